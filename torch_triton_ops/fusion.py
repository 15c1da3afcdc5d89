"""What the fused ops share: random numbers that two kernels can both compute, rows of any strides, sums of columns.

Dropout's mask is never stored. Philox-4x32-10 turns a counter of 128 bits into four words of 32 bits, or eight numbers of
16 bits, low half first. Element i, counted in row-major order whatever the strides, keeps its value where

    philox(key=seed, counter=(i // 8, offset))[i % 8] >= round(p * 2**16)

So a mask depends on the seed, the offset and the element's index alone: forward, backward, another block size and the plain
torch of `keep_reference` agree on every element. Offsets are streams, not steps: the masks of offset 0 and 1 share nothing.

Eight numbers a counter, because integer instructions are the limit: ten rounds cost some 80 of them, and an H200 has time
for 13 an element while its memory moves two bytes in and two out (64 a clock and SM for logic, as many for products).

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405

A foundation module, as `launch` is: it knows no op and imports nothing of the package.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# --------------------------------------------------------------------------------------------------------------------
# Random numbers
# --------------------------------------------------------------------------------------------------------------------

_CHUNK = 2**24  # elements whose numbers the reference computes at a time: some hundred bytes each


def drop_threshold(p: float) -> int:
    """Drop an element whose 16-bit number is below this: p to the nearest multiple of 2**-16. Only p = 1 drops all."""
    return 2**16 if p == 1 else min(round(p * 2**16), 2**16 - 1)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by, so that the expected value stays."""
    return 0.0 if p == 1 else 1 / (1 - p)


def philox_words(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10 of int64 tensors that hold 32-bit words, in plain torch: four words for each counter of four."""
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # int64 products wrap, and still hold the right 64 bits
        high, low = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (low >> 32 & mask) ^ c1 ^ k0, low & mask, (high >> 32 & mask) ^ c3 ^ k1, high & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def philox_reference(
    seed: int, offset: int, numel: int, first: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The 16-bit numbers of `numel` elements from number `first`, a multiple of 8, as int64 `(numel,)`, in plain torch.

    seed, offset: 0 to 2**63 - 1.
    """
    mask = 0xFFFFFFFF
    group = torch.arange(first // 8, (first + numel + 7) // 8, device=device)
    stream = (torch.full_like(group, offset & mask), torch.full_like(group, offset >> 32))
    words = torch.stack(philox_words((group & mask, group >> 32, *stream), (seed & mask, seed >> 32)), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).view(-1)[:numel]


def keep_reference(x: torch.Tensor, p: float, seed: int, offset: int) -> torch.Tensor:
    """Bool of x's shape: the elements that dropout keeps."""
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for first in range(0, kept.numel(), _CHUNK):
        part = kept.view(-1)[first : first + _CHUNK]
        part.copy_(philox_reference(seed, offset, part.numel(), first, x.device) >= drop_threshold(p))
    return kept


def split(value: int) -> tuple[int, int]:
    """The lower 31 bits and the rest of a seed or offset: Inductor (torch 2.11) takes no constant past 2**31 - 1."""
    return value % 2**31, value // 2**31


@triton.jit
def join(low, high):
    return tl.cast(high, tl.int64) * 2147483648 + tl.cast(low, tl.int64)


@triton.jit
def keep(
    seed,
    offset,
    start,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bool (BLOCK_M, BLOCK_N): which of BLOCK_N elements from `start` (BLOCK_M, 1), int64, dropout keeps.

    GROUPED: every start is a multiple of 8 and BLOCK_N >= 8, so eight elements share one counter. Otherwise each computes
    eight numbers and takes its own.
    """
    if THRESHOLD == 0:
        kept = tl.full((BLOCK_M, BLOCK_N), True, tl.int1)
    elif THRESHOLD > 0xFFFF:
        kept = tl.full((BLOCK_M, BLOCK_N), False, tl.int1)
    else:
        offset = tl.cast(offset, tl.int64)
        c2 = (offset & 0xFFFFFFFF).to(tl.uint32)
        c3 = (offset >> 32).to(tl.uint32)
        seed = tl.cast(seed, tl.int64)
        if GROUPED:
            group = (start >> 3) + tl.arange(0, BLOCK_N // 8)[None, :]  # (BLOCK_M, BLOCK_N / 8)
            r0, r1, r2, r3 = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), c2, c3)
            words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # the last two dims read r0, r1, r2, r3
            kept = tl.join((words & 0xFFFF) >= THRESHOLD, (words >> 16) >= THRESHOLD).reshape(BLOCK_M, BLOCK_N)
        else:
            index = start + tl.arange(0, BLOCK_N)[None, :]  # (BLOCK_M, BLOCK_N)
            group = index >> 3
            r0, r1, r2, r3 = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), c2, c3)
            word = tl.where(index & 4 == 0, tl.where(index & 2 == 0, r0, r1), tl.where(index & 2 == 0, r2, r3))
            kept = tl.where(index & 1 == 0, word & 0xFFFF, word >> 16) >= THRESHOLD
    return kept


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def as_rows(*tensors: torch.Tensor, flat: bool) -> list[torch.Tensor]:
    """Tensors of one shape as (rows, N) with unit stride along N: views where the strides allow it, else copies.

    flat: one row of every element, if all are contiguous or have one dimension at most.
    """
    shape = tensors[0].shape
    if flat and (len(shape) < 2 or all(t.is_contiguous() for t in tensors)):
        return [t.contiguous().view(1, t.numel()) for t in tensors]
    rows = [t.reshape(math.prod(shape[:-1]), shape[-1]) for t in tensors]
    return [t if t.stride(1) == 1 else t.contiguous() for t in rows]


# --------------------------------------------------------------------------------------------------------------------
# Sums of columns
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def column_sum_kernel(partial_ptr, out_ptr, G, N, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = sum over g of partial[g, n], in a fixed order: the second stage of a bias gradient. partial: (G, N) fp32."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for start in range(0, G, BLOCK_G):
        offs_g = start + tl.arange(0, BLOCK_G).to(tl.int64)  # (BLOCK_G,)
        mask = (offs_g < G)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptr + offs_g[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask_n)
