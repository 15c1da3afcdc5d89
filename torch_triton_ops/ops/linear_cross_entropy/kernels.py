"""The Triton kernels of linear_cross_entropy and linear_logprob: three products with their epilogues, and what stands between.

Rows are worked on in compact order: those that count, first to last, as `index` lists them; how many there are is a number
on the GPU, `count`, that every kernel reads, so that rows ignored cost nothing and nobody waits. A chunk holds the compact
rows `first` to `first + R`.

`coef` (6, R), fp32, says what the gradient of a row is, with p = exp(z - row_max - log_sum):
dz[c] = p[c] * (F + E * log p[c]) - O * [c == label] - S
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lce_tanh(u):
    # 1 - 2 / (exp(2u) + 1) is right in absolute terms everywhere, in relative terms away from 0: Taylor there
    u2 = u * u
    near = u * (1.0 + u2 * (-1.0 / 3.0 + u2 * (2.0 / 15.0 + u2 * (-17.0 / 315.0 + u2 * (62.0 / 2835.0)))))
    return tl.where(u2 < 0.09, near, 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))


@triton.jit
def _lce_rows_in_chunk(count_ptr, first, R):
    """How many of the chunk's R rows there are."""
    return tl.minimum(tl.maximum(tl.load(count_ptr) - first, 0), R)


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _lce_index_kernel(target_ptr, index_ptr, count_ptr, divisor_ptr, M, ignore_index, BLOCK_M: tl.constexpr):
    """One program lists the rows that count, in order, and their number."""
    offs = tl.arange(0, BLOCK_M)
    total = 0
    for start in range(0, M, BLOCK_M):
        mask = start + offs < M
        target = tl.load(target_ptr + start + offs, mask=mask, other=0)
        active = (mask & (target != ignore_index)).to(tl.int32)
        place = total + tl.cumsum(active, axis=0) - active
        tl.store(index_ptr + place, start + offs, mask=active != 0)
        total += tl.sum(active, axis=0)
    tl.store(count_ptr, total)
    tl.store(divisor_ptr, tl.cast(total, tl.float32))


@triton.jit
def _lce_gather_kernel(
    hidden_ptr,
    target_ptr,
    index_ptr,
    count_ptr,
    rows_ptr,
    label_ptr,
    first,
    R,
    H,
    V,
    stride_hm,
    stride_hh,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_M rows of the chunk: hidden states, contiguous, and classes (-1: out of range). Zeros past the last row."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_h = tl.arange(0, BLOCK_H)
    mask_m = offs_m < R
    active = mask_m & (first + offs_m < tl.load(count_ptr))
    row = tl.load(index_ptr + first + offs_m, mask=active, other=0).to(tl.int64)
    target = tl.load(target_ptr + row, mask=active, other=-1)
    tl.store(label_ptr + offs_m, tl.where((target >= 0) & (target < V), target, -1).to(tl.int32), mask=mask_m)
    source = hidden_ptr + row * stride_hm
    out = rows_ptr + offs_m.to(tl.int64) * H
    for h in range(0, H, BLOCK_H):
        mask_h = (h + offs_h < H)[None, :]
        offs = (h + offs_h).to(tl.int64)[None, :] * stride_hh
        x = tl.load(source[:, None] + offs, mask=active[:, None] & mask_h, other=0.0)  # (BLOCK_M, BLOCK_H)
        tl.store(out[:, None] + (h + offs_h)[None, :], x, mask=mask_m[:, None] & mask_h)


@triton.jit
def _lce_rows_kernel(
    part_ptr,
    logits_ptr,
    z_target_ptr,
    label_ptr,
    index_ptr,
    count_ptr,
    divisor_ptr,
    out_ptr,
    entropy_ptr,
    lse_ptr,
    coef_ptr,
    first,
    V,
    TILES,
    R,
    stride_lm,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    HAS_COEF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The tiles' statistics, (2 or 3, TILES, R), made one per row; the row's loss, or its log-probability and entropy."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    offs_t = tl.arange(0, BLOCK_T)
    rows = _lce_rows_in_chunk(count_ptr, first, R)
    active = offs_r < rows
    m = tl.full((BLOCK_T, BLOCK_R), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)  # sum of z for SMOOTHING, of exp(z - shift) * (z - shift) for ENTROPY
    tiles = tl.where(tl.program_id(0) * BLOCK_R < rows, TILES, 0)
    plane = tl.cast(TILES, tl.int64) * R
    for start in range(0, tiles, BLOCK_T):
        mask = (start + offs_t < TILES)[:, None] & active[None, :]
        ptrs = part_ptr + (start + offs_t).to(tl.int64)[:, None] * R + offs_r[None, :]
        m_tile = tl.load(ptrs, mask=mask, other=float("-inf"))
        s_tile = tl.load(ptrs + plane, mask=mask, other=0.0)
        m_new = tl.maximum(m, m_tile)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        # of -inf nothing has been summed
        left = tl.where(m == float("-inf"), 0.0, m - shift)
        right = tl.where(m_tile == float("-inf"), 0.0, m_tile - shift)
        if ENTROPY:
            u_tile = tl.load(ptrs + 2 * plane, mask=mask, other=0.0)
            u = tl.exp(left) * (u + s * left) + tl.exp(right) * (u_tile + s_tile * right)
        if SMOOTHING != 0.0:
            u += tl.load(ptrs + 2 * plane, mask=mask, other=0.0)
        s = s * tl.exp(left) + s_tile * tl.exp(right)
        m = m_new
    row_max = tl.max(m, axis=0)  # (BLOCK_R,)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    left = tl.where(m == float("-inf"), 0.0, m - row_max[None, :])
    s_row = tl.sum(s * tl.exp(left), axis=0)
    log_sum = tl.log(s_row)
    row = tl.load(index_ptr + first + offs_r, mask=active, other=0).to(tl.int64)
    label = tl.load(label_ptr + offs_r, mask=active, other=-1)
    known = active & (label >= 0)
    if HAS_LOGITS:
        z_target = tl.load(logits_ptr + offs_r.to(tl.int64) * stride_lm + label, mask=known, other=0.0).to(tl.float32)
        if SOFTCAP != 0.0:
            z_target = SOFTCAP * _lce_tanh(z_target * (1.0 / SOFTCAP))
    else:
        z_target = tl.load(z_target_ptr + offs_r, mask=known, other=0.0)
    # a class out of range makes NaN of everything that is its row's
    one = tl.where(label >= 0, 1.0, float("nan"))
    tl.store(lse_ptr + 2 * row, row_max, mask=active)
    tl.store(lse_ptr + 2 * row + 1, log_sum, mask=active)
    # not lse - z_target: for logits far from 0 the first difference is exact, the rounding of lse is not
    loss = one * ((row_max - z_target) + log_sum)
    if ENTROPY:
        u_row = tl.sum(tl.exp(left) * (u + s * left), axis=0)
        tl.store(out_ptr + row, -loss, mask=active)
        tl.store(entropy_ptr + row, log_sum - u_row / s_row, mask=active)
    else:
        lse = row_max + log_sum
        if SMOOTHING != 0.0:
            loss = (1.0 - SMOOTHING) * loss + SMOOTHING * (lse - tl.sum(u, axis=0) / V)
        if Z_LOSS != 0.0:
            loss += Z_LOSS * lse * lse
        tl.store(out_ptr + row, loss, mask=active)
    if HAS_COEF:
        g = one
        if HAS_DIVISOR:
            g = g / tl.load(divisor_ptr)
        _lce_store_coef(
            coef_ptr, offs_r, R, active, row_max, log_sum, g * (1.0 + 2.0 * Z_LOSS * (row_max + log_sum)), 0.0 * g,
            g * (1.0 - SMOOTHING), g * (SMOOTHING / V),
        )  # fmt: skip


@triton.jit
def _lce_store_coef(coef_ptr, offs_r, R, active, row_max, log_sum, F, E, O, S):
    """Zeros past the last row: its gradient is zero then."""
    mask = offs_r < R
    tl.store(coef_ptr + offs_r, tl.where(active, row_max, 0.0), mask=mask)
    tl.store(coef_ptr + R + offs_r, tl.where(active, log_sum, 0.0), mask=mask)
    tl.store(coef_ptr + 2 * R + offs_r, tl.where(active, F, 0.0), mask=mask)
    tl.store(coef_ptr + 3 * R + offs_r, tl.where(active, E, 0.0), mask=mask)
    tl.store(coef_ptr + 4 * R + offs_r, tl.where(active, O, 0.0), mask=mask)
    tl.store(coef_ptr + 5 * R + offs_r, tl.where(active, S, 0.0), mask=mask)


@triton.jit
def _lce_coef_kernel(
    grad_ptr,
    grad_entropy_ptr,
    lse_ptr,
    entropy_ptr,
    divisor_ptr,
    label_ptr,
    index_ptr,
    count_ptr,
    coef_ptr,
    V,
    R,
    stride_g,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The rows' coefficients, from upstream gradients and what the forward saved."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    active = offs_r < tl.load(count_ptr)
    row = tl.load(index_ptr + offs_r, mask=active, other=0).to(tl.int64)
    label = tl.load(label_ptr + offs_r, mask=active, other=0)
    one = tl.where(label >= 0, 1.0, float("nan"))
    row_max = tl.load(lse_ptr + 2 * row, mask=active, other=0.0)
    log_sum = tl.load(lse_ptr + 2 * row + 1, mask=active, other=0.0)
    g = one * tl.load(grad_ptr + row * stride_g, mask=active, other=0.0).to(tl.float32)
    if ENTROPY:
        g = g * (1.0 / TEMPERATURE)
        ge = tl.load(grad_entropy_ptr + row, mask=active, other=0.0).to(tl.float32) * (1.0 / TEMPERATURE)
        entropy = tl.load(entropy_ptr + row, mask=active, other=0.0)
        _lce_store_coef(coef_ptr, offs_r, R, active, row_max, log_sum, -g - ge * entropy, -ge, -g, 0.0 * g)
    else:
        if HAS_DIVISOR:
            g = g / tl.load(divisor_ptr)
        _lce_store_coef(
            coef_ptr, offs_r, R, active, row_max, log_sum, g * (1.0 + 2.0 * Z_LOSS * (row_max + log_sum)), 0.0 * g,
            g * (1.0 - SMOOTHING), g * (SMOOTHING / V),
        )  # fmt: skip


@triton.jit
def _lce_reduce_kernel(rows_ptr, divisor_ptr, loss_ptr, M, HAS_DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr):
    """One program adds the rows' losses, always in the same order."""
    offs = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        acc += tl.load(rows_ptr + start + offs, mask=start + offs < M, other=0.0)
    total = tl.sum(acc, axis=0)
    if HAS_DIVISOR:
        total = total / tl.load(divisor_ptr)
    tl.store(loss_ptr, total)


# --------------------------------------------------------------------------------------------------------------------
# The gradient of logits
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _lce_dlogits(
    z,
    label,
    offs_v,
    row_max,
    log_sum,
    F,
    E,
    O,
    S,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """The module's formula for logits z (rows, columns) before softcap and temperature; the rest is by row, (rows,)."""
    if SOFTCAP != 0.0:
        t = _lce_tanh(z * (1.0 / SOFTCAP))
        z = SOFTCAP * t
    if TEMPERATURE != 1.0:
        z = z * (1.0 / TEMPERATURE)
    # the first difference is exact near the maximum, where p is large; the rounding of lse would cost digits
    log_p = (z - row_max[:, None]) - log_sum[:, None]
    p = tl.exp(log_p)
    if ENTROPY:
        # 0 * log 0 is 0
        dz = p * (F[:, None] + E[:, None] * tl.where(p > 0.0, log_p, 0.0))
    else:
        dz = p * F[:, None]
    dz -= tl.where(offs_v[None, :] == label[:, None], O[:, None], 0.0)
    if SMOOTHING != 0.0:
        dz -= S[:, None]
    if SOFTCAP != 0.0:
        dz *= 1.0 - t * t
    return dz


@triton.jit
def _lce_dlogits_kernel(
    logits_ptr,
    label_ptr,
    coef_ptr,
    count_ptr,
    first,
    V,
    R,
    stride_lm,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Replace a tile of logits by its gradient. Rows past the last, up to a multiple of ROWS, become zeros."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(V, BLOCK_V)
    offs_m = (pid // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_v = (pid % tiles) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    rows = _lce_rows_in_chunk(count_ptr, first, R)
    padded = tl.maximum(tl.cdiv(rows, ROWS), 1) * ROWS
    ptrs = logits_ptr + offs_m.to(tl.int64)[:, None] * stride_lm + offs_v[None, :]
    mask_v = (offs_v < V)[None, :]
    active = offs_m < rows
    z = tl.load(ptrs, mask=active[:, None] & mask_v, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_V)
    label = tl.load(label_ptr + offs_m, mask=active, other=-1)
    coef = coef_ptr + offs_m
    dz = _lce_dlogits(
        z, label, offs_v,
        tl.load(coef, mask=active, other=0.0),
        tl.load(coef + R, mask=active, other=0.0),
        tl.load(coef + 2 * R, mask=active, other=0.0),
        tl.load(coef + 3 * R, mask=active, other=0.0),
        tl.load(coef + 4 * R, mask=active, other=0.0),
        tl.load(coef + 5 * R, mask=active, other=0.0),
        SMOOTHING, SOFTCAP, 1.0, False,
    )  # fmt: skip
    dz = tl.where(active[:, None], dz, 0.0)
    tl.store(ptrs, dz.to(logits_ptr.dtype.element_ty), mask=(offs_m < padded)[:, None] & mask_v)


@triton.jit
def _lce_dbias_kernel(
    dlogits_ptr,
    count_ptr,
    dbias_ptr,
    first,
    V,
    R,
    stride_lm,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Column sums of a chunk, added to those of the chunks before."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    offs_m = tl.arange(0, BLOCK_M)
    mask_v = offs_v < V
    rows = _lce_rows_in_chunk(count_ptr, first, R)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for m in range(0, rows, BLOCK_M):
        ptrs = dlogits_ptr + (m + offs_m).to(tl.int64)[:, None] * stride_lm + offs_v[None, :]
        acc += tl.load(ptrs, mask=(m + offs_m < rows)[:, None] & mask_v[None, :], other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0)
    if ADD:
        total += tl.load(dbias_ptr + offs_v, mask=mask_v, other=0.0)
    tl.store(dbias_ptr + offs_v, total, mask=mask_v)


@triton.jit
def _lce_scatter_kernel(
    part_ptr,
    index_ptr,
    count_ptr,
    dhidden_ptr,
    first,
    R,
    H,
    PARTS,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rows of (PARTS, R, H) partial products, added up, to where they came from."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # (BLOCK_H,)
    active = offs_m < _lce_rows_in_chunk(count_ptr, first, R)
    mask = active[:, None] & (offs_h < H)[None, :]
    row = tl.load(index_ptr + first + offs_m, mask=active, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    ptrs = part_ptr + offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    for _ in range(PARTS):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += tl.cast(R, tl.int64) * H
    out = dhidden_ptr + row[:, None] * H + offs_h[None, :]
    tl.store(out, acc.to(dhidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lce_scale_kernel(grad_ptr, x_ptr, NUMEL, BLOCK: tl.constexpr):
    """x *= grad in place. A gradient of exactly 1, what `loss.backward()` sends, costs a look at it."""
    g = tl.load(grad_ptr).to(tl.float32)
    if g != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, NUMEL, step):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < NUMEL
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(x_ptr + offs, (x * g).to(x_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _lce_tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    # Columns of GROUP_M tiles: programs that run at the same time share rows of A and columns of B, which stay in L2.
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    in_group = tile % per_group
    return first_m + in_group % rows, in_group // rows


@triton.jit
def _lce_halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    HALF: tl.constexpr = BLOCK_N // 2
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, HALF)), (0, 2, 1)))


@triton.jit
def _lce_put(x, out, off_m, off_n, M, N, stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """Store a tile: out is a descriptor of its shape, or a pointer."""
    if TMA:
        out.store([off_m, off_n], x.to(out.dtype))
    else:
        offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        offs_n = off_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        ptrs = out + offs_m.to(tl.int64)[:, None] * stride_m + offs_n[None, :]
        tl.store(ptrs, x.to(out.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _lce_get(src, off_m, off_n, M, N, stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = off_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    ptrs = src + offs_m.to(tl.int64)[:, None] * stride_m + offs_n[None, :]
    return tl.load(ptrs, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _lce_statistics(
    z,
    label,
    off_n,
    N,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    STORE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """By row of a tile: maximum, sum of exponentials, a third sum where one is asked for, the target's logit if it is here."""
    offs_n = off_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    if SOFTCAP != 0.0:
        z = SOFTCAP * _lce_tanh(z * (1.0 / SOFTCAP))
    if TEMPERATURE != 1.0:
        z = z * (1.0 / TEMPERATURE)
    if STORE:
        z_target = tl.zeros_like(label).to(tl.float32)
    else:
        z_target = tl.sum(tl.where(offs_n[None, :] == label[:, None], z, 0.0), axis=1)
    if SMOOTHING != 0.0:
        third = tl.sum(z if EVEN_N else tl.where(offs_n[None, :] < N, z, 0.0), axis=1)
    if not EVEN_N:
        z = tl.where(offs_n[None, :] < N, z, float("-inf"))
    m = tl.max(z, axis=1)
    # while all is -inf, subtract 0: -inf - -inf would be NaN
    z = z - tl.where(m == float("-inf"), 0.0, m)[:, None]
    e = tl.exp(z)
    s = tl.sum(e, axis=1)
    if ENTROPY:
        third = tl.sum(tl.where(e > 0.0, e * z, 0.0), axis=1)
    elif SMOOTHING == 0.0:
        third = s
    return m, s, third, z_target


@triton.jit
def _lce_finish_statistics(
    acc,
    out,
    bias_ptr,
    label_ptr,
    part_ptr,
    z_target_ptr,
    off_m,
    off_n,
    tile_n,
    tiles_n,
    M,
    N,
    R,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    EVEN_N: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA_OUT: tl.constexpr,
):
    """Store a tile of logits, if asked for, and its statistics; one half of the columns after the other, to save registers."""
    HALF: tl.constexpr = BLOCK_N // 2
    offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    mask_m = offs_m < R
    label = tl.load(label_ptr + offs_m, mask=mask_m, other=-1)
    left, right = _lce_halves(acc, BLOCK_M, BLOCK_N)
    left = _lce_logits(left, out, bias_ptr, off_m, off_n, M, N, stride_om, BLOCK_M, HALF, HAS_BIAS, STORE, TMA_OUT)
    m0, s0, third0, z_target0 = _lce_statistics(
        left, label, off_n, N, HALF, EVEN_N, STORE, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY
    )
    right = _lce_logits(
        right, out, bias_ptr, off_m, off_n + HALF, M, N, stride_om, BLOCK_M, HALF, HAS_BIAS, STORE, TMA_OUT
    )
    m1, s1, third1, z_target1 = _lce_statistics(
        right, label, off_n + HALF, N, HALF, EVEN_N, STORE, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY
    )
    m = tl.maximum(m0, m1)
    # of -inf nothing has been summed
    left0 = tl.where(m0 == float("-inf"), 0.0, m0 - m)
    left1 = tl.where(m1 == float("-inf"), 0.0, m1 - m)
    part_ptr += tl.cast(tile_n, tl.int64) * R + offs_m
    plane = tl.cast(tiles_n, tl.int64) * R
    tl.store(part_ptr, m, mask=mask_m)
    tl.store(part_ptr + plane, s0 * tl.exp(left0) + s1 * tl.exp(left1), mask=mask_m)
    if ENTROPY:
        third = tl.exp(left0) * (third0 + s0 * left0) + tl.exp(left1) * (third1 + s1 * left1)
        tl.store(part_ptr + 2 * plane, third, mask=mask_m)
    if SMOOTHING != 0.0:
        tl.store(part_ptr + 2 * plane, third0 + third1, mask=mask_m)
    if not STORE:
        here = mask_m & (label >= off_n) & (label < off_n + BLOCK_N)
        tl.store(z_target_ptr + offs_m, z_target0 + z_target1, mask=here)


@triton.jit
def _lce_logits(
    acc,
    out,
    bias_ptr,
    off_m,
    off_n,
    M,
    N,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    TMA_OUT: tl.constexpr,
):
    """A tile of logits: with their bias and, if they are stored, as they are stored, for that is what the gradient sees."""
    if HAS_BIAS:
        offs_n = off_n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if STORE:
        stored = acc.to(out.dtype if TMA_OUT else out.dtype.element_ty)
        _lce_put(stored, out, off_m, off_n, M, N, stride_om, BLOCK_M, BLOCK_N, TMA_OUT)
        acc = stored.to(tl.float32)
    return acc


@triton.jit
def _lce_finish(
    acc,
    out,
    add,
    bias_ptr,
    label_ptr,
    coef_ptr,
    part_ptr,
    z_target_ptr,
    index_ptr,
    off_m,
    off_n,
    tile_n,
    tiles_n,
    rows,
    M,
    N,
    R,
    first,
    column,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    ADD: tl.constexpr,
    EVEN_N: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA_OUT: tl.constexpr,
):
    """What becomes of a tile of a product; see the launcher for the EPILOGUEs."""
    HALF: tl.constexpr = BLOCK_N // 2
    if EPILOGUE == "statistics":
        _lce_finish_statistics(
            acc, out, bias_ptr, label_ptr, part_ptr, z_target_ptr, off_m, off_n, tile_n, tiles_n, M, N, R, stride_om,
            BLOCK_M, BLOCK_N, HAS_BIAS, STORE, EVEN_N, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY, TMA_OUT,
        )  # fmt: skip
    elif EPILOGUE == "dlogits":
        left, right = _lce_halves(acc, BLOCK_M, BLOCK_N)
        _lce_finish_dlogits(
            left, out, bias_ptr, label_ptr, coef_ptr, off_m, off_n, rows, M, N, R, column, stride_om,
            BLOCK_M, HALF, HAS_BIAS, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY, TMA_OUT,
        )  # fmt: skip
        _lce_finish_dlogits(
            right, out, bias_ptr, label_ptr, coef_ptr, off_m, off_n + HALF, rows, M, N, R, column, stride_om,
            BLOCK_M, HALF, HAS_BIAS, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY, TMA_OUT,
        )  # fmt: skip
    elif EPILOGUE == "dweight":
        if ADD:
            # By pointer, so that all loads are under way together; in halves, for want of shared memory.
            left, right = _lce_halves(acc, BLOCK_M, BLOCK_N)
            left_add = _lce_get(add, off_m, off_n, M, N, stride_om, BLOCK_M, HALF)
            right_add = _lce_get(add, off_m, off_n + HALF, M, N, stride_om, BLOCK_M, HALF)
            _lce_put(left + left_add, out, off_m, off_n, M, N, stride_om, BLOCK_M, HALF, False)
            _lce_put(right + right_add, out, off_m, off_n + HALF, M, N, stride_om, BLOCK_M, HALF, False)
        else:
            left, right = _lce_halves(acc, BLOCK_M, BLOCK_N)
            _lce_put(left, out, off_m, off_n, M, N, stride_om, BLOCK_M, HALF, TMA_OUT)
            _lce_put(right, out, off_m, off_n + HALF, M, N, stride_om, BLOCK_M, HALF, TMA_OUT)
    else:
        # in quarters, for want of shared memory
        QUARTER: tl.constexpr = BLOCK_N // 4
        left, right = _lce_halves(acc, BLOCK_M, BLOCK_N)
        quarter0, quarter1 = _lce_halves(left, BLOCK_M, BLOCK_N // 2)
        quarter2, quarter3 = _lce_halves(right, BLOCK_M, BLOCK_N // 2)
        _lce_put_rows(
            quarter0, out, add, index_ptr, off_m, off_n, rows, N, first, BLOCK_M, QUARTER, EPILOGUE == "dhidden", ADD
        )
        off_n += QUARTER
        _lce_put_rows(
            quarter1, out, add, index_ptr, off_m, off_n, rows, N, first, BLOCK_M, QUARTER, EPILOGUE == "dhidden", ADD
        )
        off_n += QUARTER
        _lce_put_rows(
            quarter2, out, add, index_ptr, off_m, off_n, rows, N, first, BLOCK_M, QUARTER, EPILOGUE == "dhidden", ADD
        )
        off_n += QUARTER
        _lce_put_rows(
            quarter3, out, add, index_ptr, off_m, off_n, rows, N, first, BLOCK_M, QUARTER, EPILOGUE == "dhidden", ADD
        )


@triton.jit
def _lce_finish_dlogits(
    acc,
    out,
    bias_ptr,
    label_ptr,
    coef_ptr,
    off_m,
    off_n,
    rows,
    M,
    N,
    R,
    column,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA_OUT: tl.constexpr,
):
    z = _lce_logits(acc, out, bias_ptr, off_m, off_n, M, N, stride_om, BLOCK_M, BLOCK_N, HAS_BIAS, False, TMA_OUT)
    offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    mask_m = offs_m < rows
    label = tl.load(label_ptr + offs_m, mask=mask_m, other=-1)
    coef = coef_ptr + offs_m
    dz = _lce_dlogits(
        z, label, column + off_n + tl.arange(0, BLOCK_N),
        tl.load(coef, mask=mask_m, other=0.0),
        tl.load(coef + R, mask=mask_m, other=0.0),
        tl.load(coef + 2 * R, mask=mask_m, other=0.0),
        tl.load(coef + 3 * R, mask=mask_m, other=0.0),
        tl.load(coef + 4 * R, mask=mask_m, other=0.0),
        tl.load(coef + 5 * R, mask=mask_m, other=0.0),
        SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY,
    )  # fmt: skip
    _lce_put(tl.where(mask_m[:, None], dz, 0.0), out, off_m, off_n, M, N, stride_om, BLOCK_M, BLOCK_N, TMA_OUT)


@triton.jit
def _lce_put_rows(
    x,
    out,
    add,
    index_ptr,
    off_m,
    off_n,
    rows,
    N,
    first,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store rows where they are in the chunk, or, SCATTER, where they came from."""
    offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = off_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
    if SCATTER:
        row = tl.load(index_ptr + first + offs_m, mask=offs_m < rows, other=0).to(tl.int64)
    else:
        row = offs_m.to(tl.int64)
    offs = row[:, None] * N + offs_n[None, :]
    if ADD:
        x += tl.load(add + offs, mask=mask, other=0.0)
    tl.store(out + offs, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lce_extent(count_ptr, first, M, K, R, EPILOGUE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr):
    """Rows of the chunk; rows and inner dimension of its product. Rows are the inner dimension of dweight."""
    rows = _lce_rows_in_chunk(count_ptr, first, R)
    # whole ROWS, the last of which are zeros; one of them always, which makes the zeros of no rows at all
    padded = tl.maximum(tl.cdiv(rows, ROWS), 1) * ROWS
    if EPILOGUE == "dweight":
        K = padded
        if ADD:
            M = tl.where(rows > 0, M, 0)
    elif EPILOGUE == "dlogits":
        M = padded
    else:
        M = rows
    return rows, M, K


@triton.jit
def _lce_tma_kernel(
    a_desc,
    b_desc,
    out,
    add,
    bias_ptr,
    label_ptr,
    coef_ptr,
    part_ptr,
    z_target_ptr,
    index_ptr,
    count_ptr,
    M,
    N,
    K,
    K_SPLIT,
    R,
    first,
    column,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    ADD: tl.constexpr,
    EVEN_N: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA_OUT: tl.constexpr,
):
    """A product by TMA and tensor cores: one program per SM, which loops over its tiles."""
    rows, size_m, size_k = _lce_extent(count_ptr, first, M, K, R, EPILOGUE, ADD, ROWS)
    tiles_m = tl.cdiv(size_m, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    # flatten: the next tile's loads start while this tile is finished
    for work in tl.range(tl.program_id(0), tiles * SPLIT_K, tl.num_programs(0), flatten=True):
        tile = work % tiles if SPLIT_K > 1 else work
        pid_m, pid_n = _lce_tile_of(tile, tiles_m, tiles_n, GROUP_M)
        off_m = pid_m * BLOCK_M
        off_n = pid_n * BLOCK_N
        k_first = (work // tiles) * K_SPLIT if SPLIT_K > 1 else 0
        # a part may be empty: then one step of zeros, which TMA reads beyond the edge
        span = max(min(size_k - k_first, K_SPLIT), 1) if SPLIT_K > 1 else size_k
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, span, BLOCK_K):
            if A_K_MAJOR:
                a = a_desc.load([off_m, k_first + k])
            else:
                a = a_desc.load([k_first + k, off_m]).T  # (BLOCK_M, BLOCK_K)
            if B_K_MAJOR:
                b = b_desc.load([off_n, k_first + k]).T
            else:
                b = b_desc.load([k_first + k, off_n])  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc)
        tile_out = out + (work // tiles).to(tl.int64) * R * N if SPLIT_K > 1 else out
        tile_add = add + (work // tiles).to(tl.int64) * R * N if SPLIT_K > 1 and ADD else add
        _lce_finish(
            acc, tile_out, tile_add, bias_ptr, label_ptr, coef_ptr, part_ptr, z_target_ptr, index_ptr,
            off_m, off_n, pid_n, tiles_n, rows, M, N, R, first, column, stride_om, BLOCK_M, BLOCK_N, EPILOGUE,
            HAS_BIAS, STORE, ADD, EVEN_N, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY, TMA_OUT,
        )  # fmt: skip


@triton.jit
def _lce_gemm_kernel(
    a_ptr,
    b_ptr,
    out,
    add,
    bias_ptr,
    label_ptr,
    coef_ptr,
    part_ptr,
    z_target_ptr,
    index_ptr,
    count_ptr,
    M,
    N,
    K,
    K_SPLIT,
    R,
    first,
    column,
    stride_om,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    ADD: tl.constexpr,
    EVEN_N: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The same product from any strides: one tile per program."""
    rows, size_m, size_k = _lce_extent(count_ptr, first, M, K, R, EPILOGUE, ADD, ROWS)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    programs = tl.cdiv(M, BLOCK_M) * tiles_n
    split = pid // programs
    pid_m, pid_n = _lce_tile_of(pid % programs, tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    off_m = pid_m * BLOCK_M
    off_n = pid_n * BLOCK_N
    if off_m < size_m:
        offs_m = off_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        offs_n = off_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        mask_m = (offs_m < size_m)[:, None]
        mask_n = (offs_n < N)[None, :]
        k_first = split * K_SPLIT
        span = min(size_k - k_first, K_SPLIT)
        # int64: an operand may pass 2**31 elements along any dim
        k_int64 = (k_first + offs_k).to(tl.int64)
        a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am + k_int64[None, :] * stride_ak  # (BLOCK_M, BLOCK_K)
        b_ptrs = b_ptr + k_int64[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn  # (BLOCK_K, BLOCK_N)
        a_step = tl.full((), BLOCK_K, tl.int64) * stride_ak
        b_step = tl.full((), BLOCK_K, tl.int64) * stride_bk
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, span, BLOCK_K):
            mask_k = offs_k < span - k
            a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
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
        tile_out = out + split.to(tl.int64) * R * N if SPLIT_K > 1 else out
        tile_add = add + split.to(tl.int64) * R * N if SPLIT_K > 1 and ADD else add
        _lce_finish(
            acc, tile_out, tile_add, bias_ptr, label_ptr, coef_ptr, part_ptr, z_target_ptr, index_ptr,
            off_m, off_n, pid_n, tiles_n, rows, M, N, R, first, column, stride_om, BLOCK_M, BLOCK_N, EPILOGUE,
            HAS_BIAS, STORE, ADD, EVEN_N, SMOOTHING, SOFTCAP, TEMPERATURE, ENTROPY, False,
        )  # fmt: skip
