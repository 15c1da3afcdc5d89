"""Root-mean-square normalisation of rows.

rstd = 1 / sqrt(mean(x ** 2) + eps)
y    = x * rstd * (weight + weight_offset)

With g = dy * (weight + weight_offset) and xhat = x * rstd:

dx      = rstd * (g - xhat * mean(g * xhat))
dweight = sum over rows of dy * xhat

| tensor | shape | dtype |
|---|---|---|
| x | (..., N), any strides | float32, float16, bfloat16 |
| weight | (N,) or None (then 1, and weight_offset must be 0) | any of these, also another than x's |
| y | (..., N) contiguous | that of x, whatever weight's is |
| rstd | (...) | float32 |
| dx, dweight | those of x, weight | those of x, weight |

`weight_offset` is Gemma's 1.0. Statistics and arithmetic are in fp32, with one rounding at the store. Deterministic:
the gradient of weight is summed in a fixed order, without atomics. The kernels are those of `norms.py`.

Bytes: forward 2 * M * N * itemsize, backward 3 * M * N * itemsize. Raises ValueError for x without dimensions, a weight
of another shape, a negative eps and an offset without a weight.

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


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    return rms_norm_fwd_reference(x, weight, eps, weight_offset)[0]


def rms_norm_fwd_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = norms.forward_reference(x, weight, None, eps, weight_offset)
    return y.to(x.dtype).contiguous(), rstd


def rms_norm_bwd_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    out = rms_norm_bwd_fake(dy, x, weight, rstd, weight_offset, needs)
    found = norms.backward_reference(dy, x, weight, None, rstd, weight_offset)
    norms.copy_wanted(out, found, needs)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    y = rms_norm_fake(x, weight, eps, weight_offset)
    norms.forward(x, None, weight, None, eps, weight_offset, y, None, None, None, centred=False)
    return y


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = rms_norm_fwd_fake(x, weight, eps, weight_offset)
    norms.forward(x, None, weight, None, eps, weight_offset, y, None, None, rstd, centred=False)
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """needs: whether dx, dweight are wanted; the other is an empty tensor."""
    dx, dweight = rms_norm_bwd_fake(dy, x, weight, rstd, weight_offset, needs)
    wanted = (dx if needs[0] else None, None, dweight if needs[1] else None, None)
    norms.backward(dy, None, x, weight, None, rstd, weight_offset, *wanted)
    return dx, dweight


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def rms_norm_fake(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    return x.new_empty(x.shape)


def rms_norm_fwd_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


def rms_norm_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return norms.empty_gradient(x, x, needs[0]), norms.empty_gradient(weight, x, needs[1])


def rms_norm_check(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> None:
    norms.check("rms_norm", x, eps, weight, weight_offset=weight_offset)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def rms_norm_forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    y, rstd = torch.ops.tt.rms_norm_fwd(x, weight, eps, weight_offset)
    ctx.save_for_backward(x, weight, rstd)
    ctx.weight_offset = weight_offset
    return y


def rms_norm_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    needs = [bool(ctx.needs[0]), bool(ctx.needs[1]) and weight is not None]
    dx, dweight = torch.ops.tt.rms_norm_bwd(dy, x, weight, rstd, ctx.weight_offset, needs)
    return dx if needs[0] else None, dweight if needs[1] else None


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def rms_norm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample("M3_N33", (t(3, 33), t(33)))
    yield Sample("M9_N1024", (t(9, 1024), t(1024)))
    yield Sample("M70_N8", (t(70, 8), t(8)))
    yield Sample("no_weight", (t(5, 64),))
    yield Sample("eps", (t(5, 64), t(64)), {"eps": 0.1})
    yield Sample("weight_offset", (t(5, 64), t(64)), {"weight_offset": 1.0})
    yield Sample("weight_of_other_dtype", (t(5, 64), t(64, dtype=other_dtype(dtype))), {"weight_offset": 1.0})
    yield Sample("one_row", (t(129), t(129)))
    yield Sample("N1", (t(4, 1), t(1)))
    yield Sample("batch_2x3x40", (t(2, 3, 40), t(40)))
    yield Sample("rows_strided", (t(6, 100)[:, 20:70], t(50)))
    yield Sample("transposed", (t(48, 5).t(), t(48)))
    yield Sample("expanded", (t(1, 48).expand(5, 48), t(1).expand(48)))
    yield Sample("unaligned", (t(4 * 64 + 1)[1:].view(4, 64), t(65)[1:]))
    yield Sample("large_values", (t(4, 256) * 100, t(256)))
    yield Sample("empty_rows", (t(0, 16), t(16)))
    yield Sample("empty_columns", (t(3, 0), t(0)))
    yield Sample("M2_N17000", (t(2, 17000), t(17000)))
    yield Sample("M3_N65537", (t(3, 65537), t(65537)), slow_in_interpreter=True)


def rms_norm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("scalar", (x[0, 0],), match="rms_norm.*'x'.*at least one dimension")
    yield ErrorSample("weight_shape", (x, x[0, :31]), match=r"rms_norm.*'weight'.*\(31,\).*\(32,\)")
    yield ErrorSample("weight_two_dimensional", (x, x[:1]), match=r"rms_norm.*'weight'.*\(1, 32\).*\(32,\)")
    yield ErrorSample("negative_eps", (x, x[0]), {"eps": -1e-6}, match="rms_norm.*'eps' is -1e-06.*>= 0")
    yield ErrorSample("offset_alone", (x,), {"weight_offset": 1.0}, match="rms_norm.*'weight_offset' is 1.0.*weight")


def rms_norm_bench_cases() -> Iterator[BenchCase]:
    def make(M: int, N: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(M, N, device=device, dtype=dtype), torch.randn(N, device=device, dtype=dtype)), {}

    for M, N in [(8192, 4096), (16384, 8192), (32768, 1024)]:
        yield BenchCase(f"{M}x{N}", lambda d, t, M=M, N=N: make(M, N, d, t))


def rms_norm_cost(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> Cost:
    row = 0 if weight is None else weight.numel() * weight.element_size()
    return Cost(
        flops=4 * x.numel(),
        bytes=2 * x.numel() * x.element_size() + row,
        backward_flops=8 * x.numel(),
        backward_bytes=3 * x.numel() * x.element_size() + 2 * row,
    )
