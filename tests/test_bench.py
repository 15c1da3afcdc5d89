"""The benchmark without a GPU: cases, inputs, checks, ratios, the record and its merging, charts, the command line.

Timers are replaced by one that runs the calls on CPU tensors and reports invented times.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torch_triton_ops
from bench import check, gemm_suite, peers, plot, record, run, timing
from torch_triton_ops.cases import BenchCase, Cost

ROOT = Path(__file__).resolve().parent.parent
LIMITS = run.Limits(copy_tbps=4.0, matmul_tflops=600.0)


class FakeSpec:
    """A registry entry without a registry: `scale(x, weight) -> x * weight`."""

    name, namespace = "scale", "fake"
    arguments = (SimpleNamespace(name="x"), SimpleNamespace(name="weight"))
    differentiable = ("x", "weight")

    def __init__(self) -> None:
        make = lambda device, dtype: (
            (torch.randn(64, 32, device=device, dtype=dtype), torch.randn(32, device=device, dtype=dtype)),
            {},
        )
        self.functions: dict[str, Any] = {
            "bench_cases": lambda: iter(
                [BenchCase("64x32", make), BenchCase("wide", make, passes=("fwd", "bwd")), BenchCase("other", make)]
            ),
            "cost": lambda x, weight: Cost(x.numel(), 2 * x.numel() * 2, 2 * x.numel(), 3 * x.numel() * 2),
            "reference": lambda x, weight: x * weight,
            "fake": lambda x, weight: torch.empty_like(x),
        }

    def function(self, suffix: str) -> Any:
        return self.functions.get(suffix)


class FakeTimer:
    """Calls once; every call then takes `ms` milliseconds, and one per cent more in each round."""

    method = "graph"

    def __init__(self, prepare: timing.Prepare, ms: float) -> None:
        self.calls = prepare()
        self.calls[0]()
        self.ms, self.round = ms, 0

    def measure(self) -> float:
        self.round += 1
        return self.ms * (1 + 0.01 * self.round)

    def outputs(self, protected: set[int]) -> list[torch.Tensor]:
        return [out.clone() for out in self.calls[0]()]

    def release(self) -> None:
        self.calls = []


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Clocks that need no GPU; the list gives each impl's milliseconds in order of setting up."""
    times: list[float] = []
    monkeypatch.setattr(timing, "make_timer", lambda prepare, *a, **k: (FakeTimer(prepare, times.pop(0)), None))
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 1024)
    monkeypatch.setattr(run, "_free_memory", lambda: None)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    monkeypatch.setattr(timing, "rotation_target", lambda: 3 * (64 * 32 + 32) * 2)
    monkeypatch.setattr(timing, "free_bytes", lambda: 10**9)
    return times


def bench(impls: list[peers.Impl], pass_name: str = "fwd", case: int = 0) -> dict[str, record.Row]:
    spec = FakeSpec()
    chosen = list(spec.function("bench_cases")())[case]
    found = peers.Found([*impls])
    rows = run.bench_pass(
        spec, chosen, pass_name, found, LIMITS, run.Options(rounds=5), "stamp", device="cpu", say=lambda line: None
    )
    return {row["impl"]: row for row in rows}


def scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


# --------------------------------------------------------------------------------------------------------------------
# Cases and inputs
# --------------------------------------------------------------------------------------------------------------------


def test_walk_filters_by_case_and_by_op_and_case() -> None:
    ids = lambda pattern: [case.id for _, case in run.walk([FakeSpec()], pattern)]
    assert ids(None) == ["64x32", "wide", "other"]
    assert ids("^w") == ["wide"]
    assert ids("scale/oth") == ["other"]
    assert ids("nothing") == []


def test_walk_passes_over_ops_without_cases() -> None:
    spec = FakeSpec()
    del spec.functions["bench_cases"]
    assert list(run.walk([spec], None)) == []


def test_every_registered_op_has_runnable_cases() -> None:
    """The walk, the cost and the peers' signatures agree with the real registry; shapes on the meta device."""
    import torch_triton_ops

    seen = set()
    for spec, case in run.walk(torch_triton_ops.specs(), None):
        seen.add(spec.name)
        args, kwargs = case.make("meta", case.dtype)
        cost = spec.function("cost")(*args, **kwargs)
        assert cost.bytes > 0
        assert set(case.passes) <= set(peers.PASSES)
        if set(case.passes) & {"bwd", "fwdbwd"}:
            assert spec.differentiable
            assert cost.backward_bytes > 0
    assert "vector_add" in seen


def test_input_sets_are_random_reproducible_and_different() -> None:
    spec = FakeSpec()
    case = next(spec.function("bench_cases")())
    first, again, second = (run.make_set(spec, case, "fwdbwd", i, "cpu") for i in (0, 0, 1))
    assert torch.equal(first.arguments["x"], again.arguments["x"])
    assert not torch.equal(first.arguments["x"], second.arguments["x"])
    assert all(t.count_nonzero() > 0.99 * t.numel() for t in first.tensors())
    assert list(first.leaves) == ["x", "weight"]
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in first.leaves.values())
    assert not run.make_set(spec, case, "fwd", 0, "cpu").leaves


def test_a_cloned_set_shares_nothing_and_is_restored() -> None:
    spec = FakeSpec()
    case = next(spec.function("bench_cases")())
    inputs = run.make_set(spec, case, "fwdbwd", 0, "cpu")
    copy = inputs.clone()
    with torch.no_grad():
        copy.arguments["x"].zero_()
    assert inputs.arguments["x"].count_nonzero() > 0
    copy.copy_(inputs)
    assert torch.equal(copy.arguments["x"], inputs.arguments["x"])
    assert copy.leaves["x"] is copy.arguments["x"]


@pytest.mark.parametrize(
    ("per_set", "free", "sets"),
    [(200_000_000, 10**12, 1), (100_000_000, 10**12, 2), (8_000_000, 10**12, 23), (10, 10**12, 64), (10**8, 10**8, 1)],
)
def test_rotation_exceeds_three_times_the_l2(per_set: int, free: int, sets: int) -> None:
    target = timing.rotation_bytes(50 * 2**20)
    assert target >= 180_000_000
    assert timing.rotation_count(per_set, target, free) == sets


@pytest.mark.parametrize(("estimate", "sets"), [(0.001, 23), (0.05, 3), (100.0, 2), (0.0, 64)])
def test_a_graph_goes_round_the_sets(estimate: float, sets: int) -> None:
    count = timing.calls_per_graph(estimate, sets)
    assert count >= sets
    assert count % sets == 0
    assert count <= max(timing.MAX_CALLS_PER_GRAPH, sets)


def test_host_time_and_spread() -> None:
    calls = []
    assert timing.host_us(lambda: calls.append(1) or [], 1.0, blocks=2, calls=10) > 0
    assert len(calls) == 21
    assert timing.Spread.of([3.0, 1.0, 2.0]) == timing.Spread(2.0, 1.0, 3.0)


def test_reason_of_a_failed_capture_is_the_first_error() -> None:
    end = RuntimeError("the end of the capture")
    end.__context__ = ValueError("the real one")
    assert timing.one_line(timing._first_cause(end)) == "ValueError: the real one"
    assert len(timing.one_line(ValueError("x" * 1000))) == 200


# --------------------------------------------------------------------------------------------------------------------
# The timers' own logic, on a CUDA made of Python
# --------------------------------------------------------------------------------------------------------------------


class FakeGraph:
    """Replays nothing; `log` tells what happened."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda as far as the timers use it, on CPU tensors; every span between two events takes 1 ms."""
    log: list[str] = []
    event = lambda enable_timing: SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0
    )
    generator = SimpleNamespace(
        clone_state=lambda: "state", graphsafe_set_state=lambda state: log.append(f"generator {state}")
    )

    @contextlib.contextmanager
    def capture(graph: FakeGraph, stream: Any) -> Iterator[None]:
        log.append("capture")
        try:
            yield
        except Exception as inside:
            error = RuntimeError("capture invalidated")
            error.__context__ = inside
            raise error from inside

    empty = torch.empty
    for name, value in {
        "Event": event,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda s: contextlib.nullcontext(),
        "current_stream": lambda: None,
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "default_generators": [generator],
        "CUDAGraph": lambda: FakeGraph(log),
        "graph": capture,
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "ROTATION_FLOOR", 64)
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    return log


def test_graph_timer_captures_whole_rounds_of_the_sets(fake_cuda: list[str]) -> None:
    counts = [0, 0, 0]

    def prepare() -> list[timing.Call]:
        def call(i: int) -> list[torch.Tensor]:
            counts[i] += 1
            return [torch.full((4,), float(i)), inputs[i]]

        return [lambda i=i: call(i) for i in range(3)]

    inputs = [torch.ones(2) for _ in range(3)]
    timer, reason = timing.make_timer(prepare, budget_ms=5.0)
    assert reason is None
    assert timer.method == "graph"
    assert timer.count % 3 == 0
    assert sum(counts) >= timer.count
    assert timer.replays == 5
    assert timer.measure() == pytest.approx(1.0 / (5 * timer.count))
    outputs = timer.outputs({inputs[0].untyped_storage().data_ptr()})
    assert outputs[0].isnan().all()  # a replay that writes nothing is found out
    assert torch.equal(outputs[1], torch.ones(2))  # an output that is an input is left alone
    timer.release()


def test_a_failed_capture_falls_back_to_events_and_mends_the_generator(fake_cuda: list[str]) -> None:
    def prepare() -> list[timing.Call]:
        def call() -> list[torch.Tensor]:
            if fake_cuda[-1:] == ["capture"]:
                raise RuntimeError("operation not permitted when stream is capturing")
            return [torch.ones(3)]

        return [call]

    timer, reason = timing.make_timer(prepare, budget_ms=5.0)
    assert fake_cuda == ["capture", "generator state"]
    assert timer.method == "events"
    assert reason == "RuntimeError: operation not permitted when stream is capturing"
    assert timer.measure() == 1.0
    assert torch.equal(timer.outputs(set())[0], torch.ones(3))
    timer.release()


def test_out_of_memory_in_a_capture_is_no_failed_capture(fake_cuda: list[str]) -> None:
    def call() -> list[torch.Tensor]:
        if fake_cuda[-1:] == ["capture"]:
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return []

    with pytest.raises(torch.cuda.OutOfMemoryError):
        timing.make_timer(lambda: [call], budget_ms=5.0)


def test_event_timer_restores_the_inputs_before_every_call(fake_cuda: list[str]) -> None:
    x = torch.ones(4)
    timer, _ = timing.make_timer(lambda: [lambda: [x.mul_(2)]], 5.0, capturable=False, restore=lambda: x.fill_(1))
    timer.measure()
    assert torch.equal(timer.outputs(set())[0], torch.full((4,), 2.0))
    assert "capture" not in fake_cuda


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------


def expected_scale(dtype: torch.dtype = torch.bfloat16) -> tuple[check.InputSet, check.Expected]:
    torch.manual_seed(0)
    arguments = {"x": torch.randn(64, 32).to(dtype), "weight": torch.randn(32).to(dtype)}
    inputs = check.InputSet(arguments, 2)
    return inputs, check.expect("scale", scale, inputs)


def test_a_right_output_passes() -> None:
    inputs, expected = expected_scale()
    result = check.verdict([scale(**inputs.arguments)], expected)
    assert result["passed"]
    assert result["against"] == "fp64"
    assert 0 < result["rel_error"] < 1e-2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda y: y * 1.1, "relative error"),
        (lambda y: y.index_fill(0, torch.tensor([63]), 0), "error"),
        (lambda y: y.index_fill(0, torch.tensor([5]), math.nan), "relative error inf"),
        (lambda y: y[:-1], "shape"),
    ],
    ids=["scaled", "last_row_unwritten", "nan", "shape"],
)
def test_a_wrong_output_fails(spoil: Any, reason: str) -> None:
    inputs, expected = expected_scale()
    result = check.verdict([spoil(scale(**inputs.arguments))], expected)
    assert not result["passed"]
    assert reason in result["reason"]
    json.dumps(result, allow_nan=False)


def test_a_missing_output_fails() -> None:
    _, expected = expected_scale()
    assert "0 results instead of 1" in check.verdict([], expected)["reason"]


def test_equal_infinities_and_integers_are_no_error() -> None:
    expected = check.Expected([torch.tensor([1.0, -math.inf]), torch.tensor([3, 4])], "fp64", [(0.0, 0.0)] * 2, 0.0)
    assert check.verdict([torch.tensor([1.0, -math.inf]), torch.tensor([3, 4])], expected)["passed"]
    assert not check.verdict([torch.tensor([1.0, -math.inf]), torch.tensor([3, 5])], expected)["passed"]
    assert not check.verdict([torch.tensor([1.0, 0.0]), torch.tensor([3, 4])], expected)["passed"]


def test_attention_in_slices_equals_the_whole() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    leaves = {n: t.requires_grad_() for n, t in (("q", q), ("k", k), ("v", v))}
    inputs = check.InputSet(dict(leaves), 3, leaves, [torch.randn(2, 4, 5, 6)])
    sliced = check.reference_values("flash_attn", attention, inputs, torch.float64)
    whole = check.reference_values("another_op", attention, inputs, torch.float64)
    assert [t.shape for t in sliced] == [(2, 4, 5, 6), q.shape, k.shape, v.shape]
    torch.testing.assert_close(sliced, whole)


# --------------------------------------------------------------------------------------------------------------------
# One (op, case, pass)
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pass_name", "case"), [("fwd", 0), ("fwdbwd", 0), ("bwd", 1)])
def test_rows_have_the_schema(fake_gpu: list[float], pass_name: str, case: int) -> None:
    fake_gpu += [0.01, 0.02]
    rows = bench([peers.Impl("tt", scale), peers.Impl("eager", scale)], pass_name, case)
    row = rows["tt"]
    assert {
        "op",
        "case",
        "dtype",
        "pass",
        "impl",
        "measured",
        "method",
        "sets",
        "check",
        "host_us",
        "peak_bytes",
    } < set(row)
    assert row["op"] == "scale"
    assert row["dtype"] == "bfloat16"
    assert row["pass"] == pass_name
    assert row["check"]["passed"], row["check"]
    assert row["ms_min"] < row["ms"] < row["ms_max"]
    # compulsory bytes of the pass over the copy's bandwidth
    nbytes = 64 * 32 * 2 * {"fwd": 2, "fwdbwd": 5, "bwd": 3}[pass_name]
    assert row["bytes"] == nbytes
    assert row["tbps"] == pytest.approx(nbytes / row["ms"] / 1e9, abs=1e-4)
    assert row["ratio_to_best_peer"] == pytest.approx(2.0, rel=1e-3)
    assert row["best_peer"] == "eager"
    assert "ratio_to_best_peer" not in rows["eager"]
    stamp = {"schema_version": record.SCHEMA_VERSION}
    assert record.problems({"header": stamp, "stamps": {"stamp": stamp}, "rows": list(rows.values())}) is None


def test_every_registered_op_runs_and_passes_its_check(fake_gpu: list[float]) -> None:
    """Ours and the eager peer on small inputs: fakes, gradients, references and signatures agree with the registry's."""
    import torch_triton_ops

    for spec in torch_triton_ops.specs():
        if spec.function("bench_cases") is None:
            continue
        dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]
        for sample in spec.function("samples")("cpu", dtype):
            sizes = [t.numel() for t in sample.args if isinstance(t, torch.Tensor)]
            if min(sizes) > 0 and max(sizes) > 8:
                break
        case = BenchCase(sample.id, lambda device, dtype, s=sample: (s.args, s.kwargs))
        found = peers.find(spec.name, getattr(torch.ops.tt, spec.name), spec.function("reference"), ("eager",))
        for pass_name in sorted({name for own in spec.function("bench_cases")() for name in own.passes}):
            fake_gpu[:] = [0.01, 0.02]
            rows = run.bench_pass(
                spec, case, pass_name, found, LIMITS, run.Options(), "s", device="cpu", say=lambda line: None
            )
            for row in rows:
                unsupported = row.get("error", "").startswith("not supported")
                assert unsupported or row["check"]["passed"], row
            assert record.valid(rows[0])


def test_float8_results_are_compared() -> None:
    want = torch.tensor([1.0, -2.0, 448.0]).to(torch.float8_e4m3fn)
    assert check._errors(want, want) == (0.0, 0.0)
    got = torch.tensor([1.0, -2.0, 416.0]).to(torch.float8_e4m3fn)
    assert check._errors(got, want)[1] == 32.0


def test_a_wrong_peer_is_recorded_and_out_of_the_ratio(fake_gpu: list[float]) -> None:
    fake_gpu += [0.02, 0.01, 0.03]
    wrong = peers.Impl("liger", lambda x, weight: x + weight)
    rows = bench([peers.Impl("tt", scale), wrong, peers.Impl("eager", scale)])
    assert not rows["liger"]["check"]["passed"]
    assert rows["tt"]["best_peer"] == "eager"
    assert rows["tt"]["ratio_to_best_peer"] == pytest.approx(1.5, rel=1e-3)


def test_no_ratio_when_ours_is_wrong(fake_gpu: list[float]) -> None:
    fake_gpu += [0.01, 0.02]
    rows = bench([peers.Impl("tt", lambda x, weight: x), peers.Impl("eager", scale)])
    assert not rows["tt"]["check"]["passed"]
    assert "ratio_to_best_peer" not in rows["tt"]


def test_an_impl_that_raises_is_recorded_with_its_reason(fake_gpu: list[float]) -> None:
    fake_gpu += [0.01, 0.02]

    def broken(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("blocks of 65536\nat most")

    def unsupported(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise peers.Unsupported("no bias")

    def full(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    fake_gpu += [0.0, 0.0, 0.0]
    impls = [peers.Impl("liger", broken), peers.Impl("quack", unsupported), peers.Impl("fa4", full)]
    rows = bench([peers.Impl("tt", scale), *impls])
    assert rows["liger"]["error"] == "RuntimeError: blocks of 65536 at most"
    assert rows["quack"]["error"] == "not supported: no bias"
    assert rows["fa4"]["error"] == "out of memory"
    assert "ms" not in rows["liger"]
    assert "best_peer" not in rows["tt"]
    assert all(name in record.describe(rows[name]) for name in rows)


def test_an_impl_that_overwrites_its_inputs_spoils_nobodys(fake_gpu: list[float]) -> None:
    fake_gpu += [0.01, 0.02, 0.03]
    overwriting = peers.Impl("liger", lambda x, weight: x.mul_(weight), in_place=("fwd",))
    rows = bench([overwriting, peers.Impl("tt", scale), peers.Impl("eager", scale)])
    assert rows["liger"]["method"] == "graph, in place"
    assert all(row["check"]["passed"] for row in rows.values())


def test_launch_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_triton_ops")
    rows = run.bench_launch("stamp", ("eager",), device="cpu", calls=3)
    assert [row["impl"] for row in rows] == ["tt", "eager"]
    for row in rows:
        assert row["host_us"] > 0
        assert row["check"]["passed"]
        assert "ms" not in row


@pytest.mark.parametrize(
    ("flops", "nbytes", "unit", "fraction"),
    [(1, 4_000_000_000, "tbps", 0.5), (600_000_000_000, 1, "tflops", 0.5)],
    ids=["memory", "compute"],
)
def test_rate_names_the_limit_that_binds(flops: int, nbytes: int, unit: str, fraction: float) -> None:
    row = record.rate(flops, nbytes, 2.0, 4.0, 600.0)
    assert unit in row
    assert len({"tbps", "tflops"} & set(row)) == 1
    assert row["fraction_of_limit"] == pytest.approx(fraction)
    assert "fraction_of_limit" not in record.rate(0, 0, 1.0, 4.0, 600.0)


# --------------------------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------------------------


def test_absent_peers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_unavailable", {})
    monkeypatch.setitem(peers.PACKAGES, "liger", ("no_such_package_of_liger", "liger-kernel"))
    found = peers.find("softmax", scale, scale, ("eager", "liger", "cudnn"))
    assert [impl.name for impl in found.impls] == ["tt", "eager"]  # cudnn has no softmax: absent, not missing
    assert found.missing == {"liger": "not installed (pip install liger-kernel)"}


def test_a_peer_that_cannot_be_imported_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_peer_package.py").write_text("raise RuntimeError('needs a GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "_unavailable", {})
    monkeypatch.setitem(peers.PACKAGES, "quack", ("broken_peer_package", "quack-kernels"))
    assert peers.find("softmax", scale, scale, ("quack",)).missing == {
        "quack": "cannot be imported: RuntimeError: needs a GPU"
    }


def test_ops_that_are_not_compiled() -> None:
    names = lambda op: [impl.name for impl in peers.find(op, scale, scale, ("eager", "compile")).impls]
    assert names("linear") == ["tt", "eager"]
    assert names("softmax") == ["tt", "eager", "compile"]


def eager(op: str) -> Any:
    return peers.find(op, scale, scale, ("eager",)).impls[1].call


def test_eager_rope_is_a_rotation() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    angle = torch.randn(6, 4)
    half = eager("rope")(q, k, angle.cos(), angle.sin())
    full = eager("rope")(q, k, torch.cat([angle.cos()] * 2, -1)[None], torch.cat([angle.sin()] * 2, -1)[None])
    torch.testing.assert_close(half, full)
    first = q[..., :4] * angle.cos() - q[..., 4:] * angle.sin()
    torch.testing.assert_close(half[0][..., :4], first)
    torch.testing.assert_close(half[1].norm(), k.norm())
    with pytest.raises(peers.Unsupported, match="pairs"):
        eager("rope")(q, k, angle.cos(), angle.sin(), True)


def test_eager_cross_entropy_and_attention_refuse_what_they_lack() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 7), torch.tensor([0, 1, -100, 6, 2])
    torch.testing.assert_close(
        eager("cross_entropy")(logits, target, z_loss=0.0), torch.nn.functional.cross_entropy(logits, target)
    )
    with pytest.raises(peers.Unsupported, match="no softcap"):
        eager("cross_entropy")(logits, target, softcap=30.0)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    assert eager("flash_attn")(q, k, k, causal=True, softcap=0.0, window_left=-1).shape == q.shape
    for options, reason in [
        ({"window_left": 3}, "no window_left"),
        ({"sinks": torch.zeros(4)}, "no sinks"),
    ]:
        with pytest.raises(peers.Unsupported, match=reason):
            eager("flash_attn")(q, k, k, **options)
    with pytest.raises(peers.Unsupported, match="unequal lengths"):
        eager("flash_attn")(q[:, :, :3], k, k, causal=True)


@pytest.mark.parametrize("op", ["vector_add", "softmax", "rms_norm", "swiglu", "linear"])
def test_eager_peers_agree_with_the_references(op: str) -> None:
    import torch_triton_ops

    if op not in [spec.name for spec in torch_triton_ops.specs()]:
        pytest.skip(f"{op} is not registered")
    spec = next(spec for spec in torch_triton_ops.specs() if spec.name == op)
    x, w = torch.randn(4, 8), torch.randn(8)
    args = {"softmax": (x,), "rms_norm": (x, w), "linear": (x, torch.randn(3, 8))}.get(op, (x, torch.randn(4, 8)))
    torch.testing.assert_close(eager(op)(*args), spec.function("reference")(*args))


# --------------------------------------------------------------------------------------------------------------------
# The record
# --------------------------------------------------------------------------------------------------------------------


def header(gpu: str = "NVIDIA H200", date: str = "2026-01-01T00:00:00+00:00") -> dict[str, Any]:
    return {
        "schema_version": record.SCHEMA_VERSION,
        "gpu": gpu,
        "driver": "1",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "date": date,
        "commit": "abc",
        "copy_tbps": 4.0,
        "matmul_tflops": 600.0,
    }


def make_row(op: str, case: str, impl: str, ms: float, stamp: str, pass_name: str = "fwd", **more: Any) -> record.Row:
    row = {"op": op, "case": case, "dtype": "bfloat16", "pass": pass_name, "impl": impl, "measured": stamp}
    row |= {"ms": ms, "ms_min": 0.99 * ms, "ms_max": 1.01 * ms, "method": "graph", "check": {"passed": True}}
    return {**row, **record.rate(10**9, 4 * 10**8, ms, 4.0, 600.0), **more}


def make_record(stamp: str, rows: list[record.Row], **how: Any) -> record.Record:
    head = header(**how)
    return {"header": head, "stamps": {stamp: head}, "rows": rows}


def test_merge_replaces_an_op_and_keeps_the_others_with_their_stamp() -> None:
    old = make_record(
        "a",
        [make_row("softmax", c, "tt", 1.0, "a") for c in ("old_case", "both")]
        + [make_row("rope", "r", "tt", 2.0, "a")],
    )
    new = make_record("b", [make_row("softmax", "both", "tt", 0.5, "b")], date="2026-02-02T00:00:00+00:00")
    merged = record.merge(old, new, ["softmax"])
    assert [(r["op"], r["case"], r["measured"]) for r in merged["rows"]] == [
        ("softmax", "both", "b"),
        ("rope", "r", "a"),
    ]
    assert merged["header"]["date"].startswith("2026-02")
    assert merged["stamps"]["a"]["date"].startswith("2026-01")
    assert record.problems(merged) is None


def test_merge_of_some_cases_keeps_the_other_cases_and_drops_unused_stamps() -> None:
    old = make_record("a", [make_row("softmax", c, impl, 1.0, "a") for c in ("x", "y") for impl in ("tt", "eager")])
    new = make_record("b", [make_row("softmax", "y", "tt", 0.5, "b")])
    merged = record.merge(old, new, [])
    assert [(r["case"], r["impl"]) for r in merged["rows"]] == [("x", "tt"), ("x", "eager"), ("y", "tt")]
    assert set(
        record.merge(merged, make_record("c", [make_row("softmax", "x", "tt", 1.0, "c")]), ["softmax"])["stamps"]
    ) == {"c"}


def test_merge_refuses_another_gpu() -> None:
    with pytest.raises(record.RecordError, match=r"NVIDIA A100.*NVIDIA H200.*--json"):
        record.merge(make_record("a", [], gpu="NVIDIA A100"), make_record("b", []), [])


def test_save_and_load(tmp_path: Path) -> None:
    rows = [make_row("softmax", "x", "tt", 1.0, "a"), make_row("softmax", "x", "eager", 2.0, "a")]
    path = tmp_path / "deep" / "r.json"
    record.save(make_record("a", rows), path)
    assert record.load(path)["rows"] == rows
    assert sum('"impl"' in line for line in path.read_text().splitlines()) == 2  # one row, one line
    assert record.slug("NVIDIA H200") == "nvidia_h200"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"r\.json:1: not JSON"),
        ("[]", "not a benchmark record"),
        ('{"header": {"schema_version": 99}, "stamps": {}, "rows": []}', "schema_version is 99"),
        ('{"header": {"schema_version": 1}, "stamps": {}, "rows": [{"op": "x"}]}', "row 0 has no case"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(record.RecordError, match=message):
        record.load(path)


def test_table_marks_absent_failed_and_event_timed() -> None:
    rows = [
        make_row("softmax", "x", "tt", 0.1, "a", best_peer="eager", ratio_to_best_peer=2.0),
        make_row("softmax", "x", "eager", 0.2, "a", method="events"),
        {**make_row("softmax", "x", "liger", 0.2, "a"), "check": {"passed": False}},
        make_row("rope", "x", "tt", 0.1, "a"),
    ]
    lines = record.table(rows).splitlines()
    assert lines[0].split()[:5] == ["op", "case", "dtype", "pass", "unit"]
    assert lines[1].split() == ["softmax", "x", "bfloat16", "fwd", "TB/s", "4", "2*", "x", "100%", "2.00", "eager"]
    assert lines[2].split() == ["rope", "x", "bfloat16", "fwd", "TB/s", "4", "-", "-", "100%"]


def test_compare_tells_change_from_noise() -> None:
    before = make_record("a", [make_row("softmax", c, "tt", 1.0, "a") for c in ("same", "slow", "fast", "gone")])
    after = make_record(
        "b",
        [
            make_row("softmax", c, "tt", ms, "b")
            for c, ms in [("same", 1.005), ("slow", 1.2), ("fast", 0.8), ("new", 1)]
        ],
    )
    lines = {line.split()[1]: line for line in record.compare(before, after).splitlines()[1:]}
    assert set(lines) == {"same", "slow", "fast"}
    assert "within the spread" in lines["same"]
    assert "+20.0%" in lines["slow"]
    assert lines["slow"].endswith("slower")
    assert lines["fast"].endswith("faster")


# --------------------------------------------------------------------------------------------------------------------
# Charts
# --------------------------------------------------------------------------------------------------------------------


def test_charts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        make_row(op, "case", i, 0.2, "a", p)
        for op in ("softmax", "rope")
        for i in ("tt", "eager")
        for p in ("fwd", "bwd")
    ]
    rows.append({**make_row("rope", "case", "liger", 0.1, "a"), "check": {"passed": False, "reason": "wrong"}})
    failed = make_row("rope", "case", "quack", 0.1, "a")
    rows.append({k: failed[k] for k in record.REQUIRED} | {"error": "not supported: pairs"})
    rows.append({k: failed[k] for k in record.REQUIRED} | {"case": "1024", "host_us": 9.0, "check": {"passed": True}})
    path = tmp_path / "gpu.json"
    record.save(make_record("a", rows), path)
    assert plot.main([str(path)]) == 0
    for name in ("gpu_bars.png", "gpu_roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000


def test_absent_and_failed_impls_get_no_bar() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [
        make_row("rope", "c", "tt", 0.2, "a"),
        {**make_row("rope", "c", "liger", 0.1, "a"), "check": {"passed": False}},
    ]
    figure, axes = pyplot.subplots()
    plot._panel(axes, "rope", [("c", rows)], 1.05)
    assert len(axes.patches) == 1
    assert any("liger: wrong output, no figure" in text.get_text() for text in axes.texts)
    pyplot.close(figure)


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu.json"
    record.save(make_record("a", []), path)
    assert plot.main([str(path)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert plot.main([]) == 2


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "no_such_op"], "--op: no op 'no_such_op'; allowed: vector_add"),
        (["--peers", "eager,ligre"], "--peers: no peer 'ligre'; allowed: eager, compile"),
        (["--case", "("], "--case: not a regular expression"),
        (["--rounds", "0"], "--rounds: 0; allowed: 1 or more"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--op", "vector_add", "--case", "27"]) == 0
    assert capsys.readouterr().out.split() == ["vector_add", "2^27", "float32", "fwd"]


def test_without_a_gpu_one_sentence_and_exit_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.run"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA GPU" in done.stderr


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ms in zip(paths, (1.0, 2.0), strict=True):
        record.save(make_record("s", [make_row("softmax", "x", "tt", ms, "s")]), path)
    assert run.main(["--compare", *map(str, paths)]) == 0
    assert "+100.0%" in capsys.readouterr().out
    assert run.main(["--compare", str(paths[0]), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.fixture
def fake_machine(monkeypatch: pytest.MonkeyPatch, fake_gpu: list[float]) -> None:
    """A whole run: the fake spec, a GPU in name only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA Fake 9")
    monkeypatch.setattr(timing, "copy_tbps", lambda: 4.0)
    monkeypatch.setattr(timing, "matmul_tflops", lambda: 600.0)
    monkeypatch.setattr(timing, "nvidia_smi", lambda *fields: {})
    monkeypatch.setattr(timing, "make_timer", lambda prepare, *a, **k: (FakeTimer(prepare, 0.01), None))
    spec = FakeSpec()
    real = run.bench_pass
    monkeypatch.setattr(run, "bench_pass", lambda *a, **k: real(*a, **{**k, "device": "cpu"}))
    monkeypatch.setattr(run, "select_ops", lambda specs, names: [spec])
    monkeypatch.setattr(torch.ops, "fake", SimpleNamespace(scale=scale), raising=False)


@pytest.mark.usefixtures("fake_machine")
def test_a_whole_run_writes_merges_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    assert run.main(["--peers", "eager", "--json", str(path), "--plot"]) == 0
    saved = record.load(path)
    assert saved["header"]["gpu"] == "NVIDIA Fake 9"
    assert len(saved["rows"]) == 3 * 2 * 2  # cases, passes, impls
    assert all(row["check"]["passed"] for row in saved["rows"])
    assert (tmp_path / "r_bars.png").exists()
    assert "x best peer" in capsys.readouterr().out
    assert run.main(["--peers", "eager", "--json", str(path), "--case", "wide"]) == 0
    again = record.load(path)
    assert len(again["rows"]) == len(saved["rows"])


@pytest.mark.usefixtures("fake_machine")
def test_quick_writes_no_record_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.main(["--peers", "eager", "--quick"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert run.main(["--peers", "eager", "--quick", "--json", str(tmp_path / "q.json")]) == 0
    assert {row["case"] for row in record.load(tmp_path / "q.json")["rows"]} == {"64x32"}


@pytest.mark.usefixtures("fake_machine")
def test_a_lost_gpu_ends_the_run_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    working = run.bench_pass

    def failing(spec: Any, case: Any, *a: Any, **k: Any) -> list[record.Row]:
        if case.id == "other":
            raise run.GpuLost("illegal memory access")
        return working(spec, case, *a, **k)

    monkeypatch.setattr(run, "bench_pass", failing)
    path = tmp_path / "r.json"
    assert run.main(["--peers", "eager", "--json", str(path)]) == 1
    assert "illegal memory access" in capsys.readouterr().err
    assert {row["case"] for row in record.load(path)["rows"]} == {"64x32", "wide"}


# --------------------------------------------------------------------------------------------------------------------
# Layers of language models
# --------------------------------------------------------------------------------------------------------------------


def test_gemm_suite_replaces_the_cases_of_linear():
    (spec,) = run.select_ops(torch_triton_ops.specs(), ["linear"])
    found = [case.id for _, case in run.walk([gemm_suite.Suite(spec)], "^16x")]
    assert found == [f"16x{N}x{K}" for N, K in gemm_suite.shapes()]
    assert len(found) == len(set(found)) == 14
    (x, weight), _ = next(iter(gemm_suite.cases())).make("meta", torch.bfloat16)
    assert spec.function("cost")(x, weight) == gemm_suite.Suite(spec).function("cost")(x, weight)


def test_gemm_suite_geometric_means():
    rows = [
        {"impl": "tt", "case": "1x2x3", "ratio_to_best_peer": 0.5},
        {"impl": "tt", "case": "16x2x3", "ratio_to_best_peer": 2.0},
        {"impl": "tt", "case": "16x4x3", "error": "out of memory"},
        {"impl": "eager", "case": "16x2x3"},
    ]
    means = gemm_suite.geomeans(rows)
    assert list(means) == ["1", "16", "all"]
    assert means["all"] == pytest.approx((1.0, 0.5, 2))
    assert means["16"] == pytest.approx((2.0, 2.0, 1))


def test_gemm_suite_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gemm_suite.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
