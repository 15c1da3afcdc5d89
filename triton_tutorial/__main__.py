"""`triton-tutorial` and `python -m triton_tutorial`."""

from __future__ import annotations

import sys


def main() -> int:
    """The command; without its packages, one sentence with the fix."""
    try:
        from triton_tutorial import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "yaml"):
            raise
        message = f"triton-tutorial: {error.name} is not installed; install it with: pip install 'torch-triton-ops[tutorials]'"
        print(message, file=sys.stderr)
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
