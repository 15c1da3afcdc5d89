"""The Huber loss: quadratic near, linear far.

d     = input - target
loss  = d ** 2 / 2 where |d| <= delta, else delta * (|d| - delta / 2)
dinput = -dtarget = d clamped to [-delta, delta]

then "mean" or "sum" over the elements, or "none".

| tensor | shape | dtype |
|---|---|---|
| input, target | any, the same; any strides | float32, float16, bfloat16 |
| loss | () or, with "none", that of input | that of input |

delta: a finite number above 0, in the unit of input. Raises ValueError for other numbers, shapes and reductions.
Bytes: two reads; backward two reads and a write for each gradient asked for. The kernels are made by losses.elementwise_loss.

Source: Huber, Robust Estimation of a Location Parameter, https://doi.org/10.1214/aoms/1177703732;
torch.nn.functional.huber_loss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from torch_triton_ops.losses import elementwise_loss


@triton.jit
def huber_value(input, target, delta: tl.constexpr = 1.0):
    d = tl.abs(input - target)
    return tl.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))


@triton.jit
def huber_derivative(input, target, delta: tl.constexpr = 1.0):
    d = input - target
    d = tl.where(d > delta, delta, tl.where(d < -delta, -delta, d))
    return d, -d


def _check(bad: Callable[..., None], delta: float, **_: Any) -> None:
    if not delta > 0.0:
        bad("delta", delta, "a number above 0")


elementwise_loss(
    "tt::huber_loss",
    huber_value,
    huber_derivative,
    globals(),
    gradients=("input", "target"),
    check=_check,
    options=[{"delta": 0.3}],
    flops=5,
)
