"""Which tile, how many stages, how many parts of K: by the shape alone, from what was measured on an H200."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch_triton_ops.launch import cdiv


class _MatmulConfig(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8
    persistent: bool = False  # TMA kernel only
    halves: bool = False  # TMA kernel only: epilogue in two halves
    block_n2: int = 0  # TMA kernel only: further columns of a tile
    swapped: bool = False  # TMA kernel only: block_m is of N and block_n of M; the transpose is computed


class _MatmulTile(NamedTuple):
    """A tile and the share of the GPU's rate that a full wave of them reaches."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    share: float
    block_n2: int = 0


# The shares were measured on an H200 (bench/results/tuning/nvidia_h200/matmul_few_rows.json). The accumulator of the widest
# tile is 128 registers a thread. The smaller a tile, the more operand bytes for each multiply-add have to come from the L2,
# which is what limits them; and all of them want nearly the whole shared memory as stages. Widths between the powers of two
# are there for shapes that they make fill the last wave of programs.
_MATMUL_TMA_TILES = (
    _MatmulTile(128, 256, 8, 3, 1.02),
    _MatmulTile(128, 128, 8, 6, 0.98),
    _MatmulTile(128, 128, 8, 5, 0.8, 32),
    _MatmulTile(64, 128, 4, 7, 0.92, 64),
    _MatmulTile(64, 128, 4, 8, 0.8, 32),
    _MatmulTile(64, 128, 4, 8, 0.87),
    _MatmulTile(64, 64, 4, 6, 0.6),
)
_MATMUL_TILES = (
    _MatmulTile(128, 128, 8, 3, 0.8),
    _MatmulTile(64, 128, 4, 3, 0.67),
    _MatmulTile(64, 64, 4, 4, 0.56),
)
# CUDA cores: operands and accumulator are registers, which limits the tile.
_MATMUL_IEEE_TILES = (_MatmulTile(64, 64, 4, 3, 0.08), _MatmulTile(32, 32, 4, 3, 0.06))


def _matmul_microseconds(
    M: int, N: int, K: int, batches: int, tile: _MatmulTile, block_k: int, split: int, sms: int
) -> float:
    """Estimated time on an H200, to compare tiles and splits of K by; other GPUs differ by a factor that cancels.

    Waves of programs, each with its flops at its share of the SM's 5.2 TFLOP/s and a microsecond and a half to start and to
    end; for a split, the reduction's launch and the float32 partial results, written and read at 3 TB/s.
    """
    width = tile.block_n + tile.block_n2
    programs = cdiv(M, tile.block_m) * cdiv(N, width) * batches * split
    flops = 2 * tile.block_m * width * block_k * cdiv(cdiv(K, block_k), split)
    product = cdiv(programs, sms) * (flops / (5.2e6 * tile.share) + 1.5)
    return product if split == 1 else product + 2.0 + 8 * split * batches * M * N / 3e6


def _matmul_split(tiles: int, K: int, block_k: int, slots: int) -> int:
    """How many programs share the K loop of a tile: enough to fill `slots`, each with at least four steps."""
    steps = cdiv(K, block_k)
    if 2 * tiles > slots or steps < 8:
        return 1
    per_part = cdiv(steps, min(slots // tiles, steps // 4, 32))
    return cdiv(steps, per_part)  # no part is empty


def _matmul_stream_config(
    M: int, N: int, K: int, batches: int, itemsize: int, aligned: bool, tma: bool, sms: int
) -> _MatmulConfig:
    """A short side of at most 64 (decoding): bound by the stream of the longer operand.

    One block covers the short side. With TMA, 32 rows or fewer are the short side of the tensor cores' tile too: the long
    operand is the one that gives wgmma its 64 rows, and nothing is multiplied in vain. The stages of all programs on an SM
    together take nearly all its shared memory: it is the bytes under way that make a stream fast, more than the number of
    SMs that take part. K is split only where even so there is too little under way: the second kernel costs 2 us.
    """
    short_side, long_side = min(M, N), max(M, N)
    short = 16 if short_side <= 16 else 32 if short_side <= 32 else 64
    if not tma:
        # the pointers of a longer BLOCK_K would spill
        block_k = (128 if aligned else 64) // itemsize
        stages = 3 if short == 64 or itemsize == 4 else 5
        split = _matmul_split(cdiv(long_side, 64) * batches, K, block_k, 2 * sms)
        return _MatmulConfig(*((short, 64) if M <= N else (64, short)), block_k, 4, stages, split_k=split)
    block_k = 256 // itemsize
    short_blocks, long_blocks = (cdiv(long_side, length) * batches for length in (64, 128))
    if short == 64:
        # 64 x 64 as long as each has an SM of its own
        length = 64 if short_blocks <= sms else 128
    else:
        # blocks of 64, but not a few more of them than there are SMs
        length = 128 if short_blocks > sms >= long_blocks else 64
    programs = cdiv(long_side, length) * batches
    split = _matmul_split(programs, K, block_k, sms // 2)
    # a program alone on its SM has all the shared memory for its stages; else two share it
    alone = programs * split <= sms or short == 64
    stages = min(9, (196 if alone else 100) * 1024 // ((short + length) * block_k * itemsize))
    swapped = short < 64 and M <= N
    blocks = (length, short) if swapped or M > N else (short, length)
    return _MatmulConfig(*blocks, block_k, 4, stages, split_k=split, swapped=swapped)


@functools.lru_cache(4096)
def _matmul_config(
    M: int,
    N: int,
    K: int,
    batches: int,
    itemsize: int,
    precision: str,
    aligned: bool,
    tma: bool,
    activation: str,
    sms: int,
) -> _MatmulConfig:
    """The launch configuration for a shape."""
    ieee = itemsize == 4 and precision == "ieee"
    if min(M, N) <= (32 if ieee else 64):
        if not ieee:
            return _matmul_stream_config(M, N, K, batches, itemsize, aligned, tma, sms)
        split = _matmul_split(cdiv(M, 32) * cdiv(N, 32) * batches, K, 32, 2 * sms)
        return _MatmulConfig(32, 32, 32, 4, 3, split_k=split)
    # 128-byte rows are a swizzle atom. Without 16-byte loads every element has a pointer of its own: a shorter block leaves
    # registers for them.
    block_k = 16 if ieee else (128 if tma or aligned else 64) // itemsize
    steps = cdiv(K, block_k)
    best, least = _MatmulConfig(0, 0, 0, 0, 0), math.inf
    for tile in _MATMUL_IEEE_TILES if ieee else _MATMUL_TMA_TILES if tma else _MATMUL_TILES:
        for split in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32):
            if split > 1 and 4 * split > steps:
                break
            time = _matmul_microseconds(M, N, K, batches, tile, block_k, split, sms)
            if time < least:
                # no part is empty
                parts, least = cdiv(steps, cdiv(steps, split)), time
                blocks = (tile.block_m, tile.block_n, block_k, tile.num_warps, tile.num_stages)
                best = _MatmulConfig(*blocks, split_k=parts, block_n2=tile.block_n2)
    if not (tma and best.block_n == 256):
        return best
    if itemsize == 2 and best.split_k == 1:
        # One program per SM that loops over the tiles, so that the next tile's loads run under this one's epilogue; stored in
        # halves, because a whole tile leaves no shared memory for the fourth stage. On an H200, against cuBLAS in the same
        # process: 1.02x at 8192^3, 1.01x at 4096^3; one program per tile gave 1.00x and 0.96x.
        return best._replace(num_stages=4, persistent=True, halves=True)
    # The accumulator's 128 registers a thread leave few for an activation, and none for a float32 tile's store.
    return best._replace(halves=activation != "none" or itemsize == 4)
