"""Rotary position embedding of queries and keys, in one launch.

Each pair (x1, x2) of a head's first R elements is rotated by its position's angle; elements R to D are copied:

out1 = x1 * cos1 - x2 * sin1
out2 = x2 * cos2 + x1 * sin2

The pairs are (i, i + R / 2) (`rotate_half`, Hugging Face's layout of Llama's weights), or (2 * i, 2 * i + 1) where
`interleaved` (GPT-J, and Llama's original weights). Tables usually have cos1 = cos2 and sin1 = sin2; where they do not,
the formula still holds, and so does the gradient:

dx1 = d1 * cos1 + d2 * sin2
dx2 = d2 * cos2 - d1 * sin1

| tensor | shape | dtype |
|---|---|---|
| q | (B, Hq, S, D), any strides | float32, float16, bfloat16 |
| k | (B, Hk, S, D), any strides | that of q |
| cos, sin | (S, R / 2), or (1 or B, S, R) | any of these |
| q_out, k_out, gradients | those of q, k | that of q |

The tables' number of dimensions tells what they hold: (S, R / 2) one value per pair; (1 or B, S, R) one per element, as
Hugging Face makes them. R <= D follows from the last size. Position offsets are rows of a longer table:
`cos[start : start + S]`. The tables get no gradient. Arithmetic in fp32, with one rounding, at the store.

Strides of the results, and of the gradients alike: where x is not contiguous and its heads lie closer together than its
positions, as in (B, S, H, D).transpose(1, 2), the result is a contiguous (B, S, H, D), transposed; else contiguous.
So nothing needs to be copied before the projection that follows attention.

Bytes: 2 * (q.numel() + k.numel()) * itemsize, forward and backward. Raises ValueError for other shapes, TypeError for
dtypes that differ between q and k or between cos and sin.

Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(_rotate_reference(x, cos, sin, interleaved, inverse=False) for x in (q, k))


def rope_bwd_reference(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(_rotate_reference(x, cos, sin, interleaved, inverse=True) for x in (dq, dk))


def _rotate_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    R = _rotary_dims(cos)
    first, second = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    # (1 or B, 1, S, R / 2): over the heads
    cos, sin = (t.to(dtype).unsqueeze(-3) for t in (cos, sin))
    if cos.ndim == 3:
        cos1, cos2, sin1, sin2 = cos, cos, sin, sin
    else:
        cos1, cos2, sin1, sin2 = cos[..., first], cos[..., second], sin[..., first], sin[..., second]
    x1, x2 = x[..., first].to(dtype), x[..., second].to(dtype)
    if inverse:
        sin1, sin2 = -sin2, -sin1
    out = _empty_like(x)
    out[..., first] = x1 * cos1 - x2 * sin1
    out[..., second] = x2 * cos2 + x1 * sin2
    out[..., R:] = x[..., R:]
    return out


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate_tile(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    S,
    H,
    D,
    stride_xh,
    stride_xs,
    stride_outh,
    stride_outs,
    stride_tables,
    start_s,
    start_h,
    HALF: tl.constexpr,
    FULL_TABLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_S positions of BLOCK_H heads; x_ptr, out_ptr and the tables already point at the batch entry."""
    rows = tl.arange(0, BLOCK_S * BLOCK_H)
    offs_s = start_s + rows // BLOCK_H
    offs_h = start_h + rows % BLOCK_H
    mask_row = (offs_s < S) & (offs_h < H)
    x_ptrs = x_ptr + (offs_s.to(tl.int64) * stride_xs + offs_h.to(tl.int64) * stride_xh)[:, None]
    out_ptrs = out_ptr + (offs_s.to(tl.int64) * stride_outs + offs_h.to(tl.int64) * stride_outh)[:, None]
    table = (offs_s.to(tl.int64) * stride_tables)[:, None]
    offs_i = tl.arange(0, BLOCK_HALF)[None, :]  # (1, BLOCK_HALF), the pairs
    mask = mask_row[:, None] & (offs_i < HALF)  # (BLOCK_S * BLOCK_H, BLOCK_HALF)
    if INTERLEAVED:
        # A pair's elements are neighbours: load whole vectors, and split them in registers.
        offs_r = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask_r = mask_row[:, None] & (offs_r < 2 * HALF)
        x = tl.load(x_ptrs + offs_r, mask=mask_r).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_S * BLOCK_H, BLOCK_HALF, 2)))
    else:
        x1 = tl.load(x_ptrs + offs_i, mask=mask).to(tl.float32)
        x2 = tl.load(x_ptrs + HALF + offs_i, mask=mask).to(tl.float32)
    if not FULL_TABLES:
        cos1 = tl.load(cos_ptr + table + offs_i, mask=mask, eviction_policy="evict_last").to(tl.float32)
        sin1 = tl.load(sin_ptr + table + offs_i, mask=mask, eviction_policy="evict_last").to(tl.float32)
        cos2 = cos1
        sin2 = sin1
    elif INTERLEAVED:
        cos = tl.load(cos_ptr + table + offs_r, mask=mask_r, eviction_policy="evict_last").to(tl.float32)
        sin = tl.load(sin_ptr + table + offs_r, mask=mask_r, eviction_policy="evict_last").to(tl.float32)
        cos1, cos2 = tl.split(tl.reshape(cos, (BLOCK_S * BLOCK_H, BLOCK_HALF, 2)))
        sin1, sin2 = tl.split(tl.reshape(sin, (BLOCK_S * BLOCK_H, BLOCK_HALF, 2)))
    else:
        cos1 = tl.load(cos_ptr + table + offs_i, mask=mask, eviction_policy="evict_last").to(tl.float32)
        sin1 = tl.load(sin_ptr + table + offs_i, mask=mask, eviction_policy="evict_last").to(tl.float32)
        cos2 = tl.load(cos_ptr + table + HALF + offs_i, mask=mask, eviction_policy="evict_last").to(tl.float32)
        sin2 = tl.load(sin_ptr + table + HALF + offs_i, mask=mask, eviction_policy="evict_last").to(tl.float32)
    if INVERSE:
        out1 = x1 * cos1 + x2 * sin2
        out2 = x2 * cos2 - x1 * sin1
    else:
        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2
    dtype = out_ptr.dtype.element_ty
    if INTERLEAVED:
        out = tl.reshape(tl.join(out1.to(dtype), out2.to(dtype)), (BLOCK_S * BLOCK_H, 2 * BLOCK_HALF))
        tl.store(out_ptrs + offs_r, out, mask=mask_r)
    else:
        tl.store(out_ptrs + offs_i, out1.to(dtype), mask=mask)
        tl.store(out_ptrs + HALF + offs_i, out2.to(dtype), mask=mask)
    if BLOCK_REST > 0:
        offs_d = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask_d = mask_row[:, None] & (offs_d < D)
        tl.store(out_ptrs + offs_d, tl.load(x_ptrs + offs_d, mask=mask_d), mask=mask_d)


@triton.jit
def _rope_fwd_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    S,
    HQ,
    HK,
    D,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_tableb,
    stride_tables,
    stride_q_outb,
    stride_q_outh,
    stride_q_outs,
    stride_k_outb,
    stride_k_outh,
    stride_k_outs,
    HALF: tl.constexpr,
    FULL_TABLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One tile of one tensor per program: for each block of positions the heads of q, then those of k.

    So programs that use the same rows of the tables run at the same time.
    """
    blocks_q = tl.cdiv(HQ, BLOCK_H)
    blocks_h = blocks_q + tl.cdiv(HK, BLOCK_H)
    blocks_s = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    pid_h = pid % blocks_h
    pid_s = pid // blocks_h % blocks_s
    b = (pid // blocks_h // blocks_s).to(tl.int64)
    cos_ptr += b * stride_tableb
    sin_ptr += b * stride_tableb
    if pid_h < blocks_q:
        _rotate_tile(
            q_ptr + b * stride_qb,
            q_out_ptr + b * stride_q_outb,
            cos_ptr,
            sin_ptr,
            S,
            HQ,
            D,
            stride_qh,
            stride_qs,
            stride_q_outh,
            stride_q_outs,
            stride_tables,
            pid_s * BLOCK_S,
            pid_h * BLOCK_H,
            HALF,
            FULL_TABLES,
            INTERLEAVED,
            INVERSE,
            BLOCK_S,
            BLOCK_H,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        _rotate_tile(
            k_ptr + b * stride_kb,
            k_out_ptr + b * stride_k_outb,
            cos_ptr,
            sin_ptr,
            S,
            HK,
            D,
            stride_kh,
            stride_ks,
            stride_k_outh,
            stride_k_outs,
            stride_tables,
            pid_s * BLOCK_S,
            (pid_h - blocks_q) * BLOCK_H,
            HALF,
            FULL_TABLES,
            INTERLEAVED,
            INVERSE,
            BLOCK_S,
            BLOCK_H,
            BLOCK_HALF,
            BLOCK_REST,
        )


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _rotary_dims(cos: torch.Tensor) -> int:
    return cos.shape[-1] * (2 if cos.ndim == 2 else 1)


def _config(q: torch.Tensor, k: torch.Tensor, R: int) -> dict[str, int]:
    """Tiles of about 4096 elements that lie together in memory: some heads of a position, or positions of one head."""
    block_half = next_power_of_2(R // 2)
    block_h = 1
    if q.stride(1) < q.stride(2):
        while block_h < 8 and block_h < min(q.shape[1], k.shape[1]):
            block_h *= 2
    block_s = max(2048 // (block_half * block_h), 1)
    block_rest = next_power_of_2(q.shape[3] - R) if q.shape[3] > R else 0
    return {
        "BLOCK_S": block_s,
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "num_warps": 4,
    }


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = rope_fake(q, k, cos, sin, interleaved)
    _launch(q, k, cos, sin, q_out, k_out, interleaved, inverse=False)
    return q_out, k_out


def rope_bwd(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dq_in, dk_in = rope_bwd_fake(dq, dk, cos, sin, interleaved)
    _launch(dq, dk, cos, sin, dq_in, dk_in, interleaved, inverse=True)
    return dq_in, dk_in


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    B, HQ, S, D = q.shape
    HK, R = k.shape[1], _rotary_dims(cos)
    config = _config(q, k, R)
    blocks_h = cdiv(HQ, config["BLOCK_H"]) + cdiv(HK, config["BLOCK_H"])
    launch(
        _rope_fwd_kernel,
        (B * cdiv(S, config["BLOCK_S"]) * blocks_h,),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        S,
        HQ,
        HK,
        D,
        *q.stride()[:3],
        *k.stride()[:3],
        cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0,
        cos.stride(-2),
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        HALF=int(R // 2),  # one kernel per width, so that the second half's vectors are known to be aligned
        FULL_TABLES=cos.ndim == 3,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        **config,
    )


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """The result for x: see "Strides of the results"."""
    B, H, S, D = x.shape
    if not x.is_contiguous() and x.stride(1) < x.stride(2):
        return x.new_empty((B, S, H, D)).transpose(1, 2)
    return x.new_empty((B, H, S, D))


def rope_fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(q), _empty_like(k)


def rope_bwd_fake(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(dq), _empty_like(dk)


def rope_check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> None:
    if q.ndim != 4:
        bad_argument("rope", "q", f"of shape {tuple(q.shape)}", "(B, Hq, S, D)")
    B, _, S, D = q.shape
    if k.ndim != 4 or k.shape[0] != B or k.shape[2:] != q.shape[2:]:
        bad_argument("rope", "k", f"of shape {tuple(k.shape)}", f"({B}, Hk, {S}, {D}), as q")
    if k.dtype != q.dtype:
        bad_argument("rope", "k", f"of dtype {k.dtype}", f"the dtype of q, {q.dtype}", TypeError)
    if not cos.is_floating_point():
        bad_argument("rope", "cos", f"of dtype {cos.dtype}", "a floating-point dtype", TypeError)
    if cos.ndim == 2:
        fits = cos.shape[0] == S and 0 < 2 * cos.shape[1] <= D
    else:
        fits = cos.ndim == 3 and cos.shape[0] in (1, B) and cos.shape[1] == S and 0 < cos.shape[2] <= D
        fits = fits and cos.shape[2] % 2 == 0
    if not fits:
        allowed = f"({S}, R / 2), or (1 or {B}, {S}, R) with a value per element; R even, at most D = {D}"
        bad_argument("rope", "cos", f"of shape {tuple(cos.shape)}", allowed)
    if sin.shape != cos.shape:
        bad_argument("rope", "sin", f"of shape {tuple(sin.shape)}", f"the shape of cos, {tuple(cos.shape)}")
    if sin.dtype != cos.dtype:
        bad_argument("rope", "sin", f"of dtype {sin.dtype}", f"the dtype of cos, {cos.dtype}", TypeError)


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def rope_forward(
    ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    ctx.save_for_backward(cos, sin)
    ctx.interleaved = interleaved
    return torch.ops.tt.rope(q, k, cos, sin, interleaved)


def rope_backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = ctx.saved_tensors
    return torch.ops.tt.rope_bwd(dq, dk, cos, sin, ctx.interleaved)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _angles(device: torch.device | str, positions: int, pairs: int) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(pairs, device=device) / pairs)
    return torch.outer(torch.arange(positions, device=device), frequencies)  # (positions, pairs)


def rope_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def token_major(*shape: int) -> torch.Tensor:
        B, H, S, D = shape
        return t(B, S, H, D).transpose(1, 2)

    def half(positions: int, R: int, dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
        a = _angles(device, positions, R // 2)
        return a.cos().to(dtype), a.sin().to(dtype)

    def full(positions: int, R: int, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        a = _angles(device, positions, R // 2)
        a = (a.repeat_interleave(2, -1) if interleaved else torch.cat([a, a], -1)).unsqueeze(0)
        return a.cos().to(dtype), a.sin().to(dtype)

    qk = token_major(2, 4, 5, 32), token_major(2, 2, 5, 32)
    yield Sample("full", (*qk, *full(5, 32)))
    yield Sample("half", (*qk, *half(5, 32)))
    yield Sample("full_interleaved", (*qk, *full(5, 32, True)), {"interleaved": True})
    yield Sample("half_interleaved", (*qk, *half(5, 32)), {"interleaved": True})
    yield Sample("contiguous", (t(2, 3, 17, 64), t(2, 1, 17, 64), *full(17, 64)))
    yield Sample("contiguous_q_only", (t(2, 3, 7, 16), token_major(2, 5, 7, 16), *half(7, 16)))
    yield Sample("fp32_tables", (*qk, *half(5, 32, torch.float32)))
    yield Sample("partial", (*qk, *full(5, 12)))
    yield Sample("partial_half", (*qk, *half(5, 10)))
    yield Sample("partial_interleaved", (*qk, *full(5, 20, True)), {"interleaved": True})
    yield Sample("position_offset", (*qk, *(table[7:12] for table in half(20, 32))))
    yield Sample("table_per_batch", (*qk, t(2, 5, 32), t(2, 5, 32)))
    yield Sample("halves_differ_interleaved", (*qk, t(1, 5, 32), t(1, 5, 32)), {"interleaved": True})
    yield Sample("tables_strided", (*qk, t(1, 32, 5).transpose(1, 2), t(1, 5, 64)[..., :32]))
    yield Sample("D80", (token_major(1, 3, 9, 80), token_major(1, 3, 9, 80), *full(9, 80)))
    yield Sample("odd_D", (t(1, 2, 3, 7), t(1, 2, 3, 7), *half(3, 6)))
    yield Sample("fused_qkv", _split_heads(t(2, 5, (4 + 2 + 2) * 16), (4, 2)) + full(5, 16))
    yield Sample("last_dim_strided", (t(2, 4, 16, 5).transpose(2, 3), t(2, 2, 16, 5).transpose(2, 3), *half(5, 16)))
    yield Sample("expanded", (t(1, 1, 5, 16).expand(2, 4, 5, 16), t(2, 2, 5, 16), *half(5, 16)))
    yield Sample("unaligned", (t(2 * 3 * 16 + 1)[1:].view(1, 2, 3, 16), t(1, 2, 3, 16), *half(3, 16)))
    yield Sample("one_position", (token_major(3, 4, 1, 16), token_major(3, 2, 1, 16), *half(1, 16)))
    yield Sample("R2", (t(1, 1, 2, 2), t(1, 1, 2, 2), *half(2, 2)))
    yield Sample("many_positions", (t(1, 1, 300, 16), t(1, 1, 300, 16), *half(300, 16)), slow_in_interpreter=True)
    yield Sample("empty_batch", (t(0, 4, 5, 16), t(0, 2, 5, 16), *half(5, 16)))
    yield Sample("no_keys", (t(2, 4, 5, 16), t(2, 0, 5, 16), *half(5, 16)))


def _split_heads(qkv: torch.Tensor, heads: tuple[int, int], head_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as views of one projection's output (B, S, (Hq + Hk + Hk) * D)."""
    parts = qkv.split([heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim], -1)[:2]
    return tuple(p.unflatten(-1, (-1, head_dim)).transpose(1, 2) for p in parts)


def rope_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    q, k = torch.randn(2, 4, 5, 16, device=device), torch.randn(2, 2, 5, 16, device=device)
    cos = torch.randn(5, 8, device=device)
    yield ErrorSample("three_dimensions", (q[0], k, cos, cos), match=r"rope.*'q'.*\(4, 5, 16\).*\(B, Hq, S, D\)")
    yield ErrorSample("positions_differ", (q, k[:, :, :4], cos, cos), match=r"rope.*'k'.*\(2, 2, 4, 16\).*as q")
    yield ErrorSample("dtypes_differ", (q, k.half(), cos, cos), error=TypeError, match="rope.*'k'.*float16.*float32")
    yield ErrorSample(
        "integer_table", (q, k, cos.long(), cos.long()), error=TypeError, match="rope.*'cos'.*int64.*float"
    )
    yield ErrorSample("short_table", (q, k, cos[:4], cos[:4]), match=r"rope.*'cos'.*\(4, 8\).*\(5, R / 2\)")
    wide = torch.randn(5, 16, device=device)
    yield ErrorSample("full_table_2d", (q, k, wide, wide), match=r"rope.*'cos'.*\(5, 16\).*\(1 or 2, 5, R\)")
    odd = torch.randn(1, 5, 7, device=device)
    yield ErrorSample("odd_table", (q, k, odd, odd), match=r"rope.*'cos'.*\(1, 5, 7\).*R even")
    batch = torch.randn(3, 5, 16, device=device)
    yield ErrorSample("table_batch", (q, k, batch, batch), match=r"rope.*'cos'.*\(3, 5, 16\).*1 or 2")
    yield ErrorSample("tables_differ", (q, k, cos, cos[:, :4]), match=r"rope.*'sin'.*\(5, 4\).*\(5, 8\)")
    yield ErrorSample("table_dtypes", (q, k, cos, cos.half()), error=TypeError, match="rope.*'sin'.*float16.*float32")


def rope_bench_cases() -> Iterator[BenchCase]:
    def make(
        B: int, S: int, HQ: int, HK: int, D: int, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q, k = (torch.randn(B, S, H, D, device=device, dtype=dtype).transpose(1, 2) for H in (HQ, HK))
        a = _angles(device, S, D // 2)
        a = torch.cat([a, a], -1).unsqueeze(0)
        return (q, k, a.cos().to(dtype), a.sin().to(dtype)), {}

    yield BenchCase("b4_s4096_h32_8_d128", lambda d, t: make(4, 4096, 32, 8, 128, d, t))


def rope_cost(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> Cost:
    numel = q.numel() + k.numel()
    size = 2 * numel * q.element_size() + 2 * cos.numel() * cos.element_size()
    return Cost(flops=3 * numel, bytes=size, backward_flops=3 * numel, backward_bytes=size)
