"""The logistic function, as torch.sigmoid.

out = 1 / (1 + exp(-x));  dx = dout * s * (1 - s), s = 1 / (1 + exp(-x))

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| out | that of x, contiguous | that of x |

Arithmetic in fp32, with one rounding. The backward keeps x, not the result as torch does: a result rounded to half precision
near 1 has lost the gradient. Bytes: one read, one write; backward two reads, one write. Raises TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.sigmoid.html
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


def sigmoid_reference(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x).contiguous()


def sigmoid_bwd_reference(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.sigmoid(x.to(dtype))
    return (dout.to(dtype) * s * (1 - s)).to(x.dtype).contiguous()


@triton.jit
def _sigmoid_fwd_kernel(x_ptr, out_ptr, B, M, N, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    out = 1.0 / (1.0 + tl.exp(-x))
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid_bwd_kernel(
    dout_ptr, x_ptr, dx_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dx_ptr)  # (BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), dx_ptr)
    s = 1.0 / (1.0 + tl.exp(-x))
    dx = dout * s * (1.0 - s)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    out = sigmoid_fake(x)
    elementwise.run(_sigmoid_fwd_kernel, (x,), (out,))
    return out


def sigmoid_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def sigmoid_bwd(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = sigmoid_bwd_fake(dout, x)
    elementwise.run(_sigmoid_bwd_kernel, (dout, x), (dx,))
    return dx


def sigmoid_bwd_fake(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def sigmoid_forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    ctx.save_for_backward(x)
    return torch.ops.tt.sigmoid(x)


def sigmoid_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.sigmoid_bwd(dout, *ctx.saved_tensors)


def sigmoid_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_samples(device, dtype)


def sigmoid_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_gpu_samples(device, dtype)


def sigmoid_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.unary_error_samples("sigmoid", device)


def sigmoid_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192))


def sigmoid_cost(x: torch.Tensor) -> Cost:
    return elementwise.unary_cost(x, 3)
