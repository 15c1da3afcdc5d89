"""Contrastive preference optimisation: DPO with a uniform reference, and behaviour cloning beside it.

h     = policy_chosen - policy_rejected,  x = beta * h,  s = label_smoothing
loss  = preference + alpha * (-policy_chosen)

| loss_type | preference | its derivative by policy_chosen; by policy_rejected the negative |
|---|---|---|
| sigmoid | -(1 - s) * log sigmoid(x) - s * log sigmoid(-x) | beta * (s * sigmoid(x) - (1 - s) * sigmoid(-x)) |
| hinge | max(0, 1 - x) | -beta where x < 1, else 0 |
| ipo | (h - 1 / (2 * beta)) ** 2 | 2 * (h - 1 / (2 * beta)) |

chosen_reward, rejected_reward = beta * policy_chosen, beta * policy_rejected

then "mean" or "sum" over the pairs, or "none". Rewards have no gradient. alpha = 0 leaves the second term out, for a
likelihood of your own beside it (TRL's is the mean over the tokens of the batch).

| tensor | shape | dtype |
|---|---|---|
| policy_chosen, policy_rejected | (B,), or any, the same; any strides | float32, float16, bfloat16 |
| loss | () or, with "none", that of policy_chosen | that of policy_chosen |
| chosen_reward, rejected_reward | that of policy_chosen | that of policy_chosen |

policy_chosen, policy_rejected: the log-probability of an answer, summed over its tokens. beta: above 0. label_smoothing: from
0 to below 0.5, with loss_type sigmoid only. alpha: >= 0. Raises ValueError for anything else. One launch up to 8192 pairs;
backward one launch.

Source: Xu et al., Contrastive Preference Optimization, https://arxiv.org/abs/2401.08417, equations 3 to 5; hinge:
https://arxiv.org/abs/2305.10425; ipo: https://arxiv.org/abs/2310.12036
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase
from torch_triton_ops.losses import check_pairs, elementwise_loss, pairs_case, preference_loss, preference_slope


@triton.jit
def cpo_value(
    policy_chosen,
    policy_rejected,
    beta: tl.constexpr = 0.1,
    label_smoothing: tl.constexpr = 0.0,
    alpha: tl.constexpr = 1.0,
    loss_type: tl.constexpr = "sigmoid",
):
    h = policy_chosen - policy_rejected
    if loss_type == "sigmoid":
        loss = preference_loss(beta * h, label_smoothing)
    elif loss_type == "hinge":
        loss = tl.maximum(1.0 - beta * h, 0.0)
    else:
        loss = (h - 0.5 / beta) * (h - 0.5 / beta)
    if alpha != 0.0:
        loss -= alpha * policy_chosen
    return loss, beta * policy_chosen, beta * policy_rejected


@triton.jit
def cpo_derivative(
    policy_chosen,
    policy_rejected,
    beta: tl.constexpr = 0.1,
    label_smoothing: tl.constexpr = 0.0,
    alpha: tl.constexpr = 1.0,
    loss_type: tl.constexpr = "sigmoid",
):
    h = policy_chosen - policy_rejected
    if loss_type == "sigmoid":
        slope = beta * preference_slope(beta * h, label_smoothing)
    elif loss_type == "hinge":
        slope = tl.where(beta * h < 1.0, -beta, 0.0)
    else:
        slope = 2.0 * (h - 0.5 / beta)
    return slope - alpha, -slope


def cpo_loss_bench_cases() -> Iterator[BenchCase]:
    yield pairs_case(2)


elementwise_loss(
    "tt::cpo_loss",
    cpo_value,
    cpo_derivative,
    globals(),
    gradients=("policy_chosen", "policy_rejected"),
    extras=("chosen_reward", "rejected_reward"),
    check=check_pairs,
    options=[{"label_smoothing": 0.1, "alpha": 0.0}, {"loss_type": "hinge"}, {"loss_type": "ipo"}],
    flops=10,
)
