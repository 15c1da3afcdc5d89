"""Multiplication with broadcasting and type promotion, as torch.mul.

out = x * y;  dx = dout * y, dy = dout * x, each summed over the dimensions that were broadcast

| tensor | shape | dtype |
|---|---|---|
| x, y | any two that broadcast; any strides | float32, float16, bfloat16, int32, int64, any two |
| out | the broadcast shape, contiguous | torch.result_type(x, y) |

Half precision is multiplied in fp32, with one rounding. Bytes: each input read once, the result written once. Raises
ValueError where the shapes do not broadcast, TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.mul.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops import elementwise
from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.elementwise import tile, upcast


def mul_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, y).contiguous()


def mul_bwd_reference(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = mul_bwd_fake(dout, x, y)
    if y is not None:
        dx.copy_(dout * y)
    if x is not None:
        dy.copy_(dout * x)
    return dx, dy


@triton.jit
def _mul_fwd_kernel(
    x_ptr, y_ptr, out_ptr, B, M, N, xa, xb, xm, xn, ya, yb, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)  # (BLOCK_M, BLOCK_N)
    y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
    out = upcast(x, out_ptr) * upcast(y, out_ptr)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mul_bwd_kernel(
    dout_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn, ya, yb, ym, yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A gradient that is not wanted has no pointer, and nor has the input that only it needs."""
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dout_ptr)  # (BLOCK_M, BLOCK_N)
    if dx_ptr is not None:
        y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
        dx = dout * upcast(y, dout_ptr)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)
        dy = dout * upcast(x, dout_ptr)
        tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = mul_fake(x, y)
    elementwise.run(_mul_fwd_kernel, (x, y), (out,))
    return out


def mul_fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return elementwise.empty_result(x, y)


def mul_bwd(dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = mul_bwd_fake(dout, x, y)
    outputs = (dx if y is not None else None, dy if x is not None else None)
    elementwise.run(_mul_bwd_kernel, (dout, x, y), outputs)
    return dx, dy


def mul_bwd_fake(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return elementwise.wanted(dout, y is not None), elementwise.wanted(dout, x is not None)


def mul_check(x: torch.Tensor, y: torch.Tensor) -> None:
    elementwise.check_binary("mul", x, y)


def mul_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    elementwise.save_kinds(ctx, x, y)
    ctx.save_for_backward(x if ctx.needs[1] else None, y if ctx.needs[0] else None)
    return torch.ops.tt.mul(x, y)


def mul_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return elementwise.reduce_gradients(ctx, *torch.ops.tt.mul_bwd(dout, *ctx.saved_tensors))


def mul_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_samples(device, dtype)


def mul_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_gpu_samples(device, dtype)


def mul_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.binary_error_samples("mul", device)


def mul_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192), (8192, 8192))
    yield elementwise.bench_case((8192, 8192), (8192,), id="8192x8192_row")


def mul_cost(x: torch.Tensor | None, y: torch.Tensor | None) -> Cost:
    return elementwise.binary_cost(x, y)
