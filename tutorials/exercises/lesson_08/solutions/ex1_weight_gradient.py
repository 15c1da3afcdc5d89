"""Exercise 1. The gradient of RMSNorm's weight, without atomics.

dweight[n] = sum over rows m of dy[m, n] * xhat[m, n], where xhat = x * rstd is given here.

P programs share M rows: program p takes the rows p, p + P, p + 2 * P, ... below M. It adds them up in registers, in fp32,
and writes row p of `partial` (P, N). The launcher adds the rows of `partial`.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def weight_gradient_kernel(dy_ptr, xhat_ptr, partial_ptr, M, N, BLOCK_N: tl.constexpr):
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(pid, M, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        xhat = tl.load(xhat_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        dweight += dy * xhat
    tl.store(partial_ptr + pid * N + offs_n, dweight, mask=mask_n)


def weight_gradient(dy: torch.Tensor, xhat: torch.Tensor, programs: int) -> torch.Tensor:
    M, N = dy.shape
    partial = torch.empty(programs, N, dtype=torch.float32, device=dy.device)
    weight_gradient_kernel[(programs,)](dy, xhat, partial, M, N, BLOCK_N=triton.next_power_of_2(N))
    return partial.sum(0)
