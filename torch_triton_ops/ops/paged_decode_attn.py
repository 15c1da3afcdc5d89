"""Attention of a few new tokens against a paged key-value cache: one step of decoding, plain or speculative.

out[b, t, h] = sum_j P[j] * v[j],  P = softmax over the visible j of score[j] = scale * dot(q[b, t, h], k[j])

where score is softcap * tanh(score / softcap) if softcap > 0, and key j of sequence b is row j % page of the cache's block
`block_table[b, j // page]`, of key head h // (Hq / Hkv), times `k_scale`; values likewise, times `v_scale`.

`seq_lens[b]` counts the keys of sequence b **with those of the T new tokens**, which `kv_cache_write` has put there before:
new token t stands at p = seq_lens[b] - T + t and sees the keys j <= p, and j >= p - window_left if window_left >= 0. A token
that sees nothing (seq_lens of 0, p < 0) gets zeros.

| argument | shape | dtype |
|---|---|---|
| q | (B, Hq, D), or (B, T, Hq, D) with T from 1 to 8; D from 16 to 256 | float32, float16, bfloat16 |
| k_cache, v_cache | (blocks, page, Hkv, D), page from 16 to 256, Hq a multiple of Hkv | that of q, float8_e4m3fn, float8_e5m2 |
| block_table | (B, pages): the blocks of each sequence, in order | int32, int64 |
| seq_lens | (B,), at most pages * page | int32, int64 |
| k_scale, v_scale | (), (1,) or (Hkv,); required for a float8 cache | float32 |
| out | that of q, contiguous | that of q |

`scale` defaults to 1 / sqrt(D). Any strides. Entries of `block_table` past a sequence's length are never read, nor is the cache
there. A length beyond pages * page is cut to it, since lengths are not read on the host; an entry that names no block of the
cache is not checked either.

How it works. A program owns one key head of one sequence and a range of its keys: the query heads of the group and the new
tokens are the rows of one tile, so that keys and values are read once for all of them. The ranges (splits) of a sequence are
merged by a second kernel in a fixed order, hence the same bits every time. Their number is chosen on the host from B, Hkv, the
table's width and the number of SMs; each program divides its own sequence's length by it, so that short sequences in a wide
table still occupy the GPU, and programs beyond the end return at once. Nothing is read on the host: safe in a CUDA graph.

Bytes: keys and values of every sequence once; the partial results are about 1 % of that. float32 products are IEEE. Those of a
float8 cache are in float16, which holds every float8, except for float32 queries; caches whose last stride is 1, the others even
and D even and above 16, are read by pairs, which is faster.

Forward only. Errors: ValueError, TypeError for shapes, dtypes and options outside the table.

Sources: Kwon et al., PagedAttention, https://arxiv.org/abs/2309.06180; Dao et al., Flash-Decoding,
https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.float8 import MANTISSA, decode_fp8, decode_fp8_pairs
from torch_triton_ops.launch import INTERPRET, aligned, capability, cdiv, launch, next_power_of_2, sm_count
from torch_triton_ops.special import exp_fp32

_MAX_TOKENS = 8

# --------------------------------------------------------------------------------------------------------------------
# The specification: plain torch
# --------------------------------------------------------------------------------------------------------------------


def paged_decode_attn_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    tensors, options = (q, k_cache, v_cache, block_table, seq_lens), (scale, softcap, window_left, k_scale, v_scale)
    return _plain(*tensors, *options, dtype, dtype)


def paged_decode_attn_eager(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """In eager torch, keys, scores and weights rounded to the queries' dtype: the error budget's yardstick."""
    tensors, options = (q, k_cache, v_cache, block_table, seq_lens), (scale, softcap, window_left, k_scale, v_scale)
    return _plain(*tensors, *options, q.dtype, torch.float32)


def _plain(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None,
    softcap: float,
    window_left: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    dtype: torch.dtype,
    softmax_dtype: torch.dtype,
) -> torch.Tensor:
    B, T, Hq, D = _sizes(q)
    Hkv = k_cache.shape[2]
    x = q.reshape(B, T, Hkv, Hq // Hkv, D).to(dtype)
    N = block_table.shape[1] * k_cache.shape[1]
    lengths = seq_lens.long().clamp(0, N)
    keys = torch.arange(N, device=q.device)
    position = lengths[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    visible = keys <= position[..., None]  # (B, T, N)
    if window_left >= 0:
        visible &= keys >= position[..., None] - window_left
    visible = visible[:, :, None, None]
    k, v = (
        _gathered(cache, block_table, keys < lengths[:, None], factor, dtype)
        for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
    )
    score = torch.einsum("bthgd,bnhd->bthgn", x, k) * _scale(q, scale)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    sees_any = visible.any(-1, keepdim=True)
    p = score.to(softmax_dtype).masked_fill(~visible & sees_any, -math.inf).softmax(-1) * sees_any
    return torch.einsum("bthgn,bnhd->bthgd", p.to(dtype), v).to(q.dtype).reshape(q.shape)


def _gathered(
    cache: torch.Tensor, block_table: torch.Tensor, used: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The keys or values of every sequence, (B, N, Hkv, D) in `dtype`; zeros where not `used` (B, N)."""
    blocks, _, Hkv, D = cache.shape
    if blocks == 0 or used.numel() == 0:
        return cache.new_zeros((*used.shape, Hkv, D), dtype=dtype)
    codes = cache.view(torch.uint8) if cache.dtype in MANTISSA else cache  # torch does not index float8
    rows = codes[block_table.long().clamp(0, blocks - 1)].view(cache.dtype).flatten(1, 2)
    rows = rows.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if factor is not None:
        rows = rows * factor.reshape(-1, 1)
    return rows.masked_fill(~used[..., None, None], 0).to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _splits_of(lens_ptr, b, stride_sb, capacity, window_left, T, tile, min_tiles, most):
    """Length of sequence b; first tile of `tile` keys that a new token sees; how many; in how many splits (1 to `most`)."""
    length = tl.minimum(tl.maximum(tl.load(lens_ptr + b * stride_sb), 0), capacity).to(tl.int32)
    first = tl.maximum(length - T - window_left, 0) // tile
    tiles = tl.cdiv(length, tile) - first
    splits = tl.maximum(tl.minimum(tl.cdiv(tiles, min_tiles), most), 1)
    return length, first, tiles, splits


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    """e^x in fp32; else 2^x, for scores that carry the factor log2(e)."""
    if PRECISE:
        return exp_fp32(x)
    else:
        return tl.exp2(x)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    y = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # e^2x = 2^(2 x log2 e); overflow to inf gives 1
    if PRECISE:
        # Near 0 the line above cancels: there a series, whose next term is below an fp32's last bit for |x| < 0.35.
        z = x * x
        near = -0.33333334 + z * (0.13333334 + z * (-0.053968254 + z * (0.021869488 - z * 0.0088632355)))
        y = tl.where(tl.abs(x) < 0.35, x + x * (z * near), y)
    return y


@triton.jit
def _rounded(x, UPCAST: tl.constexpr):
    """The interpreter's cast to bf16 truncates: round to nearest even before it."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _binade(x):
    """The power of two 2^e <= x < 2^(e+1), and its inverse."""
    field = x.to(tl.int32, bitcast=True) >> 23
    field = tl.minimum(tl.maximum(field, 1), 253)
    return (field << 23).to(tl.float32, bitcast=True), ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _operand(x, dtype: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Loaded keys or values as the products take them."""
    if FP8 != 0:
        return decode_fp8(x, dtype, FP8, NATIVE)
    else:
        return x.to(dtype)


@triton.jit
def _paged_decode_attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    k_scale_ptr,
    v_scale_ptr,
    lse_ptr,
    out_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_tb,
    stride_tp,
    stride_sb,
    stride_ksh,
    stride_vsh,
    capacity,
    window_left,
    min_tiles,
    T,
    G,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of one key head of one sequence. T new tokens, G query heads of each key head; no window: `capacity`.

    PAIRS: the caches are int16 of two float8 each; even and odd elements of a head are multiplied apart.

    With one split at most lse_ptr is None and the result goes to out_ptr (B, T, Hq, D). Otherwise out_ptr gets each split's own
    weighted mean, (B, T, Hq, splits, D) in fp32, and lse_ptr the logarithm of its weight, (B, T, Hq, splits).
    """
    m_blocks = tl.cdiv(T * G, BLOCK_M)
    # heads run side by side: in the cache the rows of a token's heads are neighbours
    h, pid_m = tl.program_id(0) // m_blocks, tl.program_id(0) % m_blocks
    Hq = tl.num_programs(0) // m_blocks * G
    split, most = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    UNIT: tl.constexpr = 1.0 if PRECISE else 1.4426950408889634

    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length, first, tiles, splits = _splits_of(
        lens_ptr, b, stride_sb, capacity, window_left, T, BLOCK_N, min_tiles, most
    )
    if split >= splits:
        return
    begin = first + (tl.cast(tiles, tl.int64) * split // splits).to(tl.int32)
    end = first + (tl.cast(tiles, tl.int64) * (split + 1) // splits).to(tl.int32)

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # row: query head rows % G of the group, new token rows // G
    token, head = rows // G, h * G + rows % G
    mask_m = rows < T * G
    STEP: tl.constexpr = 2 if PAIRS else 1  # elements of a head in a column of the cache
    CHUNK: tl.constexpr = 16
    offs_c = tl.arange(0, BLOCK_D // STEP).to(tl.int64)  # of unusual layouts a stride may be large
    mask_c = offs_c < HEAD_DIM // STEP
    q_rows = q_ptr + b * stride_qb + token.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh  # (BLOCK_M,)
    q_ptrs = q_rows[:, None] + (offs_c * STEP)[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
    if PAIRS:
        q_odd = tl.load(q_ptrs + stride_qd, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
    unit = tl.full((BLOCK_M,), SCALE, tl.float32)
    if k_scale_ptr is not None:
        unit *= tl.load(k_scale_ptr + h * stride_ksh)
    # float8: products in fp16, to which it converts in one instruction; bf16 queries fit after a shift of their exponents.
    HALF: tl.constexpr = tl.float16 if FP8 != 0 and not PRECISE else q_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float32 if UPCAST else HALF
    if dtype == tl.float16 and q_ptr.dtype.element_ty == tl.bfloat16:
        q = q.to(tl.float32)
        largest = tl.max(tl.abs(q), 1)
        if PAIRS:
            q_odd = q_odd.to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(q_odd), 1))
        binade, inverse = _binade(largest)
        unit *= binade
        q *= inverse[:, None]
        if PAIRS:
            q_odd *= inverse[:, None]
    q = q.to(dtype)
    if PAIRS:
        q_odd = q_odd.to(dtype)
    position = length - T + token  # (BLOCK_M,)

    k_head = k_ptr + tl.cast(h, tl.int64) * stride_kh
    v_head = v_ptr + tl.cast(h, tl.int64) * stride_vh
    table_row = table_ptr + b * stride_tb
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D // STEP), tl.float32)
    if PAIRS:
        acc_odd = tl.zeros((BLOCK_M, BLOCK_D // STEP), tl.float32)
    for tile in range(begin, end):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        if PAGE % BLOCK_N == 0:
            page = tl.load(table_row + (tile * BLOCK_N // PAGE) * stride_tp).to(tl.int64)
            slot = (tile * BLOCK_N % PAGE + tl.arange(0, BLOCK_N)).to(tl.int64)
            k_rows, v_rows = page * stride_kp + slot * stride_ks, page * stride_vp + slot * stride_vs
        else:
            pages = tl.load(table_row + (offs_n // PAGE) * stride_tp, mask=mask_n, other=0).to(tl.int64)
            slot = (offs_n % PAGE).to(tl.int64)
            k_rows, v_rows = pages * stride_kp + slot * stride_ks, pages * stride_vp + slot * stride_vs
        mask_k, mask_v = mask_n[None, :], mask_n[:, None]
        if HEAD_DIM < BLOCK_D:
            mask_k, mask_v = mask_k & mask_c[:, None], mask_v & mask_c[None, :]
        if PRECISE and not PAIRS:
            # Some elements of a head at a time: operands of multiply-adds are held in registers, and one chain of additions
            # along the whole head would round too often (the product with 1.0 keeps the compiler from chaining the sums).
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
                part = (start + tl.arange(0, CHUNK)).to(tl.int64)  # (CHUNK,)
                inside = part < HEAD_DIM
                q_part = tl.load(
                    q_rows[:, None] + part[None, :] * stride_qd, mask=mask_m[:, None] & inside[None, :], other=0.0
                )
                k_part = tl.load(
                    k_head + k_rows[None, :] + part[:, None] * stride_kd,
                    mask=mask_n[None, :] & inside[:, None],
                    other=0,
                )
                k_part = _operand(k_part, dtype, FP8, NATIVE)
                s = tl.fma(s, 1.0, tl.dot(q_part, k_part, input_precision=PRECISION))
        else:
            k = tl.load(k_head + k_rows[None, :] + offs_c[:, None] * stride_kd, mask=mask_k, other=0)
        if PAIRS:
            k, k_odd = decode_fp8_pairs(k, dtype, FP8, NATIVE)
            s = tl.dot(q_odd, k_odd, input_precision=PRECISION)
            s = tl.dot(q, k, s, input_precision=PRECISION)
        elif not PRECISE:
            s = tl.dot(q, _operand(k, dtype, FP8, NATIVE), input_precision=PRECISION)
        s *= unit[:, None]  # (BLOCK_M, BLOCK_N)
        if SOFTCAP > 0:
            s = SOFTCAP * _tanh(s / SOFTCAP, PRECISE)
        visible = offs_n[None, :] <= position[:, None]
        if HAS_WINDOW:
            visible = visible & (offs_n[None, :] >= position[:, None] - window_left)
        s = tl.where(visible, s * UNIT, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # -inf until the first visible key: -inf - 0 gives weight 0 where -inf - -inf gives NaN
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = _exp(s - shift[:, None], PRECISE)
        alpha = _exp(m - shift, PRECISE)
        total = total * alpha + tl.sum(p, 1)
        p = p.to(dtype)
        v = tl.load(v_head + v_rows[:, None] + offs_c[None, :] * stride_vd, mask=mask_v, other=0)
        if PAIRS:
            v, v_odd = decode_fp8_pairs(v, dtype, FP8, NATIVE)
            acc_odd = tl.dot(p, v_odd, acc_odd * alpha[:, None], input_precision=PRECISION)
        else:
            v = _operand(v, dtype, FP8, NATIVE)
        if PRECISE and not PAIRS:
            acc = tl.fma(acc, alpha[:, None], tl.dot(p, v, input_precision=PRECISION))  # (BLOCK_M, BLOCK_D)
        else:
            acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)  # (BLOCK_M, BLOCK_D / STEP)
        m = m_new

    if PAIRS:
        acc = tl.interleave(acc, acc_odd)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    divisor = tl.where(total > 0, total, 1.0)  # nothing visible: zeros
    out = acc / divisor[:, None]
    if v_scale_ptr is not None:
        out *= tl.load(v_scale_ptr + h * stride_vsh)
    row = (b * T + token) * Hq + head  # of (B, T, Hq)
    mask = mask_m[:, None] & mask_d[None, :]
    if lse_ptr is None:
        out = _rounded(out, UPCAST and out_ptr.dtype.element_ty == tl.bfloat16).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask)
    else:
        row = row * most + split
        lse = m + (tl.log(divisor) if PRECISE else tl.log2(divisor))  # -inf where nothing is visible, as m is
        tl.store(lse_ptr + row, lse, mask=mask_m)
        tl.store(out_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask)


@triton.jit
def _paged_decode_attn_merge_kernel(
    part_ptr,
    lse_ptr,
    lens_ptr,
    out_ptr,
    stride_sb,
    capacity,
    window_left,
    min_tiles,
    T,
    tile,
    most,
    rows_per_sequence,
    HEAD_DIM: tl.constexpr,
    PRECISE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """The splits of one query head of one new token, in their order; BLOCK_D of its elements."""
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # All loads at once: those of splits that were not computed fetch something, which counts for nothing.
    lse = tl.load(lse_ptr + row * most + offs_s, mask=offs_s < most, other=float("-inf"))
    ptrs = part_ptr + (row * most + offs_s)[:, None] * HEAD_DIM + offs_d[None, :]
    part = tl.load(ptrs, mask=(offs_s < most)[:, None] & mask_d[None, :], other=0.0)  # (BLOCK_S, BLOCK_D)
    _, _, _, splits = _splits_of(
        lens_ptr, row // rows_per_sequence, stride_sb, capacity, window_left, T, tile, min_tiles, most
    )
    mask_s = offs_s < splits
    lse = tl.where(mask_s, lse, float("-inf"))
    m = tl.max(lse, 0)
    weight = _exp(lse - tl.where(m == float("-inf"), 0.0, m), PRECISE)
    total = tl.sum(weight, 0)
    acc = tl.sum(tl.where(mask_s[:, None], part * weight[:, None], 0.0), 0)
    out = _rounded(acc / tl.where(total > 0, total, 1.0), UPCAST and out_ptr.dtype.element_ty == tl.bfloat16)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


# --------------------------------------------------------------------------------------------------------------------
# Launcher
# --------------------------------------------------------------------------------------------------------------------

# Chosen on an H200; all variants and their times: bench/results/tuning/nvidia_h200/paged_decode_attn.json.
_TILE_BYTES = 8 * 1024  # of keys, and as many of values, in one step
# A step's loads wait for its entry of the block table: the compiler gives that way one half of its stages, so that five are two
# tiles of keys and of values in flight.
_STAGES = 5
_WARPS = 4
_PROGRAMS_PER_SM = 3
_MIN_KEYS = 256  # of a split: below, starting a program costs more than it brings
_MAX_KEYS = (
    16384  # of a split, in sequences of any length: one long sequence among many short ones must not be one program's
)
_MAX_SPLITS = 128


def _plan(pairs: int, keys: int, programs: int) -> tuple[int, int]:
    """Splits of a sequence at most, and the least keys of a split, for `pairs` of sequence and key head of up to `keys` keys."""
    splits = programs // pairs
    min_keys = _MIN_KEYS if splits > 1 else _MAX_KEYS // 2
    splits = max(1, splits, cdiv(keys, _MAX_KEYS))
    return min(splits, cdiv(keys, min_keys), _MAX_SPLITS), min_keys


def paged_decode_attn(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    B, T, Hq, D = _sizes(q)
    _, page, Hkv, _ = k_cache.shape
    if out.numel() == 0:
        return out
    capacity = block_table.shape[1] * page
    has_window = 0 <= window_left < capacity
    window_left = window_left if has_window else capacity
    fp8 = MANTISSA.get(k_cache.dtype, 0)
    BLOCK_D = max(16, next_power_of_2(D))
    BLOCK_N = min(128, max(16, _TILE_BYTES // (BLOCK_D * k_cache.element_size())))
    pairs = bool(fp8) and BLOCK_D > 16 and _holds_pairs(k_cache) and _holds_pairs(v_cache)
    if fp8:
        codes = torch.int16 if pairs else torch.uint8
        k_cache, v_cache = k_cache.view(codes), v_cache.view(codes)
    group = Hq // Hkv
    BLOCK_M = min(64 if BLOCK_D <= 128 else 32, max(16, next_power_of_2(T * group)))
    if q.dtype == torch.float32:  # the operands of multiply-adds are held in registers
        BLOCK_N = min(BLOCK_N, 2048 // BLOCK_M)
    m_blocks = cdiv(T * group, BLOCK_M)
    visible = min(capacity, window_left + T + BLOCK_N)
    splits, min_keys = _plan(B * Hkv * m_blocks, max(1, visible), _PROGRAMS_PER_SM * sm_count(q.device))
    min_tiles = cdiv(min_keys, BLOCK_N)
    part, lse = out, None
    if splits > 1:
        part = q.new_empty((B * T * Hq, splits, D), dtype=torch.float32)
        lse = q.new_empty((B * T * Hq, splits), dtype=torch.float32)
    four = q if q.dim() == 4 else q.unsqueeze(1)
    launch(
        _paged_decode_attn_fwd_kernel,
        (Hkv * m_blocks, splits, B),
        *(q, k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, lse, part),
        *(*four.stride(), *k_cache.stride(), *v_cache.stride(), *block_table.stride(), seq_lens.stride(0)),
        *(_head_stride(k_scale), _head_stride(v_scale), capacity, window_left, min_tiles, T, group),
        SCALE=_scale(q, scale),
        SOFTCAP=float(softcap),
        HAS_WINDOW=has_window,
        HEAD_DIM=D,
        PAGE=page,
        FP8=fp8,
        PAIRS=pairs,
        NATIVE=capability(q.device) >= 89,
        UPCAST=INTERPRET,
        PRECISION="ieee",
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=_WARPS if BLOCK_D <= 128 else 2 * _WARPS,
        num_stages=_STAGES,
    )
    if lse is not None:
        # few rows of many splits: several programs a row
        BLOCK_S, BLOCK_D = (16, BLOCK_D) if splits <= 16 else (_MAX_SPLITS, min(BLOCK_D, 32))
        launch(
            _paged_decode_attn_merge_kernel,
            (B * T * Hq, cdiv(D, BLOCK_D)),
            *(part, lse, seq_lens, out, seq_lens.stride(0), capacity, window_left, min_tiles, T, BLOCK_N),
            *(splits, T * Hq),
            HEAD_DIM=D,
            PRECISE=q.dtype == torch.float32,
            UPCAST=INTERPRET,
            BLOCK_S=BLOCK_S,
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )
    return out


def paged_decode_attn_fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _sizes(q: torch.Tensor) -> tuple[int, int, int, int]:
    """(B, T, Hq, D)"""
    return (q.shape[0], 1, q.shape[1], q.shape[2]) if q.dim() == 3 else tuple(q.shape)  # type: ignore[return-value]


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _holds_pairs(cache: torch.Tensor) -> bool:
    """Whether two neighbours of a head's bytes can be read as one int16."""
    *outer, inner = cache.stride()
    return inner == 1 and cache.shape[3] % 2 == 0 and all(s % 2 == 0 for s in outer) and aligned(cache)


def _head_stride(factor: torch.Tensor | None) -> int:
    """From one key head's scale to the next."""
    return factor.stride(0) if factor is not None and factor.numel() > 1 else 0


# --------------------------------------------------------------------------------------------------------------------
# Check
# --------------------------------------------------------------------------------------------------------------------


def paged_decode_attn_check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument("paged_decode_attn", argument, given, allowed, error)

    def shape(x: torch.Tensor) -> str:
        return f"of shape {tuple(x.shape)}"

    if q.dim() not in (3, 4):
        bad("q", shape(q), "(batch, heads, head size) or (batch, new tokens, heads, head size)")
    B, T, Hq, D = _sizes(q)
    if q.dtype in MANTISSA:
        bad("q", f"of dtype {q.dtype}", "float32, float16, bfloat16", TypeError)
    if not 1 <= T <= _MAX_TOKENS:
        bad("q", shape(q), f"1 to {_MAX_TOKENS} new tokens a sequence (dimension 1); flash_attn takes more")
    if not 16 <= D <= 256:
        bad("q", shape(q), "a head size (the last dimension) from 16 to 256")
    if k_cache.dim() != 4 or k_cache.shape[3] != D:
        bad("k_cache", shape(k_cache), f"(blocks, page, key heads, {D})")
    _, page, Hkv, _ = k_cache.shape
    if not 16 <= page <= 256:
        bad("k_cache", shape(k_cache), "a page size (dimension 1) from 16 to 256")
    if Hq % Hkv if Hkv else Hq:
        bad("k_cache", shape(k_cache), f"a number of heads (dimension 2) that divides q's, {Hq}")
    if k_cache.dtype != q.dtype and k_cache.dtype not in MANTISSA:
        bad("k_cache", f"of dtype {k_cache.dtype}", f"the dtype of q, {q.dtype}, or a float8", TypeError)
    if v_cache.shape != k_cache.shape:
        bad("v_cache", shape(v_cache), f"the shape of k_cache, {tuple(k_cache.shape)}")
    if v_cache.dtype != k_cache.dtype:
        bad("v_cache", f"of dtype {v_cache.dtype}", f"the dtype of k_cache, {k_cache.dtype}", TypeError)
    for name, x in (("block_table", block_table), ("seq_lens", seq_lens)):
        if x.dtype not in (torch.int32, torch.int64):
            bad(name, f"of dtype {x.dtype}", "int32, int64", TypeError)
    if block_table.dim() != 2 or block_table.shape[0] != B:
        bad("block_table", shape(block_table), f"({B}, pages)")
    if block_table.shape[1] * page >= 2**31 - 256:
        bad("block_table", shape(block_table), f"pages for less than 2**31 keys; the page size is {page}")
    if seq_lens.dim() != 1 or seq_lens.shape[0] != B:
        bad("seq_lens", shape(seq_lens), f"({B},)")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is None:
            if k_cache.dtype in MANTISSA:
                bad(name, "None", f"a tensor: the cache is {k_cache.dtype}")
            continue
        if factor.dtype != torch.float32:
            bad(name, f"of dtype {factor.dtype}", "float32", TypeError)
        if factor.dim() > 1 or (factor.dim() == 1 and factor.shape[0] not in (1, Hkv)):
            bad(name, shape(factor), f"(), (1,) or a value for each key head, ({Hkv},)")
    if scale is not None and not -math.inf < scale < math.inf:
        bad("scale", scale, "a finite number, or None for 1 / sqrt(head size)")
    if not 0 <= softcap < math.inf:
        bad("softcap", softcap, "a finite number > 0, or 0 for none")
    if window_left < -1:
        bad("window_left", window_left, "a number of keys >= 0, or -1 for no bound")


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _call(
    device: torch.device | str,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int],
    D: int,
    page: int,
    tokens: int | None = None,
    spare: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Random arguments: every sequence's blocks lie anywhere in the cache, `spare` table columns name no block."""
    B, (Hq, Hkv) = len(lengths), heads
    pages = max((cdiv(n, page) for n in lengths), default=0)
    blocks = B * pages + 1
    half = torch.bfloat16 if dtype in MANTISSA else dtype
    q = torch.randn(*(B, Hq, D) if tokens is None else (B, tokens, Hq, D), device=device, dtype=half)
    k_cache, v_cache = (torch.randn(blocks, page, Hkv, D, device=device, dtype=half).to(dtype) for _ in range(2))
    # factory functions alone: what indexes or copies asks a traced tensor for its GPU
    order = torch.randperm(blocks, device=device).narrow(0, 0, B * pages).view(B, pages).to(torch.int32)
    table = torch.cat([order, torch.full((B, spare), -1, device=device, dtype=torch.int32)], 1)
    if len(set(lengths)) == 1:
        return q, k_cache, v_cache, table, torch.full((B,), lengths[0], device=device, dtype=torch.int32)
    return q, k_cache, v_cache, table, torch.tensor(lengths, device=device, dtype=torch.int32)


def _scales(device: torch.device | str, heads: int) -> dict[str, torch.Tensor]:
    """One for all key heads, and one for each."""
    return {"k_scale": torch.full((), 0.7, device=device), "v_scale": torch.linspace(0.5, 1.5, heads, device=device)}


def paged_decode_attn_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(
        name: str, *shape: Any, options: dict[str, Any] | None = None, slow: bool = False, **more: Any
    ) -> Sample:
        given = dict(options or {})
        if dtype in MANTISSA:
            given |= _scales(device, shape[1][1])
        return Sample(name, _call(device, dtype, *shape, **more), given, slow)

    yield sample("two", [37, 5], (2, 1), 16, 16, spare=1)
    if dtype == torch.float8_e5m2:
        return
    odd = {"window_left": 20, "softcap": 3.0}
    yield sample("tokens_window_softcap", [2, 45], (3, 1), 24, 17, tokens=4, options=odd)
    if dtype == torch.float8_e4m3fn:
        return
    yield sample("splits", [600, 0, 130], (2, 1), 16, 16)
    if dtype == torch.float16:  # half precision's other points are bfloat16's
        return
    odd = {"window_left": 500, "softcap": 4.0, "scale": -0.1}
    yield sample("window_splits", [800], (2, 2), 24, 17, options=odd)
    yield sample("ragged", [1, 2, 15, 16, 0, 7, 9, 3, 14], (1, 1), 16, 16)
    yield sample("empty_batch", [], (2, 1), 16, 16)
    yield sample("empty_table", [0, 0], (2, 1), 16, 16)
    # 72 rows of a key head: two blocks of them
    q, k, v, table, lengths = _call(device, dtype, [50], (9, 1), 16, 128, tokens=8)
    lengths = torch.full((1,), 1000, device=device)  # more keys than the table has room for
    yield Sample("rows_int64_scaled", (q, k, v, table.long(), lengths), _scales(device, 1))
    yield sample("D128_splits", [3000, 77, 1024], (32, 8), 128, 64, slow=True)
    yield sample("D256_tokens", [999, 4], (16, 2), 256, 32, tokens=2, slow=True)


def paged_decode_attn_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    q, k, v, table, lengths = _call(device, torch.float32, [20, 5], (4, 2), 16, 16)
    op = "paged_decode_attn.*"
    half, float8 = k.half(), k.to(torch.float8_e4m3fn)
    yield ErrorSample("rank", (q[0], k, v, table, lengths), match=op + r"'q'.*\(4, 16\)")
    many = q[:, None].expand(2, 9, 4, 16)
    yield ErrorSample("tokens", (many, k, v, table, lengths), match=op + "'q'.*1 to 8 new tokens")
    yield ErrorSample(
        "float8_q", (q.to(float8.dtype), float8, float8, table, lengths), error=TypeError, match=op + "'q'"
    )
    small = (q[..., :8], k[..., :8], v[..., :8])
    yield ErrorSample("head_size", (*small, table, lengths), match=op + "'q'.*16 to 256")
    yield ErrorSample("head_sizes", (q, k[..., :15], v, table, lengths), match=op + "'k_cache'.*blocks, page")
    yield ErrorSample("page", (q, k[:, :8], v[:, :8], table, lengths), match=op + "'k_cache'.*page size.*16 to 256")
    yield ErrorSample("heads", (q[:, :3], k, v, table, lengths), match=op + "'k_cache'.*divides q's, 3")
    yield ErrorSample("k_dtype", (q, half, half, table, lengths), error=TypeError, match=op + "'k_cache'.*float16")
    yield ErrorSample("v_shape", (q, k, v[:1], table, lengths), match=op + "'v_cache'.*the shape of k_cache")
    yield ErrorSample("v_dtype", (q, k, half, table, lengths), error=TypeError, match=op + "'v_cache'.*float16")
    yield ErrorSample(
        "table_dtype", (q, k, v, table.short(), lengths), error=TypeError, match=op + "'block_table'.*int16"
    )
    yield ErrorSample("table_shape", (q, k, v, table[:1], lengths), match=op + r"'block_table'.*\(2, pages\)")
    wide = table[:, :1].expand(2, 2**27)
    yield ErrorSample("table_size", (q, k, v, wide, lengths), match=op + r"'block_table'.*2\*\*31 keys")
    yield ErrorSample("lengths", (q, k, v, table, lengths[:1]), match=op + r"'seq_lens'.*\(2,\)")
    yield ErrorSample("no_scale", (q, float8, float8, table, lengths), match=op + "'k_scale'.*None.*float8_e4m3fn")
    five, wrong = torch.ones(5, device=device), torch.ones(2, device=device, dtype=torch.float16)
    yield ErrorSample("scale_shape", (q, k, v, table, lengths), {"v_scale": five}, match=op + r"'v_scale'.*\(2,\)")
    options = {"k_scale": wrong}
    yield ErrorSample("scale_dtype", (q, k, v, table, lengths), options, TypeError, op + "'k_scale'.*float16")
    yield ErrorSample("scale", (q, k, v, table, lengths), {"scale": math.inf}, match=op + "'scale'.*inf.*finite")
    yield ErrorSample("softcap", (q, k, v, table, lengths), {"softcap": -1.0}, match=op + "'softcap'.*-1.0")
    yield ErrorSample("window", (q, k, v, table, lengths), {"window_left": -2}, match=op + "'window_left'.*-2.*>= 0")


def paged_decode_attn_bench_cases() -> Iterator[BenchCase]:
    # id, (sequences, keys of each, query heads, key heads, page, new tokens), dtype of the cache
    for name, sizes, dtype in [
        ("b16_h32/8_kv8192", (16, 8192, 32, 8, 64, None), torch.bfloat16),
        ("b1_h32/8_kv65536", (1, 65536, 32, 8, 64, None), torch.bfloat16),
        ("b64_h32/8_kv4096", (64, 4096, 32, 8, 64, None), torch.bfloat16),
        ("b16_h32/8_kv8192_4tokens", (16, 8192, 32, 8, 64, 4), torch.bfloat16),
        ("b16_h32/8_kv8192_fp8", (16, 8192, 32, 8, 64, None), torch.float8_e4m3fn),
    ]:

        def make(
            device: torch.device | str,
            dtype: torch.dtype,
            sizes: tuple[Any, ...] = sizes,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            B, N, Hq, Hkv, page, tokens = sizes
            options = _scales(device, Hkv) if dtype in MANTISSA else {}
            return _call(device, dtype, [N] * B, (Hq, Hkv), 128, page, tokens), options

        yield BenchCase(name, make, dtype, passes=("fwd",))


def paged_decode_attn_cost(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Cost:
    """From the lengths; from the table's room where they have no values (fake and meta tensors)."""
    B, T, Hq, D = _sizes(q)
    _, page, Hkv, _ = k_cache.shape
    room = block_table.shape[1] * page
    known = seq_lens.device.type != "meta" and not isinstance(seq_lens, torch._subclasses.FakeTensor)
    lengths = [min(max(n, 0), room) for n in seq_lens.tolist()] if known else [room] * B
    window = room if window_left < 0 else window_left
    pairs = sum(max(0, min(n - T + t, window) + 1) for n in lengths for t in range(T) if n - T + t >= 0)
    keys = sum(min(n, window + T) for n in lengths)
    cache = 2 * keys * Hkv * D * k_cache.element_size()
    tables = sum(cdiv(n, page) for n in lengths) * block_table.element_size() + B * seq_lens.element_size()
    return Cost(4 * Hq * D * pairs, cache + tables + 2 * q.numel() * q.element_size())
