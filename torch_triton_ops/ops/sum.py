"""Sum over any dims.

out = sum of x over `dim`

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16, int32, int64 |
| out | that of x without `dim` (size 1 there with `keepdim`), contiguous | that of x; int64 for integers, as in torch |

`dim` is one dim or a list, from either end; None or an empty list means all. A sum of nothing is 0.
The gradient of x is that of out, expanded: a view, no kernel.

Additions in fp32 (int64), each in a fixed order: the same bits every time. A chain of additions is some dozens long
whatever the length of the sum, and the chains meet in a tree, so that a sum of 2**28 numbers is as accurate as one of
a few thousand.

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


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.int64


def sum_reference(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    dims = normalize_dims(x, dim)
    return x.to(accumulation_dtype(x.dtype)).sum(dims, keepdim=keepdim).to(_result_dtype(x)).contiguous()


def sum(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    out = sum_fake(x, dim, keepdim)
    reduce("sum", x, normalize_dims(x, dim), out)
    return out


def sum_fake(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    return x.new_empty(reduced_shape(x, dim, keepdim), dtype=_result_dtype(x))


def sum_check(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> None:
    check_dims("sum", x, dim)


def sum_forward(ctx: Any, x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool) -> torch.Tensor:
    ctx.shape, ctx.dims, ctx.keepdim = x.shape, normalize_dims(x, dim), keepdim
    return torch.ops.tt.sum(x, dim, keepdim)


def sum_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor]:
    return (expand_reduced(dout, ctx.shape, ctx.dims, ctx.keepdim),)


def sum_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.randint(-100, 100, shape, device=device, dtype=dtype)
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


def sum_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        yield Sample("2^31+5", (torch.randn(2**31 + 5, device=device, dtype=dtype),))
    if dtype == torch.float32:
        yield Sample("2^26", (torch.randn(2**26, device=device, dtype=dtype),))


def sum_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"sum.*'dim' is 2.*-2 to 1")
    yield ErrorSample("dim_twice", (x, [1, -1]), match=r"sum.*'dim' is \[1, -1\].*once")
    yield ErrorSample("bool", (x > 0,), error=TypeError, match="sum.*'x'.*bool.*int64")


def sum_bench_cases() -> Iterator[BenchCase]:
    def make(
        shape: tuple[int, ...], dim: list[int] | None, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(shape, device=device, dtype=dtype), dim), {}

    yield BenchCase("2^28", lambda d, t: make((2**28,), None, d, t), dtype=torch.float32, passes=("fwd",))
    yield BenchCase("8192x8192_rows", lambda d, t: make((8192, 8192), [-1], d, t), passes=("fwd",))
    yield BenchCase("8192x8192_columns", lambda d, t: make((8192, 8192), [0], d, t), passes=("fwd",))


def sum_cost(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> Cost:
    written = math.prod(reduced_shape(x, dim, keepdim)) * _result_dtype(x).itemsize
    return Cost(flops=x.numel(), bytes=x.numel() * x.element_size() + written)  # the gradient is a view
