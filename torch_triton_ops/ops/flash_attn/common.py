"""What both attention ops' files share: arithmetic, memory layout, checks, and how many pairs see each other."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from torch_triton_ops.errors import bad_argument


def heads_per_kv(q: torch.Tensor, k: torch.Tensor) -> int:
    """Query heads per key head."""
    return q.shape[1] // k.shape[1] if k.shape[1] else 1


def scale_of(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def window(causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """(left, right) with causal taken in; -1 where there is no bound."""
    return window_left, 0 if causal else window_right


def dense_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, shape and dtype of x (B, H, S, D), dense, heads and rows nested as in x. See the package's docstring."""
    B, H, S, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, S, H, D)).transpose(1, 2)
    return x.new_empty((B, H, S, D))


def dense_copy(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`value` in the dtype and memory layout of `dense_like(x)`; differentiable."""
    value = value.to(x.dtype)
    return value.transpose(1, 2).contiguous().transpose(1, 2) if x.stride(1) < x.stride(2) else value.contiguous()


def check_options(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    B: int,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise for what is wrong with arguments that both ops take; heads are dimension 1 of q, k and v."""

    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument(op, argument, given, allowed, error)

    Hq, D = q.shape[1], q.shape[-1]
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            bad(name, f"of dtype {x.dtype}", f"the dtype of q, {q.dtype}", TypeError)
    if not 16 <= D <= 256:
        bad("q", f"of shape {tuple(q.shape)}", "a head size (the last dimension) from 16 to 256")
    if k.shape[-1] != D:
        bad("k", f"of shape {tuple(k.shape)}", f"the head size of q, {D}")
    if v.shape != k.shape:
        bad("v", f"of shape {tuple(v.shape)}", f"the shape of k, {tuple(k.shape)}")
    Hkv = k.shape[1]
    if Hq % Hkv if Hkv else Hq:
        bad("k", f"of shape {tuple(k.shape)}", f"a number of heads that divides q's, {Hq}")
    if scale is not None and not -math.inf < scale < math.inf:
        bad("scale", scale, "a finite number, or None for 1 / sqrt(head size)")
    for name, bound in (("window_left", window_left), ("window_right", window_right)):
        if bound < -1:
            bad(name, bound, "a number of keys >= 0, or -1 for no bound")
    if not 0 <= softcap < math.inf:
        bad("softcap", softcap, "a finite number > 0, or 0 for none")
    for name, term in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if term is not None and not term.is_floating_point():
            bad(name, f"of dtype {term.dtype}", "a floating-point dtype", TypeError)
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((Hq,), (B, Hq)):
        bad("alibi_slopes", f"of shape {tuple(alibi_slopes.shape)}", f"a slope per query head, ({Hq},) or ({B}, {Hq})")
    if sinks is not None and tuple(sinks.shape) != (Hq,):
        bad("sinks", f"of shape {tuple(sinks.shape)}", f"a logit per query head, ({Hq},)")


def visible_pairs(Sq: int, Skv: int, causal: bool, window_left: int, window_right: int) -> int:
    """How many pairs (query, key) see each other."""
    left, right = window(causal, window_left, window_right)

    def below(n: int) -> int:
        """Sum of min(t, Skv) for 0 <= t < n."""
        n = max(n, 0)
        ramp = min(n, Skv + 1)
        return ramp * (ramp - 1) // 2 + (n - ramp) * Skv

    def keys_before(shift: int) -> int:
        """How many pairs (i, j) have j < p(i) + shift, for p(i) = i + Skv - Sq."""
        return below(Skv + shift) - below(Skv - Sq + shift)

    pairs = keys_before(right + 1) if right >= 0 else Sq * Skv
    return pairs - keys_before(-left) if left >= 0 else pairs
