"""InfoNCE: each query must pick its own key out of all of them.

s[i, j] = sum_d query[i, d] * key[j, d] / temperature
row[i]  = log sum_j exp(s[i, j]) - s[i, i]

Key i belongs to query i, all others are its negatives; keys beyond the queries' number are negatives of all (a queue, hard
negatives). "none" gives the rows, "sum" their sum, "mean" their mean. CLIP's loss is the mean of this one and of the one with
query and key swapped. With p[i, j] = exp(s[i, j] - log sum exp(s[i])), g[i] the gradient that reaches row i and T =
temperature

dquery[i] = g[i] / T * (sum_j p[i, j] * key[j] - key[i])
dkey[j]   = sum_i g[i] / T * (p[i, j] - [i == j]) * query[i]

| tensor | shape | dtype |
|---|---|---|
| query | (M, D), any strides; normalise it before, if the similarity is to be the cosine | float32, float16, bfloat16 |
| key | (N, D) with N >= M, any strides | that of query |
| loss | () or, with "none", (M,) | that of query |
| stats (saved) | (2, M): max_j s and sum_j exp(s - max_j s) | float32 |

temperature: above 0. Raises ValueError for other numbers, shapes and reductions, TypeError where the dtypes differ.

The scores are never in memory: a program holds 64 queries and goes through the keys with running maximum and sum, as attention
does; the gradients compute the scores again, once for each 128 columns of D (queries and keys apart; 64 where D is no multiple
of 8, and in fp32). Products of half-precision inputs on tensor cores with fp32 sums, of fp32 inputs in IEEE fp32. Flops: 2 * M
* N * D; backward 8 * M * N * D and, with D over 128, 4 * M * N * D more for each further 128.

Source: van den Oord, Li and Vinyals, Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748, equation 4
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import INTERPRET, cdiv, launch, next_power_of_2
from torch_triton_ops.losses import REDUCTIONS, arithmetic_dtype, sum_partials

# --------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------


def info_nce_loss_reference(
    query: torch.Tensor, key: torch.Tensor, *, temperature: float = 0.07, reduction: str = "mean"
) -> torch.Tensor:
    return info_nce_loss_fwd_reference(query, key, temperature, reduction)[0]


def info_nce_loss_eager(
    query: torch.Tensor, key: torch.Tensor, *, temperature: float = 0.07, reduction: str = "mean"
) -> torch.Tensor:
    """As written with torch's own functions: the scores are of the inputs' dtype."""
    target = torch.arange(query.shape[0], device=query.device)
    return torch.nn.functional.cross_entropy(query @ key.T / temperature, target, reduction=reduction)


def _scores(query: torch.Tensor, key: torch.Tensor, temperature: float) -> torch.Tensor:
    dtype = arithmetic_dtype(query)
    return query.to(dtype) @ key.to(dtype).T / temperature


def info_nce_loss_fwd_reference(
    query: torch.Tensor, key: torch.Tensor, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    s = _scores(query, key, temperature)
    top = s.detach().amax(1) if query.shape[0] else s.new_empty(0)
    total = (s - top[:, None]).exp().sum(1)
    rows = total.log() - (s.diagonal() - top)
    loss = rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
    return loss.to(query.dtype).contiguous(), torch.stack([top, total.detach()])


def info_nce_loss_bwd_reference(
    dloss: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, M = arithmetic_dtype(query), query.shape[0]
    g = dloss.to(dtype).reshape(-1).expand(M) / temperature
    if reduction == "mean":
        g = g / M
    p = (_scores(query, key, temperature) - stats[0][:, None]).exp() / stats[1][:, None]
    p.diagonal().sub_(1)
    ds = g[:, None] * p
    dquery = (ds @ key.to(dtype)).to(query.dtype) if needs[0] else query.new_empty(0)
    dkey = (ds.T @ query.to(dtype)).to(key.dtype) if needs[1] else key.new_empty(0)
    return dquery.contiguous(), dkey.contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _dot_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. In fp32 one long chain of additions rounds too often: a sum for each block, then a sum of those.

    The product with 1.0 keeps the compiler from chaining them again.
    """
    if a.dtype == tl.float32:
        return tl.fma(acc, 1.0, tl.dot(a, b, input_precision=PRECISION))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _score_tile(
    a_ptr,
    b_ptr,
    offs_a,
    offs_b,
    A,
    B,
    D,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows offs_a of (A, D) times rows offs_b of (B, D): (BLOCK_A, BLOCK_B), times SCALE, in fp32."""
    s = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        a = tl.load(
            a_ptr + offs_a.to(tl.int64)[:, None] * D + offs_d[None, :],
            mask=(offs_a < A)[:, None] & mask_d[None, :],
            other=0.0,
        )  # (BLOCK_A, BLOCK_D)
        b = tl.load(
            b_ptr + offs_b.to(tl.int64)[None, :] * D + offs_d[:, None],
            mask=(offs_b < B)[None, :] & mask_d[:, None],
            other=0.0,
        )  # (BLOCK_D, BLOCK_B)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        s = _dot_add(a, b, s, PRECISION)
    return s * SCALE


@triton.jit
def _info_nce_fwd_kernel(
    query_ptr,
    key_ptr,
    loss_ptr,
    stats_ptr,
    M,
    N,
    D,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        s = _score_tile(
            query_ptr, key_ptr, offs_m, offs_n, M, N, D, SCALE, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D
        )  # (BLOCK_M, BLOCK_N)
        own += tl.sum(tl.where(offs_m[:, None] == offs_n[None, :], s, 0.0), axis=1)
        s = tl.where((offs_n < N)[None, :], s, float("-inf"))
        raised = tl.maximum(top, tl.max(s, axis=1))
        total = total * tl.exp(top - raised) + tl.sum(tl.exp(s - raised[:, None]), axis=1)
        top = raised
    mask_m = offs_m < M
    tl.store(loss_ptr + offs_m, (tl.log(total) - (own - top)).to(loss_ptr.dtype.element_ty), mask=mask_m)
    tl.store(stats_ptr + offs_m, top, mask=mask_m)
    tl.store(stats_ptr + M + offs_m, total, mask=mask_m)


@triton.jit
def _info_nce_bwd_kernel(
    dloss_ptr,
    a_ptr,
    b_ptr,
    stats_ptr,
    da_ptr,
    A,
    B,
    D,
    M,
    stride_dloss,
    SCALE: tl.constexpr,
    MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    A_IS_QUERY: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """BLOCK_OUT columns of BLOCK_A rows of the gradient of `a`: the queries with b the keys, or the other way round.

    `stats` and `dloss` belong to the queries.
    """
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)  # (BLOCK_A,)
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # (BLOCK_OUT,)
    acc = tl.zeros((BLOCK_A, BLOCK_OUT), tl.float32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)  # (BLOCK_B,)
        s = _score_tile(a_ptr, b_ptr, offs_a, offs_b, A, B, D, SCALE, PRECISION, UPCAST, BLOCK_A, BLOCK_B, BLOCK_D)
        if A_IS_QUERY:
            offs_m = offs_a[:, None]
        else:
            offs_m = offs_b[None, :]
        mask_m = offs_m < M
        top = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
        total = tl.load(stats_ptr + M + offs_m, mask=mask_m, other=float("inf"))  # p is 0 beyond the last query
        g = tl.load(dloss_ptr + offs_m.to(tl.int64) * stride_dloss, mask=mask_m, other=0.0).to(tl.float32)
        # divided by the sum, not less its logarithm, which is rounded to as much as the sum of p may be off by
        p = tl.exp(s - top) * (1.0 / total)  # (BLOCK_A, BLOCK_B)
        ds = g * (p - tl.where(offs_a[:, None] == offs_b[None, :], 1.0, 0.0))
        b = tl.load(
            b_ptr + offs_b.to(tl.int64)[:, None] * D + offs_out[None, :],
            mask=(offs_b < B)[:, None] & (offs_out < D)[None, :],
            other=0.0,
        )  # (BLOCK_B, BLOCK_OUT)
        ds = ds.to(b.dtype)
        if UPCAST:
            ds, b = ds.to(tl.float32), b.to(tl.float32)
        acc = _dot_add(ds, b, acc, PRECISION)
    # the factor that all share stays in fp32
    acc *= SCALE
    if MEAN:
        acc = acc / M
    tl.store(
        da_ptr + offs_a.to(tl.int64)[:, None] * D + offs_out[None, :],
        acc.to(da_ptr.dtype.element_ty),
        mask=(offs_a < A)[:, None] & (offs_out < D)[None, :],
    )


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _config(query: torch.Tensor) -> tuple[int, int, dict[str, Any]]:
    """Rows of a tile, columns of a gradient's tile, and what the kernels share."""
    # the interpreter's products of bf16 are wrong
    common: dict[str, Any] = {"PRECISION": "ieee", "UPCAST": INTERPRET, "num_warps": 4}
    if query.dtype == torch.float32:
        return 32, 64, {**common, "BLOCK_D": 32}
    if query.shape[1] % 8 == 0:
        return 64, 128, {**common, "BLOCK_D": 64}
    # an address for each element, instead of one for eight
    return 64, 64, {**common, "BLOCK_D": 32, "num_warps": 8, "num_stages": 1}


def info_nce_loss(
    query: torch.Tensor, key: torch.Tensor, *, temperature: float = 0.07, reduction: str = "mean"
) -> torch.Tensor:
    return info_nce_loss_fwd(query, key, temperature, reduction)[0]


def info_nce_loss_fake(
    query: torch.Tensor, key: torch.Tensor, *, temperature: float = 0.07, reduction: str = "mean"
) -> torch.Tensor:
    return query.new_empty(query.shape[:1] if reduction == "none" else ())


def info_nce_loss_fwd(
    query: torch.Tensor, key: torch.Tensor, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    loss, stats = info_nce_loss_fwd_fake(query, key, temperature, reduction)
    (M, D), N = query.shape, key.shape[0]
    rows = loss if reduction == "none" else stats.new_empty(M)
    block, _, config = _config(query)
    launch(
        _info_nce_fwd_kernel,
        (cdiv(M, block),),
        query.contiguous(),
        key.contiguous(),
        rows,
        stats,
        M,
        N,
        D,
        SCALE=1.0 / temperature,
        BLOCK_M=block,
        BLOCK_N=block,
        **config,
    )
    if reduction != "none":
        sum_partials(rows, loss, M, reduction == "mean")
    return loss, stats


def info_nce_loss_fwd_fake(
    query: torch.Tensor, key: torch.Tensor, temperature: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = info_nce_loss_fake(query, key, temperature=temperature, reduction=reduction)
    return loss, query.new_empty((2, query.shape[0]), dtype=arithmetic_dtype(query))


def info_nce_loss_bwd(
    dloss: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dquery, dkey = info_nce_loss_bwd_fake(dloss, query, key, stats, temperature, reduction, needs)
    query, key, dloss = query.contiguous(), key.contiguous(), dloss.reshape(-1)
    (M, D), N = query.shape, key.shape[0]
    block, out, config = _config(query)
    out = min(out, max(16, next_power_of_2(D)))
    if out == 128:
        config["num_warps"] = 8  # a gradient's tile beside the scores'
    for needed, a, b, da, A, B in ((needs[0], query, key, dquery, M, N), (needs[1], key, query, dkey, N, M)):
        if needed:
            launch(
                _info_nce_bwd_kernel,
                (cdiv(A, block), cdiv(D, out)),
                dloss,
                a,
                b,
                stats,
                da,
                A,
                B,
                D,
                M,
                dloss.stride(0) if reduction == "none" else 0,
                SCALE=1.0 / temperature,
                MEAN=reduction == "mean",
                A_IS_QUERY=da is dquery,
                BLOCK_A=block,
                BLOCK_B=block,
                BLOCK_OUT=out,
                **config,
            )
    return dquery, dkey


def info_nce_loss_bwd_fake(
    dloss: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape if needs[0] else (0,)), key.new_empty(key.shape if needs[1] else (0,))


def info_nce_loss_check(
    query: torch.Tensor, key: torch.Tensor, *, temperature: float = 0.07, reduction: str = "mean"
) -> None:
    def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> None:
        bad_argument("info_nce_loss", argument, given, allowed, error)

    if query.ndim != 2 or query.shape[1] == 0:
        bad("query", f"of shape {tuple(query.shape)}", "(M, D) with D > 0")
    if key.dtype != query.dtype:
        bad("key", f"of dtype {key.dtype}", f"{query.dtype}, as query", TypeError)
    if key.ndim != 2 or key.shape[1] != query.shape[1]:
        bad("key", f"of shape {tuple(key.shape)}", f"(N, {query.shape[1]}), since query is {tuple(query.shape)}")
    if key.shape[0] < query.shape[0]:
        bad("key", f"of shape {tuple(key.shape)}", f"at least {query.shape[0]} rows, one for each query")
    if not 0.0 < temperature < math.inf:
        bad("temperature", temperature, "a finite number above 0")
    if reduction not in REDUCTIONS:
        bad("reduction", repr(reduction), "'none', 'mean' or 'sum'")


# --------------------------------------------------------------------------------------------------------------------
# Gradient
# --------------------------------------------------------------------------------------------------------------------


def info_nce_loss_forward(
    ctx: Any, query: torch.Tensor, key: torch.Tensor, temperature: float, reduction: str
) -> torch.Tensor:
    loss, stats = torch.ops.tt.info_nce_loss_fwd(query, key, temperature, reduction)
    ctx.save_for_backward(query, key, stats)
    ctx.options = (temperature, reduction)
    return loss


def info_nce_loss_backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.tt.info_nce_loss_bwd(dloss, *ctx.saved_tensors, *ctx.options, list(ctx.needs))


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def _inputs(M: int, N: int, D: int, device: torch.device | str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.nn.functional.normalize(torch.randn(n, D, device=device), dim=1).to(dtype) for n in (M, N))


def info_nce_loss_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    yield Sample("5x7_D33", _inputs(5, 7, 33, device, dtype))
    options = {"temperature": 0.5, "reduction": "none"}
    yield Sample("67x70_D20_none", _inputs(67, 70, 20, device, dtype), options)
    if dtype in (torch.float32, torch.float64):
        yield Sample("D150_sum", _inputs(3, 4, 150, device, dtype), {"reduction": "sum"})
        yield Sample("empty_sum", _inputs(0, 3, 5, device, dtype), {"reduction": "sum"})
        yield Sample("one", _inputs(1, 1, 1, device, dtype))


def info_nce_loss_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    query, key = _inputs(4, 5, 6, device, torch.float32)
    name = "tt::info_nce_loss"
    yield ErrorSample("query", (query[0], key), match=rf"{name}.*'query'.*\(6,\).*\(M, D\)")
    yield ErrorSample("dtype", (query, key.half()), error=TypeError, match=f"{name}.*'key'.*float16.*float32")
    yield ErrorSample("key", (query, key[:, :3]), match=rf"{name}.*'key'.*\(5, 3\).*\(N, 6\)")
    yield ErrorSample("few", (query, key[:3]), match=f"{name}.*'key'.*at least 4 rows")
    yield ErrorSample("temperature", (query, key), {"temperature": 0.0}, match=f"{name}.*'temperature' is 0.0")
    yield ErrorSample("reduction", (query, key), {"reduction": "all"}, match=f"{name}.*'reduction' is 'all'")


def info_nce_loss_bench_cases() -> Iterator[BenchCase]:
    for M, D in ((4096, 256), (16384, 512)):
        yield BenchCase(f"{M}x{D}", lambda device, dtype, M=M, D=D: (_inputs(M, M, D, device, dtype), {}))


def info_nce_loss_cost(
    query: torch.Tensor, key: torch.Tensor, *, temperature: float = 0.07, reduction: str = "mean"
) -> Cost:
    product = 2 * query.shape[0] * key.shape[0] * query.shape[1]
    read = (query.numel() + key.numel()) * query.element_size()
    # what there is to compute: the scores once more, and two products
    return Cost(product, read, 3 * product, 2 * read)
