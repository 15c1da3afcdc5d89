"""Is an output right? Every impl's outputs and gradients against fp64, by the op's own reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Function = Callable[..., Any]
Index = tuple[Any, ...]


@dataclass
class InputSet:
    """One call's inputs. `leaves` are the inputs that want a gradient, `upstream` the gradient of each floating output.

    `arguments` is in the schema's order; the first `positional` of them are passed by position, as a user would. `mutated`
    names those that the op writes to: its outputs, where it returns nothing.
    """

    arguments: dict[str, Any]
    positional: int
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    upstream: list[torch.Tensor | None] = field(default_factory=list)
    mutated: tuple[str, ...] = ()

    def call(self, function: Function) -> list[torch.Tensor]:
        """The function's outputs as a list."""
        values = list(self.arguments.values())[: self.positional]
        named = dict(list(self.arguments.items())[self.positional :])
        outputs = function(*values, **named)
        return [self.arguments[n] for n in self.mutated] if outputs is None else flatten(outputs)

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (*self.arguments.values(), *self.upstream) if isinstance(t, torch.Tensor)]

    def clone(self) -> InputSet:
        """The same values in other memory."""
        arguments = {n: _clone(v) if isinstance(v, torch.Tensor) else v for n, v in self.arguments.items()}
        upstream = [None if g is None else _clone(g) for g in self.upstream]
        return InputSet(arguments, self.positional, {n: arguments[n] for n in self.leaves}, upstream, self.mutated)

    def copy_(self, other: InputSet) -> None:
        """Take the values of `other`."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.data.copy_(theirs)  # .data: a graph kept for its backward must not take this for a modification


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    # the same strides, gaps included: a peer that copies what is not contiguous must do so here too
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def flatten(outputs: Any) -> list[torch.Tensor]:
    """An op's outputs as a list."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def gradients(outputs: Sequence[torch.Tensor], inputs: InputSet, retain_graph: bool = False) -> list[torch.Tensor]:
    """torch.autograd.grad of the outputs that have a gradient, for all leaves, with the set's upstream gradients."""
    pairs = [(o, g) for o, g in zip(outputs, inputs.upstream, strict=True) if o.requires_grad and g is not None]
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs], list(inputs.leaves.values()), [g for _, g in pairs], retain_graph=retain_graph
        )
    )


def forward_backward(function: Function, inputs: InputSet) -> list[torch.Tensor]:
    """Outputs, then gradients. Outputs alone where nothing wants a gradient."""
    outputs = inputs.call(function)
    if not inputs.leaves:
        return outputs
    return [*(o.detach() for o in outputs), *gradients(outputs, inputs)]


# --------------------------------------------------------------------------------------------------------------------
# The reference in slices
# --------------------------------------------------------------------------------------------------------------------


def _attention_slices(arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Index], list[Index]]]:
    """One (batch, query head) at a time: the scores of a whole batch in fp64 do not fit."""
    q, k = arguments["q"], arguments["k"]
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            query = (slice(b, b + 1), slice(h, h + 1))
            key = (slice(b, b + 1), slice(h // group, h // group + 1))
            yield {"q": query, "k": key, "v": key}, [query]


def _attention_fp8_slices(arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Index], list[Index]]]:
    """As `_attention_slices`, with each head's scales, (H,) or (B, H)."""
    for indices, outputs in _attention_slices(arguments):
        for name, of in (("q_scale", "q"), ("k_scale", "k"), ("v_scale", "v")):
            indices[name] = indices[of][-arguments[name].dim() :]
        yield indices, outputs


# op -> slices of its tensors that can be computed alone, with the slice of each output. Gradients of overlapping slices
# add up.
_SLICES: dict[str, Callable[[dict[str, Any]], Iterator[tuple[dict[str, Index], list[Index]]]]] = {
    "flash_attn": _attention_slices,
    "flash_attn_fp8": _attention_fp8_slices,
}


def _sliceable(op: str, inputs: InputSet) -> bool:
    if op not in _SLICES:
        return False
    first, _ = next(_SLICES[op](inputs.arguments))
    return all(name in first for name, value in inputs.arguments.items() if isinstance(value, torch.Tensor))


def reference_values(op: str, reference: Function, inputs: InputSet, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Outputs and gradients of the op's reference, computed in `dtype` (None: as the inputs are)."""

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.detach().to(dtype) if dtype is not None and t.is_floating_point() else t.detach()

    def part(indices: dict[str, Index], outputs: list[Index] | None) -> InputSet:
        arguments = {
            n: cast(v[indices.get(n, ())]) if isinstance(v, torch.Tensor) else v for n, v in inputs.arguments.items()
        }
        arguments |= {n: arguments[n].clone() for n in inputs.mutated}
        leaves = {n: arguments[n].requires_grad_() for n in inputs.leaves}
        upstream = [
            None if g is None else cast(g if outputs is None else g[outputs[i]]) for i, g in enumerate(inputs.upstream)
        ]
        return InputSet(arguments, inputs.positional, leaves, upstream, inputs.mutated)

    if not _sliceable(op, inputs):
        return [t.detach() for t in forward_backward(reference, part({}, None))]

    whole: list[torch.Tensor] = []
    for indices, outputs in _SLICES[op](inputs.arguments):
        values = [t.detach() for t in forward_backward(reference, part(indices, outputs))]
        places = [*outputs, *(indices[n] for n in inputs.leaves)]
        if not whole:
            shapes = [inputs.arguments["q"].shape] * len(outputs) + [leaf.shape for leaf in inputs.leaves.values()]
            whole = [
                # sums of half precision in fp32: one rounding of the sum, not one of each term, is torch's own error
                torch.zeros(
                    (*shape[:-1], v.shape[-1]), dtype=torch.promote_types(v.dtype, torch.float32), device=v.device
                )
                for shape, v in zip(shapes, values, strict=True)
            ]
        for target, place, value in zip(whole, places, values, strict=True):
            target[place] += value
    return whole


# --------------------------------------------------------------------------------------------------------------------
# The verdict
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What the outputs must be, and how far torch itself is from it at the inputs' precision."""

    values: list[torch.Tensor]
    against: str  # "fp64" or "fp32"
    torch_error: list[tuple[float, float]]  # relative L2 error and largest absolute error of each output
    eps: float  # rounding of the inputs' dtype


def expect(op: str, reference: Function, inputs: InputSet) -> Expected:
    """The op's reference in fp64; in fp32 where fp64 does not fit. Raises OutOfMemoryError where neither does."""
    values, against = None, "fp64"
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # no handler: its traceback would hold what did fit
        values = reference_values(op, reference, inputs, torch.float64)
    if values is None:
        torch.cuda.empty_cache()
        values, against = reference_values(op, reference, inputs, torch.float32), "fp32"
    plain = reference_values(op, reference, inputs, None)
    dtypes = [t.dtype for t in inputs.tensors() if t.is_floating_point() and t.dtype.itemsize > 1]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return Expected(values, against, [_errors(p, v) for p, v in zip(plain, values, strict=True)], eps)


def _errors(value: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative L2 error and largest absolute error; infinite where one is NaN or infinite and the other is not so."""
    if value.numel() == 0:
        return 0.0, 0.0
    square = scale = largest = 0.0
    # in pieces: a whole fp64 difference of a gigabyte tensor would be two more of them
    for got, want in zip(_pieces(value), _pieces(expected), strict=True):
        # integers do not subtract as numbers do, and float8 not at all
        want = want if want.is_floating_point() and want.itemsize > 1 else want.double()
        got = got.to(want.dtype)
        difference = torch.where(got == want, torch.zeros_like(want), got - want)  # equal infinities differ by nothing
        square += difference.square().sum().item()
        scale += torch.where(want.isfinite(), want, torch.zeros_like(want)).square().sum().item()
        piece = difference.abs().max().item()  # NaN spreads through max
        largest = piece if math.isnan(piece) else max(largest, piece)
        if math.isnan(largest) or math.isinf(largest):
            return math.inf, math.inf
    return math.sqrt(square / scale) if scale else math.sqrt(square), largest


def _pieces(tensor: torch.Tensor, elements: int = 2**26) -> tuple[torch.Tensor, ...]:
    if tensor.dim() == 0 or tensor.numel() <= elements:
        return (tensor,)
    return tensor.split(max(1, elements * tensor.shape[0] // tensor.numel()))


def verdict(got: Sequence[torch.Tensor], expected: Expected) -> dict[str, Any]:
    """The record's `check`: each output within four times torch's own error and a few roundings, in norm and at worst.

    This catches wrong results of anybody's kernels; the tight error budget of our own ops is the conformance suite's.
    """
    base: dict[str, Any] = {"against": expected.against}
    if len(got) != len(expected.values):
        return base | {"passed": False, "reason": f"{len(got)} results instead of {len(expected.values)}"}
    worst, worst_torch = 0.0, 0.0
    for i, (value, want, (torch_rel, torch_max)) in enumerate(
        zip(got, expected.values, expected.torch_error, strict=True)
    ):
        if value.shape != want.shape:
            return base | {
                "passed": False,
                "reason": f"result {i}: shape {tuple(value.shape)}, not {tuple(want.shape)}",
            }
        # a loss in fp32 may be the sum of half-precision terms
        eps = max(torch.finfo(value.dtype).eps, expected.eps) if value.is_floating_point() else 0.0
        rel, largest = _errors(value, want)
        top = want[want.isfinite()].abs().max().item() if eps and want.isfinite().any() else 0.0
        worst, worst_torch = max(worst, rel), max(worst_torch, torch_rel)
        if not rel <= 4 * torch_rel + 4 * eps:
            text = f"result {i}: relative error {rel:.2e}, torch's own {torch_rel:.2e}"
            return base | {"passed": False, "reason": text, "rel_error": _finite(rel)}
        if not largest <= 4 * torch_max + 8 * eps * top:
            text = f"result {i}: largest error {largest:.2e} of {top:.2e}, torch's own {torch_max:.2e}"
            return base | {"passed": False, "reason": text, "rel_error": _finite(rel)}
    return base | {"passed": True, "rel_error": worst, "torch_rel_error": worst_torch}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
