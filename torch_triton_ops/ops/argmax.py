"""Index of the maximum along one dim.

out = the first index i along `dim` with x[i] = max(x)

| tensor | shape | dtype |
|---|---|---|
| x | any; any strides | float32, float16, bfloat16, int32, int64 |
| out | that of x without `dim` (size 1 there with `keepdim`), contiguous | int64 |

`dim` counts from either end; None means all elements in order, as of `x.flatten()`. Of equal elements the first
counts, and a NaN is larger than any number, both as in torch. It cuts no gradient: x may require one.

Each place of a tile keeps the best value it has seen and its index, by strict comparison, so that the first of equals
stays. A tree then takes the best value, and the smallest index among those that hold it. A long row is divided among
programs, whose (value, index) pairs the same kernel reduces.

Bytes: x read once, out written once.

Errors: IndexError when `dim` is out of range or empty.

Source: https://docs.pytorch.org/docs/stable/generated/torch.argmax.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.launch import launch
from torch_triton_ops.reductions import (
    View,
    accumulation_dtype,
    check_dims,
    check_not_empty,
    joined_view,
    plan_columns,
    plan_rows,
    reduced_shape,
    view_along,
)


def argmax_reference(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    return torch.argmax(x, dim, keepdim).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _lowest(A: tl.constexpr, B: tl.constexpr, dtype: tl.constexpr):
    if dtype.is_floating():
        tile = tl.full((A, B), float("-inf"), dtype)
    else:
        tile = tl.full((A, B), -0x8000000000000000, dtype)
    return tile


@triton.jit
def _take(best, index, x, i):
    # NaN, the only value that differs from itself, replaces every number and is replaced by nothing
    better = (x > best) | ((x != x) & (best == best))
    return tl.where(better, x, best), tl.where(better, i, index)


@triton.jit
def _first_of_best(best, index, lowest, axis: tl.constexpr):
    """(value, index) along `axis`."""
    numbers = tl.where(best == best, best, lowest)
    top = tl.max(numbers, axis=axis)
    is_top = best == tl.expand_dims(top, axis)
    if best.dtype.is_floating():
        has_nan = tl.max((best != best).to(tl.int32), axis=axis) > 0
        top = tl.where(has_nan, float("nan"), top)
        is_top = tl.where(tl.expand_dims(has_nan, axis), best != best, is_top)
    return top, tl.min(tl.where(is_top, index, 0x7FFFFFFF), axis=axis)


@triton.jit
def _argmax_rows_kernel(
    x_ptr,
    index_ptr,
    value_ptr,
    out_ptr,
    R,
    N,
    K,
    S,
    chunk,
    stride_xm,
    stride_xn,
    stride_xk,
    HAS_INDEX: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_R rows r = m * K + k of x, part s of S of each; value and out (R, S).

    HAS_INDEX: x holds the best values of parts, and index_ptr, of the same strides, their indices.
    """
    ACC: tl.constexpr = tl.float32 if x_ptr.dtype.element_ty.is_floating() else tl.int64
    pid = tl.program_id(0)
    pid_s = (pid % S).to(tl.int64)
    offs_r = (pid // S).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_r = offs_r < R
    start = pid_s * chunk
    length = tl.minimum(N - start, chunk).to(tl.int32)  # a part has fewer than 2**31 elements
    rows = (offs_r // K) * stride_xm + (offs_r % K) * stride_xk + start * stride_xn  # (BLOCK_R,)
    offs = rows[:, None] + offs_n[None, :].to(tl.int64) * stride_xn  # (BLOCK_R, BLOCK_N)
    lowest = _lowest(BLOCK_R, BLOCK_N, ACC)
    best = lowest
    # the first place of a part stands for its first element: right even where nothing is above the lowest value
    index = tl.broadcast_to(offs_n[None, :], (BLOCK_R, BLOCK_N))  # int32, counted from the part's start
    whole = length // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        x = tl.load(x_ptr + offs + tl.cast(n, tl.int64) * stride_xn, mask=mask_r[:, None], other=0).to(ACC)
        best, index = _take(best, index, x, n + offs_n[None, :])
    if whole < length:
        mask = mask_r[:, None] & (offs_n < length - whole)[None, :]
        x = tl.load(x_ptr + offs + whole.to(tl.int64) * stride_xn, mask=mask, other=0).to(ACC)
        best, index = _take(best, index, tl.where(mask, x, lowest), whole + offs_n[None, :])
    value, position = _first_of_best(best, index, lowest, 1)  # (BLOCK_R,)
    found = start + position
    if HAS_INDEX:
        found = tl.load(index_ptr + rows + position.to(tl.int64) * stride_xn, mask=mask_r)
    if HAS_VALUE:
        tl.store(value_ptr + offs_r * S + pid_s, value, mask=mask_r)
    tl.store(out_ptr + offs_r * S + pid_s, found, mask=mask_r)


@triton.jit
def _argmax_columns_kernel(
    x_ptr,
    index_ptr,
    value_ptr,
    out_ptr,
    N,
    K,
    S,
    chunk,
    stride_xm,
    stride_xn,
    stride_xk,
    HAS_INDEX: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K columns of one m, part s of S of each; value and out (M, S, K)."""
    ACC: tl.constexpr = tl.float32 if x_ptr.dtype.element_ty.is_floating() else tl.int64
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    pid_s = (pid // blocks % S).to(tl.int64)
    pid_m = (pid // blocks // S).to(tl.int64)
    offs_k = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_k = offs_k < K
    start = pid_s * chunk
    length = tl.minimum(N - start, chunk).to(tl.int32)
    columns = pid_m * stride_xm + start * stride_xn + offs_k * stride_xk  # (BLOCK_K,)
    offs = columns[None, :] + offs_n[:, None].to(tl.int64) * stride_xn  # (BLOCK_N, BLOCK_K)
    lowest = _lowest(BLOCK_N, BLOCK_K, ACC)
    best = lowest
    index = tl.broadcast_to(offs_n[:, None], (BLOCK_N, BLOCK_K))
    for n in range(0, length, BLOCK_N):
        mask = (offs_n < length - n)[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs + tl.cast(n, tl.int64) * stride_xn, mask=mask, other=0).to(ACC)
        best, index = _take(best, index, tl.where(mask, x, lowest), n + offs_n[:, None])
    value, position = _first_of_best(best, index, lowest, 0)  # (BLOCK_K,)
    found = start + position
    if HAS_INDEX:
        found = tl.load(index_ptr + columns + position.to(tl.int64) * stride_xn, mask=mask_k)
    offs_out = (pid_m * S + pid_s) * K + offs_k
    if HAS_VALUE:
        tl.store(value_ptr + offs_out, value, mask=mask_k)
    tl.store(out_ptr + offs_out, found, mask=mask_k)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _argmax_view(view: View, index: torch.Tensor | None, out: torch.Tensor) -> None:
    N, K, columns = view.N, view.K, view.has_columns
    # the first of equals is in the first part that has one
    plan = (plan_columns if columns else plan_rows)(view, contiguous=True)
    value, part = None, out
    if plan.parts > 1:
        shape = (view.M, plan.parts, K) if columns else (view.M * K, plan.parts)
        value, part = out.new_empty(shape, dtype=accumulation_dtype(view.x.dtype)), out.new_empty(shape)
    launch(
        _argmax_columns_kernel if columns else _argmax_rows_kernel,
        (plan.programs * plan.parts,),
        *(view.x, index, value, part, *(() if columns else (view.M * K,)), N, K, plan.parts, plan.chunk),
        *(view.stride_m, view.stride_n, view.stride_k),
        HAS_INDEX=index is not None,
        HAS_VALUE=value is not None,
        **plan.config,
    )
    if value is not None:
        _argmax_view(joined_view(view, plan, value), part, out)


def argmax(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    out = argmax_fake(x, dim, keepdim)
    if out.numel() > 0:
        _argmax_view(view_along(x, dim), None, out)
    return out


def argmax_fake(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    return x.new_empty(reduced_shape(x, dim, keepdim), dtype=torch.int64)


def argmax_check(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> None:
    check_dims("argmax", x, dim)
    check_not_empty("argmax", x, dim)


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def argmax_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def t(*shape: int) -> torch.Tensor:  # with ties
        return torch.randint(-30, 30, shape, device=device).to(dtype)

    yield Sample("rows_5x33", (t(5, 33), -1))
    yield Sample("middle_keepdim", (t(3, 70, 36), 1, True))
    yield Sample("all_17x1000", (t(17, 1000),))
    yield Sample("long_columns_5000x3", (t(5000, 3), 0))
    yield Sample("all_transposed", (t(33, 17).t(),))
    yield Sample("scalar", (t(),))
    yield Sample("no_result_0x1", (t(0, 1), 1))
    if dtype.is_floating_point:
        x = t(4, 40001)
        x[0, 39000], x[0, 20000], x[1], x[2, 7] = float("nan"), float("nan"), float("-inf"), float("inf")
        yield Sample("nan_and_inf", (x, 1))


def argmax_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype == torch.bfloat16:  # an index past 2**31
        x = torch.zeros(2**31 + 5, device=device, dtype=dtype)
        x[-2:] = 1
        yield Sample("2^31+5", (x,))


def argmax_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("dim_too_large", (x, 2), error=IndexError, match=r"argmax.*'dim' is 2.*-2 to 1")
    yield ErrorSample("empty", (x[:, :0],), error=IndexError, match=r"argmax.*'dim'.*\(4, 0\).*at least one")


def argmax_bench_cases() -> Iterator[BenchCase]:
    def make(m: int, n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(m, n, device=device, dtype=dtype), -1), {}

    yield BenchCase("8192x8192_rows", lambda d, t: make(8192, 8192, d, t), passes=("fwd",))
    yield BenchCase("256x128256_vocabulary", lambda d, t: make(256, 128256, d, t), passes=("fwd",))


def argmax_cost(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Cost:
    return Cost(flops=x.numel(), bytes=x.numel() * x.element_size() + 8 * math.prod(reduced_shape(x, dim, keepdim)))
