"""The Bradley-Terry loss, with which a reward model learns from preferences.

d     = chosen - rejected - margin
loss  = -log sigmoid(d) + center_coefficient * (chosen + rejected) ** 2
dchosen, drejected = -sigmoid(-d) + c, sigmoid(-d) + c      with c = 2 * center_coefficient * (chosen + rejected)

then "mean" or "sum" over the pairs, or "none". -log sigmoid is computed so that no reward is too large for it.

| tensor | shape | dtype |
|---|---|---|
| chosen, rejected | (B,), or any, the same; any strides: the rewards of two answers to one prompt | float32, float16, bfloat16 |
| margin | that of chosen, or one element, or None; no gradient: how much better the first is | float32, float16, bfloat16 |
| loss | () or, with "none", that of chosen | that of chosen |

center_coefficient: a number >= 0, for rewards whose mean stays near 0. Raises ValueError for other numbers, shapes and
reductions. One launch up to 8192 pairs; backward one launch.

Source: Bradley and Terry, Rank Analysis of Incomplete Block Designs, https://doi.org/10.2307/2334029; with a margin: Touvron et
al., Llama 2, https://arxiv.org/abs/2307.09288; centred: Eisenstein et al., https://arxiv.org/abs/2312.09244
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase
from torch_triton_ops.losses import elementwise_loss, pairs_case, softplus


@triton.jit
def bradley_terry_value(chosen, rejected, margin=0.0, center_coefficient: tl.constexpr = 0.0):
    loss = softplus(-(chosen - rejected - margin))
    if center_coefficient != 0.0:
        total = chosen + rejected
        loss += center_coefficient * total * total
    return loss


@triton.jit
def bradley_terry_derivative(chosen, rejected, margin=0.0, center_coefficient: tl.constexpr = 0.0):
    slope = tl.sigmoid(-(chosen - rejected - margin))
    if center_coefficient != 0.0:
        center = 2.0 * center_coefficient * (chosen + rejected)
        return center - slope, center + slope
    else:
        return -slope, slope


def _check(bad: Callable[..., None], center_coefficient: float, **_: Any) -> None:
    if not center_coefficient >= 0.0:
        bad("center_coefficient", center_coefficient, "a number >= 0")


def _inputs(shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    chosen, rejected = (2 * torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    # an odd number of elements: with a margin of its own for every pair; even: one for all
    margin = torch.rand(shape if chosen.numel() % 2 else (1,), device=device, dtype=dtype)
    return chosen, rejected, margin


def bradley_terry_loss_bench_cases() -> Iterator[BenchCase]:
    yield pairs_case(2)


elementwise_loss(
    "tt::bradley_terry_loss",
    bradley_terry_value,
    bradley_terry_derivative,
    globals(),
    gradients=("chosen", "rejected"),
    check=_check,
    inputs=_inputs,
    options=[{"center_coefficient": 0.01}],
    flops=9,
)
