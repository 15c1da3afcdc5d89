"""What lessons are made of: kernels interpreted in a child process, address pictures, rungs, records, figures."""

from __future__ import annotations

import fcntl
import json
import linecache
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_tutorial import catalog, charts, interpreted, pictures
from triton_tutorial import lesson as framework
from triton_tutorial.lesson import Figure, Lesson, LessonError

ROOT = Path(__file__).resolve().parents[1]
TWO = tl.constexpr(2)


@triton.jit
def _sum_of(x):
    return tl.sum(x, axis=0) * TWO


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    y = tl.load(y_ptr + offs_n, mask=mask_n)
    tl.store(out_ptr + offs_n, x + y, mask=mask_n)


@triton.jit
def maskless_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    x = tl.load(x_ptr + offs_n)
    y = tl.load(y_ptr + offs_n)
    tl.store(out_ptr + offs_n, x + y)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, sum_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])  # (BLOCK, BLOCK)
        b = tl.load(b_ptr + (k + offs[:, None]) * BLOCK + offs[None, :])
        acc += tl.dot(a, b)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)
    tl.store(sum_ptr, _sum_of(_sum_of(acc)))


@triton.jit
def _quadruple(x):
    return _sum_of(x + tl.zeros_like(x)) * TWO


@triton.jit
def shared_helper_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, _quadruple(x) - _sum_of(x))


@triton.jit
def box_kernel(x_desc, out_desc, BLOCK: tl.constexpr):
    out_desc.store([tl.program_id(0) * BLOCK, 0], x_desc.load([tl.program_id(0) * BLOCK, 0]) * 2)


def add(x: torch.Tensor, y: torch.Tensor, BLOCK_N: int = 32) -> torch.Tensor:
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), BLOCK_N),)](x, y, out, x.numel(), BLOCK_N=BLOCK_N)
    return out


def maskless_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    maskless_kernel[lambda meta: (triton.cdiv(meta["N"], meta["BLOCK_N"]),)](x, y, out, x.numel(), BLOCK_N=32)
    return out


def half_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    add_kernel[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel() // 2, BLOCK_N=32)
    return out


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lesson:
    """Lesson 1 without its script, on the CPU, with a record that belongs to no machine."""
    row = {"table": "add", "correct": True}
    rows = [
        row | {"name": "torch", "case": "2^20", "us": 20.0, "tbps": 2.0, "fraction": 0.5, "baseline": True},
        row | {"name": "torch", "case": "2^27", "us": 40.0, "tbps": 2.0, "fraction": 0.5, "baseline": True},
        row | {"name": "blocks", "case": "2^20", "us": 12.0, "tbps": 3.0, "fraction": 0.75, "registers": 20},
        row | {"name": "blocks", "case": "2^27", "us": 10.0, "tbps": 4.0, "fraction": 1.0, "registers": 20},
    ]
    header = {"gpu": "Some GPU", "torch": "2", "triton": "3", "date": "2026-01-02T03:04", "copy_tbps": 4.0}
    monkeypatch.setattr(framework, "_read_record", lambda info: {"header": header, "rows": rows})
    return Lesson(1, ["--device", "cpu", "--plot", str(tmp_path)])


def problem(lesson: Lesson) -> framework.Problem:
    return lesson.problem(
        "add",
        reference=lambda x, y: x + y,
        make=lambda n: (lesson.randn(n), lesson.randn(n)),
        check=[(100,), (1,)],
        timed=[(2**20,), (2**27,)],
        bytes=lambda x, y: 12 * x.numel(),
    )


def test_interpreted_kernels_write_back_and_may_call_others() -> None:
    interpreted.install()
    whole = torch.randn(3, 50)
    add_kernel[(2,)](whole[0], whole[1], whole[2], 50, BLOCK_N=32)  # three views of one storage
    assert torch.equal(whole[2], whole[0] + whole[1])
    a, b, c, total = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16(), torch.empty(16, 16), torch.empty(1)
    product_kernel[(1,)](a, b, c, total, 32, BLOCK=16)
    torch.testing.assert_close(c, a.float() @ b.float())
    # the sum in another order: within some roundings of what is added up, however much of it cancels
    torch.testing.assert_close(total[0], 4 * c.sum(), rtol=0, atol=4e-6 * c.abs().sum().item())
    shared_helper_kernel[(1,)](torch.ones(16), total, BLOCK=16)  # _sum_of again, by itself and inside another
    assert total[0] == 32
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # bf16 is rounded, as on a GPU
        x, y = torch.randn(2, 1000).to(dtype)
        x[:4] = torch.tensor([float("inf"), float("nan"), 0.0, 3e38]).to(dtype)
        assert torch.equal(interpreted.call_op("tt::vector_add", x, y).nan_to_num(7), (x + y).nan_to_num(7))


def test_descriptors_are_interpreted_and_recorded() -> None:
    interpreted.install()
    x, out = torch.randn(2, 40, 16)
    with interpreted.tracing() as traces:
        box_kernel[(3,)](*(TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, out)), BLOCK=16)
    assert torch.equal(out, 2 * x)
    assert {(a.kind, a.tensor) for a in traces[0].accesses} == {("load", "x"), ("store", "out")}
    with interpreted.recorded(90) as launches:
        box_kernel[(3,)](*(TensorDescriptor.from_tensor(t.to("meta"), [16, 16]) for t in (x, out)), BLOCK=16)
    assert [type(a).__name__ for a in launches[0].args] == ["Descriptor", "Descriptor"]


def test_access_outside_a_tensor_is_named() -> None:
    interpreted.install()
    x, y = torch.randn(100), torch.randn(100)
    with pytest.raises(
        interpreted.OutOfBounds, match=r"program 3 reads element 100 of x, which has 100 \(28 such lanes\)"
    ):
        maskless_add(x, y)
    with interpreted.tracing(bounds=False) as traces:
        assert torch.equal(maskless_add(x, y), x + y)
    assert [a.tensor for a in traces[0].accesses[-3:]] == ["x", "y", "out"]
    with pytest.raises(interpreted.InterpreterError, match="power of 2"):
        add(x, x, BLOCK_N=33)


def test_cells_of_a_notebook_share_a_name_and_lines() -> None:
    interpreted.install()
    x = torch.randn(20)
    for cell, sign in enumerate("+-*"):
        text = f"""@triton.jit
def cell_kernel(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs_n, mask=offs_n < N)
    tl.store(out_ptr + offs_n, x {sign} x, mask=offs_n < N)
"""
        file, scope = f"<cell {cell // 2}>", {"triton": triton, "tl": tl}
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), scope)
        out = torch.empty_like(x)
        scope["cell_kernel"][(1,)](x, out, 20, BLOCK_N=32)
        assert torch.equal(out, eval(f"x {sign} x"))


def test_notebooks_have_the_lesson_in_cells() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
    made = tool["notebook"](catalog.find(["1"]).file.read_text(encoding="utf-8"))["cells"]
    assert "".join(made[0]["source"]).startswith("# Lesson 1")
    assert "".join(made[-1]["source"]) == "lesson.finish()"
    assert {c["cell_type"] for c in made} == {"markdown", "code"}


def test_picture(tmp_path: Path) -> None:
    interpreted.install()
    with interpreted.tracing() as traces:
        add(torch.randn(100), torch.randn(100))
    text = pictures.describe(traces)
    assert "add_kernel, grid (4,)" in text
    assert "program 3: elements 96..99" in text
    assert "400 bytes asked for, 400 distinct (each once), 28 lanes masked off" in text
    with interpreted.tracing() as more:
        half_add(torch.randn(100), torch.randn(100))  # two programs, one of which has work for half of its lanes
        add_kernel[(5, 2)](torch.randn(100), torch.randn(100), torch.empty(100), 100, BLOCK_N=32)  # twice, and one idle
    for i, _ in enumerate(more):
        pictures.draw(more, tmp_path / f"more{i}.png", "addition", launch=i)
    for view in pictures.VIEWS:
        pictures.draw(traces, tmp_path / f"{view}.png", "addition", view=view)
        assert (tmp_path / f"{view}.png").stat().st_size > 5000


def test_rungs_tables_and_figures(lesson: Lesson, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = problem(lesson)
    p.rung("blocks", add, add_kernel)
    p.ladder("Addition")
    said = capsys.readouterr().out
    assert "blocks: correct," in said
    assert "registers and 0 bytes of spills on sm_90" in said
    assert "4.00 TB/s" in said
    assert "Recorded on Some GPU" in said
    assert {f.name for f in tmp_path.glob("*.png")} == {"lesson_01_add.png", "lesson_01_add_sizes.png"}
    ratio = lesson.figure("add", "torch", "us") / lesson.figure("add", "blocks", "us")
    assert f"{ratio:.1f} {lesson.figure('add', 'nothing'):.2f}" == "4.0 (not recorded yet)"
    assert f"{2 / Figure(4.0):.1f} {2 * Figure(None)}" == "0.5 (not recorded yet)"
    assert not lesson.failures


def test_wrong_kernels_are_noticed(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    p = problem(lesson)
    p.rung("half", half_add, add_kernel)
    assert len(lesson.failures) == 1
    assert "50 of 100 elements differ; the first is [50]: 0 instead of" in lesson.failures[0]
    found = p.bug("no mask", maskless_add, maskless_kernel, 100)
    assert "writes element 100 of out" in found
    found = p.bug("half", half_add, add_kernel, 100)
    assert "the first is [50]" in found
    assert "no program wrote it" in found
    with pytest.raises(LessonError, match="was not noticed"):
        p.bug("none", add, add_kernel, 100)
    lesson.notebook = True
    with pytest.raises(LessonError, match="1 checks failed"):
        lesson.finish()


def test_a_rung_is_a_small_step(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framework, "MAX_CHANGED", 3)
    p = problem(lesson)
    p.rung("blocks", add, add_kernel)
    with pytest.raises(LessonError, match="allowed: 3"):
        p.rung("another", maskless_add, maskless_kernel)


def test_registration_and_compilation(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    p = problem(lesson)
    op = p.register(
        "framework_add(Tensor x, Tensor y) -> Tensor",
        lambda x, y: add(x, y),
        fake=lambda x, y: torch.empty_like(x),
        backward=lambda ctx, dout: (dout, dout),
        shipped="vector_add",
    )
    lesson.compiled(
        "model",
        make=p.make,
        ours=lambda x, y: torch.relu(op(x, y)),
        eager=lambda x, y: torch.relu(x + y),
        node="tt_lesson.framework_add",
        check=(100,),
    )
    said = capsys.readouterr().out
    assert not lesson.failures
    assert "the same bits" in said
    assert "torch.ops.tt_lesson.framework_add.default" in said
    p.register("framework_wrong(Tensor x, Tensor y) -> Tensor", add, fake=lambda x, y: torch.empty_like(x)[:1])
    assert any("test_faketensor" in failure for failure in lesson.failures)


class FakeTimer:
    """Stands for a GPU's: calls once, and says 10 us."""

    method = "graph"

    def __init__(self, prepare: Any, budget_ms: float) -> None:
        self.outputs = [call() for call in prepare()]

    def measure(self) -> float:
        return 0.01

    def release(self) -> None:
        self.outputs = []


def test_a_measuring_run(lesson: Lesson, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """What a run on a GPU does, with invented times."""
    from triton_tutorial.bench import timing

    monkeypatch.setattr(timing, "make_timer", lambda prepare, budget: (FakeTimer(prepare, budget), None))
    monkeypatch.setattr(timing, "rotation_target", lambda: 1000)
    monkeypatch.setattr(timing, "free_bytes", lambda: 10**6)
    lesson.timing = True
    lesson.header |= {"gpu": "Some GPU", "copy_tbps": 4.0, "matmul_tflops": 700.0}
    p = problem(lesson)
    p.timed = {"60": (60,), "100": (100,)}
    p.baseline("torch")
    p.rung("blocks", add, add_kernel)
    p.rung("half", half_add, add_kernel)
    p.ladder("Addition")
    assert p.autotune(add, [{"BLOCK_N": 32}, {"BLOCK_N": 64}]) == {"BLOCK_N": 32}
    lesson.measure("strides", "every second", lambda: lambda: torch.ones(8)[::2].clone(), 32, case="8")
    lesson.compiled(
        "model",
        p.make,
        torch.mul,
        torch.mul,
        "mul",
        (3,),
        (5,),
        bytes=lambda x, y: 60,
        others={"tt, compiled": torch.mul},
    )
    times = [(r["table"], r["name"], r["case"]) for r in lesson.rows if "us" in r]
    assert [t for t in times if t[0] == "add"] == [("add", n, c) for n in ("torch", "blocks") for c in ("60", "100")]
    assert ("add, autotuning", "BLOCK_N=64", "100") in times
    assert ("strides", "every second", "8") in times
    assert [t[1] for t in times if t[0] == "model"] == [
        "torch, eager", "torch, compiled", "ours, eager", "ours, compiled", "tt, compiled",
    ]  # fmt: skip
    assert lesson.figure("add", "blocks", "us").value == 10.0
    assert lesson.figure("add", "blocks", case="100").value == pytest.approx(12 * 100 / 10e-6 / 1e12, abs=1e-4)
    assert "half" in lesson.failures[0]
    assert "10.0 us" in capsys.readouterr().out


def test_a_figure_that_cannot_be_true_is_refused(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that does nothing, or whose bytes come from a cache, does not become a speed."""
    from triton_tutorial.bench import timing

    monkeypatch.setattr(timing, "make_timer", lambda prepare, budget: (FakeTimer(prepare, budget), None))
    monkeypatch.setattr(timing, "rotation_target", lambda: 1000)
    monkeypatch.setattr(timing, "free_bytes", lambda: 10**6)
    lesson.timing = True
    lesson.header |= {"gpu": "Some GPU", "copy_tbps": 4.0, "matmul_tflops": 700.0}

    def calls() -> Any:
        return lambda: torch.ones(8)

    lesson.measure("t", "true", calls, 47_000_000)  # in 10 us: 4.7 TB/s
    lesson.measure("t", "false", calls, 49_000_000)
    lesson.measure("t", "cached", calls, 80_000_000, cached=True)
    lesson.measure("t", "flops", calls, 1000, 9_000_000_000)
    monkeypatch.setattr(FakeTimer, "measure", lambda self: 4e-6)
    lesson.measure("t", "nothing", calls)
    rows = {row["name"]: row for row in lesson.rows}
    assert rows["true"]["fraction"] == 1.175
    assert rows["cached"]["tbps"] == 8.0
    assert rows["cached"]["cached"]
    assert "fraction" not in rows["cached"]
    assert [name for name, row in rows.items() if "error" in row] == ["false", "flops", "nothing"]
    assert all("us" not in rows[name] for name in ("false", "flops", "nothing"))
    assert "4.90 TB/s" in lesson.failures[0]
    assert "measured limit" in lesson.failures[0]
    assert "900 TFLOP/s" in lesson.failures[1]
    assert "nothing was run" in lesson.failures[2]
    assert len(lesson.failures) == 3
    # a rung and a baseline take the same way
    p = problem(lesson)
    p.timed = {"100": (100,)}
    p.baseline("torch")
    assert "nothing was run" in lesson.failures[3]
    assert lesson.figure("add", "torch", "us").value is None


RECORDS = sorted((ROOT / "tutorials" / "results").glob("*/lesson_*.json"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_recorded_figures_can_be_true(file: Path) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["failures"] == []
    assert {"gpu", "torch", "triton", "date", "copy_tbps", "matmul_tflops"} <= record["header"].keys()
    for row in record["rows"]:
        assert "error" not in row, row
        assert "us" not in row or framework._doubt(row) == "", row
        assert row.get("correct", True), row


def test_figures_compute_and_may_be_missing() -> None:
    two, none = Figure(2.0), Figure(None)
    assert f"{100 * (two / 4 - 0.25):.0f} {1 - two:.0f} {two - two:.0f}" == "25 -1 0"
    for missing in (none / two, two / none, 3 / none, none * 2, two - none, none - two, 1 - none):
        assert f"{missing:.2f}" == "(not recorded yet)"


def test_lessons_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    mine = framework._Turn(str(tmp_path / "lock"))
    with open(tmp_path / "lock", "a") as theirs:
        with pytest.raises(BlockingIOError):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with mine.left():
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(theirs, fcntl.LOCK_UN)
        with pytest.raises(BlockingIOError):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine.end()
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with framework._Turn("").left():
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--json", "{file}/x/r.json"], "--json: cannot write to"),
        (["--json", "{folder}"], "is a folder; give a file"),
        (["--plot", "{file}"], "--plot: cannot write to"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_options_are_refused_before_the_lesson_runs(options: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as status:
        Lesson(1, [o.format(file=tmp_path / "file", folder=tmp_path) for o in options])
    assert status.value.code == 2
    assert said in capsys.readouterr().err


def test_record(tmp_path: Path) -> None:
    lesson = Lesson(1, ["--check-only", "--device", "cpu", "--json", str(tmp_path / "r.json")])
    problem(lesson).rung("blocks", add, add_kernel)
    lesson.finish()
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["failures"] == []
    assert record["rows"] == [{"table": "add", "name": "blocks", "case": "", "correct": True}]
    assert "gpu" not in record["header"]  # the CPU measures nothing


def test_prose_is_every_markdown_cell_without_the_header() -> None:
    cells = framework._prose(catalog.find(["1"]).file)
    assert cells[0][1].startswith("# Lesson 1")
    assert not any("prerequisites:" in text or "import torch" in text for _, text in cells)


def test_records_come_back_from_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool: dict[str, Any] = runpy.run_path(str(ROOT / "tutorials" / "record.py"))
    monkeypatch.setitem(tool["take_over"].__globals__, "RESULTS", tmp_path / "results")
    (tmp_path / "lesson_01.json").write_text(json.dumps({"header": {"gpu": "NVIDIA H200"}, "rows": []}))
    (tmp_path / "lesson_01_add.png").write_bytes(b"png")
    assert tool["take_over"](tmp_path, ["lesson_01"]) == tmp_path / "results" / "h200"
    assert {f.name for f in (tmp_path / "results" / "h200").iterdir()} == {"lesson_01.json", "lesson_01_add.png"}


def test_bars_and_lines_of_no_colour_left(tmp_path: Path) -> None:
    header = {"gpu": "Some GPU", "torch": "2", "triton": "3", "date": "2026-01-02"}
    series = {f"s{i}": [("a", 1.0 + i), ("b", 2.0 + i)] for i in range(12)}
    charts.lines(series, header, "many", tmp_path / "many.png", baselines=["s0", "s1"])
    charts.lines({"wide": [("2^4", 0.001), ("2^9", 4.0)]}, header, "log", tmp_path / "log.png", limit=4.2)
    charts.bars([{"name": "one", "us": 1.0}], header, "one", tmp_path / "one.png", measure="us")
    rows = [
        {"name": n, "tbps": 1.0, "fraction": 0.002, "baseline": n == "torch"} for n in ("torch", "torch.ops.tt.x", "y")
    ]
    charts.panels({"8x8": rows, "1x64": rows[1:]}, header, "panels", tmp_path / "panels.png", limit=4.0)
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert charts._places(["2^4", "2^9"]) == [4, 9]
    assert charts._places(["2^4", "x"]) == [0, 1]
