"""Matrix multiplication: `matmul`, and `linear` with bias and activation fused into the epilogue.

matmul: out[..., m, n] = sum_k a[..., m, k] * b[..., k, n]
linear: y[..., n] = activation(sum_k x[..., k] * weight[n, k] + bias[n])

| tensor | shape | dtype |
|---|---|---|
| a | (..., M, K) | float32, float16, bfloat16 |
| b | (..., K, N), its batch dims broadcast against a's | that of a |
| x | (..., K), one or more dims | float32, float16, bfloat16 |
| weight | (N, K) | that of x |
| bias | (N,) or None | that of x |
| activation | "none", "relu", "gelu" (erf), "gelu_tanh", "silu" | |

Accumulation, bias and activation are in float32; the result is rounded once, to the input's dtype. float32 inputs
follow `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul`: TF32 only where torch would use it.
Results do not depend on the order in which programs run: split-K adds its partial products in a second kernel.

Two kernels do the work. On compute capability 9.0 and up, operands whose rows are 16-byte aligned are fetched by TMA;
anything else (Ampere, odd strides, batches, the interpreter) takes the portable kernel, which reads any strides.

Raises ValueError for a 1-D operand, sizes that do not match, an unknown activation; TypeError for dtypes that differ.

Sources: L2-friendly tile order, https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html;
GELU, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

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
def _matmul_tma_load(desc, off, k, K_MAJOR: tl.constexpr):
    """(ROWS, BLOCK_K) of an operand. TMA wants a contiguous last dim: the other order is transposed after the load."""
    if K_MAJOR:
        return desc.load([off, k])
    else:
        return desc.load([k, off]).T


@triton.jit
def _matmul_tma_product(
    a_desc,
    b_desc,
    off_m,
    off_n,
    k_first,
    span,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, span, BLOCK_K):
        a = _matmul_tma_load(a_desc, off_m, k_first + k, A_K_MAJOR)  # (BLOCK_M, BLOCK_K)
        b = _matmul_tma_load(b_desc, off_n, k_first + k, B_K_MAJOR)  # (BLOCK_N, BLOCK_K)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


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
    bias_ptr,
    out,
    z_out,
    M,
    N,
    K,
    K_SPLIT,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """2-D product with TMA loads (zeros beyond the edges). out, z_out: descriptors if TMA_STORE, else pointers."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if PERSISTENT:
        # flatten: the next tile's loads start while this tile is stored
        for tile in tl.range(pid, tiles, tl.num_programs(0), flatten=True):
            pid_m, pid_n = _matmul_tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            off_m = pid_m * BLOCK_M
            off_n = pid_n * BLOCK_N
            acc = _matmul_tma_product(
                a_desc, b_desc, off_m, off_n, 0, K,
                BLOCK_M, BLOCK_N, BLOCK_K, A_K_MAJOR, B_K_MAJOR, PRECISION, UPCAST,
            )  # fmt: skip
            _matmul_tma_finish(
                acc, bias_ptr, out, z_out, off_m, off_n, M, N,
                BLOCK_M, BLOCK_N, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE, HALVES,
            )  # fmt: skip
    else:
        split = pid // tiles
        k_first = split * K_SPLIT
        # tl.assume with range(0, span) keeps ptxas from serialising wgmma (its warning C7515)
        span = min(K - k_first, K_SPLIT) if SPLIT_K > 1 else K
        tl.assume(span > 0)
        pid_m, pid_n = _matmul_tile_of(pid % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        off_m = pid_m * BLOCK_M
        off_n = pid_n * BLOCK_N
        acc = _matmul_tma_product(
            a_desc, b_desc, off_m, off_n, k_first, span,
            BLOCK_M, BLOCK_N, BLOCK_K, A_K_MAJOR, B_K_MAJOR, PRECISION, UPCAST,
        )  # fmt: skip
        if SPLIT_K > 1:  # partial products go to (SPLIT_K, M, N) by pointer
            out += split.to(tl.int64) * M * N
        _matmul_tma_finish(
            acc, bias_ptr, out, z_out, off_m, off_n, M, N,
            BLOCK_M, BLOCK_N, HAS_BIAS, ACTIVATION, STORE_Z, TMA_STORE, HALVES,
        )  # fmt: skip


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


def _matmul_split(tiles: int, K: int, block_k: int, sms: int) -> int:
    """How many programs share the K loop of a tile: enough to fill the GPU, each with at least four steps."""
    steps = cdiv(K, block_k)
    if 2 * tiles > sms or steps < 8:
        return 1
    per_part = cdiv(steps, min(2 * sms // tiles, steps // 4, 32))
    return cdiv(steps, per_part)  # no part is empty


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
    target: int,
    sms: int,
) -> _MatmulConfig:
    """The launch configuration for a shape. Candidates are (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    if itemsize == 4 and precision == "ieee":
        # CUDA cores: operands and accumulator are registers, which limits the tile.
        tiles = ((64, 64, 16, 4, 3), (32, 32, 16, 4, 3)) if min(M, N) > 32 else ((32, 32, 32, 4, 3),)
    elif min(M, N) <= 64:
        # Decoding: bound by the bandwidth of the longer operand. One block covers the short side; blocks of 64 on the
        # long side make many programs, whose stages together keep 100 KB or more per SM in flight. Without TMA the
        # pointers of a longer BLOCK_K would spill.
        short = 16 if min(M, N) <= 16 else 32 if min(M, N) <= 32 else 64
        block_k = (256 if tma else 128 if aligned else 64) // itemsize
        stages = 3 if short == 64 or itemsize == 4 else 5
        tiles = ((short, 64, block_k, 4, stages),) if M <= N else ((64, short, block_k, 4, stages),)
    elif tma:
        # A stage of the widest tile is 48 KB, its accumulator 128 registers a thread. 128-byte rows are a swizzle atom.
        block_k = 128 // itemsize
        tiles = (
            (128, 256, block_k, 8, 3),
            (128, 128, block_k, 8, 4),
            (64, 128, block_k, 4, 4),
            (64, 64, block_k, 4, 4),
        )
    else:
        # Without 16-byte loads every element has a pointer of its own: a shorter block leaves registers for them.
        block_k = (128 if aligned else 64) // itemsize
        tiles = ((128, 128, block_k, 8, 3), (64, 128, block_k, 4, 3), (64, 64, block_k, 4, 4))

    # Useful share of all the slots in all waves, weighted by what a tile can reach: larger ones reuse more.
    def score(tile: tuple[int, ...]) -> float:
        block_m, block_n = tile[:2]
        waves = cdiv(cdiv(M, block_m) * cdiv(N, block_n) * batches, sms)
        return M * N * batches / (waves * sms * block_m * block_n) * (block_m * block_n) ** 0.25

    best = max(tiles, key=score)
    count = cdiv(M, best[0]) * cdiv(N, best[1]) * batches
    split_k = _matmul_split(count, K, best[2], sms)
    wide = tma and best[1] == 256
    if wide and itemsize == 2 and split_k == 1:
        # One program per SM that loops over the tiles, so that the next tile's loads run under this one's epilogue; stored in
        # halves, because a whole tile leaves no shared memory for the fourth stage. On an H200, against cuBLAS in the same
        # process: 1.02x at 8192^3, 1.01x at 4096^3; one program per tile gave 1.00x and 0.96x.
        return _MatmulConfig(*best[:4], 4, split_k=1, persistent=True, halves=True)
    # The accumulator's 128 registers a thread leave few for an activation, and none for a float32 tile's store.
    return _MatmulConfig(*best, split_k=split_k, halves=wide and (activation != "none" or itemsize == 4))


def _matmul_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: what torch would use on CUDA. Half precision ignores it."""
    if dtype != torch.float32:
        return "tf32"
    settings = torch.backends.cuda.matmul
    # torch >= 2.9 has fp32_precision, and raises on the older names once a program has set it
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if tf32 else "ieee"


def _matmul_tma_view(x: torch.Tensor) -> torch.Tensor | None:
    """The 2-D tensor or its transpose, whichever TMA can read; None if it can read neither."""
    return next((view for view in (x, x.t()) if can_describe(view)), None)


def _matmul_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    z: torch.Tensor | None = None,
    config: _MatmulConfig | None = None,
) -> None:
    """out = activation(a @ b + bias), and z = a @ b + bias if z is given.

    a (B1, B2, M, K), b (B1, B2, K, N): any strides; out, z: contiguous, B1 * B2 * M * N elements.
    `config` overrides the heuristic (tuning).
    """
    B1, B2, M, K = a.shape
    N = b.shape[3]
    B = B1 * B2
    NUMEL = B * M * N
    if NUMEL == 0:
        return
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation, "STORE_Z": z is not None}
    if K == 0:
        _matmul_reduce(out, out, 0, N, bias, z, epilogue)
        return
    # With no contiguous dim every load would be a scattered one: a copy costs less than the product.
    a, b = (t if 1 in t.stride()[2:] else t.contiguous() for t in (a, b))
    precision = _matmul_precision(a.dtype)
    target, sms = capability(a.device), sm_count(a.device)
    # Views of A as (M, K) or (K, M) and of B as (N, K) or (K, N), whichever has contiguous, 16-byte aligned rows.
    a_view, b_view = _matmul_tma_view(a[0, 0]), _matmul_tma_view(b[0, 0].t())
    aligned = a_view is not None and b_view is not None
    a_k_major = aligned and a_view.stride() == a.stride()[2:]
    b_k_major = aligned and b_view.stride() == b.mT.stride()[2:]
    tma = aligned and target >= 90 and B == 1 and max(M, N, K) < 2**31
    if a.dtype == torch.float32:
        tma = (
            tma and precision == "tf32" and a_k_major and b_k_major
        )  # wgmma takes 4-byte operands with K contiguous only
    if config is None:
        vectors = (
            aligned and K % 16 == 0 and all(s * a.element_size() % 16 == 0 for t in (a, b) for s in t.stride()[:2])
        )
        config = _matmul_config(M, N, K, B, a.element_size(), precision, tma or vectors, tma, activation, target, sms)

    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    split = config.split_k
    k_split = cdiv(cdiv(K, block_k), split) * block_k
    partial = out if split == 1 else out.new_empty((split, NUMEL), dtype=torch.float32)
    shared = {
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
    if tma:
        out_arg = partial
        tma_store = split == 1 and can_describe(out.view(M, N))  # z has out's shape, and both are new
        if tma_store:
            out_block = (block_m, block_n // 2 if config.halves else block_n)
            out_arg = descriptor(out.view(M, N), out_block)
            z_arg = None if z is None else descriptor(z.view(M, N), out_block)
        launch(
            _matmul_tma_kernel,
            (min(tiles, sms) if config.persistent else tiles * split,),
            descriptor(a_view, (block_m, block_k) if a_k_major else (block_k, block_m)),
            descriptor(b_view, (block_n, block_k) if b_k_major else (block_k, block_n)),
            bias_arg,
            out_arg,
            z_arg,
            M,
            N,
            K,
            k_split,
            A_K_MAJOR=a_k_major,
            B_K_MAJOR=b_k_major,
            TMA_STORE=tma_store,
            HALVES=config.halves,
            PERSISTENT=config.persistent,
            **shared,
        )
    else:
        launch(
            _matmul_kernel,
            (tiles * split * B,),
            a,
            b,
            bias_arg,
            partial,
            z_arg,
            M,
            N,
            K,
            k_split,
            B,
            B2,
            *a.stride(),
            *b.stride(),
            EVEN_K=K % block_k == 0,
            **shared,
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
    if math.prod(b.shape[:-2]) == 1:
        # One matrix b: a's leading dims are the rows of one product (a view, or a copy, which costs less than it).
        _matmul_gemm(a.reshape(1, 1, math.prod(a.shape[:-1]), a.shape[-1]), b.reshape(1, 1, *b.shape[-2:]), out)
    else:
        _matmul_gemm(*_matmul_batches(a, b), out)
    return out


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
    N, K = weight.shape
    rows = x.reshape(1, 1, math.prod(x.shape[:-1]), K)
    bias = None if bias is None else bias.contiguous()
    _matmul_gemm(rows, weight.t().reshape(1, 1, K, N), y, bias, activation, z)


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
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


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
