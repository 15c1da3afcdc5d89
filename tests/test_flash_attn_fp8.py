"""Attention on float8 inputs beyond the conformance suite: the Hopper kernels, which no machine without such a GPU runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import check
from torch_triton_ops import launch, offline
from torch_triton_ops.ops import flash_attn_fp8 as fp8

ROOT = Path(__file__).resolve().parents[1]

# In the interpreter, on CPU tensors. Column (half, lane, element) of 16 of an accumulator goes to place (lane, half, element).
PREPARE = """
import math, torch
from torch_triton_ops.ops import flash_attn_fp8 as fp8
from torch_triton_ops.ops.flash_attn_fp8 import hopper

B, H, Hkv, S, D = 2, 34, 2, 150, 48
_, _, v, q_scale, k_scale, v_scale = fp8._call("cpu", B, H, Hkv, 1, S, D, batched=True)
order = torch.arange(16).reshape(2, 4, 2).permute(1, 0, 2).flatten()
padded = torch.nn.functional.pad(v.view(torch.uint8), (0, 0, 0, 10)).unflatten(2, (10, 16))
want = padded[:, :, :, order].flatten(2, 3).mT
for x in (v, v.view(torch.uint8).mT.contiguous().mT.view(v.dtype)):
    vt, factors, counter = hopper.prepare(x, q_scale, k_scale[0], v_scale, 0.3)
    assert vt.shape == (B, Hkv, D, 160) and torch.equal(vt.view(torch.uint8), want)
    unit = q_scale * k_scale[0].repeat_interleave(17) * 0.3 * math.log2(math.e)
    torch.testing.assert_close(factors, torch.stack([unit, v_scale.repeat_interleave(17, 1)], -1))
    assert counter.item() == 0
print("ok")
"""


def test_values_are_transposed_and_scales_folded(interpreted) -> None:
    assert interpreted("-c", PREPARE) == "ok"


def hopper_launches(Skv: int, causal: bool, D: int = 128):
    """Recorded for sm_90, whatever `_HOPPER` says."""
    from torch_triton_ops.ops.flash_attn_fp8 import hopper

    tensors = fp8._call("meta", 2, 4, 2, 300, Skv, D)
    out = torch.empty(2, 4, 300, D, device="meta", dtype=torch.bfloat16)
    return offline.record(lambda: hopper.forward(*tensors, out, 0.1, causal), 90)


@pytest.mark.skipif(launch.INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(("Skv", "causal"), [(512, False), (515, True)], ids=["even", "masked"])
def test_hopper_kernels_compile_clean(Skv: int, causal: bool) -> None:
    """That they compile at all says that the weights are in the operand's places: they are converted without an instruction."""
    prepare, attention = hopper_launches(Skv, causal)
    assert not offline.compile_launch(attention, 90).faults()
    if causal:
        assert not offline.compile_launch(prepare, 90).faults()


@pytest.mark.skipif(launch.INTERPRET, reason="the interpreter runs the portable kernel alone")
@pytest.mark.parametrize("hopper", [False, True])
def test_which_kernel_runs(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_HOPPER", hopper)

    def last(target: int, D: int = 128, Skv: int = 512, **options) -> str:
        args = fp8._call("meta", 2, 4, 2, 300, Skv, D)
        launches = offline.record(lambda: torch.ops.tt.flash_attn_fp8(*args, **options), target)
        return launches[-1].kernel.__name__

    portable = "_flash_attn_fp8_fwd_kernel"
    chosen = "_flash_attn_fp8_fwd_hopper_kernel" if hopper else portable
    assert last(90) == last(90, 48, causal=True) == last(90, 96, out_dtype=torch.float16) == chosen
    assert last(80) == last(100) == portable
    for refused in ({"D": 72}, {"D": 32}, {"D": 256}, {"out_dtype": torch.float32}, {"scale": -1.0}, {"Skv": 0}):
        assert last(90, **refused) == portable


@pytest.mark.parametrize("batched", [False, True])
def test_the_benchmarks_slices_take_their_scales_along(batched: bool) -> None:
    names = ("q", "k", "v", "q_scale", "k_scale", "v_scale")
    tensors = fp8._call("cpu", 2, 4, 2, 5, 7, 16, batched=batched)
    inputs = check.InputSet(dict(zip(names, tensors, strict=True)) | {"causal": True}, 6, {}, [None])
    sliced, whole = (
        check.reference_values(op, fp8.flash_attn_fp8_reference, inputs, torch.float64)
        for op in ("flash_attn_fp8", "another_op")
    )
    torch.testing.assert_close(sliced, whole)
