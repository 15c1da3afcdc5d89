"""What the reductions and scans share: which dims, how a tensor looks to a kernel, the kernels and their launches.

A reduction of any dims of a tensor of any strides becomes one or more reductions of an (M, N, K) view along N:

* neighbouring dims that are reduced, or kept, together and lie in memory as one, are one;
* at most two groups of kept dims remain for one group of reduced dims, else the tensor is copied once;
* further groups of reduced dims are reduced one after another, the largest first, in the accumulation dtype.

Two kernels cover it: `_reduce_rows_kernel` where neighbouring elements are reduced, `_reduce_columns_kernel` where they
are kept. Few outputs with long reductions are split in S parts, whose results a second, tiny launch reduces: the order
of all additions is fixed, so results are equal bit by bit, and no atomics are needed. The tiles of a reduction are dealt to its
parts in turn, so that what is read at one time lies together in memory.

Accumulation: fp32 for floating dtypes, int64 for integers. Every element of a tile has its own accumulator, and these
meet in a tree: a chain of additions is as long as the loop, some dozens, not as the reduction. The sums of the parts, which
are few, are added in fp64.

It knows no op: the ops are in `ops/sum.py`, `mean.py`, `amax.py`, `amin.py`, `argmax.py`, `cumsum.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch, next_power_of_2, sm_count

# --------------------------------------------------------------------------------------------------------------------
# Dims and shapes
# --------------------------------------------------------------------------------------------------------------------


def check_dims(op: str, x: torch.Tensor, dim: Sequence[int] | int | None) -> None:
    """Raise IndexError for a dim out of range, ValueError for one that is named twice."""
    dims = max(x.dim(), 1)
    seen: set[int] = set()
    for d in _as_list(dim):
        if not -dims <= d < dims:
            bad_argument(op, "dim", d, f"{-dims} to {dims - 1} for x of shape {tuple(x.shape)}", IndexError)
        if d % dims in seen:
            bad_argument(op, "dim", list(_as_list(dim)), "each dim once")
        seen.add(d % dims)


def check_not_empty(op: str, x: torch.Tensor, dim: Sequence[int] | int | None) -> None:
    """Raise IndexError where a reduced dim has no element: a maximum of nothing is nothing."""
    for d in normalize_dims(x, dim):
        if x.shape[d] == 0:
            given = f"{dim}, and dim {d} of x, of shape {tuple(x.shape)}, is empty"
            bad_argument(op, "dim", given, "dims of at least one element", IndexError)


def normalize_dims(x: torch.Tensor, dim: Sequence[int] | int | None) -> tuple[int, ...]:
    """The reduced dims, counted from the front, in order. None and an empty list mean all, as in torch."""
    if x.dim() == 0:
        return ()
    return tuple(sorted(d % x.dim() for d in _as_list(dim))) or tuple(range(x.dim()))


def reduced_shape(x: torch.Tensor, dim: Sequence[int] | int | None, keepdim: bool) -> list[int]:
    """The shape of the result."""
    dims = normalize_dims(x, dim)
    if keepdim:
        return [1 if d in dims else n for d, n in enumerate(x.shape)]
    return [n for d, n in enumerate(x.shape) if d not in dims]


def expand_reduced(y: torch.Tensor, shape: Sequence[int], dims: Sequence[int], keepdim: bool) -> torch.Tensor:
    """A result of a reduction as a view of the shape that was reduced."""
    if not keepdim:
        for d in dims:
            y = y.unsqueeze(d)
    return y.expand(shape)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for floating dtypes (fp64 keeps its own: the references), int64 for integers."""
    if dtype == torch.float64:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int64


def _as_list(dim: Sequence[int] | int | None) -> Sequence[int]:
    return () if dim is None else (dim,) if isinstance(dim, int) else dim


# --------------------------------------------------------------------------------------------------------------------
# How a tensor looks to a kernel
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """`x` as (M, N, K) by strides in elements; N is reduced (or scanned), the result is (M, K) (or (M, N, K))."""

    x: torch.Tensor
    M: int
    N: int
    K: int
    stride_m: int
    stride_n: int
    stride_k: int

    @property
    def has_columns(self) -> bool:
        """Whether neighbours in memory are kept, not reduced."""
        return self.K > 1 and self.stride_k < self.stride_n


_Group = tuple[int, int]  # size, stride


def _merge(x: torch.Tensor, dims: Sequence[int]) -> list[tuple[_Group, list[int]]]:
    """`dims` in the given order, neighbours that lie in memory as one made one: ((size, stride), dims)."""
    found: list[tuple[_Group, list[int]]] = []
    for d in dims:
        size, stride = x.shape[d], x.stride(d)
        if size == 1:
            continue
        if found and found[-1][0][1] == size * stride:
            (before, _), members = found[-1]
            found[-1] = (before * size, stride), [*members, d]
        else:
            found.append(((size, stride), [d]))
    return found


def _view(x: torch.Tensor, reduced: _Group, kept: Sequence[_Group]) -> View | None:
    """None if no kernel can read `x` so, or not at speed."""
    (N, stride_n), one = reduced, (1, 0)
    if len(kept) > 2:
        return None
    if len(kept) == 2:
        (M, stride_m), (K, stride_k) = kept
        if stride_m < stride_k and stride_m < stride_n and stride_n != 1:
            return None  # neighbours in memory would go to distant programs
    elif len(kept) == 1 and kept[0][1] < stride_n:
        (M, stride_m), (K, stride_k) = one, kept[0]
    else:
        (M, stride_m), (K, stride_k) = kept[0] if kept else one, one
    return View(x, M, N, K, stride_m, stride_n, stride_k)


def view_along(x: torch.Tensor, dim: int | None) -> View:
    """`x` as (M, N, K) with N its dim `dim`; None: all elements in order, as one row. Copies where strides need it."""
    if dim is None or x.dim() == 0:
        x = x.contiguous()
        return View(x, 1, x.numel(), 1, 0, 1, 0)
    dim %= x.dim()
    others = [d for d in range(x.dim()) if d != dim]
    found = _view(x, (x.shape[dim], x.stride(dim)), [group for group, _ in _merge(x, others)])
    return _ordered_view(x, [dim]) if found is None else found


def scan_view(x: torch.Tensor, dim: int) -> View:
    """`x` as (M, N, K) with M the dims before `dim` and K those behind it, so that the elements' order is that of x."""
    if x.dim() == 0:
        return View(x, 1, 1, 1, 0, 1, 0)
    view = _ordered_view(x, [dim % x.dim()])
    # rows that lie side by side, but their elements apart: a copy costs less than reading them so
    return _ordered_view(x.contiguous(), [dim % x.dim()]) if 0 < view.stride_m < view.stride_n else view


def _ordered_view(x: torch.Tensor, dims: Sequence[int]) -> View:
    """`x` as (M, N, K), `dims`, which are neighbours, being N, in the order of its elements. Copies where strides need it."""
    first, last = (dims[0], dims[-1]) if dims else (x.dim(), x.dim() - 1)
    M, K = math.prod(x.shape[:first]), math.prod(x.shape[last + 1 :])
    N = math.prod(x.shape[first : last + 1])
    groups = [_merge(x, range(first)), _merge(x, dims), _merge(x, range(last + 1, x.dim()))]
    if any(len(g) > 1 for g in groups):
        return View(x.contiguous(), M, N, K, N * K, K, 1)
    m, n, k = (g[0][0][1] if g else 0 for g in groups)
    return View(x, M, N, K, m, n if N > 1 else 1, k)


# --------------------------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------------------------

# Elements of a tile, warps. Rows that fill the GPU: a warp walks along its row, and no warp waits for another. Split rows: long
# tiles, 32 elements a thread.
_ROW_TILE, _PART_TILE = (1024, 1), (8192, 8)
_COLUMN_TILE = 1024  # a warp's
# A reduction of fewer programs than _FULL for each multiprocessor is split, into about _PARTS for each.
_FULL, _PARTS, _COLUMN_PARTS = 4, 16, 16


@dataclass(frozen=True)
class Plan:
    """Blocks of a launch. `parts` programs share a reduction: part s begins at s * chunk, and takes tiles `step` apart.

    They end before s * chunk + span, and before N.
    """

    programs: int  # without the parts
    parts: int
    chunk: int
    step: int
    span: int
    config: dict[str, int]  # BLOCK_N, BLOCK_R or BLOCK_K, num_warps


def _block(n: int, most: int) -> int:
    return most if n >= most else next_power_of_2(n)


def whole_plan(view: View, programs: int, config: dict[str, int]) -> Plan:
    """One part."""
    return Plan(programs, 1, view.N, config["BLOCK_N"], view.N, config)


def contiguous_plan(view: View, programs: int, parts: int, config: dict[str, int]) -> Plan:
    """At most `parts` parts of consecutive elements."""
    BLOCK_N = config["BLOCK_N"]
    # an odd number of tiles: parts a power of two apart would meet in the same channels of memory
    chunk = (cdiv(cdiv(view.N, parts), BLOCK_N) | 1) * BLOCK_N
    return Plan(programs, cdiv(view.N, chunk), chunk, BLOCK_N, chunk, config)


def dealt_plan(view: View, programs: int, parts: int, config: dict[str, int]) -> Plan:
    """At most `parts` parts that take tiles in turn."""
    BLOCK_N = config["BLOCK_N"]
    tiles = cdiv(view.N, BLOCK_N)
    parts = cdiv(tiles, cdiv(tiles, parts))  # so many tiles for each
    return Plan(programs, parts, BLOCK_N, parts * BLOCK_N, view.N, config)


def plan_rows(view: View, contiguous: bool = False) -> Plan:
    """Tiles (BLOCK_R, BLOCK_N) of rows whose elements are neighbours. Short rows share a program."""
    R, sms = view.M * view.K, sm_count(view.x.device)
    tile, num_warps = _PART_TILE
    if _FULL * sms > R and tile < view.N:
        parts = cdiv(_PARTS * sms, R)
        config = {"BLOCK_R": 1, "BLOCK_N": tile, "num_warps": num_warps}
        return (contiguous_plan if contiguous else dealt_plan)(view, R, parts, config)
    tile, num_warps = _ROW_TILE
    if _FULL * sms > R:
        tile, num_warps = 4 * tile, 4 * num_warps  # too few rows for a warp each
    BLOCK_N = _block(view.N, tile)
    BLOCK_R = max(1, 512 // BLOCK_N)  # 16 elements a thread: rows of odd strides need an address for each
    config = {"BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N, "num_warps": max(1, num_warps * BLOCK_N // tile)}
    return whole_plan(view, cdiv(R, BLOCK_R), config)


def plan_columns(view: View, contiguous: bool = False) -> Plan:
    """Tiles (BLOCK_N, BLOCK_K) of neighbouring columns, a warp each: no thread needs another's numbers where K is large."""
    itemsize, sms = view.x.element_size(), sm_count(view.x.device)
    BLOCK_K = _block(view.K, 512 // itemsize)
    BLOCK_N = _block(view.N, _COLUMN_TILE // BLOCK_K)
    config = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 1}
    programs = view.M * cdiv(view.K, BLOCK_K)
    if programs >= _FULL * sms or view.N <= 16 * BLOCK_N:
        return whole_plan(view, programs, config)
    parts = min(cdiv(_COLUMN_PARTS * sms, programs), cdiv(view.N, 4 * BLOCK_N))
    return (contiguous_plan if contiguous else dealt_plan)(view, programs, parts, config)


# --------------------------------------------------------------------------------------------------------------------
# Kernels. OP: "sum", "mean" (the sum divided by `count`), "max", "min" (NaN wins, as in torch), "ties" (how many
# elements equal y, one y for each output).
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _accumulate(acc, x, OP: tl.constexpr):
    if OP == "max":
        acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "min":
        acc = tl.minimum(acc, x, propagate_nan=tl.PropagateNan.ALL)
    else:
        acc += x
    return acc


@triton.jit
def _identity(A: tl.constexpr, B: tl.constexpr, dtype: tl.constexpr, OP: tl.constexpr):
    """What changes no accumulator, (A, B)."""
    if OP == "max":
        if dtype.is_floating():
            tile = tl.full((A, B), float("-inf"), dtype)
        else:
            tile = tl.full((A, B), -0x8000000000000000, dtype)
    elif OP == "min":
        if dtype.is_floating():
            tile = tl.full((A, B), float("inf"), dtype)
        else:
            tile = tl.full((A, B), 0x7FFFFFFFFFFFFFFF, dtype)
    else:
        tile = tl.zeros((A, B), dtype)
    return tile


@triton.jit
def _halve(acc, axis: tl.constexpr):
    """Both halves of a long axis added: a thread would add its own elements in a chain, which rounds more often."""
    A: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[1]
    if axis == 1 and B >= 1024:
        acc = tl.sum(tl.reshape(acc, (A, 2, B // 2)), axis=1)
    elif axis == 0 and A >= 32:
        acc = tl.sum(tl.reshape(acc, (2, A // 2, B)), axis=0)
    return acc


@triton.jit
def _finish(acc, identity, count, axis: tl.constexpr, OP: tl.constexpr):
    """The accumulators of a tile along `axis`, in a tree."""
    if OP == "max" or OP == "min":
        numbers = tl.where(acc == acc, acc, identity)
        if OP == "max":
            out = tl.max(numbers, axis=axis)
        else:
            out = tl.min(numbers, axis=axis)
        if acc.dtype.is_floating():  # a NaN among them wins
            out = tl.where(tl.max((acc != acc).to(tl.int32), axis=axis) > 0, float("nan"), out)
    else:
        acc = _halve(_halve(_halve(acc, axis), axis), axis)
        out = tl.sum(acc, axis=axis)
        if OP == "mean":
            if acc.dtype == tl.float64:
                out = (out / tl.cast(count, tl.float64)).to(tl.float32)
            else:
                out = tl.div_rn(out, tl.cast(count, tl.float32))
        elif acc.dtype == tl.float64:
            out = out.to(tl.float32)
    return out


@triton.jit
def _reduce_rows_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    R,
    N,
    K,
    S,
    chunk,
    step,
    span,
    count,
    stride_xm,
    stride_xn,
    stride_xk,
    OP: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_R rows r = m * K + k of x, part s of S of each; out (R, S). JOIN: x holds the sums of parts, added in fp64."""
    FLOAT: tl.constexpr = tl.float64 if JOIN else tl.float32
    ACC: tl.constexpr = FLOAT if x_ptr.dtype.element_ty.is_floating() else tl.int64
    pid = tl.program_id(0)
    pid_s = (pid % S).to(tl.int64)
    offs_r = (pid // S).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_r = offs_r < R
    start = pid_s * chunk
    end = tl.minimum(start + span, N)
    # whole tiles need no mask along N, so that they are read 16 bytes at a time whatever N is
    whole = tl.cdiv(tl.maximum(end - start - BLOCK_N + 1, 0), step).to(tl.int32)
    rows_ptr = x_ptr + (offs_r // K) * stride_xm + (offs_r % K) * stride_xk + start * stride_xn  # (BLOCK_R,)
    ptrs = rows_ptr[:, None] + offs_n[None, :].to(tl.int64) * stride_xn  # (BLOCK_R, BLOCK_N)
    if PDL:
        gdc_wait()
    if OP == "ties":
        y = tl.load(y_ptr + offs_r, mask=mask_r)[:, None].to(ACC)
    identity = _identity(BLOCK_R, BLOCK_N, ACC, OP)
    acc = identity
    for i in range(whole):
        x = tl.load(ptrs + tl.cast(i, tl.int64) * step * stride_xn, mask=mask_r[:, None], other=0).to(ACC)
        if OP == "ties":
            x = (x == y).to(ACC)
        acc = _accumulate(acc, x, OP)
    left = end - start - whole.to(tl.int64) * step
    if left > 0:
        mask = mask_r[:, None] & (offs_n < left)[None, :]
        x = tl.load(ptrs + whole.to(tl.int64) * step * stride_xn, mask=mask, other=0).to(ACC)
        if OP == "ties":
            x = (x == y).to(ACC)
        acc = _accumulate(acc, tl.where(mask, x, identity), OP)
    if PDL:
        gdc_launch_dependents()
    out = _finish(acc, identity, count, 1, OP)  # (BLOCK_R,)
    tl.store(out_ptr + offs_r * S + pid_s, out.to(out_ptr.dtype.element_ty), mask=mask_r)


@triton.jit
def _reduce_columns_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    N,
    K,
    S,
    chunk,
    step,
    span,
    count,
    stride_xm,
    stride_xn,
    stride_xk,
    OP: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_K columns of one m, part s of S of each; out (M, S, K). JOIN: x holds the sums of parts, added in fp64."""
    FLOAT: tl.constexpr = tl.float64 if JOIN else tl.float32
    ACC: tl.constexpr = FLOAT if x_ptr.dtype.element_ty.is_floating() else tl.int64
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    pid_s = (pid // blocks % S).to(tl.int64)
    pid_m = (pid // blocks // S).to(tl.int64)
    offs_k = (pid % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_k = offs_k < K
    start = pid_s * chunk
    end = tl.minimum(start + span, N)
    part_ptr = x_ptr + pid_m * stride_xm + start * stride_xn
    ptrs = part_ptr + offs_n[:, None].to(tl.int64) * stride_xn + offs_k[None, :] * stride_xk  # (BLOCK_N, BLOCK_K)
    if PDL:
        gdc_wait()
    if OP == "ties":
        y = tl.load(y_ptr + pid_m * K + offs_k, mask=mask_k)[None, :].to(ACC)
    identity = _identity(BLOCK_N, BLOCK_K, ACC, OP)
    acc = identity
    for i in range(tl.cdiv(end - start, step).to(tl.int32)):
        tile = tl.cast(i, tl.int64) * step
        mask = (offs_n < end - start - tile)[:, None] & mask_k[None, :]
        x = tl.load(ptrs + tile * stride_xn, mask=mask, other=0).to(ACC)
        if OP == "ties":
            x = (x == y).to(ACC)
        acc = _accumulate(acc, tl.where(mask, x, identity), OP)
    if PDL:
        gdc_launch_dependents()
    out = _finish(acc, identity, count, 0, OP)  # (BLOCK_K,)
    tl.store(out_ptr + (pid_m * S + pid_s) * K + offs_k, out.to(out_ptr.dtype.element_ty), mask=mask_k)


# --------------------------------------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------------------------------------

# what a part of a reduction computes, and what is done with the parts
_PARTIAL = {"sum": "sum", "mean": "sum", "max": "max", "min": "min", "ties": "ties"}
_JOIN = {"sum": "sum", "mean": "mean", "max": "max", "min": "min", "ties": "sum"}


def reduce(op: str, x: torch.Tensor, dims: Sequence[int], out: torch.Tensor) -> None:
    """Reduce `dims` (counted from the front) of x into `out`, contiguous, which has the other dims.

    op: "sum", "mean", "max", "min".
    """
    count = math.prod([x.shape[d] for d in dims])
    if out.numel() == 0:
        return
    if count == 0:  # sums are 0, means NaN; max and min were refused before
        out.fill_(float("nan") if op == "mean" else 0)
        return
    dims = list(dims)
    while True:
        # the order of reduced dims is free, so that a transposed tensor's lie as one, too
        groups = _merge(x, sorted(dims, key=x.stride, reverse=True)) or [((1, 1), dims)]
        group, members = max(groups, key=lambda g: g[0][0])
        kept = [d for d in range(x.dim()) if d not in members and (d not in dims or x.shape[d] != 1)]
        view = _view(x, group, [g for g, _ in _merge(x, kept)])
        if view is None:
            if x.is_contiguous():
                raise AssertionError("a contiguous tensor has at most two groups of dims about a third")
            x = x.contiguous()
        elif len(groups) == 1:
            _reduce_view(op, view, None, out, count)
            return
        else:
            rest = x.new_empty([x.shape[d] for d in kept], dtype=accumulation_dtype(x.dtype))
            _reduce_view(_PARTIAL[op], view, None, rest, count)
            x, dims = rest, [kept.index(d) for d in dims if d in kept]


def _reduce_view(
    op: str, view: View, y: torch.Tensor | None, out: torch.Tensor, count: int, join: bool = False
) -> None:
    plan = plan_columns(view) if view.has_columns else plan_rows(view)
    if plan.parts == 1:
        _launch(op, view, plan, y, out, count, join)
        return
    parts = _parts(view, plan)
    _launch(_PARTIAL[op], view, plan, y, parts, count, join)
    _reduce_view(_JOIN[op], joined_view(view, plan, parts), None, out, count, join=_PARTIAL[op] not in ("max", "min"))


def reduce_parts(view: View, plan: Plan) -> torch.Tensor:
    """The sums of the parts that `plan` divides each row (column) of `view` into: (M * K, S), of columns (M, S, K)."""
    parts = _parts(view, plan)
    _launch("sum", view, plan, None, parts, 1, False)
    return parts


def _parts(view: View, plan: Plan) -> torch.Tensor:
    """Memory for a number for each part, in the accumulation dtype."""
    shape = (view.M, plan.parts, view.K) if view.has_columns else (view.M * view.K, plan.parts)
    return view.x.new_empty(shape, dtype=accumulation_dtype(view.x.dtype))


def joined_view(view: View, plan: Plan, parts: torch.Tensor) -> View:
    """The parts of `view`, to be reduced."""
    M, S, K = view.M, plan.parts, view.K
    return View(parts, M, S, K, S * K, K, 1) if view.has_columns else View(parts, M * K, S, 1, S, 1, 0)


def _launch(op: str, view: View, plan: Plan, y: torch.Tensor | None, out: torch.Tensor, count: int, join: bool) -> None:
    N, K, S = view.N, view.K, plan.parts
    launch(
        _reduce_columns_kernel if view.has_columns else _reduce_rows_kernel,
        (plan.programs * S,),
        *(view.x, y, out, *(() if view.has_columns else (view.M * K,)), N, K, S),
        *(plan.chunk, plan.step, plan.span, count, view.stride_m, view.stride_n, view.stride_k),
        OP=op,
        JOIN=join,
        **plan.config,
    )


# --------------------------------------------------------------------------------------------------------------------
# The gradient of amax and amin
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _extremum_bwd_rows_kernel(
    dy_ptr, x_ptr, y_ptr, dx_ptr, M, N, stride_xm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whole rows in registers: counted and written with one read."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs_m, mask=mask_m).to(tl.float32)
    dy = tl.load(dy_ptr + offs_m, mask=mask_m).to(tl.float32)
    ties = (x == y[:, None]) & mask
    share = tl.div_rn(dy, tl.sum(ties.to(tl.float32), axis=1))  # NaN, as torch's, where y is NaN and nothing equals it
    dx = tl.where(ties, share[:, None], tl.where(y == y, 0.0, float("nan"))[:, None])
    tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _extremum_bwd_spread_kernel(
    dy_ptr,
    x_ptr,
    y_ptr,
    ties_ptr,
    dx_ptr,
    N,
    K,
    stride_xm,
    stride_xn,
    stride_xk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one m; the ties were counted before."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = (pid // blocks_k // blocks_n).to(tl.int64)
    offs_n = (pid // blocks_k % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    mask_k = offs_k < K
    mask = (offs_n < N)[:, None] & mask_k[None, :]
    ptrs = x_ptr + pid_m * stride_xm + offs_n[:, None] * stride_xn + offs_k[None, :] * stride_xk
    x = tl.load(ptrs, mask=mask).to(tl.float32)  # (BLOCK_N, BLOCK_K)
    y = tl.load(y_ptr + pid_m * K + offs_k, mask=mask_k).to(tl.float32)
    dy = tl.load(dy_ptr + pid_m * K + offs_k, mask=mask_k).to(tl.float32)
    share = tl.div_rn(dy, tl.load(ties_ptr + pid_m * K + offs_k, mask=mask_k, other=1.0))
    dx = tl.where(x == y[None, :], share[None, :], tl.where(y == y, 0.0, float("nan"))[None, :])
    offs = (pid_m * N + offs_n[:, None]) * K + offs_k[None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def extremum_bwd_reference(
    dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor, dim: Sequence[int] | None, keepdim: bool
) -> torch.Tensor:
    """dy divided evenly among the elements of x that equal y; NaN for all where y is NaN, as torch."""
    dtype, dims = accumulation_dtype(x.dtype), normalize_dims(x, dim)
    wide = [expand_reduced(t, x.shape, dims, keepdim) for t in (dy.to(dtype), y)]
    ties = x == wide[1]
    share = wide[0] / ties.sum(dims, keepdim=True)
    zero = torch.where(wide[1].isnan(), wide[1].to(dtype), 0)
    return torch.where(ties, share, zero).to(x.dtype).contiguous()


def extremum_bwd(
    dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor, dim: Sequence[int] | None, dx: torch.Tensor
) -> None:
    """The same by kernels, into `dx`, contiguous."""
    if dx.numel() == 0:
        return
    dims, dy, y = normalize_dims(x, dim), dy.contiguous(), y.contiguous()
    wide = [d for d in dims if x.shape[d] != 1]
    if any(d not in dims and x.shape[d] != 1 for d in (range(wide[0], wide[-1]) if wide else ())):
        # reduced dims with kept ones between them: bring them to the end
        order = [*(d for d in range(x.dim()) if d not in dims), *dims]
        moved = x.permute(order).contiguous()
        gradient = torch.empty_like(moved)
        extremum_bwd(dy, moved, y, list(range(x.dim() - len(dims), x.dim())), gradient)
        dx.copy_(gradient.permute([order.index(d) for d in range(x.dim())]))
        return
    view = _ordered_view(x, wide)
    x, M, N, K = view.x, view.M, view.N, view.K
    if K == 1 and view.stride_n == 1 and N * x.element_size() <= 32768:
        BLOCK_N = next_power_of_2(N)
        BLOCK_M = max(1, 1024 // BLOCK_N)
        config = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": max(1, min(16, BLOCK_M * BLOCK_N // 1024))}
        launch(_extremum_bwd_rows_kernel, (cdiv(M, BLOCK_M),), dy, x, y, dx, M, N, view.stride_m, **config)
        return
    ties = dx.new_empty(M * K, dtype=torch.float32)
    _reduce_view("ties", view, y, ties, 1)
    BLOCK_K = _block(K, 64)
    BLOCK_N = _block(N, 2048 // BLOCK_K)
    grid = (M * cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K),)
    strides = view.stride_m, view.stride_n, view.stride_k
    launch(_extremum_bwd_spread_kernel, grid, dy, x, y, ties, dx, N, K, *strides, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
