"""The rectifier, as torch.relu.

out = x where x > 0, else 0;  dx = dout where out > 0, else 0 (so 0 at 0); NaN stays NaN

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16, int32, int64 |
| out | that of x, contiguous | that of x |

The backward keeps the result alone. Bytes: one read, one write; backward two reads, one write. Raises TypeError
for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.relu.html
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


def relu_reference(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).contiguous()


def relu_bwd_reference(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.where(out <= 0, 0.0, dout).to(dout.dtype).contiguous()


@triton.jit
def _relu_fwd_kernel(x_ptr, out_ptr, B, M, N, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    out = tl.where(x <= 0, 0, x)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_bwd_kernel(
    dout_ptr, out_ptr, dx_ptr, B, M, N, da, db, dm, dn, oa, ob, om, on, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dx_ptr)  # (BLOCK_M, BLOCK_N)
    out = upcast(tl.load(out_ptr + a * oa + b * ob + m * om + n * on, mask=mask), dx_ptr)
    dx = tl.where(out <= 0, 0.0, dout)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def relu(x: torch.Tensor) -> torch.Tensor:
    out = relu_fake(x)
    elementwise.run(_relu_fwd_kernel, (x,), (out,))
    return out


def relu_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def relu_bwd(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    dx = relu_bwd_fake(dout, out)
    elementwise.run(_relu_bwd_kernel, (dout, out), (dx,))
    return dx


def relu_bwd_fake(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def relu_forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.ops.tt.relu(x)
    ctx.save_for_backward(out)
    return out


def relu_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.relu_bwd(dout, *ctx.saved_tensors)


def relu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_samples(device, dtype)


def relu_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_gpu_samples(device, dtype)


def relu_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.unary_error_samples("relu", device)


def relu_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192))


def relu_cost(x: torch.Tensor) -> Cost:
    return elementwise.unary_cost(x)
