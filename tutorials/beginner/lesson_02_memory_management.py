# ---
# lesson:
#   number: 2
#   slug: memory_management
#   title: "Memory: strides, coalescing, dtypes"
#   level: beginner
#   minutes: 45
#   prerequisites: [1]
#   ops: [strided_copy, cast, transpose]
#   concepts: [stride, contiguous, coalescing, sector, tile, shared memory, dtype, alignment, bandwidth]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 2. Memory: strides, coalescing, dtypes
#
# At the end of this lesson you can say from a tensor's strides whether a kernel will be fast, write one that is fast
# for both orders of a matrix, and choose a dtype by what it costs to move. There is no arithmetic in this lesson at
# all: every kernel copies.
#
# **Strides.** A tensor is a line of memory and a rule for finding elements in it. Element `[m, n]` of a matrix lies
# `m * stride_m + n * stride_n` elements behind the first. `x.t()` moves nothing: it exchanges the two strides.
#
# | tensor | shape | strides | |
# |---|---|---|---|
# | `x = torch.empty(4, 6)` | (4, 6) | (6, 1) | contiguous: the last dimension has stride 1, and no gaps |
# | `x.t()` | (6, 4) | (1, 6) | the first dimension has stride 1 |
# | `x[:, ::2]` | (4, 3) | (6, 2) | every second element |
# | `x[:1].expand(4, 6)` | (4, 6) | (0, 1) | one row, four times |
#
# **Coalescing.** The memory of a GPU is not read by the byte. What moves between memory and an SM is a *sector* of 32
# bytes, eight fp32 numbers. A warp's 32 threads load together; the hardware gathers their 32 addresses and fetches
# each sector once. If neighbours in the block are neighbours in memory, 32 fp32 loads are 4 sectors, every byte of
# which is used: the access is *coalesced*. If they lie 8 or more elements apart, the same 32 loads are 32 sectors.

# %%
import torch
import triton
import triton.language as tl

from triton_tutorial.lesson import Lesson

lesson = Lesson(2)

# %%
lesson.predict(
    """
    Kernel A copies 33 million fp32 numbers that lie side by side. Kernel B copies 33 million too, every eighth of a larger
    tensor. Both do as many loads and as many stores. How many times longer does B take?
    """
)

# %% [markdown]
# ## The reference, and what it must move
#
# The reference is `x.clone(memory_format=torch.contiguous_format)`: the same elements, in order, in new memory. It must
# read each element once and write it once, 8 bytes for an fp32 number; these *useful* bytes are what every rate below
# counts. A kernel that fetches 32 bytes to use 4 shows as one that is slow.
#
# (Why not `x.contiguous()`? Of a tensor that is contiguous already it copies nothing: it returns `x`. As a reference to be
# timed it would look thousands of times faster than the memory. Whatever beats the measured limit by more than a fifth is
# refused in these lessons, since the usual reason is that nothing was done.)


# %%
def reference(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


steps = (1, 2, 4, 8, 16, 32)
strided = lesson.problem(
    "stride",
    reference=reference,
    make=lambda n, step: (lesson.randn(n * step)[::step],),
    check=[(1000, 3), (1, 1), (2048, 1)],
    timed={f"stride {s}": (lesson.size(2**22, 2**25), s) for s in steps},
    bytes=lambda x: 2 * x.numel() * x.element_size(),
)
strided.baseline("torch")


@triton.jit
def take_kernel_v1(x_ptr, out_ptr, N, stride_xn, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n * stride_xn, mask=mask_n)
    tl.store(out_ptr + offs_n, x, mask=mask_n)


def take_v1(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    N = x.numel()
    BLOCK_N = 8192 // x.element_size()  # 8 KiB a program, 64 bytes a thread
    take_kernel_v1[(triton.cdiv(N, BLOCK_N),)](x, out, N, x.stride(0), BLOCK_N=BLOCK_N)
    return out


# %% [markdown]
# ## Which program touches which address
#
# Thirty-two elements, every fourth of `x`, and four programs of 8. The picture of `x` is 8 fp32 numbers wide: a row is a
# sector. The stores to `out` fill whole sectors. Of those of `x`, two numbers in eight are used, and the six grey ones
# are fetched and thrown away.


# %%
def toy_take(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    take_kernel_v1[(triton.cdiv(x.numel(), 8),)](x, out, x.numel(), x.stride(0), BLOCK_N=8)
    return out


strided.picture(toy_take, 32, 4, title="Every fourth element: 4 programs of 8", name="stride", columns=8)

# %% [markdown]
# ## Coalesced against strided, measured
#
# One kernel, six strides, always the same number of useful bytes. By the rule of sectors an element costs 4 bytes
# written and `4 * stride` bytes fetched, up to 32: 8, 12, 20 and 36 bytes for strides 1, 2, 4 and 8, so 4.5 times as
# many at stride 8. Beyond that every element has a sector of its own, and by this rule it cannot become worse. Whether
# that is so, the table says.

# %%
strided.rung("one kernel, any stride", take_v1, take_kernel_v1)
lesson.table("stride", "Copying with a stride", columns=("us", "rate", "fraction"))
lesson.chart("stride", "Useful bytes a second, by stride", name="bandwidth", kind="lines", xlabel="stride of the loads")

# %%
unit = lesson.figure("stride", "one kernel, any stride", "us", "stride 1")
times = {s: lesson.figure("stride", "one kernel, any stride", "us", f"stride {s}") / unit for s in steps}
best = lesson.figure("stride", "one kernel, any stride", "tbps", "stride 1")
lesson.answer(
    f"""
    Times over that of stride 1: {times[2]:.2f} at stride 2, {times[4]:.2f} at 4, {times[8]:.2f} at 8; sectors predict 1.5, 2.5
    and 4.5. "Coalesced is two to five times as fast", as one often reads, is about strides 4 to 8. Then, on an H200, the rule
    fails: {times[16]:.1f} at stride 16 and {times[32]:.1f} at 32. That the time doubles once more from 8 to 16, and hardly
    grows behind it, says that the memory itself hands out 64 bytes at a time, two sectors: 68 bytes an element instead of 8, or
    8.5 times. The rest bytes do not explain.
    """
)

# %%
paper, ceiling = lesson.figure("dtypes", "copy", "tbps", "float32") / 4.8, lesson.limit()
torchs, ours = (lesson.figure("stride", name, "us", "stride 8") for name in ("torch", "one kernel, any stride"))
lesson.say(
    f"""
    And how good is the coalesced copy? {best:.2f} TB/s are {best / ceiling * 100:.0f} % of the {ceiling:.2f} TB/s that
    torch's copy of a large tensor reaches here, and {best / 4.8 * 100:.0f} % of the 4.8 TB/s on paper ({paper * 100:.0f} %
    with four times as many elements, below). "85 to 95 % of the peak" is true of what can be measured. Of the figure on paper
    a copy does not get that far, since half its bytes are writes; lesson 1's addition, with a third, does.

    Where loads are scattered, our simple kernel is not the best: at stride 8 torch takes {torchs:.0f} us, ours {ours:.0f} us.
    """
)

# %% [markdown]
# ## A matrix in the other order
#
# Now a tensor that has a dimension of stride 1, only not the last: `x.t()`. Whoever walks through it in the order of
# `out` reads with a stride of a whole row; whoever walks in the order of `x` writes so.


# %%
copy = lesson.problem(
    "strided_copy",
    reference=reference,
    make=lambda m, n: (lesson.randn(n, m).t(),),
    check=[(33, 65), (1, 1), (64, 128)],
    timed=[(n, n) for n in lesson.size((1024, 2048), (2048, 4096, 8192))],
    bytes=lambda x: 2 * x.numel() * x.element_size(),
)
copy.baseline("torch")

# %% [markdown]
# ### Rung 1: along the rows of out
#
# The stores are coalesced. The loads are not: neighbours in the block lie `stride_xn` elements apart, each in a sector
# of its own, and of 32 bytes one program uses 4. The other 28 belong to the next seven programs, and are only in the
# cache if those run soon.


# %%
@triton.jit
def copy_kernel_v1(x_ptr, out_ptr, M, N, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offs_n < N
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m * N + offs_n, x, mask=mask)


def copy_v1(x: torch.Tensor, BLOCK: int = 1024) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (M, triton.cdiv(N, BLOCK))
    copy_kernel_v1[grid](x, out, M, N, x.stride(0), x.stride(1), BLOCK=BLOCK)
    return out


copy.rung("along the rows of out", copy_v1, copy_kernel_v1)

# %% [markdown]
# ### Rung 2: along the columns of out
#
# Turn it round: a program takes a column, so that neighbours in the block are neighbours in `x`. Now the loads are
# coalesced and the stores are not. Is that better or worse? A store of 4 bytes into a sector need not fetch the sector
# first, but the cache has to put the parts together before it writes them to memory.


# %%
@triton.jit
def copy_kernel_v2(x_ptr, out_ptr, M, N, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offs_m < M
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m * N + offs_n, x, mask=mask)


def copy_v2(x: torch.Tensor, BLOCK: int = 1024) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (N, triton.cdiv(M, BLOCK))
    copy_kernel_v2[grid](x, out, M, N, x.stride(0), x.stride(1), BLOCK=BLOCK)
    return out


copy.rung("along the columns of out", copy_v2, copy_kernel_v2, note="the same program, turned round")

# %%
rows, columns = (lesson.figure("strided_copy", f"along the {name} of out", "us") for name in ("rows", "columns"))
lesson.say(
    f"Worse: {columns:.0f} us against {rows:.0f} us, {columns / rows:.1f} times as long. Scattered stores cost more than loads."
)

# %% [markdown]
# ### Rung 3: tiles
#
# A block may have two dimensions. A tile of 32 by 32 has 32 neighbours in either direction: 128 bytes, four whole
# sectors, whichever way it is read. The load and the store want the threads in different orders, and Triton sees it: it
# loads with the threads along the dimension where `x` has stride 1, passes the tile through *shared memory*, and
# stores with the threads along the rows of `out`. You write none of that. (Lesson 5 looks into it; `triton-tutorial
# explain` shows the `convert_layout` in the compiler's text.)


# %%
@triton.jit
def copy_kernel_v3(x_ptr, out_ptr, M, N, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # (BLOCK, 1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK, BLOCK)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m * N + offs_n, x, mask=mask)


def copy_v3(x: torch.Tensor, BLOCK: int = 32) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK))
    copy_kernel_v3[grid](x, out, M, N, x.stride(0), x.stride(1), BLOCK=BLOCK)
    return out


copy.rung("tiles of 32 x 32", copy_v3, copy_kernel_v3, note="a block of two dimensions")
copy.picture(copy_v3, 64, 48, title="Tiles of a matrix in the other order", name="tiles")

# %% [markdown]
# ### Rung 4: larger tiles
#
# Memory likes long runs, longer than a sector: a tile of 64 reads and writes 256 bytes in a row, and a program has four
# times as many loads under way. Eight warps share it, so that a thread needs hardly more registers than before.


# %%
@triton.jit
def copy_kernel_v4(x_ptr, out_ptr, M, N, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # (BLOCK, 1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK, BLOCK)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m * N + offs_n, x, mask=mask)


def copy_v4(x: torch.Tensor, BLOCK: int = 64, num_warps: int = 8) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK))
    copy_kernel_v4[grid](x, out, M, N, x.stride(0), x.stride(1), BLOCK=BLOCK, num_warps=num_warps)
    return out


copy.rung("tiles of 64 x 64", copy_v4, copy_kernel_v4, note="longer runs, more loads under way")

# %% [markdown]
# ### Rung 5: which tiles at one time
#
# The programs of a grid start in order, the first index fastest. So far that was `m`: the tiles that are in flight
# together lie side by side in `x`, and below one another in `out`. Exchange the two indices, and they lie side by side
# in `out`, so that whole rows are written at one time and the reads are scattered. The work is the same, to the last
# byte; only its order has changed.


# %%
@triton.jit
def copy_kernel_v5(x_ptr, out_ptr, M, N, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # (BLOCK, 1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK, BLOCK)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m * N + offs_n, x, mask=mask)


def copy_v5(x: torch.Tensor, BLOCK: int = 64, num_warps: int = 8) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(N, BLOCK), triton.cdiv(M, BLOCK))
    copy_kernel_v5[grid](x, out, M, N, x.stride(0), x.stride(1), BLOCK=BLOCK, num_warps=num_warps)
    return out


copy.rung("tiles, in the order of out", copy_v5, copy_kernel_v5, note="neighbours in flight are neighbours in out")
copy.ladder("Copying a matrix in the other order")

# %%
rows, tiles = (
    lesson.figure("strided_copy", name, "us") for name in ("along the rows of out", "tiles, in the order of out")
)
torchs = lesson.figure("strided_copy", "torch", "us")
lesson.say(
    f"""
    Rung 1 takes {rows / tiles:.1f} times as long as rung 5, torch's copy {torchs / tiles:.1f} times as long: it does not use
    tiles. Tiles of 32 take {lesson.figure("strided_copy", "tiles of 32 x 32", "us"):.0f} us, of 64
    {lesson.figure("strided_copy", "tiles of 64 x 64", "us"):.0f} us, and in the order of `out` {tiles:.0f} us, which is
    {100 * lesson.figure("strided_copy", "tiles, in the order of out", "fraction"):.0f} % of what a copy in order reaches.
    """
)

# %% [markdown]
# ## A bug on purpose
#
# The commonest mistake of all: a kernel that knows one stride, given a tensor that has others. It copies memory in the
# order of memory. For a contiguous tensor that is right, and tests are written with contiguous tensors; here every
# element is there and almost none is in its place. A library has three honest ways out: use the strides, copy first
# (`x.contiguous()`), or refuse with an error.


# %%
@triton.jit
def copy_kernel_v6(x_ptr, out_ptr, M, N, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # (BLOCK, 1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK, BLOCK)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask)
    tl.store(out_ptr + offs_m * N + offs_n, x, mask=mask)


def copy_v6(x: torch.Tensor, BLOCK: int = 64, num_warps: int = 8) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(N, BLOCK), triton.cdiv(M, BLOCK))
    copy_kernel_v6[grid](x, out, M, N, x.stride(0), x.stride(1), BLOCK=BLOCK, num_warps=num_warps)
    return out


copy.bug("the strides are not used", copy_v6, copy_kernel_v6, 33, 65)

# %% [markdown]
# ## Dtypes: bytes are the price
#
# For a kernel that only moves data, a dtype is a size: 2 bytes should take half the time of 4, at the same bytes a
# second. The table copies as many elements in each of five dtypes with the kernel from above, whose block is counted
# in bytes: what hides the time of a load is the bytes that are under way.
#
# | dtype | bytes | largest | next after 1 | for |
# |---|---|---|---|---|
# | float32 | 4 | 3.4e38 | 1.0000001 | sums, statistics, whatever must be exact |
# | bfloat16 | 2 | 3.4e38 | 1.0078 | training: the range of float32, 8 bits of precision |
# | float16 | 2 | 65504 | 1.00098 | more precision, but 300 * 300 is infinity |
# | int32 | 4 | 2147483647 | 2 | indices; float32 holds integers exactly only to 2^24 |
# | int8 | 1 | 127 | 2 | quantized weights (lesson 11) |
#
# Therefore kernels load in the small dtype, convert in registers to float32, compute, and convert back at the store:
# conversion costs next to nothing beside the bytes that it saves.


# %%
def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    return (100 * torch.rand(n, device=lesson.device)).to(dtype)


kinds = {
    "float32": torch.float32,
    "int32": torch.int32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
dtypes = lesson.problem(
    "dtypes",
    reference=lambda x: x.clone(),
    make=lambda n, dtype: (values(n, dtype),),
    check=[(1000, dtype) for dtype in kinds.values()],
    timed={name: (lesson.size(2**24, 2**27), dtype) for name, dtype in kinds.items()},
    bytes=lambda x: 2 * x.numel() * x.element_size(),
)
dtypes.rung("copy", take_v1, take_kernel_v1)
lesson.table("dtypes", "As many elements in five dtypes", columns=("us", "rate", "fraction"))
four, two, single = (lesson.figure("dtypes", "copy", "us", name) for name in ("float32", "bfloat16", "int8"))
lesson.say(
    f"Four bytes {four:.0f} us, two {two:.0f} us, one {single:.0f} us: {four / two:.2f} and {four / single:.2f} times faster,"
    f" where the bytes say 2 and 4."
)

# %% [markdown]
# A conversion is a load, `.to(...)` and a store. `tl.store` converts to the dtype of the pointer by itself, but a
# kernel that says so is easier to read. Rounding is to the nearest, ties to even; what lies beyond the largest value
# becomes infinity in float16, and in an integer it is undefined, so a careful kernel clamps first. The shipped `cast`
# does, and has float8 too.


# %%
@triton.jit
def cast_kernel_v1(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    tl.store(out_ptr + offs_n, x.to(out_ptr.dtype.element_ty), mask=mask_n)


def to_half(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    N = x.numel()
    cast_kernel_v1[(triton.cdiv(N, 2048),)](x, out, N, BLOCK_N=2048)
    return out


cast = lesson.problem(
    "cast",
    reference=lambda x: x.to(torch.float16),
    make=lambda n: (lesson.randn(n),),
    check=[(1000,), (1,)],
    timed=[(lesson.size(2**24, 2**27),)],
    bytes=lambda x: x.numel() * (x.element_size() + 2),
)
cast.baseline("torch")
cast.rung("float32 to float16", to_half, cast_kernel_v1)

# %% [markdown]
# ## Registering the operator
#
# `strided_copy(Tensor x) -> Tensor` in the four parts of lesson 1. Two of them say something new. The *fake* must give
# the strides too: the result is contiguous, whatever `x` was, and a compiler plans memory by that. And the *gradient*
# of a copy is the upstream gradient, in x's shape; it may itself have any strides, which is why kernels of a backward
# must not trust them either (`out.sum().backward()` hands down a gradient whose strides are all 0).
#
# The shipped op takes any number of dimensions: it merges those that one stride walks through, and hands a tensor like
# ours to `transpose`, whose kernel is the one of rung 5.


# %%
def fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def backward(ctx, dout: torch.Tensor) -> torch.Tensor:
    return dout


def launcher(x: torch.Tensor) -> torch.Tensor:
    return copy_v5(x)


op = copy.register("strided_copy(Tensor x) -> Tensor", launcher, fake=fake, backward=backward, shipped="strided_copy")

# %% [markdown]
# ## Autotuning: which tile?
#
# A wider tile makes longer runs in both matrices; more warps share it among more threads. Too small, and a thread has
# nothing to wait for while it waits; too large, and few programs fit beside each other on an SM.

# %%
tilings = [(32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 8), (128, 16)]
configs = [{"BLOCK": block, "num_warps": warps} for block, warps in tilings]
copy.autotune(copy_v5, configs)

# %% [markdown]
# ## Into a model
#
# A copy that changes the order stands before many layers, since the next kernel wants its rows contiguous. In plain
# torch `torch.compile` makes one kernel of the copy and the arithmetic behind it. Ours stays a node of its own, which
# writes a matrix only for the next kernel to read it: two passes where one would do. A copy is worth a kernel of its
# own where nothing stands beside it to be fused with. (The shipped op, `visibility: triton`, is inlined, and still a
# kernel of its own.)


# %%
def model_with(copy_op):
    def model(x):
        return torch.relu(copy_op(x.t())) * 0.5

    return model


lesson.compiled(
    "model",
    make=lambda m, n: (lesson.randn(m, n),),
    ours=model_with(op),
    eager=model_with(lambda x: x.contiguous()),
    others={"torch.ops.tt, compiled": model_with(torch.ops.tt.strided_copy)},
    node="tt_lesson.strided_copy",
    check=(65, 33),
    timed=lesson.size((2048, 2048), (8192, 8192)),
    bytes=lambda x: 2 * x.numel() * x.element_size(),
    title="relu(x.t().contiguous()) / 2",
)
eager, fused, ours_eager, mixed = (
    lesson.figure("model", name, "us") for name in ("torch, eager", "torch, compiled", "ours, eager", "ours, compiled")
)
lesson.say(
    f"""
    Run eagerly, our copy makes the model {eager / ours_eager:.1f} times as fast ({eager:.0f} us to {ours_eager:.0f} us).
    Compiled, it makes it {mixed / fused:.1f} times as slow: {mixed:.0f} us for two kernels, against {fused:.0f} us for the
    compiler's one, which reads in tiles too.
    """
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: a kernel that knows one layout learns to use strides.
# * `ex2`: how many sectors does a warp's load touch? A function that counts them.
# * `ex3`: integers times a scale: convert at the right place.
#
# ## Pitfalls
#
# * `.view`, `.t()`, `.expand` and slices move nothing: what looks like a matrix may have any strides, 0 included.
# * The fast dimension belongs on the last axis of the block, for the loads and for the stores; if they disagree, use a
#   tile.
# * Strides count elements, not bytes. So do offsets.
# * A tensor that begins one element behind a 16-byte boundary (`x[1:]`), or whose rows have an odd length, is read in
#   smaller pieces: still coalesced, with more instructions.
# * A stride of 2 is not half a copy: it fetches everything and uses half.
# * Benchmark with the strides that your users have. Contiguous inputs are the ones that need no kernel.
#
# Next: lesson 3, in which kernels compute.

# %%
lesson.finish()
