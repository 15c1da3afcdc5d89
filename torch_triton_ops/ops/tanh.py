"""The hyperbolic tangent, as torch.tanh.

out = sign(x) * (1 - 2e / (1 + e));  dx = dout * (1 - tanh(x)^2) = dout * 4e / (1 + e)^2, e = exp(-2|x|)

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| out | that of x, contiguous | that of x |

Arithmetic in fp32, with one rounding; for half precision to 2^-17 of the result, by fewer instructions. The backward
keeps x, not the result as torch does: a result rounded to half precision near 1 has lost the gradient. Bytes: one read,
one write; backward two reads, one write. Raises TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.tanh.html
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
from torch_triton_ops.special import tanh_half


def tanh_reference(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x).contiguous()


def tanh_bwd_reference(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    e = torch.exp(-2 * x.to(dtype).abs())
    return (dout.to(dtype) * 4 * e / (1 + e) ** 2).to(x.dtype).contiguous()


@triton.jit
def _tanh(x):
    """fp32, to about one unit in the last place."""
    # Near 0 the quotient would cancel: there x + x^3 p(x^2), least maximum error on [0, 0.625], 4e-9 of x.
    s = x * x
    p = -0.0057170363 * s + 0.0206505787
    p = p * s - 0.0537434965
    p = p * s + 0.1333149076
    p = p * s - 0.3333328366
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * s * p, tl.where(x < 0, -far, far))


@triton.jit
def _tanh_fwd_kernel(x_ptr, out_ptr, B, M, N, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    out = _tanh(x) if out_ptr.dtype.element_ty == tl.float32 else tanh_half(x)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tanh_bwd_kernel(
    dout_ptr, x_ptr, dx_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dx_ptr)  # (BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), dx_ptr)
    e = tl.exp(-2.0 * tl.abs(x))
    dx = dout * 4.0 * e / ((1.0 + e) * (1.0 + e))
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def tanh(x: torch.Tensor) -> torch.Tensor:
    out = tanh_fake(x)
    elementwise.run(_tanh_fwd_kernel, (x,), (out,))
    return out


def tanh_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def tanh_bwd(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = tanh_bwd_fake(dout, x)
    elementwise.run(_tanh_bwd_kernel, (dout, x), (dx,))
    return dx


def tanh_bwd_fake(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def tanh_forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    ctx.save_for_backward(x)
    return torch.ops.tt.tanh(x)


def tanh_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.tanh_bwd(dout, *ctx.saved_tensors)


def tanh_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_samples(device, dtype)


def tanh_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_gpu_samples(device, dtype)


def tanh_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.unary_error_samples("tanh", device)


def tanh_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192))


def tanh_cost(x: torch.Tensor) -> Cost:
    return elementwise.unary_cost(x, 12)
