"""Vector addition, the first kernel of the course.

out[i] = x[i] + y[i]

| tensor | shape | dtype |
|---|---|---|
| x, y | any, the same | float32, float16, bfloat16 (the same) |
| out | that of x | that of x |

Bytes: 3 * numel * itemsize. One addition per 12 bytes of fp32: bandwidth is the only limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch


def vector_add_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x + y).contiguous()


@triton.jit
def _vector_add_fwd_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    # int64: N may pass 2**31 elements
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    x = tl.load(x_ptr + offs_n, mask=mask_n).to(tl.float32)
    y = tl.load(y_ptr + offs_n, mask=mask_n).to(tl.float32)
    tl.store(out_ptr + offs_n, (x + y).to(out_ptr.dtype.element_ty), mask=mask_n)


def vector_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = vector_add_fake(x, y)
    N = out.numel()
    launch(_vector_add_fwd_kernel, (cdiv(N, 2048),), x.contiguous(), y.contiguous(), out, N, BLOCK_N=2048, num_warps=8)
    return out


def vector_add_fake(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def vector_add_check(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape != y.shape:
        bad_argument("vector_add", "y", f"of shape {tuple(y.shape)}", f"the shape of x, {tuple(x.shape)}")
    if x.dtype != y.dtype:
        bad_argument("vector_add", "y", f"of dtype {y.dtype}", f"the dtype of x, {x.dtype}", TypeError)


def vector_add_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.ops.tt.vector_add(x, y)


def vector_add_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return dout, dout


def vector_add_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    for shape in [(1,), (0,), (1000,), (33, 65), (2, 3, 0), (3, 1, 129), ()]:
        yield Sample(
            "x".join(map(str, shape)) or "scalar",
            (torch.randn(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype)),
        )


def vector_add_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        x = torch.randn(2**31 + 5, device=device, dtype=dtype)
        yield Sample("2^31+5", (x, x.flip(0)))


def vector_add_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("shapes_differ", (x, x[0]), match=r"vector_add.*'y'.*\(5,\).*\(4, 5\)")
    yield ErrorSample("dtypes_differ", (x, x.half()), error=TypeError, match="vector_add.*'y'.*float16.*float32")


def vector_add_bench_cases() -> Iterator[BenchCase]:
    def make(n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(n, device=device, dtype=dtype), torch.randn(n, device=device, dtype=dtype)), {}

    for exponent in (20, 27):
        yield BenchCase(
            f"2^{exponent}", lambda d, t, n=2**exponent: make(n, d, t), dtype=torch.float32, passes=("fwd",)
        )


def vector_add_cost(x: torch.Tensor, y: torch.Tensor) -> Cost:
    return Cost(flops=x.numel(), bytes=3 * x.numel() * x.element_size())
