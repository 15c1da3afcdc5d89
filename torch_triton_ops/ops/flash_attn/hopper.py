"""Attention forward for Hopper (sm_90), in Gluon: Triton's language for kernels that place everything themselves.

What the hardware wants, and what this kernel does about it:

* **Tensor cores that never wait.** A tile of queries is shared by two or three consumer warpgroups of 64 rows each. While one
  of them does its softmax, another one's matrix products run. Inside a warpgroup S = Q K(i)^T is issued together with
  O += P V(i-1), and the softmax of S runs under the second product.
* **Loads that cost no instructions.** One producer warp, with few registers, does nothing but start TMA copies; barriers in
  shared memory tell the consumers when a buffer is full and tell the producer when it is free again. The consumers get the
  registers that the producer gives back.
* **No idle SM at the end.** The grid is persistent. The producer draws the next tile from a counter in global memory; tiles
  are ordered by what suits the L2 cache, and under a causal mask the longest come first.
* **Masks where they are needed only.** Keys are taken from the last visible block down, so that the first blocks of a tile are
  the masked ones (in a window the last ones, too) and invisible ones are never loaded.

P never leaves the registers: an accumulator of S holds its elements exactly where the operand of P V wants them. O leaves by
TMA under the next tile. TMA descriptors have rank 4 (batch, head, row, column), so rows past the end of a head, and columns
past the head size, read as zero and are not written: every length and every head size up to HEAD_DIM is the same code.

`forward` launches it.
"""

# No `from __future__ import annotations` here: an aggregate's fields are declared by their types themselves.

import math
import threading
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
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
from torch_triton_ops.launch import (
    Descriptor,
    NotInlinable,
    Plans,
    Prepared,
    aligned,
    can_describe,
    cdiv,
    descriptor,
    sm_count,
)

# --------------------------------------------------------------------------------------------------------------------
# What the producer and the consumers share
# --------------------------------------------------------------------------------------------------------------------


@aggregate
class _Forward:
    """One program's arguments, buffers and barriers."""

    # global memory
    q_desc: tma.tensor_descriptor  # (B, Hq, Sq, D), box (1, 1, ROWS, HEAD_DIM, or 64 of 192)
    k_desc: tma.tensor_descriptor  # (B, Hkv, Skv, D), box (1, 1, BLOCK_N, as of q)
    v_desc: tma.tensor_descriptor  # as k
    out_desc: tma.tensor_descriptor  # as q
    lse_ptr: gl.tensor  # (B, Hq, Sq) float32
    counter_ptr: gl.tensor  # (1,) int32: how many tiles have been drawn
    sinks_ptr: gl.tensor  # (H,)
    # the problem
    scale_log2: gl.tensor  # log2(e) times the scale, or with softcap times that: so that exp becomes exp2
    cap_scale: gl.tensor  # softcap: 2 * log2(e) * scale / softcap
    Sq: gl.tensor
    Skv: gl.tensor
    first: gl.tensor  # query i sees the keys from i + first (windows)
    last: gl.tensor  # to i + last (causal, windows)
    num_blocks: gl.tensor  # tiles of a head
    H: gl.tensor  # query heads
    heads_per_kv: gl.tensor
    BH: gl.tensor
    section: gl.tensor  # heads that run side by side
    # shared memory
    q: gl.shared_memory_descriptor  # (consumers, ROWS, HEAD_DIM), or the first 128 columns of 192
    k: gl.shared_memory_descriptor  # (STAGES, BLOCK_N, HEAD_DIM)
    v: gl.shared_memory_descriptor  # (STAGES, BLOCK_N, HEAD_DIM)
    out: gl.shared_memory_descriptor  # (consumers, ROWS, HEAD_DIM)
    q_tail: gl.shared_memory_descriptor  # HEAD_DIM 192: columns 128 to 191. Tensors are powers of two.
    k_tail: gl.shared_memory_descriptor
    v_tail: gl.shared_memory_descriptor
    out_tail: gl.shared_memory_descriptor
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
    TAIL: gl.constexpr  # whether there are tails
    STAGES: gl.constexpr
    OUT_IN_Q: gl.constexpr
    PING_PONG: gl.constexpr
    LAZY: gl.constexpr
    HAS_LAST: gl.constexpr  # causal or a window
    HAS_FIRST: gl.constexpr  # a window
    HAS_SOFTCAP: gl.constexpr
    HAS_SINKS: gl.constexpr
    EVEN_N: gl.constexpr
    SAVE_LSE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tensors, problem, buffers, barriers, config, options):
        self.q_desc, self.k_desc, self.v_desc, self.out_desc = tensors[:4]
        self.lse_ptr, self.counter_ptr, self.sinks_ptr = tensors[4:]
        self.scale_log2, self.cap_scale, self.Sq, self.Skv, self.first, self.last = problem[:6]
        self.num_blocks, self.H, self.heads_per_kv, self.BH, self.section = problem[6:]
        self.q, self.k, self.v, self.out, self.q_tail, self.k_tail, self.v_tail, self.out_tail, self.tile = buffers
        self.q_full, self.q_empty, self.full, self.empty, self.tile_full, self.tile_empty = barriers
        self.CONSUMERS, self.BLOCK_N, self.HEAD_DIM, self.STAGES, self.OUT_IN_Q = map(gl.constexpr, config[:5])
        self.TAIL = gl.constexpr(config[2] == 192)
        self.PING_PONG, self.LAZY = map(gl.constexpr, config[5:])
        self.HAS_LAST, self.HAS_FIRST, self.HAS_SOFTCAP = map(gl.constexpr, options[:3])
        self.HAS_SINKS, self.EVEN_N, self.SAVE_LSE = map(gl.constexpr, options[3:])


# --------------------------------------------------------------------------------------------------------------------
# Which tile, which keys
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _key_blocks(x, start_m, BLOCK_M: gl.constexpr):
    """Rows start_m .. start_m + BLOCK_M need key blocks begin .. end; of these full_begin .. full_end need no mask.

    Returns (begin, full_begin, full_end, end): begin <= full_begin <= full_end < end. At least one block is always processed,
    because a row that sees no key must be written all the same; the last one counts as masked.
    """
    LOG_N: gl.constexpr = x.BLOCK_N.bit_length() - 1  # a shift rounds down, and needs no sign
    seen_by_all = x.Skv
    seen_by_any = x.Skv
    if x.HAS_LAST:
        seen_by_all = gl.minimum(x.Skv, gl.maximum(start_m + x.last, -1) + 1)
        seen_by_any = gl.minimum(x.Skv, gl.minimum(start_m + BLOCK_M, x.Sq) + x.last)
    end = gl.maximum((seen_by_any + x.BLOCK_N - 1) >> LOG_N, 1)
    full_end = gl.minimum(seen_by_all >> LOG_N, end - 1)
    begin = 0
    full_begin = 0
    if x.HAS_FIRST:
        first = gl.maximum(start_m + x.first, 0)
        begin = gl.minimum(first >> LOG_N, end - 1)
        full_end = gl.maximum(full_end, begin)
        first = gl.maximum(start_m + x.first + BLOCK_M - 1, 0)  # the last row's
        full_begin = gl.minimum(gl.maximum((first + x.BLOCK_N - 1) >> LOG_N, begin), full_end)
    return begin, full_begin, full_end, end


# --------------------------------------------------------------------------------------------------------------------
# Softmax
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def tanh(s, factor):
    """tanh(s * factor / (2 log2(e))) = 1 - 2 / (1 + 2^(s * factor)), to about 1e-7: tanh.approx, one instruction fewer, is off by
    5e-4, and what it is off by is multiplied by softcap."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 e, e; "
        "fma.rn.f32 $0, e, 0fC0000000, 0f3F800000; }",
        "=f,f",
        [s * factor],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _softmax_step(x, s, m, limit, first, start_n, MASKED: gl.constexpr, LAZY: gl.constexpr):
    """(P, the factor for everything accumulated so far, the new reference m); s is (ROWS, BLOCK_N), m in units of log 2.

    m is the row's maximum, or with LAZY a former maximum that is at most 8 too small: P is then at most 2^8, and as l and acc
    use the same m, the result is the same.
    """
    if x.HAS_SOFTCAP:
        s = tanh(s, x.cap_scale)
    if MASKED:
        s = mask_scores(s, limit, first, start_n, x.HAS_FIRST)
    m_new = gl.maximum(m, gl.max(s, 1) * x.scale_log2)
    if LAZY:
        m_new = gl.where(m_new - m > 8.0, m_new, m)
    shift = m_new
    if MASKED:  # a row that has seen no key yet: subtract 0, as -inf - -inf is NaN
        shift = gl.where(m_new == -float("inf"), 0.0, m_new)
    return gl.exp2(s * x.scale_log2 - shift[:, None]), gl.exp2(m - shift), m_new


@gluon.constexpr_function
def _rescale_asm(registers):
    # Operands: 0.. results, tied to registers.. accumulators, 2 * registers.. factors. Registers 0, 1 belong to one row, 2, 3
    # to the other of this thread, and so on in turns.
    factor = 2 * registers
    multiply = " ".join(f"mul.f32 ${i}, ${i}, ${factor + i};" for i in range(registers))
    return (
        f"{{ .reg .pred p; setp.lt.f32 p, ${factor}, 0f3F800000; "
        f"setp.lt.or.f32 p, ${factor + 2}, 0f3F800000, p; "
        f"vote.sync.any.pred p, p, -1; @!p bra DONE; {multiply} DONE: }}"
    )


@gluon.constexpr_function
def _rescale_constraints(registers):
    return ",".join(["=f"] * registers + [str(i) for i in range(registers)] + ["f"] * registers)


@gluon.jit
def _rescale(acc, alpha, LAZY: gl.constexpr):
    """acc * alpha, (ROWS, HEAD_DIM). With LAZY a warp whose factors are all 1, nearly always after the first blocks, jumps over
    the multiplications: 128 of about 400 instructions a block of keys at HEAD_DIM 256."""
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    if LAZY:
        registers: gl.constexpr = acc.shape[0] * acc.shape[1] // 128
        asm: gl.constexpr = _rescale_asm(registers)
        constraints: gl.constexpr = _rescale_constraints(registers)
        alpha, acc = gl.broadcast(alpha, acc)
        return gl.inline_asm_elementwise(
            asm, constraints, [acc, alpha], dtype=gl.float32, is_pure=False, pack=registers
        )
    else:
        return acc * alpha


# P is carried from one step to the next as pairs packed into int32. Carried in 16 bits, every element takes a register of its
# own, and each pair an instruction to split it and one to join it: 64 instructions a step.


@gluon.jit
def _pack_p(p, dtype: gl.constexpr):
    lo, hi = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [lo, hi], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack_p(packed, dtype: gl.constexpr, layout: gl.constexpr):
    """No instructions: the packed registers already are the matrix product's operand."""
    lo = packed.to(gl.int16).to(dtype, bitcast=True)
    hi = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    p = gl.join(lo, hi).reshape([packed.shape[0], packed.shape[1] * 2])
    return gl.convert_layout(p, layout, assert_trivial=True)


# --------------------------------------------------------------------------------------------------------------------
# Producer: one warp
#
# Keys are taken from the last visible block to the first. A tile with n key blocks takes n + 1 steps of the ring: step 0
# brings K(n-1), step i brings K(n-1-i) and V(n-i), step n brings V(0), all counted from the first visible block. That is what
# a consumer needs together, so a slot has one "full" and one "empty" barrier for both.
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def panels(tile):
    """Columns 0 to 63 and 64 to 127 of a tile of 128 columns: in shared memory one lies behind the other."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    panels = tile._reinterpret(tile.dtype, [2, tile.shape[0], 64], layout)
    return panels.index(0), panels.index(1)


@gluon.jit
def load(x, desc, b, h, row, full, tile, tail):
    if x.TAIL:
        left, right = panels(tile)
        tma.async_copy_global_to_shared(desc, [b, h, row, 0], full, left)
        tma.async_copy_global_to_shared(desc, [b, h, row, 64], full, right)
        tma.async_copy_global_to_shared(desc, [b, h, row, 128], full, tail)
    else:
        tma.async_copy_global_to_shared(desc, [b, h, row, 0], full, tile)


@gluon.jit
def _producer(x):
    BLOCK_M: gl.constexpr = ROWS * x.CONSUMERS
    KV_BYTES: gl.constexpr = x.BLOCK_N * x.HEAD_DIM * 2
    tiles = x.num_blocks * x.BH

    tile = gl.program_id(0)
    n = 0  # tiles begun by this program
    step = 0  # steps of the ring, over all tiles
    while tile < tiles:
        block_m, b, h = tile_place(x, tile)
        publish_tile(x, n, block_m, b, h)
        h_kv = h // x.heads_per_kv
        begin, _, _, end = _key_blocks(x, block_m * BLOCK_M, BLOCK_M)

        # An empty-barrier is awaited with the opposite phase, so that the first use passes at once.
        slot = step % x.STAGES
        mbarrier.wait(x.empty.index(slot), ((step // x.STAGES) & 1) ^ 1)
        mbarrier.expect(x.full.index(slot), KV_BYTES)
        start_n = (end - 1) * x.BLOCK_N
        load(x, x.k_desc, b, h_kv, start_n, x.full.index(slot), x.k.index(slot), x.k_tail.index(slot))
        step += 1
        for c in gl.static_range(x.CONSUMERS):
            mbarrier.wait(x.q_empty.index(c), (n & 1) ^ 1)
            mbarrier.expect(x.q_full.index(c), ROWS * x.HEAD_DIM * 2)
            start_m = block_m * BLOCK_M + c * ROWS
            load(x, x.q_desc, b, h, start_m, x.q_full.index(c), x.q.index(c), x.q_tail.index(c))
        for i in range(1, end - begin):
            start_n = (end - 1 - i) * x.BLOCK_N
            slot = step % x.STAGES
            mbarrier.wait(x.empty.index(slot), ((step // x.STAGES) & 1) ^ 1)
            mbarrier.expect(x.full.index(slot), 2 * KV_BYTES)
            load(x, x.k_desc, b, h_kv, start_n, x.full.index(slot), x.k.index(slot), x.k_tail.index(slot))
            start_n += x.BLOCK_N
            load(x, x.v_desc, b, h_kv, start_n, x.full.index(slot), x.v.index(slot), x.v_tail.index(slot))
            step += 1
        slot = step % x.STAGES
        mbarrier.wait(x.empty.index(slot), ((step // x.STAGES) & 1) ^ 1)
        mbarrier.expect(x.full.index(slot), KV_BYTES)
        load(x, x.v_desc, b, h_kv, begin * x.BLOCK_N, x.full.index(slot), x.v.index(slot), x.v_tail.index(slot))
        step += 1

        # The next tile. Program p began with tile p, so exactly `tiles` tickets are drawn in a launch: whoever draws the last
        # one resets the counter for the next launch.
        ticket = gl.atomic_add(x.counter_ptr, 1)
        if ticket == tiles - 1:
            gl.store(x.counter_ptr, 0)
        tile = ticket + gl.num_programs(0)
        n += 1
    publish_tile(x, n, -1, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Consumer: one warpgroup, ROWS query rows
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _issue_scores(x, slot, zero, CONSUMER: gl.constexpr):
    """S = Q K^T, asynchronous: one product, or two."""
    k = x.k.index(slot).permute([1, 0])
    token = warpgroup_mma(x.q.index(CONSUMER), k, zero, use_acc=False, is_async=True)
    if x.TAIL:
        k = x.k_tail.index(slot).permute([1, 0])
        token = warpgroup_mma(x.q_tail.index(CONSUMER), k, token, is_async=True)
    return token


# O, too, has a tail: `tail` stands for it where it is not needed.


@gluon.jit
def _issue_pv(x, slot, p_packed, acc, tail):
    """O += P V, asynchronous: one product, or two."""
    dtype: gl.constexpr = x.v.dtype
    p = _unpack_p(p_packed, dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(p, x.v.index(slot), acc, is_async=True)
    if x.TAIL:
        p = _unpack_p(p_packed, dtype, gl.DotOperandLayout(0, tail.type.layout, 2))
        tail = warpgroup_mma(p, x.v_tail.index(slot), tail, is_async=True)
    return acc, tail


@gluon.jit
def _wait_for_pv(x, acc, tail):
    if x.TAIL:
        acc, tail = warpgroup_mma_wait(0, [acc, tail])
    else:
        acc = warpgroup_mma_wait(0, [acc])
    return acc, tail


@gluon.jit
def _consumer_step(
    x, acc, tail, l, m, p_packed, step, zero, limit, first, start_n, CONSUMER: gl.constexpr, MASKED: gl.constexpr
):
    """S = Q K(i)^T and right behind it O += P V of the step before; then the softmax of S."""
    slot = step % x.STAGES
    mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
    if x.PING_PONG:
        wait_for_turn(CONSUMER)
    s_token = _issue_scores(x, slot, zero, CONSUMER)
    acc, tail = _issue_pv(x, slot, p_packed, acc, tail)
    if x.PING_PONG:
        hand_over_turn(CONSUMER, x.CONSUMERS)

    s = warpgroup_mma_wait(2 if x.TAIL else 1, [s_token])  # S is ready, PV may still run
    p, alpha, m = _softmax_step(x, s, m, limit, first, start_n, MASKED, x.LAZY)
    row_sum = partial_row_sum(p)
    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, row_sum.type.layout))[:, None] + row_sum
    acc, tail = _wait_for_pv(x, acc, tail)
    mbarrier.arrive(x.empty.index(slot))
    acc = _rescale(acc, alpha, x.LAZY)
    if x.TAIL:
        tail = _rescale(tail, alpha, x.LAZY)
    return acc, tail, l, m, _pack_p(p, x.v.dtype)


@gluon.jit
def _consumer(x, CONSUMER: gl.constexpr):
    BLOCK_M: gl.constexpr = ROWS * x.CONSUMERS
    dtype: gl.constexpr = x.q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, x.BLOCK_N, 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, x.q.shape[2], 16]
    )
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    FIRST_MASKED: gl.constexpr = x.HAS_LAST or not x.EVEN_N
    zero = gl.full([ROWS, x.BLOCK_N], 0.0, gl.float32, s_layout)
    out = x.out.index(CONSUMER)
    out_tail = x.out_tail.index(CONSUMER)

    gl.assume(x.Sq > 0)  # else its sign takes a register
    n = 0
    step = 0
    if x.PING_PONG and CONSUMER == x.CONSUMERS - 1:
        hand_over_turn(CONSUMER, x.CONSUMERS)  # consumer 0 goes first
    block_m, b, h = read_tile(x, n)
    mbarrier.arrive(x.tile_empty.index(n % 2))
    while block_m >= 0:
        start_m = block_m * BLOCK_M + CONSUMER * ROWS
        offs_m = start_m + gl.arange(0, ROWS, layout=s_row)
        limit = gl.full([ROWS], 0, gl.int32, s_row) + x.Skv  # first invisible key of each row
        if x.HAS_LAST:
            limit = gl.minimum(limit, gl.maximum(offs_m + x.last, -1) + 1)
        first = limit
        if x.HAS_FIRST:
            first = offs_m + x.first
        if x.HAS_SINKS:
            sink = gl.load(x.sinks_ptr + h).to(gl.float32) * 1.4426950408889634
        begin, full_begin, full_end, end = _key_blocks(x, start_m, ROWS)
        if x.HAS_LAST:
            # Key blocks that only later rows of the tile see: free them, and take no part.
            tile_begin, _, _, tile_end = _key_blocks(x, block_m * BLOCK_M, BLOCK_M)
            for _ in range(tile_end - end):
                slot = step % x.STAGES
                mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
                if x.PING_PONG:
                    wait_for_turn(CONSUMER)
                    hand_over_turn(CONSUMER, x.CONSUMERS)
                mbarrier.arrive(x.empty.index(slot))
                step += 1

        # The first key block: no PV to overlap with yet.
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
        p, _, m = _softmax_step(x, s, m, limit, first, (end - 1) * x.BLOCK_N, FIRST_MASKED, False)
        l = partial_row_sum(p)  # running sum of each row
        p_packed = _pack_p(p, dtype)
        acc = gl.full([ROWS, x.q.shape[2]], 0.0, gl.float32, acc_layout)
        if x.TAIL:
            tail = gl.full([ROWS, 64], 0.0, gl.float32, tail_layout)
        else:
            tail = 0
        step += 1

        # The other blocks that need a mask, then those that do not, then in a window those on its other edge.
        if x.HAS_LAST:
            for i in range(end - 1 - full_end):
                start_n = (end - 2 - i) * x.BLOCK_N
                acc, tail, l, m, p_packed = _consumer_step(
                    x, acc, tail, l, m, p_packed, step, zero, limit, first, start_n, CONSUMER, True
                )
                step += 1
        else:
            full_end = end - 1
        for _ in range(full_end - full_begin):
            acc, tail, l, m, p_packed = _consumer_step(
                x, acc, tail, l, m, p_packed, step, zero, limit, first, 0, CONSUMER, False
            )
            step += 1
        if x.HAS_FIRST:
            for i in range(full_begin - begin):
                start_n = (full_begin - 1 - i) * x.BLOCK_N
                acc, tail, l, m, p_packed = _consumer_step(
                    x, acc, tail, l, m, p_packed, step, zero, limit, first, start_n, CONSUMER, True
                )
                step += 1
        if not x.OUT_IN_Q:
            mbarrier.arrive(x.q_empty.index(CONSUMER))  # the next tile's Q may come

        # The last PV, and under it the log-sum-exp. A row without keys has l = 0: output 0, lse -inf.
        slot = step % x.STAGES
        mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
        acc, tail = _issue_pv(x, slot, p_packed, acc, tail)
        row_sum = gl.convert_layout(gl.sum(l, 1), s_row)
        if x.HAS_SINKS:  # one more key, without a value
            m_new = gl.maximum(m, sink)
            shift = gl.where(m_new == -float("inf"), 0.0, m_new)
            own = gl.exp2(m - shift)
            row_sum = row_sum * own + gl.exp2(sink - shift)
            inverse = gl.where(row_sum > 0.0, own / row_sum, 0.0)
            m = m_new
        else:
            inverse = gl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
        if x.SAVE_LSE:
            lse = (m + gl.log2(row_sum)) * 0.6931471805599453
            gl.store(x.lse_ptr + (b * x.H + h).to(gl.int64) * x.Sq + offs_m, lse, mask=offs_m < x.Sq)
        acc, tail = _wait_for_pv(x, acc, tail)
        mbarrier.arrive(x.empty.index(slot))
        step += 1
        if x.HAS_FIRST:
            # Key blocks that only earlier rows of the tile see. The turn comes first: others need not wait for this one's ring.
            for _ in range(begin - tile_begin):
                slot = step % x.STAGES
                if x.PING_PONG:
                    wait_for_turn(CONSUMER)
                    hand_over_turn(CONSUMER, x.CONSUMERS)
                mbarrier.wait(x.full.index(slot), (step // x.STAGES) & 1)
                mbarrier.arrive(x.empty.index(slot))
                step += 1

        # O goes out by TMA, which drops rows past Sq. Its reads are awaited only when the buffer is needed again, so the
        # store runs under the next tile.
        acc = acc * gl.convert_layout(inverse, acc_row)[:, None]
        if not x.OUT_IN_Q:
            tma.store_wait(0)
        out.store(acc.to(dtype))
        if x.TAIL:
            tail = tail * gl.convert_layout(inverse, gl.SliceLayout(1, tail_layout))[:, None]
            out_tail.store(tail.to(dtype))
        fence_async_shared()
        if x.TAIL:
            left, right = panels(out)
            tma.async_copy_shared_to_global(x.out_desc, [b, h, start_m, 0], left)
            tma.async_copy_shared_to_global(x.out_desc, [b, h, start_m, 64], right)
            tma.async_copy_shared_to_global(x.out_desc, [b, h, start_m, 128], out_tail)
        else:
            tma.async_copy_shared_to_global(x.out_desc, [b, h, start_m, 0], out)
        if x.OUT_IN_Q:
            tma.store_wait(0)
            mbarrier.arrive(x.q_empty.index(CONSUMER))
        n += 1
        block_m, b, h = read_tile(x, n)
        mbarrier.arrive(x.tile_empty.index(n % 2))
    tma.store_wait(0)
    if x.PING_PONG and CONSUMER == 0:
        wait_for_turn(CONSUMER)  # take the last hand-over, so that the barrier's counts balance


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "scale_log2",
        "cap_scale",
        "Sq",
        "Skv",
        "first",
        "last",
        "num_blocks",
        "H",
        "heads_per_kv",
        "BH",
        "section",
    ]
)
def _flash_attn_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, counter_ptr, sinks_ptr,
    scale_log2, cap_scale, Sq, Skv, first, last, num_blocks, H, heads_per_kv, BH, section,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    OUT_IN_Q: gl.constexpr, PING_PONG: gl.constexpr, LAZY: gl.constexpr, REGISTERS: gl.constexpr,
    HAS_LAST: gl.constexpr, HAS_FIRST: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    EVEN_N: gl.constexpr, SAVE_LSE: gl.constexpr,
):  # fmt: skip
    """Persistent: at most one program on an SM. Launched with num_warps=4, the first consumer's."""
    dtype: gl.constexpr = q_desc.dtype
    BUFFERS: gl.constexpr = 2 if CONSUMERS == 2 else 4  # shapes must be powers of two
    # The descriptors have rank 4, the buffers rank 2: a box is one head's.
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    MAIN: gl.constexpr = 128 if HEAD_DIM == 192 else HEAD_DIM
    q = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, MAIN], tile_layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, MAIN], tile_layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, MAIN], tile_layout)
    if OUT_IN_Q:
        out = q
    else:
        out = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, MAIN], tile_layout)
    q_tail, k_tail, v_tail, out_tail = q, k, v, out
    if HEAD_DIM == 192:
        q_tail = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, 64], tile_layout)
        k_tail = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 64], tile_layout)
        v_tail = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 64], tile_layout)
        out_tail = gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, 64], tile_layout)
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
        (q_desc, k_desc, v_desc, out_desc, lse_ptr, counter_ptr, sinks_ptr),
        (scale_log2, cap_scale, Sq, Skv, first, last, num_blocks, H, heads_per_kv, BH, section),
        (q, k, v, out, q_tail, k_tail, v_tail, out_tail, tile),
        (q_full, q_empty, full, empty, tile_full, tile_empty),
        (CONSUMERS, BLOCK_N, HEAD_DIM, STAGES, OUT_IN_Q, PING_PONG, LAZY),
        (HAS_LAST, HAS_FIRST, HAS_SOFTCAP, HAS_SINKS, EVEN_N, SAVE_LSE),
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

# By the head size's block. BLOCK_N: keys a step. STAGES: depth of the K / V ring. OUT_IN_Q: O leaves through Q's buffer (at 256
# there is no room for its own). PING_PONG: consumers take turns on the tensor cores. LAZY: see _rescale. REGISTERS: of a
# consumer's thread. Measured on an H200.
_CONFIGS: dict[int, dict[str, Any]] = {
    64: {
        "CONSUMERS": 3, "BLOCK_N": 128, "STAGES": 4, "OUT_IN_Q": False, "PING_PONG": True, "LAZY": False, "REGISTERS": 160,
    },
    128: {
        "CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 2, "OUT_IN_Q": False, "PING_PONG": False, "LAZY": False, "REGISTERS": 240,
    },
    192: {
        "CONSUMERS": 2, "BLOCK_N": 64, "STAGES": 2, "OUT_IN_Q": False, "PING_PONG": False, "LAZY": True, "REGISTERS": 240,
    },
    256: {
        "CONSUMERS": 2, "BLOCK_N": 64, "STAGES": 2, "OUT_IN_Q": True, "PING_PONG": False, "LAZY": True, "REGISTERS": 240,
    },
}  # fmt: skip
# How a box of 16-bit values lies in shared memory: as a warpgroup's matrix product wants its operands.
TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
# K and V of the heads that run side by side should fill no more of the L2 cache than this.
_L2_BYTES = 16 * 2**20


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Write out and, unless it is None, lse. left, right: as those of triton_kernels.Options.

    float16 or bfloat16, a head size of at most 256 that is a multiple of 8, scale > 0. Inputs that TMA cannot take (a last
    stride other than 1, expanded, rows or a base that are not aligned to 16 bytes) are copied.
    """
    if isinstance(q, (FakeTensor, FunctionalTensor)):
        raise NotInlinable(_flash_attn_fwd_hopper_kernel.__name__)
    if q.shape[:3].numel() == 0:
        return
    if sinks is not None:
        sinks = sinks.contiguous()
    if lse is None and is_window(left, right) and q.shape[3] > 192:  # without this store, ptxas spills a register
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    key = (
        *(q.shape, q.stride(), k.shape, k.stride(), v.stride(), out.stride()),
        *(aligned(q), aligned(k), aligned(v), q.dtype, q.device, scale, left, right, lse is None),
        *(softcap, None if sinks is None else sinks.dtype),
    )
    plan = _plans.find(key)
    if plan is None:
        copies = describable(q), describable(k), describable(v)
        plan = _plan(*copies, out, lse, _tile_counter(q), sinks, scale, left, right, softcap)
        if all(x is y for x, y in zip(copies, (q, k, v), strict=True)):  # else they are to be made at every call
            _plans.keep(key, plan)
        q, k, v = copies
    # out once more is a pointer that nobody follows, where there is nothing to save, and where there are no sinks
    plan(q, k, v, out, out if lse is None else lse, _tile_counter(q), out if sinks is None else sinks)


_plans = Plans()


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    counter: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> Prepared:
    B, H, Sq, D = q.shape
    Hkv, Skv = k.shape[1], k.shape[2]
    head_dim = next(width for width in _CONFIGS if width >= D)
    box = 64 if head_dim == 192 else head_dim
    config = _CONFIGS[head_dim]
    block_n, group = config["BLOCK_N"], H // Hkv
    num_blocks = cdiv(Sq, ROWS.value * config["CONSUMERS"])
    # as many key heads at a time as fit, each with all its query heads
    section = min(B * H, group * max(1, _L2_BYTES // (2 * Skv * D * k.element_size())))
    first, last = reach(Sq, Skv, left, right)
    bounded, even = left >= 0 or right >= 0, Skv % block_n == 0
    log2e = math.log2(math.e)
    return Prepared(
        _flash_attn_fwd_hopper_kernel,
        (min(sm_count(q.device), num_blocks * B * H),),
        boxes(q, ROWS.value, box),
        boxes(k, block_n, box),
        boxes(v, block_n, box),
        boxes(out, ROWS.value, box),
        out if lse is None else lse,
        counter,
        out if sinks is None else sinks,
        (softcap or scale) * log2e,
        2 * log2e * scale / softcap if softcap else 0.0,
        *(Sq, Skv, first, last, num_blocks, H, group, B * H, section),
        num_warps=4,
        HEAD_DIM=head_dim,
        # a bound that hides nothing masks the keys beyond Skv with fewer registers
        HAS_LAST=bounded or (not even and (softcap > 0 or sinks is not None)),
        HAS_FIRST=is_window(left, right),
        HAS_SOFTCAP=softcap > 0,
        HAS_SINKS=sinks is not None,
        EVEN_N=even and not bounded,
        SAVE_LSE=lse is not None,
        **config,
    )


def is_window(left: int, right: int) -> bool:
    """Neither full nor causal: the kernels' third mask, with a bound on both sides. A side without one gets one that hides
    nothing."""
    return left >= 0 or right > 0


def reach(Sq: int, Skv: int, left: int, right: int) -> tuple[int, int]:
    """Query i sees the keys from i + first to i + last: (first, last)."""
    return Skv - Sq - (left if left >= 0 else Skv), Skv - Sq + (right if right >= 0 else Sq)


def describable(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, S, D), or a copy that TMA can read."""
    return x if can_describe(x) else x.clone(memory_format=torch.contiguous_format)  # contiguous() may keep the base


def boxes(x: torch.Tensor, rows: int, head_dim: int) -> Descriptor:
    """Descriptor of x (B, H, S, D) for boxes of one head's (rows, head_dim)."""
    return descriptor(x, (1, 1, rows, head_dim), TILE)


# --------------------------------------------------------------------------------------------------------------------
# The tile counter
#
# It must be 0 when a launch begins, no other launch may touch it meanwhile, and the kernel leaves it at 0. So:
#
# * Launches that may overlap need counters of their own. Launches on one stream never overlap, whichever threads they come
#   from: a counter for each (device, stream) serves all of them, and costs nothing after the first call.
# * A captured launch runs again whenever its graph is replayed, on any stream, beside eager launches on the stream that it was
#   captured on. It gets a counter of its own, which lives in the graph's memory, and whose clearing is captured with it.
# * A lasting counter must not lie in a memory pool that somebody owns: the warm-up run before Inductor records a CUDA graph
#   allocates from the graph's pool, which is rolled back after. Pools are entered by a thread (or by a stream other than the
#   default one), so the counter is allocated by a thread of its own, on the default stream, which moreover can be under
#   nobody's capture. It is never freed.
# * A stream that torch did not make may be destroyed with work in flight, and its handle may come back as another stream's.
#   torch's own streams live as long as the process; on any other stream every launch gets a fresh counter.
# --------------------------------------------------------------------------------------------------------------------

# (device, stream handle) -> counter; None: a fresh one for every launch
_counters: dict[tuple[int, int], torch.Tensor | None] = {}


def _tile_counter(q: torch.Tensor) -> torch.Tensor:
    """(1,) int32, 0 when the launch that is about to be made on q's device begins."""
    if q.is_meta:
        return q.new_empty(1, dtype=torch.int32)
    device = q.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _tile_counter(q)
    if torch.cuda.is_current_stream_capturing():
        return q.new_zeros(1, dtype=torch.int32)
    place = device, torch._C._cuda_getCurrentRawStream(device)
    if place not in _counters:
        stream = torch.cuda.current_stream(device)
        foreign = stream.stream_id == stream.cuda_stream != 0
        # two threads may come here at once: one counter wins, and it is cleared before either of them launches
        _counters.setdefault(place, None if foreign else _lasting_counter(device))
    counter = _counters[place]
    return q.new_zeros(1, dtype=torch.int32) if counter is None else counter


def _lasting_counter(device: int) -> torch.Tensor:
    """A counter that is 0 for whatever the current stream does next."""
    made: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def make() -> None:
        with torch.cuda.device(device):
            counter = torch.zeros(1, dtype=torch.int32, device="cuda")
            made.append((counter, torch.cuda.current_stream().record_event()))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    [(counter, cleared)] = made
    torch.cuda.current_stream(device).wait_event(cleared)
    return counter
