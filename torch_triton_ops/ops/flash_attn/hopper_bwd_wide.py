"""Attention backward for Hopper (sm_90) and head sizes above 128, in Gluon. Read hopper_bwd.py first.

dK and dV of 64 keys at head size 256 are 128 kB: half of an SM's registers, whatever way they are split. Were they split by
columns, each consumer would need all of S^T and dP^T, and would compute half of them with products so narrow that shared memory
cannot feed the tensor cores. So the consumers split the work by what they own:

    consumer 0, dV:   S^T = K Q^T,    P^T = exp(S^T - lse),               dV += P^T dO
    consumer 1, dK:   dP^T = V dO^T,  dS^T = P^T * (dP^T - delta),        dK += dS^T Q

Every product is as wide as it can be, and its left operand is in registers where it was computed. P^T goes to consumer 1 through
shared memory, dS^T comes back the same way for dQ = dS K, of which each consumer computes half of the columns. Consumer 1 needs
P^T in the middle of its step only, so the two settle half a step apart by themselves: while one of them does its exponentials or
its dS, the other one's products run.

A step's hand-overs need two barriers: p_full, and ds_full which also says that P^T has been read. Consumer 0 takes dS of the step
before, so it never waits long.

dQ is added to its float32 sums straight from registers, four neighbouring ones at a time: there is no shared memory left to send
it from, and none of its bandwidth.
"""

# No `from __future__ import annotations` here: an aggregate's fields are declared by their types themselves.

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

from .hopper import tanh
from .hopper_bwd import FULL, edge_of, hide, place, read, write

TILE = gl.constexpr(64)  # queries of a step, keys of a program
DIM = gl.constexpr(256)
HALF_DIM = gl.constexpr(128)
STAGES = gl.constexpr(2)  # depth of the Q / dO ring


@aggregate
class _Wide:
    """One program's arguments, buffers and barriers."""

    # global memory
    q_desc: tma.tensor_descriptor  # (B, Hq, Sq, D), box (1, 1, TILE, DIM); k, v, dout, dk, dv alike
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    dout_desc: tma.tensor_descriptor
    rows_desc: tma.tensor_descriptor  # (2, B * Hq * padded Sq) float32, box (2, TILE): lse in units of log 2, delta
    sums_ptr: gl.tensor  # float32, dQ's sums
    dk_desc: tma.tensor_descriptor
    dv_desc: tma.tensor_descriptor
    # the problem
    scale: gl.tensor
    scale_log2: gl.tensor  # log2(e) times the scale, or with softcap times that: so that exp becomes exp2
    cap_scale: gl.tensor  # softcap: 2 * log2(e) * scale / softcap
    Skv: gl.tensor
    first_key: gl.tensor  # query i sees the keys from i + first_key (windows)
    last_key: gl.tensor  # to i + last_key (causal, windows)
    query_blocks: gl.tensor
    key_blocks: gl.tensor
    H: gl.tensor  # key heads
    BH: gl.tensor  # B * H
    heads_per_kv: gl.tensor
    group_rows: gl.tensor  # heads_per_kv * query_blocks * TILE
    # shared memory
    k: gl.shared_memory_descriptor  # (1, TILE, DIM)
    v: gl.shared_memory_descriptor  # (1, TILE, DIM)
    q: gl.shared_memory_descriptor  # (STAGES, TILE, DIM)
    dout: gl.shared_memory_descriptor  # (STAGES, TILE, DIM)
    rows: gl.shared_memory_descriptor  # (STAGES, 2, TILE)
    p: gl.shared_memory_descriptor  # (TILE, TILE): P^T, with softcap times its derivative
    ds: gl.shared_memory_descriptor  # (2, TILE, TILE): dS^T
    steps: gl.shared_memory_descriptor  # (8, 1) int32: for four steps, dQ's row and the edge (`hide`)
    # barriers
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # (STAGES, 1): Q and its rows
    dout_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor  # both consumers are done with Q, its rows and dO
    p_full: gl.shared_memory_descriptor  # (1,)
    ds_full: gl.shared_memory_descriptor  # (1,): dS^T is written, P^T is read
    # constants
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    SECTION: gl.constexpr  # heads that run side by side
    MASK: gl.constexpr  # FULL, CAUSAL or WINDOW
    HAS_SOFTCAP: gl.constexpr
    EVEN_N: gl.constexpr  # FULL, and no key block is partly empty

    @gluon.constexpr_function
    def __init__(self, tensors, factors, problem, buffers, barriers, constants):
        self.q_desc, self.k_desc, self.v_desc, self.dout_desc = tensors[:4]
        self.rows_desc, self.sums_ptr, self.dk_desc, self.dv_desc = tensors[4:]
        self.scale, self.scale_log2, self.cap_scale = factors
        self.Skv, self.first_key, self.last_key = problem[:3]
        self.query_blocks, self.key_blocks, self.H, self.BH, self.heads_per_kv, self.group_rows = problem[3:]
        self.k, self.v, self.q, self.dout, self.rows, self.p, self.ds, self.steps = buffers
        self.k_full, self.v_full, self.q_full, self.dout_full, self.empty, self.p_full, self.ds_full = barriers
        self.BLOCK_M, self.BLOCK_N = gl.constexpr(64), gl.constexpr(64)
        self.SECTION, self.MASK, self.HAS_SOFTCAP, self.EVEN_N = map(gl.constexpr, constants)


# --------------------------------------------------------------------------------------------------------------------
# Producer: one warp. Loads K and V once, then Q, its rows and dO of every step.
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _producer(x):
    b, h, start_n, first, steps = place(x)
    BYTES: gl.constexpr = TILE * DIM * 2
    mbarrier.expect(x.k_full, BYTES)
    tma.async_copy_global_to_shared(x.k_desc, [b, h, start_n, 0], x.k_full, x.k.index(0))
    mbarrier.expect(x.v_full, BYTES)
    tma.async_copy_global_to_shared(x.v_desc, [b, h, start_n, 0], x.v_full, x.v.index(0))
    t = 0
    row = (b * x.H + h) * x.group_rows  # of the head's first query, among those of all heads
    for hq in range(h * x.heads_per_kv, (h + 1) * x.heads_per_kv):
        for start_m in range(first * TILE, (first + steps) * TILE, TILE):
            slot = t & 1
            # One barrier frees Q and dO together; the first STAGES waits (of the opposite phase) pass at once.
            mbarrier.wait(x.empty.index(slot), ((t >> 1) & 1) ^ 1)
            write(x.steps, (t & 3) * 2, row + start_m)
            if x.MASK != FULL:
                write(x.steps, (t & 3) * 2 + 1, edge_of(x, start_m, start_n))
            mbarrier.expect(x.q_full.index(slot), BYTES + 2 * TILE * 4)
            tma.async_copy_global_to_shared(x.q_desc, [b, hq, start_m, 0], x.q_full.index(slot), x.q.index(slot))
            tma.async_copy_global_to_shared(x.rows_desc, [0, row + start_m], x.q_full.index(slot), x.rows.index(slot))
            mbarrier.expect(x.dout_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(
                x.dout_desc, [b, hq, start_m, 0], x.dout_full.index(slot), x.dout.index(slot)
            )
            t += 1
        row += x.query_blocks * TILE


# --------------------------------------------------------------------------------------------------------------------
# What the consumers share
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _opaque(tile, t):
    """tile[0], at an address that the compiler takes for a new one in every step: it would compute those of all 16 operands of
    a product once, keep them in registers and spill them."""
    return tile.index(t >> 30)


@gluon.jit
def _issue_dq(x, t, CONSUMER: gl.constexpr):
    """dQ(t)[:, this consumer's half] = dS(t) K[:, that half], (TILE, HALF_DIM); asynchronous."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_DIM, 16])
    half: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    zero = gl.full([TILE, HALF_DIM], 0.0, gl.float32, layout)
    # In shared memory a tile of 16 bits with 128-byte swizzle is panels of 64 columns.
    halves = x.k._reinterpret(x.k.dtype, [2, TILE, HALF_DIM], half)
    ds = x.ds.index(t & 1).permute([1, 0])
    return warpgroup_mma(ds, halves.index(CONSUMER), zero, use_acc=False, is_async=True)


@gluon.constexpr_function
def _reduce_asm(registers):
    outputs = registers // 4
    adds = " ".join(
        f"red.relaxed.gpu.global.add.v4.f32 [at + {i * 512}], "
        f"{{${outputs + i}, ${outputs + i + 1}, ${outputs + i + 2}, ${outputs + i + 3}}};"
        for i in range(0, registers, 4)
    )
    return (
        "{ .reg .u64 at; .reg .u32 thread; mov.u32 thread, %tid.x; and.b32 thread, thread, 127; "
        f"mad.wide.u32 at, thread, 16, ${outputs + registers}; {adds} }}"
    )


@gluon.constexpr_function
def _reduce_constraints(registers):
    return ",".join(["=r"] * (registers // 4) + ["f"] * registers + ["l"] * registers)


@gluon.jit
def _reduce_add(sums_ptr, row, value):
    """Row `row` (of 128 numbers) of the sums and those after it += value, in the order in which its registers lie in the
    threads: four neighbouring registers of all 128 threads, then the next four. So a warp adds 512 contiguous bytes."""
    registers: gl.constexpr = value.shape[0] * value.shape[1] // 128
    asm: gl.constexpr = _reduce_asm(registers)
    constraints: gl.constexpr = _reduce_constraints(registers)
    at = sums_ptr.to(gl.int64) + row.to(gl.int64) * 512
    at = gl.full([value.shape[0], value.shape[1]], 0, gl.int64, value.type.layout) + at
    gl.inline_asm_elementwise(asm, constraints, [value, at], dtype=gl.int8, is_pure=False, pack=registers)


@gluon.jit
def _add_dq(x, t, dq, CONSUMER: gl.constexpr):
    _reduce_add(x.sums_ptr, read(x.steps, (t & 3) * 2) * 2 + CONSUMER * 64, dq)


@gluon.jit
def _send(desc, b, h, start_n, buffer, value):
    buffer.store(value.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [b, h, start_n, 0], buffer)
    tma.store_wait(0)


@gluon.jit
def _load_row(x, slot, WHICH: gl.constexpr, layout: gl.constexpr):
    rows = x.rows._reinterpret(gl.float32, [2 * STAGES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return rows.index(slot * 2 + WHICH).load(layout)


# --------------------------------------------------------------------------------------------------------------------
# Consumer 0: dV
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _dv_step(x, t, tail, dv, HAS_PREVIOUS: gl.constexpr):
    """One block of queries: S^T and P^T; then dV += this block's share, and dQ(t - 1)."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)  # P^T as an operand in registers
    dtype: gl.constexpr = x.q_desc.dtype
    zero = gl.full([TILE, TILE], 0.0, gl.float32, s_layout)
    slot = t & 1
    phase = (t >> 1) & 1

    # Rows are keys, columns are queries.
    mbarrier.wait(x.q_full.index(slot), phase)
    s_token = warpgroup_mma(_opaque(x.k, t), x.q.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
    edge = tail
    if x.MASK != FULL:
        edge = read(x.steps, (t & 3) * 2 + 1)  # now, under the product
    lse = _load_row(x, slot, 0, gl.SliceLayout(0, s_layout))
    s = warpgroup_mma_wait(0, [s_token])
    if x.HAS_SOFTCAP:
        s = tanh(s, x.cap_scale)
    p = gl.exp2(s * x.scale_log2 - lse[None, :])
    if not x.EVEN_N:
        p = hide(p, edge, x.MASK)
    p_operand = gl.convert_layout(p.to(dtype), p_layout)
    if x.HAS_SOFTCAP:  # its derivative: consumer 1 needs P^T for dS^T alone
        p = p * (1.0 - s * s)
    if HAS_PREVIOUS:
        mbarrier.wait(x.ds_full, (t - 1) & 1)
    x.p.store(p.to(dtype))
    mbarrier.arrive(x.p_full)

    mbarrier.wait(x.dout_full.index(slot), phase)
    if HAS_PREVIOUS:
        dq_token = _issue_dq(x, t - 1, 0)
    dv_token = warpgroup_mma(p_operand, x.dout.index(slot), dv, is_async=True)
    if HAS_PREVIOUS:
        dq = warpgroup_mma_wait(1, [dq_token])
        _add_dq(x, t - 1, dq, 0)
    dv = warpgroup_mma_wait(0, [dv_token])
    mbarrier.arrive(x.empty.index(slot))
    return dv


@gluon.jit
def _dv_consumer(x):
    b, h, start_n, _, steps = place(x)
    total = steps * x.heads_per_kv
    gl.assume(total > 1)
    dv = gl.full([TILE, DIM], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]))
    mbarrier.wait(x.k_full, 0)
    dv = _dv_step(x, 0, x.Skv - start_n, dv, False)
    for t in range(1, total):
        dv = _dv_step(x, t, x.Skv - start_n, dv, True)
    t = total - 1
    mbarrier.wait(x.ds_full, t & 1)
    dq_token = _issue_dq(x, t, 0)
    _send(x.dv_desc, b, h, start_n, x.v.index(0), dv)  # consumer 1 has computed its last dP
    dq = warpgroup_mma_wait(0, [dq_token])
    _add_dq(x, t, dq, 0)


# --------------------------------------------------------------------------------------------------------------------
# Consumer 1: dK
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _dk_step(x, t, dk):
    """One block of queries: dP^T and dS^T; then dK += this block's share, and dQ."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    dtype: gl.constexpr = x.q_desc.dtype
    zero = gl.full([TILE, TILE], 0.0, gl.float32, s_layout)
    slot = t & 1
    phase = (t >> 1) & 1

    mbarrier.wait(x.dout_full.index(slot), phase)
    v = _opaque(x.v, t)
    dp_token = warpgroup_mma(v, x.dout.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.wait(x.q_full.index(slot), phase)
    delta = _load_row(x, slot, 1, gl.SliceLayout(0, s_layout))
    dp = warpgroup_mma_wait(0, [dp_token])
    dp = dp - delta[None, :]
    mbarrier.wait(x.p_full, t & 1)
    ds = (x.p.load(s_layout).to(gl.float32) * dp).to(dtype)
    x.ds.index(t & 1).store(ds)
    fence_async_shared()
    mbarrier.arrive(x.ds_full)

    dq_token = _issue_dq(x, t, 1)
    dk_token = warpgroup_mma(gl.convert_layout(ds, ds_layout), x.q.index(slot), dk, is_async=True)
    dq = warpgroup_mma_wait(1, [dq_token])
    _add_dq(x, t, dq, 1)
    dk = warpgroup_mma_wait(0, [dk_token])
    mbarrier.arrive(x.empty.index(slot))
    return dk


@gluon.jit
def _dk_consumer(x):
    b, h, start_n, _, steps = place(x)
    total = steps * x.heads_per_kv
    gl.assume(total > 1)
    dk = gl.full([TILE, DIM], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]))
    mbarrier.wait(x.k_full, 0)
    mbarrier.wait(x.v_full, 0)
    for t in range(total):
        dk = _dk_step(x, t, dk)
    # Q of the last step has been read by both: consumer 0 went on from S to P^T before this one could.
    _send(x.dk_desc, b, h, start_n, x.q.index((total - 1) & 1), dk * x.scale)


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "scale",
        "scale_log2",
        "cap_scale",
        "Skv",
        "first_key",
        "last_key",
        "query_blocks",
        "key_blocks",
        "H",
        "BH",
        "heads_per_kv",
        "group_rows",
    ]
)
def _flash_attn_bwd_wide_kernel(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, sums_ptr, dk_desc, dv_desc,
    scale, scale_log2, cap_scale, Skv, first_key, last_key, query_blocks, key_blocks, H, BH, heads_per_kv, group_rows,
    SECTION: gl.constexpr, MASK: gl.constexpr, HAS_SOFTCAP: gl.constexpr, EVEN_N: gl.constexpr,
):  # fmt: skip
    """Launched with num_warps=4, the first consumer's. H, BH count key heads."""
    dtype: gl.constexpr = q_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k = gl.allocate_shared_memory(dtype, [1, TILE, DIM], tile_layout)
    v = gl.allocate_shared_memory(dtype, [1, TILE, DIM], tile_layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, TILE, DIM], tile_layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES, TILE, DIM], tile_layout)
    ds = gl.allocate_shared_memory(dtype, [2, TILE, TILE], tile_layout)
    # P^T in the order in which its registers lie in the threads, 16 bytes each: nobody else reads it. Offset bits, lowest first:
    # column 1, row 8, column 8, ...
    p_layout: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 16], [0, 32]], [], 128
    )
    p = gl.allocate_shared_memory(dtype, [TILE, TILE], p_layout)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, 2, TILE], rows_desc.layout)
    steps = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    bar: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    p_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(ds_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    x = _Wide(
        (q_desc, k_desc, v_desc, dout_desc, rows_desc, sums_ptr, dk_desc, dv_desc),
        (scale, scale_log2, cap_scale),
        (Skv, first_key, last_key, query_blocks, key_blocks, H, BH, heads_per_kv, group_rows),
        (k, v, q, dout, rows, p, ds, steps),
        (k_full, v_full, q_full, dout_full, empty, p_full, ds_full),
        (SECTION, MASK, HAS_SOFTCAP, EVEN_N),
    )
    # The first entry runs on the launch's own 4 warps; then 4 and 1 more.
    gl.warp_specialize([(_dv_consumer, (x,)), (_dk_consumer, (x,)), (_producer, (x,))], [4, 1], [240, 24])
