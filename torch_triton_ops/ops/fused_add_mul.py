"""A sum and a product in one pass, with broadcasting and type promotion: the first fusion of the course.

out = (x + y) * z

ds = dout * z, which is dx and dy;  dz = dout * (x + y); each summed over the dimensions that were broadcast

| tensor | shape | dtype |
|---|---|---|
| x, y, z | any three that broadcast; any strides | float32, float16, bfloat16, any three; y, z also int32, int64 |
| out | the broadcast shape, contiguous | that of (x + y) * z in torch |

Half precision is added and multiplied in fp32, with one rounding: the sum is not rounded, as eager torch rounds it.

Bytes: each input read once, the result written once; as two eager operations the sum is written and read besides: 6 numel
instead of 4. Raises ValueError where the shapes do not broadcast, TypeError for other dtypes.

Source: https://triton-lang.org/main/getting-started/tutorials/01-vector-add.html
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
from torch_triton_ops.errors import bad_argument

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _wide(*tensors: torch.Tensor | None) -> list[Any]:
    """In the dtype of arithmetic: fp32, or fp64 where one of them is."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return [None if t is None else t.to(torch.float64 if double else torch.float32) for t in tensors]


def fused_add_mul_reference(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    xf, yf, zf = _wide(x, y, z)
    return ((xf + yf) * zf).to(_result_dtype(x, y, z)).contiguous()


def fused_add_mul_eager(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """With the sum rounded, and the terms of a broadcast input's gradient: those ours rounds, too."""
    return (x + y) * z


def fused_add_mul_bwd_reference(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None, z: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ds, dz = fused_add_mul_bwd_fake(dout, x, y, z)
    doutf, xf, yf, zf = _wide(dout, x, y, z)
    if z is not None:
        ds.copy_(doutf * zf)
    if x is not None:
        dz.copy_(doutf * (xf + yf))
    return ds, dz


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _fused_add_mul_fwd_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    out_ptr,
    B,
    M,
    N,
    xa,
    xb,
    xm,
    xn,
    ya,
    yb,
    ym,
    yn,
    za,
    zb,
    zm,
    zn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)  # (BLOCK_M, BLOCK_N)
    y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
    z = tl.load(z_ptr + a * za + b * zb + m * zm + n * zn, mask=mask)
    out = (upcast(x, out_ptr) + upcast(y, out_ptr)) * upcast(z, out_ptr)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fused_add_mul_bwd_kernel(
    dout_ptr,
    x_ptr,
    y_ptr,
    z_ptr,
    ds_ptr,
    dz_ptr,
    B,
    M,
    N,
    da,
    db,
    dm,
    dn,
    xa,
    xb,
    xm,
    xn,
    ya,
    yb,
    ym,
    yn,
    za,
    zb,
    zm,
    zn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A gradient that is not wanted has no pointer, and nor have the inputs that only it needs."""
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dout_ptr)  # (BLOCK_M, BLOCK_N)
    if ds_ptr is not None:
        z = tl.load(z_ptr + a * za + b * zb + m * zm + n * zn, mask=mask)
        ds = dout * upcast(z, dout_ptr)
        tl.store(ds_ptr + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)
    if dz_ptr is not None:
        x = tl.load(x_ptr + a * xa + b * xb + m * xm + n * xn, mask=mask)
        y = tl.load(y_ptr + a * ya + b * yb + m * ym + n * yn, mask=mask)
        dz = dout * (upcast(x, dout_ptr) + upcast(y, dout_ptr))
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def fused_add_mul(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    out = fused_add_mul_fake(x, y, z)
    elementwise.run(_fused_add_mul_fwd_kernel, (x, y, z), (out,))
    return out


def fused_add_mul_bwd(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None, z: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """z is given where ds is wanted, x and y where dz is; the other gradient is an empty tensor."""
    ds, dz = fused_add_mul_bwd_fake(dout, x, y, z)
    outputs = (None if z is None else ds, None if x is None else dz)
    elementwise.run(_fused_add_mul_bwd_kernel, (dout, x, y, z), outputs)
    return ds, dz


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def _result_dtype(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.dtype:
    """Of (x + y) * z in torch, where a tensor without dimensions does not widen one with dimensions. x is floating-point."""
    dtype = elementwise.result_dtype(x, y)
    if z.dtype.is_floating_point and x.ndim == y.ndim == 0 and z.ndim > 0:
        return z.dtype
    if z.ndim == 0 and (x.ndim > 0 or y.ndim > 0):
        return dtype
    return torch.promote_types(dtype, z.dtype)


def fused_add_mul_fake(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    shape = x.shape if x.shape == y.shape == z.shape else torch.broadcast_shapes(x.shape, y.shape, z.shape)
    return x.new_empty(shape, dtype=_result_dtype(x, y, z))


def fused_add_mul_bwd_fake(
    dout: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None, z: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return elementwise.wanted(dout, z is not None), elementwise.wanted(dout, x is not None)


def fused_add_mul_check(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    elementwise.check_binary("fused_add_mul", x, y)
    elementwise.check_binary("fused_add_mul", x, z, "z")
    # with x both broadcast; then so do all three, unless y and z clash where x has a size of one
    try:
        elementwise.broadcast_shape(y, z)
    except ValueError:
        shape = tuple(y.shape)
        bad_argument("fused_add_mul", "z", f"of shape {tuple(z.shape)}", f"one that broadcasts with y's, {shape}")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def fused_add_mul_forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    elementwise.save_kinds(ctx, x, y, z)
    needs_ds, needs_dz = ctx.needs[0] or ctx.needs[1], ctx.needs[2]
    ctx.save_for_backward(x if needs_dz else None, y if needs_dz else None, z if needs_ds else None)
    return torch.ops.tt.fused_add_mul(x, y, z)


def fused_add_mul_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    ds, dz = torch.ops.tt.fused_add_mul_bwd(dout, *ctx.saved_tensors)
    return elementwise.reduce_gradients(ctx, ds, ds, dz)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def fused_add_mul_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return elementwise.random(shape, device, dtype)

    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield Sample("33x65", (t(33, 65), t(33, 65), t(33, 65)))
    yield Sample("broadcast", (t(3, 1, 65), t(7, 1), t(65)))
    yield Sample("promoted", (t(5, 33), t(5, 33, dtype=other), t(33, dtype=torch.int64)))
    yield Sample("scalar_z", (t(5), t(5), t()))
    yield Sample("scalar_sum", (t(), t(), t(4)))
    yield Sample("empty", (t(0, 3), t(3), t(1, 3)))
    yield Sample("strided", (t(9, 35).t(), t(35, 18)[:, ::2], t(35, 9)))


def fused_add_mul_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        x = torch.randn(2**18 + 1, 2**13, device=device, dtype=dtype)
        yield Sample("rows_past_2^31", (x[:, :8], x[:, 8:16], x[:, 16:24]))


def fused_add_mul_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    name = "fused_add_mul"
    yield ErrorSample("shape_y", (x, x[:, :2], x), match=rf"{name}.*'y'.*\(4, 2\).*\(4, 5\)")
    yield ErrorSample("shape_z", (x, x, x[:, :2]), match=rf"{name}.*'z'.*\(4, 2\).*\(4, 5\)")
    yield ErrorSample("shape_y_z", (x[0, :1], x, x[:, :2]), match=rf"{name}.*'z'.*\(4, 2\).*y's, \(4, 5\)")
    yield ErrorSample("dtype_z", (x, x, x > 0), error=TypeError, match=f"{name}.*'z'.*bool.*float32")


def fused_add_mul_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 8192), (8192, 8192), (8192, 8192))


def fused_add_mul_cost(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Cost:
    shape = torch.broadcast_shapes(x.shape, y.shape, z.shape)
    n = torch.Size(shape).numel()
    inputs = sum(t.numel() * t.element_size() for t in (x, y, z))
    out = n * _result_dtype(x, y, z).itemsize
    return Cost(flops=2 * n, bytes=inputs + out, backward_flops=3 * n, backward_bytes=inputs + 3 * out)
