"""Dropout whose mask is computed, never stored.

out[i] = x[i] / (1 - p) where element i is kept, 0 where it is dropped

Element i (in row-major order, whatever the strides) is kept where the 16-bit number philox(seed, (i // 8, offset))[i % 8] is
at least round(p * 2**16): with probability 1 - p to within 2**-17. The gradient is the same function of the upstream
gradient: it computes the same mask again.

| argument | shape | dtype, range |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| p | number, known when the kernel is compiled | 0 (keeps all, exactly) to 1 (zeros, whatever x is) |
| seed, offset | integers at run time: new ones compile nothing | 0 to 2**63 - 1 |
| out | that of x, contiguous | that of x |

The same seed, offset and number of elements give the same mask on every device and in every layout. `offset` chooses one
of the seed's streams: give each layer, and each step, its own pair, since two calls with the same pair drop the same elements.
A dropped infinity or NaN is 0. There is no sharding rule: a rank knows the index of an element within its shard only.

Bytes: 2 * numel * itemsize, forward and backward. Raises ValueError for p outside 0 to 1, a negative seed or offset.

Source: Srivastava et al., Dropout, https://jmlr.org/papers/v15/srivastava14a.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.fusion import as_rows, drop_threshold, join, keep, keep_reference, keep_scale, split
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def dropout_reference(x: torch.Tensor, p: float, seed: int, offset: int = 0) -> torch.Tensor:
    xf = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.where(keep_reference(x, p, seed, offset), xf * keep_scale(p), 0.0).to(x.dtype).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high"])  # a new seed compiles nothing
def _dropout_fwd_kernel(
    x_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of (BLOCK_M, BLOCK_N) per program."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    offs_m = ((pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    start_n = (pid % blocks) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    mask = (offs_m < M) & (offs_n < N)
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask=mask).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    seed, offset = join(seed_low, seed_high), join(offset_low, offset_high)
    kept = keep(seed, offset, offs_m * N + start_n, THRESHOLD, GROUPED, BLOCK_M, BLOCK_N)
    out = tl.where(kept, x * SCALE, 0.0)
    tl.store(out_ptr + offs_m * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launcher
# --------------------------------------------------------------------------------------------------------------------

_TILE = 2048  # elements of a program
_WIDTH = 1024  # columns of a program, where there are several rows


def dropout(x: torch.Tensor, p: float, seed: int, offset: int = 0) -> torch.Tensor:
    out = dropout_fake(x, p, seed, offset)
    (x,) = as_rows(x, flat=True)
    M, N = x.shape
    if M == 1:
        block_m, block_n = 1, _TILE
    else:
        block_n = _WIDTH if N > _WIDTH // 2 else max(next_power_of_2(N), 8)
        block_m = _TILE // block_n
    launch(
        _dropout_fwd_kernel,
        (cdiv(M, block_m) * cdiv(N, block_n),),
        x,
        out,
        M,
        N,
        x.stride(0),
        *split(seed),
        *split(offset),
        THRESHOLD=drop_threshold(p),
        SCALE=keep_scale(p),
        GROUPED=bool(M == 1 or N % 8 == 0),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


# --------------------------------------------------------------------------------------------------------------------
# Fake and check
# --------------------------------------------------------------------------------------------------------------------


def dropout_fake(x: torch.Tensor, p: float, seed: int, offset: int = 0) -> torch.Tensor:
    return x.new_empty(x.shape)


def dropout_check(x: torch.Tensor, p: float, seed: int, offset: int = 0) -> None:
    if not 0 <= p <= 1:
        bad_argument("dropout", "p", p, "a probability, 0 to 1")
    for name, value in (("seed", seed), ("offset", offset)):
        if value < 0:
            bad_argument("dropout", name, value, "an integer >= 0")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def dropout_forward(ctx: Any, x: torch.Tensor, p: float, seed: int, offset: int = 0) -> torch.Tensor:
    ctx.p, ctx.seed, ctx.offset = p, seed, offset
    return torch.ops.tt.dropout(x, p, seed, offset)


def dropout_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.dropout(dout, ctx.p, ctx.seed, ctx.offset)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def dropout_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample("3x129", (t(3, 129), 0.5, 7))
    yield Sample("2x3x64_offset", (t(2, 3, 64), 0.1, 2**40 + 3, 2**33 + 1))
    yield Sample("2500", (t(2500), 0.25, 0, 1))
    yield Sample("p0", (t(33), 0.0, 1))
    yield Sample("p1", (t(33, 1), 1.0, 1))
    yield Sample("scalar", (t(), 0.5, 11))
    yield Sample("empty", (t(0, 16), 0.5, 1))


def dropout_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        yield Sample("rows_past_2^31", (torch.randn(2**18 + 1, 2**13, device=device, dtype=dtype)[:, :8], 0.1, 5))


def dropout_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 8, device=device)
    yield ErrorSample("p_above_1", (x, 1.5, 0), match="dropout.*'p' is 1.5.*0 to 1")
    yield ErrorSample("p_nan", (x, float("nan"), 0), match="dropout.*'p' is nan.*0 to 1")
    yield ErrorSample("negative_seed", (x, 0.5, -1), match="dropout.*'seed' is -1.*>= 0")
    yield ErrorSample("negative_offset", (x, 0.5, 1, -4), match="dropout.*'offset' is -4.*>= 0")


def dropout_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(8192, 8192, device=device, dtype=dtype), 0.1, 1234), {}

    yield BenchCase("8192x8192", make)


def dropout_cost(x: torch.Tensor, p: float, seed: int, offset: int = 0) -> Cost:
    size = x.numel() * x.element_size()
    return Cost(flops=x.numel(), bytes=2 * size, backward_flops=x.numel(), backward_bytes=2 * size)
