# ---
# lesson:
#   number: 4
#   slug: matrix_operations
#   title: "Matrix operations: from naive to a persistent TMA kernel"
#   level: intermediate
#   minutes: 75
#   prerequisites: [1, 2, 3]
#   ops: [matmul, bmm, linear]
#   concepts: [tile, arithmetic intensity, tensor cores, L2 reuse, software pipelining, TMA, persistent kernel, batch]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 4. Matrix operations
#
# At the end of this lesson you have taken a matrix product from a direct transcription of its formula to a kernel that
# keeps the tensor cores of an H200 as busy as NVIDIA's own library does on large matrices, in seven steps, and you know
# what each step was for. Then the same for batches and transposed operands, and what changes when there are only a few rows.

# %%
import itertools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_tutorial.lesson import Lesson

lesson = Lesson(4)

# %%
lesson.predict(
    f"""
    Two 4096 x 4096 matrices of fp16 are 32 MiB each. The formula reads a row of A and a column of B for every element of
    the result: 2 x 4096 numbers, 16.8 million times. If each of those reads went to memory, how long would they take at
    {lesson.limit():.1f} TB a second? And how long would the arithmetic take, at the {lesson.limit("matmul_tflops"):.0f} TFLOP/s
    that a tensor-core kernel can sustain?
    """
)

# %% [markdown]
# ## The reference, and what it must move
#
# `out[m, n] = sum over k of a[m, k] * b[k, n]`. That is 2 M N K operations, and at least M K + K N elements must be read
# and M N written. For M = N = K = 4096 in fp16: 137 billion operations on 101 MB, 1365 operations a byte. This ratio is
# the *arithmetic intensity*. An H200 can do some 160 operations in the time in which it moves a byte, so this product is
# *compute-bound*: what counts is the tensor cores' time, if only each byte from memory is used often enough.
#
# Everything below is about those two words, *often enough*: the matrices themselves are read once, but the programs of a
# kernel together read far more, and what they read must come from somewhere nearer than memory.


# %%
def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def make(M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    return lesson.randn(M, K, dtype=torch.float16), lesson.randn(K, N, dtype=torch.float16)


def flops(a: torch.Tensor, b: torch.Tensor) -> int:
    return 2 * a.numel() * b.shape[-1]


def moved(a: torch.Tensor, b: torch.Tensor) -> int:
    return 2 * (a.numel() + b.numel() + a.numel() // a.shape[-1] * b.shape[-1])


matmul = lesson.problem(
    "matmul",
    reference=reference,
    make=make,
    check=[(12, 40, 72), (1, 8, 16), (4, 1032, 16), (130, 8, 16)],
    timed=[(n, n, n) for n in lesson.size((512, 1024), (1024, 2048, 4096))],
    bytes=moved,
    flops=flops,
)
matmul.baseline("cuBLAS (torch)")

# %% [markdown]
# ## Which program touches which address
#
# The plan, at a toy size: a 32 x 32 result, cut into four *tiles* of 16 x 16, one for each program. A program needs a strip
# of 16 rows of A and a strip of 16 columns of B; it walks along both, 16 steps of K at a time, and multiplies the blocks. A
# strip of A serves all tiles in its row, so A is read twice here, and so is B.


# %%
@triton.jit
def toy_kernel(a_ptr, b_ptr, out_ptr, N, K, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        offs_k = k + tl.arange(0, BLOCK)  # (BLOCK,)
        a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :])  # rows of A
        b = tl.load(b_ptr + offs_k[:, None] * N + offs_n[None, :])  # columns of B
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(tl.float16))


def toy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    toy_kernel[(M // 16, N // 16)](a, b, out, N, K, BLOCK=16)
    return out


matmul.picture(toy, 32, 32, 48, title="A (32 x 48) times B (48 x 32), in tiles of 16 x 16")

# %% [markdown]
# ## Rung 1: the formula
#
# First without tiles. One program computes 256 neighbouring elements of one row of the result. It walks down K: one number
# of A, times 256 numbers of B. The sum is kept in fp32, whatever the inputs are: 4096 additions in fp16 would lose most of
# the digits.
#
# `a_ptrs` and `b_ptrs` use the *strides* of the matrices: element `[m, k]` of A lies `m * stride_am + k * stride_ak`
# elements behind its first. So a transposed matrix needs no copy; its strides are merely exchanged.


# %%
@triton.jit
def matmul_kernel_v1(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    a_ptrs = a_ptr + pid_m * stride_am
    b_ptrs = b_ptr + offs_n * stride_bn  # (BLOCK_N,)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for _k in range(K):
        a = tl.load(a_ptrs).to(tl.float32)
        b = tl.load(b_ptrs, mask=offs_n < N, other=0.0)
        acc += a * b
        a_ptrs += stride_ak
        b_ptrs += stride_bk
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid_m * N + offs_n, out, mask=offs_n < N)


def matmul_v1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    sizes = (M, N, K, *a.stride(), *b.stride())
    grid = (M, triton.cdiv(N, 256))
    blocks = {"BLOCK_N": 256}
    matmul_kernel_v1[grid](a, b, out, *sizes, **blocks, num_warps=8, num_stages=1)
    return out


matmul.rung("naive", matmul_v1, matmul_kernel_v1)

# %% [markdown]
# Each program reads a strip of B 256 columns wide and 4096 rows long, 2 MiB, and uses every number of it once. All 65536
# programs together read 137 GB, from the L2 cache for the most part. And the arithmetic is done by the ordinary fp32
# units: the tensor cores stand idle.
#
# ## Rung 2: tiles
#
# Now the plan from above, with tiles of 128 x 128. For each step of K a program loads 128 x 64 of A and 64 x 128 of B, and
# `tl.dot` multiplies the two blocks on the tensor cores, which take matrices, not numbers. Each loaded number is used 128
# times. What all programs read together shrinks from 137 GB to 2.1 GB.
#
# The sums of the tile live in registers, and that is the limit: 128 x 128 sums of 4 bytes are 64 KiB, a quarter of an SM's
# registers. The masks put zeros where the tile hangs over an edge; zeros add nothing to the sums.


# %%
@triton.jit
def matmul_kernel_v2(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak  # (BLOCK_M, BLOCK_K)
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn  # (BLOCK_K, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(offs_m < M)[:, None] & (offs_k < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def matmul_v2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    sizes = (M, N, K, *a.stride(), *b.stride())
    grid = (triton.cdiv(M, 128), triton.cdiv(N, 128))
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    matmul_kernel_v2[grid](a, b, out, *sizes, **blocks, num_warps=8, num_stages=1)
    return out


matmul.rung("tiles", matmul_v2, matmul_kernel_v2, note="128 x 128 elements a program, on tensor cores")

# %%
lesson.say(
    f"""
    Tiled against naive at 4096: {lesson.figure("matmul", "naive", "us") / lesson.figure("matmul", "tiles", "us"):.0f} times
    as fast. Older tutorials promise two to five times. That is what tiling gains when both versions compute on the same
    units; here the tile also brings in the tensor cores, which is why the factor is another one.
    """
)

# %% [markdown]
# ## Rung 3: an order that the L2 cache likes
#
# Some 132 programs run at a time, in the order of their numbers. With a grid of tiles, program after program goes down one
# column of tiles: 32 programs share a strip of B, and each has a strip of A of its own. 132 programs in four columns need
# four strips of B and all 32 of A, 36 strips. As a block of 8 by 17 tiles they need 25.
#
# So number the tiles in groups of 8 rows: down 8 tiles, then the next column of the same 8 rows. Only the arithmetic of the
# program id changes; which tile is whose does not matter for the result. The gain grows with the matrices: what is read
# twice costs little while it is still in the 50 MiB of L2.


# %%
@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = (pid // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)  # the last group may have fewer
    in_group = pid % per_group
    return first_m + in_group % rows, in_group // rows


@triton.jit
def matmul_kernel_v3(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak  # (BLOCK_M, BLOCK_K)
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn  # (BLOCK_K, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(offs_m < M)[:, None] & (offs_k < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def matmul_v3(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    sizes = (M, N, K, *a.stride(), *b.stride())
    grid = (triton.cdiv(M, 128) * triton.cdiv(N, 128),)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    matmul_kernel_v3[grid](a, b, out, *sizes, **blocks, num_warps=8, num_stages=1)
    return out


matmul.rung("grouped order", matmul_v3, matmul_kernel_v3, note="programs that run together share strips in the L2")

# %% [markdown]
# ## Rung 4: pipelining
#
# So far a step is: load two blocks, *wait*, multiply, and again. The wait takes as long as the multiplication or longer (512
# clocks for these blocks, if the tensor cores never pause). `num_stages=3` tells the compiler to keep the loads of the next
# steps under way while it multiplies: the blocks go into shared memory asynchronously, into a ring of buffers. The
# trade-off: a stage takes 32 KiB of the 227 that an SM has, and more stages mean fewer programs on it.
#
# The second new line is a trap of this hardware. The tensor-core instruction of Hopper, wgmma, works in the background too,
# but only if the assembler can prove that nothing else touches its accumulator. If K could be 0 and the loop skipped, it
# cannot, and waits after every single instruction, with no more than an advisory, C7515. `tl.assume(K > 0)` is the proof.


# %%
@triton.jit
def matmul_kernel_v4(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    pid = tl.program_id(0).to(tl.int64)
    pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak  # (BLOCK_M, BLOCK_K)
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn  # (BLOCK_K, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(offs_m < M)[:, None] & (offs_k < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def matmul_v4(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    sizes = (M, N, K, *a.stride(), *b.stride())
    grid = (triton.cdiv(M, 128) * triton.cdiv(N, 128),)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    matmul_kernel_v4[grid](a, b, out, *sizes, **blocks, num_warps=8, num_stages=3)
    return out


matmul.rung("pipelined", matmul_v4, matmul_kernel_v4, note="loads run ahead of the tensor cores")

# %% [markdown]
# ## Rung 5: TMA
#
# Every thread still computes addresses and masks, for thousands of elements, at every step. Hopper has a unit that does
# nothing else, the *tensor memory accelerator*. It is told once, by a *descriptor*, where a matrix begins, its sizes,
# strides and the box that will be wanted; from then on one thread says "the box at row 128, column 64", and the unit
# fetches it and fills in zeros beyond the edges. So the pointers and the masks all go.
#
# The trade-off: it takes matrices whose last dimension is contiguous and whose rows begin at multiples of 16 bytes.
# Everything else must keep rung 4's kernel, and the shipped op does keep one.


# %%
@triton.jit
def matmul_kernel_v5(
    a_desc, b_desc, out_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    pid = tl.program_id(0)
    pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = a_desc.load([pid_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
        b = b_desc.load([k, pid_n * BLOCK_N])  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(a, b, acc)
    out = acc.to(out_desc.dtype)
    out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], out)


def matmul_v5(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    boxes = (a, [128, 64]), (b, [64, 128]), (out, [128, 128])
    descriptors = [TensorDescriptor.from_tensor(x, box) for x, box in boxes]
    grid = (triton.cdiv(M, 128) * triton.cdiv(N, 128),)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    matmul_kernel_v5[grid](*descriptors, M, N, K, **blocks, num_warps=8, num_stages=4)
    return out


matmul.rung("TMA", matmul_v5, matmul_kernel_v5, note="one thread asks for a box; no pointers, no masks")

# %% [markdown]
# ## Rung 6: persistent programs
#
# With one program a tile, an SM that finishes a tile writes it out, ends the program, starts the next, and waits for its
# first loads; the tensor cores pause for all that. A *persistent* kernel starts one program for each SM, and each takes tile
# after tile. `flatten=True` makes one loop of the two, so that the loads of the next tile are under way while this one is
# written.


# %%
@triton.jit
def matmul_kernel_v6(
    a_desc, b_desc, out_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([pid_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            b = b_desc.load([k, pid_n * BLOCK_N])  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
        out = acc.to(out_desc.dtype)
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], out)


def sm_count(x: torch.Tensor) -> int:
    """Number of SMs; a few where there is no GPU, so that a program gets several tiles there, too."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def matmul_v6(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    boxes = (a, [128, 64]), (b, [64, 128]), (out, [128, 128])
    descriptors = [TensorDescriptor.from_tensor(x, box) for x, box in boxes]
    grid = (min(sm_count(a), triton.cdiv(M, 128) * triton.cdiv(N, 128)),)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    matmul_kernel_v6[grid](*descriptors, M, N, K, **blocks, num_warps=8, num_stages=4)
    return out


matmul.rung("persistent", matmul_v6, matmul_kernel_v6, note="a program an SM, tile after tile")

# %% [markdown]
# ## Rung 7: a wider tile, stored in halves
#
# 128 x 256 elements a tile: the same loads feed a third more multiplications than two tiles of 128 x 128 would get. But now
# shared memory is short: a stage is 48 KiB, the tile on its way out another 64, and four stages with it do not fit into the
# 227 KiB of a program. So the tile goes out in two halves, through 32 KiB. `tl.split` takes apart a last dimension of size
# two; the reshape and the permutation put the two halves of the columns there, all in registers.


# %%
@triton.jit
def matmul_kernel_v7(
    a_desc, b_desc, out_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([pid_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            b = b_desc.load([k, pid_n * BLOCK_N])  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))  # (BLOCK_M, BLOCK_N // 2, 2)
        left, right = tl.split(halves)
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], left.to(out_desc.dtype))
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], right.to(out_desc.dtype))


def matmul_v7(
    a: torch.Tensor, b: torch.Tensor, BLOCK_M: int = 128, BLOCK_N: int = 256, num_stages: int = 4, GROUP_M: int = 8
) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    boxes = (a, [BLOCK_M, 64]), (b, [64, BLOCK_N]), (out, [BLOCK_M, BLOCK_N // 2])
    descriptors = [TensorDescriptor.from_tensor(x, box) for x, box in boxes]
    grid = (min(sm_count(a), triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)),)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": 64, "GROUP_M": GROUP_M}
    matmul_kernel_v7[grid](*descriptors, M, N, K, **blocks, num_warps=8, num_stages=num_stages)
    return out


matmul.rung("128 x 256, halves", matmul_v7, matmul_kernel_v7, note="more reuse; the store pays for the fourth stage")
matmul.ladder("fp16 matrix product")

# %%
last, cublas = lesson.figure("matmul", "128 x 256, halves", "us"), lesson.figure("matmul", "cuBLAS (torch)", "us")
lesson.answer(
    f"""
    2 x 4096 numbers of 2 bytes, 4096 x 4096 times, are 275 GB: {275000 / lesson.limit():.0f} us from memory. The arithmetic
    takes {137439 / lesson.limit("matmul_tflops"):.0f} us at what this GPU sustains. Hundreds of times more reading than
    computing, unless each number read is used hundreds of times: that is all that tiles are for. Measured: naive
    {lesson.figure("matmul", "naive", "us"):.0f} us, the last rung {last:.0f} us, cuBLAS {cublas:.0f} us, so the last rung
    runs at {cublas / last:.2f} times cuBLAS's rate.
    """
)

# %%
steps = ("tiles", "grouped order", "pipelined", "TMA", "persistent", "128 x 256, halves")
gains = [
    lesson.figure("matmul", before, "us") / lesson.figure("matmul", after, "us")
    for before, after in itertools.pairwise(steps)
]
side = lesson.size(512, 1024)  # the smallest
small, cublas_small, plain_small = (
    lesson.figure("matmul", name, "us", f"{side}x{side}x{side}")
    for name in ("128 x 256, halves", "cuBLAS (torch)", "TMA")
)
lesson.say(
    f"""
    What each step gained at the largest size: grouped order {gains[0]:.2f} times, pipelining {gains[1]:.2f}, TMA
    {gains[2]:.2f}, persistence {gains[3]:.2f}, the wide tile {gains[4]:.2f}. So persistence by itself gained next to nothing:
    a tile is many steps long (64 for K = 4096), beside which starting and storing it are little. It is there for the wide
    tile, whose store is twice as long.

    And a fast kernel at one size is not one at another. At {side} the last rung takes {small:.1f} us, rung 5
    {plain_small:.1f} us, and cuBLAS {cublas_small:.1f} us: {small / cublas_small:.1f} times as fast as the one,
    {plain_small / cublas_small:.1f} times as fast as the other. A result of {side} x {side} is {side // 128 * (side // 256)}
    tiles of 128 x 256, for 132 SMs. A library chooses tiles by size, and so does the shipped op.
    """
)

# %% [markdown]
# ## A bug on purpose
#
# Persistence has a bug of its own: an accumulator that is set to zero once, before the loop over tiles. The first tile of
# each program is right. The second starts from the first one's sums. With fewer tiles than SMs, and so with every small
# test on an H200, each program has one tile and nothing is wrong. (That is why `sm_count` is 3 in this lesson's tests on a
# CPU: a test must give some program a second tile.)


# %%
@triton.jit
def matmul_kernel_v8(
    a_desc, b_desc, out_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([pid_m * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            b = b_desc.load([k, pid_n * BLOCK_N])  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))  # (BLOCK_M, BLOCK_N // 2, 2)
        left, right = tl.split(halves)
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], left.to(out_desc.dtype))
        out_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], right.to(out_desc.dtype))


def matmul_v8(
    a: torch.Tensor, b: torch.Tensor, BLOCK_M: int = 128, BLOCK_N: int = 256, num_stages: int = 4, GROUP_M: int = 8
) -> torch.Tensor:
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    boxes = (a, [BLOCK_M, 64]), (b, [64, BLOCK_N]), (out, [BLOCK_M, BLOCK_N // 2])
    descriptors = [TensorDescriptor.from_tensor(x, box) for x, box in boxes]
    grid = (min(sm_count(a), triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)),)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": 64, "GROUP_M": GROUP_M}
    matmul_kernel_v8[grid](*descriptors, M, N, K, **blocks, num_warps=8, num_stages=num_stages)
    return out


matmul.bug("the sums are not cleared", matmul_v8, matmul_kernel_v8, 300, 264, 64)

# %% [markdown]
# ## Transposed operands
#
# A linear layer's weight is stored as (N, K), so its product is `x @ weight.t()`; the gradients are `dout @ weight` and
# `x.t() @ dout`. Does a transposed operand have to be copied into order first? The kernel of rung 4 takes strides, and its
# loads stay *coalesced* (lesson 2) as long as one of the two strides is 1, since Triton lays its threads along that one.
# TMA takes the matrix as it lies in memory; the box is turned on its way into the tensor cores. Here are all four layouts,
# through one kernel with strides, and a copy first for comparison.

# %%
SIDE = lesson.size(1024, 4096) if lesson.gpu else 64


def layout(which: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = make(SIDE, SIDE, SIDE)
    return a.t() if which[0] == "T" else a, b.t() if which[1] == "T" else b


def product_of(which: str, copy: bool = False):
    def calls():
        a, b = layout(which)
        if copy:
            return lambda: matmul_v4(a.contiguous(), b.contiguous())
        return lambda: matmul_v4(a, b)

    return calls


for which in ("NN", "NT", "TN", "TT"):
    assert matmul.wrong(matmul_v4, *layout(which)) is None, which
    names = {"NN": "a @ b", "NT": "a @ b.t()", "TN": "a.t() @ b", "TT": "a.t() @ b.t()"}
    work = {"bytes": 6 * SIDE**2, "flops": 2 * SIDE**3}
    lesson.measure("layouts", names[which], product_of(which), case=str(SIDE), **work)
lesson.measure("layouts", "a.t() @ b.t(), copied first", product_of("TT", copy=True), case=str(SIDE), **work)
lesson.table("layouts", "Rung 4 on transposed operands")
plain, turned, both, copied = (
    lesson.figure("layouts", name, "us")
    for name in ("a @ b", "a.t() @ b", "a.t() @ b.t()", "a.t() @ b.t(), copied first")
)
lesson.say(
    f"""
    Transposed operands take up to {100 * (turned / plain - 1):.0f} % more time here; two copies first take
    {copied / both:.2f} times the time of none.
    """
)

# %% [markdown]
# ## Batches
#
# `bmm` multiplies the matrices of a batch in pairs. The obvious way is a loop in Python: one launch a pair. A pair of 512 x
# 512 results has 16 tiles, so 16 of 132 SMs work. In one launch, with the batch as a second dimension of the grid, the
# tiles of all pairs fill the GPU together. In the kernel that is two more strides: a batch, too, is only an offset.

# %%
batched = lesson.problem(
    "bmm",
    reference=lambda a, b: a @ b,
    make=lambda B, M, N, K: (lesson.randn(B, M, K, dtype=torch.float16), lesson.randn(B, K, N, dtype=torch.float16)),
    check=[(3, 40, 72, 80), (2, 1, 8, 16), (1, 130, 136, 64)],
    timed=[(lesson.size(8, 64), 512, 512, 128)],
    bytes=lambda a, b: 2 * (a.numel() + b.numel() + a.shape[0] * a.shape[1] * b.shape[2]),
    flops=lambda a, b: 2 * a.numel() * b.shape[2],
)
batched.baseline("cuBLAS (torch)")


# %%
def bmm_v1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (B, M, K), N = a.shape, b.shape[2]
    out = a.new_empty(B, M, N)
    sizes = (M, N, K, *a.stride()[1:], *b.stride()[1:])
    grid = (triton.cdiv(M, 128) * triton.cdiv(N, 128),)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    for i in range(B):
        matmul_kernel_v4[grid](a[i], b[i], out[i], *sizes, **blocks, num_warps=8, num_stages=3)
    return out


batched.rung("a launch a matrix", bmm_v1, matmul_kernel_v4)


# %%
@triton.jit
def matmul_kernel_v9(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_ab, stride_am, stride_ak, stride_bb, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    batch = tl.program_id(1).to(tl.int64)
    a_ptr += batch * stride_ab
    b_ptr += batch * stride_bb
    out_ptr += batch * M * N
    pid = tl.program_id(0).to(tl.int64)
    pid_m, pid_n = tile_of(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak  # (BLOCK_M, BLOCK_K)
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn  # (BLOCK_K, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(offs_m < M)[:, None] & (offs_k < K - k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def bmm_v2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (B, M, K), N = a.shape, b.shape[2]
    out = a.new_empty(B, M, N)
    sizes = (M, N, K, *a.stride(), *b.stride())
    grid = (triton.cdiv(M, 128) * triton.cdiv(N, 128), B)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    matmul_kernel_v9[grid](a, b, out, *sizes, **blocks, num_warps=8, num_stages=3)
    return out


batched.rung("the batch in the grid", bmm_v2, matmul_kernel_v9, note="all pairs in one launch")
batched.ladder("Batched product")

# %%
loop, batch, cublas = (
    lesson.figure("bmm", name, "us") for name in ("a launch a matrix", "the batch in the grid", "cuBLAS (torch)")
)
lesson.say(
    f"""
    One launch instead of a loop: {loop / batch:.0f} times as fast. It is {cublas / batch:.2f} times as fast as cuBLAS: with K
    = 128 memory decides, and rung 4's tile spends most of its two steps on starting and storing, with nothing under way
    meanwhile.
    """
)

# %% [markdown]
# ## Few rows: when a matrix product is memory-bound
#
# A language model that generates text multiplies one row, or a few, by each of its weights. A weight of 14336 x 4096 is
# 117 MB in fp16; with M rows there are 2 M operations for each of its elements. Below some 160 rows, reading the weight
# takes longer than multiplying by it, whatever the tensor cores can do: time hardly depends on M, and the limit is again
# the copy of lesson 1. So the shipped op has other kernels and tiles there: for one row no tensor cores at all; up to 64
# rows one block of rows, short blocks of columns, and deep rings of buffers, so that every SM has about 100 KiB under way;
# and where there are still too few tiles for all SMs, several programs divide K among themselves (*split-K*) and a second
# kernel adds their sums, always in the same order.


# %%
def few_rows(M: int, function):
    def calls():
        x, weight = lesson.randn(M, 4096, dtype=torch.float16), lesson.randn(14336, 4096, dtype=torch.float16)
        return lambda: function(x, weight)

    return calls


for M in (1, 16, 64, 256, 1024):
    work = {"bytes": 2 * (M * 4096 + 14336 * 4096 + M * 14336), "flops": 2 * M * 4096 * 14336}
    for name, function in (
        ("cuBLAS (torch)", torch.nn.functional.linear),
        ("torch.ops.tt.linear", torch.ops.tt.linear),
    ):
        plain = name != "torch.ops.tt.linear"
        lesson.measure("few rows", name, few_rows(M, function), case=str(M), baseline=plain, **work)
lesson.table("few rows", "x (M, 4096) times a weight of 14336 x 4096")
lesson.chart("few rows", "Rows times a 14336 x 4096 weight", measure="us", kind="lines", xlabel="rows")
lines = ["| rows | cuBLAS | `torch.ops.tt.linear` | cuBLAS's time / ours |", "|---|---|---|---|"]
for M in (1, 16, 64, 256, 1024):
    theirs, ours = (lesson.figure("few rows", name, "us", str(M)) for name in ("cuBLAS (torch)", "torch.ops.tt.linear"))
    lines.append(f"| {M} | {theirs:.1f} us | {ours:.1f} us | {theirs / ours:.2f} |")
lesson.say("\n".join(lines))
ratio = (theirs / ours).value  # at the most rows
if ratio is not None:
    lesson.say(
        f"With the most rows arithmetic decides again, and there the shipped op is"
        f" {'behind cuBLAS' if ratio < 0.97 else 'level with cuBLAS' if ratio < 1.03 else 'ahead of cuBLAS'}, at {ratio:.2f}"
        f" times its rate."
    )

# %% [markdown]
# ## Registering the operator
#
# As in lesson 1: schema, kernel, fake, gradient. The gradients of a product are products: `dout @ b.t()` and
# `a.t() @ dout`. Both are the op itself on transposed operands, which need no copy. The launcher decides: TMA where both
# matrices allow it, the kernel with strides where not.


# %%
def launcher(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    hopper = not a.is_cuda or torch.cuda.get_device_capability(a.device)[0] >= 9
    boxes = all(x.stride(1) == 1 and x.stride(0) % 8 == 0 for x in (a, b)) and b.shape[1] % 8 == 0
    return matmul_v7(a, b) if hopper and boxes else matmul_v4(a, b)


def fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = ctx.saved_tensors
    product = torch.ops.tt_lesson.matmul
    return product(dout, b.t()), product(a.t(), dout)


op = matmul.register(
    "matmul(Tensor a, Tensor b) -> Tensor",
    launcher,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    shipped="matmul",
    exact=False,  # the shipped op may choose another tile for such small sizes, and so another order of additions
)

# %% [markdown]
# ## Autotuning
#
# The tile, the stages and the height of a group. Look at the registers: the sums of a 128 x 256 tile are 128 registers a
# thread with 8 warps. Twice the tile would need more than the 255 that a thread can have.

# %%
configs = [
    {"BLOCK_M": 128, "BLOCK_N": 256, "num_stages": 4, "GROUP_M": 8},
    {"BLOCK_M": 128, "BLOCK_N": 256, "num_stages": 3, "GROUP_M": 8},
    {"BLOCK_M": 128, "BLOCK_N": 256, "num_stages": 4, "GROUP_M": 1},
    {"BLOCK_M": 128, "BLOCK_N": 256, "num_stages": 4, "GROUP_M": 16},
    {"BLOCK_M": 256, "BLOCK_N": 128, "num_stages": 4, "GROUP_M": 8},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 5, "GROUP_M": 8},
]
matmul.autotune(matmul_v7, configs)


def tuned(m: int, n: int, stages: int, group: int):
    name = f"BLOCK_M={m}, BLOCK_N={n}, num_stages={stages}, GROUP_M={group}"
    return lesson.figure("matmul, autotuning", name, "us")


lesson.say(
    f"""
    Four stages {tuned(128, 256, 4, 8):.0f} us, three {tuned(128, 256, 3, 8):.0f} us: the fourth, for which the store was
    halved, gains nothing that could be measured. (The first line is rung 7 once more: {last:.0f} us in the ladder. That is
    how far two measurements of one kernel lie apart, so smaller differences mean nothing.) Without groups it takes
    {tuned(128, 256, 4, 1):.0f} us, with tiles of 256 x 128 {tuned(256, 128, 4, 8):.0f} us, of 128 x 128
    {tuned(128, 128, 5, 8):.0f} us.
    """
)

# %% [markdown]
# ## Into a model
#
# The two layers of a Transformer's MLP. In the graph our op stands as a node, between which torch.compile writes a kernel
# for the ReLU. The product itself it leaves to cuBLAS, unless asked to search with `mode="max-autotune"`; so all that is to
# be won beyond the product is what can be *fused* to it. `torch.ops.tt.linear` applies bias and activation to the sums
# while they are in registers, in fp32, and the hidden layer is written once instead of written, read and written again.


# %%
def mlp_with(product):
    def mlp(x, w1, w2):
        return product(torch.relu(product(x, w1)), w2)

    return mlp


def fused_mlp(x, w1, w2):
    return torch.ops.tt.linear(torch.ops.tt.linear(x, w1.t(), None, "relu"), w2.t())


def mlp_inputs(M: int, H: int, F: int) -> tuple[torch.Tensor, ...]:
    return (
        lesson.randn(M, H, dtype=torch.float16),
        lesson.randn(H, F, dtype=torch.float16) * H**-0.5,
        lesson.randn(F, H, dtype=torch.float16) * F**-0.5,
    )


lesson.compiled(
    "model",
    make=mlp_inputs,
    ours=mlp_with(op),
    eager=mlp_with(torch.matmul),
    others={"torch.ops.tt.linear, compiled": fused_mlp},
    node="tt_lesson.matmul",
    check=(40, 64, 136),
    timed=(4096, 4096, lesson.size(4096, 14336)),
    bytes=lambda x, w1, w2: 2 * (2 * x.numel() + w1.numel() + w2.numel()),
    flops=lambda x, w1, w2: 4 * x.numel() * w1.shape[1],
    tolerance=2e-3,
    title="relu(x @ w1) @ w2",
)
compiled, ours, fused = (
    lesson.figure("model", name, "us")
    for name in ("torch, compiled", "ours, compiled", "torch.ops.tt.linear, compiled")
)
lesson.say(
    f"""
    With cuBLAS {compiled:.0f} us, with our product {ours:.0f} us, with the ReLU in the product's own kernel {fused:.0f} us:
    what fusion gains beside so much arithmetic is {100 * (compiled / fused - 1):.0f} %.
    """
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: K is no multiple of the block. Keep the last step from reading the next row.
# * `ex2`: multiply by a transposed matrix without a copy.
# * `ex3`: bias and ReLU in the epilogue, in fp32, before the one rounding.
#
# ## Pitfalls
#
# * Accumulate in fp32. An fp16 accumulator is wrong in the second digit after a few thousand additions, and no error tells.
# * fp32 inputs: `tl.dot` may use TF32, with 10 bits of mantissa. Say which you want with `input_precision`; the shipped op
#   follows `torch.set_float32_matmul_precision`.
# * A mask on K belongs on both operands: a zero times whatever lies beyond (inf, NaN) is not zero.
# * Sizes that are powers of two hide wrong strides, missing masks and swapped sizes. Test with M, N and K all different.
# * `tl.assume(K > 0)` and `range(0, K, BLOCK_K)`: see rung 4. Look for C7515 in the assembler's log, not only at the result.
# * An operand that is the transpose of another product's accumulator: write that product transposed instead. Some versions
#   of Triton compile `tl.dot(tl.trans(acc), ...)` wrongly on Hopper.
# * Never time a product of zeros: fewer bits change, less power is drawn, and the clock stays higher than it ever would.
#
# Next: lesson 5, on what lies between registers and memory.

# %%
lesson.finish()
