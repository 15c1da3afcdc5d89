"""Matrix multiplication: `matmul`, `bmm`, and `linear` with bias and activation fused into the epilogue.

matmul: out[..., m, n] = sum_k a[..., m, k] * b[..., k, n]
bmm:    the same for exactly three dims, without broadcasting
linear: y[..., n] = activation(sum_k x[..., k] * weight[n, k] + bias[n])

| tensor | shape | dtype |
|---|---|---|
| a | (..., M, K); bmm: (B, M, K) | float32, float16, bfloat16 |
| b | (..., K, N), its batch dims broadcast against a's; bmm: (B, K, N) | that of a |
| x | (..., K), one or more dims | float32, float16, bfloat16 |
| weight | (N, K) | that of x |
| bias | (N,) or None | that of x |
| activation | "none", "relu", "gelu" (erf), "gelu_tanh", "silu" | |

Accumulation, bias and activation are in float32; the result is rounded once, to the input's dtype. float32 inputs
follow `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul`: TF32 only where torch would use it.
Results do not depend on the order in which programs run: split-K adds its partial products in a second kernel.

Three kernels do the work. A product with one row or column streams the matrix through CUDA cores. On compute capability
9.0 and up, operands whose rows are 16-byte aligned are fetched by TMA; anything else (Ampere, odd strides, batches that are
not evenly spaced, the interpreter) takes the portable kernel, which reads any strides.

Raises ValueError for a 1-D operand (bmm: any number of dims but three), sizes that do not match, an unknown activation;
TypeError for dtypes that differ.

Sources: L2-friendly tile order, https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html;
GELU, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import INTERPRET, can_describe, capability, cdiv, descriptor, launch, sm_count

LINEAR_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


# --------------------------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------------------------


def _matmul_upcast(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32, for arithmetic; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matmul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(_matmul_upcast(a), _matmul_upcast(b)).to(a.dtype).contiguous()


def _linear_activate_reference(z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    return z


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    return linear_fwd_reference(x, weight, bias, activation)[0]


def linear_fwd_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    z = F.linear(_matmul_upcast(x), _matmul_upcast(weight), None if bias is None else _matmul_upcast(bias))
    # As activation(F.linear(...)) in torch, the pre-activation is rounded to x's dtype; the kernel's is not.
    z = z.to(x.dtype).contiguous()
    if activation == "none":
        return z, x.new_empty(0)
    y = _linear_activate_reference(_matmul_upcast(z), activation).to(x.dtype)
    return y, z if _linear_keeps_z(activation) else x.new_empty(0)


def _linear_activate_grad_reference(dy: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_bwd_reference(
    dy: torch.Tensor, z: torch.Tensor | None, activation: str, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = _matmul_upcast(dy)
    if activation != "none":
        dz = _linear_activate_grad_reference(dz, _matmul_upcast(z), activation)
    rows = dz.reshape(math.prod(dz.shape[:-1]), dz.shape[-1])
    return (
        dz.to(dy.dtype).contiguous() if activation != "none" else dy.new_empty(0),
        rows.sum(0).to(dy.dtype) if needs_dbias else dy.new_empty(0),
    )


def bmm_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return matmul_reference(a, b)


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _matmul_tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    # Columns of GROUP_M tiles: programs that run at the same time share rows of A and columns of B, which stay in L2.
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = (pid // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    in_group = pid % per_group
    return first_m + in_group % rows, in_group // rows


@triton.jit
def _linear_activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # not maximum(): NaN must stay NaN, as in torch
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def _linear_sigmoid(u):
    """sigmoid(u) and its derivative, without the cancellation in 1 - sigmoid(u)."""
    e = tl.exp(-tl.abs(u))
    s = tl.where(u < 0, e, 1.0) / (1.0 + e)
    return s, e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _linear_activate_grad(z, ACTIVATION: tl.constexpr):
    """d activation / d z; for relu, z may be the output."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        pdf = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * pdf
    elif ACTIVATION == "gelu_tanh":
        s, ds = _linear_sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * ds * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:  # silu
        s, ds = _linear_sigmoid(z)
        return s + z * ds


@triton.jit
def _matmul_store(value, dst, off_m, off_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """Store a tile to row-major (M, N) memory: a descriptor, or a pointer."""
    if TMA:
        dst.store([off_m, off_n], value.to(dst.dtype))
    else:
        offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        offs_n = off_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        ptrs = dst + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(ptrs, value.to(dst.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _matmul_finish(
    acc,
    bias_ptr,
    out,
    z_out,
    off_m,
    off_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
    TMA: tl.constexpr,
):
    """The fused epilogue: bias, activation, stores; all arithmetic in float32."""
    if HAS_BIAS:
        offs_n = off_n + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc += bias[None, :]
    if STORE_Z:
        _matmul_store(acc, z_out, off_m, off_n, M, N, BLOCK_M, BLOCK_N, TMA)
    _matmul_store(_linear_activate(acc, ACTIVATION), out, off_m, off_n, M, N, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    z_ptr,
    M,
    N,
    K,
    K_SPLIT,
    B,
    B2,
    stride_ab1,
    stride_ab2,
    stride_am,
    stride_ak,
    stride_bb1,
    stride_bb2,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of one batch and one part of K; any strides. out is (SPLIT_K, B, M, N)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    part = pid // tiles  # split * B + batch
    pid_m, pid_n = _matmul_tile_of(pid % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    batch1 = ((part % B) // B2).to(tl.int64)
    batch2 = ((part % B) % B2).to(tl.int64)
    k_first = (part // B) * K_SPLIT
    # tl.assume with range(0, span) keeps ptxas from serialising wgmma (its warning C7515)
    span = min(K - k_first, K_SPLIT) if SPLIT_K > 1 else K
    tl.assume(span > 0)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    mask_m = offs_m < M
    mask_n = offs_n < N
    # int64: an operand may pass 2**31 elements along any dim
    k_int64 = (k_first + offs_k).to(tl.int64)
    a_ptrs = a_ptr + batch1 * stride_ab1 + batch2 * stride_ab2
    a_ptrs += offs_m.to(tl.int64)[:, None] * stride_am + k_int64[None, :] * stride_ak  # (BLOCK_M, BLOCK_K)
    b_ptrs = b_ptr + batch1 * stride_bb1 + batch2 * stride_bb2
    b_ptrs += k_int64[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn  # (BLOCK_K, BLOCK_N)
    a_step = tl.full((), BLOCK_K, tl.int64) * stride_ak
    b_step = tl.full((), BLOCK_K, tl.int64) * stride_bk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, span, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            # parts of K are whole blocks, so only K itself ends inside one
            mask_k = offs_k < K - k_first - k
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if PRECISION == "ieee":
            # Sums of BLOCK_K products, then a sum of those: a chain of K additions would round K times, and cuBLAS
            # does not. The product with 1.0 keeps the compiler from chaining them again.
            acc = tl.fma(acc, 1.0, tl.dot(a, b, input_precision=PRECISION))
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step

    part_offset = part.to(tl.int64) * M * N
    _matmul_finish(
        acc,
        bias_ptr,
        out_ptr + part_offset,
        z_ptr + part_offset if STORE_Z else z_ptr,
        pid_m * BLOCK_M,
        pid_n * BLOCK_N,
        M,
        N,
        BLOCK_M,
        BLOCK_N,
        HAS_BIAS,
        ACTIVATION,
        STORE_Z,
        False,
    )


@triton.jit
def _matmul_tma_load(desc, first, off, k, K_MAJOR: tl.constexpr):
    """(ROWS, BLOCK_K) of an operand. TMA wants a contiguous last dim: the other order is transposed after the load.

    first: where the batch begins among the descriptor's rows.
    """
    if K_MAJOR:
        return desc.load([first + off, k])
    else:
        return desc.load([first + k, off]).T


@triton.jit
def _matmul_tma_product(
    a_desc,
    b_desc,
    b2_desc,
    a_first,
    b_first,
    off_m,
    off_n,
    k_first,
    span,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile's first BLOCK_N columns and its further BLOCK_N2, if any (else the first twice)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros((BLOCK_M, BLOCK_N2), tl.float32)
        for k in range(0, span, BLOCK_K):
            a = _matmul_tma_load(a_desc, a_first, off_m, k_first + k, A_K_MAJOR)  # (BLOCK_M, BLOCK_K)
            b = _matmul_tma_load(b_desc, b_first, off_n, k_first + k, B_K_MAJOR)  # (BLOCK_N, BLOCK_K)
            b2 = _matmul_tma_load(b2_desc, b_first, off_n + BLOCK_N, k_first + k, B_K_MAJOR)  # (BLOCK_N2, BLOCK_K)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
                b2 = b2.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            acc2 = tl.dot(a, b2.T, acc2, input_precision=PRECISION)
        return acc, acc2
    else:
        for k in range(0, span, BLOCK_K):
            a = _matmul_tma_load(a_desc, a_first, off_m, k_first + k, A_K_MAJOR)  # (BLOCK_M, BLOCK_K)
            b = _matmul_tma_load(b_desc, b_first, off_n, k_first + k, B_K_MAJOR)  # (BLOCK_N, BLOCK_K)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        return acc, acc


@triton.jit
def _matmul_tma_finish(
    acc,
    bias_ptr,
    out,
    z_out,
    off_m,
    off_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
    TMA_STORE: tl.constexpr,
    HALVES: tl.constexpr,
):
    if HALVES:
        # One half of the columns after the other: half the shared memory for the store, which pays for one more stage.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _matmul_finish(
            left, bias_ptr, out, z_out, off_m, off_n, M, N, BLOCK_M, HALF, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE
        )
        off_n += HALF
        _matmul_finish(
            right, bias_ptr, out, z_out, off_m, off_n, M, N, BLOCK_M, HALF, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE
        )
    else:
        _matmul_finish(
            acc, bias_ptr, out, z_out, off_m, off_n, M, N, BLOCK_M, BLOCK_N, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE
        )


@triton.jit
def _matmul_tma_kernel(
    a_desc,
    b_desc,
    b2_desc,
    bias_ptr,
    out,
    z_out,
    M,
    N,
    K,
    K_SPLIT,
    B,
    A_BATCH,
    B_BATCH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
    TMA_STORE: tl.constexpr,
    HALVES: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SWAPPED: tl.constexpr,
    BATCHED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Products with TMA loads (zeros beyond the edges). out, z_out: descriptors if TMA_STORE, else pointers.

    BLOCK_N2: a tile has that many columns more, which makes widths possible that are no powers of two.
    SWAPPED: computes the transpose of what is stored: out is (N, M).
    BATCHED: the descriptors hold B matrices one below another, A_BATCH and B_BATCH rows apart (0: the same for all), so
    a tile at the edge of one may read rows of the next. They meet only rows of the output that are not stored: the
    launcher sees to it.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N + BLOCK_N2)
    if PERSISTENT:
        # flatten: the next tile's loads start while this tile is stored
        for tile in tl.range(pid, tiles * B if BATCHED else tiles, tl.num_programs(0), flatten=True):
            batch = tile // tiles if BATCHED else 0
            pid_m, pid_n = _matmul_tile_of(tile % tiles if BATCHED else tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            off_m = pid_m * BLOCK_M
            off_n = pid_n * BLOCK_N
            acc, _ = _matmul_tma_product(
                a_desc, b_desc, b2_desc, batch * A_BATCH, batch * B_BATCH, off_m, off_n, 0, K,
                BLOCK_M, BLOCK_N, BLOCK_N2, BLOCK_K, A_K_MAJOR, B_K_MAJOR, PRECISION, UPCAST,
            )  # fmt: skip
            tile_out = out if TMA_STORE or not BATCHED else out + batch.to(tl.int64) * M * N
            _matmul_tma_finish(
                acc, bias_ptr, tile_out, z_out, off_m + batch * M if TMA_STORE else off_m, off_n, M, N,
                BLOCK_M, BLOCK_N, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE, HALVES,
            )  # fmt: skip
    else:
        part = pid // tiles  # split * B + batch
        split = part // B if BATCHED else part
        batch = part % B if BATCHED else 0
        k_first = split * K_SPLIT
        # tl.assume with range(0, span) keeps ptxas from serialising wgmma (its warning C7515)
        span = min(K - k_first, K_SPLIT) if SPLIT_K > 1 else K
        tl.assume(span > 0)
        pid_m, pid_n = _matmul_tile_of(pid % tiles, M, N, BLOCK_M, BLOCK_N + BLOCK_N2, GROUP_M)
        off_m = pid_m * BLOCK_M
        off_n = pid_n * (BLOCK_N + BLOCK_N2)
        acc, acc2 = _matmul_tma_product(
            a_desc, b_desc, b2_desc, batch * A_BATCH, batch * B_BATCH, off_m, off_n, k_first, span,
            BLOCK_M, BLOCK_N, BLOCK_N2, BLOCK_K, A_K_MAJOR, B_K_MAJOR, PRECISION, UPCAST,
        )  # fmt: skip
        if not TMA_STORE and (SPLIT_K > 1 or BATCHED):  # (SPLIT_K, B, M, N) by pointer
            out += part.to(tl.int64) * M * N
        if SWAPPED:
            _matmul_finish(
                acc.T, bias_ptr, out, z_out, off_n + batch * N if TMA_STORE else off_n, off_m, N, M,
                BLOCK_N, BLOCK_M, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE,
            )  # fmt: skip
        else:
            _matmul_tma_finish(
                acc, bias_ptr, out, z_out, off_m + batch * M if TMA_STORE else off_m, off_n, M, N,
                BLOCK_M, BLOCK_N, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE, HALVES,
            )  # fmt: skip
            if BLOCK_N2 > 0:
                _matmul_finish(
                    acc2, bias_ptr, out, z_out, off_m, off_n + BLOCK_N, M, N,
                    BLOCK_M, BLOCK_N2, HAS_BIAS, ACTIVATION, STORE_Z, False,
                )  # fmt: skip


@triton.jit
def _matmul_vector_kernel(
    w_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    z_ptr,
    N,
    K,
    K_SPLIT,
    stride_wn,
    stride_xk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
):
    """out[n] = sum_k w[n, k] * x[k], rows of w contiguous. A stream of w: nothing is used twice, so no tensor cores."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    mask_n = offs_n < N
    split = tl.program_id(1)
    k_first = split * K_SPLIT
    k_last = min(k_first + K_SPLIT, K) if SPLIT_K > 1 else K
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_k[None, :]  # (BLOCK_N, BLOCK_K)
    x_ptrs = x_ptr + offs_k.to(tl.int64) * stride_xk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(k_first, k_last, BLOCK_K):
        k_int64 = tl.cast(k, tl.int64)
        if EVEN_K:
            w = tl.load(w_ptrs + k_int64, mask=mask_n[:, None], other=0.0)
            x = tl.load(x_ptrs + k_int64 * stride_xk)
        else:
            mask_k = offs_k < k_last - k
            w = tl.load(w_ptrs + k_int64, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            x = tl.load(x_ptrs + k_int64 * stride_xk, mask=mask_k, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)
    if SPLIT_K > 1:  # (SPLIT_K, N)
        out_ptr += split.to(tl.int64) * N
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if STORE_Z:
        tl.store(z_ptr + offs_n, y.to(z_ptr.dtype.element_ty), mask=mask_n)
    tl.store(out_ptr + offs_n, _linear_activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _matmul_reduce_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    z_ptr,
    NUMEL,
    N,
    PARTS,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
):
    """Add PARTS partial results, always in the same order, then bias and activation. No parts (K = 0) give zeros."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offs < NUMEL
    acc = tl.zeros((BLOCK,), tl.float32)
    ptrs = partial_ptr + offs
    for _ in range(PARTS):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += NUMEL
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    if STORE_Z:
        tl.store(z_ptr + offs, acc.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offs, _linear_activate(acc, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_bwd_kernel(
    dy_ptr,
    z_ptr,
    dz_ptr,
    partial_ptr,
    M,
    N,
    ROWS,
    stride_dym,
    stride_dyn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
):
    """dz = dy * activation'(z), and each program's column sums over its ROWS rows for the bias's gradient."""
    pid_m = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    first = pid_m * ROWS
    last = min(first + ROWS, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
        mask = (offs_m < last)[:, None] & mask_n[None, :]
        dz_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn
        dz = tl.load(dz_ptrs, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            offs = offs_m[:, None] * N + offs_n[None, :]
            z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dz *= _linear_activate_grad(z, ACTIVATION)
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DBIAS:
            acc += dz
    if NEEDS_DBIAS:
        tl.store(partial_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


class _MatmulConfig(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8
    persistent: bool = False  # TMA kernel only
    halves: bool = False  # TMA kernel only: epilogue in two halves
    block_n2: int = 0  # TMA kernel only: further columns of a tile
    swapped: bool = False  # TMA kernel only: block_m is of N and block_n of M; the transpose is computed


class _MatmulTile(NamedTuple):
    """A tile and the share of the GPU's rate that a full wave of them reaches."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    share: float
    block_n2: int = 0


# The shares were measured on an H200 (bench/results/tuning/nvidia_h200/matmul_few_rows.json). The accumulator of the widest
# tile is 128 registers a thread. The smaller a tile, the more operand bytes for each multiply-add have to come from the L2,
# which is what limits them; and all of them want nearly the whole shared memory as stages. Widths between the powers of two
# are there for shapes that they make fill the last wave of programs.
_MATMUL_TMA_TILES = (
    _MatmulTile(128, 256, 8, 3, 1.02),
    _MatmulTile(128, 128, 8, 6, 0.98),
    _MatmulTile(128, 128, 8, 5, 0.8, 32),
    _MatmulTile(64, 128, 4, 7, 0.92, 64),
    _MatmulTile(64, 128, 4, 8, 0.8, 32),
    _MatmulTile(64, 128, 4, 8, 0.87),
    _MatmulTile(64, 64, 4, 6, 0.6),
)
_MATMUL_TILES = (
    _MatmulTile(128, 128, 8, 3, 0.8),
    _MatmulTile(64, 128, 4, 3, 0.67),
    _MatmulTile(64, 64, 4, 4, 0.56),
)
# CUDA cores: operands and accumulator are registers, which limits the tile.
_MATMUL_IEEE_TILES = (_MatmulTile(64, 64, 4, 3, 0.08), _MatmulTile(32, 32, 4, 3, 0.06))


def _matmul_microseconds(
    M: int, N: int, K: int, batches: int, tile: _MatmulTile, block_k: int, split: int, sms: int
) -> float:
    """Estimated time on an H200, to compare tiles and splits of K by; other GPUs differ by a factor that cancels.

    Waves of programs, each with its flops at its share of the SM's 5.2 TFLOP/s and a microsecond and a half to start and to
    end; for a split, the reduction's launch and the float32 partial results, written and read at 3 TB/s.
    """
    width = tile.block_n + tile.block_n2
    programs = cdiv(M, tile.block_m) * cdiv(N, width) * batches * split
    flops = 2 * tile.block_m * width * block_k * cdiv(cdiv(K, block_k), split)
    product = cdiv(programs, sms) * (flops / (5.2e6 * tile.share) + 1.5)
    return product if split == 1 else product + 2.0 + 8 * split * batches * M * N / 3e6


def _matmul_split(tiles: int, K: int, block_k: int, slots: int) -> int:
    """How many programs share the K loop of a tile: enough to fill `slots`, each with at least four steps."""
    steps = cdiv(K, block_k)
    if 2 * tiles > slots or steps < 8:
        return 1
    per_part = cdiv(steps, min(slots // tiles, steps // 4, 32))
    return cdiv(steps, per_part)  # no part is empty


def _matmul_stream_config(
    M: int, N: int, K: int, batches: int, itemsize: int, aligned: bool, tma: bool, sms: int
) -> _MatmulConfig:
    """A short side of at most 64 (decoding): bound by the stream of the longer operand.

    One block covers the short side. With TMA, 32 rows or fewer are the short side of the tensor cores' tile too: the long
    operand is the one that gives wgmma its 64 rows, and nothing is multiplied in vain. The stages of all programs on an SM
    together take nearly all its shared memory: it is the bytes under way that make a stream fast, more than the number of
    SMs that take part. K is split only where even so there is too little under way: the second kernel costs 2 us.
    """
    short_side, long_side = min(M, N), max(M, N)
    short = 16 if short_side <= 16 else 32 if short_side <= 32 else 64
    if not tma:
        # the pointers of a longer BLOCK_K would spill
        block_k = (128 if aligned else 64) // itemsize
        stages = 3 if short == 64 or itemsize == 4 else 5
        split = _matmul_split(cdiv(long_side, 64) * batches, K, block_k, 2 * sms)
        return _MatmulConfig(*((short, 64) if M <= N else (64, short)), block_k, 4, stages, split_k=split)
    block_k = 256 // itemsize
    short_blocks, long_blocks = (cdiv(long_side, length) * batches for length in (64, 128))
    if short == 64:
        # 64 x 64 as long as each has an SM of its own
        length = 64 if short_blocks <= sms else 128
    else:
        # blocks of 64, but not a few more of them than there are SMs
        length = 128 if short_blocks > sms >= long_blocks else 64
    programs = cdiv(long_side, length) * batches
    split = _matmul_split(programs, K, block_k, sms // 2)
    # a program alone on its SM has all the shared memory for its stages; else two share it
    alone = programs * split <= sms or short == 64
    stages = min(9, (196 if alone else 100) * 1024 // ((short + length) * block_k * itemsize))
    swapped = short < 64 and M <= N
    blocks = (length, short) if swapped or M > N else (short, length)
    return _MatmulConfig(*blocks, block_k, 4, stages, split_k=split, swapped=swapped)


@functools.lru_cache(4096)
def _matmul_config(
    M: int,
    N: int,
    K: int,
    batches: int,
    itemsize: int,
    precision: str,
    aligned: bool,
    tma: bool,
    activation: str,
    sms: int,
) -> _MatmulConfig:
    """The launch configuration for a shape."""
    ieee = itemsize == 4 and precision == "ieee"
    if min(M, N) <= (32 if ieee else 64):
        if not ieee:
            return _matmul_stream_config(M, N, K, batches, itemsize, aligned, tma, sms)
        split = _matmul_split(cdiv(M, 32) * cdiv(N, 32) * batches, K, 32, 2 * sms)
        return _MatmulConfig(32, 32, 32, 4, 3, split_k=split)
    # 128-byte rows are a swizzle atom. Without 16-byte loads every element has a pointer of its own: a shorter block leaves
    # registers for them.
    block_k = 16 if ieee else (128 if tma or aligned else 64) // itemsize
    steps = cdiv(K, block_k)
    best, least = _MatmulConfig(0, 0, 0, 0, 0), math.inf
    for tile in _MATMUL_IEEE_TILES if ieee else _MATMUL_TMA_TILES if tma else _MATMUL_TILES:
        for split in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32):
            if split > 1 and 4 * split > steps:
                break
            time = _matmul_microseconds(M, N, K, batches, tile, block_k, split, sms)
            if time < least:
                # no part is empty
                parts, least = cdiv(steps, cdiv(steps, split)), time
                blocks = (tile.block_m, tile.block_n, block_k, tile.num_warps, tile.num_stages)
                best = _MatmulConfig(*blocks, split_k=parts, block_n2=tile.block_n2)
    if not (tma and best.block_n == 256):
        return best
    if itemsize == 2 and best.split_k == 1:
        # One program per SM that loops over the tiles, so that the next tile's loads run under this one's epilogue; stored in
        # halves, because a whole tile leaves no shared memory for the fourth stage. On an H200, against cuBLAS in the same
        # process: 1.02x at 8192^3, 1.01x at 4096^3; one program per tile gave 1.00x and 0.96x.
        return best._replace(num_stages=4, persistent=True, halves=True)
    # The accumulator's 128 registers a thread leave few for an activation, and none for a float32 tile's store.
    return best._replace(halves=activation != "none" or itemsize == 4)


def _matmul_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: what torch would use on CUDA. Half precision ignores it."""
    if dtype != torch.float32:
        return "tf32"
    settings = torch.backends.cuda.matmul
    # torch >= 2.9 has fp32_precision, and raises on the older names once a program has set it
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if tf32 else "ieee"


class _MatmulOperand(NamedTuple):
    """What TMA reads of an operand (..., rows, K): (rows, K) or (K, rows), the batches one below another."""

    view: torch.Tensor
    k_major: bool
    batch_rows: int  # rows of the view from one batch to the next


def _matmul_tma_operand(x: torch.Tensor, block_k: int) -> _MatmulOperand | None:
    """The operand (rows, K) or (1, B, rows, K) as TMA can read it; None if it cannot."""
    if x.dim() == 2:
        if can_describe(x):
            return _MatmulOperand(x, True, 0)
        return _MatmulOperand(x.t(), False, 0) if can_describe(x.t()) else None
    _, stride_batch, stride_row, stride_k = x.stride()
    outer, batches, rows, K = x.shape
    for k_major in (True, False):
        if outer != 1 or (stride_k if k_major else stride_row) != 1:
            continue
        lines, stride = (rows, stride_row) if k_major else (K, stride_k)
        shared = batches == 1 or stride_batch == 0
        # Past the last line of a batch lie the next one's. Lines of K must not: what they hold (inf, say) times the other
        # operand's zeros would be NaN.
        if not shared and (stride_batch != lines * stride or (not k_major and K % block_k != 0)):
            continue
        size = (lines if shared else batches * lines, K if k_major else rows)
        view = x.as_strided(size, (stride, 1))
        if can_describe(view):
            return _MatmulOperand(view, k_major, 0 if shared else lines)
    return None


def _matmul_tma_operands(
    a: torch.Tensor, w: torch.Tensor, precision: str, block_k: int
) -> tuple[_MatmulOperand, _MatmulOperand] | None:
    """Both operands as TMA can read them, or None."""
    found = _matmul_tma_operand(a, block_k), _matmul_tma_operand(w, block_k)
    if found[0] is None or found[1] is None or max(*found[0].view.shape, *found[1].view.shape) >= 2**31:
        return None
    # wgmma takes 4-byte operands with K contiguous only
    if a.dtype == torch.float32 and not (precision == "tf32" and found[0].k_major and found[1].k_major):
        return None
    return found[0], found[1]


def _matmul_gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    z: torch.Tensor | None = None,
    config: _MatmulConfig | None = None,
) -> None:
    """out = activation(a @ w^T + bias), and z = a @ w^T + bias if z is given.

    a (M, K), w (N, K), or with batches (B1, B2, M, K), (B1, B2, N, K): any strides; out, z: contiguous,
    B1 * B2 * M * N elements. `config` overrides the heuristic (tuning).
    """
    NUMEL = out.numel()
    if NUMEL == 0:
        return
    M, K = a.shape[-2:]
    N = w.shape[-2]
    B1, B2 = a.shape[:-2] or (1, 1)
    B = B1 * B2
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation, "STORE_Z": z is not None}
    if K == 0:
        _matmul_reduce(out, out, 0, N, bias, z, epilogue)
        return
    # With no contiguous dim every load would be a scattered one: a copy costs less than the product.
    if 1 not in a.stride()[-2:]:
        a = a.contiguous()
    if 1 not in w.stride()[-2:]:
        w = w.contiguous()
    sms = sm_count(a.device)
    if config is None and B == 1 and (M == 1 or N == 1):
        if M == 1 and w.stride()[-1] == 1:
            _matmul_vector(w.reshape(N, K), a.reshape(K), out, bias, z, epilogue, sms)
            return
        if N == 1 and a.stride()[-1] == 1 and bias is None:
            _matmul_vector(a.reshape(M, K), w.reshape(K), out, None, z, epilogue, sms)
            return
    itemsize = a.element_size()
    precision = _matmul_precision(a.dtype)
    # what the TMA kernel's BLOCK_K will be, for batches
    block_k = config.block_k if config is not None else (256 if min(M, N) <= 64 else 128) // itemsize
    tma = _matmul_tma_operands(a, w, precision, block_k) if capability(a.device) >= 90 else None
    if config is None:
        aligned = tma is not None or (K % 16 == 0 and _matmul_aligned(a) and _matmul_aligned(w))
        config = _matmul_config(M, N, K, B, itemsize, precision, aligned, tma is not None, activation, sms)

    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    size_m, size_n = (N, M) if config.swapped else (M, N)  # of what the kernel computes
    tiles = cdiv(size_m, block_m) * cdiv(size_n, block_n + config.block_n2)
    split = config.split_k
    k_split = cdiv(cdiv(K, block_k), split) * block_k
    partial = out if split == 1 else out.new_empty((split, NUMEL), dtype=torch.float32)
    shared: dict[str, Any] = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": config.group_m,
        "SPLIT_K": split,
        "PRECISION": precision,
        # the interpreter's tl.dot is wrong for bf16
        "UPCAST": INTERPRET,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    # With split-K the epilogue belongs to the reduction.
    shared |= epilogue if split == 1 else {"HAS_BIAS": False, "ACTIVATION": "none", "STORE_Z": False}
    bias_arg, z_arg = (bias, z) if split == 1 else (None, None)
    if tma is not None:
        first, second = tma[::-1] if config.swapped else tma
        out_arg: Any = partial
        box = (block_n, block_m) if config.swapped else (block_m, block_n // 2 if config.halves else block_n)
        # A store by descriptor ends at the last batch's edge only. z has out's shape, and both are new.
        tma_store = split == 1 and N * itemsize % 16 == 0 and (B == 1 or M % box[0] == 0) and B * M < 2**31
        tma_store = tma_store and config.block_n2 == 0
        if tma_store:
            out_arg = descriptor(out.view(B * M, N), box)
            z_arg = None if z is None else descriptor(z.view(M, N), box)
        launch(
            _matmul_tma_kernel,
            (min(tiles * B, sms) if config.persistent else tiles * split * B,),
            descriptor(first.view, (block_m, block_k) if first.k_major else (block_k, block_m)),
            *(
                descriptor(second.view, (width, block_k) if second.k_major else (block_k, width)) if width else None
                for width in (block_n, config.block_n2)
            ),
            bias_arg,
            out_arg,
            z_arg,
            size_m,
            size_n,
            K,
            k_split,
            B,
            first.batch_rows,
            second.batch_rows,
            A_K_MAJOR=first.k_major,
            B_K_MAJOR=second.k_major,
            TMA_STORE=tma_store,
            HALVES=config.halves,
            PERSISTENT=config.persistent,
            BLOCK_N2=config.block_n2,
            SWAPPED=config.swapped,
            BATCHED=B > 1,
            **shared,
        )
    else:
        *batch_a, stride_am, stride_ak = a.stride()
        *batch_w, stride_bn, stride_bk = w.stride()
        launch(
            _matmul_kernel,
            (tiles * split * B,),
            a,
            w,
            bias_arg,
            partial,
            z_arg,
            M,
            N,
            K,
            k_split,
            B,
            B2,
            *(batch_a or (0, 0)),
            stride_am,
            stride_ak,
            *(batch_w or (0, 0)),
            stride_bk,
            stride_bn,
            EVEN_K=K % block_k == 0,
            **shared,
        )
    if split > 1:
        _matmul_reduce(partial, out, split, N, bias, z, epilogue)


def _matmul_aligned(x: torch.Tensor) -> bool:
    """Whether every row (of the contiguous dim) of a (..., rows, columns) tensor begins at a multiple of 16 bytes."""
    size = x.element_size()
    return all(s == 1 or s * size % 16 == 0 for s in x.stride()) and x.storage_offset() * size % 16 == 0


def _matmul_vector(
    w: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    epilogue: dict[str, Any],
    sms: int,
    block: tuple[int, int, int] = (4, 512, 4),
) -> None:
    """out = activation(w @ x + bias): w (N, K) with contiguous rows, x (K,). `block`: BLOCK_N, BLOCK_K, warps (tuning)."""
    N, K = w.shape
    block_n, block_k, num_warps = block
    programs = cdiv(N, block_n)
    split = _matmul_split(programs, K, block_k, 4 * sms)
    k_split = cdiv(cdiv(K, block_k), split) * block_k
    partial = out if split == 1 else out.new_empty((split, N), dtype=torch.float32)
    launch(
        _matmul_vector_kernel,
        (programs, split),
        w,
        x,
        bias if split == 1 else None,
        partial,
        z if split == 1 else None,
        N,
        K,
        k_split,
        w.stride(0),
        x.stride(0),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLIT_K=split,
        EVEN_K=K % block_k == 0,
        num_warps=num_warps,
        **(epilogue if split == 1 else {"HAS_BIAS": False, "ACTIVATION": "none", "STORE_Z": False}),
    )
    if split > 1:
        _matmul_reduce(partial, out, split, N, bias, z, epilogue)


def _matmul_reduce(
    partial: torch.Tensor,
    out: torch.Tensor,
    parts: int,
    N: int,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    epilogue: dict[str, Any],
) -> None:
    """out = activation(sum of the (parts, out.numel()) partial results + bias)."""
    NUMEL = out.numel()
    # few columns (a bias's gradient): small blocks, so that more than one program runs
    block = 1024 if NUMEL >= 2**17 else 128
    launch(
        _matmul_reduce_kernel,
        (cdiv(NUMEL, block),),
        partial,
        bias,
        out,
        z,
        NUMEL,
        N,
        parts,
        BLOCK=block,
        num_warps=4,
        **epilogue,
    )


def _matmul_batches(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands as (B1, B2, rows, columns), batch dims broadcast: views unless that takes more than two strides."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    dims: list[tuple[int, int, int]] = []  # (size, stride in a, stride in b), neighbours merged where both allow it
    for dim in zip(batch, a.stride(), b.stride()):  # noqa: B905 (the strides are longer)
        size, sa, sb = dim
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * sa, size * sb):
            dims[-1] = (dims[-1][0] * size, sa, sb)
        else:
            dims.append(dim)
    if len(dims) > 2:
        count = math.prod(batch)
        return a.reshape(1, count, *a.shape[-2:]), b.reshape(1, count, *b.shape[-2:])
    dims = [(1, 0, 0)] * (2 - len(dims)) + dims
    sizes, strides_a, strides_b = zip(*dims, strict=True)
    return (
        a.as_strided((*sizes, *a.shape[-2:]), (*strides_a, *a.stride()[-2:])),
        b.as_strided((*sizes, *b.shape[-2:]), (*strides_b, *b.stride()[-2:])),
    )


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = matmul_fake(a, b)
    if out.numel() == 0:
        return out
    if b.dim() == 2 or math.prod(b.shape[:-2]) == 1:
        # One matrix b: a's leading dims are the rows of one product (a view, or a copy, which costs less than it).
        _matmul_gemm(_matmul_rows(a), b.t() if b.dim() == 2 else b.reshape(b.shape[-2:]).t(), out)
    else:
        a, b = _matmul_batches(a, b)
        _matmul_gemm(a, b.mT, out)
    return out


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = bmm_fake(a, b)
    if out.numel() > 0:
        _matmul_gemm(a[None], b.mT[None], out)
    return out


def _matmul_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (rows, K)."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    y = linear_fake(x, weight, bias, activation)
    _linear_gemm(x, weight, bias, activation, y, None)
    return y


def linear_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y, z = linear_fwd_fake(x, weight, bias, activation)
    _linear_gemm(x, weight, bias, activation, y, z if _linear_keeps_z(activation) else None)
    return y, z


def _linear_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    y: torch.Tensor,
    z: torch.Tensor | None,
) -> None:
    bias = None if bias is None else bias.contiguous()
    _matmul_gemm(_matmul_rows(x), weight, y, bias, activation, z)


def linear_bwd(
    dy: torch.Tensor, z: torch.Tensor | None, activation: str, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dz, dbias = linear_bwd_fake(dy, z, activation, needs_dbias)
    N = dy.shape[-1]
    M = math.prod(dy.shape[:-1])
    if N == 0:
        return dz, dbias
    dy = dy.reshape(M, N)
    z = None if z is None else z.contiguous()
    block_m, block_n = 16, 128
    columns = cdiv(N, block_n)
    # Each program walks down its rows and keeps their column sums. Eight programs an SM keep enough loads in flight.
    rows = cdiv(cdiv(M, block_m), max(1, 8 * sm_count(dy.device) // columns)) * block_m
    parts = cdiv(M, rows) if M else 0
    partial = dy.new_empty((parts, N), dtype=torch.float32) if needs_dbias else None
    launch(
        _linear_bwd_kernel,
        (parts, columns),
        dy,
        z,
        dz if activation != "none" else None,
        partial,
        M,
        N,
        rows,
        *dy.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ACTIVATION=activation,
        NEEDS_DBIAS=needs_dbias,
        num_warps=4,
    )
    if needs_dbias:
        epilogue = {"HAS_BIAS": False, "ACTIVATION": "none", "STORE_Z": False}
        _matmul_reduce(partial, dbias, parts, N, None, None, epilogue)
    return dz, dbias


# --------------------------------------------------------------------------------------------------------------------
# Fakes
# --------------------------------------------------------------------------------------------------------------------


def matmul_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    batch = a.shape[:-2]
    if b.dim() > 2:  # broadcast_shapes takes longer than a launch
        batch = torch.broadcast_shapes(batch, b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def bmm_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


def linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if _linear_keeps_z(activation) else (0,))


def linear_bwd_fake(
    dy: torch.Tensor, z: torch.Tensor | None, activation: str, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = dy.new_empty(dy.shape if activation != "none" else (0,))
    return dz, dy.new_empty((dy.shape[-1],) if needs_dbias else (0,))


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------


def matmul_check(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        if t.dim() < 2:
            hint = "two or more dims (for a vector: unsqueeze it to a matrix of one row or column, squeeze the result)"
            bad_argument("matmul", name, f"of shape {tuple(t.shape)}", hint)
    if a.dtype != b.dtype:
        bad_argument("matmul", "b", f"of dtype {b.dtype}", f"the dtype of a, {a.dtype}", TypeError)
    if a.shape[-1] != b.shape[-2]:
        allowed = f"(..., K, N) with K = {a.shape[-1]}, the last size of a, {tuple(a.shape)}"
        bad_argument("matmul", "b", f"of shape {tuple(b.shape)}", allowed)
    for size_a, size_b in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False):
        if size_a != size_b and size_a != 1 and size_b != 1:
            allowed = f"batch dims that broadcast against those of a, {tuple(a.shape)}"
            bad_argument("matmul", "b", f"of shape {tuple(b.shape)}", allowed)


def bmm_check(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        if t.dim() != 3:
            bad_argument("bmm", name, f"of shape {tuple(t.shape)}", "three dims (tt::matmul takes two or more)")
    if a.dtype != b.dtype:
        bad_argument("bmm", "b", f"of dtype {b.dtype}", f"the dtype of a, {a.dtype}", TypeError)
    if a.shape[0] != b.shape[0]:
        allowed = f"the batch size of a, {a.shape[0]} (tt::matmul broadcasts)"
        bad_argument("bmm", "b", f"of batch size {b.shape[0]}", allowed)
    if a.shape[2] != b.shape[1]:
        allowed = f"(B, K, N) with K = {a.shape[2]}, the last size of a, {tuple(a.shape)}"
        bad_argument("bmm", "b", f"of shape {tuple(b.shape)}", allowed)


def linear_check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> None:
    if x.dim() == 0:
        bad_argument("linear", "x", "of no dims", "(..., K)")
    if weight.dim() != 2:
        bad_argument("linear", "weight", f"of shape {tuple(weight.shape)}", "two dims, (N, K)")
    if x.dtype != weight.dtype:
        bad_argument("linear", "weight", f"of dtype {weight.dtype}", f"the dtype of x, {x.dtype}", TypeError)
    if x.shape[-1] != weight.shape[1]:
        allowed = f"(N, K) with K = {x.shape[-1]}, the last size of x, {tuple(x.shape)}"
        bad_argument("linear", "weight", f"of shape {tuple(weight.shape)}", allowed)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            bad_argument(
                "linear", "bias", f"of shape {tuple(bias.shape)}", f"({weight.shape[0]},), a value per row of weight"
            )
        if bias.dtype != x.dtype:
            bad_argument("linear", "bias", f"of dtype {bias.dtype}", f"the dtype of x, {x.dtype}", TypeError)
    if activation not in LINEAR_ACTIVATIONS:
        bad_argument("linear", "activation", repr(activation), ", ".join(map(repr, LINEAR_ACTIVATIONS)))


# --------------------------------------------------------------------------------------------------------------------
# Gradients: products again, through the public op, so every layout takes its fast path
# --------------------------------------------------------------------------------------------------------------------


def matmul_forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ctx.shapes = a.shape, b.shape
    ctx.save_for_backward(a if ctx.needs[1] else None, b if ctx.needs[0] else None)
    return torch.ops.tt.matmul(a, b)


def matmul_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, b = ctx.saved_tensors
    shape_a, shape_b = ctx.shapes
    da = _matmul_summed(dout, b.mT, shape_a) if ctx.needs[0] else None
    db = _matmul_summed(a.mT, dout, shape_b) if ctx.needs[1] else None
    return da, db


def _matmul_summed(left: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """left @ right, summed over the batch dims that `shape` lacks or has with size one.

    Those dims join the inner one, so that the sum is part of the product: accumulated in float32, rounded once.
    """
    rank = max(left.dim(), right.dim()) - 2
    left = left.reshape((1,) * (rank + 2 - left.dim()) + tuple(left.shape))
    right = right.reshape((1,) * (rank + 2 - right.dim()) + tuple(right.shape))
    batch = (1,) * (rank + 2 - len(shape)) + tuple(shape[:-2])
    # a dim to sum over has its full size in both: the operand that lacks it is the one whose gradient this is
    summed = [i for i in range(rank) if batch[i] == 1 and (left.shape[i] != 1 or right.shape[i] != 1)]
    if summed:
        kept = [i for i in range(rank) if i not in summed]
        inner = left.shape[-1] * math.prod(left.shape[i] for i in summed)
        sizes_left, sizes_right = ([t.shape[i] for i in kept] for t in (left, right))
        left = left.permute(*kept, rank, *summed, rank + 1).reshape(*sizes_left, left.shape[-2], inner)
        right = right.permute(*kept, *summed, rank, rank + 1).reshape(*sizes_right, inner, right.shape[-1])
    return torch.ops.tt.matmul(left, right).reshape(shape)


def bmm_forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ctx.save_for_backward(a if ctx.needs[1] else None, b if ctx.needs[0] else None)
    return torch.ops.tt.bmm(a, b)


def bmm_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, b = ctx.saved_tensors
    da = torch.ops.tt.bmm(dout, b.mT) if ctx.needs[0] else None
    db = torch.ops.tt.bmm(a.mT, dout) if ctx.needs[1] else None
    return da, db


def _linear_keeps_z(activation: str) -> bool:
    """Whether the gradient needs the pre-activation: recomputing it costs a product. For relu the output will do."""
    return activation in ("gelu", "gelu_tanh", "silu")


def linear_forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    ctx.activation = activation
    ctx.shape_x = x.shape
    y, z = torch.ops.tt.linear_fwd(x, weight, bias, activation)
    kept = None if activation == "none" else z if _linear_keeps_z(activation) else y
    ctx.save_for_backward(x if ctx.needs[1] else None, weight if ctx.needs[0] else None, kept)
    return y


def linear_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, z = ctx.saved_tensors
    dz, dbias = dy, None
    if ctx.activation != "none" or ctx.needs[2]:
        found, dbias = torch.ops.tt.linear_bwd(dy, z, ctx.activation, ctx.needs[2])
        dz = found if ctx.activation != "none" else dy
    N = dz.shape[-1]
    rows = dz.reshape(math.prod(dz.shape[:-1]), N)
    dx = torch.ops.tt.matmul(rows, weight).reshape(ctx.shape_x) if ctx.needs[0] else None
    dweight = torch.ops.tt.matmul(rows.t(), x.reshape(rows.shape[0], x.shape[-1])) if ctx.needs[1] else None
    return dx, dweight, dbias


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def matmul_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for M, K, N in [(1, 1, 1), (33, 65, 17), (128, 64, 96), (1, 256, 72), (200, 136, 3)]:
        yield Sample(f"M{M}_K{K}_N{N}", (rand(M, K), rand(K, N)))
    yield Sample("split_k", (rand(8, 4096), rand(4096, 24)))
    yield Sample("row_vector", (rand(1, 1100), rand(9, 1100).t()))
    yield Sample("column_vector", (rand(7, 2048), rand(2048, 1)))
    yield Sample("column_vector_split_k", (rand(4, 8200), rand(8200, 1)))
    yield Sample("split_k_ragged", (rand(5, 4100), rand(4100, 7)))
    yield Sample("several_tiles", (rand(300, 80), rand(80, 264)), slow_in_interpreter=True)
    for M, K, N in [(0, 5, 4), (4, 0, 5), (4, 5, 0), (0, 0, 0)]:
        yield Sample(f"empty_M{M}_K{K}_N{N}", (rand(M, K), rand(K, N)))
    yield Sample("a_transposed", (rand(64, 40).t(), rand(64, 48)))
    yield Sample("b_transposed", (rand(40, 64), rand(48, 64).t()))
    yield Sample("both_transposed", (rand(64, 40).t(), rand(48, 64).t()))
    yield Sample("sliced", (rand(40, 99)[:, 2:66], rand(64, 150)[:, ::3]))
    yield Sample("misaligned", (rand(16 * 32 + 1)[1:].view(16, 32), rand(32 * 24 + 3)[3:].view(32, 24)))
    yield Sample("expanded", (rand(1, 32).expand(20, 32), rand(32, 1).expand(32, 24)))
    yield Sample("batched", (rand(3, 17, 33), rand(3, 33, 9)))
    yield Sample("batched_heads", (rand(2, 19, 3, 16).transpose(1, 2), rand(2, 11, 3, 16).transpose(1, 2).mT))
    yield Sample("batch_of_a", (rand(2, 3, 5, 16), rand(16, 7)))
    yield Sample("batch_of_b", (rand(5, 16), rand(3, 16, 3)))
    yield Sample("broadcast", (rand(2, 1, 5, 8), rand(3, 8, 3)))
    yield Sample("broadcast_both", (rand(2, 1, 3, 1, 2, 8), rand(2, 1, 4, 8, 2)))
    yield Sample("size_one_batches", (rand(1, 5, 8), rand(1, 1, 8, 7)))
    yield Sample("empty_batch", (rand(0, 5, 8), rand(8, 7)))
    yield Sample("empty_batch_K0", (rand(2, 5, 0), rand(2, 0, 7)))


def matmul_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    a = torch.randn(4, 5, device=device)
    yield ErrorSample("inner_sizes", (a, a), match=r"matmul.*'b'.*\(4, 5\).*K = 5")
    yield ErrorSample("dtypes_differ", (a, a.t().half()), error=TypeError, match="matmul.*'b'.*float16.*float32")
    yield ErrorSample("a_1d", (a[0], a.t()), match=r"matmul.*'a'.*\(5,\).*two or more dims.*unsqueeze")
    yield ErrorSample("b_1d", (a, a[0]), match=r"matmul.*'b'.*\(5,\).*two or more dims.*unsqueeze")
    b = a.t().expand(3, 5, 4)
    yield ErrorSample("batches", (a.expand(2, 4, 5), b), match=r"matmul.*'b'.*\(3, 5, 4\).*broadcast.*\(2, 4, 5\)")


def matmul_bench_cases() -> Iterator[BenchCase]:
    def make(n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)), {}

    yield BenchCase("8192x8192x8192", lambda d, t: make(8192, d, t), passes=("fwd",))
    yield BenchCase("4096x4096x4096", lambda d, t: make(4096, d, t))


def matmul_cost(a: torch.Tensor, b: torch.Tensor) -> Cost:
    size = a.element_size()
    out = math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])) * a.shape[-2] * b.shape[-1]
    flops = 2 * out * a.shape[-1]
    operands = (a.numel() + b.numel()) * size
    # backward: two products of the same size; dout and both operands in, both gradients out
    return Cost(flops, operands + out * size, 2 * flops, 2 * operands + out * size)


def bmm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for B, M, K, N in [(1, 1, 1, 1), (3, 17, 33, 9), (2, 70, 128, 72)]:
        yield Sample(f"B{B}_M{M}_K{K}_N{N}", (rand(B, M, K), rand(B, K, N)))
    for B, M, K, N in [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)]:
        yield Sample(f"empty_B{B}_M{M}_K{K}_N{N}", (rand(B, M, K), rand(B, K, N)))
    yield Sample("transposed", (rand(2, 16, 24).mT, rand(2, 40, 16).mT))
    yield Sample("batch_last", (rand(9, 16, 3).permute(2, 0, 1), rand(16, 8, 3).permute(2, 0, 1)))
    yield Sample("expanded", (rand(1, 9, 16).expand(3, 9, 16), rand(16, 1).expand(3, 16, 8)))
    yield Sample("sliced", (rand(3, 20, 40)[:, 1:18, 3:36], rand(6, 33, 24)[::2, :, ::3]))
    yield Sample("long_K", (rand(2, 3, 4096), rand(2, 4096, 5)))


def bmm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    a, b = torch.randn(2, 4, 5, device=device), torch.randn(2, 5, 3, device=device)
    yield ErrorSample("a_2d", (a[0], b), match=r"bmm.*'a'.*\(4, 5\).*three dims.*matmul")
    yield ErrorSample("b_4d", (a, b[None]), match=r"bmm.*'b'.*\(1, 2, 5, 3\).*three dims")
    yield ErrorSample("batches", (a, b[:1]), match=r"bmm.*'b'.*batch size 1.*batch size of a, 2.*broadcasts")
    yield ErrorSample("inner_sizes", (a, b.mT), match=r"bmm.*'b'.*\(2, 3, 5\).*K = 5")
    yield ErrorSample("dtypes_differ", (a, b.half()), error=TypeError, match="bmm.*'b'.*float16.*float32")


def bmm_bench_cases() -> Iterator[BenchCase]:
    def case(B: int, M: int, N: int, K: int, passes: tuple[str, ...]) -> BenchCase:
        def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            a, b = torch.randn(B, M, K, device=device, dtype=dtype), torch.randn(B, K, N, device=device, dtype=dtype)
            return (a, b), {}

        return BenchCase(f"{B}x{M}x{N}x{K}", make, passes=passes)

    yield case(32, 2048, 2048, 128, ("fwd", "fwdbwd"))
    yield case(16, 2048, 2048, 2048, ("fwd",))


def bmm_cost(a: torch.Tensor, b: torch.Tensor) -> Cost:
    return matmul_cost(a, b)


def linear_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for activation in LINEAR_ACTIVATIONS:
        yield Sample(f"M33_N40_K65_{activation}", (rand(33, 65), rand(40, 65), rand(40), activation))
        yield Sample(f"M64_N48_K64_{activation}", (rand(64, 64), rand(48, 64), None, activation))
    yield Sample("no_bias", (rand(17, 64), rand(24, 64)))
    yield Sample("M1_N1_K1", (rand(1, 1), rand(1, 1), rand(1)))
    yield Sample("vector_x", (rand(40), rand(24, 40), rand(24), "silu"))
    yield Sample("leading_dims", (rand(2, 3, 5, 32), rand(16, 32), rand(16), "gelu"))
    yield Sample("x_transposed", (rand(2, 32, 9).mT, rand(16, 32), rand(16)))
    yield Sample("weight_transposed", (rand(9, 32), rand(32, 16).t(), rand(16), "relu"))
    yield Sample("misaligned", (rand(9 * 32 + 1)[1:].view(9, 32), rand(16, 33)[:, 1:], rand(17)[1:], "relu"))
    yield Sample("expanded", (rand(1, 32).expand(9, 32), rand(16, 32), rand(1).expand(16)))
    yield Sample("split_k", (rand(4, 4096), rand(24, 4096), rand(24), "gelu_tanh"))
    yield Sample("tall", (rand(700, 16), rand(24, 16), rand(24), "silu"), slow_in_interpreter=True)
    yield Sample("empty_M", (rand(0, 16), rand(8, 16), rand(8), "silu"))
    yield Sample("empty_N", (rand(4, 16), rand(0, 16), rand(0)))
    yield Sample("empty_K", (rand(4, 0), rand(8, 0), rand(8), "gelu"))
    yield Sample("empty_K_no_bias", (rand(4, 0), rand(8, 0)))


def linear_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((4, 5), (3, 5), (3,)))
    yield ErrorSample("inner_sizes", (x, weight.t()), match=r"linear.*'weight'.*\(5, 3\).*K = 5")
    yield ErrorSample("weight_1d", (x, weight[0]), match=r"linear.*'weight'.*\(5,\).*\(N, K\)")
    yield ErrorSample("x_0d", (x[0, 0], weight), match=r"linear.*'x'.*no dims")
    yield ErrorSample("weight_dtype", (x, weight.half()), error=TypeError, match="linear.*'weight'.*float16.*float32")
    yield ErrorSample("bias_dtype", (x, weight, bias.half()), error=TypeError, match="linear.*'bias'.*float16.*float32")
    yield ErrorSample("bias_shape", (x, weight, x[0]), match=r"linear.*'bias'.*\(5,\).*\(3,\)")
    yield ErrorSample(
        "activation", (x, weight, bias, "swish"), match="linear.*'activation'.*swish.*'gelu_tanh', 'silu'"
    )


def linear_bench_cases() -> Iterator[BenchCase]:
    def case(M: int, N: int, K: int, activation: str = "none", passes: tuple[str, ...] = ("fwd",)) -> BenchCase:
        def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype)
            if activation == "none":
                return (x, weight), {}
            return (x, weight, torch.randn(N, device=device, dtype=dtype), activation), {}

        return BenchCase(f"{M}x{N}x{K}" + ("" if activation == "none" else f"_bias_{activation}"), make, passes=passes)

    yield case(8192, 8192, 8192)
    yield case(4096, 4096, 4096, passes=("fwd", "fwdbwd"))
    yield case(8192, 14336, 4096, passes=("fwd", "fwdbwd"))
    yield case(8192, 4096, 14336)
    yield case(16, 14336, 4096)
    yield case(1, 14336, 4096)
    yield case(8192, 14336, 4096, "gelu_tanh", passes=("fwd", "fwdbwd"))


def linear_cost(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> Cost:
    size = x.element_size()
    M, N = math.prod(x.shape[:-1]), weight.shape[0]
    flops = 2 * M * N * weight.shape[1]
    operands = (x.numel() + weight.numel() + (0 if bias is None else N)) * size
    kept = 0 if activation == "none" else M * N * size  # the backward reads z, or relu's output
    return Cost(flops, operands + M * N * size, 2 * flops, 2 * operands + M * N * size + kept)
