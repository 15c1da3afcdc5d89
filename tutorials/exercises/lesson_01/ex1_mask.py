"""Exercise 1. The mask.

`add(x, y, out)` is right as long as the number of elements is a multiple of 128. Make it right for every number: no
program may read or write outside the tensors.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    pid = tl.program_id(0)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    # TODO(ex1): which of these BLOCK_N elements exist? Tell tl.load and tl.store.
    x = tl.load(x_ptr + offs_n)
    y = tl.load(y_ptr + offs_n)
    tl.store(out_ptr + offs_n, x + y)


def add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """Write x + y into out; all contiguous and of the same size."""
    N = x.numel()
    add_kernel[(triton.cdiv(N, 128),)](x, y, out, N, BLOCK_N=128)
