"""SiLU with a slope, also called Swish.

y  = x * s                        with s = sigmoid(beta * x)
dx = dy * s * (1 + beta * x * (1 - s))

| tensor | shape | dtype |
|---|---|---|
| x, dy | any, any strides | float32, float16, bfloat16 |
| y, dx | that of x, contiguous | that of x |

beta is a number without a gradient; ValueError if it is not finite. Arithmetic in fp32, one rounding at the store.

Source: Ramachandran, Zoph and Le, Searching for Activation Functions, https://arxiv.org/abs/1710.05941
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch

# -- reference: the specification, and what runs on CPU tensors -------------------------------------------------------


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scaled_silu_reference(x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    xf = x.to(_arithmetic_dtype(x))
    return (xf * torch.sigmoid(beta * xf)).to(x.dtype).contiguous()


def scaled_silu_bwd_reference(dy: torch.Tensor, x: torch.Tensor, beta: float) -> torch.Tensor:
    xf = x.to(_arithmetic_dtype(x))
    s = torch.sigmoid(beta * xf)
    return (dy.to(xf.dtype) * s * (1.0 + beta * xf * (1.0 - s))).to(x.dtype).contiguous()


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled_silu_fwd_kernel(x_ptr, y_ptr, N, BETA: tl.constexpr, BLOCK_N: tl.constexpr):
    # int64: N may pass 2**31 elements
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    y = x * tl.sigmoid(BETA * x)
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _scaled_silu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, N, BETA: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    dy = tl.load(dy_ptr + offs_n, mask=mask_n).to(tl.float32)
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    s = tl.sigmoid(BETA * x)
    dx = dy * s * (1.0 + BETA * x * (1.0 - s))
    tl.store(dx_ptr + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)


# -- launchers: what runs on CUDA tensors -----------------------------------------------------------------------------

_BLOCK_N = 2048


def scaled_silu(x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    y = scaled_silu_fake(x, beta)
    N = x.numel()
    launch(_scaled_silu_fwd_kernel, (cdiv(N, _BLOCK_N),), x.contiguous(), y, N, BETA=beta, BLOCK_N=_BLOCK_N)
    return y


def scaled_silu_bwd(dy: torch.Tensor, x: torch.Tensor, beta: float) -> torch.Tensor:
    dx = scaled_silu_bwd_fake(dy, x, beta)
    N = x.numel()
    launch(
        _scaled_silu_bwd_kernel,
        (cdiv(N, _BLOCK_N),),
        dy.contiguous(),
        x.contiguous(),
        dx,
        N,
        BETA=beta,
        BLOCK_N=_BLOCK_N,
    )
    return dx


# -- fakes: the shape of the result, for torch.compile and torch.export -----------------------------------------------


def scaled_silu_fake(x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    return x.new_empty(x.shape)


def scaled_silu_bwd_fake(dy: torch.Tensor, x: torch.Tensor, beta: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def scaled_silu_check(x: torch.Tensor, beta: float = 1.0) -> None:
    if not math.isfinite(beta):
        bad_argument("scaled_silu", "beta", beta, "a finite number", namespace="my")


# -- gradient ---------------------------------------------------------------------------------------------------------


def scaled_silu_forward(ctx: Any, x: torch.Tensor, beta: float) -> torch.Tensor:
    ctx.save_for_backward(x)
    ctx.beta = beta
    return torch.ops.my.scaled_silu(x, beta)


def scaled_silu_backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    return torch.ops.my.scaled_silu_bwd(dy, x, ctx.beta)


# -- what tests and benchmarks walk -----------------------------------------------------------------------------------


def scaled_silu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    for shape in [(1,), (0,), (1000,), (33, 65), (2, 0, 3), ()]:
        x = torch.randn(shape, device=device, dtype=dtype)
        yield Sample("x".join(map(str, shape)) or "scalar", (x,))
    yield Sample("beta", (torch.randn(7, 129, device=device, dtype=dtype), -1.5))
    yield Sample("large_values", (torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], device=device, dtype=dtype),))


def scaled_silu_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("beta_nan", (x, math.nan), match="my::scaled_silu.*'beta' is nan; allowed: a finite number")
    yield ErrorSample("integers", (x.int(),), error=TypeError, match="my::scaled_silu.*'x' is of dtype torch.int32")


def scaled_silu_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(8192, 14336, device=device, dtype=dtype),), {}

    yield BenchCase("8192x14336", make)


def scaled_silu_cost(x: torch.Tensor, beta: float = 1.0) -> Cost:
    size = x.numel() * x.element_size()
    return Cost(flops=4 * x.numel(), bytes=2 * size, backward_flops=8 * x.numel(), backward_bytes=3 * size)
