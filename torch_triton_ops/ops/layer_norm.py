"""Layer normalisation of rows.

mean = mean(x)
rstd = 1 / sqrt(mean((x - mean) ** 2) + eps)
y    = (x - mean) * rstd * weight + bias

With g = dy * weight and xhat = (x - mean) * rstd:

dx      = rstd * (g - mean(g) - xhat * mean(g * xhat))
dweight = sum over rows of dy * xhat
dbias   = sum over rows of dy

| tensor | shape | dtype |
|---|---|---|
| x | (..., N), any strides | float32, float16, bfloat16 |
| weight | (N,) or None (then 1) | any of these, also another than x's |
| bias | (N,) or None (then 0) | any of these, also another than x's |
| y | (..., N) contiguous | that of x, whatever the others' are |
| mean, rstd | (...) | float32 |
| dx, dweight, dbias | those of x, weight, bias | those of x, weight, bias |

The last dimension is normalised: for more of them, reshape x. Statistics and arithmetic are in fp32, with one rounding at
the store; rows far from zero lose nothing. Deterministic: the gradients of weight and bias are summed in a fixed order,
without atomics. The kernels are those of `norms.py`.

Bytes: forward 2 * M * N * itemsize, backward 3 * M * N * itemsize. Raises ValueError for x without dimensions, a weight
or bias of another shape and a negative eps.

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


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    return layer_norm_fwd_reference(x, weight, bias, eps)[0]


def layer_norm_fwd_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = norms.forward_reference(x, weight, bias, eps, centred=True)
    return y.to(x.dtype).contiguous(), mean, rstd


def layer_norm_bwd_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = layer_norm_bwd_fake(dy, x, weight, bias, mean, rstd, needs)
    norms.copy_wanted(out, norms.backward_reference(dy, x, weight, mean, rstd), needs)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    y = layer_norm_fake(x, weight, bias, eps)
    norms.forward(x, None, weight, bias, eps, 0.0, y, None, None, None, centred=True)
    return y


def layer_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = layer_norm_fwd_fake(x, weight, bias, eps)
    norms.forward(x, None, weight, bias, eps, 0.0, y, None, mean, rstd, centred=True)
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """needs: whether dx, dweight, dbias are wanted; the others are empty tensors."""
    dx, dweight, dbias = out = layer_norm_bwd_fake(dy, x, weight, bias, mean, rstd, needs)
    wanted = (dx if needs[0] else None, None, dweight if needs[1] else None, dbias if needs[2] else None)
    norms.backward(dy, None, x, weight, mean, rstd, 0.0, *wanted)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def layer_norm_fake(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    return x.new_empty(x.shape)


def layer_norm_fwd_fake(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def layer_norm_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        norms.empty_gradient(x, x, needs[0]),
        norms.empty_gradient(weight, x, needs[1]),
        norms.empty_gradient(bias, x, needs[2]),
    )


def layer_norm_check(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> None:
    norms.check("layer_norm", x, eps, weight, bias)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def layer_norm_forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    y, mean, rstd = torch.ops.tt.layer_norm_fwd(x, weight, bias, eps)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    return y


def layer_norm_backward(
    ctx: Any, dy: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    needs = list(ctx.needs)
    dx, dweight, dbias = torch.ops.tt.layer_norm_bwd(dy, *ctx.saved_tensors, needs)
    return dx if needs[0] else None, dweight if needs[1] else None, dbias if needs[2] else None


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def layer_norm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    other = other_dtype(dtype)
    yield Sample("M3_N33", (t(3, 33), t(33), t(33)))
    yield Sample("M9_N1024", (t(9, 1024), t(1024), t(1024)))
    yield Sample("plain", (t(5, 64),))
    yield Sample("bias_alone", (t(5, 64), None, t(64)))
    yield Sample("weight_alone", (t(2, 3, 40), t(40, dtype=other)), {"eps": 0.1})
    yield Sample("one_row", (t(129), t(129), t(129, dtype=other)))
    yield Sample("N1", (t(4, 1), t(1), t(1)))
    yield Sample("far_from_zero", (t(4, 160) + 1000 * t(4, 1), t(160), t(160)))
    yield Sample("empty_rows", (t(0, 16), t(16), t(16)))
    yield Sample("empty_columns", (t(3, 0), t(0), t(0)))
    yield Sample("M2_N17000", (t(2, 17000) + 100, t(17000), t(17000)))


def layer_norm_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # offsets past 2**31 elements
        x = torch.randn(2**18 + 1, 2**13, device=device, dtype=dtype)[:, :8]
        yield Sample("rows_past_2^31", (x, *torch.randn(2, 8, device=device, dtype=dtype)))
    yield Sample("M3_N65537", tuple(torch.randn(*shape, 65537, device=device, dtype=dtype) for shape in ((3,), (), ())))


def layer_norm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("scalar", (x[0, 0],), match="layer_norm.*'x'.*at least one dimension")
    yield ErrorSample("weight_shape", (x, x[0, :31]), match=r"layer_norm.*'weight'.*\(31,\).*\(32,\)")
    yield ErrorSample("bias_shape", (x, x[0], x[:1]), match=r"layer_norm.*'bias'.*\(1, 32\).*\(32,\)")
    yield ErrorSample("negative_eps", (x,), {"eps": -1e-5}, match="layer_norm.*'eps' is -1e-05.*>= 0")


def layer_norm_bench_cases() -> Iterator[BenchCase]:
    def make(M: int, N: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(torch.randn(*shape, device=device, dtype=dtype) for shape in ((M, N), (N,), (N,))), {}

    for M, N in [(8192, 4096), (16384, 8192), (32768, 1024)]:
        yield BenchCase(f"{M}x{N}", lambda d, t, M=M, N=N: make(M, N, d, t))


def layer_norm_cost(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> Cost:
    size = x.numel() * x.element_size()
    weights, biases = (0 if v is None else v.numel() * v.element_size() for v in (weight, bias))
    return Cost(
        flops=7 * x.numel(),
        bytes=2 * size + weights + biases,
        backward_flops=11 * x.numel(),
        backward_bytes=3 * size + 2 * weights + biases,
    )
