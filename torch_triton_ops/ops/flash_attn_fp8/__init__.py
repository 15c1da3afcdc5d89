"""Attention on float8 inputs: softmax(scale * q @ k^T) @ v of values that carry one scale for each head. Forward only.

score[i, j] = scale * q_scale * k_scale * dot(q[i], k[j])
P[i, j]     = exp(score[i, j] - lse[i]),  over the keys j that query i may see
out[i]      = v_scale * sum_j P[i, j] * v[j]

With `causal` query i sees the keys j <= i + Skv - Sq: aligned to the bottom right, as `flash_attn`. A query that sees nothing
gets zeros.

| argument | shape | dtype |
|---|---|---|
| q | (B, Hq, Sq, D), D from 16 to 256 | float8_e4m3fn |
| k, v | (B, Hkv, Skv, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv) | float8_e4m3fn |
| q_scale | (Hq,) or (B, Hq): what a code of that head is multiplied by to give its value | float32 |
| k_scale, v_scale | (Hkv,) or (B, Hkv) | float32 |
| out | that of q; its order in memory too, `(B, S, H, D)` or `(B, H, S, D)` | out_dtype: float32, float16, bfloat16 (None) |

`scale` defaults to 1 / sqrt(D). Scales are steps of a quantisation, at least 0. A good one is the head's largest magnitude / 448.
Inputs may have any strides; only a last stride other than 1 costs a copy.

FLOPs: 4 * D per visible pair (query, key) and head. Bytes: every input and the output once.

Precision: scores are sums in fp32 of exact products. The portable kernel multiplies P by v in fp16, to which both convert exactly
or nearly so. The Hopper kernel rounds P to float8_e4m3fn, 2^8 times larger so that weights down to 2^-14 of a row's largest keep
that format's 4 significant bits. The error budget is that of eager torch with such a P (`flash_attn_fp8_eager`).

Two kernels: the portable one below, in Triton, for every GPU from sm_80 up, and `hopper.py`, in Gluon, for compute capability
9.0; `_HOPPER` says whether the second is chosen. Under torch.compile the op is one node.

Errors: ValueError, TypeError for shapes and dtypes outside the table, NotImplementedError for a tensor that requires a gradient.

Source: Shah et al., FlashAttention-3, https://arxiv.org/abs/2407.08608
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.float8 import decode_fp8
from torch_triton_ops.launch import INTERPRET, capability, cdiv, gluon_ready, launch, next_power_of_2

_FP8 = torch.float8_e4m3fn

# --------------------------------------------------------------------------------------------------------------------
# The specification: plain torch
# --------------------------------------------------------------------------------------------------------------------


def flash_attn_fp8_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _plain(q, k, v, q_scale, k_scale, v_scale, causal, scale, out_dtype, round_p=False)


def flash_attn_fp8_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """In eager torch, the weights rounded to float8: the error budget's yardstick."""
    return _plain(q, k, v, q_scale, k_scale, v_scale, causal, scale, out_dtype, round_p=True)


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    causal: bool,
    scale: float | None,
    out_dtype: torch.dtype | None,
    round_p: bool,
) -> torch.Tensor:
    exact = q.dtype == torch.float64
    dtype = torch.float64 if exact else torch.float32
    Sq, Skv = q.shape[2], k.shape[2]
    group = q.shape[1] // max(k.shape[1], 1)

    def of_queries(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.to(dtype).repeat_interleave(group, dim)

    unit = q_scale.to(dtype) * of_queries(k_scale, -1) * _scale(q, scale)
    score = (q.to(dtype) @ of_queries(k, 1).mT) * unit[..., None, None]  # (B, Hq, Sq, Skv)
    visible = torch.ones(Sq, Skv, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(Skv - Sq)
    score = score.masked_fill(~visible, -math.inf)
    p = torch.zeros_like(score)
    if Skv:
        p = (score - score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = p.sum(-1, keepdim=True)
    if round_p:
        p = (p * 256).to(_FP8).to(dtype) / 256
    out = (p @ of_queries(v, 1)) / total.masked_fill(total == 0, 1.0) * of_queries(v_scale, -1)[..., None, None]
    out = out if exact else out.to(out_dtype or torch.bfloat16)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if q.stride(1) < q.stride(2) else out.contiguous()


# --------------------------------------------------------------------------------------------------------------------
# The portable kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(
    x_ptr, start, stride_xs, S, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows start .. start + BLOCK_S of one head, zeros beyond S and HEAD_DIM: (BLOCK_S, BLOCK_D)."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x_ptr + tl.cast(start, tl.int64) * stride_xs + (offs_s[:, None] * stride_xs + offs_d[None, :])
    mask = (offs_d < HEAD_DIM)[None, :]
    if MASKED:
        return tl.load(ptrs, mask=mask & ((start + offs_s) < S)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """Loaded codes as the products take them: exactly in `dtype`."""
    if dtype == tl.float8e4nv:
        return x
    elif x.dtype == tl.uint8:
        return decode_fp8(x, dtype, 3, False)
    else:
        return x.to(dtype)


@triton.jit
def _attend(
    acc, l, m, q, k_ptr, v_ptr, unit, last, start_n, stride_kn, stride_vn, Skv,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """One block of keys: the online softmax, in units of log 2. `last`: the last key that each query sees."""
    k = _operand(_load_rows(k_ptr, start_n, stride_kn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED), q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * unit  # (BLOCK_M, BLOCK_N)
    if MASKED:
        s = tl.where((start_n + tl.arange(0, BLOCK_N))[None, :] <= last[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # -inf until the first visible key: -inf - 0 gives weight 0 where -inf - -inf gives NaN
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v = _operand(_load_rows(v_ptr, start_n, stride_vn, Skv, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED), HALF)
    return tl.dot(p.to(HALF), v, acc * alpha[:, None], input_precision="ieee"), l, m_new


@triton.jit(do_not_specialize=["Sq", "Skv", "diagonal", "H", "BH", "heads_per_kv"])
def _flash_attn_fp8_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr,
    Sq, Skv, diagonal, H, BH, heads_per_kv,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_qsb, stride_qsh, stride_ksb, stride_ksh, stride_vsb, stride_vsh,
    SCALE_LOG2: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. Query i sees the keys up to i + diagonal.

    q, k, v: float8, or uint8 codes for GPUs whose Triton has no pointer to that.
    """
    # GROUP heads run side by side, so that their keys and values stay in L2; the last blocks, the longest if causal, first
    num_blocks = tl.cdiv(Sq, BLOCK_M)
    group = tl.program_id(0) // (GROUP * num_blocks)
    rest = tl.program_id(0) - group * (GROUP * num_blocks)
    heads = tl.minimum(GROUP, BH - group * GROUP)
    start_m = (num_blocks - 1 - rest // heads) * BLOCK_M
    bh = group * GROUP + rest % heads
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    h_kv = h // heads_per_kv
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    unit = tl.load(q_scale_ptr + b * stride_qsb + h * stride_qsh)
    unit *= tl.load(k_scale_ptr + b * stride_ksb + h_kv * stride_ksh) * SCALE_LOG2

    # The scores' product in float8 where the GPU has it; P V in fp16, as v lies the wrong way round for it in float8.
    HALF: tl.constexpr = tl.float32 if UPCAST else tl.float16
    FIRST: tl.constexpr = HALF if q_ptr.dtype.element_ty == tl.uint8 else q_ptr.dtype.element_ty
    q = _operand(_load_rows(q_ptr, start_m, stride_qm, Sq, HEAD_DIM, BLOCK_M, BLOCK_D, True), FIRST)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    last = tl.minimum(offs_m + diagonal, Skv - 1)
    end = tl.minimum(Skv, tl.maximum(tl.minimum(start_m + BLOCK_M, Sq) + diagonal, 0))
    full = tl.minimum(Skv, tl.maximum(start_m + diagonal + 1, 0)) // BLOCK_N * BLOCK_N
    if full > 0:
        for start_n in range(0, full, BLOCK_N):
            acc, l, m = _attend(
                acc, l, m, q, k_ptr, v_ptr, unit, last, start_n, stride_kn, stride_vn, Skv,
                HEAD_DIM, BLOCK_N, BLOCK_D, False, HALF,
            )  # fmt: skip
    if end > full:
        for start_n in range(full, end, BLOCK_N):
            acc, l, m = _attend(
                acc, l, m, q, k_ptr, v_ptr, unit, last, start_n, stride_kn, stride_vn, Skv,
                HEAD_DIM, BLOCK_N, BLOCK_D, True, HALF,
            )  # fmt: skip

    v_scale = tl.load(v_scale_ptr + b * stride_vsb + h_kv * stride_vsh)
    out = acc * (v_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    if UPCAST and out_ptr.dtype.element_ty == tl.bfloat16:  # the interpreter's cast truncates: round to nearest even
        bits = out.to(tl.int32, bitcast=True)
        out = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = out_ptr + b * stride_ob + h * stride_oh + offs_m.to(tl.int64)[:, None] * stride_om + offs_d[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(offs_m < Sq)[:, None] & (offs_d < HEAD_DIM)[None, :])


# --------------------------------------------------------------------------------------------------------------------
# Launcher, fake, check
# --------------------------------------------------------------------------------------------------------------------

# Whether Hopper GPUs run hopper.py. It compiles clean and its layouts are proved, but it has not yet passed on a GPU.
_HOPPER = False

_GROUP = 8  # heads whose blocks of queries run side by side
# widest head -> BLOCK_M, BLOCK_N, warps, stages; for codes, whose decoding takes registers, and for float8
_CODES_CONFIGS = {64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 1)}
_CONFIGS = {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}


def flash_attn_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out = flash_attn_fp8_fake(q, k, v, q_scale, k_scale, v_scale, causal=causal, scale=scale, out_dtype=out_dtype)
    if out.numel() == 0:
        return out
    if _HOPPER and gluon_ready(q.device) and capability(q.device) == 90:
        from . import hopper

        if hopper.takes(q, k, out, _scale(q, scale)):
            hopper.forward(q, k, v, q_scale, k_scale, v_scale, out, _scale(q, scale), causal)
            return out
    portable(q, k, v, q_scale, k_scale, v_scale, out, _scale(q, scale), causal)
    return out


def portable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    causal: bool,
) -> None:
    """Write out by the Triton kernel."""
    q, k, v = (x if x.stride(3) == 1 else x.view(torch.uint8).contiguous().view(_FP8) for x in (q, k, v))
    B, H, Sq, D = q.shape
    Skv = k.shape[2]
    strides = (s for x in (q, k, v, out) for s in x.stride()[:3])
    scale_strides = (s for x in (q_scale, k_scale, v_scale) for s in per_head_strides(x))
    configs = _CONFIGS
    if capability(q.device) < 89:
        q, k, v = (x.view(torch.uint8) for x in (q, k, v))
        configs = _CODES_CONFIGS
    BLOCK_M, BLOCK_N, num_warps, num_stages = next(c for width, c in configs.items() if width >= D)
    launch(
        _flash_attn_fp8_fwd_kernel,
        (cdiv(Sq, BLOCK_M) * B * H,),
        *(q, k, v, q_scale, k_scale, v_scale, out),
        *(Sq, Skv, Skv - Sq if causal else Skv, H, B * H, H // k.shape[1]),
        *strides,
        *scale_strides,
        SCALE_LOG2=scale * math.log2(math.e),
        GROUP=_GROUP,
        HEAD_DIM=D,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=max(32, next_power_of_2(D)),  # a float8 product takes 32 columns at least
        UPCAST=INTERPRET,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def per_head_strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and heads of scales (H,) or (B, H)."""
    return (0, x.stride(0)) if x.dim() == 1 else (x.stride(0), x.stride(1))


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def flash_attn_fp8_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    B, H, S, D = q.shape
    dtype = out_dtype or torch.bfloat16
    if q.stride(1) < q.stride(2):  # heads and rows nested as in q
        return q.new_empty((B, S, H, D), dtype=dtype).transpose(1, 2)
    return q.new_empty((B, H, S, D), dtype=dtype)


def flash_attn_fp8_check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument("flash_attn_fp8", argument, given, allowed, error)

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != _FP8:
            bad(name, f"of dtype {x.dtype}", "float8_e4m3fn", TypeError)
        if x.dim() != 4:
            bad(name, f"of shape {tuple(x.shape)}", "4 dimensions: (batch, heads, length, head size)")
    B, Hq, _, D = q.shape
    if not 16 <= D <= 256:
        bad("q", f"of shape {tuple(q.shape)}", "a head size (the last dimension) from 16 to 256")
    Hkv = k.shape[1]
    if k.shape[0] != B or k.shape[3] != D:
        bad("k", f"of shape {tuple(k.shape)}", f"the batch and the head size of q, {B} and {D}")
    if Hq % Hkv if Hkv else Hq:
        bad("k", f"of shape {tuple(k.shape)}", f"a number of heads that divides q's, {Hq}")
    if v.shape != k.shape:
        bad("v", f"of shape {tuple(v.shape)}", f"the shape of k, {tuple(k.shape)}")
    for name, x, H in (("q_scale", q_scale, Hq), ("k_scale", k_scale, Hkv), ("v_scale", v_scale, Hkv)):
        if x.dtype != torch.float32:
            bad(name, f"of dtype {x.dtype}", "float32", TypeError)
        if tuple(x.shape) not in ((H,), (B, H)):
            bad(name, f"of shape {tuple(x.shape)}", f"a value for each head, ({H},) or ({B}, {H})")
    if scale is not None and not -math.inf < scale < math.inf:
        bad("scale", scale, "a finite number, or None for 1 / sqrt(head size)")
    if out_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        bad("out_dtype", out_dtype, "float32, float16, bfloat16, or None for bfloat16", TypeError)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _call(
    device: torch.device | str, B: int, Hq: int, Hkv: int, Sq: int, Skv: int, D: int, batched: bool = False
) -> tuple[torch.Tensor, ...]:
    """Normal values, quantised with scales that differ from head to head, and, if batched, from sequence to sequence."""
    shapes = ((Hq, Sq), (Hkv, Skv), (Hkv, Skv))
    values = [torch.randn(B, H, S, D, device=device) for H, S in shapes]
    scales = [(0.5 + torch.rand((B, H) if batched else (H,), device=device)) / 32 for H, _ in shapes]
    codes = [(x / s.view(*s.shape, 1, 1)).to(_FP8) for x, s in zip(values, scales, strict=True)]
    return *codes, *scales


def flash_attn_fp8_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """float8: bfloat16 comes out, float32: that."""
    if dtype == torch.float32:
        yield Sample("one_query_scale", _call(device, 1, 2, 1, 1, 70, 16), {"out_dtype": dtype, "scale": 0.3})
        yield Sample(
            "scale_negative", _call(device, 1, 1, 1, 40, 70, 32), {"out_dtype": dtype, "scale": -0.1, "causal": True}
        )
        return
    yield Sample("gqa_causal", _call(device, 2, 4, 2, 130, 150, 32, batched=True), {"causal": True})
    yield Sample("causal_long_q", _call(device, 1, 1, 1, 70, 33, 17), {"causal": True})  # 37 queries see nothing
    yield Sample("empty_q", _call(device, 1, 2, 1, 0, 7, 16), {"causal": True})
    yield Sample("empty_kv", _call(device, 1, 2, 1, 5, 0, 16), {"out_dtype": torch.float16})
    for D, causal in ((80, False), (128, True), (256, True)):
        args = _call(device, 1, 4, 2, 200, 333, D)
        yield Sample(f"D{D}{'_causal' if causal else ''}", args, {"causal": causal}, slow_in_interpreter=True)


def flash_attn_fp8_compile_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """The widest head: the benchmark has the others' kernels."""
    return (sample for sample in flash_attn_fp8_samples(device, _FP8) if sample.id == "D256_causal")


def flash_attn_fp8_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    q, k, v, *scales = _call(device, 2, 4, 2, 5, 7, 16)
    one, two, three = scales
    op = "flash_attn_fp8.*"
    yield ErrorSample("q_dtype", (q.float(), k, v, *scales), error=TypeError, match=op + "'q'.*float32.*float8_e4m3fn")
    yield ErrorSample("rank", (q[0], k, v, *scales), match=op + r"'q'.*\(4, 5, 16\).*4 dimensions")
    yield ErrorSample("head_size", (q[..., :8], k[..., :8], v[..., :8], *scales), match=op + "'q'.*16 to 256")
    yield ErrorSample("batch", (q[:1], k, v, *scales), match=op + r"'k'.*\(2, 2, 7, 16\).*batch")
    yield ErrorSample("heads", (q[:, :3], k, v, one[:3], two, three), match=op + "'k'.*divides q's, 3")
    yield ErrorSample("v_shape", (q, k, v[:, :, :6], *scales), match=op + r"'v'.*\(2, 2, 6, 16\).*\(2, 2, 7, 16\)")
    yield ErrorSample(
        "scale_dtype", (q, k, v, one, two.double(), three), error=TypeError, match=op + "'k_scale'.*float64"
    )
    yield ErrorSample("scale_shape", (q, k, v, one, two, one), match=op + r"'v_scale'.*\(4,\).*\(2,\) or \(2, 2\)")
    yield ErrorSample("scale", (q, k, v, *scales), {"scale": math.inf}, match=op + "'scale'.*inf.*finite")
    yield ErrorSample(
        "out_dtype", (q, k, v, *scales), {"out_dtype": _FP8}, TypeError, op + "'out_dtype'.*float8.*bfloat16"
    )
    given = (q, k, v, one, two, three.clone().requires_grad_())
    yield ErrorSample("gradient", given, error=NotImplementedError, match=op + "'v_scale'.*gradient")


def flash_attn_fp8_bench_cases() -> Iterator[BenchCase]:
    for B, Hq, Hkv, S, D, causal in [
        (4, 32, 32, 4096, 128, False),
        (4, 32, 32, 4096, 128, True),
        (4, 32, 8, 8192, 128, True),
    ]:

        def make(
            device: torch.device | str,
            dtype: torch.dtype,
            sizes: tuple[int, int, int, int, int, int] = (B, Hq, Hkv, S, S, D),
            causal: bool = causal,
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return _call(device, *sizes, batched=True), {"causal": causal}

        heads = f"h{Hq}" if Hq == Hkv else f"h{Hq}/{Hkv}"
        yield BenchCase(f"b{B}_{heads}_s{S}_d{D}_{'causal' if causal else 'full'}", make, dtype=_FP8, passes=("fwd",))


def flash_attn_fp8_cost(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Cost:
    B, H, Sq, D = q.shape
    Skv = k.shape[2]
    pairs = Sq * Skv
    if causal:  # the last min(Sq, Skv) queries see keys; each of them one more than the one before
        n = min(Sq, Skv)
        pairs = n * (2 * Skv - n + 1) // 2
    itemsize = (out_dtype or torch.bfloat16).itemsize
    scales = 4 * (q_scale.numel() + k_scale.numel() + v_scale.numel())
    return Cost(4 * B * H * D * pairs, q.numel() * (1 + itemsize) + k.numel() + v.numel() + scales)
