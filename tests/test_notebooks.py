"""The notebooks run, cell by cell, on the CPU, and say what they promise."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials" / "notebooks").glob("[0-9]*.py"))

# Runs the code cells of a notebook in one namespace, as Jupyter does; a cell that fails is named.
RUNNER = """
import json, linecache, sys, traceback
cells = [c for c in json.load(open(sys.argv[1]))["cells"] if c["cell_type"] == "code"]
namespace = {"__name__": "__main__"}
for i, cell in enumerate(cells):
    name, source = f"<cell {i}>", "".join(cell["source"])
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # Triton reads a kernel's source
    exec(compile(source, name, "exec"), namespace)
print("cells run:", len(cells))
"""


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(source: Path, tmp_path: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
    notebook = tmp_path / f"{source.stem}.ipynb"
    notebook.write_text(json.dumps(tool["notebook"](source.read_text(encoding="utf-8"))), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(notebook)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "cells run:" in done.stdout


def test_there_are_notebooks() -> None:
    assert [file.name[:2] for file in NOTEBOOKS] == ["06", "07"]
