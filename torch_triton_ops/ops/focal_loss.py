"""The focal loss: binary cross entropy in which what is classified well counts little.

p     = sigmoid(logits),  t = target
ce    = -t * log(p) - (1 - t) * log(1 - p)
q     = t * (1 - p) + (1 - t) * p                        how wrong the prediction is
loss  = a * q ** gamma * ce                               with a = t * alpha + (1 - t) * (1 - alpha), or 1 where alpha < 0
dlogits = a * (q ** gamma * (p - t) + gamma * q ** (gamma - 1) * (1 - 2 * t) * p * (1 - p) * ce)

then "mean" or "sum" over the elements, or "none".

| tensor | shape | dtype |
|---|---|---|
| logits | any; any strides | float32, float16, bfloat16 |
| target | that of logits; 0 or 1, or between; no gradient | float32, float16, bfloat16 |
| loss | () or, with "none", that of logits | that of logits |

alpha: at most 1; below 0 there is no weight. gamma: 0 or more. Raises ValueError for other numbers, shapes and reductions.
Bytes: two reads; backward two reads and a write. The kernels are made by losses.elementwise_loss.

Source: Lin et al., Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002, equation 5;
torchvision.ops.sigmoid_focal_loss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.losses import elementwise_loss, softplus


@triton.jit
def focal_value(logits, target, alpha: tl.constexpr = 0.25, gamma: tl.constexpr = 2.0):
    loss = target * softplus(-logits) + (1.0 - target) * softplus(logits)
    if gamma != 0.0:
        q = target * tl.sigmoid(-logits) + (1.0 - target) * tl.sigmoid(logits)
        if gamma == 2.0:
            loss *= q * q
        else:
            loss *= tl.exp2(gamma * tl.log2(q))
    if alpha >= 0.0:
        loss *= target * alpha + (1.0 - target) * (1.0 - alpha)
    return loss


@triton.jit
def focal_derivative(logits, target, alpha: tl.constexpr = 0.25, gamma: tl.constexpr = 2.0):
    p, not_p = tl.sigmoid(logits), tl.sigmoid(-logits)
    # p - t, without the cancellation where both are near 1
    slope = (1.0 - target) * p - target * not_p
    if gamma != 0.0:
        ce = target * softplus(-logits) + (1.0 - target) * softplus(logits)
        q = target * not_p + (1.0 - target) * p
        if gamma == 2.0:
            power, less = q * q, q
        else:
            power = tl.exp2(gamma * tl.log2(q))
            less = tl.where(q > 0.0, tl.exp2((gamma - 1.0) * tl.log2(q)), 0.0)
        slope = power * slope + gamma * less * (1.0 - 2.0 * target) * p * not_p * ce
    if alpha >= 0.0:
        slope *= target * alpha + (1.0 - target) * (1.0 - alpha)
    return slope


def _reference(logits: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if gamma:
        loss = loss * (target * torch.sigmoid(-logits) + (1 - target) * torch.sigmoid(logits)) ** gamma
    return loss * (target * alpha + (1 - target) * (1 - alpha)) if alpha >= 0 else loss


def _check(bad: Callable[..., None], alpha: float, gamma: float, **_: Any) -> None:
    if not alpha <= 1.0:
        bad("alpha", alpha, "a number from 0 to 1, or below 0 for none")
    if not gamma >= 0.0:
        bad("gamma", gamma, "a number >= 0")


def _inputs(shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    logits = 3 * torch.randn(shape, device=device, dtype=dtype)
    return logits, (torch.rand(shape, device=device) < 0.3).to(dtype)


elementwise_loss(
    "tt::focal_loss",
    focal_value,
    focal_derivative,
    globals(),
    reference=_reference,
    check=_check,
    inputs=_inputs,
    options=[{"alpha": -1.0, "gamma": 1.5}, {"gamma": 0.0}],
    flops=20,
)
