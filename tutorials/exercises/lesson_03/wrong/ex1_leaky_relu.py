# fails: leaky_relu\(\.\.\., 2\.0\).*out\[\d+\]
"""Exercise 1. One element-wise operation with a choice in it.

Write `leaky_relu(x, slope)`: x where it is 0 or more, slope * x elsewhere. A kernel has no `if` for single elements:
both values are computed, and `tl.where(condition, a, b)` picks one of them for each lane. NaN must stay NaN.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def leaky_relu_kernel(x_ptr, out_ptr, N, SLOPE: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    out = tl.maximum(x, SLOPE * x)
    tl.store(out_ptr + offs_n, out, mask=mask_n)


def leaky_relu(x: torch.Tensor, slope: float) -> torch.Tensor:
    out = torch.empty_like(x)
    leaky_relu_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), SLOPE=slope, BLOCK_N=256)
    return out
