"""Bias, dropout and the residual sum in one pass: the end of both halves of a transformer block.

out = residual + dropout(x + bias, p, seed, offset)

dx        = dropout(dout, p, seed, offset)       the same mask, computed again
dbias     = sum over rows of dx, before it is rounded
dresidual = dout

The mask is that of `tt::dropout`: a function of seed, offset and the element's index in row-major order.

| argument | shape | dtype, range |
|---|---|---|
| x, residual | (..., N), the same; any strides | float32, float16, bfloat16, also different ones |
| bias | (N,) or None | any of these |
| p | number, known when the kernel is compiled | 0 (keeps all, exactly) to 1 (out is residual) |
| seed, offset | integers at run time: new ones compile nothing | 0 to 2**63 - 1 |
| out | that of x, contiguous | the one that x and residual promote to, as in torch |
| dx, dbias, dresidual | those of x, bias, residual | those of x, bias, residual |

Arithmetic in fp32, with one rounding, at the store. Deterministic: dbias is summed in a fixed order, without atomics. There
is no sharding rule: a rank knows the index of an element within its shard only.

Bytes: forward 3 * M * N * itemsize, backward 2 * M * N * itemsize. Raises ValueError for a residual or bias of another
shape, a bias for an x without dimensions, p outside 0 to 1, a negative seed or offset.

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
from torch_triton_ops.fusion import (
    as_rows,
    column_sum_kernel,
    drop_threshold,
    join,
    keep,
    keep_reference,
    keep_scale,
    split,
)
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bias_dropout_residual_reference(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int, offset: int = 0
) -> torch.Tensor:
    dtype = _arithmetic_dtype(x)
    z = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    out = residual.to(dtype) + torch.where(keep_reference(x, p, seed, offset), z * keep_scale(p), 0.0)
    return out.to(torch.promote_types(x.dtype, residual.dtype)).contiguous()


def bias_dropout_residual_bwd_reference(
    dout: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    seed: int,
    offset: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dbias = bias_dropout_residual_bwd_fake(dout, bias, p, seed, offset, dtype, needs)
    doutf = dout.to(_arithmetic_dtype(dout))
    dz = torch.where(keep_reference(dout, p, seed, offset), doutf * keep_scale(p), 0.0)
    if needs[0]:
        dx.copy_(dz)
    if needs[1]:
        dbias.copy_(dz.sum(tuple(range(dz.ndim - 1))) if dz.ndim > 1 else dz)
    return dx, dbias


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high"])  # a new seed compiles nothing
def _bias_dropout_residual_fwd_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    stride_residualm,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    HAS_BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of (BLOCK_M, BLOCK_N) per program; its rows share the bias."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    offs_m = ((pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    start_n = (pid % blocks) * BLOCK_N
    offs_n = (start_n + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask=mask).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    residual = tl.load(residual_ptr + offs_m * stride_residualm + offs_n, mask=mask).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)
    seed, offset = join(seed_low, seed_high), join(offset_low, offset_high)
    kept = keep(seed, offset, offs_m * N + start_n, THRESHOLD, GROUPED, BLOCK_M, BLOCK_N)
    out = residual + tl.where(kept, x * SCALE, 0.0)
    tl.store(out_ptr + offs_m * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high"])  # a new seed compiles nothing
def _bias_dropout_residual_bwd_kernel(
    dout_ptr,
    dx_ptr,
    partial_ptr,
    M,
    N,
    stride_doutm,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    NEEDS_DX: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """STEPS tiles of (BLOCK_M, BLOCK_N), one below the other, per program; the sum of their rows stays in registers.

    partial_ptr: (row blocks, N) fp32, one row of sums per program.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    pid_m = pid // blocks
    start_n = (pid % blocks) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    # Rows are summed within a thread as long as possible: two dimensions, and one reduction after the loop.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        offs_m = ((pid_m * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
        mask = (offs_m < M) & mask_n[None, :]
        # 0 outside the tensor, so that those rows add nothing
        dout = tl.load(dout_ptr + offs_m * stride_doutm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        seed, offset = join(seed_low, seed_high), join(offset_low, offset_high)
        kept = keep(seed, offset, offs_m * N + start_n, THRESHOLD, GROUPED, BLOCK_M, BLOCK_N)
        dz = tl.where(kept, dout * SCALE, 0.0)  # (BLOCK_M, BLOCK_N)
        if NEEDS_DX:
            tl.store(dx_ptr + offs_m * N + offs_n[None, :], dz.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DBIAS:
            acc += dz
    if NEEDS_DBIAS:
        tl.store(partial_ptr + pid_m * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _tile(M: int, N: int, elements: int, width: int) -> dict[str, int]:
    """A tile of so many elements, as wide as a row at most, and whether eight elements share a Philox counter."""
    if M == 1:
        block_m, block_n = 1, elements
    else:
        block_n = width if width // 2 < N else max(next_power_of_2(N), 8)
        block_m = elements // block_n
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": bool(M == 1 or N % 8 == 0)}


def bias_dropout_residual(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int, offset: int = 0
) -> torch.Tensor:
    out = bias_dropout_residual_fake(x, bias, residual, p, seed, offset)
    x, residual = as_rows(x, residual, flat=bias is None)
    M, N = x.shape
    tile = _tile(M, N, elements=2048, width=1024)
    launch(
        _bias_dropout_residual_fwd_kernel,
        (cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]),),
        x,
        None if bias is None else bias.contiguous(),
        residual,
        out,
        M,
        N,
        x.stride(0),
        residual.stride(0),
        *split(seed),
        *split(offset),
        HAS_BIAS=bias is not None,
        THRESHOLD=drop_threshold(p),
        SCALE=keep_scale(p),
        **tile,
        num_warps=4,
    )
    return out


# Tiles of a backward program: a row of partial sums for every 64 rows of 256 columns adds 2 % to the bytes.
_STEPS = 8


def bias_dropout_residual_bwd(
    dout: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    seed: int,
    offset: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dtype: that of x. needs: whether dx, dbias are wanted; the other is an empty tensor."""
    dx, dbias = bias_dropout_residual_bwd_fake(dout, bias, p, seed, offset, dtype, needs)
    (dout,) = as_rows(dout, flat=not needs[1])
    M, N = dout.shape
    steps = _STEPS if needs[1] else 1
    tile = _tile(M, N, elements=2048, width=256 if needs[1] else 1024)
    row_blocks = cdiv(M, tile["BLOCK_M"] * steps)
    partial = dout.new_empty((row_blocks, N), dtype=torch.float32) if needs[1] else None
    launch(
        _bias_dropout_residual_bwd_kernel,
        (row_blocks * cdiv(N, tile["BLOCK_N"]),),
        dout,
        dx,
        partial,
        M,
        N,
        dout.stride(0),
        *split(seed),
        *split(offset),
        NEEDS_DX=needs[0],
        NEEDS_DBIAS=needs[1],
        THRESHOLD=drop_threshold(p),
        SCALE=keep_scale(p),
        STEPS=steps,
        **tile,
        num_warps=4,
    )
    if partial is not None:
        launch(column_sum_kernel, (cdiv(N, 16),), partial, dbias, row_blocks, N, BLOCK_G=64, BLOCK_N=16)
    return dx, dbias


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def bias_dropout_residual_fake(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int, offset: int = 0
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def bias_dropout_residual_bwd_fake(
    dout: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    seed: int,
    offset: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = dout.new_empty(dout.shape if needs[0] else (0,), dtype=dtype)
    return dx, dout.new_empty((0,)) if bias is None or not needs[1] else bias.new_empty(bias.shape)


def bias_dropout_residual_check(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int, offset: int = 0
) -> None:
    name = "bias_dropout_residual"
    if bias is not None and x.ndim == 0:
        bad_argument(name, "bias", "given for an x without dimensions", "None")
    if bias is not None and bias.shape != x.shape[-1:]:
        bad_argument(name, "bias", f"of shape {tuple(bias.shape)}", f"({x.shape[-1]},), the last size of x")
    if residual.shape != x.shape:
        bad_argument(name, "residual", f"of shape {tuple(residual.shape)}", f"the shape of x, {tuple(x.shape)}")
    if not 0 <= p <= 1:
        bad_argument(name, "p", p, "a probability, 0 to 1")
    for argument, value in (("seed", seed), ("offset", offset)):
        if value < 0:
            bad_argument(name, argument, value, "an integer >= 0")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def bias_dropout_residual_forward(
    ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int, offset: int = 0
) -> torch.Tensor:
    ctx.save_for_backward(bias)  # for its dtype; x and residual are not needed
    ctx.p, ctx.seed, ctx.offset = p, seed, offset
    ctx.dtypes = x.dtype, residual.dtype
    return torch.ops.tt.bias_dropout_residual(x, bias, residual, p, seed, offset)


def bias_dropout_residual_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (bias,) = ctx.saved_tensors
    needs = [bool(ctx.needs[0]), bool(ctx.needs[1]) and bias is not None]
    dx = dbias = None
    if any(needs):
        dx, dbias = torch.ops.tt.bias_dropout_residual_bwd(
            dout, bias, ctx.p, ctx.seed, ctx.offset, ctx.dtypes[0], needs
        )
    return dx if needs[0] else None, dbias if needs[1] else None, dout.to(ctx.dtypes[1])


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def bias_dropout_residual_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield Sample("M3_N129", (t(3, 129), t(129), t(3, 129), 0.5, 7))
    # several programs, several rows of partial sums
    yield Sample("M70_N304", (t(70, 304), t(304), t(70, 304), 0.1, 3), slow_in_interpreter=True)
    yield Sample("no_bias", (t(2, 3, 33), None, t(2, 3, 33), 0.25, 0, 1))
    x, bias, residual = t(4, 40), t(40, dtype=other), t(4, 40, dtype=other)
    yield Sample("residual_of_other_dtype", (x, bias, residual, 0.3, 2**40 + 3, 2**33 + 1))
    yield Sample("p0", (t(5, 16), t(16), t(5, 16), 0.0, 1))
    yield Sample("p1", (t(5, 1), t(1), t(5, 1), 1.0, 1))
    yield Sample("empty_rows", (t(0, 16), t(16), t(0, 16), 0.5, 1))
    yield Sample("scalar", (t(), None, t(), 0.5, 11))


def bias_dropout_residual_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        x = torch.randn(2**18 + 1, 2**13, device=device, dtype=dtype)
        yield Sample("rows_past_2^31", (x[:, :8], torch.randn(8, device=device, dtype=dtype), x[:, 8:16], 0.1, 5))


def bias_dropout_residual_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    name = "bias_dropout_residual"
    yield ErrorSample("bias_shape", (x, x[0, :31], x, 0.1, 0), match=rf"{name}.*'bias'.*\(31,\).*\(32,\)")
    yield ErrorSample("bias_of_scalar", (x[0, 0], x[0], x[0, 0], 0.1, 0), match=f"{name}.*'bias'.*None")
    yield ErrorSample("residual_shape", (x, None, x[:1], 0.1, 0), match=rf"{name}.*'residual'.*\(1, 32\).*\(4, 32\)")
    yield ErrorSample("p", (x, None, x, -0.1, 0), match=f"{name}.*'p' is -0.1.*0 to 1")
    yield ErrorSample("negative_seed", (x, None, x, 0.1, -1), match=f"{name}.*'seed' is -1.*>= 0")


def bias_dropout_residual_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = ((8192, 8192), (8192,), (8192, 8192))
        return (*(torch.randn(*shape, device=device, dtype=dtype) for shape in shapes), 0.1, 1234), {}

    yield BenchCase("8192x8192", make)


def bias_dropout_residual_cost(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, seed: int, offset: int = 0
) -> Cost:
    row = 0 if bias is None else bias.numel() * bias.element_size()
    out = x.numel() * torch.promote_types(x.dtype, residual.dtype).itemsize
    size = x.numel() * x.element_size()
    return Cost(
        flops=3 * x.numel(),
        bytes=size + residual.numel() * residual.element_size() + out + row,
        backward_flops=2 * x.numel(),
        backward_bytes=out + size + row,
    )
