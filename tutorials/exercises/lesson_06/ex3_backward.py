"""Exercise 3. The backward of dropout.

`dropout_kernel` keeps element i where its random number is at least p, and divides it by 1 - p. No mask is stored.
Write `backward`: the gradient with respect to x, for the upstream gradient `dout` and the arguments of the forward.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def dropout_kernel(x_ptr, out_ptr, N, seed, P: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    kept = tl.rand(seed, offs_n) >= P  # a number from 0 to 1 for each (seed, element)
    tl.store(out_ptr + offs_n, tl.where(kept, x / (1 - P), 0.0), mask=mask_n)


def dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    out = torch.empty_like(x)
    N = x.numel()
    dropout_kernel[(triton.cdiv(N, 256),)](x, out, N, seed, P=p, BLOCK_N=256)
    return out


def backward(dout: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """The gradient with respect to x of dropout(x, p, seed)."""
    # TODO(ex3): which elements of dout reach x, and scaled by how much? The kernel above can compute it.
    return dout.clone()
