# ---
# lesson:
#   number: 1
#   slug: gpu_fundamentals
#   title: "GPU fundamentals: programs, blocks, masks"
#   level: beginner
#   minutes: 40
#   prerequisites: []
#   ops: [vector_add]
#   concepts: [GPU architecture, memory hierarchy, program id, block, grid, mask, bandwidth, registers]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 1. GPU fundamentals: programs, blocks, masks
#
# At the end of this lesson you have written a vector addition that runs at the speed of the memory, know why nothing can
# be much faster, and have registered it as an operator that `torch.compile` accepts. No CUDA is needed, and no GPU to
# follow.
#
# **What a GPU is.** A GPU is some hundred small processors, the *streaming multiprocessors* (SMs; an H200 has 132),
# beside one large memory. Each SM keeps up to 2048 threads at hand and changes between them at every clock, so that
# while some wait for memory, others compute. That is the whole trick: a GPU does not make memory quick, it makes
# waiting cheap.
#
# **Where data lives**, nearest first:
#
# | level | whose | size on an H200 | what to remember |
# |---|---|---|---|
# | registers | one thread | 65536 of 4 bytes for each SM | all arithmetic happens here; with too many a thread they *spill* |
# | shared memory, L1 | one SM | 228 KiB | lesson 5; Triton uses it by itself |
# | L2 cache | all SMs | 50 MiB | what was touched lately may still be there |
# | global memory (HBM) | all | 141 GB | every tensor; 4.8 TB/s on paper |
#
# **What Triton adds.** In CUDA you write what one *thread* does with one element. In Triton you write what one
# *program* does with a *block* of elements; the compiler shares them out among threads. You launch a *grid* of programs,
# and each asks `tl.program_id(0)` which one it is.

# %%
import torch
import triton
import triton.language as tl

from triton_tutorial.lesson import Lesson

lesson = Lesson(1)

# %%
lesson.predict(
    """
    Two float32 vectors of 2^27 elements (134 million) are added on an H200. On paper it does 67 TFLOP/s in fp32 and moves
    4.8 TB/s. How long must the addition take at least, and which of the two decides?
    """
)

# %% [markdown]
# ## The reference, and what it must move
#
# `x + y` reads 4 bytes of `x` and 4 bytes of `y` and writes 4 bytes, for one addition: 12 bytes an operation. Work of
# so few operations a byte is *memory-bound*: the only figure that counts is bytes a second, and the best one can hope
# for is what a plain copy of a large tensor reaches. That copy is measured on the GPU before anything else, and every
# rung below is given as a fraction of it.


# %%
def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


SMALL, FULL = (16, 20), (12, 16, 18, 20, 22, 24, 27)  # exponents of the timed sizes

add = lesson.problem(
    "vector_add",
    reference=reference,
    make=lambda n: (lesson.randn(n), lesson.randn(n)),
    check=[(1000,), (1,), (4096,), (4097,)],
    timed=[(2**k,) for k in lesson.size(SMALL, FULL)],
    bytes=lambda x, y: 3 * x.numel() * x.element_size(),
    flops=lambda x, y: x.numel(),
)
add.baseline("torch")

# %% [markdown]
# ## Which program touches which address
#
# Say there are 100 elements and each program takes a block of 32. Program 0 takes elements 0 to 31, program 1 elements
# 32 to 63, and so on; element `i` of program `pid`'s block is element `pid * 32 + i` of the tensor. These numbers are
# the *offsets*, and `x_ptr + offsets` is a block of 32 *addresses*: pointer arithmetic on whole blocks is most of what
# a Triton kernel is.
#
# The number of programs is `ceil(100 / 32) = 4`, and the last one has 28 lanes (elements of its block) that would lie
# behind the end of the tensor. They are switched off by a *mask*.


# %%
@triton.jit
def toy_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    pid = tl.program_id(0)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    y = tl.load(y_ptr + offs_n, mask=mask_n)
    tl.store(out_ptr + offs_n, x + y, mask=mask_n)


def toy_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    toy_kernel[(triton.cdiv(x.numel(), 32),)](x, y, out, x.numel(), BLOCK_N=32)
    return out


add.picture(toy_add, 100, title="Vector addition: 100 elements, 4 programs of 32")

# %% [markdown]
# ## Rung 1: one program
#
# The simplest kernel that is right: a single program that walks through the tensor, block by block. `BLOCK_N` is a
# `tl.constexpr`: a constant of the compiled kernel, since the shape of a block must be known when it is compiled, and a
# power of two.


# %%
@triton.jit
def add_kernel_v1(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask_n = offs_n < N
        x = tl.load(x_ptr + offs_n, mask=mask_n)
        y = tl.load(y_ptr + offs_n, mask=mask_n)
        tl.store(out_ptr + offs_n, x + y, mask=mask_n)


def add_v1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    add_kernel_v1[(1,)](x, y, out, x.numel(), BLOCK_N=256)
    return out


add.rung("one program", add_v1, add_kernel_v1)

# %% [markdown]
# It is right, and uses one SM of 132: the other 131 look on.
#
# ## Rung 2: a grid of programs
#
# Instead of a loop, one program for each block. The hardware starts them on whichever SM has room, in no order that you
# may rely on. The kernel has become shorter: the loop moved into the grid.


# %%
@triton.jit
def add_kernel_v2(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    start = tl.program_id(0) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    y = tl.load(y_ptr + offs_n, mask=mask_n)
    tl.store(out_ptr + offs_n, x + y, mask=mask_n)


def add_v2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    N = x.numel()
    add_kernel_v2[(triton.cdiv(N, 256),)](x, y, out, N, BLOCK_N=256)
    return out


add.rung("a grid, blocks of 256", add_v2, add_kernel_v2, note="one program a block")

# %%
one, grid = (lesson.figure("vector_add", name, "us") for name in ("one program", "a grid, blocks of 256"))
lesson.say(
    f"""
    The grid is {one / grid:.0f} times as fast. That is more than the 132 of the SMs, because an SM is not busy with one
    program: it holds up to 64 warps (a *warp* is 32 threads that go in step), and the one program brought 4.
    """
)

# %% [markdown]
# ## Rung 3: larger blocks, more bytes in flight
#
# A program has to be started, finds out who it is and computes its addresses before the first byte is asked for. With
# 256 elements on 4 warps each thread asks for two elements of `x` and two of `y`, 16 bytes. Larger blocks give each
# thread more loads to have under way at a time, and fewer programs to start. The trade-off: a larger block needs more
# registers, and for a small tensor it leaves SMs without a program. Does it pay?


# %%
@triton.jit
def add_kernel_v3(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    start = tl.program_id(0) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    y = tl.load(y_ptr + offs_n, mask=mask_n)
    tl.store(out_ptr + offs_n, x + y, mask=mask_n)


def add_v3(x: torch.Tensor, y: torch.Tensor, BLOCK_N: int = 2048, num_warps: int = 8) -> torch.Tensor:
    out = torch.empty_like(x)
    N = x.numel()
    add_kernel_v3[(triton.cdiv(N, BLOCK_N),)](x, y, out, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


add.rung("blocks of 2048", add_v3, add_kernel_v3, note="more bytes in flight for each thread")

# %%
small, large = (lesson.figure("vector_add", name, "us") for name in ("a grid, blocks of 256", "blocks of 2048"))
lesson.say(
    f"""
    On an H200 it does not: {small:.0f} us with blocks of 256, {large:.0f} us with blocks of 2048. An SM's 2048 threads with
    16 bytes each have 32 KiB under way, and 4.4 TB/s at a latency of some 700 ns need 23 KB for each SM. So 256 is enough,
    for four-byte elements; of two bytes it would be half as many bytes under way, too few. A library that serves both takes
    the larger block.
    """
)

# %% [markdown]
# ## Rung 4: fit to ship
#
# Four lines for the cases that a benchmark does not show. Offsets in 64 bits: `pid * BLOCK_N` of 32 bits turns negative
# behind 2^31 elements, without a word. And arithmetic in fp32 whatever the dtype, converted back at the store, so that
# half precision is rounded once.


# %%
@triton.jit
def add_kernel_v4(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    y = tl.load(y_ptr + offs_n, mask=mask_n).to(tl.float32)
    tl.store(out_ptr + offs_n, (x + y).to(out_ptr.dtype.element_ty), mask=mask_n)


def add_v4(x: torch.Tensor, y: torch.Tensor, BLOCK_N: int = 2048, num_warps: int = 8) -> torch.Tensor:
    out = torch.empty_like(x)
    N = x.numel()
    add_kernel_v4[(triton.cdiv(N, BLOCK_N),)](x, y, out, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


add.rung("fit to ship", add_v4, add_kernel_v4, note="64-bit offsets, fp32 arithmetic")
add.ladder("Vector addition", xlabel="elements")

# %% [markdown]
# **More than 100 % of the limit?** The limit is a copy's, and half of the bytes of a copy are writes. Of an addition's
# bytes a third are, and reading is a little faster than writing. So a few per cent above the limit are true; a figure far
# above it would not be, and the lesson would refuse it.

# %%
ours, torchs = lesson.figure("vector_add", "fit to ship", "us"), lesson.figure("vector_add", "torch", "us")
lesson.answer(
    f"""
    3 x 4 bytes x 2^27 = 1.61 GB: at 4.8 TB/s 336 us, at the {lesson.limit():.2f} TB/s that a plain copy reaches
    {1610.6 / lesson.limit():.0f} us. The arithmetic would take 2 us: memory decides, by far. Measured: ours {ours:.0f} us,
    torch {torchs:.0f} us.
    """
)

# %% [markdown]
# ## Is it faster than torch?
#
# Older tutorials promise 1.16x. Whether that holds is a question of size: a small tensor is done before all SMs have
# work, so the cost of starting the kernel decides; a large one waits for memory, and two kernels that keep the memory
# busy are equally fast. torch's addition is such a kernel, so at large sizes nothing is left to win.


# %%
def by_size(name: str, k: int):
    return lesson.figure("vector_add", name, "us", f"2^{k}")


table = ["| elements | torch | ours | torch's time / ours |", "|---|---|---|---|"]
for k in lesson.size(SMALL, FULL):
    torchs, ours = by_size("torch", k), by_size("fit to ship", k)
    table.append(f"| 2^{k} | {torchs:.1f} us | {ours:.1f} us | {torchs / ours:.3f} |")
lesson.say("\n".join(table))

ratios = [(by_size("torch", k) / by_size("fit to ship", k)).value for k in lesson.size(SMALL, FULL)]
if None not in ratios:
    lesson.say(
        f"The ratio lies between {min(ratios):.3f} and {max(ratios):.3f}: 1.16 is"
        f" {'reached at some size' if max(ratios) >= 1.16 else 'reached at no size'}. As fast as torch, within a few per cent"
        f" either way, is what is true. (With blocks of 256 it is {torchs / small:.3f} at the largest size.)"
    )

# %% [markdown]
# ## A bug on purpose
#
# Forget the mask, and nothing seems to happen: on a GPU the last program reads whatever lies behind `x` and writes
# behind `out`, into somebody else's tensor. With 4096 elements every test passes; with 100 the memory behind `out` is
# overwritten and the result is still right! A comparison of values does not find this one. The interpreter of these
# lessons puts every tensor between guard bands and compares each address.


# %%
@triton.jit
def add_kernel_v5(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    x = tl.load(x_ptr + offs_n).to(tl.float32)
    y = tl.load(y_ptr + offs_n).to(tl.float32)
    tl.store(out_ptr + offs_n, (x + y).to(out_ptr.dtype.element_ty))


def add_v5(x: torch.Tensor, y: torch.Tensor, BLOCK_N: int = 2048, num_warps: int = 8) -> torch.Tensor:
    out = torch.empty_like(x)
    N = x.numel()
    add_kernel_v5[(triton.cdiv(N, BLOCK_N),)](x, y, out, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


add.bug("no mask", add_v5, add_kernel_v5, 5000)

# %% [markdown]
# ## Registering the operator
#
# A function that launches a kernel is opaque to the rest of PyTorch: `torch.compile` cannot look into it, autograd has
# no gradient for it. An *operator* says what is missing, in four parts:
#
# * the **schema**, its signature: `vector_add(Tensor x, Tensor y) -> Tensor`;
# * the **kernel**, what runs on real tensors;
# * the **fake**, which gives shape, dtype and device of the result without computing it: compilers call this one;
# * the **gradient**. Of x + y it is the incoming gradient, twice: no kernel is needed.
#
# `torch.library.opcheck` tests that the four agree. The shipped op declares the same in one entry of
# `op_registry.yaml`, and its kernel is the one of rung 4: the last check compares the two, bit for bit.


# %%
def fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return dout, dout


def launcher(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return add_v4(x.contiguous(), y.contiguous())


op = add.register(
    "vector_add(Tensor x, Tensor y) -> Tensor", launcher, fake=fake, backward=backward, shipped="vector_add"
)

# %% [markdown]
# ## Autotuning: which block, how many warps?
#
# `BLOCK_N` and `num_warps` change no result, only the time. Which are best is found by trying them; Triton's
# `@triton.autotune` does so at the first call for each new size. In a library that means seconds of waiting inside
# somebody's training run, so here the trying is done once, on record, and the launcher names its choice.

# %%
configs = [{"BLOCK_N": b, "num_warps": w} for b in (256, 1024, 2048, 4096) for w in (2, 4, 8) if b // w >= 64]
add.autotune(add_v4, configs)

names = [f"BLOCK_N={c['BLOCK_N']}, num_warps={c['num_warps']}" for c in configs]
times = [lesson.figure("vector_add, autotuning", name, "us").value for name in names]
if None not in times:
    lesson.say(
        f"The best and the worst of these are {100 * (max(times) / min(times) - 1):.1f} % apart: for a kernel that only moves"
        f" memory, at this size, almost any block will do."
    )

# %% [markdown]
# ## Into a model
#
# A residual connection, an activation and a scale, with our op in it. `fullgraph=True` makes anything that the compiler
# cannot see an error. The graph shows the op as one node. Then look at the times: torch.compile *fuses* the whole model
# into one kernel when it sees plain torch, and cannot fuse across our opaque node. A registered op is worth it when its
# kernel does what the compiler cannot do by itself; an addition does not, and a fair lesson says so. (The shipped op is
# `visibility: triton`: its kernel is inlined into the compiled graph.)


# %%
def model_with(add_op):
    def model(x, y):
        return torch.relu(add_op(x, y)) * 0.5

    return model


lesson.compiled(
    "model",
    make=lambda n: (lesson.randn(n), lesson.randn(n)),
    ours=model_with(op),
    eager=model_with(torch.add),
    others={"torch.ops.tt, compiled": model_with(torch.ops.tt.vector_add)},
    node="tt_lesson.vector_add",
    check=(1000,),
    timed=(lesson.size(2**20, 2**26),),
    bytes=lambda x, y: 12 * x.numel(),
    title="relu(x + y) / 2",
)
eager, fused, mixed = (
    lesson.figure("model", name, "us") for name in ("torch, eager", "torch, compiled", "ours, compiled")
)
lesson.say(
    f"""
    Eager {eager:.0f} us: three kernels, seven passes over memory. Compiled from plain torch {fused:.0f} us: one kernel, three
    passes. Compiled with our node {mixed:.0f} us: two kernels, five passes, so {mixed / fused:.2f} times as long, where the
    passes say {5 / 3:.2f}.
    """
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: add a mask to a kernel that has none.
# * `ex2`: a*x + y with a scalar `a`, on a grid that you compute.
# * `ex3`: several blocks for each program: a loop inside and a grid outside.
#
# To look further: `triton-tutorial explain tt::vector_add` shows the machine code, `triton-tutorial viz tt::vector_add` the
# addresses of the shipped op.
#
# ## Pitfalls
#
# * The mask belongs on the loads *and* on the store. Values do not show a missing one.
# * `tl.arange(0, BLOCK)` takes powers of two only; the tensor's size goes into the mask.
# * Offsets are counted in elements, not in bytes, and are 32-bit integers unless you convert them.
# * Programs run in any order, at once: none may rely on what another wrote.
# * Timing needs warm-up, a synchronised clock and inputs that are not still in the L2 cache from the last call.
#
# Next: lesson 2, in which the same bytes take several times as long.

# %%
lesson.finish()
