"""Odds-ratio preference optimisation: supervised fine-tuning and a preference in one loss, without a reference model.

log_odds(p) = p - log(1 - exp(p))
x     = log_odds(policy_chosen) - log_odds(policy_rejected)
loss  = sft_weight * (-policy_chosen) + beta * (-log sigmoid(x))
chosen_reward, rejected_reward = beta * policy_chosen, beta * policy_rejected

dpolicy_chosen   = -sft_weight - beta * sigmoid(-x) / (1 - exp(policy_chosen))
dpolicy_rejected = beta * sigmoid(-x) / (1 - exp(policy_rejected))

then "mean" or "sum" over the pairs, or "none". Rewards have no gradient. sft_weight = 0 leaves the first term out, for a
likelihood of your own beside it (TRL's is the mean over the tokens of the batch).

| tensor | shape | dtype |
|---|---|---|
| policy_chosen, policy_rejected | (B,), or any, the same; any strides | float32, float16, bfloat16 |
| loss | () or, with "none", that of policy_chosen | that of policy_chosen |
| chosen_reward, rejected_reward | that of policy_chosen | that of policy_chosen |

policy_chosen, policy_rejected: the *mean* log-probability of an answer's tokens, at most 0. log(1 - exp(p)) keeps its digits
for p near 0 and far from it; above 0 it is NaN. beta (the paper's lambda): above 0. sft_weight: >= 0. Raises ValueError for
other numbers, shapes and reductions. One launch up to 8192 pairs; backward one launch.

Source: Hong, Lee and Thorne, ORPO, https://arxiv.org/abs/2403.07691, equations 3 to 7
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase
from torch_triton_ops.losses import check_pairs, elementwise_loss, expm1, log1mexp, pairs_case, softplus


@triton.jit
def orpo_value(policy_chosen, policy_rejected, beta: tl.constexpr = 0.1, sft_weight: tl.constexpr = 1.0):
    x = (policy_chosen - policy_rejected) - (log1mexp(policy_chosen) - log1mexp(policy_rejected))
    loss = beta * softplus(-x)
    if sft_weight != 0.0:
        loss -= sft_weight * policy_chosen
    return loss, beta * policy_chosen, beta * policy_rejected


@triton.jit
def orpo_derivative(policy_chosen, policy_rejected, beta: tl.constexpr = 0.1, sft_weight: tl.constexpr = 1.0):
    x = (policy_chosen - policy_rejected) - (log1mexp(policy_chosen) - log1mexp(policy_rejected))
    slope = beta * tl.sigmoid(-x)
    return slope / expm1(policy_chosen) - sft_weight, -slope / expm1(policy_rejected)


def _inputs(shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    chosen, rejected = (-2 * torch.rand(shape, device=device, dtype=dtype) - 0.02 for _ in range(2))
    return chosen, rejected


def orpo_loss_bench_cases() -> Iterator[BenchCase]:
    yield pairs_case(2)


elementwise_loss(
    "tt::orpo_loss",
    orpo_value,
    orpo_derivative,
    globals(),
    gradients=("policy_chosen", "policy_rejected"),
    extras=("chosen_reward", "rejected_reward"),
    check=check_pairs,
    inputs=_inputs,
    options=[{"beta": 0.5, "sft_weight": 0.0}],
    flops=30,
)
