"""Exercise 2. A transposed operand, without a copy.

A linear layer's weight is (N, K), and the layer computes `x @ weight.t()`. Write `linear(x, weight)` for a contiguous
weight without copying it: the block that `tl.dot` wants is (BLOCK_K, BLOCK_N), element [k, n] of which is weight[n, k].
"""

import torch
import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, out_ptr, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        offs_k = k + tl.arange(0, BLOCK)  # (BLOCK,)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk  # (BLOCK_M, BLOCK_K)
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn  # (BLOCK_K, BLOCK_N)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=mask_m[:, None] & mask_n[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, K) times the transpose of weight (N, K), both float16."""
    (M, K), N = x.shape, weight.shape[0]
    out = x.new_empty(M, N)
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    linear_kernel[grid](x, weight, out, M, N, K, *x.stride(), *weight.stride(), BLOCK=32)
    return out
