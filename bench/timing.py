"""Clocks: GPU time by CUDA-graph replay over rotated inputs or by events with an L2 flush, host time, memory, limits.

Knows no op. A timer takes `prepare`, which returns one closure per input set; each closure makes one call and returns
its output tensors. What happens once (compilation, autotuning, capture) happens in a timer's constructor.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Sequence[torch.Tensor]]
Prepare = Callable[[], list[Call]]

ROTATION_FLOOR = 180_000_000  # bytes: three times the L2 of an H100 or H200
MAX_SETS = 64
MAX_CALLS_PER_GRAPH = 256
GRAPH_MS = 10.0  # what one captured graph should take: long against the launch of a graph


def rotation_bytes(l2_bytes: int) -> int:
    """Bytes that the rotated inputs must exceed together, so that no call finds its inputs in the L2."""
    return max(ROTATION_FLOOR, 3 * l2_bytes)


def rotation_count(bytes_per_set: int, target: int, free_bytes: int) -> int:
    """Number of input sets: enough to exceed `target` bytes, at most MAX_SETS and a quarter of the free memory."""
    per_set = max(bytes_per_set, 1)
    wanted = target // per_set + 1 if per_set <= target else 1
    return max(1, min(wanted, MAX_SETS, free_bytes // 4 // per_set))


def calls_per_graph(estimate_ms: float, sets: int) -> int:
    """Calls to capture: about GRAPH_MS, at least one for each input set and a multiple of their number."""
    wanted = min(MAX_CALLS_PER_GRAPH, math.ceil(GRAPH_MS / max(estimate_ms, 1e-4)))
    return sets * max(1, wanted // sets)


@dataclass(frozen=True)
class Spread:
    """Median and extremes of the rounds, in milliseconds a call."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


def _elapsed_ms(body: Callable[[], object], times: int = 1) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        body()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class GraphTimer:
    """Replays a CUDA graph of many calls that go round the input sets; the host's launch cost stays out."""

    def __init__(self, prepare: Prepare, budget_ms: float) -> None:
        self.method = "graph"
        # A capture wants a stream of its own, and a backward runs on its forward's stream: all happens on this one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = prepare()
            for call in calls[:2]:
                call()
            torch.cuda.synchronize()
            estimate = _elapsed_ms(lambda: [call() for call in calls[:4]]) / min(len(calls), 4)
        torch.cuda.synchronize()
        self.calls = calls  # keeps what the graph reads alive: inputs, retained graphs
        self.count = calls_per_graph(estimate, len(calls))
        # One slot of outputs for each input set: outputs rotate through memory too, or they would stay in the L2.
        self.slots: list[Sequence[torch.Tensor]] = [()] * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        self._capture(stream)
        replay_ms = min(_elapsed_ms(self.graph.replay) for _ in range(2))
        self.replays = max(1, math.ceil(budget_ms / max(replay_ms, 1e-3)))

    def _capture(self, stream: torch.cuda.Stream) -> None:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.clone_state()
        try:
            with torch.cuda.graph(self.graph, stream=stream):
                for i in range(self.count):
                    self.slots[i % len(self.calls)] = self.calls[i % len(self.calls)]()
        except BaseException:
            # A failed capture leaves the generator waiting for its end: every later random number would raise.
            generator.graphsafe_set_state(state)
            self.release()
            raise
        torch.cuda.synchronize()

    def measure(self) -> float:
        """Milliseconds a call, over about `budget_ms` of replays."""
        self.graph.replay()  # clocks and caches settle after the impl that ran before
        return _elapsed_ms(self.graph.replay, self.replays) / (self.replays * self.count)

    def outputs(self, protected: set[int]) -> list[torch.Tensor]:
        """Outputs of the first set, overwritten with NaN and written again by one more replay.

        `protected`: storage addresses of the inputs; an output that is an input (an addition's gradient) is left alone.
        """
        for out in self.slots[0]:
            writable = out.untyped_storage().data_ptr() not in protected and 0 not in out.stride()
            if writable and out.is_floating_point() and out.dtype.itemsize > 1:
                out.fill_(math.nan)
        self.graph.replay()
        torch.cuda.synchronize()
        return [out.clone() for out in self.slots[0]]

    def release(self) -> None:
        """Drop the graph, its memory pool and the calls."""
        self.slots, self.calls = [], []
        del self.graph


class EventTimer:
    """One call at a time between two events, the L2 flushed before each: for what cannot be captured.

    `restore` puts the inputs right again before every call, outside the timed span.
    """

    def __init__(self, prepare: Prepare, budget_ms: float, restore: Callable[[], object] | None = None) -> None:
        self.method = "events"
        self.restore = restore
        self.calls = prepare()[:1]
        self.flush = torch.empty(rotation_bytes(_l2_bytes()) // 4, dtype=torch.int32, device="cuda")
        host_s = []
        for _ in range(3):
            self._before(1)
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.calls[0]()
            host_s.append(time.perf_counter() - start)
            torch.cuda.synchronize()
        # The GPU must be busy flushing while the host prepares the call, or the host's time would be counted.
        flush_ms = max(_elapsed_ms(self.flush.zero_), 1e-3)
        self.flushes = min(64, 1 + math.ceil(1.5e3 * host_s[-1] / flush_ms))
        once = self._once()
        self.repeats = max(5, min(200, math.ceil(budget_ms / max(once, 1e-3))))

    def _before(self, flushes: int) -> None:
        if self.restore is not None:
            self.restore()
        for _ in range(flushes):
            self.flush.zero_()

    def _once(self) -> float:
        self._before(self.flushes)
        return _elapsed_ms(self.calls[0])

    def measure(self) -> float:
        """Milliseconds a call: the median of about `budget_ms` of calls."""
        return statistics.median(self._once() for _ in range(self.repeats))

    def outputs(self, protected: set[int]) -> list[torch.Tensor]:
        """Outputs of one more call."""
        self._before(0)
        outputs = [out.clone() for out in self.calls[0]()]
        torch.cuda.synchronize()
        return outputs

    def release(self) -> None:
        """Drop the calls and the flush buffer."""
        self.calls = []
        del self.flush


Timer = GraphTimer | EventTimer


def make_timer(
    prepare: Prepare, budget_ms: float, capturable: bool = True, restore: Callable[[], object] | None = None
) -> tuple[Timer, str | None]:
    """The graph timer, or the event timer and the reason why the call could not be captured."""
    if not capturable:
        return EventTimer(prepare, budget_ms, restore), None
    # Errors of the call itself (an unsupported shape, say) must not read like a failed capture, so call once before.
    prepare()[0]()
    torch.cuda.synchronize()
    try:
        return GraphTimer(prepare, budget_ms), None
    except Exception as error:
        cause = _first_cause(error)
        if isinstance(cause, torch.cuda.OutOfMemoryError):
            raise cause from None
        torch.cuda.synchronize()
        return EventTimer(prepare, budget_ms, restore), one_line(cause)


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong inside a capture: the end of the broken capture raises an error of its own over it."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def host_us(call: Call, ms: float, blocks: int = 5, calls: int | None = None) -> float:
    """Host microseconds a call: best of `blocks` loops of asynchronous calls, too short to fill the launch queue."""
    count = calls if calls is not None else max(3, min(64, int(8 / max(ms, 1e-3))))
    call()
    best = math.inf
    for _ in range(blocks):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - start)
    synchronize()
    return best / count * 1e6


def peak_bytes(call: Call) -> int:
    """Peak memory of one call above what was allocated before it, its outputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception as one line for the record."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --------------------------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------------------------


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def rotation_target() -> int:
    """Bytes that rotated inputs must exceed on the current GPU."""
    return rotation_bytes(_l2_bytes())


def free_bytes() -> int:
    """Free memory of the current GPU."""
    return int(torch.cuda.mem_get_info()[0])


def _sustained_ms(body: Callable[[], object], calls: int, rounds: int) -> float:
    for _ in range(calls):
        body()
    torch.cuda.synchronize()
    return statistics.median(_elapsed_ms(body, calls) / calls for _ in range(rounds))


def copy_tbps() -> float:
    """Bandwidth of a large device copy of random bf16, bytes read and written, TB/s."""
    numel = min(2**30, free_bytes() // 16)
    x = torch.randn(numel, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.numel() * 2 / _sustained_ms(lambda: y.copy_(x), calls=20, rounds=7) / 1e9


def matmul_tflops(n: int = 8192) -> float:
    """Sustained rate of torch's bf16 n x n x n product of random data, TFLOP/s."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _sustained_ms(lambda: a @ b, calls=50, rounds=7) / 1e9


def nvidia_smi(*fields: str) -> dict[str, Any]:
    """Fields of `nvidia-smi --query-gpu` for the current GPU; empty where the tool is missing or refuses."""
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
            "-i",
            f"GPU-{uuid}",
        ]
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError):
        return {}
    return dict(zip(fields, (part.strip() for part in line.splitlines()[0].split(",")), strict=False)) if line else {}


def sm_clock_mhz() -> int | None:
    """The SM clock now, or None."""
    value = nvidia_smi("clocks.sm").get("clocks.sm", "")
    return int(value) if value.isdigit() else None
