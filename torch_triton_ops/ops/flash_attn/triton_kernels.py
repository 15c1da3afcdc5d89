"""The portable path: attention in Triton, for every GPU from sm_80 up, for float32 and for every option.

`forward` and `backward` launch it. Arguments are those of the package's docstring, with the window already reduced to two
bounds: query i, whose place among the keys is p(i) = i + Skv - Sq, sees the keys j of p(i) - left <= j <= p(i) + right; -1 is
no bound.

The backward is three kernels: one reduces each query's row to two numbers, one owns dk and dv, one owns dq. So nothing is
added atomically, and results repeat bit for bit. In float32 the last runs once more, before the others, for more exact rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from torch_triton_ops.launch import INTERPRET, capability, cdiv, launch, next_power_of_2
from torch_triton_ops.special import INTERPRETED, exp_fp32

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
def _load_columns(
    x_ptr, start, stride_xs, S, column, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns column .. column + BLOCK of the rows that `_load_rows` loads: (BLOCK_S, BLOCK)."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = column + tl.arange(0, BLOCK)
    ptrs = x_ptr + tl.cast(start, tl.int64) * stride_xs + (offs_s[:, None] * stride_xs + offs_d[None, :])
    return tl.load(ptrs, mask=((start + offs_s) < S)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _rounded(x, TO_BF16: tl.constexpr):
    """x; for the interpreter, whose cast to bf16 truncates, rounded to it to nearest even."""
    if TO_BF16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _store_rows(
    x_ptr, x, start, stride_xs, S, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + tl.cast(start, tl.int64) * stride_xs + (offs_s[:, None] * stride_xs + offs_d[None, :])
    mask = ((start + offs_s) < S)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, _rounded(x, UPCAST).to(x_ptr.dtype.element_ty), mask=mask)


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
def _distance(start_m, start_n, i, j, Sq, Skv):
    """How far query start_m + i stands from key start_n + j, for indices i and j that broadcast. Exact up to 2**24."""
    return tl.abs((start_m + (Skv - Sq) + i).to(tl.float32) - (start_n + j).to(tl.float32))


@triton.jit
def _add_terms(
    s, slope, bias_ptr, start_m, start_n, i, j, Sq, Skv, stride_bm, stride_bn,
    HAS_ALIBI: tl.constexpr, MASKED: tl.constexpr, LOG2E: tl.constexpr
):  # fmt: skip
    """Scores s, in the unit of `_exp`, with ALiBi and bias. i, j: rows of queries and keys within their blocks, as they lie in s.

    MASKED: keys may lie beyond Skv.
    """
    if HAS_ALIBI:
        s -= slope * _distance(start_m, start_n, i, j, Sq, Skv)
    if bias_ptr is not None:
        bias_ptr += tl.cast(start_m, tl.int64) * stride_bm + tl.cast(start_n, tl.int64) * stride_bn
        mask = (start_m + i) < Sq
        if MASKED:
            mask = mask & ((start_n + j) < Skv)
        s += tl.load(bias_ptr + (i * stride_bm + j * stride_bn), mask=mask, other=0.0).to(tl.float32) * LOG2E
    return s


@triton.jit
def _sequence(start, end):
    """First row and length of one of several packed sequences, from two neighbours of cu_seqlens.

    The kernels load them themselves: torch.compile takes a pointer given to a function that computes an address for written.
    """
    return start.to(tl.int64), (end - start).to(tl.int32)


@triton.jit
def _first_row(q_start, b, h, H, Sq_padded, PACKED: tl.constexpr):
    """Where the rows of one head of one sequence begin in a plane of the backward's rows, padded to 128 (_ROW_PADDING).

    Packed sequences: Sq_padded is the length of all of them, with 128 more for each; every one begins at a multiple of 128.
    """
    if PACKED:
        return h * Sq_padded + (q_start + b * 128) // 128 * 128
    else:
        return (b * H + h) * Sq_padded


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
def _dot_rows(
    a, a_ptr, start_a, stride_a, Sa, b, b_ptr, start_b, stride_b, Sb,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """a @ b.T of two blocks of rows, (BLOCK_A, BLOCK_D) and (BLOCK_B, BLOCK_D), which `_load_rows` loaded.

    IEEE products in fp32 are multiply-adds that hold whole operands in registers. They load the rows again, some columns at a
    time: then the operands fit, and a chain of additions is short, so that it rounds less often.
    """
    if a_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee":
        BLOCK: tl.constexpr = 16
        products = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
        for column in tl.range(0, BLOCK_D, BLOCK, num_stages=1):
            a_part = _load_columns(a_ptr, start_a, stride_a, Sa, column, HEAD_DIM, a.shape[0], BLOCK)
            b_part = _load_columns(b_ptr, start_b, stride_b, Sb, column, HEAD_DIM, b.shape[0], BLOCK)
            # times 1.0: else the compiler goes on with one chain of additions
            products = tl.fma(products, 1.0, tl.dot(a_part, tl.trans(b_part), input_precision=PRECISION))
        return products
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


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
    acc, l, m, q, q_ptr, k_ptr, v_ptr, bias_ptr, slope, start_m, start_n,
    stride_qm, stride_kn, stride_vn, stride_bm, stride_bn, last, first, Sq, Skv,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """One block of keys: the online softmax. m is in the unit of the scores (`_exp`)."""
    k = _load_rows(k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    s = _dot_rows(
        q, q_ptr, start_m, stride_qm, Sq, k, k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_D, PRECISION
    )  # (BLOCK_M, BLOCK_N)
    if SOFTCAP > 0:
        s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32)
    UNIT: tl.constexpr = (SOFTCAP if SOFTCAP > 0 else SCALE) * LOG2E
    if MASKED or HAS_ALIBI or bias_ptr is not None:
        i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        s = _add_terms(
            s * UNIT, slope, bias_ptr, start_m, start_n, i, j, Sq, Skv, stride_bm, stride_bn, HAS_ALIBI, MASKED, LOG2E
        )
        if MASKED:
            visible = (start_n + j) <= last[:, None]
            if HAS_LEFT:
                visible = visible & ((start_n + j) >= first[:, None])
            s = tl.where(visible, s, float("-inf"))
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
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, alibi_ptr, bias_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    Sq, Skv, Tq, H, BH, window_left, window_right,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_ab, stride_bb, stride_bh, stride_bm, stride_bn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries. Packed sequences: Sq and Skv are the longest, Tq the rows of all."""
    HAS_ALIBI: tl.constexpr = alibi_ptr is not None
    b, h, start_m = _head_and_block(tl.program_id(0), Sq, H, BH, GROUP, BLOCK_M, HAS_RIGHT)
    q_start = 0
    k_start = 0
    if cu_q_ptr is not None:
        q_start, Sq = _sequence(tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1))
        k_start, Skv = _sequence(tl.load(cu_k_ptr + b), tl.load(cu_k_ptr + b + 1))
        if start_m >= Sq:
            return
    q_ptr += b * stride_qb + h * stride_qh + q_start * stride_qm
    k_ptr += b * stride_kb + h // HEADS_PER_KV * stride_kh + k_start * stride_kn
    v_ptr += b * stride_vb + h // HEADS_PER_KV * stride_vh + k_start * stride_vn
    out_ptr += b * stride_ob + h * stride_oh + q_start * stride_om
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_ptr + b * stride_ab + h).to(tl.float32) * LOG2E
    if bias_ptr is not None:
        bias_ptr += b * stride_bb + h * stride_bh

    q = _load_rows(q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)  # (BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # as if a key without value had been seen first
        l += 1.0
        m = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E

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
                acc, l, m, q, q_ptr, k_ptr, v_ptr, bias_ptr, slope, start_m, start_n,
                stride_qm, stride_kn, stride_vn, stride_bm, stride_bn, last, first, Sq, Skv, SCALE, SOFTCAP, HAS_LEFT, HAS_ALIBI,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False, LOG2E, PRECISION, UPCAST,
            )  # fmt: skip
    # blocks on the edge of what is seen, left and right in one loop
    edge = (full_begin - begin) + (end - full_end)
    if edge > 0:
        for i in range(0, edge, BLOCK_N):
            start_n = tl.where(i < full_begin - begin, begin + i, full_end + i - (full_begin - begin))
            acc, l, m = _attend(
                acc, l, m, q, q_ptr, k_ptr, v_ptr, bias_ptr, slope, start_m, start_n,
                stride_qm, stride_kn, stride_vn, stride_bm, stride_bn, last, first, Sq, Skv, SCALE, SOFTCAP, HAS_LEFT, HAS_ALIBI,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True, LOG2E, PRECISION, UPCAST,
            )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)  # nothing was visible: acc is 0 and m is -inf
    acc = acc * (1.0 / l)[:, None]
    _store_rows(out_ptr, acc, start_m, stride_om, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, UPCAST)
    if lse_ptr is not None:
        if q_ptr.dtype.element_ty == tl.float32:
            lse = m + tl.log(l)
        else:
            lse = (m + tl.log2(l)) * 0.6931471805599453
        lse_ptr += (b * H + h) * Sq if cu_q_ptr is None else h * Tq + q_start
        tl.store(lse_ptr + offs_m, lse, mask=offs_m < Sq)


# --------------------------------------------------------------------------------------------------------------------
# Kernels: backward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["Sq", "plane"])
def _flash_attn_bwd_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, rows_ptr, cu_q_ptr,
    Sq, Sq_padded, Tq, H, plane,
    stride_db, stride_dh, stride_dm, stride_ob, stride_oh, stride_om,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """What the backward needs of every query: lse in the unit of the scores (`_exp`), and delta = dot(dout, out).

    Rows beyond Sq, and queries that see nothing, get lse = +inf: then P = exp(score - lse) is 0 without a mask.
    """
    num_blocks = tl.cdiv(Sq, 128) * (128 // BLOCK_M)  # _ROW_PADDING
    bh = tl.program_id(0) // num_blocks
    start_m = tl.program_id(0) % num_blocks * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    q_start = 0
    if cu_q_ptr is not None:
        q_start, Sq = _sequence(tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1))
    out_ptr += b * stride_ob + h * stride_oh + q_start * stride_om
    dout_ptr += b * stride_db + h * stride_dh + q_start * stride_dm
    out = _load_rows(out_ptr, start_m, stride_om, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, True)
    dout = _load_rows(dout_ptr, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, True)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse_ptr += (b * H + h) * Sq if cu_q_ptr is None else h * Tq + q_start
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < Sq, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    rows_ptr += _first_row(q_start, b, h, H, Sq_padded, cu_q_ptr is not None)
    mask_m = offs_m < tl.cdiv(Sq, 128) * 128  # a shorter sequence than the longest ends before
    tl.store(rows_ptr + offs_m, lse, mask=mask_m)
    tl.store(rows_ptr + tl.cast(plane, tl.int64) + offs_m, tl.sum(out * dout, 1), mask=mask_m)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, k_ptr, v_ptr, q_ptr, dout_ptr, rows_ptr, bias_ptr, slope, plane, start_m, start_n,
    stride_kn, stride_vn, stride_qm, stride_dm, stride_bm, stride_bn, first, last, on_edge, Sq, Skv,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """One block of queries. Everything is computed transposed, (BLOCK_N, BLOCK_M), so that no accumulator is transposed."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
    if INTERPRETED:  # norm is the sum of these scores, and numpy, unlike a GPU, rounds a transposed product otherwise
        s = tl.trans(
            _dot_rows(q, q_ptr, start_m, stride_qm, Sq, k, k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_D, PRECISION)
        )  # (BLOCK_N, BLOCK_M)
    else:
        s = _dot_rows(
            k, k_ptr, start_n, stride_kn, Skv, q, q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_D, PRECISION
        )  # (BLOCK_N, BLOCK_M)
    if SOFTCAP > 0:
        s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32)
    UNIT: tl.constexpr = (SOFTCAP if SOFTCAP > 0 else SCALE) * LOG2E
    score = _add_terms(
        s * UNIT, slope, bias_ptr, start_m, start_n, tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None],
        Sq, Skv, stride_bm, stride_bn, HAS_ALIBI, True, LOG2E,
    )  # fmt: skip
    p = _exp(q_ptr, score - tl.load(rows_ptr + offs_m)[None, :])
    if q_ptr.dtype.element_ty == tl.float32:
        p *= tl.load(rows_ptr + 2 * plane + offs_m)[None, :]
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
        dp = _dot_rows(
            v, v_ptr, start_n, stride_vn, Skv, dout, dout_ptr, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_D, PRECISION
        )  # (BLOCK_N, BLOCK_M)
        ds = p * (dp - tl.load(rows_ptr + plane + offs_m)[None, :])
        if SOFTCAP > 0:
            ds = ds * (1.0 - s * s)
        dk = _dot_add(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["Sq", "Skv", "BH", "plane", "window_left", "window_right"])
def _flash_attn_bwd_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, alibi_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, dk_ptr, dv_ptr,
    Sq, Sq_padded, Skv, H, BH, plane, window_left, window_right,
    stride_db, stride_dh, stride_dm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ab, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, summed over the query heads that share it; either may be None. H, BH count key heads."""
    NEEDS_DK: tl.constexpr = dk_ptr is not None
    NEEDS_DV: tl.constexpr = dv_ptr is not None
    HAS_ALIBI: tl.constexpr = alibi_ptr is not None
    b, h, start_n = _head_and_block(tl.program_id(0), Skv, H, BH, GROUP, BLOCK_N, False)
    q_start = 0
    k_start = 0
    if cu_q_ptr is not None:
        q_start, Sq = _sequence(tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1))
        k_start, Skv = _sequence(tl.load(cu_k_ptr + b), tl.load(cu_k_ptr + b + 1))
        if start_n >= Skv:
            return
    # rows beyond Skv are computed from zeros and not stored; nothing else depends on them
    k_ptr += b * stride_kb + h * stride_kh + k_start * stride_kn
    v_ptr += b * stride_vb + h * stride_vh + k_start * stride_vn
    k = _load_rows(k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, True, UPCAST)
    v = _load_rows(v_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, True, UPCAST)
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
    plane = tl.cast(plane, tl.int64)
    for g in range(HEADS_PER_KV):
        hq = h * HEADS_PER_KV + g
        q_head_ptr = q_ptr + b * stride_qb + hq * stride_qh + q_start * stride_qm
        dout_head_ptr = dout_ptr + b * stride_db + hq * stride_dh + q_start * stride_dm
        rows_head_ptr = rows_ptr + _first_row(q_start, b, hq, H * HEADS_PER_KV, Sq_padded, cu_q_ptr is not None)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_ptr + b * stride_ab + hq).to(tl.float32) * LOG2E
        bias_head_ptr = bias_ptr
        if bias_ptr is not None:
            bias_head_ptr += b * stride_bb + hq * stride_bh
        if begin < end:
            for start_m in range(begin, end, BLOCK_M):
                start_m = tl.multiple_of(start_m, BLOCK_M)
                on_edge = (start_m < full_begin) | (start_m >= full_end)
                dk, dv = _dkdv_step(
                    dk, dv, k, v, k_ptr, v_ptr, q_head_ptr, dout_head_ptr, rows_head_ptr, bias_head_ptr,
                    slope, plane, start_m, start_n,
                    stride_kn, stride_vn, stride_qm, stride_dm, stride_bm, stride_bn, first, last, on_edge, Sq, Skv,
                    SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_ALIBI, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                    NEEDS_DK, NEEDS_DV, LOG2E, PRECISION, UPCAST,
                )  # fmt: skip
    if NEEDS_DK:
        dk_ptr += b * stride_dkb + h * stride_dkh + k_start * stride_dkn
        _store_rows(dk_ptr, dk * SCALE, start_n, stride_dkn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, UPCAST)
    if NEEDS_DV:
        dv_ptr += b * stride_dvb + h * stride_dvh + k_start * stride_dvn
        _store_rows(dv_ptr, dv, start_n, stride_dvn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, UPCAST)


@triton.jit
def _dq_step(
    acc, total, q, dout, q_ptr, dout_ptr, lse, delta, norm, k_ptr, v_ptr, bias_ptr, slope, start_m, start_n,
    stride_qm, stride_dm, stride_kn, stride_vn, stride_bm, stride_bn, last, first, Sq, Skv,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ONLY_ROWS: tl.constexpr, NEEDS_DALIBI: tl.constexpr
):  # fmt: skip
    """One block of keys, added to dq (BLOCK_M, BLOCK_D) and the slope's gradient, or to the rows' sums of P * dP and of P."""
    k = _load_rows(k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    s = _dot_rows(
        q, q_ptr, start_m, stride_qm, Sq, k, k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_D, PRECISION
    )  # (BLOCK_M, BLOCK_N)
    if SOFTCAP > 0:
        s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32)
    UNIT: tl.constexpr = (SOFTCAP if SOFTCAP > 0 else SCALE) * LOG2E
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    score = _add_terms(
        s * UNIT, slope, bias_ptr, start_m, start_n, i, j, Sq, Skv, stride_bm, stride_bn, HAS_ALIBI, MASKED, LOG2E
    )
    p = _exp(k_ptr, score - lse[:, None])
    if MASKED:
        visible = (start_n + j) <= last[:, None]
        if HAS_LEFT:
            visible = visible & ((start_n + j) >= first[:, None])
        p = tl.where(visible, p, 0.0)
    v = _load_rows(v_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, UPCAST)
    dp = _dot_rows(
        dout, dout_ptr, start_m, stride_dm, Sq, v, v_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_D, PRECISION
    )  # (BLOCK_M, BLOCK_N)
    if ONLY_ROWS:
        return acc + tl.sum(p * dp, 1), total + tl.sum(p, 1)
    else:
        if k_ptr.dtype.element_ty == tl.float32:
            p *= norm[:, None]
        ds = p * (dp - delta[:, None])
        if NEEDS_DALIBI:
            total -= tl.sum(ds * _distance(start_m, start_n, i, j, Sq, Skv), 1)
        if SOFTCAP > 0:
            ds = ds * (1.0 - s * s)
        return _dot_add(ds.to(k.dtype), k, acc, PRECISION), total


@triton.jit(do_not_specialize=["Sq", "Skv", "BH", "plane", "window_left", "window_right"])
def _flash_attn_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, alibi_ptr, bias_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, dq_ptr, dalibi_ptr,
    Sq, Sq_padded, Skv, H, BH, plane, window_left, window_right,
    stride_db, stride_dh, stride_dm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ab, stride_bb, stride_bh, stride_bm, stride_bn, stride_dqb, stride_dqh, stride_dqm,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ONLY_ROWS: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: the forward's loop over the keys. ONLY_ROWS: two sums over the keys instead.

    The sum of P * dP is delta, too, but dP - delta then cancels as exactly as in eager attention. The sum of P, with the
    sink's, is 1 but for the rounding of lse, which grows with the scores and is common to a row: in fp32 1 / sum takes it back.

    dalibi_ptr, a plane like those of rows, gets each query's part of the slope's gradient.
    """
    HAS_ALIBI: tl.constexpr = alibi_ptr is not None
    NEEDS_DALIBI: tl.constexpr = dalibi_ptr is not None
    b, h, start_m = _head_and_block(tl.program_id(0), Sq, H, BH, GROUP, BLOCK_M, HAS_RIGHT)
    q_start = 0
    k_start = 0
    if cu_q_ptr is not None:
        q_start, Sq = _sequence(tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1))
        k_start, Skv = _sequence(tl.load(cu_k_ptr + b), tl.load(cu_k_ptr + b + 1))
        if start_m >= Sq:
            return
    k_ptr += b * stride_kb + h // HEADS_PER_KV * stride_kh + k_start * stride_kn
    v_ptr += b * stride_vb + h // HEADS_PER_KV * stride_vh + k_start * stride_vn
    q_ptr += b * stride_qb + h * stride_qh + q_start * stride_qm
    dout_ptr += b * stride_db + h * stride_dh + q_start * stride_dm
    q = _load_rows(q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
    dout = _load_rows(dout_ptr, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_ptr + b * stride_ab + h).to(tl.float32) * LOG2E
    if bias_ptr is not None:
        bias_ptr += b * stride_bb + h * stride_bh
    offs_m = start_m + tl.arange(0, BLOCK_M)
    first_row = _first_row(q_start, b, h, H, Sq_padded, cu_q_ptr is not None)
    rows_ptr += first_row
    plane = tl.cast(plane, tl.int64)
    lse = tl.load(rows_ptr + offs_m)
    delta = tl.load(rows_ptr + plane + offs_m)
    norm = delta
    if q_ptr.dtype.element_ty == tl.float32 and not ONLY_ROWS:
        norm = tl.load(rows_ptr + 2 * plane + offs_m)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if ONLY_ROWS:
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
            acc, total = _dq_step(
                acc, total, q, dout, q_ptr, dout_ptr, lse, delta, norm, k_ptr, v_ptr, bias_ptr, slope, start_m, start_n,
                stride_qm, stride_dm, stride_kn, stride_vn, stride_bm, stride_bn, last, first, Sq, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HAS_ALIBI,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False, LOG2E, PRECISION, UPCAST, ONLY_ROWS, NEEDS_DALIBI,
            )  # fmt: skip
    edge = (full_begin - begin) + (end - full_end)
    if edge > 0:
        for i in range(0, edge, BLOCK_N):
            start_n = tl.where(i < full_begin - begin, begin + i, full_end + i - (full_begin - begin))
            acc, total = _dq_step(
                acc, total, q, dout, q_ptr, dout_ptr, lse, delta, norm, k_ptr, v_ptr, bias_ptr, slope, start_m, start_n,
                stride_qm, stride_dm, stride_kn, stride_vn, stride_bm, stride_bn, last, first, Sq, Skv,
                SCALE, SOFTCAP, HAS_LEFT, HAS_ALIBI,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True, LOG2E, PRECISION, UPCAST, ONLY_ROWS, NEEDS_DALIBI,
            )  # fmt: skip
    if ONLY_ROWS:
        if sinks_ptr is not None:
            total += _exp(q_ptr, tl.load(sinks_ptr + h).to(tl.float32) * LOG2E - lse)
        total = tl.where(total == 0.0, 1.0, total)  # 0: the query sees nothing
        tl.store(rows_ptr + plane + offs_m, tl.div_rn(acc, total), mask=offs_m < Sq)
        tl.store(rows_ptr + 2 * plane + offs_m, tl.div_rn(1.0, total))  # within the padding
    else:
        if NEEDS_DALIBI:
            tl.store(dalibi_ptr + first_row + offs_m, total)
        dq_ptr += b * stride_dqb + h * stride_dqh + q_start * stride_dqm
        _store_rows(dq_ptr, acc * SCALE, start_m, stride_dqm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, UPCAST)


@triton.jit(do_not_specialize=["Sq", "Skv", "B", "plane", "window_left", "window_right"])
def _flash_attn_bwd_dbias_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, alibi_ptr, bias_ptr, dbias_ptr,
    Sq, Sq_padded, Skv, B, H, plane, window_left, window_right,
    stride_db, stride_dh, stride_dm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ab, stride_bb, stride_bh, stride_bm, stride_bn,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG2E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient, summed in order over the dimensions (SUM_*) along which the bias was broadcast."""
    HAS_ALIBI: tl.constexpr = alibi_ptr is not None
    heads = 1 if SUM_H else H
    rows = 1 if SUM_M else Sq
    columns = 1 if SUM_N else Skv
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % tiles_n * BLOCK_N
    tile_m = pid // tiles_n % tiles_m * BLOCK_M
    bias_bh = pid // tiles_n // tiles_m
    b_begin, h_begin = bias_bh // heads, bias_bh % heads
    b_end, h_end, m_end = b_begin + 1, h_begin + 1, tile_m + 1
    if SUM_B:
        b_begin, b_end = 0, B
    if SUM_H:
        h_begin, h_end = 0, H
    if SUM_M:
        m_end = Sq
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    plane = tl.cast(plane, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b_small in range(b_begin, b_end):
        for h_small in range(h_begin, h_end):
            b, h = tl.cast(b_small, tl.int64), tl.cast(h_small, tl.int64)
            q_head_ptr = q_ptr + b * stride_qb + h * stride_qh
            dout_head_ptr = dout_ptr + b * stride_db + h * stride_dh
            k_head_ptr = k_ptr + b * stride_kb + h // HEADS_PER_KV * stride_kh
            v_head_ptr = v_ptr + b * stride_vb + h // HEADS_PER_KV * stride_vh
            rows_head_ptr = rows_ptr + (b * H + h) * Sq_padded
            bias_head_ptr = bias_ptr + b * stride_bb + h * stride_bh
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(alibi_ptr + b * stride_ab + h).to(tl.float32) * LOG2E
            for start_m in range(tile_m, m_end, BLOCK_M):
                # the keys that this block of queries meets: all of them, or those of the tile
                first_place = start_m + (Skv - Sq)
                last_place = tl.minimum(start_m + BLOCK_M, Sq) - 1 + (Skv - Sq)
                begin, _, _, end = _blocks(
                    first_place, last_place, Skv, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
                )
                if not SUM_N:
                    begin, end = tl.maximum(begin, tile_n), tl.minimum(end, tile_n + BLOCK_N)
                if begin < end:
                    q = _load_rows(q_head_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
                    dout = _load_rows(dout_head_ptr, start_m, stride_dm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True, UPCAST)
                    offs_m = start_m + tl.arange(0, BLOCK_M)
                    lse = tl.load(rows_head_ptr + offs_m)
                    delta = tl.load(rows_head_ptr + plane + offs_m)
                    for start_n in range(begin, end, BLOCK_N):
                        k = _load_rows(k_head_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, True, UPCAST)
                        s = _dot_rows(
                            q, q_head_ptr, start_m, stride_qm, Sq, k, k_head_ptr, start_n, stride_kn, Skv,
                            HEAD_DIM, BLOCK_D, PRECISION,
                        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
                        if SOFTCAP > 0:
                            s = _tanh(s * (SCALE / SOFTCAP), q.dtype == tl.float32) * (SOFTCAP * LOG2E)
                        else:
                            s = s * (SCALE * LOG2E)
                        s = _add_terms(
                            s, slope, bias_head_ptr, start_m, start_n, i, j, Sq, Skv, stride_bm, stride_bn,
                            HAS_ALIBI, True, LOG2E,
                        )  # fmt: skip
                        p = _exp(q_ptr, s - lse[:, None])
                        if q_ptr.dtype.element_ty == tl.float32:
                            p *= tl.load(rows_head_ptr + 2 * plane + offs_m)[:, None]
                        visible = (start_n + j) < Skv
                        place = start_m + (Skv - Sq) + i
                        if HAS_RIGHT:
                            visible = visible & ((start_n + j) <= place + window_right)
                        if HAS_LEFT:
                            visible = visible & ((start_n + j) >= place - window_left)
                        v = _load_rows(v_head_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, True, UPCAST)
                        dp = _dot_rows(
                            dout, dout_head_ptr, start_m, stride_dm, Sq, v, v_head_ptr, start_n, stride_vn, Skv,
                            HEAD_DIM, BLOCK_D, PRECISION,
                        )  # fmt: skip
                        acc += tl.where(visible, p * (dp - delta[:, None]), 0.0)
    if SUM_M:
        acc = tl.sum(acc, 0, keep_dims=True)
        i = tl.arange(0, 1)[:, None]
    if SUM_N:
        acc = tl.sum(acc, 1, keep_dims=True)
        j = tl.arange(0, 1)[None, :]
    row = bias_bh.to(tl.int64) * rows + tile_m + i
    mask = ((tile_m + i) < rows) & ((tile_n + j) < columns)
    tl.store(dbias_ptr + row * columns + tile_n + j, _rounded(acc, ROUND).to(dbias_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["Sq", "plane"])
def _flash_attn_bwd_heads_kernel(
    rows_ptr, dalibi_ptr, sinks_ptr, cu_q_ptr, sums_ptr,
    Sq, Sq_padded, H, plane,
    BLOCK_M: tl.constexpr, LOG2E: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Gradient of one head's slope or, with sinks, sink, of one sequence: a sum over its queries. FP32: of q."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_start = 0
    if cu_q_ptr is not None:
        q_start, Sq = _sequence(tl.load(cu_q_ptr + b), tl.load(cu_q_ptr + b + 1))
    first_row = _first_row(q_start, b, h, H, Sq_padded, cu_q_ptr is not None)
    plane = tl.cast(plane, tl.int64)
    rows_ptr += first_row
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
    else:
        dalibi_ptr += first_row
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start_m in range(0, Sq, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < Sq
        if sinks_ptr is not None:
            x = sink - tl.load(rows_ptr + offs_m, mask=mask_m, other=float("inf"))
            p = exp_fp32(x) if FP32 else tl.exp2(x)
            if FP32:
                p *= tl.load(rows_ptr + 2 * plane + offs_m, mask=mask_m, other=0.0)
            acc -= p * tl.load(rows_ptr + plane + offs_m, mask=mask_m, other=0.0)
        else:
            acc += tl.load(dalibi_ptr + offs_m, mask=mask_m, other=0.0)
    tl.store(sums_ptr + bh, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["B", "H"])
def _flash_attn_bwd_batches_kernel(
    sums_ptr, out_ptr, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ROUND: tl.constexpr
):
    """Sum (B, H) over the sequences, in out's dtype."""
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    acc = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for start_b in range(0, B, BLOCK_B):
        offs_b = start_b + tl.arange(0, BLOCK_B)[:, None]
        acc += tl.load(sums_ptr + offs_b * H + offs_h, mask=(offs_b < B) & (offs_h < H), other=0.0)
    out = _rounded(tl.sum(acc, 0, keep_dims=True), ROUND).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_h, out, mask=offs_h < H)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------

# The backward's per-query rows are padded to this multiple, so that no block of queries reads beyond them.
_ROW_PADDING = 128

# Heads whose blocks run side by side (`_head_and_block`).
_GROUP = 8


def _config(kernel: str, x: torch.Tensor, crowd: str) -> dict[str, int]:
    """Tile and launch options for kernel "fwd", "dkdv", "dq" or "dbias": the largest tiles that compile without a spill.

    crowd: which options need registers of their own, a key of _SUFFIXES.

    Eight warps also where four would do: some 4-warp products were miscompiled for SM90.
    """
    block_d = max(16, next_power_of_2(x.shape[-1]))
    width = "narrow" if block_d <= 64 else "128" if block_d == 128 else "256"
    if x.dtype == torch.float32:
        kind = "float32"
    else:
        kind = "sm90" if capability(x.device) == 90 else "portable"
    configs = _CONFIGS[kind][kernel]
    found = next(configs[width + suffix] for suffix in _SUFFIXES[crowd] if width + suffix in configs)
    block_m, block_n, num_warps, num_stages = found
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


# The entries of _CONFIGS that serve each crowd, the best first.
_SUFFIXES = {
    "": ("",),
    "crowded": (" crowded", ""),
    "packed": (" packed", " crowded", ""),
    "packed crowded": (" packed crowded", " packed", " crowded", ""),
    "bias": (" bias", " crowded", ""),
    "bias crowded": (" bias crowded", " bias", " crowded", ""),
}

_CONFIGS: dict[str, dict[str, dict[str, tuple[int, int, int, int]]]] = {
    "sm90": {
        "fwd": {
            "narrow": (128, 128, 8, 2),
            "narrow packed": (128, 64, 8, 2),
            "narrow bias": (128, 64, 8, 2),
            "128": (128, 128, 8, 2),
            "128 crowded": (128, 64, 8, 2),
            "128 bias": (128, 32, 8, 1),
            "128 bias crowded": (64, 32, 8, 2),
            "256": (128, 32, 8, 2),
            "256 bias": (64, 32, 8, 2),
            "256 bias crowded": (64, 16, 8, 2),
        },
        "dkdv": {
            "narrow": (64, 128, 8, 2),
            "narrow crowded": (32, 128, 8, 2),
            "128": (32, 128, 8, 2),
            "128 crowded": (32, 64, 8, 2),
            "128 bias": (32, 32, 8, 2),
            "256": (32, 32, 8, 1),
        },
        "dq": {
            "narrow": (128, 64, 8, 2),
            "128": (128, 64, 8, 2),
            "128 bias": (64, 64, 8, 2),
            "128 bias crowded": (64, 32, 8, 2),
            "256": (64, 32, 8, 2),
            "256 bias": (32, 32, 8, 2),
        },
        "dbias": {"narrow": (64, 64, 8, 1), "128": (64, 64, 8, 1), "256": (32, 32, 8, 1)},
    },
    "portable": {
        "fwd": {
            "narrow": (128, 64, 8, 2),
            "narrow bias": (128, 32, 8, 2),
            "128": (128, 64, 8, 2),
            "128 packed crowded": (64, 64, 8, 2),
            "128 bias": (64, 64, 8, 2),
            "128 bias crowded": (64, 32, 8, 2),
            "256": (64, 64, 8, 1),
            "256 bias": (64, 32, 8, 1),
        },
        "dkdv": {
            "narrow": (32, 64, 8, 2),
            "128": (32, 64, 8, 2),
            "128 bias": (32, 32, 8, 2),
            "256": (32, 32, 8, 1),
        },
        "dq": {
            "narrow": (128, 64, 8, 2),
            "narrow bias": (64, 64, 8, 2),
            "128": (64, 64, 8, 2),
            "128 crowded": (32, 64, 8, 2),
            "256": (64, 64, 8, 1),
            "256 bias": (32, 32, 8, 1),
        },
        "dbias": {"narrow": (64, 32, 8, 1), "128": (64, 32, 8, 1), "256": (32, 32, 8, 1)},
    },
    # IEEE products are multiply-adds on whole operands in registers
    "float32": {
        "fwd": {
            "narrow": (64, 32, 8, 2),
            "narrow crowded": (32, 32, 8, 2),
            "128": (32, 16, 8, 1),
            "256": (16, 16, 8, 1),
        },
        "dkdv": {
            "narrow": (32, 32, 8, 1),
            "narrow crowded": (16, 32, 8, 1),
            "128": (16, 32, 8, 1),
            "256": (16, 16, 8, 1),
        },
        "dq": {"narrow": (32, 32, 8, 1), "128": (16, 16, 8, 1), "256": (16, 16, 8, 1)},
        "dbias": {"narrow": (32, 32, 8, 1), "128": (16, 16, 8, 1), "256": (16, 16, 8, 1)},
    },
}


class Packing(NamedTuple):
    """Packed sequences: where they begin, (B + 1,), and the longest length of each."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Options(NamedTuple):
    """What a call asks for besides q, k and v. left, right: the window's two bounds."""

    scale: float
    softcap: float
    left: int
    right: int
    alibi_slopes: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    packing: Packing | None = None


class _Call:
    """The arguments that the kernels of one call share."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> None:
        self.q, self.options = q, options
        self.H, self.Hkv, self.D = q.shape[1], k.shape[1], q.shape[-1]
        self.packed = options.packing is not None
        self.cu: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self.Tq: int | None = None
        if options.packing is not None:
            cu_q, cu_k, self.Sq, self.Skv = options.packing
            self.cu, self.B, self.Tq = (cu_q.contiguous(), cu_k.contiguous()), cu_q.shape[0] - 1, q.shape[0]
        else:
            self.B, self.Sq, self.Skv = q.shape[0], q.shape[2], k.shape[2]
        slopes, bias, sinks = options.alibi_slopes, options.attn_bias, options.sinks
        self.slopes = None if slopes is None else slopes.contiguous()
        self.bias = bias
        self.sinks = None if sinks is None else sinks.contiguous()
        # the batch stride of slopes, then the bias's, 0 where it is broadcast
        self.term_strides = (
            None if slopes is None else self.H if slopes.dim() == 2 else 0,
            *((None,) * 4 if bias is None else _broadcast_strides(bias)),
        )
        self.window = (options.left, options.right)
        crowded = options.softcap > 0 or options.left >= 0 or slopes is not None or next_power_of_2(self.D) != self.D
        self.crowd = " ".join(["bias"] * (bias is not None) + (["crowded"] if crowded else []))
        self.log2e = 1.0 if q.dtype == torch.float32 else 1.4426950408889634

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """Strides of batch, heads and rows of each."""
        found: list[int] = []
        for x in tensors:
            found += (0, x.stride(1), x.stride(0)) if self.packed else x.stride()[:3]
        return tuple(found)

    def constexprs(self, kernel: str) -> dict[str, Any]:
        return {
            **_config(
                kernel, self.q, f"packed {self.crowd}".strip() if self.packed and kernel == "fwd" else self.crowd
            ),
            "SCALE": self.options.scale,
            "SOFTCAP": float(self.options.softcap),
            "HAS_LEFT": bool(self.options.left >= 0),
            "HAS_RIGHT": bool(self.options.right >= 0),
            "HEADS_PER_KV": self.H // self.Hkv if self.Hkv else 1,
            "HEAD_DIM": self.D,
            "LOG2E": self.log2e,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "UPCAST": _rounds(self.q),
        }


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None, options: Options
) -> None:
    """Write out and, unless it is None, lse."""
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    call = _Call(q, k, v, options)
    constexprs = call.constexprs("fwd")
    launch(
        _flash_attn_fwd_kernel,
        (cdiv(call.Sq, constexprs["BLOCK_M"]) * call.B * call.H,),
        *(q, k, v, out, lse, call.slopes, call.bias, call.sinks, *call.cu),
        *(call.Sq, call.Skv, call.Tq, call.H, call.B * call.H, *call.window),
        *call.strides(q, k, v, out),
        *call.term_strides,
        GROUP=_GROUP,
        **constexprs,
    )


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    options: Options,
) -> None:
    """Write those of `gradients` (of q, k, v, alibi_slopes, attn_bias, sinks) that are not None."""
    dq, dk, dv, dalibi, dbias, dsinks = gradients
    dout, q, k, v, out = map(_unit_last_stride, (dout, q, k, v, out))
    call = _Call(q, k, v, options)
    B, H, Hkv, Sq, Skv = call.B, call.H, call.Hkv, call.Sq, call.Skv
    strides = call.strides(dout, q, k, v)
    # The slope's gradient sums P * (dP - delta) times distances, so that a delta of the rounded out would be all that is left.
    fp32 = q.dtype == torch.float32
    exact_rows = fp32 or dalibi is not None

    # One row per query in each plane: lse in the unit of the scores, delta, and with exact rows 1 / (sum of P).
    if call.packed:
        padded = cdiv(q.shape[0], _ROW_PADDING) * _ROW_PADDING + B * _ROW_PADDING
        plane = H * padded
    else:
        padded = cdiv(Sq, _ROW_PADDING) * _ROW_PADDING
        plane = B * H * padded
    rows = q.new_empty((3 if exact_rows else 2, plane), dtype=torch.float32)
    slope_rows = None if dalibi is None else q.new_empty(plane, dtype=torch.float32)
    block_d = max(16, next_power_of_2(call.D))
    block_m = 64 if block_d <= 128 else 16
    launch(
        _flash_attn_bwd_rows_kernel,
        (cdiv(Sq, _ROW_PADDING) * (_ROW_PADDING // block_m) * B * H,),
        *(dout, out, lse.contiguous(), rows, call.cu[0]),
        *(Sq, padded, call.Tq, H, plane),
        *call.strides(dout, out),
        num_warps=4,
        HEAD_DIM=call.D,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        LOG2E=call.log2e,
    )

    def launch_dq(dq: torch.Tensor | None, slope_rows: torch.Tensor | None) -> None:
        constexprs = call.constexprs("dq")
        launch(
            _flash_attn_bwd_dq_kernel,
            (cdiv(Sq, constexprs["BLOCK_M"]) * B * H,),
            *(
                dout,
                q,
                k,
                v,
                rows,
                call.slopes,
                call.bias,
                call.sinks if exact_rows else None,
                *call.cu,
                dq,
                slope_rows,
            ),
            *(Sq, padded, Skv, H, B * H, plane, *call.window),
            *(*strides, *call.term_strides, *((None,) * 3 if dq is None else call.strides(dq))),
            GROUP=_GROUP,
            ONLY_ROWS=dq is None,
            **constexprs,
        )

    if exact_rows:
        launch_dq(None, None)
    if dk is not None or dv is not None:
        constexprs = call.constexprs("dkdv")
        launch(
            _flash_attn_bwd_dkdv_kernel,
            (cdiv(Skv, constexprs["BLOCK_N"]) * B * Hkv,),
            *(dout, q, k, v, rows, call.slopes, call.bias, *call.cu, dk, dv),
            *(Sq, padded, Skv, Hkv, B * Hkv, plane, *call.window),
            *(*strides, *call.term_strides),
            *((None,) * 3 if dk is None else call.strides(dk)),
            *((None,) * 3 if dv is None else call.strides(dv)),
            GROUP=_GROUP,
            **constexprs,
        )
    if dq is not None or dalibi is not None:
        launch_dq(torch.empty_like(q) if dq is None else dq, slope_rows)
    if dbias is not None:
        constexprs = call.constexprs("dbias")
        Bb, Hb, M, N = (1,) * (4 - dbias.dim()) + tuple(dbias.shape)
        tiles = cdiv(M, constexprs["BLOCK_M"]) * cdiv(N, constexprs["BLOCK_N"])
        launch(
            _flash_attn_bwd_dbias_kernel,
            (tiles * Bb * Hb,),
            *(dout, q, k, v, rows, call.slopes, call.bias, dbias),
            *(Sq, padded, Skv, B, H, plane, *call.window),
            *(*strides, *call.term_strides),
            ROUND=_rounds(dbias),
            SUM_B=Bb == 1,
            SUM_H=Hb == 1,
            SUM_M=M == 1,
            SUM_N=N == 1,
            **constexprs,
        )
    for gradient, sinks in ((dalibi, None), (dsinks, call.sinks)):
        if gradient is not None:
            own_rows = slope_rows if sinks is None else None
            sum_over_queries(gradient, rows, own_rows, sinks, call.cu[0], B, H, Sq, padded, plane, fp32)


def sum_over_queries(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    slope_rows: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor | None,
    B: int,
    H: int,
    Sq: int,
    padded: int,
    plane: int,
    fp32: bool,
) -> None:
    """Write the gradient of the slopes, from each query's part of it, or that of the sinks, from rows: planes of `plane` numbers,
    `padded` for each head (see `backward`)."""
    sums = rows.new_empty((B, H))
    launch(
        _flash_attn_bwd_heads_kernel,
        (B * H,),
        *(rows, slope_rows, sinks, cu_q, sums, Sq, padded, H, plane),
        num_warps=4,
        BLOCK_M=1024,
        LOG2E=1.0 if fp32 else 1.4426950408889634,
        FP32=fp32,
    )
    per_batch = gradient.dim() == 2
    columns = B * H if per_batch else H
    launch(
        _flash_attn_bwd_batches_kernel,
        (cdiv(columns, 16),),
        *(sums, gradient, 1 if per_batch else B, columns),
        num_warps=4,
        BLOCK_B=64,
        BLOCK_H=16,
        ROUND=_rounds(gradient),
    )


def _broadcast_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Four strides of x, 0 where it has no such dimension or one of size 1."""
    own = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (0,) * (4 - x.dim()) + tuple(own)


def _rounds(x: torch.Tensor) -> bool:
    """Whether x is what the interpreter neither multiplies (as if it were uint16) nor rounds to."""
    return INTERPRET and x.dtype == torch.bfloat16


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
