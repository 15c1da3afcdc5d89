"""Flash attention, forward and backward: softmax(scale * q @ k^T) @ v without ever storing the score matrix.

score[i, j] = scale * dot(q[i], k[j]), or softcap * tanh(score / softcap) if softcap > 0
P[i, j]     = exp(score[i, j] - lse[i]),  lse[i] = log(sum_j exp(score[i, j])),  over the keys j that query i may see
out[i]      = sum_j P[i, j] * v[j]

Let p(i) = i + Skv - Sq, the place of query i among the keys: **causal and windows are aligned to the bottom right**, so the
last query stands beside the last key also when Sq != Skv. Query i sees the keys j of 0 <= j < Skv with
    j <= p(i) if causal,  j >= p(i) - window_left if window_left >= 0,  j <= p(i) + window_right if window_right >= 0.
A query that sees nothing gets zeros (and lse = -inf), and its gradient is zero.

| argument | shape | dtype |
|---|---|---|
| q | (B, Hq, Sq, D), D from 16 to 256 | float32, float16, bfloat16 |
| k, v | (B, Hkv, Skv, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv) | that of q |
| out, dq | that of q | that of q |
| dk, dv | that of k | that of k |
| lse (internal) | (B, Hq, Sq), natural logarithm | float32 |

`scale` defaults to 1 / sqrt(D). `alibi_slopes`, `attn_bias` and `sinks` are not implemented and raise NotImplementedError.

Memory layout. Inputs may have any strides; only a last stride other than 1 costs a copy. An output is dense and keeps the
order of its model (out and dq follow q, dk follows k, dv follows v): `(B, S, H, D)` in memory, shown as `(B, H, S, D)`, if the
model's head stride is smaller than its row stride, else contiguous. So `(B, S, H, D).transpose(1, 2)` costs nothing on the way
in or out.

float32 products follow `torch.backends.cuda.matmul.fp32_precision` at launch: IEEE unless TF32 is allowed.

FLOPs: 4 * D per visible pair (query, key) and head forward, 10 * D backward (two and five matrix products). The backward is two
kernels, one that owns dk and dv and one that owns dq, so nothing is added atomically and results repeat bit for bit.

Sources: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691; Rabe and Staats, https://arxiv.org/abs/2112.05682.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import INTERPRET, capability, cdiv, launch, next_power_of_2

_LOG2E = math.log2(math.e)

# --------------------------------------------------------------------------------------------------------------------
# The specification: plain torch
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return flash_attn_fwd_reference(q, k, v, causal, scale, window_left, window_right, softcap)[0]


def flash_attn_fwd_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _arithmetic_dtype(q)
    group = _group(q, k)
    visible = _visible_mask(q.shape[2], k.shape[2], causal, window_left, window_right, q.device)  # (Sq, Skv)
    k, v_all = k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    score = (q.to(dtype) @ k.transpose(-1, -2)) * _scale(q, scale)  # (B, Hq, Sq, Skv)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    p = _softmax(score, visible)
    lse = score.masked_fill(~visible, -math.inf).logsumexp(-1)
    return _dense_copy(p @ v_all, q), lse


def flash_attn_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in eager torch, scores and weights rounded to the inputs' dtype: the error budget's yardstick."""
    group = _group(q, k)
    visible = _visible_mask(q.shape[2], k.shape[2], causal, window_left, window_right, q.device)
    score = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * _scale(q, scale)  # (B, Hq, Sq, Skv)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    p = _softmax(score.to(_arithmetic_dtype(q)), visible).to(q.dtype)
    return _dense_copy(p @ v.repeat_interleave(group, 1), q)


def flash_attn_bwd_reference(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _arithmetic_dtype(q)
    B, Hkv, Skv, D = k.shape
    group, scale = _group(q, k), _scale(q, scale)
    visible = _visible_mask(q.shape[2], Skv, causal, window_left, window_right, q.device)
    q_all, dout_all = q.to(dtype), dout.to(dtype)
    k_all, v_all = k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    score = (q_all @ k_all.transpose(-1, -2)) * scale
    if softcap > 0:
        capped = torch.tanh(score / softcap)
        score = softcap * capped
    # From the scores again, not from lse and out: in fp32 those would cost digits where softmax is nearly one-hot.
    p = _softmax(score, visible)
    dp = dout_all @ v_all.transpose(-1, -2)
    dscore = torch.ops.aten._softmax_backward_data(dp, p, -1, dtype)  # p * (dp - sum(p * dp))
    if softcap > 0:
        dscore = dscore * (1 - capped * capped)
    dscore = dscore * scale
    dq = dscore @ k_all
    dk = (dscore.transpose(-1, -2) @ q_all).view(B, Hkv, group, Skv, D).sum(2)
    dv = (p.transpose(-1, -2) @ dout_all).view(B, Hkv, group, Skv, D).sum(2)
    return tuple(
        _dense_copy(gradient, x) if needed else x.new_empty(0)
        for gradient, x, needed in zip((dq, dk, dv), (q, k, v), needs, strict=True)
    )


def _softmax(score: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Over the visible keys; zeros, with a zero gradient, where there are none."""
    sees_any = visible.any(-1, keepdim=True)
    # a query that sees nothing keeps its scores, so that softmax stays finite; its row is cleared after
    return score.masked_fill(~visible & sees_any, -math.inf).softmax(-1) * sees_any


def _visible_mask(
    Sq: int, Skv: int, causal: bool, window_left: int, window_right: int, device: torch.device
) -> torch.Tensor:
    """(Sq, Skv) bool: may query i see key j?"""
    left, right = _window(causal, window_left, window_right)
    distance = torch.arange(Skv, device=device) - (torch.arange(Sq, device=device) + (Skv - Sq))[:, None]  # j - p(i)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if right >= 0:
        visible &= distance <= right
    if left >= 0:
        visible &= distance >= -left
    return visible


# --------------------------------------------------------------------------------------------------------------------
# Kernels: parts that all of them use
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(
    x_ptr, start, stride_xs, S, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Rows start .. start + BLOCK_S of one head, zeros beyond S and HEAD_DIM: (BLOCK_S, BLOCK_D)."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    # int64 for the block's start alone: within a block int32 is enough, and cheaper
    ptrs = x_ptr + tl.cast(start, tl.int64) * stride_xs + (offs_s[:, None] * stride_xs + offs_d[None, :])
    if MASKED:
        mask = ((start + offs_s) < S)[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_rows(
    x_ptr, x, start, stride_xs, S, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + tl.cast(start, tl.int64) * stride_xs + (offs_s[:, None] * stride_xs + offs_d[None, :])
    mask = ((start + offs_s) < S)[:, None] & (offs_d < HEAD_DIM)[None, :]
    if UPCAST:  # the interpreter's cast to bf16 truncates: round to nearest even before it
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    tl.store(ptrs, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    y = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # e^2x = 2^(2 x log2 e); overflow to inf gives 1
    if PRECISE:
        # Near 0 the line above cancels: there x + x^3 P(x^2), fitted for the least relative error (6e-9) on |x| < 0.64.
        z = x * x
        near = -0.3333327 + z * (0.13331092 + z * (-0.05370965 + z * (0.02053881 - z * 0.005591)))
        y = tl.where(tl.abs(x) < 0.64, x + x * (z * near), y)
    return y


@triton.jit
def _blocks(first, last, total, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks of the other sequence (0 .. total) do items first .. last meet, if item i meets i - left .. i + right?

    Four multiples of BLOCK: blocks [begin, full_begin) and [full_end, end) need a mask, blocks [full_begin, full_end) do not, and
    nothing else is met. HAS_LEFT, HAS_RIGHT: is there such a bound?
    """
    begin = 0
    full_begin = 0
    end = total
    full_end = total
    if HAS_LEFT:
        begin = tl.maximum(first - left, 0) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(last - left, 0), BLOCK) * BLOCK
    if HAS_RIGHT:
        end = tl.minimum(total, tl.maximum(last + right + 1, 0))
        full_end = tl.minimum(total, tl.maximum(first + right + 1, 0))
    end = tl.cdiv(end, BLOCK) * BLOCK
    begin = tl.minimum(begin, end)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _head_and_block(pid, S, H, BH, GROUP: tl.constexpr, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Program -> (batch, head, first row of its block).

    GROUP heads run side by side, block by block, the longest blocks of all of them first (the last ones if LAST_FIRST): short
    blocks fill the gaps at the end, and K and V of the group stay in L2.
    """
    num_blocks = tl.cdiv(S, BLOCK)
    group = pid // (GROUP * num_blocks)
    rest = pid - group * (GROUP * num_blocks)
    heads = tl.minimum(GROUP, BH - group * GROUP)
    block = rest // heads
    bh = group * GROUP + (rest - block * heads)
    if LAST_FIRST:
        block = num_blocks - 1 - block
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), block * BLOCK


# --------------------------------------------------------------------------------------------------------------------
# Kernel: forward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _exp(x_ptr, x):
    """exp of a difference of scores. They are kept in units of log 2, so that exp2 needs no product of its own; but in fp32
    in natural ones: there log2(e) comes after the subtraction, where its rounding is small, and a scale that is a power of
    two costs none."""
    return tl.exp(x) if x_ptr.dtype.element_ty == tl.float32 else tl.exp2(x)


@triton.jit
def _dot_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. In fp32 a chain of additions over all keys rounds too often: one sum per block, then a sum of those.

    The product with 1.0 keeps the compiler from chaining them again.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return tl.fma(acc, 1.0, tl.dot(a, b, input_precision=PRECISION))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _attend(
    acc, l, m, q, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """One block of keys: the online softmax. m is in the unit of the scores (`_exp`)."""
    k = _load_rows(k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if SOFTCAP > 0:
        s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32)
        UNIT: tl.constexpr = SOFTCAP * (1.0 if k_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634)
    else:
        UNIT: tl.constexpr = SCALE * (1.0 if k_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634)
    if MASKED:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        visible = offs_n[None, :] <= last[:, None]
        if HAS_LEFT:
            visible = visible & (offs_n[None, :] >= first[:, None])
        s = tl.where(visible, s * UNIT, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # -inf until the first visible key: -inf - 0 gives weight 0 where -inf - -inf gives NaN
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = _exp(k_ptr, s - shift[:, None])
    else:
        if UNIT >= 0:
            m_new = tl.maximum(m, tl.max(s, 1) * UNIT)
        else:
            m_new = tl.maximum(m, tl.min(s, 1) * UNIT)
        shift = m_new
        p = _exp(k_ptr, s * UNIT - shift[:, None])
    alpha = _exp(k_ptr, m - shift)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = _load_rows(v_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    acc = _dot_add(p.to(v.dtype), v, acc, PRECISION)
    return acc, l, m_new


@triton.jit(do_not_specialize=["Sq", "Skv", "BH", "window_left", "window_right"])
def _flash_attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    Sq, Skv, H, BH, window_left, window_right,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b, h, start_m = _head_and_block(tl.program_id(0), Sq, H, BH, GROUP, BLOCK_M, HAS_RIGHT)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // HEADS_PER_KV * stride_kh
    v_ptr += b * stride_vb + h // HEADS_PER_KV * stride_vh
    out_ptr += b * stride_ob + h * stride_oh

    q = _load_rows(q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)  # (BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    # places of the queries among the keys, and the first and last key that each sees
    offs_m = start_m + tl.arange(0, BLOCK_M)
    place = offs_m + (Skv - Sq)
    first = place - window_left
    last = tl.zeros((BLOCK_M,), tl.int32) + (Skv - 1)
    if HAS_RIGHT:
        last = tl.minimum(last, place + window_right)
    first_place = start_m + (Skv - Sq)
    last_place = tl.minimum(start_m + BLOCK_M, Sq) - 1 + (Skv - Sq)
    begin, full_begin, full_end, end = _blocks(
        first_place, last_place, Skv, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if full_begin < full_end:
        for start_n in range(full_begin, full_end, BLOCK_N):
            acc, l, m = _attend(
                acc, l, m, q, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HEAD_DIM, BLOCK_N, BLOCK_D, False, PRECISION, UPCAST,
            )  # fmt: skip
    # blocks on the edge of what is seen, left and right in one loop
    edge = (full_begin - begin) + (end - full_end)
    if edge > 0:
        for i in range(0, edge, BLOCK_N):
            start_n = tl.where(i < full_begin - begin, begin + i, full_end + i - (full_begin - begin))
            acc, l, m = _attend(
                acc, l, m, q, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HEAD_DIM, BLOCK_N, BLOCK_D, True, PRECISION, UPCAST,
            )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)  # nothing was visible: acc is 0 and m is -inf
    acc = acc * (1.0 / l)[:, None]
    _store_rows(out_ptr, acc, start_m, stride_om, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, UPCAST)
    if lse_ptr is not None:
        if q_ptr.dtype.element_ty == tl.float32:
            lse = m + tl.log(l)
        else:
            lse = (m + tl.log2(l)) * 0.6931471805599453
        tl.store(lse_ptr + (b * H + h) * Sq + offs_m, lse, mask=offs_m < Sq)


# --------------------------------------------------------------------------------------------------------------------
# Kernels: backward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["Sq", "BH"])
def _flash_attn_bwd_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, rows_ptr,
    Sq, Sq_padded, H, BH,
    stride_db, stride_dh, stride_dm, stride_ob, stride_oh, stride_om,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the backward needs of every query: lse in the unit of the scores (`_exp`), and delta = dot(dout, out).

    Rows beyond Sq, and queries that see nothing, get lse = +inf: then P = exp(score - lse) is 0 without a mask.
    """
    num_blocks = tl.cdiv(Sq_padded, BLOCK_M)
    bh = tl.program_id(0) // num_blocks
    start_m = tl.program_id(0) % num_blocks * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    out = _load_rows(
        out_ptr + b * stride_ob + h * stride_oh, start_m, stride_om, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, True
    )
    dout = _load_rows(
        dout_ptr + b * stride_db + h * stride_dh, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, True
    )
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * Sq + offs_m, mask=offs_m < Sq, other=float("-inf"))
    lse = tl.where(
        lse == float("-inf"),
        float("inf"),
        lse * (1.0 if out_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634),
    )
    rows_ptr += bh.to(tl.int64) * Sq_padded
    mask_m = offs_m < Sq_padded
    tl.store(rows_ptr + offs_m, lse, mask=mask_m)
    tl.store(rows_ptr + tl.cast(BH, tl.int64) * Sq_padded + offs_m, tl.sum(out * dout, 1), mask=mask_m)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, start_m, stride_qm, stride_dm, first, last, on_edge, Sq,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """One block of queries. Everything is computed transposed, (BLOCK_N, BLOCK_M), so that no accumulator is transposed."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    if SOFTCAP > 0:
        s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32)
        UNIT: tl.constexpr = SOFTCAP * (1.0 if q_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634)
    else:
        UNIT: tl.constexpr = SCALE * (1.0 if q_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634)
    p = _exp(q_ptr, s * UNIT - tl.load(lse_ptr + offs_m)[None, :])
    if HAS_LEFT or HAS_RIGHT:  # noqa: SIM102 (a constexpr, then a run-time value)
        if on_edge:
            if HAS_RIGHT:
                p = tl.where(offs_m[None, :] >= first[:, None], p, 0.0)
            if HAS_LEFT:
                p = tl.where(offs_m[None, :] <= last[:, None], p, 0.0)
    dout = _load_rows(dout_ptr, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
    if NEEDS_DV:
        dv = _dot_add(p.to(dout.dtype), dout, dv, PRECISION)
    if NEEDS_DK:
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        ds = p * (dp - tl.load(delta_ptr + offs_m)[None, :])
        if SOFTCAP > 0:
            ds = ds * (1.0 - s * s)
        dk = _dot_add(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["Sq", "Skv", "BH", "BHq", "window_left", "window_right"])
def _flash_attn_bwd_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, dk_ptr, dv_ptr,
    Sq, Sq_padded, Skv, H, BH, BHq, window_left, window_right,
    stride_db, stride_dh, stride_dm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, summed over the query heads that share it; either may be None. H, BH count key heads."""
    NEEDS_DK: tl.constexpr = dk_ptr is not None
    NEEDS_DV: tl.constexpr = dv_ptr is not None
    b, h, start_n = _head_and_block(tl.program_id(0), Skv, H, BH, GROUP, BLOCK_N, False)
    # rows beyond Skv are computed from zeros and not stored; nothing else depends on them
    k = _load_rows(
        k_ptr + b * stride_kb + h * stride_kh, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, True, UPCAST
    )
    v = _load_rows(
        v_ptr + b * stride_vb + h * stride_vh, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, True, UPCAST
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    # first and last query that sees each key: the forward's window, read from the other side
    place = start_n + tl.arange(0, BLOCK_N) - (Skv - Sq)
    first = place - window_right
    last = place + window_left
    first_place = start_n - (Skv - Sq)
    last_place = tl.minimum(start_n + BLOCK_N, Skv) - 1 - (Skv - Sq)
    begin, full_begin, full_end, end = _blocks(
        first_place, last_place, Sq, window_right, window_left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    for g in range(HEADS_PER_KV):
        hq = h * HEADS_PER_KV + g
        q_head_ptr = q_ptr + b * stride_qb + hq * stride_qh
        dout_head_ptr = dout_ptr + b * stride_db + hq * stride_dh
        lse_ptr = rows_ptr + (b * H * HEADS_PER_KV + hq) * Sq_padded
        delta_ptr = lse_ptr + tl.cast(BHq, tl.int64) * Sq_padded
        if begin < end:
            for start_m in range(begin, end, BLOCK_M):
                start_m = tl.multiple_of(start_m, BLOCK_M)
                on_edge = (start_m < full_begin) | (start_m >= full_end)
                dk, dv = _dkdv_step(
                    dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr, delta_ptr, start_m, stride_qm, stride_dm,
                    first, last, on_edge, Sq, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, HEAD_DIM, BLOCK_M, BLOCK_D,
                    NEEDS_DK, NEEDS_DV, PRECISION, UPCAST,
                )  # fmt: skip
    if NEEDS_DK:
        dk_ptr += b * stride_dkb + h * stride_dkh
        _store_rows(dk_ptr, dk * SCALE, start_n, stride_dkn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, UPCAST)
    if NEEDS_DV:
        dv_ptr += b * stride_dvb + h * stride_dvh
        _store_rows(dv_ptr, dv, start_n, stride_dvn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, UPCAST)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """One block of keys."""
    k = _load_rows(k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if SOFTCAP > 0:
        s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32)
        UNIT: tl.constexpr = SOFTCAP * (1.0 if k_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634)
    else:
        UNIT: tl.constexpr = SCALE * (1.0 if k_ptr.dtype.element_ty == tl.float32 else 1.4426950408889634)
    p = _exp(k_ptr, s * UNIT - lse[:, None])
    if MASKED:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        visible = offs_n[None, :] <= last[:, None]
        if HAS_LEFT:
            visible = visible & (offs_n[None, :] >= first[:, None])
        p = tl.where(visible, p, 0.0)
    v = _load_rows(v_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    ds = p * (dp - delta[:, None])
    if SOFTCAP > 0:
        ds = ds * (1.0 - s * s)
    return _dot_add(ds.to(k.dtype), k, dq, PRECISION)


@triton.jit(do_not_specialize=["Sq", "Skv", "BH", "window_left", "window_right"])
def _flash_attn_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, dq_ptr,
    Sq, Sq_padded, Skv, H, BH, window_left, window_right,
    stride_db, stride_dh, stride_dm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dqb, stride_dqh, stride_dqm,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: the forward's loop over the keys."""
    b, h, start_m = _head_and_block(tl.program_id(0), Sq, H, BH, GROUP, BLOCK_M, HAS_RIGHT)
    k_ptr += b * stride_kb + h // HEADS_PER_KV * stride_kh
    v_ptr += b * stride_vb + h // HEADS_PER_KV * stride_vh
    q = _load_rows(
        q_ptr + b * stride_qb + h * stride_qh, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST
    )
    dout = _load_rows(
        dout_ptr + b * stride_db + h * stride_dh, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST
    )
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows_ptr += (b * H + h) * Sq_padded
    lse = tl.load(rows_ptr + offs_m)
    delta = tl.load(rows_ptr + tl.cast(BH, tl.int64) * Sq_padded + offs_m)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    place = offs_m + (Skv - Sq)
    first = place - window_left
    last = tl.zeros((BLOCK_M,), tl.int32) + (Skv - 1)
    if HAS_RIGHT:
        last = tl.minimum(last, place + window_right)
    first_place = start_m + (Skv - Sq)
    last_place = tl.minimum(start_m + BLOCK_M, Sq) - 1 + (Skv - Sq)
    begin, full_begin, full_end, end = _blocks(
        first_place, last_place, Skv, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if full_begin < full_end:
        for start_n in range(full_begin, full_end, BLOCK_N):
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HEAD_DIM, BLOCK_N, BLOCK_D, False, PRECISION, UPCAST,
            )  # fmt: skip
    edge = (full_begin - begin) + (end - full_end)
    if edge > 0:
        for i in range(0, edge, BLOCK_N):
            start_n = tl.where(i < full_begin - begin, begin + i, full_end + i - (full_begin - begin))
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HEAD_DIM, BLOCK_N, BLOCK_D, True, PRECISION, UPCAST,
            )  # fmt: skip
    dq_ptr += b * stride_dqb + h * stride_dqh
    _store_rows(dq_ptr, dq * SCALE, start_m, stride_dqm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, UPCAST)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------

# The backward's per-query rows are padded to this multiple, so that no block of queries reads beyond them.
_ROW_PADDING = 128


def _config(
    kernel: str, dtype: torch.dtype, D: int, softcap: float, left: int, target: int
) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) for kernel "fwd", "dkdv" or "dq": the largest tiles that compile without a spill.

    Eight warps also where four would do: some 4-warp products were miscompiled for SM90.
    """
    block_d = next_power_of_2(D)
    width = "narrow" if block_d <= 64 else "128" if block_d == 128 else "256"
    if dtype == torch.float32:
        kind = "float32"
    else:
        kind = "sm90" if target == 90 else "portable"
    configs = _CONFIGS[kind][kernel]
    # a softcap, a left bound and head sizes that fill their block in part need registers of their own
    crowded = softcap > 0 or left >= 0 or block_d != D
    return configs.get(f"{width} crowded" if crowded else width, configs[width])


_CONFIGS: dict[str, dict[str, dict[str, tuple[int, int, int, int]]]] = {
    "sm90": {
        "fwd": {
            "narrow": (128, 128, 8, 2),
            "128": (128, 128, 8, 2),
            "128 crowded": (128, 64, 8, 2),
            "256": (128, 32, 8, 2),
        },
        "dkdv": {
            "narrow": (64, 128, 8, 2),
            "narrow crowded": (32, 128, 8, 2),
            "128": (32, 128, 8, 2),
            "128 crowded": (32, 64, 8, 2),
            "256": (32, 32, 8, 1),
        },
        "dq": {"narrow": (128, 64, 8, 2), "128": (128, 64, 8, 2), "256": (64, 32, 8, 2)},
    },
    "portable": {
        "fwd": {"narrow": (128, 64, 8, 2), "128": (128, 64, 8, 2), "256": (64, 64, 8, 1)},
        "dkdv": {"narrow": (32, 64, 8, 2), "128": (32, 64, 8, 2), "256": (32, 32, 8, 1)},
        "dq": {"narrow": (128, 64, 8, 2), "128": (64, 64, 8, 2), "128 crowded": (32, 64, 8, 2), "256": (64, 64, 8, 1)},
    },
    # IEEE products are multiply-adds on whole operands in registers
    "float32": {
        "fwd": {"narrow": (64, 32, 8, 2), "128": (32, 16, 8, 1), "256": (16, 16, 8, 1)},
        "dkdv": {"narrow": (32, 32, 8, 1), "128": (16, 32, 8, 1), "256": (16, 16, 8, 1)},
        "dq": {"narrow": (32, 32, 8, 1), "128": (16, 16, 8, 1), "256": (16, 16, 8, 1)},
    },
}


def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    out = _dense_like(q)
    _forward(q, k, v, out, None, causal, scale, window_left, window_right, softcap)
    return out


def flash_attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = flash_attn_fwd_fake(q, k, v, causal, scale, window_left, window_right, softcap)
    _forward(q, k, v, out, lse, causal, scale, window_left, window_right, softcap)
    return out, lse


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
) -> None:
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    B, H, Sq, D = q.shape
    Skv = k.shape[2]
    block_d = max(16, next_power_of_2(D))
    left, right = _bounds(Sq, Skv, causal, window_left, window_right)
    block_m, block_n, num_warps, num_stages = _config("fwd", q.dtype, D, softcap, left, capability(q.device))
    launch(
        _flash_attn_fwd_kernel,
        (cdiv(Sq, block_m) * B * H,),
        *(q, k, v, out, lse),
        *(Sq, Skv, H, B * H, left, right),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        num_warps=num_warps,
        num_stages=num_stages,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        **_constexprs(q, k, scale, softcap, left, right, block_d),
    )


def flash_attn_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = flash_attn_bwd_fake(dout, q, k, v, out, lse, causal, scale, window_left, window_right, softcap, needs)
    dout, q, k, v, out = map(_unit_last_stride, (dout, q, k, v, out))
    B, H, Sq, D = q.shape
    Hkv, Skv = k.shape[1], k.shape[2]
    block_d = max(16, next_power_of_2(D))
    target = capability(q.device)
    left, right = _bounds(Sq, Skv, causal, window_left, window_right)
    constexprs = _constexprs(q, k, scale, softcap, left, right, block_d)
    strides = (*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])

    padded = cdiv(Sq, _ROW_PADDING) * _ROW_PADDING
    rows = q.new_empty((2, B * H, padded), dtype=torch.float32)  # lse in the unit of the scores, delta
    block_m = 64 if block_d <= 128 else 16
    launch(
        _flash_attn_bwd_rows_kernel,
        (padded // block_m * B * H,),
        *(dout, out, lse.contiguous(), rows, Sq, padded, H, B * H),
        *(*dout.stride()[:3], *out.stride()[:3]),
        num_warps=4,
        HEAD_DIM=D,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
    )
    if needs[1] or needs[2]:
        block_m, block_n, num_warps, num_stages = _config("dkdv", q.dtype, D, softcap, left, target)
        launch(
            _flash_attn_bwd_dkdv_kernel,
            (cdiv(Skv, block_n) * B * Hkv,),
            *(dout, q, k, v, rows, dk if needs[1] else None, dv if needs[2] else None),
            *(Sq, padded, Skv, Hkv, B * Hkv, B * H, left, right, *strides),
            *(*(dk.stride()[:3] if needs[1] else (0, 0, 0)), *(dv.stride()[:3] if needs[2] else (0, 0, 0))),
            num_warps=num_warps,
            num_stages=num_stages,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            **constexprs,
        )
    if needs[0]:
        block_m, block_n, num_warps, num_stages = _config("dq", q.dtype, D, softcap, left, target)
        launch(
            _flash_attn_bwd_dq_kernel,
            (cdiv(Sq, block_m) * B * H,),
            *(dout, q, k, v, rows, dq),
            *(Sq, padded, Skv, H, B * H, left, right, *strides, *dq.stride()[:3]),
            num_warps=num_warps,
            num_stages=num_stages,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            **constexprs,
        )
    return dq, dk, dv


def _constexprs(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, softcap: float, left: int, right: int, block_d: int
) -> dict[str, Any]:
    group = _group(q, k)
    return {
        "SCALE": _scale(q, scale),
        "SOFTCAP": float(softcap),
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HEADS_PER_KV": group,
        "GROUP": 8,
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": block_d,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        # the interpreter multiplies bf16 as if it were uint16
        "UPCAST": INTERPRET and q.dtype == torch.bfloat16,
    }


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _window(causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """(left, right) with causal taken in; -1 where there is no bound."""
    return window_left, 0 if causal else window_right


def _bounds(Sq: int, Skv: int, causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """As `_window`, -1 also for a bound that cuts nothing off: what remains fits 32 bits and costs a mask only where needed."""
    left, right = _window(causal, window_left, window_right)
    return left if 0 <= left < Skv - 1 else -1, right if 0 <= right < Sq - 1 else -1


def _group(q: torch.Tensor, k: torch.Tensor) -> int:
    """Query heads per key head."""
    return q.shape[1] // k.shape[1] if k.shape[1] else 1


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Outputs, and checks
# --------------------------------------------------------------------------------------------------------------------


def _dense_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, shape and dtype of x (B, H, S, D), dense, heads and rows nested as in x. See the module's docstring."""
    B, H, S, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, S, H, D)).transpose(1, 2)
    return x.new_empty((B, H, S, D))


def _dense_copy(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype and memory layout of `_dense_like(x)`; differentiable."""
    value = value.to(x.dtype)
    return value.transpose(1, 2).contiguous().transpose(1, 2) if x.stride(1) < x.stride(2) else value.contiguous()


def flash_attn_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return _dense_like(q)


def flash_attn_fwd_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _dense_like(q), q.new_empty(q.shape[:3], dtype=_arithmetic_dtype(q))


def flash_attn_bwd_fake(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(_dense_like(x) if needed else x.new_empty(0) for x, needed in zip((q, k, v), needs, strict=True))


def flash_attn_check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument("flash_attn", argument, given, allowed, error)

    for name, option in (("alibi_slopes", alibi_slopes), ("attn_bias", attn_bias), ("sinks", sinks)):
        if option is not None:
            bad(name, "given", "None; this option is not implemented", NotImplementedError)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            bad(name, f"of shape {tuple(x.shape)}", "4 dimensions: (batch, heads, length, head size)")
        if x.dtype != q.dtype:
            bad(name, f"of dtype {x.dtype}", f"the dtype of q, {q.dtype}", TypeError)
    B, Hq, _, D = q.shape
    if not 16 <= D <= 256:
        bad("q", f"of shape {tuple(q.shape)}", "a head size (the last dimension) from 16 to 256")
    if k.shape[0] != B or k.shape[3] != D:
        bad("k", f"of shape {tuple(k.shape)}", f"the batch and head size of q, ({B}, heads, length, {D})")
    if v.shape != k.shape:
        bad("v", f"of shape {tuple(v.shape)}", f"the shape of k, {tuple(k.shape)}")
    Hkv = k.shape[1]
    if Hq % Hkv if Hkv else Hq:
        bad("k", f"of shape {tuple(k.shape)}", f"a number of heads that divides q's, {Hq}")
    if scale is not None and not -math.inf < scale < math.inf:
        bad("scale", scale, "a finite number, or None for 1 / sqrt(head size)")
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        if window < -1:
            bad(name, window, "a number of keys >= 0, or -1 for no bound")
    if not 0 <= softcap < math.inf:
        bad("softcap", softcap, "a finite number > 0, or 0 for none")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_forward(
    ctx: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    ctx.options = (causal, scale, window_left, window_right, softcap)
    out, lse = torch.ops.tt.flash_attn_fwd(q, k, v, *ctx.options)
    ctx.save_for_backward(q, k, v, out, lse)
    return out


def flash_attn_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.tt.flash_attn_bwd(dout, *ctx.saved_tensors, *ctx.options, ctx.needs)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def qkv(B: int, Hq: int, Hkv: int, Sq: int, Skv: int, D: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(B, H, S, D, device=device, dtype=dtype) for H, S in ((Hq, Sq), (Hkv, Skv), (Hkv, Skv)))

    # id, (B, Hq, Hkv, Sq, Skv, D), options
    for name, shape, options in [
        ("one_query", (1, 1, 1, 1, 33, 16), {}),
        ("square", (1, 2, 2, 64, 64, 32), {}),
        ("odd", (2, 1, 1, 37, 91, 16), {}),
        ("causal", (1, 2, 2, 130, 130, 32), {"causal": True}),
        ("causal_long_q", (1, 1, 1, 70, 33, 16), {"causal": True}),  # the first 37 queries see nothing
        ("causal_long_kv", (1, 1, 1, 33, 130, 16), {"causal": True}),
        ("causal_one_query", (2, 2, 1, 1, 65, 16), {"causal": True}),
        ("gqa", (2, 4, 2, 33, 47, 32), {"causal": True}),
        ("mqa", (1, 3, 1, 40, 40, 16), {}),
        ("D40", (1, 1, 1, 35, 50, 40), {"causal": True}),
        ("D17", (1, 2, 1, 20, 33, 17), {}),
        ("scale", (1, 1, 1, 40, 40, 16), {"scale": 0.3}),
        ("scale_negative", (1, 1, 1, 40, 70, 16), {"scale": -0.1, "causal": True}),
        ("scale_zero", (1, 1, 1, 40, 40, 16), {"scale": 0.0, "causal": True}),
        ("window", (1, 2, 1, 130, 130, 16), {"window_left": 20, "window_right": 9}),
        ("window_causal", (1, 1, 1, 100, 130, 16), {"window_left": 17, "causal": True}),
        ("window_left_only", (1, 1, 1, 130, 100, 16), {"window_left": 0}),
        ("window_right_only", (1, 1, 1, 70, 100, 16), {"window_right": 40}),
        ("window_two_keys", (1, 1, 1, 40, 40, 16), {"window_left": 1, "window_right": 0}),
        ("window_huge", (1, 1, 1, 40, 40, 16), {"window_left": 2**31 - 1, "window_right": 2**31 - 1}),
        ("softcap", (1, 2, 1, 40, 70, 16), {"softcap": 2.0, "causal": True}),
        ("softcap_window", (1, 1, 1, 66, 66, 16), {"softcap": 30.0, "window_left": 9}),
        ("empty_batch", (0, 2, 1, 5, 7, 16), {}),
        ("empty_q", (1, 2, 1, 0, 7, 16), {"causal": True}),
        ("empty_kv", (1, 2, 1, 5, 0, 16), {}),
        ("no_heads", (1, 0, 0, 5, 7, 16), {}),
    ]:
        yield Sample(name, qkv(*shape), options)
    for name, shape, options in [
        ("D64_causal", (2, 4, 4, 300, 300, 64), {"causal": True}),
        ("D80", (1, 2, 1, 200, 257, 80), {}),
        ("D96_gqa", (1, 4, 2, 257, 257, 96), {"causal": True}),
        ("D128", (2, 4, 4, 384, 384, 128), {}),
        ("D128_gqa_causal", (2, 8, 2, 515, 515, 128), {"causal": True}),
        ("D128_window_softcap", (1, 4, 2, 700, 700, 128), {"causal": True, "window_left": 200, "softcap": 20.0}),
        ("D192", (1, 2, 2, 190, 310, 192), {"causal": True}),
        ("D256", (1, 4, 1, 320, 400, 256), {"causal": True}),
    ]:
        yield Sample(name, qkv(*shape), options, slow_in_interpreter=True)

    B, H, S, D = 2, 3, 37, 16
    transposed = [torch.randn(B, S, H, D, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    yield Sample("strides_bshd", tuple(transposed), {"causal": True})
    packed = torch.randn(B, S, 3, H, D, device=device, dtype=dtype)
    yield Sample("strides_packed_qkv", tuple(x.transpose(1, 2) for x in packed.unbind(2)), {"causal": True})
    q, k, v = qkv(1, 2, 2, S, S, D)
    # no expanded keys or values: equal rows make the true gradients 0, where only rounding is left to compare
    yield Sample("strides_expanded", (q[:, :, :1].expand_as(q), k[:, :1].expand_as(k), v[:, :1].expand_as(v)))
    wide = torch.randn(3, 1, 2, S + 1, 2 * D + 1, device=device, dtype=dtype)[:, :, :, 1:, 1 : D + 1]  # misaligned rows
    yield Sample("strides_sliced", tuple(wide))
    yield Sample("strides_last", tuple(x.mT.contiguous().mT for x in (q, k, v)))


def flash_attn_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    q = torch.randn(2, 4, 5, 16, device=device)
    k, v = torch.randn(2, 2, 2, 7, 16, device=device)
    yield ErrorSample("rank", (q[0], k, v), match=r"flash_attn.*'q'.*\(4, 5, 16\).*4 dimensions")
    yield ErrorSample("dtypes", (q, k, v.half()), error=TypeError, match="flash_attn.*'v'.*float16.*float32")
    yield ErrorSample("head_size_small", (q[..., :8], k[..., :8], v[..., :8]), match="flash_attn.*'q'.*16 to 256")
    wide = torch.randn(1, 1, 2, 257, device=device)
    yield ErrorSample("head_size_large", (wide, wide, wide), match="flash_attn.*'q'.*257.*16 to 256")
    yield ErrorSample("batch", (q[:1], k, v), match=r"flash_attn.*'k'.*\(2, 2, 7, 16\).*batch")
    yield ErrorSample("k_v_shapes", (q, k, v[:, :, :6]), match=r"flash_attn.*'v'.*\(2, 2, 6, 16\).*\(2, 2, 7, 16\)")
    yield ErrorSample("heads", (q[:, :3], k, v), match="flash_attn.*'k'.*divides q's, 3")
    yield ErrorSample("no_key_heads", (q, k[:, :0], v[:, :0]), match="flash_attn.*'k'.*divides q's, 4")
    yield ErrorSample("scale_nan", (q, k, v), {"scale": math.nan}, match="flash_attn.*'scale'.*nan.*finite")
    yield ErrorSample("window_left", (q, k, v), {"window_left": -2}, match="flash_attn.*'window_left'.*-2.*>= 0")
    yield ErrorSample("window_right", (q, k, v), {"window_right": -7}, match="flash_attn.*'window_right'.*-7.*>= 0")
    yield ErrorSample("softcap", (q, k, v), {"softcap": -1.0}, match="flash_attn.*'softcap'.*-1.0")
    for name, shape in (("alibi_slopes", (4,)), ("attn_bias", (2, 4, 5, 7)), ("sinks", (4,))):
        options = {name: torch.ones(shape, device=device)}
        yield ErrorSample(name, (q, k, v), options, NotImplementedError, f"flash_attn.*'{name}'.*not implemented")


def flash_attn_bench_cases() -> Iterator[BenchCase]:
    for B, Hq, Hkv, S, D, causal in [
        (4, 32, 32, 4096, 128, False),
        (4, 32, 32, 4096, 128, True),
        (4, 32, 8, 4096, 128, True),
        (1, 32, 8, 16384, 128, True),
        (16, 32, 32, 1024, 128, True),
        (4, 32, 32, 4096, 64, True),
        (32, 16, 16, 512, 64, False),
        (2, 16, 16, 8192, 256, True),
    ]:

        def make(
            device: torch.device | str,
            dtype: torch.dtype,
            sizes: tuple[tuple[int, ...], ...] = ((B, Hq, S, D), (B, Hkv, S, D), (B, Hkv, S, D)),
            causal: bool = causal,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(torch.randn(size, device=device, dtype=dtype) for size in sizes), {"causal": causal}

        heads = f"h{Hq}" if Hq == Hkv else f"h{Hq}/{Hkv}"
        yield BenchCase(f"b{B}_{heads}_s{S}_d{D}_{'causal' if causal else 'full'}", make, passes=("fwd", "bwd"))


def flash_attn_cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Cost:
    B, H, Sq, D = q.shape
    flops = 4 * B * H * D * _visible_pairs(Sq, k.shape[2], causal, window_left, window_right)
    forward = 2 * q.numel() + k.numel() + v.numel()  # q, k, v; out
    backward = 4 * q.numel() + 2 * (k.numel() + v.numel())  # q, k, v, out, dout; dq, dk, dv
    itemsize = q.element_size()
    return Cost(flops, forward * itemsize, flops * 5 // 2, backward * itemsize)


def _visible_pairs(Sq: int, Skv: int, causal: bool, window_left: int, window_right: int) -> int:
    """How many pairs (query, key) see each other."""
    left, right = _window(causal, window_left, window_right)

    def below(n: int) -> int:
        """Sum of min(t, Skv) for 0 <= t < n."""
        n = max(n, 0)
        ramp = min(n, Skv + 1)
        return ramp * (ramp - 1) // 2 + (n - ramp) * Skv

    def keys_before(shift: int) -> int:
        """How many pairs (i, j) have j < p(i) + shift."""
        return below(Skv + shift) - below(Skv - Sq + shift)

    pairs = keys_before(right + 1) if right >= 0 else Sq * Skv
    return pairs - keys_before(-left) if left >= 0 else pairs
