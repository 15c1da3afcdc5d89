# fails: row_minimum of .*out\[0\] is 0; expected
"""Exercise 3. A reduction with a mask.

`row_minimum(x)` gives the smallest element of each row of a contiguous matrix. The loop is there; what is missing is
what the accumulator holds at first, and what the lanes load that are switched off.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def row_minimum_kernel(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    acc = tl.full((BLOCK_N,), float("inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0)
        acc = tl.minimum(acc, x)
    tl.store(out_ptr + row, tl.min(acc, axis=0))


def row_minimum(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, device=x.device, dtype=x.dtype)
    row_minimum_kernel[(M,)](x, out, N, BLOCK_N=64)
    return out
