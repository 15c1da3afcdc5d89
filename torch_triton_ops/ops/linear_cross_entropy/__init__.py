"""The head of a language model and its loss in one: `linear_cross_entropy`, and `linear_logprob` for preference losses.

u      = hidden @ weight^T + bias                                  the logits, (rows, V); never whole in memory
z      = softcap * tanh(u / softcap) / temperature                 without a softcap, u / temperature
lse    = log sum_c exp(z[c]),  p = exp(z - lse)

linear_cross_entropy (temperature 1), for a row with target t, s being `label_smoothing`:

row    = (1 - s) * (lse - z[t])  +  s / V * sum_c (lse - z[c])  +  z_loss * lse ** 2

A row whose target is `ignore_index` counts 0. Then "none" gives the rows, "sum" their sum, "mean" their sum divided by the
number of rows not ignored: NaN when there is none, as in torch.

linear_logprob: logprob = z[t] - lse, entropy = -sum_c p[c] log p[c], each for every row; both are differentiable.

| tensor | shape | dtype |
|---|---|---|
| hidden | (..., H), any strides | float32, float16, bfloat16 |
| weight | (V, H), any strides | that of hidden |
| target | (...), that of hidden without H | int64, int32 |
| bias | (V,) or None | that of hidden |
| loss | () or, with "none", that of target | float32 |
| logprob, entropy | that of target | float32 |

Gradients reach hidden, weight and bias, each only if it asks for one. Raises ValueError for sizes that do not match, V = 0, a
number out of its range, an unknown reduction; TypeError for dtypes; IndexError on CPU for a target outside [0, V) that is
not `ignore_index`. On CUDA, where looking would mean waiting, such a target makes the loss and the gradients that it
takes part in NaN, and nothing is read or written out of bounds.

How the work is done
--------------------
Rows that are ignored cost nothing but a look at their target: a kernel lists the others, first to last, and their number; the
products run over that list, from a copy of its rows, and read the number on the GPU. No host synchronisation, no
atomics: the same result every time, and in a CUDA graph for whatever targets a replay finds.

Without a gradient there is one product. Its epilogue makes of each tile of logits, in float32 and in registers, a maximum
and a sum of exponentials by row; these, 8 bytes for a row and 256 columns, are all that is written.

With a gradient of a "sum" or a "mean", where the upstream gradient is one number, everything is computed in the forward,
and the backward multiplies by that number, in place, unless it is 1. Three products of 2 M V H flops are the least there
is: at M = 8192, H = 4096, V = 128256 they are 25.8 TFLOP, 38 ms at 680 TFLOP/s. The gradient of a logit needs its row's
log-sum-exp, hence all logits of a row at once; and three products, not four, mean that these are stored until then. So
rows are taken in chunks of at most 1 GiB of logits (two of 4096 rows there). For each chunk:

    logits = rows @ weight^T   rounded to their dtype; the epilogue makes the statistics, of what was rounded
    logits become their gradient in place, rounded to their dtype            one read, one write: 2.1 GB, 0.5 ms
    dhidden[chunk] = dlogits @ weight                                        complete: rounded once
    dweight += dlogits^T @ rows                                              added up in the product's epilogue

More and smaller chunks take less memory and more time, because each but the first reads and writes dweight, 2.1 GB, once
more. On an H200 2, 4, 8 and 16 chunks take 39.4, 40.6, 42.3 and 51.0 ms and 1.03, 0.51, 0.26 and 0.16 GiB beside the
gradients, which are 1.04 GiB themselves (bench/results/tuning/nvidia_h200/linear_cross_entropy.json).

`dweight` is the only thing that is rounded once for every chunk. A float32 accumulator beside it would be 2.1 GB; instead
at most four chunks add to it at its own dtype (random roundings of partial sums that grow as sqrt(k / 4) add up to 1.6
times one rounding, within the budget of twice), and where there are more they do get that accumulator, which is then
small beside the logits that are not stored. The statistics are of the rounded logits because that is what torch does:
where one p is near 1, p - 1 is then as exact as torch's, which it is not with a log-sum-exp of other logits.

Otherwise (reduction "none", linear_logprob, a second backward through the same graph, and float16, whose range the upstream
gradient must be multiplied into before anything is rounded) the forward is the one product, the backward three: logits
are computed again for one part of the vocabulary after another, turned into their gradient in the epilogue, in float32,
and rounded once; a part's dweight is complete at once, dhidden is added up in float32.

Sources: torch.nn.functional.cross_entropy; recomputed and chunked heads, https://arxiv.org/abs/2410.10989 and
https://arxiv.org/abs/2411.09009; z-loss, https://arxiv.org/abs/2204.02311; softcap, https://arxiv.org/abs/2408.00118
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import INTERPRET

from .head import (
    _LCE_NOTHING_IGNORED,
    _lce_by_columns,
    _lce_by_rows,
    _lce_index,
    _lce_reduce,
    _lce_scale,
    _LceGradients,
    _LceHead,
    _LceOptions,
    _LceResults,
)

# --------------------------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------------------------


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _upcast(x: torch.Tensor) -> torch.Tensor:
    return x.to(_arithmetic_dtype(x))


def _logits_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float, rounded: bool = False
) -> torch.Tensor:
    """z (rows, V) at temperature 1; `rounded`: the product is of the inputs' dtype, as eager torch's."""
    hidden = hidden.reshape(-1, hidden.shape[-1]) if hidden.numel() else hidden.flatten(0, -2)
    if rounded:
        z = _upcast(F.linear(hidden, weight, bias))
    else:
        z = F.linear(_upcast(hidden), _upcast(weight), None if bias is None else _upcast(bias))
    return softcap * torch.tanh(z / softcap) if softcap else z


def _targets_reference(op: str, target: torch.Tensor, V: int, ignore_index: int | None) -> torch.Tensor:
    t = target.reshape(-1).long()
    wrong = t[((t < 0) | (t >= V)) & (t != ignore_index if ignore_index is not None else torch.ones_like(t).bool())]
    if wrong.numel():
        allowed = f"0 to {V - 1}" + ("" if ignore_index is None else f", or ignore_index={ignore_index}")
        bad_argument(op, "target", wrong[0].item(), allowed, IndexError)
    return t


def _loss_reference(
    z: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> torch.Tensor:
    t = _targets_reference("linear_cross_entropy", target, z.shape[-1], ignore_index)
    rows = F.cross_entropy(z, t, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    active = t != ignore_index
    if z_loss:
        rows = rows + torch.where(active, z_loss * torch.logsumexp(z, -1).square(), 0.0)
    if reduction == "none":
        return rows.reshape(target.shape)
    return rows.sum() / active.sum() if reduction == "mean" else rows.sum()


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    z = _logits_reference(hidden, weight, bias, softcap)
    return _loss_reference(z, target, ignore_index, label_smoothing, z_loss, reduction)


def linear_cross_entropy_eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """A head in eager torch, then its loss in float32: the logits and their gradient are rounded to the inputs' dtype."""
    z = _logits_reference(hidden, weight, bias, softcap, rounded=True)
    return _loss_reference(z, target, ignore_index, label_smoothing, z_loss, reduction)


def linear_cross_entropy_fwd_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    z = _logits_reference(hidden, weight, bias, softcap)
    loss = _loss_reference(z, target, ignore_index, label_smoothing, z_loss, reduction)
    active = target.reshape(-1) != ignore_index
    lse = _lse_reference(z, target).masked_fill(~active.reshape(*target.shape, 1), 0.0)
    divisor = active.sum().to(z.dtype).reshape(1) if reduction == "mean" else z.new_empty(0)
    outputs = linear_cross_entropy_fwd_fake(
        hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction, needs
    )
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    gradients: Sequence[torch.Tensor] = outputs[3:]
    if any(needs):
        gradients = linear_cross_entropy_bwd_reference(
            loss.new_ones(()), hidden, weight, target, lse, divisor, bias, *options, needs
        )
    return loss, lse, divisor, *gradients


def _lse_reference(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(..., 2): the maximum and the logarithm of the sum of exponentials relative to it."""
    z_max = z.amax(-1)
    z_max = torch.where(z_max == float("-inf"), 0.0, z_max)
    return torch.stack([z_max, torch.exp(z - z_max[:, None]).sum(-1).log()], -1).reshape(*target.shape, 2)


def linear_cross_entropy_bwd_reference(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    z = _logits_reference(hidden, weight, bias, softcap)
    t = target.reshape(-1).long()
    active = t != ignore_index
    g = _upcast(dloss).reshape(-1).expand(t.shape)
    if reduction == "mean":
        g = g / divisor
    lse = lse.reshape(-1, 2)
    p = torch.exp((z - lse[:, :1]) - lse[:, 1:])
    dz = p * (1 + 2 * z_loss * lse.sum(1, keepdim=True)) - label_smoothing / z.shape[-1]
    dz.scatter_add_(1, t.masked_fill(~active, 0)[:, None], dz.new_full((t.shape[0], 1), label_smoothing - 1.0))
    dz = (dz * g[:, None]).masked_fill(~active[:, None], 0.0)
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    return _head_gradients_reference(dz, hidden, weight, bias, needs)


def _head_gradients_reference(
    dz: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    dhidden, dweight, dbias = _gradients_fake(hidden, weight, bias, needs)
    if needs[0]:
        dhidden = (dz @ _upcast(weight)).to(hidden.dtype).reshape(hidden.shape)
    if needs[1]:
        dweight = (dz.t() @ _upcast(hidden).reshape(dz.shape[0], hidden.shape[-1])).to(weight.dtype)
    if needs[2]:
        dbias = dz.sum(0).to(dbias.dtype)
    return dhidden, dweight, dbias


def linear_cross_entropy_scale_reference(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    dhidden: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> None:
    for x in (dhidden, dweight, dbias):
        x.copy_(_upcast(x) * dloss)


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _logprob_of_logits(_logits_reference(hidden, weight, bias, softcap) / temperature, target)


def linear_logprob_eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with logits of the inputs' dtype."""
    return _logprob_of_logits(_logits_reference(hidden, weight, bias, softcap, rounded=True) / temperature, target)


def _logprob_of_logits(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    t = _targets_reference("linear_logprob", target, z.shape[-1], None)
    log_p = torch.log_softmax(z, -1)
    p = torch.exp(log_p)
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    return log_p.gather(1, t[:, None]).reshape(target.shape), entropy.reshape(target.shape)


def linear_logprob_fwd_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = _logits_reference(hidden, weight, bias, softcap) / temperature
    return *_logprob_of_logits(z, target), _lse_reference(z, target)


def linear_logprob_bwd_reference(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    z = _logits_reference(hidden, weight, bias, softcap)
    lse = lse.reshape(-1, 2)
    log_p = (z / temperature - lse[:, :1]) - lse[:, 1:]
    p = torch.exp(log_p)
    g, ge = (_upcast(x).reshape(-1, 1) / temperature for x in (dlogprob, dentropy))
    dz = -p * (g + ge * (torch.where(p > 0, log_p, 0.0) + entropy.reshape(-1, 1)))
    dz.scatter_add_(1, target.reshape(-1, 1).long(), g)
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    return _head_gradients_reference(dz, hidden, weight, bias, needs)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    return linear_cross_entropy_fwd(hidden, weight, target, bias, *options, [False] * 3)[0]


def linear_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    loss, lse, divisor, dhidden, dweight, dbias = linear_cross_entropy_fwd_fake(
        hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction, needs
    )
    head = _LceHead.of(hidden, weight, target, bias)
    rows = _lce_index(head.target, ignore_index, divisor if reduction == "mean" else divisor.new_empty(1))
    gradients = _LceGradients(head, dhidden, dweight, dbias, needs) if any(needs) else None
    rows_loss = loss.view(-1) if reduction == "none" else loss.new_empty(head.target.shape)
    results = _LceResults(rows_loss.zero_(), None, lse.zero_())
    options = _LceOptions(label_smoothing, z_loss, softcap)
    _lce_by_rows(head, rows, results, options, gradients, reduction == "mean")
    if reduction != "none":
        _lce_reduce(rows_loss, rows, loss, reduction == "mean")
    return loss, lse, divisor, dhidden, dweight, dbias


def linear_cross_entropy_bwd(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    found = _gradients_fake(hidden, weight, bias, needs)
    head = _LceHead.of(hidden, weight, target, bias)
    rows = _lce_index(head.target, ignore_index, divisor.new_empty(1))
    grad = dloss.reshape(-1).expand(head.target.shape)
    options = _LceOptions(label_smoothing, z_loss, softcap)
    gradients = _LceGradients(head, *found, needs)
    _lce_by_columns(head, rows, lse, None, grad, None, options, gradients, reduction == "mean")
    return found


def linear_cross_entropy_scale(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    dhidden: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> None:
    for x in (dhidden, dweight, dbias):
        _lce_scale(dloss, x)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_logprob_fwd(hidden, weight, target, bias, temperature, softcap)[:2]


def linear_logprob_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprob, entropy, lse = linear_logprob_fwd_fake(hidden, weight, target, bias, temperature, softcap)
    head = _LceHead.of(hidden, weight, target, bias)
    rows = _lce_index(head.target, _LCE_NOTHING_IGNORED, lse.new_empty(1))
    options = _LceOptions(softcap=softcap, temperature=temperature, entropy=True)
    _lce_by_rows(head, rows, _LceResults(logprob, entropy, lse), options)
    return logprob, entropy, lse


def linear_logprob_bwd(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    found = _gradients_fake(hidden, weight, bias, needs)
    head = _LceHead.of(hidden, weight, target, bias)
    rows = _lce_index(head.target, _LCE_NOTHING_IGNORED, lse.new_empty(1))
    options = _LceOptions(softcap=softcap, temperature=temperature, entropy=True)
    gradients = _LceGradients(head, *found, needs)
    upstream = dlogprob.reshape(-1).contiguous(), dentropy.reshape(-1).contiguous()
    _lce_by_columns(head, rows, lse, entropy, *upstream, options, gradients)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Fakes
# --------------------------------------------------------------------------------------------------------------------


def _gradients_fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those that are not wanted are empty."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty((weight.shape[0],) if needs[2] else (0,)),
    )


def linear_cross_entropy_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    return hidden.new_empty(target.shape if reduction == "none" else (), dtype=_arithmetic_dtype(hidden))


def linear_cross_entropy_fwd_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    dtype = _arithmetic_dtype(hidden)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    lse = hidden.new_empty((*target.shape, 2), dtype=dtype)
    divisor = hidden.new_empty(1 if reduction == "mean" else 0, dtype=dtype)
    return loss, lse, divisor, *_gradients_fake(hidden, weight, bias, needs)


def linear_cross_entropy_bwd_fake(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    return _gradients_fake(hidden, weight, bias, needs)


def linear_cross_entropy_scale_fake(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    dhidden: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> None:
    return None


def linear_logprob_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _arithmetic_dtype(hidden)
    return hidden.new_empty(target.shape, dtype=dtype), hidden.new_empty(target.shape, dtype=dtype)


def linear_logprob_fwd_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _arithmetic_dtype(hidden)
    logprob, entropy = (hidden.new_empty(target.shape, dtype=dtype) for _ in range(2))
    return logprob, entropy, hidden.new_empty((*target.shape, 2), dtype=dtype)


def linear_logprob_bwd_fake(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    return _gradients_fake(hidden, weight, bias, needs)


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------


def _check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
) -> None:
    if hidden.dim() == 0:
        bad_argument(op, "hidden", "of no dims", "(..., H)")
    if weight.dim() != 2 or weight.shape[0] == 0:
        bad_argument(op, "weight", f"of shape {tuple(weight.shape)}", "(V, H) with at least one class")
    if weight.dtype != hidden.dtype:
        bad_argument(op, "weight", f"of dtype {weight.dtype}", f"the dtype of hidden, {hidden.dtype}", TypeError)
    if weight.shape[1] != hidden.shape[-1]:
        allowed = f"(V, H) with H = {hidden.shape[-1]}, the last size of hidden, {tuple(hidden.shape)}"
        bad_argument(op, "weight", f"of shape {tuple(weight.shape)}", allowed)
    if target.dtype not in (torch.int64, torch.int32):
        bad_argument(op, "target", f"of dtype {target.dtype}", "int64 or int32 class indices", TypeError)
    if target.shape != hidden.shape[:-1]:
        allowed = f"{tuple(hidden.shape[:-1])}, hidden's shape {tuple(hidden.shape)} without H, which comes last"
        bad_argument(op, "target", f"of shape {tuple(target.shape)}", allowed)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            bad_argument(op, "bias", f"of shape {tuple(bias.shape)}", f"({weight.shape[0]},), one for each class")
        if bias.dtype != hidden.dtype:
            bad_argument(op, "bias", f"of dtype {bias.dtype}", f"the dtype of hidden, {hidden.dtype}", TypeError)
    if not softcap >= 0.0:
        bad_argument(op, "softcap", softcap, "a number >= 0; 0 is off")


def linear_cross_entropy_check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> None:
    op = "linear_cross_entropy"
    _check_head(op, hidden, weight, target, bias, softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        bad_argument(op, "label_smoothing", label_smoothing, "a number from 0 to 1")
    if not z_loss >= 0.0:
        bad_argument(op, "z_loss", z_loss, "a number >= 0")
    if reduction not in ("none", "mean", "sum"):
        bad_argument(op, "reduction", repr(reduction), "'none', 'mean' or 'sum'")


def linear_logprob_check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> None:
    _check_head("linear_logprob", hidden, weight, target, bias, softcap)
    if not temperature > 0.0:
        bad_argument("linear_logprob", "temperature", temperature, "a number > 0")


# --------------------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------------------


def linear_cross_entropy_forward(
    ctx: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> torch.Tensor:
    ctx.options = ignore_index, label_smoothing, z_loss, softcap, reduction
    # float16 has no room for a gradient that is to be multiplied later, by a loss scale of 2**16 say
    at_once = reduction != "none" and hidden.dtype != torch.float16
    needs = list(ctx.needs) if at_once else [False] * 3
    loss, lse, divisor, *gradients = torch.ops.tt.linear_cross_entropy_fwd(
        hidden, weight, target, bias, *ctx.options, needs
    )
    ctx.save_for_backward(hidden, weight, target, lse, divisor, bias)
    # not saved: the first backward writes to them and gives them away, without a copy
    ctx.gradients = gradients if at_once else None
    return loss


def linear_cross_entropy_backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hidden, weight, target, lse, divisor, bias = ctx.saved_tensors
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is not None:
        torch.ops.tt.linear_cross_entropy_scale(dloss, hidden, weight, target, bias, *gradients)
        return tuple(gradients)
    return torch.ops.tt.linear_cross_entropy_bwd(
        dloss, hidden, weight, target, lse, divisor, bias, *ctx.options, list(ctx.needs)
    )


def linear_logprob_forward(
    ctx: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    ctx.options = temperature, softcap
    logprob, entropy, lse = torch.ops.tt.linear_logprob_fwd(hidden, weight, target, bias, temperature, softcap)
    ctx.save_for_backward(hidden, weight, target, entropy, lse, bias)
    return logprob, entropy


def linear_logprob_backward(ctx: Any, dlogprob: torch.Tensor, dentropy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.tt.linear_logprob_bwd(dlogprob, dentropy, *ctx.saved_tensors, *ctx.options, list(ctx.needs))


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def _head_sample(
    device: torch.device | str, dtype: torch.dtype, rows: tuple[int, ...], H: int, V: int, ignored: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight and target whose logits have a standard deviation of 2."""
    hidden = torch.randn(*rows, H, device=device, dtype=dtype)
    weight = torch.randn(V, H, device=device, dtype=dtype) * (2 / max(H, 1) ** 0.5)
    target = torch.randint(0, V, rows, device=device)
    if ignored:
        target.view(-1)[::ignored] = -100
    return hidden, weight, target


def linear_cross_entropy_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *rows: int, H: int = 40, V: int = 300, ignored: int = 0, **kwargs: Any) -> Sample:
        head = _head_sample(device, dtype, rows, H, V, ignored)
        bias = torch.randn(V, device=device, dtype=dtype) if kwargs.pop("bias", False) else None
        return Sample(name, (*head, bias), kwargs)

    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    yield sample("1x1x1", 1, H=1, V=1, reduction="sum")
    yield sample("none_all_options", 2, 5, H=33, V=290, ignored=4, reduction="none", bias=True, **options)
    yield sample("mean_all_options", 5, 9, ignored=3, bias=True, **options)
    yield sample("empty", 0, reduction="sum")
    hidden, weight, target = _head_sample(device, dtype, (6,), 40, 264)
    strided = hidden.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([target, target], 1)[:, 0].int()
    yield Sample("strided_int32", strided, {"reduction": "none"}, slow_in_interpreter=True)
    # on a GPU: several tiles each way, a vocabulary that fills none of them, parts of the inner dimension
    large = _head_sample(device, dtype, (700,), 328, 3001, 5)
    yield Sample("700_rows", large, slow_in_interpreter=True)
    yield Sample("700_rows_none", large, {"reduction": "none"}, slow_in_interpreter=True)
    if dtype != torch.float64:  # NaN, which no finite difference can check
        ignored = large[0][:9], large[1], torch.full_like(large[2][:9], -100)
        yield Sample("all_ignored_mean", ignored, slow_in_interpreter=True)


def linear_logprob_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *rows: int, H: int = 40, V: int = 300, bias: bool = False, **kwargs: Any) -> Sample:
        head = _head_sample(device, dtype, rows, H, V)
        return Sample(name, (*head, torch.randn(V, device=device, dtype=dtype) if bias else None), kwargs)

    yield sample("all_options", 3, 7, bias=True, temperature=0.7, softcap=5.0)
    yield sample("1x1x1", 1, H=1, V=1)
    yield sample("empty", 0)
    large = _head_sample(device, dtype, (700,), 328, 3001)
    yield Sample("700_rows", large, {"temperature": 2.0}, slow_in_interpreter=True)


def _head_error_samples(op: str, device: torch.device | str) -> Iterator[ErrorSample]:
    hidden, weight = torch.randn(4, 5, device=device), torch.randn(6, 5, device=device)
    target = torch.tensor([0, 1, 2, 5], device=device)

    def error(
        name: str, match: str, *args: torch.Tensor, error: type[Exception] = ValueError, **kwargs: Any
    ) -> ErrorSample:
        return ErrorSample(name, args or (hidden, weight, target), kwargs, error, f"{op}.*{match}")

    yield error("hidden_0d", "'hidden'.*no dims", hidden[0, 0], weight, target)
    yield error("no_classes", r"'weight'.*\(0, 5\).*one class", hidden, weight[:0], target)
    yield error("weight_dtype", "'weight'.*float16.*float32", hidden, weight.half(), target, error=TypeError)
    yield error("inner_sizes", r"'weight'.*\(6, 4\).*H = 5", hidden, weight[:, :4], target)
    yield error("float_target", "'target'.*float32.*int64", hidden, weight, target.float(), error=TypeError)
    yield error("target_shape", r"'target'.*\(3,\).*\(4,\)", hidden, weight, target[:3])
    yield error("bias_shape", r"'bias'.*\(5,\).*\(6,\)", hidden, weight, target, hidden[0])
    yield error("bias_dtype", "'bias'.*float16.*float32", hidden, weight, target, weight[:, 0].half(), error=TypeError)
    yield error("softcap", "'softcap' is -2.0", softcap=-2.0)
    if hidden.device.type == "cpu" and not INTERPRET:
        yield error("out_of_range", "'target' is 6.*0 to 5", hidden, weight, target + 1, error=IndexError)
    if op == "linear_logprob":
        yield error("temperature", "'temperature' is 0.0.*> 0", temperature=0.0)
    else:
        yield error("label_smoothing", "'label_smoothing' is 1.5", label_smoothing=1.5)
        yield error("z_loss", "'z_loss' is -1.0", z_loss=-1.0)
        yield error("reduction", "'reduction' is 'avg'.*'mean'", reduction="avg")


def linear_cross_entropy_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    return _head_error_samples("linear_cross_entropy", device)


def linear_logprob_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    return _head_error_samples("linear_logprob", device)


def _head_bench_cases() -> Iterator[BenchCase]:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _head_sample(device, dtype, (8192,), 4096, 128256), {}

    yield BenchCase("8192x4096x128256", make, passes=("fwdbwd",))


def linear_cross_entropy_bench_cases() -> Iterator[BenchCase]:
    return _head_bench_cases()


def linear_logprob_bench_cases() -> Iterator[BenchCase]:
    return _head_bench_cases()


def _head_cost(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Cost:
    flops = 2 * hidden.numel() * weight.shape[0]
    operands = (hidden.numel() + weight.numel()) * hidden.element_size()
    # backward: two products of the same size; both operands in, both gradients out
    return Cost(flops, operands + target.numel() * target.element_size(), 2 * flops, 2 * operands)


def linear_cross_entropy_cost(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Cost:
    return _head_cost(hidden, weight, target)


def linear_logprob_cost(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Cost:
    return _head_cost(hidden, weight, target)
