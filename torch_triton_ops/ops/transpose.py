"""Transpose two dims in memory, through shared memory.

out = x.transpose(dim0, dim1), contiguous

| tensor | shape | dtype |
|---|---|---|
| x | any, any strides | floating, float8, int8, int32, int64 |
| out | that of x with dim0 and dim1 exchanged, contiguous, never x itself | that of x |

dim0, dim1: from -x.ndim to x.ndim - 1; a dim with itself copies. The gradient is the transpose of the upstream gradient.
Bytes: 2 * numel * itemsize. No arithmetic: every bit is kept.

Reading rows and writing columns wastes 28 of every 32 bytes that a write moves (fp32). A program therefore loads a tile along
the dim that has stride 1 in x, exchanges it between its threads in shared memory (`tl.trans` and the change of layout that
the compiler makes of it: bank conflicts are avoided by a swizzle), and stores it along the dim that has stride 1 in out.
Both sides move 16 bytes a thread. Programs walk along the rows of out, so that what is written at one time lies together.
Where both strides of 1 fall on the same dim it is a plain copy: `strided_copy`.

Errors: ValueError where a dim is out of range.

Source: https://developer.nvidia.com/blog/efficient-matrix-transpose-cuda-cc/
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
from torch_triton_ops.launch import cdiv, launch, next_power_of_2, sm_count

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def transpose_reference(x: torch.Tensor, dim0: int, dim1: int) -> torch.Tensor:
    return x.transpose(dim0, dim1).clone(memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _transpose_fwd_kernel(
    x_ptr,
    out_ptr,
    M,
    N,
    B,
    C,
    stride_xm,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_outn,
    stride_outa,
    stride_outb,
    stride_outc,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For each (a, b, c): x (M, N) with stride 1 along N -> out (N, M) with stride 1 along M. One tile per program."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    batch = pid // tiles
    pid_m = pid % tiles % tiles_m  # along the rows of out first
    pid_n = pid % tiles // tiles_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    # int64: a matrix or a batch of them may pass 2**31 elements
    c = (batch % C).to(tl.int64)
    b = (batch // C % B).to(tl.int64)
    a = (batch // C // B).to(tl.int64)
    x_ptr += a * stride_xa + b * stride_xb + c * stride_xc
    out_ptr += a * stride_outa + b * stride_outb + c * stride_outc
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_n[None, :]  # (BLOCK_M, BLOCK_N)
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_outn + offs_m[None, :]  # (BLOCK_N, BLOCK_M)
    if EVEN:
        tl.store(out_ptrs, tl.trans(tl.load(x_ptrs)))
    else:
        mask_m, mask_n = offs_m < M, offs_n < N
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_n[None, :])
        tl.store(out_ptrs, tl.trans(x), mask=mask_n[:, None] & mask_m[None, :])


# --------------------------------------------------------------------------------------------------------------------
# Launcher, fake, check
# --------------------------------------------------------------------------------------------------------------------

_OUTER = 3  # dims of the kernel besides the two of the tile
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # sm_80 has no pointer to these: their bytes are moved


# Tile and warps by itemsize. On an H200, 8192x8192: bf16 3.99 TB/s, fp32 4.09, against 3.57 and 3.93 of torch.compile; tiles of
# 64x64 (bf16) and 32x32 (fp32) with half the warps 3.69 and 3.67; along the rows of x first 2 % less; TMA loads, and loads
# pipelined over several tiles, 6 to 50 % less (bench/results/tuning/nvidia_h200/transpose.json).
_CONFIGS = {1: (128, 8), 2: (128, 8), 4: (64, 8), 8: (64, 8)}
_UNALIGNED_CONFIG = (64, 8)  # a thread's share of 128x128 single accesses does not fit into its registers


def _config(x: torch.Tensor, M: int, N: int, stride_xm: int) -> tuple[int, int]:
    """Side of the square tile, num_warps."""
    # Triton knows alignment as divisibility by 16 elements (pointers: bytes); without it every access is of one element.
    aligned = M % 16 == 0 and N % 16 == 0 and stride_xm % 16 == 0 and x.storage_offset() * x.element_size() % 16 == 0
    side, num_warps = _CONFIGS[x.element_size()] if aligned else _UNALIGNED_CONFIG
    if x.numel() < 2 * sm_count(x.device) * side * side:  # too few tiles to keep every processor busy
        return side // 2, num_warps // 2
    return side, num_warps


def transpose(x: torch.Tensor, dim0: int, dim1: int) -> torch.Tensor:
    if x.dtype in _FLOAT8:
        return transpose(x.view(torch.int8), dim0, dim1).view(x.dtype)
    turned = x.transpose(dim0, dim1)
    unit = next(
        (i for i, (n, step) in enumerate(zip(turned.shape, turned.stride(), strict=True)) if n > 1 and step == 1), -1
    )
    last = turned.ndim - 1
    outer = [i for i in range(last) if i != unit and turned.shape[i] != 1]
    if turned.numel() == 0 or unit in (-1, last) or turned.stride(last) <= 1 or len(outer) > _OUTER:
        # nothing to turn, or dims to merge first: it comes back here with fewer
        return torch.ops.tt.strided_copy(turned)
    out = transpose_fake(x, dim0, dim1)
    M, N = turned.shape[last], turned.shape[unit]
    side, num_warps = _config(turned, M, N, turned.stride(last))
    block_m = block_n = side
    # a short side leaves its share of the tile to the other
    tile = side * side
    if block_n > N:
        block_n = next_power_of_2(N)
        block_m = next_power_of_2(min(M, tile // block_n))
    elif block_m > M:
        block_m = next_power_of_2(M)
        block_n = next_power_of_2(min(N, tile // block_m))
    padding = _OUTER - len(outer)
    A, B, C = [1] * padding + [turned.shape[i] for i in outer]
    launch(
        _transpose_fwd_kernel,
        (A * B * C * cdiv(M, block_m) * cdiv(N, block_n),),
        turned,
        out,
        M,
        N,
        B,
        C,
        turned.stride(last),
        *([0] * padding + [turned.stride(i) for i in outer]),
        out.stride(unit),
        *([0] * padding + [out.stride(i) for i in outer]),
        EVEN=bool(M % block_m == 0 and N % block_n == 0),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=max(1, min(num_warps, block_m * block_n // 256)),
    )
    return out


def transpose_fake(x: torch.Tensor, dim0: int, dim1: int) -> torch.Tensor:
    return x.new_empty(x.transpose(dim0, dim1).shape)


def transpose_check(x: torch.Tensor, dim0: int, dim1: int) -> None:
    limit = max(x.ndim, 1)  # as in torch, a scalar has dims -1 and 0
    for name, dim in (("dim0", dim0), ("dim1", dim1)):
        if not -limit <= dim < limit:
            bad_argument("transpose", name, dim, f"{-limit} to {limit - 1} for x of shape {tuple(x.shape)}")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def transpose_forward(ctx: Any, x: torch.Tensor, dim0: int, dim1: int) -> torch.Tensor:
    ctx.dims = (dim0, dim1)
    return torch.ops.tt.transpose(x, dim0, dim1)


def transpose_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.transpose(dout, *ctx.dims)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def transpose_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.randint(-128, 128, shape, device=device).to(dtype)
        return torch.randn(shape, device=device).to(dtype)

    yield Sample("matrix", (t(37, 70), 0, 1))
    yield Sample("even_tiles", (t(128, 64), 0, 1))
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return  # the same bits are moved
    yield Sample("batch_of_matrices", (t(2, 3, 17, 33), -1, -2))
    yield Sample("outer_dims", (t(3, 2, 5, 16), 0, 2))
    yield Sample("ends", (t(5, 3, 2, 19), 0, 3))
    yield Sample("few_channels", (t(2, 301, 3), 1, 2))
    yield Sample("few_rows", (t(3, 301), 0, 1))
    yield Sample("size_one", (t(1, 7), 0, 1))
    yield Sample("already_turned", (t(9, 35).t(), 0, 1))
    yield Sample("same_dim", (t(3, 5), 1, 1))
    yield Sample("empty", (t(3, 0, 2), 0, 1))
    yield Sample("scalar", (t(), 0, -1))


def transpose_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        yield Sample("2^31", (torch.randn(2**16 + 8, 2**15 + 1, device=device, dtype=dtype), 0, 1))


def transpose_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(3, 4, device=device)
    yield ErrorSample("dim_too_large", (x, 0, 2), match=r"transpose.*'dim1' is 2.*-2 to 1.*\(3, 4\)")
    yield ErrorSample("dim_too_small", (x, -3, 0), match=r"transpose.*'dim0' is -3.*-2 to 1")


def transpose_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(8192, 8192, device=device, dtype=dtype), 0, 1), {}

    yield BenchCase("8192x8192", make, dtype=torch.bfloat16, passes=("fwd",))
    yield BenchCase("8192x8192", make, dtype=torch.float32, passes=("fwd",))


def transpose_cost(x: torch.Tensor, dim0: int, dim1: int) -> Cost:
    read = math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step != 0)
    bytes_backward = 2 * x.numel() * x.element_size()
    return Cost(flops=0, bytes=(x.numel() + read) * x.element_size(), backward_bytes=bytes_backward)
