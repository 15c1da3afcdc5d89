"""Softmax along one dimension.

y  = exp(x - max(x)) / sum(exp(x - max(x)))
dx = y * (dy - sum(dy * y) / sum(y))

The last divisor is 1 but for the rounding of y to its dtype. With it, a constant added to dy changes nothing, as it
should.

| tensor | shape | dtype |
|---|---|---|
| x | any; `dim` counts from either end | float32, float16, bfloat16 |
| y | that of x, contiguous | that of x |

Arithmetic in fp32. -inf masks an element (y = 0); a row of -inf alone gives NaN, as in torch. A scalar gives 1.

Bytes: 2 * numel * itemsize forward (x read, y written), 3 * numel * itemsize backward (dy and y read, dx written).
Three kernels keep to that, by where the row waits between the reduction and the store:

* in registers, up to 32768 elements: read once;
* in the caches, beyond: a first pass sums the exponentials, shifted by the first tile's maximum (a row for which that
  leaves the range of fp32 is summed again with a running maximum), a second reads the row again, backwards, so that what
  was read last is met first. One or two programs per multiprocessor, so that all rows in flight fit into the L2 cache:
  132 rows of 131072 half-precision elements are 35 MB;
* a dimension other than the last: the same two passes down a block of neighbouring columns, without a transposed copy.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867

Errors: IndexError when `dim` is out of range.
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
from torch_triton_ops.launch import capability, cdiv, launch, next_power_of_2, sm_count


def _upcast(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def softmax_reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.softmax(_upcast(x), dim).to(x.dtype).contiguous()


def softmax_bwd_reference(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dy32, y32 = _upcast(dy), _upcast(y)
    total = y32.sum(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # y may round to 0 everywhere
    return (y32 * (dy32 - (dy32 * y32).sum(dim, keepdim=True) / total)).to(y.dtype).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_fwd_kernel(x_ptr, y_ptr, M, N, stride_xm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # whole rows in registers: BLOCK_N >= N
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=float("-inf"))
    x = x.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    y = tl.exp(x - tl.max(x, axis=1)[:, None])
    y *= (1.0 / tl.sum(y, axis=1))[:, None]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _online_step(m, s, x):
    # (max, sum of exp(x - max)) of what was seen, x (R, L) of new elements reduced along R.
    m_new = tl.maximum(m, tl.max(x, axis=0))
    # while all is -inf, subtract 0: -inf - -inf would be NaN
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[None, :]), axis=0)
    return m_new, s


@triton.jit
def _softmax_fwd_online_kernel(x_ptr, y_ptr, M, N, stride_xm, R: tl.constexpr, L: tl.constexpr):
    # A tile is R * L consecutive elements. With L = 256 * num_warps half-precision elements each thread holds columns
    # of the (R, L) tile, so the loop reduces without a word between threads, which meet twice a row.
    BLOCK_N: tl.constexpr = R * L
    offs = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]  # (R, L)
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        x_row_ptr = x_ptr + tl.cast(pid_m, tl.int64) * stride_xm
        y_row_ptr = y_ptr + tl.cast(pid_m, tl.int64) * N

        # Any shift that keeps the sum in range gives the same quotient, so the first tile's maximum does for nearly every
        # row, and the loop keeps no running maximum: one exponential an element instead of two.
        ahead = tl.load(x_row_ptr + offs, mask=offs < N, other=float("-inf"))
        shift = tl.max(tl.max(ahead.to(tl.float32), axis=0), axis=0)
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        s = tl.zeros((L,), tl.float32)
        # each tile is asked for one step before its use, to hide its latency
        for start in range(0, N, BLOCK_N):
            x = ahead.to(tl.float32)
            offs_ahead = start + BLOCK_N + offs
            ahead = tl.load(
                x_row_ptr + offs_ahead, mask=offs_ahead < N, other=float("-inf"), eviction_policy="evict_last"
            )
            s += tl.sum(tl.exp(x - shift), axis=0)
        total = tl.sum(s, axis=0)
        # 2**-60 to 2**60; not so for NaN, for a first tile of -inf and for one far below the row's maximum
        if not ((total > 8.6736174e-19) & (total < 1.1529215e18)):
            m = tl.full((L,), float("-inf"), tl.float32)
            s = tl.zeros((L,), tl.float32)
            for start in range(0, N, BLOCK_N):
                offs_n = start + offs
                x = tl.load(x_row_ptr + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
                m, s = _online_step(m, s, x)
            shift = tl.max(m, axis=0)
            shift = tl.where(shift == float("-inf"), 0.0, shift)
            total = tl.sum(s * tl.exp(m - shift), axis=0)
        scale = 1.0 / total  # an all -inf row: 0 * (1 / 0) = NaN below

        # every thread holds its elements: a tile is read again by the threads that read it first, last tile first
        ahead = tl.load(x_row_ptr + last + offs, mask=last + offs < N)
        for back in range(0, N, BLOCK_N):
            x = ahead.to(tl.float32)
            offs_n = last - back + offs
            offs_ahead = offs_n - BLOCK_N
            ahead = tl.load(x_row_ptr + offs_ahead, mask=offs_ahead >= 0)
            y = tl.exp(x - shift) * scale
            tl.store(y_row_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _softmax_fwd_columns_kernel(x_ptr, y_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # x (B, N, K) contiguous, softmax along N: BLOCK_K neighbouring columns per program
    pid_b = tl.program_id(0) // tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % tl.cdiv(K, BLOCK_K)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    base = pid_b.to(tl.int64) * N * K
    m = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs = base + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]  # (BLOCK_N, BLOCK_K)
        mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs, mask=mask, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        m, s = _online_step(m, s, x)
    m = tl.where(m == float("-inf"), 0.0, m)
    scale = 1.0 / s
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs = base + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
        y = tl.exp(x - m[None, :]) * scale[None, :]
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


# --------------------------------------------------------------------------------------------------------------------
# Backward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _mean(weighted, total):
    # every y of a row may have rounded to 0
    return weighted / tl.maximum(total, 1.1754944e-38)


@triton.jit
def _softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, stride_dym, stride_ym, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = _mean(tl.sum(dy * y, axis=1), tl.sum(y, axis=1))  # (BLOCK_M,)
    dx = y * (dy - mean[:, None])  # (BLOCK_M, BLOCK_N)
    tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_bwd_online_kernel(dy_ptr, y_ptr, dx_ptr, M, N, stride_dym, stride_ym, R: tl.constexpr, L: tl.constexpr):
    BLOCK_N: tl.constexpr = R * L
    offs = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]  # (R, L), as in the forward
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        dy_row_ptr = dy_ptr + tl.cast(pid_m, tl.int64) * stride_dym
        y_row_ptr = y_ptr + tl.cast(pid_m, tl.int64) * stride_ym
        dx_row_ptr = dx_ptr + tl.cast(pid_m, tl.int64) * N

        weighted = tl.zeros((L,), tl.float32)
        total = tl.zeros((L,), tl.float32)
        dy_ahead = tl.load(dy_row_ptr + offs, mask=offs < N, other=0.0, eviction_policy="evict_last")
        y_ahead = tl.load(y_row_ptr + offs, mask=offs < N, other=0.0, eviction_policy="evict_last")
        for start in range(0, N, BLOCK_N):
            dy, y = dy_ahead.to(tl.float32), y_ahead.to(tl.float32)
            offs_ahead = start + BLOCK_N + offs
            mask = offs_ahead < N
            dy_ahead = tl.load(dy_row_ptr + offs_ahead, mask=mask, other=0.0, eviction_policy="evict_last")
            y_ahead = tl.load(y_row_ptr + offs_ahead, mask=mask, other=0.0, eviction_policy="evict_last")
            weighted += tl.sum(dy * y, axis=0)
            total += tl.sum(y, axis=0)
        mean = _mean(tl.sum(weighted, axis=0), tl.sum(total, axis=0))

        dy_ahead = tl.load(dy_row_ptr + last + offs, mask=last + offs < N, eviction_policy="evict_first")
        y_ahead = tl.load(y_row_ptr + last + offs, mask=last + offs < N, eviction_policy="evict_first")
        for back in range(0, N, BLOCK_N):
            dy, y = dy_ahead.to(tl.float32), y_ahead.to(tl.float32)
            offs_n = last - back + offs
            offs_ahead = offs_n - BLOCK_N
            dy_ahead = tl.load(dy_row_ptr + offs_ahead, mask=offs_ahead >= 0, eviction_policy="evict_first")
            y_ahead = tl.load(y_row_ptr + offs_ahead, mask=offs_ahead >= 0, eviction_policy="evict_first")
            dx = (y * (dy - mean)).to(dx_ptr.dtype.element_ty)
            tl.store(dx_row_ptr + offs_n, dx, mask=offs_n < N, eviction_policy="evict_first")


@triton.jit
def _softmax_bwd_columns_kernel(dy_ptr, y_ptr, dx_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    pid_b = tl.program_id(0) // tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % tl.cdiv(K, BLOCK_K)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    base = pid_b.to(tl.int64) * N * K
    weighted = tl.zeros((BLOCK_K,), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs = base + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]  # (BLOCK_N, BLOCK_K)
        mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        weighted += tl.sum(dy * y, axis=0)
        total += tl.sum(y, axis=0)
    mean = _mean(weighted, total)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs = base + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        dy = tl.load(dy_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
        dx = (y * (dy - mean[None, :])).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offs, dx, mask=mask, eviction_policy="evict_first")


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _split(x: torch.Tensor, dim: int) -> tuple[int, int, int]:
    # sizes before, along and behind `dim`; a scalar has one element along its only dimension
    if x.dim() == 0:
        return 1, 1, 1
    dim = dim % x.dim()
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


def _rows(x: torch.Tensor, M: int, N: int) -> torch.Tensor:
    x = x.reshape(M, N)
    return x if x.stride(1) == 1 else x.contiguous()


def _register_config(N: int, itemsize: int) -> dict[str, int]:
    # 16 elements a thread; rows of up to 1024 share a program of one warp: small programs overlap better than wide ones
    BLOCK_N = next_power_of_2(N)
    if BLOCK_N <= 1024:
        return {"BLOCK_M": 2048 // BLOCK_N if BLOCK_N >= 32 else 64, "BLOCK_N": BLOCK_N, "num_warps": 1}
    return {"BLOCK_M": 1, "BLOCK_N": BLOCK_N, "num_warps": max(4, min(BLOCK_N // 512, 64 // itemsize))}


def _online_config(N: int, itemsize: int, target: int) -> tuple[dict[str, int], int]:
    # Tile and programs per SM: two where the rows of all of them fit into L2 (50 to 60 MB on sm_90), one otherwise. Rows that
    # allow no 16-byte loads need an address for each element: more threads, lest registers spill.
    if N % 8 == 0 and N * itemsize <= 131072:
        return {"R": 2, "L": 4096, "num_warps": 16}, 2
    if N % 8 == 0:
        return {"R": 4 if itemsize == 2 and target == 90 else 2, "L": 8192, "num_warps": 32}, 1  # sm_100 would spill
    return {"R": 2, "L": 4096, "num_warps": 32}, 1


def _online_bwd_config(N: int, itemsize: int) -> dict[str, int]:
    return {"R": 2, "L": 8192 if N % 8 == 0 and itemsize == 2 else 4096, "num_warps": 32}


def _column_config(N: int, K: int) -> dict[str, int]:
    # 64 columns are a line of 128 bytes in half precision
    BLOCK_K = min(64, next_power_of_2(K))
    return {"BLOCK_N": min(4096 // BLOCK_K, next_power_of_2(N)), "BLOCK_K": BLOCK_K, "num_warps": 4}


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    y = softmax_fake(x, dim)
    if y.numel() == 0:
        return y
    M, N, K = _split(x, dim)
    if K != 1:
        config = _column_config(N, K)
        launch(_softmax_fwd_columns_kernel, (M * cdiv(K, config["BLOCK_K"]),), x.contiguous(), y, N, K, **config)
        return y
    x = _rows(x, M, N)
    if N <= 32768:
        config = _register_config(N, x.element_size())
        launch(_softmax_fwd_kernel, (cdiv(M, config["BLOCK_M"]),), x, y, M, N, x.stride(0), **config)
    else:
        config, per_sm = _online_config(N, x.element_size(), capability(x.device))
        grid = (min(M, sm_count(x.device) * per_sm),)
        launch(_softmax_fwd_online_kernel, grid, x, y, M, N, x.stride(0), **config)
    return y


def softmax_fake(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x.new_empty(x.shape)


def softmax_bwd(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dx = softmax_bwd_fake(dy, y, dim)
    if dx.numel() == 0:
        return dx
    M, N, K = _split(y, dim)
    if K != 1:
        config = _column_config(N, K)
        grid = (M * cdiv(K, config["BLOCK_K"]),)
        launch(_softmax_bwd_columns_kernel, grid, dy.contiguous(), y.contiguous(), dx, N, K, **config)
        return dx
    dy, y = _rows(dy, M, N), _rows(y, M, N)
    strides = dy.stride(0), y.stride(0)
    if N <= 16384:  # two tensors wait in registers
        config = _register_config(N, y.element_size())
        launch(_softmax_bwd_kernel, (cdiv(M, config["BLOCK_M"]),), dy, y, dx, M, N, *strides, **config)
    else:
        grid = (min(M, sm_count(y.device)),)
        launch(_softmax_bwd_online_kernel, grid, dy, y, dx, M, N, *strides, **_online_bwd_config(N, y.element_size()))
    return dx


def softmax_bwd_fake(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    return y.new_empty(y.shape)


def softmax_check(x: torch.Tensor, dim: int = -1) -> None:
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        bad_argument("softmax", "dim", dim, f"{-dims} to {dims - 1} for x of shape {tuple(x.shape)}", IndexError)


def softmax_forward(ctx: Any, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    y = torch.ops.tt.softmax(x, dim)
    ctx.save_for_backward(y)
    ctx.dim = dim
    return y


def softmax_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor]:
    (y,) = ctx.saved_tensors
    return (torch.ops.tt.softmax_bwd(dy, y, ctx.dim),)


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def softmax_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for shape in [(1, 1), (5, 33), (3, 1000), (2, 2049), (2, 3, 65), (0, 5), (4, 0), (7,), ()]:
        yield Sample("x".join(map(str, shape)) or "scalar", (randn(*shape),))
    for dim in (0, 1, -2):
        yield Sample(f"dim{dim}_5x37x3", (randn(5, 37, 3), dim))
    yield Sample("dim0_300x70", (randn(300, 70), 0))
    yield Sample("dim1_3x4x1", (randn(3, 4, 1), 1))
    yield Sample("dim0_scalar", (randn(), 0))
    yield Sample("dim1_3x0x4", (randn(3, 0, 4), 1))
    yield Sample("N32768", (randn(2, 32768),))
    yield Sample("N40001_online", (randn(3, 40001),))
    yield Sample("N262144_online", (randn(1, 262144),), slow_in_interpreter=True)
    yield Sample("transposed", (randn(33, 6).t(),))
    yield Sample("sliced_unaligned", (randn(4, 71)[:, 1:66],))
    yield Sample("expanded", (randn(1, 50).expand(3, 50),))
    yield Sample("large_values", (randn(4, 130) * 1000,))
    masked = randn(4, 100)
    masked[:, 60:] = float("-inf")
    masked[1, 1:] = float("-inf")
    yield Sample("masked", (masked,))
    masked = randn(1, 40000)
    masked[:, :30000] = float("-inf")  # whole tiles of -inf before the first number
    yield Sample("masked_online", (masked,))
    masked = randn(70, 5)
    masked[:69, 2] = float("-inf")
    yield Sample("masked_dim0", (masked, 0))
    if dtype != torch.float64:  # NaN, which no finite difference can check
        nothing_left = randn(3, 40000)
        nothing_left[1] = float("-inf")
        yield Sample("all_masked_online", (nothing_left,))
        yield Sample("all_masked", (nothing_left[:, :70],))
        yield Sample("all_masked_dim0", (nothing_left[:, :70].t(), 0))


def softmax_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"softmax.*'dim' is 2.*-2 to 1")
    yield ErrorSample("dim_too_small", (x, -3), error=IndexError, match=r"softmax.*'dim' is -3.*-2 to 1")
    yield ErrorSample("dim_of_scalar", (x[0, 0], 1), error=IndexError, match=r"softmax.*'dim' is 1.*-1 to 0")


def softmax_bench_cases() -> Iterator[BenchCase]:
    def make(m: int, n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(m, n, device=device, dtype=dtype),), {}

    for m, n in [(8192, 1024), (8192, 4096), (4096, 16384), (2048, 65536), (1024, 131072)]:
        yield BenchCase(f"{m}x{n}", lambda d, t, m=m, n=n: make(m, n, d, t))


def softmax_cost(x: torch.Tensor, dim: int = -1) -> Cost:
    numel, size = x.numel(), x.element_size()
    # subtract, exp, multiply, and two reductions; backward: multiply, add, subtract, multiply
    return Cost(flops=5 * numel, bytes=2 * numel * size, backward_flops=4 * numel, backward_bytes=3 * numel * size)
