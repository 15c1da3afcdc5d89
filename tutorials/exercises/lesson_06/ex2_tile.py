"""Exercise 2. A row beside a matrix.

`bias_relu(x, bias)` is `relu(x + bias)` for an `(M, N)` matrix and a bias of `N`. Each program computes a tile of
BLOCK_M rows and BLOCK_N columns: work out its rows, its columns, its mask, and load the bias once for the tile.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def bias_relu_kernel(x_ptr, bias_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask)
    # TODO(ex2): load the bias of these columns, with a mask of its own, and add it before the relu.
    tl.store(out_ptr + offs_m * N + offs_n, tl.maximum(x, 0.0), mask=mask)


def bias_relu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """relu(x + bias); x (M, N) contiguous, bias (N,)."""
    out = torch.empty_like(x)
    M, N = x.shape
    grid = (triton.cdiv(M, 4), triton.cdiv(N, 32))
    bias_relu_kernel[grid](x, bias, out, M, N, BLOCK_M=4, BLOCK_N=32)
    return out
