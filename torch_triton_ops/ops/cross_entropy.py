"""Cross entropy of logits against class indices, with everything a language model's loss wants.

z      = softcap * tanh(logits / softcap), or logits when softcap is 0
lse    = log sum_c exp(z[c])
row    = (1 - s) * weight[t] * (lse - z[t])  +  s / V * sum_c weight[c] * (lse - z[c])  +  z_loss * lse ** 2

for each row with target t, s being `label_smoothing` and weight 1 everywhere when not given. A row whose target is
`ignore_index` counts 0. Then "none" gives the rows, "sum" their sum, and "mean" their sum divided by the sum of
weight[t] over the rows not ignored (their number, without weight): NaN when there is none, as in torch. So the z-loss
term is not scaled by the row's class weight, and is divided by the same divisor as the rest.

With p = exp(z - lse) and g the gradient that reaches `row`:

dz[c]   = g * (p[c] * ((1 - s) * weight[t] + s / V * sum(weight) + 2 * z_loss * lse)
               - (1 - s) * weight[t] * [c == t] - s / V * weight[c])
dlogits = dz * (1 - (z / softcap) ** 2), the last factor with a softcap only

| tensor | shape | dtype |
|---|---|---|
| logits | (..., V), any strides; the classes are the last dimension, also beyond two | float32, float16, bfloat16 |
| target | (...), that of logits without V | int64, int32 |
| weight | (V,) or None, no gradient | float32, float16, bfloat16 |
| loss | () or, with "none", that of target | that of logits |
| lse (saved) | (2, rows): max(z) and log sum exp(z - max(z)), whose sum is lse; 0 for a row ignored | float32 |
| divisor (saved) | (1,) with "mean", else (0,) | float32 |

A target outside [0, V) that is not `ignore_index` raises IndexError on CPU. On CUDA, where looking would mean waiting,
it makes the loss and the gradient of its row NaN, and nothing is read or written out of bounds. Other wrong arguments
raise ValueError, a target of another dtype TypeError.

Arithmetic and the sum over rows are in fp32, in a fixed order, without atomics. Logits are never modified; memory is
logits and one gradient. Bytes: V * itemsize per row forward (one read, with a running maximum and sum,
https://arxiv.org/abs/1805.02867) and twice that backward (one read, one write). Ignored rows are not read at all.

Source: torch.nn.functional.cross_entropy; label smoothing https://arxiv.org/abs/1512.00567, z-loss
https://arxiv.org/abs/2204.02311, softcap https://arxiv.org/abs/2408.00118
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
from torch_triton_ops.launch import INTERPRET, cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _arithmetic_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def cross_entropy_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    return cross_entropy_fwd_reference(
        logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction
    )[0]


def cross_entropy_fwd_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, V = _arithmetic_dtype(logits), logits.shape[-1]
    z = logits.to(dtype).reshape(-1, V)
    t = target.long().reshape(-1)
    ignored = t == ignore_index
    wrong = t[~ignored & ((t < 0) | (t >= V))]
    if wrong.numel():
        allowed = f"0 to {V - 1}, or ignore_index={ignore_index}"
        bad_argument("cross_entropy", "target", wrong[0].item(), allowed, IndexError)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    w = None if weight is None else weight.to(dtype)
    z_max = z.amax(-1)
    z_max = torch.where(z_max == float("-inf"), 0.0, z_max)
    log_sum = torch.exp(z - z_max[:, None]).sum(-1).log()
    lse = torch.stack([z_max, log_sum]).masked_fill(ignored, 0.0)
    rows = torch.nn.functional.cross_entropy(
        z, t, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    if z_loss:
        rows = rows + z_loss * lse.sum(0).square()
    divisor = z.new_empty(0)
    if reduction == "none":
        loss = rows.reshape(target.shape)
    else:
        loss = rows.sum()
    if reduction == "mean":
        counts = torch.ones_like(rows) if w is None else w[t.masked_fill(ignored, 0)]
        divisor = counts.masked_fill(ignored, 0.0).sum().reshape(1)
        loss = loss / divisor[0]
    return loss.to(logits.dtype).contiguous(), lse, divisor


def cross_entropy_bwd_reference(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> torch.Tensor:
    dtype, V = _arithmetic_dtype(logits), logits.shape[-1]
    z = logits.to(dtype).reshape(-1, V)
    t = target.long().reshape(-1)
    ignored = t == ignore_index
    t = t.masked_fill(ignored, 0)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    w = z.new_ones(V) if weight is None else weight.to(dtype)
    g = dloss.to(dtype).reshape(-1).expand(t.shape)
    if reduction == "mean":
        g = g / divisor
    hard = (1 - label_smoothing) * w[t]
    soft = label_smoothing / V
    p = torch.exp((z - lse[0][:, None]) - lse[1][:, None])
    dz = p * (hard + soft * w.sum() + 2 * z_loss * lse.sum(0))[:, None] - soft * w
    dz.scatter_add_(1, t[:, None], -hard[:, None])
    dz = dz * g[:, None]
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    return dz.masked_fill(ignored[:, None], 0.0).to(logits.dtype).reshape(logits.shape)


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(u):
    # 1 - 2 / (exp(2u) + 1) is right in absolute terms everywhere, in relative terms away from 0: Taylor there
    u2 = u * u
    near = u * (1.0 + u2 * (-1.0 / 3.0 + u2 * (2.0 / 15.0 + u2 * (-17.0 / 315.0 + u2 * (62.0 / 2835.0)))))
    return tl.where(u2 < 0.09, near, 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))


@triton.jit
def _target_rows(target_ptr, weight_ptr, offs_m, mask_m, V, ignore_index, HAS_WEIGHT: tl.constexpr):
    """Of rows, or of one: class (-1 when out of range), whether it counts, its weight (NaN when out of range)."""
    target = tl.load(target_ptr + offs_m, mask=mask_m, other=0)
    active = mask_m & (target != ignore_index)
    in_range = (target >= 0) & (target < V)
    # one instruction per compare with a column instead of two
    label = tl.where(in_range, target, -1).to(tl.int32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + label, mask=active & in_range, other=float("nan")).to(tl.float32)
    else:
        weight = tl.where(in_range, 1.0, float("nan"))
    return label, active, weight


@triton.jit
def _row_loss(
    z_target, row_max, log_sum, weighted_z, weight, weight_sum, V, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr
):
    """The formula of the module's docstring; weighted_z = sum_c weight[c] * z[c], weight_sum = sum_c weight[c]."""
    lse = row_max + log_sum
    # not lse - z_target: for logits far from 0 the first difference is exact, the rounding of lse is not
    loss = weight * ((row_max - z_target) + log_sum)
    if SMOOTHING != 0.0:
        loss = (1.0 - SMOOTHING) * loss + SMOOTHING / V * (weight_sum * lse - weighted_z)
    if Z_LOSS != 0.0:
        loss += Z_LOSS * lse * lse
    return loss


@triton.jit
def _online_step(
    m,
    s,
    weighted_z,
    logits_ptr,
    weight_ptr,
    offs_v,
    V,
    HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the tile offs_v (R, L) of a row to the running maximum, sum of exponentials and weighted sum, each (L,)."""
    mask = offs_v < V
    if MASKED:
        z = tl.load(logits_ptr + offs_v, mask=mask, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(logits_ptr + offs_v).to(tl.float32)
    if SOFTCAP != 0.0:
        z = SOFTCAP * _tanh(z * (1.0 / SOFTCAP))
        if MASKED:
            z = tl.where(mask, z, float("-inf"))
    if SMOOTHING != 0.0:
        weighted = z
        if HAS_WEIGHT:
            weighted = z * tl.load(weight_ptr + offs_v, mask=mask, other=0.0, eviction_policy="evict_last").to(
                tl.float32
            )
        if MASKED:
            weighted = tl.where(mask, weighted, 0.0)
        weighted_z += tl.sum(weighted, axis=0)
    m_new = tl.maximum(m, tl.max(z, axis=0))
    # while all is -inf, subtract 0: -inf - -inf would be NaN
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    s = s * tl.exp(m - shift) + tl.sum(tl.exp(z - shift[None, :]), axis=0)
    return m_new, s, weighted_z


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    count_ptr,
    lse_ptr,
    V,
    stride_lm,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """One row per program, read once.

    A tile is R * L consecutive logits. With L = 256 * num_warps half-precision logits each thread holds columns of the
    (R, L) tile, so the loop reduces without a word between threads, which meet once, after it.
    """
    pid_m = tl.program_id(0)
    row = pid_m.to(tl.int64)
    label, active, weight = _target_rows(target_ptr, weight_ptr, row, pid_m >= 0, V, ignore_index, HAS_WEIGHT)
    logits_ptr += row * stride_lm
    offs = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]  # (R, L)
    m = tl.full((L,), float("-inf"), tl.float32)
    s = tl.zeros((L,), tl.float32)
    weighted_z = tl.zeros((L,), tl.float32)
    end = tl.where(active, V, 0)  # a row ignored is not read
    whole = end // (R * L) * (R * L)
    for start in range(0, whole, R * L):
        m, s, weighted_z = _online_step(
            m, s, weighted_z, logits_ptr, weight_ptr, start + offs, end, HAS_WEIGHT, SMOOTHING, SOFTCAP, False
        )
    if not EVEN_V:
        m, s, weighted_z = _online_step(
            m, s, weighted_z, logits_ptr, weight_ptr, whole + offs, end, HAS_WEIGHT, SMOOTHING, SOFTCAP, True
        )
    row_max = tl.max(m, axis=0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    log_sum = tl.log(tl.sum(s * tl.exp(m - row_max), axis=0))
    z_target = tl.load(logits_ptr + label, mask=active & (label >= 0), other=0.0).to(tl.float32)
    if SOFTCAP != 0.0:
        z_target = SOFTCAP * _tanh(z_target * (1.0 / SOFTCAP))
    if HAS_WEIGHT and SMOOTHING != 0.0:
        weight_sum = tl.load(weight_sum_ptr)
    else:
        weight_sum = V
    loss = _row_loss(z_target, row_max, log_sum, tl.sum(weighted_z, axis=0), weight, weight_sum, V, SMOOTHING, Z_LOSS)
    tl.store(loss_ptr + row, tl.where(active, loss, 0.0).to(loss_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, tl.where(active, row_max, 0.0))
    tl.store(lse_ptr + tl.num_programs(0) + row, tl.where(active, log_sum, 0.0))
    if HAS_COUNT:
        tl.store(count_ptr + row, tl.where(active, weight, 0.0))


@triton.jit
def _cross_entropy_fwd_short_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    count_ptr,
    lse_ptr,
    M,
    V,
    stride_lm,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_M rows of a small vocabulary per program. With REDUCE it stores their sum, else each."""
    pid_m = tl.program_id(0)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    label, active, weight = _target_rows(target_ptr, weight_ptr, offs_m, offs_m < M, V, ignore_index, HAS_WEIGHT)
    mask = active[:, None] & (offs_v[None, :] < V)
    z = tl.load(logits_ptr + offs_m[:, None] * stride_lm + offs_v[None, :], mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP != 0.0:
        z = SOFTCAP * _tanh(z * (1.0 / SOFTCAP))  # (BLOCK_M, BLOCK_V)
    weighted_z = tl.zeros((BLOCK_M,), tl.float32)
    weight_sum = V
    if SMOOTHING != 0.0:
        weighted = z
        if HAS_WEIGHT:
            weighted = z * tl.load(weight_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
            weight_sum = tl.load(weight_sum_ptr)
        weighted_z = tl.sum(tl.where(mask, weighted, 0.0), axis=1)
    z_target = tl.sum(tl.where(offs_v[None, :] == label[:, None], z, 0.0), axis=1)
    z = tl.where(mask, z, float("-inf"))
    row_max = tl.max(z, axis=1)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    log_sum = tl.log(tl.sum(tl.exp(z - row_max[:, None]), axis=1))
    loss = _row_loss(z_target, row_max, log_sum, weighted_z, weight, weight_sum, V, SMOOTHING, Z_LOSS)
    loss = tl.where(active, loss, 0.0)
    tl.store(lse_ptr + offs_m, tl.where(active, row_max, 0.0), mask=offs_m < M)
    tl.store(lse_ptr + M + offs_m, tl.where(active, log_sum, 0.0), mask=offs_m < M)
    if REDUCE:
        tl.store(loss_ptr + pid_m, tl.sum(loss, axis=0))
        if HAS_COUNT:
            tl.store(count_ptr + pid_m, tl.sum(tl.where(active, weight, 0.0), axis=0))
    else:
        tl.store(loss_ptr + offs_m, loss.to(loss_ptr.dtype.element_ty), mask=offs_m < M)


@triton.jit
def _cross_entropy_reduce_kernel(
    partial_ptr, count_ptr, loss_ptr, divisor_ptr, P, HAS_COUNT: tl.constexpr, BLOCK_P: tl.constexpr
):
    """One program adds the P partial sums, and divides by the sum of the counts: a fixed order."""
    offs_p = tl.arange(0, BLOCK_P)
    loss = tl.zeros((BLOCK_P,), tl.float32)
    count = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, P, BLOCK_P):
        mask_p = start + offs_p < P
        loss += tl.load(partial_ptr + start + offs_p, mask=mask_p, other=0.0)
        if HAS_COUNT:
            count += tl.load(count_ptr + start + offs_p, mask=mask_p, other=0.0)
    total = tl.sum(loss, axis=0)
    if HAS_COUNT:
        divisor = tl.sum(count, axis=0)
        tl.store(divisor_ptr, divisor)
        total = total / divisor
    tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr,
    logits_ptr,
    target_ptr,
    lse_ptr,
    divisor_ptr,
    weight_ptr,
    weight_sum_ptr,
    dlogits_ptr,
    M,
    V,
    stride_lm,
    stride_dlossm,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One tile of the gradient per program, last rows first: they are what the forward left in the L2 cache."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles_v = tl.cdiv(V, BLOCK_V)
    offs_m = (pid // tiles_v).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_v = (pid % tiles_v) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    mask_m = offs_m < M
    mask_v = offs_v < V
    label, active, weight = _target_rows(target_ptr, weight_ptr, offs_m, mask_m, V, ignore_index, HAS_WEIGHT)
    z = tl.load(
        logits_ptr + offs_m[:, None] * stride_lm + offs_v[None, :],
        mask=active[:, None] & mask_v[None, :],
        other=0.0,
    ).to(tl.float32)  # (BLOCK_M, BLOCK_V)
    row_max = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
    log_sum = tl.load(lse_ptr + M + offs_m, mask=mask_m, other=0.0)
    g = tl.load(dloss_ptr + offs_m * stride_dlossm, mask=mask_m, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        g = g / tl.load(divisor_ptr)
    hard = weight
    soft = SMOOTHING / V
    factor = weight
    if SMOOTHING != 0.0:
        hard = (1.0 - SMOOTHING) * weight
        if HAS_WEIGHT:
            factor = hard + soft * tl.load(weight_sum_ptr)
        else:
            factor = hard + SMOOTHING
    if Z_LOSS != 0.0:
        factor += 2.0 * Z_LOSS * (row_max + log_sum)
    if SOFTCAP != 0.0:
        t = _tanh(z * (1.0 / SOFTCAP))
        z = SOFTCAP * t
    # the first difference is exact near the maximum, where p is large; the rounding of lse would cost digits
    dz = tl.exp((z - row_max[:, None]) - log_sum[:, None]) * factor[:, None]
    dz -= tl.where(offs_v[None, :] == label[:, None], hard[:, None], 0.0)
    if SMOOTHING != 0.0:
        if HAS_WEIGHT:
            weights = tl.load(weight_ptr + offs_v, mask=mask_v, other=0.0, eviction_policy="evict_last")
            dz -= soft * weights.to(tl.float32)[None, :]
        else:
            dz -= soft
    dz *= g[:, None]
    if SOFTCAP != 0.0:
        dz *= 1.0 - t * t
    dz = tl.where(active[:, None], dz, 0.0)
    tl.store(
        dlogits_ptr + offs_m[:, None] * V + offs_v[None, :],
        dz.to(dlogits_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_v[None, :],
    )


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits as (rows, V) with unit stride along V: a view where the strides allow it."""
    logits = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _block_m(V: int) -> int:
    """Rows per program: one, or of a small vocabulary as many as make 2048 logits."""
    return min(2048 // next_power_of_2(V), 256) if V <= 1024 else 1


def _weights(weight: torch.Tensor | None, label_smoothing: float) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The class weights and, where label smoothing asks for it, their sum."""
    if weight is None:
        return None, None
    return weight.contiguous(), weight.sum(dtype=torch.float32) if label_smoothing else None


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    # what is kept for a gradient comes for nothing: 8 bytes a row
    return cross_entropy_fwd(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction)[0]


def cross_entropy_fake(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    return logits.new_empty(target.shape if reduction == "none" else ())


def cross_entropy_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, lse, divisor = cross_entropy_fwd_fake(
        logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction
    )
    logits, target = _rows(logits), target.reshape(-1).contiguous()
    M, V = logits.shape
    weight, weight_sum = _weights(weight, label_smoothing)
    options: dict[str, Any] = {
        "HAS_WEIGHT": weight is not None,
        "HAS_COUNT": reduction == "mean",
        "SMOOTHING": label_smoothing,
        "Z_LOSS": z_loss,
        "SOFTCAP": softcap,
    }
    BLOCK_M = _block_m(V)
    programs = cdiv(M, BLOCK_M)
    if reduction == "none":
        partial, count = loss, None
    else:
        partial = lse.new_empty(programs)
        count = lse.new_empty(programs) if reduction == "mean" else None
    inputs = (logits, target, weight, weight_sum, partial, count, lse)
    if V <= 1024:
        options |= {"REDUCE": reduction != "none", "BLOCK_M": BLOCK_M, "BLOCK_V": next_power_of_2(V), "num_warps": 4}
        launch(_cross_entropy_fwd_short_kernel, (programs,), *inputs, M, V, logits.stride(0), ignore_index, **options)
    else:
        # 4 warps and a tile of 4096 logits: four 16-byte loads in flight per thread, several programs per multiprocessor.
        # Rows that allow no 16-byte loads need an address for each logit: more threads, lest registers spill.
        options |= {"R": 4, "L": 1024, "EVEN_V": bool(V % 4096 == 0), "num_warps": 4 if V % 8 == 0 else 8}
        launch(_cross_entropy_fwd_kernel, (programs,), *inputs, V, logits.stride(0), ignore_index, **options)
    if reduction != "none":
        launch(
            _cross_entropy_reduce_kernel,
            (1,),
            partial,
            count,
            loss,
            divisor,
            programs,
            HAS_COUNT=reduction == "mean",
            BLOCK_P=4096,
            num_warps=16,
        )
    return loss, lse, divisor


def cross_entropy_fwd_fake(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _arithmetic_dtype(logits)
    loss = logits.new_empty(target.shape if reduction == "none" else ())
    lse = logits.new_empty((2, target.numel()), dtype=dtype)
    return loss, lse, logits.new_empty(1 if reduction == "mean" else 0, dtype=dtype)


def cross_entropy_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> torch.Tensor:
    dlogits = cross_entropy_bwd_fake(
        dloss, logits, target, lse, divisor, weight, ignore_index, label_smoothing, z_loss, softcap, reduction
    )
    logits, target, dloss = _rows(logits), target.reshape(-1).contiguous(), dloss.reshape(-1)
    M, V = logits.shape
    weight, weight_sum = _weights(weight, label_smoothing)
    BLOCK_V = min(4096, next_power_of_2(V))
    BLOCK_M = _block_m(V)
    launch(
        _cross_entropy_bwd_kernel,
        (cdiv(M, BLOCK_M) * cdiv(V, BLOCK_V),),
        dloss,
        logits,
        target,
        lse,
        divisor,
        weight,
        weight_sum,
        dlogits,
        M,
        V,
        logits.stride(0),
        dloss.stride(0) if reduction == "none" else 0,
        ignore_index,
        HAS_WEIGHT=weight is not None,
        HAS_DIVISOR=reduction == "mean",
        SMOOTHING=label_smoothing,
        Z_LOSS=z_loss,
        SOFTCAP=softcap,
        BLOCK_M=BLOCK_M,
        BLOCK_V=BLOCK_V,
        num_warps=4,
    )
    return dlogits


def cross_entropy_bwd_fake(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def cross_entropy_check(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> None:
        bad_argument("cross_entropy", argument, given, allowed, error)

    if logits.dim() == 0 or logits.shape[-1] == 0:
        bad("logits", f"of shape {tuple(logits.shape)}", "(..., V) with at least one class")
    if target.dtype not in (torch.int64, torch.int32):
        bad("target", f"of dtype {target.dtype}", "int64 or int32 class indices", TypeError)
    if target.shape != logits.shape[:-1]:
        bad(
            "target",
            f"of shape {tuple(target.shape)}",
            f"{tuple(logits.shape[:-1])}, logits' shape {tuple(logits.shape)} without the classes, which come last",
        )
    if weight is not None and weight.shape != logits.shape[-1:]:
        bad("weight", f"of shape {tuple(weight.shape)}", f"({logits.shape[-1]},), one for each class")
    if not 0.0 <= label_smoothing <= 1.0:
        bad("label_smoothing", label_smoothing, "a number from 0 to 1")
    if not z_loss >= 0.0:
        bad("z_loss", z_loss, "a number >= 0")
    if not softcap >= 0.0:
        bad("softcap", softcap, "a number >= 0; 0 is off")
    if reduction not in ("none", "mean", "sum"):
        bad("reduction", repr(reduction), "'none', 'mean' or 'sum'")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def cross_entropy_forward(
    ctx: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> torch.Tensor:
    options = ignore_index, label_smoothing, z_loss, softcap, reduction
    loss, lse, divisor = torch.ops.tt.cross_entropy_fwd(logits, target, weight, *options)
    ctx.save_for_backward(logits, target, lse, divisor, weight)
    ctx.options = options
    return loss


def cross_entropy_backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.ops.tt.cross_entropy_bwd(dloss, *ctx.saved_tensors, *ctx.options),)


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def cross_entropy_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *shape: int, scale: float = 2.0, index: torch.dtype = torch.int64, **kwargs: Any) -> Sample:
        logits = scale * torch.randn(shape, device=device, dtype=dtype)
        target = torch.randint(0, shape[-1], shape[:-1], device=device).to(index)
        slow = kwargs.pop("slow", False)
        ignored = kwargs.pop("ignored", 0)
        if ignored:
            target.view(-1)[::ignored] = kwargs.get("ignore_index", -100)
        return Sample(name, (logits, target), kwargs, slow_in_interpreter=slow)

    def weight(V: int) -> torch.Tensor:
        return torch.rand(V, device=device, dtype=dtype) + 0.5

    for shape in [(1, 1), (5, 33), (7, 1024), (3, 1025), (2, 4096), (3, 4099), (2, 3, 17), (0, 5), (2, 0, 9), (6,)]:
        yield sample("x".join(map(str, shape)), *shape)
    for reduction in ("none", "sum", "mean"):
        for V in (37, 1500):
            options: dict[str, Any] = {"reduction": reduction, "ignored": 3}
            yield sample(f"{reduction}_V{V}", 7, V, **options)
            yield sample(f"{reduction}_V{V}_weight", 7, V, weight=weight(V), **options)
            yield sample(f"{reduction}_V{V}_smoothing", 7, V, label_smoothing=0.1, **options)
            yield sample(f"{reduction}_V{V}_z_loss", 7, V, z_loss=1e-2, **options)
            yield sample(f"{reduction}_V{V}_softcap", 7, V, softcap=5.0, **options)
            options |= {"weight": weight(V), "label_smoothing": 0.3, "z_loss": 1e-3, "softcap": 30.0}
            yield sample(f"{reduction}_V{V}_all_options", 7, V, ignore_index=2, **options)
    yield sample("empty_sum", 0, 5, reduction="sum")
    yield sample("empty_none", 0, 5, reduction="none")
    if dtype != torch.float64:  # NaN, which no finite difference can check
        yield sample("all_ignored_mean", 3, 40, ignored=1)
    yield sample("all_ignored_sum", 3, 2000, ignored=1, reduction="sum")
    yield sample("int32_target", 6, 50, index=torch.int32, ignored=2)
    yield sample("smoothing_1", 3, 20, label_smoothing=1.0)
    yield sample("large_logits", 4, 1300, scale=300.0)
    yield sample("5000_rows", 5000, 3, ignored=5)
    yield sample("V262144", 2, 262144, slow=True)
    logits = torch.randn(4, 3000, device=device, dtype=dtype)
    target = torch.tensor([5, 0, 2999, 7], device=device)
    yield Sample("transposed", (torch.randn(90, 4, device=device, dtype=dtype).t(), target % 90))
    yield Sample("sliced_unaligned", (logits[:, 3:1203], target % 1200))
    yield Sample("expanded", (logits[:1].expand(4, -1), target))
    yield Sample("strided_target", (logits[:, :70], torch.arange(8, device=device)[::2]))
    masked = logits.clone()
    masked[:, 8:2990] = float("-inf")
    yield Sample("masked", (masked, target), {"reduction": "none"})


def cross_entropy_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    logits = torch.randn(4, 5, device=device)
    target = torch.tensor([0, 1, 2, 4], device=device)

    def error(
        id: str, match: str, *args: torch.Tensor, error: type[Exception] = ValueError, **kwargs: Any
    ) -> ErrorSample:
        return ErrorSample(id, args or (logits, target), kwargs, error, f"cross_entropy.*{match}")

    yield error("no_classes", r"'logits'.*\(4, 0\)", logits[:, :0], target)
    yield error("float_target", "'target'.*float32.*int64", logits, target.float(), error=TypeError)
    yield error("target_shape", r"'target'.*\(3,\).*\(4,\)", logits, target[:3])
    yield error("weight_shape", r"'weight'.*\(4,\).*\(5,\)", weight=logits[0, :4])
    yield error("label_smoothing", "'label_smoothing' is 1.5", label_smoothing=1.5)
    yield error("z_loss", "'z_loss' is -1.0", z_loss=-1.0)
    yield error("softcap", "'softcap' is -2.0", softcap=-2.0)
    yield error("reduction", "'reduction' is 'avg'.*'mean'", reduction="avg")
    if logits.device.type == "cpu" and not INTERPRET:
        yield error("out_of_range", "'target' is 5.*0 to 4.*-100", logits, target + 1, error=IndexError)


def cross_entropy_bench_cases() -> Iterator[BenchCase]:
    def make(v: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        logits = torch.randn(8192, v, device=device, dtype=dtype)
        return (logits, torch.randint(0, v, (8192,), device=device)), {}

    for v in (32000, 128256):
        yield BenchCase(f"8192x{v}", lambda d, t, v=v: make(v, d, t))


def cross_entropy_cost(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Cost:
    numel, size = logits.numel(), logits.element_size()
    # maximum, subtract, exp, add; backward: subtract, exp, multiply, add, multiply
    return Cost(flops=4 * numel, bytes=numel * size, backward_flops=5 * numel, backward_bytes=2 * numel * size)
