"""Every kernel, at every config that the benchmark cases and samples reach, compiled for GPUs that are not there.

Fails on register spills, on serialised wgmma (ptxas C75xx) and on shared memory past the target's limit.
"""

from __future__ import annotations

import pytest
import torch

import torch_triton_ops
from bench import gemm_suite
from torch_triton_ops import launch as tt_launch
from torch_triton_ops import offline

pytestmark = pytest.mark.skipif(tt_launch.INTERPRET, reason="the interpreter replaces the compiler")


def calls(spec, target):
    """(args, kwargs) on the meta device: every benchmark case; for one target also the samples (`<op>_compile_samples` where an
    op picks some), in half precision."""
    for case in spec.function("bench_cases")():
        yield case.make("meta", case.dtype)
    if target == 90:
        samples = spec.function("compile_samples") or spec.function("samples")
        for sample in samples("meta", torch.bfloat16):
            yield sample.args, sample.kwargs


def forward_and_backward(spec, args, kwargs):
    def leaf(value):
        wanted = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if wanted else value

    names = [a.name for a in spec.arguments]
    args = [leaf(a) if names[i] in spec.differentiable else a for i, a in enumerate(args)]
    spec.op(*args, **kwargs)
    with torch.no_grad():
        spec.op(*args, **kwargs)
    out = spec.op(*args, **kwargs)
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None and o.requires_grad]
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs])


def hardest(launches):
    """One launch for each kernel, dtype, config and option: of those that differ only in the sizes and addresses, or in the value
    of a factor, the one of which Triton knows least (divisible by 16, equal to 1), because it needs most registers."""

    def known(launch):
        offsets = [a.storage_offset() * a.element_size() if isinstance(a, torch.Tensor) else a for a in launch.args]
        return sum(type(a) is int and (a % 16 == 0 or a == 1) for a in offsets)

    found = {}
    for launch in sorted(launches, key=known):
        kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else type(a) for a in launch.args)
        factors = {n: c for n, c in launch.constexprs.items() if type(c) is not float or c in (-1.0, 0.0, 1.0)}
        found.setdefault((launch.kernel, kinds, str(factors), str(launch.options)), launch)
    return list(found.values())


@pytest.mark.parametrize("target", offline.TARGETS, ids=lambda t: f"sm{t}")
@pytest.mark.parametrize("spec", torch_triton_ops.specs(), ids=lambda s: s.name)
def test_compiles_clean(spec, target):
    def run():
        for args, kwargs in calls(spec, target):
            forward_and_backward(spec, args, kwargs)

    launches = hardest(offline.record(run, target))
    assert launches, f"{spec.qualname} recorded no launch"
    faults = {}
    for launch in launches:
        found = offline.compile_launch(launch, target).faults()
        if found:
            faults[f"{launch.kernel.__name__} {launch.constexprs} {launch.options}"] = found
    assert not faults, "\n".join(f"{k}: {v}" for k, v in faults.items())


# fp32 operands of attention are held in registers, which the compiler fills to the last one
FP32 = {
    "flash_attn": ("D64_causal", "D128_gqa_causal", "D256_terms", "bias"),
    "flash_attn_varlen": ("D64_causal",),
    "paged_decode_attn": ("rows_int64_scaled", "D256_tokens"),
}


@pytest.mark.parametrize("name", FP32)
def test_fp32_attention_hardly_spills(name):
    """Nothing or a few registers; whole operands would be some hundred."""
    spec = next(s for s in torch_triton_ops.specs() if s.name == name)
    samples = {s.id: s for s in spec.function("samples")("meta", torch.float32)}

    def run():
        for sample in (samples[i] for i in FP32[name]):
            forward_and_backward(spec, sample.args, sample.kwargs)

    for launch in hardest(offline.record(run, 90)):
        assert offline.compile_launch(launch, 90).spilled <= 64, (launch.kernel.__name__, launch.constexprs)


def test_layers_of_language_models_compile_clean():
    """The configs that `linear` chooses for bench.gemm_suite's few-token shapes, on the target they were tuned on."""

    def run():
        for case in gemm_suite.cases():
            args, _ = case.make("meta", case.dtype)
            if args[0].shape[0] <= 256:
                torch.ops.tt.linear(*args)

    for launch in offline.record(run, 90):
        assert not offline.compile_launch(launch, 90).faults(), (launch.constexprs, launch.options)


def test_the_gate_sees_a_spill(spilling_launch):
    compiled = offline.compile_launch(spilling_launch, 90)
    assert compiled.spilled > 0
    assert "spills" in " ".join(compiled.faults())


@pytest.fixture
def spilling_launch():
    """A row of 2**17 elements held by one warp cannot fit into registers."""
    from torch_triton_ops.ops import rms_norm

    x = torch.empty(4, 2**14, device="meta")
    launch = offline.record(lambda: rms_norm.rms_norm(x), 90)[0]
    constexprs = launch.constexprs | {"BLOCK_M": 1, "BLOCK_N": 2**15}
    return tt_launch.Launch(launch.kernel, launch.grid, launch.args, constexprs, {"num_warps": 1, "num_stages": 1})
