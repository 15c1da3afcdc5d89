"""Convert to another dtype.

out[i] = x[i] in dtype

| tensor | shape | dtype |
|---|---|---|
| x | any, any strides | float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, int32 |
| out | that of x, contiguous, never x itself | dtype, any of the same |

The rules are those of torch 2.13's `x.to(dtype)`, on every version of torch and every GPU, and where torch leaves the result
undefined there is one:

| from | to | |
|---|---|---|
| floating | float32, float16, bfloat16 | nearest, ties to even; beyond the largest value infinity |
| floating | float8_e5m2 | nearest, ties to even; beyond the largest value infinity |
| floating | float8_e4m3fn | nearest, ties to even; beyond 448 saturates, infinity too (there is none); NaN stays NaN |
| floating | int8, int32 | towards zero; beyond the range saturates, NaN gives 0 (undefined in torch) |
| int32 | int8 | the low 8 bits |
| int8, int32 | floating | as from float32, to which they are rounded first |

Before 2.13 torch's own conversion to float8_e4m3fn gave NaN beyond 464. Between floating dtypes the gradient is the upstream
gradient in x's dtype; an integer on either side has none.

GPUs from sm_89 convert float8 by instruction; for older ones the kernel computes it from the bits. Tensors that are not
contiguous are copied first. Bytes: numel * (itemsize of x + itemsize of out).

Errors: TypeError where dtype is none of the above.

Source: https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.float8 import MANTISSA, decode_fp8, encode_fp8
from torch_triton_ops.launch import capability, cdiv, launch

_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int32,
)

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def cast_reference(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.is_floating_point() and not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        # fp64 holds the limits of int32 exactly
        x = x.double().nan_to_num(0.0, limits.max, limits.min).clamp(limits.min, limits.max)
    out = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if dtype == torch.float8_e4m3fn:
        # what torch 2.13 does and older ones do not; through detach(), for the gradient is that of `to`
        out.detach().copy_(x.detach().float().clamp(-448, 448))
    return out


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _cast_fwd_kernel(
    x_ptr,
    out_ptr,
    N,
    X_FP8: tl.constexpr,
    OUT_FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """X_FP8, OUT_FP8: 0, or the mantissa bits of the float8 whose codes the uint8 tensor holds."""
    pid = tl.program_id(0)
    if WIDE:  # N may pass 2**31 elements
        pid = pid.to(tl.int64)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    if X_FP8 != 0:
        x = decode_fp8(x, tl.float32, X_FP8, NATIVE)
    elif x.dtype.is_floating():
        x = x.to(tl.float32)
    if OUT_FP8 != 0:
        out = encode_fp8(x.to(tl.float32), OUT_FP8, NATIVE, SATURATE=False)
    elif x.dtype.is_floating() and dtype.is_int():
        # Out of range the instruction's result is anybody's guess. 2**31 - 128 is the largest fp32 below 2**31.
        LOWEST: tl.constexpr = -128.0 if dtype == tl.int8 else -2147483648.0
        HIGHEST: tl.constexpr = 127.0 if dtype == tl.int8 else 2147483520.0
        inside = tl.minimum(tl.maximum(x, LOWEST), HIGHEST)
        out = tl.where(x == x, inside, 0.0).to(dtype)
        if dtype == tl.int32:
            out = tl.where(x >= 2147483648.0, 2147483647, out)
    elif dtype.is_floating():
        out = x.to(tl.float32).to(dtype)
    else:
        out = x.to(dtype)
    tl.store(out_ptr + offs_n, out, mask=mask_n)


# --------------------------------------------------------------------------------------------------------------------
# Launcher, fake, check
# --------------------------------------------------------------------------------------------------------------------

# On an H200, 2^27 elements: 4.1 (widening) to 4.38 TB/s, within 1 % of the best of seven configs each
# (bench/results/tuning/nvidia_h200/transpose.json).
_BLOCK_N = 1024
_WARPS = 2


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not x.is_contiguous():
        x = torch.ops.tt.strided_copy(x)
    # sm_80 has no pointer to float8_e4m3fn: the kernel sees bytes
    x_fp8, out_fp8 = MANTISSA.get(x.dtype, 0), MANTISSA.get(dtype, 0)
    out = x.new_empty(x.shape, dtype=torch.uint8) if out_fp8 else cast_fake(x, dtype)
    N = x.numel()
    launch(
        _cast_fwd_kernel,
        (cdiv(N, _BLOCK_N),),
        x.view(torch.uint8) if x_fp8 else x,
        out,
        N,
        X_FP8=x_fp8,
        OUT_FP8=out_fp8,
        NATIVE=capability(x.device) >= 89,
        WIDE=bool(N >= 2**31),
        BLOCK_N=_BLOCK_N,
        num_warps=_WARPS,
    )
    return out.view(dtype) if out_fp8 else out


def cast_fake(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def cast_check(x: torch.Tensor, dtype: torch.dtype) -> None:
    # fp64 on CPU alone, as for x
    if dtype not in _DTYPES and (dtype != torch.float64 or x.device.type == "cuda"):
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        bad_argument("cast", "dtype", dtype, names, TypeError)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def cast_forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    ctx.dtype = x.dtype
    return torch.ops.tt.cast(x, dtype)


def cast_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.cast(dout, ctx.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _random(n: int, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Values over all magnitudes of the dtype, or over those of an fp32 from 2**-26 to 2**26."""
    if dtype.is_floating_point:
        x = torch.randn(n, device=device) * torch.exp2(torch.arange(n, device=device) % 52 - 26.0)
        limit = torch.finfo(dtype).max  # beyond it torch before 2.13 makes NaN of float8, which opcheck cannot compare
        return x.clamp(-limit, limit).to(dtype)
    bits = torch.iinfo(dtype).bits
    return (
        torch.randint(-(2**31), 2**31, (n,), device=device) >> (torch.arange(n, device=device) % bits + 32 - bits)
    ).to(dtype)


def _corners(n: int, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """The same, after ties, limits, and subnormal, infinite and undefined values of the formats."""
    x = _random(n, device, dtype)
    if dtype.is_floating_point:
        values = [
            0.0,
            -0.0,
            0.5,
            -1.5,
            2.5,
            2**-9,
            2**-10,
            3 * 2**-10,
            2**-17,
            3 * 2**-17,
            127.9,
            -128.9,
            300.0,
            464.0,
            465.0,
        ]
        values += [-480.0, 61439.0, 61440.0, -65520.0, 1e38, 2.0**31, -(2.0**31) - 256, math.inf, -math.inf, math.nan]
    else:
        values = [torch.iinfo(dtype).min, torch.iinfo(dtype).max, 2**24 + 1 if dtype == torch.int32 else 1]
    x[: len(values)] = torch.tensor(values, device=device).to(dtype)
    return x


def cast_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.float64:  # gradcheck
        yield Sample("to_float64", (torch.randn(3, 5, device=device, dtype=dtype), torch.float64))
        return
    first = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield Sample("matrix", (_random(129, device, dtype).view(3, 43), first))
    for to in _DTYPES:
        yield Sample(f"to_{str(to).removeprefix('torch.')}", (_corners(131, device, dtype), to))
    if dtype == torch.float32:
        yield Sample("transposed", (torch.randn(7, 33, device=device).t(), torch.float16))
        yield Sample("empty", (torch.randn(0, 3, device=device), torch.int8))
        yield Sample("size_one", (torch.randn(1, device=device), torch.float8_e4m3fn))
        yield Sample("scalar", (torch.randn((), device=device), torch.int32))


def cast_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        yield Sample("2^31+5", (torch.randn(2**31 + 5, device=device, dtype=dtype), torch.float8_e5m2))


def cast_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("to_bool", (x, torch.bool), error=TypeError, match="cast.*'dtype'.*bool.*float32.*int32")
    yield ErrorSample("from_int64", (x.long(), torch.float32), error=TypeError, match="cast.*'x'.*int64.*int32")


def cast_bench_cases() -> Iterator[BenchCase]:
    def make(
        to: torch.dtype, n: int, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(n, device=device, dtype=dtype), to), {}

    for dtype, to in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.int8),
    ):
        name = str(to).removeprefix("torch.")
        yield BenchCase(f"2^27_to_{name}", lambda d, t, to=to: make(to, 2**27, d, t), dtype=dtype, passes=("fwd",))


def cast_cost(x: torch.Tensor, dtype: torch.dtype) -> Cost:
    moved = x.numel() * (x.element_size() + dtype.itemsize)
    return Cost(flops=0, bytes=moved, backward_bytes=moved)
