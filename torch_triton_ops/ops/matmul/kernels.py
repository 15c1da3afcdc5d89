"""The Triton kernels of matmul, bmm and linear."""

from __future__ import annotations

import triton
import triton.language as tl


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
