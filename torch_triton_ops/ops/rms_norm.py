"""Root-mean-square normalisation of rows.

rstd = 1 / sqrt(mean(x ** 2) + eps)
y    = x * rstd * (weight + weight_offset)

With g = dy * (weight + weight_offset) and xhat = x * rstd:

dx      = rstd * (g - xhat * mean(g * xhat))
dweight = sum over rows of dy * xhat

| tensor | shape | dtype |
|---|---|---|
| x | (..., N), any strides | float32, float16, bfloat16 |
| weight | (N,) or None (then 1, and weight_offset must be 0) | any of these, also another than x's |
| y | (..., N) contiguous | that of x, whatever weight's is |
| rstd | (...) | float32 |
| dx, dweight | those of x, weight | those of x, weight |

`weight_offset` is Gemma's 1.0. Statistics and arithmetic are in fp32, with one rounding at the store. Deterministic:
the gradient of weight is summed in a fixed order, without atomics.

Bytes: forward 2 * M * N * itemsize, backward 3 * M * N * itemsize. Raises ValueError for x without dimensions, a weight
of another shape, a negative eps and an offset without a weight.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch, next_power_of_2, sm_count

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    return rms_norm_fwd_reference(x, weight, eps, weight_offset)[0]


def rms_norm_fwd_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    xf = x.to(_statistics_dtype(x))
    rstd = torch.rsqrt(xf.square().mean(-1) + eps)
    y = xf * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_bwd_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = rms_norm_bwd_fake(dy, x, weight, rstd, weight_offset, needs)
    dyf, r = dy.to(rstd.dtype), rstd.unsqueeze(-1)
    xhat = x.to(rstd.dtype) * r
    if needs[0]:
        g = dyf if weight is None else dyf * (weight.to(rstd.dtype) + weight_offset)
        dx.copy_(r * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
    if needs[1]:
        dweight.copy_((dyf * xhat).sum(tuple(range(x.ndim - 1))) if x.ndim > 1 else dyf * xhat)
    return dx, dweight


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    M,
    N,
    stride_xm,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE_RSTD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M whole rows per program, held in registers between the reduction and the store: x is read once."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(
        tl.float32
    )  # (BLOCK_M, BLOCK_N)
    # Before the reduction: the weight then travels together with x. Every program reads it: keep it in the caches.
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + EPS)  # (BLOCK_M,)
    if STORE_RSTD:
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y = y * (weight + WEIGHT_OFFSET)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_fwd_wide_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    N,
    stride_xm,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STORE_RSTD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row per program, for rows that do not fit in registers: the second pass finds x in L2."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + offs_n, mask=offs_n < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
        acc += x * x
    rstd = 1.0 / tl.sqrt_rn(tl.sum(acc) / N + EPS)
    if STORE_RSTD:
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) * rstd
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            y = y * (weight + WEIGHT_OFFSET)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Persistent over blocks of whole rows; the weight's gradient stays in registers until the last one.

    partial_ptr: (programs, N) fp32, one row of sums per program.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    if HAS_WEIGHT and KEEP_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
    # Rows are summed within a thread as long as possible: two dimensions, and one reduction after the loop.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_m in tl.range(pid * BLOCK_M, M, programs * BLOCK_M, num_stages=STAGES):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )  # (BLOCK_M, BLOCK_N)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        if NEEDS_DWEIGHT:
            acc += dy * (x * rstd)
        if HAS_WEIGHT:
            if not KEEP_WEIGHT:  # the widest rows have no registers left for it
                weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(
                    tl.float32
                )
            dy = dy * (weight + WEIGHT_OFFSET)[None, :]
        mean = rstd * tl.sum(dy * x, axis=1, keep_dims=True) / N  # (BLOCK_M, 1)
        dx = rstd * (dy - x * (rstd * mean))
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DWEIGHT:
        tl.store(partial_ptr + pid.to(tl.int64) * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


@triton.jit
def _rms_norm_bwd_wide_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    N,
    stride_dym,
    stride_xm,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx of one row per program, for rows that do not fit in registers: the second pass finds x and dy in L2."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    dy_ptr += row * stride_dym
    dx_ptr += row * N
    rstd = tl.load(rstd_ptr + row)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        xhat = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32) * rstd
        g = tl.load(dy_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            g = g * (weight + WEIGHT_OFFSET)
        acc += g * xhat
    mean = tl.sum(acc) / N
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        xhat = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) * rstd
        g = tl.load(dy_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0, eviction_policy="evict_last").to(tl.float32)
            g = g * (weight + WEIGHT_OFFSET)
        dx = rstd * (g - xhat * mean)
        tl.store(dx_ptr + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _rms_norm_dweight_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    partial_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weight's gradient alone: program (i, j) sums every j-th block of rows of column block i."""
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_m in range(pid_m * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        acc += dy * (x * rstd)
    tl.store(partial_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(acc, axis=0), mask=mask_n)


@triton.jit
def _rms_norm_sum_kernel(partial_ptr, dweight_ptr, G, N, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr):
    """dweight[n] = sum over g of partial[g, n], in a fixed order."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for start in range(0, G, BLOCK_G):
        offs_g = start + tl.arange(0, BLOCK_G).to(tl.int64)  # (BLOCK_G,)
        mask = (offs_g < G)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptr + offs_g[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(dweight_ptr + offs_n, tl.sum(acc, axis=0).to(dweight_ptr.dtype.element_ty), mask=mask_n)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------

# A row of up to this many elements stays in registers; more would spill.
_MAX_ROW = 16384


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, N) with unit stride along N: a view where the strides allow it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _block_m(block_n: int) -> int:
    """Rows to fill a tile of 4096 elements; a row costs registers for its addresses, so not too many."""
    return min(max(4096 // block_n, 1), 64)


def _fwd_config(block_n: int) -> dict[str, int]:
    # A warp for every 1024 elements, four 16-byte loads in flight per thread; short rows share a program of two. On an
    # H200, 32768x1024: 4.07 TB/s, against 3.99 with 4 rows and 4 warps, and 3.27 with one row and one warp, because every
    # program of a dependent launch must wait for the kernel before it (bench/results/tuning/nvidia_h200/dependent_launch.json).
    block_m = min(max(2048 // block_n, 1), 64)
    num_warps = 4 if block_n < 1024 else max(block_n // 1024, 2)  # many short rows: their addresses would spill in two
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": min(num_warps, 16)}


def _bwd_config(N: int, itemsize: int) -> tuple[dict[str, Any], int] | None:
    """Constexprs and options, and programs per SM (each costs an fp32 row of partial sums). None: row too wide."""
    block_n = next_power_of_2(N)
    # Rows that no vector load fits need more registers: fewer warps, or another kernel.
    if block_n > _MAX_ROW or (block_n == _MAX_ROW and (itemsize != 2 or N % 8 != 0)):
        return None
    block_m = _block_m(block_n)
    tile_bytes = 2 * block_m * block_n * itemsize  # x and dy of one step, in shared memory
    config = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "KEEP_WEIGHT": block_n < _MAX_ROW,
        "STAGES": 3 if tile_bytes <= 32768 else 2,
        # H200: 4096 columns 3.65 TB/s with 4 or 8 warps, 1024 columns 3.73 with 4 and 3.57 with 8
        "num_warps": 4 if block_n <= 4096 and N % 8 == 0 else 8 if N % 8 != 0 else block_n // 512,
    }
    return config, 2 if tile_bytes <= 16384 else 1


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    y = rms_norm_fake(x, weight, eps, weight_offset)
    _launch_fwd(x, weight, eps, weight_offset, y, None)
    return y


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = rms_norm_fwd_fake(x, weight, eps, weight_offset)
    _launch_fwd(x, weight, eps, weight_offset, y, rstd)
    return y, rstd


def _launch_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    y: torch.Tensor,
    rstd: torch.Tensor | None,
) -> None:
    x = _rows(x)
    M, N = x.shape
    weight = None if weight is None else weight.contiguous()
    options = {
        "EPS": eps,
        "WEIGHT_OFFSET": weight_offset,
        "HAS_WEIGHT": weight is not None,
        "STORE_RSTD": rstd is not None,
    }
    block_n = next_power_of_2(N)
    if block_n <= _MAX_ROW:
        config = _fwd_config(block_n)
        grid = (cdiv(M, config["BLOCK_M"]),)
        launch(_rms_norm_fwd_kernel, grid, x, weight, y, rstd, M, N, x.stride(0), **options, **config)
    else:
        launch(
            _rms_norm_fwd_wide_kernel,
            (M,),
            x,
            weight,
            y,
            rstd,
            N,
            x.stride(0),
            **options,
            BLOCK_N=8192,
            num_warps=16,
        )


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """needs: whether dx, dweight are wanted; the other is an empty tensor."""
    dx, dweight = rms_norm_bwd_fake(dy, x, weight, rstd, weight_offset, needs)
    dy, x = _rows(dy), _rows(x)
    M, N = x.shape
    narrow = _bwd_config(N, x.element_size())
    options = {"WEIGHT_OFFSET": weight_offset, "HAS_WEIGHT": weight is not None}
    weight = None if weight is None else weight.contiguous()
    partial = None
    if needs[0] and narrow is not None:
        config, programs_per_sm = narrow
        programs = min(cdiv(M, config["BLOCK_M"]), sm_count(x.device) * programs_per_sm)
        if needs[1]:
            partial = x.new_empty((programs, N), dtype=torch.float32)
        launch(
            _rms_norm_bwd_kernel,
            (programs,),
            dy,
            x,
            weight,
            rstd,
            dx,
            partial,
            M,
            N,
            dy.stride(0),
            x.stride(0),
            **options,
            NEEDS_DWEIGHT=needs[1],
            **config,
        )
    elif needs[0]:
        launch(
            _rms_norm_bwd_wide_kernel,
            (M,),
            dy,
            x,
            weight,
            rstd,
            dx,
            N,
            dy.stride(0),
            x.stride(0),
            **options,
            BLOCK_N=4096,
            num_warps=8,
        )
    if needs[1]:
        if partial is None:
            blocks = cdiv(N, 128)
            splits = min(cdiv(M, 32), max(4 * sm_count(x.device) // max(blocks, 1), 1))
            partial = x.new_empty((splits, N), dtype=torch.float32)
            launch(
                _rms_norm_dweight_kernel,
                (blocks, splits),
                dy,
                x,
                rstd,
                partial,
                M,
                N,
                dy.stride(0),
                x.stride(0),
                BLOCK_M=32,
                BLOCK_N=128,
            )
        # narrow columns: many programs, because each one's loop over the partial sums is all latency
        block_n = 16 if N <= 8192 else 128
        grid = (cdiv(N, block_n),)
        launch(_rms_norm_sum_kernel, grid, partial, dweight, partial.shape[0], N, BLOCK_G=64, BLOCK_N=block_n)
    return dx, dweight


# --------------------------------------------------------------------------------------------------------------------
# Fakes and check
# --------------------------------------------------------------------------------------------------------------------


def rms_norm_fake(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    return x.new_empty(x.shape)


def rms_norm_fwd_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_statistics_dtype(x))


def rms_norm_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape if needs[0] else (0,))
    dweight = x.new_empty((0,)) if weight is None or not needs[1] else weight.new_empty(weight.shape)
    return dx, dweight


def rms_norm_check(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> None:
    if x.ndim == 0:
        bad_argument("rms_norm", "x", "a tensor without dimensions", "at least one dimension, (..., N)")
    if weight is not None and weight.shape != x.shape[-1:]:
        bad_argument("rms_norm", "weight", f"of shape {tuple(weight.shape)}", f"({x.shape[-1]},), the last size of x")
    if not eps >= 0:
        bad_argument("rms_norm", "eps", eps, "a number >= 0")
    if weight is None and weight_offset != 0:
        bad_argument("rms_norm", "weight_offset", weight_offset, "0.0 where there is no weight to add it to")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def rms_norm_forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> torch.Tensor:
    y, rstd = torch.ops.tt.rms_norm_fwd(x, weight, eps, weight_offset)
    ctx.save_for_backward(x, weight, rstd)
    ctx.weight_offset = weight_offset
    return y


def rms_norm_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    needs = [bool(ctx.needs[0]), bool(ctx.needs[1]) and weight is not None]
    dx, dweight = torch.ops.tt.rms_norm_bwd(dy, x, weight, rstd, ctx.weight_offset, needs)
    return dx if needs[0] else None, dweight if needs[1] else None


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


def rms_norm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample("M3_N33", (t(3, 33), t(33)))
    yield Sample("M9_N1024", (t(9, 1024), t(1024)))
    yield Sample("M70_N8", (t(70, 8), t(8)))
    yield Sample("no_weight", (t(5, 64),))
    yield Sample("eps", (t(5, 64), t(64)), {"eps": 0.1})
    yield Sample("weight_offset", (t(5, 64), t(64)), {"weight_offset": 1.0})
    yield Sample("weight_of_other_dtype", (t(5, 64), t(64, dtype=_other(dtype))), {"weight_offset": 1.0})
    yield Sample("one_row", (t(129), t(129)))
    yield Sample("N1", (t(4, 1), t(1)))
    yield Sample("batch_2x3x40", (t(2, 3, 40), t(40)))
    yield Sample("rows_strided", (t(6, 100)[:, 20:70], t(50)))
    yield Sample("transposed", (t(48, 5).t(), t(48)))
    yield Sample("expanded", (t(1, 48).expand(5, 48), t(1).expand(48)))
    yield Sample("unaligned", (t(4 * 64 + 1)[1:].view(4, 64), t(65)[1:]))
    yield Sample("large_values", (t(4, 256) * 100, t(256)))
    yield Sample("empty_rows", (t(0, 16), t(16)))
    yield Sample("empty_columns", (t(3, 0), t(0)))
    yield Sample("M2_N17000", (t(2, 17000), t(17000)))
    yield Sample("M3_N65537", (t(3, 65537), t(65537)), slow_in_interpreter=True)


def _other(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def rms_norm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 32, device=device)
    yield ErrorSample("scalar", (x[0, 0],), match="rms_norm.*'x'.*at least one dimension")
    yield ErrorSample("weight_shape", (x, x[0, :31]), match=r"rms_norm.*'weight'.*\(31,\).*\(32,\)")
    yield ErrorSample("weight_two_dimensional", (x, x[:1]), match=r"rms_norm.*'weight'.*\(1, 32\).*\(32,\)")
    yield ErrorSample("negative_eps", (x, x[0]), {"eps": -1e-6}, match="rms_norm.*'eps' is -1e-06.*>= 0")
    yield ErrorSample("offset_alone", (x,), {"weight_offset": 1.0}, match="rms_norm.*'weight_offset' is 1.0.*weight")


def rms_norm_bench_cases() -> Iterator[BenchCase]:
    def make(M: int, N: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(M, N, device=device, dtype=dtype), torch.randn(N, device=device, dtype=dtype)), {}

    for M, N in [(8192, 4096), (16384, 8192), (32768, 1024)]:
        yield BenchCase(f"{M}x{N}", lambda d, t, M=M, N=N: make(M, N, d, t))


def rms_norm_cost(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0
) -> Cost:
    row = 0 if weight is None else weight.numel() * weight.element_size()
    return Cost(
        flops=4 * x.numel(),
        bytes=2 * x.numel() * x.element_size() + row,
        backward_flops=8 * x.numel(),
        backward_bytes=3 * x.numel() * x.element_size() + 2 * row,
    )
