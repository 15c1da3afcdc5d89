"""flash_attn_varlen: attention of packed sequences of different lengths, each with itself alone.

Sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] of q and the keys cu_seqlens_k[b] .. cu_seqlens_k[b + 1] of
k and v, and gets what `flash_attn` of those would give: same formula, same options, same alignment to the bottom right, in the
same kernels (`triton_kernels.py`). A length may be 0: queries without keys get zeros.

| argument | shape | dtype |
|---|---|---|
| q | (Tq, Hq, D), D from 16 to 256 | float32, float16, bfloat16 |
| k, v | (Tk, Hkv, D), Hq a multiple of Hkv | that of q |
| cu_seqlens_q, cu_seqlens_k | (B + 1,): 0, then the running sums of the lengths | int32, int64 |
| max_seqlen_q, max_seqlen_k | numbers: no sequence is longer | |
| alibi_slopes | (Hq,) or (B, Hq) | one of the three |
| sinks | (Hq,), logits | one of the three |
| out, gradients | that of their input | that of their input |
| lse (internal) | (Hq, Tq), natural logarithm | float32 |

What cu_seqlens holds is never read on the host, so it is not checked: it must begin with 0, not decrease, end with Tq or Tk, and
no length may exceed max_seqlen_*. On a GPU, rows beyond the last sequence's end are left uninitialised. There is no attn_bias.
Any strides; only a last stride other than 1 costs a copy. All kernels are Triton's, on every GPU; results repeat bit for bit.

FLOPs: 4 * D per visible pair (query, key) of each sequence and head forward, 10 * D backward; counting them reads the
lengths, or, under torch.compile, takes the mean length for each.

Source: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import is_fake

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument

from . import triton_kernels
from .common import arithmetic_dtype, check_options, scale_of, visible_pairs, window
from .reference import flash_attn_bwd_reference, flash_attn_eager, flash_attn_fwd_reference

# --------------------------------------------------------------------------------------------------------------------
# The specification: flash_attn's, for one sequence after the other
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_varlen_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return flash_attn_varlen_fwd_reference(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(causal, scale, window_left, window_right, softcap, alibi_slopes, sinks),
    )[0]


def flash_attn_varlen_fwd_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=arithmetic_dtype(q))
    for queries, keys, slopes in _sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes):
        options = (causal, scale, window_left, window_right, softcap, slopes, None, sinks)
        own, own_lse = flash_attn_fwd_reference(
            _heads_first(q[queries]), _heads_first(k[keys]), _heads_first(v[keys]), *options
        )
        out[queries] = own[0].transpose(0, 1)
        lse[:, queries] = own_lse[0]
    return out, lse


def flash_attn_varlen_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alibi_slopes: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """As `flash_attn_eager`: scores and weights rounded to the inputs' dtype."""
    outs = [q[:0]]
    for queries, keys, slopes in _sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes):
        one = (_heads_first(x) for x in (q[queries], k[keys], v[keys]))
        outs.append(flash_attn_eager(*one, alibi_slopes=slopes, **options)[0].transpose(0, 1))
    return torch.cat(outs)


def flash_attn_varlen_bwd_reference(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    wide = arithmetic_dtype(q)
    found = _gradients(q, k, v, alibi_slopes, sinks, needs)
    dq, dk, dv, dslopes, dsinks = (g if g.dtype == wide else torch.zeros_like(g, dtype=wide) for g in found)
    for gradient in (dq, dk, dv, dslopes, dsinks):
        gradient.zero_()
    parts = [*needs[:4], False, needs[4]]  # no bias
    for b, (queries, keys, slopes) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k, alibi_slopes)):
        d1, q1, k1, v1 = (_heads_first(x.to(wide)) for x in (dout[queries], q[queries], k[keys], v[keys]))
        slopes = None if slopes is None else slopes.to(wide)
        options = (
            causal,
            scale,
            window_left,
            window_right,
            softcap,
            slopes,
            None,
            None if sinks is None else sinks.to(wide),
        )
        own = flash_attn_bwd_reference(d1, q1, k1, v1, q1, lse, *options, parts)  # out and lse are not read
        for gradient, part, rows in ((dq, own[0], queries), (dk, own[1], keys), (dv, own[2], keys)):
            if gradient.dim() == 3:
                gradient[rows] = part[0].transpose(0, 1)
        if needs[3]:
            (dslopes[b] if dslopes.dim() == 2 else dslopes).add_(own[3])
        if needs[4]:
            dsinks += own[5]
    return tuple(g.to(x.dtype) for g, x in zip((dq, dk, dv, dslopes, dsinks), found, strict=True))


def _sequences(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, alibi_slopes: torch.Tensor | None
) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Rows of the queries, rows of the keys and slopes of each sequence."""
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(queries) - 1):
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        yield slice(queries[b], queries[b + 1]), slice(keys[b], keys[b + 1]), slopes


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(S, H, D) -> (1, H, S, D)."""
    return x.transpose(0, 1)[None]


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    out = q.new_empty(q.shape)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _options(q, *lengths, causal, scale, window_left, window_right, softcap, alibi_slopes, sinks)
    triton_kernels.forward(q, k, v, out, None, options)
    return out


def flash_attn_varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _options(q, *lengths, causal, scale, window_left, window_right, softcap, alibi_slopes, sinks)
    triton_kernels.forward(q, k, v, out, lse, options)
    return out, lse


def flash_attn_varlen_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    found = _gradients(q, k, v, alibi_slopes, sinks, needs)
    dq, dk, dv, dslopes, dsinks = (g if needed else None for g, needed in zip(found, needs, strict=True))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _options(q, *lengths, causal, scale, window_left, window_right, softcap, alibi_slopes, sinks)
    triton_kernels.backward(dout, q, k, v, out, lse, (dq, dk, dv, dslopes, None, dsinks), options)
    return found


def _options(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> triton_kernels.Options:
    # places and bounds are added in 32 bits
    left, right = (min(bound, _FAR) for bound in window(causal, window_left, window_right))
    packing = triton_kernels.Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return triton_kernels.Options(scale_of(q, scale), softcap, left, right, alibi_slopes, None, sinks, packing)


_FAR = 2**30


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """What the backward returns, uninitialised; empty where no gradient is needed."""
    inputs = (q, k, v, alibi_slopes, sinks)
    return tuple(
        x.new_empty(x.shape) if needed and x is not None else q.new_empty(0)
        for x, needed in zip(inputs, needs, strict=True)
    )


# --------------------------------------------------------------------------------------------------------------------
# Outputs, and checks
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_varlen_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


def flash_attn_varlen_fwd_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=arithmetic_dtype(q))


def flash_attn_varlen_bwd_fake(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    return _gradients(q, k, v, alibi_slopes, sinks, needs)


def flash_attn_varlen_check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument("flash_attn_varlen", argument, given, allowed, error)

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            bad(name, f"of shape {tuple(x.shape)}", "3 dimensions: (tokens, heads, head size)")
    cu_seqlens = (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    for name, x in cu_seqlens:
        if x.dtype not in (torch.int32, torch.int64):
            bad(name, f"of dtype {x.dtype}", "int32 or int64", TypeError)
        if x.dim() != 1 or x.shape[0] == 0:
            bad(name, f"of shape {tuple(x.shape)}", "(number of sequences + 1,)")
    B = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != B:
        bad("cu_seqlens_k", f"of shape {tuple(cu_seqlens_k.shape)}", f"the shape of cu_seqlens_q, ({B + 1},)")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            bad(name, longest, "a number of tokens >= 0")
    check_options("flash_attn_varlen", q, k, v, B, scale, window_left, window_right, softcap, alibi_slopes, sinks)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_varlen_forward(
    ctx: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    ctx.options = (max_seqlen_q, max_seqlen_k, causal, scale, window_left, window_right, softcap)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    out, lse = torch.ops.tt.flash_attn_varlen_fwd(*tensors, *ctx.options, alibi_slopes, sinks)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    return out


def flash_attn_varlen_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *tensors, alibi_slopes, sinks = ctx.saved_tensors
    return torch.ops.tt.flash_attn_varlen_bwd(dout, *tensors, *ctx.options, alibi_slopes, sinks, ctx.needs)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _packed(
    device: torch.device | str,
    dtype: torch.dtype,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    Hq: int,
    Hkv: int,
    D: int,
    index: torch.dtype = torch.int32,
) -> tuple[Any, ...]:
    """Random positional arguments for sequences of these lengths."""
    cu_seqlens = [
        torch.tensor(list(itertools.accumulate(lengths, initial=0)), device=device, dtype=index)
        for lengths in (lengths_q, lengths_k)
    ]
    sizes = ((sum(lengths_q), Hq, D), (sum(lengths_k), Hkv, D), (sum(lengths_k), Hkv, D))
    qkv = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
    return *qkv, *cu_seqlens, max(lengths_q, default=0), max(lengths_k, default=0)


def flash_attn_varlen_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    # id, lengths of queries and keys, (Hq, Hkv, D), options
    samples: list[tuple[str, list[int], list[int], tuple[int, int, int], dict[str, Any]]] = [
        # scale: with larger scores softmax is nearly one-hot, and half precision has fewer digits of delta than of its gradients
        ("causal", [18, 33], [18, 33], (2, 1, 16), {"causal": True, "scale": 0.1}),
        ("causal_blocks", [33, 70], [33, 70], (2, 1, 16), {"causal": True}),
        # no queries, no keys, neither; queries that see nothing
        ("zero_lengths", [0, 17, 0, 40, 5], [9, 0, 0, 33, 70], (2, 2, 16), {"causal": True}),
        ("one_query", [1, 1], [40, 1], (2, 1, 17), {}),
        ("no_sequences", [], [], (2, 1, 16), {}),
        ("window", [66, 20], [40, 70], (1, 1, 16), {"window_left": 9, "window_right": 2**31 - 1, "softcap": 3.0}),
        (
            "terms",
            [20, 0, 12],
            [32, 7, 12],
            (2, 1, 16),
            {"alibi_slopes": randn(3, 2) / 4, "sinks": randn(2), "causal": True, "window_left": 10, "softcap": 5.0},
        ),
    ]
    terms = {"alibi_slopes": randn(4) / 16, "sinks": randn(4), "window_left": 99}
    large: list[tuple[str, list[int], tuple[int, int, int], dict[str, Any]]] = [
        ("D64_causal", [300, 1, 0, 517], (4, 2, 64), {"causal": True}),
        ("D128_terms", [129, 515], (4, 4, 128), terms),
        ("D96", [257, 200], (2, 1, 96), {}),
    ]
    for name, lengths_q, lengths_k, heads, options in samples:
        yield Sample(name, _packed(device, dtype, lengths_q, lengths_k, *heads), options)
    for name, lengths, heads, options in large:
        yield Sample(name, _packed(device, dtype, lengths, lengths, *heads), options, slow_in_interpreter=True)
    *_, cu_seqlens_q, cu_seqlens_k, _, _ = _packed(device, dtype, [37, 12], [37, 12], 1, 1, 16, torch.int64)
    qkv = randn(49, 3, 2, 16).unbind(1)
    yield Sample("strides_packed_qkv", (*qkv, cu_seqlens_q, cu_seqlens_k, 100, 90), {"causal": True})


def flash_attn_varlen_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    call = _packed(device, torch.float32, [5, 3], [4, 4], 4, 2, 16)
    q, k, v, cu_seqlens_q, cu_seqlens_k, *longest = call
    rest = (cu_seqlens_q, cu_seqlens_k, *longest)
    op = "flash_attn_varlen"
    yield ErrorSample("rank", (q[None], k, v, *rest), match=f"{op}.*'q'.*3 dimensions")
    yield ErrorSample("heads", (q[:, :3], k, v, *rest), match=f"{op}.*'k'.*divides q's, 3")
    yield ErrorSample("k_v_shapes", (q, k, v[:5], *rest), match=rf"{op}.*'v'.*\(5, 2, 16\).*\(8, 2, 16\)")
    floats = (q, k, v, cu_seqlens_q.float(), cu_seqlens_k, *longest)
    yield ErrorSample("cu_seqlens_dtype", floats, error=TypeError, match=f"{op}.*'cu_seqlens_q'.*float32.*int32")
    fewer = (q, k, v, cu_seqlens_q, cu_seqlens_k[:2], *longest)
    yield ErrorSample("cu_seqlens_length", fewer, match=rf"{op}.*'cu_seqlens_k'.*\(2,\).*\(3,\)")
    none = (q, k, v, cu_seqlens_q[:0], cu_seqlens_k[:0], *longest)
    yield ErrorSample("cu_seqlens_empty", none, match=f"{op}.*'cu_seqlens_q'.*sequences")
    yield ErrorSample("max_seqlen", (*call[:5], -1, 4), match=f"{op}.*'max_seqlen_q'.*-1.*>= 0")
    slopes = {"alibi_slopes": torch.ones(3, 4, device=device)}
    yield ErrorSample("alibi_slopes", call, slopes, match=rf"{op}.*'alibi_slopes'.*\(3, 4\).*\(2, 4\)")
    yield ErrorSample("sinks", call, {"sinks": torch.ones(2, device=device)}, match=rf"{op}.*'sinks'.*\(2,\).*\(4,\)")
    yield ErrorSample("softcap", call, {"softcap": -1.0}, match=f"{op}.*'softcap'.*-1.0")


def flash_attn_varlen_bench_cases() -> Iterator[BenchCase]:
    lengths = (4096, 137, 2048, 905, 64, 3001, 512, 1777, 250, 33, 2560, 1001)  # 16384 tokens, a mean of 1365

    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _packed(device, dtype, lengths, lengths, 32, 8, 128), {"causal": True}

    yield BenchCase("t16384_b12_h32/8_d128_causal", make, passes=("fwd", "bwd"))


def flash_attn_varlen_compile_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """None: the benchmark case has the kernels' code for packed sequences, and flash_attn's samples its options."""
    return iter(())


def flash_attn_varlen_cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Cost:
    if is_fake(cu_seqlens_q) or cu_seqlens_q.is_meta:
        B = cu_seqlens_q.shape[0] - 1
        lengths = [(q.shape[0] // B, k.shape[0] // B)] * B
    else:
        lengths = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    pairs = sum(visible_pairs(Sq, Skv, causal, window_left, window_right) for Sq, Skv in lengths)
    flops = 4 * q.shape[1] * q.shape[2] * pairs
    others = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    rest = sum(x.numel() * x.element_size() for x in others if x is not None)
    forward = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()  # q, k, v; out
    backward = (4 * q.numel() + 2 * (k.numel() + v.numel())) * q.element_size()  # q, k, v, out, dout; dq, dk, dv
    return Cost(flops, forward + rest, flops * 5 // 2, backward + rest)
