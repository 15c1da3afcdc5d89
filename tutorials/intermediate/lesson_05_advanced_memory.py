# ---
# lesson:
#   number: 5
#   slug: advanced_memory
#   title: "Advanced memory: where a row waits"
#   level: intermediate
#   minutes: 60
#   prerequisites: [1, 2, 3]
#   ops: [softmax, log_softmax]
#   concepts: [kernel fusion, registers, spills, occupancy, L2 reuse, online softmax, eviction hints, shared memory, pipelining]
#   exercises: [ex1, ex2, ex3]
# ---

# %% [markdown]
# # Lesson 5. Advanced memory: where a row waits
#
# Softmax needs each row twice: once for its maximum and its sum, once to divide by them. Between the two the row must
# wait somewhere, and where it waits decides the speed. At the end of this lesson you can choose the place: registers,
# shared memory, the L2 cache, or (never on purpose) global memory; and you can read from the compiler's figures
# whether it will work.
#
# | place | on an H200 | its price |
# |---|---|---|
# | registers | 256 KiB for each SM | many registers a thread leave room for few threads: *occupancy* |
# | shared memory | 228 KiB for each SM | you decide what is in it, and you wait for the copies |
# | L2 cache | 50 MiB for all SMs | you may hint, but the hardware decides |
# | global memory | 141 GB | every byte costs bandwidth, which is all there is to win here |

# %%
import math

import torch
import triton
import triton.language as tl

from torch_triton_ops.launch import sm_count
from triton_tutorial.lesson import Lesson

lesson = Lesson(5)

# %%
lesson.predict(
    """
    Softmax of 4096 rows of 16384 bfloat16 numbers, written in PyTorch as one writes it on paper:
    `e = exp(x - amax(x)); e / sum(e)`. That is five kernels. One fused kernel reads each number once and writes it
    once. How many bytes do the five move for each byte of the one, and is the fused kernel faster by that much?
    """
)

# %% [markdown]
# ## The reference, and what it must move
#
# y = exp(x - max(x)) / sum(exp(x - max(x))), for each row. The maximum is subtracted because exp(89) is already
# infinite in fp32; it cancels in the quotient.
#
# Each element must be read once and written once: 2 * M * N * 2 bytes in bfloat16. Per element there are about five
# operations, far below what the GPU could do in the time: *memory-bound* again.
#
# Three baselines: `torch.softmax`, which is one kernel; the formula as it stands, which is five; and the formula given
# to `torch.compile`, which fuses it.


# %%
def reference(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=-1)


def on_paper(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return e / e.sum(dim=-1, keepdim=True)


softmax = lesson.problem(
    "softmax",
    reference=reference,
    make=lambda m, n, dtype=torch.bfloat16: (lesson.randn(m, n, dtype=dtype) * 3,),
    check=[(5, 33, torch.float32), (1, 1), (3, 2500), (2, 1024, torch.float16)],
    timed=lesson.size([(8192, 1024), (4096, 4096)], [(8192, 1024), (8192, 4096), (4096, 16384)]),
    bytes=lambda x: 2 * x.numel() * x.element_size(),
    flops=lambda x: 5 * x.numel(),
)
softmax.baseline("torch")
softmax.baseline("torch, on paper", on_paper)
softmax.baseline("torch, compiled", torch.compile(on_paper, dynamic=False))

# %% [markdown]
# ## Rung 1: three passes
#
# The formula as a kernel: a loop for the maximum, a loop for the sum, a loop for the result. A program takes one row
# and walks along it in tiles of 1024. Masked lanes get -inf: the smallest number for the maximum, and exp(-inf) = 0
# adds nothing to the sum.


# %%
@triton.jit
def softmax_kernel_v1(x_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        x = tl.load(x_ptr + row + start + offs_n, mask=start + offs_n < N, other=float("-inf")).to(tl.float32)
        m = tl.maximum(m, x)
    m = tl.max(m, axis=0)
    s = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        x = tl.load(x_ptr + row + start + offs_n, mask=start + offs_n < N, other=float("-inf")).to(tl.float32)
        s += tl.exp(x - m)
    s = tl.sum(s, axis=0)
    for start in range(0, N, BLOCK_N):
        x = tl.load(x_ptr + row + start + offs_n, mask=start + offs_n < N).to(tl.float32)
        y = tl.exp(x - m) / s
        tl.store(y_ptr + row + start + offs_n, y.to(y_ptr.dtype.element_ty), mask=start + offs_n < N)


def softmax_v1(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    softmax_kernel_v1[(M,)](x, y, N, BLOCK_N=1024, num_warps=4)
    return y


softmax.rung("three passes", softmax_v1, softmax_kernel_v1)

# %% [markdown]
# ## Rung 2: the row in registers
#
# Make the block as wide as the row, and there is no loop left: the row is loaded once, all of it stays in registers,
# and reductions combine registers. `BLOCK_N` must be a power of two, so the mask does the rest.


# %%
@triton.jit
def softmax_kernel_v2(x_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
    y = tl.exp(x - tl.max(x, axis=0))
    y = y / tl.sum(y, axis=0)
    tl.store(y_ptr + row + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def softmax_v2(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    softmax_kernel_v2[(M,)](x, y, N, BLOCK_N=triton.next_power_of_2(N), num_warps=4)
    return y


softmax.rung("the row in registers", softmax_v2, softmax_kernel_v2, note="read once")

# %% [markdown]
# Compare the pictures: the colour says how often an element is touched.

# %%
softmax.picture(
    softmax_v1, 4, 24, title="Three passes read every element three times", view="touches", name="three_passes"
)
softmax.picture(softmax_v2, 4, 24, title="The row in registers: once", view="touches", name="once")

# %% [markdown]
# ## Rung 3: enough threads for the row
#
# Look at the registers of rung 2. With 16384 elements on 4 warps, each of 128 threads holds 128 of them, as fp32: 128
# registers, and more for addresses and results. An SM has 65536 registers, so few such programs fit on it at a time, and
# each of them first waits for its whole row, then computes, then stores. A thread may have 255 registers. On 2 warps a
# row of 16384 needs more, and the rest is *spilled*: stored to local memory, which is global memory behind a cache, and
# loaded again. The row then waits where it should not; the text below the autotuning table says what that costs.
#
# The cure is more threads: 16 elements for each. A program has at most 32 warps.


# %%
@triton.jit
def softmax_kernel_v3(x_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
    y = tl.exp(x - tl.max(x, axis=0))
    y = y / tl.sum(y, axis=0)
    tl.store(y_ptr + row + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def softmax_v3(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    num_warps = max(1, min(32, BLOCK_N // 512))
    softmax_kernel_v3[(M,)](x, y, N, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return y


softmax.rung("16 elements a thread", softmax_v3, softmax_kernel_v3, note="more threads for longer rows")

# %% [markdown]
# ## Rung 4: short rows share a program
#
# A row of 100 elements keeps a warp busy for some nanoseconds, and starting a program costs as much. Let a program take
# `BLOCK_M` rows: the block becomes a matrix, and the reductions go along its second axis. One warp for 2048 elements:
# its reductions are shuffles within the warp, and no thread waits for another warp.


# %%
@triton.jit
def softmax_kernel_v4(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs = offs_m[:, None] * N + offs_n[None, :]  # (BLOCK_M, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    x = tl.load(x_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
    y = tl.exp(x - tl.max(x, axis=1)[:, None])
    y = y / tl.sum(y, axis=1)[:, None]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def softmax_v4(x: torch.Tensor, BLOCK_M: int = 0, num_warps: int = 0) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_M = BLOCK_M or max(1, min(64, 2048 // BLOCK_N))
    num_warps = num_warps or max(1, min(32, BLOCK_N // 512))
    softmax_kernel_v4[(triton.cdiv(M, BLOCK_M),)](x, y, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return y


softmax.rung("short rows share a program", softmax_v4, softmax_kernel_v4, note="a block of rows")
softmax.ladder("Softmax", xlabel="rows x elements of a row")

# %% [markdown]
# The sizes above are too long to show what sharing is worth: at 1024 elements a program takes two rows, and from 2048 on
# one. So here are rows of 128.

# %%
SHORT = lesson.size((2**15, 128), (2**19, 128))


def short_rows(function):
    def calls():
        x = softmax.make(*SHORT)[0]
        return lambda: function(x)

    return calls


for name, function in (("torch", reference), ("a row a program", softmax_v3), ("16 rows a program", softmax_v4)):
    lesson.measure("short rows", name, short_rows(function), 4 * SHORT[0] * SHORT[1], baseline=name == "torch")
lesson.table("short rows", f"Softmax, {SHORT[0]} rows of {SHORT[1]}")
alone, shared = (lesson.figure("short rows", name, "us") for name in ("a row a program", "16 rows a program"))
if alone:
    lesson.say(
        f"A row a program {alone:.0f} us, sixteen rows a program {shared:.0f} us: {alone / shared:.1f} times as fast."
    )

# %%
lines = [
    "| rows | torch.softmax | compiled formula | ours | faster than torch | than the compiler |",
    "|---|---|---|---|---|---|",
]
for label in softmax.timed:
    torchs, compiled, ours = (
        lesson.figure("softmax", name, "us", label)
        for name in ("torch", "torch, compiled", "short rows share a program")
    )
    lines.append(
        f"| {label} | {torchs:.1f} us | {compiled:.1f} us | {ours:.1f} us | {torchs / ours:.2f} | {compiled / ours:.2f} |"
    )
lesson.say("\n".join(lines))
fused, paper = (lesson.figure("softmax", name, "us") for name in ("short rows share a program", "torch, on paper"))
share = 4 * lesson.figure("softmax", "torch, on paper", "fraction")
middle = lesson.size("4096x4096", "8192x4096")
near, near_fused = (
    lesson.figure("softmax", name, "us", middle) for name in ("three passes", "short rows share a program")
)
three = lesson.figure("softmax", "three passes", "us")
lesson.answer(
    f"""
    `amax` reads x; the subtraction reads and writes; `exp` reads and writes; `sum` reads; the division reads and writes: 8
    against 2, so four times the bytes. Measured: {paper:.0f} us on paper, {fused:.0f} us fused, {paper / fused:.1f}
    times as long. The rest is not fusion: torch's five kernels, most of which broadcast or reduce, run at
    {100 * share:.0f} % of the limit.

    Three passes in *one* kernel have twice the fused kernel's bytes, as long as every pass goes to memory. In rows of 4096, 8
    KB each, they take {near / near_fused:.2f} times the fused time: the row is still in a cache when its program comes back
    to it. In rows of 16384, 32 KB each, {three / fused:.2f} times: with 32 registers a thread 16 programs share an SM, so
    2112 rows are under way at once, 69 MB, and the L2 holds 50 MiB. Reading again is cheap while the row is near; how near
    depends on how many rows are under way. That is the second half of this lesson.
    """
)

# %% [markdown]
# ## Occupancy
#
# An SM hides the wait for memory by having other warps to run. How many it can hold is a division:
#
# * 64 warps at most, 32 programs at most;
# * 65536 registers: a warp takes 32 times the registers of a thread, rounded up to 256;
# * 228 KiB of shared memory, of which each program takes 1 KiB besides its own.
#
# The smallest of these decides. What counts in the end is bytes *in flight*: to move 4 TB/s with a latency of some 700 ns,
# 2.8 MB must be under way at any time, 21 KB for each SM. A program of few, fat threads can have as many bytes in flight
# as many thin ones. So occupancy is a means: too low is a sure sign of trouble, while the highest is rarely the best.


# %%
def programs_per_sm(registers: int, num_warps: int, shared: int = 0) -> int:
    per_warp = math.ceil(registers * 32 / 256) * 256
    return min(32, 64 // num_warps, 65536 // (per_warp * num_warps), 228 * 1024 // (shared + 1024))


# %% [markdown]
# ## The autotuning table
#
# The same kernel with 2 to 32 warps a row. Few warps: many registers a thread, at last spills. Many warps: few elements for
# each, and reductions in which 32 warps wait for each other. Which counts for more?

# %%
softmax.autotune(softmax_v4, [{"BLOCK_M": 1, "num_warps": w} for w in (32, 16, 8, 4, 2)])


def occupancy_line(warps: int) -> str:
    name = f"BLOCK_M=1, num_warps={warps}"
    registers, spills, us = (lesson.figure("softmax, autotuning", name, key) for key in ("registers", "spilled", "us"))
    programs = programs_per_sm(int(registers.value), warps) if registers else 0
    room = f"{programs} programs, {programs * warps} of 64 warps" if registers else ""
    return f"| {warps} | {registers:.0f} | {spills:.0f} B | {room} | {us:.0f} us |"


lines = [occupancy_line(w) for w in (2, 4, 8, 16, 32)]
heads = ["| warps a row | registers a thread | spills | on one SM at a time | time |", "|---|---|---|---|---|"]
lesson.say("\n".join([*heads, *lines]))

# %% [markdown]
# On an H200 16 and 32 warps hardly differ: 32 warps that wait for each other cost little beside 64 warps that an SM can switch
# between. With 8 warps there are still two rows on the SM, but a quarter of the warps, and the time in which all of them
# compute or wait is time in which nothing is loaded. 4 warps are better than 8: of those programs *three* fit, and while two
# compute a third may load. With 2 warps four fit, and the spills spoil it.
#
# ## Long rows: online softmax
#
# The vocabulary of a language model has 131072 words and more. Such a row is 256 KB in bfloat16: all the registers of an
# SM, and twice them in fp32. It cannot wait there, so it has to be read twice. Not three times: maximum and sum come from
# one pass, by the *online* rule. Keep (m, s), the maximum so far and the sum of exp(x - m) so far. When a larger number
# comes, what was summed is too large by exp(m_new - m), so scale it down:
#
# m_new = max(m, x);  s = s * exp(m - m_new) + exp(x - m_new)
#
# The trade-off: a pass over memory less, an exponential an element more.
#
# Each lane of the block keeps its own (m, s); they are merged, by the same rule, at the end of the row. This one identity
# is also what makes flash attention possible (lesson 7).
#
# First rung: three passes again, for comparison. The loop over rows runs once for now: the grid has a program a row.

# %%
LONG = (1024, 131072)

long = lesson.problem(
    "long rows",
    reference=reference,
    make=lambda m, n, dtype=torch.bfloat16: (lesson.randn(m, n, dtype=dtype) * 3,),
    check=[(3, 9000, torch.float32), (1, 1), (5, 4096)],
    timed=[lesson.size((256, 131072), LONG)],
    bytes=lambda x: 2 * x.numel() * x.element_size(),
    flops=lambda x: 5 * x.numel(),
)
long.baseline("torch")
long.baseline("torch, compiled", torch.compile(on_paper, dynamic=False))
long.baseline("torch.ops.tt.softmax", lambda x: torch.ops.tt.softmax(x))


@triton.jit
def long_kernel_v1(x_ptr, y_ptr, M, N, BLOCK_N: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(pid_m, tl.int64) * N
        m = tl.full((BLOCK_N,), -3.4e38, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
            m = tl.maximum(m, x)
        top = tl.max(m, axis=0)
        for start in range(0, N, BLOCK_N):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
            s += tl.exp(x - top)
        scale = 1.0 / tl.sum(s, axis=0)
        for start in range(0, N, BLOCK_N):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N).to(tl.float32)
            y = tl.exp(x - top) * scale
            tl.store(y_ptr + row + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def long_v1(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    long_kernel_v1[(M,)](x, y, M, N, BLOCK_N=4096, num_warps=8)
    return y


long.rung("three passes", long_v1, long_kernel_v1)

# %% [markdown]
# ### Online: two passes
#
# `m` begins at -3.4e38, not at -inf: a lane that has seen nothing but -inf would compute -inf - (-inf), which is NaN.


# %%
@triton.jit
def long_kernel_v2(x_ptr, y_ptr, M, N, BLOCK_N: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(pid_m, tl.int64) * N
        m = tl.full((BLOCK_N,), -3.4e38, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, x)
            s = s * tl.exp(m - m_new) + tl.exp(x - m_new)
            m = m_new
        top = tl.max(m, axis=0)
        scale = 1.0 / tl.sum(s * tl.exp(m - top), axis=0)
        for start in range(0, N, BLOCK_N):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N).to(tl.float32)
            y = tl.exp(x - top) * scale
            tl.store(y_ptr + row + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def long_v2(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    long_kernel_v2[(M,)](x, y, M, N, BLOCK_N=4096, num_warps=8)
    return y


long.rung("online", long_v2, long_kernel_v2, note="maximum and sum in one pass")

# %%
three, online = (lesson.figure("long rows", name, "us") for name in ("three passes", "online"))
lesson.say(
    f"""
    Three passes {three:.0f} us, two {online:.0f} us: {three / online:.2f} times as fast, where the passes over memory say 4 /
    3. The third exponential is why. 3 x 134 million of them, on 132 SMs that finish 16 a clock, are about 100 us by themselves.
    """
)

# %% [markdown]
# ### What the L2 cache is worth
#
# The second pass wants the row again. Is it still in the L2 cache? First measure what that is worth: a kernel that reads
# tensors of growing size, eight times each, and nothing else.


# %%
@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCKS, REPEAT: tl.constexpr, BLOCK_N: tl.constexpr):
    pid = tl.program_id(0)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for r in range(REPEAT):  # an eighth of the tensor further each time: no L1 cache will help
        block = (pid + r * (BLOCKS // REPEAT)) % BLOCKS
        acc += tl.load(x_ptr + block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))
    tl.store(out_ptr + pid, tl.sum(acc, axis=0))


def read(x: torch.Tensor) -> torch.Tensor:
    blocks = x.numel() // 2048
    out = torch.empty(blocks, device=x.device)
    read_kernel[(blocks,)](x, out, blocks, REPEAT=8, BLOCK_N=2048, num_warps=4)
    return out


for megabytes in (8, 16, 32, 64, 128, 512):

    def reads(megabytes: int = megabytes):
        x = lesson.randn(megabytes * 2**18)
        return lambda: read(x)

    lesson.measure("L2", "read eight times", reads, bytes=8 * megabytes * 2**20, case=f"{megabytes} MiB", cached=True)

lesson.table("L2", "Reading a tensor eight times, by its size", columns=("us", "rate"))
lesson.chart(
    "L2", "Reading a tensor eight times (limit: a copy, through memory)", kind="lines", xlabel="size of the tensor"
)
near, far = (lesson.figure("L2", "read eight times", case=case) for case in ("16 MiB", "512 MiB"))
lesson.say(
    f"""
    A tensor of 16 MiB is read at {near:.1f} TB/s, one of 512 MiB at {far:.1f} TB/s: what the cache still holds comes
    {near / far:.1f} times as fast.
    """
)

# %% [markdown]
# ### Fewer rows at once, and the last tile first
#
# With a program a row, the 132 SMs of an H200 work on several hundred rows of 256 KB at a time: far more than 50 MiB, so a
# row is gone from the cache when its second pass begins. Two changes should keep it there:
#
# * a *persistent* grid: one program for each SM, which takes row after row. 132 rows of 256 KB are 34 MB, and fit;
# * the second pass goes backwards. Caches throw out what was used longest ago. Walking forwards, the second pass would
#   follow right behind the eviction; backwards, it begins with what was read last.
#
# Predict before you read on: will it be faster?


# %%
@triton.jit
def long_kernel_v3(x_ptr, y_ptr, M, N, BLOCK_N: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(pid_m, tl.int64) * N
        m = tl.full((BLOCK_N,), -3.4e38, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, x)
            s = s * tl.exp(m - m_new) + tl.exp(x - m_new)
            m = m_new
        top = tl.max(m, axis=0)
        scale = 1.0 / tl.sum(s * tl.exp(m - top), axis=0)
        for back in range(0, N, BLOCK_N):
            offs_n = last - back + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N).to(tl.float32)
            y = tl.exp(x - top) * scale
            tl.store(y_ptr + row + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def long_v3(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    grid = (min(M, sm_count(x.device)),)
    long_kernel_v3[grid](x, y, M, N, BLOCK_N=8192, num_warps=16)
    return y


long.rung("a row for each SM, backwards", long_v3, long_kernel_v3, note="what is in flight fits into L2")

# %%
alone = lesson.figure("long rows", "a row for each SM, backwards", "us")
lesson.say(
    f"""
    On an H200 it is slower: {alone:.0f} us, after {online:.0f} us. Whatever the cache now gives is lost again, because one
    program for each SM has 16 KB under way, 16 elements of 2 bytes for each of its 512 threads, and none while it computes.
    Above we counted that an SM needs 21 KB at any time.
    """
)

# %% [markdown]
# ### Shared memory: asking ahead
#
# One program for each SM has a new problem: nobody else loads while it computes. It must ask for the next tiles before it
# needs them. `tl.range(..., num_stages=3)` tells the compiler to *pipeline* the loop: loads become
# asynchronous copies into **shared memory**, two tiles ahead of the arithmetic. Two tiles of 8192 numbers of 2 bytes wait
# there: 32 KiB, in the last table's column.
#
# Triton uses shared memory by itself in three other places: for reductions between warps (a few bytes), to change which
# thread holds what (lesson 2's transpose), and for the operands of `tl.dot` (lesson 4).


# %%
@triton.jit
def long_kernel_v4(x_ptr, y_ptr, M, N, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(pid_m, tl.int64) * N
        m = tl.full((BLOCK_N,), -3.4e38, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, x)
            s = s * tl.exp(m - m_new) + tl.exp(x - m_new)
            m = m_new
        top = tl.max(m, axis=0)
        scale = 1.0 / tl.sum(s * tl.exp(m - top), axis=0)
        for back in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            offs_n = last - back + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N).to(tl.float32)
            y = tl.exp(x - top) * scale
            tl.store(y_ptr + row + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def long_v4(x: torch.Tensor) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    grid = (min(M, sm_count(x.device)),)
    long_kernel_v4[grid](x, y, M, N, BLOCK_N=8192, STAGES=3, num_warps=16)
    return y


long.rung("asked for two tiles ahead", long_v4, long_kernel_v4, note="loads go through shared memory, in advance")

# %% [markdown]
# ### Eviction hints
#
# A load or a store may say what it expects: `evict_last`, keep this line, it will be wanted again; `evict_first`, throw it
# out before others. Here the first pass wants its lines kept, and what the second pass reads and writes will not be
# touched again. A hint is no command, and it can cost: the table shows each combination, measured.


# %%
@triton.jit
def long_kernel_v5(
    x_ptr, y_ptr, M, N, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr
):
    offs = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for pid_m in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(pid_m, tl.int64) * N
        m = tl.full((BLOCK_N,), -3.4e38, tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            offs_n = start + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, other=float("-inf"), eviction_policy=FIRST)
            x = x.to(tl.float32)
            m_new = tl.maximum(m, x)
            s = s * tl.exp(m - m_new) + tl.exp(x - m_new)
            m = m_new
        top = tl.max(m, axis=0)
        scale = 1.0 / tl.sum(s * tl.exp(m - top), axis=0)
        for back in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            offs_n = last - back + offs
            x = tl.load(x_ptr + row + offs_n, mask=offs_n < N, eviction_policy=SECOND).to(tl.float32)
            y = (tl.exp(x - top) * scale).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + row + offs_n, y, mask=offs_n < N, eviction_policy=SECOND)


def long_v5(x: torch.Tensor, STAGES: int = 3, FIRST: str = "evict_last", SECOND: str = "evict_first") -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    grid = (min(M, sm_count(x.device)),)
    options = {"STAGES": STAGES, "FIRST": FIRST, "SECOND": SECOND}
    long_kernel_v5[grid](x, y, M, N, BLOCK_N=8192, **options, num_warps=16)
    return y


long.rung("eviction hints", long_v5, long_kernel_v5, note="keep the first pass's lines, not the second's")
long.ladder("Softmax of long rows")
lesson.table("long rows", "And the shared memory of a program", columns=("registers", "shared", "us"))
long.autotune(
    long_v5,
    [
        {"STAGES": stages, "FIRST": first, "SECOND": second}
        for stages, first, second in [
            (3, "evict_last", "evict_first"),
            (3, "evict_last", ""),
            (3, "", "evict_first"),
            (3, "", ""),
            (1, "evict_last", "evict_first"),
        ]
    ],
    title="Hints and stages, the fastest first",
)

# %%
ahead, hinted, ours = (
    lesson.figure("long rows", name, "us")
    for name in ("asked for two tiles ahead", "eviction hints", "torch.ops.tt.softmax")
)


def hints(stages: int, first: str, second: str):
    return lesson.figure("long rows, autotuning", f"STAGES={stages}, FIRST={first}, SECOND={second}", "us")


lesson.say(
    f"""
    What it all came to, on an H200. Three passes over rows of 256 KB: {three:.0f} us; two: {online:.0f} us; a row for each
    SM, backwards:
    {alone:.0f} us; two tiles ahead: {ahead:.0f} us; with hints: {hinted:.0f} us. Asking ahead mends what the persistent grid
    broke, and no more than that: the plain online kernel, with several programs on each SM, is still the fastest of ours.
    A good idea about the cache was a bad one about the work under way, and only the measurement told.

    And the hints: without asking ahead they save {100 * (1 - hints(1, "evict_last", "evict_first") / alone):.0f} % of
    what a row for each SM takes. With it, `evict_first` in the second pass saves
    {100 * (1 - hints(3, "", "evict_first") / hints(3, "", "")):.0f} %;
    `evict_last` in the first alone makes {hints(3, "evict_last", ""):.1f} us of {hints(3, "", ""):.1f} us, which is nothing.

    The shipped op takes {ours:.0f} us, {online / ours:.1f} times as fast as our best. It holds the whole row in **shared
    memory** and, where that is too small, the rest in registers, so that every byte is read once: 256 KB of a row in an SM of
    228 KiB + 256 KiB. Triton's language has no statement for "keep this tile in shared memory"; the kernel is written in
    Gluon, the layer below, in which layouts, shared memory and asynchronous copies are yours to place
    (`_softmax_fwd_shared_kernel` in `torch_triton_ops/ops/softmax.py`; lesson 9 is about Gluon).
    """
)

# %% [markdown]
# ## A bug on purpose
#
# Masked lanes need the value that changes nothing, and for softmax that is not 0. With `other=0.0` each lane behind the end
# of the row adds exp(0 - max) to the sum. In rows of a power of two there is no such lane, and every test passes. In a row of
# 2500 on a block of 4096, all results are too small by the same factor: plausible numbers that no longer sum to one.


# %%
@triton.jit
def softmax_kernel_v6(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs = offs_m[:, None] * N + offs_n[None, :]  # (BLOCK_M, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.exp(x - tl.max(x, axis=1)[:, None])
    y = y / tl.sum(y, axis=1)[:, None]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def softmax_v6(x: torch.Tensor, BLOCK_M: int = 0, num_warps: int = 0) -> torch.Tensor:
    M, N = x.shape
    y = torch.empty_like(x)
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_M = BLOCK_M or max(1, min(64, 2048 // BLOCK_N))
    num_warps = num_warps or max(1, min(32, BLOCK_N // 512))
    softmax_kernel_v6[(triton.cdiv(M, BLOCK_M),)](x, y, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps)
    return y


softmax.bug("masked lanes count", softmax_v6, softmax_kernel_v6, 3, 33, torch.float32)

# %% [markdown]
# ## Registering the operator
#
# The gradient of softmax needs its result, not its input: dx = y * (dy - sum(dy * y)). So `setup_context` saves y, and the
# input's memory may be freed. The backward is a kernel with the same shape as the forward: two rows in registers, one
# reduction, one store. As an eager formula it would be four kernels.


# %%
@triton.jit
def softmax_bwd_kernel(dy_ptr, y_ptr, dx_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs = offs_m[:, None] * N + offs_n[None, :]  # (BLOCK_M, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, axis=1)[:, None])
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def launcher(x: torch.Tensor) -> torch.Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    return (softmax_v4(rows) if rows.shape[1] <= 16384 else long_v2(rows)).view(x.shape)  # the fastest as measured


def fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
    (y,) = ctx.saved_tensors
    return torch.ops.tt_lesson.softmax_bwd(dy.contiguous(), y)


@torch.library.custom_op("tt_lesson::softmax_bwd", mutates_args=())
def softmax_bwd(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    M, N = y.numel() // y.shape[-1], y.shape[-1]
    dx = torch.empty_like(y)
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_M = max(1, min(64, 1024 // BLOCK_N))
    num_warps = max(1, min(32, BLOCK_N // 512))
    softmax_bwd_kernel[(triton.cdiv(M, BLOCK_M),)](
        dy, y, dx, M, N, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps
    )
    return dx


softmax_bwd.register_fake(lambda dy, y: torch.empty_like(y))

op = softmax.register(
    "softmax(Tensor x) -> Tensor",
    launcher,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    shipped="softmax",
    exact=False,
)

# %% [markdown]
# ## Into a model
#
# The routing of a mixture of experts, and every sampler, is a softmax behind a scale: `softmax(x / temperature)`. The graph
# shows our op as one node with a multiplication before it. torch.compile turns plain torch into *one* kernel, scale included;
# with an opaque node there are two, and the scaled tensor goes to memory and back. The shipped op is `visibility: triton`, yet
# Inductor does not merge a kernel that it did not write with its own: it stays two kernels. A fused kernel is worth it where
# it does so much better than the compiler's that the extra pass is paid for. Where the compiler's own is as good, let the
# compiler do it.


# %%
def model_with(softmax_op):
    def model(x):
        return softmax_op(x * 0.125)

    return model


lesson.compiled(
    "model",
    make=lambda m, n: (lesson.randn(m, n, dtype=torch.bfloat16),),
    ours=model_with(op),
    eager=model_with(reference),
    others={"torch.ops.tt, compiled": model_with(torch.ops.tt.softmax)},
    node="tt_lesson.softmax",
    check=(3, 100),
    timed=lesson.size((256, 131072), LONG),
    bytes=lambda x: 2 * x.numel() * x.element_size(),
    tolerance=1e-2,
    title="softmax(x / 8), rows of 131072",
)
compiled, mixed, shipped = (
    lesson.figure("model", name, "us") for name in ("torch, compiled", "ours, compiled", "torch.ops.tt, compiled")
)
lesson.say(
    f"""
    Compiled from plain torch {compiled:.0f} us, with our node {mixed:.0f} us: {mixed / compiled:.2f} times as long. Our op is
    not so much better than the compiler's that it could pay for a pass of its own. With the shipped op it is {shipped:.0f} us,
    {compiled / shipped:.2f} times as fast as the compiler, the extra pass included.
    """
)

# %% [markdown]
# ## Exercises
#
# * `ex1`: merge two halves of an online softmax: the rule for (m, s) pairs.
# * `ex2`: log-softmax with the row in registers: one logarithm a row, no second exponential.
# * `ex3`: occupancy: how many programs fit on an SM, and what limits them.
#
# ## Pitfalls
#
# * A block that holds a whole row needs a power of two: a row of 4097 costs a block of 8192. Just above a power of two, a loop
#   over tiles may win.
# * Spills do not fail, they are slow. Look at the figure (`triton-tutorial explain tt::softmax`) after every change of a
#   block size.
# * `-inf - (-inf)` is NaN. An online maximum must not begin at -inf unless the subtraction is guarded.
# * The L2 cache flatters benchmarks: inputs that fit into it must be rotated, or you measure the cache.
# * Eviction hints and pipelining are claims about a machine. Measure them on yours, with the real neighbours in the same kernel.
#
# Next: lesson 6, which fuses what stands beside the kernel.

# %%
lesson.finish()
