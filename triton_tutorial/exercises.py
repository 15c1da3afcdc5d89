"""The exercises: the learner's copies, the hidden checks and how they are run. Imports torch only where a check runs.

A lesson's exercises live in `exercises/lesson_NN/` beside the lessons (tutorials/AUTHORING.md, "Exercises"):

    ex1_<slug>.py             what the learner edits, marked `# TODO(ex1)`
    solutions/ex1_<slug>.py   passes
    wrong/ex1_<slug>.py       a telling wrong answer: fails with a helpful message
    checks.py                 def check_ex1(module) -> None, raises CheckFailed
    hints.yaml                ex1: [level 1, level 2, level 3]

A check runs in a process of its own, on the GPU if there is one, else in Triton's interpreter (`interpreted`), where every load
and store is watched: an access outside a tensor fails at its line, and a wrong element is traced to the line and the program
that stored it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import linecache
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from triton_tutorial import progress
from triton_tutorial.catalog import CatalogError, Lesson, TutorialError

if TYPE_CHECKING:
    import torch

TIMEOUT = 60.0  # seconds of one check
FAR = 1 << 16  # elements
HINT_LEVELS = progress.HINT_LEVELS


# --------------------------------------------------------------------------------------------------------------------
# For checks.py
# --------------------------------------------------------------------------------------------------------------------


class CheckFailed(AssertionError):
    """What is wrong with the learner's answer, for the learner: what was computed, what was expected, where to look.

    `tensor` and `index` name the first wrong element, so that the runner can say which line and which program stored it.
    """

    def __init__(self, message: str, tensor: torch.Tensor | None = None, index: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.tensor, self.index = tensor, index


def device() -> str:
    """Where checks run their tensors: "cuda", or "cpu", where Triton interprets the kernels."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# relative and absolute tolerance; the absolute one is multiplied by the largest expected magnitude
_TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-5, 1e-5), "float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 8e-3)}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, what: str, rtol: float | None = None, atol: float | None = None
) -> None:
    """Raise CheckFailed that names the first element of `what` that is wrong: its index, what it is, what it should be.

    `actual` must have the shape and dtype of `expected` (or any dtype, where `expected` is float64). The tolerance is
    rtol * |expected| + atol * max(1, max|expected|), by default that of the dtype of `actual`; integers must be equal.
    NaN where NaN is expected is right.
    """
    import torch

    if not isinstance(actual, torch.Tensor):
        raise CheckFailed(f"{what} is {_describe(actual)}; expected a tensor (is a `return` missing?)")
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what} has shape {tuple(actual.shape)}; expected {tuple(expected.shape)}")
    if actual.dtype != expected.dtype and expected.dtype != torch.float64:
        raise CheckFailed(f"{what} has dtype {_dtype(actual)}; expected {_dtype(expected)}")
    if actual.numel() == 0:
        return
    got = actual.detach().cpu()
    want = expected.detach().cpu()
    if got.dtype.is_floating_point:
        default = _TOLERANCES.get(_dtype(actual), (0.1, 0.1))
        rtol, atol = (default[0] if rtol is None else rtol), (default[1] if atol is None else atol)
        got, want = got.double(), want.double()
        finite = want[want.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        error = (got - want).abs()
        near = (error <= rtol * want.abs() + atol * scale) & want.isfinite()
        wrong = ~(near | (got == want) | (got.isnan() & want.isnan()))
    else:
        error = (got.double() - want.double()).abs()
        wrong = got != want
    if not wrong.any():
        return
    index = tuple(int(i) for i in wrong.nonzero()[0])
    count, total = int(wrong.sum()), wrong.numel()
    where = f"[{', '.join(map(str, index))}]" if index else ""
    message = f"{what}{where} is {_number(got[index])}; expected {_number(want[index])}"
    message += f" ({count} of {total} elements {'is' if count == 1 else 'are'} wrong"
    largest = error[wrong]
    largest = largest[largest.isfinite()]
    message += f", the largest error is {float(largest.max()):.3g})" if largest.numel() else ")"
    raise CheckFailed(message, actual, index)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _number(value: torch.Tensor) -> str:
    number = value.item()
    return f"{number:.7g}" if isinstance(number, float) else str(number)


# --------------------------------------------------------------------------------------------------------------------
# The files
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """One exercise: the package's files and the learner's copy."""

    lesson: Lesson
    name: str  # ex1
    original: Path
    solution: Path
    wrong: Path

    @property
    def checks(self) -> Path:
        return self.lesson.folder / "checks.py"

    @property
    def copy(self) -> Path:
        """The file that the learner edits."""
        return progress.home() / "exercises" / self.lesson.name / self.original.name

    @property
    def title(self) -> str:
        return f"lesson {self.lesson.number} {self.name}"

    def hints(self) -> list[str]:
        """Three hints, from a nudge to nearly the answer."""
        file = self.lesson.folder / "hints.yaml"
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CatalogError(f"{file}: {error.strerror}; write {HINT_LEVELS} hints for each exercise") from None
        except yaml.YAMLError as error:
            raise CatalogError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
        own = found.get(self.name) if isinstance(found, dict) else None
        if (
            not isinstance(own, list)
            or len(own) != HINT_LEVELS
            or not all(isinstance(h, str) and h.strip() for h in own)
        ):
            raise CatalogError(f"{file}: {self.name} must be a list of {HINT_LEVELS} hints")
        return [hint.strip() for hint in own]

    def start(self) -> bool:
        """Make the learner's copy if there is none. A copy that was never edited follows the package's file.

        Returns whether the learner has edited it.
        """
        text = self.original.read_bytes()
        try:
            mine = self.copy.read_bytes() if self.copy.exists() else None
            if mine is not None and _digest(mine) != self._origin():
                return mine != text
            if mine != text or self._origin() is None:
                self._write(text)
        except OSError as error:
            raise progress.not_writable(error) from None
        return False

    def reset(self) -> Path | None:
        """Put the original back. What the learner wrote is kept: returns that file, or None if there was nothing to keep."""
        kept = None
        try:
            text = self.original.read_bytes()
            mine = self.copy.read_bytes() if self.copy.exists() else None
            if mine is not None and mine != text:
                kept = progress.home() / "backups" / self.lesson.name / f"{self.copy.stem}.{progress.timestamp()}.py"
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(mine)
            self._write(text)
        except OSError as error:
            raise progress.not_writable(error) from None
        return kept

    def _write(self, text: bytes) -> None:
        self.copy.parent.mkdir(parents=True, exist_ok=True)
        self.copy.write_bytes(text)
        with progress.update() as state:
            state.exercise(self.lesson.number, self.name)["origin"] = _digest(text)

    def _origin(self) -> str | None:
        return progress.load().exercises.get(f"{self.lesson.number}/{self.name}", {}).get("origin")


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def of_lesson(lesson: Lesson) -> list[Exercise]:
    """The lesson's exercises in order. Raises CatalogError for a missing file."""
    found = []
    for name in lesson.exercises:
        matches = sorted(lesson.folder.glob(f"{name}_*.py"))
        if len(matches) != 1:
            said = "no file" if not matches else "more than one file"
            raise CatalogError(f"{lesson.file}:1: exercise {name} has {said} {lesson.folder}/{name}_<slug>.py")
        original = matches[0]
        exercise = Exercise(
            lesson,
            name,
            original,
            lesson.folder / "solutions" / original.name,
            lesson.folder / "wrong" / original.name,
        )
        for file in (exercise.solution, exercise.wrong, exercise.checks):
            if not file.is_file():
                raise CatalogError(f"{lesson.file}:1: exercise {name} has no {file}")
        found.append(exercise)
    return found


def find(lesson: Lesson, name: str) -> Exercise:
    """`ex1` of a lesson. Raises TutorialError with what there is."""
    if name not in lesson.exercises:
        there = ", ".join(lesson.exercises) or "none"
        near = difflib.get_close_matches(name, lesson.exercises, n=1)
        advice = f"did you mean {near[0]}?" if near and len(lesson.exercises) > 3 else f"there are: {there}"
        raise TutorialError(f"lesson {lesson.number} has no exercise '{name}'; {advice}")
    return of_lesson(lesson)[lesson.exercises.index(name)]


# --------------------------------------------------------------------------------------------------------------------
# Running checks: the side of the command
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One file to check."""

    exercise: str  # ex1
    file: str
    checks: str

    @staticmethod
    def of(exercise: Exercise, file: Path | None = None) -> Job:
        """The learner's copy of an exercise, or another file in its place."""
        return Job(exercise.name, str(file or exercise.copy), str(exercise.checks))


@dataclass(frozen=True)
class Outcome:
    """What came of a check. `line` is a line of the checked file."""

    passed: bool
    message: str = ""
    line: int | None = None
    text: str = ""  # that line
    trace: str = ""  # for --debug
    device: str = ""
    seconds: float = 0.0


class Checker:
    """A process that checks, one job after another: it imports torch once, and forks for each job.

    device: auto, cpu (Triton's interpreter) or cuda. quiet: what the checked file prints is dropped.
    """

    def __init__(self, device: str = "auto", timeout: float = TIMEOUT, quiet: bool = False) -> None:
        read, write = os.pipe()
        order = json.dumps({"device": device, "timeout": timeout, "results": write})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "triton_tutorial.exercises", order],
            env=child_environment(),
            pass_fds=[write],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.DEVNULL if quiet else None,
            start_new_session=True,  # one group, which `close` ends: the server, its job, the interpreter
            text=True,
        )
        os.close(write)
        self.results = os.fdopen(read, encoding="utf-8")

    def check(self, job: Job) -> Outcome:
        """Run one check. Raises TutorialError where none can run."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: why, it has written
            self.process.stdin.write(json.dumps(asdict(job)) + "\n")
            self.process.stdin.flush()
        line = self.results.readline()
        if not line:
            status = self.process.wait()
            raise TutorialError(f"the checks' process ended with status {status}; try: triton-tutorial doctor")
        answer = json.loads(line)
        if "refused" in answer:
            raise TutorialError(answer["refused"])
        return Outcome(**answer)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.results.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child Python that must find this package: also in a checkout that is not installed."""
    environment = {**os.environ, **changes}
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").exists():
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else str(root)
    return environment


# --------------------------------------------------------------------------------------------------------------------
# Running checks: the other process
# --------------------------------------------------------------------------------------------------------------------


def _serve(order: dict[str, Any]) -> None:
    """Answer jobs from stdin. Import torch once, then fork for each: no job sees another's modules, ops or crash."""
    results = os.fdopen(order["results"], "w", encoding="utf-8")

    def answer(value: dict[str, Any]) -> None:
        results.write(json.dumps(value) + "\n")
        results.flush()

    # asks NVML whether there is a GPU; asking CUDA would start it here, and a fork could not use it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS warns in the debug mode below
    os.environ.pop("TRITON_INTERPRET", None)  # `interpreted` does that, without breaking torch.compile
    if order["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        import triton
        import triton.language  # noqa: F401
    except ImportError as error:
        answer({"refused": f"Triton cannot be imported ({error}); install it with: pip install 'triton>=3.6'"})
        return
    import torch

    import torch_triton_ops.launch  # noqa: F401 - what every job would import again after its fork
    from triton_tutorial import interpreted

    # memory that is not written to holds NaN, not what a run before left there
    torch.set_deterministic_debug_mode("warn")
    cuda = torch.cuda.is_available()
    if order["device"] == "cuda" and not cuda:
        answer({"refused": "this machine has no CUDA GPU that torch can use; leave out --device cuda"})
        return
    if not cuda:
        interpreted.install()
    for line in sys.stdin:
        if not cuda:
            # before the fork, so that all jobs share one interpreter, and its start is no job's time
            interpreted.call_op("vector_add", torch.zeros(1), torch.zeros(1))
        outcome, clean = _in_fork(Job(**json.loads(line)), order["timeout"])
        if not (cuda or clean):
            interpreted.stop()  # it may be busy with what the dead job asked
        answer(asdict(outcome))


def _in_fork(job: Job, timeout: float) -> tuple[Outcome, bool]:
    """The outcome, and whether the job came to its own end."""
    start = time.monotonic()
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.fork()
    if worker == 0:
        try:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # stdin brings the jobs
            with os.fdopen(write, "w", encoding="utf-8") as out:
                out.write(json.dumps(asdict(_run(job))))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(0)
    os.close(write)
    text, ended = b"", False
    while not ended:
        left = timeout - (time.monotonic() - start)
        if left <= 0 or not select.select([read], [], [], left)[0]:
            break
        part = os.read(read, 1 << 16)
        text, ended = text + part, not part
    os.close(read)
    if not ended:
        os.kill(worker, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    outcome = Outcome(False, f"the process ended with status {status} in the middle of the check")
    if not ended:
        outcome = Outcome(False, f"not done after {timeout:.0f} seconds; is there a loop without an end?")
    elif text:
        outcome = Outcome(**json.loads(text))
    elif status < 0:
        outcome = Outcome(False, f"the process died of {signal.Signals(-status).name} in the middle of the check")
    return replace(outcome, seconds=round(time.monotonic() - start, 2)), bool(ended and text)


def _run(job: Job) -> Outcome:
    """One check in this process, every failure as an Outcome."""
    import torch

    from triton_tutorial import interpreted

    torch.manual_seed(0)
    file, on = Path(job.file), device()
    module = checks = None
    traces: list[Any] = []
    try:
        module = _import(file, f"tutorial_{job.exercise}")
        checks = _import(Path(job.checks), "tutorial_checks")
        watching: Any = interpreted.tracing() if on == "cpu" else contextlib.nullcontext([])
        with watching as traces:
            getattr(checks, f"check_{job.exercise}")(module)
    except BaseException as error:
        return replace(_explain(error, file, module, checks, job, traces), device=on)
    return Outcome(True, device=on)


def _import(file: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _explain(error: BaseException, file: Path, module: Any, checks: Any, job: Job, traces: Sequence[Any]) -> Outcome:
    """An exception as one sentence and a line of the learner's file."""
    from triton_tutorial.interpreted import OutOfBounds

    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    chain = _chain(error)
    failed = next((e for e in chain if isinstance(e, CheckFailed)), None)
    outside = next((e for e in chain if isinstance(e, OutOfBounds)), None)
    line: int | None
    if failed is not None:
        message, line = str(failed), None
        if failed.tensor is not None and failed.index is not None:
            told, line = _who_stored(failed.tensor, failed.index, traces, file)
            message += told
    elif outside is not None:
        message, line = _outside(outside.strays[0], file)
    else:
        message, line = _say(chain[-1], file, module, checks, job, _line_in(chain, file))
    text = linecache.getline(str(file), line).strip() if line else ""
    return Outcome(False, message, line, text, trace)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from: Triton wraps what a kernel raises."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _line_in(chain: Sequence[BaseException], file: Path) -> int | None:
    """The innermost line of the file that an error passed through."""
    for error in reversed(chain):
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if lines:
            return lines[-1]
    return None


def _say(
    error: BaseException, file: Path, module: Any, checks: Any, job: Job, line: int | None
) -> tuple[str, int | None]:
    kind, said = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"not valid Python: {error.msg}", error.lineno
    if isinstance(error, NotImplementedError):
        return f"not written yet; look for TODO({job.exercise})", line
    if isinstance(error, AttributeError) and module is not None and error.obj is module:
        return f"the file has no '{error.name}' any more; the check calls it", None
    if isinstance(error, AttributeError) and checks is not None and error.obj is checks:
        return f"{job.checks} has no function {error.name}", None
    if isinstance(error, SystemExit):
        return "the file ends the program; leave out sys.exit", line
    if kind == "InterpreterError":  # "<file>:<line>: <text>: <error>", from the interpreter's process
        match = re.match(rf"{re.escape(file.name)}:(\d+): ", said)
        if match is None:
            return said, line
        line = int(match[1])
        return said[match.end() :].removeprefix(" ".join(linecache.getline(str(file), line).split())).lstrip(": "), line
    node, source = getattr(error, "node", None), getattr(error, "src", None)
    if node is not None and isinstance(source, str):  # Triton's compiler: a line of the kernel's own text
        wrong = source.splitlines()[node.lineno - 1 : node.lineno]
        everything = file.read_text(encoding="utf-8").splitlines()
        line = next((i for i, text in enumerate(everything, 1) if wrong and text.strip() == wrong[0].strip()), line)
        said = " ".join(str(getattr(error, "error_message", None) or said).split())
    return (f"{kind}: {said}" if said else kind), line


def _outside(stray: Any, file: Path) -> tuple[str, int | None]:
    """An access outside a tensor, in words."""
    verb = {"load": "reads", "store": "writes"}.get(stray.kind, "updates")
    lanes = f"{stray.lanes} element{'s' * (stray.lanes != 1)}"
    who = f"program {stray.program} of {stray.kernel} {verb} {lanes}"
    if not -FAR <= stray.element < stray.numel + FAR:  # nearest to which tensor it is then says nothing
        message = f"{who} far outside every tensor (is an offset wrong?)"
    else:
        message = (
            f"{who} outside {stray.tensor}, which has {stray.numel}: the first is number {stray.element}"
            " (is a mask missing, or an offset wrong?)"
        )
    return message, stray.line if stray.file == str(file) else None


def _who_stored(
    tensor: torch.Tensor, index: tuple[int, ...], traces: Sequence[Any], file: Path
) -> tuple[str, int | None]:
    """("; program ... stored it", line) for an element of a kernel's output; ("", None) where that cannot be told."""
    offset = sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
    for launch in reversed(traces):
        written = {access.tensor for access in launch.accesses if access.kind != "load"}
        names = [name for name in written if _same_layout(launch, name, tensor)]
        if not names:
            continue
        if len(names) > 1:  # two outputs alike: which is meant is not known
            return "", None
        for access in reversed(launch.accesses):
            if access.kind != "load" and access.tensor == names[0] and (access.index == offset).any():
                return f"; program {access.program} of {launch.kernel} stored it", access.line
        return f"; no program of {launch.kernel} stored it", None
    return "", None


def _same_layout(launch: Any, name: str, tensor: torch.Tensor) -> bool:
    """Whether element i of the launch's tensor in memory order is element i of `tensor`."""
    import torch

    if name not in launch.shapes or launch.itemsizes[name] != tensor.element_size():
        return False
    theirs = torch.empty_strided(launch.shapes[name], launch.strides[name], device="meta")
    if theirs.is_contiguous() and tensor.is_contiguous():
        return theirs.numel() == tensor.numel()
    return theirs.shape == tensor.shape and theirs.stride() == tensor.stride()


if __name__ == "__main__":
    # the real module: a CheckFailed of __main__ would be another class than the one that checks.py raises
    from triton_tutorial import exercises

    exercises._serve(json.loads(sys.argv[1]))
