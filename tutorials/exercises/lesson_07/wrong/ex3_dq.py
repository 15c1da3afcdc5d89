# fails: dq of 64 queries is 4 times as large as it should be
"""Exercise 3. The gradient of q.

One head, no mask: s = SCALE * q @ k^T, p = softmax(s), out = p @ v. The forward kept lse, the log-sum-exp of each row of s,
and another kernel has made delta, the product of each row of dout with its row of out. With these two numbers a row
every block of keys stands alone. Write p, and from it and dp the gradient of the scores; dq is a sum over all blocks.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, start, S, D: tl.constexpr, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + offs[:, None] * D + tl.arange(0, D)[None, :], mask=offs[:, None] < S, other=0.0)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, S,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    dout = load_rows(dout_ptr, start_m, S, D, BLOCK_M)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < S, other=0.0)
    delta = tl.load(delta_ptr + offs_m, mask=offs_m < S, other=0.0)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr, start_n, S, D, BLOCK_N)  # (BLOCK_N, D), zeros past the end: they add nothing to dq
        v = load_rows(v_ptr, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        p = tl.exp(s - lse[:, None])
        ds = p * (dp - delta[:, None])  # the gradient of s; that of q @ k^T has the scale in it
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    offs = offs_m[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + offs, dq, mask=offs_m[:, None] < S)


def gradient_of_q(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """q, k, v, dout: (S, D); lse, delta: (S,)."""
    S, D = q.shape
    dq = torch.empty_like(q)
    grid = (triton.cdiv(S, 32),)
    dq_kernel[grid](q, k, v, dout, lse, delta, dq, S, SCALE=D**-0.5, D=D, BLOCK_M=32, BLOCK_N=32)
    return dq
