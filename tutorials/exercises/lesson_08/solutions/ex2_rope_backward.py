"""Exercise 2. The backward of RoPE with interleaved pairs.

`rope_kernel` turns the neighbours (x[2 * i], x[2 * i + 1]) of each row by the angle whose cosine and sine stand in row
`m` of the tables, (M, D / 2):

out[2 * i]     = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i]
out[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i]

Write `backward`: the gradient with respect to x, for the upstream gradient `dout`. It saves nothing of x.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, HALF, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)  # (BLOCK,), the pairs
    mask = offs < HALF
    cos = tl.load(cos_ptr + row * HALF + offs, mask=mask)
    sin = tl.load(sin_ptr + row * HALF + offs, mask=mask)
    even = row * 2 * HALF + 2 * offs
    x1 = tl.load(x_ptr + even, mask=mask)
    x2 = tl.load(x_ptr + even + 1, mask=mask)
    tl.store(out_ptr + even, x1 * cos - x2 * sin, mask=mask)
    tl.store(out_ptr + even + 1, x2 * cos + x1 * sin, mask=mask)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    M, D = x.shape
    rope_kernel[(M,)](x, cos, sin, out, D // 2, BLOCK=triton.next_power_of_2(D // 2))
    return out


def backward(dout: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to x of rope(x, cos, sin)."""
    return rope(dout, cos, -sin)
