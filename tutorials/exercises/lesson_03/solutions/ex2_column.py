"""Exercise 2. Broadcasting along the other dimension.

`add_column(x, c)` adds a column `c` of shape (M, 1) to a matrix `x` of shape (M, N): row m gets c[m]. The kernel adds
a row. Which offsets does the column need, of what shape is the block of them, and which mask belongs to it? `x` and
`c` are contiguous.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def add_column_kernel(x_ptr, c_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask)
    c = tl.load(c_ptr + offs_m, mask=offs_m < M)  # (BLOCK_M, 1)
    tl.store(out_ptr + offs_m * N + offs_n, x + c, mask=mask)


def add_column(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty_like(x)
    grid = (triton.cdiv(M, 8), triton.cdiv(N, 32))
    add_column_kernel[grid](x, c, out, M, N, BLOCK_M=8, BLOCK_N=32)
    return out
