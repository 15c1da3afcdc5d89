"""The smaller of two elements, with broadcasting and type promotion, as torch.minimum.

out = min(x, y), NaN where either is NaN

The gradient goes to the smaller element; of two equal ones, or where either is NaN, as torch has it: half to each of two
equal ones, all of it to both beside a NaN. It is summed over the dimensions that were broadcast.

| tensor | shape | dtype |
|---|---|---|
| x, y | any two that broadcast; any strides | float32, float16, bfloat16, int32, int64, any two |
| out | the broadcast shape, contiguous | torch.result_type(x, y) |

Nothing is rounded. Bytes: each input read once, the result written once. Raises ValueError where the
shapes do not broadcast, TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.minimum.html
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


def minimum_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.minimum(x, y).contiguous()


def minimum_bwd_reference(
    dout: torch.Tensor, x: torch.Tensor, y: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = minimum_bwd_fake(dout, x, y, needs)
    share = torch.where(x == y, dout / 2, dout)
    if needs[0]:
        dx.copy_(share.masked_fill(x > y, 0))
    if needs[1]:
        dy.copy_(share.masked_fill(x < y, 0))
    return dx, dy


@triton.jit
def _minimum_fwd_kernel(
    x_ptr, y_ptr, out_ptr, B, M, N, xa, xb, xm, xn, ya, yb, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)  # (BLOCK_M, BLOCK_N)
    y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
    out = tl.minimum(upcast(x, out_ptr), upcast(y, out_ptr), propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _minimum_bwd_kernel(
    dout_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn, ya, yb, ym, yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A gradient that is not wanted has no pointer."""
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dout_ptr)  # (BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), dout_ptr)
    y = upcast(tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask), dout_ptr)
    share = tl.where(x == y, 0.5 * dout, dout)
    if dx_ptr is not None:
        tl.store(dx_ptr + offs, tl.where(x > y, 0.0, share).to(dx_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        tl.store(dy_ptr + offs, tl.where(x < y, 0.0, share).to(dy_ptr.dtype.element_ty), mask=mask)


def minimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = minimum_fake(x, y)
    elementwise.run(_minimum_fwd_kernel, (x, y), (out,))
    return out


def minimum_fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return elementwise.empty_result(x, y)


def minimum_bwd(
    dout: torch.Tensor, x: torch.Tensor, y: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = minimum_bwd_fake(dout, x, y, needs)
    outputs = (dx if needs[0] else None, dy if needs[1] else None)
    elementwise.run(_minimum_bwd_kernel, (dout, x, y), outputs)
    return dx, dy


def minimum_bwd_fake(
    dout: torch.Tensor, x: torch.Tensor, y: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    return elementwise.wanted(dout, needs[0]), elementwise.wanted(dout, needs[1])


def minimum_check(x: torch.Tensor, y: torch.Tensor) -> None:
    elementwise.check_binary("minimum", x, y)


def minimum_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    elementwise.save_kinds(ctx, x, y)
    ctx.save_for_backward(x, y)
    return torch.ops.tt.minimum(x, y)


def minimum_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return elementwise.reduce_gradients(ctx, *torch.ops.tt.minimum_bwd(dout, *ctx.saved_tensors, ctx.needs))


def minimum_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_samples(device, dtype)


def minimum_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_gpu_samples(device, dtype)


def minimum_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.binary_error_samples("minimum", device)


def minimum_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192), (8192, 8192))


def minimum_cost(x: torch.Tensor, y: torch.Tensor) -> Cost:
    return elementwise.binary_cost(x, y)
