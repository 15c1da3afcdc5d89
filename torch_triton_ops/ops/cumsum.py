"""Running sum along one dim.

out[i] = x[0] + ... + x[i]
dx[i]  = dout[i] + ... + dout[N - 1]

| tensor | shape | dtype |
|---|---|---|
| x | any; `dim` counts from either end; any strides | float32, float16, bfloat16, int32, int64 |
| out | that of x, contiguous | that of x; int64 for integers, as in torch |

The gradient is the running sum from the other end, by the same kernels.

Additions in fp64 for fp32, in fp32 for half precision and in int64, each in a fixed order: the same bits every time. A
program walks along its rows (or neighbouring columns) tile by tile: the running sums of a tile are a tree, and what
went before it is carried in two numbers, sum and rounding error, so that the error does not grow with the number of
tiles. Few and long rows are divided among programs: a first launch sums the parts, and each program of the second
adds up the parts before its own.

Bytes: x read once, out written once; x is read twice where rows are divided.

Errors: IndexError when `dim` is out of range.

Source: Blelloch, Prefix sums and their applications, https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.launch import cdiv, launch, next_power_of_2, sm_count
from torch_triton_ops.reductions import (
    Plan,
    View,
    accumulation_dtype,
    check_dims,
    contiguous_plan,
    reduce_parts,
    scan_view,
    whole_plan,
)

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.int64


def cumsum_reference(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.to(accumulation_dtype(x.dtype)).cumsum(dim).to(_result_dtype(x)).contiguous()


def cumsum_eager(x: torch.Tensor, dim: int) -> torch.Tensor:
    """On CPU torch adds in fp64; this is a scan that adds in fp32, by doubling, as scans on a GPU do."""
    if x.device.type != "cpu" or not x.is_floating_point() or x.dim() == 0:
        return cumsum_reference(x, dim)
    y, shift = x.to(accumulation_dtype(x.dtype)).movedim(dim, 0), 1
    while shift < y.shape[0]:
        y = torch.cat([y[:shift], y[shift:] + y[:-shift]])
        shift *= 2
    return y.movedim(0, dim).to(x.dtype).contiguous()


def cumsum_bwd_reference(dout: torch.Tensor, dim: int) -> torch.Tensor:
    dtype = accumulation_dtype(dout.dtype)
    return dout.to(dtype).flip(dim).cumsum(dim).flip(dim).to(dout.dtype).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _carry(total, error, x):
    """(total, error) + x, exactly but for what `error` itself rounds (Knuth's two-sum); integers need no error."""
    new = total + x
    if x.dtype.is_floating():
        part = new - total
        lost = (total - (new - part)) + (x - part)
        error += tl.where(lost == lost, lost, 0.0)  # inf - inf
    return new, error


@triton.jit
def _before(total, axis: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr):
    """For each of L totals (R, L) the sum of those before it (behind it): (R, L)."""
    offs = tl.arange(0, L)
    if REVERSE:
        earlier = offs[:, None] > offs[None, :]
    else:
        earlier = offs[:, None] < offs[None, :]  # (L from, L to)
    zero = tl.zeros_like(total)[:, :, None]
    return tl.sum(tl.where(earlier[None, :, :], total[:, :, None], zero), axis=1)


@triton.jit
def _cumsum_rows_kernel(
    x_ptr,
    part_ptr,
    out_ptr,
    R,
    N,
    K,
    S,
    chunk,
    stride_xm,
    stride_xn,
    stride_xk,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
):
    """BLOCK_R rows r = m * K + k of x, part s of S of each; part_ptr (R, S): the parts' sums.

    A tile is L * W elements of a row: L lines, each scanned by itself, then raised by the sum of those before it.
    """
    # fp32 in fp64: the additions are few for each byte, and the roundings of a scan add up along the row
    FLOAT: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32
    ACC: tl.constexpr = FLOAT if x_ptr.dtype.element_ty.is_floating() else tl.int64
    BLOCK_N: tl.constexpr = L * W
    pid = tl.program_id(0)
    pid_s = pid % S
    offs_r = (pid // S).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    mask_r = offs_r < R
    m, k = offs_r // K, offs_r % K
    offs_n = tl.arange(0, L)[:, None] * W + tl.arange(0, W)[None, :]  # (L, W)

    total = tl.zeros((BLOCK_R,), ACC)
    error = tl.zeros((BLOCK_R,), ACC)
    if BLOCK_S > 0:  # the parts before this one; few, so one read of them all
        offs_s = tl.arange(0, BLOCK_S)
        if REVERSE:
            mask_s = (offs_s > pid_s) & (offs_s < S)
        else:
            mask_s = offs_s < pid_s
        parts_ptr = part_ptr + offs_r[:, None] * S + offs_s[None, :]
        total = tl.sum(tl.load(parts_ptr, mask=mask_r[:, None] & mask_s[None, :], other=0).to(ACC), axis=1)

    start = pid_s.to(tl.int64) * chunk
    tiles = tl.cdiv(tl.minimum(N - start, chunk), BLOCK_N).to(tl.int32)
    x_rows_ptr = x_ptr + m * stride_xm + k * stride_xk
    out_rows_ptr = out_ptr + m * N * K + k
    offs_x, offs_out = offs_n.to(tl.int64) * stride_xn, offs_n.to(tl.int64) * K
    for tile in range(tiles):
        if REVERSE:
            tile = tiles - 1 - tile
        tile_start = start + tl.cast(tile, tl.int64) * BLOCK_N
        left = tl.minimum(N - tile_start, BLOCK_N).to(tl.int32)
        mask = mask_r[:, None, None] & (offs_n < left)[None, :, :]
        tile_ptr = x_rows_ptr + tile_start * stride_xn  # (BLOCK_R,)
        x = tl.load(tile_ptr[:, None, None] + offs_x[None, :, :], mask=mask, other=0).to(ACC)  # (BLOCK_R, L, W)
        y = tl.cumsum(x, axis=2, reverse=REVERSE)
        lines = tl.sum(x, axis=2)  # (BLOCK_R, L)
        if L > 1:
            y += _before(lines, 1, L, REVERSE)[:, :, None]
        y = (y + error[:, None, None]) + total[:, None, None]
        tile_ptr = out_rows_ptr + tile_start * K
        tl.store(tile_ptr[:, None, None] + offs_out[None, :, :], y.to(out_ptr.dtype.element_ty), mask=mask)
        total, error = _carry(total, error, tl.sum(lines, axis=1))


@triton.jit
def _cumsum_columns_kernel(
    x_ptr,
    part_ptr,
    out_ptr,
    N,
    K,
    S,
    chunk,
    stride_xm,
    stride_xn,
    stride_xk,
    REVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K columns of one m, part s of S of each; part_ptr (M, S, K): the parts' sums."""
    # fp32 in fp64: the additions are few for each byte, and the roundings of a scan add up along the row
    FLOAT: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32
    ACC: tl.constexpr = FLOAT if x_ptr.dtype.element_ty.is_floating() else tl.int64
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    pid_s = pid // blocks % S
    pid_m = (pid // blocks // S).to(tl.int64)
    offs_k = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    mask_k = offs_k < K
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)

    total = tl.zeros((BLOCK_K,), ACC)
    error = tl.zeros((BLOCK_K,), ACC)
    if BLOCK_S > 0:  # the parts before this one, some rows of them at a time
        for first in range(0, S, BLOCK_S):
            offs_s = first + tl.arange(0, BLOCK_S)
            if REVERSE:
                mask_s = (offs_s > pid_s) & (offs_s < S)
            else:
                mask_s = offs_s < pid_s
            parts_ptr = part_ptr + (pid_m * S + offs_s[:, None]) * K + offs_k[None, :]
            part = tl.load(parts_ptr, mask=mask_s[:, None] & mask_k[None, :], other=0).to(ACC)
            total, error = _carry(total, error, tl.sum(part, axis=0))

    start = pid_s.to(tl.int64) * chunk
    tiles = tl.cdiv(tl.minimum(N - start, chunk), BLOCK_N).to(tl.int32)
    x_columns_ptr = x_ptr + pid_m * stride_xm + offs_k * stride_xk
    out_columns_ptr = out_ptr + pid_m * N * K + offs_k
    for tile in range(tiles):
        if REVERSE:
            tile = tiles - 1 - tile
        here = start + tl.cast(tile, tl.int64) * BLOCK_N + offs_n  # (BLOCK_N,)
        mask = (here < N)[:, None] & mask_k[None, :]
        x = tl.load(x_columns_ptr[None, :] + here[:, None] * stride_xn, mask=mask, other=0).to(ACC)
        y = tl.cumsum(x, axis=0, reverse=REVERSE)  # (BLOCK_N, BLOCK_K)
        y = (y + error[None, :]) + total[None, :]
        tl.store(out_columns_ptr[None, :] + here[:, None] * K, y.to(out_ptr.dtype.element_ty), mask=mask)
        total, error = _carry(total, error, tl.sum(x, axis=0))


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------

# Below _FULL programs for each multiprocessor rows are divided, into about _PARTS programs for each, at most _MOST parts.
_FULL, _PARTS, _MOST = 2, 8, 1024
_ROW_TILE, _LINE, _ROW_WARPS = 1024, 64, 1
_COLUMN_TILE = 1024  # elements, a warp's


def _plan(view: View) -> tuple[Plan, dict[str, int]]:
    """How the parts are summed, and the blocks of the scan."""
    N, K, R, itemsize = view.N, view.K, view.M * view.K, view.x.element_size()
    if view.has_columns:  # a warp walks down its columns: no thread needs another's numbers where K is large
        BLOCK_K = min(512 // itemsize, next_power_of_2(K))
        BLOCK_N = min(32, _COLUMN_TILE // BLOCK_K, next_power_of_2(N))
        scan = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 1}
        blocks = scan
        programs = view.M * cdiv(K, BLOCK_K)
    else:
        BLOCK_N = _ROW_TILE if N >= _ROW_TILE else next_power_of_2(N)
        W = min(_LINE, BLOCK_N)
        BLOCK_R = max(1, 512 // BLOCK_N)
        num_warps = max(1, _ROW_WARPS * BLOCK_N // _ROW_TILE)
        scan = {"BLOCK_R": BLOCK_R, "L": BLOCK_N // W, "W": W, "num_warps": num_warps}
        programs = cdiv(R, BLOCK_R)
        blocks = {"BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    sms = sm_count(view.x.device)
    if programs < _FULL * sms and N > 4 * BLOCK_N:
        return contiguous_plan(view, programs, min(cdiv(_PARTS * sms, programs), _MOST), blocks), scan
    return whole_plan(view, programs, blocks), scan


def _scan(x: torch.Tensor, dim: int, out: torch.Tensor, reverse: bool) -> None:
    if out.numel() == 0:
        return
    view = scan_view(x, dim)
    plan, scan = _plan(view)
    parts = reduce_parts(view, plan) if plan.parts > 1 else None
    columns = view.has_columns
    sizes = (view.N, view.K, plan.parts, plan.chunk)
    launch(
        _cumsum_columns_kernel if columns else _cumsum_rows_kernel,
        (plan.programs * plan.parts,),
        *(view.x, parts, out, *(sizes if columns else (view.M * view.K, *sizes))),
        *(view.stride_m, view.stride_n, view.stride_k),
        REVERSE=reverse,
        BLOCK_S=0 if parts is None else 4 if columns else next_power_of_2(plan.parts),
        **scan,
    )


def cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    out = cumsum_fake(x, dim)
    _scan(x, dim, out, reverse=False)
    return out


def cumsum_bwd(dout: torch.Tensor, dim: int) -> torch.Tensor:
    dx = cumsum_bwd_fake(dout, dim)
    _scan(dout, dim, dx, reverse=True)
    return dx


def cumsum_fake(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=_result_dtype(x))


def cumsum_bwd_fake(dout: torch.Tensor, dim: int) -> torch.Tensor:
    return dout.new_empty(dout.shape)


def cumsum_check(x: torch.Tensor, dim: int) -> None:
    check_dims("cumsum", x, dim)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def cumsum_forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
    ctx.dim = dim
    return torch.ops.tt.cumsum(x, dim)


def cumsum_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.ops.tt.cumsum_bwd(dout, ctx.dim),)


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def cumsum_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.randint(-100, 100, shape, device=device, dtype=dtype)
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample("rows_5x33", (t(5, 33), -1))
    yield Sample("middle_3x70x36", (t(3, 70, 36), 1))
    yield Sample("two_tiles_3x3001", (t(3, 3001), 1))
    yield Sample("long_rows_2x20001", (t(2, 20001), 1))
    yield Sample("long_columns_1200x3", (t(1200, 3), 0))
    yield Sample("transposed", (t(33, 6).t(), -1))
    yield Sample("size_one_5x1", (t(5, 1), 1))
    yield Sample("scalar", (t(), 0))
    yield Sample("empty_0x3", (t(0, 3), 0))
    if dtype.is_floating_point and dtype != torch.float64:
        x = t(2, 3001)
        x[0, 100], x[1, 100], x[1, 2500] = float("inf"), float("-inf"), float("nan")
        yield Sample("inf_and_nan", (x, 1))


def cumsum_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        yield Sample("rows_past_2^31", (torch.randn(2**18 + 1, 2**13, device=device, dtype=dtype)[:, :8], -1))


def cumsum_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"cumsum.*'dim' is 2.*-2 to 1")
    yield ErrorSample("dim_of_scalar", (x[0, 0], 1), error=IndexError, match=r"cumsum.*'dim' is 1.*-1 to 0")


def cumsum_bench_cases() -> Iterator[BenchCase]:
    def make(
        m: int, n: int, dim: int, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(m, n, device=device, dtype=dtype), dim), {}

    yield BenchCase("8192x8192_rows", lambda d, t: make(8192, 8192, -1, d, t))
    yield BenchCase("8192x8192_columns", lambda d, t: make(8192, 8192, 0, d, t), passes=("fwd",))
    yield BenchCase("1x2^27", lambda d, t: make(1, 2**27, -1, d, t), dtype=torch.float32, passes=("fwd",))


def cumsum_cost(x: torch.Tensor, dim: int) -> Cost:
    size = x.numel() * (x.element_size() + _result_dtype(x).itemsize)
    return Cost(flops=x.numel(), bytes=size, backward_flops=x.numel(), backward_bytes=size)
