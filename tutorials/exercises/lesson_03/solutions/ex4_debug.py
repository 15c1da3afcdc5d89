"""Exercise 4. A kernel with a bug in it.

`scale_rows(x, scale)` multiplies row m of `x` by scale[m]; x may have any strides. It is right for contiguous
matrices, which is what its author tested. Find the one mistake. Shrink, look where it is wrong, then read the line.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def scale_rows_kernel(x_ptr, scale_ptr, out_ptr, M, N, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    scale = tl.load(scale_ptr + offs_m, mask=offs_m < M)  # (BLOCK_M, 1)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
        mask = (offs_m < M) & (offs_n < N)
        x = tl.load(x_ptr + offs_m * xm + offs_n * xn, mask=mask)
        tl.store(out_ptr + offs_m * N + offs_n, x * scale, mask=mask)


def scale_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    scale_rows_kernel[(triton.cdiv(M, 4),)](x, scale, out, M, N, x.stride(0), x.stride(1), BLOCK_M=4, BLOCK_N=16)
    return out
