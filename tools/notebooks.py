"""Notebooks from the lessons and other percent files: python tools/notebooks.py [FOLDER]. Notebooks are never edited.

Needs nothing but Python: a percent file is cut at its `# %%` lines, and a notebook is JSON.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("tutorials/*/lesson_*.py", "tutorials/notebooks/[0-9]*.py")


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a percent file, without the header between its first two `# ---` lines."""
    body = re.sub(r"\A# ---\n.*?^# ---\n", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for mark, source in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", body, re.MULTILINE):
        markdown = "[markdown]" in mark
        lines = source.strip("\n").splitlines()
        if markdown:
            lines = [re.sub(r"^# ?", "", line) for line in lines]
        if not any(line.strip() for line in lines):
            continue
        cell: dict[str, Any] = {
            "cell_type": "markdown" if markdown else "code",
            "id": f"cell-{len(found)}",
            "metadata": {},
            "source": "\n".join(lines).splitlines(keepends=True),
        }
        found.append(cell if markdown else cell | {"execution_count": None, "outputs": []})
    return found


def notebook(text: str) -> dict[str, Any]:
    """A percent file as a notebook of format 4.5."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells(text), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(f for pattern in SOURCES for f in ROOT.glob(pattern)):
        target = folder / f"{file.stem}.ipynb"
        target.write_text(json.dumps(notebook(file.read_text(encoding="utf-8")), indent=1) + "\n", encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "notebooks")
