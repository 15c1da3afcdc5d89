"""Attention of float8 inputs for Hopper (sm_90), in Gluon. `forward` launches two kernels.

The first makes the tensor cores' operand of v. They take float8 only with the summed dimension contiguous: for P V that is the
keys, so v is transposed. On the way the keys change places within each 16 (`_key_at`): as an accumulator of S = Q K^T holds
its columns, and as the operand P of P V wants its own, a thread has the same 16 keys of 32, in another order. Moving the keys
of v instead of the weights costs nothing, and P never leaves the registers. That kernel also folds the scales of a head into
two factors and clears the second kernel's tile counter, so that nothing outlives a call.

The second follows `flash_attn`'s (ops/flash_attn/hopper.py says why): one producer warp that starts TMA copies and draws tiles,
consumer warpgroups of 64 query rows, S = Q K(i)^T issued together with P V(i-1), keys from the last visible block down. What
float8 changes:

* P is rounded to e4m3, 2^8 times larger: its largest weight is 256 of 448, and weights down to 2^-14 keep four significant bits.
  The row sums are of the unrounded weights, 2^8 times larger too, so that the factor cancels.
* The tensor cores add up float8 products with fewer bits than fp32 has. So O is not their accumulator: each block's P V starts
  from zero and is added in fp32, in the multiply-add that rescales O.
"""

# No `from __future__ import annotations` here: an aggregate's fields are declared by their types themselves.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from torch_triton_ops.attention_hopper import (
    ROWS,
    hand_over_turn,
    mask_scores,
    partial_row_sum,
    publish_tile,
    read_tile,
    tile_place,
    wait_for_turn,
)
from torch_triton_ops.launch import Descriptor, can_describe, cdiv, descriptor, launch, next_power_of_2, sm_count

# --------------------------------------------------------------------------------------------------------------------
# The first kernel: v transposed, the factors of each head, the counter
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _key_at(place):
    """Which key of its 16 stands at each place: bits (a, b, c, d) of the place are bits (c, a, b, d) of the key."""
    return (place & -15) | ((place & 2) << 2) | ((place & 12) >> 1)


@triton.jit
def _load_words(v_head, places, stride_vn, Skv, mask_w):
    """The keys that stand at `places`: (places, words)."""
    keys = _key_at(places)
    return tl.load(
        v_head + keys.to(tl.int64)[:, None] * stride_vn, mask=(keys < Skv)[:, None] & mask_w[None, :], other=0
    )


@triton.jit(do_not_specialize=["Skv", "padded", "Hkv", "heads_per_kv"])
def _flash_attn_fp8_prepare_kernel(
    v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, vt_ptr, factors_ptr, counter_ptr, Skv, padded, Hkv, heads_per_kv,
    stride_vb, stride_vh, stride_vn, stride_qsb, stride_qsh, stride_ksb, stride_ksh, stride_vsb, stride_vsh,
    SCALE_LOG2: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one head. v: words of four columns; vt (B, Hkv, 4 * WORDS, padded / 4): words of four keys, 0 from Skv on.

    factors (B, Hq, 2): of the scores, of out.
    """
    blocks = tl.cdiv(padded, BLOCK_N)
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // Hkv, bh % Hkv
    groups = block * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)  # four places each
    words = tl.arange(0, BLOCK_W)
    mask_w = words < WORDS
    v_head = v_ptr + b * stride_vb + h * stride_vh + words[None, :]
    # of four places the same four columns each, then of four columns the same four places each
    rows = (
        _load_words(v_head, groups * 4, stride_vn, Skv, mask_w),
        _load_words(v_head, groups * 4 + 1, stride_vn, Skv, mask_w),
        _load_words(v_head, groups * 4 + 2, stride_vn, Skv, mask_w),
        _load_words(v_head, groups * 4 + 3, stride_vn, Skv, mask_w),
    )
    vt_head = vt_ptr + bh * (4 * WORDS) * (padded // 4) + groups[None, :]
    mask = mask_w[:, None] & (groups < padded // 4)[None, :]
    for j in tl.static_range(4):
        column = tl.zeros_like(rows[0])
        for i in tl.static_range(4):
            column |= ((rows[i] >> (8 * j)) & 0xFF) << (8 * i)
        tl.store(vt_head + (words * 4 + j)[:, None] * (padded // 4), tl.trans(column), mask=mask)
    if block == 0:
        unit = tl.load(k_scale_ptr + b * stride_ksb + h * stride_ksh) * SCALE_LOG2
        v_scale = tl.load(v_scale_ptr + b * stride_vsb + h * stride_vsh)
        for first in range(0, heads_per_kv, BLOCK_H):
            member = first + tl.arange(0, BLOCK_H)
            mask_h = member < heads_per_kv
            heads = h * heads_per_kv + member
            q_scale = tl.load(q_scale_ptr + b * stride_qsb + heads * stride_qsh, mask=mask_h, other=0.0)
            pair = factors_ptr + (bh * heads_per_kv + member) * 2
            # never 0: hidden scores are -inf before they are scaled, and -inf * 0 is NaN
            tl.store(pair, tl.maximum(q_scale * unit, 1e-30), mask=mask_h)
            tl.store(pair + 1, tl.zeros((BLOCK_H,), tl.float32) + v_scale, mask=mask_h)
        if bh == 0:
            tl.store(counter_ptr, 0)


# --------------------------------------------------------------------------------------------------------------------
# What the producer and the consumers share
# --------------------------------------------------------------------------------------------------------------------


@aggregate
class _Forward:
    """One program's arguments, buffers and barriers."""

    # global memory
    q_desc: tma.tensor_descriptor  # (B, Hq, Sq, D), box (1, 1, ROWS, HEAD_DIM)
    k_desc: tma.tensor_descriptor  # (B, Hkv, Skv, D), box (1, 1, BLOCK_N, HEAD_DIM)
    v_desc: tma.tensor_descriptor  # (B, Hkv, D, padded), box (1, 1, HEAD_DIM, BLOCK_N)
    out_desc: tma.tensor_descriptor  # as q
    factors_ptr: gl.tensor  # (B, Hq, 2) float32
    counter_ptr: gl.tensor  # (1,) int32: how many tiles have been drawn
    # the problem
    Sq: gl.tensor
    Skv: gl.tensor
    diagonal: gl.tensor  # row i sees the keys up to i + diagonal; without a causal mask all of them: Skv
    num_blocks: gl.tensor  # tiles of a head
    H: gl.tensor  # query heads
    heads_per_kv: gl.tensor
    BH: gl.tensor
    section: gl.tensor  # heads that run side by side
    # shared memory
    q: gl.shared_memory_descriptor  # (consumers, ROWS, HEAD_DIM)
    k: gl.shared_memory_descriptor  # (STAGES, BLOCK_N, HEAD_DIM)
    v: gl.shared_memory_descriptor  # (STAGES, HEAD_DIM, BLOCK_N)
    out: gl.shared_memory_descriptor  # (consumers, ROWS, HEAD_DIM)
    tile: gl.shared_memory_descriptor  # (8, 1) int32: two slots of (row block, batch, head)
    # barriers
    q_full: gl.shared_memory_descriptor  # (consumers, 1)
    q_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # (STAGES, 1)
    empty: gl.shared_memory_descriptor
    tile_full: gl.shared_memory_descriptor  # (2, 1)
    tile_empty: gl.shared_memory_descriptor
    # constants
    CONSUMERS: gl.constexpr
    BLOCK_N: gl.constexpr
    HEAD_DIM: gl.constexpr
    STAGES: gl.constexpr
    PING_PONG: gl.constexpr
    MASKED: gl.constexpr  # whether there are keys that not every row sees

    @gluon.constexpr_function
    def __init__(self, tensors, problem, buffers, barriers, constants):
        self.q_desc, self.k_desc, self.v_desc, self.out_desc, self.factors_ptr, self.counter_ptr = tensors
        self.Sq, self.Skv, self.diagonal, self.num_blocks, self.H, self.heads_per_kv, self.BH, self.section = problem
        self.q, self.k, self.v, self.out, self.tile = buffers
        self.q_full, self.q_empty, self.full, self.empty, self.tile_full, self.tile_empty = barriers
        self.CONSUMERS, self.BLOCK_N, self.HEAD_DIM, self.STAGES = map(gl.constexpr, constants[:4])
        self.PING_PONG, self.MASKED = map(gl.constexpr, constants[4:])


# --------------------------------------------------------------------------------------------------------------------
# Which tile, which keys
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _key_blocks(x, start_m, BLOCK_M: gl.constexpr):
    """Rows start_m .. start_m + BLOCK_M need key blocks 0 .. end, at least one; of these 0 .. full need no mask."""
    last_key = x.Skv
    full = x.Skv // x.BLOCK_N
    if x.MASKED:
        last_key = gl.minimum(x.Skv, gl.minimum(start_m + BLOCK_M, x.Sq) + x.diagonal)
        full = gl.minimum(full, gl.maximum(start_m + x.diagonal + 1, 0) // x.BLOCK_N)
    end = gl.maximum((last_key + x.BLOCK_N - 1) // x.BLOCK_N, 1)
    return end, gl.minimum(full, end - 1)


# --------------------------------------------------------------------------------------------------------------------
# Softmax
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _softmax_step(s, m, unit, limit, start_n, MASKED: gl.constexpr):
    """(2^8 P, the factor for everything accumulated so far, the new maximum m); s is (ROWS, BLOCK_N), m in units of log 2."""
    if MASKED:
        s = mask_scores(s, limit, limit, start_n, False)
    m_new = gl.maximum(m, gl.max(s, 1) * unit)
    shift = m_new
    if MASKED:  # a row that has seen no key yet: subtract 0, as -inf - -inf is NaN
        shift = gl.where(m_new == -float("inf"), 0.0, m_new)
    return gl.exp2(s * unit - (shift - 8.0)[:, None]), gl.exp2(m - shift), m_new


# Of 16 columns, lane l of a row's 4 holds 2 l, 2 l + 1, 8 + 2 l and 8 + 2 l + 1 in the accumulator, and places 4 l to 4 l + 3 in
# a register of the operand P. So column (half, l, element) goes to place (l, half, element): `_key_at`.
# P is carried from one step to the next as int32 of four, because values of 8 bits would take a register each.


@gluon.jit
def _pack_p(p):
    """(ROWS, BLOCK_N) fp32 in an accumulator's layout -> (ROWS, BLOCK_N / 4) int32, places in order."""
    p = p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    even, odd = gl.split(p)
    first_even, second_even = gl.split(even)
    first_odd, second_odd = gl.split(odd)
    packed = gl.inline_asm_elementwise(
        "{ .reg .b16 first, second; cvt.rn.satfinite.e4m3x2.f32 first, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 second, $4, $3; mov.b32 $0, {first, second}; }",
        "=r,f,f,f,f",
        [first_even, first_odd, second_even, second_odd],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    return packed.reshape([packed.shape[0], packed.shape[1] * 4])


@gluon.jit
def _unpack_p(packed, layout: gl.constexpr):
    """No instructions: the packed registers already are the matrix product's operand."""
    first = gl.join(_byte(packed, 0), _byte(packed, 2))
    second = gl.join(_byte(packed, 1), _byte(packed, 3))
    p = gl.join(first, second).reshape([packed.shape[0], packed.shape[1] * 4])
    return gl.convert_layout(p, layout, assert_trivial=True)


@gluon.jit
def _byte(packed, i: gl.constexpr):
    return (packed >> (8 * i)).to(gl.int8).to(gl.float8e4nv, bitcast=True)


# --------------------------------------------------------------------------------------------------------------------
# Producer: one warp
#
# A tile with n key blocks takes n + 1 steps of the ring: step 0 brings K(n-1), step i brings K(n-1-i) and V(n-i), step n brings
# V(0). That is what a consumer needs together, so a slot has one "full" and one "empty" barrier for both.
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _producer(x):
    BLOCK_M: gl.constexpr = ROWS * x.CONSUMERS
    KV_BYTES: gl.constexpr = x.BLOCK_N * x.HEAD_DIM
    tiles = x.num_blocks * x.BH

    tile = gl.program_id(0)
    n = 0  # tiles begun by this program
    step = 0  # steps of the ring, over all tiles
    while tile < tiles:
        block_m, b, h = tile_place(x, tile)
        publish_tile(x, n, block_m, b, h)
        h_kv = h // x.heads_per_kv
        end, _ = _key_blocks(x, block_m * BLOCK_M, BLOCK_M)

        # An empty-barrier is awaited with the opposite phase, so that the first use passes at once.
        slot = step % x.STAGES
        mbarrier.wait(x.empty.index(slot), ((step // x.STAGES) & 1) ^ 1)
        mbarrier.expect(x.full.index(slot), KV_BYTES)
        start_n = (end - 1) * x.BLOCK_N
        tma.async_copy_global_to_shared(x.k_desc, [b, h_kv, start_n, 0], x.full.index(slot), x.k.index(slot))
        step += 1
        for c in gl.static_range(x.CONSUMERS):
            mbarrier.wait(x.q_empty.index(c), (n & 1) ^ 1)
            mbarrier.expect(x.q_full.index(c), ROWS * x.HEAD_DIM)
            start_m = block_m * BLOCK_M + c * ROWS
            tma.async_copy_global_to_shared(x.q_desc, [b, h, start_m, 0], x.q_full.index(c), x.q.index(c))
        for i in range(1, end):
            start_n = (end - 1 - i) * x.BLOCK_N
            slot = step % x.STAGES
            mbarrier.wait(x.empty.index(slot), ((step // x.STAGES) & 1) ^ 1)
            mbarrier.expect(x.full.index(slot), 2 * KV_BYTES)
            tma.async_copy_global_to_shared(x.k_desc, [b, h_kv, start_n, 0], x.full.index(slot), x.k.index(slot))
            start_n += x.BLOCK_N
            tma.async_copy_global_to_shared(x.v_desc, [b, h_kv, 0, start_n], x.full.index(slot), x.v.index(slot))
            step += 1
        slot = step % x.STAGES
        mbarrier.wait(x.empty.index(slot), ((step // x.STAGES) & 1) ^ 1)
        mbarrier.expect(x.full.index(slot), KV_BYTES)
        tma.async_copy_global_to_shared(x.v_desc, [b, h_kv, 0, 0], x.full.index(slot), x.v.index(slot))
        step += 1

        # The next tile: program p began with tile p.
        tile = gl.atomic_add(x.counter_ptr, 1) + gl.num_programs(0)
        n += 1
    publish_tile(x, n, -1, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Consumer: one warpgroup, ROWS query rows
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _issue_scores(x, slot, zero, CONSUMER: gl.constexpr):
    """S = Q K^T, asynchronous."""
    return warpgroup_mma(x.q.index(CONSUMER), x.k.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _issue_pv(x, slot, p_packed, zero):
    """One block's P V, asynchronous."""
    p = _unpack_p(p_packed, gl.DotOperandLayout(0, zero.type.layout, 4))
    return warpgroup_mma(p, x.v.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _consumer_step(
    x, acc, l, m, alpha, p_packed, step, unit, zero, zero_out, limit, start_n,
    CONSUMER: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """S = Q K(i)^T and right behind it P V of the step before; then the softmax of S. alpha: what O still is to be scaled by."""
    slot = step % x.STAGES
    mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
    if x.PING_PONG:
        wait_for_turn(CONSUMER)
    s_token = _issue_scores(x, slot, zero, CONSUMER)
    pv_token = _issue_pv(x, slot, p_packed, zero_out)
    if x.PING_PONG:
        hand_over_turn(CONSUMER, x.CONSUMERS)

    s = warpgroup_mma_wait(1, [s_token])  # S is ready, P V may still run
    p, alpha_next, m = _softmax_step(s, m, unit, limit, start_n, MASKED)
    row_sum = partial_row_sum(p)
    l = l * gl.convert_layout(alpha_next, gl.SliceLayout(1, row_sum.type.layout))[:, None] + row_sum
    pv = warpgroup_mma_wait(0, [pv_token])
    mbarrier.arrive(x.empty.index(slot))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None] + pv
    return acc, l, m, alpha_next, _pack_p(p)


@gluon.jit
def _consumer(x, CONSUMER: gl.constexpr):
    BLOCK_M: gl.constexpr = ROWS * x.CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, x.BLOCK_N, 32]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, x.HEAD_DIM, 32]
    )
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    zero = gl.full([ROWS, x.BLOCK_N], 0.0, gl.float32, s_layout)
    zero_out = gl.full([ROWS, x.HEAD_DIM], 0.0, gl.float32, acc_layout)
    out = x.out.index(CONSUMER)

    n = 0
    step = 0
    if x.PING_PONG and CONSUMER == x.CONSUMERS - 1:
        hand_over_turn(CONSUMER, x.CONSUMERS)  # consumer 0 goes first
    block_m, b, h = read_tile(x, n)
    while block_m >= 0:
        start_m = block_m * BLOCK_M + CONSUMER * ROWS
        unit = gl.load(x.factors_ptr + (b * x.H + h) * 2)
        # the first invisible key of each row
        limit = gl.minimum(start_m + gl.arange(0, ROWS, layout=s_row) + x.diagonal + 1, x.Skv)
        end, full_blocks = _key_blocks(x, start_m, ROWS)
        if x.MASKED:
            # Key blocks that only later rows of the tile see: free them, and take no part.
            tile_end, _ = _key_blocks(x, block_m * BLOCK_M, BLOCK_M)
            for _ in range(tile_end - end):
                slot = step % x.STAGES
                mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
                if x.PING_PONG:
                    wait_for_turn(CONSUMER)
                    hand_over_turn(CONSUMER, x.CONSUMERS)
                mbarrier.arrive(x.empty.index(slot))
                step += 1

        # The first key block: no P V to overlap with yet.
        mbarrier.wait(x.q_full.index(CONSUMER), n & 1)
        slot = step % x.STAGES
        mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
        if x.PING_PONG:
            wait_for_turn(CONSUMER)
        s_token = _issue_scores(x, slot, zero, CONSUMER)
        if x.PING_PONG:
            hand_over_turn(CONSUMER, x.CONSUMERS)
        s = warpgroup_mma_wait(0, [s_token])
        mbarrier.arrive(x.empty.index(slot))
        m = gl.full([ROWS], -float("inf"), gl.float32, s_row)  # running maximum of each row, units of log 2
        p, alpha, m = _softmax_step(s, m, unit, limit, (end - 1) * x.BLOCK_N, x.MASKED)
        l = partial_row_sum(p)  # running sum of each row
        p_packed = _pack_p(p)
        acc = gl.full([ROWS, x.HEAD_DIM], 0.0, gl.float32, acc_layout)
        step += 1

        # The other blocks that need a mask, then those that do not.
        if x.MASKED:
            for i in range(end - 1 - full_blocks):
                start_n = (end - 2 - i) * x.BLOCK_N
                acc, l, m, alpha, p_packed = _consumer_step(
                    x, acc, l, m, alpha, p_packed, step, unit, zero, zero_out, limit, start_n, CONSUMER, True
                )
                step += 1
        else:
            full_blocks = end - 1
        for _ in range(full_blocks):
            acc, l, m, alpha, p_packed = _consumer_step(
                x, acc, l, m, alpha, p_packed, step, unit, zero, zero_out, limit, 0, CONSUMER, False
            )
            step += 1
        mbarrier.arrive(x.q_empty.index(CONSUMER))  # the next tile's Q may come

        # The last P V. A row without keys has l = 0: output 0.
        slot = step % x.STAGES
        mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
        pv_token = _issue_pv(x, slot, p_packed, zero_out)
        row_sum = gl.convert_layout(gl.sum(l, 1), s_row)
        block_m, b, h = read_tile(x, n)
        mbarrier.arrive(x.tile_empty.index(n % 2))
        v_scale = gl.load(x.factors_ptr + (b * x.H + h) * 2 + 1)
        inverse = gl.where(row_sum > 0.0, v_scale / row_sum, 0.0)
        pv = warpgroup_mma_wait(0, [pv_token])
        mbarrier.arrive(x.empty.index(slot))
        step += 1
        acc = acc * gl.convert_layout(alpha, acc_row)[:, None] + pv

        # O goes out by TMA, which drops rows past Sq. Its reads are awaited only when the buffer is needed again, so the
        # store runs under the next tile.
        acc = acc * gl.convert_layout(inverse, acc_row)[:, None]
        tma.store_wait(0)
        out.store(acc.to(x.out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(x.out_desc, [b, h, block_m * BLOCK_M + CONSUMER * ROWS, 0], out)
        n += 1
        block_m, b, h = read_tile(x, n)
    tma.store_wait(0)
    if x.PING_PONG and CONSUMER == 0:
        wait_for_turn(CONSUMER)  # take the last hand-over, so that the barrier's counts balance


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["Sq", "Skv", "diagonal", "num_blocks", "H", "heads_per_kv", "BH", "section"])
def _flash_attn_fp8_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, factors_ptr, counter_ptr, Sq, Skv, diagonal, num_blocks, H, heads_per_kv, BH, section,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    PING_PONG: gl.constexpr, REGISTERS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Persistent: at most one program on an SM. Launched with num_warps=4, the first consumer's."""
    dtype: gl.constexpr = q_desc.dtype
    BUFFERS: gl.constexpr = 2 if CONSUMERS == 2 else 4  # shapes must be powers of two
    # The descriptors have rank 4, the buffers rank 2: a box is one head's.
    qk_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=HEAD_DIM, element_bitwidth=8, rank=2)
    v_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_N, element_bitwidth=8, rank=2)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, HEAD_DIM], qk_layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], qk_layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, HEAD_DIM, BLOCK_N], v_layout)
    out = gl.allocate_shared_memory(out_desc.dtype, [BUFFERS, ROWS, HEAD_DIM], out_layout)
    tile = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], bar_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)  # every consumer must free a slot
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    x = _Forward(
        (q_desc, k_desc, v_desc, out_desc, factors_ptr, counter_ptr),
        (Sq, Skv, diagonal, num_blocks, H, heads_per_kv, BH, section),
        (q, k, v, out, tile),
        (q_full, q_empty, full, empty, tile_full, tile_empty),
        (CONSUMERS, BLOCK_N, HEAD_DIM, STAGES, PING_PONG, MASKED),
    )
    # The first entry runs on the launch's own 4 warps, the others on 4, (4) and 1 more.
    if CONSUMERS == 2:
        gl.warp_specialize([(_consumer, (x, 0)), (_consumer, (x, 1)), (_producer, (x,))], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize(
            [(_consumer, (x, 0)), (_consumer, (x, 1)), (_consumer, (x, 2)), (_producer, (x,))],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


# --------------------------------------------------------------------------------------------------------------------
# Launch
# --------------------------------------------------------------------------------------------------------------------

# By the head size's block: keys a step, depth of the K / V ring, registers of a consumer's thread. Not yet measured.
CONFIGS: dict[int, dict[str, Any]] = {
    64: {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 4, "PING_PONG": True, "REGISTERS": 240},
    128: {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 4, "PING_PONG": True, "REGISTERS": 240},
}
# How boxes lie in shared memory, by their width in bytes: as a warpgroup's matrix product wants its operands.
_TILES = {n: gl.NVMMASharedLayout(swizzle_byte_width=n, element_bitwidth=8, rank=4) for n in (64, 128)}
_OUT_TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
# K and V of the heads that run side by side should fill no more of the L2 cache than this.
_L2_BYTES = 16 * 2**20


def takes(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, scale: float) -> bool:
    """Whether these kernels can compute the call: TMA wants rows of a multiple of 16 bytes, and cannot describe empty keys."""
    D = q.shape[3]
    return out.dtype.itemsize == 2 and D % 16 == 0 and 32 < D <= max(CONFIGS) and scale > 0 and k.shape[2] > 0


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    causal: bool,
) -> None:
    """Write out. What `takes` allows; inputs that TMA cannot take are copied."""
    B, H, Sq, D = q.shape
    Hkv, Skv = k.shape[1], k.shape[2]
    head_dim = next(width for width in CONFIGS if width >= D)
    config = CONFIGS[head_dim]
    block_n, group = config["BLOCK_N"], H // Hkv
    num_blocks = cdiv(Sq, ROWS.value * config["CONSUMERS"])

    vt, factors, counter = prepare(v, q_scale, k_scale, v_scale, scale)
    # as many key heads at a time as fit, each with all its query heads
    section = min(B * H, group * max(1, _L2_BYTES // (2 * Skv * D)))
    launch(
        _flash_attn_fp8_fwd_hopper_kernel,
        (min(sm_count(q.device), num_blocks * B * H),),
        _boxes(q, ROWS.value, head_dim),
        _boxes(k, block_n, head_dim),
        _boxes(vt, head_dim, block_n),
        descriptor(out, (1, 1, ROWS.value, head_dim), _OUT_TILE),
        *(factors, counter, Sq, Skv, Skv - Sq if causal else Skv, num_blocks, H, group, B * H, section),
        num_warps=4,
        HEAD_DIM=head_dim,
        MASKED=causal or Skv % block_n != 0,
        **config,
    )


def prepare(
    v: torch.Tensor, q_scale: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v transposed (B, Hkv, D, keys padded to 16), the factors of every query head (B, Hq, 2), a tile counter of 0."""
    from . import per_head_strides

    B, Hkv, Skv, D = v.shape
    H = q_scale.shape[-1]
    v = _described(v).view(torch.int32)
    padded = cdiv(Skv, 16) * 16
    vt = v.new_empty((B, Hkv, D, padded // 4))
    factors = v.new_empty((B, H, 2), dtype=torch.float32)
    counter = v.new_empty(1, dtype=torch.int32)
    BLOCK_N = 128
    launch(
        _flash_attn_fp8_prepare_kernel,
        (cdiv(padded, BLOCK_N) * B * Hkv,),
        *(v, q_scale, k_scale, v_scale, vt, factors, counter),
        *(Skv, padded, Hkv, H // Hkv, *v.stride()[:3]),
        *(stride for x in (q_scale, k_scale, v_scale) for stride in per_head_strides(x)),
        SCALE_LOG2=scale * math.log2(math.e),
        WORDS=D // 4,
        BLOCK_N=BLOCK_N,
        BLOCK_W=next_power_of_2(D // 4),
        BLOCK_H=16,
        num_warps=8,
    )
    return vt.view(torch.float8_e4m3fn), factors, counter


def _boxes(x: torch.Tensor, rows: int, columns: int) -> Descriptor:
    """Descriptor of x, or of a copy, for boxes of one head's (rows, columns)."""
    return descriptor(_described(x), (1, 1, rows, columns), _TILES[columns])


def _described(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy if TMA cannot take it."""
    return (
        x if can_describe(x) else x.clone(memory_format=torch.contiguous_format)
    )  # contiguous() would keep a misaligned base
