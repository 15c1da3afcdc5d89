"""The wheel and the sdist: built, looked into, installed into an empty environment, an op called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from a copy of the tracked files."""
    source = tmp_path_factory.mktemp("source")
    files = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    )
    for name in filter(None, files):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


PACKAGES = {"torch_triton_ops", "triton_tutorial"}


def test_wheel_carries_both_packages_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert "torch_triton_ops/op_registry.yaml" in names
    assert "torch_triton_ops/py.typed" in names
    assert "torch_triton_ops/ops/rms_norm.py" in names
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == PACKAGES
    text = zipfile.ZipFile(built[0]).read("torch_triton_ops/op_registry.yaml").decode()
    assert text == (ROOT / "op_registry.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["wheel", "sdist"])
def test_every_lesson_exercise_and_record_is_carried(built, where):
    """What `triton_tutorial/lessons` and `triton_tutorial/bench` link to, as files."""
    if where == "wheel":
        names = set(zipfile.ZipFile(built[0]).namelist())
    else:
        with tarfile.open(built[1]) as archive:
            names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile() and "/" in m.name}
    tracked = subprocess.run(["git", "ls-files", "tutorials", "bench"], cwd=ROOT, capture_output=True, text=True)
    carried = r"^tutorials/.*/.*\.(py|yaml|json|png)$|^bench/[^/]*\.py$|^bench/results/[^/]*\.json$"
    wanted = {
        name.replace("tutorials/", "triton_tutorial/lessons/", 1)
        if name.startswith("tutorials/")
        else f"triton_tutorial/{name}"
        for name in tracked.stdout.splitlines()
        if (ROOT / name).exists() and re.search(carried, name)
    }
    assert "triton_tutorial/lessons/beginner/lesson_01_gpu_fundamentals.py" in wanted
    assert "triton_tutorial/bench/results/nvidia_h200.json" in wanted
    assert wanted <= names, sorted(wanted - names)


def test_sdist_carries_the_registry_as_a_file(built):
    with tarfile.open(built[1]) as archive:
        members = {m.name.split("/", 1)[1]: m for m in archive.getmembers() if "/" in m.name}
    assert members["op_registry.yaml"].isfile()
    assert "torch_triton_ops/op_registry.yaml" in members


def test_installed_wheel_runs_an_op_and_the_command(built, tmp_path):
    """An empty environment that has only our wheel, and borrows torch, triton, PyYAML, typer and rich from this one."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(built[0])], check=True, capture_output=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # our own editable install must not be what is imported: borrow by name
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for found in Path(sysconfig.get_path("purelib")).iterdir():
        if (
            not found.name.startswith(("torch_triton_ops", "triton_tutorial", "__editable__"))
            and found.suffix != ".pth"
        ):
            (borrowed / found.name).symlink_to(found)
    (Path(site) / "borrowed.pth").write_text(str(borrowed))
    code = (
        "import torch, torch_triton_ops; x = torch.randn(4, 8, requires_grad=True);"
        "torch.ops.tt.rms_norm(x, torch.ones(8)).sum().backward();"
        "print(torch_triton_ops.__file__, x.grad.shape)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    assert str(environment) in done.stdout
    assert "torch.Size([4, 8])" in done.stdout

    clean["TRITON_TUTORIAL_HOME"] = str(tmp_path / "home")
    command = environment / "bin" / "triton-tutorial"
    done = subprocess.run([command, "list"], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    assert "GPU fundamentals" in done.stdout
    answer = zipfile.ZipFile(built[0]).read("triton_tutorial/lessons/exercises/lesson_01/solutions/ex1_mask.py")
    subprocess.run([command, "next"], check=True, capture_output=True, cwd=tmp_path, env=clean)
    subprocess.run([command, "check", "1", "ex1"], capture_output=True, cwd=tmp_path, env=clean)
    (tmp_path / "home" / "exercises" / "lesson_01" / "ex1_mask.py").write_bytes(answer)
    checked = [command, "check", "1", "ex1", "--device", "cpu"]
    done = subprocess.run(checked, capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lesson 1 ex1: passed" in done.stdout
    done = subprocess.run([command, "roofline"], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "roofline.png").is_file()
