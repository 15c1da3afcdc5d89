# ---
# lesson:
#   number: 8
#   slug: transformer_kernels
#   title: "Transformer kernels: everything in a Llama block that is no matrix product"
#   level: advanced
#   minutes: 90
#   prerequisites: [3, 5, 6]
#   ops: [rms_norm, add_rms_norm, rope, swiglu, cross_entropy, linear_cross_entropy]
#   concepts: [RMSNorm, residual stream, partial sums, determinism, RoPE, SwiGLU, cross entropy, chunked head, training step]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 8. Transformer kernels
#
# A Llama block is seven matrix products, an attention, and small things between them: two norms, two residual additions, a
# rotation of queries and keys, a gated activation; and behind the last block the loss. At the end of this lesson you have
# written each of the small things, forward and backward, know the bytes that each must move and the memory that each
# must keep, and have put them together to a block that trains, compiles into one graph, and is timed beside plain
# torch.

# %%
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torch_triton_ops import nn as tt_nn
from triton_tutorial import interpreted
from triton_tutorial.lesson import Lesson

lesson = Lesson(8)
bf16 = torch.bfloat16
EPS = tl.constexpr(1e-6)
IGNORE = tl.constexpr(-100)

# %%
lesson.predict(
    """
    A training step, forward and backward, of one block of Llama-3-8B on 4096 tokens: 5.4 TFLOP of matrix products, and
    beside them norms, residuals, rotation and gate, which together are less than a thousandth of that arithmetic. Eager
    PyTorch runs these small things as kernels of their own. Which share of the step can good kernels for them save?
    """
)

# %% [markdown]
# ## The references, and what they must move
#
# Bytes for each element of the activation, in bf16, forward only: eager PyTorch as models write it, and one kernel that
# reads its inputs once and writes its results once.
#
# | component | as models write it | eager | fused |
# |---|---|---|---|
# | RMSNorm | `w * (x32 * rsqrt(mean(x32^2) + eps)).bf16()` | to fp32 6, square 8, mean 4, scale 8, to bf16 6, weight 4: 36 | 4 |
# | residual + RMSNorm | `h = x + r`, then the norm | 6 + 36 | 8 |
# | RoPE | `x * cos + rotate_half(x) * sin` | 4 + 2 + 4 + 4 + 6: 20 | 4 |
# | SwiGLU | `silu(gate) * up` | 4 + 6: 10 | 6 |
# | cross entropy, with its gradient | `log_softmax`, `nll_loss`, and backward | 4, and 2 + 6: 12 | 4 to 6 |
#
# The fp32 detour of a norm is there for accuracy: the squares of 4096 numbers must not be added in bf16. In a kernel the
# detour happens in registers and is free. (Recent versions of torch have a kernel of their
# own for it, `F.rms_norm`; it is timed below.)
#
# A pattern for all of this lesson: **load, upcast, compute in fp32, round once at the store.**


# %%
def wide(x: torch.Tensor) -> torch.Tensor:
    """fp32, or fp64 for the exact reference."""
    return x if x.dtype == torch.float64 else x.float()


def norm_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x32 = wide(x)
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


FULL, SMALL = (8192, 4096), (1024, 4096)
LONG, SMALL_LONG = (1024, 65536), (128, 65536)

norm = lesson.problem(
    "rms_norm",
    reference=norm_reference,
    make=lambda m, n: (lesson.randn(m, n, dtype=bf16), lesson.randn(n, dtype=bf16)),
    check=[(5, 33), (1, 1), (2, 4100)],
    timed=[lesson.size(SMALL_LONG, LONG), lesson.size(SMALL, FULL)],
    bytes=lambda x, weight: 2 * x.numel() * x.element_size() + weight.numel() * weight.element_size(),
    flops=lambda x, weight: 4 * x.numel(),
)
norm.baseline("torch, written out")
norm.baseline("F.rms_norm", lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6))
norm.baseline("torch.ops.tt.rms_norm", torch.ops.tt.rms_norm)

# %% [markdown]
# ## RMSNorm, rung 1: a row in registers
#
# `y = x / sqrt(mean(x^2) + eps) * weight`. One program takes one row, in one block: the row is read once, its mean square
# is one reduction, and what is stored comes from the same registers. Masked lanes hold 0, which adds nothing to a sum of
# squares; the division is by `N`, not by the block.


# %%
@triton.jit
def norm_kernel_v1(x_ptr, weight_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / N + EPS)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + offs_n, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask_n)


def norm_v1(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    norm_kernel_v1[(M,)](x, weight, y, N, BLOCK_N=BLOCK_N, num_warps=max(1, min(32, BLOCK_N // 1024)))
    return y


norm.rung("a row in registers", norm_v1, norm_kernel_v1)

# %% [markdown]
# ## Rung 2: rows longer than a block
#
# A row of 65536 is 64 elements for each of 1024 threads, and all of them wait for one reduction; a row of 2^17 does not
# fit at all. The alternative is a loop: one pass adds up squares, block by block, lane by lane, with a single reduction
# after the loop; a second pass reads the row again and scales it. The second read finds the row in L2 if the rows under
# way fit there together. It is a trade: any length and few registers, for a second trip to the cache.


# %%
@triton.jit
def norm_kernel_v2(x_ptr, weight_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + EPS)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + offs_n, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=offs_n < N)


def norm_v2(x: torch.Tensor, weight: torch.Tensor, BLOCK_N: int = 4096, num_warps: int = 4) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    norm_kernel_v2[(M,)](x, weight, y, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return y


norm.rung("blocks of a row", norm_v2, norm_kernel_v2, note="any length; the second pass reads from L2")


def toy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm_v2(x, weight, BLOCK_N=8)


norm.picture(toy, 4, 20, title="RMSNorm of 4 rows of 20, in blocks of 8: every row is read twice, by its own program")
norm.ladder("RMSNorm", sizes="panels")

# %%
lesson.say(
    f"""
    Rows of 4096: {lesson.figure("rms_norm", "a row in registers", "us"):.0f} us in registers,
    {lesson.figure("rms_norm", "blocks of a row", "us"):.0f} us in blocks. Rows of 65536:
    {lesson.figure("rms_norm", "a row in registers", "us", "1024x65536"):.0f} us and
    {lesson.figure("rms_norm", "blocks of a row", "us", "1024x65536"):.0f} us. Written out in eager torch, the short rows take
    {lesson.figure("rms_norm", "torch, written out", "us"):.0f} us.
    """
)

# %% [markdown]
# ## The gradient of RMSNorm, and of its weight
#
# With `xhat = x * rstd` and `g = dy * weight`
#
# `dx = rstd * (g - xhat * mean(g * xhat))`, and `dweight = sum over all rows of dy * xhat`.
#
# `dx` is row by row, like the forward: read dy and x, write dx, three passes. `rstd` could be saved by the forward,
# four bytes a row; as the whole row is in registers anyway, here it is computed again, for nothing but one more
# reduction.
#
# `dweight` is another matter: a sum over *rows*, across all programs. The first way that comes to mind is an atomic
# addition for each element.


# %%
def norm_bwd_reference(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x32, g = wide(x), wide(dy) * wide(weight)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
    xhat = x32 * rstd
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx.to(x.dtype), (wide(dy) * xhat).sum(0).to(weight.dtype)


norm_bwd = lesson.problem(
    "rms_norm, backward",
    reference=norm_bwd_reference,
    make=lambda m, n: (*(lesson.randn(m, n, dtype=bf16) for _ in range(2)), lesson.randn(n, dtype=bf16)),
    check=[(9, 33), (1, 1), (6, 130)],
    timed=[lesson.size(SMALL, FULL)],
    bytes=lambda dy, x, weight: 3 * x.numel() * x.element_size(),
    flops=lambda dy, x, weight: 8 * x.numel(),
)
norm_bwd.baseline("torch, written out")


@triton.jit
def row_gradient(x, dy, weight, N):
    """dx of one row in registers, and its share of dweight."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / N + EPS)
    xhat = x * rstd
    g = dy * weight
    return rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / N)), dy * xhat


@triton.jit
def norm_bwd_kernel_v1(dy_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, M, N, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        offs = tl.cast(row, tl.int64) * N + offs_n
        x = tl.load(x_ptr + offs, mask=mask_n, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask_n, other=0.0).to(tl.float32)
        dx, share = row_gradient(x, dy, weight, N)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)
        tl.atomic_add(dweight_ptr + offs_n, share, mask=mask_n)


def norm_bwd_v1(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = x.shape
    dx = torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    dweight = torch.zeros(N, dtype=torch.float32, device=x.device)
    num_warps = max(1, min(32, BLOCK_N // 512))
    norm_bwd_kernel_v1[(M,)](dy, x, weight, dx, dweight, M, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return dx, dweight.to(weight.dtype)


norm_bwd.rung("atomics", norm_bwd_v1, norm_bwd_kernel_v1)

# %% [markdown]
# Two things are wrong with it. Every row sends 4096 additions to the same 4096 addresses, which L2 performs one after the
# other: 8192 x 4096 of them, twice the bytes of `dx` besides. And fp32 addition is not associative: the last bits of the
# sum depend on the order in which programs happen to come by, so two runs of the same step differ.
#
# ## Partial sums: no atomics, the same bits every time
#
# Start as many programs as the GPU runs at once, and let program `p` of `P` take the rows `p, p + P, p + 2P, ...`. Each
# adds up its rows' shares *in registers*, where the row's block lives anyway, and writes one row of a `(P, N)` matrix
# at the end. A second, small kernel adds its columns.
#
# Why is that deterministic? Program `p` adds its rows in the order of a loop; the second kernel adds `P` numbers in an
# order that its code fixes; nothing depends on who finishes first. (It does depend on `P`: on a GPU with another number
# of SMs the last bits differ. That is reproducible, though not portable.)
#
# What it costs: `8 * P * N` bytes, written and read in fp32. With two programs for each of 132 SMs and N = 4096 it is
# 8.7 MB beside the 201 MB of the three passes, and most of it never leaves L2. It needs registers, too: one more block
# of fp32 lives through the loop.

# %%
PROGRAMS = 264 if lesson.gpu else 4  # two for each SM of an H200; in the interpreter few, so that each has several rows


@triton.jit
def norm_bwd_kernel_v2(dy_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, M, N, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        offs = tl.cast(row, tl.int64) * N + offs_n
        x = tl.load(x_ptr + offs, mask=mask_n, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask_n, other=0.0).to(tl.float32)
        dx, share = row_gradient(x, dy, weight, N)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)
        dweight += share
    tl.store(partial_ptr + tl.program_id(0) * N + offs_n, dweight, mask=mask_n)


def norm_bwd_v2(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, programs: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = x.shape
    dx = torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    P = min(M, programs or PROGRAMS)
    partial = torch.empty(P, N, dtype=torch.float32, device=x.device)
    num_warps = max(1, min(32, BLOCK_N // 512))
    norm_bwd_kernel_v2[(P,)](dy, x, weight, dx, partial, M, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return dx, partial.sum(0).to(weight.dtype)


norm_bwd.rung("partial sums", norm_bwd_v2, norm_bwd_kernel_v2, note="one row of sums a program, in a fixed order")


def four_programs(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return norm_bwd_v2(dy, x, weight, programs=4)


norm_bwd.picture(
    four_programs,
    8,
    12,
    title="8 rows, 4 programs: program p takes rows p and p + 4, writes row p of sums",
    name="partial_sums",
)
norm_bwd.ladder("RMSNorm, backward")
norm_bwd.autotune(
    norm_bwd_v2,
    [{"programs": programs} for programs in (132, 264, 396, 528, 1056)],
    title="How many programs? 132 is one for each SM of an H200",
)


# %%
def differing_bits() -> None:
    """How many elements of dweight, before it is rounded, differ between two runs on the same inputs."""
    dy, x, weight = norm_bwd.make(*lesson.size(SMALL, FULL))
    weight = weight.float()  # so that nothing is hidden by the rounding of the result
    for name, function in (("atomics", norm_bwd_v1), ("partial sums", norm_bwd_v2)):
        first, second = (function(dy, x, weight)[1] for _ in range(2))
        differ = int((first != second).sum())
        lesson.rows.append({"table": "two runs", "name": name, "case": "", "differ": differ})


if lesson.timing:
    differing_bits()
lesson.say(
    f"""
    Atomics {lesson.figure("rms_norm, backward", "atomics", "us"):.0f} us, partial sums
    {lesson.figure("rms_norm, backward", "partial sums", "us"):.0f} us. Two runs on the same inputs: of 4096 elements of
    `dweight` in fp32 {lesson.figure("two runs", "atomics", "differ"):.0f} differ with atomics,
    {lesson.figure("two runs", "partial sums", "differ"):.0f} with partial sums.
    """
)

# %% [markdown]
# ## Registering RMSNorm
#
# The backward is an operator as well, so that a compiler which traces the gradient meets one node, and no kernel that it
# would have to look into.


# %%
@torch.library.custom_op("tt_lesson::rms_norm_bwd", mutates_args=())
def rms_norm_bwd(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N = x.shape[-1]
    dx, dweight = norm_bwd_v2(dy.contiguous().view(-1, N), x.contiguous().view(-1, N), weight)
    return dx.view(x.shape), dweight


@rms_norm_bwd.register_fake
def rms_norm_bwd_fake(dy, x, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    return (norm_v1 if rows.shape[1] <= 16384 else norm_v2)(rows, weight).view(x.shape)


def rms_norm_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rms_norm_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def rms_norm_backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tt_lesson.rms_norm_bwd(dy, *ctx.saved_tensors)


rms_norm_op = norm.register(
    "rms_norm(Tensor x, Tensor weight) -> Tensor",
    rms_norm,
    fake=rms_norm_fake,
    backward=rms_norm_backward,
    setup_context=rms_norm_save,
    shipped="rms_norm",
    exact=False,
)

# %% [markdown]
# ## Residual and norm in one kernel
#
# Between two halves of a block stands `h = x + residual; y = norm(h)`, and *both* results are wanted: y goes into the
# next half, h goes past it. As two kernels: read x and the residual, write h; read h, write y: 10 bytes an element. In
# one kernel h is in registers when the norm wants it, and only the second read falls away: 8 bytes, a gain of 1.25 at
# best. For one Llama-3-8B block on 4096 tokens it is 4096 x 4096 x 2 = 34 MB.
#
# One line is there for agreement: h is rounded to bf16 *before* the norm. The backward will find the rounded h in memory
# and compute its `rstd` from that; the forward should have used the same.


# %%
def add_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    return norm_reference(h, weight), h


add_norm = lesson.problem(
    "add_rms_norm",
    reference=add_norm_reference,
    make=lambda m, n: (*(lesson.randn(m, n, dtype=bf16) for _ in range(2)), lesson.randn(n, dtype=bf16)),
    check=[(5, 33), (1, 1), (2, 260)],
    timed=[lesson.size(SMALL, FULL)],
    bytes=lambda x, residual, weight: 4 * x.numel() * x.element_size() + weight.numel() * weight.element_size(),
    flops=lambda x, residual, weight: 5 * x.numel(),
)
add_norm.baseline("torch, written out")
add_norm.baseline("torch.ops.tt.add_rms_norm", torch.ops.tt.add_rms_norm)


@triton.jit
def add_kernel_v1(x_ptr, residual_ptr, h_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * N + offs_n, x.to(h_ptr.dtype.element_ty), mask=mask_n)


def add_norm_v1(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = x.shape
    y, h = torch.empty_like(x), torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    num_warps = max(1, min(32, BLOCK_N // 1024))
    add_kernel_v1[(M,)](x, residual, h, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    norm_kernel_v1[(M,)](h, weight, y, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return y, h


add_norm.rung("two kernels", add_norm_v1, (add_kernel_v1, norm_kernel_v1))


@triton.jit
def add_norm_kernel_v2(x_ptr, residual_ptr, h_ptr, weight_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + row * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * N + offs_n, x.to(h_ptr.dtype.element_ty), mask=mask_n)
    x = x.to(h_ptr.dtype.element_ty).to(tl.float32)  # what the backward will see
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / N + EPS)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + offs_n, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask_n)


def add_norm_v2(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = x.shape
    y, h = torch.empty_like(x), torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    num_warps = max(1, min(32, BLOCK_N // 1024))
    add_norm_kernel_v2[(M,)](x, residual, h, weight, y, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return y, h


add_norm.rung("one kernel", add_norm_v2, add_norm_kernel_v2, note="h is written, and not read again")
add_norm.ladder("Residual + RMSNorm")
lesson.say(
    f"""
    Two kernels {lesson.figure("add_rms_norm", "two kernels", "us"):.0f} us, one
    {lesson.figure("add_rms_norm", "one kernel", "us"):.0f} us:
    {lesson.figure("add_rms_norm", "two kernels", "us") / lesson.figure("add_rms_norm", "one kernel", "us"):.2f} times as
    fast, where the bytes say 1.25.
    """
)

# %% [markdown]
# The gradient: h reaches the loss on two ways, so its gradient is the norm's plus the one that comes in for h itself;
# and the gradient of a sum is that of both its terms, one tensor for x and for the residual. Here torch adds the two;
# the shipped op's backward adds inside its kernel, 4 passes instead of 6.


# %%
def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N = x.shape[-1]
    y, h = add_norm_v2(x.contiguous().view(-1, N), residual.contiguous().view(-1, N), weight)
    return y.view(x.shape), h.view(x.shape)


def add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_fake(x, weight), rms_norm_fake(x, weight)


def add_rms_norm_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], inputs[2])


def add_rms_norm_backward(ctx, dy: torch.Tensor, dh: torch.Tensor):
    from_norm, dweight = torch.ops.tt_lesson.rms_norm_bwd(dy, *ctx.saved_tensors)
    dx = from_norm + dh
    return dx, dx, dweight


add_rms_norm_op = add_norm.register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight) -> (Tensor, Tensor)",
    add_rms_norm,
    fake=add_rms_norm_fake,
    backward=add_rms_norm_backward,
    setup_context=add_rms_norm_save,
    shipped="add_rms_norm",
    exact=False,
)

# %% [markdown]
# ## RoPE: a rotation, and its inverse
#
# Rotary embedding tells attention where a token stands: each pair `(x1, x2)` of a head's elements, `D / 2` apart, is
# turned by an angle that grows with the position. With `c, s` the angle's cosine and sine
#
# `out1 = x1 * c - x2 * s`, `out2 = x2 * c + x1 * s`.
#
# Every head of a position has the same angles. So a program takes one position with all its heads: the table's row is
# loaded once, and 32 heads are turned with it. Queries and keys are what projections leave, `(B, S, H, D)` in memory
# and `(B, H, S, D)` in shape; the kernel takes strides, so nobody has to copy. First a launch for each of q and k.


# %%
def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    c, s = (torch.cat((table, table), -1).to(q.dtype) for table in (cos, sin))

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        return torch.cat((-x2, x1), -1)

    return q * c + rotate_half(q) * s, k * c + rotate_half(k) * s


def rope_inputs(b: int, s: int, hq: int, hk: int, d: int) -> tuple[torch.Tensor, ...]:
    q, k = (lesson.randn(b, s, h, d, dtype=bf16).transpose(1, 2) for h in (hq, hk))
    angles = torch.arange(s, device=lesson.device)[:, None] * 10_000 ** (
        -torch.arange(d // 2, device=lesson.device) / (d // 2)
    )
    return q, k, angles.cos(), angles.sin()  # tables (S, D / 2), fp32


rope = lesson.problem(
    "rope",
    reference=rope_reference,
    make=rope_inputs,
    check=[(2, 5, 4, 2, 16), (1, 1, 1, 1, 2), (1, 3, 3, 1, 12)],
    timed={"4x4096, 32 and 8 heads of 128": lesson.size((1, 1024, 32, 8, 128), (4, 4096, 32, 8, 128))},
    bytes=lambda q, k, cos, sin: 2 * (q.numel() + k.numel()) * q.element_size() + 8 * cos.numel(),
    flops=lambda q, k, cos, sin: 3 * (q.numel() + k.numel()),
)
rope.baseline("torch, written out")
rope.baseline("torch.ops.tt.rope", torch.ops.tt.rope)


@triton.jit
def rotate(
    x_ptr,
    out_ptr,
    cos,
    sin,
    H,
    stride_xh,
    stride_outh,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All heads of one position, at which x_ptr and out_ptr point; cos and sin are (1, BLOCK_D)."""
    offs_h = tl.arange(0, BLOCK_H)[:, None]  # (BLOCK_H, 1)
    offs_d = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D), the pairs
    mask = (offs_h < H) & (offs_d < HALF)
    x1 = tl.load(x_ptr + offs_h * stride_xh + offs_d, mask=mask).to(tl.float32)
    x2 = tl.load(x_ptr + offs_h * stride_xh + HALF + offs_d, mask=mask).to(tl.float32)
    out1, out2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    tl.store(out_ptr + offs_h * stride_outh + offs_d, out1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offs_h * stride_outh + HALF + offs_d, out2.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel_v1(
    x_ptr, out_ptr, cos_ptr, sin_ptr, H,
    stride_xb, stride_xh, stride_xs, stride_outb, stride_outh, stride_outs,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_ptr + s * HALF + offs_d, mask=offs_d < HALF, other=0.0)
    sin = tl.load(sin_ptr + s * HALF + offs_d, mask=offs_d < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    x_ptr += b * stride_xb + s * stride_xs
    out_ptr += b * stride_outb + s * stride_outs
    rotate(x_ptr, out_ptr, cos, sin, H, stride_xh, stride_outh, HALF, BLOCK_H, BLOCK_D)


def rope_v1(q, k, cos, sin, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, S, D = q.shape
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    constants = {"INVERSE": inverse, "HALF": D // 2, "BLOCK_D": triton.next_power_of_2(D // 2)}
    for x, out in ((q, q_out), (k, k_out)):
        H = x.shape[1]
        strides = (*x.stride()[:3], *out.stride()[:3])
        rope_kernel_v1[(S, B)](x, out, cos, sin, H, *strides, BLOCK_H=triton.next_power_of_2(H), **constants)
    return q_out, k_out


rope.rung("a launch for q, one for k", rope_v1, rope_kernel_v1)

# %% [markdown]
# Llama-3 has 32 heads of queries and 8 of keys: the second launch is a quarter of the work, reads the tables again, and
# in the small batches of generation it is nothing but latency. One launch does both: the program that turned a
# position's queries turns its keys with the angles that it still holds.


# %%
@triton.jit
def rope_kernel_v2(
    q_ptr, q_out_ptr, k_ptr, k_out_ptr, cos_ptr, sin_ptr, HQ, HK,
    stride_qb, stride_qh, stride_qs, stride_q_outb, stride_q_outh, stride_q_outs,
    stride_kb, stride_kh, stride_ks, stride_k_outb, stride_k_outh, stride_k_outs,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr,
):  # fmt: skip
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_ptr + s * HALF + offs_d, mask=offs_d < HALF, other=0.0)
    sin = tl.load(sin_ptr + s * HALF + offs_d, mask=offs_d < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    q_ptr += b * stride_qb + s * stride_qs
    q_out_ptr += b * stride_q_outb + s * stride_q_outs
    rotate(q_ptr, q_out_ptr, cos, sin, HQ, stride_qh, stride_q_outh, HALF, BLOCK_HQ, BLOCK_D)
    k_ptr += b * stride_kb + s * stride_ks
    k_out_ptr += b * stride_k_outb + s * stride_k_outs
    rotate(k_ptr, k_out_ptr, cos, sin, HK, stride_kh, stride_k_outh, HALF, BLOCK_HK, BLOCK_D)


def rope_v2(q, k, cos, sin, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, S, D = q.shape
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    constants = {"INVERSE": inverse, "HALF": D // 2, "BLOCK_D": triton.next_power_of_2(D // 2)}
    HQ, HK = q.shape[1], k.shape[1]
    strides = (*q.stride()[:3], *q_out.stride()[:3], *k.stride()[:3], *k_out.stride()[:3])
    constants |= {"BLOCK_HQ": triton.next_power_of_2(HQ), "BLOCK_HK": triton.next_power_of_2(HK)}
    rope_kernel_v2[(S, B)](q, q_out, k, k_out, cos, sin, HQ, HK, *strides, **constants)
    return q_out, k_out


rope.rung("one launch", rope_v2, rope_kernel_v2, note="the angles stay in registers from q to k")
rope.ladder("RoPE of queries and keys")
lesson.say(
    f"""
    Written out in eager torch {lesson.figure("rope", "torch, written out", "us"):.0f} us; two launches
    {lesson.figure("rope", "a launch for q, one for k", "us"):.0f} us; one
    {lesson.figure("rope", "one launch", "us"):.0f} us, at {100 * lesson.figure("rope", "one launch", "fraction"):.0f} % of
    the limit.
    """
)

# %% [markdown]
# **The gradient of a rotation is the rotation back.** A linear map's gradient is its transpose, and the transpose of a
# rotation matrix `[[c, -s], [s, c]]` is `[[c, s], [-s, c]]`: the same with `-s`. So the backward is the forward's
# kernel with one sign, and it saves *nothing* of q and k: only the tables, which all layers share.
#
# The tables get no gradient. `torch.library` is told so by a `None`, and this time `register` checks the forward and we
# add the gradient by hand.


# %%
def rope_launch(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool):
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return rope_v2(q, k, cos.contiguous(), sin.contiguous(), inverse)


def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    return rope_launch(q, k, cos, sin, inverse=False)


def rope_fake(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    return tuple(torch.empty_like(x if x.stride(-1) == 1 else x.contiguous()) for x in (q, k))


rope_op = rope.register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    rotated,
    fake=rope_fake,
    shipped="rope",
    exact=False,
)


@torch.library.custom_op("tt_lesson::rope_bwd", mutates_args=())
def rope_bwd(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_launch(dq, dk, cos, sin, inverse=True)


rope_bwd.register_fake(rope_fake)


def rope_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def rope_backward(ctx, dq: torch.Tensor, dk: torch.Tensor):
    return *torch.ops.tt_lesson.rope_bwd(dq, dk, *ctx.saved_tensors), None, None


rope_op.register_autograd(rope_backward, setup_context=rope_save)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2.0**-6) -> bool:
    """Within a few roundings of bf16 of the largest element."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return bool((ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max())))


q, k, cos, sin = rope.make(2, 5, 4, 2, 16)
q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
torch.library.opcheck(rope_op, (q, k, cos, sin))
dq, dk = torch.randn_like(q), torch.randn_like(k)
mine = torch.autograd.grad(rope_op(q, k, cos, sin), (q, k), (dq, dk))
torchs = torch.autograd.grad(rope_reference(q, k, cos, sin), (q, k), (dq, dk))
there_and_back = torch.ops.tt_lesson.rope_bwd(*rope_op(q.detach(), k.detach(), cos, sin), cos, sin)
assert all(close(a, b) for a, b in zip(mine, torchs, strict=True)), "the gradient of rope differs from torch's"
assert all(close(a, b) for a, b in zip(there_and_back, (q, k), strict=True)), "rope_bwd does not undo rope"
lesson.say("Checked: opcheck with the gradient, the gradient against torch's, and that `rope_bwd` undoes `rope`.")

# %% [markdown]
# ## SwiGLU: what not to save
#
# `out = silu(gate) * up`, with `silu(g) = g * sigmoid(g)`: three passes in one kernel, five in two. The larger gain is
# memory. Eager autograd keeps the inputs of *each* operation until the backward: gate for `silu`, and `silu(gate)` and
# up for the product. In Llama-3-8B that is 3 x 14336 numbers a token and layer: 352 MB for 4096 tokens. The sigmoid is
# a handful of instructions, so we keep gate and up alone, two thirds of it, and compute the sigmoid **again**:
#
# `dgate = dout * up * s * (1 + gate * (1 - s))`, `dup = dout * gate * s`.
#
# Recomputing costs nothing in time either: the backward moves five passes, and arithmetic is free up to a point (lesson 6).


# %%
def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


swiglu = lesson.problem(
    "swiglu",
    reference=swiglu_reference,
    make=lambda *shape: tuple(lesson.randn(*shape, dtype=bf16) for _ in range(2)),
    check=[(3, 129), (1,), (2, 3, 700)],
    timed=[lesson.size((1024, 14336), (8192, 14336))],
    bytes=lambda gate, up: 3 * gate.numel() * gate.element_size(),
    flops=lambda gate, up: 5 * gate.numel(),
)
swiglu.baseline("torch, eager")


@triton.jit
def swiglu_kernel_v1(gate_ptr, up_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    gate = tl.load(gate_ptr + offs_n, mask=mask_n).to(tl.float32)
    up = tl.load(up_ptr + offs_n, mask=mask_n).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def swiglu_bwd_kernel(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    dout = tl.load(dout_ptr + offs_n, mask=mask_n).to(tl.float32)
    gate = tl.load(gate_ptr + offs_n, mask=mask_n).to(tl.float32)
    up = tl.load(up_ptr + offs_n, mask=mask_n).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dout * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + offs_n, dgate.to(dgate_ptr.dtype.element_ty), mask=mask_n)
    tl.store(dup_ptr + offs_n, (dout * gate * s).to(dup_ptr.dtype.element_ty), mask=mask_n)


def swiglu_v1(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    N = out.numel()
    swiglu_kernel_v1[(triton.cdiv(N, 1024),)](gate, up, out, N, BLOCK_N=1024)
    return out


swiglu.rung("one kernel", swiglu_v1, swiglu_kernel_v1)
swiglu.ladder("SwiGLU")
lesson.say(
    f"""
    Eager {lesson.figure("swiglu", "torch, eager", "us"):.0f} us, one kernel
    {lesson.figure("swiglu", "one kernel", "us"):.0f} us; the bytes say 10 / 6 = 1.67 times, measured are
    {lesson.figure("swiglu", "torch, eager", "us") / lesson.figure("swiglu", "one kernel", "us"):.2f}.
    """
)


@torch.library.custom_op("tt_lesson::swiglu_bwd", mutates_args=())
def swiglu_bwd(dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    N = gate.numel()
    swiglu_bwd_kernel[(triton.cdiv(N, 1024),)](dout, gate, up, dgate, dup, N, BLOCK_N=1024)
    return dgate, dup


@swiglu_bwd.register_fake
def swiglu_bwd_fake(dout, gate, up):
    return swiglu_fake(gate, up), swiglu_fake(gate, up)


def swiglu_fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def swiglu_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def swiglu_backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tt_lesson.swiglu_bwd(dout, *ctx.saved_tensors)


swiglu_op = swiglu.register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    swiglu_v1,
    fake=swiglu_fake,
    backward=swiglu_backward,
    setup_context=swiglu_save,
    shipped="swiglu",
)

# %% [markdown]
# ## Cross entropy: a row of 128256
#
# `loss = log(sum(exp(z))) - z[target]` for each row of logits, the mean over the rows that count: a target of -100 says
# that its row does not. Llama-3's rows are 128256 long, 256 KB in bf16: far too long for registers. First in two
# passes, as the formula is written with the maximum subtracted: one for the maximum, one for the sum.


# %%
def counted(target: torch.Tensor) -> torch.Tensor:
    """How many rows count: a number on the GPU. Nobody waits for it."""
    return (target != -100).sum()


def ce_inputs(m: int, v: int) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.randint(0, v, (m,), device=lesson.device)
    if (
        m < 1000
    ):  # some that do not count, for the checks; what is timed counts, all of it, so that everybody does the same work
        target[1::5] = -100
    return 3 * lesson.randn(m, v, dtype=bf16), target


def ce_reference(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target)


VOCABULARY = lesson.size((1024, 128256), (8192, 128256))
ce = lesson.problem(
    "cross_entropy",
    reference=ce_reference,
    make=ce_inputs,
    check=[(7, 33), (2, 1), (3, 9000)],
    timed=[VOCABULARY],
    bytes=lambda logits, target: logits.numel() * logits.element_size(),
    flops=lambda logits, target: 4 * logits.numel(),
)
ce.baseline("torch, eager")
ce.baseline("torch.ops.tt.cross_entropy", torch.ops.tt.cross_entropy)


@triton.jit
def logits_block(logits_ptr, offs_v, V):
    """A block of a row in fp32; -inf behind its end, which no maximum takes and whose exponential is 0."""
    return tl.load(logits_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def ce_kernel_v1(logits_ptr, target_ptr, loss_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    z_target = tl.load(logits_ptr + target, mask=target != IGNORE, other=0.0).to(tl.float32)
    offs_v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    m = tl.full((BLOCK_V,), -1e30, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        m = tl.maximum(m, logits_block(logits_ptr, start + offs_v, V))
    row_max = tl.max(m, axis=0)
    for start in range(0, V, BLOCK_V):
        s += tl.exp(logits_block(logits_ptr, start + offs_v, V) - row_max)
    log_sum = tl.log(tl.sum(s, axis=0))
    tl.store(loss_ptr + row, tl.where(target != IGNORE, row_max - z_target + log_sum, 0.0))


def ce_v1(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    ce_kernel_v1[(M,)](logits, target, losses, V, BLOCK_V=4096, num_warps=8)
    return (losses.sum() / counted(target)).to(logits.dtype)


ce.rung("two passes", ce_v1, ce_kernel_v1)

# %% [markdown]
# Lesson 5's online softmax does with one: each lane keeps a running maximum `m` and the sum `s` of `exp(z - m)`; when
# the maximum rises, the sum is scaled by `exp(old - new)`. The lanes are put together once, behind the loop. (The
# maximum begins at -1e30, not at -inf: a lane that has seen nothing would compute -inf - -inf.)


# %%
@triton.jit
def ce_kernel_v2(logits_ptr, target_ptr, loss_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    z_target = tl.load(logits_ptr + target, mask=target != IGNORE, other=0.0).to(tl.float32)
    offs_v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    m = tl.full((BLOCK_V,), -1e30, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        z = logits_block(logits_ptr, start + offs_v, V)
        m_new = tl.maximum(m, z)
        s = s * tl.exp(m - m_new) + tl.exp(z - m_new)
        m = m_new
    row_max = tl.max(m, axis=0)
    log_sum = tl.log(tl.sum(s * tl.exp(m - row_max), axis=0))
    tl.store(loss_ptr + row, tl.where(target != IGNORE, row_max - z_target + log_sum, 0.0))


def ce_v2(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    ce_kernel_v2[(M,)](logits, target, losses, V, BLOCK_V=4096, num_warps=8)
    return (losses.sum() / counted(target)).to(logits.dtype)


ce.rung("one pass", ce_v2, ce_kernel_v2, note="maximum and sum together")
ce.ladder("Cross entropy of rows of 128256")
lesson.say(
    f"""
    Two passes {lesson.figure("cross_entropy", "two passes", "us"):.0f} us, one
    {lesson.figure("cross_entropy", "one pass", "us"):.0f} us, eager
    {lesson.figure("cross_entropy", "torch, eager", "us"):.0f} us. (One pass has two exponentials an element instead of one.
    The shipped kernel, {lesson.figure("cross_entropy", "torch.ops.tt.cross_entropy", "us"):.0f} us, gives a lane four logits at
    a time, and scales its sum once for the four.)
    """
)

# %% [markdown]
# ## The gradient, written in the forward
#
# `dlogits = (softmax(z) - onehot(target)) / count`: the same size as the logits, 2.1 GB for 8192 rows, and nothing in
# it depends on the backward, save one factor, the loss's own upstream gradient, a single number and nearly always one.
# So it can be written in the forward, when the row has just passed through the cache.
#
# Below, a training step of the loss: first as a forward and a backward kernel, which read the logits from memory twice
# and write once; then as one kernel, whose second read *may* come from L2. May: an H200 has 50 MB of it, and a row of
# 256 KB on each of 132 SMs is 34 MB. With four programs on an SM it is 135 MB, and the row is gone when it is wanted
# again. The autotuning table below is about that.
#
# What it costs: a forward without gradient (evaluation) must not do it; the upstream factor still has to be multiplied
# in, another read and write unless somebody knows that it is 1, and asking for that means waiting for the GPU; with
# `reduction="none"` there is a factor for each row, and it is never known; and in float16 `p / count` is rounded to
# nothing before a loss scale could save it. The shipped `tt.cross_entropy` therefore saves 8 bytes a row, its maximum
# and log-sum, and computes the gradient in the backward; the shipped `tt.linear_cross_entropy`, where it pays most,
# does it in the forward.


# %%
def ce_step_reference(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = torch.softmax(logits, -1)
    p[torch.arange(len(target), device=target.device), target.clamp(min=0)] -= 1
    active = target != -100
    return F.cross_entropy(logits, target), p * (active / active.sum()).to(p.dtype)[:, None]


def ce_step_torch(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, target)
    return loss.detach(), *torch.autograd.grad(loss, logits)


def ce_step_shipped(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = torch.ops.tt.cross_entropy(logits, target)
    return loss.detach(), *torch.autograd.grad(loss, logits)


ce_step = lesson.problem(
    "cross_entropy, step",
    reference=ce_step_reference,
    make=ce_inputs,
    check=[(7, 33), (2, 1), (3, 9000)],
    timed=[VOCABULARY],
    bytes=lambda logits, target: 2 * logits.numel() * logits.element_size(),
    flops=lambda logits, target: 9 * logits.numel(),
)
ce_step.baseline("torch, eager", ce_step_torch)
ce_step.baseline("torch.ops.tt.cross_entropy", ce_step_shipped)


@triton.jit
def row_statistics(logits_ptr, V, BLOCK_V: tl.constexpr):
    """Maximum of a row, and log of its sum of exponentials less that: the loop of the kernel above."""
    offs_v = tl.arange(0, BLOCK_V)
    m = tl.full((BLOCK_V,), -1e30, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        z = logits_block(logits_ptr, start + offs_v, V)
        m_new = tl.maximum(m, z)
        s = s * tl.exp(m - m_new) + tl.exp(z - m_new)
        m = m_new
    row_max = tl.max(m, axis=0)
    return row_max, tl.log(tl.sum(s * tl.exp(m - row_max), axis=0))


@triton.jit
def ce_fwd_kernel_v1(logits_ptr, target_ptr, loss_ptr, lse_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    z_target = tl.load(logits_ptr + target, mask=target != IGNORE, other=0.0).to(tl.float32)
    row_max, log_sum = row_statistics(logits_ptr, V, BLOCK_V)
    tl.store(loss_ptr + row, tl.where(target != IGNORE, row_max - z_target + log_sum, 0.0))
    tl.store(lse_ptr + row, row_max + log_sum)


@triton.jit
def ce_bwd_kernel_v1(logits_ptr, target_ptr, lse_ptr, count_ptr, dlogits_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    scale = tl.where(target != IGNORE, 1.0 / tl.load(count_ptr), 0.0)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    p = tl.exp(logits_block(logits_ptr + row * V, offs_v, V) - tl.load(lse_ptr + row))
    d = tl.where(offs_v == target, p - 1.0, p) * scale
    tl.store(dlogits_ptr + row * V + offs_v, d.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)


def ce_step_v1(logits, target, BLOCK_V: int = 4096, num_warps: int = 8):
    M, V = logits.shape
    losses, lse = (torch.empty(M, dtype=torch.float32, device=logits.device) for _ in range(2))
    count, dlogits = counted(target), torch.empty_like(logits)
    constants = {"BLOCK_V": BLOCK_V, "num_warps": num_warps}
    ce_fwd_kernel_v1[(M,)](logits, target, losses, lse, V, **constants)
    ce_bwd_kernel_v1[(M, triton.cdiv(V, BLOCK_V))](logits, target, lse, count, dlogits, V, **constants)
    return (losses.sum() / count).to(logits.dtype), dlogits


ce_step.rung("forward and backward", ce_step_v1, (ce_fwd_kernel_v1, ce_bwd_kernel_v1))


@triton.jit
def ce_step_kernel_v2(logits_ptr, target_ptr, loss_ptr, count_ptr, dlogits_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    z_target = tl.load(logits_ptr + target, mask=target != IGNORE, other=0.0).to(tl.float32)
    row_max, log_sum = row_statistics(logits_ptr, V, BLOCK_V)
    tl.store(loss_ptr + row, tl.where(target != IGNORE, row_max - z_target + log_sum, 0.0))
    scale = tl.where(target != IGNORE, 1.0 / tl.load(count_ptr), 0.0)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        p = tl.exp(logits_block(logits_ptr, offs_v, V) - row_max - log_sum)
        d = tl.where(offs_v == target, p - 1.0, p) * scale
        tl.store(dlogits_ptr + row * V + offs_v, d.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)


def ce_step_v2(logits, target, BLOCK_V: int = 4096, num_warps: int = 8):
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    count, dlogits = counted(target), torch.empty_like(logits)
    constants = {"BLOCK_V": BLOCK_V, "num_warps": num_warps}
    ce_step_kernel_v2[(M,)](logits, target, losses, count, dlogits, V, **constants)
    return (losses.sum() / count).to(logits.dtype), dlogits


ce_step.rung("gradient in the forward", ce_step_v2, ce_step_kernel_v2, note="the second read comes from L2, if it can")
ce_step.ladder("Cross entropy, loss and gradient")
lesson.say(
    f"""
    Eager {lesson.figure("cross_entropy, step", "torch, eager", "us"):.0f} us; forward and backward
    {lesson.figure("cross_entropy, step", "forward and backward", "us"):.0f} us; the gradient in the forward
    {lesson.figure("cross_entropy, step", "gradient in the forward", "us"):.0f} us. Three passes would become two, a gain of
    1.5, if every second read came from L2.
    """
)

# %% [markdown]
# ## Autotuning
#
# More warps for a row mean fewer rows under way at once, so that more of them are still in L2 for the second read;
# fewer warps mean cheaper reductions and more independent work. Which of the two matters?

# %%
configs = [
    {"BLOCK_V": block, "num_warps": warps}
    for block, warps in ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32))
]
ce_step.autotune(ce_step_v2, configs)
names = [f"BLOCK_V={c['BLOCK_V']}, num_warps={c['num_warps']}" for c in configs]
times = [lesson.figure("cross_entropy, step, autotuning", name, "us").value for name in names]
if None not in times:
    lesson.say(f"The best and the worst of these are {100 * (max(times) / min(times) - 1):.0f} % apart.")

# %% [markdown]
# ## Registering a loss that has its gradient already
#
# The operator returns both, loss and gradient. `setup_context` saves the second output and says that nobody may
# differentiate it; the backward is one multiplication by the upstream number.


# %%
def saves_its_gradients(ctx, inputs, output) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)


def scaled_gradients(ctx, dloss: torch.Tensor, *unused: torch.Tensor | None):
    return *((dloss * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors), None  # none for the target


ce_op = ce_step.register(
    "cross_entropy(Tensor logits, Tensor target) -> (Tensor, Tensor)",
    ce_step_v2,
    fake=lambda logits, target: (logits.new_empty(()), torch.empty_like(logits)),
)
ce_op.register_autograd(scaled_gradients, setup_context=saves_its_gradients)


def same_as_shipped(op: Callable[..., Any], shipped: str, inputs: tuple[Any, ...], tolerance: float) -> None:
    """Asserts that the loss equals that of the shipped op's kernel, and the gradients those of the shipped op."""
    *leaves, target = inputs
    leaves = [a.detach().requires_grad_() for a in leaves]
    torch.library.opcheck(op, (*leaves, target))
    ours, theirs = op(*leaves, target)[0], getattr(torch.ops.tt, shipped)(*leaves, target)
    kernel = theirs if lesson.gpu else interpreted.call_op(shipped, *inputs)
    assert close(ours, kernel, tolerance), f"the loss differs from {shipped}'s: {ours} and {kernel}"
    mine, shippeds = (torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5)) for loss in (ours, theirs))
    for a, b in zip(mine, shippeds, strict=True):
        assert close(a, b, tolerance), f"a gradient differs from {shipped}'s"


same_as_shipped(ce_op, "cross_entropy", ce_inputs(7, 33), 2.0**-6)
lesson.say("Checked: opcheck with the gradient; loss and gradient equal those of `torch.ops.tt.cross_entropy`.")

# %% [markdown]
# ## The logits need never be whole
#
# The logits are `hidden @ weight.t()`: 8192 tokens by 128256 words, 2.1 GB in bf16, the largest tensor of the whole
# model; and eager torch holds several of that size: the logits, the log-softmax, its gradient, and copies in fp32 if
# the model asks for them. Yet all that training wants of them is one number and two gradients,
#
# `dhidden = dlogits @ weight` and `dweight = dlogits.t() @ hidden`.
#
# So there are three products of `2 M V H` flops, and between the first and the others a row-wise kernel that turns
# logits into their gradient: `ce_step_kernel_v2`, **in place**, since `dlogits_ptr` may be `logits_ptr`. Rows do not
# depend on each other, so take a chunk of them at a time: logits, loss and gradient, `dhidden` of these rows, a
# contribution to `dweight`, and the chunk's memory is free for the next.
#
# | 8192 tokens, H = 4096, V = 128256, bf16 | bytes |
# |---|---|
# | logits, all rows | 2.10 GB |
# | logits, log-softmax and the gradients of both, as eager makes them | up to 8.4 GB |
# | one chunk of 2048 rows, logits becoming their gradient | 0.53 GB |
# | the gradients that are wanted: dhidden, dweight | 0.07 + 1.05 GB |
#
# Why not compute them tile by tile and store nothing at all? Because the gradient of a logit needs the log-sum-exp of
# its whole row. Without storing, the first product has to be done twice, four products instead of three: a third more
# time at this size, to save half a gigabyte. And why not tiny chunks? Each reads and writes the whole `dweight`, 2.1
# GB, once more, and rounds it to bf16 once more.


# %%
def lce_reference(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, dlogits = ce_step_reference(hidden @ weight.t(), target)
    return loss.float(), dlogits @ weight, dlogits.t() @ hidden


def lce_inputs(m: int, h: int, v: int, dtype: torch.dtype = bf16) -> tuple[torch.Tensor, ...]:
    _, target = ce_inputs(m, v)
    return lesson.randn(m, h, dtype=dtype), lesson.randn(v, h, dtype=dtype) * h**-0.5, target


def lce_torch(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.t(), target)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def lce_shipped(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = torch.ops.tt.linear_cross_entropy(hidden, weight, target)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


HEAD = lesson.size((1024, 1024, 32000), (8192, 4096, 128256))
lce = lesson.problem(
    "linear_cross_entropy",
    reference=lce_reference,
    make=lce_inputs,
    check=[(7, 16, 33, torch.float32), (2, 8, 1, torch.float32)],
    timed={"x".join(map(str, HEAD)): HEAD},
    bytes=lambda hidden, weight, target: 4 * (hidden.numel() + weight.numel()),
    flops=lambda hidden, weight, target: 6 * hidden.numel() * weight.shape[0],
)
lce.baseline("torch, eager", lce_torch)
lce.baseline("torch.ops.tt.linear_cross_entropy", lce_shipped)


def lce_v1(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor):
    M, V = hidden.shape[0], weight.shape[0]
    count, losses = counted(target), torch.empty(M, dtype=torch.float32, device=hidden.device)
    constants = {"BLOCK_V": 16384, "num_warps": 16}
    logits = hidden @ weight.t()
    ce_step_kernel_v2[(M,)](logits, target, losses, count, logits, V, **constants)  # logits become their gradient
    dhidden = logits @ weight
    dweight = logits.t() @ hidden
    return losses.sum() / count, dhidden, dweight


lce.rung("whole logits, in place", lce_v1, ce_step_kernel_v2)


def lce_v2(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, CHUNK: int = 2048):
    M, V = hidden.shape[0], weight.shape[0]
    count, losses = counted(target), torch.empty(M, dtype=torch.float32, device=hidden.device)
    constants = {"BLOCK_V": 16384, "num_warps": 16}
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, M, CHUNK):
        rows = slice(start, min(start + CHUNK, M))
        logits = hidden[rows] @ weight.t()
        grid = (logits.shape[0],)
        ce_step_kernel_v2[grid](logits, target[rows], losses[rows], count, logits, V, **constants)
        dhidden[rows] = logits @ weight
        dweight.addmm_(logits.t(), hidden[rows])
    return losses.sum() / count, dhidden, dweight


lce.rung("chunks of rows", lce_v2, ce_step_kernel_v2, note="memory for 2048 rows of logits, not for all")
assert lce.wrong(lambda *inputs: lce_v2(*inputs, CHUNK=3), *lce_inputs(7, 16, 33, torch.float32)) is None


def record_memory() -> None:
    """Peak memory of a call, above what there was before it, in GiB."""
    from triton_tutorial.bench.timing import peak_bytes

    inputs = lce_inputs(*HEAD)
    for name, function in (
        ("torch, eager", lce_torch),
        ("torch.ops.tt.linear_cross_entropy", lce_shipped),
        ("whole logits, in place", lce_v1),
        ("chunks of rows", lce_v2),
    ):
        gib = peak_bytes(lambda function=function: function(*inputs)) / 2**30
        lesson.rows.append({"table": "memory of the head", "name": name, "case": "", "gib": round(gib, 2)})


if lesson.timing:
    record_memory()
lce.ladder("Head and loss, with their gradients", measure="us")
lesson.table("memory of the head", "Peak memory above the inputs, GiB, gradients included", columns=("gib",))

# %%
eager, whole, chunks, shipped = (
    lesson.figure("linear_cross_entropy", name, "us") / 1000
    for name in ("torch, eager", "whole logits, in place", "chunks of rows", "torch.ops.tt.linear_cross_entropy")
)
eager_gib, whole_gib, chunks_gib, shipped_gib = (
    lesson.figure("memory of the head", name, "gib")
    for name in ("torch, eager", "whole logits, in place", "chunks of rows", "torch.ops.tt.linear_cross_entropy")
)
lesson.say(
    f"""
    Eager {eager:.1f} ms and {eager_gib:.1f} GiB; whole logits in place {whole:.1f} ms and {whole_gib:.1f} GiB; in chunks
    {chunks:.1f} ms and {chunks_gib:.1f} GiB; the shipped op {shipped:.1f} ms and {shipped_gib:.1f} GiB. The three products alone
    would take {6 * 8192 * 4096 * 128256 / 1e9 / lesson.limit("matmul_tflops"):.1f} ms at this GPU's measured rate.
    """
)

# %% [markdown]
# `torch.mm` does the products here. The shipped op has products of its own: its first one makes each tile's maximum and
# sum of exponentials while the tile is in registers, so that the row-wise kernel need not read the logits for them, and
# its last one adds to `dweight` in its epilogue. It also leaves out the rows that do not count: ours multiplies them by
# zero, like torch.

# %%
lce_op = lce.register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, target: lce_v2(hidden, weight, target),
    fake=lambda hidden, weight, target: (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden),
        torch.empty_like(weight),
    ),
)
lce_op.register_autograd(scaled_gradients, setup_context=saves_its_gradients)
same_as_shipped(lce_op, "linear_cross_entropy", lce_inputs(7, 16, 33, torch.float32), 1e-3)
lesson.say("Checked: opcheck with the gradient; loss and gradients equal those of `torch.ops.tt.linear_cross_entropy`.")

# %% [markdown]
# ## A bug on purpose
#
# In place is a trap. `ce_step_kernel_v2` loads the target's logit first of all. Load it where it is used, behind the
# loop say, and with logits and gradient in one memory it is no longer a logit: the kernel has just written `(p - 1) /
# count` there. Every gradient is right, training goes as well as ever, and the loss that it prints is wrong, about as
# large as it should be. (With the load *between* statistics and loop it would be a race: one warp may be writing in the
# loop while another has not yet loaded. Before the statistics it is safe, since their reduction across warps is a
# barrier.) What finds it is a test that compares every output, the loss too, with a reference, called as the model will
# call it: in place.


# %%
@triton.jit
def late_kernel_v3(logits_ptr, target_ptr, loss_ptr, count_ptr, dlogits_ptr, V, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row)
    row_max, log_sum = row_statistics(logits_ptr, V, BLOCK_V)
    scale = tl.where(target != IGNORE, 1.0 / tl.load(count_ptr), 0.0)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        p = tl.exp(logits_block(logits_ptr, offs_v, V) - row_max - log_sum)
        d = tl.where(offs_v == target, p - 1.0, p) * scale
        tl.store(dlogits_ptr + row * V + offs_v, d.to(dlogits_ptr.dtype.element_ty), mask=offs_v < V)
    z_target = tl.load(logits_ptr + target, mask=target != IGNORE, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target != IGNORE, row_max - z_target + log_sum, 0.0))


def late_v3(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, CHUNK: int = 2048):
    M, V = hidden.shape[0], weight.shape[0]
    count, losses = counted(target), torch.empty(M, dtype=torch.float32, device=hidden.device)
    constants = {"BLOCK_V": 16384, "num_warps": 16}
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, M, CHUNK):
        rows = slice(start, min(start + CHUNK, M))
        logits = hidden[rows] @ weight.t()
        grid = (logits.shape[0],)
        late_kernel_v3[grid](logits, target[rows], losses[rows], count, logits, V, **constants)
        dhidden[rows] = logits @ weight
        dweight.addmm_(logits.t(), hidden[rows])
    return losses.sum() / count, dhidden, dweight


lce.bug("the target's logit is read too late", late_v3, late_kernel_v3, 7, 16, 33, torch.float32)

# %% [markdown]
# ## A Llama block
#
# `torch_triton_ops.nn.LlamaBlock` is the block made of shipped ops, with the parameter names of Hugging Face's Llama,
# so that its checkpoints load. Below the same block is written once more, over *its* parameters, with the small things
# as arguments: torch's, ours of this lesson, and Liger's where `liger-kernel` is installed. The sum that a block begins
# with belongs to the block before, so `add_rms_norm` is used once here; a model of many blocks uses it twice in each.


# %%
class Parts(NamedTuple):
    """What is no matrix product. rope takes tables (S, D / 2)."""

    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


TORCH = Parts(norm_reference, add_norm_reference, rope_reference, swiglu_reference, torch_attention)
LESSON = Parts(rms_norm_op, add_rms_norm_op, rope_op, swiglu_op, torch_attention)


def block_with(block: tt_nn.LlamaBlock, parts: Parts) -> Callable[..., torch.Tensor]:
    attn, mlp = block.self_attn, block.mlp

    def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = parts.rms_norm(x, block.input_layernorm.weight)
        q, k, v = (
            project(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = parts.rope(q, k, cos, sin)
        attended = attn.o_proj(parts.attention(q, k, v).transpose(1, 2).flatten(2))
        normed, h = parts.add_rms_norm(attended, x, block.post_attention_layernorm.weight)
        return h + mlp.down_proj(parts.swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))

    return forward


def shipped_with(block: tt_nn.LlamaBlock) -> Callable[..., torch.Tensor]:
    """nn.LlamaBlock's own forward; it takes the tables that nn.RotaryEmbedding makes, (1, S, D)."""

    def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return block(x, *(torch.cat((table, table), -1).unsqueeze(0) for table in (cos, sin)))

    return forward


def new_block(hidden: int, inner: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tt_nn.LlamaBlock:
    return tt_nn.LlamaBlock(hidden, inner, heads, kv_heads, device=lesson.device, dtype=dtype)


def block_inputs(tokens: int, hidden: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    cos, sin = tt_nn.RotaryEmbedding(head_dim, device=lesson.device)(torch.arange(tokens, device=lesson.device))
    half = head_dim // 2
    return lesson.randn(1, tokens, hidden, dtype=dtype), cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


# %% [markdown]
# With `fullgraph=True` the whole block is one graph: seven products, torch's attention, and between them our nodes,
# which the compiler neither opens nor breaks at.

# %%
small = new_block(64, 48, 4, 2, torch.float32)
small_inputs = block_inputs(6, 64, 16, torch.float32)
lesson.compiled(
    "block",
    make=lambda *case: small_inputs,
    ours=block_with(small, LESSON),
    eager=block_with(small, TORCH),
    node="tt_lesson.add_rms_norm",
    check=(),
)


def gradients(forward: Callable[..., torch.Tensor], block: tt_nn.LlamaBlock, inputs: tuple[torch.Tensor, ...], dy):
    """One training step without the optimiser: the output, and the gradients of x and of every parameter."""
    x, cos, sin = inputs
    x = x.detach().requires_grad_()
    y = forward(x, cos, sin)
    return y.detach(), *torch.autograd.grad(y, (x, *block.parameters()), dy)


dy = torch.randn_like(small_inputs[0])
wanted = gradients(block_with(small, TORCH), small, small_inputs, dy)
for name, forward in (
    ("the lesson's kernels", block_with(small, LESSON)),
    ("torch_triton_ops.nn.LlamaBlock", shipped_with(small)),
):
    for got, want in zip(gradients(forward, small, small_inputs, dy), wanted, strict=True):
        assert close(got, want, 1e-3), f"a block of {name}: the output or a gradient differs from torch's"
lesson.say("Checked: output and all ten gradients of the block, of our kernels and of `nn.LlamaBlock`, equal torch's.")


# %% [markdown]
# Now its step, forward and backward, at the size of Llama-3-8B: hidden 4096, 14336 inside, 32 heads of queries and 8 of
# keys, 4096 tokens, bf16. To say what each
# change is worth, they are made one at a time: "torch" writes the small things out, as models do; "the lesson's kernels"
# replace just these, with torch's attention and products; in `nn.LlamaBlock` attention is `tt.flash_attn` as well.


# %%
def liger_parts() -> Parts | None:
    """Liger's kernels for the same places, or None where it is not installed. Its RoPE and SwiGLU's backward work in place."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)

    def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor):
        h = x + residual
        return rms_norm(h, weight), h

    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        tables = (torch.cat((table, table), -1).to(q.dtype).unsqueeze(0) for table in (cos, sin))
        return LigerRopeFunction.apply(q, k, *tables)

    return Parts(rms_norm, add_rms_norm, rope, LigerSiLUMulFunction.apply, torch_attention)


HIDDEN, INNER, HEADS, KV_HEADS = 4096, 14336, 32, 8
TOKENS = lesson.size(1024, 4096)
PRODUCTS = 2 * HIDDEN * HIDDEN * (1 + KV_HEADS / HEADS) + 3 * HIDDEN * INNER  # weights of the seven products
ATTENTION = 4 * TOKENS * TOKENS * HIDDEN / 2  # flops of its two products, over the causal half
FLOPS = int(
    6 * TOKENS * PRODUCTS + 3.5 * ATTENTION
)  # the backward of a product is two; that of attention has five for two


def time_steps() -> None:
    block = new_block(HIDDEN, INNER, HEADS, KV_HEADS, bf16)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)

    torch._dynamo.reset()
    runs = {
        "torch, eager": block_with(block, TORCH),
        "torch, compiled": torch.compile(block_with(block, TORCH), fullgraph=True, dynamic=False),
        "the lesson's kernels, eager": block_with(block, LESSON),
        "the lesson's kernels, compiled": torch.compile(block_with(block, LESSON), fullgraph=True, dynamic=False),
        "nn.LlamaBlock, eager": shipped_with(block),
        "nn.LlamaBlock, compiled": torch.compile(shipped_with(block), fullgraph=True, dynamic=False),
    }
    liger = liger_parts()
    if liger is not None:
        runs["Liger, eager"] = block_with(block, liger)

    for name, forward in runs.items():

        def calls(forward: Callable[..., torch.Tensor] = forward) -> Callable[[], Any]:
            inputs = block_inputs(TOKENS, HIDDEN, HIDDEN // HEADS, bf16)
            dy = torch.randn_like(inputs[0])
            return lambda: gradients(forward, block, inputs, dy)

        baseline = name.startswith(("torch", "Liger"))
        lesson.measure("step", name, calls, int(4 * PRODUCTS), FLOPS, f"{TOKENS} tokens", baseline=baseline)


if lesson.timing:
    time_steps()
lesson.table("step", "One training step of a Llama-3-8B block, without the optimiser")
lesson.chart("step", "One training step of a Llama-3-8B block", "step", measure="us", limit=False)

# %%
step = {
    name: lesson.figure("step", name, "us") / 1000
    for name in (
        "torch, eager",
        "torch, compiled",
        "the lesson's kernels, eager",
        "the lesson's kernels, compiled",
        "nn.LlamaBlock, eager",
        "nn.LlamaBlock, compiled",
        "Liger, eager",
    )
}
lesson.answer(
    f"""
    Eager {step["torch, eager"]:.1f} ms; with only the small things replaced by this lesson's kernels
    {step["the lesson's kernels, eager"]:.1f} ms: they save
    {100 * (1 - step["the lesson's kernels, eager"] / step["torch, eager"]):.0f} % of the step. torch.compile, which fuses
    the same chains by itself, takes {step["torch, compiled"]:.1f} ms; our kernels under torch.compile
    {step["the lesson's kernels, compiled"]:.1f} ms; Liger's in the same places {step["Liger, eager"]:.1f} ms;
    `nn.LlamaBlock` {step["nn.LlamaBlock, eager"]:.1f} ms, compiled {step["nn.LlamaBlock, compiled"]:.1f} ms. At this GPU's
    measured rate the products and the attention alone would take {FLOPS / 1e9 / lesson.limit("matmul_tflops"):.1f} ms: what
    lies between is all that better kernels can still win.
    """
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: the gradient of RMSNorm's weight by partial sums: each program its rows, no atomics.
# * `ex2`: the backward of interleaved RoPE.
# * `ex3`: cross entropy's gradient, where some rows do not count.
#
# ## Pitfalls
#
# * Statistics in bf16 are wrong long before they look wrong. Upcast right after the load.
# * A sum over rows by atomics is another number in every run. Partial sums cost a few megabytes and make a training run
#   repeatable.
# * What a fused forward rounds, round before it is used again, or forward and backward disagree about `h`.
# * RoPE has two layouts, halves and neighbours, and both train. A checkpoint of one in a model of the other gives
#   fluent nonsense.
# * Saving less is worth as much as running faster: gate and up, not silu(gate); the tables, not q and k; a row's two
#   statistics, not its softmax.
# * `mean` divides by the rows that *count*. Asking the host how many there are (`.item()`) stops the GPU and forbids
#   CUDA graphs; a kernel can read the number from memory.
# * In place: load what you still need before the first store, and know which barrier stands between them.
# * Accumulating a gradient in bf16 over many chunks loses bits: few chunks, or an fp32 accumulator.
#
# Next: lesson 9, below Triton: Gluon.

# %%
lesson.finish()
