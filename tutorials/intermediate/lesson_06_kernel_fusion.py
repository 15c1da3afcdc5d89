# ---
# lesson:
#   number: 6
#   slug: kernel_fusion
#   title: "Kernel fusion: fewer trips to memory"
#   level: intermediate
#   minutes: 60
#   prerequisites: [1, 2, 3]
#   ops: [fused_add_mul, bias_gelu, dropout, bias_dropout_residual]
#   concepts: [fusion, intermediate result, bias, GELU, Philox, recomputation, instruction bound, proton, torch.compile]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 6. Kernel fusion
#
# At the end of this lesson you can say, before you write a line, what fusing a chain of operations will gain; you have
# fused the three chains of a transformer block that stand between its matrix products, one of them random; and you
# know which of this `torch.compile` would have done for you.

# %%
import json
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from torch_triton_ops import offline
from torch_triton_ops.fusion import keep_reference
from triton_tutorial import interpreted
from triton_tutorial.lesson import Lesson

lesson = Lesson(6)
bf16 = torch.bfloat16

# %%
lesson.predict(
    """
    `(x + y) * z` on three 8192 x 8192 tensors of bf16, 128 MiB each. Eager PyTorch runs two kernels, an addition and a
    multiplication, and each of them reaches the bandwidth of the memory. One kernel that does both does the same
    arithmetic. Can it be faster at all, and by how much at best?
    """
)

# %% [markdown]
# ## The references, and what they must move
#
# An elementwise operation spends its time on memory: it reads its inputs, computes for a moment and writes its result.
# In a chain of them each result is written to memory only to be read back by the next kernel. *Fusing* the chain keeps
# that intermediate result in registers. Count passes over the data, each of `numel * itemsize` bytes:
#
# | chain | as separate kernels | fused | at best |
# |---|---|---|---|
# | `(x + y) * z` | read x, y, write s; read s, z, write: 6 | read x, y, z, write: 4 | 1.5x |
# | `gelu(x + bias)` | read x, write; read, write: 4 | read x, write: 2 | 2x |
# | `residual + dropout(x + bias)` | 2 for the bias, 2 and half a mask for dropout, 3 for the sum: 7.5 | 3 | 2.5x |
#
# (A bias is one row: its bytes do not count. The mask has a byte an element, half a pass of bf16.) That ratio is what
# fusion gives if the separate kernels and the fused one are equally good, and it is known before the kernel is written. What
# is measured above it is owed to something else: separate kernels that are slow by themselves.


# %%
def reference(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x + y) * z


FULL, SMALL = (8192, 8192), (1024, 1024)

add_mul = lesson.problem(
    "fused_add_mul",
    reference=reference,
    make=lambda *shape: tuple(lesson.randn(*shape, dtype=bf16) for _ in range(3)),
    check=[(33, 65), (1,), (4097,)],
    timed=[lesson.size(SMALL, FULL)],
    bytes=lambda x, y, z: 4 * x.numel() * x.element_size(),
    flops=lambda x, y, z: 2 * x.numel(),
)
add_mul.baseline("torch, eager")
compiled_reference = torch.compile(reference, dynamic=False)
add_mul.baseline("torch.compile", compiled_reference)

# %% [markdown]
# ## Rung 1: what eager does
#
# Two kernels, with the sum between them in memory. The fraction of the limit below is that of the *fused* chain's four
# passes: these two kernels can be perfect and still reach only two thirds of it.


# %%
@triton.jit
def add_kernel_v1(x_ptr, y_ptr, s_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    y = tl.load(y_ptr + offs_n, mask=mask_n).to(tl.float32)
    tl.store(s_ptr + offs_n, (x + y).to(s_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def mul_kernel_v1(s_ptr, z_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    s = tl.load(s_ptr + offs_n, mask=mask_n).to(tl.float32)
    z = tl.load(z_ptr + offs_n, mask=mask_n).to(tl.float32)
    tl.store(out_ptr + offs_n, (s * z).to(out_ptr.dtype.element_ty), mask=mask_n)


def add_mul_v1(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    N = out.numel()
    s = torch.empty_like(x)
    add_kernel_v1[(triton.cdiv(N, 1024),)](x, y, s, N, BLOCK_N=1024)
    mul_kernel_v1[(triton.cdiv(N, 1024),)](s, z, out, N, BLOCK_N=1024)
    return out


add_mul.rung("two kernels", add_mul_v1, (add_kernel_v1, mul_kernel_v1))

# %% [markdown]
# ## Rung 2: one kernel
#
# The second kernel's load of `s` and the first one's store of it vanish, and with them the tensor. Note what else is
# gone: one launch, 128 MiB of memory, and one *rounding*. Eager PyTorch rounds the sum to bf16; here it stays in fp32
# until the store. A fused kernel is not bit-equal to the chain that it replaces, it is closer to the truth.
#
# 64-bit offsets make it fit to ship.


# %%
@triton.jit
def add_mul_kernel_v2(x_ptr, y_ptr, z_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    y = tl.load(y_ptr + offs_n, mask=mask_n).to(tl.float32)
    z = tl.load(z_ptr + offs_n, mask=mask_n).to(tl.float32)
    tl.store(out_ptr + offs_n, ((x + y) * z).to(out_ptr.dtype.element_ty), mask=mask_n)


def add_mul_v2(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    N = out.numel()
    add_mul_kernel_v2[(triton.cdiv(N, 1024),)](x, y, z, out, N, BLOCK_N=1024)
    return out


add_mul.rung("one kernel", add_mul_v2, add_mul_kernel_v2, note="the sum stays in registers")

# %% [markdown]
# ## Which program touches which address
#
# 60 elements in blocks of 16. Four tensors, and every element of each is touched once, by one program. In rung 1 there
# was a fifth tensor, which one launch filled and the other emptied.


# %%
def toy(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    add_mul_kernel_v2[(triton.cdiv(x.numel(), 16),)](x, y, z, out, x.numel(), BLOCK_N=16)
    return out


add_mul.picture(toy, 60, title="(x + y) * z: 60 elements, 4 programs of 16")
add_mul.ladder("(x + y) * z")

# %%
eager, compiled, ours = (
    lesson.figure("fused_add_mul", name, "us") for name in ("torch, eager", "torch.compile", "one kernel")
)
lesson.answer(
    f"""
    At best by 6 / 4 = 1.5, since only the passes over memory count. Measured: eager {eager:.0f} us, torch.compile
    {compiled:.0f} us, ours {ours:.0f} us: {eager / ours:.2f} times faster than eager, {compiled / ours:.2f} times
    torch.compile, which fuses this chain by itself. (A trifle above 1.5 is no mistake: of our passes three in four are reads,
    of eager's two in three, and reads are faster than writes.)
    """
)

# %% [markdown]
# ## Registering it
#
# The gradient of `(x + y) * z` is `dout * z` for x and for y, and `dout * (x + y)` for z. Here it is written in torch,
# which runs a kernel for each product; the shipped op has one kernel for all of it (`fused_add_mul_bwd`), writes `dx`
# and `dy` once, since they are the same tensor, and skips what nobody asked for.


# %%
def add_mul_fake(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def add_mul_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def add_mul_backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, z = ctx.saved_tensors
    ds = dout * z
    return ds, ds, (dout.float() * (x.float() + y.float())).to(z.dtype)


add_mul_op = add_mul.register(
    "fused_add_mul(Tensor x, Tensor y, Tensor z) -> Tensor",
    add_mul_v2,
    fake=add_mul_fake,
    backward=add_mul_backward,
    setup_context=add_mul_save,
    shipped="fused_add_mul",
)

# %% [markdown]
# ## Bias and GELU: a row beside a matrix, and arithmetic that counts
#
# The first half of a feed-forward block ends with `gelu(x + bias)`, where `x` is `(M, N)` and the bias is one row of
# `N`. With the tanh form of GELU
#
# `gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z^3)))`.


# %%
def gelu_reference(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias, approximate="tanh")


gelu = lesson.problem(
    "bias_gelu",
    reference=gelu_reference,
    make=lambda m, n: (lesson.randn(m, n, dtype=bf16), lesson.randn(n, dtype=bf16)),
    check=[(9, 130), (1, 1), (4, 64)],
    timed=[lesson.size(SMALL, FULL)],
    bytes=lambda x, bias: 2 * x.numel() * x.element_size() + bias.numel() * bias.element_size(),
    flops=lambda x, bias: 10 * x.numel(),
)
gelu.baseline("torch, eager")
compiled_gelu = torch.compile(gelu_reference, dynamic=False)
gelu.baseline("torch.compile", compiled_gelu)

# %% [markdown]
# The first version treats `x` as one long vector; element `i` stands in column `i % N`. Triton has no `tanh` of its
# own, but `tanh(u) = 2 / (1 + exp(-2 u)) - 1`.


# %%
@triton.jit
def gelu_kernel_v1(x_ptr, bias_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N) + tl.arange(0, BLOCK_M * BLOCK_N)
    mask = offs < M * N
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + offs % N, mask=mask).to(tl.float32)
    z = x + bias
    u = 0.7978845608 * (z + 0.044715 * z * z * z)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * u)) - 1.0
    out = 0.5 * z * (1.0 + tanh)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def gelu_v1(x: torch.Tensor, bias: torch.Tensor, BLOCK_M: int = 4, BLOCK_N: int = 1024) -> torch.Tensor:
    out = torch.empty_like(x)
    M, N = x.shape
    grid = (triton.cdiv(M * N, BLOCK_M * BLOCK_N),)
    gelu_kernel_v1[grid](x, bias, out, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return out


gelu.rung("one long vector", gelu_v1, gelu_kernel_v1)

# %% [markdown]
# `offs % N` is a division in 64 bits, which a GPU does in dozens of instructions. The compiler helps: it is told when N is
# a multiple of 16, and then eight neighbours lie in one row and share the division; with another N every element has its
# own. And the bias is loaded again for every row. In a tile of rows and columns the column number is there for nothing,
# and one load of the bias serves all rows of the tile.


# %%
@triton.jit
def gelu_kernel_v2(x_ptr, bias_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = ((pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    offs_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
    offs = offs_m * N + offs_n
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N).to(tl.float32)
    z = x + bias
    u = 0.7978845608 * (z + 0.044715 * z * z * z)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * u)) - 1.0
    out = 0.5 * z * (1.0 + tanh)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def gelu_v2(x: torch.Tensor, bias: torch.Tensor, BLOCK_M: int = 4, BLOCK_N: int = 1024) -> torch.Tensor:
    out = torch.empty_like(x)
    M, N = x.shape
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    gelu_kernel_v2[grid](x, bias, out, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return out


gelu.rung("tiles of rows", gelu_v2, gelu_kernel_v2, note="no division; the bias loaded once a tile")


def toy_tiles(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return gelu_v2(x, bias, BLOCK_M=4, BLOCK_N=8)


gelu.picture(toy_tiles, 8, 16, title="gelu(x + bias): tiles of 4 rows and 8 columns", name="tiles")

# %% [markdown]
# How much arithmetic is free? An H200 moves an element of bf16 in and out in about a trillionth of a second, and in that
# time its 132 SMs issue some 27 instructions for it: loads, conversions and masks included. GELU is near that border, so
# its formula is worth a look. `(1 + tanh(u)) / 2` is `1 / (1 + exp(-2 u))`: the same function, without the subtraction and
# the halving; and the GPU's own exponential is `2^w`, so the factor log2(e) goes into the constants. What remains is
# `z / (1 + 2^w)` with `w = z * (a + b * z^2)`.


# %%
@triton.jit
def gelu_kernel_v3(x_ptr, bias_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = ((pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    offs_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
    offs = offs_m * N + offs_n
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N).to(tl.float32)
    z = x + bias
    # -2 * sqrt(2 / pi) * log2(e), and the same times 0.044715
    w = z * (-2.302208198 - 0.10294324 * z * z)
    out = z / (1.0 + tl.exp2(w))
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def gelu_v3(x: torch.Tensor, bias: torch.Tensor, BLOCK_M: int = 4, BLOCK_N: int = 1024) -> torch.Tensor:
    out = torch.empty_like(x)
    M, N = x.shape
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    gelu_kernel_v3[grid](x, bias, out, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return out


gelu.rung("fewer instructions", gelu_v3, gelu_kernel_v3, note="a sigmoid in base 2")
gelu.ladder("gelu(x + bias)")

# %%
vector, tiles, fewer, eager, compiled = (
    lesson.figure("bias_gelu", name, "us")
    for name in ("one long vector", "tiles of rows", "fewer instructions", "torch, eager", "torch.compile")
)
lesson.say(
    f"""
    One long vector {vector:.0f} us, tiles {tiles:.0f} us, the shorter formula {fewer:.0f} us, at
    {100 * lesson.figure("bias_gelu", "fewer instructions", "fraction"):.0f} % of the limit. Once memory decides, shorter
    formulas gain nothing more: look at the fraction before you polish arithmetic.

    Eager takes {eager:.0f} us, {eager / fewer:.1f} times as long, though the passes say 2: adding a row to a matrix is a slow
    kernel of torch's, as in lesson 3. `torch.compile` fuses, and takes {compiled:.0f} us, {compiled / fewer:.2f} times as
    long as ours: it calls the CUDA library's tanh, which has more instructions than there is time for.
    """
)


# %%
def gelu_fake(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def gelu_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def gelu_backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, bias = ctx.saved_tensors
    dz = torch.ops.aten.gelu_backward(dout.float(), x.float() + bias.float(), approximate="tanh")
    return dz.to(x.dtype), dz.sum(0).to(bias.dtype)


gelu_op = gelu.register(
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    gelu_v3,
    fake=gelu_fake,
    backward=gelu_backward,
    setup_context=gelu_save,
    shipped="bias_gelu",
    exact=False,
)

# %% [markdown]
# The bias's gradient is a sum over all rows of `dx`. A fused backward computes both in one pass: each program sums its
# own rows in registers and writes one row of partial sums, and a second, small kernel adds those. Atomic additions would
# save the second kernel, and make the last bits depend on the order in which programs finish. The shipped op's sum
# always has the same order.
#
# ## Dropout and residual: fusing what is random
#
# `out = residual + dropout(x + bias)` ends both halves of a transformer block. Dropout zeroes each element with
# probability `p` and divides the others by `1 - p`. Its backward must drop *the same* elements, so PyTorch's eager
# dropout stores a mask, a byte for each element, until the backward has used it.
#
# It need not be stored: it can be **computed again**, if the random numbers are a *function* of the element's index.
# Philox is such a function: ten rounds of multiplying and mixing turn a 128-bit counter into four 32-bit words that no
# test can tell from random ones. There is no state to carry along, any program can compute any element's number, and
# forward and backward agree because they ask for the same counter and the same `seed`.
#
# Ours takes eight 16-bit numbers from the four words: element `i` uses number `i % 8` of counter `i // 8`, and is kept
# where that is at least `p * 2^16`. `keep_reference` computes the same in plain torch, which is how a random kernel can
# be tested like any other.


# %%
def drop_reference(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    kept = keep_reference(x, p, seed, 0)
    return residual + torch.where(kept, (x + bias) / (1 - p), 0.0)


def drop_eager(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    return residual + F.dropout(x + bias, p)


def drop_inputs(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int]:
    return lesson.randn(m, n, dtype=bf16), lesson.randn(n, dtype=bf16), lesson.randn(m, n, dtype=bf16), 0.1, 2026


drop = lesson.problem(
    "bias_dropout_residual",
    reference=drop_reference,
    make=drop_inputs,
    check=[(9, 136), (1, 8), (5, 64)],
    timed=[lesson.size(SMALL, FULL)],
    bytes=lambda x, bias, residual, p, seed: 3 * x.numel() * x.element_size() + bias.numel() * bias.element_size(),
    flops=lambda x, bias, residual, p, seed: 3 * x.numel(),
)
drop.baseline("torch, eager", drop_eager)
compiled_drop = torch.compile(drop_eager, dynamic=False)
drop.baseline("torch.compile", compiled_drop)

ones = torch.ones(2**18)
share = keep_reference(ones, 0.1, 2026, 0).double().mean().item()
agree = (keep_reference(ones, 0.5, 1, 0) == keep_reference(ones, 0.5, 2, 0)).double().mean().item()
lesson.say(
    f"""
    Checked here, on 2^18 elements: with p = 0.1 a share of {share:.4f} is kept, and the masks of seeds 1 and 2 with p = 0.5
    agree on {agree:.4f} of the elements, as independent ones would on a half.
    """
)


# %% [markdown]
# First as eager does it: one kernel stores result and mask, another adds the residual.


# %%
@triton.jit
def number_of(seed, index):
    """The 16-bit random number of each element; index: int64."""
    group = index // 8
    r0, r1, r2, r3 = tl.philox(tl.cast(seed, tl.int64), group.to(tl.uint32), (group >> 32).to(tl.uint32), 0, 0)
    word = tl.where(index & 4 == 0, tl.where(index & 2 == 0, r0, r1), tl.where(index & 2 == 0, r2, r3))
    return tl.where(index & 1 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def drop_kernel_v1(
    x_ptr, bias_ptr, out_ptr, kept_ptr, N, seed, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr
):
    row, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n).to(tl.float32)
    x += tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    kept = number_of(seed, row * N + offs_n) >= THRESHOLD
    out = tl.where(kept, x * SCALE, 0.0)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)
    tl.store(kept_ptr + row * N + offs_n, kept.to(tl.int8), mask=mask_n)


@triton.jit
def residual_kernel_v1(residual_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    out = tl.load(out_ptr + row * N + offs_n, mask=offs_n < N).to(tl.float32)
    out += tl.load(residual_ptr + row * N + offs_n, mask=offs_n < N).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def drop_v1(x, bias, residual, p, seed, BLOCK_N: int = 2048, num_warps: int = 4):
    out = torch.empty_like(x)
    M, N = x.shape
    constants = {"THRESHOLD": round(p * 2**16), "SCALE": 1 / (1 - p), "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    grid = (M, triton.cdiv(N, BLOCK_N))
    kept = torch.empty_like(x, dtype=torch.int8)
    drop_kernel_v1[grid](x, bias, out, kept, N, seed, **constants)
    residual_kernel_v1[grid](residual, out, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


drop.rung("two kernels and a mask", drop_v1, (drop_kernel_v1, residual_kernel_v1))

# %% [markdown]
# Fused, without the mask:


# %%
@triton.jit
def drop_kernel_v2(
    x_ptr, bias_ptr, residual_ptr, out_ptr, N, seed, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr
):
    row, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n).to(tl.float32)
    x += tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    kept = number_of(seed, row * N + offs_n) >= THRESHOLD
    out = tl.load(residual_ptr + row * N + offs_n, mask=mask_n).to(tl.float32) + tl.where(kept, x * SCALE, 0.0)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def drop_v2(x, bias, residual, p, seed, BLOCK_N: int = 2048, num_warps: int = 4):
    out = torch.empty_like(x)
    M, N = x.shape
    constants = {"THRESHOLD": round(p * 2**16), "SCALE": 1 / (1 - p), "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    grid = (M, triton.cdiv(N, BLOCK_N))
    drop_kernel_v2[grid](x, bias, residual, out, N, seed, **constants)
    return out


drop.rung("one kernel, no mask", drop_v2, drop_kernel_v2, note="the mask is a function of seed and index")

# %% [markdown]
# It moves the fewest bytes possible. Whether it also runs at the speed of memory is a question of *instructions*: a Philox
# counter costs about 80 of them. The border was 27 an element for one pass in and one out, so it is some 40 for the three
# passes here. If every element computed a counter of its own, as the source of `number_of` says, arithmetic would decide.
# Does it? The compiled code tells. A counter takes ten rounds of two products, of which the upper half is an instruction
# of its own in PTX, `mul.hi.u32`: count them.


# %%
@triton.jit
def rand_kernel(x_ptr, out_ptr, N, seed, P: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout with Triton's own tl.rand: a counter for each element, and three of its four words unused."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    out = tl.where(tl.rand(seed, offs_n) >= P, x * SCALE, 0.0)
    tl.store(out_ptr + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def rand_dropout(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    N = x.numel()
    rand_kernel[(triton.cdiv(N, 2048),)](x, out, N, 2026, P=0.1, SCALE=1 / 0.9, BLOCK_N=2048)
    return out


def counters(function, *inputs) -> float:
    """Philox counters for each element in the code that is compiled for sm_90, for blocks of 2048 on 4 warps."""
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in inputs]
    with interpreted.recorded(90) as launches:
        function(*meta)
    ptx = offline.compile_launch(launches[0], 90).kernel.asm["ptx"]
    # 20 products a counter, but for two of the first round, whose factor is the same for all; 16 elements a thread
    return ptx.count("mul.hi.u32") / 20 / 16


def bf16_inputs(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int]:
    return *(torch.empty(shape, dtype=bf16) for shape in ((m, n), (n,), (m, n))), 0.1, 2026


if not lesson.quiet:
    rows = {
        "`tl.rand`": counters(rand_dropout, torch.empty(8192, 8192, dtype=bf16)),
        "ours, N = 8192": counters(drop_v2, *bf16_inputs(64, 8192)),
        "ours, N = 8190": counters(drop_v2, *bf16_inputs(64, 8190)),
    }
    lines = ["| kernel | counters an element |", "|---|---|", *(f"| {name} | {n:.2f} |" for name, n in rows.items())]
    lesson.say("\n".join(lines))

# %% [markdown]
# (Less than 1 where a product is the same for all elements, or nobody uses it.) With N = 8192 the compiler found by
# itself that eight neighbours of one thread have the same `index // 8`, and computes it once. It could, because it was
# told that N is a multiple of 16, so that every vector of eight begins with a new counter; with N = 8190 it does as the
# source says. Performance that hangs on such a proof is better said in the source: a block of `BLOCK_N // 8` counters
# gives four words each, `tl.join` puts blocks together along a new last dimension, and `reshape` makes one block of it
# in the order of the elements. Nothing moves between threads, a thread that loads eight neighbours computes their
# counter itself, and no element has to pick its number from four words. (A row must begin with a new counter, so N must
# be a multiple of 8; the shipped op computes a counter for each element where it is not.)


# %%
@triton.jit
def kept_of_block(seed, first, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of BLOCK_N elements from number `first`, a multiple of 8, are kept."""
    group = first // 8 + tl.arange(0, BLOCK_N // 8)  # (BLOCK_N / 8,)
    r0, r1, r2, r3 = tl.philox(tl.cast(seed, tl.int64), group.to(tl.uint32), (group >> 32).to(tl.uint32), 0, 0)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # (BLOCK_N / 8, 2, 2): the last two dims read r0, r1, r2, r3
    return tl.join((words & 0xFFFF) >= THRESHOLD, (words >> 16) >= THRESHOLD).reshape(BLOCK_N)


@triton.jit
def drop_kernel_v3(
    x_ptr, bias_ptr, residual_ptr, out_ptr, N, seed, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr
):
    row, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n).to(tl.float32)
    x += tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    kept = kept_of_block(seed, row * N + start_n, THRESHOLD, BLOCK_N)
    out = tl.load(residual_ptr + row * N + offs_n, mask=mask_n).to(tl.float32) + tl.where(kept, x * SCALE, 0.0)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def drop_v3(x, bias, residual, p, seed, BLOCK_N: int = 2048, num_warps: int = 4):
    out = torch.empty_like(x)
    M, N = x.shape
    constants = {"THRESHOLD": round(p * 2**16), "SCALE": 1 / (1 - p), "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    grid = (M, triton.cdiv(N, BLOCK_N))
    drop_kernel_v3[grid](x, bias, residual, out, N, seed, **constants)
    return out


drop.rung("eight numbers a counter", drop_v3, drop_kernel_v3, note="one Philox for eight elements, said in the source")
drop.ladder("residual + dropout(x + bias)")

# %%
separate, whole, shared, eager, compiled = (
    lesson.figure("bias_dropout_residual", name, "us")
    for name in (
        "two kernels and a mask",
        "one kernel, no mask",
        "eight numbers a counter",
        "torch, eager",
        "torch.compile",
    )
)
lesson.say(
    f"""
    Two kernels {separate:.0f} us, one kernel {whole:.0f} us, the shared counter spelt out {shared:.0f} us, at
    {100 * lesson.figure("bias_dropout_residual", "eight numbers a counter", "fraction"):.0f} % of the limit. Eager takes
    {eager:.0f} us, {eager / shared:.1f} times as long, where the passes say 2.5: its bias again. `torch.compile` takes
    {compiled:.0f} us, {compiled / shared:.1f} times as long: one kernel, beside a small one that draws a
    seed, but with a counter for each element.

    And what random numbers cost where there is little else to wait for, in a plain dropout of the same size, two passes
    over memory:
    """
)


def dropout_calls(function):
    def calls():
        x = lesson.randn(*lesson.size(SMALL, FULL), dtype=bf16)
        return lambda: function(x)

    return calls


m, n = lesson.size(SMALL, FULL)
for name, function in (
    ("tl.rand, a counter for each element", rand_dropout),
    ("torch.ops.tt.dropout, eight elements a counter", lambda x: torch.ops.tt.dropout(x, 0.1, 2026)),
    ("F.dropout", lambda x: F.dropout(x, 0.1)),
):
    lesson.measure("dropout", name, dropout_calls(function), 4 * m * n, baseline=name == "F.dropout")
lesson.table("dropout", "Dropout alone")

# %% [markdown]
# ## A bug on purpose
#
# Forget the position of the block: every program asks for the counters from 0 on, and so drops the same columns in
# every block. The share of dropped elements is right, the scale is right, the mean is right, and every statistic of one
# row is right. A model even trains, a little worse. What finds it is a reference that gives *the same mask*, element by
# element.


# %%
@triton.jit
def drop_kernel_v4(
    x_ptr, bias_ptr, residual_ptr, out_ptr, N, seed, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr
):
    row, start_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + row * N + offs_n, mask=mask_n).to(tl.float32)
    x += tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    kept = kept_of_block(seed, start_n, THRESHOLD, BLOCK_N)
    out = tl.load(residual_ptr + row * N + offs_n, mask=mask_n).to(tl.float32) + tl.where(kept, x * SCALE, 0.0)
    tl.store(out_ptr + row * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


def drop_v4(x, bias, residual, p, seed, BLOCK_N: int = 2048, num_warps: int = 4):
    out = torch.empty_like(x)
    M, N = x.shape
    constants = {"THRESHOLD": round(p * 2**16), "SCALE": 1 / (1 - p), "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    grid = (M, triton.cdiv(N, BLOCK_N))
    drop_kernel_v4[grid](x, bias, residual, out, N, seed, **constants)
    return out


drop.bug("every row drops the same columns", drop_v4, drop_kernel_v4, 9, 136)

# %% [markdown]
# ## Registering a random operator
#
# Seed and probability are arguments like any other: `seed` is a `SymInt`, a number known only at run time, so that a new
# seed in every step compiles nothing anew; `p` is baked into the kernel. An operator with a hidden generator would be
# none that `opcheck` could test, and activation checkpointing would draw another mask when it recomputes. The gradient
# is the same operator on `dout`, with the same seed and neither bias nor residual.


# %%
def drop_fake(x, bias, residual, p, seed):
    return torch.empty_like(x)


def drop_save(ctx, inputs, output) -> None:
    _, ctx.bias, _, ctx.p, ctx.seed = inputs


def drop_backward(ctx, dout):
    # the operator, not its launcher: what a compiler traces must be operators
    this = torch.ops.tt_lesson.bias_dropout_residual
    dx = this(dout.contiguous(), torch.zeros_like(ctx.bias), torch.zeros_like(dout), ctx.p, ctx.seed)
    return dx, dx.float().sum(0).to(ctx.bias.dtype), dout, None, None


drop_op = drop.register(
    "bias_dropout_residual(Tensor x, Tensor bias, Tensor residual, float p, SymInt seed) -> Tensor",
    drop_v3,
    fake=drop_fake,
    backward=drop_backward,
    setup_context=drop_save,
    shipped="bias_dropout_residual",
    exact=False,
)

# %% [markdown]
# ## Autotuning
#
# How many elements a program and how many warps? A block of 1024 on 4 warps gives each thread one 16-byte load of each
# tensor and one Philox counter.

# %%
configs = [
    {"BLOCK_N": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (1, 2, 4, 8) if 256 <= b // w <= 1024
]
drop.autotune(drop_v3, configs)
names = [f"BLOCK_N={c['BLOCK_N']}, num_warps={c['num_warps']}" for c in configs]
times = [lesson.figure("bias_dropout_residual, autotuning", name, "us").value for name in names]
if None not in times:
    lesson.say(f"The best and the worst of these are {100 * (max(times) / min(times) - 1):.0f} % apart.")

# %% [markdown]
# ## Profiling: which kernels run?
#
# A profiler answers what a stopwatch cannot: *what* ran. Triton brings its own, **proton** (`triton.profiler`). It
# listens to the GPU's driver, so it sees cuBLAS's kernels and eager PyTorch's beside Triton's, and it needs a GPU.
# `proton.scope` names a stretch of the program; `proton.finalize` writes a tree of scopes and kernels as JSON, which
# `proton-viewer -m time/us FILE` prints, and which is short enough to read by hand:


# %%
def profile(scopes: dict[str, object], repeats: int = 5) -> dict[str, dict[str, tuple[int, float]]]:
    """scope -> kernel -> (launches, microseconds) of one call of each function."""
    import triton.profiler as proton

    for call in scopes.values():  # compile first
        call()
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        proton.start(str(Path(folder) / "lesson"))
        for name, call in scopes.items():
            with proton.scope(name):
                for _ in range(repeats):
                    call()
        torch.cuda.synchronize()
        proton.finalize()
        (file,) = Path(folder).iterdir()
        tree = json.loads(file.read_text())
    found: dict[str, dict[str, tuple[int, float]]] = {name: {} for name in scopes}

    def walk(node, scope: str | None) -> None:
        name, metrics = node["frame"]["name"], node["metrics"]
        scope = name if name in found else scope
        if scope is not None and metrics.get("time (ns)") and not node["children"]:
            found[scope][name] = (round(metrics["count"] / repeats), metrics["time (ns)"] / repeats / 1e3)
        for child in node["children"]:
            walk(child, scope)

    walk(tree[0], None)
    return found


# %% [markdown]
# ## What torch.compile fuses by itself, and what it does not
#
# Five chains, each in eager PyTorch, through `torch.compile` and as one of our ops. `torch.compile` writes Triton kernels
# of its own (Inductor does) and fuses
#
# * elementwise chains with each other, whatever their length: the three chains of this lesson;
# * elementwise work with the reduction before or after it, where both see the same rows;
# * a random number generator into its consumer.
#
# It does not, by default, fuse
#
# * into a matrix product: that is a call of cuBLAS, and bias and GELU come after it in a kernel of their own
#   (`mode="max-autotune"` may choose a Triton product with an epilogue);
# * two matrix products with each other, so an attention that is written out keeps its score matrix in memory. Patterns
#   that it knows are replaced by a ready kernel; change the formula, as Gemma 2's soft cap does, and it knows them no more;
# * across anything that it cannot look into: a custom op that is one node, a graph break, a collective.
#
# That is where to write kernels. Not for `(x + y) * z`: there the compiler is as good, and it is free. And a chain that it
# does fuse may still be worth a kernel where the arithmetic counts, as GELU's and Philox's did above.
#
# And one thing can be seen without a GPU: what a compiled forward hands to its backward. Before Inductor writes any
# kernel, AOTAutograd divides the joint graph in two and decides what to save and what to compute again; numbers from a
# generator cannot be computed again, so it saves the mask.


# %%
def saved_for_backward(function) -> str:
    """What the forward graph returns besides its result, when torch.compile has divided the graph."""
    forward: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs):
        forward.append(module)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    with lesson.on_cpu():
        inputs = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in drop_inputs(64, 128)]
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (returned,) = forward[0].graph.find_nodes(op="output")
    tensors = [node.meta["val"] for node in returned.args[0][1:]]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors) or "nothing"


lesson.say(
    f"""
    Saved by `residual + F.dropout(x + bias)` for a 64 x 128 input: {saved_for_backward(drop_eager)}. By
    `torch.ops.tt.bias_dropout_residual`: {saved_for_backward(torch.ops.tt.bias_dropout_residual)}, the bias itself, which is
    a parameter and there anyway; seed and offset are numbers.
    """
)

# %%
cap = 30.0


def product_gelu(x, w, bias):
    return F.gelu(F.linear(x, w, bias), approximate="tanh")


def capped_attention(q, k, v):
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5) / cap)
    return torch.softmax(scores, -1) @ v


def scopes() -> dict[str, object]:
    tt = torch.ops.tt
    m, n = lesson.size(SMALL, FULL)
    three = add_mul.make(m, n)
    two = gelu.make(m, n)
    five = drop.make(m, n)
    product = tuple(lesson.randn(*shape, dtype=bf16) / 8 for shape in ((m, 1024), (n, 1024), (n,)))
    heads = tuple(lesson.randn(4, 16, m // 4, 64, dtype=bf16) for _ in range(3))
    chains = {
        "(x + y) * z": (reference, compiled_reference, tt.fused_add_mul, three),
        "gelu(x + bias)": (gelu_reference, compiled_gelu, tt.bias_gelu, two),
        "residual + dropout(x + bias)": (drop_eager, compiled_drop, tt.bias_dropout_residual, five),
        "gelu(x @ w + bias)": (
            product_gelu,
            torch.compile(product_gelu, dynamic=False),
            lambda x, w, bias: tt.linear(x, w, bias, "gelu_tanh"),
            product,
        ),
        "attention with a soft cap": (
            capped_attention,
            torch.compile(capped_attention, dynamic=False),
            lambda q, k, v: tt.flash_attn(q, k, v, softcap=cap),
            heads,
        ),
    }
    calls: dict[str, object] = {}
    for chain, (eager, compiled, ours, inputs) in chains.items():
        for who, function in (("eager", eager), ("torch.compile", compiled), ("torch.ops.tt", ours)):
            calls[f"{chain}, {who}"] = lambda function=function, inputs=inputs: function(*inputs)
    return calls


def readable(name: str) -> str:
    """A kernel's name without its template arguments: _ZN2at6native13reduce_kernelILi512E... -> at::native::reduce_kernel."""
    parts, rest = [], name.removeprefix("_ZN")
    while rest != name and (length := re.match(r"\d+", rest)):
        part, rest = rest[length.end() :][: int(length[0])], rest[length.end() + int(length[0]) :]
        parts += [] if part.startswith("_GLOBAL_") else [part]
    return "::".join(parts)[:60] if parts else name[:60]


def record_profile() -> None:
    try:
        found = profile(scopes())
    except Exception as error:  # the driver may forbid profiling, in a container say
        lesson.say(f"proton could not run here: {error}")
        return
    for scope, kernels in found.items():
        lesson.rows.append(
            {
                "table": "profile",
                "name": scope,
                "case": "",
                "kernels": sum(count for count, _ in kernels.values()),
                "us": round(sum(us for _, us in kernels.values()), 1),
                "slowest": readable(max(kernels, key=lambda name: kernels[name][1])) if kernels else "",
            }
        )


if lesson.timing:
    record_profile()
elif not lesson.gpu:
    lesson.say("proton needs a GPU: it was not run here. What it saw when this lesson was recorded:")
lesson.table("profile", "Kernels of one call, by proton", columns=("kernels", "us", "slowest"))

# %%
lines = ["| chain | eager | torch.compile | torch.ops.tt |", "|---|---|---|---|"]
for chain in (
    "(x + y) * z",
    "gelu(x + bias)",
    "residual + dropout(x + bias)",
    "gelu(x @ w + bias)",
    "attention with a soft cap",
):
    cells: list[str] = []
    for who in ("eager", "torch.compile", "torch.ops.tt"):
        count, us = (lesson.figure("profile", f"{chain}, {who}", measure) for measure in ("kernels", "us"))
        kernels = "1 kernel" if count.value == 1 else f"{count:.0f} kernels"
        cells.append(f"{kernels}, {us:.0f} us" if count else "(not recorded yet)")
    lines.append(f"| {chain} | {' | '.join(cells)} |")
lesson.say("\n".join(lines))

# %% [markdown]
# ## Into a model
#
# The first half of a feed-forward block, with our `bias_gelu` in it. `fullgraph=True` accepts it, since it is registered.
# Look at the times: once bias and GELU are one kernel, they are a small part of the product's time, and the best place for
# them is inside the product's own kernel, where `x @ w` is still in registers: `torch.ops.tt.linear(x, w, bias, "gelu_tanh")`.


# %%
def feed_forward_with(bias_gelu):
    def model(x, w, bias):
        return bias_gelu(x @ w.t(), bias)

    return model


lesson.compiled(
    "feed_forward",
    make=lambda m, k, n: (
        lesson.randn(m, k, dtype=bf16),
        lesson.randn(n, k, dtype=bf16) * k**-0.5,
        lesson.randn(n, dtype=bf16),
    ),
    ours=feed_forward_with(gelu_op),
    eager=feed_forward_with(gelu_reference),
    others={
        "torch.ops.tt.bias_gelu, compiled": feed_forward_with(torch.ops.tt.bias_gelu),
        "torch.ops.tt.linear, eager": lambda x, w, bias: torch.ops.tt.linear(x, w, bias, "gelu_tanh"),
    },
    node="tt_lesson.bias_gelu",
    check=(64, 32, 48),
    timed=lesson.size((1024, 512, 1024), (8192, 2048, 8192)),
    bytes=lambda x, w, bias: 2 * (x.numel() + w.numel() + bias.numel() + x.shape[0] * w.shape[0]),
    flops=lambda x, w, bias: 2 * x.shape[0] * x.shape[1] * w.shape[0],
    tolerance=2e-2,
    title="gelu(x @ w + bias)",
)
eager, compiled, ours, inside = (
    lesson.figure("feed_forward", name, "us")
    for name in ("torch, eager", "torch, compiled", "ours, compiled", "torch.ops.tt.linear, eager")
)
lesson.say(
    f"""
    Eager {eager:.0f} us; torch.compile {compiled:.0f} us; with our `bias_gelu` {ours:.0f} us, {compiled / ours:.2f} times as
    fast as that; inside the product {inside:.0f} us, {compiled / inside:.2f} times.
    """
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: fuse `(x - y) * z` in half precision, rounded once.
# * `ex2`: a bias beside a matrix, in tiles.
# * `ex3`: the backward of dropout, with the mask computed again.
#
# ## Pitfalls
#
# * Count passes before you fuse: the ratio of passes is the most that you can gain. Fusing into something bound by
#   arithmetic gains less than that.
# * Fused results are rounded fewer times than the chain's. Compare with fp64, not with the chain.
# * More inputs in a kernel mean more registers. Past a point (the ladder shows registers and spills) two kernels are
#   faster than one.
# * A random kernel's numbers must depend on the element's index, never on the program, the block or the strides, or
#   the backward will drop others, and so will the next release with another block size.
# * One seed, one use: two dropouts of a step with the same seed and offset drop the same elements. `offset` is there
#   for that.
# * A fused op is a wall for the compiler when it is opaque: what it could have fused with its neighbours, it cannot.
#
# Next: lesson 7, the fusion that the compiler cannot find, attention.

# %%
lesson.finish()
