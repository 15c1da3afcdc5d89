"""Subtraction with broadcasting and type promotion, as torch.sub.

out = x - y;  dx = dout, dy = -dout, each summed over the dimensions that were broadcast

| tensor | shape | dtype |
|---|---|---|
| x, y | any two that broadcast; any strides | float32, float16, bfloat16, int32, int64, any two |
| out | the broadcast shape, contiguous | torch.result_type(x, y) |

Half precision is subtracted in fp32, with one rounding. Bytes: each input read once, the result written once. Raises
ValueError where the shapes do not broadcast, TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.sub.html
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


def sub_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sub(x, y).contiguous()


def sub_bwd_reference(dout: torch.Tensor) -> torch.Tensor:
    return -dout.contiguous()


@triton.jit
def _sub_fwd_kernel(
    x_ptr, y_ptr, out_ptr, B, M, N, xa, xb, xm, xn, ya, yb, ym, yn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)  # (BLOCK_M, BLOCK_N)
    y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
    out = upcast(x, out_ptr) - upcast(y, out_ptr)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sub_bwd_kernel(dout_ptr, dy_ptr, B, M, N, da, db, dm, dn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask)  # (BLOCK_M, BLOCK_N)
    tl.store(dy_ptr + offs, (-upcast(dout, dy_ptr)).to(dy_ptr.dtype.element_ty), mask=mask)


def sub(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = sub_fake(x, y)
    elementwise.run(_sub_fwd_kernel, (x, y), (out,))
    return out


def sub_fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return elementwise.empty_result(x, y)


def sub_bwd(dout: torch.Tensor) -> torch.Tensor:
    dy = sub_bwd_fake(dout)
    elementwise.run(_sub_bwd_kernel, (dout,), (dy,))
    return dy


def sub_bwd_fake(dout: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def sub_check(x: torch.Tensor, y: torch.Tensor) -> None:
    elementwise.check_binary("sub", x, y)


def sub_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    elementwise.save_kinds(ctx, x, y)
    return torch.ops.tt.sub(x, y)


def sub_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return elementwise.reduce_gradients(ctx, dout, torch.ops.tt.sub_bwd(dout) if ctx.needs[1] else dout)


def sub_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_samples(device, dtype)


def sub_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.binary_gpu_samples(device, dtype)


def sub_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.binary_error_samples("sub", device)


def sub_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192), (8192, 8192))


def sub_cost(x: torch.Tensor, y: torch.Tensor) -> Cost:
    return elementwise.binary_cost(x, y, saved=False)
