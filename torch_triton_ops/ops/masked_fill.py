"""Put one value where a mask is true, as torch.masked_fill.

out = value where mask, else x;  dx = 0 where mask, else dout, summed over the dimensions in which x was broadcast

| argument | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16, int32, int64 |
| mask | any that broadcasts with x; any strides | bool |
| value | a number within the range of x's dtype, or infinite or NaN for a floating-point x | |
| out | the broadcast shape, contiguous | that of x |

The value is a run-time argument of the kernel: another one compiles nothing. The backward is masked_fill(dout, mask, 0).

Bytes: x and the mask read once, the result written once. Raises ValueError where the shapes do not broadcast or the
value does not fit, TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.Tensor.masked_fill_.html
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops import elementwise
from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.elementwise import tile
from torch_triton_ops.errors import bad_argument


def masked_fill_reference(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    return torch.masked_fill(x, mask, value).contiguous()


@triton.jit
def _masked_fill_fwd_kernel(
    x_ptr,
    mask_ptr,
    out_ptr,
    value,
    B,
    M,
    N,
    xa,
    xb,
    xm,
    xn,
    ya,
    yb,
    ym,
    yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """value: of an integer x the number itself, else the bits of the number in fp32."""
    a, b, m, n, offs, inside = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=inside)  # (BLOCK_M, BLOCK_N)
    mask = tl.load(mask_ptr + a * ya + b * yb + m * ym + n * yn, mask=inside)
    if x.dtype.is_floating():
        fill = tl.cast(value, tl.int32).to(tl.float32, bitcast=True).to(x.dtype)
    else:
        fill = tl.cast(value, x.dtype)
    tl.store(out_ptr + offs, tl.where(mask, fill, x), mask=inside)


def masked_fill(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    out = masked_fill_fake(x, mask, value)
    if (
        x.dtype.is_floating_point
    ):  # an int argument, not a float: torch.compile hands floats on as fp64, infinity not at all
        (argument,) = struct.unpack("<i", struct.pack("<f", float(value)))
    else:
        argument = int(value)
    elementwise.run(_masked_fill_fwd_kernel, (x, mask), (out,), argument)
    return out


def masked_fill_fake(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    return x.new_empty(elementwise.broadcast_shape(x, mask))


def masked_fill_check(x: torch.Tensor, mask: torch.Tensor, value: float) -> None:
    if mask.dtype != torch.bool:
        bad_argument("masked_fill", "mask", f"of dtype {mask.dtype}", "bool", TypeError)
    elementwise.check_broadcast("masked_fill", x, mask, "mask")
    if isinstance(value, (int, float)):  # neither a traced number, nor a complex one
        info = torch.finfo(x.dtype) if x.dtype.is_floating_point else torch.iinfo(x.dtype)
        special = x.dtype.is_floating_point and not math.isfinite(value)
        if not special and not info.min <= value <= info.max:
            bad_argument(
                "masked_fill", "value", value, f"a number from {info.min} to {info.max}, the range of {x.dtype}"
            )
    elif isinstance(value, complex):
        bad_argument("masked_fill", "value", value, "a real number", TypeError)


def masked_fill_forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    elementwise.save_kinds(ctx, x)
    ctx.save_for_backward(mask)
    return torch.ops.tt.masked_fill(x, mask, value)


def masked_fill_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return elementwise.reduce_gradients(ctx, torch.ops.tt.masked_fill(dout, mask, 0))


def masked_fill_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def pair(x: tuple[int, ...], mask: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise.random(x, device, dtype), elementwise.random(mask, device, torch.float32) > 0

    # in fp64 gradients are compared with differences, which infinity has not
    infinite = dtype.is_floating_point and dtype != torch.float64
    yield Sample("33x65", (*pair((33, 65), (33, 65)), float("-inf") if infinite else -7))
    yield Sample("row", (*pair((3, 7, 33), (33,)), 1))
    if dtype.is_floating_point:
        yield Sample("x_broadcast", (*pair((7, 1), (3, 1, 17)), -0.1))
        yield Sample("scalars", (*pair((), ()), 65000.0))
        yield Sample("empty", (*pair((0, 3), (3,)), float("nan")))
        x, mask = pair((9, 35), (35, 18))
        yield Sample("strided", (x.t(), mask[:, ::2], 16.0))


def masked_fill_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("shapes", (x, x[:, :2] > 0, 0.0), match=r"masked_fill.*'mask'.*\(4, 2\).*\(4, 5\)")
    yield ErrorSample("mask_dtype", (x, x, 0.0), error=TypeError, match="masked_fill.*'mask'.*float32.*bool")
    yield ErrorSample("value", (x.half(), x > 0, -1e9), match=r"masked_fill.*'value'.*-1000000000.*65504.*float16")
    yield ErrorSample("value_int", (x.int(), x > 0, float("inf")), match="masked_fill.*'value'.*inf.*int32")


def masked_fill_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scores = torch.randn(4, 32, 2048, 2048, device=device, dtype=dtype)
        return (scores, torch.ones(2048, 2048, device=device, dtype=torch.bool).triu(1), float("-inf")), {}

    yield BenchCase("4x32x2048x2048_causal", make)


def masked_fill_cost(x: torch.Tensor, mask: torch.Tensor, value: float) -> Cost:
    size, out = x.element_size(), x.numel()
    if mask.shape != x.shape:
        out = math.prod(elementwise.broadcast_shape(x, mask))
    return Cost(0, (x.numel() + out) * size + mask.numel(), 0, (x.numel() + out) * size + mask.numel())
