"""One product, or a batch of them, started: which kernel, what TMA can read, split K and its reduction."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torch_triton_ops.launch import (
    INTERPRET,
    Plans,
    Prepared,
    aligned,
    can_describe,
    capability,
    cdiv,
    descriptor,
    launch,
    sm_count,
)

from .configs import _matmul_config, _matmul_split, _MatmulConfig
from .kernels import _matmul_kernel, _matmul_reduce_kernel, _matmul_tma_kernel, _matmul_vector_kernel


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


class _MatmulPlan(NamedTuple):
    """How a product is started."""

    start: Prepared
    swapped: bool  # the kernel's a is our w
    twice: bool  # b is described for two widths of tiles
    split: int


_matmul_plans = Plans()


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
    if K == 0 or (config is None and (M == 1 or N == 1)):
        epilogue = _matmul_epilogue(bias is not None, activation, z is not None)
        if K == 0:
            _matmul_reduce(out, out, 0, N, bias, z, epilogue)
            return
        if a.shape.numel() == M * K:  # no batches
            if M == 1 and w.stride()[-1] == 1:
                _matmul_vector(w.reshape(N, K), a.reshape(K), out, bias, z, epilogue, sm_count(a.device))
                return
            if N == 1 and a.stride()[-1] == 1 and bias is None:
                _matmul_vector(a.reshape(M, K), w.reshape(K), out, None, z, epilogue, sm_count(a.device))
                return
    # With no contiguous dim every load would be a scattered one: a copy costs less than the product.
    if 1 not in a.stride()[-2:]:
        a = a.contiguous()
    if 1 not in w.stride()[-2:]:
        w = w.contiguous()
    dtype = a.dtype
    precision = _matmul_precision(dtype)
    key = (
        *(a.shape, a.stride(), aligned(a), w.shape, w.stride(), aligned(w)),
        *(dtype, a.device, precision, bias is not None, activation, z is not None),
    )
    plan = _matmul_plans.find(key) if config is None else None
    if plan is None:
        plan = _matmul_plan(a, w, out, bias, activation, z, precision, config)
        if config is None:
            _matmul_plans.keep(key, plan)

    # With split-K the epilogue belongs to the reduction.
    alone = plan.split == 1
    partial = out if alone else out.new_empty((plan.split, NUMEL), dtype=torch.float32)
    first, second = (w, a) if plan.swapped else (a, w)
    plan.start(
        *((first, second, second) if plan.twice else (first, second)),
        *((bias,) if alone and bias is not None else ()),
        partial,
        *((z,) if alone and z is not None else ()),
    )
    if not alone:
        epilogue = _matmul_epilogue(bias is not None, activation, z is not None)
        _matmul_reduce(partial, out, plan.split, N, bias, z, epilogue)


def _matmul_epilogue(has_bias: bool, activation: str, store_z: bool) -> dict[str, Any]:
    return {"HAS_BIAS": has_bias, "ACTIVATION": activation, "STORE_Z": store_z}


def _matmul_plan(
    a: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    z: torch.Tensor | None,
    precision: str,
    config: _MatmulConfig | None,
) -> _MatmulPlan:
    """Which kernel, which tiles, what TMA reads: for `_matmul_gemm`, whose arguments these are."""
    M, K = a.shape[-2:]
    N = w.shape[-2]
    B1, B2 = a.shape[:-2] or (1, 1)
    B = B1 * B2
    sms = sm_count(a.device)
    itemsize = a.element_size()
    # what the TMA kernel's BLOCK_K will be, for batches
    block_k = config.block_k if config is not None else (256 if min(M, N) <= 64 else 128) // itemsize
    tma = _matmul_tma_operands(a, w, precision, block_k) if capability(a.device) >= 90 else None
    if config is None:
        even = tma is not None or (K % 16 == 0 and _matmul_aligned(a) and _matmul_aligned(w))
        config = _matmul_config(M, N, K, B, itemsize, precision, even, tma is not None, activation, sms)

    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    size_m, size_n = (N, M) if config.swapped else (M, N)  # of what the kernel computes
    tiles = cdiv(size_m, block_m) * cdiv(size_n, block_n + config.block_n2)
    split = config.split_k
    k_split = cdiv(cdiv(K, block_k), split) * block_k
    if split > 1:
        bias = z = None
        activation = "none"
        out = out.new_empty((split, out.numel()), dtype=torch.float32)  # as every call's partial results
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
        **_matmul_epilogue(bias is not None, activation, z is not None),
    }
    if tma is None:
        *batch_a, stride_am, stride_ak = a.stride()
        *batch_w, stride_bn, stride_bk = w.stride()
        start = Prepared(
            _matmul_kernel,
            (tiles * split * B,),
            *(a, w, bias, out, z, M, N, K, k_split, B, B2),
            *(*(batch_a or (0, 0)), stride_am, stride_ak, *(batch_w or (0, 0)), stride_bk, stride_bn),
            EVEN_K=K % block_k == 0,
            **shared,
        )
        return _MatmulPlan(start, False, False, split)

    first, second = tma[::-1] if config.swapped else tma
    box = (block_n, block_m) if config.swapped else (block_m, block_n // 2 if config.halves else block_n)
    # A store by descriptor ends at the last batch's edge only. z has out's shape, and both are new.
    tma_store = split == 1 and N * itemsize % 16 == 0 and (B == 1 or M % box[0] == 0) and B * M < 2**31
    tma_store = tma_store and config.block_n2 == 0
    start = Prepared(
        _matmul_tma_kernel,
        (min(tiles * B, sms) if config.persistent else tiles * split * B,),
        descriptor(first.view, (block_m, block_k) if first.k_major else (block_k, block_m)),
        *(
            descriptor(second.view, (width, block_k) if second.k_major else (block_k, width)) if width else None
            for width in (block_n, config.block_n2)
        ),
        bias,
        descriptor(out.view(B * M, N), box) if tma_store else out,
        descriptor(z.view(B * M, N), box) if tma_store and z is not None else z,
        *(size_m, size_n, K, k_split, B, first.batch_rows, second.batch_rows),
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
    return _MatmulPlan(start, config.swapped, config.block_n2 > 0, split)


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
