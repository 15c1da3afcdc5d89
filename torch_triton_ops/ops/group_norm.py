"""Normalisation of groups of channels.

For each sample n and group g of C / num_groups neighbouring channels, over the K = C / num_groups * S elements of both
channels and space:

mean = mean(x)
rstd = 1 / sqrt(mean((x - mean) ** 2) + eps)
y    = (x - mean) * rstd * weight[c] + bias[c]

With h = dy * weight[c] and xhat = (x - mean) * rstd:

dx      = rstd * (h - mean(h) - xhat * mean(h * xhat))
dweight = sum over n and space of dy * xhat
dbias   = sum over n and space of dy

| argument | shape | dtype |
|---|---|---|
| x | (N, C, ...), any strides; what is not contiguous is copied | float32, float16, bfloat16 |
| num_groups | a divisor of C | |
| weight | (C,) or None (then 1) | any of these, also another than x's |
| bias | (C,) or None (then 0) | any of these, also another than x's |
| y | that of x, contiguous | that of x, whatever the others' are |
| mean, rstd | (N, num_groups) | float32 |
| dx, dweight, dbias | those of x, weight, bias | those of x, weight, bias |

Statistics and arithmetic are in fp32, with one rounding at the store; groups far from zero lose nothing. Deterministic:
the gradients of weight and bias are summed in a fixed order, without atomics.

A group that fits in registers is read once, by one program. Where larger groups are many, a program goes through each
twice, the second time from L2. Where they are few, each is divided among programs, which leave their moments (in the
backward: the sums of each channel) for a second launch to combine and a third to apply; what L2 does not hold is then read
twice from memory.

Bytes: forward 2 * numel * itemsize, backward 3 * numel * itemsize. Raises ValueError for x of less than two dimensions,
a num_groups that does not divide C, a weight or bias of another shape and a negative eps.

Source: Wu and He, Group Normalization, https://arxiv.org/abs/1803.08494
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops import norms
from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.fusion import column_sum_kernel
from torch_triton_ops.launch import cdiv, launch, next_power_of_2, sm_count
from torch_triton_ops.norms import other_dtype, rounded_product, statistics_dtype

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _sizes(x: torch.Tensor, num_groups: int) -> tuple[int, int, int]:
    """Groups of all samples, channels of a group, elements of a channel."""
    return x.shape[0] * num_groups, x.shape[1] // num_groups, math.prod(x.shape[2:])


def _by_channel(vector: torch.Tensor, x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(C,) as (num_groups, C / num_groups, 1), to meet (N, num_groups, C / num_groups, S)."""
    return vector.to(statistics_dtype(x)).reshape(num_groups, x.shape[1] // num_groups, 1)


def group_norm_reference(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    return group_norm_fwd_reference(x, num_groups, weight, bias, eps)[0]


def group_norm_fwd_reference(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, channels, space = _sizes(x, num_groups)
    xc = x.to(statistics_dtype(x)).reshape(x.shape[0], num_groups, channels, space)
    mean = xc.mean((2, 3))
    xc = xc - mean[:, :, None, None]
    rstd = torch.rsqrt(xc.square().mean((2, 3)) + eps)
    y = xc * rstd[:, :, None, None]
    if weight is not None:
        y = y * _by_channel(weight, x, num_groups)
    if bias is not None:
        y = y + _by_channel(bias, x, num_groups)
    return y.reshape(x.shape).to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def group_norm_bwd_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = group_norm_bwd_fake(dy, x, num_groups, weight, bias, mean, rstd, needs)
    _, channels, space = _sizes(x, num_groups)
    shape = (x.shape[0], num_groups, channels, space)
    r = rstd[:, :, None, None]
    xhat = (x.to(rstd.dtype).reshape(shape) - mean[:, :, None, None]) * r
    dyf = dy.to(rstd.dtype).reshape(shape)
    h = dyf if weight is None else dyf * _by_channel(weight, x, num_groups)
    dx = r * (h - h.mean((2, 3), keepdim=True) - xhat * (h * xhat).mean((2, 3), keepdim=True))
    dweight, dbias = (dyf * xhat).sum((0, 3)), dyf.sum((0, 3))
    norms.copy_wanted(out, (dx.reshape(x.shape), dweight.reshape(-1), dbias.reshape(-1)), needs)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Kernels. r counts the groups of all samples, c the channels of a group, s the elements of a channel.
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _group_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    G,
    C,
    S,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_STATISTICS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """BLOCK_R whole groups per program, held in registers between the reduction and the store."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    r = offs_r[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    mask_c = (r < R) & (c < C)  # (BLOCK_R, BLOCK_C, 1)
    mask = mask_c & (s < S)
    offs = (r * C + c) * S + s  # (BLOCK_R, BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    channel = (r % G) * C + c
    K = tl.cast(C, tl.float32) * S
    # Half precision: both sums at once, which keeps x packed in registers. If more than six bits cancel (or NaN comes of it),
    # the group is gone through again, as fp32 always is.
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    if HALF:
        mean, squares = tl.split(tl.sum(tl.sum(tl.join(x, x * x), axis=2), axis=1))  # each (BLOCK_R,)
        mean = mean / K
        variance = squares / K - mean * mean
        careful = tl.max((mean * mean <= 64.0 * variance).to(tl.int32) ^ 1, axis=0) != 0
    else:
        mean = tl.sum(tl.sum(x, axis=2), axis=1) / K  # (BLOCK_R,)
        variance = mean
        careful = True
    if careful:
        xc = tl.where(mask, x - mean[:, None, None], 0.0)
        error = tl.sum(tl.sum(xc, axis=2), axis=1) / K  # what rounding left of the mean
        variance = tl.maximum(tl.sum(tl.sum(xc * xc, axis=2), axis=1) / K - error * error, 0.0)
        mean += error
    rstd = 1.0 / tl.sqrt_rn(variance + EPS)
    if STORE_STATISTICS:
        tl.store(mean_ptr + offs_r, mean, mask=offs_r < R)
        tl.store(rstd_ptr + offs_r, rstd, mask=offs_r < R)
    y = (x - mean[:, None, None]) * rstd[:, None, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_fwd_loop_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    G,
    C,
    S,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_STATISTICS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One group per program, tile by tile; the second pass finds x in L2."""
    r = tl.program_id(0).to(tl.int64)
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles = tl.cdiv(C, BLOCK_C) * tiles_s
    x_ptr += r * C * S
    y_ptr += r * C * S
    K = tl.cast(C, tl.float32) * S
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    # The mean of the first tile is guess enough: were the others far from it, then so would be the variance, and what
    # cancels below is `tiles` times the result at most.
    mask = (c < C) & (s < S)
    x = tl.load(x_ptr + c * S + s, mask=mask, other=0.0).to(tl.float32)
    guess = tl.sum(x) / (tl.minimum(C, BLOCK_C) * tl.minimum(S, BLOCK_S))
    acc = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for tile in range(tiles):
        c = tile // tiles_s * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        s = tile % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        mask = (c < C) & (s < S)
        x = tl.load(x_ptr + c * S + s, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = tl.where(mask, x - guess, 0.0)
        acc += x
        squares += x * x
    error = tl.sum(acc) / K
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(squares) / K - error * error, 0.0) + EPS)
    mean = guess + error
    if STORE_STATISTICS:
        tl.store(mean_ptr + r, mean)
        tl.store(rstd_ptr + r, rstd)
    for tile in range(tiles):
        c = tile // tiles_s * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        s = tile % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        mask = (c < C) & (s < S)
        y = (tl.load(x_ptr + c * S + s, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        channel = (r % G) * C + c
        if HAS_WEIGHT:
            y = y * tl.load(weight_ptr + channel, mask=c < C, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + channel, mask=c < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + c * S + s, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(pid, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """A program's tile of a group: r (int64), the tile's number in it, c (BLOCK_C, 1), s (1, BLOCK_S), and s's block."""
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles = tl.cdiv(C, BLOCK_C) * tiles_s
    tile = pid % tiles
    c = tile // tiles_s * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    s = tile % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    return (pid // tiles).to(tl.int64), tile, c, s, tile % tiles_s


@triton.jit
def _group_norm_moments_kernel(x_ptr, moments_ptr, R, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Mean and sum of squared differences from it of one tile. moments_ptr: (2, R, tiles) fp32."""
    r, tile, c, s, _ = _tile(tl.program_id(0), C, S, BLOCK_C, BLOCK_S)
    mask = (c < C) & (s < S)
    x = tl.load(x_ptr + (r * C + c) * S + s, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_C, BLOCK_S)
    count = tl.sum(mask.to(tl.float32))
    mean = tl.sum(x) / count
    x = tl.where(mask, x - mean, 0.0)
    error = tl.sum(x) / count
    tiles = tl.cdiv(C, BLOCK_C) * tl.cdiv(S, BLOCK_S)
    moments_ptr += r * tiles + tile
    tl.store(moments_ptr, mean + error)
    tl.store(moments_ptr + tl.cast(R, tl.int64) * tiles, tl.sum(x * x) - count * error * error)


@triton.jit
def _group_norm_combine_kernel(
    moments_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    C,
    S,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Mean and rstd of one group from the moments of its tiles, in a fixed order."""
    r = tl.program_id(0).to(tl.int64)
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles = tl.cdiv(C, BLOCK_C) * tiles_s
    moments_ptr += r * tiles
    K = tl.cast(C, tl.float32) * S
    acc = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        count = tl.minimum(C - tile // tiles_s * BLOCK_C, BLOCK_C) * tl.minimum(S - tile % tiles_s * BLOCK_S, BLOCK_S)
        acc += count * tl.load(moments_ptr + tile, mask=tile < tiles, other=0.0)
    mean = tl.sum(acc) / K
    acc = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = tile < tiles
        count = tl.minimum(C - tile // tiles_s * BLOCK_C, BLOCK_C) * tl.minimum(S - tile % tiles_s * BLOCK_S, BLOCK_S)
        apart = tl.where(mask, tl.load(moments_ptr + tile, mask=mask, other=0.0) - mean, 0.0)
        acc += count * apart
        squares += count * apart * apart
        squares += tl.load(moments_ptr + tl.cast(R, tl.int64) * tiles + tile, mask=mask, other=0.0)
    error = tl.sum(acc) / K
    variance = tl.maximum(tl.sum(squares) / K - error * error, 0.0)
    tl.store(mean_ptr + r, mean + error)
    tl.store(rstd_ptr + r, 1.0 / tl.sqrt_rn(variance + EPS))


@triton.jit
def _group_norm_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    G,
    C,
    S,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of the result; the last first, which the launch before has left in L2."""
    r, _, c, s, _ = _tile(tl.num_programs(0) - 1 - tl.program_id(0), C, S, BLOCK_C, BLOCK_S)
    mask = (c < C) & (s < S)
    offs = (r * C + c) * S + s  # (BLOCK_C, BLOCK_S)
    channel = (r % G) * C + c
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = (x - tl.load(mean_ptr + r)) * tl.load(rstd_ptr + r)
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + channel, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + channel, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    sums_ptr,
    R,
    G,
    C,
    S,
    HAS_WEIGHT: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx of BLOCK_R whole groups, and the sums over space of dy * xhat and dy. sums_ptr: (2, 1, R * C) fp32."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    r = offs_r[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, :, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    mask_c = (r < R) & (c < C)  # (BLOCK_R, BLOCK_C, 1)
    mask = mask_c & (s < S)
    offs = (r * C + c) * S + s  # (BLOCK_R, BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + r, mask=r < R, other=0.0)  # (BLOCK_R, 1, 1)
    xhat = (x - tl.load(mean_ptr + r, mask=r < R, other=0.0)) * rstd
    along = tl.sum(rounded_product(dy, xhat), axis=2, keep_dims=True)  # (BLOCK_R, BLOCK_C, 1)
    total = tl.sum(dy, axis=2, keep_dims=True)
    if STORE_SUMS:
        tl.store(sums_ptr + r * C + c, along, mask=mask_c)
        tl.store(sums_ptr + (tl.cast(R, tl.int64) + r) * C + c, total, mask=mask_c)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + (r % G) * C + c, mask=mask_c, other=0.0).to(tl.float32)
        along = along * weight
        total = rounded_product(total, weight)
        dy = rounded_product(dy, weight)
    K = tl.cast(C, tl.float32) * S
    slope = tl.sum(along, axis=1, keep_dims=True) / K  # (BLOCK_R, 1, 1)
    mean = tl.sum(total, axis=1, keep_dims=True) / K
    dx = rstd * (dy - mean - xhat * slope)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_bwd_loop_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    sums_ptr,
    R,
    G,
    C,
    S,
    HAS_WEIGHT: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx of one group per program, tile by tile, and each channel's sums as `_group_norm_sums_kernel` leaves them; the
    second pass finds x and dy in L2."""
    r = tl.program_id(0).to(tl.int64)
    tiles_s = tl.cdiv(S, BLOCK_S)
    tiles = tl.cdiv(C, BLOCK_C) * tiles_s
    x_ptr += r * C * S
    dy_ptr += r * C * S
    dx_ptr += r * C * S
    sums_ptr += r * C
    channels = tl.cast(R, tl.int64) * C
    mean = tl.load(mean_ptr + r)
    rstd = tl.load(rstd_ptr + r)
    acc_slope = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    acc_mean = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for tile in range(tiles):
        tile_s = tile % tiles_s
        c = tile // tiles_s * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        mask = (c < C) & (s < S)
        x = tl.load(x_ptr + c * S + s, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dy = tl.load(dy_ptr + c * S + s, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        along = dy * ((x - mean) * rstd)
        if STORE_SUMS:
            tl.store(sums_ptr + tile_s * channels + c, tl.sum(along, axis=1, keep_dims=True), mask=c < C)
            tl.store(sums_ptr + (tiles_s + tile_s) * channels + c, tl.sum(dy, axis=1, keep_dims=True), mask=c < C)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + (r % G) * C + c, mask=c < C, other=0.0).to(tl.float32)
            along = along * weight
            dy = dy * weight
        acc_slope += along
        acc_mean += dy
    K = tl.cast(C, tl.float32) * S
    slope = tl.sum(acc_slope) / K
    mean_h = tl.sum(acc_mean) / K
    for tile in range(tiles):
        c = tile // tiles_s * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        s = tile % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        mask = (c < C) & (s < S)
        xhat = (tl.load(x_ptr + c * S + s, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        h = tl.load(dy_ptr + c * S + s, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            h = h * tl.load(weight_ptr + (r % G) * C + c, mask=c < C, other=0.0).to(tl.float32)
        dx = rstd * (h - mean_h - xhat * slope)
        tl.store(dx_ptr + c * S + s, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, sums_ptr, R, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Each channel's sums over one tile of dy * xhat and dy. sums_ptr: (2, tiles of S, R * C) fp32."""
    r, _, c, s, tile_s = _tile(tl.program_id(0), C, S, BLOCK_C, BLOCK_S)
    mask = (c < C) & (s < S)
    offs = (r * C + c) * S + s  # (BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    xhat = (x - tl.load(mean_ptr + r)) * tl.load(rstd_ptr + r)
    channels = tl.cast(R, tl.int64) * C
    sums_ptr += tile_s * channels + r * C + c
    tl.store(sums_ptr, tl.sum(dy * xhat, axis=1, keep_dims=True), mask=c < C)
    tl.store(sums_ptr + tl.cdiv(S, BLOCK_S) * channels, tl.sum(dy, axis=1, keep_dims=True), mask=c < C)


@triton.jit
def _group_norm_slopes_kernel(
    sums_ptr, weight_ptr, slopes_ptr, R, G, C, S, TILES_S, HAS_WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr
):
    """A group's means of h * xhat and h, from its channels' sums in a fixed order. slopes_ptr: (2, R) fp32."""
    r = tl.program_id(0).to(tl.int64)
    channels = tl.cast(R, tl.int64) * C
    sums_ptr += r * C
    acc_slope = tl.zeros((BLOCK_T,), tl.float32)
    acc_mean = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, C * TILES_S, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = t < C * TILES_S
        c = t % C
        along = tl.load(sums_ptr + (t // C) * channels + c, mask=mask, other=0.0)
        total = tl.load(sums_ptr + (TILES_S + t // C) * channels + c, mask=mask, other=0.0)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + (r % G) * C + c, mask=mask, other=0.0).to(tl.float32)
            along = along * weight
            total = total * weight
        acc_slope += along
        acc_mean += total
    K = tl.cast(C, tl.float32) * S
    tl.store(slopes_ptr + r, tl.sum(acc_slope) / K)
    tl.store(slopes_ptr + R + r, tl.sum(acc_mean) / K)


@triton.jit
def _group_norm_dx_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    slopes_ptr,
    dx_ptr,
    R,
    G,
    C,
    S,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of dx; the last first, which the launch before has left in L2."""
    r, _, c, s, _ = _tile(tl.num_programs(0) - 1 - tl.program_id(0), C, S, BLOCK_C, BLOCK_S)
    mask = (c < C) & (s < S)
    offs = (r * C + c) * S + s  # (BLOCK_C, BLOCK_S)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        h = h * tl.load(weight_ptr + (r % G) * C + c, mask=c < C, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + r)
    xhat = (x - tl.load(mean_ptr + r)) * rstd
    dx = rstd * (h - tl.load(slopes_ptr + R + r) - xhat * tl.load(slopes_ptr + r))
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _whole_groups(channels: int, space: int, largest: int, per_warp: int) -> dict[str, int] | None:
    """Config of a program that holds whole groups in registers; None where one has more than `largest` elements, padded."""
    block_c, block_s = next_power_of_2(channels), next_power_of_2(space)
    if block_c * block_s > largest:
        return None
    block_r = min(max(2048 // (block_c * block_s), 1), 64)
    warps = min(max(block_r * block_c * block_s // per_warp, 4), 16)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps}


# Groups for each SM from which on one program takes a whole group, however large.
_LOOP = 2


def _tiles(channels: int, space: int, elements: int) -> dict[str, int]:
    """A tile of at most so many elements of one group, as wide in space as can be."""
    block_s = min(next_power_of_2(space), elements)
    return {"BLOCK_C": min(next_power_of_2(channels), elements // block_s), "BLOCK_S": block_s}


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    y = group_norm_fake(x, num_groups, weight, bias, eps)
    _launch_fwd(x, num_groups, weight, bias, eps, y, None, None)
    return y


def group_norm_fwd(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = group_norm_fwd_fake(x, num_groups, weight, bias, eps)
    _launch_fwd(x, num_groups, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def _launch_fwd(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
) -> None:
    x = x.contiguous()
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    has = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    R, C, S = _sizes(x, num_groups)
    whole = _whole_groups(C, S, largest=16384, per_warp=1024)
    if whole is not None:
        launch(
            _group_norm_fwd_kernel,
            (cdiv(R, whole["BLOCK_R"]),),
            x,
            weight,
            bias,
            y,
            mean,
            rstd,
            R,
            num_groups,
            C,
            S,
            EPS=eps,
            STORE_STATISTICS=rstd is not None,
            **has,
            **whole,
        )
        return
    if _LOOP * sm_count(x.device) <= R:
        tile = _tiles(C, S, elements=8192)
        store = {"STORE_STATISTICS": rstd is not None}
        sizes = (num_groups, C, S)
        launch(
            _group_norm_fwd_loop_kernel,
            (R,),
            x,
            weight,
            bias,
            y,
            mean,
            rstd,
            *sizes,
            EPS=eps,
            **store,
            **has,
            **tile,
            num_warps=8,
        )
        return
    if mean is None or rstd is None:
        mean, rstd = (x.new_empty((R,), dtype=torch.float32) for _ in range(2))
    tile = _tiles(C, S, elements=4096)
    tiles = cdiv(C, tile["BLOCK_C"]) * cdiv(S, tile["BLOCK_S"])
    moments = x.new_empty((2, R, tiles), dtype=torch.float32)
    launch(_group_norm_moments_kernel, (R * tiles,), x, moments, R, C, S, **tile)
    launch(_group_norm_combine_kernel, (R,), moments, mean, rstd, R, C, S, EPS=eps, **tile, BLOCK_T=256)
    launch(_group_norm_apply_kernel, (R * tiles,), x, weight, bias, mean, rstd, y, num_groups, C, S, **has, **tile)


def group_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """needs: whether dx, dweight, dbias are wanted; the others are empty tensors."""
    dx, dweight, dbias = group_norm_bwd_fake(dy, x, num_groups, weight, bias, mean, rstd, needs)
    dy, x = dy.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    has_weight = weight is not None
    R, C, S = _sizes(x, num_groups)
    whole = _whole_groups(C, S, largest=8192, per_warp=512) if needs[0] else None
    loop = needs[0] and _LOOP * sm_count(x.device) <= R
    tile = _tiles(C, S, elements=4096 if loop else 2048)
    tiles_s = 1 if whole is not None else cdiv(S, tile["BLOCK_S"])
    sums = x.new_empty((2, tiles_s, R * C), dtype=torch.float32)
    if whole is not None:
        launch(
            _group_norm_bwd_kernel,
            (cdiv(R, whole["BLOCK_R"]),),
            dy,
            x,
            weight,
            mean,
            rstd,
            dx,
            sums,
            R,
            num_groups,
            C,
            S,
            HAS_WEIGHT=has_weight,
            STORE_SUMS=needs[1] or needs[2],
            **whole,
        )
    elif loop:
        launch(
            _group_norm_bwd_loop_kernel,
            (R,),
            dy,
            x,
            weight,
            mean,
            rstd,
            dx,
            sums,
            R,
            num_groups,
            C,
            S,
            HAS_WEIGHT=has_weight,
            STORE_SUMS=needs[1] or needs[2],
            **tile,
            num_warps=8,
        )
    else:
        grid = (R * cdiv(C, tile["BLOCK_C"]) * tiles_s,)
        launch(_group_norm_sums_kernel, grid, dy, x, mean, rstd, sums, R, C, S, **tile)
        if needs[0]:
            slopes = x.new_empty((2, R), dtype=torch.float32)
            sizes = (R, num_groups, C, S)
            launch(
                _group_norm_slopes_kernel,
                (R,),
                sums,
                weight,
                slopes,
                *sizes,
                tiles_s,
                HAS_WEIGHT=has_weight,
                BLOCK_T=256,
            )
            launch(
                _group_norm_dx_kernel,
                grid,
                dy,
                x,
                weight,
                mean,
                rstd,
                slopes,
                dx,
                *sizes,
                HAS_WEIGHT=has_weight,
                **tile,
            )
    rows, columns = tiles_s * x.shape[0], x.shape[1]
    for i, gradient in enumerate((dweight, dbias)):
        if needs[i + 1]:
            launch(column_sum_kernel, (cdiv(columns, 16),), sums[i], gradient, rows, columns, BLOCK_G=64, BLOCK_N=16)
    return dx, dweight, dbias


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def group_norm_fake(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def group_norm_fwd_fake(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=statistics_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def group_norm_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = (norms.empty_gradient(t, x, n) for t, n in zip((x, weight, bias), needs, strict=True))
    return dx, dweight, dbias


def group_norm_check(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    if x.ndim < 2:
        bad_argument("group_norm", "x", f"of shape {tuple(x.shape)}", "two dimensions at least, (N, C, ...)")
    if num_groups < 1 or x.shape[1] % num_groups != 0:
        bad_argument("group_norm", "num_groups", num_groups, f"a divisor of the {x.shape[1]} channels")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[1:2]:
            bad_argument("group_norm", name, f"of shape {tuple(vector.shape)}", f"({x.shape[1]},), the channels of x")
    if not eps >= 0:
        bad_argument("group_norm", "eps", eps, "a number >= 0")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def group_norm_forward(
    ctx: Any,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    y, mean, rstd = torch.ops.tt.group_norm_fwd(x, num_groups, weight, bias, eps)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.num_groups = num_groups
    return y


def group_norm_backward(
    ctx: Any, dy: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs)
    dx, dweight, dbias = torch.ops.tt.group_norm_bwd(dy, x, ctx.num_groups, weight, bias, mean, rstd, needs)
    return dx if needs[0] else None, dweight if needs[1] else None, dbias if needs[2] else None


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def group_norm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    other = other_dtype(dtype)
    yield Sample("2x6x5x7_G3", (t(2, 6, 5, 7), 3, t(6), t(6)))
    yield Sample("5x12_G4", (t(5, 12), 4, t(12, dtype=other)), {"eps": 0.1})
    yield Sample("far_from_zero", (t(2, 4, 40) + 1000 * t(2, 4, 1), 4, None, t(4, dtype=other)))
    yield Sample("1x4x1_G2", (t(1, 4, 1), 2))
    yield Sample("empty", (t(0, 4, 3), 2, t(4), t(4)))
    yield Sample("long_channels", (t(2, 3, 5000) + 10, 1, t(3), t(3)))
    yield Sample("many_groups", (t(2, 4, 16400), 4, t(4), t(4)))
    yield Sample("many_channels", (t(1, 600, 17), 1, t(600), t(600)))


def group_norm_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    # groups enough for a program each
    x, weight, bias = (torch.randn(*s, device=device, dtype=dtype) for s in ((9, 192, 3000), (192,), (192,)))
    yield Sample("288_groups", (x + 5, 32, weight, bias))


def group_norm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(2, 6, 5, device=device)
    yield ErrorSample("one_dim", (x[0, 0], 1), match=r"group_norm.*'x'.*\(5,\).*two dimensions")
    yield ErrorSample("num_groups", (x, 4), match="group_norm.*'num_groups' is 4.*divisor of the 6 channels")
    yield ErrorSample("no_groups", (x, 0), match="group_norm.*'num_groups' is 0.*divisor of the 6 channels")
    yield ErrorSample("weight_shape", (x, 2, x[0, 0]), match=r"group_norm.*'weight'.*\(5,\).*\(6,\)")
    yield ErrorSample("bias_shape", (x, 2, None, x[0]), match=r"group_norm.*'bias'.*\(6, 5\).*\(6,\)")
    yield ErrorSample("negative_eps", (x, 2), {"eps": -1e-5}, match="group_norm.*'eps' is -1e-05.*>= 0")


def group_norm_bench_cases() -> Iterator[BenchCase]:
    def make(
        shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, weight, bias = (torch.randn(*s, device=device, dtype=dtype) for s in (shape, shape[1:2], shape[1:2]))
        return (x, 32, weight, bias), {}

    # the U-Net's and the autoencoder's layers of a latent diffusion model
    for shape in [(64, 1280, 16, 16), (16, 320, 64, 64), (4, 128, 512, 512)]:
        yield BenchCase("x".join(map(str, shape)), lambda d, t, shape=shape: make(shape, d, t))


def group_norm_cost(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Cost:
    size = x.numel() * x.element_size()
    weights, biases = (0 if v is None else v.numel() * v.element_size() for v in (weight, bias))
    return Cost(
        flops=7 * x.numel(),
        bytes=2 * size + weights + biases,
        backward_flops=11 * x.numel(),
        backward_bytes=3 * size + 2 * weights + biases,
    )
