"""What the Gluon attention kernels for Hopper share: the order of tiles, how consumers hear of them and take turns, masks.

`x` is a kernel's aggregate of arguments, buffers and barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Query rows of one consumer: what one warpgroup's matrix product takes.
ROWS = gl.constexpr(64)

# --------------------------------------------------------------------------------------------------------------------
# Tiles. The producer is the scheduler too: it tells the consumers their next tile through shared memory (two slots, so that
# it can run ahead). So the consumers do no integer divisions.
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def tile_place(x, tile):
    """Tile number -> (row block, batch, head).

    Heads are taken `section` at a time, so that their K and V stay in L2. Inside a section the last row blocks come first:
    under a causal mask they are the longest.
    """
    first = tile // (x.num_blocks * x.section) * x.section
    width = gl.minimum(x.section, x.BH - first)
    rest = tile % (x.num_blocks * x.section)
    bh = first + rest % width
    return x.num_blocks - 1 - rest // width, bh // x.H, bh % x.H


@gluon.jit
def publish_tile(x, n, block_m, b, h):
    """The producer's n-th tile; row block -1: there is none any more."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = n % 2
    mbarrier.wait(x.tile_empty.index(slot), ((n // 2) & 1) ^ 1)
    x.tile.index(slot * 4 + 0).store(gl.full([1], block_m, gl.int32, layout))
    x.tile.index(slot * 4 + 1).store(gl.full([1], b, gl.int32, layout))
    x.tile.index(slot * 4 + 2).store(gl.full([1], h, gl.int32, layout))
    mbarrier.arrive(x.tile_full.index(slot))


@gluon.jit
def read_tile(x, n):
    """A consumer's n-th tile: row block, batch, head. It frees the slot itself: arrive at `tile_empty.index(n % 2)`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = n % 2
    mbarrier.wait(x.tile_full.index(slot), (n // 2) & 1)
    block_m = gl.max(x.tile.index(slot * 4 + 0).load(layout), 0)
    b = gl.max(x.tile.index(slot * 4 + 1).load(layout), 0)
    h = gl.max(x.tile.index(slot * 4 + 2).load(layout), 0)
    return block_m, b, h


# --------------------------------------------------------------------------------------------------------------------
# Taking turns (PING_PONG): consumer c owns named barrier 9 + c (Triton itself uses low numbers). It waits there for its
# turn, issues its matrix products and hands the turn on. 256 threads: the one group that waits, the one that arrives. The
# unused output keeps the inline PTX in the program.
# --------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _named_barrier(op, consumer):
    return f"bar.{op} {9 + consumer}, 256; // dummy $0"


@gluon.jit
def wait_for_turn(CONSUMER: gl.constexpr):
    asm: gl.constexpr = _named_barrier("sync", CONSUMER)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hand_over_turn(CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    asm: gl.constexpr = _named_barrier("arrive", (CONSUMER + 1) % CONSUMERS)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


# --------------------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------------------


@gluon.jit
def mask_scores(s, limit, first, start_n, HAS_FIRST: gl.constexpr):
    """Scores of keys at or past limit[row], with HAS_FIRST also of those before first[row], become -inf.

    Compare and select are fused in one asm block for each element. With gl.where, ptxas computes all 64 predicates early,
    packs them into bit masks and unpacks them again: 200 more instructions a block of keys.
    """
    offs_n = start_n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    if HAS_FIRST:
        return gl.inline_asm_elementwise(
            "{ .reg .pred visible; setp.lt.s32 visible, $2, $3; setp.ge.and.s32 visible, $2, $4, visible; "
            "selp.f32 $0, $1, 0fFF800000, visible; }",
            "=f,f,r,r,r",
            [s, offs_n[None, :], limit[:, None], first[:, None]],
            dtype=gl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .pred visible; setp.lt.s32 visible, $2, $3; selp.f32 $0, $1, 0fFF800000, visible; }",
            "=f,f,r,r",
            [s, offs_n[None, :], limit[:, None]],
            dtype=gl.float32,
            is_pure=True,
            pack=1,
        )


@gluon.jit
def partial_row_sum(p):
    """Sums of the columns that one thread holds: (ROWS, 4). No shuffles; the 4 lanes of a row are added once for each tile.
    An accumulator's column is 8 * j + 2 * (lane % 4) + e, so j and e are in one thread."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)
