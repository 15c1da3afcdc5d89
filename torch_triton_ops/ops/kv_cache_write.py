"""Put new keys and values into their places in a paged cache.

k_cache[s // page, s % page] = k[i] / k_scale,  v_cache likewise, for every token i with s = slot_mapping[i] >= 0

| argument | shape | dtype |
|---|---|---|
| k, v | (N, Hkv, D) | float32, float16, bfloat16 |
| k_cache, v_cache (written) | (blocks, page, Hkv, D), no two elements in one place | that of k, float8_e4m3fn, float8_e5m2 |
| slot_mapping | (N,): block * page + row in the block | int32, int64 |
| k_scale, v_scale | (), (1,) or (Hkv,), not 0; required for a float8 cache | float32 |

Tokens of a negative slot (padding) are skipped, and so is a slot beyond the cache, since slots are not read on the host. Which
of two tokens of one slot stays is not defined. A float8 cache gets the nearest value, beyond the largest finite one that value.
`paged_decode_attn` with the same scales reads what was written.

Any strides. Bytes: k and v once, the cache's rows once, the slots. Returns nothing; forward only: k or v that require a
gradient are refused while gradients are on, since the write would cut it. Under torch.compile the op is one node, and the
graph writes in place.

Errors: ValueError, TypeError for shapes and dtypes outside the table, NotImplementedError for a tensor that requires a gradient.

Source: https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.float8 import MANTISSA, encode_fp8
from torch_triton_ops.launch import INTERPRET, capability, cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def kv_cache_write_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    blocks, page = k_cache.shape[:2]
    valid = (slot_mapping >= 0) & (slot_mapping < blocks * page)
    slots = slot_mapping[valid].long()
    for x, cache, factor in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        values = x[valid].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if factor is not None:
            values = values / factor.reshape(-1, 1)
        if cache.dtype in MANTISSA:  # torch does not index float8
            largest = torch.finfo(cache.dtype).max
            values, cache = values.clamp(-largest, largest).to(cache.dtype).view(torch.uint8), cache.view(torch.uint8)
        cache[slots // page, slots % page] = values.to(cache.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(x_ptr, scale_ptr, heads, H, offs_d, mask, stride_xh, stride_xd, stride_sh):
    """The heads of one token in fp32, divided by their scales: (BLOCK_H, BLOCK_D)."""
    x = tl.load(x_ptr + heads[:, None] * stride_xh + offs_d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        factor = tl.load(scale_ptr + heads * stride_sh, mask=heads < H, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(factor[:, None], x.shape))  # `/` may miss a tie of the rounding that follows
    return x


@triton.jit
def _stored(x, cache_ptr, FP8: tl.constexpr, NATIVE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 as the cache holds it."""
    if FP8 != 0:
        return encode_fp8(x, FP8, NATIVE)
    if UPCAST and cache_ptr.dtype.element_ty == tl.bfloat16:  # the interpreter's cast truncates: round to nearest even
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(cache_ptr.dtype.element_ty)


@triton.jit
def _kv_cache_write_fwd_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_cache_ptr,
    v_cache_ptr,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_kcp,
    stride_kcs,
    stride_kch,
    stride_kcd,
    stride_vcp,
    stride_vcs,
    stride_vch,
    stride_vcd,
    stride_sn,
    stride_ksh,
    stride_vsh,
    total,
    H,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some heads of one token, keys and values. `total`: the cache's slots."""
    n = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + n * stride_sn).to(tl.int64)
    if (slot < 0) | (slot >= total):
        return
    page, row = slot // PAGE, slot % PAGE
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (heads < H)[:, None] & (offs_d < HEAD_DIM)[None, :]
    k = _load_rows(k_ptr + n * stride_kn, k_scale_ptr, heads, H, offs_d, mask, stride_kh, stride_kd, stride_ksh)
    v = _load_rows(v_ptr + n * stride_vn, v_scale_ptr, heads, H, offs_d, mask, stride_vh, stride_vd, stride_vsh)
    k_rows = k_cache_ptr + page * stride_kcp + row * stride_kcs + heads[:, None] * stride_kch
    v_rows = v_cache_ptr + page * stride_vcp + row * stride_vcs + heads[:, None] * stride_vch
    tl.store(k_rows + offs_d[None, :] * stride_kcd, _stored(k, k_cache_ptr, FP8, NATIVE, UPCAST), mask=mask)
    tl.store(v_rows + offs_d[None, :] * stride_vcd, _stored(v, v_cache_ptr, FP8, NATIVE, UPCAST), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launcher, fake, check
# --------------------------------------------------------------------------------------------------------------------

_TILE = 1024  # elements of k, and as many of v, that a program writes


def kv_cache_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    N, H, D = k.shape
    blocks, page = k_cache.shape[:2]
    if 0 in (N, H, D, blocks):
        return
    fp8 = MANTISSA.get(k_cache.dtype, 0)
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    BLOCK_D = next_power_of_2(D)
    BLOCK_H = min(next_power_of_2(H), max(1, _TILE // BLOCK_D))
    launch(
        _kv_cache_write_fwd_kernel,
        (N, cdiv(H, BLOCK_H)),
        *(k, v, slot_mapping, k_scale, v_scale, k_cache, v_cache),
        *(*k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(), slot_mapping.stride(0)),
        *(_head_stride(k_scale), _head_stride(v_scale), blocks * page, H),
        HEAD_DIM=D,
        PAGE=page,
        FP8=fp8,
        NATIVE=capability(k.device) >= 89,
        UPCAST=INTERPRET,
        BLOCK_H=BLOCK_H,
        BLOCK_D=BLOCK_D,
        num_warps=2,
    )


def _head_stride(factor: torch.Tensor | None) -> int:
    """From one key head's scale to the next."""
    return factor.stride(0) if factor is not None and factor.numel() > 1 else 0


def kv_cache_write_fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    return None


def kv_cache_write_check(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
        bad_argument("kv_cache_write", argument, given, allowed, error)

    def shape(x: torch.Tensor) -> str:
        return f"of shape {tuple(x.shape)}"

    if k.dtype in MANTISSA:
        bad("k", f"of dtype {k.dtype}", "float32, float16, bfloat16", TypeError)
    if k.dim() != 3:
        bad("k", shape(k), "(tokens, key heads, head size)")
    N, H, D = k.shape
    if v.shape != k.shape:
        bad("v", shape(v), f"the shape of k, {tuple(k.shape)}")
    if v.dtype != k.dtype:
        bad("v", f"of dtype {v.dtype}", f"the dtype of k, {k.dtype}", TypeError)
    if k_cache.dim() != 4 or k_cache.shape[2] != H or k_cache.shape[3] != D or k_cache.shape[1] == 0:
        bad("k_cache", shape(k_cache), f"(blocks, page, {H}, {D})")
    if k_cache.dtype != k.dtype and k_cache.dtype not in MANTISSA:
        bad("k_cache", f"of dtype {k_cache.dtype}", f"the dtype of k, {k.dtype}, or a float8", TypeError)
    if v_cache.shape != k_cache.shape:
        bad("v_cache", shape(v_cache), f"the shape of k_cache, {tuple(k_cache.shape)}")
    if v_cache.dtype != k_cache.dtype:
        bad("v_cache", f"of dtype {v_cache.dtype}", f"the dtype of k_cache, {k_cache.dtype}", TypeError)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if any(stride == 0 and size > 1 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            bad(name, f"of strides {cache.stride()}", "a cache whose elements have places of their own (no expand())")
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        bad("slot_mapping", f"of dtype {slot_mapping.dtype}", "int32, int64", TypeError)
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != N:
        bad("slot_mapping", shape(slot_mapping), f"({N},), a slot for each token")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is None:
            if k_cache.dtype in MANTISSA:
                bad(name, "None", f"a tensor: the cache is {k_cache.dtype}")
            continue
        if factor.dtype != torch.float32:
            bad(name, f"of dtype {factor.dtype}", "float32", TypeError)
        if factor.dim() > 1 or (factor.dim() == 1 and factor.shape[0] not in (1, H)):
            bad(name, shape(factor), f"(), (1,) or a value for each key head, ({H},)")
    if torch.is_grad_enabled():
        tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                allowed = "no gradient: the write would cut it (torch.no_grad(), or detach() it)"
                bad(name, "a tensor that requires a gradient", allowed, NotImplementedError)


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def _call(
    device: torch.device | str, dtype: torch.dtype, slots: list[int], blocks: int, page: int, H: int, D: int
) -> tuple[torch.Tensor, ...]:
    half = torch.bfloat16 if dtype in MANTISSA else dtype
    k, v = torch.randn(2, len(slots), H, D, device=device, dtype=half)
    k_cache, v_cache = (torch.randn(blocks, page, H, D, device=device, dtype=half).to(dtype) for _ in range(2))
    if not slots:
        return k, v, k_cache, v_cache, torch.empty(0, device=device, dtype=torch.int64)
    return k, v, k_cache, v_cache, torch.tensor(slots, device=device, dtype=torch.int64)


def _scales(device: torch.device | str, heads: int) -> dict[str, torch.Tensor]:
    """One for all key heads, and one for each."""
    return {"k_scale": torch.full((), 0.7, device=device), "v_scale": torch.linspace(0.5, 1.5, heads, device=device)}


def kv_cache_write_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    fp8 = dtype in MANTISSA
    H = 3
    yield Sample(
        "H3_D24",
        _call(device, dtype, [17, -1, 3, 31, 0, 9, 8, -7, 22], 2, 16, H, 24),
        _scales(device, H) if fp8 else {},
    )
    if fp8:
        return
    yield Sample("one", _call(device, dtype, [1], 1, 5, 1, 1))
    yield Sample("scaled", _call(device, dtype, [40, 2, 47, 48, 2**40], 3, 16, 2, 16), _scales(device, 2))
    yield Sample("empty", _call(device, dtype, [], 2, 16, 2, 16))
    yield Sample("no_blocks", _call(device, dtype, [-1, 0], 0, 16, 2, 16))
    k, v, k_cache, v_cache, slots = _call(device, dtype, [5, 9, 33], 2, 2, 17, 64)
    layouts = (k_cache.transpose(1, 2).contiguous().transpose(1, 2), v_cache.mT.contiguous().mT)
    yield Sample("layouts", (k, v, *layouts, slots.int()))


def kv_cache_write_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    k, v, k_cache, v_cache, slots = _call(device, torch.float32, [5, 9, 3], 2, 16, 2, 16)
    op = "kv_cache_write.*"
    float8 = k_cache.to(torch.float8_e4m3fn)
    half, halves = k.half(), k_cache.half()
    yield ErrorSample("rank", (k[0], v[0], k_cache, v_cache, slots), match=op + "'k'.*tokens, key heads")
    given = (k.to(float8.dtype), v.to(float8.dtype), float8, float8, slots)
    yield ErrorSample("float8_k", given, error=TypeError, match=op + "'k'.*float8")
    yield ErrorSample("v_shape", (k, v[:2], k_cache, v_cache, slots), match=op + "'v'.*the shape of k")
    yield ErrorSample("v_dtype", (k, half, k_cache, v_cache, slots), error=TypeError, match=op + "'v'.*float16")
    yield ErrorSample(
        "heads", (k, v, k_cache[:, :, :1], v_cache, slots), match=op + r"'k_cache'.*\(blocks, page, 2, 16\)"
    )
    yield ErrorSample(
        "cache_dtype", (k, v, halves, halves, slots), error=TypeError, match=op + "'k_cache'.*float16.*float32"
    )
    yield ErrorSample("v_cache_shape", (k, v, k_cache, v_cache[:1], slots), match=op + "'v_cache'.*shape of k_cache")
    yield ErrorSample("v_cache_dtype", (k, v, k_cache, halves, slots), error=TypeError, match=op + "'v_cache'.*float16")
    shared = k_cache[:1].expand(2, 16, 2, 16)
    yield ErrorSample("expanded", (k, v, shared, v_cache, slots), match=op + "'k_cache'.*strides.*places of their own")
    yield ErrorSample(
        "slots_dtype", (k, v, k_cache, v_cache, slots.float()), error=TypeError, match=op + "'slot_mapping'"
    )
    yield ErrorSample("slots", (k, v, k_cache, v_cache, slots[:2]), match=op + r"'slot_mapping'.*\(3,\)")
    yield ErrorSample("no_scale", (k, v, float8, float8, slots), match=op + "'k_scale'.*None.*float8_e4m3fn")
    options = {"k_scale": torch.ones(3, device=device)}
    yield ErrorSample("scale_shape", (k, v, k_cache, v_cache, slots), options, match=op + r"'k_scale'.*\(2,\)")
    options = {"v_scale": torch.ones((), device=device, dtype=torch.float16)}
    yield ErrorSample("scale_dtype", (k, v, k_cache, v_cache, slots), options, TypeError, op + "'v_scale'.*float16")
    given = (k.clone().requires_grad_(), v, k_cache, v_cache, slots)
    yield ErrorSample("gradient", given, error=NotImplementedError, match=op + "'k'.*gradient")


def kv_cache_write_bench_cases() -> Iterator[BenchCase]:
    # id, tokens, dtype of the cache; 8 key heads of 128
    for name, N, dtype in [
        ("256_tokens", 256, torch.bfloat16),
        ("32768_tokens", 32768, torch.bfloat16),
        ("32768_tokens_fp8", 32768, torch.float8_e4m3fn),
    ]:

        def make(device: torch.device | str, dtype: torch.dtype, N: int = N) -> tuple[tuple[Any, ...], dict[str, Any]]:
            k, v, k_cache, v_cache, _ = _call(device, dtype, [], N // 32, 64, 8, 128)
            k, v = torch.randn(2, N, 8, 128, device=device, dtype=k.dtype).unbind()
            slots = torch.randperm(2 * N, device=device).narrow(0, 0, N)
            return (k, v, k_cache, v_cache, slots), _scales(device, 8) if dtype in MANTISSA else {}

        yield BenchCase(name, make, dtype, passes=("fwd",))


def kv_cache_write_cost(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Cost:
    """As if no token were skipped."""
    slots = k.shape[0] * slot_mapping.element_size()
    return Cost(0, 2 * k.numel() * (k.element_size() + k_cache.element_size()) + slots)
