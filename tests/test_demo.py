"""The demo, as a user runs it: a short run to the end, the files it writes, and what it says to wrong arguments."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "train_lm.py"
OPS = ("rms_norm", "rope", "flash_attn", "swiglu", "linear", "cross_entropy")
STEPS = 8
QUICKENED = f"""
import runpy, sys
from triton_tutorial.interpreted import quicken

quicken()
sys.path.insert(0, {str(DEMO.parent)!r})
runpy.run_path({str(DEMO)!r}, run_name="__main__")
"""


def run_demo(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(
        filter(None, (environment.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")))
    )
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ["-c", QUICKENED] if environment.get("TRITON_INTERPRET") == "1" else [DEMO]
    return subprocess.run(
        [sys.executable, *script, "--device", "cpu", *arguments],
        env={**variables, **environment, "PYTHONPATH": path, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=500,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """Output, results.json and directory of one short run."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = run_demo("--steps", str(STEPS), "--preset", "tiny", "--backend", "aot_eager", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, json.loads((out / "results.json").read_text()), out


@pytest.fixture
def train_lm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    return pytest.importorskip("train_lm")


def test_both_models_learn_alike(demo: tuple[str, dict, Path]) -> None:
    _, results, _ = demo
    ours, plain = results["runs"]["tt"]["losses"], results["runs"]["torch"]["losses"]
    assert len(ours) == len(plain) == STEPS
    # before the first update the two differ by rounding alone; an untrained model pays ln(256) nats a byte
    assert ours[0] == pytest.approx(plain[0], abs=1e-5)
    assert ours[0] == pytest.approx(math.log(256), abs=0.3)
    assert ours[-1] < ours[0] - 1
    # eight steps amplify rounding differences little; the tolerance of a whole run is the demo's own
    assert ours == pytest.approx(plain, abs=1e-3)
    assert results["comparison"]["agree"]
    assert results["runs"]["tt"]["validation_loss"] == pytest.approx(
        results["runs"]["torch"]["validation_loss"], abs=1e-3
    )


def test_one_graph_without_breaks(demo: tuple[str, dict, Path]) -> None:
    output, results, _ = demo
    for run in results["runs"].values():
        assert (run["graphs"], run["graph_breaks"]) == (1, 0)
        assert run["tokens_per_s"] > 0
    assert results["backend"] == "aot_eager"
    assert "graph breaks" in output


@pytest.mark.parametrize("op", OPS)
def test_op_ran_forward_and_backward(demo: tuple[str, dict, Path], op: str) -> None:
    output, results, _ = demo
    named = {name: entry for name, entry in results["ops"].items() if name.startswith(op)}
    assert any(name.endswith("_fwd") or name == op for name in named), sorted(results["ops"])
    assert all(entry["calls"] > 0 and entry["path"] == "reference" for entry in named.values())
    assert all(f"tt::{name}" in output for name in named)
    # the gradient of a linear layer is two matrix products
    assert any(name.endswith("_bwd") for name in named) or (op == "linear" and "matmul" in results["ops"])


def test_says_that_a_cpu_measures_no_kernel(demo: tuple[str, dict, Path]) -> None:
    output, results, _ = demo
    assert "says nothing about the Triton kernels" in output
    assert "says nothing about the Triton kernels" in results["remark"]


def test_figure_and_sample(demo: tuple[str, dict, Path]) -> None:
    _, _, out = demo
    png = (out / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 1000
    assert height >= 600
    assert len(png) > 20_000  # an empty figure of this size has about 5 kB
    assert (out / "sample.txt").read_text(encoding="utf-8").startswith("A class definition ")


def test_one_model_alone_on_interpreted_kernels(tmp_path: Path) -> None:
    done = run_demo("--steps", "2", "--no-compare", "--prompt", "é", "--out", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"]) == ["tt"]
    assert results["comparison"] is None
    assert {entry["path"] for entry in results["ops"].values()} == {"interpreter"}
    assert results["backend"] == "eager"
    assert results["runs"]["tt"]["graph_breaks"] is None
    assert "torch.compile does not work with interpreted kernels" in " ".join(done.stdout.split())
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8").startswith("é")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "1"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--preset", "huge"], "--preset"),
        (["--dtype", "int8"], "--dtype"),
        (["--backend", "nvfuser"], "--backend"),
        (["--prompt", ""], "--prompt"),
        (["--out", str(DEMO)], "--out"),
        (["--stepz", "3"], "--stepz"),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, list) else "",
)
def test_wrong_argument_is_one_sentence(
    train_lm: ModuleType, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(train_lm.UserError, match=says) as caught:
        train_lm.main(["--device", "cpu", *arguments])
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_wrong_argument_exits_with_2() -> None:
    done = run_demo("--steps", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_lm.py: argument --steps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(train_lm: ModuleType) -> None:
    with pytest.raises(train_lm.UserError, match="no CUDA GPU; use --device cpu"):
        train_lm.choose_device("cuda")


def test_no_cpp_compiler(train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    backend, note = train_lm.choose_backend("auto", torch.device("cpu"))
    assert backend == "aot_eager"
    assert "install g++" in note
    assert "aot_eager" in note
    with pytest.raises(train_lm.UserError, match=r"install g\+\+.*--backend aot_eager"):
        train_lm.choose_backend("inductor", torch.device("cpu"))


def test_cpp_compiler_that_fails(train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("C++ compile error\n\nCommand: g++ x.cpp\n\nx.cpp:1:10: fatal error: Python.h: No such file")

    monkeypatch.setenv("CXX", sys.executable)  # something that exists
    monkeypatch.setattr(torch, "compile", fail)
    backend, note = train_lm.choose_backend("auto", torch.device("cpu"))
    assert backend == "aot_eager"
    assert "Python.h" in note
    assert "python3-dev" in note


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_extra(package: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('gone', name='{package}')\n")
    done = run_demo("--steps", "2", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"needs {package}" in done.stderr
    assert "torch-triton-ops[tutorials]" in done.stderr
