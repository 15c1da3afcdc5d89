"""The gated activation of GELU, as in the feed-forward blocks of T5 1.1 and Gemma.

out = gelu(gate) * up

gelu(g) = g * Phi(g), Phi(g) = (1 + erf(g / sqrt(2))) / 2                                   approximate = "none"
        ~ g * s(g), s(g) = sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 * g ** 3))              approximate = "tanh"

dgate = dout * up * gelu'(gate)
dup   = dout * gelu(gate)

s(g) is (1 + tanh(u)) / 2 without its cancellation where u is far below 0.

| argument | shape | dtype |
|---|---|---|
| gate, up | any, the same; any strides | float32, float16, bfloat16 (the same) |
| approximate | "tanh" (default) or "none" (erf) | |
| out, dgate, dup | that of gate, contiguous | that of gate |

gate and up may be the two halves of one (..., 2 * N) tensor: any strides are read in place. Arithmetic in fp32, with one
rounding, at the store.

Bytes: forward 3 * numel * itemsize, backward 5 * numel * itemsize. Raises ValueError where the shapes differ and for
another `approximate`, TypeError where the dtypes differ.

Source: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torch_triton_ops import elementwise
from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.elementwise import tile, upcast, wanted
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.special import exp_fp32

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def geglu_reference(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    dtype = _arithmetic_dtype(gate)
    return (F.gelu(gate.to(dtype), approximate=approximate) * up.to(dtype)).to(gate.dtype).contiguous()


def geglu_bwd_reference(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = geglu_bwd_fake(dout, gate, up, approximate, needs)
    dtype = _arithmetic_dtype(gate)
    dout, g = dout.to(dtype), gate.to(dtype)
    if needs[0]:
        dgate.copy_(torch.ops.aten.gelu_backward(dout * up.to(dtype), g, approximate=approximate))
    if needs[1]:
        dup.copy_(dout * F.gelu(g, approximate=approximate))
    return dgate, dup


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _factors(g, TANH: tl.constexpr, EXACT: tl.constexpr):
    """phi, such that gelu(g) = g * phi, and 1 - phi, neither by a difference that cancels (erf: 1 - phi is not needed)."""
    if TANH:
        z = -1.5957691216057308 * (g + 0.044715 * g * g * g)
        if EXACT:
            e = exp_fp32(z)
        else:
            e = tl.exp(z)
        phi = 1.0 / (1.0 + e)
        return phi, tl.where(z > 0, 1.0 - phi, e * phi)
    elif EXACT:
        phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return phi, 1.0 - phi
    else:
        # As bias_gelu: -log2(Phi(g) / Phi(-g)) is odd and smooth; its minimax polynomial is off by at most 3.4e-6 in Phi, a
        # hundredth of half precision's rounding near 1, at half of the instructions of erf, which memory does not hide.
        gg = g * g
        w = g * (-2.302114319 + gg * (-0.10514166 + gg * (3.29903124e-4 + gg * (9.21381173e-5 - 3.38557339e-6 * gg))))
        phi = 1.0 / (1.0 + tl.exp2(w))
        return phi, 1.0 - phi


@triton.jit
def _geglu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, B, M, N, ga, gb, gm, gn, ua, ub, um, un,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    gate = upcast(tl.load(gate_ptr + a * ga + b * gb + m * gm + n * gn, mask=mask), out_ptr)  # (BLOCK_M, BLOCK_N)
    up = upcast(tl.load(up_ptr + a * ua + b * ub + m * um + n * un, mask=mask), out_ptr)
    phi, _ = _factors(gate, TANH, out_ptr.dtype.element_ty == tl.float32)
    tl.store(out_ptr + offs, (gate * phi * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, B, M, N, da, db, dm, dn, ga, gb, gm, gn, ua, ub, um, un,
    TANH: tl.constexpr, NEEDS_DGATE: tl.constexpr, NEEDS_DUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The activation is computed again, which is cheaper than storing it."""
    EXACT: tl.constexpr = dout_ptr.dtype.element_ty == tl.float32
    a, b, m, n, offs, mask = tile(B, M, N, BLOCK_M, BLOCK_N)
    dout = upcast(tl.load(dout_ptr + a * da + b * db + m * dm + n * dn, mask=mask), dout_ptr)  # (BLOCK_M, BLOCK_N)
    gate = upcast(tl.load(gate_ptr + a * ga + b * gb + m * gm + n * gn, mask=mask), dout_ptr)
    phi, rest = _factors(gate, TANH, EXACT)
    if NEEDS_DGATE:
        up = upcast(tl.load(up_ptr + a * ua + b * ub + m * um + n * un, mask=mask), dout_ptr)
        if TANH:
            slope = phi + gate * phi * rest * 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        else:
            density = -0.5 * gate * gate
            if EXACT:
                density = exp_fp32(density)
            else:
                density = tl.exp(density)
            slope = phi + gate * density * 0.3989422804014327
        tl.store(dgate_ptr + offs, (dout * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DUP:
        tl.store(dup_ptr + offs, (dout * gate * phi).to(dup_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    out = geglu_fake(gate, up, approximate)
    elementwise.run(_geglu_fwd_kernel, (gate, up), (out,), TANH=approximate == "tanh")
    return out


def geglu_bwd(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """needs: whether dgate, dup are wanted; the other is an empty tensor."""
    out = geglu_bwd_fake(dout, gate, up, approximate, needs)
    targets = [gradient if needed else None for gradient, needed in zip(out, needs, strict=True)]
    options = {"TANH": approximate == "tanh", "NEEDS_DGATE": needs[0], "NEEDS_DUP": needs[1]}
    elementwise.run(_geglu_bwd_kernel, (dout, gate, up), targets, **options)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def geglu_fake(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    return gate.new_empty(gate.shape)


def geglu_bwd_fake(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, approximate: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    return wanted(gate, needs[0]), wanted(up, needs[1])


def geglu_check(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> None:
    if gate.shape != up.shape:
        bad_argument("geglu", "up", f"of shape {tuple(up.shape)}", f"the shape of gate, {tuple(gate.shape)}")
    if gate.dtype != up.dtype:
        bad_argument("geglu", "up", f"of dtype {up.dtype}", f"the dtype of gate, {gate.dtype}", TypeError)
    if approximate not in ("none", "tanh"):
        bad_argument("geglu", "approximate", repr(approximate), "'none' or 'tanh'")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def geglu_forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    ctx.save_for_backward(gate, up)
    ctx.approximate = approximate
    return torch.ops.tt.geglu(gate, up, approximate)


def geglu_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tt.geglu_bwd(dout, *ctx.saved_tensors, ctx.approximate, list(ctx.needs))


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def geglu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample("3x129", (t(3, 129), t(3, 129)))
    yield Sample("erf", (t(2, 3, 65), t(2, 3, 65), "none"))
    yield Sample("halves_of_one", t(5, 192).chunk(2, dim=-1))
    yield Sample("large_values", (t(8, 64) * 100, t(8, 64)))
    yield Sample("large_values_erf", (t(8, 64) * 100, t(8, 64), "none"))
    yield Sample("1x1", (t(1, 1), t(1, 1)))
    if dtype in (torch.float32, torch.float64):
        yield Sample("scalar", (t(), t()))
        yield Sample("strides_differ", (t(7, 33), t(33, 7).t()))
        yield Sample("empty", (t(0, 16), t(0, 16)))


def geglu_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("shapes_differ", (x, x[:1]), match=r"geglu.*'up'.*\(1, 32\).*\(4, 32\)")
    yield ErrorSample("dtypes_differ", (x, x.half()), error=TypeError, match="geglu.*'up'.*float16.*float32")
    yield ErrorSample("approximate", (x, x, "erf"), match="geglu.*'approximate' is 'erf'.*'tanh'")


def geglu_bench_cases() -> Iterator[BenchCase]:
    yield elementwise.bench_case((8192, 14336), (8192, 14336), id="8192x14336")
    yield elementwise.bench_case((8192, 14336), (8192, 14336), id="8192x14336_erf", approximate="none")


def geglu_cost(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> Cost:
    size = gate.numel() * gate.element_size()
    return Cost(flops=9 * gate.numel(), bytes=3 * size, backward_flops=20 * gate.numel(), backward_bytes=5 * size)
