"""Maximum (amax) and minimum (amin) over any dims.

out = maximum, or minimum, of x over `dim`
dx  = dout / (number of elements equal to out) where x equals out, else 0

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16, int32, int64 |
| out | that of x without `dim` (size 1 there with `keepdim`), contiguous | that of x |

`dim` is one dim or a list, from either end; None or an empty list means all. A NaN wins, and makes the gradient of
all that it was compared with NaN; equal elements share the gradient evenly: both as in torch.

Bytes: x read once, out written once; backward: x read once (twice where a row is longer than registers hold), dx
written once. The kernels are those of `reductions.py`, which says how dims and strides are met.

Errors: IndexError when a dim is out of range or empty, ValueError when one is named twice.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.amax.html,
https://docs.pytorch.org/docs/stable/generated/torch.amin.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.reductions import (
    check_dims,
    check_not_empty,
    extremum_bwd,
    extremum_bwd_reference,
    normalize_dims,
    reduce,
    reduced_shape,
)


def amax_reference(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    return torch.amax(x, normalize_dims(x, dim), keepdim).contiguous()


def amin_reference(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    return torch.amin(x, normalize_dims(x, dim), keepdim).contiguous()


def amax_bwd_reference(
    dout: torch.Tensor, x: torch.Tensor, out: torch.Tensor, dim: Sequence[int] | None, keepdim: bool
) -> torch.Tensor:
    return extremum_bwd_reference(dout, x, out, dim, keepdim)


def amax(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    out = amax_fake(x, dim, keepdim)
    reduce("max", x, normalize_dims(x, dim), out)
    return out


def amin(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    out = amin_fake(x, dim, keepdim)
    reduce("min", x, normalize_dims(x, dim), out)
    return out


def amax_bwd(
    dout: torch.Tensor, x: torch.Tensor, out: torch.Tensor, dim: Sequence[int] | None, keepdim: bool
) -> torch.Tensor:
    dx = amax_bwd_fake(dout, x, out, dim, keepdim)
    extremum_bwd(dout, x, out, dim, dx)
    return dx


def amax_fake(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    return x.new_empty(reduced_shape(x, dim, keepdim))


def amax_bwd_fake(
    dout: torch.Tensor, x: torch.Tensor, out: torch.Tensor, dim: Sequence[int] | None, keepdim: bool
) -> torch.Tensor:
    return x.new_empty(x.shape)


def amax_check(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> None:
    _check("amax", x, dim)


def amin_check(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> None:
    _check("amin", x, dim)


def _check(op: str, x: torch.Tensor, dim: Sequence[int] | None) -> None:
    check_dims(op, x, dim)
    check_not_empty(op, x, dim)


def amax_forward(ctx: Any, x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    return _forward(torch.ops.tt.amax, ctx, x, dim, keepdim)


def amin_forward(ctx: Any, x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    return _forward(torch.ops.tt.amin, ctx, x, dim, keepdim)


def _forward(op: Any, ctx: Any, x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    out: torch.Tensor = op(x, dim, keepdim)
    ctx.save_for_backward(x, out)
    ctx.dim, ctx.keepdim = dim, keepdim
    return out


def amax_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor]:
    x, out = ctx.saved_tensors
    return (torch.ops.tt.amax_bwd(dout, x, out, ctx.dim, ctx.keepdim),)


def amin_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor]:
    x, out = ctx.saved_tensors
    return (torch.ops.tt.amin_bwd(dout, x, out, ctx.dim, ctx.keepdim),)


def amax_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:  # no two elements are equal where a finite difference is taken
        if dtype == torch.float64:
            return torch.randperm(math.prod(shape), device=device).view(shape).to(dtype)
        return torch.randint(-30, 30, shape, device=device).to(dtype)  # ties

    yield Sample("rows_5x33", (t(5, 33), [-1]))
    yield Sample("middle_and_last_keepdim", (t(3, 5, 4, 7), [1, -1], True))
    yield Sample("columns_70x36", (t(70, 36), 0))
    yield Sample("all_17x1x1000", (t(17, 1, 1000),))
    yield Sample("scalar", (t(),))
    yield Sample("no_result_0x3", (t(0, 3), 1))
    if dtype.is_floating_point and dtype != torch.float64:  # NaN, which no finite difference can check
        x = t(3, 3001)
        x[0, 2999], x[1], x[2] = float("nan"), float("-inf"), float("inf")
        yield Sample("nan_and_inf", (x, [1]))


def amax_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from _error_samples("amax", device)


def amin_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from _error_samples("amin", device)


def _error_samples(op: str, device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=rf"{op}.*'dim' is 2.*-2 to 1")
    yield ErrorSample("empty_dim", (x[:, :0], 1), error=IndexError, match=rf"{op}.*'dim'.*\(4, 0\).*at least one")


def amax_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(8192, 8192, device=device, dtype=dtype), [-1]), {}

    yield BenchCase("8192x8192_rows", make)


def amax_cost(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> Cost:
    result = math.prod(reduced_shape(x, dim, keepdim)) * x.element_size()
    size = x.numel() * x.element_size()
    return Cost(flops=x.numel(), bytes=size + result, backward_flops=2 * x.numel(), backward_bytes=2 * (size + result))


# amin: what does not depend on which of the two is wanted. The gradient goes where x equals out.
amin_bwd_reference = amax_bwd_reference
amin_bwd = amax_bwd
amin_fake = amax_fake
amin_bwd_fake = amax_bwd_fake
amin_samples = amax_samples
amin_bench_cases = amax_bench_cases
amin_cost = amax_cost
