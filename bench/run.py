"""python -m bench.run: the registry's benchmark cases, ours beside what a user would pick instead.

The recipe and every column of the record: bench/README.md. Exit status: 0 done, 1 the GPU failed on the way (what was
measured is saved), 2 wrong command line or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from . import peers, record, timing
from .check import Expected, InputSet, expect, flatten, gradients, verdict
from .record import Record, RecordError, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
LAUNCH_CASE = "1024"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    case: str | None = None
    peers: tuple[str, ...] = peers.DEFAULT
    rounds: int = 5
    quick: bool = False

    @property
    def budget_ms(self) -> float:
        """GPU time of one impl in one round."""
        return 5.0 if self.quick else 30.0


@dataclass(frozen=True)
class Limits:
    """What this GPU can do, measured in this process."""

    copy_tbps: float
    matmul_tflops: float


class GpuLost(RuntimeError):
    """The CUDA context is broken: nothing more can be measured in this process."""


# --------------------------------------------------------------------------------------------------------------------
# Which ops and cases
# --------------------------------------------------------------------------------------------------------------------


def select_ops(specs: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The specs called `names`, or all. Raises ValueError for an unknown name."""
    known = [spec.name for spec in specs]
    for name in names:
        if name not in known:
            raise ValueError(f"no op '{name}'; allowed: {', '.join(known)}")
    return [spec for spec in specs if not names or spec.name in names]


def walk(specs: Sequence[Any], pattern: str | None) -> Iterator[tuple[Any, Any]]:
    """(spec, case) of every case whose id, or `op/id`, matches the regular expression."""
    for spec in specs:
        cases = spec.function("bench_cases")
        for case in cases() if cases is not None else ():
            if pattern is None or re.search(pattern, case.id) or re.search(pattern, f"{spec.name}/{case.id}"):
                yield spec, case


# --------------------------------------------------------------------------------------------------------------------
# Inputs and calls
# --------------------------------------------------------------------------------------------------------------------


def make_set(spec: Any, case: Any, pass_name: str, index: int, device: str) -> InputSet:
    """Input set number `index` of a case: the same values for every impl and every run."""
    torch.manual_seed(index)
    args, kwargs = case.make(device, case.dtype)
    names = [argument.name for argument in spec.arguments]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if pass_name == "fwd":
        return InputSet(arguments, len(args), mutated=_mutated(spec))
    outputs = spec.function("fake")(*args, **kwargs)
    leaves = {}
    for name in spec.differentiable:
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = leaves[name] = arguments[name].detach().requires_grad_()
    return InputSet(arguments, len(args), leaves, [_upstream(out) for out in flatten(outputs)])


def _mutated(spec: Any) -> tuple[str, ...]:
    return tuple(a.name for a in spec.arguments if getattr(a, "mutated", False))


def _upstream(out: torch.Tensor) -> torch.Tensor | None:
    if not out.is_floating_point():
        return None
    return torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out)


def set_bytes(inputs: InputSet) -> int:
    """Bytes that a call must read."""
    return sum(t.numel() * t.element_size() for t in inputs.tensors())


def prepare_calls(impl: peers.Impl, pass_name: str, sets: Sequence[InputSet]) -> list[timing.Call]:
    """One closure for each input set; for "bwd" the forward runs here, and the closure its gradient alone."""

    def forward(s: InputSet) -> timing.Call:
        return lambda: s.call(impl.call)

    def forward_backward(s: InputSet) -> timing.Call:
        def call() -> list[torch.Tensor]:
            outputs = s.call(impl.call)
            return [*(o.detach() for o in outputs), *gradients(outputs, s)]

        return call

    def backward(s: InputSet) -> timing.Call:
        outputs = s.call(impl.call)
        return lambda: gradients(outputs, s, retain_graph=True)

    make = {"fwd": forward, "fwdbwd": forward_backward, "bwd": backward}[pass_name]
    return [make(s) for s in sets]


# --------------------------------------------------------------------------------------------------------------------
# One (op, case, pass)
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """One impl on its way through one (op, case, pass)."""

    impl: peers.Impl
    row: Row
    rounds: list[float]
    timer: timing.Timer | None = None
    outputs: list[torch.Tensor] | None = None

    def attempt(self, step: Callable[[Contender], object]) -> None:
        """Run a step; an exception becomes the row's error."""
        try:
            step(self)
            return
        except Exception as error:
            self.fail(error)
        _free_memory()  # out of the handler, whose traceback holds the tensors of every frame

    def fail(self, error: BaseException) -> None:
        """Record why there is no number, and let go of the memory."""
        _raise_if_gpu_lost(error)
        reason = str(error) if isinstance(error, peers.Unsupported) else timing.one_line(error)
        kind = "not supported: " if isinstance(error, peers.Unsupported) else ""
        self.row["error"] = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else kind + reason
        self.drop_timer()

    def measure(self) -> None:
        """One round."""
        assert self.timer is not None
        self.rounds.append(self.timer.measure())

    def drop_timer(self) -> None:
        if self.timer is not None:
            self.timer.release()
            self.timer = None


def _raise_if_gpu_lost(error: BaseException) -> None:
    try:
        timing.synchronize()
    except RuntimeError as broken:
        raise GpuLost(f"{timing.one_line(error)}; then {timing.one_line(broken)}") from error


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _set_up(contender: Contender, pass_name: str, sets: Sequence[InputSet], budget_ms: float) -> None:
    """Compile, tune, capture, and take what is measured once: peak memory and host time."""
    impl, row = contender.impl, contender.row
    start = time.perf_counter()
    restore: Callable[[], object] | None = None
    if pass_name in impl.in_place:
        pristine, sets = sets, [s.clone() for s in sets]
        restore = lambda: sets[0].copy_(pristine[0])
    contender.timer, fallback = timing.make_timer(
        lambda: prepare_calls(impl, pass_name, sets), budget_ms, pass_name not in impl.not_captured, restore
    )
    row["setup_s"] = round(time.perf_counter() - start, 2)
    row["method"] = contender.timer.method + (", in place" if restore is not None else "")
    row["sets"] = len(contender.timer.calls)
    if fallback is not None:
        row["not_captured"] = fallback
    call = contender.timer.calls[0]
    row["peak_bytes"] = timing.peak_bytes(call)
    row["host_us"] = round(timing.host_us(call, contender.timer.measure()), 2)


def _take_outputs(contender: Contender, pass_name: str, sets: Sequence[InputSet]) -> None:
    """Outputs on the first input set, after all timing."""
    assert contender.timer is not None
    if pass_name in contender.impl.in_place:
        # what it timed has been overwritten many times over
        contender.outputs = [o.clone() for o in prepare_calls(contender.impl, pass_name, [sets[0].clone()])[0]()]
    else:
        protected = {t.untyped_storage().data_ptr() for t in sets[0].tensors()}
        contender.outputs = contender.timer.outputs(protected)


def _expect(spec: Any, inputs: InputSet, pass_name: str) -> Expected:
    expected = expect(spec.name, spec.function("reference"), inputs)
    if pass_name == "bwd":
        first = len(expected.values) - len(inputs.leaves)
        expected = Expected(expected.values[first:], expected.against, expected.torch_error[first:], expected.eps)
    return expected


def _measure(
    contenders: Sequence[Contender],
    pass_name: str,
    first: InputSet,
    make: Callable[[int], InputSet],
    options: Options,
) -> None:
    """Set up every impl, time them in turn, round after round, and then take their outputs."""
    count = timing.rotation_count(set_bytes(first), timing.rotation_target(), timing.free_bytes())
    sets = [first, *(make(i) for i in range(1, count))]
    # a compiled graph is kept for several backwards when the backward is timed alone; a donated buffer forbids that
    donated = torch._functorch.config.patch(donated_buffer=False) if pass_name == "bwd" else contextlib.nullcontext()
    with torch.set_grad_enabled(pass_name != "fwd"), donated:
        for contender in contenders:
            contender.attempt(lambda c: _set_up(c, pass_name, sets, options.budget_ms))
        for _ in range(options.rounds):
            for contender in contenders:
                if contender.timer is not None:
                    contender.attempt(Contender.measure)
        for contender in contenders:
            if contender.timer is not None:
                contender.attempt(lambda c: _take_outputs(c, pass_name, sets))
                contender.drop_timer()


def bench_pass(
    spec: Any,
    case: Any,
    pass_name: str,
    found: peers.Found,
    limits: Limits,
    options: Options,
    stamp: str,
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure every impl on one (op, case, pass), interleaved, check every output afterwards, and return the rows."""
    base = {"op": spec.name, "case": case.id, "dtype": str(case.dtype).removeprefix("torch."), "pass": pass_name}
    impls = [replace(impl, in_place=peers.PASSES) for impl in found.impls] if _mutated(spec) else found.impls
    contenders = [Contender(impl, {**base, "impl": impl.name, "measured": stamp}, []) for impl in impls]
    torch._dynamo.reset()  # every case compiles for its own shapes, and no case is the ninth shape of one function
    first = make_set(spec, case, pass_name, 0, device)
    cost = spec.function("cost")(**first.arguments)
    make = lambda index: make_set(spec, case, pass_name, index, device)
    _measure(contenders, pass_name, first, make, options)
    _free_memory()

    with torch.enable_grad():
        _judge(spec, first, pass_name, contenders)
    for contender in contenders:
        row = contender.row
        if "error" not in row:
            row.update(record.times(timing.Spread.of(contender.rounds)))
            row.update(record.rate(*record.work(cost, pass_name), row["ms"], limits.copy_tbps, limits.matmul_tflops))
    rows = [contender.row for contender in contenders]
    record.add_ratios(rows, {c.impl.name: c.rounds for c in contenders})
    for row in rows:
        say(record.describe(row))
    _free_memory()
    return rows


def _judge(spec: Any, inputs: InputSet, pass_name: str, contenders: Sequence[Contender]) -> None:
    expected: Expected | None = None
    reason = ""
    try:
        expected = _expect(spec, inputs, pass_name)
    except Exception as error:
        _raise_if_gpu_lost(error)
        reason = f"the reference failed: {timing.one_line(error)}"
        _free_memory()
    for contender in contenders:
        if contender.outputs is None:
            continue
        if expected is None:
            contender.row["check"] = {"passed": False, "reason": reason}
        elif contender.impl.random:
            contender.row["check"] = {"passed": True, "against": "nothing", "reason": "its random numbers are its own"}
        else:
            try:
                contender.row["check"] = verdict(contender.outputs, expected)
            except Exception as error:
                _raise_if_gpu_lost(error)
                contender.row["check"] = {"passed": False, "reason": f"not compared: {timing.one_line(error)}"}
        contender.outputs = None


def bench_launch(stamp: str, names: Sequence[str], device: str = "cuda", calls: int = 500) -> list[Row]:
    """Host time of a call whose GPU time is nothing: an addition of 1024 fp32 numbers, ours beside torch's own."""
    torch._dynamo.reset()
    x, y = (torch.randn(1024, device=device) for _ in range(2))
    tt_add = torch.ops.tt.vector_add
    # the compiled functions: aten's addition as Inductor writes it, and our op inlined into a graph
    contenders: dict[str, Callable[[], torch.Tensor]] = {"tt": lambda: tt_add(x, y), "eager": lambda: torch.add(x, y)}
    if "compile" in names:
        compiled_add = torch.compile(lambda x, y: x + y, dynamic=False)
        compiled_tt = torch.compile(lambda x, y: tt_add(x, y), dynamic=False, fullgraph=True)
        contenders["compile"] = lambda: compiled_add(x, y)
        contenders["tt_compile"] = lambda: compiled_tt(x, y)
    expected = x.double() + y.double()
    rows = []
    for name, call in contenders.items():
        row: Row = {
            "op": "vector_add",
            "case": LAUNCH_CASE,
            "dtype": "float32",
            "pass": "fwd",
            "impl": name,
            "measured": stamp,
        }
        try:
            with torch.no_grad():
                row["host_us"] = round(timing.host_us(lambda call=call: [call()], 0.0, calls=calls), 2)
                row["method"] = "host"
                right = torch.allclose(call().double(), expected, rtol=2**-23, atol=0)
            row["check"] = {"against": "fp64", "passed": right}
        except Exception as error:
            _raise_if_gpu_lost(error)
            row["error"] = timing.one_line(error)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("BENCH_COMMIT")


def make_header(limits: Limits, clocks: tuple[int | None, int | None], options: Options) -> dict[str, Any]:
    """What was measured with, and the limits that fractions refer to."""
    import triton

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "schema_version": record.SCHEMA_VERSION,
        "gpu": torch.cuda.get_device_name(),
        "driver": timing.nvidia_smi("driver_version").get("driver_version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "copy_tbps": round(limits.copy_tbps, 4),
        "matmul_tflops": round(limits.matmul_tflops, 1),
        "sm_clock_mhz": {"before": clocks[0], "after": clocks[1]},
        "rounds": options.rounds,
        "quick": options.quick,
        "missing_peers": {},
    }


def run(specs: Sequence[Any], options: Options, path: Path | None) -> Record:
    """Measure, print and save after every op. Raises GpuLost when the GPU fails; what was measured is saved."""
    previous = record.load(path) if path is not None and path.exists() else None
    torch.set_grad_enabled(True)
    gc.collect()
    gc.freeze()  # torch's own objects: every later collection is ten times faster for it
    clock = timing.sm_clock_mhz()
    limits = Limits(timing.copy_tbps(), timing.matmul_tflops())
    _free_memory()
    header = make_header(limits, (clock, timing.sm_clock_mhz()), options)
    stamp = f"{header['date']} {header['commit'] or 'no commit'}"
    new: Record = {"header": header, "stamps": {stamp: header}, "rows": []}
    merged = record.merge(previous, new, ())  # another GPU's record is refused now, not after minutes of measuring
    print(
        f"{header['gpu']}, driver {header['driver']}, torch {header['torch']}, triton {header['triton']}; "
        f"copy {limits.copy_tbps:.2f} TB/s, bf16 matmul {limits.matmul_tflops:.0f} TFLOP/s",
        flush=True,
    )
    whole: list[str] = []

    def save() -> None:
        nonlocal merged
        header["sm_clock_mhz"]["after"] = timing.sm_clock_mhz()
        merged = record.merge(previous, new, whole)
        if path is not None:
            record.save(merged, path)

    try:
        for spec in specs:
            start, before = time.perf_counter(), len(new["rows"])
            _bench_op(spec, options, limits, stamp, new["rows"], header["missing_peers"])
            if len(new["rows"]) > before:
                if options.case is None:
                    whole.append(spec.name)
                save()
                print(f"# {spec.name}: {time.perf_counter() - start:.0f} s", flush=True)
    except (GpuLost, KeyboardInterrupt):
        save()
        raise
    if new["rows"]:
        print("\n" + record.table(new["rows"]))
        print("* timed by events   x failed, or its output was wrong   - absent")
    return merged


def _bench_op(
    spec: Any, options: Options, limits: Limits, stamp: str, rows: list[Row], missing: dict[str, str]
) -> None:
    """Append all rows of one op to `rows`."""
    pairs = list(walk([spec], options.case))[: 1 if options.quick else None]
    launch = spec.name == "vector_add" and (options.case is None or re.search(options.case, LAUNCH_CASE))
    if not pairs and not launch:
        return
    ours = getattr(getattr(torch.ops, spec.namespace), spec.name)
    found = peers.find(spec.name, ours, spec.function("reference"), options.peers)
    for name, reason in found.missing.items():
        if name not in missing:
            missing[name] = reason
            print(f"# {name}: {reason}", flush=True)
    say = lambda line: print(line, flush=True)
    for _, case in pairs:
        for pass_name in case.passes:
            if pass_name != "fwd" and not spec.differentiable:
                continue
            try:
                rows += bench_pass(spec, case, pass_name, found, limits, options, stamp, say=say)
            except GpuLost:
                raise
            except Exception as error:  # the case itself cannot be made: too big for this GPU, say
                _raise_if_gpu_lost(error)
                row = {
                    "op": spec.name,
                    "case": case.id,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "pass": pass_name,
                }
                rows.append({**row, "impl": "tt", "measured": stamp, "error": timing.one_line(error)})
                say(record.describe(rows[-1]))
                _free_memory()
    if launch:
        for row in bench_launch(stamp, options.peers):
            rows.append(row)
            say(record.describe(row))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in (p.strip() for p in text.split(",")) if part)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench.run", description="Benchmark the registry's ops against their peers."
    )
    p.add_argument("--op", action="append", default=[], metavar="OP[,OP]", help="only these ops (repeatable)")
    p.add_argument("--case", metavar="REGEX", help="only cases whose id, or op/id, matches")
    p.add_argument(
        "--peers", metavar="LIST", help=f"comma-separated, of {', '.join(peers.NAMES)}; default: all but compile_max"
    )
    p.add_argument(
        "--rounds", type=int, default=5, help="interleaved rounds, at least 5 for a published figure (default 5)"
    )
    p.add_argument(
        "--json", type=Path, metavar="PATH", help="record to write and merge into (default bench/results/<gpu>.json)"
    )
    p.add_argument(
        "--plot", action="store_true", help="draw <record>_bars.png and <record>_roofline.png beside the record"
    )
    p.add_argument(
        "--quick", action="store_true", help="first case of each op, short rounds; writes a record only with --json"
    )
    p.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="print what changed from record A to record B"
    )
    p.add_argument("--list", action="store_true", help="print the ops, cases and passes that would run")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status; argparse itself exits with 2 on a wrong command line."""
    p = parser()
    a = p.parse_args(argv)
    try:
        if a.compare:
            print(record.compare(*(record.load(path) for path in a.compare)))
            return 0
        chosen = peers.DEFAULT if a.peers is None else _names(a.peers)
        unknown = [name for name in chosen if name not in peers.NAMES]
        if unknown:
            p.error(f"argument --peers: no peer '{unknown[0]}'; allowed: {', '.join(peers.NAMES)}")
        if a.rounds < 1:
            p.error(f"argument --rounds: {a.rounds}; allowed: 1 or more")
        try:
            re.compile(a.case or "")
        except re.error as error:
            p.error(f"argument --case: not a regular expression: {error}")

        import torch_triton_ops

        try:
            specs = select_ops(torch_triton_ops.specs(), [name for text in a.op for name in _names(text)])
        except ValueError as error:
            p.error(f"argument --op: {error}")
        options = Options(a.case, chosen, a.rounds, a.quick)
        if a.list:
            for spec, case in walk(specs, a.case):
                print(
                    f"{spec.name:<16} {case.id:<28} {str(case.dtype).removeprefix('torch.'):<9} {' '.join(case.passes)}"
                )
            return 0
        if not torch.cuda.is_available():
            print(
                "bench.run: no CUDA GPU: torch.cuda.is_available() is False; run it on a machine with an NVIDIA GPU and"
                " a CUDA build of torch (--list and --compare work without one)",
                file=sys.stderr,
            )
            return 2
        # a time limit's SIGTERM ends a run as Ctrl-C does: what was measured is saved
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        path = a.json
        if path is None and not a.quick:
            path = RESULTS / f"{record.slug(torch.cuda.get_device_name())}.json"
        try:
            result = run(specs, options, path)
        except GpuLost as lost:
            print(
                f"bench.run: the GPU failed and nothing more can be measured in this process: {lost}", file=sys.stderr
            )
            return 1
        if path is not None:
            print(f"\nwritten: {path}")
        if a.plot:
            from . import plot

            for image in plot.draw(result, (path or Path("bench_quick.json")).with_suffix("")):
                print(f"written: {image}")
        return 0
    except RecordError as error:
        print(f"bench.run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
