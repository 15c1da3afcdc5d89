"""Flash attention, forward and backward: softmax(scale * q @ k^T) @ v without ever storing the score matrix.

score[i, j] = scale * dot(q[i], k[j]), then softcap * tanh(score / softcap) if softcap > 0,
              then - alibi_slopes * |p(i) - j|, then + attn_bias[i, j]
P[i, j]     = exp(score[i, j] - lse[i]),  over the keys j that query i may see
lse[i]      = log(sum_j exp(score[i, j]) + exp(sinks))
out[i]      = sum_j P[i, j] * v[j]

Let p(i) = i + Skv - Sq, the place of query i among the keys: **causal and windows are aligned to the bottom right**, so the
last query stands beside the last key also when Sq != Skv. Query i sees the keys j of 0 <= j < Skv with
    j <= p(i) if causal,  j >= p(i) - window_left if window_left >= 0,  j <= p(i) + window_right if window_right >= 0.
A query that sees nothing, also because its bias is -inf everywhere, gets zeros, and its gradient is zero. A sink is a key
without a value: it takes its part of every query's weight, and none of the output.

| argument | shape | dtype |
|---|---|---|
| q | (B, Hq, Sq, D), D from 16 to 256 | float32, float16, bfloat16 |
| k, v | (B, Hkv, Skv, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv) | that of q |
| alibi_slopes | (Hq,) or (B, Hq) | one of the three |
| attn_bias | broadcasts to (B, Hq, Sq, Skv), without a copy | one of the three |
| sinks | (Hq,), logits | one of the three |
| out, dq | that of q | that of q |
| dk, dv | that of k | that of k |
| dalibi_slopes, dattn_bias, dsinks | that of their input | that of their input |
| lse (internal) | (B, Hq, Sq), natural logarithm | float32 |

`scale` defaults to 1 / sqrt(D). All options combine.

Memory layout. Inputs may have any strides; only a last stride other than 1 costs a copy. An output is dense and keeps the
order of its model (out and dq follow q, dk follows k, dv follows v): `(B, S, H, D)` in memory, shown as `(B, H, S, D)`, if the
model's head stride is smaller than its row stride, else contiguous. So `(B, S, H, D).transpose(1, 2)` costs nothing on the way
in or out.

float32 products follow `torch.backends.cuda.matmul.fp32_precision` at launch: IEEE unless TF32 is allowed.

FLOPs: 4 * D per visible pair (query, key) and head forward, 10 * D backward (two and five matrix products).

Two sets of kernels, chosen for each call:

* `triton_kernels.py`, Triton: every GPU from sm_80 up, every option. A bias's gradient takes a kernel of its own, which computes
  the scores once more and sums over the dimensions that were broadcast in a fixed order.
* `hopper*.py`, Gluon: compute capability 9.0, triton 3.6 and 3.7; half precision, D from 40 to 256 that is a
  multiple of 8, scale > 0, any mask, window, softcap and sinks, no slopes and no bias. The backward: of
  these, Sq > 64 (Sq > 128 for D up to 64).

The Hopper kernels read by TMA, which wants rows and bases aligned to 16 bytes and no expanded dimension: other inputs are copied.
Their backward sums dq in no fixed order; dk and dv, every forward and the whole portable path repeat bit for bit. With
`torch.use_deterministic_algorithms` the portable backward runs. The environment variable `TORCH_TRITON_OPS_ATTENTION` forces a
set: `triton`, or `gluon`, which raises RuntimeError with the reason where that is not possible; `auto` is the default.
Under torch.compile the portable kernels are inlined, and a call of the Hopper kernels is one node of the graph.

Sources: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691; Rabe and Staats, https://arxiv.org/abs/2112.05682; ALiBi: Press
et al., https://arxiv.org/abs/2108.12409; sinks: Xiao et al., https://arxiv.org/abs/2309.17453, as logits in OpenAI's gpt-oss.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import triton

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import capability, gluon_ready

from . import triton_kernels
from .common import arithmetic_dtype, check_options, dense_like, scale_of, visible_pairs, window
from .reference import (  # noqa: F401 (the registration looks for both ops' functions here)
    flash_attn_bwd_reference,
    flash_attn_eager,
    flash_attn_fwd_reference,
    flash_attn_reference,
)
from .varlen import (  # noqa: F401
    flash_attn_varlen,
    flash_attn_varlen_backward,
    flash_attn_varlen_bench_cases,
    flash_attn_varlen_bwd,
    flash_attn_varlen_bwd_fake,
    flash_attn_varlen_bwd_reference,
    flash_attn_varlen_check,
    flash_attn_varlen_compile_samples,
    flash_attn_varlen_cost,
    flash_attn_varlen_eager,
    flash_attn_varlen_error_samples,
    flash_attn_varlen_fake,
    flash_attn_varlen_forward,
    flash_attn_varlen_fwd,
    flash_attn_varlen_fwd_fake,
    flash_attn_varlen_fwd_reference,
    flash_attn_varlen_reference,
    flash_attn_varlen_samples,
)

# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def flash_attn(
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
    out = dense_like(q)
    options = (causal, scale, window_left, window_right, softcap, alibi_slopes, attn_bias, sinks)
    _forward(q, k, v, out, None, *options)
    return out


def flash_attn_fwd(
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
    options = (causal, scale, window_left, window_right, softcap, alibi_slopes, attn_bias, sinks)
    out, lse = flash_attn_fwd_fake(q, k, v, *options)
    _forward(q, k, v, out, lse, *options)
    return out, lse


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    left, right = _bounds(q.shape[2], k.shape[2], causal, window_left, window_right)
    scale = scale_of(q, scale)
    refusal = _terms_refusal(alibi_slopes, attn_bias) or _gluon_refusal(q, k, scale)
    if _takes_gluon(q.device, refusal):
        from . import hopper

        hopper.forward(q, k, v, out, lse, scale, left, right, softcap, sinks)
    else:
        options = triton_kernels.Options(scale, softcap, left, right, alibi_slopes, attn_bias, sinks)
        triton_kernels.forward(q, k, v, out, lse, options)


def flash_attn_bwd(
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
    terms = (alibi_slopes, attn_bias, sinks)
    options = (causal, scale, window_left, window_right, softcap, *terms)
    found = flash_attn_bwd_fake(dout, q, k, v, out, lse, *options, needs)
    left, right = _bounds(q.shape[2], k.shape[2], causal, window_left, window_right)
    scale = scale_of(q, scale)
    refusal = _terms_refusal(alibi_slopes, attn_bias) or _gluon_bwd_refusal(q, k, scale)
    if _takes_gluon(q.device, refusal):
        from . import hopper_bwd

        dq, dk, dv = (g if needed else dense_like(x) for g, x, needed in zip(found, (q, k, v), needs, strict=False))
        dsinks = found[5] if sinks is not None and needs[5] else None
        hopper_bwd.backward(dout, q, k, v, out, lse, dq, dk, dv, scale, left, right, softcap, sinks, dsinks)
    else:
        triton_kernels.backward(
            *(dout, q, k, v, out, lse),
            [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)],
            triton_kernels.Options(scale, softcap, left, right, *terms),
        )
    return found


# --------------------------------------------------------------------------------------------------------------------
# Which kernels
# --------------------------------------------------------------------------------------------------------------------

_SETTING = "TORCH_TRITON_OPS_ATTENTION"
_SETTINGS = ("auto", "triton", "gluon")
_setting = os.environ.get(_SETTING, "auto")
if _setting not in _SETTINGS:
    raise ValueError(f"{_SETTING} is {_setting!r}; allowed: {', '.join(_SETTINGS)}")


def _takes_gluon(device: torch.device, refusal: str | None) -> bool:
    """Whether the Hopper kernels run, by the user's setting and by why they cannot, if they cannot."""
    if _setting == "triton":
        return False
    if refusal is None and not gluon_ready(device):
        refusal = f"they are tested with triton 3.6 and 3.7, not with {triton.__version__}"
        if _setting == "auto":
            _warn_once(refusal)
    if refusal is not None and _setting == "gluon":
        raise RuntimeError(f"tt::flash_attn: {_SETTING}=gluon, but the Hopper kernels cannot run: {refusal}")
    return refusal is None


@functools.cache
def _warn_once(refusal: str) -> None:
    warnings.warn(f"tt::flash_attn runs its portable kernels, not the Hopper ones: {refusal}", stacklevel=2)


def _terms_refusal(alibi_slopes: torch.Tensor | None, attn_bias: torch.Tensor | None) -> str | None:
    """Why the Hopper kernels cannot compute a call with these; None if they can."""
    terms = {"alibi_slopes": alibi_slopes, "attn_bias": attn_bias}
    given = [name for name, term in terms.items() if term is not None]
    return f"they have no {' and no '.join(given)}" if given else None


def _gluon_refusal(q: torch.Tensor, k: torch.Tensor, scale: float) -> str | None:
    """Why the Hopper kernels cannot compute this call; None if they can."""
    D = q.shape[3]
    if capability(q.device) != 90:
        return f"they are written for compute capability 9.0 and {q.device} is another"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"they compute float16 and bfloat16, not {q.dtype}"
    if D % 8 or D <= 32:  # TMA wants rows of a multiple of 16 bytes; small heads would be mostly padding
        return f"they take head sizes from 40 to 256 that are multiples of 8, not {D}"
    if scale <= 0:
        return f"they take a scale > 0, not {scale}"  # they hide keys before scaling: -inf * scale must stay -inf
    if k.shape[2] == 0:
        return "TMA cannot describe empty keys"
    return None


def _gluon_bwd_refusal(q: torch.Tensor, k: torch.Tensor, scale: float) -> str | None:
    refusal = _gluon_refusal(q, k, scale)
    D, Sq = q.shape[3], q.shape[2]
    least = 128 if D <= 64 else 64  # two of their steps
    if refusal is None and Sq <= least:
        return f"their backward takes more than {least} queries of head size {D}, not {Sq}"
    if refusal is None and torch.are_deterministic_algorithms_enabled():
        return "their backward sums dq in no fixed order, and deterministic algorithms are asked for"
    return refusal


def _bounds(Sq: int, Skv: int, causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """As `window`, -1 also for a bound that cuts nothing off: what remains fits 32 bits and costs a mask only where needed."""
    left, right = window(causal, window_left, window_right)
    return left if 0 <= left < Skv - 1 else -1, right if 0 <= right < Sq - 1 else -1


# --------------------------------------------------------------------------------------------------------------------
# Outputs, and checks
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_fake(
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
    return dense_like(q)


def flash_attn_fwd_fake(
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
    return dense_like(q), q.new_empty(q.shape[:3], dtype=arithmetic_dtype(q))


def flash_attn_bwd_fake(
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
    found = [dense_like(x) if needed else x.new_empty(0) for x, needed in zip((q, k, v), needs, strict=False)]
    for x, needed in zip((alibi_slopes, attn_bias, sinks), needs[3:], strict=True):
        found.append(x.new_empty(x.shape) if needed and x is not None else q.new_empty(0))
    return tuple(found)


def flash_attn_check(
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
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument("flash_attn", argument, given, allowed, error)

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            bad(name, f"of shape {tuple(x.shape)}", "4 dimensions: (batch, heads, length, head size)")
    B, Hq, Sq, _ = q.shape
    if k.shape[0] != B:
        bad("k", f"of shape {tuple(k.shape)}", f"the batch of q, {B}")
    check_options("flash_attn", q, k, v, B, scale, window_left, window_right, softcap, alibi_slopes, sinks)
    if attn_bias is not None and not attn_bias.is_floating_point():
        allowed = "a floating-point dtype; for a mask of bools, 0 where it is True and -inf elsewhere"
        bad("attn_bias", f"of dtype {attn_bias.dtype}", allowed, TypeError)
    if attn_bias is not None:
        own, full = tuple(attn_bias.shape), (B, Hq, Sq, k.shape[2])
        wrong = (size not in (1, whole) for size, whole in zip(reversed(own), reversed(full), strict=False))
        if len(own) > 4 or any(wrong):
            bad("attn_bias", f"of shape {own}", f"what broadcasts to the scores' shape, {full}")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_forward(
    ctx: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    ctx.options = (causal, scale, window_left, window_right, softcap)
    out, lse = torch.ops.tt.flash_attn_fwd(q, k, v, *ctx.options, alibi_slopes, attn_bias, sinks)
    ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, attn_bias, sinks)
    return out


def flash_attn_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *tensors, alibi_slopes, attn_bias, sinks = ctx.saved_tensors
    return torch.ops.tt.flash_attn_bwd(dout, *tensors, *ctx.options, alibi_slopes, attn_bias, sinks, ctx.needs)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def qkv(B: int, Hq: int, Hkv: int, Sq: int, Skv: int, D: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(B, H, S, D, device=device, dtype=dtype) for H, S in ((Hq, Sq), (Hkv, Skv), (Hkv, Skv)))

    # id, (B, Hq, Hkv, Sq, Skv, D), options
    samples: list[tuple[str, tuple[int, int, int, int, int, int], dict[str, Any]]] = [
        ("one_query", (1, 1, 1, 1, 33, 16), {}),
        ("square", (1, 2, 2, 64, 64, 32), {}),
        ("odd", (2, 1, 1, 37, 91, 16), {}),
        ("causal", (1, 2, 2, 130, 130, 32), {"causal": True}),
        ("causal_long_q", (1, 1, 1, 70, 33, 16), {"causal": True}),  # the first 37 queries see nothing
        ("causal_long_kv", (1, 1, 1, 33, 130, 16), {"causal": True}),
        ("causal_one_query", (2, 2, 1, 1, 65, 16), {"causal": True}),
        ("gqa", (2, 4, 2, 33, 47, 32), {"causal": True}),
        ("mqa", (1, 3, 1, 40, 40, 16), {}),
        ("D40", (1, 1, 1, 35, 50, 40), {"causal": True}),
        ("D17", (1, 2, 1, 20, 33, 17), {}),
        ("scale", (1, 1, 1, 40, 40, 16), {"scale": 0.3}),
        ("scale_negative", (1, 1, 1, 40, 70, 16), {"scale": -0.1, "causal": True}),
        ("scale_zero", (1, 1, 1, 40, 40, 16), {"scale": 0.0, "causal": True}),
        ("window", (1, 2, 1, 130, 130, 16), {"window_left": 20, "window_right": 9}),
        ("window_causal", (1, 1, 1, 100, 130, 16), {"window_left": 17, "causal": True}),
        ("window_left_only", (1, 1, 1, 130, 100, 16), {"window_left": 0}),
        ("window_right_only", (1, 1, 1, 70, 100, 16), {"window_right": 40}),
        ("window_two_keys", (1, 1, 1, 40, 40, 16), {"window_left": 1, "window_right": 0}),
        ("window_huge", (1, 1, 1, 40, 40, 16), {"window_left": 2**31 - 1, "window_right": 2**31 - 1}),
        ("softcap", (1, 2, 1, 40, 70, 16), {"softcap": 2.0, "causal": True}),
        ("softcap_window", (1, 1, 1, 66, 66, 16), {"softcap": 30.0, "window_left": 9}),
        ("empty_batch", (0, 2, 1, 5, 7, 16), {}),
        ("empty_q", (1, 2, 1, 0, 7, 16), {"causal": True}),
        ("empty_kv", (1, 2, 1, 5, 0, 16), {}),
        ("no_heads", (1, 0, 0, 5, 7, 16), {}),
    ]
    for name, shape, options in samples:
        yield Sample(name, qkv(*shape), options)
    large: list[tuple[str, tuple[int, int, int, int, int, int], dict[str, Any]]] = [
        ("D64_causal", (2, 4, 4, 300, 300, 64), {"causal": True}),
        ("D80", (1, 2, 1, 200, 257, 80), {}),
        ("D96_gqa", (1, 4, 2, 257, 257, 96), {"causal": True}),
        ("D128", (2, 4, 4, 384, 384, 128), {}),
        ("D128_gqa_causal", (2, 8, 2, 515, 515, 128), {"causal": True}),
        ("D128_window_softcap", (1, 4, 2, 700, 700, 128), {"causal": True, "window_left": 200, "softcap": 20.0}),
        ("D192", (1, 2, 2, 190, 310, 192), {"causal": True}),
        ("D256", (1, 4, 1, 320, 400, 256), {"causal": True}),
    ]
    for name, shape, options in large:
        yield Sample(name, qkv(*shape), options, slow_in_interpreter=True)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    hidden = randn(2, 1, 1, 50)
    hidden[0, :, :, 20:] = -math.inf  # a padding mask
    hidden[1] = -math.inf  # these queries see nothing
    # id, (B, Hq, Hkv, Sq, Skv, D), terms of the scores, options
    with_terms: list[tuple[str, tuple[int, int, int, int, int, int], dict[str, Any], dict[str, Any]]] = [
        ("alibi", (2, 4, 2, 37, 50, 16), {"alibi_slopes": randn(4) / 4}, {"causal": True}),
        ("alibi_batch", (2, 2, 2, 50, 37, 16), {"alibi_slopes": randn(2, 2) / 4}, {"softcap": 3.0}),
        ("bias", (2, 2, 1, 40, 70, 16), {"attn_bias": randn(2, 40, 70)}, {"causal": True}),
        ("bias_padding", (2, 2, 2, 37, 50, 16), {"attn_bias": hidden}, {}),
        ("bias_queries", (2, 2, 1, 40, 70, 16), {"attn_bias": randn(2, 1, 40, 1), "sinks": randn(2)}, {}),
        (
            "sinks",
            (2, 2, 1, 70, 40, 16),
            {"sinks": randn(2)},
            {"causal": True},
        ),  # the first 30 queries see nothing else
        (
            "terms",
            (2, 2, 1, 20, 35, 16),
            {"alibi_slopes": randn(2) / 4, "attn_bias": randn(2, 2, 20, 35), "sinks": randn(2)},
            {"softcap": 5.0, "window_left": 15, "causal": True},
        ),
    ]
    for name, shape, terms, options in with_terms:
        yield Sample(name, qkv(*shape), terms | options)
    large_with_terms: list[tuple[str, tuple[int, int, int, int, int, int], dict[str, Any], dict[str, Any]]] = [
        ("D64_alibi", (2, 4, 2, 300, 300, 64), {"alibi_slopes": randn(4) / 16}, {"causal": True}),
        ("D64_bias", (2, 4, 4, 257, 300, 64), {"attn_bias": randn(4, 257, 300)}, {"softcap": 10.0}),
        ("D128_sinks_window", (1, 8, 2, 515, 515, 128), {"sinks": randn(8)}, {"causal": True, "window_left": 100}),
        (
            "D128_bias",
            (2, 4, 2, 300, 515, 128),
            {"attn_bias": randn(2, 1, 300, 515), "sinks": randn(4)},
            {"causal": True},
        ),
        (
            "D256_terms",
            (2, 2, 1, 257, 257, 256),
            {"alibi_slopes": randn(2, 2) / 16, "attn_bias": randn(257, 257), "sinks": randn(2)},
            {"causal": True, "window_left": 150, "softcap": 20.0},
        ),
    ]
    for name, shape, terms, options in large_with_terms:
        yield Sample(name, qkv(*shape), terms | options, slow_in_interpreter=True)

    B, H, S, D = 2, 3, 37, 16
    transposed = [torch.randn(B, S, H, D, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    yield Sample("strides_bshd", tuple(transposed), {"causal": True})
    packed = torch.randn(B, S, 3, H, D, device=device, dtype=dtype)
    yield Sample("strides_packed_qkv", tuple(x.transpose(1, 2) for x in packed.unbind(2)), {"causal": True})
    q, k, v = qkv(1, 2, 2, S, S, D)
    # no expanded keys or values: equal rows make the true gradients 0, where only rounding is left to compare
    yield Sample("strides_expanded", (q[:, :, :1].expand_as(q), k[:, :1].expand_as(k), v[:, :1].expand_as(v)))
    wide = torch.randn(3, 1, 2, S + 1, 2 * D + 1, device=device, dtype=dtype)[:, :, :, 1:, 1 : D + 1]  # misaligned rows
    yield Sample("strides_sliced", tuple(wide))
    yield Sample("strides_last", tuple(x.mT.contiguous().mT for x in (q, k, v)))


def flash_attn_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    q = torch.randn(2, 4, 5, 16, device=device)
    k, v = torch.randn(2, 2, 2, 7, 16, device=device)
    yield ErrorSample("rank", (q[0], k, v), match=r"flash_attn.*'q'.*\(4, 5, 16\).*4 dimensions")
    yield ErrorSample("dtypes", (q, k, v.half()), error=TypeError, match="flash_attn.*'v'.*float16.*float32")
    yield ErrorSample("head_size_small", (q[..., :8], k[..., :8], v[..., :8]), match="flash_attn.*'q'.*16 to 256")
    wide = torch.randn(1, 1, 2, 257, device=device)
    yield ErrorSample("head_size_large", (wide, wide, wide), match="flash_attn.*'q'.*257.*16 to 256")
    yield ErrorSample("batch", (q[:1], k, v), match=r"flash_attn.*'k'.*\(2, 2, 7, 16\).*batch")
    yield ErrorSample("k_v_shapes", (q, k, v[:, :, :6]), match=r"flash_attn.*'v'.*\(2, 2, 6, 16\).*\(2, 2, 7, 16\)")
    yield ErrorSample("heads", (q[:, :3], k, v), match="flash_attn.*'k'.*divides q's, 3")
    yield ErrorSample("no_key_heads", (q, k[:, :0], v[:, :0]), match="flash_attn.*'k'.*divides q's, 4")
    yield ErrorSample("scale_nan", (q, k, v), {"scale": math.nan}, match="flash_attn.*'scale'.*nan.*finite")
    yield ErrorSample("window_left", (q, k, v), {"window_left": -2}, match="flash_attn.*'window_left'.*-2.*>= 0")
    yield ErrorSample("window_right", (q, k, v), {"window_right": -7}, match="flash_attn.*'window_right'.*-7.*>= 0")
    yield ErrorSample("softcap", (q, k, v), {"softcap": -1.0}, match="flash_attn.*'softcap'.*-1.0")
    for name, shape, allowed in (
        ("alibi_slopes", (2, 3), r"\(2, 3\).*\(4,\) or \(2, 4\)"),
        ("attn_bias", (2, 2, 5, 7), r"\(2, 2, 5, 7\).*broadcasts to.*\(2, 4, 5, 7\)"),
        ("sinks", (2, 4), r"\(2, 4\).*\(4,\)"),
    ):
        options = {name: torch.ones(shape, device=device)}
        yield ErrorSample(name, (q, k, v), options, match=f"flash_attn.*'{name}'.*{allowed}")
    mask = {"attn_bias": torch.ones(5, 7, device=device, dtype=torch.bool)}
    yield ErrorSample("mask", (q, k, v), mask, TypeError, "flash_attn.*'attn_bias'.*bool.*-inf elsewhere")


def flash_attn_compile_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Samples that are worth compiling offline: smaller heads take the same path with fewer registers."""
    return (sample for sample in flash_attn_samples(device, dtype) if sample.slow_in_interpreter)


def flash_attn_bench_cases() -> Iterator[BenchCase]:
    for B, Hq, Hkv, S, D, causal in [
        (4, 32, 32, 4096, 128, False),
        (4, 32, 32, 4096, 128, True),
        (4, 32, 8, 4096, 128, True),
        (1, 32, 8, 16384, 128, True),
        (16, 32, 32, 1024, 128, True),
        (4, 32, 32, 4096, 64, True),
        (32, 16, 16, 512, 64, False),
        (2, 16, 16, 8192, 256, True),
    ]:

        def make(
            device: torch.device | str,
            dtype: torch.dtype,
            sizes: tuple[tuple[int, ...], ...] = ((B, Hq, S, D), (B, Hkv, S, D), (B, Hkv, S, D)),
            causal: bool = causal,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(torch.randn(size, device=device, dtype=dtype) for size in sizes), {"causal": causal}

        heads = f"h{Hq}" if Hq == Hkv else f"h{Hq}/{Hkv}"
        yield BenchCase(f"b{B}_{heads}_s{S}_d{D}_{'causal' if causal else 'full'}", make, passes=("fwd", "bwd"))


def flash_attn_cost(
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
) -> Cost:
    B, H, Sq, D = q.shape
    flops = 4 * B * H * D * visible_pairs(Sq, k.shape[2], causal, window_left, window_right)
    forward = 2 * q.numel() + k.numel() + v.numel()  # q, k, v; out
    backward = 4 * q.numel() + 2 * (k.numel() + v.numel())  # q, k, v, out, dout; dq, dk, dv
    itemsize = q.element_size()
    terms = sum(x.numel() * x.element_size() for x in (alibi_slopes, attn_bias, sinks) if x is not None)
    return Cost(flops, forward * itemsize + terms, flops * 5 // 2, backward * itemsize + 2 * terms)
