"""DTensor sharding rules, by the name that an entry's `sharding:` gives.

A rule lists the ways in which an op's tensors may be sharded over one mesh dimension so that every rank computes its
part alone; DTensor combines them over the mesh and takes the cheapest. Replicating everything is always allowed.

A rule knows tensors by the schema's names, which internal ops share with the public op. The gradient of an argument `x`
is the output `dx`: sharded as x is, or, where x is replicated and the work is not, a partial sum.

`register` runs when torch.distributed.tensor is imported, so importing the package does not import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from torch_triton_ops.registry import OpDecl, OpSpec

# Tensors that all rows share: whole on every rank when the rows are divided.
PARAMETERS = ("weight", "bias", "cos", "sin")


@dataclass(frozen=True)
class _Call:
    """One op with the arguments that DTensor asks about: a DTensorSpec for a tensor, anything else as it is."""

    spec: OpSpec
    decl: OpDecl
    values: dict[str, Any]

    @cached_property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the tensors given, in the schema's order."""
        tensors = (a.name for a in self.decl.arguments if a.is_tensor and self.values[a.name] is not None)
        return {name: tuple(self.values[name].shape) for name in tensors}

    @cached_property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the outputs by the schema's names."""
        from torch.utils._python_dispatch import _disable_current_modes

        names = [r.name for r in torch._C.parse_schema(self.decl.schema).returns]
        if self.decl.kind == "backward" and names == [""]:
            names = [f"d{self.spec.differentiable[0]}"]
        with _disable_current_modes():  # torch.compile must not see these tensors
            values = {
                name: torch.empty(value.shape, dtype=value.tensor_meta.dtype, device="meta")
                if name in self.inputs
                else value
                for name, value in self.values.items()
            }
            positional = [values[a.name] for a in self.decl.arguments if not a.keyword_only]
            keywords = {a.name: values[a.name] for a in self.decl.arguments if a.keyword_only}
            found = getattr(self.spec.module, f"{self.decl.name}_fake")(*positional, **keywords)
        found = found if isinstance(found, (tuple, list)) else (found,)
        return {name or f"out{i}": tuple(t.shape) for i, (name, t) in enumerate(zip(names, found, strict=True))}

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Inputs, then outputs."""
        return self.inputs | self.outputs

    def option(self, name: str, default: Any = None) -> Any:
        """A number or a string of the call."""
        return self.values.get(name, default)

    def ranks(self, names: Sequence[str], dim: int) -> int:
        """Over how many ranks `dim` is divided if it stays on the mesh dimensions where one of `names` has it now."""
        mesh, ranks = self.values[names[0]].mesh, 1
        for i in range(mesh.ndim):
            if any(self.values[name].placements[i].is_shard(dim) for name in names):
                ranks *= mesh.size(i)
        return ranks if ranks > 1 else mesh.size()


_Placements = dict[str, Any]  # by name; a tensor left out is replicated
_Rule = Callable[[_Call], Iterator[_Placements]]


def _is_empty(shape: Sequence[int]) -> bool:
    """An output that this call does not compute."""
    return len(shape) == 1 and shape[0] == 0


def _divide(call: _Call, dim: int, size: int, replicated: Sequence[str] = ()) -> _Placements | None:
    """Shard `dim`, of `size`, of every tensor but `replicated`, whose gradients become partial sums.

    None if a tensor has no such dimension.
    """
    from torch.distributed.tensor import Partial, Shard

    placements: _Placements = {}
    for name, shape in call.tensors.items():
        if name in replicated or _is_empty(shape):
            continue
        if name in call.outputs and name.removeprefix("d") in replicated:
            placements[name] = Partial("sum")
        elif len(shape) > dim and shape[dim] == size:
            placements[name] = Shard(dim)
        else:
            return None
    return placements


def _elementwise(call: _Call) -> Iterator[_Placements]:
    """Tensors that broadcast: any dimension of the result. What is broadcast along it is whole on every rank."""
    from torch.distributed.tensor import Shard

    shape = torch.broadcast_shapes(*call.inputs.values())
    if any(call.outputs[name] != shape and not _is_empty(call.outputs[name]) for name in call.outputs):
        return
    for dim, size in enumerate(shape):
        placements: _Placements = {}
        for name, own in call.tensors.items():
            at = dim - (len(shape) - len(own))
            if at >= 0 and own[at] == size and not (name in call.outputs and _is_empty(own)):
                placements[name] = Shard(at)
        yield placements


def _transposed(call: _Call) -> Iterator[_Placements]:
    """Any dimension; `dim0` and `dim1` change places in the output."""
    from torch.distributed.tensor import Shard

    ((name, shape),) = call.inputs.items()
    (out,) = call.outputs
    places = list(range(len(shape)))
    if places:
        dim0, dim1 = (call.option(dim) % len(shape) for dim in ("dim0", "dim1"))
        places[dim0], places[dim1] = dim1, dim0
    for dim, place in enumerate(places):
        yield {name: Shard(dim), out: Shard(place)}


def _rowwise(call: _Call) -> Iterator[_Placements]:
    """Every dimension but the one that is reduced: `dim`, or the last. Statistics have the leading dimensions."""
    shape = next(shape for name, shape in call.inputs.items() if name not in PARAMETERS)
    if not shape:
        return
    reduced = call.option("dim", -1) % len(shape)
    for dim, size in enumerate(shape):
        if dim != reduced:
            found = _divide(call, dim, size, PARAMETERS)
            if found is not None:
                yield found


def _batch(call: _Call) -> Iterator[_Placements]:
    """The first dimension alone: samples are independent, and what belongs to channels is whole on every rank."""
    shape = next(shape for name, shape in call.inputs.items() if name not in PARAMETERS)
    found = _divide(call, 0, shape[0], PARAMETERS) if shape else None
    if found is not None:
        yield found


def _reduction(call: _Call) -> Iterator[_Placements]:
    """Every dimension that is kept; and those that are reduced, where parts of the result make the whole."""
    from torch.distributed.tensor import Partial, Shard

    shape = call.inputs["x"]
    given = call.option("dim")
    listed = [] if given is None else [given] if isinstance(given, int) else list(given)
    reduced = {d % len(shape) for d in listed} if shape else set()
    reduced = reduced or set(range(len(shape)))
    kept = [d for d in range(len(shape)) if d not in reduced]
    results = [name for name in call.tensors if name not in ("x", "dx")]  # of the result's shape
    for dim in kept:
        at = dim if call.option("keepdim") else kept.index(dim)
        wide = [name for name in call.tensors if name in ("x", "dx")]
        yield dict.fromkeys(wide, Shard(dim)) | dict.fromkeys(results, Shard(at))
    parts = {"sum": "sum", "mean": "avg", "amax": "max", "amin": "min"}.get(call.decl.name)
    for dim in reduced if parts else ():
        # ranks have elements, and a mean as many each
        if parts == "sum" or shape[dim] % call.ranks(["x"], dim) == 0:
            yield {"x": Shard(dim)} | dict.fromkeys(results, Partial(parts))


def _batch_and_heads(call: _Call) -> Iterator[_Placements]:
    """(B, H, S, D) and (B, H, S) tensors: the batch, or the heads where each rank keeps whole groups of them."""
    from torch.distributed.tensor import Shard

    tables = [name for name in call.inputs if name in PARAMETERS]
    heads = [name for name, shape in call.inputs.items() if name not in PARAMETERS and len(shape) in (3, 4)]
    if any(call.values.get(name) is not None for name in ("alibi_slopes", "attn_bias", "sinks")):
        return  # their own dimensions may be the batch's or the heads'
    batch = call.inputs[heads[0]][0]
    scales = {name: len(shape) for name, shape in call.inputs.items() if name.endswith("_scale")}  # (H,) or (B, H)
    found = _divide(call, 0, batch, [*tables, *scales])
    if found is not None:
        found |= {name: Shard(0) for name, rank in scales.items() if rank == 2}
        # a table of positions for each sequence goes with its sequence
        own = [name for name in tables if len(call.inputs[name]) >= 3 and call.inputs[name][0] != 1]
        yield found | {name: Shard(0) for name in own}
    # a rank's query heads must find their key heads on the same rank
    ranks = call.ranks(heads, 1)
    per_head = any(len(call.inputs[name]) == 4 and call.inputs[name][1] != 1 for name in tables)
    if not per_head and all(call.inputs[name][1] % ranks == 0 for name in heads):
        found = {name: Shard(1) for name, shape in call.tensors.items() if len(shape) >= 3 and name not in tables}
        yield found | {name: Shard(rank - 1) for name, rank in scales.items()}


def _packed_heads(call: _Call) -> Iterator[_Placements]:
    """(tokens, H, D) tensors, and lse (H, tokens): the heads, where each rank keeps whole groups of them."""
    from torch.distributed.tensor import Shard

    if any(call.values.get(name) is not None for name in ("alibi_slopes", "sinks")):
        return  # their own dimensions are the heads'
    heads = [name for name, shape in call.inputs.items() if len(shape) == 3]
    ranks = call.ranks(heads, 1)
    if all(call.inputs[name][1] % ranks == 0 for name in heads):
        found = {name: Shard(1) for name, shape in call.tensors.items() if len(shape) == 3}
        yield found | {"lse": Shard(0)} if "lse" in call.tensors else found


def _cross_entropy(call: _Call) -> Iterator[_Placements]:
    """The rows, for reduction none and sum. A mean needs the number of targets of all ranks, so it is replicated."""
    from torch.distributed.tensor import Partial, Shard

    logits, reduction = call.inputs["logits"], call.option("reduction")
    # Statistics have the rows flat, last: sharded as the batch is if there is no other dimension or it divides evenly.
    flat = len(logits) == 2 or (len(logits) > 2 and logits[0] % call.ranks(["logits"], 0) == 0)
    if not flat:
        return
    placements = {"logits": Shard(0), "target": Shard(0)}
    if call.decl.kind == "backward":
        # for every reduction: what the mean needs of other rows is in `divisor`
        lse = len(call.inputs["lse"]) - 1
        placements |= {"lse": Shard(lse), "dlogits": Shard(0)}
        yield placements | ({"dloss": Shard(0)} if reduction == "none" else {})
    elif reduction != "mean":
        loss, *statistics = call.outputs
        for name in statistics:
            if not _is_empty(call.outputs[name]):
                placements[name] = Shard(len(call.outputs[name]) - 1)
        yield placements | {loss: Shard(0) if reduction == "none" else Partial("sum")}


def _loss(call: _Call) -> Iterator[_Placements]:
    """The first dimension, for reduction none and sum; one number for all rows is whole. A mean's gradient would need to know how
    many rows all ranks have, so it is replicated."""
    from torch.distributed.tensor import Partial, Shard

    first = call.spec.differentiable[0]
    shape, reduction = call.inputs[first], call.option("reduction")
    # "aot" sorts all rows; so does dpo_match, which has no reduction
    if not shape or reduction not in ("none", "sum") or call.option("loss_type") == "aot":
        return
    # Statistics have the rows flat, last: sharded as the batch is if there is no other dimension or it divides evenly.
    statistics = [name for name in call.tensors if name == "stats"]
    if statistics and len(shape) > 2 and shape[0] % call.ranks([first], 0):
        return
    whole = [name for name, own in call.tensors.items() if math.prod(own) == 1]
    found = _divide(call, 0, shape[0], [*whole, *statistics])
    if found is not None:
        found |= {name: Shard(len(call.tensors[name]) - 1) for name in statistics}
        loss = next(iter(call.outputs))
        yield found | ({loss: Partial("sum")} if reduction == "sum" and call.outputs[loss] == () else {})


def _linear(call: _Call) -> Iterator[_Placements]:
    """x @ weight^T: rows of x (data parallel), rows of weight (column parallel), or the inner dimension (row parallel).

    Also for a product a @ b, and for the elementwise part of linear's gradient.
    """
    from torch.distributed.tensor import Partial, Shard

    if "a" in call.inputs:
        yield from _matmul(call)
        return
    first = "x" if "x" in call.inputs else "dy"
    shape = call.inputs[first]
    rank = len(shape)
    results = [name for name, shape in call.outputs.items() if len(shape) == rank and not _is_empty(shape)]
    kept = ["z"] if "z" in call.inputs else []
    sums = [name for name in ("dbias",) if name in call.outputs and not _is_empty(call.outputs[name])]
    for dim in range(rank - 1):
        rows = {name: Shard(dim) for name in (first, *kept, *results)}
        yield rows | dict.fromkeys(sums, Partial("sum"))
    columns = {name: Shard(rank - 1) for name in (*kept, *results)}
    if first == "dy":
        yield columns | {"dy": Shard(rank - 1)} | dict.fromkeys(sums, Shard(0))
        return
    yield columns | {name: Shard(0) for name in ("weight", "bias") if name in call.inputs}
    if "bias" not in call.inputs and call.option("activation", "none") == "none":
        yield {"x": Shard(rank - 1), "weight": Shard(1)} | dict.fromkeys(results, Partial("sum"))


def _matmul(call: _Call) -> Iterator[_Placements]:
    from torch.distributed.tensor import Partial, Shard

    a, b = call.inputs["a"], call.inputs["b"]
    ((out, shape),) = call.outputs.items()
    rank = len(shape)
    yield {"a": Shard(len(a) - 2), out: Shard(rank - 2)}
    yield {"b": Shard(len(b) - 1), out: Shard(rank - 1)}
    yield {"a": Shard(len(a) - 1), "b": Shard(len(b) - 2), out: Partial("sum")}
    for dim in range(rank - 2):
        found: _Placements = {out: Shard(dim)}
        for name, own in (("a", a), ("b", b)):
            at = dim - (rank - len(own))
            if at >= 0 and own[at] != 1:  # else broadcast along this dimension
                found[name] = Shard(at)
        if len(found) > 1:
            yield found


RULES: dict[str, _Rule] = {
    "elementwise": _elementwise,
    "transposed": _transposed,
    "rowwise": _rowwise,
    "batch": _batch,
    "reduction": _reduction,
    "batch_and_heads": _batch_and_heads,
    "packed_heads": _packed_heads,
    "cross_entropy": _cross_entropy,
    "linear": _linear,
    "loss": _loss,
}


def register(spec: OpSpec) -> None:
    """Register the rules of `spec`'s ops with DTensor. Needs torch.distributed.tensor to be imported.

    Importing that must not fail because of us: under a torch whose DTensor has changed, our ops have no rules, and DTensor
    says so when one meets a sharded tensor.
    """
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
        from torch.distributed.tensor.experimental import register_sharding

        schema_info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    except (ImportError, AttributeError):
        return
    for decl in spec.decls:
        register_sharding(decl.op)(_sharding(spec, decl))
        # register_sharding lets only integers into DTensor's cache key: the rule for activation="none" would answer for
        # "relu". Every option counts.
        options = [i for i, a in enumerate(decl.arguments) if not a.is_tensor and not a.keyword_only]
        keywords = [a.name for a in decl.arguments if a.keyword_only]
        schema_info[decl.op] = RuntimeSchemaInfo(
            static_argnum=min(options, default=100), static_kwargkey=keywords or None, needs_pytree=True
        )


def _sharding(spec: OpSpec, decl: OpDecl) -> Callable[..., list[tuple[list[Any], list[Any]]]]:
    """What register_sharding wants: a list of (placements of the outputs, placements of the arguments)."""
    rule = RULES[spec.sharding or ""]
    positional = [a for a in decl.arguments if not a.keyword_only]

    def sharding(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Replicate

        values = {a.name: a.default for a in decl.arguments}
        values |= dict(zip((a.name for a in positional), args, strict=False)) | kwargs
        call = _Call(spec, decl, values)
        given = [*(a.name for a in positional[: len(args)]), *kwargs]
        for name in kwargs:
            if name in call.inputs and not all(p.is_replicate() for p in values[name].placements):
                raise ValueError(
                    f"{decl.qualname}: argument '{name}' is a DTensor placed {values[name].placements}; allowed:"
                    " Replicate(), since DTensor does not redistribute keyword arguments"
                )
        whole = Replicate()
        found: list[tuple[list[Any], list[Any]]] = []
        for placements in ({}, *rule(call)):
            if any(name in kwargs and not placements.get(name, whole).is_replicate() for name in call.inputs):
                continue
            outputs = [placements.get(name, whole) for name in call.outputs]
            inputs = [placements.get(name, whole) if name in call.inputs else None for name in given]
            found.append((outputs, inputs))
        return found

    return sharding
