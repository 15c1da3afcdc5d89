"""SimPO: preference optimisation without a reference model.

x     = beta * (policy_chosen - policy_rejected) - gamma
loss  = -(1 - s) * log sigmoid(x) - s * log sigmoid(-x)            s being label_smoothing
chosen_reward, rejected_reward = beta * policy_chosen, beta * policy_rejected

dpolicy_chosen = -dpolicy_rejected = beta * (s * sigmoid(x) - (1 - s) * sigmoid(-x))

then "mean" or "sum" over the pairs, or "none". Rewards have no gradient.

| tensor | shape | dtype |
|---|---|---|
| policy_chosen, policy_rejected | (B,), or any, the same; any strides | float32, float16, bfloat16 |
| loss | () or, with "none", that of policy_chosen | that of policy_chosen |
| chosen_reward, rejected_reward | that of policy_chosen | that of policy_chosen |

policy_chosen, policy_rejected: the *mean* log-probability of an answer's tokens. beta: above 0 (the paper: 2 to 2.5). gamma:
the margin that a pair should have, >= 0, in the unit of the rewards (0.5 to 1.5). label_smoothing: from 0 to below 0.5. Raises
ValueError for other numbers, shapes and reductions. One launch up to 8192 pairs; backward one launch.

Source: Meng, Xia and Chen, SimPO, https://arxiv.org/abs/2405.14734, equation 6
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase
from torch_triton_ops.losses import check_pairs, elementwise_loss, pairs_case, preference_loss, preference_slope


@triton.jit
def simpo_value(
    policy_chosen,
    policy_rejected,
    beta: tl.constexpr = 2.0,
    gamma: tl.constexpr = 1.0,
    label_smoothing: tl.constexpr = 0.0,
):
    x = beta * (policy_chosen - policy_rejected) - gamma
    return preference_loss(x, label_smoothing), beta * policy_chosen, beta * policy_rejected


@triton.jit
def simpo_derivative(
    policy_chosen,
    policy_rejected,
    beta: tl.constexpr = 2.0,
    gamma: tl.constexpr = 1.0,
    label_smoothing: tl.constexpr = 0.0,
):
    slope = beta * preference_slope(beta * (policy_chosen - policy_rejected) - gamma, label_smoothing)
    return slope, -slope


def simpo_loss_bench_cases() -> Iterator[BenchCase]:
    yield pairs_case(2)


elementwise_loss(
    "tt::simpo_loss",
    simpo_value,
    simpo_derivative,
    globals(),
    gradients=("policy_chosen", "policy_rejected"),
    extras=("chosen_reward", "rejected_reward"),
    check=check_pairs,
    options=[{"beta": 2.5, "gamma": 0.5, "label_smoothing": 0.1}],
    flops=10,
)
