"""Mean over any dims.

out = sum of x over `dim` / number of elements along `dim`

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| out | that of x without `dim` (size 1 there with `keepdim`), contiguous | that of x |

`dim` is one dim or a list, from either end; None or an empty list means all. A mean of nothing is NaN.
The gradient of x is that of out over the number of elements, expanded: a view.

Additions in fp32, each in a fixed order (see `ops/sum.py`), then one correctly rounded division: the sum itself may
pass the range of half precision.

Bytes: x read once, out written once. The kernels are those of `reductions.py`, which says how dims and strides are
met.

Errors: IndexError when a dim is out of range, ValueError when one is named twice.

Source: Higham, The accuracy of floating point summation, https://doi.org/10.1137/0914050
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.reductions import (
    accumulation_dtype,
    check_dims,
    expand_reduced,
    normalize_dims,
    reduce,
    reduced_shape,
)


def mean_reference(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    dims = normalize_dims(x, dim)
    return x.to(accumulation_dtype(x.dtype)).mean(dims, keepdim=keepdim).to(x.dtype).contiguous()


def mean(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    out = mean_fake(x, dim, keepdim)
    reduce("mean", x, normalize_dims(x, dim), out)
    return out


def mean_fake(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    return x.new_empty(reduced_shape(x, dim, keepdim))


def mean_check(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> None:
    check_dims("mean", x, dim)


def mean_forward(ctx: Any, x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    ctx.shape, ctx.dims, ctx.keepdim = x.shape, normalize_dims(x, dim), keepdim
    return torch.ops.tt.mean(x, dim, keepdim)


def mean_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor]:
    count = math.prod([ctx.shape[d] for d in ctx.dims])
    return (expand_reduced(dout / count, ctx.shape, ctx.dims, ctx.keepdim),)


def mean_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample("rows_5x33", (t(5, 33), [-1]))
    yield Sample("middle_and_last_keepdim", (t(3, 5, 4, 7), [1, -1], True))
    yield Sample("columns_70x36", (t(70, 36), 0))
    yield Sample("all_17x1000", (t(17, 1000),))
    yield Sample("empty_list_is_all", (t(3, 1, 5), []))
    yield Sample("long_columns_5000x3", (t(5000, 3), [0]))
    yield Sample("transposed_all", (t(6, 5, 4).transpose(0, 2),))
    yield Sample("scalar", (t(),))
    yield Sample("nothing_3x0", (t(3, 0), 1))
    yield Sample("no_result_0x3", (t(0, 3), 1))


def mean_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"mean.*'dim' is 2.*-2 to 1")
    yield ErrorSample("dim_twice", (x, [1, -1]), match=r"mean.*'dim' is \[1, -1\].*once")
    yield ErrorSample("bool", (x > 0,), error=TypeError, match="mean.*'x'.*bool.*bfloat16")


def mean_bench_cases() -> Iterator[BenchCase]:
    def make(
        shape: tuple[int, ...], dim: list[int] | None, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(shape, device=device, dtype=dtype), dim), {}

    yield BenchCase("8192x8192_rows", lambda d, t: make((8192, 8192), [-1], d, t), passes=("fwd",))
    yield BenchCase("64x256x56x56_images", lambda d, t: make((64, 256, 56, 56), [0, 2, 3], d, t), passes=("fwd",))


def mean_cost(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> Cost:
    written = math.prod(reduced_shape(x, dim, keepdim)) * x.element_size()
    # the gradient is a view of dout / count
    return Cost(flops=x.numel(), bytes=x.numel() * x.element_size() + written, backward_bytes=2 * written)
