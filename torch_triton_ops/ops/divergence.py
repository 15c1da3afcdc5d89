"""Kullback-Leibler and Jensen-Shannon divergence of two distributions that are given by their logits.

p = softmax(logits / temperature), q = softmax(target_logits / temperature), over the last dimension;  T = temperature

kl_div:  row = sum_c q[c] * (log q[c] - log p[c])                                   KL(q || p): what p lacks of q
         dlogits = g / T * (p - q),   dtarget_logits = g / T * q * (log q - log p - row)

js_div:  m = beta * q + (1 - beta) * p
         row = beta * KL(q || m) + (1 - beta) * KL(p || m)
         dlogits = g / T * (1 - beta) * p * (log p - log m - KL(p || m))
         dtarget_logits = g / T * beta * q * (log q - log m - KL(q || m))

g being the gradient that reaches the row. A class whose probability is 0 adds 0, also where both are. "none" gives the rows,
"sum" their sum, "mean" their sum divided by their number (torch's "batchmean"). Swap the arguments of kl_div for KL(p || q).
There is no factor T ** 2: distillation multiplies by it to keep the gradient's scale.

| tensor | shape | dtype |
|---|---|---|
| logits, target_logits | (..., V), the same; any strides | float32, float16, bfloat16 |
| loss | () or, with "none", (...) | that of logits |
| stats (saved) | (5 or 6, rows): max z and log sum exp(z - max z) of both; then what the gradients subtract | float32 |

temperature: above 0. beta: above 0 and below 1 (kl_div is the limit of js_div / beta at 0). Raises ValueError for other
numbers, shapes and reductions.

Arithmetic in fp32; V to 2**18 and more. Bytes: kl_div reads each row of both once, keeping running maxima, sums, and the sum
of exp(z_q - max) * (z_q - z_p); js_div, whose logarithm of a sum has no running form, twice, the second time from the L2 cache
if the rows fit. Backward: one read of both and a write for each gradient asked for.

Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; js_div:
Agarwal et al., On-Policy Distillation of Language Models, https://arxiv.org/abs/2306.13649, equation 1, q being the teacher
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
from torch_triton_ops.launch import cdiv, launch, next_power_of_2
from torch_triton_ops.losses import REDUCTIONS, arithmetic_dtype, sum_partials

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits.to(arithmetic_dtype(logits)) / temperature).log_softmax(-1)


def _expectation(log_q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Sum of q * log_ratio, where q is not 0."""
    some = log_q > float("-inf")
    return torch.where(some, log_q.exp() * torch.where(some, log_ratio, 0.0), 0.0).sum(-1)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    m = beta * log_q.exp() + (1 - beta) * log_p.exp()
    return torch.log(torch.where(m > 0, m, 1.0))


def _reduced(rows: torch.Tensor, dtype: torch.dtype, reduction: str) -> torch.Tensor:
    loss = rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
    return loss.to(dtype).contiguous()


def _stats(logits: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    z = logits.detach().to(arithmetic_dtype(logits)).reshape(-1, logits.shape[-1]) / temperature
    top = z.amax(-1)
    top = torch.where(top == float("-inf"), 0.0, top)
    return [top, (z - top[:, None]).exp().sum(-1).log()]


def kl_div_reference(
    logits: torch.Tensor, target_logits: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> torch.Tensor:
    log_p, log_q = _log_softmax(logits, temperature), _log_softmax(target_logits, temperature)
    return _reduced(_expectation(log_q, log_q - log_p), logits.dtype, reduction)


def kl_div_fwd_reference(
    logits: torch.Tensor, target_logits: torch.Tensor, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p, log_q = _log_softmax(logits, temperature), _log_softmax(target_logits, temperature)
    rows = _expectation(log_q, log_q - log_p)
    saved = [*_stats(logits, temperature), *_stats(target_logits, temperature), rows.reshape(-1)]
    return _reduced(rows, logits.dtype, reduction), torch.stack(saved)


def js_div_reference(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    log_p, log_q = _log_softmax(logits, temperature), _log_softmax(target_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    rows = beta * _expectation(log_q, log_q - log_m) + (1 - beta) * _expectation(log_p, log_p - log_m)
    return _reduced(rows, logits.dtype, reduction)


def js_div_fwd_reference(
    logits: torch.Tensor, target_logits: torch.Tensor, beta: float, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p, log_q = _log_softmax(logits, temperature), _log_softmax(target_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    kl_q, kl_p = _expectation(log_q, log_q - log_m), _expectation(log_p, log_p - log_m)
    saved = [*_stats(logits, temperature), *_stats(target_logits, temperature), kl_q.reshape(-1), kl_p.reshape(-1)]
    return _reduced(beta * kl_q + (1 - beta) * kl_p, logits.dtype, reduction), torch.stack(saved)


def _upstream(dloss: torch.Tensor, logits: torch.Tensor, temperature: float, reduction: str) -> torch.Tensor:
    """The gradient that reaches each row's z, (rows, 1)."""
    rows = math.prod(logits.shape[:-1])
    g = dloss.to(arithmetic_dtype(logits)).reshape(-1, 1).expand(rows, 1) / temperature
    return g / rows if reduction == "mean" else g


def _saved_logs(
    logits: torch.Tensor, target_logits: torch.Tensor, stats: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for i, t in enumerate((logits, target_logits)):
        z = t.to(arithmetic_dtype(t)).reshape(-1, t.shape[-1]) / temperature
        found.append((z - stats[2 * i][:, None]) - stats[2 * i + 1][:, None])
    return found[0], found[1]


def _gradients(
    logits: torch.Tensor, target_logits: torch.Tensor, by_p: torch.Tensor, by_q: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    dlogits = by_p.to(logits.dtype).reshape(logits.shape).contiguous() if needs[0] else logits.new_empty(0)
    dtarget = (
        by_q.to(target_logits.dtype).reshape(logits.shape).contiguous() if needs[1] else target_logits.new_empty(0)
    )
    return dlogits, dtarget


def kl_div_bwd_reference(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    g = _upstream(dloss, logits, temperature, reduction)
    log_p, log_q = _saved_logs(logits, target_logits, stats, temperature)
    q = log_q.exp()
    by_q = torch.where(q > 0, q * (log_q - log_p - stats[4][:, None]), 0.0)
    return _gradients(logits, target_logits, g * (log_p.exp() - q), g * by_q, needs)


def js_div_bwd_reference(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    beta: float,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    g = _upstream(dloss, logits, temperature, reduction)
    log_p, log_q = _saved_logs(logits, target_logits, stats, temperature)
    log_m, p, q = _log_mixture(log_p, log_q, beta), log_p.exp(), log_q.exp()
    by_p = (1 - beta) * torch.where(p > 0, p * (log_p - log_m - stats[5][:, None]), 0.0)
    by_q = beta * torch.where(q > 0, q * (log_q - log_m - stats[4][:, None]), 0.0)
    return _gradients(logits, target_logits, g * by_p, g * by_q, needs)


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tile(ptr, offs, V, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """z of a tile in fp32, -inf beyond the row."""
    if MASKED:
        z = tl.load(ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(ptr + offs).to(tl.float32)
    if SCALE != 1.0:
        z = z * SCALE
    return z


@triton.jit
def _raise_max(m, z):
    """The running maximum with a tile, what to subtract (0 while all is -inf), and the factor of what was summed before."""
    m_new = tl.maximum(m, tl.max(z, axis=0))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, shift, tl.exp(m - shift)


@triton.jit
def _divergence_step(
    m_p, s_p, m_q, s_q, w, p_ptr, q_ptr, offs, V, SCALE: tl.constexpr, KL: tl.constexpr, MASKED: tl.constexpr
):
    """Add a tile (R, L) of both rows to the running maxima and sums of exponentials, each (L,), and to
    w = sum of exp(z_q - m_q) * ((z_q - m_q) - (z_p - m_p)). Relative to the maxima, nothing large cancels in the end."""
    z_p = _load_tile(p_ptr, offs, V, SCALE, MASKED)
    z_q = _load_tile(q_ptr, offs, V, SCALE, MASKED)
    old_p, old_q = m_p, m_q
    m_p, shift_p, factor_p = _raise_max(m_p, z_p)
    s_p = s_p * factor_p + tl.sum(tl.exp(z_p - shift_p[None, :]), axis=0)
    m_q, shift_q, factor = _raise_max(m_q, z_q)
    e = tl.exp(z_q - shift_q[None, :])
    if KL:
        w = _moved(w, s_q, (shift_p - old_p) - (shift_q - old_q), factor)
        # -inf - -inf where q is 0; w is infinite where p is 0 and q is not
        log_ratio = (z_q - shift_q[None, :]) - (z_p - shift_p[None, :])
        w += tl.sum(tl.where(e > 0.0, e * log_ratio, 0.0), axis=0)
    s_q = s_q * factor + tl.sum(e, axis=0)
    return m_p, s_p, m_q, s_q, w


@triton.jit
def _moved(w, s_q, by, factor):
    """w when the maxima that its terms are relative to have moved. Nothing was summed where s_q is 0: `by` is not a number."""
    return tl.where((s_q > 0.0) & (factor > 0.0), (w + s_q * by) * factor, 0.0)


@triton.jit
def _above_m(log_p, log_q, BETA: tl.constexpr):
    """log(p / m) and log(q / m) from the difference of the logarithms: both are 0 where p is q, and few digits cancel.

    They mean nothing where p or q is 0.
    """
    apart = log_q - log_p
    ratio = tl.exp(-tl.abs(apart))  # the smaller of p and q over the larger
    low = tl.log(tl.where(apart > 0.0, BETA + (1.0 - BETA) * ratio, (1.0 - BETA) + BETA * ratio))  # log(m / larger)
    return tl.minimum(-apart, 0.0) - low, tl.minimum(apart, 0.0) - low


@triton.jit
def _js_step(
    kl_p,
    kl_q,
    p_ptr,
    q_ptr,
    offs,
    V,
    top_p,
    log_p_sum,
    top_q,
    log_q_sum,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add a tile (R, L) to the sums of p * log(p / m) and q * log(q / m), each (L,)."""
    log_p = (_load_tile(p_ptr, offs, V, SCALE, MASKED) - top_p) - log_p_sum
    log_q = (_load_tile(q_ptr, offs, V, SCALE, MASKED) - top_q) - log_q_sum
    p, q = tl.exp(log_p), tl.exp(log_q)
    above_p, above_q = _above_m(log_p, log_q, BETA)
    kl_p += tl.sum(tl.where(p > 0.0, p * above_p, 0.0), axis=0)
    kl_q += tl.sum(tl.where(q > 0.0, q * above_q, 0.0), axis=0)
    return kl_p, kl_q


@triton.jit
def _row_sum(m, s):
    """Maximum of a row (0 if all is -inf), the factor of each lane's sums, and the sum."""
    top = tl.max(m, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp(m - top)
    return top, factor, tl.sum(s * factor, axis=0)


@triton.jit
def _divergence_fwd_kernel(
    p_ptr,
    q_ptr,
    loss_ptr,
    stats_ptr,
    V,
    stride_p,
    stride_q,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    KL: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """One row of both per program. Each thread holds columns of the (R, L) tile; they meet once, after the loop."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    p_ptr += row * stride_p
    q_ptr += row * stride_q
    offs = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]  # (R, L)
    m_p = tl.full((L,), float("-inf"), tl.float32)
    s_p = tl.zeros((L,), tl.float32)
    m_q = tl.full((L,), float("-inf"), tl.float32)
    s_q = tl.zeros((L,), tl.float32)
    w = tl.zeros((L,), tl.float32)
    whole = V // (R * L) * (R * L)
    for start in range(0, whole, R * L):
        m_p, s_p, m_q, s_q, w = _divergence_step(m_p, s_p, m_q, s_q, w, p_ptr, q_ptr, start + offs, V, SCALE, KL, False)
    if not EVEN_V:
        m_p, s_p, m_q, s_q, w = _divergence_step(m_p, s_p, m_q, s_q, w, p_ptr, q_ptr, whole + offs, V, SCALE, KL, True)
    top_p, _, p_sum = _row_sum(m_p, s_p)
    top_q, factor, q_sum = _row_sum(m_q, s_q)
    log_p_sum, log_q_sum = tl.log(p_sum), tl.log(q_sum)
    if KL:
        w = _moved(w, s_q, (top_p - m_p) - (top_q - m_q), factor)
        loss = tl.sum(w, axis=0) / q_sum - (log_q_sum - log_p_sum)
        tl.store(stats_ptr + 4 * rows + row, loss)
    else:
        kl_p = tl.zeros((L,), tl.float32)
        kl_q = tl.zeros((L,), tl.float32)
        for start in range(0, whole, R * L):
            kl_p, kl_q = _js_step(
                kl_p, kl_q, p_ptr, q_ptr, start + offs, V, top_p, log_p_sum, top_q, log_q_sum, SCALE, BETA, False
            )
        if not EVEN_V:
            kl_p, kl_q = _js_step(
                kl_p, kl_q, p_ptr, q_ptr, whole + offs, V, top_p, log_p_sum, top_q, log_q_sum, SCALE, BETA, True
            )
        by_p, by_q = tl.sum(kl_p, axis=0), tl.sum(kl_q, axis=0)
        loss = BETA * by_q + (1.0 - BETA) * by_p
        tl.store(stats_ptr + 4 * rows + row, by_q)
        tl.store(stats_ptr + 5 * rows + row, by_p)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    tl.store(stats_ptr + row, top_p)
    tl.store(stats_ptr + rows + row, log_p_sum)
    tl.store(stats_ptr + 2 * rows + row, top_q)
    tl.store(stats_ptr + 3 * rows + row, log_q_sum)


@triton.jit
def _divergence_bwd_kernel(
    dloss_ptr,
    p_ptr,
    q_ptr,
    stats_ptr,
    dp_ptr,
    dq_ptr,
    M,
    V,
    stride_p,
    stride_q,
    stride_dloss,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
    NEEDS_P: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A part of a row of the gradients per program, last rows first: they are what the forward left in the L2 cache."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles_v = tl.cdiv(V, BLOCK_V)
    row = (pid // tiles_v).to(tl.int64)
    offs_v = (pid % tiles_v) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    mask_v = offs_v < V
    g = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32) * SCALE
    if MEAN:
        g = g / M
    z_p = _load_tile(p_ptr + row * stride_p, offs_v, V, SCALE, True)
    z_q = _load_tile(q_ptr + row * stride_q, offs_v, V, SCALE, True)
    log_p = (z_p - tl.load(stats_ptr + row)) - tl.load(stats_ptr + M + row)
    log_q = (z_q - tl.load(stats_ptr + 2 * M + row)) - tl.load(stats_ptr + 3 * M + row)
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KL:
        if NEEDS_P:
            dp = g * (p - q)
        if NEEDS_Q:
            dq = g * tl.where(q > 0.0, q * (log_q - log_p - tl.load(stats_ptr + 4 * M + row)), 0.0)
    else:
        above_p, above_q = _above_m(log_p, log_q, BETA)
        if NEEDS_P:
            dp = ((1.0 - BETA) * g) * tl.where(p > 0.0, p * (above_p - tl.load(stats_ptr + 5 * M + row)), 0.0)
        if NEEDS_Q:
            dq = (BETA * g) * tl.where(q > 0.0, q * (above_q - tl.load(stats_ptr + 4 * M + row)), 0.0)
    if NEEDS_P:
        tl.store(dp_ptr + row * V + offs_v, dp.to(dp_ptr.dtype.element_ty), mask=mask_v)
    if NEEDS_Q:
        tl.store(dq_ptr + row * V + offs_v, dq.to(dq_ptr.dtype.element_ty), mask=mask_v)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """(rows, V) with unit stride along V: a view where the strides allow it."""
    logits = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _forward(
    logits: torch.Tensor, target_logits: torch.Tensor, beta: float | None, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    loss, stats = _outputs(logits, reduction, beta)
    p, q = _rows(logits), _rows(target_logits)
    M, V = p.shape
    rows = loss if reduction == "none" else stats.new_empty(M)
    if V <= 1024:
        L = max(32, next_power_of_2(V))
        config = {"R": 1, "L": L, "EVEN_V": False, "num_warps": max(1, L // 256)}
    else:
        # two rows of 2048 logits: as many bytes in flight as one row of 4096
        config = {"R": 2, "L": 1024, "EVEN_V": bool(V % 2048 == 0), "num_warps": 4 if V % 8 == 0 else 8}
    launch(
        _divergence_fwd_kernel,
        (M,),
        p,
        q,
        rows,
        stats,
        V,
        p.stride(0),
        q.stride(0),
        SCALE=1.0 / temperature,
        BETA=beta or 0.0,
        KL=beta is None,
        **config,
    )
    if reduction != "none":
        sum_partials(rows, loss, M, reduction == "mean")
    return loss, stats


def _backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    beta: float | None,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dlogits, dtarget = _wanted(logits, target_logits, needs)
    p, q, dloss = _rows(logits), _rows(target_logits), dloss.reshape(-1)
    M, V = p.shape
    BLOCK_V = min(2048, max(128, next_power_of_2(V)))
    launch(
        _divergence_bwd_kernel,
        (M * cdiv(V, BLOCK_V),),
        dloss,
        p,
        q,
        stats,
        dlogits if needs[0] else None,
        dtarget if needs[1] else None,
        M,
        V,
        p.stride(0),
        q.stride(0),
        dloss.stride(0) if reduction == "none" else 0,
        SCALE=1.0 / temperature,
        BETA=beta or 0.0,
        KL=beta is None,
        MEAN=reduction == "mean",
        NEEDS_P=bool(needs[0]),
        NEEDS_Q=bool(needs[1]),
        BLOCK_V=BLOCK_V,
        num_warps=4 if V % 8 == 0 else 8,  # without 16-byte loads an address for each logit: fewer of them to a thread
    )
    return dlogits, dtarget


def _outputs(logits: torch.Tensor, reduction: str, beta: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    rows = math.prod(logits.shape[:-1])
    loss = logits.new_empty(logits.shape[:-1] if reduction == "none" else ())
    return loss, logits.new_empty((5 if beta is None else 6, rows), dtype=arithmetic_dtype(logits))


def _wanted(logits: torch.Tensor, target_logits: torch.Tensor, needs: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = (logits.shape if needed else (0,) for needed in needs)
    return logits.new_empty(next(shapes)), target_logits.new_empty(next(shapes))


def kl_div(
    logits: torch.Tensor, target_logits: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> torch.Tensor:
    return _forward(logits, target_logits, None, temperature, reduction)[0]


def kl_div_fake(
    logits: torch.Tensor, target_logits: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> torch.Tensor:
    return _outputs(logits, reduction, None)[0]


def kl_div_fwd(
    logits: torch.Tensor, target_logits: torch.Tensor, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(logits, target_logits, None, temperature, reduction)


def kl_div_fwd_fake(
    logits: torch.Tensor, target_logits: torch.Tensor, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(logits, reduction, None)


def kl_div_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dloss, logits, target_logits, stats, None, temperature, reduction, needs)


def kl_div_bwd_fake(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return _wanted(logits, target_logits, needs)


def js_div(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    return _forward(logits, target_logits, beta, temperature, reduction)[0]


def js_div_fake(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    return _outputs(logits, reduction, beta)[0]


def js_div_fwd(
    logits: torch.Tensor, target_logits: torch.Tensor, beta: float, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(logits, target_logits, beta, temperature, reduction)


def js_div_fwd_fake(
    logits: torch.Tensor, target_logits: torch.Tensor, beta: float, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(logits, reduction, beta)


def js_div_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    beta: float,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dloss, logits, target_logits, stats, beta, temperature, reduction, needs)


def js_div_bwd_fake(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    stats: torch.Tensor,
    beta: float,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return _wanted(logits, target_logits, needs)


# --------------------------------------------------------------------------------------------------------------------
# Checks, gradients
# --------------------------------------------------------------------------------------------------------------------


def _check(op: str, logits: torch.Tensor, target_logits: torch.Tensor, temperature: float, reduction: str) -> None:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        bad_argument(op, "logits", f"of shape {tuple(logits.shape)}", "(..., V) with at least one class")
    if target_logits.shape != logits.shape:
        bad_argument(op, "target_logits", f"of shape {tuple(target_logits.shape)}", f"{tuple(logits.shape)}, as logits")
    if not 0.0 < temperature < math.inf:
        bad_argument(op, "temperature", temperature, "a finite number above 0")
    if reduction not in REDUCTIONS:
        bad_argument(op, "reduction", repr(reduction), "'none', 'mean' or 'sum'")


def kl_div_check(
    logits: torch.Tensor, target_logits: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> None:
    _check("kl_div", logits, target_logits, temperature, reduction)


def js_div_check(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> None:
    _check("js_div", logits, target_logits, temperature, reduction)
    if not 0.0 < beta < 1.0:
        bad_argument("js_div", "beta", beta, "a number above 0 and below 1; kl_div is for the ends")


def kl_div_forward(
    ctx: Any, logits: torch.Tensor, target_logits: torch.Tensor, temperature: float, reduction: str
) -> torch.Tensor:
    loss, stats = torch.ops.tt.kl_div_fwd(logits, target_logits, temperature, reduction)
    ctx.save_for_backward(logits, target_logits, stats)
    ctx.options = (temperature, reduction)
    return loss


def kl_div_backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tt.kl_div_bwd(dloss, *ctx.saved_tensors, *ctx.options, list(ctx.needs))


def js_div_forward(
    ctx: Any, logits: torch.Tensor, target_logits: torch.Tensor, beta: float, temperature: float, reduction: str
) -> torch.Tensor:
    loss, stats = torch.ops.tt.js_div_fwd(logits, target_logits, beta, temperature, reduction)
    ctx.save_for_backward(logits, target_logits, stats)
    ctx.options = (beta, temperature, reduction)
    return loss


def js_div_backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tt.js_div_bwd(dloss, *ctx.saved_tensors, *ctx.options, list(ctx.needs))


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def _samples(device: torch.device | str, dtype: torch.dtype, **options: Any) -> Iterator[Sample]:
    def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        p, q = 2 * torch.randn((2, *shape), device=device, dtype=dtype)
        return p, q

    yield Sample("5x33", pair(5, 33))
    yield Sample("none_options", pair(2, 3, 2051), {"temperature": 2.5, "reduction": "none", **options})
    p, q = pair(4, 70)
    p[:, 5:60], q[:, 5:60] = float("-inf"), float("-inf")
    yield Sample("masked", (p, q), {"reduction": "sum"})
    if dtype in (torch.float32, torch.float64):
        yield Sample("even_2048", pair(2, 2048), {"reduction": "sum"})
        yield Sample("empty_sum", pair(0, 5), {"reduction": "sum"})
        yield Sample("one_class", pair(3, 1), {"reduction": "none"})


def kl_div_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from _samples(device, dtype)


def js_div_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from _samples(device, dtype, beta=0.3)


def _gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    p, q = 3 * torch.randn((2, 3, 2**18), device=device, dtype=dtype)
    yield Sample("V262144", (p, q), {"reduction": "none"})


def kl_div_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """A vocabulary of 2**18."""
    yield from _gpu_samples(device, dtype)


def js_div_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """A vocabulary of 2**18."""
    yield from _gpu_samples(device, dtype)


def _error_samples(op: str, device: torch.device | str) -> Iterator[ErrorSample]:
    p = torch.randn(4, 5, device=device)
    yield ErrorSample("no_classes", (p[:, :0], p[:, :0]), match=rf"{op}.*'logits'.*\(4, 0\)")
    yield ErrorSample("shape", (p, p[:3]), match=rf"{op}.*'target_logits'.*\(3, 5\).*\(4, 5\)")
    yield ErrorSample("temperature", (p, p), {"temperature": 0.0}, match=f"{op}.*'temperature' is 0.0")
    yield ErrorSample("reduction", (p, p), {"reduction": "batchmean"}, match=f"{op}.*'batchmean'.*'mean'")


def kl_div_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from _error_samples("tt::kl_div", device)


def js_div_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from _error_samples("tt::js_div", device)
    p = torch.randn(4, 5, device=device)
    yield ErrorSample("beta", (p, p), {"beta": 1.0}, match="tt::js_div.*'beta' is 1.0.*kl_div")


def _bench_cases() -> Iterator[BenchCase]:
    def make(M: int, V: int, device: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(torch.randn(M, V, device=device, dtype=dtype) for _ in range(2)), {}

    for M, V in ((8192, 32000), (4096, 128256)):
        yield BenchCase(f"{M}x{V}", lambda device, dtype, M=M, V=V: make(M, V, device, dtype))


def kl_div_bench_cases() -> Iterator[BenchCase]:
    yield from _bench_cases()


def js_div_bench_cases() -> Iterator[BenchCase]:
    yield from _bench_cases()


def kl_div_cost(
    logits: torch.Tensor, target_logits: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> Cost:
    n = logits.numel()
    read = n * (logits.element_size() + target_logits.element_size())
    return Cost(9 * n, read, 10 * n, 2 * read)


def js_div_cost(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Cost:
    n = logits.numel()
    read = n * (logits.element_size() + target_logits.element_size())
    return Cost(20 * n, read, 16 * n, 2 * read)
