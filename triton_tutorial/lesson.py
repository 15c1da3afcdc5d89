"""What a lesson script imports: everything that is not teaching. How to write a lesson with it: tutorials/AUTHORING.md.

    lesson = Lesson(1)                                   # arguments, device, record, prose
    add = lesson.problem("vector_add", reference=..., make=..., check=..., timed=..., bytes=...)
    add.picture(...); add.rung(...); add.ladder()        # addresses; the kernel step by step; the table
    add.bug(...); add.register(...); add.autotune(...)
    lesson.compiled(...)                                 # inside a model, with torch.compile
    lesson.finish()

On the CPU every kernel runs in Triton's interpreter, in a process of its own (`interpreted`); times come from the record
of a GPU run, `tutorials/results/h200/lesson_NN.json`, and never from the interpreter. On CUDA this machine is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import fcntl
import functools
import inspect
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import offline, registry
from triton_tutorial import catalog, interpreted, pictures

Row = dict[str, Any]

MAX_CHANGED = 15  # lines a rung
MAX_FRACTION = 1.2  # of the measured limit: what is faster did not do the work, or did not go to memory
MIN_US = 0.2  # a launch takes longer than that: what is faster launched nothing
RECORD = "h200"  # the folder of records shown where nothing can be measured
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}


class LessonError(RuntimeError):
    """A kernel of the lesson is wrong, or the lesson is: one sentence that says which."""


class Figure:
    """A recorded number that may be missing: `f"{lesson.figure(...):.2f} TB/s"` reads "(not recorded yet)" then."""

    def __init__(self, value: float | None) -> None:
        self.value = value

    def __format__(self, form: str) -> str:
        return "(not recorded yet)" if self.value is None else format(self.value, form)

    def __bool__(self) -> bool:
        return self.value is not None

    def __truediv__(self, other: Figure | float) -> Figure:
        divisor = other.value if isinstance(other, Figure) else other
        return Figure(self.value / divisor if self.value is not None and divisor else None)

    def __rtruediv__(self, other: float) -> Figure:
        return Figure(other / self.value if self.value else None)

    def __mul__(self, factor: float) -> Figure:
        return Figure(None if self.value is None else self.value * factor)

    __rmul__ = __mul__

    def __sub__(self, other: Figure | float) -> Figure:
        less = other.value if isinstance(other, Figure) else other
        return Figure(None if self.value is None or less is None else self.value - less)

    def __rsub__(self, other: float) -> Figure:
        return Figure(None if self.value is None else other - self.value)


# --------------------------------------------------------------------------------------------------------------------
# The lesson
# --------------------------------------------------------------------------------------------------------------------


class _Turn:
    """This process's turn on the GPU, where several lessons are recorded at once: all its work there is done in it.

    path: a file that they lock; without one, it is always this process's turn.
    """

    def __init__(self, path: str) -> None:
        self.file = open(path, "a") if path else None  # noqa: SIM115 - held as long as the lesson runs
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def end(self) -> None:
        """Let the next one in; a forked compile worker may hold the file open for longer."""
        if self.file is not None:
            torch.cuda.synchronize()
            fcntl.flock(self.file, fcntl.LOCK_UN)
            self.file = None

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Inside, another lesson may use the GPU: this one only compiles or interprets."""
        if self.file is None:
            yield
            return
        torch.cuda.synchronize()
        fcntl.flock(self.file, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_EX)


class Lesson:
    """One run of one lesson.

    device: where the kernels run, torch.device. gpu: whether that is CUDA. timing: whether this run measures.
    rows: what this run found; `figure` reads them, or the record on the CPU.
    """

    def __init__(self, number: int, argv: Sequence[str] | None = None) -> None:
        self.info = catalog.find([str(number)])
        self.notebook = "ipykernel" in sys.modules
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        self.script = main is not None and Path(main).resolve() == self.info.file
        self.options = _arguments(self.info, argv if argv is not None else sys.argv[1:] if self.script else [])
        self.device = _device(self.options.device)
        self.gpu = self.device.type == "cuda"
        self.quiet = self.options.check_only
        self.timing = self.gpu and not self.options.check_only
        self.plots = Path(self.options.plot) if self.options.plot else None
        self.rows: list[Row] = []
        self.problems: list[Problem] = []
        self.failures: list[str] = []
        self.record = _read_record(self.info)
        self.header: Row = {"lesson": self.info.number} | _versions(self.gpu) | {"seed": self.options.seed}
        self._cells = _prose(self.info.file)
        self._printed = 0
        self._out = _Output(self.notebook)
        torch.manual_seed(self.options.seed)
        interpreted.install()
        interpreted.start()  # on a GPU too: for the address picture and the bug
        self.turn = _Turn(os.environ.get("TRITON_TUTORIAL_GPU_LOCK", "") if self.timing else "")
        if self.timing:
            self._measure_limits()
        self._tell()
        if not self.quiet:
            self._out.note(self._mode())

    def _mode(self) -> str:
        if self.gpu:
            return f"Running on {self.header['gpu']}; this run measures it."
        if self.record is None:
            return "No GPU: correctness only, in Triton's interpreter. No speeds are recorded for this lesson yet."
        return f"No GPU: correctness only; speeds below were recorded on {self._machine(self.record['header'])}."

    @staticmethod
    def _machine(header: Row) -> str:
        return f"{header['gpu']} (torch {header['torch']}, triton {header['triton']}, {header['date'][:10]})"

    def _measure_limits(self) -> None:
        from triton_tutorial.bench import timing

        self.header |= {
            "copy_tbps": round(timing.copy_tbps(), 4),
            "matmul_tflops": round(timing.matmul_tflops(), 1),
            "size": self.options.size,
        }

    # -- inputs ---------------------------------------------------------------------------------------------------------

    def size(self, small: Any, full: Any) -> Any:
        """`full`, or `small` with --size small on a GPU; elsewhere the recorded sizes are the full ones."""
        return small if self.options.size == "small" and self.gpu else full

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal random numbers on the current device."""
        return torch.randn(shape, device=self.device, dtype=dtype)

    @contextlib.contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Inside, `device` is the CPU and kernels are interpreted, on any machine."""
        device, gpu = self.device, self.gpu
        self.device, self.gpu = torch.device("cpu"), False
        try:
            with self.turn.left():
                yield
        finally:
            self.device, self.gpu = device, gpu

    def problem(self, name: str, **description: Any) -> Problem:
        """What a ladder of kernels computes; see `Problem`."""
        problem = Problem(self, name, **description)
        self.problems.append(problem)
        return problem

    # -- prose ----------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A paragraph with figures in it (`figure`), as Markdown."""
        self._tell()
        if not self.quiet:
            self._out.markdown(textwrap.dedent(text).strip())

    def predict(self, question: str) -> None:
        """A question to answer before reading on."""
        self._tell()
        if not self.quiet:
            self._out.panel("Predict first", textwrap.dedent(question).strip())

    def answer(self, text: str) -> None:
        """The answer to the question."""
        self._tell()
        if not self.quiet:
            self._out.panel("Answer", textwrap.dedent(text).strip())

    def _tell(self) -> None:
        """In a terminal, print the Markdown cells above the line of the lesson that runs now."""
        if self.quiet or not self.script:
            return
        frame = inspect.currentframe()
        line = 0
        while frame is not None:
            if frame.f_code.co_name == "<module>" and Path(frame.f_code.co_filename) == self.info.file:
                line = frame.f_lineno
            frame = frame.f_back
        self._tell_until(line)

    def _tell_until(self, line: float) -> None:
        while self._printed < len(self._cells) and self._cells[self._printed][0] < line:
            self._out.markdown(self._cells[self._printed][1])
            self._printed += 1

    # -- figures --------------------------------------------------------------------------------------------------------

    def results(self) -> tuple[list[Row], Row] | None:
        """Rows and header with times in them: this run's on CUDA, else the record's; None if there is neither."""
        if self.timing:
            return self.rows, self.header
        return (self.record["rows"], self.record["header"]) if self.record is not None else None

    def figure(self, table: str, name: str, measure: str = "tbps", case: str | None = None) -> Figure:
        """A number of `results()`: the row `name` of `table`, at `case` or the last case there.

        measure: tbps, tflops, us, fraction; of a row, also registers, spilled, shared.
        """
        found = self.results()
        rows = [] if found is None else _select(found[0], table, name, case)
        value = rows[-1].get(measure) if rows else None
        return Figure(None if value is None else float(value))

    def limit(self, measure: str = "copy_tbps") -> Figure:
        """This GPU's measured limit, or the recorded one's: copy_tbps or matmul_tflops."""
        found = self.results()
        return Figure(None if found is None else found[1].get(measure))

    def measure(
        self,
        table: str,
        name: str,
        calls: Callable[[], Callable[[], Any]],
        bytes: int = 0,
        flops: int = 0,
        case: str = "",
        baseline: bool = False,
        cached: bool = False,
        **more: Any,
    ) -> None:
        """Time something that is no rung, on CUDA only. `calls()` makes fresh inputs and returns a closure over them.

        It returns its output tensors. bytes, flops: of one call. cached: its bytes are meant to come from a cache, so they
        have no fraction of the memory's limit. more: further columns of the row.
        """
        self._tell()
        if self.timing:
            row = {"table": table, "name": name, "case": case, **({"baseline": True} if baseline else {}), **more}
            row |= {"cached": True} if cached else {}
            try:
                self.rows.append(row | self._time(calls, bytes, flops, cached))
            except Exception as error:
                self._fail(f"{table}: {name}: {_one_line(error)}", row | {"error": _one_line(error)})

    def _time(self, calls: Callable[[], Callable[[], Any]], nbytes: int, flops: int, cached: bool = False) -> Row:
        from triton_tutorial.bench import timing

        sets = timing.rotation_count(nbytes, timing.rotation_target(), timing.free_bytes()) if nbytes else 2

        def prepare() -> list[Callable[[], Sequence[torch.Tensor]]]:
            each = [calls() for _ in range(sets)]
            return [functools.partial(_outputs, call) for call in each]

        rounds, budget = (7, 15.0) if self.options.bench else (3, 10.0)
        timer, reason = timing.make_timer(prepare, budget)
        times = [timer.measure() for _ in range(rounds)]
        row = _rate(statistics.median(times), nbytes, flops, self.header["copy_tbps"], self.header["matmul_tflops"])
        row |= {"us_low": round(1e3 * min(times), 3), "us_high": round(1e3 * max(times), 3)}
        if timer.method != "graph":
            row |= {"method": timer.method} | ({"why": reason} if reason else {})
        timer.release()
        torch.cuda.empty_cache()  # what is cached is not free: the next timer would rotate through fewer inputs
        if cached:
            row.pop("fraction", None)
        if doubt := _doubt(row):
            raise LessonError(doubt)
        return row

    def table(
        self,
        table: str,
        title: str = "",
        columns: Sequence[str] = ("us", "rate", "fraction"),
        cases: Sequence[str] = (),
    ) -> None:
        """Print the rows of `table` (at `cases`), measured here or recorded. Columns: us, rate, fraction, or any of a row."""
        self._tell()
        if self.quiet:
            return
        found = self.results()
        if found is None:
            self._out.note(f"{title or table}: no speeds recorded yet.")
            return
        rows = [r for r in found[0] if r["table"] == table and (not cases or r["case"] in cases)]
        if not rows:
            self._out.note(f"{title or table}: nothing recorded yet.")
            return
        heads = ["", *(["size"] if len({r["case"] for r in rows}) > 1 else []), *(_HEADS.get(c, c) for c in columns)]
        body = [[r["name"], *([r["case"]] if "size" in heads else []), *(_cell(r, c) for c in columns)] for r in rows]
        self._out.table(title or table, heads, body)
        if "fraction" in columns and any(r.get("fraction", 0) > 1 and "tflops" not in r for r in rows):
            self._out.note(
                "Above 100 %: the limit is a copy's, half of whose bytes are writes; reads alone are faster."
            )
        if not self.timing:
            self._out.note(f"Recorded on {self._machine(found[1])}.")

    def chart(
        self,
        table: str,
        title: str,
        name: str = "",
        measure: str = "tbps",
        kind: str = "bars",
        case: str | None = None,
        limit: bool = True,
        xlabel: str = "",
    ) -> None:
        """With --plot, draw the rows of `table` as lesson_NN_<name or table>.png.

        kind: "bars" (the rows at `case`, or at the last one), "lines" (a line for each name over the cases) or "panels" (bars
        for each case, for cases that are no series).
        """
        from triton_tutorial import charts

        self._tell()
        found = self.results()
        if self.quiet or found is None:
            return
        rows = [r for r in found[0] if r["table"] == table and r.get(measure) is not None]
        path = self._picture_path(name or table)
        if not rows or path is None:
            return
        bound = {"tbps": "copy_tbps", "tflops": "matmul_tflops"}.get(measure) if limit else None
        line = found[1].get(bound) if bound else None
        try:
            with self.turn.left():
                if kind == "lines":
                    series: dict[str, list[tuple[str, float]]] = {}
                    for row in rows:
                        series.setdefault(row["name"], []).append((row["case"], row[measure]))
                    theirs = [r for r in rows if r.get("baseline") and not charts.shipped(r["name"])]
                    grey = list(dict.fromkeys(r["name"] for r in theirs))
                    charts.lines(series, found[1], title, path, measure, xlabel, grey, line)
                elif kind == "panels":
                    groups = {c: [r for r in rows if r["case"] == c] for c in dict.fromkeys(r["case"] for r in rows)}
                    charts.panels(groups, found[1], title, path, measure, line)
                else:
                    wanted = case if case is not None else rows[-1]["case"]
                    rows = [r for r in rows if r["case"] == wanted]
                    charts.bars(rows, found[1], title, path, measure, line)
        except ImportError as error:
            self._out.note(f"{path.name} is not drawn ({error}): pip install 'torch-triton-ops[tutorials]'")
            return
        self._shown(path)

    def _picture_path(self, name: str) -> Path | None:
        if self.plots is None and not self.notebook:
            return None
        if self.plots is None:
            self.plots = Path(tempfile.mkdtemp(prefix=f"{self.info.name}_"))
        folder = self.plots
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.info.name}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.png"

    def _shown(self, path: Path) -> None:
        if self.notebook:
            from IPython.display import Image, display

            display(Image(str(path), width=820))
        else:
            self._out.note(f"Picture: {path}")

    # -- inside a model -------------------------------------------------------------------------------------------------

    def compiled(
        self,
        table: str,
        make: Callable[..., tuple[Any, ...]],
        ours: Callable[..., Any],
        eager: Callable[..., Any],
        node: str,
        check: tuple[Any, ...],
        timed: tuple[Any, ...] | None = None,
        bytes: Callable[..., int] | None = None,
        flops: Callable[..., int] | None = None,
        others: Mapping[str, Callable[..., Any]] | None = None,
        tolerance: float = 1e-4,
        title: str = "",
    ) -> None:
        """`ours` (a model with the lesson's op in it) through torch.compile(fullgraph=True), beside plain torch.

        make(*case) makes inputs; check, timed: cases; node: the op that must stand in the graph, as "tt_lesson.vector_add".
        eager: the same model in plain torch. Measured on CUDA: eager, ours eager, ours compiled, eager compiled, and
        `others` (name -> function, the shipped op or a library), each compiled if its name says so.
        """
        self._tell()
        graphs: list[torch.fx.GraphModule] = []
        name_of_backend = "inductor" if self.gpu else "aot_eager"  # Inductor's CPU backend wants a C++ compiler

        def backend(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
            graphs.append(module)
            return torch._dynamo.lookup_backend(name_of_backend)(module, inputs, **options)

        torch._dynamo.reset()
        compiled_ours = torch.compile(ours, fullgraph=True, dynamic=False, backend=backend)
        inputs = make(*check)
        with torch.no_grad():
            got, want = compiled_ours(*inputs), eager(*inputs)
        if not graphs or node not in str(graphs[0].graph):
            raise LessonError(f"the compiled graph does not hold {node}")
        for g, w in zip(_tensors(got), _tensors(want), strict=True):
            bound = tolerance * max(1.0, float(w.double().abs().max()) if w.numel() else 1.0)
            if not torch.allclose(g.double(), w.double(), rtol=0, atol=bound):
                worst = float((g.double() - w.double()).abs().max())
                self._fail(f"{table}: the compiled model differs from eager by {worst:.2e}; allowed: {bound:.1e}")
        if not self.quiet:
            self._out.code(_readable(graphs[0]), "python", f"the graph: one piece, with {node} in it")
        if self.timing and timed is not None:
            # at check's size it was compiled once: a second size would be compiled with a symbol for the size
            torch._dynamo.reset()
            compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=name_of_backend)
            runs = {
                "torch, eager": eager,
                "torch, compiled": compiled(eager),
                "ours, eager": ours,
                "ours, compiled": compiled(ours),
            }
            for name, function in (others or {}).items():
                runs[name] = compiled(function) if "compiled" in name else function
            case = _label(timed)
            sample = make(*timed)
            nbytes, work = (bytes(*sample) if bytes else 0), (flops(*sample) if flops else 0)
            del sample
            for name, function in runs.items():

                def calls(function: Callable[..., Any] = function) -> Callable[[], Any]:
                    fresh = make(*timed)
                    return lambda: function(*fresh)

                with torch.no_grad():
                    self.measure(table, name, calls, nbytes, work, case, baseline=name.startswith("torch"))
        if timed is not None:
            self.table(table, title or "In a model", cases=[_label(timed)])
            self.chart(table, title or "In a model", measure="us", limit=False)

    # -- the end --------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The rest of the prose, the exercises, the record; status 1 for a script with a failure in it."""
        self.turn.end()
        if self.script and not self.quiet:
            self._tell_until(float("inf"))
        if self.options.json:
            _write_record(Path(self.options.json), self.header, self.rows, self.failures)
        if not self.quiet:
            number = self.info.number
            for exercise in self.info.exercises:
                self._out.note(
                    f"{exercise}: triton-tutorial check {number} {exercise}; triton-tutorial hint {number} {exercise}"
                )
        for failure in self.failures:
            self._out.failed(failure)
        if not self.failures:
            where = self.header["gpu"] if self.gpu else "the CPU"
            times = f", {sum('us' in r for r in self.rows)} times measured" if self.timing else ""
            self._out.passed(f"Lesson {self.info.number}: every check passed on {where}{times}.")
        elif self.notebook or not self.script:
            raise LessonError(f"{len(self.failures)} checks failed; the first: {self.failures[0]}")
        else:
            sys.exit(1)

    def _fail(self, message: str, row: Row | None = None) -> None:
        self.failures.append(message)
        self._out.failed(message)
        if row is not None:
            self.rows.append(row)


# --------------------------------------------------------------------------------------------------------------------
# A problem: one operation, its inputs, its reference and the kernels that compute it
# --------------------------------------------------------------------------------------------------------------------


class Problem:
    """One operation and the ladder of kernels for it.

    reference: plain torch, on any dtype. make(*case): fresh inputs, made with `lesson.randn` or on `lesson.device`.
    check: cases for correctness, small (the interpreter runs about 600 programs a second) and awkward.
    timed: cases for a GPU, the last the one that tables show; a list, or a dict from label to case.
    bytes, flops: what one call must at least move and compute, from the inputs.
    rtol, atol: allowed difference to the fp64 reference where the derived one does not fit; say why in the prose.
    """

    def __init__(
        self,
        lesson: Lesson,
        name: str,
        *,
        reference: Callable[..., Any],
        make: Callable[..., tuple[Any, ...]],
        check: Sequence[tuple[Any, ...]],
        bytes: Callable[..., int],
        timed: Sequence[tuple[Any, ...]] | Mapping[str, tuple[Any, ...]] = (),
        flops: Callable[..., int] = lambda *inputs: 0,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        self.lesson, self.name, self.reference, self.make = lesson, name, reference, make
        self.check, self.bytes, self.flops, self.rtol, self.atol = list(check), bytes, flops, rtol, atol
        self.timed = dict(timed) if isinstance(timed, Mapping) else {_label(case): case for case in timed}
        self.sources: list[list[str]] = []
        self.names: dict[int, str] = {}  # of the kernels by position, of the launcher at -1
        self.own_rows: list[Row] = []

    # -- correctness ----------------------------------------------------------------------------------------------------

    def wrong(self, function: Callable[..., Any], *inputs: Any) -> str | None:
        """What is wrong with `function(*inputs)`, or None. See `compare`."""
        try:
            got = _tensors(function(*inputs))
        except interpreted.InterpreterError as error:
            return str(error)
        return self.compare(got, inputs)

    def compare(self, got: Sequence[torch.Tensor], inputs: Sequence[Any]) -> str | None:
        """The first element further from the fp64 reference than allowed, or None.

        Allowed: twice the largest error of torch at the inputs' precision, plus a few roundings of the value.
        """
        want = _tensors(self.reference(*inputs))
        exact = _tensors(self.reference(*[_double(a) for a in inputs]))
        if len(got) != len(want):
            return f"{len(got)} outputs; the reference has {len(want)}"
        for i, (g, w, e) in enumerate(zip(got, want, exact, strict=True)):
            which = f"output {i}, " if len(got) > 1 else ""
            if g.shape != w.shape or g.dtype != w.dtype:
                return f"{which}shape {tuple(g.shape)} and {g.dtype}; the reference has {tuple(w.shape)} and {w.dtype}"
            if g.numel() == 0:
                continue
            if not g.dtype.is_floating_point:
                bad = g != w
            else:
                eps = EPS[g.dtype]
                rtol = 2 * eps if self.rtol is None else self.rtol
                atol = _torch_error(w, e) * 2 + eps * 1e-3 if self.atol is None else self.atol
                bad = ~((g.double() - e).abs() <= atol + rtol * e.abs()) & ~(g.isnan() & e.isnan()) & (g.double() != e)
            if bool(bad.any()):
                first = tuple(int(n) for n in bad.nonzero()[0])
                at = ", ".join(map(str, first))
                return (
                    f"{which}{int(bad.sum())} of {g.numel()} elements differ; the first is [{at}]:"
                    f" {_number(g[first])} instead of {_number(e[first])}"
                )
        return None

    def _check(self, name: str, function: Callable[..., Any]) -> bool:
        for case in self.check:
            problem = self.wrong(function, *self.make(*case))
            if problem:
                self.lesson._fail(f"{self.name}: {name}, {_label(case)}: {problem}")
                return False
        return True

    # -- the ladder -----------------------------------------------------------------------------------------------------

    def baseline(self, name: str, function: Callable[..., Any] | None = None) -> None:
        """Something to compare with, the reference if no function is given: timed on CUDA, drawn in grey."""
        self.lesson._tell()
        self._measure(name, function or self.reference, {"baseline": True})

    def rung(self, name: str, function: Callable[..., Any], kernel: Any = (), note: str = "", target: int = 90) -> None:
        """One step: the change against the step before, its checks, its resources and, on CUDA, its times.

        function(*inputs) launches `kernel` (one, or several). note: why this step, in one sentence. target: the compute
        capability to compile for where there is no GPU.
        """
        lesson = self.lesson
        lesson._tell()
        kernels = kernel if isinstance(kernel, (tuple, list)) else (kernel,)
        changed = self._show_change(name, function, kernels, note)
        correct = self._check(name, function)
        row: Row = {"correct": correct} | ({"changed": changed} if self.own_rows else {})
        if not lesson.quiet:
            row |= self._resources(name, function, target)
        self._measure(name, function, row)
        self.own_rows.append({"table": self.name, "name": name} | row)
        if not lesson.quiet:
            lesson._out.note(self._summary(name, row))

    def _summary(self, name: str, row: Row) -> str:
        parts = ["correct" if row["correct"] else "WRONG"]
        last = _select(self.lesson.rows, self.name, name, None)
        if self.lesson.timing and last and "us" in last[-1]:
            parts += [_cell(last[-1], "us"), _cell(last[-1], "rate"), f"{_cell(last[-1], 'fraction')} of the limit"]
        if "registers" in row:
            sm = "this GPU" if self.lesson.gpu else f"sm_{row['target']}"
            parts.append(f"{row['registers']} registers and {row['spilled']} bytes of spills on {sm}")
        return f"{name}: " + ", ".join(parts)

    def _show_change(self, name: str, function: Callable[..., Any], kernels: Sequence[Any], note: str) -> int:
        functions = {i: k.fn if hasattr(k, "fn") else k for i, k in enumerate(kernels)} | {-1: function}
        source: list[str] = []
        for place, f in functions.items():
            # a new name for the same thing is no change: shown under the first rung's names, without their "_v0"
            self.names.setdefault(place, re.sub(r"_v\d+$", "", f.__name__))
        for f in functions.values():
            text = textwrap.dedent(inspect.getsource(inspect.unwrap(f)))
            for place, g in functions.items():
                text = re.sub(rf"\b{re.escape(g.__name__)}\b", self.names[place], text)
            source += [*text.rstrip().splitlines(), ""]
        before = self.sources[-1] if self.sources else None
        self.sources.append(source)
        if before is None:
            if not self.lesson.quiet and self.lesson.script:
                self.lesson._out.code("\n".join(source), "python", name)
            return 0
        diff = list(difflib.unified_diff(before, source, lineterm="", n=1))[2:]
        added, removed = (sum(line.startswith(s) and line[1:].strip() != "" for line in diff) for s in "+-")
        changed = max(added, removed)
        if changed > MAX_CHANGED:
            raise LessonError(f"{self.name}: rung '{name}' changes {changed} lines; allowed: {MAX_CHANGED}")
        if not self.lesson.quiet:
            body = "\n".join(line if not line.startswith("@@") else "" for line in diff).strip("\n")
            self.lesson._out.code(body, "diff", f"{name}: {note}" if note else name)
        return changed

    def _resources(self, name: str, function: Callable[..., Any], target: int) -> Row:
        """Registers, spills and shared memory of the launches at the largest case: compiled, not run."""
        if self.lesson.gpu:
            major, minor = torch.cuda.get_device_capability()
            target = 10 * major + minor
        case = list(self.timed.values())[-1] if self.timed else self.check[-1]
        try:
            inputs = [_meta(a) for a in self._shapes(case)]
            with interpreted.recorded(target) as launches:
                function(*inputs)
            unique = {offline.specialisation(launch): launch for launch in launches}
            with self.lesson.turn.left():
                made = [offline.compile_launch(launch, target) for launch in unique.values()]
        except Exception as error:
            self.lesson._fail(f"{self.name}: {name}: not compiled for sm_{target}: {_one_line(error)}")
            return {}
        if not made:
            return {}
        return {
            "target": target,
            "registers": max(m.registers for m in made),
            "spilled": sum(m.spilled for m in made),
            "shared": max(m.shared for m in made),
        }

    def _shapes(self, case: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of a case as meta tensors: `make` under a mode that allocates nothing."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            return self.make(*case)

    def _measure(self, name: str, function: Callable[..., Any], columns: Row) -> None:
        lesson = self.lesson
        if not lesson.timing or columns.get("correct") is False:  # a wrong kernel has no speed
            lesson.rows.append({"table": self.name, "name": name, "case": ""} | columns)
            return
        for label, case in self.timed.items():
            inputs = self.make(*case)
            nbytes, flops = self.bytes(*inputs), self.flops(*inputs)
            row = {"table": self.name, "name": name, "case": label} | columns
            try:
                wrong = self.wrong(function, *inputs) if columns.get("correct") else None
                del inputs

                def calls(case: tuple[Any, ...] = case) -> Callable[[], Any]:
                    fresh = self.make(*case)
                    return lambda: function(*fresh)

                if wrong:
                    lesson._fail(f"{self.name}: {name}, {label}: {wrong}", row | {"error": wrong})
                else:
                    lesson.rows.append(row | lesson._time(calls, nbytes, flops))
            except Exception as error:
                lesson._fail(f"{self.name}: {name}, {label}: {_one_line(error)}", row | {"error": _one_line(error)})

    def ladder(self, title: str = "", measure: str = "", sizes: str = "lines", xlabel: str = "size") -> None:
        """The table of all rungs and baselines at the last timed case, and its figures (one over all cases, if several).

        sizes: how that one is drawn, "lines" or "panels". xlabel: what the sizes are.
        """
        lesson = self.lesson
        lesson._tell()
        if lesson.quiet:
            return
        title = title or self.name
        found = lesson.results()
        last = list(self.timed)[-1] if self.timed else ""
        if found is None:
            heads = ["", "correct", "registers", "spills", "lines changed"]
            body = [
                [r["name"], *(_cell(r, c) for c in ("correct", "registers", "spilled", "changed"))]
                for r in self.own_rows
            ]
            lesson._out.table(f"{title} (compiled for sm_90; no speeds recorded yet)", heads, body)
            return
        columns = ("correct", "us", "rate", "fraction", "registers", "spilled", "changed")
        lesson.table(self.name, f"{title}, {last}" if last else title, columns, [last])
        sample = next((r for r in found[0] if r["table"] == self.name and "us" in r), {})
        measure = measure or ("tflops" if "tflops" in sample else "tbps")
        lesson.chart(self.name, f"{title}, {last}", measure=measure, case=last)
        if len(self.timed) > 1:
            lesson.chart(self.name, title, f"{self.name}_sizes", measure, sizes, xlabel=xlabel)

    # -- picture, bug ---------------------------------------------------------------------------------------------------

    def picture(
        self, function: Callable[..., Any], *case: Any, title: str = "", name: str = "addresses", **options: Any
    ) -> list[interpreted.LaunchTrace]:
        """Which addresses each program touches, at a toy size: in words and, with --plot, as lesson_NN_<name>.png.

        options: of `pictures.draw`.
        """
        lesson = self.lesson
        lesson._tell()
        with lesson.on_cpu(), interpreted.tracing() as traces:
            function(*self.make(*case))
        if lesson.quiet:
            return traces
        lesson._out.plain(pictures.describe(traces))
        path = lesson._picture_path(name)
        if path is not None:
            try:
                with lesson.turn.left():
                    pictures.draw(traces, path, title or f"{self.name}, {_label(case)}", **options)
            except ImportError as error:
                lesson._out.note(f"{path.name} is not drawn ({error}): pip install 'torch-triton-ops[tutorials]'")
                return traces
            lesson._shown(path)
        else:
            stored = lesson.info.root / "results" / RECORD / f"{lesson.info.name}_{name}.png"
            where = str(stored) if stored.is_file() else "add --plot DIR"
            lesson._out.note(f"The picture: {where}")
        return traces

    def bug(self, name: str, function: Callable[..., Any], kernel: Any, *case: Any, note: str = "") -> str:
        """A wrong version of the last rung, in the interpreter on any machine: the change, and what the checks say of it.

        Raises LessonError if no check notices. Returns the findings.
        """
        lesson = self.lesson
        lesson._tell()
        kernels = kernel if isinstance(kernel, (tuple, list)) else (kernel,)
        self._show_change(name, function, kernels, note)
        self.sources.pop()
        found: list[str] = []
        with lesson.on_cpu(), interpreted.tracing(), interpreted.collecting_strays() as strays:
            inputs = self.make(*case)
            try:
                got = _tensors(function(*inputs))
            except interpreted.InterpreterError as error:
                found.append(str(error))
            else:
                traces = list(interpreted.traces())
                wrong = self.compare(got, inputs)
                if wrong:
                    found += [wrong, *_blame(traces, wrong, got)]
        unique = {(s.kind, s.tensor, s.line): s for s in reversed(strays)}
        found += [str(s) for s in reversed(unique.values())]
        if not found:
            raise LessonError(f"{self.name}: the bug '{name}' was not noticed at {_label(case)}")
        if not lesson.quiet:
            lesson._out.panel("What the check says", "\n".join(f"* {f}" for f in found))
        return "\n".join(found)

    # -- registration ---------------------------------------------------------------------------------------------------

    def register(
        self,
        schema: str,
        function: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., Any] | None = None,
        shipped: str = "",
        exact: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Register `function` as torch.ops.tt_lesson.<name>, check it as torch does, compare it with the shipped op.

        schema: "vector_add(Tensor x, Tensor y) -> Tensor". fake: the output, empty. backward(ctx, *grads) and
        setup_context(ctx, inputs, output): torch.library.register_autograd's. shipped: the op of the registry whose entry
        is shown and whose kernel must give the same: the same bits, or within the tolerance if exact is False.
        options: keyword arguments for the shipped op. Returns the op, which may be called.
        """
        lesson = self.lesson
        lesson._tell()
        name, _, signature = schema.partition("(")
        op = torch.library.custom_op(f"tt_lesson::{name}", function, mutates_args=(), schema="(" + signature)
        op.register_fake(fake)
        calls = [
            f'op = torch.library.custom_op("tt_lesson::{name}", {_name_of(function, "launcher")}, mutates_args=(),',
            f'                             schema="({signature}")',
            f"op.register_fake({_name_of(fake, 'fake')})",
        ]
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
            context = f", setup_context={_name_of(setup_context, 'setup_context')}" if setup_context else ""
            calls.append(f"op.register_autograd({_name_of(backward, 'backward')}{context})")
        if not lesson.quiet:
            lesson._out.code("\n".join(calls), "python", "what register() does, before it checks")
        checks: list[list[str]] = []
        inputs = self.make(*self.check[0])
        if backward is not None:
            inputs = tuple(_leaf(a) for a in inputs)
        result = torch.library.opcheck(op, inputs, raise_exception=False)
        for test, verdict in result.items():
            passed = verdict == "SUCCESS"
            checks.append([_OPCHECK.get(test, test), "passed" if passed else "FAILED"])
            if not passed:
                lesson._fail(f"tt_lesson::{name}: {test}: {_one_line(verdict)}")
        if backward is not None:
            checks.append(["the gradient against torch's own", self._check_gradient(name, op, inputs)])
        if shipped:
            checks.append(
                [f"against torch.ops.tt.{shipped}", self._check_shipped(name, op, shipped, exact, options or {})]
            )
        if not lesson.quiet:
            lesson._out.table(f"torch.ops.tt_lesson.{name}", ["check", ""], checks)
            if shipped:
                lesson._out.code(
                    registry_entry(shipped), "yaml", f"op_registry.yaml: how torch.ops.tt.{shipped} is declared"
                )
        return op

    def _check_gradient(self, name: str, op: Any, inputs: tuple[Any, ...]) -> str:
        outputs = [o for o in _tensors(op(*inputs)) if o.requires_grad]
        upstream = [torch.randn_like(o) for o in outputs]
        leaves = [a for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad]
        got = torch.autograd.grad(outputs, leaves, upstream)

        def gradient(dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
            cast = [
                _leaf(a.detach().to(dtype or a.dtype)) if isinstance(a, torch.Tensor) and a.requires_grad else a
                for a in inputs
            ]
            wanted = _tensors(self.reference(*cast))
            again = [a for a in cast if isinstance(a, torch.Tensor) and a.requires_grad]
            return torch.autograd.grad(wanted, again, [u.to(w.dtype) for u, w in zip(upstream, wanted, strict=True)])

        for i, (g, w, e) in enumerate(zip(got, gradient(None), gradient(torch.float64), strict=True)):
            allowed = 2 * _torch_error(w, e) + 4 * EPS[g.dtype] * float(e.abs().max() if e.numel() else 0)
            worst = float((g.double() - e).abs().max()) if g.numel() else 0.0
            if not worst <= allowed:
                self.lesson._fail(f"tt_lesson::{name}: gradient {i} is off by {worst:.2e}; allowed: {allowed:.2e}")
                return "FAILED"
        return "passed"

    def _check_shipped(self, name: str, op: Any, shipped: str, exact: bool, options: Mapping[str, Any]) -> str:
        for case in self.check:
            inputs = self.make(*case)
            ours = _tensors(op(*inputs))
            call = getattr(torch.ops.tt, shipped) if self.lesson.gpu else None
            theirs = _tensors(call(*inputs, **options) if call else interpreted.call_op(shipped, *inputs, **options))
            for a, b in zip(ours, theirs, strict=True):
                if exact and not torch.equal(a, b):
                    self.lesson._fail(f"tt_lesson::{name} and torch.ops.tt.{shipped} differ at {_label(case)}")
                    return "FAILED"
            if not exact and (problem := self.compare(theirs, inputs) or self.compare(ours, inputs)):
                self.lesson._fail(f"tt_lesson::{name} and torch.ops.tt.{shipped}, {_label(case)}: {problem}")
                return "FAILED"
        return "the same bits" if exact else "the same within rounding"

    # -- autotuning -----------------------------------------------------------------------------------------------------

    def autotune(
        self, function: Callable[..., Any], configs: Sequence[Mapping[str, Any]], title: str = ""
    ) -> Mapping[str, Any] | None:
        """Time `function(*inputs, **config)` for every config at the last timed case; the winner, or None if none is recorded.

        The CPU runs one config, in the interpreter, compiles all, and shows the recorded times.
        """
        lesson = self.lesson
        lesson._tell()
        table = f"{self.name}, autotuning"
        label, case = list(self.timed.items())[-1]
        names = {", ".join(f"{k}={v}" for k, v in config.items()): dict(config) for config in configs}
        resources: dict[str, Row] = {}
        for i, (name, config) in enumerate(names.items()):

            def run(*inputs: Any, config: dict[str, Any] = config) -> Any:
                return function(*inputs, **config)

            if (lesson.gpu or i == 0) and (wrong := self.wrong(run, *self.make(*self.check[-1]))):
                lesson._fail(f"{table}: {name}: {wrong}")
                continue
            if lesson.quiet:
                continue
            resources[name] = self._resources(name, run, 90)
            if lesson.timing:
                sample = self.make(*case)
                nbytes, flops = self.bytes(*sample), self.flops(*sample)
                del sample

                def calls(run: Callable[..., Any] = run) -> Callable[[], Any]:
                    fresh = self.make(*case)
                    return lambda: run(*fresh)

                lesson.measure(table, name, calls, nbytes, flops, label, **resources[name])
        if lesson.quiet:
            return None
        found = lesson.results()
        rows = [] if found is None else [r for r in found[0] if r["table"] == table and "us" in r]
        rows.sort(key=lambda r: r["us"])
        winner = names.get(rows[0]["name"]) if rows else None
        title = title or f"Every config at {label}, the fastest first"
        if rows:
            heads = ["config", *(_HEADS[c] for c in ("us", "rate", "fraction", "registers", "spilled"))]
            body = [
                [r["name"], *(_cell(r, c) for c in ("us", "rate", "fraction", "registers", "spilled"))] for r in rows
            ]
            lesson._out.table(title, heads, body)
        else:
            body = [[n, *(_cell(r, c) for c in ("registers", "spilled"))] for n, r in resources.items()]
            lesson._out.table(
                "Every config, compiled for sm_90; no speeds recorded yet", ["config", "registers", "spills"], body
            )
        if not lesson.timing:
            where = f"; times recorded on {lesson._machine(found[1])}" if found is not None and rows else ""
            lesson._out.note(f"One config ran here, in the interpreter: {next(iter(names))}{where}.")
        return winner


# --------------------------------------------------------------------------------------------------------------------
# Arguments, records
# --------------------------------------------------------------------------------------------------------------------


def _arguments(info: catalog.Lesson, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=info.file.name, description=f"Lesson {info.number}: {info.title}")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where kernels run (default: a GPU if there is one)",
    )
    parser.add_argument("--size", choices=("small", "full"), default="full", help="of the timed inputs, on a GPU")
    parser.add_argument("--bench", action="store_true", help="more rounds of timing; needs a GPU")
    parser.add_argument("--plot", metavar="DIR", help="write the lesson's figures to DIR")
    parser.add_argument("--json", metavar="FILE", help="write what was found to FILE")
    parser.add_argument("--check-only", action="store_true", help="only the checks: no prose, no timing, no figures")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random inputs (default: 0)")
    options = parser.parse_args(argv)
    if options.bench and _device(options.device).type != "cuda":
        parser.error("--bench needs a CUDA GPU; without it the lesson shows recorded speeds")
    folders = {"--plot": options.plot, "--json": options.json and str(Path(options.json).parent)}
    for option, folder in folders.items():  # now, not when everything has been measured
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"{option}: cannot write to {folder}: {error.strerror}")
    if options.json and Path(options.json).is_dir():
        parser.error(f"--json: {options.json} is a folder; give a file")
    return options


def _device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA GPU; leave the option out to run on the CPU")
    return torch.device("cuda")


def _versions(gpu: bool) -> Row:
    header: Row = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if gpu:
        from triton_tutorial.bench import timing

        driver = timing.nvidia_smi("driver_version").get("driver_version", "")
        header = {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda} | header
    return header


def _read_record(info: catalog.Lesson) -> Row | None:
    file = info.root / "results" / RECORD / f"{info.name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _write_record(file: Path, header: Row, rows: Sequence[Row], failures: Sequence[str]) -> None:
    """One row on a line, so that a change of one is a change of one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    head = f' "header": {json.dumps(header)},\n "failures": {json.dumps(list(failures))},\n'
    file.write_text("{\n" + head + ' "rows": [\n' + body + "\n ]\n}\n", encoding="utf-8")


def _select(rows: Sequence[Row], table: str, name: str, case: str | None) -> list[Row]:
    return [r for r in rows if r["table"] == table and r["name"] == name and case in (None, r["case"])]


def _rate(ms: float, nbytes: int, flops: int, copy_tbps: float, matmul_tflops: float) -> Row:
    """Time, rates and the fraction of the nearer limit: moving the bytes or doing the arithmetic."""
    row: Row = {"us": round(1e3 * ms, 3)}
    if nbytes:
        row["tbps"] = round(nbytes / ms / 1e9, 4)
    memory_ms, compute_ms = nbytes / copy_tbps / 1e9, flops / matmul_tflops / 1e9
    if compute_ms > memory_ms:
        row["tflops"] = round(flops / ms / 1e9, 2)
    if nbytes or flops:
        row["fraction"] = round(max(memory_ms, compute_ms) / ms, 4)
    return row


def _doubt(row: Row) -> str:
    """Why a measured row cannot be true, or ""."""
    if row["us"] < MIN_US:
        return f"{row['us']:.3f} us is less than a launch takes: nothing was run"
    if row.get("fraction", 0) > MAX_FRACTION:
        rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['tbps']:.2f} TB/s"
        return (
            f"{rate} in {row['us']:.1f} us is {row['fraction']:.2f} of the measured limit; either the work was not done, or"
            " bytes and flops are counted wrongly, or a cache served it (then say cached=True)"
        )
    return ""


_HEADS = {
    "us": "time",
    "rate": "rate",
    "fraction": "of the limit",
    "registers": "registers",
    "spilled": "spills",
    "changed": "lines changed",
    "shared": "shared memory",
}
_OPCHECK = {
    "test_schema": "opcheck: the schema tells the truth",
    "test_autograd_registration": "opcheck: the gradient is registered",
    "test_faketensor": "opcheck: the fake gives the same shapes",
    "test_aot_dispatch_dynamic": "opcheck: it traces with dynamic shapes",
}


def _cell(row: Row, column: str) -> str:
    if column == "rate":
        if row.get("tflops") is not None:
            return f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] >= 10 else f"{row['tflops']:.2f} TFLOP/s"
        return f"{row['tbps']:.2f} TB/s" if row.get("tbps") is not None else ""
    value = row.get(column)
    if value is None:
        return "failed" if column == "us" and "error" in row else ""
    if column == "us":
        return f"{value:.1f} us" if value < 1e3 else f"{value / 1e3:.2f} ms"
    if column == "fraction":
        return f"{100 * value:.0f} %"
    if column == "correct":
        return "yes" if value else "NO"
    if column in ("spilled", "shared"):
        return f"{value} B"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def registry_entry(op: str) -> str:
    """The text of an op's entry in op_registry.yaml."""
    text = registry.REGISTRY_FILE.read_text(encoding="utf-8")
    found = re.search(rf"^- op: {re.escape(op)}\(.*?(?=^- op:|^#|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LessonError(f"op_registry.yaml has no op '{op}'")
    return found[0].rstrip()


# --------------------------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, (tuple, list)) else []


def _outputs(call: Callable[[], Any]) -> list[torch.Tensor]:
    return _tensors(call())


def _name_of(function: Any, otherwise: str) -> str:
    name = getattr(function, "__name__", otherwise)
    return otherwise if name == "<lambda>" else name


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.storage_offset() == 0:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    whole = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype, device="meta")
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _torch_error(low: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (low.double() - exact).abs()
    difference = difference[difference.isfinite()]
    return float(difference.max()) if difference.numel() else 0.0


def _number(element: torch.Tensor) -> str:
    return f"{element.item():.6g}"


def _label(case: Sequence[Any]) -> str:
    """(1024, 64) -> "1024x64"; (2**27,) -> "2^27"."""
    parts = []
    for item in case:
        power = isinstance(item, int) and item >= 2**10 and item & (item - 1) == 0 and len(case) == 1
        text = f"2^{item.bit_length() - 1}" if power else str(item).removeprefix("torch.")
        parts.append(text)
    return "x".join(parts)


def _blame(traces: Sequence[interpreted.LaunchTrace], wrong: str, got: Sequence[torch.Tensor]) -> list[str]:
    """Which program wrote the first wrong element, or that none did."""
    at = re.search(r"the first is \[([\d, ]*)\]", wrong)
    output = re.search(r"^output (\d+)", wrong)
    tensor = got[int(output[1]) if output else 0]
    if at is None or not traces:
        return []
    position = [int(n) for n in at[1].split(",") if n.strip()]
    flat = sum(i * s for i, s in zip(position, tensor.stride(), strict=True))
    stores = [
        (trace, access)
        for trace in traces
        for access in trace.accesses
        if access.kind != "load" and trace.shapes[access.tensor] == tuple(tensor.shape)
    ]
    if not stores:
        return []
    for trace, access in reversed(stores):
        lanes = (access.index == flat).nonzero()[0]
        if lanes.size:
            return [
                f"program {access.program} of {trace.kernel} wrote it, lane {int(lanes[0])} of its block of"
                f" {access.index.size + access.masked.size}"
            ]
    return ["no program wrote it"]


def _readable(module: torch.fx.GraphModule) -> str:
    text = module.print_readable(print_output=False)
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("# File:")]
    return textwrap.dedent("\n".join(line for line in lines if not line.startswith("class ")))


def _one_line(error: object, limit: int = 300) -> str:
    text = " ".join((f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --------------------------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------------------------


def _prose(file: Path) -> list[tuple[int, str]]:
    """(line of the cell's mark, text) of the Markdown cells, without the lesson's header."""
    cells: list[tuple[int, str]] = []
    lines: list[str] | None = None
    start, header = 0, False
    for number, line in enumerate([*file.read_text(encoding="utf-8").splitlines(), "# %%"], 1):
        if line.rstrip() == "# ---":
            header = not header
        elif line.startswith("# %%"):
            if lines is not None and (text := "\n".join(lines).strip()):
                cells.append((start, text))
            start, lines = number, [] if "[markdown]" in line else None
        elif lines is not None and not header:
            lines.append(re.sub(r"^# ?", "", line))
    return cells


class _Output:
    """The terminal through rich, or plainly where rich is not installed."""

    def __init__(self, notebook: bool) -> None:
        self.console: Any = None
        with contextlib.suppress(ImportError):
            from rich.console import Console

            width = None if sys.stdout.isatty() or notebook or "COLUMNS" in os.environ else 120
            self.console = Console(width=width, highlight=False, soft_wrap=False)

    def plain(self, text: str) -> None:
        print(text, flush=True) if self.console is None else self.console.print(text, markup=False)

    def markdown(self, text: str) -> None:
        if self.console is None:
            print(f"\n{text}\n", flush=True)
            return
        from rich.markdown import Markdown
        from rich.padding import Padding

        self.console.print(Padding(Markdown(text, code_theme="ansi_dark"), (1, 0, 0, 0)))

    def note(self, text: str) -> None:
        self.plain(text) if self.console is None else self.console.print(text, style="dim", markup=False)

    def passed(self, text: str) -> None:
        self.plain(text) if self.console is None else self.console.print(text, style="green", markup=False)

    def failed(self, text: str) -> None:
        self.plain(f"FAILED {text}") if self.console is None else self.console.print(
            f"FAILED {text}", style="bold red", markup=False
        )

    def panel(self, title: str, text: str) -> None:
        if self.console is None:
            print(f"\n{title}: {text}\n", flush=True)
            return
        from rich.markdown import Markdown
        from rich.panel import Panel

        self.console.print(Panel(Markdown(text), title=title, title_align="left", border_style="cyan"))

    def code(self, text: str, language: str, title: str) -> None:
        if self.console is None:
            print(f"\n-- {title}\n{text}\n", flush=True)
            return
        from rich.panel import Panel
        from rich.syntax import Syntax

        self.console.print(
            Panel(
                Syntax(text, language, theme="ansi_dark", word_wrap=True),
                title=title,
                title_align="left",
                border_style="dim",
            )
        )

    def table(self, title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        # a column with nothing in it says nothing
        keep = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in body)]
        heads, body = [heads[i] for i in keep], [[row[i] for i in keep] for row in body]
        if self.console is None:
            widths = [max(len(str(row[i])) for row in (heads, *body)) for i in range(len(heads))]
            print(f"\n{title}")
            for row in (heads, *body):
                print("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
            print(flush=True)
            return
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in body:
            table.add_row(*[str(c) for c in row])
        self.console.print(table)
