"""Exercise 5. Errors for people.

The kernel of `add` reads as many elements of y as x has, whatever y is. Write `check(x, y)`, which the launcher calls
first: raise ValueError where the shapes differ, TypeError where the dtypes differ. The message names the op and the
argument, says what was given and what is allowed, as in: add: y has the shape (3,); x has (4,).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    out = tl.load(x_ptr + offs_n, mask=mask_n) + tl.load(y_ptr + offs_n, mask=mask_n)
    tl.store(out_ptr + offs_n, out, mask=mask_n)


def check(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise unless y has x's shape and dtype."""
    # TODO(ex5): two conditions, two errors


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    check(x, y)
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 256),)](x, y, out, x.numel(), BLOCK_N=256)
    return out
