"""The specification of attention in plain torch, which CPU tensors run, and its yardstick as eager torch rounds it.

Arguments are those of the package's docstring. The score matrix is stored whole here.
"""

from __future__ import annotations

import math

import torch

from .common import arithmetic_dtype, dense_copy, heads_per_kv, scale_of, window


def flash_attn_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    options = (causal, scale, window_left, window_right, softcap, alibi_slopes, attn_bias, sinks)
    return flash_attn_fwd_reference(q, k, v, *options)[0]


def flash_attn_fwd_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = arithmetic_dtype(q)
    group = heads_per_kv(q, k)
    k, v_all = k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    score = (q.to(dtype) @ k.transpose(-1, -2)) * scale_of(q, scale)  # (B, Hq, Sq, Skv)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    score = _add_terms(score, alibi_slopes, attn_bias)
    score = _hide(score, causal, window_left, window_right)
    if sinks is not None:
        score = _append_sinks(score, sinks)
    p = _softmax(score)[..., : k.shape[2]]
    return dense_copy(p @ v_all, q), score.logsumexp(-1)


def flash_attn_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in eager torch, scores and weights rounded to the inputs' dtype: the error budget's yardstick."""
    group = heads_per_kv(q, k)
    score = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * scale_of(q, scale)  # (B, Hq, Sq, Skv)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    score = _add_terms(score, alibi_slopes, attn_bias).to(q.dtype)
    score = _hide(score, causal, window_left, window_right)
    if sinks is not None:
        score = _append_sinks(score, sinks)
    p = _softmax(score.to(arithmetic_dtype(q)))[..., : k.shape[2]].to(q.dtype)
    return dense_copy(p @ v.repeat_interleave(group, 1), q)


def flash_attn_bwd_reference(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    dtype = arithmetic_dtype(q)
    B, Hkv, Skv, D = k.shape
    group, scale = heads_per_kv(q, k), scale_of(q, scale)
    q_all, dout_all = q.to(dtype), dout.to(dtype)
    k_all, v_all = k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    score = (q_all @ k_all.transpose(-1, -2)) * scale
    if softcap > 0:
        capped = torch.tanh(score / softcap)
        score = softcap * capped
    score = _hide(_add_terms(score, alibi_slopes, attn_bias), causal, window_left, window_right)
    dp = dout_all @ v_all.transpose(-1, -2)
    if sinks is not None:
        score = _append_sinks(score, sinks)
        dp = torch.nn.functional.pad(dp, (0, 1))  # a sink has no value
    # From the scores again, not from lse and out: in fp32 those would cost digits where softmax is nearly one-hot.
    p = _softmax(score)
    dscore = torch.ops.aten._softmax_backward_data(dp, p, -1, dtype)  # p * (dp - sum(p * dp))
    dsinks = dscore[..., Skv:].sum((0, 2, 3))
    p, dscore = p[..., :Skv], dscore[..., :Skv]
    dbias = dscore if attn_bias is None else dscore.sum_to_size(attn_bias.shape)
    dslopes = None
    if alibi_slopes is not None:
        dslopes = (
            -(dscore * _places(score.shape[2], Skv, score.device).abs()).sum((2, 3)).sum_to_size(alibi_slopes.shape)
        )
    if softcap > 0:
        dscore = dscore * (1 - capped * capped)
    dscore = dscore * scale
    dq = dscore @ k_all
    dk = (dscore.transpose(-1, -2) @ q_all).view(B, Hkv, group, Skv, D).sum(2)
    dv = (p.transpose(-1, -2) @ dout_all).view(B, Hkv, group, Skv, D).sum(2)
    found = [
        dense_copy(gradient, x) if needed else x.new_empty(0)
        for gradient, x, needed in zip((dq, dk, dv), (q, k, v), needs, strict=False)
    ]
    for gradient, x, needed in zip((dslopes, dbias, dsinks), (alibi_slopes, attn_bias, sinks), needs[3:], strict=True):
        found.append(gradient.to(x.dtype, copy=True).contiguous() if needed and x is not None else q.new_empty(0))
    return tuple(found)


def _add_terms(score: torch.Tensor, alibi_slopes: torch.Tensor | None, attn_bias: torch.Tensor | None) -> torch.Tensor:
    """Scores (B, H, Sq, Skv) with ALiBi and bias."""
    if alibi_slopes is not None:
        distance = _places(score.shape[2], score.shape[3], score.device).abs()
        score = score - (alibi_slopes.to(arithmetic_dtype(score))[..., None, None] * distance).to(score.dtype)
    return score if attn_bias is None else score + attn_bias


def _hide(score: torch.Tensor, causal: bool, window_left: int, window_right: int) -> torch.Tensor:
    """-inf where query i does not see key j."""
    left, right = window(causal, window_left, window_right)
    place = _places(score.shape[2], score.shape[3], score.device)
    visible = torch.ones_like(place, dtype=torch.bool)
    if right >= 0:
        visible &= place <= right
    if left >= 0:
        visible &= place >= -left
    return score.masked_fill(~visible, -math.inf)


def _append_sinks(score: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """(B, H, Sq, Skv + 1): each head's sink as one more key."""
    B, H, Sq, _ = score.shape
    return torch.cat([score, sinks.to(score.dtype)[:, None, None].expand(B, H, Sq, 1)], -1)


def _softmax(score: torch.Tensor) -> torch.Tensor:
    """Over the last dimension; zeros, with a zero gradient, where all of it is -inf."""
    sees_any = (score != -math.inf).any(-1, keepdim=True)
    return score.masked_fill(~sees_any, 0.0).softmax(-1) * sees_any


def _places(Sq: int, Skv: int, device: torch.device) -> torch.Tensor:
    """(Sq, Skv): j - p(i), where key j stands seen from query i."""
    return torch.arange(Skv, device=device) - (torch.arange(Sq, device=device) + (Skv - Sq))[:, None]
