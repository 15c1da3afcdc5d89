"""The loss of group-relative policy optimisation and its relatives, from the log-probabilities of tokens.

l, o, f = logprob, old_logprob, ref_logprob;  A = advantage of the sequence;  over tokens with mask != 0, n of them in a sequence
ratio = exp(l - o);  for gspo exp(mean over the sequence of l - o), the same for all its tokens
token = -min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A) + beta * kl
kl    = exp(f - l) - (f - l) - 1                         the unbiased estimate of KL(policy || reference) of one token

| loss_type | loss | source |
|---|---|---|
| grpo | mean over the sequences of sum(token) / n | https://arxiv.org/abs/2402.03300 eq. 3 |
| gspo | the same, with the sequence's ratio | https://arxiv.org/abs/2507.18071 eq. 5 |
| dr_grpo | sum of all tokens / (B * max_length) | https://arxiv.org/abs/2503.20783 |
| bnpo, dapo | sum of all tokens / num_tokens | https://arxiv.org/abs/2503.14476 eq. 8 |

kl and clip_fraction, for the log, are means over all tokens: of kl (0 without ref_logprob), and of whether the clamped product is
the smaller. They have no gradient. With w = 1 / (B * n), 1 / (B * max_length) or 1 / num_tokens

dl = dloss * w * (-ratio * A where the clamped product is not the smaller, else 0, + beta * (1 - exp(f - l)))

| tensor | shape | dtype |
|---|---|---|
| logprob | (B, T), any strides | float32, float16, bfloat16 |
| advantage | (B,), no gradient | float32, float16, bfloat16 |
| mask | (B, T): what counts; elsewhere anything may stand, also NaN | bool, int32, int64, floating-point |
| old_logprob | (B, T), no gradient; None: logprob itself, as a constant (ratio 1) | float32, float16, bfloat16 |
| ref_logprob | (B, T), no gradient, or None; with beta > 0 needed | float32, float16, bfloat16 |
| num_tokens | one element, for bnpo and dapo; None: the tokens of this batch, at least 1 | float32, int32, int64 |
| loss, kl, clip_fraction | () | that of logprob |
| stats (saved) | (5, B): sum of token, n, sum of kl, clipped tokens, and the mean of l - o for gspo | float32 |
| scale (saved) | (1,): 1 / num_tokens, or the other types' constant | float32 |

beta, clip_low, clip_high: 0 or more. max_length: of dr_grpo, the longest completion that generation allows; 0: T. A sequence
without tokens counts 0. Raises ValueError for anything else, also for an argument that the loss type does not have, TypeError for
a mask of another dtype.

Bytes: each (B, T) tensor once; backward again, and the gradient. Two launches, each in a fixed order; backward one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import launch, next_power_of_2
from torch_triton_ops.losses import arithmetic_dtype, expm1, load

LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo")
_BY_TOKENS = ("bnpo", "dapo")

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def grpo_loss_reference(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "grpo",
    max_length: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (logprob, advantage, mask, old_logprob, ref_logprob, num_tokens)
    return grpo_loss_fwd_reference(*tensors, beta, clip_low, clip_high, loss_type, max_length)[:3]


def grpo_loss_fwd_reference(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, (B, T) = arithmetic_dtype(logprob), logprob.shape
    counts = mask != 0
    l = torch.where(counts, logprob.to(dtype), 0.0)
    A = advantage.to(dtype)[:, None]
    n = counts.sum(1).to(dtype)
    log_ratio = l - (l.detach() if old_logprob is None else torch.where(counts, old_logprob.to(dtype), 0.0))
    mean = log_ratio.sum(1) / n.clamp(min=1)
    ratio = torch.exp(mean[:, None].expand(B, T) if loss_type == "gspo" else log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token = -torch.minimum(ratio * A, clipped * A)
    kl = torch.zeros_like(l)
    if ref_logprob is not None:
        d = torch.where(counts, ref_logprob.to(dtype), 0.0) - l
        kl = torch.expm1(d) - d
        token = token + beta * kl
    stats = torch.stack(
        [torch.where(counts, v, 0.0).sum(1) for v in (token, counts, kl, (clipped * A < ratio * A).to(dtype))]
    )
    total = n.sum().clamp(min=1)
    if loss_type in _BY_TOKENS:
        scale = (1 / (total if num_tokens is None else num_tokens.to(dtype))).reshape(1)
        loss = (stats[0].sum() * scale).sum()
    elif loss_type == "dr_grpo":
        scale = l.new_full((1,), 1 / max(1, B * (max_length or T)))
        loss = stats[0].sum() / max(1, B * (max_length or T))
    else:
        scale = l.new_full((1,), 1 / max(1, B))
        loss = (stats[0] / n.clamp(min=1)).sum() / max(1, B)
    outputs = (loss, stats[2].detach().sum() / total, stats[3].detach().sum() / total)
    saved = torch.cat([stats, mean[None]]).detach()
    return *(v.to(logprob.dtype) for v in outputs), saved, scale.to(dtype)


def grpo_loss_bwd_reference(
    dloss: torch.Tensor,
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
) -> torch.Tensor:
    dtype = arithmetic_dtype(logprob)
    counts = mask != 0
    l = torch.where(counts, logprob.to(dtype), 0.0)
    A = advantage.to(dtype)[:, None]
    if loss_type == "gspo":
        log_ratio = stats[4][:, None]
    else:
        log_ratio = l - (l if old_logprob is None else torch.where(counts, old_logprob.to(dtype), 0.0))
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    slope = torch.where(clipped * A < ratio * A, 0.0, -ratio * A)
    if ref_logprob is not None:
        slope = slope - beta * torch.expm1(torch.where(counts, ref_logprob.to(dtype), 0.0) - l)
    weight = dloss.to(dtype) * scale
    if loss_type in ("grpo", "gspo"):
        weight = weight / stats[1][:, None].clamp(min=1)
    return torch.where(counts, slope * weight, 0.0).to(logprob.dtype).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _kl_token(d):
    """exp(d) - 1 - d; near 0, where that cancels, its series."""
    series = 1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320)))
    series = d * d * (0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * series)))
    return tl.where(tl.abs(d) < 0.5, series, expm1(d) - d)


@triton.jit
def _grpo_tokens(logprob_ptr, mask_ptr, old_ptr, offs, mask_t, HAS_OLD: tl.constexpr):
    """Of a block of tokens: whether each counts, its log-probability and its log-ratio, 0 where it does not count."""
    counts = mask_t & (tl.load(mask_ptr + offs, mask=mask_t, other=0) != 0)
    logprob = load(logprob_ptr, offs, counts)
    if HAS_OLD:
        return counts, logprob, logprob - load(old_ptr, offs, counts)
    else:
        return counts, logprob, tl.zeros_like(logprob)


@triton.jit
def _grpo_loss_fwd_kernel(
    logprob_ptr,
    advantage_ptr,
    mask_ptr,
    old_ptr,
    ref_ptr,
    stats_ptr,
    B,
    T,
    BETA: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    GSPO: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The sums of one sequence."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * T
    offs_t = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    A = tl.load(advantage_ptr + row).to(tl.float32)
    mean = 0.0
    if GSPO:
        log_ratios = tl.zeros((BLOCK_T,), tl.float32)
        tokens = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, T, BLOCK_T):
            offs = start + offs_t
            counts, _, log_ratio = _grpo_tokens(logprob_ptr, mask_ptr, old_ptr, first + offs, offs < T, HAS_OLD)
            log_ratios += log_ratio
            tokens += counts.to(tl.float32)
        mean = tl.sum(log_ratios, axis=0) / tl.maximum(tl.sum(tokens, axis=0), 1.0)
    losses = tl.zeros((BLOCK_T,), tl.float32)
    number = tl.zeros((BLOCK_T,), tl.float32)
    kls = tl.zeros((BLOCK_T,), tl.float32)
    clips = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, T, BLOCK_T):
        offs = start + offs_t
        counts, logprob, log_ratio = _grpo_tokens(logprob_ptr, mask_ptr, old_ptr, first + offs, offs < T, HAS_OLD)
        if GSPO:
            log_ratio = tl.zeros_like(log_ratio) + mean
        ratio = tl.exp(log_ratio)
        clipped = tl.minimum(tl.maximum(ratio, 1.0 - CLIP_LOW), 1.0 + CLIP_HIGH) * A
        token = -tl.minimum(ratio * A, clipped)
        if HAS_REF:
            kl = _kl_token(load(ref_ptr, first + offs, counts) - logprob)
            token += BETA * kl
            kls += tl.where(counts, kl, 0.0)
        losses += tl.where(counts, token, 0.0)
        number += counts.to(tl.float32)
        clips += tl.where(counts & (clipped < ratio * A), 1.0, 0.0)
    tl.store(stats_ptr + row, tl.sum(losses, axis=0))
    tl.store(stats_ptr + B + row, tl.sum(number, axis=0))
    tl.store(stats_ptr + 2 * B + row, tl.sum(kls, axis=0))
    tl.store(stats_ptr + 3 * B + row, tl.sum(clips, axis=0))
    tl.store(stats_ptr + 4 * B + row, mean)


@triton.jit
def _grpo_loss_reduce_kernel(
    stats_ptr,
    num_tokens_ptr,
    loss_ptr,
    kl_ptr,
    clip_ptr,
    scale_ptr,
    B,
    length,
    BY_TOKENS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program adds the sequences' sums in a fixed order."""
    offs = tl.arange(0, BLOCK_B)  # (BLOCK_B,)
    losses = tl.zeros((BLOCK_B,), tl.float32)
    number = tl.zeros((BLOCK_B,), tl.float32)
    kls = tl.zeros((BLOCK_B,), tl.float32)
    clips = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + offs
        mask_b = offs_b < B
        n = tl.load(stats_ptr + B + offs_b, mask=mask_b, other=0.0)
        loss = tl.load(stats_ptr + offs_b, mask=mask_b, other=0.0)
        if BY_ROWS:
            loss = loss / tl.maximum(n, 1.0)
        losses += loss
        number += n
        kls += tl.load(stats_ptr + 2 * B + offs_b, mask=mask_b, other=0.0)
        clips += tl.load(stats_ptr + 3 * B + offs_b, mask=mask_b, other=0.0)
    tokens = tl.maximum(tl.sum(number, axis=0), 1.0)
    if BY_TOKENS:
        divisor = tokens
        if HAS_TOKENS:
            divisor = tl.load(num_tokens_ptr).to(tl.float32)
    elif BY_ROWS:
        divisor = tl.maximum(tl.cast(B, tl.float32), 1.0)
    else:
        divisor = tl.maximum(tl.cast(B, tl.float32) * length, 1.0)
    tl.store(loss_ptr, (tl.sum(losses, axis=0) / divisor).to(loss_ptr.dtype.element_ty))
    tl.store(kl_ptr, (tl.sum(kls, axis=0) / tokens).to(kl_ptr.dtype.element_ty))
    tl.store(clip_ptr, (tl.sum(clips, axis=0) / tokens).to(clip_ptr.dtype.element_ty))
    tl.store(scale_ptr, 1.0 / divisor)


@triton.jit
def _grpo_loss_bwd_kernel(
    dloss_ptr,
    logprob_ptr,
    advantage_ptr,
    mask_ptr,
    old_ptr,
    ref_ptr,
    stats_ptr,
    scale_ptr,
    dlogprob_ptr,
    B,
    T,
    BETA: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    GSPO: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * T
    A = tl.load(advantage_ptr + row).to(tl.float32)
    weight = tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr)
    if BY_ROWS:
        weight = weight / tl.maximum(tl.load(stats_ptr + B + row), 1.0)
    for start in range(0, T, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        counts, logprob, log_ratio = _grpo_tokens(logprob_ptr, mask_ptr, old_ptr, first + offs, offs < T, HAS_OLD)
        if GSPO:
            log_ratio = tl.zeros_like(log_ratio) + tl.load(stats_ptr + 4 * B + row)
        ratio = tl.exp(log_ratio)
        clipped = tl.minimum(tl.maximum(ratio, 1.0 - CLIP_LOW), 1.0 + CLIP_HIGH) * A
        slope = tl.where(clipped < ratio * A, 0.0, -ratio * A)
        if HAS_REF:
            slope -= BETA * expm1(load(ref_ptr, first + offs, counts) - logprob)
        slope = tl.where(counts, slope * weight, 0.0)
        tl.store(dlogprob_ptr + first + offs, slope.to(dlogprob_ptr.dtype.element_ty), mask=offs < T)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _config(T: int) -> dict[str, int]:
    """One warp for 256 tokens."""
    block = min(1024, max(128, next_power_of_2(T)))
    return {"BLOCK_T": block, "num_warps": max(1, block // 256)}


def grpo_loss(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "grpo",
    max_length: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (logprob, advantage, mask, old_logprob, ref_logprob, num_tokens)
    return grpo_loss_fwd(*tensors, beta, clip_low, clip_high, loss_type, max_length)[:3]


def grpo_loss_fake(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "grpo",
    max_length: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return logprob.new_empty(()), logprob.new_empty(()), logprob.new_empty(())


def grpo_loss_fwd(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (logprob, advantage, mask, old_logprob, ref_logprob, num_tokens)
    loss, kl, clip, stats, scale = grpo_loss_fwd_fake(*tensors, beta, clip_low, clip_high, loss_type, max_length)
    B, T = logprob.shape
    launch(
        _grpo_loss_fwd_kernel,
        (B,),
        *map(_dense, tensors[:5]),
        stats,
        B,
        T,
        BETA=beta,
        CLIP_LOW=clip_low,
        CLIP_HIGH=clip_high,
        HAS_OLD=old_logprob is not None,
        HAS_REF=ref_logprob is not None,
        GSPO=loss_type == "gspo",
        **_config(T),
    )
    launch(
        _grpo_loss_reduce_kernel,
        (1,),
        stats,
        num_tokens,
        loss,
        kl,
        clip,
        scale,
        B,
        max_length or T,
        BY_TOKENS=loss_type in _BY_TOKENS,
        BY_ROWS=loss_type in ("grpo", "gspo"),
        HAS_TOKENS=num_tokens is not None,
        BLOCK_B=1024,
        num_warps=4,
    )
    return loss, kl, clip, stats, scale


def grpo_loss_fwd_fake(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = arithmetic_dtype(logprob)
    loss, kl, clip = grpo_loss_fake(logprob, advantage, mask)
    return loss, kl, clip, logprob.new_empty((5, logprob.shape[0]), dtype=dtype), logprob.new_empty(1, dtype=dtype)


def grpo_loss_bwd(
    dloss: torch.Tensor,
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
) -> torch.Tensor:
    tensors = (dloss, logprob, advantage, mask, old_logprob, ref_logprob, stats, scale)
    dlogprob = grpo_loss_bwd_fake(*tensors, beta, clip_low, clip_high, loss_type)
    B, T = logprob.shape
    launch(
        _grpo_loss_bwd_kernel,
        (B,),
        *map(_dense, tensors),
        dlogprob,
        B,
        T,
        BETA=beta,
        CLIP_LOW=clip_low,
        CLIP_HIGH=clip_high,
        HAS_OLD=old_logprob is not None,
        HAS_REF=ref_logprob is not None,
        GSPO=loss_type == "gspo",
        BY_ROWS=loss_type in ("grpo", "gspo"),
        **_config(T),
    )
    return dlogprob


def grpo_loss_bwd_fake(
    dloss: torch.Tensor,
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
) -> torch.Tensor:
    return logprob.new_empty(logprob.shape)


def grpo_loss_check(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "grpo",
    max_length: int = 0,
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> None:
        bad_argument("grpo_loss", argument, given, allowed, error)

    if logprob.ndim != 2:
        bad("logprob", f"of shape {tuple(logprob.shape)}", "(B, T), a row for each sequence")
    if advantage.shape != logprob.shape[:1]:
        bad("advantage", f"of shape {tuple(advantage.shape)}", f"{tuple(logprob.shape[:1])}, one for each sequence")
    for name, t in (("mask", mask), ("old_logprob", old_logprob), ("ref_logprob", ref_logprob)):
        if t is not None and t.shape != logprob.shape:
            bad(name, f"of shape {tuple(t.shape)}", f"{tuple(logprob.shape)}, as logprob")
    if not mask.is_floating_point() and mask.dtype not in (torch.bool, torch.int32, torch.int64):
        bad("mask", f"of dtype {mask.dtype}", "bool, int32, int64 or floating-point", TypeError)
    if loss_type not in LOSS_TYPES:
        bad("loss_type", repr(loss_type), f"one of {', '.join(LOSS_TYPES)}")
    for name, value in (("beta", beta), ("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0.0:
            bad(name, value, "a number >= 0")
    if beta > 0.0 and ref_logprob is None:
        bad("ref_logprob", None, f"a tensor of shape {tuple(logprob.shape)}, with beta {beta}")
    if num_tokens is not None and loss_type not in _BY_TOKENS:
        bad("num_tokens", "a tensor", f"None with loss_type '{loss_type}'; a tensor with bnpo and dapo")
    if num_tokens is not None and num_tokens.numel() != 1:
        bad("num_tokens", f"of shape {tuple(num_tokens.shape)}", "one element")
    if max_length < 0 or (max_length and loss_type != "dr_grpo"):
        bad("max_length", max_length, "0, or with loss_type 'dr_grpo' a length")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def grpo_loss_forward(
    ctx: Any,
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (logprob, advantage, mask, old_logprob, ref_logprob)
    options = (beta, clip_low, clip_high, loss_type)
    *outputs, stats, scale = torch.ops.tt.grpo_loss_fwd(*tensors, num_tokens, *options, max_length)
    ctx.save_for_backward(*tensors, stats, scale)
    ctx.options = options
    ctx.mark_non_differentiable(*outputs[1:])
    return tuple(outputs)  # type: ignore[return-value]


def grpo_loss_backward(ctx: Any, dloss: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.ops.tt.grpo_loss_bwd(dloss, *ctx.saved_tensors, *ctx.options)


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def _inputs(
    B: int, T: int, device: torch.device | str, dtype: torch.dtype, old: bool = True, ref: bool = False
) -> tuple[Any, ...]:
    logprob = -2 * torch.rand(B, T, device=device, dtype=dtype)
    near = [logprob + 0.3 * torch.randn(B, T, device=device, dtype=dtype) for _ in range(2)]
    mask = torch.arange(T, device=device).expand(B, T) < torch.randint(1, T + 1, (B, 1), device=device)
    advantage = torch.randn(B, device=device, dtype=dtype)
    return (logprob, advantage, mask, near[0] if old else None, near[1] if ref else None)


def grpo_loss_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(id: str, B: int, T: int, ref: bool = False, old: bool = True, **options: Any) -> Sample:
        return Sample(id, _inputs(B, T, device, dtype, old, ref), options)

    yield sample("grpo_9x33", 9, 33)
    yield sample("gspo", 3, 35, clip_low=0.02, clip_high=0.03, loss_type="gspo")
    args = _inputs(4, 17, device, dtype, ref=True)
    tokens = torch.full((1,), 50.0, device=device)
    yield Sample("dapo_all_options", (*args, tokens), {"beta": 0.1, "clip_high": 0.3, "loss_type": "dapo"})
    if dtype in (torch.float32, torch.float64):
        yield sample("dr_grpo_1100", 3, 1100, ref=True, beta=0.04, loss_type="dr_grpo", max_length=1500)
        yield Sample("empty", (args[0][:0], args[1][:0], args[2][:0]))
        yield sample("one", 1, 1)
    if dtype == torch.float32:  # finite differences see a ratio of 1 wherever logprob goes
        yield sample("bnpo_on_policy", 3, 9, old=False, loss_type="bnpo")


def grpo_loss_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    logprob, advantage, mask, old, _ = _inputs(4, 5, device, torch.float32)

    def error(id: str, match: str, *args: Any, error: type[Exception] = ValueError, **options: Any) -> ErrorSample:
        return ErrorSample(id, args or (logprob, advantage, mask), options, error, f"tt::grpo_loss.*{match}")

    yield error("logprob", r"'logprob'.*\(5,\).*\(B, T\)", logprob[0], advantage, mask)
    yield error("advantage", r"'advantage'.*\(3,\).*\(4,\)", logprob, advantage[:3], mask)
    yield error("mask", r"'mask'.*\(3, 5\).*\(4, 5\)", logprob, advantage, mask[:3])
    yield error("mask_dtype", "'mask'.*int8", logprob, advantage, mask.to(torch.int8), error=TypeError)
    yield error("old", r"'old_logprob'.*\(2, 5\)", logprob, advantage, mask, old[:2])
    yield error("loss_type", "'loss_type' is 'ppo'.*gspo", loss_type="ppo")
    yield error("clip", "'clip_low' is -0.1", clip_low=-0.1)
    yield error("no_ref", "'ref_logprob' is None.*beta 0.1", beta=0.1)
    yield error("tokens_unused", "'num_tokens'.*None.*'grpo'", logprob, advantage, mask, None, None, advantage[:1])
    yield error("max_length", "'max_length' is 7.*dr_grpo", max_length=7)


def grpo_loss_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _inputs(256, 8192, device, dtype, ref=True), {"beta": 0.04}

    yield BenchCase("256x8192", make, torch.float32)


def grpo_loss_cost(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logprob: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "grpo",
    max_length: int = 0,
) -> Cost:
    given = [t for t in (logprob, advantage, mask, old_logprob, ref_logprob) if t is not None]
    read, n = sum(t.numel() * t.element_size() for t in given), logprob.numel()
    return Cost(12 * n, read, 10 * n, read + n * logprob.element_size())
