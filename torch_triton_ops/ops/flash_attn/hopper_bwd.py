"""Attention backward for Hopper (sm_90), in Gluon. Read hopper.py first: the same roles, barriers and descriptors.

For head sizes up to 128; hopper_bwd_wide.py has the kernel for larger ones.

A program owns BLOCK_N = 128 keys of one key head, with dK and dV in its registers, and walks over the queries that see them,
BLOCK_M at a time, head after head of the group that shares these keys: so dK and dV are summed without atomics. One producer
warp loads; two consumer warpgroups own 64 keys each. A step computes, transposed so that P^T is in registers exactly as the
operand of the next product,

    S^T = K Q^T,  dP^T = V dO^T,  P^T = exp(S^T - lse),  dS^T = P^T * (dP^T - delta),  dV += P^T dO,  dK += dS^T Q

and dS^T goes through shared memory once, where dQ += dS K reads it too, over the keys of both consumers. dQ is summed over
programs in float32 by TMA reduce-adds, whose order is not fixed: dK and dV repeat bit for bit, dQ need not.

dQ lags one step behind, so that no consumer waits for the other one's softmax of the same step. The two slots of dS with
their empty-barrier do more than protect memory: they keep the consumers from drifting a whole step apart, where both would
want the tensor cores at once.

Before it, a small kernel reduces each query's row to lse and delta = dot(dO, O) and clears dQ's sums; after it, another one
casts these. `backward` launches all three.
"""

# No `from __future__ import annotations` here: an aggregate's fields are declared by their types themselves.

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from torch_triton_ops.launch import NotInlinable, Plans, Prepared, aligned, cdiv, descriptor

from .hopper import TILE, boxes, describable, is_window, reach, tanh
from .triton_kernels import _load_rows, sum_over_queries

HALF_N = gl.constexpr(64)  # keys of a consumer
BLOCK_N = gl.constexpr(128)  # keys of a program
STAGES = gl.constexpr(2)  # depth of the Q / dO ring; 3 is slower
FULL, CAUSAL, WINDOW = (
    gl.constexpr(0),
    gl.constexpr(1),
    gl.constexpr(2),
)  # which queries see a key: all, no earlier ones, a band


@builtin
def _tma_reduce_add(desc, coord, src, _semantic=None):
    """global[coord] += src, asynchronous; tma.store_wait waits for it as for a store. The compiler has it, Gluon gives it no
    name of its own."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


# --------------------------------------------------------------------------------------------------------------------
# What the producer and the consumers share
# --------------------------------------------------------------------------------------------------------------------


@aggregate
class _Backward:
    """One program's arguments, buffers and barriers."""

    # global memory
    q_desc: tma.tensor_descriptor  # (B, Hq, Sq, D), box (1, 1, BLOCK_M, HEAD_DIM)
    k_desc: tma.tensor_descriptor  # (B, Hkv, Skv, D), box (1, 1, HALF_N, HEAD_DIM)
    v_desc: tma.tensor_descriptor  # as k
    dout_desc: tma.tensor_descriptor  # as q
    rows_desc: tma.tensor_descriptor  # (2, B * Hq * padded Sq) float32, box (2, BLOCK_M): lse in units of log 2, delta
    dq_desc: tma.tensor_descriptor  # float32 sums, box (32, 128): see dq below
    dk_desc: tma.tensor_descriptor  # as k
    dv_desc: tma.tensor_descriptor  # as v
    # the problem
    scale: gl.tensor
    scale_log2: gl.tensor  # log2(e) times the scale, or with softcap times that: so that exp becomes exp2
    cap_scale: gl.tensor  # softcap: 2 * log2(e) * scale / softcap
    uncap: gl.tensor  # softcap: 1 / (softcap * log2(e))
    Skv: gl.tensor
    first_key: gl.tensor  # query i sees the keys from i + first_key (windows)
    last_key: gl.tensor  # to i + last_key (causal, windows)
    query_blocks: gl.tensor
    key_blocks: gl.tensor
    H: gl.tensor  # key heads
    BH: gl.tensor  # B * H
    heads_per_kv: gl.tensor
    # shared memory
    k: gl.shared_memory_descriptor  # (2, HALF_N, HEAD_DIM): one half for each consumer
    v: gl.shared_memory_descriptor  # (2, HALF_N, HEAD_DIM)
    q: gl.shared_memory_descriptor  # (STAGES, BLOCK_M, HEAD_DIM)
    dout: gl.shared_memory_descriptor  # (STAGES, BLOCK_M, HEAD_DIM)
    rows: gl.shared_memory_descriptor  # (STAGES, 2, BLOCK_M)
    ds: gl.shared_memory_descriptor  # (2 * 2, HALF_N, BLOCK_M): dS^T, two slots of two halves
    dq: gl.shared_memory_descriptor  # (2, BLOCK_M, HEAD_DIM / 2) float32: one half for each consumer, on its way out
    steps: (
        gl.shared_memory_descriptor
    )  # (16, 1) int32: for four steps, dQ's row and for each consumer its edge (`hide`)
    # barriers
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # (STAGES, 1): Q and its rows
    dout_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor  # both consumers are done with Q, its rows and dO
    ds_full: gl.shared_memory_descriptor  # (2, 1): both halves of dS^T are written
    ds_empty: gl.shared_memory_descriptor  # both consumers have read dS^T
    out_full: gl.shared_memory_descriptor  # (2, 1): a consumer's dV, then its dK, lies where its half of V was
    out_empty: gl.shared_memory_descriptor  # its dV has been sent
    # constants
    HEAD_DIM: gl.constexpr
    BLOCK_M: gl.constexpr  # queries of a step
    BLOCK_N: gl.constexpr  # keys of a program
    SECTION: gl.constexpr  # heads that run side by side
    MASK: gl.constexpr  # FULL, CAUSAL or WINDOW
    HAS_SOFTCAP: gl.constexpr
    OPAQUE: gl.constexpr  # see _half
    FIRST_IS_UNSEEN: gl.constexpr  # the first step's queries see no key of the second consumer
    EVEN_N: gl.constexpr  # FULL, and no key block is partly empty

    @gluon.constexpr_function
    def __init__(self, tensors, factors, problem, buffers, barriers, constants):
        self.q_desc, self.k_desc, self.v_desc, self.dout_desc = tensors[:4]
        self.rows_desc, self.dq_desc, self.dk_desc, self.dv_desc = tensors[4:]
        self.scale, self.scale_log2, self.cap_scale, self.uncap = factors
        self.Skv, self.first_key, self.last_key = problem[:3]
        self.query_blocks, self.key_blocks, self.H, self.BH, self.heads_per_kv = problem[3:]
        self.k, self.v, self.q, self.dout, self.rows, self.ds, self.dq, self.steps = buffers
        self.k_full, self.v_full, self.q_full, self.dout_full, self.empty, self.ds_full, self.ds_empty = barriers[:7]
        self.out_full, self.out_empty = barriers[7:]
        self.HEAD_DIM, self.BLOCK_M, self.BLOCK_N, self.SECTION = map(gl.constexpr, constants[:4])
        self.MASK, self.HAS_SOFTCAP, self.OPAQUE = map(gl.constexpr, constants[4:7])
        self.FIRST_IS_UNSEEN, self.EVEN_N = map(gl.constexpr, constants[7:])


@gluon.jit
def place(x):
    """(batch, key head, first key, first query block, number of query blocks) of this program.

    Heads are taken in sections, so that their Q, dO and dQ stay in L2. Inside a section the first keys of every head come
    first: under a causal mask these are the longest programs.
    """
    pid = gl.program_id(0)
    section = pid // (x.SECTION * x.key_blocks)
    rest = pid % (x.SECTION * x.key_blocks)
    size = gl.minimum(x.SECTION, x.BH - section * x.SECTION)  # the last section may be smaller
    start_n = rest // size * x.BLOCK_N
    bh = section * x.SECTION + rest % size
    first = 0
    end = x.query_blocks
    if x.MASK != FULL:  # earlier queries see none of these keys; but every program takes two steps at least
        first = gl.minimum(gl.maximum(start_n - x.last_key, 0) // x.BLOCK_M, x.query_blocks - 2)
    if x.MASK == WINDOW:  # nor do later ones
        seen = gl.maximum(start_n + x.BLOCK_N - x.first_key, 0)  # queries up to this one
        end = gl.minimum(gl.maximum((seen + x.BLOCK_M - 1) // x.BLOCK_M, first + 2), end)
    return bh // x.H, bh % x.H, start_n, first, end - first


# --------------------------------------------------------------------------------------------------------------------
# Producer: one warp. Loads K and V once, then Q, its rows and dO of every step.
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _producer(x):
    b, h, start_n, first, steps = place(x)
    KV_BYTES: gl.constexpr = x.BLOCK_N * x.HEAD_DIM * 2
    mbarrier.expect(x.k_full, KV_BYTES)
    for c in gl.static_range(2):
        tma.async_copy_global_to_shared(x.k_desc, [b, h, start_n + c * HALF_N, 0], x.k_full, x.k.index(c))
    t = 0
    # of the head's first query, among those of all heads
    row = (b * x.H + h) * x.heads_per_kv * x.query_blocks * x.BLOCK_M
    for g in range(x.heads_per_kv):
        hq = h * x.heads_per_kv + g
        for i in range(steps):
            slot = t % STAGES
            start_m = (first + i) * x.BLOCK_M
            # One barrier frees Q and dO together; the first STAGES waits (of the opposite phase) pass at once.
            mbarrier.wait(x.empty.index(slot), ((t // STAGES) & 1) ^ 1)
            write(x.steps, t % 4 * 4, row + start_m)
            if x.MASK != FULL:
                for c in gl.static_range(2):
                    write(x.steps, t % 4 * 4 + 1 + c, edge_of(x, start_m, start_n + c * HALF_N))
            mbarrier.expect(x.q_full.index(slot), x.BLOCK_M * x.HEAD_DIM * 2 + 2 * x.BLOCK_M * 4)
            tma.async_copy_global_to_shared(x.q_desc, [b, hq, start_m, 0], x.q_full.index(slot), x.q.index(slot))
            tma.async_copy_global_to_shared(x.rows_desc, [0, row + start_m], x.q_full.index(slot), x.rows.index(slot))
            if t == 0:
                mbarrier.expect(x.v_full, KV_BYTES)
                for c in gl.static_range(2):
                    tma.async_copy_global_to_shared(x.v_desc, [b, h, start_n + c * HALF_N, 0], x.v_full, x.v.index(c))
            mbarrier.expect(x.dout_full.index(slot), x.BLOCK_M * x.HEAD_DIM * 2)
            tma.async_copy_global_to_shared(
                x.dout_desc, [b, hq, start_m, 0], x.dout_full.index(slot), x.dout.index(slot)
            )
            t += 1
        row += x.query_blocks * x.BLOCK_M

    for c in gl.static_range(2):
        mbarrier.wait(x.out_full.index(c), 0)
        tma.async_copy_shared_to_global(x.dv_desc, [b, h, start_n + c * HALF_N, 0], x.v.index(c))
    tma.store_wait(0)
    for c in gl.static_range(2):
        mbarrier.arrive(x.out_empty.index(c))
    for c in gl.static_range(2):
        mbarrier.wait(x.out_full.index(c), 1)
        tma.async_copy_shared_to_global(x.dk_desc, [b, h, start_n + c * HALF_N, 0], x.v.index(c))
    tma.store_wait(0)


# --------------------------------------------------------------------------------------------------------------------
# Consumer WG (0 or 1): one warpgroup with 64 rows of dK and dV, and half of dQ
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _half(x, tile, half, t):
    """tile[half], of K or V. OPAQUE: at an address that the compiler takes for a new one in every step t, lest it keep those of
    all operands in registers."""
    if x.OPAQUE:
        return tile.index(half + (t >> 30))
    else:
        return tile.index(half)


@gluon.jit
def _issue_dq(x, t, WG: gl.constexpr):
    """dQ(t)'s part of this consumer, (64, 64), = dS(t) K over all 128 keys; asynchronous.

    The part: at HEAD_DIM 128 (BLOCK_M 64) these 64 columns, at HEAD_DIM 64 (BLOCK_M 128) these 64 queries.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    panel: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    zero = gl.full([64, 64], 0.0, gl.float32, layout)
    # In shared memory a (64, 128) tile of 16 bits with 128-byte swizzle is two panels of (64, 64).
    ds = (t % 2) * 2
    if x.HEAD_DIM == 128:
        panels = x.k._reinterpret(x.k.dtype, [4, HALF_N, 64], panel)
        token = warpgroup_mma(x.ds.index(ds).permute([1, 0]), panels.index(WG), zero, use_acc=False, is_async=True)
        token = warpgroup_mma(x.ds.index(ds + 1).permute([1, 0]), panels.index(2 + WG), token, is_async=True)
    else:
        panels = x.ds._reinterpret(x.k.dtype, [8, HALF_N, 64], panel)
        first = panels.index(ds * 2 + WG).permute([1, 0])
        token = warpgroup_mma(first, _half(x, x.k, 0, t), zero, use_acc=False, is_async=True)
        token = warpgroup_mma(panels.index(ds * 2 + 2 + WG).permute([1, 0]), _half(x, x.k, 1, t), token, is_async=True)
    return token


@gluon.jit
def _add_dq(x, row, dq, WG: gl.constexpr):
    """The sums += dq, (64, 64), of the block of queries that begins with number `row`."""
    row = (row >> 6) * (x.HEAD_DIM // 2) + WG * 32
    tma.store_wait(0)  # the reduce-add before this one has read the buffer
    stage = x.dq.index(WG)
    stage.store(dq)
    fence_async_shared()
    blob = stage._reinterpret(gl.float32, [32, 128], x.dq_desc.layout)
    _tma_reduce_add(x.dq_desc, [row, 0], blob)


@gluon.jit
def edge_of(x, start_m, start_n):
    """The edge, in the sense of `hide`, between the queries from start_m and the 64 keys from start_n. By the producer, whose
    time is free."""
    last = start_m + x.last_key - start_n
    if x.MASK == WINDOW:
        last = gl.minimum(gl.maximum(last, -x.BLOCK_M), 63)
        first = gl.minimum(gl.maximum(start_m + x.first_key - start_n, 1 - x.BLOCK_M), 64)
        keys = gl.minimum(gl.maximum(x.Skv - start_n, 0), 64)
        return (last & 255) | ((first & 255) << 8) | (keys << 16)
    else:
        return last


@gluon.constexpr_function
def _hide_asm(mask, registers, queries):
    """Of an accumulator of 64 rows a thread holds, in this order, for each j: columns 8 j + 2 (lane % 4) + (0, 1) of row
    16 warp + lane / 4, then the same of the row 8 further down. Operand 2 * registers is the edge. The indices are computed
    here because the compiler would keep them in registers across the loop, which has none to spare."""
    edge = f"${2 * registers}"
    rows = "mov.u32 lane, %tid.x; bfe.u32 row, lane, 5, 2; bfe.u32 part, lane, 2, 3; mad.lo.s32 row, row, 16, part; "
    columns = "and.b32 part, lane, 3; shl.b32 part, part, 1; "
    # seen: predicate p of register i, whose row is row or low, and whose column is `column` + 2 (lane % 4)
    row, column = ["low" if i & 2 else "row" for i in range(registers)], [i // 4 * 8 + i % 2 for i in range(registers)]
    if mask == 1:  # column + edge >= row, that is 8 j + e >= row - edge - 2 (lane % 4)
        nothing = f"setp.ge.s32 p, {edge}, 63; "
        bound = f"sub.s32 row, row, {edge}; {columns}sub.s32 row, row, part; add.s32 low, row, 8; "
        test = [f"setp.le.s32 p, {row[i]}, {column[i]};" for i in range(registers)]
    elif mask == 2:  # and column + first <= row, and row < keys
        nothing = f"setp.eq.s32 p, {edge}, {63 | (1 - queries & 255) << 8 | 64 << 16}; "
        bound = (
            f"{columns}sub.s32 part, row, part; "
            f"bfe.s32 row_end, {edge}, 8, 8; sub.s32 row_end, part, row_end; add.s32 low_end, row_end, 8; "
            f"bfe.u32 lane, {edge}, 16, 8; setp.lt.s32 p, row, lane; selp.s32 row_end, row_end, -1000, p; "
            "add.s32 row, row, 8; setp.lt.s32 p, row, lane; selp.s32 low_end, low_end, -1000, p; "
            f"bfe.s32 row, {edge}, 0, 8; sub.s32 row, part, row; add.s32 low, row, 8; "
        )
        test = [
            f"setp.le.s32 p, {row[i]}, {column[i]}; setp.ge.and.s32 p, {row[i]}_end, {column[i]}, p;"
            for i in range(registers)
        ]
    else:  # row < edge
        nothing = f"setp.ge.s32 p, {edge}, 64; "
        bound = "add.s32 low, row, 8; "
        test = [f"setp.lt.s32 p, {row[i]}, {edge};" for i in range(registers)]
    select = " ".join(f"{test[i]} selp.f32 ${i}, ${i}, 0f00000000, p;" for i in range(registers))
    return (
        "{ .reg .pred p; .reg .s32 row, low, part, row_end, low_end; .reg .u32 lane; "
        f"{nothing}@p bra DONE; {rows}{bound}{select} DONE: }}"
    )


@gluon.constexpr_function
def _hide_constraints(registers):
    return ",".join(["=f"] * registers + [str(i) for i in range(registers)] + ["r"] * registers)


@gluon.jit
def hide(p, edge, MASK: gl.constexpr):
    """P^T (64 keys, queries), 0 where a query does not see a key. Jumps over it all where nothing is to be hidden, as in most
    steps. In numbers of query and key within P^T, what is seen is

    FULL: key < edge; CAUSAL: key <= query + edge;
    WINDOW: query + first <= key <= query + last and key < keys, where edge holds last, first and keys in its three low bytes,
    cut to what still makes a difference.
    """
    registers: gl.constexpr = p.shape[0] * p.shape[1] // 128
    asm: gl.constexpr = _hide_asm(MASK, registers, p.shape[1])
    constraints: gl.constexpr = _hide_constraints(registers)
    edge = gl.full([p.shape[0], p.shape[1]], 0, gl.int32, p.type.layout) + edge
    return gl.inline_asm_elementwise(asm, constraints, [p, edge], dtype=gl.float32, is_pure=True, pack=registers)


@gluon.jit
def read(ints, i):
    """Number i of a shared array of int32."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(ints.index(i).load(layout), 0)


@gluon.jit
def write(ints, i, value):
    """By the producer's one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ints.index(i).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _cap_slope(p, lse, uncap):
    """What softcap takes the score's derivative by, 1 - tanh(score / softcap)^2, from P: there are no registers to keep tanh in.

    uncap is 1 / (softcap * log2(e)), lse in units of softcap: then log2(p) * uncap + lse is the tanh. Where P is 0 any number
    from 0 to 1 will do.
    """
    tanh = gl.inline_asm_elementwise(
        "{ .reg .f32 x; max.f32 x, $1, 0f00800000; lg2.approx.ftz.f32 x, x; fma.rn.f32 $0, x, $3, $2; }",
        "=f,f,f,f",
        [p, lse[None, :], uncap],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return gl.maximum(1.0 - tanh * tanh, 0.0)


@gluon.jit
def _step(x, t, tail, dk, dv, HAS_PREVIOUS: gl.constexpr, WG: gl.constexpr):
    """One block of queries: S^T, dP^T, P^T, dS^T; then dQ(t - 1) to dq_row, and dV, dK += this block's share.

    tail: this consumer's keys before Skv. Everything issued is awaited within the step: ptxas serialised every variant with
    products in flight across the back edge of the loop.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.BLOCK_M, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)  # P^T as an operand in registers
    query_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = x.q_desc.dtype
    zero = gl.full([HALF_N, x.BLOCK_M], 0.0, gl.float32, s_layout)
    rows = x.rows._reinterpret(gl.float32, [2 * STAGES, x.BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slot = t % STAGES
    phase = (t // STAGES) & 1

    # Rows are keys, columns are queries: (HALF_N, x.BLOCK_M).
    mbarrier.wait(x.q_full.index(slot), phase)
    s_token = warpgroup_mma(_half(x, x.k, WG, t), x.q.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.wait(x.dout_full.index(slot), phase)
    dp_token = warpgroup_mma(
        _half(x, x.v, WG, t), x.dout.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True
    )

    edge = tail
    if x.MASK != FULL:
        edge = read(x.steps, t % 4 * 4 + 1 + WG)  # now, under the products
    s = warpgroup_mma_wait(1, [s_token])
    lse = rows.index(slot * 2).load(query_column)
    if x.HAS_SOFTCAP:
        s = tanh(s, x.cap_scale)
    p = gl.exp2(s * x.scale_log2 - lse[None, :])
    if not x.EVEN_N:
        p = hide(p, edge, x.MASK)

    dp = warpgroup_mma_wait(0, [dp_token])
    delta = rows.index(slot * 2 + 1).load(query_column)
    ds = p * (dp - delta[None, :])
    if x.HAS_SOFTCAP:
        ds = ds * _cap_slope(p, rows.index(slot * 2).load(query_column) * x.uncap, x.uncap)
    ds = ds.to(dtype)
    p_operand = gl.convert_layout(p.to(dtype), p_layout)
    if x.HEAD_DIM == 64:  # with 128 columns there are no registers to keep dS^T in: dK reads what dQ reads
        ds_operand = gl.convert_layout(ds, p_layout)

    mbarrier.wait(x.ds_empty.index(t % 2), ((t // 2) & 1) ^ 1)  # dQ(t - 2) is finished
    own_ds = x.ds.index((t % 2) * 2 + WG)
    own_ds.store(ds)
    fence_async_shared()
    mbarrier.arrive(x.ds_full.index(t % 2))

    if HAS_PREVIOUS:
        mbarrier.wait(x.ds_full.index((t - 1) % 2), ((t - 1) // 2) & 1)
        dq_token = _issue_dq(x, t - 1, WG)
    dv_token = warpgroup_mma(p_operand, x.dout.index(slot), dv, is_async=True)
    if x.HEAD_DIM == 64:
        dk_token = warpgroup_mma(ds_operand, x.q.index(slot), dk, is_async=True)
    else:
        dk_token = warpgroup_mma(own_ds, x.q.index(slot), dk, is_async=True)
    if HAS_PREVIOUS:
        dq = warpgroup_mma_wait(2, [dq_token])  # dV and dK go on
        mbarrier.arrive(x.ds_empty.index((t - 1) % 2))
        _add_dq(x, read(x.steps, (t - 1) % 4 * 4), dq, WG)
    dv, dk = warpgroup_mma_wait(0, [dv_token, dk_token])
    mbarrier.arrive(x.empty.index(slot))
    return dk, dv


@gluon.jit
def _consumer(x, WG: gl.constexpr):
    _, _, start_n, _, steps = place(x)
    total = steps * x.heads_per_kv
    gl.assume(total > 1)
    tail = x.Skv - start_n - WG * HALF_N
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.HEAD_DIM, 16])
    dtype: gl.constexpr = x.q_desc.dtype
    dk = gl.full([HALF_N, x.HEAD_DIM], 0.0, gl.float32, acc_layout)
    dv = gl.full([HALF_N, x.HEAD_DIM], 0.0, gl.float32, acc_layout)

    mbarrier.wait(x.k_full, 0)
    mbarrier.wait(x.v_full, 0)
    if x.FIRST_IS_UNSEEN and WG == 1:
        # The first queries see none of these keys: dS = 0.
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.BLOCK_M, 16])
        x.ds.index(1).store(gl.full([HALF_N, x.BLOCK_M], 0.0, dtype, s_layout))
        fence_async_shared()
        mbarrier.arrive(x.ds_full.index(0))
        mbarrier.arrive(x.empty.index(0))
        dk, dv = _step(x, 1, tail, dk, dv, True, WG)
        for t in range(2, total):
            dk, dv = _step(x, t, tail, dk, dv, True, WG)
    else:
        dk, dv = _step(x, 0, tail, dk, dv, False, WG)
        for t in range(1, total):
            dk, dv = _step(x, t, tail, dk, dv, True, WG)

    t = total - 1

    # The last dQ. dV goes out meanwhile through this consumer's half of V, then dK too; the producer sends them.
    mbarrier.wait(x.ds_full.index(t % 2), (t // 2) & 1)
    dq_token = _issue_dq(x, t, WG)
    out = x.v.index(WG)
    out.store(dv.to(dtype))
    fence_async_shared()
    mbarrier.arrive(x.out_full.index(WG))
    dq = warpgroup_mma_wait(0, [dq_token])
    _add_dq(x, read(x.steps, t % 4 * 4), dq, WG)
    mbarrier.wait(x.out_empty.index(WG), 0)
    out.store((dk * x.scale).to(dtype))
    fence_async_shared()
    mbarrier.arrive(x.out_full.index(WG))
    tma.store_wait(0)  # the last reduce-add has read its buffer


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "scale",
        "scale_log2",
        "cap_scale",
        "uncap",
        "Skv",
        "first_key",
        "last_key",
        "query_blocks",
        "key_blocks",
        "H",
        "BH",
        "heads_per_kv",
    ]
)
def _flash_attn_bwd_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, dq_desc, dk_desc, dv_desc,
    scale, scale_log2, cap_scale, uncap, Skv, first_key, last_key, query_blocks, key_blocks, H, BH, heads_per_kv,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, SECTION: gl.constexpr,
    MASK: gl.constexpr, HAS_SOFTCAP: gl.constexpr, OPAQUE: gl.constexpr, FIRST_IS_UNSEEN: gl.constexpr, EVEN_N: gl.constexpr,
):  # fmt: skip
    """Launched with num_warps=4, the first consumer's. H, BH count key heads."""
    dtype: gl.constexpr = q_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k = gl.allocate_shared_memory(dtype, [2, HALF_N, HEAD_DIM], tile_layout)
    v = gl.allocate_shared_memory(dtype, [2, HALF_N, HEAD_DIM], tile_layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], tile_layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, HEAD_DIM], tile_layout)
    ds = gl.allocate_shared_memory(dtype, [4, HALF_N, BLOCK_M], tile_layout)
    # dQ (64, 64) in the order in which its registers lie in the threads: each thread stores 16-byte vectors without bank
    # conflicts, and the tile travels as one contiguous blob of 16 KB. The last kernel undoes the permutation. Offset bits,
    # lowest first: column 1, row 8, column 2, ...
    dq_layout: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]], [], 128
    )
    dq = gl.allocate_shared_memory(gl.float32, [2, 64, 64], dq_layout)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BLOCK_M], rows_desc.layout)
    steps = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    bar: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    out_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    out_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
        mbarrier.init(out_full.index(i), count=1)
        mbarrier.init(out_empty.index(i), count=1)
    fence_async_shared()

    x = _Backward(
        (q_desc, k_desc, v_desc, dout_desc, rows_desc, dq_desc, dk_desc, dv_desc),
        (scale, scale_log2, cap_scale, uncap),
        (Skv, first_key, last_key, query_blocks, key_blocks, H, BH, heads_per_kv),
        (k, v, q, dout, rows, ds, dq, steps),
        (k_full, v_full, q_full, dout_full, empty, ds_full, ds_empty, out_full, out_empty),
        (HEAD_DIM, BLOCK_M, BLOCK_N, SECTION, MASK, HAS_SOFTCAP, OPAQUE, FIRST_IS_UNSEEN, EVEN_N),
    )
    # The first entry runs on the launch's own 4 warps; then 4 and 1 more.
    gl.warp_specialize([(_consumer, (x, 0)), (_consumer, (x, 1)), (_producer, (x,))], [4, 1], [240, 24])


@triton.jit(do_not_specialize=["Sq", "H", "BH"])
def _flash_attn_bwd_prepare_kernel(
    dout_ptr, out_ptr, lse_ptr, rows_ptr, sums_ptr,
    Sq, H, BH,
    stride_db, stride_dh, stride_dm, stride_ob, stride_oh, stride_om,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries: lse in units of log 2 and delta = dot(dout, out); its dQ sums = 0.

    Rows beyond Sq, and queries that see nothing, get lse = +inf: then P = exp(score - lse) is 0 without a mask.
    """
    num_blocks = tl.cdiv(Sq, BLOCK_M)
    bh = tl.program_id(0) // num_blocks
    start_m = tl.program_id(0) % num_blocks * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    out = _load_rows(out_ptr + b * stride_ob + h * stride_oh, start_m, stride_om, Sq, D, BLOCK_M, BLOCK_D, True, True)
    dout = _load_rows(dout_ptr + b * stride_db + h * stride_dh, start_m, stride_dm, Sq, D, BLOCK_M, BLOCK_D, True, True)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = start_m + offs_m < Sq
    lse = tl.load(lse_ptr + bh.to(tl.int64) * Sq + start_m + offs_m, mask=mask_m, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    tl.store(rows_ptr + row + offs_m, lse)
    tl.store(rows_ptr + tl.cast(BH, tl.int64) * num_blocks * BLOCK_M + row + offs_m, tl.sum(out * dout, 1))
    sums = row * BLOCK_D + offs_m[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(sums_ptr + sums, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))


@triton.jit(do_not_specialize=["Sq", "H", "num_blocks"])
def _flash_attn_bwd_cast_kernel(
    sums_ptr, dq_ptr, Sq, H, num_blocks, stride_qb, stride_qh, stride_qm,
    SCALE: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One block of 64 queries: blobs of 64 x 64 float32, back in row order and scaled. num_blocks: of a head."""
    bh = tl.program_id(0) // num_blocks
    start_m = tl.program_id(0) % num_blocks * 64
    dq_ptr += (bh // H).to(tl.int64) * stride_qb + (bh % H).to(tl.int64) * stride_qh
    sums_ptr += tl.program_id(0).to(tl.int64) * (64 * HEAD_DIM)
    offs_m = start_m + tl.arange(0, 64)
    for start_d in tl.static_range(0, D, 64):
        offs_d = start_d + tl.arange(0, 64)
        dq = tl.load(sums_ptr + start_d * 64 + tl.arange(0, 4096))
        # axes of a blob: column / 8, row / 16, row % 8, column / 2 % 4, row / 8 % 2, column % 2
        dq = tl.reshape(dq, (8, 4, 8, 4, 2, 2))
        dq = tl.reshape(tl.permute(dq, (1, 4, 2, 0, 3, 5)), (64, 64))
        ptrs = dq_ptr + tl.cast(offs_m, tl.int64)[:, None] * stride_qm + offs_d[None, :]
        mask = (offs_m < Sq)[:, None] & (offs_d < D)[None, :]
        tl.store(ptrs, (dq * SCALE).to(dq_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launch
# --------------------------------------------------------------------------------------------------------------------

_PLAIN = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dsinks: torch.Tensor | None = None,
) -> None:
    """Write dq, dk, dv and, unless it is None, dsinks. left, right: as those of triton_kernels.Options.

    float16 or bfloat16, a head size of at most 128 that is a multiple of 8. What TMA cannot take is copied, as in the forward.
    Needs B * Hq * Sq * D * 4 bytes for the float32 sums of dq.
    """
    if isinstance(q, (FakeTensor, FunctionalTensor)):
        raise NotInlinable(_flash_attn_bwd_hopper_kernel.__name__)
    B, H, Sq, D = q.shape
    if B * H * Sq == 0:
        for gradient in (dk, dv, dsinks):
            if gradient is not None:
                gradient.zero_()
        return
    head_dim = 64 if D <= 64 else 128 if D <= 128 else 256
    block_m = 128 if head_dim == 64 else 64  # queries of a step
    blocks = cdiv(Sq, block_m)
    queries = B * H * blocks * block_m
    rows = q.new_empty((2, queries), dtype=torch.float32)
    sums = q.new_empty((queries * head_dim // 128, 128), dtype=torch.float32)
    dout, out, lse = _unit_last_stride(dout), _unit_last_stride(out), lse.contiguous()
    key = (
        *(q.shape, q.stride(), k.shape, k.stride(), v.stride(), dout.stride(), out.stride(), dq.stride()),
        *(aligned(q), aligned(k), aligned(v), aligned(dout), q.dtype, q.device, scale, left, right, softcap),
    )
    plan = _plans.find(key)
    if plan is None:
        given, copies = (q, k, v, dout), tuple(map(describable, (q, k, v, dout)))
        plan = _plan(copies, out, lse, rows, sums, dq, dk, dv, scale, left, right, softcap, head_dim, block_m, blocks)
        if all(x is y for x, y in zip(copies, given, strict=True)):  # else they are to be made at every call
            _plans.keep(key, plan)
        q, k, v, dout = copies
    prepare, accumulate, cast = plan
    prepare(dout, out, lse, rows, sums)
    accumulate(q, k, v, dout, rows, sums, dk, dv)
    cast(sums, dq)
    if sinks is not None and dsinks is not None:
        sum_over_queries(dsinks, rows, None, sinks.contiguous(), None, B, H, Sq, blocks * block_m, queries, False)


_plans = Plans()


def _plan(
    inputs: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    sums: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    head_dim: int,
    block_m: int,
    blocks: int,
) -> tuple[Prepared, Prepared, Prepared]:
    """The three launches. inputs: q, k, v, dout."""
    q, k, v, dout = inputs
    B, H, Sq, D = q.shape
    Hkv, Skv = k.shape[1], k.shape[2]
    block_n = 64 if head_dim == 256 else 128  # keys of a program
    key_blocks = cdiv(Skv, block_n)
    prepare = Prepared(
        _flash_attn_bwd_prepare_kernel,
        (B * H * blocks,),
        *(dout, out, lse, rows, sums, Sq, H, B * H),
        *(*dout.stride()[:3], *out.stride()[:3]),
        num_warps=8,
        D=D,
        BLOCK_M=block_m,
        BLOCK_D=head_dim,
    )
    tensors = (
        boxes(q, block_m, head_dim),
        boxes(k, 64, head_dim),
        boxes(v, 64, head_dim),
        boxes(dout, block_m, head_dim),
        descriptor(rows, (2, block_m), _PLAIN),
    )
    gradients = descriptor(dk, (1, 1, 64, head_dim), TILE), descriptor(dv, (1, 1, 64, head_dim), TILE)
    first_key, last_key = reach(Sq, Skv, left, right)
    uneven = left < 0 and right < 0 and Skv % block_n > 0
    # softcap leaves no register for FULL's edge: a window that hides nothing takes its place
    mask = WINDOW if is_window(left, right) or (uneven and softcap) else CAUSAL if right == 0 else FULL
    masked = mask is not FULL
    log2e = math.log2(math.e)
    factors = (scale, (softcap or scale) * log2e, 2 * log2e * scale / softcap if softcap else 0.0)
    problem = Skv, first_key, last_key, blocks, key_blocks, Hkv, B * Hkv, H // Hkv
    grid = (B * Hkv * key_blocks,)
    shared: dict[str, Any] = {
        "num_warps": 4,
        "SECTION": 4 if masked else 1,
        "MASK": mask.value,
        "HAS_SOFTCAP": softcap > 0,
        "EVEN_N": not masked and not uneven,
    }
    if head_dim == 256:
        from .hopper_bwd_wide import _flash_attn_bwd_wide_kernel

        groups = H // Hkv * blocks * block_m
        numbers = *factors, *problem, groups
        accumulate = Prepared(_flash_attn_bwd_wide_kernel, grid, *tensors, sums, *gradients, *numbers, **shared)
    else:
        accumulate = Prepared(
            _flash_attn_bwd_hopper_kernel,
            grid,
            *tensors,
            descriptor(sums, (32, 128), _PLAIN),
            *gradients,
            *factors,
            1 / (softcap * log2e) if softcap else 0.0,
            *problem,
            HEAD_DIM=head_dim,
            BLOCK_M=block_m,
            # softcap has the fewest registers to spare; at head size 64 the ptxas of triton 3.6 does better left alone
            OPAQUE=softcap > 0 and (head_dim == 128 or not triton.__version__.startswith("3.6.")),
            FIRST_IS_UNSEEN=masked and last_key <= 0 and block_m == 64,
            **shared,
        )
    parts = blocks * (block_m // 64)
    cast = Prepared(
        _flash_attn_bwd_cast_kernel,
        (B * H * parts,),
        *(sums, dq, Sq, H, parts, *dq.stride()[:3]),
        num_warps=8,
        SCALE=scale,
        D=D,
        HEAD_DIM=head_dim,
    )
    return prepare, accumulate, cast


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
