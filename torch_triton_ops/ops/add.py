"""Addition with broadcasting and type promotion, as torch.add.

out = x + y;  dx = dout, dy = dout, each summed over the dimensions that were broadcast

| tensor | shape | dtype |
|---|---|---|
| x, y | any two that broadcast; any strides | float32, float16, bfloat16, int32, int64, any two |
| out | the broadcast shape, contiguous | torch.result_type(x, y) |

Half precision is added in fp32, with one rounding. Bytes: each input read once, the result written once. Raises
ValueError where the shapes do not broadcast, TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.add.html
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


def add_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.add(x, y).contiguous()


@triton.jit
def _add_fwd_kernel(
    x_ptr, y_ptr, out_ptr, B, M, N, xa, xb, xm, xn, ya, yb, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)  # (BLOCK_M, BLOCK_N)
    y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
    out = upcast(x, out_ptr) + upcast(y, out_ptr)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = add_fake(x, y)
    elementwise.run(_add_fwd_kernel, (x, y), (out,))
    return out


def add_fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return elementwise.empty_result(x, y)


def add_check(x: torch.Tensor, y: torch.Tensor) -> None:
    elementwise.check_binary("add", x, y)


def add_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    elementwise.save_kinds(ctx, x, y)
    return torch.ops.tt.add(x, y)


def add_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return elementwise.reduce_gradients(ctx, dout, dout)


def add_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_samples(device, dtype)


def add_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_gpu_samples(device, dtype)
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        x = torch.randn(65537, 32769, device=device, dtype=dtype)
        yield Sample("65537x32769_row", (x, x[0].clone()))


def add_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.binary_error_samples("add", device)


def add_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192), (8192, 8192), passes=("fwd",))
    yield elementwise.bench_case((8192, 8192), (8192,), id="8192x8192_row", passes=("fwd",))


def add_cost(x: torch.Tensor, y: torch.Tensor) -> Cost:
    return elementwise.binary_cost(x, y, saved=False)
