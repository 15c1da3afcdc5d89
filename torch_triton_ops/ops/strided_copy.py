"""Contiguous copy of a tensor of any strides: what `x.contiguous()` does when it has work to do.

out[i0, i1, ...] = x[i0, i1, ...]

| tensor | shape | dtype |
|---|---|---|
| x | any number of dims, any strides (0 too) | floating, float8, int8, int32, int64 |
| out | that of x, contiguous, never x itself | that of x |

The gradient is the upstream gradient. Bytes: numel * itemsize written, and as many read, of the elements that are distinct:
an expanded dimension (stride 0) is read once. No arithmetic: every bit is kept.

What decides the speed is which dimension has stride 1. Neighbouring dims that one stride walks through are merged first.
Then, if the last dim has the smallest step, a program copies a tile of rows, and reads are as wide as the strides allow.
If another dim has stride 1, reading along the last one would fetch 32 bytes for every element that is used: the tensor goes
to `transpose`, which turns tiles in shared memory.

More than five dims that cannot be merged cost one launch for each index of the outermost.

Source: https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/#coalesced-access-to-global-memory
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def strided_copy_reference(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _strided_copy_fwd_kernel(
    x_ptr,
    out_ptr,
    M,
    N,
    B,
    C,
    D,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_xd,
    stride_xn,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x (A, B, C, D, N) of any strides -> out (M = A * B * C * D, N): a tile of BLOCK_M rows by BLOCK_N per program.

    An outer dim that is not needed has size 1: Triton compiles a 1 as a constant, and its division away.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    if WIDE:  # an offset may pass 2**31
        offs_m = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = offs_n.to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # (BLOCK_M, BLOCK_N)
    # one division per row and dim, not per element
    d = offs_m % D
    c = offs_m // D % C
    b = offs_m // D // C % B
    a = offs_m // D // C // B
    rows = a * stride_xa + b * stride_xb + c * stride_xc + d * stride_xd  # (BLOCK_M,)
    x = tl.load(x_ptr + rows[:, None] + (offs_n * stride_xn)[None, :], mask=mask)
    tl.store(out_ptr + (offs_m * N)[:, None] + offs_n[None, :], x, mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launcher, fake
# --------------------------------------------------------------------------------------------------------------------

_OUTER = 4  # dims of the kernel besides the last
# Elements a program. On an H200 2048 with 2, 4 or 8 warps are up to 2 % slower (bench/results/tuning/nvidia_h200/transpose.json).
_TILE = 1024
_WARPS = 1
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # sm_80 has no pointer to these: their bytes are copied


def _merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes and strides without the dims of size 1, neighbours merged where one stride walks through both."""
    sizes: list[int] = []
    steps: list[int] = []
    for n, step in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if sizes and steps[-1] == n * step:
            sizes[-1] *= n
            steps[-1] = step
        else:
            sizes.append(n)
            steps.append(step)
    return sizes or [1], steps or [1]


def _unit_dim(sizes: Sequence[int], steps: Sequence[int]) -> int | None:
    """The dim of stride 1 if it is not the last one: then tiles are turned. Not for a last dim of stride 0."""
    if steps[-1] <= 1:
        return None
    return next((i for i, step in enumerate(steps) if step == 1), None)


def strided_copy(x: torch.Tensor) -> torch.Tensor:
    if x.dtype in _FLOAT8:
        return strided_copy(x.view(torch.int8)).view(x.dtype)
    if x.numel() == 0:
        return strided_copy_fake(x)
    sizes, steps = _merged(x.shape, x.stride())
    unit = _unit_dim(sizes, steps)
    if unit is not None and len(sizes) <= _OUTER + 1:
        # `transpose` of the tensor whose last dim is the one of stride 1: it turns it back
        return torch.ops.tt.transpose(x.view(sizes).transpose(unit, -1), unit, -1).view(x.shape)
    out = strided_copy_fake(x)
    _copy_into(x, out)
    return out


def _copy_into(x: torch.Tensor, out: torch.Tensor) -> None:
    """Copy x to the contiguous `out` of its shape."""
    sizes, steps = _merged(x.shape, x.stride())
    if len(sizes) > _OUTER + 1:
        for part, out_part in zip(x.unbind(), out.unbind(), strict=True):
            _copy_into(part, out_part)
        return
    span = sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    padding = _OUTER + 1 - len(sizes)
    A, B, C, D, N = [1] * padding + sizes
    M = A * B * C * D
    block_n = next_power_of_2(min(N, _TILE))
    block_m = next_power_of_2(min(M, _TILE // block_n))
    grid = (cdiv(M, block_m) * cdiv(N, block_n),)
    strides = [0] * padding + steps
    launch(
        _strided_copy_fwd_kernel,
        grid,
        x,
        out,
        M,
        N,
        B,
        C,
        D,
        *strides,
        WIDE=bool(span >= 2**31 or out.numel() >= 2**31),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=_WARPS,
    )


def strided_copy_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def strided_copy_forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.strided_copy(x)


def strided_copy_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return dout


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _values(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Random values of any dtype: normal, or integers of the whole range of an int8."""
    if not dtype.is_floating_point:
        return torch.randint(-128, 128, tuple(shape), device=device).to(dtype)
    return torch.randn(tuple(shape), device=device).to(dtype)


def strided_copy_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        return _values(shape, device, dtype)

    yield Sample("padded_rows", (t(37, 70)[:, :65],))
    yield Sample("every_second", (t(5, 258)[:, 1::2],))
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return  # the same bits are moved
    yield Sample("turned", (t(3, 33, 7).permute(2, 0, 1),))
    yield Sample("heads", (t(2, 5, 3, 16).transpose(1, 2),))
    yield Sample("size_one", (t(1, 7),))
    yield Sample("expanded", (t(3, 1, 5, 1).expand(3, 4, 5, 6),))
    yield Sample("contiguous", (t(3, 1001),))
    yield Sample("unmergeable_dims", (t(2, 4, 2, 4, 2, 4, 6)[:, ::2, :, ::2, :, ::2, ::3],))
    yield Sample("empty", (t(3, 0),))
    yield Sample("scalar", (t(),))


def strided_copy_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        yield Sample("2^31_rows", (_values((2**20 + 1, 2**11 + 8), device, dtype)[:, : 2**11],))


def strided_copy_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.zeros(3, 4, device=device, dtype=torch.complex64)
    yield ErrorSample("complex", (x,), error=TypeError, match="strided_copy.*'x'.*complex64.*float32")


def strided_copy_bench_cases() -> Iterator[BenchCase]:
    def make(name: str, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name == "heads":
            return (torch.randn(4, 4096, 32, 128, device=device, dtype=dtype).transpose(1, 2),), {}
        return (torch.randn(8192, 16384, device=device, dtype=dtype)[:, ::2],), {}

    for name, shape, dtype in (
        ("heads", "4x4096x32x128_heads", torch.bfloat16),
        ("step", "8192x8192_step2", torch.float32),
    ):
        yield BenchCase(shape, lambda d, t, n=name: make(n, d, t), dtype=dtype, passes=("fwd",))


def strided_copy_cost(x: torch.Tensor) -> Cost:
    read = math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step != 0)
    return Cost(flops=0, bytes=(x.numel() + read) * x.element_size())
