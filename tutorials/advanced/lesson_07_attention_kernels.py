# ---
# lesson:
#   number: 7
#   slug: attention_kernels
#   title: "Attention: the matrix that is never stored"
#   level: advanced
#   minutes: 90
#   prerequisites: [4, 5, 6]
#   ops: [flash_attn, flash_attn_varlen, paged_decode_attn, kv_cache_write]
#   concepts: [attention, online softmax, causal skipping, grouped heads, log-sum-exp, recomputation, warp specialisation, TMA]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 7. Attention kernels
#
# At the end of this lesson you can derive flash attention from the softmax of lesson 5 and write it, forward and
# backward, in some hundred lines of Triton; you know what each of its parts is worth; and you can read the shipped
# kernel for Hopper, which takes over by hand what the compiler cannot do.

# %%
import functools
import re

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_triton_ops import offline
from torch_triton_ops.ops.flash_attn import triton_kernels
from triton_tutorial import interpreted
from triton_tutorial.lesson import Lesson, LessonError, registry_entry

lesson = Lesson(7)
bf16 = torch.bfloat16

# %%
lesson.predict(
    """
    Attention over 4096 tokens with 32 heads of 128 numbers in bf16. q, k, v and the result are 32 MiB each. Written as three
    lines of PyTorch it also makes a matrix of scores, 4096 x 4096 for each head: 1 GiB. A kernel that never stores that
    matrix does the same arithmetic. What will it be bound by, and how many times faster can it be?
    """
)

# %% [markdown]
# ## The reference, and what it must move
#
# For each head, with S rows of D numbers in q, k and v:
#
# `s = q @ k^T / sqrt(D)`, `p = softmax(s)` along each row, `out = p @ v`.
#
# Row i of `s` says how well query i fits each key; `out` is an average of the rows of `v` with the weights `p`.
#
# | | for each head | 32 heads, S = 4096, D = 128 | S = 131072 |
# |---|---|---|---|
# | q, k, v, out | 4 S D numbers | 128 MiB | 4 GiB |
# | s, and p again | S^2 numbers each | 1 GiB each | 1 TiB each |
# | arithmetic of the two products | 4 S^2 D flops | 275 GFLOP | 281 TFLOP |
# | exponentials | S^2 | 0.5 G | 550 G |
#
# The three lines pass over the matrix six times: the product writes it, the scaling reads and writes it, softmax reads
# and writes it, the second product reads it. At S = 4096 that is 6 GiB, against 128 MiB that must be moved. And at S =
# 131072 there is no GPU on which it fits.
#
# Without the matrix, 4 S^2 D flops come to 8 S D bytes: S / 2 flops for each byte, 2048 at S = 4096. A GPU of today
# does a few hundred flops in the time of a byte. So attention is not memory-bound by nature; storing the matrix makes
# it so.


# %%
def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    p = torch.softmax(s, dim=-1)
    return p @ v


def library(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, causal: bool = False
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> int:
    return 4 * q.numel() * k.shape[2]


attention = lesson.problem(
    "attention",
    reference=naive,
    make=lambda b, h, s, d: tuple(lesson.randn(b, h, s, d, dtype=bf16) for _ in range(3)),
    check=[(1, 2, 150, 16), (2, 1, 64, 32)],
    timed=[lesson.size((1, 8, 2048, 128), (1, 32, 4096, 128))],
    bytes=lambda q, k, v: 4 * q.numel() * q.element_size(),
    flops=flops,
)
attention.baseline("torch, three lines")
attention.baseline("torch, cuDNN", lambda q, k, v: library(q, k, v, SDPBackend.CUDNN_ATTENTION))
attention.baseline("torch.ops.tt.flash_attn", lambda q, k, v: torch.ops.tt.flash_attn(q, k, v))


# %% [markdown]
# ## Online softmax, step by step
#
# A row of `out` needs its whole row of `s` first: the maximum, then the sum. Unless those can be put right afterwards.
#
# **Step 1.** Leave the division to the end. `out = sum_j exp(s_j - m) v_j / sum_j exp(s_j - m)`: both sums run over the
# keys, so keep both, `acc` (D numbers) and `l`, and divide once.
#
# **Step 2.** `m` is there so that exp does not overflow. It cancels in the quotient, so *any* number serves, as long as
# both sums use the same.
#
# **Step 3.** So use the maximum *so far*. When a block of keys brings a larger one, what was summed is too large by
# `exp(m - m_new)`; in `acc` and in `l` alike:
#
# ```
# m_new = max(m, max_j s_j)
# alpha = exp(m - m_new)                        # <= 1; 0 in the first step, where m is -inf
# p_j   = exp(s_j - m_new)
# l     = l * alpha + sum_j p_j
# acc   = acc * alpha + sum_j p_j v_j
# ```
#
# After the last block `out = acc / l`, and `m + log(l)` is the row's *log-sum-exp*, of which more below. Here it is for
# one query with six keys, two at a time, and one number in each value:

# %%
scores, values = torch.tensor([1.0, 3.0, 2.0, 6.0, 5.0, 0.0]), torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
m, l, acc = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
lines = ["| keys | s | m | alpha | l | acc | acc / l |", "|---|---|---|---|---|---|---|"]
for start in range(0, 6, 2):
    s, v = scores[start : start + 2], values[start : start + 2]
    m_new = torch.maximum(m, s.max())
    alpha = torch.exp(m - m_new)
    p = torch.exp(s - m_new)
    l = l * alpha + p.sum()
    acc = acc * alpha + (p * v).sum()
    m = m_new
    cells = f"{m:.0f} | {alpha:.4f} | {l:.4f} | {acc:.3f} | {acc / l:.3f}"
    lines.append(f"| {start}, {start + 1} | {s[0]:.0f}, {s[1]:.0f} | {cells} |")
whole = torch.softmax(scores, 0) @ values
torch.testing.assert_close(acc / l, whole)
torch.testing.assert_close(m + torch.log(l), torch.logsumexp(scores, 0))
lesson.say("\n".join(lines))
lesson.say(
    f"And `softmax(s) @ v`, with the whole row at hand: {whole:.3f}. The last line is exact, not an approximation."
)

# %% [markdown]
# ## Rung 1: two passes over the keys
#
# A program takes a block of queries of one head and keeps it. It walks along the keys in blocks; a block of scores, 128
# x 64, is a `tl.dot` in registers and is never stored. Without the online rule it must walk twice: once for the maxima,
# once for both sums. So `q @ k^T` is computed twice: 6 S^2 D flops instead of 4.
#
# Keys past the end must get -inf, not 0: exp(-inf) is 0. Queries past the end compute something that nobody stores.


# %%
@triton.jit
def load_rows(x_ptr, start, S, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows start .. start + BLOCK of one head, zeros beyond S: (BLOCK, D)."""
    offs = start + tl.arange(0, BLOCK)
    ptrs = x_ptr + offs[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=offs[:, None] < S, other=0.0) if MASKED else tl.load(ptrs)


@triton.jit
def store_rows(x_ptr, x, start, S, D: tl.constexpr, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    ptrs = x_ptr + offs[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptrs, x.to(x_ptr.dtype.element_ty), mask=offs[:, None] < S)


@triton.jit
def attention_kernel_v1(
    q_ptr, k_ptr, v_ptr, out_ptr, S,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64) * S * D
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr + head, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
        s = tl.dot(q, tl.trans(k)) * SCALE  # (BLOCK_M, BLOCK_N)
        s = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] < S, s, float("-inf"))
        m = tl.maximum(m, tl.max(s, 1))
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr + head, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k)) * SCALE
        s = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] < S, s, float("-inf"))
        p = tl.exp(s - m[:, None])
        l += tl.sum(p, 1)
        v = load_rows(v_ptr + head, start_n, S, D, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc)
    store_rows(out_ptr + head, acc / l[:, None], start_m, S, D, BLOCK_M)


def attention_v1(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, S, D = q.shape
    out = torch.empty_like(q)
    options = {"SCALE": D**-0.5, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    attention_kernel_v1[(triton.cdiv(S, 128), B * H)](q, k, v, out, S, **options)
    return out


attention.rung("two passes", attention_v1, attention_kernel_v1)

# %% [markdown]
# ## Rung 2: one pass, online
#
# The first loop goes; the four lines of step 3 come. The trade-off: a multiplication of `acc` in every step, 128 x D
# products on the ordinary cores, for a third of the work of the tensor cores and half of the keys' loads.


# %%
@triton.jit
def attention_kernel_v2(
    q_ptr, k_ptr, v_ptr, out_ptr, S,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64) * S * D
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr + head, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k)) * SCALE
        s = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] < S, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp(m - m_new)
        p = tl.exp(s - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m = m_new
        v = load_rows(v_ptr + head, start_n, S, D, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc)
    store_rows(out_ptr + head, acc / l[:, None], start_m, S, D, BLOCK_M)


def attention_v2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, S, D = q.shape
    out = torch.empty_like(q)
    options = {"SCALE": D**-0.5, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    attention_kernel_v2[(triton.cdiv(S, 128), B * H)](q, k, v, out, S, **options)
    return out


attention.rung("one pass, online", attention_v2, attention_kernel_v2, note="no maximum beforehand")

# %% [markdown]
# ## Rung 3: base 2, the scale folded in
#
# The GPU's instruction is `2^x`; `tl.exp(x)` is `2^(x * 1.4427)`, a product for each of S^2 scores, after the one with
# the scale and a subtraction. Keep `m` in units of log 2, and scale, conversion and subtraction are *one* instruction,
# `s * UNIT - m`. The maximum is taken before scaling (the scale is positive), so it costs one product a row.


# %%
@triton.jit
def attention_kernel_v3(
    q_ptr, k_ptr, v_ptr, out_ptr, S,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(1).to(tl.int64) * S * D
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr + head, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k))
        s = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] < S, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * UNIT)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * UNIT - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m = m_new
        v = load_rows(v_ptr + head, start_n, S, D, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc)
    store_rows(out_ptr + head, acc / l[:, None], start_m, S, D, BLOCK_M)


def attention_v3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, S, D = q.shape
    out = torch.empty_like(q)
    options = {"SCALE": D**-0.5, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    attention_kernel_v3[(triton.cdiv(S, 128), B * H)](q, k, v, out, S, **options)
    return out


attention.rung("base 2, scale folded", attention_v3, attention_kernel_v3, note="one instruction before the exponential")

# %% [markdown]
# ## Which program touches which address
#
# One head of 48 rows of 16 numbers, in blocks of 16 queries: three programs. Each reads its own rows of q and writes
# its own rows of out; all of them read all of k and v. That is the price of many programs: with 32 blocks of queries
# each key is loaded 32 times. But 32 programs that run at the same time read the same keys at about the same time, and
# the L2 cache can answer all but the first.


# %%
def toy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(q)
    S, D = q.shape[2:]
    attention_kernel_v3[(triton.cdiv(S, 16), 1)](q, k, v, out, S, SCALE=D**-0.5, D=D, BLOCK_M=16, BLOCK_N=16)
    return out


attention.picture(toy, 1, 1, 48, 16, title="Attention: 48 queries, 3 programs; each reads every key and value")
attention.ladder("Attention")

# %%
stored, ours, shipped, cudnn = (
    lesson.figure("attention", name, "us")
    for name in ("torch, three lines", "base 2, scale folded", "torch.ops.tt.flash_attn", "torch, cuDNN")
)
_, H, S, D = list(attention.timed.values())[-1]
matrix_us = 6 * 2 * H * S * S / lesson.limit() * 1e-6
product_us = 4 * H * S * S * D / lesson.limit("matmul_tflops") * 1e-6
measured = (
    f"""
    Both limits were measured in the same run. At them the two products alone take {product_us:.0f} us, and six passes over the
    matrix {matrix_us:.0f} us: storing it costs {matrix_us / product_us:.1f} times what must be done. Measured: three lines
    {stored:.0f} us, our kernel {ours:.0f} us, {stored / ours:.1f} times as fast; cuDNN {cudnn:.0f} us; the shipped op
    {shipped:.0f} us. The last part of this lesson is about what is left between our kernel and the shipped one.
    """
    if stored
    else "\nHow much that is on an H200 is not recorded yet; on a GPU this lesson measures it."
)
lesson.answer(
    """
    By arithmetic: S / 2 flops for each byte that must be moved, 2048 at S = 4096, where a GPU does a few hundred in that time.
    The kernel saves six passes over the matrix; the products, their exponentials, and q, k, v and out remain.
    """
    + measured
)

# %% [markdown]
# ## A bug on purpose
#
# `l` is rescaled, `acc` is not. A test with one block of keys passes: in the first step there is nothing to rescale.
# Rows whose largest score is in the first block are right, too. The others give old values too much weight, by a factor
# that is different in every row. Whoever tests an online algorithm tests it with several blocks.


# %%
@triton.jit
def attention_kernel_v4(
    q_ptr, k_ptr, v_ptr, out_ptr, S,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(1).to(tl.int64) * S * D
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr + head, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k))
        s = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] < S, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * UNIT)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * UNIT - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        v = load_rows(v_ptr + head, start_n, S, D, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc)
    store_rows(out_ptr + head, acc / l[:, None], start_m, S, D, BLOCK_M)


def attention_v4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, S, D = q.shape
    out = torch.empty_like(q)
    options = {"SCALE": D**-0.5, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    attention_kernel_v4[(triton.cdiv(S, 128), B * H)](q, k, v, out, S, **options)
    return out


attention.bug("acc keeps its old scale", attention_v4, attention_kernel_v4, 1, 1, 150, 16)

# %% [markdown]
# ## As language models use it: causal, with grouped heads
#
# Two changes to the problem. **Causal**: query i sees the keys 0 .. i only, so half of the pairs count, and only those
# are counted as flops here: S (S + 1) / 2 of them. **Grouped heads** (GQA): several heads of q, four here, share one of
# k and v. That changes no arithmetic; it makes k and v, which a decoder must keep for every token, smaller by the
# group.
#
# One more output: the log-sum-exp of each row, `lse = m + log(l)`, four bytes a query. The backward will rebuild the
# weights from it.


# %%
def naive_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse). The score matrix is stored, and k and v are copied for each head of q."""
    group, S = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    s = s.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), dim=-1)
    return torch.softmax(s, dim=-1) @ v, lse


def heads(b: int, h: int, hkv: int, s: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(lesson.randn(b, n, s, d, dtype=bf16) for n in (h, hkv, hkv))


def causal_flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> int:
    S = q.shape[2]
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * (S * (S + 1) // 2)


FULL = lesson.size((1, 8, 2, 2048, 128), (1, 32, 8, 4096, 128))

causal = lesson.problem(
    "causal attention",
    reference=naive_causal,
    make=heads,
    check=[(1, 2, 1, 150, 16), (2, 2, 2, 64, 32), (1, 2, 1, 1, 16)],
    timed=[FULL],
    bytes=lambda q, k, v: 2 * (2 * q.numel() + k.numel() + v.numel()) + 4 * q.numel() // q.shape[3],
    flops=causal_flops,
)
causal.baseline("torch, as written")
causal.baseline("torch, FlashAttention-2", lambda q, k, v: library(q, k, v, SDPBackend.FLASH_ATTENTION, causal=True))
causal.baseline("torch, cuDNN", lambda q, k, v: library(q, k, v, SDPBackend.CUDNN_ATTENTION, causal=True))

# %% [markdown]
# ## Rung 4: mask everything
#
# The step with one block of keys becomes a function, since it will be called twice. Each score is compared with its
# query's number. `offs_n <= offs_m` also hides the keys past the end from every query that counts. A row never sees
# -inf alone: its own key is visible, and the first block of keys is visible in part to all. (With a window it is not
# so: then -inf - (-inf) must be guarded, see the pitfalls.) For now k and v are copied for each head, as one does in
# PyTorch.


# %%
@triton.jit
def attend_v1(
    acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One block of keys."""
    k = load_rows(k_ptr, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
    s = tl.dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * UNIT)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * UNIT - m_new[:, None])
    l = l * alpha + tl.sum(p, 1)
    v = load_rows(v_ptr, start_n, S, D, BLOCK_N)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l, m_new


@triton.jit
def causal_kernel_v1(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(1).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    k_ptr += head * S * D
    v_ptr += head * S * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        acc, l, m = attend_v1(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N)
    store_rows(out_ptr + head * S * D, acc / l[:, None], start_m, S, D, BLOCK_M)
    lse = (m + tl.log2(l)) * 0.6931471805599453  # natural logarithms
    tl.store(lse_ptr + head * S + offs_m, lse, mask=offs_m < S)


def causal_v1(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    GROUP = H // k.shape[1]
    k = k.repeat_interleave(GROUP, dim=1)
    v = v.repeat_interleave(GROUP, dim=1)
    out, lse = torch.empty_like(q), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    options = {"SCALE": D**-0.5, "GROUP": GROUP, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    causal_kernel_v1[(triton.cdiv(S, 128), B * H)](q, k, v, out, lse, S, **options)
    return out, lse


causal.rung("mask everything", causal_v1, (attend_v1, causal_kernel_v1))

# %% [markdown]
# ## Rung 5: skip what is hidden
#
# Block of queries 0 .. 127 sees no key past 127. Its loop may end there: half of all blocks are never computed. It is
# one line, and should be worth nearly a factor of two; a mask alone saves nothing, since a hidden score costs as much
# as a visible one.


# %%
@triton.jit
def causal_kernel_v2(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(1).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    k_ptr += head * S * D
    v_ptr += head * S * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        acc, l, m = attend_v1(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N)
    store_rows(out_ptr + head * S * D, acc / l[:, None], start_m, S, D, BLOCK_M)
    lse = (m + tl.log2(l)) * 0.6931471805599453  # natural logarithms
    tl.store(lse_ptr + head * S + offs_m, lse, mask=offs_m < S)


def causal_v2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    GROUP = H // k.shape[1]
    k = k.repeat_interleave(GROUP, dim=1)
    v = v.repeat_interleave(GROUP, dim=1)
    out, lse = torch.empty_like(q), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    options = {"SCALE": D**-0.5, "GROUP": GROUP, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    causal_kernel_v2[(triton.cdiv(S, 128), B * H)](q, k, v, out, lse, S, **options)
    return out, lse


causal.rung("skip what is hidden", causal_v2, (attend_v1, causal_kernel_v2), note="the loop ends at the diagonal")


def toy_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    S, D = q.shape[2:]
    out, lse = torch.empty_like(q), torch.empty(S, device=q.device)
    options = {"SCALE": D**-0.5, "GROUP": 1, "D": D, "BLOCK_M": 16, "BLOCK_N": 16}
    causal_kernel_v2[(triton.cdiv(S, 16), 1)](q, k, v, out, lse, S, **options)
    return out


causal.picture(
    *(toy_causal, 1, 1, 1, 48, 16),
    title="Causal: early keys are read by all programs, the last block by one",
    view="touches",
    tensors=("q", "k", "v", "out"),
    name="causal",
)

# %% [markdown]
# ## Rung 6: mask the edge only
#
# Of the blocks that are left, only those on the diagonal need the comparison, the selection and the masked loads. So
# two loops call the same function, once with `MASKED` False. The trade-off: the code is there twice, and both copies
# share the registers.


# %%
@triton.jit
def attend_v2(
    acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys."""
    k = load_rows(k_ptr, start_n, S, D, BLOCK_N, MASKED)  # (BLOCK_N, D)
    s = tl.dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
    if MASKED:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * UNIT)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * UNIT - m_new[:, None])
    l = l * alpha + tl.sum(p, 1)
    v = load_rows(v_ptr, start_n, S, D, BLOCK_N, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l, m_new


@triton.jit
def causal_kernel_v3(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(1).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    k_ptr += head * S * D
    v_ptr += head * S * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    edge = start_m // BLOCK_N * BLOCK_N  # keys before it are seen by all of these queries
    for start_n in range(0, edge, BLOCK_N):
        acc, l, m = attend_v2(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N, False)
    for start_n in range(edge, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        acc, l, m = attend_v2(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N, True)
    store_rows(out_ptr + head * S * D, acc / l[:, None], start_m, S, D, BLOCK_M)
    lse = (m + tl.log2(l)) * 0.6931471805599453  # natural logarithms
    tl.store(lse_ptr + head * S + offs_m, lse, mask=offs_m < S)


def causal_v3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    GROUP = H // k.shape[1]
    k = k.repeat_interleave(GROUP, dim=1)
    v = v.repeat_interleave(GROUP, dim=1)
    out, lse = torch.empty_like(q), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    options = {"SCALE": D**-0.5, "GROUP": GROUP, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    causal_kernel_v3[(triton.cdiv(S, 128), B * H)](q, k, v, out, lse, S, **options)
    return out, lse


causal.rung("mask the edge only", causal_v3, (attend_v2, causal_kernel_v3), note="inner blocks compare nothing")

# %% [markdown]
# ## Rung 7: the longest first
#
# Programs are not equal any more: the first block of queries has 2 blocks of keys, the last one 64. A GPU starts
# programs in the order of their numbers, those of axis 0 fastest. So far that was: all blocks of head 0, then of head
# 1; and at the very end the longest block of the last head, with most SMs idle. Now heads are on axis 0 and blocks run
# backwards on axis 1: all heads' longest blocks first, the shortest last, where they fill the gaps.


# %%
@triton.jit
def causal_kernel_v4(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(0).to(tl.int64)
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    k_ptr += head * S * D
    v_ptr += head * S * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    edge = start_m // BLOCK_N * BLOCK_N  # keys before it are seen by all of these queries
    for start_n in range(0, edge, BLOCK_N):
        acc, l, m = attend_v2(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N, False)
    for start_n in range(edge, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        acc, l, m = attend_v2(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N, True)
    store_rows(out_ptr + head * S * D, acc / l[:, None], start_m, S, D, BLOCK_M)
    lse = (m + tl.log2(l)) * 0.6931471805599453  # natural logarithms
    tl.store(lse_ptr + head * S + offs_m, lse, mask=offs_m < S)


def causal_v4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    GROUP = H // k.shape[1]
    k = k.repeat_interleave(GROUP, dim=1)
    v = v.repeat_interleave(GROUP, dim=1)
    out, lse = torch.empty_like(q), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    options = {"SCALE": D**-0.5, "GROUP": GROUP, "D": D, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    causal_kernel_v4[(B * H, triton.cdiv(S, 128))](q, k, v, out, lse, S, **options)
    return out, lse


causal.rung("the longest first", causal_v4, (attend_v2, causal_kernel_v4), note="short blocks fill the gaps at the end")

# %% [markdown]
# ## Rung 8: grouped heads without copies
#
# Head h of q reads head `h // GROUP` of k and v: an integer division in place of two copies. With contiguous tensors
# the batch comes along by itself, since (b * H + h) // GROUP = b * Hkv + h // GROUP. And the heads of a group,
# neighbours on axis 0, run at the same time and find the same keys in the L2 cache.
#
# Block sizes and stages become arguments, for the autotuning table.


# %%
@triton.jit
def causal_kernel_v5(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    head = tl.program_id(0).to(tl.int64)
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    k_ptr += head // GROUP * S * D
    v_ptr += head // GROUP * S * D
    offs_m = start_m + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    edge = start_m // BLOCK_N * BLOCK_N  # keys before it are seen by all of these queries
    for start_n in range(0, edge, BLOCK_N):
        acc, l, m = attend_v2(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N, False)
    for start_n in range(edge, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        acc, l, m = attend_v2(acc, l, m, q, k_ptr, v_ptr, offs_m, start_n, S, UNIT, D, BLOCK_N, True)
    store_rows(out_ptr + head * S * D, acc / l[:, None], start_m, S, D, BLOCK_M)
    lse = (m + tl.log2(l)) * 0.6931471805599453  # natural logarithms
    tl.store(lse_ptr + head * S + offs_m, lse, mask=offs_m < S)


def causal_v5(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, BLOCK_M: int = 128, BLOCK_N: int = 64, num_stages: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    GROUP = H // k.shape[1]
    out, lse = torch.empty_like(q), torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    options = {"SCALE": D**-0.5, "GROUP": GROUP, "D": D, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    grid = (B * H, triton.cdiv(S, BLOCK_M))
    causal_kernel_v5[grid](q, k, v, out, lse, S, **options, num_warps=8, num_stages=num_stages)
    return out, lse


causal.rung("grouped heads", causal_v5, (attend_v2, causal_kernel_v5), note="k and v are not copied")


# %%
def portable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the shipped op's Triton kernel, also where the op would take its Hopper kernel."""
    options = triton_kernels.Options(scale=q.shape[3] ** -0.5, softcap=0.0, left=-1, right=0)
    if not lesson.gpu:
        return interpreted.call_op("flash_attn_fwd", q, k, v, True, options.scale, -1, -1, 0.0, None, None, None)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    triton_kernels.forward(q, k, v, out, lse, options)
    return out, lse


causal.baseline("torch.ops.tt, its Triton kernel", portable)
causal.baseline("torch.ops.tt.flash_attn", lambda q, k, v: torch.ops.tt.flash_attn(q, k, v, causal=True))
causal.ladder("Causal attention, grouped heads")
masked, skipped, edge_only, longest, grouped = (
    lesson.figure("causal attention", name, "us")
    for name in ("mask everything", "skip what is hidden", "mask the edge only", "the longest first", "grouped heads")
)
if masked:
    lesson.say(
        f"""
        What each rung was worth: skipping {masked / skipped:.2f} times, masks at the edge only {skipped / edge_only:.2f},
        the order {edge_only / longest:.2f}, no copies {longest / grouped:.2f}.
        """
    )

# %% [markdown]
# ## The backward, derived
#
# Given `dout`, wanted are dq, dk, dv. The chain, backwards, with the matrices of queries by keys in capitals, Z for the
# scores:
#
# | forward | backward |
# |---|---|
# | `out = P v` | `dv = P^T dout`, `dP = dout v^T` |
# | `P = softmax(Z)`, along rows | `dZ_ij = P_ij (dP_ij - sum_j P_ij dP_ij)` |
# | `Z = scale q k^T` | `dq = scale dZ k`, `dk = scale dZ^T q` |
#
# Two things seem to need a stored matrix.
#
# **P is gone.** It can be computed again, and not even online: `P_ij = exp(Z_ij - lse_i)`. With the saved log-sum-exp a
# block of P depends on its own rows of q and k alone. One more product, instead of S^2 numbers saved.
#
# **The sum runs along the whole row.** But it is known beforehand:
#
# `sum_j P_ij dP_ij = sum_j P_ij sum_d dout_id v_jd = sum_d dout_id sum_j P_ij v_jd = sum_d dout_id out_id`
#
# That is `delta_i`, the product of a row of `dout` with a row of `out`: one number for each query, from tensors that
# are there.
#
# So with lse and delta, two numbers a row, every block stands alone. Five products instead of the forward's two: 10 S^2
# D flops (2.5 times the forward).
#
# lse is an output too. If somebody uses it (who merges parts of an attention does), its gradient `dlse` adds
# `P_ij dlse_i` to dZ_ij. So `dZ = P (dP - (delta - dlse))`: subtract it from delta, once a row, and no kernel needs to
# know.
#
# dk and dv are sums over queries, dq is a sum over keys. One kernel for all three must add into one of them from many
# programs, with atomics, and the last bits then depend on who comes first. Here, as in the shipped Triton kernels,
# there are two kernels, and Z and dP are computed in both: 14 S^2 D flops, and results that repeat bit for bit. The
# rate below counts 10.


# %%
def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What autograd makes of the reference; out and lse are computed anew."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(naive_causal(*leaves), leaves, (dout, dlse))


def backward_inputs(*case: int) -> tuple[torch.Tensor, ...]:
    q, k, v = heads(*case)
    out, lse = naive_causal(q, k, v)
    return q, k, v, out, lse, torch.randn_like(out), torch.randn_like(lse)


back = lesson.problem(
    "backward",
    reference=gradients,
    make=backward_inputs,
    check=[(1, 2, 1, 150, 16), (2, 2, 2, 64, 32)],
    timed=[FULL],
    bytes=lambda q, k, v, *rest: 2 * (4 * q.numel() + 2 * (k.numel() + v.numel())) + 8 * q.numel() // q.shape[3],
    flops=lambda *inputs: causal_flops(*inputs) * 5 // 2,
)

# %% [markdown]
# ## Backward, rung 1: every block
#
# Three kernels. Queries past the end get lse = +inf: exp(s - inf) is 0, and no mask is needed for them.


# %%
@triton.jit
def delta_kernel(dout_ptr, out_ptr, dlse_ptr, delta_ptr, S, D: tl.constexpr, BLOCK_M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * S  # of this head
    start_m = tl.program_id(1) * BLOCK_M
    dout = load_rows(dout_ptr + row * D, start_m, S, D, BLOCK_M).to(tl.float32)
    out = load_rows(out_ptr + row * D, start_m, S, D, BLOCK_M).to(tl.float32)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    dlse = tl.load(dlse_ptr + row + offs_m, mask=offs_m < S, other=0.0)
    tl.store(delta_ptr + row + offs_m, tl.sum(dout * out, 1) - dlse, mask=offs_m < S)


@triton.jit
def dkdv_kernel_v1(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over all queries of the heads that share it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)  # of k
    start_n = tl.program_id(1) * BLOCK_N
    k = load_rows(k_ptr + head * S * D, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
    v = load_rows(v_ptr + head * S * D, start_n, S, D, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for g in range(GROUP):
        row = (head * GROUP + g) * S  # of this head of q
        for start_m in range(0, S, BLOCK_M):
            q = load_rows(q_ptr + row * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
            dout = load_rows(dout_ptr + row * D, start_m, S, D, BLOCK_M)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < S, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < S, other=0.0)
            s = tl.dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None] * LOG2E)
            p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv)
            dp = tl.dot(dout, tl.trans(v))
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk)
    store_rows(dk_ptr + head * S * D, dk * SCALE, start_n, S, D, BLOCK_N)
    store_rows(dv_ptr + head * S * D, dv, start_n, S, D, BLOCK_N)


@triton.jit
def dq_kernel_v1(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: the forward's loop over the keys."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)  # of q
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    dout = load_rows(dout_ptr + head * S * D, start_m, S, D, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + head * S + offs_m, mask=offs_m < S, other=float("inf"))
    delta = tl.load(delta_ptr + head * S + offs_m, mask=offs_m < S, other=0.0)
    k_ptr += head // GROUP * S * D
    v_ptr += head // GROUP * S * D
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, S, BLOCK_N):
        k = load_rows(k_ptr, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
        v = load_rows(v_ptr, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None] * LOG2E)
        p = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] <= offs_m[:, None], p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store_rows(dq_ptr + head * S * D, dq * SCALE, start_m, S, D, BLOCK_M)


def backward_v1(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    (B, H, S, D), Hkv = q.shape, k.shape[1]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    delta_kernel[(B * H, triton.cdiv(S, 64))](dout, out, dlse, delta, S, D=D, BLOCK_M=64)
    given = (q, k, v, dout, lse, delta)
    options = {"SCALE": D**-0.5, "GROUP": H // Hkv, "D": D, "num_warps": 8, "num_stages": 2}
    dkdv_kernel_v1[(B * Hkv, triton.cdiv(S, 128))](*given, dk, dv, S, BLOCK_M=32, BLOCK_N=128, **options)
    dq_kernel_v1[(B * H, triton.cdiv(S, 128))](*given, dq, S, BLOCK_M=128, BLOCK_N=64, **options)
    return dq, dk, dv


back.rung("every block", backward_v1, (delta_kernel, dkdv_kernel_v1, dq_kernel_v1))

# %% [markdown]
# ## Backward, rung 2: skip what is hidden
#
# The same skip, seen from both sides: queries before a block of keys do not see it, keys behind a block of queries are
# not seen. Here the *first* block of keys has the most to do, and programs start in that order already.


# %%
@triton.jit
def dkdv_kernel_v2(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over all queries of the heads that share it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)  # of k
    start_n = tl.program_id(1) * BLOCK_N
    k = load_rows(k_ptr + head * S * D, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
    v = load_rows(v_ptr + head * S * D, start_n, S, D, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for g in range(GROUP):
        row = (head * GROUP + g) * S  # of this head of q
        for start_m in range(start_n // BLOCK_M * BLOCK_M, S, BLOCK_M):
            q = load_rows(q_ptr + row * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
            dout = load_rows(dout_ptr + row * D, start_m, S, D, BLOCK_M)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < S, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < S, other=0.0)
            s = tl.dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None] * LOG2E)
            p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv)
            dp = tl.dot(dout, tl.trans(v))
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk)
    store_rows(dk_ptr + head * S * D, dk * SCALE, start_n, S, D, BLOCK_N)
    store_rows(dv_ptr + head * S * D, dv, start_n, S, D, BLOCK_N)


@triton.jit
def dq_kernel_v2(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries: the forward's loop over the keys."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)  # of q
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q = load_rows(q_ptr + head * S * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
    dout = load_rows(dout_ptr + head * S * D, start_m, S, D, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + head * S + offs_m, mask=offs_m < S, other=float("inf"))
    delta = tl.load(delta_ptr + head * S + offs_m, mask=offs_m < S, other=0.0)
    k_ptr += head // GROUP * S * D
    v_ptr += head // GROUP * S * D
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        k = load_rows(k_ptr, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
        v = load_rows(v_ptr, start_n, S, D, BLOCK_N)
        s = tl.dot(q, tl.trans(k))  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None] * LOG2E)
        p = tl.where(start_n + tl.arange(0, BLOCK_N)[None, :] <= offs_m[:, None], p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store_rows(dq_ptr + head * S * D, dq * SCALE, start_m, S, D, BLOCK_M)


def backward_v2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    (B, H, S, D), Hkv = q.shape, k.shape[1]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    delta_kernel[(B * H, triton.cdiv(S, 64))](dout, out, dlse, delta, S, D=D, BLOCK_M=64)
    given = (q, k, v, dout, lse, delta)
    options = {"SCALE": D**-0.5, "GROUP": H // Hkv, "D": D, "num_warps": 8, "num_stages": 2}
    dkdv_kernel_v2[(B * Hkv, triton.cdiv(S, 128))](*given, dk, dv, S, BLOCK_M=32, BLOCK_N=128, **options)
    dq_kernel_v2[(B * H, triton.cdiv(S, 128))](*given, dq, S, BLOCK_M=128, BLOCK_N=64, **options)
    return dq, dk, dv


back.rung("skip what is hidden", backward_v2, (delta_kernel, dkdv_kernel_v2, dq_kernel_v2), note="both loops")

# %% [markdown]
# ## Backward, rung 3: scores transposed
#
# dv = P^T dout needs P with the keys as rows, and the accumulators dk and dv have keys as rows too. A block of P as it
# comes out of `q @ k^T` has queries as rows, so each of its elements must first move to another thread, through shared
# memory, twice a step. Compute `k @ q^T` instead and it comes out as it is wanted. Besides, Hopper's matrix instruction
# takes 64 rows at a time from each group of four warps: a block of 32 queries is too low for it, the 128 keys are not.
# The kernel for dq needs dZ with queries as rows; it is right as it is.


# %%
@triton.jit
def dkdv_kernel_v3(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, S,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over all queries of the heads that share it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)  # of k
    start_n = tl.program_id(1) * BLOCK_N
    k = load_rows(k_ptr + head * S * D, start_n, S, D, BLOCK_N)  # (BLOCK_N, D)
    v = load_rows(v_ptr + head * S * D, start_n, S, D, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for g in range(GROUP):
        row = (head * GROUP + g) * S  # of this head of q
        for start_m in range(start_n // BLOCK_M * BLOCK_M, S, BLOCK_M):
            q = load_rows(q_ptr + row * D, start_m, S, D, BLOCK_M)  # (BLOCK_M, D)
            dout = load_rows(dout_ptr + row * D, start_m, S, D, BLOCK_M)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < S, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < S, other=0.0)
            s = tl.dot(k, tl.trans(q))  # (BLOCK_N, BLOCK_M)
            p = tl.exp2(s * (SCALE * LOG2E) - lse[None, :] * LOG2E)
            p = tl.where(offs_n[:, None] <= offs_m[None, :], p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            dp = tl.dot(v, tl.trans(dout))
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
    store_rows(dk_ptr + head * S * D, dk * SCALE, start_n, S, D, BLOCK_N)
    store_rows(dv_ptr + head * S * D, dv, start_n, S, D, BLOCK_N)


def backward_v3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    (B, H, S, D), Hkv = q.shape, k.shape[1]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    delta_kernel[(B * H, triton.cdiv(S, 64))](dout, out, dlse, delta, S, D=D, BLOCK_M=64)
    given = (q, k, v, dout, lse, delta)
    options = {"SCALE": D**-0.5, "GROUP": H // Hkv, "D": D, "num_warps": 8, "num_stages": 2}
    dkdv_kernel_v3[(B * Hkv, triton.cdiv(S, 128))](*given, dk, dv, S, BLOCK_M=32, BLOCK_N=128, **options)
    dq_kernel_v2[(B * H, triton.cdiv(S, 128))](*given, dq, S, BLOCK_M=128, BLOCK_N=64, **options)
    return dq, dk, dv


back.rung("scores transposed", backward_v3, (delta_kernel, dkdv_kernel_v3, dq_kernel_v2), note="no operand is moved")


# %%
def shipped_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) by the kernels that the shipped op takes."""
    options = (True, q.shape[3] ** -0.5, -1, -1, 0.0, None, None, None, [True] * 3 + [False] * 3)
    call = torch.ops.tt.flash_attn_bwd if lesson.gpu else functools.partial(interpreted.call_op, "flash_attn_bwd")
    return call(dout, q, k, v, out, lse, *options)[:3]


back.baseline(
    "torch.ops.tt.flash_attn", lambda q, k, v, out, lse, dout, dlse: shipped_backward(q, k, v, out, lse, dout)
)
back.ladder("Backward of causal attention, grouped heads")
every, hidden, transposed = (
    lesson.figure("backward", name, "us") for name in ("every block", "skip what is hidden", "scores transposed")
)
if every:
    lesson.say(
        f"""
        Skipping is worth {every / hidden:.2f} times, the transposed scores {hidden / transposed:.2f} times. The backward took
        {transposed / grouped:.1f} times the forward.
        """
    )

# %% [markdown]
# ## Registering it, with the log-sum-exp
#
# The operator returns (out, lse), and `setup_context` saves q, k, v, out, lse: linear in S, where autograd on the three
# lines would save p. A model takes the first output; whoever merges parts of an attention takes both. The backward is
# an operator of its own, because torch.compile traces it, and what it traces must be operators.
#
# The shipped op keeps lse to itself: `flash_attn` returns out, `flash_attn_fwd` (the `forward:` of its entry) both, and
# runs only where a gradient is needed; without one, lse is not even written. The last cell asserts that out, lse, dq,
# dk and dv of the lesson's kernels are those of the shipped op's Triton kernels.


# %%
def launcher(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return causal_v5(q.contiguous(), k.contiguous(), v.contiguous())


def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def setup_context(ctx, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.tt_lesson.flash_attn_bwd(*ctx.saved_tensors, dout, dlse)


@torch.library.custom_op("tt_lesson::flash_attn_bwd", mutates_args=())
def flash_attn_bwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return backward_v3(*(x.contiguous() for x in (q, k, v, out, lse, dout, dlse)))


@flash_attn_bwd.register_fake
def flash_attn_bwd_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


op = causal.register(
    "flash_attn(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    launcher,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
)
lesson.say(f"How the shipped op is declared, in `op_registry.yaml`:\n\n```yaml\n{registry_entry('flash_attn')}\n```")


# %%
def portable_backward(q, k, v, out, lse, dout) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) by the shipped op's Triton kernels."""
    options = triton_kernels.Options(scale=q.shape[3] ** -0.5, softcap=0.0, left=-1, right=0)
    if not lesson.gpu:
        return shipped_backward(q, k, v, out, lse, dout)
    found = [torch.empty_like(x) for x in (q, k, v)]
    triton_kernels.backward(dout, q, k, v, out, lse, [*found, None, None, None], options)
    return tuple(found)


for case in causal.check:
    q, k, v = causal.make(*case)
    theirs = portable(q, k, v)
    dout, dlse = torch.randn_like(theirs[0]), torch.zeros_like(theirs[1])  # the shipped op's lse has no gradient
    inputs = (q, k, v, *theirs, dout, dlse)
    for who, forward, gradient in (
        ("the lesson's", op(q, k, v), flash_attn_bwd(*inputs)),
        ("the shipped", theirs, portable_backward(*inputs[:-1])),
    ):
        wrong = causal.compare(forward, (q, k, v)) or back.compare(gradient[:3], inputs)
        if wrong:
            raise LessonError(f"{who} kernels, {case}: {wrong}")
lesson.say("The lesson's kernels and the shipped op's agree, within rounding: out, lse, dq, dk and dv.")

# %% [markdown]
# ## The autotuning table
#
# Back to the forward, rung 8.
#
# A larger block of queries uses each key more often; a larger block of keys has fewer steps, each with its reductions
# and its rescaling. Both need registers: at 128 x 128 `acc` is 64 numbers for each of 256 threads, and the scores of a
# step are as many again. Past 255 a thread they spill. `num_stages` is how many blocks of keys and values are under way
# or in use at once, in shared memory. Eight warps are two groups of four, each with 64 of the 128 queries.

# %%
causal.autotune(
    causal_v5,
    [
        {"BLOCK_M": m, "BLOCK_N": n, "num_stages": stages}
        for m, n, stages in ((128, 64, 2), (128, 64, 3), (128, 128, 2), (256, 64, 2))
    ],
)

# %% [markdown]
# ## What it does to memory
#
# Peak memory of one forward and backward beyond the inputs, 8 heads of 64 numbers. The three lines keep p for the
# backward, and have other matrices of that size beside it; the operator keeps one row of `out` and one number for each
# query.

# %%
LENGTHS = (1024, 2048, 4096, 8192)


def peak_mib(function, length: int) -> float:
    q, k, v = (x.requires_grad_() for x in heads(1, 8, 8, length, 64))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(q, k, v)[0]
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if lesson.timing:
    for length in LENGTHS:
        for name, function in (("torch, as written", naive_causal), ("grouped heads", op)):
            row = {"table": "memory", "name": name, "case": str(length), "baseline": function is naive_causal}
            lesson.rows.append(row | {"peak MiB": round(peak_mib(function, length), 1)})
lines = ["| S | torch, as written | our op | ratio |", "|---|---|---|---|"]
for length in LENGTHS:
    stored, kept = (
        lesson.figure("memory", name, "peak MiB", str(length)) for name in ("torch, as written", "grouped heads")
    )
    lines.append(f"| {length} | {stored:.0f} MiB | {kept:.0f} MiB | {stored / kept:.0f} |")
lesson.say("\n".join(lines) if stored else "Not recorded yet; on a GPU this lesson measures it.")
lesson.chart(
    *("memory", "Memory of a forward and a backward, by length"),
    kind="lines",
    measure="peak MiB",
    limit=False,
    xlabel="queries and keys",
)

# %% [markdown]
# ## Into a model
#
# The attention of a transformer block: one product for q, k and v, attention, one product back. The graph is one piece,
# with the op in it as a node; `getitem` takes its first output. PyTorch's own `scaled_dot_product_attention` is a node
# of the same kind, so here the compiler has little to add: what is compared is the kernels.


# %%
def block_with(attend):
    def model(x: torch.Tensor, w_qkv: torch.Tensor, w_out: torch.Tensor, h: int, hkv: int) -> torch.Tensor:
        B, S, E = x.shape
        D = E // h
        q, k, v = (x @ w_qkv.t()).split([h * D, hkv * D, hkv * D], dim=-1)
        q, k, v = (y.view(B, S, -1, D).transpose(1, 2) for y in (q, k, v))
        return attend(q, k, v).transpose(1, 2).reshape(B, S, E) @ w_out.t()

    return model


def block_inputs(b: int, s: int, h: int, hkv: int, d: int) -> tuple[torch.Tensor | int, ...]:
    E = h * d
    shapes = ((b, s, E), ((h + 2 * hkv) * d, E), (E, E))
    x, w_qkv, w_out = (lesson.randn(*shape, dtype=bf16) for shape in shapes)
    return x, w_qkv * E**-0.5, w_out * E**-0.5, h, hkv


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def shipped_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.flash_attn(q, k, v, causal=True)


lesson.compiled(
    "model",
    make=block_inputs,
    ours=block_with(lambda q, k, v: op(q, k, v)[0]),
    eager=block_with(sdpa),
    others={"torch.ops.tt, compiled": block_with(shipped_causal)},
    node="tt_lesson.flash_attn",
    check=(2, 70, 4, 2, 16),
    timed=lesson.size((1, 2048, 8, 2, 128), (1, 8192, 32, 8, 128)),
    flops=lambda x, w_qkv, w_out, h, hkv: (
        2 * x.numel() * (w_qkv.shape[0] + w_out.shape[0]) + 2 * x.numel() * x.shape[1]
    ),
    tolerance=2e-2,
    title="The attention of a transformer block",
)
library_us, ours, shipped = (
    lesson.figure("model", name, "us") for name in ("torch, compiled", "ours, compiled", "torch.ops.tt, compiled")
)
if library_us:
    lesson.say(
        f"""
        With PyTorch's attention {library_us:.0f} us, with the lesson's {ours:.0f} us, with the shipped op {shipped:.0f} us,
        {library_us / shipped:.2f} times as fast as the first.
        """
    )

# %% [markdown]
# ## What the hardware wants: the kernel for Hopper
#
# Count the clocks of an H100 or H200 for a tile of 128 queries and 128 keys at D = 128. One SM multiplies and adds 4096
# flops of bf16 a clock: the two products take 2 * 2 * 128 * 128 * 128 / 4096 = **2048 clocks**. It computes 16
# exponentials a clock: 16384 of them take **1024**, and maximum, sum, scaling and rounding come on top. Done one after
# the other, the tensor cores rest for more than a third of the time. So the one thing that counts now is *overlap*:
# exponentials of one tile under the products of another. (At D = 64 products and exponentials take 1024 clocks each, at
# D = 256 the products take 4096: the larger the head, the easier.)
#
# The Triton kernel above leaves that to the compiler: it fetches the next block of keys early (`num_stages`), and for
# the rest hopes that of the warps of an SM some compute while others multiply. The shipped kernel,
# `torch_triton_ops/ops/flash_attn/hopper.py`, is written in *Gluon*, Triton's lower language, where layouts, shared
# memory, copies and barriers are placed by hand (lesson 9). Four ideas carry it:
#
# **Warp specialisation.** `gl.warp_specialize` gives different warps different code. One warp is the *producer* and
# only starts copies. Two groups of four warps, *warpgroups*, are *consumers* with 64 queries each (three at D = 64): a
# warpgroup is what Hopper's matrix instruction, `wgmma`, runs on. The parts talk through barriers in shared memory:
# `full` says that a buffer's data has come, `empty` that its readers are done.
#
# **TMA.** A copy of a whole block is one instruction of one thread: a descriptor, made by the host, knows shape and
# strides. No warp computes addresses, rows past the end arrive as zeros, and the hardware counts the arrived bytes into
# the barrier. So the producer needs 24 registers a thread, and `setmaxnreg` hands the others to the consumers: 240
# each, where twelve equal warps would have 168.
#
# **Products under the softmax, in one consumer.** `wgmma` is asynchronous. A step issues S(i) = Q K(i)^T and right
# behind it O += P(i+1) V(i+1), of the step before (blocks go from the last to the first, so the masked ones come
# first); waits for S(i) alone, and does its softmax while the second product still runs. The price: P waits one step in
# registers.
#
# **Two consumers in turns: ping-pong.** While one of them does its softmax, the other's products run. Named barriers
# can force the order: "multiply, then hand over the turn". At D = 64, where products and exponentials take equally
# long, the kernel does so. At D = 128 it leaves them out: two consumers that wait for the same tensor cores fall into
# that rhythm by themselves, and when the kernel was tuned the barriers gained nothing.
#
# The plan for the middle of a tile at D = 128, a character for about 100 clocks (S2: scores of key block 2, PV3: P
# times V of block 3):
#
# ```
# producer      [K1 V2            ][K0 V1            ][V0, next Q and K  ]  1 warp starts copies, memory works
# consumer 0
#   products    [S2 ][PV3]          [S1 ][PV2]          [S0 ][PV1]
#   softmax          [ of S2 ]           [ of S1 ]           [ of S0 ]      under its own PV and the other's S
# consumer 1
#   products              [S2 ][PV3]          [S1 ][PV2]          [S0 ][PV
#   softmax                    [ of S2 ]           [ of S1 ]           [ o
# tensor cores  0000000000111111111100000000001111111111000000000011111111  never idle: whose turn it is
# ```
#
# And, as in our rung 7, the order of the tiles: the grid is *persistent*, one program for each SM, which draws tile
# after tile from a counter in global memory, the longest first. The next tile's Q and K are on their way while the last
# one's O leaves.
#
# The offline compiler shows what became of that, without a GPU:


# %%
def anatomy(launch) -> tuple[str, ...]:
    """A launch's resources for sm_90, and what its PTX is made of."""
    made = offline.compile_launch(launch, 90)
    ptx = made.kernel.asm["ptx"]
    kept = sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)} & {24, 240})
    return (
        str(made.kernel.metadata.num_warps),
        f"{made.registers}" + (f"; then {' and '.join(map(str, kept))}" if kept else ""),
        f"{made.spilled} B",
        f"{made.shared // 1024} KiB",
        str(ptx.count("wgmma.mma_async")),
        str(ptx.count("cp.async.bulk.tensor")),
        str(ptx.count("cp.async.c")),
        str(ptx.count("mbarrier.try_wait")),
    )


if not lesson.quiet:
    with torch.no_grad(), lesson.turn.left():
        q, k, v = (torch.empty(1, n, 4096, 128, dtype=bf16, device="meta") for n in (32, 8, 8))
        (hopper,) = offline.record(lambda: torch.ops.tt.flash_attn(q, k, v, causal=True), 90)
        with interpreted.recorded(90) as launches:
            causal_v5(q, k, v)
        columns = zip(anatomy(launches[0]), anatomy(hopper), strict=True)
    what = (
        "warps of a program",
        "registers a thread",
        "spills",
        "shared memory",
        "`wgmma` instructions",
        "TMA copies",
        "copies by threads (`cp.async`)",
        "waits at memory barriers",
    )
    lines = ["| causal, D = 128, on sm_90 | rung 8 | the Hopper kernel |", "|---|---|---|"]
    lesson.say("\n".join([*lines, *(f"| {w} | {a} | {b} |" for w, (a, b) in zip(what, columns, strict=True))]))
tensor_cores = {
    name: lesson.figure("causal attention", name, "fraction") * 100
    for name in ("grouped heads", "torch, cuDNN", "torch.ops.tt.flash_attn")
}
lesson.say(
    """
    The Hopper kernel's 12 warps start with 168 registers each, 12 * 32 * 168 = 64512 of the SM's 65536. Then the producer's
    group keeps 24 and the consumers get 240: 4 * 32 * 24 + 8 * 32 * 240 = 64512 again. (Registers are handed out to groups of
    four warps, so the producer's single warp costs four.) And one program fills the SM: what occupancy did in lesson 5,
    having somebody else to run while one waits, is done here by hand.
    """
)
if tensor_cores["grouped heads"]:
    lesson.say(
        f"""
        What it is worth, as a part of the rate that cuBLAS reached in the same run: our kernel
        {tensor_cores["grouped heads"]:.0f} %, cuDNN {tensor_cores["torch, cuDNN"]:.0f} %, the shipped op
        {tensor_cores["torch.ops.tt.flash_attn"]:.0f} %.
        """
    )

# %% [markdown]
# The price is in the file: some 500 lines of kernel for one generation of GPUs, beside 60 that run on all of them. The
# shipped op has both. The Triton kernel takes windows, soft caps, biases, sinks, fp32 and every other GPU;
# `TORCH_TRITON_OPS_ATTENTION=triton` forces it.

# %% [markdown]
# ## What else is made of this
#
# * `flash_attn_varlen`: sequences of different lengths in one tensor, without padding. A program looks up where its
#   sequence begins and ends; the loop is the same.
# * `paged_decode_attn`: one new query a sequence, against thousands of keys in a cache. One query is one program, and a
#   GPU has 132 SMs; so the keys are shared out among many programs, and their (out, lse) are merged: `ex1`. The four
#   heads of a group become four rows of one block, so that a key is loaded once for all of them.
# * `kv_cache_write` puts the new keys and values into the pages of that cache, in place: the one kind of operator whose
#   schema says that it writes to its arguments.

# %% [markdown]
# ## Exercises
#
# * `ex1`: merge two halves of an attention, from their (out, lse).
# * `ex2`: a sliding window: where the loop begins, and what it hides.
# * `ex3`: the gradient of q, from lse and delta.
#
# ## Pitfalls
#
# * `-inf - (-inf)` is NaN. A row that sees nothing in its first block keeps m = -inf, with windows, padding masks, or
#   more queries than keys. Subtract 0 in place of such an m, and divide by 1 in place of l = 0.
# * Test with several blocks, a ragged end, and more than one head: the mistakes of an online algorithm show from the
#   second block on.
# * Causal with Sq != Skv has two meanings: aligned to the top left (PyTorch's `is_causal`) or to the bottom right (the
#   shipped op, and what a decoder wants, whose one new query sees all keys). With equal lengths they agree, and so do
#   the tests.
# * lse in natural units or in units of log 2: say which, wherever it is stored.
# * delta needs `out` as it was *stored*. With the rounding of bf16 it is a little off; that is what everybody does, and
#   in fp32 the shipped op computes it anew.
# * A product of bf16 is rounded once, P in bf16 once more. Compare with fp64, at twice the error of plain torch; not
#   with another implementation to the last bit.
# * Mind what you count: causal halves the flops. A rate that counts all pairs looks twice as good. Next: lesson 8, the
#   rest of a transformer.

# %%
lesson.finish()
