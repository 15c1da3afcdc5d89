"""Residual addition and root-mean-square normalisation of the sum, in one pass.

s            = x + residual, rounded to residual's dtype
residual_out = s
rstd         = 1 / sqrt(mean(s ** 2) + eps)
y            = s * rstd * (weight + weight_offset)

With g = dy * (weight + weight_offset) and xhat = s * rstd:

ds      = rstd * (g - xhat * mean(g * xhat)) + dresidual_out, which is dx and dresidual
dweight = sum over rows of dy * xhat

| tensor | shape | dtype |
|---|---|---|
| x | (..., N), any strides | float32, float16, bfloat16 |
| residual | that of x, any strides | any of these: a residual stream may be kept in float32 |
| weight | (N,) or None (then 1, and weight_offset must be 0) | any of these, also another than x's |
| y | (..., N) contiguous | that of x |
| residual_out | (..., N) contiguous | that of residual |
| rstd | (...) | float32 |
| dx, dresidual, dweight | those of x, residual, weight | those of x, residual, weight |

Between two blocks of a transformer the sum goes on as the residual stream and the norm goes into the block: one kernel
writes both. Either may go unused; its upstream gradient is then neither read nor filled with zeros. `weight_offset` is
Gemma's 1.0. Statistics and arithmetic are in fp32. Deterministic: the gradient of weight is summed in a fixed order,
without atomics. The kernels are those of `norms.py`.

Bytes: forward 4 * M * N * itemsize, backward 4 * M * N * itemsize (dx and dresidual are one tensor where the dtypes are
equal). Raises ValueError for x without dimensions, a residual of another shape, a weight of
another shape, a negative eps and an offset without a weight.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
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


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm_fwd_reference(x, residual, weight, eps, weight_offset)[:2]


def add_rms_norm_fwd_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(statistics_dtype(x), statistics_dtype(residual))
    s = (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
    y, _, rstd = norms.forward_reference(s, weight, None, eps, weight_offset)
    return y.to(x.dtype).contiguous(), s.contiguous(), rstd


def add_rms_norm_bwd_reference(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = add_rms_norm_bwd_fake(dy, dresidual_out, residual_out, weight, rstd, weight_offset, needs)
    ds, *rest = norms.backward_reference(dy, residual_out, weight, None, rstd, weight_offset)
    if dresidual_out is not None:
        ds = ds + dresidual_out.to(ds.dtype)
    norms.copy_wanted(out, (ds, ds, *rest), needs)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual_out = add_rms_norm_fake(x, residual, weight, eps, weight_offset)
    norms.forward(x, residual, weight, None, eps, weight_offset, y, residual_out, None, None, centred=False)
    return y, residual_out


def add_rms_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, residual_out, rstd = add_rms_norm_fwd_fake(x, residual, weight, eps, weight_offset)
    norms.forward(x, residual, weight, None, eps, weight_offset, y, residual_out, None, rstd, centred=False)
    return y, residual_out, rstd


def add_rms_norm_bwd(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """needs: whether dx, dresidual, dweight are wanted; the others are empty tensors."""
    out = add_rms_norm_bwd_fake(dy, dresidual_out, residual_out, weight, rstd, weight_offset, needs)
    wanted = [gradient if needed else None for gradient, needed in zip(out, needs, strict=True)]
    norms.backward(dy, dresidual_out, residual_out, weight, None, rstd, weight_offset, *wanted, None)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def add_rms_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def add_rms_norm_fwd_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, residual_out = add_rms_norm_fake(x, residual)
    return y, residual_out, x.new_empty(x.shape[:-1], dtype=statistics_dtype(residual))


def add_rms_norm_bwd_fake(
    dy: torch.Tensor,
    dresidual_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        norms.empty_gradient(dy, dy, needs[0]),
        norms.empty_gradient(residual_out, dy, needs[1]),
        norms.empty_gradient(weight, dy, needs[2]),
    )


def add_rms_norm_check(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> None:
    norms.check("add_rms_norm", x, eps, weight, weight_offset=weight_offset, residual=residual)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def add_rms_norm_forward(
    ctx: Any,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, residual_out, rstd = torch.ops.tt.add_rms_norm_fwd(x, residual, weight, eps, weight_offset)
    ctx.save_for_backward(residual_out, weight, rstd)
    ctx.weight_offset = weight_offset
    ctx.set_materialize_grads(False)
    return y, residual_out


def add_rms_norm_backward(
    ctx: Any, dy: torch.Tensor | None, dresidual_out: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dy is None:  # the sum's gradient is that of both terms
        return dresidual_out, dresidual_out, None
    residual_out = ctx.saved_tensors[0]
    needs = list(ctx.needs)
    shared = dy.dtype == residual_out.dtype and needs[1]
    if shared:
        needs[:2] = [True, False]
    found = torch.ops.tt.add_rms_norm_bwd(dy, dresidual_out, *ctx.saved_tensors, ctx.weight_offset, needs)
    dx, dresidual, dweight = (gradient if needed else None for gradient, needed in zip(found, needs, strict=True))
    return dx, dx if shared else dresidual, dweight


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def add_rms_norm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    other = other_dtype(dtype)
    yield Sample("M3_N33", (t(3, 33), t(3, 33), t(33)))
    yield Sample("plain", (t(2, 3, 64), t(2, 3, 64)), {"eps": 0.1})
    yield Sample("weight_offset", (t(5, 40), t(5, 40), t(40, dtype=other)), {"weight_offset": 1.0})
    yield Sample("residual_of_other_dtype", (t(9, 72), t(9, 72, dtype=other), t(72)))
    yield Sample("N1", (t(4, 1), t(4, 1), t(1)))
    yield Sample("empty_rows", (t(0, 16), t(0, 16), t(16)))
    yield Sample("M2_N17000", (t(2, 17000), t(2, 17000), t(17000)))


def add_rms_norm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("scalar", (x[0, 0], x[0, 0]), match="add_rms_norm.*'x'.*at least one dimension")
    yield ErrorSample("residual_shape", (x, x[:1]), match=r"add_rms_norm.*'residual'.*\(1, 32\).*\(4, 32\)")
    yield ErrorSample("weight_shape", (x, x, x[0, :31]), match=r"add_rms_norm.*'weight'.*\(31,\).*\(32,\)")
    yield ErrorSample(
        "offset_alone", (x, x), {"weight_offset": 1.0}, match="add_rms_norm.*'weight_offset' is 1.0.*weight"
    )
    yield ErrorSample("negative_eps", (x, x), {"eps": -1e-5}, match="add_rms_norm.*'eps' is -1e-05.*>= 0")


def add_rms_norm_bench_cases() -> Iterator[BenchCase]:
    def make(M: int, N: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = ((M, N), (M, N), (N,))
        return tuple(torch.randn(*shape, device=device, dtype=dtype) for shape in shapes), {}

    for M, N in [(8192, 4096), (16384, 8192), (32768, 1024)]:
        yield BenchCase(f"{M}x{N}", lambda d, t, M=M, N=N: make(M, N, d, t))


def add_rms_norm_cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Cost:
    size, kept = (t.numel() * t.element_size() for t in (x, residual))
    own = 0 if x.dtype == residual.dtype else size  # a dx that is not dresidual
    weights = 0 if weight is None else weight.numel() * weight.element_size()
    return Cost(
        flops=5 * x.numel(),
        bytes=2 * size + 2 * kept + weights,
        backward_flops=9 * x.numel(),
        backward_bytes=size + 3 * kept + own + 2 * weights,
    )
