"""Softmax along one dimension, and its logarithm.

softmax:      y  = exp(x - max(x)) / sum(exp(x - max(x)))
              dx = y * (dy - sum(dy * y) / sum(y))
log_softmax:  y  = x - max(x) - log(sum(exp(x - max(x))))
              dx = dy - exp(y) * sum(dy)

The last divisor of softmax is 1 but for the rounding of y to its dtype. With it, a constant added to dy changes nothing,
as it should. Each kernel serves both (LOG).

| tensor | shape | dtype |
|---|---|---|
| x | any; `dim` counts from either end | float32, float16, bfloat16 |
| y | that of x, contiguous | that of x |

Arithmetic in fp32. -inf masks an element (y = 0, its logarithm -inf); a row of -inf alone gives NaN, as in torch. A scalar
gives 1, its logarithm 0.

Bytes: 2 * numel * itemsize forward (x read, y written), 3 * numel * itemsize backward (dy and y read, dx written).
Four kernels keep to that, by where the row waits between the reduction and the store:

* in registers, up to 16 KB a row (32768 elements where the next kernel cannot run): read once;
* in shared memory, and the last chunks of the longest rows in registers, up to 320 KB a row: read once. Written in Gluon,
  for sm_90 and sm_100, for rows that begin on 16 bytes and are a multiple of 16 elements long;
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
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import aligned, capability, cdiv, gluon_ready, launch, next_power_of_2, sm_count


def _upcast(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def softmax_reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.softmax(_upcast(x), dim).to(x.dtype).contiguous()


def softmax_bwd_reference(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dy32, y32 = _upcast(dy), _upcast(y)
    total = y32.sum(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # y may round to 0 everywhere
    return (y32 * (dy32 - (dy32 * y32).sum(dim, keepdim=True) / total)).to(y.dtype).contiguous()


def log_softmax_reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.log_softmax(_upcast(x), dim).to(x.dtype).contiguous()


def log_softmax_eager(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.log_softmax(x, dim).contiguous()  # its gradient starts from y as rounded to the dtype of x, as ours


def log_softmax_bwd_reference(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dy32, y32 = _upcast(dy), _upcast(y)
    return (dy32 - y32.exp() * dy32.sum(dim, keepdim=True)).to(y.dtype).contiguous()


_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    # Half precision: the hardware's own exp2, which spares exp's treatment of subnormal results. In fp32 the rounding of
    # x * log2(e) would show.
    if PRECISE:
        return tl.exp(x)
    else:
        return tl.exp2(x * _LOG2E)


# --------------------------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,
    y_ptr,
    M,
    N,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG: tl.constexpr,
    PDL: tl.constexpr,
):
    # whole rows in registers: BLOCK_N >= N
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=float("-inf"))
    if PDL:
        gdc_launch_dependents()
    x = x.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    x -= tl.max(x, axis=1)[:, None]
    y = _exp(x, x_ptr.dtype.element_ty == tl.float32)
    if LOG:
        y = x - tl.log(tl.sum(y, axis=1))[:, None]
    else:
        y *= (1.0 / tl.sum(y, axis=1))[:, None]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _copy_chunk(
    slot, x_row_ptr, i: gl.constexpr, offs, N, CHUNK: gl.constexpr, CHUNKS: gl.constexpr, EVEN: gl.constexpr
):
    # chunk i of a row into shared memory, one group of asynchronous copies
    offs_n = i * CHUNK + offs  # (CHUNK,)
    if EVEN or i < CHUNKS - 1:
        async_copy.async_copy_global_to_shared(slot, x_row_ptr + offs_n)
    else:
        async_copy.async_copy_global_to_shared(slot, x_row_ptr + offs_n, mask=offs_n < N)
    async_copy.commit_group()


@gluon.jit
def _gl_exp(x, PRECISE: gl.constexpr):
    if PRECISE:
        return gl.exp(x)
    else:
        return gl.exp2(x * _LOG2E)


@gluon.jit
def _read_again(x):
    # The same bits, which the compiler takes for new ones: it would hold on to what it made of them in the first pass.
    PACK: gl.constexpr = 32 // x.dtype.primitive_bitwidth
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@gluon.jit
def _softmax_fwd_shared_kernel(
    x_ptr,
    y_ptr,
    N,
    stride_xm,
    CHUNK: gl.constexpr,
    SLOTS: gl.constexpr,
    HELD: gl.constexpr,
    EVEN: gl.constexpr,
    LOG: gl.constexpr,
    PDL: gl.constexpr,
):
    # One row of SLOTS + HELD chunks. All SLOTS copies are under way at once; every thread reads back what it copied itself.
    # The first HELD chunks move on to registers, and the last ones take their slots: what waits in registers must have come
    # through shared memory, because the L1 cache, which direct loads need, is all but gone.
    CHUNKS: gl.constexpr = SLOTS + HELD
    PRECISE: gl.constexpr = x_ptr.dtype.element_ty == gl.float32
    VEC: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # 16 bytes
    layout: gl.constexpr = gl.BlockedLayout([VEC], [32], [gl.num_warps()], [0])
    smem = gl.allocate_shared_memory(
        x_ptr.dtype.element_ty, [SLOTS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    offs = gl.arange(0, CHUNK, layout=layout)  # (CHUNK,)
    row = gl.program_id(0).to(gl.int64)
    x_row_ptr = x_ptr + row * stride_xm
    y_row_ptr = y_ptr + row * N
    if PDL:
        gdc_wait()
    for i in gl.static_range(SLOTS):
        _copy_chunk(smem.index(i), x_row_ptr, i, offs, N, CHUNK, CHUNKS, EVEN)

    # Any shift that keeps the sum in range gives the same quotient: the first chunk's maximum does for nearly every row.
    shift = 0.0
    s = gl.zeros([CHUNK], gl.float32, layout)
    held = ()
    for i in gl.static_range(CHUNKS):
        # groups that may still be under way: those committed after chunk i's
        async_copy.wait_group(SLOTS - 1 if i <= HELD else CHUNKS - 1 - i)
        chunk = smem.index(i % SLOTS).load(layout)
        if i < HELD:
            held = held + (chunk,)  # noqa: RUF005 (Triton knows no star)
            _copy_chunk(smem.index(i), x_row_ptr, SLOTS + i, offs, N, CHUNK, CHUNKS, EVEN)
        x = chunk.to(gl.float32)
        if not EVEN and i == CHUNKS - 1:
            x = gl.where(i * CHUNK + offs < N, x, float("-inf"))
        if i == 0:
            shift = gl.max(x, axis=0)
            shift = gl.where(shift == float("-inf"), 0.0, shift)
        s += _gl_exp(x - shift, PRECISE)
    if PDL:
        gdc_launch_dependents()
    total = gl.sum(s, axis=0)
    # 2**-60 to 2**60; not so for NaN, for a first chunk of -inf and for one far below the row's maximum
    if not ((total > 8.6736174e-19) & (total < 1.1529215e18)):
        m = gl.full([CHUNK], float("-inf"), gl.float32, layout)
        for start in range(0, N, CHUNK):
            offs_n = start + offs
            m = gl.maximum(m, gl.load(x_row_ptr + offs_n, mask=offs_n < N, other=float("-inf")).to(gl.float32))
        shift = gl.max(m, axis=0)
        shift = gl.where(shift == float("-inf"), 0.0, shift)
        s = gl.zeros([CHUNK], gl.float32, layout)
        for start in range(0, N, CHUNK):
            offs_n = start + offs
            x = gl.load(x_row_ptr + offs_n, mask=offs_n < N, other=float("-inf")).to(gl.float32)
            s += _gl_exp(x - shift, PRECISE)
        total = gl.sum(s, axis=0)
    scale = 1.0 / total  # an all -inf row: 0 * (1 / 0) = NaN below
    log2_total = gl.log2(total)  # and -inf + inf = NaN
    log_total = gl.log(total)

    for i in gl.static_range(CHUNKS):
        if i < HELD:
            chunk = _read_again(held[i])
        else:
            chunk = smem.index(i % SLOTS).load(layout)
        if LOG:
            y = (chunk.to(gl.float32) - shift) - log_total
        elif PRECISE:
            y = gl.exp(chunk.to(gl.float32) - shift) * scale
        else:
            y = gl.exp2(gl.fma(chunk.to(gl.float32) - shift, _LOG2E, -log2_total))
        y = y.to(y_ptr.dtype.element_ty)
        offs_n = i * CHUNK + offs
        if EVEN or i < CHUNKS - 1:
            gl.store(y_row_ptr + offs_n, y)
        else:
            gl.store(y_row_ptr + offs_n, y, mask=offs_n < N)


@triton.jit
def _online_step(m, s, x):
    # (max, sum of exp(x - max)) of what was seen, x (R, L) of new elements reduced along R.
    m_new = tl.maximum(m, tl.max(x, axis=0))
    # while all is -inf, subtract 0: -inf - -inf would be NaN
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[None, :]), axis=0)
    return m_new, s


@triton.jit
def _softmax_fwd_online_kernel(x_ptr, y_ptr, M, N, stride_xm, R: tl.constexpr, L: tl.constexpr, LOG: tl.constexpr):
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
        log_total = tl.log(total)  # and -inf + inf = NaN

        # every thread holds its elements: a tile is read again by the threads that read it first, last tile first
        ahead = tl.load(x_row_ptr + last + offs, mask=last + offs < N)
        for back in range(0, N, BLOCK_N):
            x = ahead.to(tl.float32)
            offs_n = last - back + offs
            offs_ahead = offs_n - BLOCK_N
            ahead = tl.load(x_row_ptr + offs_ahead, mask=offs_ahead >= 0)
            if LOG:
                y = (x - shift) - log_total
            else:
                y = tl.exp(x - shift) * scale
            tl.store(y_row_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _softmax_fwd_columns_kernel(x_ptr, y_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOG: tl.constexpr):
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
    log_s = tl.log(s)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs = base + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
        if LOG:
            y = (x - m[None, :]) - log_s[None, :]
        else:
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
def _gradient(dy, y, mean, LOG: tl.constexpr):
    """`mean` is _mean's; of log_softmax, the sum of dy."""
    if LOG:
        dx = dy - tl.exp(y) * mean
    else:
        dx = y * (dy - mean)
    return dx


@triton.jit
def _softmax_bwd_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    M,
    N,
    stride_dym,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if LOG:
        mean = tl.sum(dy, axis=1)  # (BLOCK_M,)
    else:
        mean = _mean(tl.sum(dy * y, axis=1), tl.sum(y, axis=1))  # (BLOCK_M,)
    dx = _gradient(dy, y, mean[:, None], LOG)  # (BLOCK_M, BLOCK_N)
    tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _softmax_bwd_shared_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    N,
    stride_dym,
    stride_ym,
    CHUNK: gl.constexpr,
    CHUNKS: gl.constexpr,
    EVEN: gl.constexpr,
    LOG: gl.constexpr,
    PDL: gl.constexpr,
):
    # one row of each in shared memory, as in the forward
    VEC: gl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([VEC], [32], [gl.num_warps()], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    dy_smem = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [CHUNKS, CHUNK], flat)
    y_smem = gl.allocate_shared_memory(y_ptr.dtype.element_ty, [CHUNKS, CHUNK], flat)
    offs = gl.arange(0, CHUNK, layout=layout)  # (CHUNK,)
    row = gl.program_id(0).to(gl.int64)
    if PDL:
        gdc_wait()
    for i in gl.static_range(CHUNKS):
        _copy_chunk(dy_smem.index(i), dy_ptr + row * stride_dym, i, offs, N, CHUNK, CHUNKS, EVEN)
        _copy_chunk(y_smem.index(i), y_ptr + row * stride_ym, i, offs, N, CHUNK, CHUNKS, EVEN)
    weighted = gl.zeros([CHUNK], gl.float32, layout)
    total = gl.zeros([CHUNK], gl.float32, layout)
    for i in gl.static_range(CHUNKS):
        async_copy.wait_group(2 * (CHUNKS - 1 - i))
        dy = dy_smem.index(i).load(layout).to(gl.float32)
        y = y_smem.index(i).load(layout).to(gl.float32)  # 0 beyond the row, as dy: masked copies write zeros
        if LOG:
            weighted += dy
        else:
            weighted += dy * y
            total += y
    if PDL:
        gdc_launch_dependents()
    mean = gl.sum(weighted, axis=0)
    if not LOG:  # every y of a row may have rounded to 0
        mean = mean / gl.maximum(gl.sum(total, axis=0), 1.1754944e-38)
    for i in gl.static_range(CHUNKS):
        dy = dy_smem.index(i).load(layout).to(gl.float32)
        y = y_smem.index(i).load(layout).to(gl.float32)
        if LOG:
            dx = dy - gl.exp(y) * mean
        else:
            dx = y * (dy - mean)
        dx = dx.to(dx_ptr.dtype.element_ty)
        offs_n = i * CHUNK + offs
        if EVEN or i < CHUNKS - 1:
            gl.store(dx_ptr + row * N + offs_n, dx)
        else:
            gl.store(dx_ptr + row * N + offs_n, dx, mask=offs_n < N)


@triton.jit
def _softmax_bwd_online_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, stride_dym, stride_ym, R: tl.constexpr, L: tl.constexpr, LOG: tl.constexpr
):
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
            if LOG:
                weighted += tl.sum(dy, axis=0)
            else:
                weighted += tl.sum(dy * y, axis=0)
                total += tl.sum(y, axis=0)
        mean = tl.sum(weighted, axis=0)
        if not LOG:
            mean = _mean(mean, tl.sum(total, axis=0))

        dy_ahead = tl.load(dy_row_ptr + last + offs, mask=last + offs < N, eviction_policy="evict_first")
        y_ahead = tl.load(y_row_ptr + last + offs, mask=last + offs < N, eviction_policy="evict_first")
        for back in range(0, N, BLOCK_N):
            dy, y = dy_ahead.to(tl.float32), y_ahead.to(tl.float32)
            offs_n = last - back + offs
            offs_ahead = offs_n - BLOCK_N
            dy_ahead = tl.load(dy_row_ptr + offs_ahead, mask=offs_ahead >= 0, eviction_policy="evict_first")
            y_ahead = tl.load(y_row_ptr + offs_ahead, mask=offs_ahead >= 0, eviction_policy="evict_first")
            dx = _gradient(dy, y, mean, LOG).to(dx_ptr.dtype.element_ty)
            tl.store(dx_row_ptr + offs_n, dx, mask=offs_n < N, eviction_policy="evict_first")


@triton.jit
def _softmax_bwd_columns_kernel(
    dy_ptr, y_ptr, dx_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOG: tl.constexpr
):
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
        if LOG:
            weighted += tl.sum(dy, axis=0)
        else:
            weighted += tl.sum(dy * y, axis=0)
            total += tl.sum(y, axis=0)
    mean = weighted
    if not LOG:
        mean = _mean(weighted, total)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs = base + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        dy = tl.load(dy_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
        dx = _gradient(dy, y, mean[None, :], LOG).to(dx_ptr.dtype.element_ty)
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


def _shared_config(N: int, itemsize: int, tensors: int) -> dict[str, int] | None:
    # Chunks of 4, 8 or 16 KB, 32 bytes a thread: as few threads as the row allows, so that several rows share an SM. At most
    # 13 chunks of 16 KB fit into its shared memory, and 7 more into the registers of 16 warps.
    row = N * itemsize
    chunk = 4096 if row * tensors <= 40960 else 8192 if row * tensors <= 81920 else 16384
    chunks = cdiv(row, chunk)
    CHUNK = chunk // itemsize
    config = {"CHUNK": CHUNK, "EVEN": N % CHUNK == 0, "num_warps": chunk // 1024}
    if tensors > 1:
        return {**config, "CHUNKS": chunks} if chunks * tensors <= 13 else None
    return {**config, "SLOTS": min(chunks, 13), "HELD": max(chunks - 13, 0)} if chunks <= 20 else None


def _takes_shared(*rows: torch.Tensor) -> bool:
    # x (M, N): whole vectors of 16 bytes, which Triton proves from sizes and strides that are multiples of 16 elements
    return gluon_ready(rows[0].device) and all(
        x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.element_size() >= 2 and aligned(x) for x in rows
    )


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


def _forward(x: torch.Tensor, y: torch.Tensor, dim: int, LOG: bool) -> None:
    if y.numel() == 0:
        return
    M, N, K = _split(x, dim)
    if K != 1:
        config = _column_config(N, K)
        grid = (M * cdiv(K, config["BLOCK_K"]),)
        launch(_softmax_fwd_columns_kernel, grid, x.contiguous(), y, N, K, LOG=LOG, **config)
        return
    x = _rows(x, M, N)
    if N * x.element_size() > 16384 and _takes_shared(x):
        shared = _shared_config(N, x.element_size(), 1)
        if shared is not None:
            launch(_softmax_fwd_shared_kernel, (M,), x, y, N, x.stride(0), LOG=LOG, **shared)
            return
    if N <= 32768:
        config = _register_config(N, x.element_size())
        launch(_softmax_fwd_kernel, (cdiv(M, config["BLOCK_M"]),), x, y, M, N, x.stride(0), LOG=LOG, **config)
    else:
        config, per_sm = _online_config(N, x.element_size(), capability(x.device))
        grid = (min(M, sm_count(x.device) * per_sm),)
        launch(_softmax_fwd_online_kernel, grid, x, y, M, N, x.stride(0), LOG=LOG, **config)


def _backward(dy: torch.Tensor, y: torch.Tensor, dx: torch.Tensor, dim: int, LOG: bool) -> None:
    if dx.numel() == 0:
        return
    M, N, K = _split(y, dim)
    if K != 1:
        config = _column_config(N, K)
        grid = (M * cdiv(K, config["BLOCK_K"]),)
        launch(_softmax_bwd_columns_kernel, grid, dy.contiguous(), y.contiguous(), dx, N, K, LOG=LOG, **config)
        return
    dy, y = _rows(dy, M, N), _rows(y, M, N)
    strides = dy.stride(0), y.stride(0)
    if N * y.element_size() > 16384 and dy.dtype == y.dtype and _takes_shared(dy, y):
        shared = _shared_config(N, y.element_size(), 2)
        if shared is not None:
            launch(_softmax_bwd_shared_kernel, (M,), dy, y, dx, N, *strides, LOG=LOG, **shared)
            return
    if N <= 16384:  # two tensors wait in registers
        config = _register_config(N, y.element_size())
        launch(_softmax_bwd_kernel, (cdiv(M, config["BLOCK_M"]),), dy, y, dx, M, N, *strides, LOG=LOG, **config)
    else:
        config = _online_bwd_config(N, y.element_size())
        grid = (min(M, sm_count(y.device)),)
        launch(_softmax_bwd_online_kernel, grid, dy, y, dx, M, N, *strides, LOG=LOG, **config)


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    y = softmax_fake(x, dim)
    _forward(x, y, dim, LOG=False)
    return y


def softmax_fake(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x.new_empty(x.shape)


def softmax_bwd(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dx = softmax_bwd_fake(dy, y, dim)
    _backward(dy, y, dx, dim, LOG=False)
    return dx


def softmax_bwd_fake(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    return y.new_empty(y.shape)


def log_softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    y = log_softmax_fake(x, dim)
    _forward(x, y, dim, LOG=True)
    return y


def log_softmax_fake(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x.new_empty(x.shape)


def log_softmax_bwd(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dx = log_softmax_bwd_fake(dy, y, dim)
    _backward(dy, y, dx, dim, LOG=True)
    return dx


def log_softmax_bwd_fake(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    return y.new_empty(y.shape)


def _check(op: str, x: torch.Tensor, dim: int) -> None:
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        bad_argument(op, "dim", dim, f"{-dims} to {dims - 1} for x of shape {tuple(x.shape)}", IndexError)


def softmax_check(x: torch.Tensor, dim: int = -1) -> None:
    _check("softmax", x, dim)


def log_softmax_check(x: torch.Tensor, dim: int = -1) -> None:
    _check("log_softmax", x, dim)


def softmax_forward(ctx: Any, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    y = torch.ops.tt.softmax(x, dim)
    ctx.save_for_backward(y)
    ctx.dim = dim
    return y


def softmax_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor]:
    (y,) = ctx.saved_tensors
    return (torch.ops.tt.softmax_bwd(dy, y, ctx.dim),)


def log_softmax_forward(ctx: Any, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    y = torch.ops.tt.log_softmax(x, dim)
    ctx.save_for_backward(y)
    ctx.dim = dim
    return y


def log_softmax_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor]:
    (y,) = ctx.saved_tensors
    return (torch.ops.tt.log_softmax_bwd(dy, y, ctx.dim),)


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


def log_softmax_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    # the other corners are softmax's: what runs is the same but for the last line
    for shape in [(5, 33), (1, 1), (2, 2049), (0, 5), ()]:
        yield Sample("x".join(map(str, shape)) or "scalar", (randn(*shape),))
    yield Sample("dim1_5x37x3", (randn(5, 37, 3), 1))
    yield Sample("N40001_online", (randn(2, 40001),))
    yield Sample("large_values", (randn(4, 130) * 100,))
    if dtype != torch.float64:  # -inf and NaN, which no finite difference can check
        masked = randn(4, 100)
        masked[:, 60:] = float("-inf")
        masked[1] = float("-inf")
        yield Sample("masked", (masked,))
        yield Sample("masked_dim0", (masked.t(), 0))
        masked = randn(2, 40000)
        masked[0, :30000] = float("-inf")
        masked[1] = float("-inf")
        yield Sample("masked_online", (masked,))


def softmax_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    # rows that wait in shared memory: whole and broken last chunks, chunks held in registers, the sum out of range
    for N in (8208, 16400, 32768, 53248, 131072 // dtype.itemsize * 2, 131088 // dtype.itemsize * 2):
        yield Sample(f"N{N}_shared", (torch.randn(3, N, device=device, dtype=dtype),))
    masked = torch.randn(4, 40960, device=device, dtype=dtype)
    masked[0, :30000] = float("-inf")
    masked[1] = float("-inf")
    masked[2] *= 100
    masked[3, :9000] -= 200
    yield Sample("masked_shared", (masked,))
    yield Sample("slice_shared", (torch.randn(3, 20000, device=device, dtype=dtype)[:, 16:16416],))


def log_softmax_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from softmax_gpu_samples(device, dtype)


def softmax_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"softmax.*'dim' is 2.*-2 to 1")
    yield ErrorSample("dim_too_small", (x, -3), error=IndexError, match=r"softmax.*'dim' is -3.*-2 to 1")
    yield ErrorSample("dim_of_scalar", (x[0, 0], 1), error=IndexError, match=r"softmax.*'dim' is 1.*-1 to 0")


def log_softmax_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"log_softmax.*'dim' is 2.*-2 to 1")


def softmax_bench_cases() -> Iterator[BenchCase]:
    def make(m: int, n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(m, n, device=device, dtype=dtype),), {}

    for m, n in [(8192, 1024), (8192, 4096), (4096, 16384), (2048, 65536), (1024, 131072)]:
        yield BenchCase(f"{m}x{n}", lambda d, t, m=m, n=n: make(m, n, d, t))


def softmax_cost(x: torch.Tensor, dim: int = -1) -> Cost:
    numel, size = x.numel(), x.element_size()
    # subtract, exp, multiply, and two reductions; backward: multiply, add, subtract, multiply
    return Cost(flops=5 * numel, bytes=2 * numel * size, backward_flops=4 * numel, backward_bytes=3 * numel * size)


def log_softmax_bench_cases() -> Iterator[BenchCase]:
    def make(m: int, n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(m, n, device=device, dtype=dtype),), {}

    for m, n in [(8192, 4096), (1024, 131072)]:
        yield BenchCase(f"{m}x{n}", lambda d, t, m=m, n=n: make(m, n, d, t))


def log_softmax_cost(x: torch.Tensor, dim: int = -1) -> Cost:
    numel, size = x.numel(), x.element_size()
    # subtract twice, exp, and two reductions; backward: exp, multiply, subtract, and one reduction
    return Cost(flops=5 * numel, bytes=2 * numel * size, backward_flops=4 * numel, backward_bytes=3 * numel * size)
