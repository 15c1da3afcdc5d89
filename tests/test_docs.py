"""README and CONTRIBUTING: their tables, code blocks, commands and links are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/design.md", "bench/README.md", "examples/my_op/README.md"]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_tables_are_those_of_the_registry_and_the_record():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == tables.filled(text), "run: python tools/tables.py"


@pytest.mark.parametrize("block", blocks("README.md", "python"), ids=lambda b: b.strip().splitlines()[0][:40])
def test_readme_code_runs(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", block],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets, named - targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert ((ROOT / document).parent / link).exists(), f"{document}: {link}"


def test_ci_runs_the_readmes_test_command():
    assert "make test" in "\n".join(blocks("README.md", "sh"))
    assert re.search(r"^exec make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def test_commands_of_the_makefile_parse():
    """Every target's recipe is what make would run (a dry run of all of them)."""
    for target in ("demo", "test", "test-gpu", "bench", "lint", "gpu-status"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_module_has_a_docstring():
    for file in (ROOT / "torch_triton_ops").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not text.strip() or text.startswith('"""'), file
