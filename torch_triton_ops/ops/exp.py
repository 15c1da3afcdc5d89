"""The exponential function, as torch.exp.

out = e^x;  dx = dout * out

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| out | that of x, contiguous | that of x |

Arithmetic in fp32. The backward keeps the result alone. Bytes: one read, one write; backward two reads, one write.
Raises TypeError for other dtypes.

Source: https://pytorch.org/docs/stable/generated/torch.exp.html
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
from torch_triton_ops.special import exp_fp32


def exp_reference(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x).contiguous()


def exp_bwd_reference(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return (dout * out).contiguous()


@triton.jit
def _exp_fwd_kernel(x_ptr, out_ptr, B, M, N, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    if out_ptr.dtype.element_ty == tl.float32:
        out = exp_fp32(x)
    else:  # tl.exp is exact enough
        out = tl.exp(x)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _exp_bwd_kernel(
    dout_ptr, out_ptr, dx_ptr, B, M, N, da, db, dm, dn, oa, ob, om, on, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dx_ptr)  # (BLOCK_M, BLOCK_N)
    out = upcast(tl.load(out_ptr + a * oa + b * ob + m * om + n * on, mask=mask), dx_ptr)
    dx = dout * out
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def exp(x: torch.Tensor) -> torch.Tensor:
    out = exp_fake(x)
    elementwise.run(_exp_fwd_kernel, (x,), (out,))
    return out


def exp_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def exp_bwd(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    dx = exp_bwd_fake(dout, out)
    elementwise.run(_exp_bwd_kernel, (dout, out), (dx,))
    return dx


def exp_bwd_fake(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def exp_forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.ops.tt.exp(x)
    ctx.save_for_backward(out)
    return out


def exp_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.exp_bwd(dout, *ctx.saved_tensors)


def exp_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_samples(device, dtype)


def exp_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_gpu_samples(device, dtype)


def exp_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.unary_error_samples("exp", device)


def exp_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192))


def exp_cost(x: torch.Tensor) -> Cost:
    return elementwise.unary_cost(x, 2)
