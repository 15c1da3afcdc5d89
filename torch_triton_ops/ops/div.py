"""True division with broadcasting and type promotion, as torch.div.

out = x / y;  dx = dout / y, dy = -dout * (x / y) / y, each summed over the dimensions that were broadcast

| tensor | shape | dtype |
|---|---|---|
| x, y | any two that broadcast; any strides | float32, float16, bfloat16, int32, int64, any two |
| out | the broadcast shape, contiguous | torch.result_type(x, y); of two integers torch's default dtype |

Half precision is divided in fp32, with one rounding; fp32 is rounded as IEEE asks. Bytes: each input read once, the
result written once. Raises ValueError where the shapes do not broadcast, TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.div.html
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
from torch_triton_ops.errors import bad_argument


def div_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.div(x, y).contiguous()


def div_bwd_reference(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor, needs_dx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = div_bwd_fake(dout, x, y, needs_dx)
    if needs_dx:
        dx.copy_(dout / y)
    if x is not None:
        dy.copy_(-dout * (x / y / y))
    return dx, dy


@triton.jit
def _div_fwd_kernel(
    x_ptr, y_ptr, out_ptr, B, M, N, xa, xb, xm, xn, ya, yb, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)  # (BLOCK_M, BLOCK_N)
    y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask, other=1)
    out = tl.div_rn(upcast(x, out_ptr), upcast(y, out_ptr))
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _div_bwd_kernel(
    dout_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn, ya, yb, ym, yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A gradient that is not wanted has no pointer, and without dy nor has x."""
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dout_ptr)  # (BLOCK_M, BLOCK_N)
    y = upcast(tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask, other=1), dout_ptr)
    if dx_ptr is not None:
        tl.store(dx_ptr + offs, tl.div_rn(dout, y).to(dx_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), dout_ptr)
        dy = -dout * tl.div_rn(tl.div_rn(x, y), y)
        tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def div(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = div_fake(x, y)
    elementwise.run(_div_fwd_kernel, (x, y), (out,))
    return out


def div_fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.new_empty(elementwise.broadcast_shape(x, y), dtype=_result_dtype(x, y))


def _result_dtype(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    dtype = elementwise.result_dtype(x, y)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def div_bwd(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor, needs_dx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = div_bwd_fake(dout, x, y, needs_dx)
    outputs = (dx if needs_dx else None, dy if x is not None else None)
    elementwise.run(_div_bwd_kernel, (dout, x, y), outputs)
    return dx, dy


def div_bwd_fake(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor, needs_dx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return elementwise.wanted(dout, needs_dx), elementwise.wanted(dout, x is not None)


def div_check(x: torch.Tensor, y: torch.Tensor) -> None:
    elementwise.check_binary("div", x, y)
    if x.is_cuda and _result_dtype(x, y) == torch.float64:
        bad_argument("div", "x", f"of dtype {x.dtype} while the default dtype is float64", "float32 or less", TypeError)


def div_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    elementwise.save_kinds(ctx, x, y)
    ctx.save_for_backward(x if ctx.needs[1] else None, y)
    return torch.ops.tt.div(x, y)


def div_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return elementwise.reduce_gradients(ctx, *torch.ops.tt.div_bwd(dout, *ctx.saved_tensors, ctx.needs[0]))


def div_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_samples(device, dtype, away_from_zero=True)


def div_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_gpu_samples(device, dtype)


def div_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.binary_error_samples("div", device)


def div_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192), (8192, 8192))


def div_cost(x: torch.Tensor | None, y: torch.Tensor | None) -> Cost:
    return elementwise.binary_cost(x, y)
