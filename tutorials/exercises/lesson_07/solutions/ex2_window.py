"""Exercise 2. A sliding window.

Query i sees the WINDOW keys that end with its own: i - WINDOW + 1 .. i. Two things are to be written: which of a block's
scores are visible, and where the loop over the keys begins, since time should follow the window and not the length.
Keys that no query of the block sees must not be read: the check puts NaN there.

A row may see nothing in its first block of keys. `shift` is there for that: -inf - (-inf) would be NaN.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, start, S, D: tl.constexpr, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + offs[:, None] * D + tl.arange(0, D)[None, :], mask=offs[:, None] < S, other=0.0)


@triton.jit
def window_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, S, WINDOW, SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    begin = tl.maximum(start_m - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    for start_n in range(begin, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # (BLOCK_M, BLOCK_N)
        visible = (offs_n[None, :] <= offs_m[:, None]) & (offs_n[None, :] > offs_m[:, None] - WINDOW)
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - shift)
        p = tl.exp(s - shift[:, None])
        l = l * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr, start_n, S, D, BLOCK_N)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    offs = offs_m[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + offs, acc / l[:, None], mask=offs_m[:, None] < S)


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """One head: (S, D) each."""
    S, D = q.shape
    out = torch.empty_like(q)
    grid = (triton.cdiv(S, 32),)
    window_kernel[grid](q, k, v, out, S, window, SCALE=D**-0.5, D=D, BLOCK_M=32, BLOCK_N=32)
    return out
