"""Direct preference optimisation and eleven relatives, from the log-probabilities of answers.

c, r  = policy_chosen - ref_chosen, policy_rejected - ref_rejected                 log-ratios
x     = beta * (c - r),  s = label_smoothing,  sg = sigmoid
chosen_reward, rejected_reward = beta * c, beta * r

| loss_type | loss of a pair | source |
|---|---|---|
| sigmoid | -(1 - s) * log sg(x) - s * log sg(-x) | DPO https://arxiv.org/abs/2305.18290 eq. 7 |
| hinge | max(0, 1 - x) | SLiC https://arxiv.org/abs/2305.10425; RSO https://arxiv.org/abs/2309.06657 |
| ipo | (c - r - 1 / (2 * beta)) ** 2 | IPO https://arxiv.org/abs/2310.12036 eq. 17 |
| robust | (-(1 - s) * log sg(x) + s * log sg(-x)) / (1 - 2 * s) | robust DPO https://arxiv.org/abs/2403.00409 |
| exo_pair | sg(x) * log(sg(x) / (1 - s)) + sg(-x) * log(sg(-x) / s) | EXO https://arxiv.org/abs/2402.00856 eq. 16 |
| nca_pair | -log sg(beta * c) - log sg(-beta * c) / 2 - log sg(-beta * r) / 2 | NCA https://arxiv.org/abs/2402.05369 |
| bco_pair | -log sg(beta * c - delta) - log sg(delta - beta * r) | BCO https://arxiv.org/abs/2404.04656 |
| sppo_hard | (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2 | SPPO https://arxiv.org/abs/2405.00675 eq. 4.7, P = 1 |
| aot | sigmoid's, of x = beta * (policy_chosen - policy_rejected - delta) | AOT https://arxiv.org/abs/2406.05882 |
| apo_zero | sg(-beta * c) + sg(beta * r) | APO https://arxiv.org/abs/2408.06266 eq. 7 |
| apo_down | sg(beta * c) + sg(-x) | APO https://arxiv.org/abs/2408.06266 eq. 8 |
| discopop | -(1 - m) * log sg(x) + m * exp(-x), m = sg(x / tau) | DiscoPOP https://arxiv.org/abs/2406.08414 |

then "mean" or "sum" over the pairs, or "none". These are TRL's formulas too; its sigmoid's s is https://ericmitchell.ai/cdpo.pdf.
The gradient by the policy's log-probabilities is the derivative of the formula; the rewards have none. log sg is computed so
that no margin overflows, and m * exp(-x) as one exponential.

| tensor | shape | dtype |
|---|---|---|
| policy_chosen, policy_rejected | (B,), or any, the same; any strides | float32, float16, bfloat16 |
| ref_chosen, ref_rejected | that of policy_chosen; no gradient | float32, float16, bfloat16 |
| delta | one element, or that of policy_chosen; no gradient | float32, float16, bfloat16 |
| loss | () or, with "none", that of policy_chosen | that of policy_chosen |
| chosen_reward, rejected_reward | that of policy_chosen | that of policy_chosen |

The inputs are an answer's log-probability, summed over its tokens (for ipo TRL takes the mean).

delta belongs to two types. bco_pair needs it: the running mean of all rewards, chosen and rejected, which the caller keeps. For
aot it is the reference's ref_chosen - ref_rejected that each pair is compared with: if it is None, the one of the same rank,
both sorted, ties in order, NaN last. A pair's loss stays at the pair's place.

beta: above 0. label_smoothing: 0 to below 0.5, for sigmoid, robust, exo_pair (where 0 stands for 1e-3) and aot. discopop_tau:
above 0. Raises ValueError for anything else, also for an option that the loss type does not have.

One launch up to 8192 pairs (aot: two before it, comparing every pair with every other); backward one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, ErrorSample
from torch_triton_ops.launch import cdiv, launch
from torch_triton_ops.losses import (
    arithmetic_dtype,
    elementwise_loss,
    load,
    log_sigmoid,
    pairs_case,
    preference_loss,
    preference_slope,
    softplus,
)

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
)
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot")

# --------------------------------------------------------------------------------------------------------------------
# Value and derivative
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def exo_smoothing(label_smoothing: tl.constexpr):
    # the loss has no value at 0
    return 0.001 if label_smoothing == 0.0 else label_smoothing


@triton.jit
def dpo_value(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    delta=0.0,
    beta: tl.constexpr = 0.1,
    label_smoothing: tl.constexpr = 0.0,
    loss_type: tl.constexpr = "sigmoid",
    discopop_tau: tl.constexpr = 0.05,
):
    c = policy_chosen - ref_chosen
    r = policy_rejected - ref_rejected
    x = beta * (c - r)
    if loss_type == "sigmoid":
        loss = preference_loss(x, label_smoothing)
    elif loss_type == "hinge":
        loss = tl.maximum(1.0 - x, 0.0)
    elif loss_type == "ipo":
        loss = (c - r - 0.5 / beta) * (c - r - 0.5 / beta)
    elif loss_type == "robust":
        loss = softplus(-x)
        if label_smoothing != 0.0:
            loss = ((1.0 - label_smoothing) * loss - label_smoothing * softplus(x)) / (1.0 - 2.0 * label_smoothing)
    elif loss_type == "exo_pair":
        s = exo_smoothing(label_smoothing)
        loss = tl.sigmoid(x) * (log_sigmoid(x) - tl.log(1.0 - s)) + tl.sigmoid(-x) * (log_sigmoid(-x) - tl.log(s))
    elif loss_type == "nca_pair":
        loss = softplus(-beta * c) + 0.5 * softplus(beta * c) + 0.5 * softplus(beta * r)
    elif loss_type == "bco_pair":
        loss = softplus(delta - beta * c) + softplus(beta * r - delta)
    elif loss_type == "sppo_hard":
        loss = (c - 0.5 / beta) * (c - 0.5 / beta) + (r + 0.5 / beta) * (r + 0.5 / beta)
    elif loss_type == "aot":
        loss = preference_loss(beta * (policy_chosen - policy_rejected - delta), label_smoothing)
    elif loss_type == "apo_zero":
        loss = tl.sigmoid(-beta * c) + tl.sigmoid(beta * r)
    elif loss_type == "apo_down":
        loss = tl.sigmoid(beta * c) + tl.sigmoid(-x)
    else:
        u = x / discopop_tau
        loss = softplus(-x) * tl.sigmoid(-u) + tl.exp(log_sigmoid(u) - x)
    return loss, beta * c, beta * r


@triton.jit
def dpo_derivative(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    delta=0.0,
    beta: tl.constexpr = 0.1,
    label_smoothing: tl.constexpr = 0.0,
    loss_type: tl.constexpr = "sigmoid",
    discopop_tau: tl.constexpr = 0.05,
):
    c = policy_chosen - ref_chosen
    r = policy_rejected - ref_rejected
    x = beta * (c - r)
    if loss_type == "sigmoid":
        by_c = beta * preference_slope(x, label_smoothing)
        by_r = -by_c
    elif loss_type == "hinge":
        by_c = tl.where(x < 1.0, -beta, 0.0)
        by_r = -by_c
    elif loss_type == "ipo":
        by_c = 2.0 * (c - r - 0.5 / beta)
        by_r = -by_c
    elif loss_type == "robust":
        slope = (1.0 - label_smoothing) * tl.sigmoid(-x) + label_smoothing * tl.sigmoid(x)
        by_c = (-beta / (1.0 - 2.0 * label_smoothing)) * slope
        by_r = -by_c
    elif loss_type == "exo_pair":
        s = exo_smoothing(label_smoothing)
        by_c = beta * tl.sigmoid(x) * tl.sigmoid(-x) * (x + tl.log(s) - tl.log(1.0 - s))
        by_r = -by_c
    elif loss_type == "nca_pair":
        by_c = beta * (0.5 * tl.sigmoid(beta * c) - tl.sigmoid(-beta * c))
        by_r = 0.5 * beta * tl.sigmoid(beta * r)
    elif loss_type == "bco_pair":
        by_c = -beta * tl.sigmoid(delta - beta * c)
        by_r = beta * tl.sigmoid(beta * r - delta)
    elif loss_type == "sppo_hard":
        by_c = 2.0 * (c - 0.5 / beta)
        by_r = 2.0 * (r + 0.5 / beta)
    elif loss_type == "aot":
        by_c = beta * preference_slope(beta * (policy_chosen - policy_rejected - delta), label_smoothing)
        by_r = -by_c
    elif loss_type == "apo_zero":
        by_c = -beta * tl.sigmoid(beta * c) * tl.sigmoid(-beta * c)
        by_r = beta * tl.sigmoid(beta * r) * tl.sigmoid(-beta * r)
    elif loss_type == "apo_down":
        by_r = beta * tl.sigmoid(x) * tl.sigmoid(-x)
        by_c = beta * tl.sigmoid(beta * c) * tl.sigmoid(-beta * c) - by_r
    else:
        u = x / discopop_tau
        other = tl.sigmoid(-u)
        slope = tl.exp(log_sigmoid(u) - x) * (other / discopop_tau - 1.0) - tl.sigmoid(-x) * other
        # far below 0 the second factor is 0 while softplus grows without bound
        bent = tl.sigmoid(u) * other
        slope -= tl.where(bent > 0.0, softplus(-x) * bent / discopop_tau, 0.0)
        by_c = beta * slope
        by_r = -by_c
    return by_c, by_r


# --------------------------------------------------------------------------------------------------------------------
# What aot compares each pair with
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _before(x, other, offs, offs_other):
    """Whether `other` comes before x in sorted order: smaller, NaN last, equals in their order."""
    equal = (x == other) | ((x != x) & (other != other))
    return (other < x) | ((x != x) & (other == other)) | (equal & (offs_other < offs))


@triton.jit
def _dpo_rank_kernel(
    policy_chosen_ptr,
    policy_rejected_ptr,
    ref_chosen_ptr,
    ref_rejected_ptr,
    policy_rank_ptr,
    ref_rank_ptr,
    B,
    BLOCK_B: tl.constexpr,
):
    """The rank of each pair among the policy's differences, and among the reference's."""
    offs = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]  # (BLOCK_B, 1)
    mask = offs < B
    policy = load(policy_chosen_ptr, offs, mask) - load(policy_rejected_ptr, offs, mask)
    ref = load(ref_chosen_ptr, offs, mask) - load(ref_rejected_ptr, offs, mask)
    policy_rank = tl.zeros((BLOCK_B, 1), tl.int32)
    ref_rank = tl.zeros((BLOCK_B, 1), tl.int32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)[None, :]  # (1, BLOCK_B)
        mask_b = offs_b < B
        other = load(policy_chosen_ptr, offs_b, mask_b) - load(policy_rejected_ptr, offs_b, mask_b)
        before = mask_b & _before(policy, other, offs, offs_b)  # (BLOCK_B, BLOCK_B)
        policy_rank += tl.sum(before.to(tl.int32), axis=1, keep_dims=True)
        other = load(ref_chosen_ptr, offs_b, mask_b) - load(ref_rejected_ptr, offs_b, mask_b)
        before = mask_b & _before(ref, other, offs, offs_b)
        ref_rank += tl.sum(before.to(tl.int32), axis=1, keep_dims=True)
    tl.store(policy_rank_ptr + offs, policy_rank, mask=mask)
    tl.store(ref_rank_ptr + offs, ref_rank, mask=mask)


@triton.jit
def _dpo_pick_kernel(
    policy_rank_ptr, ref_rank_ptr, ref_chosen_ptr, ref_rejected_ptr, delta_ptr, B, BLOCK_B: tl.constexpr
):
    """For each pair the reference's difference of the same rank. Searched for: torch's analysis of what a kernel writes takes
    every tensor for written from which a store's address is computed, so nothing is stored at its rank."""
    offs = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]  # (BLOCK_B, 1)
    rank = tl.load(policy_rank_ptr + offs, mask=offs < B, other=-1)
    delta = tl.zeros((BLOCK_B, 1), tl.float32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)[None, :]  # (1, BLOCK_B)
        mask_b = offs_b < B
        ref = load(ref_chosen_ptr, offs_b, mask_b) - load(ref_rejected_ptr, offs_b, mask_b)
        same = tl.load(ref_rank_ptr + offs_b, mask=mask_b, other=-2) == rank  # (BLOCK_B, BLOCK_B)
        delta += tl.sum(tl.where(same, ref, 0.0), axis=1, keep_dims=True)
    tl.store(delta_ptr + offs, delta, mask=offs < B)


def dpo_match(
    policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor
) -> torch.Tensor:
    delta = dpo_match_fake(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    B = delta.numel()
    ranks = [delta.new_empty(B, dtype=torch.int32) for _ in range(2)]
    policy, ref = (policy_chosen, policy_rejected), (ref_chosen, ref_rejected)
    policy, ref = ([t.contiguous() for t in pair] for pair in (policy, ref))
    launch(_dpo_rank_kernel, (cdiv(B, 32),), *policy, *ref, *ranks, B, BLOCK_B=32)
    launch(_dpo_pick_kernel, (cdiv(B, 32),), *ranks, *ref, delta, B, BLOCK_B=32)
    return delta


def dpo_match_fake(
    policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor
) -> torch.Tensor:
    return policy_chosen.new_empty(policy_chosen.shape, dtype=arithmetic_dtype(policy_chosen))


def dpo_match_reference(
    policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor
) -> torch.Tensor:
    dtype = arithmetic_dtype(policy_chosen)
    policy = (policy_chosen.detach().to(dtype) - policy_rejected.detach().to(dtype)).reshape(-1)
    ref = (ref_chosen.to(dtype) - ref_rejected.to(dtype)).reshape(-1)
    delta = torch.empty_like(ref)
    delta[policy.argsort(stable=True)] = ref.sort(stable=True).values
    return delta.reshape(policy_chosen.shape)


# --------------------------------------------------------------------------------------------------------------------
# Samples and checks
# --------------------------------------------------------------------------------------------------------------------


def _check(
    bad: Callable[..., None],
    delta: torch.Tensor | None,
    beta: float,
    label_smoothing: float,
    loss_type: str,
    discopop_tau: float,
    **_: Any,
) -> None:
    if loss_type not in LOSS_TYPES:
        bad("loss_type", repr(loss_type), f"one of {', '.join(LOSS_TYPES)}")
    if not beta > 0.0:
        bad("beta", beta, "a number above 0")
    if not 0.0 <= label_smoothing < 0.5:
        bad("label_smoothing", label_smoothing, "a number from 0 to below 0.5")
    if label_smoothing and loss_type not in _SMOOTHED:
        bad("label_smoothing", label_smoothing, f"0 with loss_type '{loss_type}'; others with {', '.join(_SMOOTHED)}")
    if not discopop_tau > 0.0:
        bad("discopop_tau", discopop_tau, "a number above 0")
    if delta is None and loss_type == "bco_pair":
        bad("delta", None, "the running mean of the rewards, of one element, with loss_type 'bco_pair'")
    if delta is not None and loss_type not in ("bco_pair", "aot"):
        bad("delta", "a tensor", f"None with loss_type '{loss_type}'; a tensor with bco_pair and aot")


def _inputs(shape: tuple[int, ...], device: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = 6 * torch.randn((4, *shape), device=device, dtype=dtype)
    return policy_chosen, policy_rejected, ref_chosen, ref_rejected


def dpo_loss_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    yield from _LOSS.error_samples(device)
    args = _inputs((4,), device, torch.float32)

    def error(id: str, match: str, **options: Any) -> ErrorSample:
        return ErrorSample(id, args, options, match=f"tt::dpo_loss.*{match}")

    yield error("loss_type", "'loss_type' is 'dpo'.*sigmoid, hinge", loss_type="dpo")
    yield error("beta", "'beta' is 0.0", beta=0.0)
    yield error("smoothing", "'label_smoothing' is 0.5", label_smoothing=0.5)
    yield error("smoothing_unused", "'label_smoothing' is 0.1.*'hinge'", label_smoothing=0.1, loss_type="hinge")
    yield error("no_delta", "'delta' is None.*running mean", loss_type="bco_pair")
    yield error("delta_unused", "'delta' is a tensor.*None.*'ipo'", loss_type="ipo", delta=args[0])


def dpo_loss_bench_cases() -> Iterator[BenchCase]:
    yield pairs_case(4)


_LOSS = elementwise_loss(
    "tt::dpo_loss",
    dpo_value,
    dpo_derivative,
    globals(),
    gradients=("policy_chosen", "policy_rejected"),
    extras=("chosen_reward", "rejected_reward"),
    check=_check,
    inputs=_inputs,
    options=[{"label_smoothing": 0.1}, {"loss_type": "discopop"}, {"loss_type": "aot", "label_smoothing": 0.2}],
    flops=20,
)

# --------------------------------------------------------------------------------------------------------------------
# The op: as generated, but that aot's delta is found first
# --------------------------------------------------------------------------------------------------------------------


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    delta: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    discopop_tau: float = 0.05,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    if loss_type == "aot" and delta is None:
        delta = dpo_match(*tensors)
    options = {"beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type, "discopop_tau": discopop_tau}
    return _LOSS.forward(*tensors, delta, **options, reduction=reduction)


def dpo_loss_reference(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    delta: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    discopop_tau: float = 0.05,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    if loss_type == "aot" and delta is None:
        delta = dpo_match_reference(*tensors)
    options = {"beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type, "discopop_tau": discopop_tau}
    return _LOSS.reference(*tensors, delta, **options, reduction=reduction)


def dpo_loss_forward(
    ctx: Any,
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    delta: torch.Tensor | None,
    beta: float,
    label_smoothing: float,
    loss_type: str,
    discopop_tau: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    if loss_type == "aot" and delta is None:
        delta = torch.ops.tt.dpo_match(*tensors)
    options = (beta, label_smoothing, loss_type, discopop_tau)
    return _LOSS.context_forward(ctx, *tensors, delta, *options, reduction)
