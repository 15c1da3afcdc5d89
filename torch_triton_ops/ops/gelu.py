"""The Gaussian error linear unit, as torch.nn.functional.gelu.

approximate="none":  out = x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2;  dx = dout * (Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi))
approximate="tanh":  out = x * s, s = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3);  dx = dout * (s + x * s * (1 - s) * 2u')

The sigmoid is (1 + tanh(u)) / 2 without its cancellation where u is far below 0.

| argument | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16 |
| approximate | "none" or "tanh" | |
| out | that of x, contiguous | that of x |

Arithmetic in fp32, with one rounding. For half precision Phi is a polynomial times exp(-x^2 / 2), to 2^-16 of itself: half the
instructions of erf, and below -4, where 1 + erf has lost its digits, right. Bytes: one read, one write; backward two reads, one
write. Raises ValueError for
another `approximate`, TypeError for other dtypes.

Source: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415
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
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.special import exp2_approx, exp_fp32, normal_cdf_half, reciprocal_approx


def gelu_reference(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return F.gelu(x, approximate=approximate).contiguous()


def gelu_bwd_reference(dout: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(dout, x, approximate=approximate).contiguous()


@triton.jit
def _sigmoids(x, EXACT: tl.constexpr):
    """sigmoid(2u) and sigmoid(-2u), neither by a difference that cancels."""
    z = -1.5957691216057308 * (x + 0.044715 * x * x * x)  # -2u
    if EXACT:
        e = exp_fp32(z)
        s = 1.0 / (1.0 + e)
    else:
        e = exp2_approx(z * 1.4426950408889634)
        s = reciprocal_approx(1.0 + e)
    return s, tl.where(z > 0, 1.0 - s, e * s)


@triton.jit
def _gelu_fwd_kernel(
    x_ptr, out_ptr, B, M, N, xa, xb, xm, xn, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    if TANH:
        s, _ = _sigmoids(x, out_ptr.dtype.element_ty == tl.float32)
        out = x * s
    elif out_ptr.dtype.element_ty == tl.float32:
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        cdf, _ = normal_cdf_half(x)
        out = x * cdf
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    dout_ptr, x_ptr, dx_ptr, B, M, N, da, db, dm, dn, xa, xb, xm, xn,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dx_ptr)  # (BLOCK_M, BLOCK_N)
    x = upcast(tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask), dx_ptr)
    if TANH:
        s, rest = _sigmoids(x, dx_ptr.dtype.element_ty == tl.float32)
        slope = s + x * s * rest * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif dx_ptr.dtype.element_ty == tl.float32:
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        cdf, e = normal_cdf_half(x)
        slope = cdf + x * e * 0.3989422804014327
    tl.store(dx_ptr + offs, (dout * slope).to(dx_ptr.dtype.element_ty), mask=mask)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    out = gelu_fake(x, approximate)
    elementwise.run(_gelu_fwd_kernel, (x,), (out,), TANH=approximate == "tanh")
    return out


def gelu_fake(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gelu_bwd(dout: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    dx = gelu_bwd_fake(dout, x, approximate)
    elementwise.run(_gelu_bwd_kernel, (dout, x), (dx,), TANH=approximate == "tanh")
    return dx


def gelu_bwd_fake(dout: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    return torch.empty_like(dout, memory_format=torch.contiguous_format)


def gelu_check(x: torch.Tensor, approximate: str = "none") -> None:
    if approximate not in ("none", "tanh"):
        bad_argument("gelu", "approximate", repr(approximate), '"none" or "tanh"')


def gelu_forward(ctx: Any, x: torch.Tensor, approximate: str) -> torch.Tensor:
    ctx.save_for_backward(x)
    ctx.approximate = approximate
    return torch.ops.tt.gelu(x, approximate)


def gelu_backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.gelu_bwd(dout, *ctx.saved_tensors, ctx.approximate)


def gelu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield from elementwise.unary_samples(device, dtype)
    yield Sample("tanh", (elementwise.random((5, 127), device, dtype) * 3,), {"approximate": "tanh"})


def gelu_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    x = elementwise.special(device, dtype)
    yield Sample("special", (x,))
    yield Sample("special_tanh", (x, "tanh"))


def gelu_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from elementwise.unary_error_samples("gelu", device)
    x = torch.ones(3, device=device)
    yield ErrorSample("approximate", (x, "erf"), match="gelu.*'approximate'.*'erf'.*none.*tanh")


def gelu_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192))
    yield elementwise.bench_case((8192, 8192), id="8192x8192_tanh", approximate="tanh")


def gelu_cost(x: torch.Tensor, approximate: str = "none") -> Cost:
    return elementwise.unary_cost(x, 8)
