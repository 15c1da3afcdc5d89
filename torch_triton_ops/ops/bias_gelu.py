"""Bias and GELU in one pass: the first half of a transformer's feed-forward block, after its product.

z   = x + bias
out = gelu(z) = z * Phi(z) = z / 2 * (1 + erf(z / sqrt(2)))                          approximate = "none"
              ~ z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z ** 3)))           approximate = "tanh"

dx    = dout * gelu'(z)
dbias = sum over rows of dx, before it is rounded

| argument | shape | dtype |
|---|---|---|
| x | (..., N), any strides | float32, float16, bfloat16 |
| bias | (N,) | any of these, also another than x's |
| approximate | "tanh" (default) or "none" (erf) | |
| out | that of x, contiguous | that of x, whatever bias's is |
| dx, dbias | those of x, bias | those of x, bias |

Arithmetic in fp32, with one rounding, at the store: z is not rounded, as eager torch rounds it. Deterministic: dbias is
summed in a fixed order, without atomics.

Bytes: forward 2 * M * N * itemsize, backward 3 * M * N * itemsize. Raises ValueError for x without dimensions, a bias of
another shape, another word for approximate.

Source: Hendrycks and Gimpel, Gaussian Error Linear Units, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.fusion import as_rows, column_sum_kernel
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

BIAS_GELU_APPROXIMATIONS = ("none", "tanh")

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _sum_of_x_and_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype) + bias.to(dtype)


def bias_gelu_reference(x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    return F.gelu(_sum_of_x_and_bias(x, bias), approximate=approximate).to(x.dtype).contiguous()


def bias_gelu_bwd_reference(
    dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dbias = bias_gelu_bwd_fake(dout, x, bias, approximate, needs)
    z = _sum_of_x_and_bias(x, bias)
    dz = torch.ops.aten.gelu_backward(dout.to(z.dtype), z, approximate=approximate)
    if needs[0]:
        dx.copy_(dz)
    if needs[1]:
        dbias.copy_(dz.sum(tuple(range(x.ndim - 1))) if x.ndim > 1 else dz)
    return dx, dbias


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _bias_gelu_exponent(z, zz, TANH: tl.constexpr):
    """w such that gelu(z) = z / (1 + 2 ** w): the factor of z is a sigmoid in both forms, and has a cheap exponential.

    tanh: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), exactly. erf: -log2(Phi(z) / Phi(-z)) is odd and smooth; the minimax
    polynomial is off by at most 3.4e-6 in gelu and in Phi, a hundredth of half precision's rounding near 1. It takes half of
    the instructions of erf, which would cost more time than the memory does.
    """
    if TANH:
        return z * (-2.302208198 - 0.10294324 * zz)
    else:
        return z * (
            -2.302114319 + zz * (-0.10514166 + zz * (3.29903124e-4 + zz * (9.21381173e-5 - 3.38557339e-6 * zz)))
        )


@triton.jit
def _bias_gelu_value(z, TANH: tl.constexpr, ERF: tl.constexpr):
    if ERF:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        return z / (1.0 + tl.exp2(_bias_gelu_exponent(z, z * z, TANH)))


@triton.jit
def _bias_gelu_slope(z, TANH: tl.constexpr, ERF: tl.constexpr):
    zz = z * z
    if TANH:
        # below 2**64, so that its product with the square of its reciprocal is no inf * 0
        e = tl.exp2(tl.minimum(_bias_gelu_exponent(z, zz, TANH), 64.0))
        s = 1.0 / (1.0 + e)
        return s + s * (e * s) * (z * (1.5957691216 + 0.2140644488 * zz))
    else:
        pdf = 0.3989422804 * tl.exp2(-0.7213475204 * zz)
        if ERF:
            return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * pdf
        else:
            return 1.0 / (1.0 + tl.exp2(_bias_gelu_exponent(z, zz, TANH))) + z * pdf


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    TANH: tl.constexpr,
    ERF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of (BLOCK_M, BLOCK_N) per program; its rows share the bias."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = ((pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
    offs_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n
    x = tl.load(x_ptr + offs_m * stride_xm + offs_n, mask=mask).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n).to(tl.float32)  # (1, BLOCK_N)
    out = _bias_gelu_value(x + bias, TANH, ERF)
    tl.store(out_ptr + offs_m * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    M,
    N,
    stride_doutm,
    stride_xm,
    TANH: tl.constexpr,
    ERF: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """STEPS tiles of (BLOCK_M, BLOCK_N), one below the other, per program; the sum of their rows stays in registers.

    partial_ptr: (row blocks, N) fp32, one row of sums per program.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = (pid // blocks).to(tl.int64)
    offs_n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # (1, BLOCK_N)
    # Rows are summed within a thread as long as possible: two dimensions, and one reduction after the loop.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        offs_m = ((pid_m * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
        mask = (offs_m < M) & mask_n[None, :]
        x = tl.load(x_ptr + offs_m * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        # 0 outside the tensor, so that those rows add nothing
        dout = tl.load(dout_ptr + offs_m * stride_doutm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        dz = dout * _bias_gelu_slope(x + bias, TANH, ERF)  # (BLOCK_M, BLOCK_N)
        if NEEDS_DX:
            tl.store(dx_ptr + offs_m * N + offs_n[None, :], dz.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DBIAS:
            acc += dz
    if NEEDS_DBIAS:
        tl.store(partial_ptr + pid_m * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _tile(N: int, elements: int, width: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of so many elements, as wide as a row of N at most."""
    block_n = width if width // 2 < N else next_power_of_2(N)
    return elements // block_n, block_n


def _formula(x: torch.Tensor, approximate: str) -> dict[str, bool]:
    return {"TANH": approximate == "tanh", "ERF": approximate == "none" and x.dtype == torch.float32}


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    out = bias_gelu_fake(x, bias, approximate)
    (x,) = as_rows(x, flat=False)
    M, N = x.shape
    block_m, block_n = _tile(N, elements=4096, width=1024)
    launch(
        _bias_gelu_fwd_kernel,
        (cdiv(M, block_m) * cdiv(N, block_n),),
        x,
        bias.contiguous(),
        out,
        M,
        N,
        x.stride(0),
        **_formula(x, approximate),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


# Tiles of a backward program: a row of partial sums for every 64 rows of 256 columns adds 2 % to the bytes.
_STEPS = 8


def bias_gelu_bwd(
    dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """needs: whether dx, dbias are wanted; the other is an empty tensor."""
    dx, dbias = bias_gelu_bwd_fake(dout, x, bias, approximate, needs)
    dout, x = as_rows(dout, x, flat=False)
    M, N = x.shape
    block_m, block_n = _tile(N, elements=2048, width=256)
    row_blocks = cdiv(M, block_m * _STEPS)
    partial = x.new_empty((row_blocks, N), dtype=torch.float32) if needs[1] else None
    launch(
        _bias_gelu_bwd_kernel,
        (row_blocks * cdiv(N, block_n),),
        dout,
        x,
        bias.contiguous(),
        dx,
        partial,
        M,
        N,
        dout.stride(0),
        x.stride(0),
        **_formula(x, approximate),
        NEEDS_DX=needs[0],
        NEEDS_DBIAS=needs[1],
        STEPS=_STEPS,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    if partial is not None:
        launch(column_sum_kernel, (cdiv(N, 16),), partial, dbias, row_blocks, N, BLOCK_G=64, BLOCK_N=16)
    return dx, dbias


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def bias_gelu_fake(x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    return x.new_empty(x.shape)


def bias_gelu_bwd_fake(
    dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needs[0] else (0,)), bias.new_empty(bias.shape if needs[1] else (0,))


def bias_gelu_check(x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> None:
    if x.ndim == 0:
        bad_argument("bias_gelu", "x", "a tensor without dimensions", "at least one dimension, (..., N)")
    if bias.shape != x.shape[-1:]:
        bad_argument("bias_gelu", "bias", f"of shape {tuple(bias.shape)}", f"({x.shape[-1]},), the last size of x")
    if approximate not in BIAS_GELU_APPROXIMATIONS:
        bad_argument("bias_gelu", "approximate", repr(approximate), "'none' or 'tanh'")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def bias_gelu_forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    ctx.save_for_backward(x, bias)
    ctx.approximate = approximate
    return torch.ops.tt.bias_gelu(x, bias, approximate)


def bias_gelu_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, bias = ctx.saved_tensors
    return torch.ops.tt.bias_gelu_bwd(dout, x, bias, ctx.approximate, list(ctx.needs))


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def bias_gelu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield Sample("M3_N129", (t(3, 129), t(129)))
    yield Sample("M3_N129_erf", (t(3, 129), t(129), "none"))
    # several programs, several rows of partial sums
    yield Sample("M70_N300", (t(70, 300), t(300)), slow_in_interpreter=True)
    yield Sample("batch_2x3x40", (t(2, 3, 40), t(40, dtype=other)))
    yield Sample("one_row", (t(33), t(33)))
    yield Sample("N1", (t(4, 1), t(1)))
    yield Sample("large_values", (t(4, 64) * 100, t(64)))
    yield Sample("large_values_erf", (t(4, 64) * 100, t(64), "none"))
    yield Sample("empty_rows", (t(0, 16), t(16)))


def bias_gelu_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        x = torch.randn(2**18 + 1, 2**13, device=device, dtype=dtype)[:, :8]
        yield Sample("rows_past_2^31", (x, torch.randn(8, device=device, dtype=dtype)))


def bias_gelu_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("scalar", (x[0, 0], x[0]), match="bias_gelu.*'x'.*at least one dimension")
    yield ErrorSample("bias_shape", (x, x[0, :31]), match=r"bias_gelu.*'bias'.*\(31,\).*\(32,\)")
    yield ErrorSample("approximate", (x, x[0], "sigmoid"), match="bias_gelu.*'approximate' is 'sigmoid'.*'tanh'")


def bias_gelu_bench_cases() -> Iterator[BenchCase]:
    def make(approximate: str, device: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((8192, 8192), (8192,)))
        return (x, bias, approximate), {}

    yield BenchCase("8192x8192", lambda device, dtype: make("tanh", device, dtype))
    yield BenchCase("8192x8192_erf", lambda device, dtype: make("none", device, dtype))


def bias_gelu_cost(x: torch.Tensor, bias: torch.Tensor, approximate: str = "tanh") -> Cost:
    size, row = x.numel() * x.element_size(), bias.numel() * bias.element_size()
    return Cost(
        flops=10 * x.numel(),
        bytes=2 * size + row,
        backward_flops=20 * x.numel(),
        backward_bytes=3 * size + 2 * row,
    )
