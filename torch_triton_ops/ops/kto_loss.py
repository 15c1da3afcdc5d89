"""Kahneman-Tversky optimisation: from answers that are good or bad, without pairs.

z     = max(kl, 0)
r     = policy - reference
loss  = desirable_weight * sigmoid(-beta * (r - z)) where label, else undesirable_weight * sigmoid(beta * (r - z))
reward = beta * r
dpolicy = -+ weight * beta * e / (1 + e) ** 2          with e = exp(-|beta * (r - z)|), - where label

then "mean" or "sum" over the answers, or "none". 1 - sigmoid(u) is computed as sigmoid(-u). Rewards have no gradient.

| tensor | shape | dtype |
|---|---|---|
| policy, reference | (B,), or any, the same; any strides; reference has no gradient | float32, float16, bfloat16 |
| label | that of policy: true for a desirable answer | bool, int32, int64 |
| kl | one element, or None for 0; no gradient | float32, float16, bfloat16 |
| loss | () or, with "none", that of policy | that of policy |
| reward | that of policy | that of policy |

policy, reference: an answer's log-probability, summed over its tokens. kl: the mean of policy - reference over answers to
*other* prompts. beta: above 0; the weights: >= 0. Raises ValueError for other numbers, shapes and reductions, TypeError for a
label of another dtype. One launch up to 8192 answers; backward one launch.

Source: Ethayarajh et al., KTO, https://arxiv.org/abs/2402.01306, equations 7 and 8
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase
from torch_triton_ops.losses import elementwise_loss


@triton.jit
def kto_value(
    policy,
    reference,
    label,
    kl=0.0,
    beta: tl.constexpr = 0.1,
    desirable_weight: tl.constexpr = 1.0,
    undesirable_weight: tl.constexpr = 1.0,
):
    reward = beta * (policy - reference)
    u = reward - beta * tl.maximum(kl, 0.0)
    good = label != 0
    loss = tl.where(good, desirable_weight, undesirable_weight) * tl.sigmoid(tl.where(good, -u, u))
    return loss, reward


@triton.jit
def kto_derivative(
    policy,
    reference,
    label,
    kl=0.0,
    beta: tl.constexpr = 0.1,
    desirable_weight: tl.constexpr = 1.0,
    undesirable_weight: tl.constexpr = 1.0,
):
    e = tl.exp(-tl.abs(beta * (policy - reference) - beta * tl.maximum(kl, 0.0)))
    return tl.where(label != 0, -desirable_weight, undesirable_weight) * beta * (e / ((1.0 + e) * (1.0 + e)))


def _check(
    bad: Callable[..., None],
    label: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl: torch.Tensor | None,
    **_: Any,
) -> None:
    if label.dtype not in (torch.bool, torch.int32, torch.int64):
        bad("label", f"of dtype {label.dtype}", "bool, int32, int64", TypeError)
    if kl is not None and kl.numel() != 1:
        bad("kl", f"of shape {tuple(kl.shape)}", "one element, the mean over the batch")
    if not beta > 0.0:
        bad("beta", beta, "a number above 0")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not weight >= 0.0:
            bad(name, weight, "a number >= 0")


def _inputs(shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    policy, reference = (5 * torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    label = torch.randint(0, 2, shape, device=device) == 1
    if policy.numel() > 100:
        return policy, reference, label
    return policy, reference, label, torch.full((1,), 0.7, device=device, dtype=dtype)


def kto_loss_bench_cases() -> Iterator[BenchCase]:
    yield BenchCase("1024", lambda device, dtype: (_inputs((1024,), device, dtype), {}), torch.float32)


elementwise_loss(
    "tt::kto_loss",
    kto_value,
    kto_derivative,
    globals(),
    extras=("reward",),
    check=_check,
    inputs=_inputs,
    options=[{"desirable_weight": 1.3, "undesirable_weight": 0.7}],
    flops=10,
)
