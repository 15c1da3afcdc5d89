"""Exercise 3. The gradient of cross entropy, where some rows do not count.

A row counts unless its target is -100, and the loss is the mean over the rows that count. With C of them, p the softmax of a
row and t its target, the gradient of logit c is

dlogits[c] = (p[c] - (1 if c == t else 0)) / C, and 0 in a row that does not count.

`count_ptr` points at C, an integer on the GPU: nobody waits for it. Complete the kernel; a row fits into one block.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def gradient_kernel(logits_ptr, target_ptr, count_ptr, dlogits_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0)
    offs_v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    mask_v = offs_v < V
    z = tl.load(logits_ptr + row * V + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    e = tl.exp(z - tl.max(z, axis=0))
    p = e / tl.sum(e, axis=0)
    # TODO(ex3): the gradient of this row, from p, offs_v, and the numbers at target_ptr + row and count_ptr.
    dlogits = p
    tl.store(dlogits_ptr + row * V + offs_v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask_v)


def gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    M, V = logits.shape
    dlogits = torch.empty_like(logits)
    count = (target != -100).sum()
    gradient_kernel[(M,)](logits, target, count, dlogits, V, BLOCK_V=triton.next_power_of_2(V))
    return dlogits
