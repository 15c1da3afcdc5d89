"""The launchers that linear_cross_entropy and linear_logprob share: chunks of rows, or of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_triton_ops.launch import (
    INTERPRET,
    can_describe,
    capability,
    cdiv,
    descriptor,
    launch,
    next_power_of_2,
    sm_count,
)

from .kernels import (
    _lce_coef_kernel,
    _lce_dbias_kernel,
    _lce_dlogits_kernel,
    _lce_gather_kernel,
    _lce_gemm_kernel,
    _lce_index_kernel,
    _lce_reduce_kernel,
    _lce_rows_kernel,
    _lce_scale_kernel,
    _lce_scatter_kernel,
    _lce_tma_kernel,
)

# Bytes of the logits of one chunk of rows, when their gradient is computed from them. Each chunk but the first reads and writes
# the weight's gradient once more: bench/results/tuning/nvidia_h200/linear_cross_entropy.json has times by number of chunks.
_LCE_ROWS_BYTES = 2**30
# Rows whose weight gradients are added up at the weight's own half precision: more chunks than this add in float32.
_LCE_ROUNDED_CHUNKS = 4
# Bytes of the logits' gradient for one chunk of the vocabulary, when the log-sum-exp is known.
_LCE_COLUMNS_BYTES = 128 * 2**20
# Rows come in whole blocks of this size, the last filled up with zeros; in the interpreter these take as long as rows.
_LCE_ROWS = 32 if INTERPRET else 128
_LCE_NOTHING_IGNORED = -(2**62)


class _LceOptions(NamedTuple):
    """What the logits go through, and what becomes of them."""

    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    entropy: bool = False  # linear_logprob

    def epilogue(self) -> dict[str, Any]:
        return {
            "SMOOTHING": self.smoothing,
            "SOFTCAP": self.softcap,
            "TEMPERATURE": self.temperature,
            "ENTROPY": self.entropy,
        }


@dataclass(frozen=True)
class _LceRows:
    """The rows that count, on the GPU."""

    index: torch.Tensor  # (M,), int32: which they are; undefined past their number
    count: torch.Tensor  # (1,), int32
    divisor: torch.Tensor  # (1,), float32: the same number


class _LceHead(NamedTuple):
    """hidden (M, H), weight (V, H), target (M,), bias (V,) or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None
    tma: bool  # whether the products read their operands by TMA: half precision, rows of whole 16 bytes

    @classmethod
    def of(
        cls, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
    ) -> _LceHead:
        H = hidden.shape[-1]
        tma = capability(weight.device) >= 90 and weight.element_size() == 2 and H > 0 and H % 8 == 0
        # TMA wants aligned rows; with no contiguous dim every load would be a scattered one. A copy costs less than a product.
        if tma and _lce_view(weight) is None:
            weight = weight.clone(memory_format=torch.contiguous_format)
        elif not tma and 1 not in weight.stride():
            weight = weight.contiguous()
        return cls(
            hidden.reshape(math.prod(hidden.shape[:-1]), H),
            weight,
            target.reshape(-1).contiguous(),
            None if bias is None else bias.contiguous(),
            tma,
        )

    def logits(self, R: int, columns: int) -> torch.Tensor:
        """Room for R rows of logits, or of their gradient. The interpreter cuts bfloat16 off instead of rounding it."""
        dtype = torch.float32 if INTERPRET else self.hidden.dtype
        return self.hidden.new_empty((R, _lce_padded(columns, self.hidden.element_size())), dtype=dtype)[:, :columns]

    def config(self, options: _LceOptions | None = None) -> _LceConfig:
        """The tile of a product; `options` for a product of logits."""
        if INTERPRET:
            return _LceConfig(64, 256, 64, 4, 1, "ieee")
        if self.tma:
            # a softcap's tanh, and on sm_100 an entropy too, leaves no registers for the widest accumulator
            blackwell = capability(self.weight.device) >= 100
            if options is not None and (options.softcap or (options.entropy and blackwell)):
                return _LceConfig(*((64, 128, 64, 4, 5) if blackwell else (128, 128, 64, 8, 5)), "tf32")
            return _LceConfig(128, 256, 64, 8, 4, "tf32")
        if self.hidden.element_size() == 2:
            # without 16-byte loads every element has a pointer of its own: smaller blocks leave registers for them
            return _LceConfig(*((128, 128, 64, 8, 3) if self.hidden.shape[1] % 8 == 0 else (64, 64, 32, 4, 3)), "tf32")
        # torch >= 2.9 has fp32_precision, and raises on the older name once a program has set it
        settings = torch.backends.cuda.matmul
        tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
        # CUDA cores: operands and accumulator are registers, which limits the tile
        return _LceConfig(128, 128, 32, 8, 3, "tf32") if tf32 else _LceConfig(64, 64, 16, 4, 3, "ieee")


class _LceConfig(NamedTuple):
    """A product's tile; precision is tl.dot's, what torch would use on CUDA, and ignored by half precision."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str


def _lce_view(x: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    """An operand (rows, K) as TMA can read it, and whether K is its contiguous dim; None if it cannot."""
    if can_describe(x):
        return x, True
    return (x.t(), False) if can_describe(x.t()) else None


def _lce_gemm(
    epilogue: str,
    head: _LceHead,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None,
    rows: _LceRows,
    R: int,
    first: int,
    options: _LceOptions | None = None,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    coef: torch.Tensor | None = None,
    part: torch.Tensor | None = None,
    z_target: torch.Tensor | None = None,
    column: int = 0,
    split: int = 1,
) -> None:
    """a (M, K) times b (N, K) transposed, any strides, over the rows of the chunk, R at most, at compact row `first`; then

    "statistics": plus bias; the tiles' statistics to `part` and `z_target`, the logits to `out`, if given;
    "dlogits": plus bias; the gradient of the logits, by `coef`, to `out`; b's first row is the vocabulary's `column`;
    "dweight": plus `add`, if given, to `out`; the rows are the inner dimension;
    "dhidden": to the rows `index[first + i]` of `out`;
    "partial": plus `add`, if given, to `out` (split, R, N), float32.
    """
    (M, K), N = a.shape, b.shape[0]
    config = head.config(options)
    shared: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        # so many rows of tiles are worked on together that a chunk of 2048 rows reads the weight once
        "GROUP_M": 16 if epilogue in ("statistics", "dlogits") else 8,
        "SPLIT_K": split,
        "ROWS": _LCE_ROWS,
        "EPILOGUE": epilogue,
        "HAS_BIAS": bias is not None,
        "STORE": out is not None,
        "ADD": add is not None,
        "EVEN_N": epilogue == "statistics" and N % config.block_n == 0,
        **(options or _LceOptions()).epilogue(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n) * split
    k_split = cdiv(cdiv(K, config.block_k), split) * config.block_k
    pointers = (bias, label, coef, part, z_target, rows.index, rows.count)
    sizes = (M, N, K, k_split, R, first, column, 0 if out is None else out.stride(-2))
    view_a, view_b = (_lce_view(a), _lce_view(b)) if head.tma else (None, None)
    if view_a is not None and view_b is not None:
        tma_out = out is not None and add is None and epilogue in ("statistics", "dlogits", "dweight")
        box = (config.block_m, config.block_n // 2)
        launch(
            _lce_tma_kernel,
            (min(tiles, sm_count(a.device)),),
            *(
                descriptor(view, (length, config.block_k) if k_major else (config.block_k, length))
                for (view, k_major), length in ((view_a, config.block_m), (view_b, config.block_n))
            ),
            descriptor(out, box) if tma_out and out is not None else out,
            add,
            *pointers,
            *sizes,
            A_K_MAJOR=view_a[1],
            B_K_MAJOR=view_b[1],
            TMA_OUT=tma_out,
            **shared,
        )
    else:
        launch(
            _lce_gemm_kernel,
            (tiles,),
            a,
            b,
            out,
            add,
            *pointers,
            *sizes,
            *a.stride(),
            *b.stride(),
            PRECISION=config.precision,
            # the interpreter's tl.dot is wrong for bf16
            UPCAST=INTERPRET,
            **shared,
        )


# --------------------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------------------


def _lce_index(target: torch.Tensor, ignore_index: int, divisor: torch.Tensor) -> _LceRows:
    """`divisor` is written to."""
    M = target.shape[0]
    rows = _LceRows(target.new_empty(M, dtype=torch.int32), target.new_empty(1, dtype=torch.int32), divisor)
    launch(_lce_index_kernel, (1,), target, rows.index, rows.count, divisor, M, ignore_index, BLOCK_M=4096, num_warps=8)
    return rows


def _lce_gather(head: _LceHead, rows: _LceRows, first: int, rows_out: torch.Tensor, label: torch.Tensor) -> None:
    R, H = rows_out.shape
    block_h = min(2048, next_power_of_2(max(H, 1)))
    block_m = min(2048 // block_h, 64)
    launch(
        _lce_gather_kernel,
        (cdiv(R, block_m),),
        head.hidden,
        head.target,
        rows.index,
        rows.count,
        rows_out,
        label,
        first,
        R,
        H,
        head.weight.shape[0],
        *head.hidden.stride(),
        BLOCK_M=block_m,
        BLOCK_H=block_h,
        num_warps=4,
    )


def _lce_padded(V: int, itemsize: int) -> int:
    """Row length of a buffer of V columns whose rows begin at multiples of 128 bytes."""
    unit = 128 // itemsize
    return cdiv(V, unit) * unit


def _lce_rows_per_chunk(M: int, V: int, itemsize: int) -> int:
    """Rows of a chunk: chunks as equal as blocks of rows allow, none of more than _LCE_ROWS_BYTES unless one block is."""
    blocks = max(1, cdiv(M, _LCE_ROWS))
    per_chunk = max(1, _LCE_ROWS_BYTES // (_lce_padded(V, itemsize) * itemsize * _LCE_ROWS))
    return cdiv(blocks, cdiv(blocks, per_chunk)) * _LCE_ROWS


def _lce_columns_per_chunk(R: int, V: int, itemsize: int) -> int:
    """The same for the vocabulary, in blocks of 256."""
    blocks = cdiv(V, 256)
    per_chunk = max(1, _LCE_COLUMNS_BYTES // (256 * R * itemsize))
    return cdiv(blocks, cdiv(blocks, per_chunk)) * 256


def _lce_split(R: int, H: int, columns: int, sms: int) -> int:
    """How many programs share a tile of the hidden states' gradient, whose inner dimension is so many columns."""
    tiles = max(1, cdiv(R, 128) * cdiv(H, 256))
    return max(1, min(sms // tiles, columns // 512, 16))


class _LceResults(NamedTuple):
    """out: the rows' losses, or log-probabilities; zeros for a row that does not count. lse (M, 2)."""

    out: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor


class _LceGradients:
    """The gradients that are wanted, allocated; those that are not are None."""

    def __init__(
        self, head: _LceHead, dhidden: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor, needs: Sequence[bool]
    ) -> None:
        self.hidden = dhidden.zero_().view(head.hidden.shape) if needs[0] else None
        self.weight = dweight if needs[1] else None
        self.bias = dbias if needs[2] else None
        self.bias_sum = dbias.new_empty(dbias.shape, dtype=torch.float32) if needs[2] else None

    def add_bias(self, dlogits: torch.Tensor, rows: _LceRows, first: int, add: bool, columns: slice) -> None:
        """The column sums of a chunk of the logits' gradient."""
        if self.bias_sum is None:
            return
        R, V = dlogits.shape
        launch(
            _lce_dbias_kernel,
            (cdiv(V, 64),),
            dlogits,
            rows.count,
            self.bias_sum[columns],
            first,
            V,
            R,
            dlogits.stride(0),
            ADD=add,
            BLOCK_M=64,
            BLOCK_V=64,
            num_warps=4,
        )

    def finish_bias(self) -> None:
        if self.bias is not None and self.bias_sum is not None:
            self.bias.copy_(self.bias_sum)


def _lce_scatter(part: torch.Tensor, rows: _LceRows, first: int, dhidden: torch.Tensor) -> None:
    parts, R, H = part.shape
    block_h = min(1024, next_power_of_2(max(H, 1)))
    block_m = min(1024 // block_h, 64)
    launch(
        _lce_scatter_kernel,
        (cdiv(R, block_m), cdiv(H, block_h)),
        part,
        rows.index,
        rows.count,
        dhidden,
        first,
        R,
        H,
        parts,
        BLOCK_M=block_m,
        BLOCK_H=block_h,
        num_warps=4,
    )


# --------------------------------------------------------------------------------------------------------------------
# By rows: forward, and the gradient with it
# --------------------------------------------------------------------------------------------------------------------


def _lce_by_rows(
    head: _LceHead,
    rows: _LceRows,
    results: _LceResults,
    options: _LceOptions,
    gradients: _LceGradients | None = None,
    mean: bool = False,
) -> None:
    """Losses of the rows; and with `gradients` those of their sum, or mean, from the logits of one chunk after another.

    Without, no logits are stored: the tiles' statistics are all that the first product writes.
    """
    (M, H), V = head.hidden.shape, head.weight.shape[0]
    itemsize = head.hidden.element_size()
    new = head.hidden.new_empty
    if gradients is None:
        # a copy of the rows is the largest thing: 4096 of them are enough to fill a GPU
        R = min(4096, max(1, cdiv(M, _LCE_ROWS)) * _LCE_ROWS)
    else:
        R = _lce_rows_per_chunk(M, V, itemsize)
    chunk, label = new((R, H)), new(R, dtype=torch.int32)
    tiles = cdiv(V, head.config(options).block_n)
    part = new((3 if options.smoothing or options.entropy else 2, tiles, R), dtype=torch.float32)
    logits = coef = z_target = total = None
    if gradients is None:
        z_target = new(R, dtype=torch.float32)
    else:
        logits = head.logits(R, V)
        coef = new((6, R), dtype=torch.float32)
        if gradients.weight is not None and itemsize == 2 and cdiv(M, R) > _LCE_ROUNDED_CHUNKS:
            total = gradients.weight.new_empty(gradients.weight.shape, dtype=torch.float32)
    for first in range(0, max(M, 1), R):
        _lce_gather(head, rows, first, chunk, label)
        _lce_gemm(
            "statistics",
            head,
            chunk,
            head.weight,
            logits,
            rows,
            R,
            first,
            options,
            bias=head.bias,
            label=label,
            part=part,
            z_target=z_target,
        )
        launch(
            _lce_rows_kernel,
            (cdiv(R, 16),),
            part,
            logits,
            z_target,
            label,
            rows.index,
            rows.count,
            rows.divisor,
            results.out,
            results.entropy,
            results.lse,
            coef,
            first,
            V,
            tiles,
            R,
            0 if logits is None else logits.stride(0),
            SMOOTHING=options.smoothing,
            Z_LOSS=options.z_loss,
            SOFTCAP=options.softcap,
            ENTROPY=options.entropy,
            HAS_LOGITS=logits is not None,
            HAS_DIVISOR=mean,
            HAS_COEF=coef is not None,
            BLOCK_R=16,
            BLOCK_T=64,
            num_warps=4,
        )
        if gradients is None or logits is None:
            continue
        block_v = min(4096, next_power_of_2(V))
        block_m = min(4096 // block_v, _LCE_ROWS)
        launch(
            _lce_dlogits_kernel,
            (cdiv(R, block_m) * cdiv(V, block_v),),
            logits,
            label,
            coef,
            rows.count,
            first,
            V,
            R,
            logits.stride(0),
            SMOOTHING=options.smoothing,
            SOFTCAP=options.softcap,
            ROWS=_LCE_ROWS,
            BLOCK_M=block_m,
            BLOCK_V=block_v,
            num_warps=4,
        )
        gradients.add_bias(logits, rows, first, first > 0, slice(None))
        if gradients.hidden is not None:
            split = _lce_split(R, H, V, sm_count(chunk.device))
            if split == 1:
                _lce_gemm("dhidden", head, logits, head.weight.t(), gradients.hidden, rows, R, first)
            else:
                partial = new((split, R, H), dtype=torch.float32)
                _lce_gemm("partial", head, logits, head.weight.t(), partial, rows, R, first, split=split)
                _lce_scatter(partial, rows, first, gradients.hidden)
        if gradients.weight is not None:
            last = first + R >= M
            before = None if first == 0 else gradients.weight if total is None else total
            after = gradients.weight if total is None or last else total
            _lce_gemm("dweight", head, logits.t(), chunk.t(), after, rows, R, first, add=before)
    if gradients is not None:
        gradients.finish_bias()


# --------------------------------------------------------------------------------------------------------------------
# By columns: the gradient when upstream gradients and the log-sum-exp are known
# --------------------------------------------------------------------------------------------------------------------


def _lce_by_columns(
    head: _LceHead,
    rows: _LceRows,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    options: _LceOptions,
    gradients: _LceGradients,
    mean: bool = False,
) -> None:
    """Gradients from `grad` (M,) of the rows' results, logits computed again for one part of the vocabulary after another.

    A part's gradient of the weight is complete at once; the hidden states' are added up in float32.
    """
    (M, H), V = head.hidden.shape, head.weight.shape[0]
    new = head.hidden.new_empty
    itemsize = head.hidden.element_size()
    R = max(1, cdiv(M, _LCE_ROWS)) * _LCE_ROWS
    chunk, label = new((R, H)), new(R, dtype=torch.int32)
    _lce_gather(head, rows, 0, chunk, label)
    coef = new((6, R), dtype=torch.float32)
    launch(
        _lce_coef_kernel,
        (cdiv(R, 128),),
        grad,
        grad_entropy,
        lse,
        entropy,
        rows.divisor,
        label,
        rows.index,
        rows.count,
        coef,
        V,
        R,
        grad.stride(0),
        SMOOTHING=options.smoothing,
        Z_LOSS=options.z_loss,
        TEMPERATURE=options.temperature,
        ENTROPY=options.entropy,
        HAS_DIVISOR=mean,
        BLOCK_R=128,
        num_warps=4,
    )
    columns = _lce_columns_per_chunk(R, V, itemsize)
    split = _lce_split(R, H, min(columns, V), sm_count(chunk.device))
    partial = new((split, R, H), dtype=torch.float32) if gradients.hidden is not None else None
    buffer = head.logits(R, min(columns, V))
    for column in range(0, V, columns):
        part = slice(column, min(column + columns, V))
        weight = head.weight[part]
        dlogits = buffer[:, : weight.shape[0]]
        bias = None if head.bias is None else head.bias[part]
        common = (rows, R, 0)
        _lce_gemm(
            "dlogits", head, chunk, weight, dlogits, *common, options, bias=bias, label=label, coef=coef, column=column
        )
        gradients.add_bias(dlogits, rows, 0, False, part)
        if partial is not None:
            before = None if column == 0 else partial
            _lce_gemm("partial", head, dlogits, weight.t(), partial, *common, add=before, split=split)
        if gradients.weight is not None:
            _lce_gemm("dweight", head, dlogits.t(), chunk.t(), gradients.weight[part], *common)
    if partial is not None and gradients.hidden is not None:
        _lce_scatter(partial, rows, 0, gradients.hidden)
    gradients.finish_bias()


def _lce_reduce(rows_loss: torch.Tensor, rows: _LceRows, loss: torch.Tensor, mean: bool) -> None:
    M = rows_loss.shape[0]
    launch(_lce_reduce_kernel, (1,), rows_loss, rows.divisor, loss, M, HAS_DIVISOR=mean, BLOCK_M=4096, num_warps=8)


def _lce_scale(grad: torch.Tensor, x: torch.Tensor) -> None:
    """x *= grad, in place."""
    NUMEL = x.numel()
    grid = (min(cdiv(NUMEL, 4096), 8 * sm_count(x.device)),)
    launch(_lce_scale_kernel, grid, grad, x, NUMEL, BLOCK=4096, num_warps=8)
