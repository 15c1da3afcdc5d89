"""Register the losses of my_losses.yaml and prove each. Run it from anywhere: python path/to/check.py"""

from __future__ import annotations

import sys
from pathlib import Path

from torch_triton_ops import load_registry
from torch_triton_ops.testing import check_op


def main() -> int:
    reports = [check_op(spec.qualname) for spec in load_registry(Path(__file__).with_name("my_losses.yaml"))]
    for report in reports:
        print(report)
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
