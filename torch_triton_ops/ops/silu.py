"""The sigmoid linear unit (swish), as torch.nn.functional.silu.

out = x * s, s = 1 / (1 + exp(-x));  dx = dout * s * (1 + x * (1 - s))

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| out | that of x, contiguous | that of x |

Arithmetic in fp32, with one rounding. Bytes: one read, one write; backward two reads, one write. Raises TypeError
for other dtypes.

Source: Elfwing et al., https://arxiv.org/abs/1702.03118
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torch_triton_ops import elementwise
from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.elementwise import tile, upcast


def silu_reference(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x).contiguous()


def silu_bwd_reference(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.silu_backward(dout, x).contiguous()


@triton.jit
def _silu_fwd_kernel(x_ptr, out_ptr, B, M, N, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    out = x / (1.0 + tl.exp(-x))
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_bwd_kernel(
    dout_ptr, x_ptr, dx_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dx_ptr)  # (BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), dx_ptr)
    s = 1.0 / (1.0 + tl.exp(-x))
    dx = dout * s * (1.0 + x * (1.0 - s))
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def silu(x: torch.Tensor) -> torch.Tensor:
    out = silu_fake(x)
    elementwise.run(_silu_fwd_kernel, (x,), (out,))
    return out


def silu_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def silu_bwd(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = silu_bwd_fake(dout, x)
    elementwise.run(_silu_bwd_kernel, (dout, x), (dx,))
    return dx


def silu_bwd_fake(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def silu_forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
    ctx.save_for_backward(x)
    return torch.ops.tt.silu(x)


def silu_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.silu_bwd(dout, *ctx.saved_tensors)


def silu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_samples(device, dtype)


def silu_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_gpu_samples(device, dtype)


def silu_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.unary_error_samples("silu", device)


def silu_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192))


def silu_cost(x: torch.Tensor) -> Cost:
    return elementwise.unary_cost(x, 4)
