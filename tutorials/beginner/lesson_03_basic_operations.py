# ---
# lesson:
#   number: 3
#   slug: basic_operations
#   title: "Basic operations: element-wise, broadcasting, reductions, masks, bugs"
#   level: beginner
#   minutes: 60
#   prerequisites: [1, 2]
#   ops: [add, sub, mul, div, maximum, minimum, relu, sigmoid, tanh, exp, silu, gelu, masked_fill, sum, mean, amax, amin, argmax]
#   concepts: [element-wise, broadcasting, stride 0, fusion, reduction, accumulator, neutral element, error handling, debugging]
#   exercises: [ex1, ex2, ex3, ex4, ex5]
# ---

# %% [markdown]
# # Lesson 3. Basic operations: element-wise, broadcasting, reductions, masks, bugs
#
# Most of the lines of a model are one of two kinds. *Element-wise* operations compute each element of the result from
# the elements at the same place: `x * y`, `relu(x)`, `x.masked_fill(mask, 0)`. *Reductions* make one number of many:
# `x.mean(-1)`, `x.amax()`. At the end of this lesson you can write both for tensors that broadcast, you know when a
# kernel of your own pays and when it cannot, and you have found three bugs that look like working code.
#
# **Broadcasting is stride 0.** `x * scale` with `x` of shape (M, N) and `scale` of shape (N,) uses the same N numbers for
# every row. Nothing is copied for that: PyTorch *expands* `scale` to (M, N) with strides (0, 1), so that the next row
# is the same row. A kernel that takes its addresses from strides broadcasts without knowing it.
#
# | operand of `x * operand`, x of (4, 6) | as (4, 6) it has strides | what is read again |
# |---|---|---|
# | a row, shape (6,) | (0, 1) | the row, for each of 4 rows |
# | a column, shape (4, 1) | (1, 0) | each number, 6 times |
# | one number, shape () | (0, 0) | the number, 24 times |

# %%
import torch
import triton
import triton.language as tl

from triton_tutorial.lesson import Lesson

lesson = Lesson(3)

# %%
lesson.predict(
    """
    `torch.relu(x * scale + shift)` with x of 8192 x 8192 fp32 numbers, scale and shift of 8192. PyTorch runs it as three
    kernels, each of which reads a matrix and writes a matrix. How many times faster can one kernel be that computes the whole
    line?
    """
)

# %% [markdown]
# ## The reference, and what it must move
#
# We begin with one of the three, `x * y` with a row `y`. It must read each element of `x` once, write each element of
# the result once, and read the row, which is next to nothing: 8 bytes an element for one multiplication. As in lesson 1
# memory decides, so every kernel is compared with what a copy of a large tensor reaches.


# %%
def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


mul = lesson.problem(
    "mul",
    reference=reference,
    make=lambda m, n: (lesson.randn(m, n), lesson.randn(n)),
    check=[(33, 65), (1, 1), (3, 300), (40, 7)],
    timed=[lesson.size((2048, 2048), (8192, 8192))],
    bytes=lambda x, y: 2 * x.numel() * x.element_size() + y.numel() * y.element_size(),
    flops=lambda x, y: x.numel(),
)
mul.baseline("torch")

# %% [markdown]
# ## Which program touches which address
#
# A program takes a *tile*: here 4 rows of 8 columns. `offs_m` is a column of row numbers, (4, 1), and `offs_n` a row of
# column numbers, (1, 8); Triton broadcasts the two as PyTorch would, and `offs_m * N + offs_n` is a (4, 8) block of offsets.
# Of `y` the tile needs 8 numbers, whatever the number of its rows: the picture shows programs that touch different
# elements of `x` and the same of `y`.


# %%
@triton.jit
def toy_kernel(x_ptr, y_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)  # (BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask)
    y = tl.load(y_ptr + offs_n, mask=offs_n < N)  # (1, BLOCK_N)
    tl.store(out_ptr + offs_m * N + offs_n, x * y, mask=mask)


def toy_mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    M, N = x.shape
    toy_kernel[(triton.cdiv(M, 4), triton.cdiv(N, 8))](x, y, out, M, N, BLOCK_M=4, BLOCK_N=8)
    return out


mul.picture(toy_mul, 7, 13, title="x * row: 7 x 13 elements, 2 x 2 programs of 4 x 8")

# %% [markdown]
# ## Rung 1: make the row a matrix first
#
# The addition of lesson 1 with `*` for `+`, on a `y` that was written out as a matrix. It is right. It also moves twice
# what it must: a matrix is written that need not exist, and read again.


# %%
@triton.jit
def mul_kernel_v1(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x * y, mask=mask)


def mul_v1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    size = x.numel()
    y = y.expand(x.shape).contiguous()
    mul_kernel_v1[(triton.cdiv(size, 1024),)](x, y, out, size, BLOCK=1024)
    return out


mul.rung("row written out", mul_v1, mul_kernel_v1)

# %% [markdown]
# ## Rung 2: the column is the remainder
#
# Element `i` of the matrix lies in column `i % N`: the row can be read where it is. Nothing superfluous is moved any
# more. But a GPU has no instruction for a remainder: it takes many. How many times, depends on what the compiler knows. If
# `N` is a multiple of 16, and Triton looks at that at every launch, four neighbours of `x` stay neighbours in `y`: one load,
# one remainder. With any other `N` each element has a load and a remainder of its own.


# %%
@triton.jit
def mul_kernel_v2(x_ptr, y_ptr, out_ptr, size, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs % N, mask=mask)
    tl.store(out_ptr + offs, x * y, mask=mask)


def mul_v2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    size, N = x.numel(), x.shape[-1]
    mul_kernel_v2[(triton.cdiv(size, 1024),)](x, y, out, size, N, BLOCK=1024)
    return out


mul.rung("remainder", mul_v2, mul_kernel_v2, note="read the row where it is")

# %% [markdown]
# ## Rung 3: tiles
#
# The kernel of the picture. No division: row and column come from the program's number. The neighbours of `y` are
# neighbours whatever `N` is, and one row of `y` serves all rows of the tile.


# %%
@triton.jit
def mul_kernel_v3(x_ptr, y_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask)
    y = tl.load(y_ptr + offs_n, mask=offs_n < N)
    tl.store(out_ptr + offs_m * N + offs_n, x * y, mask=mask)


def mul_v3(x: torch.Tensor, y: torch.Tensor, BLOCK_M: int = 4, BLOCK_N: int = 256, num_warps: int = 4) -> torch.Tensor:
    out = torch.empty_like(x)
    M, N = x.shape
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))
    mul_kernel_v3[grid](x, y, out, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


mul.rung("tiles", mul_v3, mul_kernel_v3, note="row and column from the program's number")

# %% [markdown]
# ## Rung 4: strides, fit to ship
#
# Four strides, `xm, xn` of `x` and `ym, yn` of `y`: now `y` may be a row (0, 1), a column (1, 0), a matrix, a transposed
# one. As in lesson 1 rows are counted in 64 bits, and the arithmetic is done in fp32, whatever the dtype.


# %%
@triton.jit
def mul_kernel_v4(x_ptr, y_ptr, out_ptr, M, N, xm, xn, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * xm + offs_n * xn, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + offs_m * ym + offs_n * yn, mask=mask).to(tl.float32)
    tl.store(out_ptr + offs_m * N + offs_n, (x * y).to(out_ptr.dtype.element_ty), mask=mask)


def mul_v4(x: torch.Tensor, y: torch.Tensor, BLOCK_M: int = 4, BLOCK_N: int = 256, num_warps: int = 4) -> torch.Tensor:
    x, y = torch.broadcast_tensors(x, y)
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    (M, N), strides = x.shape, (*x.stride(), *y.stride())
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))
    mul_kernel_v4[grid](x, y, out, M, N, *strides, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


mul.rung("strides", mul_v4, mul_kernel_v4, note="any strides, 64-bit offsets, fp32 arithmetic")
for operand in (lesson.randn(33, 1), lesson.randn(33, 65), lesson.randn(65, 33).t(), lesson.randn(1, 1)):
    assert mul.wrong(mul_v4, lesson.randn(33, 65), operand) is None
mul.ladder("x * row")

# %%
written, remainder, strides, torchs = (
    lesson.figure("mul", name, "us") for name in ("row written out", "remainder", "strides", "torch")
)
lesson.say(
    f"""
    The row written out costs {written / strides:.1f} times the time. The remainder, at {remainder:.0f} us, is *not* slower than
    tiles, at {strides:.0f} us: this N is a multiple of 16, and the little arithmetic left hides behind the memory. Its blocks
    also follow one another in memory, while the tiles that are in flight together stand below one another (lesson 2, rung 5).
    What tiles buy is any N and any strides, for {100 * (strides / remainder - 1):.0f} % more
    time. Torch's product with a row takes {torchs:.0f} us,
    {100 * lesson.figure("mul", "torch", "fraction"):.0f} % of the limit: broadcasting has its price there.
    """
)

# %% [markdown]
# The shipped family (`torch_triton_ops/elementwise.py`) is this kernel with two more dimensions, after neighbouring dimensions
# that lie evenly in memory were merged: a contiguous tensor of any shape becomes one long row.
#
# ## One kernel for the whole line: fusion
#
# One multiplication is near what the memory allows; no better kernel will make it twice as fast. The gain lies between
# the operations. Run one by one, each reads a matrix and writes a matrix: six passes over memory for
# `relu(x * scale + shift)`. In one kernel the product stays in registers while the sum and the relu are taken: two passes.


# %%
def chain_reference(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.relu(x * scale + shift)


def chain_of_ops(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.relu(torch.ops.tt.add(torch.ops.tt.mul(x, scale), shift))


chain = lesson.problem(
    "chain",
    reference=chain_reference,
    make=lambda m, n: (lesson.randn(m, n), lesson.randn(n), lesson.randn(n)),
    check=[(33, 65), (1, 1), (5, 300)],
    timed=[(n, n) for n in lesson.size((512, 2048), (1024, 4096, 8192))],
    bytes=lambda x, scale, shift: 2 * x.numel() * x.element_size() + 2 * scale.numel() * scale.element_size(),
    flops=lambda x, scale, shift: 3 * x.numel(),
)
chain.baseline("torch, three kernels")
chain.baseline("torch.ops.tt, three kernels", chain_of_ops)
chain.baseline("torch.compile", torch.compile(chain_reference, dynamic=False))


@triton.jit
def chain_kernel_v1(x_ptr, scale_ptr, shift_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=mask)
    scale = tl.load(scale_ptr + offs_n, mask=offs_n < N)  # (1, BLOCK_N)
    shift = tl.load(shift_ptr + offs_n, mask=offs_n < N)
    tl.store(out_ptr + offs_m * N + offs_n, tl.maximum(x * scale + shift, 0.0), mask=mask)


def chain_v1(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    M, N = x.shape
    grid = (triton.cdiv(M, 4), triton.cdiv(N, 256))
    chain_kernel_v1[grid](x, scale, shift, out, M, N, BLOCK_M=4, BLOCK_N=256)
    return out


chain.rung("one kernel", chain_v1, chain_kernel_v1)
chain.ladder("relu(x * scale + shift)")

# %%
eager, shipped, compiled, fused = (
    lesson.figure("chain", name, "us")
    for name in ("torch, three kernels", "torch.ops.tt, three kernels", "torch.compile", "one kernel")
)
lesson.answer(
    f"""
    Three kernels move 6 matrices, one kernel moves 2: three times less, and memory decides. Three kernels of
    `torch.ops.tt`, each near the limit, take {shipped:.0f} us against {fused:.0f} us: {shipped / fused:.2f} times as long.
    Torch's own three take {eager:.0f} us, {eager / fused:.2f} times as long; what is above 3 is not fusion, it is its
    broadcasting (the table before this one). `torch.compile` sees the same thing by itself, and its kernel is a little better
    than ours: {compiled:.0f} us.
    """
)

# %%
for n in lesson.size((512, 2048), (1024, 4096, 8192)):
    ratio = lesson.figure("chain", "torch, three kernels", "us", f"{n}x{n}") / lesson.figure(
        "chain", "one kernel", "us", f"{n}x{n}"
    )
    lesson.say(f"* {n} x {n}: three kernels take {ratio:.2f} times as long as one.")

# %% [markdown]
# That is the honest form of the promise "1.5 to 3 times faster than PyTorch": a chain of operations against eager, and not
# against a compiler that fuses, too. Small matrices stay in the 50 MiB of L2 between the kernels, so that the passes saved
# are cheaper ones, and the ratio is lower. A kernel of your own pays where the compiler does not see the chain, or cannot
# fuse it: lesson 6.
#
# ## Reductions: many numbers to one
#
# The mean of each row. One program for each row walks along it; a mask switches off the lanes past the end, and
# `other=0.0` is what they load instead: adding 0 changes nothing, so 0 is the *neutral element* of a sum. Without
# `other` a lane that is switched off holds anything at all.

# %%
mean = lesson.problem(
    "mean",
    reference=lambda x: x.mean(-1),
    make=lambda m, n: (lesson.randn(m, n),),
    check=[(5, 1000), (1, 1), (3, 1024), (2, 5001)],
    timed=[lesson.size((4096, 2048), (8192, 8192)), lesson.size((16, 2**18), (16, 2**22))],
    bytes=lambda x: x.numel() * x.element_size(),
    flops=lambda x: x.numel(),
    atol=1e-6,  # sums in another order than torch's; of N numbers around 1, divided by N
)
mean.baseline("torch")


@triton.jit
def mean_kernel_v1(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = 0.0
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc += tl.sum(x, axis=0)
    tl.store(out_ptr + row, acc / N)


def mean_v1(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, device=x.device, dtype=x.dtype)
    mean_kernel_v1[(M,)](x, out, N, BLOCK_N=1024)
    return out


mean.rung("one number carried", mean_v1, mean_kernel_v1)

# %% [markdown]
# ## A block carried, not a number
#
# `tl.sum` is the costly part: the lanes of a warp exchange numbers in five steps, the warps meet in shared memory and
# wait for each other, once for every 1024 elements. Carry a block of 1024 sums instead, add element-wise, and let the
# lanes meet once, at the end. It is also more accurate: each of the 1024 sums is short.


# %%
@triton.jit
def mean_kernel_v2(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc += x
    tl.store(out_ptr + row, tl.sum(acc, axis=0) / N)


def mean_v2(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, device=x.device, dtype=x.dtype)
    mean_kernel_v2[(M,)](x, out, N, BLOCK_N=1024)
    return out


mean.rung("a block carried", mean_v2, mean_kernel_v2, note="the lanes meet once")

# %% [markdown]
# ## Few rows: split them
#
# 8192 rows are 8192 programs. 16 rows are 16 programs, on a GPU of 132 SMs. So a long row is cut into parts, each summed by
# a program of its own, and a second launch of the same kernel sums the parts. The programs of one launch cannot wait
# for each other; two launches are how one says "first all of this, then that". (Atomic additions would need one launch,
# and give other last bits every time, since the order of the additions is left to chance.)


# %%
@triton.jit
def mean_kernel_v3(x_ptr, out_ptr, N, chunk, divisor, BLOCK_N: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, N), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc += x
    tl.store(out_ptr + row * tl.num_programs(1) + part, tl.sum(acc, axis=0) / divisor)


def mean_v3(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    chunk = N if M >= 512 else 4096  # a multiple of BLOCK_N, or the whole row
    parts = triton.cdiv(N, chunk)
    out = torch.empty(M, parts, device=x.device, dtype=torch.float32)
    mean_kernel_v3[(M, parts)](x, out, N, chunk, N, BLOCK_N=1024)
    if parts > 1:
        sums, out = out, torch.empty(M, 1, device=x.device, dtype=torch.float32)
        mean_kernel_v3[(M, 1)](sums, out, parts, parts, 1, BLOCK_N=1024)
    return out.view(M).to(x.dtype)


mean.rung("rows split", mean_v3, mean_kernel_v3, note="enough programs for few rows")
mean.ladder("Mean of each row", sizes="panels")

# %%
for label in (lesson.size("4096x2048", "8192x8192"), lesson.size("16x262144", "16x4194304")):
    number, block, split, torchs = (
        lesson.figure("mean", name, "tbps", label)
        for name in ("one number carried", "a block carried", "rows split", "torch")
    )
    lesson.say(
        f"* {label}: one number carried {number:.2f} TB/s, a block carried {block:.2f} TB/s, rows split {split:.2f} TB/s,"
        f" torch {torchs:.2f} TB/s."
    )

# %% [markdown]
# With thousands of rows it makes no difference what is carried: while the warps of one program meet, those of the others
# load. With sixteen rows there are no others, and then the meeting shows; but the cure is more programs.

# %% [markdown]
# ## Masking, and a bug on purpose
#
# The maximum of each row is the same kernel with `tl.maximum` for `+`, and with another neutral element. Of a maximum
# that is minus infinity: `max(a, -inf)` is `a` whatever `a` is.


# %%
amax = lesson.problem(
    "amax",
    reference=lambda x: x.amax(-1),
    make=lambda m, n: (-lesson.randn(m, n).abs() - 1,),
    check=[(5, 1000), (1, 1), (3, 128)],
    bytes=lambda x: x.numel() * x.element_size(),
)


@triton.jit
def amax_kernel_v1(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
        acc = tl.maximum(acc, x)
    tl.store(out_ptr + row, tl.max(acc, axis=0))


def amax_v1(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, device=x.device, dtype=x.dtype)
    amax_kernel_v1[(M,)](x, out, N, BLOCK_N=128)
    return out


amax.rung("maximum of each row", amax_v1, amax_kernel_v1)

# %% [markdown]
# Now the bug: the author copied the sum, `other=0.0` included. With random numbers of both signs every test passes, since
# the maximum of a row is positive anyway. It fails for rows whose elements are all negative, and only if the row's length
# is no multiple of the block. The lesson in it: choose test data for which a wrong kernel *can* give a wrong answer.


# %%
@triton.jit
def amax_kernel_v2(x_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        x = tl.load(x_ptr + row * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc = tl.maximum(acc, x)
    tl.store(out_ptr + row, tl.max(acc, axis=0))


def amax_v2(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    out = torch.empty(M, device=x.device, dtype=x.dtype)
    amax_kernel_v2[(M,)](x, out, N, BLOCK_N=128)
    return out


amax.bug("the neutral element of another operation", amax_v2, amax_kernel_v2, 4, 200)

# %% [markdown]
# ## Debugging a kernel
#
# There is no debugger for a GPU kernel worth the name. What works, in this order:
#
# 1. **Shrink.** The smallest shape that fails: 4 x 8, a block that does not divide it. Most bugs fit into one screen.
# 2. **Look where it is wrong, not by how much.** Only the last block: a mask. Everything but row 0: a stride. Every second
#    element: a stride or a dtype. Only for large tensors: a 32-bit offset. Other elements in every run: two programs
#    write the same place, or memory that nobody wrote is read.
# 3. **Run it in the interpreter**, `TRITON_INTERPRET=1`: the kernel is Python then, one program after another. `print` works
#    in it, `breakpoint()` too, and with guarded tensors an access outside raises.
# 4. **Ask the kernel.** `tl.static_print(x.shape)` prints while compiling; `tl.device_print("x", x)` prints from a GPU, from
#    every program, so launch few; `tl.device_assert(cond, "why")` stops the kernel where `TRITON_DEBUG=1` is set.
# 5. **Compare with fp64**, not with another fp32 result, and allow what torch itself is off by.
#
# Try the second rule on this one. The two strides of `y` have changed places. A test whose `y` is one number, or `ones`,
# passes.


# %%
@triton.jit
def mul_kernel_v5(x_ptr, y_ptr, out_ptr, M, N, xm, xn, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * xm + offs_n * xn, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + offs_m * yn + offs_n * ym, mask=mask).to(tl.float32)
    tl.store(out_ptr + offs_m * N + offs_n, (x * y).to(out_ptr.dtype.element_ty), mask=mask)


def mul_v5(x: torch.Tensor, y: torch.Tensor, BLOCK_M: int = 4, BLOCK_N: int = 256, num_warps: int = 4) -> torch.Tensor:
    x, y = torch.broadcast_tensors(x, y)
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    (M, N), strides = x.shape, (*x.stride(), *y.stride())
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))
    mul_kernel_v5[grid](x, y, out, M, N, *strides, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return out


mul.bug("strides in the wrong order", mul_v5, mul_kernel_v5, 6, 4)

# %% [markdown]
# Element [0, 0] is right and [0, 1] is not: along a row `y` does not move. In column 0 row m took `y[m]`, and rows 4 and 5
# read behind its end. A kernel that multiplied by the wrong number everywhere would have been wrong at [0, 0] as well.
#
# ## Errors are part of an operation
#
# A kernel checks nothing. Give it a `y` of 5 numbers for a matrix of 6 columns, and it reads one number that belongs to
# somebody else; give it fp64, and it silently computes in fp32. What is not checked in the launcher is a wrong result
# later. A useful message says which op, which argument, what was given and what is allowed:

# %%
for call in (
    lambda: torch.ops.tt.mul(torch.randn(4, 6), torch.randn(5)),
    lambda: torch.ops.tt.mul(torch.randn(4, 6), torch.ones(6, dtype=torch.bool)),
    lambda: torch.ops.tt.masked_fill(torch.zeros(3, dtype=torch.float16), torch.ones(3, dtype=torch.bool), -1e9),
    lambda: torch.ops.tt.gelu(torch.randn(3), "fast"),
):
    try:
        call()
    except (ValueError, TypeError) as error:
        lesson.say(f"* `{type(error).__name__}: {error}`")
    else:
        raise AssertionError("a wrong call passed")

# %% [markdown]
# ## Registering the operator
#
# As in lesson 1: schema, kernel, fake, gradient. Two things are new. The fake must know the shape of the result, which is
# that of the broadcast. And the gradient of what was broadcast is a *sum*: each element of the row `y` was used M times,
# so it gets M contributions. A broadcast in the forward is a reduction in the backward, and the other way round: the
# gradient of a mean is one number, broadcast. `sum_to_size` adds up what was expanded.


# %%
def fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.new_empty(torch.broadcast_shapes(x.shape, y.shape))


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = ctx.saved_tensors
    product = torch.ops.tt_lesson.mul  # its own gradient is made of products, too
    return product(dout, y).sum_to_size(x.shape), product(dout, x).sum_to_size(y.shape)


op = mul.register(
    "mul(Tensor x, Tensor y) -> Tensor",
    mul_v4,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    shipped="mul",
)


def mean_context(ctx, inputs, output) -> None:
    ctx.shape = inputs[0].shape


def mean_backward(ctx, dout: torch.Tensor) -> torch.Tensor:
    return (dout / ctx.shape[-1]).unsqueeze(-1).expand(ctx.shape)  # stride 0 along the row


mean.register(
    "mean(Tensor x) -> Tensor",
    mean_v3,
    fake=lambda x: x.new_empty(x.shape[:-1]),
    setup_context=mean_context,
    backward=mean_backward,
    shipped="mean",
    options={"dim": [-1]},
    exact=False,  # the shipped op adds in another order
)

# %% [markdown]
# ## Autotuning: the shape of a tile
#
# A tile of 1024 numbers may be one row of 1024 or eight of 128. Wide tiles use each cache line of `x` whole; tall ones use
# each number of `y` more often. The table says how much of that matters.

# %%
shapes = [(1, 1024), (1, 2048), (4, 256), (8, 128), (32, 32), (64, 16), (4, 1024), (8, 512)]
mul.autotune(mul_v4, [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4 if m * n <= 1024 else 8} for m, n in shapes])
row, square, tall = (
    lesson.figure("mul, autotuning", f"BLOCK_M={m}, BLOCK_N={n}, num_warps=4", "us")
    for m, n in ((1, 1024), (32, 32), (64, 16))
)
lesson.say(
    f"One row of 1024: {row:.0f} us. 32 rows of 32, a cache line each: {square:.0f} us. 64 rows of 16, half a line each:"
    f" {tall:.0f} us. From 128 columns on the shape hardly matters; narrow tiles cost up to {100 * tall / row:.0f} % of the time."
)

# %% [markdown]
# ## Into a model
#
# The chain once more, with our op in the place of the multiplication. In the graph it is one node between torch's own:
# `torch.compile` fuses the addition and the relu, and stops at our node: four passes over memory, where one fused kernel
# needs two. A registered op in the middle of an element-wise chain costs more than it gains. The shipped ops show
# their kernels to the compiler, which launches them without Python in between, but cannot fuse them either.


# %%
def model_with(mul_op):
    def model(x, scale, shift):
        return torch.relu(mul_op(x, scale) + shift)

    return model


lesson.compiled(
    "model",
    make=lambda m, n: (lesson.randn(m, n), lesson.randn(n), lesson.randn(n)),
    ours=model_with(op),
    eager=model_with(torch.mul),
    others={"torch.ops.tt.mul, compiled": model_with(torch.ops.tt.mul), "one kernel of ours": chain_v1},
    node="tt_lesson.mul",
    check=(33, 65),
    timed=lesson.size((2048, 2048), (8192, 8192)),
    bytes=lambda x, scale, shift: 2 * x.numel() * x.element_size() + 2 * scale.numel() * scale.element_size(),
    title="relu(x * scale + shift)",
)
with_ours, without = lesson.figure("model", "ours, compiled", "us"), lesson.figure("model", "torch, compiled", "us")
lesson.say(
    f"Compiled with our node in the middle: {with_ours:.0f} us, {with_ours / without:.2f} times as long as compiled from plain"
    f" torch, {without:.0f} us; one kernel by hand: {lesson.figure('model', 'one kernel of ours', 'us'):.0f} us."
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: leaky relu, with `tl.where`.
# * `ex2`: add a column to a matrix: broadcasting along the other dimension.
# * `ex3`: the minimum of each row, with the right neutral element.
# * `ex4`: a kernel with a bug in it. Find it.
# * `ex5`: a launcher that refuses what its kernel cannot do.
#
# ## Pitfalls
#
# * `other=` is the neutral element of the *operation*: 0 for sums, -inf for maxima, 1 for products. Leave it out, and
#   masked lanes hold anything.
# * `x / 0` and `exp(1000)` in a masked lane are harmless as long as they stay there; a reduction brings them in.
# * `expand` costs nothing, `expand(...).contiguous()` a pass over memory; the gradient of an expanded tensor is a sum.
# * Accumulate in fp32, whatever the dtype: a bf16 sum stops growing at 256 times its addends.
# * `tl.maximum` ignores NaN, as `torch.fmax` does; torch.maximum does not. `propagate_nan=tl.PropagateNan.ALL` is torch's.
# * A reduction of few, long rows needs more programs than rows.
# * One operation alone is rarely worth a kernel. A chain is.
#
# Next: lesson 4, matrix products, in which arithmetic decides at last.

# %%
lesson.finish()
