"""What the normalisations of rows share: the kernels of rms_norm, layer_norm, and of both behind a residual addition.

s    = x + residual, rounded to residual's dtype (without a residual: x)
xc   = s - mean(s) (layer norm) or s (root-mean-square norm)
rstd = 1 / sqrt(mean(xc ** 2) + eps)
y    = xc * rstd * (weight + weight_offset) + bias

With g = dy * (weight + weight_offset) and xhat = xc * rstd, the gradient of s is

ds      = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual_out        (no mean(g) without centring)
dweight = sum over rows of dy * xhat
dbias   = sum over rows of dy

Statistics are in fp32. The variance is that of x less a first guess of the mean, corrected by what the guess was off
(Chan, Golub, LeVeque: Algorithms for Computing the Sample Variance, https://doi.org/10.1080/00031305.1983.10483115):
rows far from zero lose nothing. Gradients of weight and bias are summed in a fixed order, without atomics.

A row of up to 16384 elements stays in registers between its statistics and its result, so it is read once; a longer one
is read again from L2. The backward's programs are persistent: each keeps its sums for weight and bias in registers over
all of its rows, and writes one row of partial sums.

A foundation module, as `launch` is: it knows no op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import INTERPRET, cdiv, launch, next_power_of_2, sm_count

# --------------------------------------------------------------------------------------------------------------------
# References and checks
# --------------------------------------------------------------------------------------------------------------------


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32, in which the statistics of x are computed and kept; fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward_reference(
    s: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    centred: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result in the dtype of the statistics, mean and rstd. The mean is zero where nothing is centred."""
    xc = s.to(statistics_dtype(s))
    mean = xc.mean(-1) if centred else xc.new_zeros(xc.shape[:-1])
    if centred:
        xc = xc - mean.unsqueeze(-1)
    rstd = torch.rsqrt(xc.square().mean(-1) + eps)
    y = xc * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y, mean.contiguous(), rstd.contiguous()


def backward_reference(
    dy: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of s, weight and bias in the dtype of the statistics. Centred if there is a mean."""
    dyf, xhat = dy.to(rstd.dtype), s.to(rstd.dtype)
    if mean is not None:
        xhat = xhat - mean.unsqueeze(-1)
    xhat = xhat * rstd.unsqueeze(-1)
    g = dyf if weight is None else dyf * (weight.to(rstd.dtype) + weight_offset)
    ds = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if mean is not None:
        ds = ds - g.mean(-1, keepdim=True)
    rows = tuple(range(s.ndim - 1))
    dweight, dbias = dyf * xhat, dyf
    if rows:
        dweight, dbias = dweight.sum(rows), dbias.sum(rows)
    return rstd.unsqueeze(-1) * ds, dweight, dbias


def copy_wanted(out: Sequence[torch.Tensor], found: Sequence[torch.Tensor], needs: Sequence[bool]) -> None:
    """Copy into each tensor of `out` that is wanted what was found for it; the others are empty."""
    for target, value, needed in zip(out, found, needs, strict=False):
        if needed:
            target.copy_(value)


def empty_gradient(of: torch.Tensor | None, like: torch.Tensor, needed: bool) -> torch.Tensor:
    """A contiguous tensor for the gradient of `of`; an empty one if it is not needed."""
    return like.new_empty((0,)) if of is None or not needed else of.new_empty(of.shape)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """For samples: a dtype that a weight may have beside an x of `dtype`."""
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def check(
    op: str,
    x: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> None:
    """Raise ValueError for x without dimensions, a weight, bias or residual of another shape, a negative eps, an offset
    without a weight."""
    if x.ndim == 0:
        bad_argument(op, "x", "a tensor without dimensions", "at least one dimension, (..., N)")
    if residual is not None and residual.shape != x.shape:
        bad_argument(op, "residual", f"of shape {tuple(residual.shape)}", f"the shape of x, {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            bad_argument(op, name, f"of shape {tuple(vector.shape)}", f"({x.shape[-1]},), the last size of x")
    if not eps >= 0:
        bad_argument(op, "eps", eps, "a number >= 0")
    if weight is None and weight_offset != 0:
        bad_argument(op, "weight_offset", weight_offset, "0.0 where there is no weight to add it to")


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------

_INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def rounded_product(a, b):
    """a * b in fp32, rounded before anything is added to it: a fused multiply-add takes the exact product, and then the
    difference from a mean of rounded ones is not 0 where it should be."""
    if _INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)


@triton.jit
def _norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    stride_xm,
    stride_residualm,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M whole rows per program, held in registers between the reduction and the store: x is read once."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(
        tl.float32
    )  # (BLOCK_M, BLOCK_N)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + offs_m[:, None] * stride_residualm + offs_n[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    # Before the reduction: the weight then travels together with x. Every program reads it: keep it in the caches.
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    if HAS_RESIDUAL:
        # rounded before it is normalised: the backward sees the stored sum alone
        total = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offs_m[:, None] * N + offs_n[None, :], total, mask=mask)
        x = total.to(tl.float32)
    if CENTRED:
        # Half precision: both sums at once, which keeps x packed in registers. If more than six bits cancel (or NaN comes of
        # it), the row is gone through again, as fp32 always is.
        HALF: tl.constexpr = (sum_ptr if HAS_RESIDUAL else x_ptr).dtype.element_ty.primitive_bitwidth == 16
        if HALF:
            mean, squares = tl.split(tl.sum(tl.join(x, x * x), axis=1))  # one reduction, (BLOCK_M, 2)
            mean = mean / N
            variance = squares / N - mean * mean
            careful = tl.max((mean * mean <= 64.0 * variance).to(tl.int32) ^ 1, axis=0) != 0
        else:
            mean = tl.sum(x, axis=1) / N  # (BLOCK_M,)
            variance = mean
            careful = True
        if careful:
            xc = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
            error = tl.sum(xc, axis=1) / N  # what rounding left of the mean
            variance = tl.maximum(tl.sum(xc * xc, axis=1) / N - error * error, 0.0)
            mean += error
        x = x - mean[:, None]
        rstd = 1.0 / tl.sqrt_rn(variance + EPS)
        if STORE_STATISTICS:
            tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    else:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + EPS)  # (BLOCK_M,)
    if STORE_STATISTICS:
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y = y * (weight + WEIGHT_OFFSET)[None, :]
    if HAS_BIAS:
        y = y + bias[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_fwd_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    stride_xm,
    stride_residualm,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row per program, for rows that do not fit in registers: the second pass finds its input in L2."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N
    if HAS_RESIDUAL:
        residual_ptr += row * stride_residualm
        sum_ptr += row * N
    if CENTRED:
        # The mean of the first block is guess enough: were the others far from it, then so would be the variance, and
        # what cancels below is N / BLOCK_N times the result at most.
        offs_n = tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + offs_n, mask=offs_n < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + offs_n, mask=offs_n < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
        guess = tl.sum(x) / tl.minimum(N, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        if CENTRED:
            x = tl.where(mask_n, x - guess, 0.0)
            acc += x
        squares += x * x
    if CENTRED:
        error = tl.sum(acc) / N
        rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(squares) / N - error * error, 0.0) + EPS)
        if STORE_STATISTICS:
            tl.store(mean_ptr + row, guess + error)
    else:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares) / N + EPS)
    if STORE_STATISTICS:
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total = (y + tl.load(residual_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)).to(
                sum_ptr.dtype.element_ty
            )
            tl.store(sum_ptr + offs_n, total, mask=mask_n)
            y = total.to(tl.float32)
        if CENTRED:
            y = (y - guess) - error
        y = y * rstd
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            y = y * (weight + WEIGHT_OFFSET)
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_dsumm,
    stride_xm,
    WEIGHT_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE_DX: tl.constexpr,
    STORE_DRESIDUAL: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Persistent over blocks of whole rows; the gradients of weight and bias stay in registers until the last one.

    partial_ptr: (programs, sums, N) fp32, dweight's sums before dbias's.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    if HAS_WEIGHT and KEEP_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
    # Rows are summed within a thread as long as possible: two dimensions, and one reduction after the loop.
    acc_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_m in tl.range(pid * BLOCK_M, M, programs * BLOCK_M, num_stages=STAGES):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )  # (BLOCK_M, BLOCK_N)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        if CENTRED:
            x = x - tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        if NEEDS_DWEIGHT:
            acc_weight += dy * (x * rstd)
        if NEEDS_DBIAS:
            acc_bias += dy
        if HAS_WEIGHT:
            if not KEEP_WEIGHT:  # the widest rows have no registers left for it
                weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(
                    tl.float32
                )
            factor = (weight + WEIGHT_OFFSET)[None, :]
            dy = rounded_product(dy, factor) if CENTRED else dy * factor
        slope = rstd * tl.sum(dy * x, axis=1, keep_dims=True) / N  # (BLOCK_M, 1): mean of dy * xhat
        if CENTRED:
            dy = dy - tl.sum(dy, axis=1, keep_dims=True) / N
        dx = rstd * (dy - x * (rstd * slope))
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + offs_m[:, None] * stride_dsumm + offs_n[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        if STORE_DX:
            tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if STORE_DRESIDUAL:
            tl.store(
                dresidual_ptr + offs_m[:, None] * N + offs_n[None, :],
                dx.to(dresidual_ptr.dtype.element_ty),
                mask=mask,
            )
    if NEEDS_DWEIGHT or NEEDS_DBIAS:
        SUMS: tl.constexpr = 2 if NEEDS_DWEIGHT and NEEDS_DBIAS else 1
        partial_ptr += pid.to(tl.int64) * SUMS * N
        if NEEDS_DWEIGHT:
            tl.store(partial_ptr + offs_n, tl.sum(acc_weight, axis=0), mask=mask_n)
        if NEEDS_DBIAS:
            tl.store(partial_ptr + (SUMS - 1) * N + offs_n, tl.sum(acc_bias, axis=0), mask=mask_n)


@triton.jit
def _norm_bwd_wide_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    N,
    stride_dym,
    stride_dsumm,
    stride_xm,
    WEIGHT_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE_DX: tl.constexpr,
    STORE_DRESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of one row per program, for rows that do not fit in registers: the second pass finds x and dy in L2."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    dy_ptr += row * stride_dym
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    acc_slope = tl.zeros((BLOCK_N,), tl.float32)
    acc_mean = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        xhat = (x - mean) * rstd
        g = tl.load(dy_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            g = g * (weight + WEIGHT_OFFSET)
        acc_slope += g * xhat
        if CENTRED:
            acc_mean += g
    slope = tl.sum(acc_slope) / N
    mean_g = 0.0
    if CENTRED:
        mean_g = tl.sum(acc_mean) / N
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        xhat = (tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            g = g * (weight + WEIGHT_OFFSET)
        dx = rstd * (g - mean_g - xhat * slope)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * stride_dsumm + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if STORE_DX:
            tl.store(dx_ptr + row * N + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)
        if STORE_DRESIDUAL:
            tl.store(dresidual_ptr + row * N + offs_n, dx.to(dresidual_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _norm_parameters_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    CENTRED: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of weight and bias alone: program (i, j) sums every j-th block of rows of column block i.

    partial_ptr: (splits, sums, N) fp32, as `_norm_bwd_kernel` writes it.
    """
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    acc_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_m in range(pid_m * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEEDS_DWEIGHT:
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                x = x - tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
            acc_weight += dy * (x * rstd)
        if NEEDS_DBIAS:
            acc_bias += dy
    SUMS: tl.constexpr = 2 if NEEDS_DWEIGHT and NEEDS_DBIAS else 1
    partial_ptr += pid_m.to(tl.int64) * SUMS * N
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + offs_n, tl.sum(acc_weight, axis=0), mask=mask_n)
    if NEEDS_DBIAS:
        tl.store(partial_ptr + (SUMS - 1) * N + offs_n, tl.sum(acc_bias, axis=0), mask=mask_n)


@triton.jit
def _norm_sum_kernel(
    partial_ptr,
    first_ptr,
    second_ptr,
    G,
    N,
    SUMS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """first[n], second[n] = sums over g of partial[g, 0, n], partial[g, 1, n], in a fixed order."""
    which = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for start in range(0, G, BLOCK_G):
        offs_g = start + tl.arange(0, BLOCK_G).to(tl.int64)  # (BLOCK_G,)
        mask = (offs_g < G)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptr + (offs_g[:, None] * SUMS + which) * N + offs_n[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    if which == 0:
        tl.store(first_ptr + offs_n, total.to(first_ptr.dtype.element_ty), mask=mask_n)
    else:
        if SUMS == 2:
            tl.store(second_ptr + offs_n, total.to(second_ptr.dtype.element_ty), mask=mask_n)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------

# A row of up to this many elements stays in registers; more would spill.
_MAX_ROW = 16384


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, N) with unit stride along N: a view where the strides allow it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _fwd_config(block_n: int, residual: bool) -> dict[str, int]:
    # A warp for every 1024 elements, four 16-byte loads in flight per thread; short rows share a program of two. On an
    # H200, 32768x1024: 4.07 TB/s, against 3.99 with 4 rows and 4 warps, and 3.27 with one row and one warp, because every
    # program of a dependent launch must wait for the kernel before it (bench/results/tuning/nvidia_h200/dependent_launch.json).
    block_m = min(max(2048 // block_n, 1), 64)
    num_warps = 4 if block_n < 1024 else max(block_n // 1024, 2)  # many short rows: their addresses would spill in two
    if residual:
        num_warps = max(num_warps, 4)  # 32768x1024, add_rms_norm: 4.11 TB/s, 3.73 with two
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": min(num_warps, 16)}


def _bwd_config(N: int, itemsize: int, tensors: int, sums: int, centred: bool) -> tuple[dict[str, Any], int] | None:
    """Constexprs and options, and programs per SM (each costs `sums` fp32 rows of partial sums). None: row too wide.

    tensors: how many (M, N) tensors are read. sums: of dweight and dbias, those wanted.
    """
    block_n = next_power_of_2(N)
    vectors = N % 8 == 0  # rows that no vector load fits need more registers
    lean = tensors + sums + centred <= 3
    # the widest rows that registers hold: fewer for wide numbers, for a third input and a second sum
    if lean:
        fits = block_n < _MAX_ROW or (block_n == _MAX_ROW and itemsize == 2 and vectors)
    else:
        fits = block_n < _MAX_ROW // 2 or (block_n == _MAX_ROW // 2 and vectors and (itemsize == 2 or tensors == 2))
    if not fits:
        return None
    # rows to fill a tile; a row costs registers for its addresses, so not too many
    if lean:
        block_m = min(max(4096 // block_n, 1), 64)
    else:
        block_m = min(max((4096 if vectors and block_n >= 1024 else 2048) // block_n, 1), 16)
    tile_bytes = 2 * block_m * block_n * itemsize  # x and dy of one step, in shared memory
    # H200, rms_norm: 4096 columns 3.65 TB/s with 4 or 8 warps, 1024 columns 3.73 with 4 and 3.57 with 8
    if not lean and block_n < 1024:
        num_warps = 4
    elif vectors:
        num_warps = 4 if block_n <= 4096 else block_n // 512
    else:
        num_warps = 8
    config = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "KEEP_WEIGHT": block_n < _MAX_ROW,
        "STAGES": 3 if tile_bytes <= 32768 else 2,
        "num_warps": num_warps,
    }
    return config, 2 if tile_bytes <= 16384 else 1


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    y: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    centred: bool,
) -> None:
    """Fill y, the sum `total` where there is a residual, and the statistics unless rstd is None."""
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    M, N = x.shape
    tensors = (
        x,
        residual,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        total,
        mean,
        rstd,
    )
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    options: dict[str, Any] = {
        "EPS": eps,
        "WEIGHT_OFFSET": weight_offset,
        "CENTRED": centred,
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "STORE_STATISTICS": rstd is not None,
    }
    block_n = next_power_of_2(N)
    if block_n <= _MAX_ROW:
        config = _fwd_config(block_n, residual is not None)
        launch(_norm_fwd_kernel, (cdiv(M, config["BLOCK_M"]),), *tensors, M, N, *strides, **options, **config)
    else:
        launch(_norm_fwd_wide_kernel, (M,), *tensors, N, *strides, **options, BLOCK_N=8192, num_warps=16)


def backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    dx: torch.Tensor | None,
    dresidual: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fill the gradients that are not None; dx and dresidual get the same numbers, each in its dtype.

    s: what was normalised. dsum: the upstream gradient of s itself. Centred if there is a mean.
    """
    dy, s = _rows(dy), _rows(s)
    dsum = None if dsum is None else _rows(dsum)
    M, N = s.shape
    sums = [d for d in (dweight, dbias) if d is not None]
    wanted = {"CENTRED": mean is not None, "NEEDS_DWEIGHT": dweight is not None, "NEEDS_DBIAS": dbias is not None}
    partial = None
    if dx is not None or dresidual is not None:
        tensors = (dy, dsum, s, None if weight is None else weight.contiguous(), mean, rstd, dx, dresidual)
        strides = (dy.stride(0), 0 if dsum is None else dsum.stride(0), s.stride(0))
        options: dict[str, Any] = {
            "WEIGHT_OFFSET": weight_offset,
            "HAS_DSUM": dsum is not None,
            "HAS_WEIGHT": weight is not None,
            "STORE_DX": dx is not None,
            "STORE_DRESIDUAL": dresidual is not None,
        }
        narrow = _bwd_config(N, s.element_size(), 2 if dsum is None else 3, len(sums), mean is not None)
        if narrow is not None:
            config, programs_per_sm = narrow
            programs = min(cdiv(M, config["BLOCK_M"]), sm_count(s.device) * programs_per_sm)
            if sums:
                partial = s.new_empty((programs, len(sums), N), dtype=torch.float32)
            launch(_norm_bwd_kernel, (programs,), *tensors, partial, M, N, *strides, **options, **wanted, **config)
        else:
            options["CENTRED"] = mean is not None
            launch(_norm_bwd_wide_kernel, (M,), *tensors, N, *strides, **options, BLOCK_N=4096, num_warps=8)
    if sums:
        if partial is None:
            blocks = cdiv(N, 128)
            splits = min(cdiv(M, 32), max(4 * sm_count(s.device) // max(blocks, 1), 1))
            partial = s.new_empty((splits, len(sums), N), dtype=torch.float32)
            launch(
                _norm_parameters_kernel,
                (blocks, splits),
                dy,
                s,
                mean,
                rstd,
                partial,
                M,
                N,
                dy.stride(0),
                s.stride(0),
                **wanted,
                BLOCK_M=32,
                BLOCK_N=128,
            )
        # narrow columns: many programs, because each one's loop over the partial sums is all latency
        block_n = 16 if N <= 8192 else 128
        second = sums[1] if len(sums) == 2 else None
        grid = (cdiv(N, block_n), len(sums))
        launch(
            _norm_sum_kernel,
            grid,
            partial,
            sums[0],
            second,
            partial.shape[0],
            N,
            SUMS=len(sums),
            BLOCK_G=64,
            BLOCK_N=block_n,
        )
