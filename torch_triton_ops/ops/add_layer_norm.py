"""Residual addition and layer normalisation of the sum, in one pass.

s            = x + residual, rounded to residual's dtype
residual_out = s
rstd         = 1 / sqrt(mean((s - mean(s)) ** 2) + eps)
y            = (s - mean(s)) * rstd * weight + bias

With g = dy * weight and xhat = (s - mean(s)) * rstd:

ds      = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual_out, which is dx and dresidual
dweight = sum over rows of dy * xhat
dbias   = sum over rows of dy

| tensor | shape | dtype |
|---|---|---|
| x | (..., N), any strides | float32, float16, bfloat16 |
| residual | that of x, any strides | any of these: a residual stream may be kept in float32 |
| weight | (N,) or None (then 1) | any of these, also another than x's |
| bias | (N,) or None (then 0) | any of these, also another than x's |
| y | (..., N) contiguous | that of x |
| residual_out | (..., N) contiguous | that of residual |
| mean, rstd | (...) | float32 |
| dx, dresidual, dweight, dbias | those of x, residual, weight, bias | those of x, residual, weight, bias |

Between two blocks of a transformer the sum goes on as the residual stream and the norm goes into the block: one kernel
writes both. Either may go unused; its upstream gradient is then neither read nor filled with zeros. Statistics and
arithmetic are in fp32; rows far from zero lose nothing. Deterministic: the gradients of weight and bias are summed in a
fixed order, without atomics. The kernels are those of `norms.py`.

Bytes: forward 4 * M * N * itemsize, backward 4 * M * N * itemsize (dx and dresidual are one tensor where the dtypes are
equal). Raises ValueError for x without dimensions, a residual of another shape, a weight or bias
of another shape and a negative eps.

Source: Ba, Kiros, Hinton, Layer Normalization, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torch_triton_ops import norms
from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.norms import other_dtype, statistics_dtype

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def add_layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_layer_norm_fwd_reference(x, residual, weight, bias, eps)[:2]


def add_layer_norm_fwd_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(statistics_dtype(x), statistics_dtype(residual))
    s = (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
    y, mean, rstd = norms.forward_reference(s, weight, bias, eps, centred=True)
    return y.to(x.dtype).contiguous(), s.contiguous(), mean, rstd


def add_layer_norm_bwd_reference(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out = add_layer_norm_bwd_fake(dy, dresidual_out, residual_out, weight, bias, mean, rstd, needs)
    ds, *rest = norms.backward_reference(dy, residual_out, weight, mean, rstd)
    if dresidual_out is not None:
        ds = ds + dresidual_out.to(ds.dtype)
    norms.copy_wanted(out, (ds, ds, *rest), needs)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual_out = add_layer_norm_fake(x, residual, weight, bias, eps)
    norms.forward(x, residual, weight, bias, eps, 0.0, y, residual_out, None, None, centred=True)
    return y, residual_out


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, residual_out, mean, rstd = add_layer_norm_fwd_fake(x, residual, weight, bias, eps)
    norms.forward(x, residual, weight, bias, eps, 0.0, y, residual_out, mean, rstd, centred=True)
    return y, residual_out, mean, rstd


def add_layer_norm_bwd(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """needs: whether dx, dresidual, dweight, dbias are wanted; the others are empty tensors."""
    out = add_layer_norm_bwd_fake(dy, dresidual_out, residual_out, weight, bias, mean, rstd, needs)
    wanted = [gradient if needed else None for gradient, needed in zip(out, needs, strict=True)]
    norms.backward(dy, dresidual_out, residual_out, weight, mean, rstd, 0.0, *wanted)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def add_layer_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def add_layer_norm_fwd_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, residual_out = add_layer_norm_fake(x, residual)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics_dtype(residual)) for _ in range(2))
    return y, residual_out, mean, rstd


def add_layer_norm_bwd_fake(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        norms.empty_gradient(dy, dy, needs[0]),
        norms.empty_gradient(residual_out, dy, needs[1]),
        norms.empty_gradient(weight, dy, needs[2]),
        norms.empty_gradient(bias, dy, needs[3]),
    )


def add_layer_norm_check(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    norms.check("add_layer_norm", x, eps, weight, bias, residual=residual)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def add_layer_norm_forward(
    ctx: Any,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual_out, mean, rstd = torch.ops.tt.add_layer_norm_fwd(x, residual, weight, bias, eps)
    ctx.save_for_backward(residual_out, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)
    return y, residual_out


def add_layer_norm_backward(
    ctx: Any, dy: torch.Tensor | None, dresidual_out: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dy is None:  # the sum's gradient is that of both terms
        return dresidual_out, dresidual_out, None, None
    residual_out = ctx.saved_tensors[0]
    needs = list(ctx.needs)
    shared = dy.dtype == residual_out.dtype and needs[1]
    if shared:
        needs[:2] = [True, False]
    found = torch.ops.tt.add_layer_norm_bwd(dy, dresidual_out, *ctx.saved_tensors, needs)
    dx, dresidual, dweight, dbias = (
        gradient if needed else None for gradient, needed in zip(found, needs, strict=True)
    )
    return dx, dx if shared else dresidual, dweight, dbias


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def add_layer_norm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    other = other_dtype(dtype)
    yield Sample("M3_N33", (t(3, 33), t(3, 33), t(33), t(33)))
    yield Sample("plain", (t(2, 3, 64), t(2, 3, 64)), {"eps": 0.1})
    yield Sample("bias_alone", (t(5, 40), t(5, 40), None, t(40, dtype=other)))
    yield Sample("residual_of_other_dtype", (t(9, 72), t(9, 72, dtype=other) + 100, t(72, dtype=other), t(72)))
    yield Sample("N1", (t(4, 1), t(4, 1), t(1), t(1)))
    yield Sample("empty_rows", (t(0, 16), t(0, 16), t(16)))
    yield Sample("M2_N17000", (t(2, 17000) + 100, t(2, 17000), t(17000), t(17000)))


def add_layer_norm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("scalar", (x[0, 0], x[0, 0]), match="add_layer_norm.*'x'.*at least one dimension")
    yield ErrorSample("residual_shape", (x, x[:1]), match=r"add_layer_norm.*'residual'.*\(1, 32\).*\(4, 32\)")
    yield ErrorSample("weight_shape", (x, x, x[0, :31]), match=r"add_layer_norm.*'weight'.*\(31,\).*\(32,\)")
    yield ErrorSample("bias_shape", (x, x, x[0], x[:1]), match=r"add_layer_norm.*'bias'.*\(1, 32\).*\(32,\)")
    yield ErrorSample("negative_eps", (x, x), {"eps": -1e-5}, match="add_layer_norm.*'eps' is -1e-05.*>= 0")


def add_layer_norm_bench_cases() -> Iterator[BenchCase]:
    def make(M: int, N: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = ((M, N), (M, N), (N,), (N,))
        return tuple(torch.randn(*shape, device=device, dtype=dtype) for shape in shapes), {}

    for M, N in [(8192, 4096), (16384, 8192), (32768, 1024)]:
        yield BenchCase(f"{M}x{N}", lambda d, t, M=M, N=N: make(M, N, d, t))


def add_layer_norm_cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Cost:
    size, kept = (t.numel() * t.element_size() for t in (x, residual))
    own = 0 if x.dtype == residual.dtype else size  # a dx that is not dresidual
    weights, biases = (0 if v is None else v.numel() * v.element_size() for v in (weight, bias))
    return Cost(
        flops=8 * x.numel(),
        bytes=2 * size + 2 * kept + weights + biases,
        backward_flops=12 * x.numel(),
        backward_bytes=size + 3 * kept + own + 2 * weights + biases,
    )
