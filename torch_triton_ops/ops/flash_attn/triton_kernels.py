"""The portable path: attention in Triton, for every GPU from sm_80 up, for float32 and for every option.

`forward` and `backward` launch it. Arguments are those of the package's docstring, with the window already reduced to two
bounds: query i, whose place among the keys is p(i) = i + Skv - Sq, sees the keys j of p(i) - left <= j <= p(i) + right; -1 is
no bound.

The backward is three kernels: one reduces each query's row to two numbers, one owns dk and dv, one owns dq. So nothing is
added atomically, and results repeat bit for bit. In float32 the last runs once more, before the others, for the second of
those numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.launch import INTERPRET, capability, cdiv, launch, next_power_of_2
from torch_triton_ops.special import exp_fp32

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
    return exp_fp32(x) if x_ptr.dtype.element_ty == tl.float32 else tl.exp2(x)


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
    acc, q, dout, lse, delta, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ONLY_DELTA: tl.constexpr
):  # fmt: skip
    """One block of keys, added to dq (BLOCK_M, BLOCK_D) or to delta (BLOCK_M,)."""
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
    if ONLY_DELTA:
        return acc + tl.sum(p * dp, 1)
    else:
        ds = p * (dp - delta[:, None])
        if SOFTCAP > 0:
            ds = ds * (1.0 - s * s)
        return _dot_add(ds.to(k.dtype), k, acc, PRECISION)


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
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ONLY_DELTA: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: the forward's loop over the keys. ONLY_DELTA: delta = sum of P * dP over the keys instead.

    That sum is dot(dout, out), too, but dP - delta then cancels as exactly as in eager attention: fp32 uses it.
    """
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
    delta_ptr = rows_ptr + tl.cast(BH, tl.int64) * Sq_padded
    delta = tl.load(delta_ptr + offs_m)
    if ONLY_DELTA:
        acc = tl.zeros((BLOCK_M,), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

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
            acc = _dq_step(
                acc, q, dout, lse, delta, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HEAD_DIM, BLOCK_N, BLOCK_D, False, PRECISION, UPCAST, ONLY_DELTA,
            )  # fmt: skip
    edge = (full_begin - begin) + (end - full_end)
    if edge > 0:
        for i in range(0, edge, BLOCK_N):
            start_n = tl.where(i < full_begin - begin, begin + i, full_end + i - (full_begin - begin))
            acc = _dq_step(
                acc, q, dout, lse, delta, k_ptr, v_ptr, start_n, stride_kn, stride_vn, last, first, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HEAD_DIM, BLOCK_N, BLOCK_D, True, PRECISION, UPCAST, ONLY_DELTA,
            )  # fmt: skip
    if ONLY_DELTA:
        tl.store(delta_ptr + offs_m, acc, mask=offs_m < Sq)
    else:
        dq_ptr += b * stride_dqb + h * stride_dqh
        _store_rows(dq_ptr, acc * SCALE, start_m, stride_dqm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, UPCAST)


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


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> None:
    """Write out and, unless it is None, lse."""
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    B, H, Sq, D = q.shape
    Skv = k.shape[2]
    block_d = max(16, next_power_of_2(D))
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


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> None:
    """Write those of dq, dk, dv that are not None."""
    dout, q, k, v, out = map(_unit_last_stride, (dout, q, k, v, out))
    B, H, Sq, D = q.shape
    Hkv, Skv = k.shape[1], k.shape[2]
    block_d = max(16, next_power_of_2(D))
    target = capability(q.device)
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
    block_m, block_n, num_warps, num_stages = _config("dq", q.dtype, D, softcap, left, target)
    dq_options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        **constexprs,
    }
    dq_grid = (cdiv(Sq, block_m) * B * H,)
    if q.dtype == torch.float32:
        launch(
            _flash_attn_bwd_dq_kernel,
            dq_grid,
            *(dout, q, k, v, rows, None),
            *(Sq, padded, Skv, H, B * H, left, right, *strides, 0, 0, 0),
            ONLY_DELTA=True,
            **dq_options,
        )
    if dk is not None or dv is not None:
        block_m, block_n, num_warps, num_stages = _config("dkdv", q.dtype, D, softcap, left, target)
        launch(
            _flash_attn_bwd_dkdv_kernel,
            (cdiv(Skv, block_n) * B * Hkv,),
            *(dout, q, k, v, rows, dk, dv),
            *(Sq, padded, Skv, Hkv, B * Hkv, B * H, left, right, *strides),
            *((0, 0, 0) if dk is None else dk.stride()[:3]),
            *((0, 0, 0) if dv is None else dv.stride()[:3]),
            num_warps=num_warps,
            num_stages=num_stages,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            **constexprs,
        )
    if dq is not None:
        launch(
            _flash_attn_bwd_dq_kernel,
            dq_grid,
            *(dout, q, k, v, rows, dq),
            *(Sq, padded, Skv, H, B * H, left, right, *strides, *dq.stride()[:3]),
            ONLY_DELTA=False,
            **dq_options,
        )


def _constexprs(
    q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float, left: int, right: int, block_d: int
) -> dict[str, Any]:
    return {
        "SCALE": scale,
        "SOFTCAP": float(softcap),
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HEADS_PER_KV": q.shape[1] // k.shape[1] if k.shape[1] else 1,
        "GROUP": 8,
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": block_d,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        # the interpreter multiplies bf16 as if it were uint16
        "UPCAST": INTERPRET and q.dtype == torch.bfloat16,
    }


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
