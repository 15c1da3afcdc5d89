"""Losses from two functions: the value of an element or a row, and its derivative. For the package's losses and for yours.

    @triton.jit
    def value(input, target, beta: tl.constexpr = 1.0):
        return log_sigmoid(beta * (input - target))

    @triton.jit
    def derivative(input, target, beta: tl.constexpr = 1.0):    # by `input`
        return beta * tl.sigmoid(beta * (target - input))

    elementwise_loss("my::my_loss", value, derivative, globals())

and one entry in a registry file:

    - op: my::my_loss(Tensor input, Tensor target, *, float beta=1.0, str reduction="mean") -> Tensor
      summary: One sentence.
      module: my_loss
      backward: my::my_loss_bwd(Tensor dloss, Tensor input, Tensor target, float beta, str reduction) -> Tensor
      visibility: triton
      differentiable: [input]
      dtypes: [float32, float16, bfloat16]

give `torch.ops.my.my_loss` with everything an op has (docs/design.md): launcher, gradient op, fakes, CPU reference, checks,
samples, cost. `examples/my_loss` is a whole one. The parameters of `value`, which `derivative` shares, are the op's arguments:

| parameter | argument of the op | what the functions get |
|---|---|---|
| `input` | `Tensor input` | float32 (integers as they are), a block of any shape |
| `margin=0.0` | `Tensor? margin=None` | the default where it is None |
| `beta: tl.constexpr = 1.0` | `float beta=1.0`, keyword-only; also int, bool, str | the value |
| `column`, `columns` (row-wise only) | none | indices (1, BLOCK_N) of the columns, and their number |

After the options comes `str reduction="mean"`: "none", "sum" or "mean". Elementwise: tensors have the shape of the first, or one
element. Row-wise: they are (..., N), or (...) if listed in `per_row`; the functions see (BLOCK_M, BLOCK_N) and (BLOCK_M, 1), and
`value` reduces along axis 1 with keep_dims=True. A row is padded with zeros to a power of two: leave out the elements where
`column < columns` is false.

On CPU tensors the same two functions run on torch tensors: of `tl` they may use what `torch_language` lists, and any
@triton.jit function made of that. The conformance suite compares that derivative with torch's own of `value`, in fp64 with
finite differences, and the kernels with both. A `reference` of your own, in plain torch, replaces the translated value.

The kernels are generated, readable source: `forward_kernel.src` and `backward_kernel.src` of what `elementwise_loss` returns.
Forward: up to 8192 elements in one launch, else partial sums and one program that adds them in a fixed order. Backward: one
launch, from the inputs; nothing else is kept.

A foundation module, as `elementwise` is: it knows no op.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

REDUCTIONS = ("none", "mean", "sum")
MAX_COLUMNS = 16384  # of a row-wise loss: a row is held in one program's registers

# --------------------------------------------------------------------------------------------------------------------
# For use in kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    """log(1 + exp(x)), right to the last bits for every x: no overflow, no loss where exp(x) vanishes beside 1."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    # log(1 + u): what 1 + u rounds away is made good by the factor u / (w - 1)
    tiny = w == 1.0
    log1p = tl.where(tiny, u, tl.log(w) * (u / tl.where(tiny, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x)))."""
    return -softplus(-x)


@triton.jit
def expm1(x):
    """exp(x) - 1, also near 0, where the difference would lose all digits."""
    u = tl.exp(x)
    plain = (u == 1.0) | (x < -15.0)
    # log(u) is the exponent that u is the exact power of; its error and that of u - 1 are alike
    near = (u - 1.0) * (x / tl.where(plain, 1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where(x < -15.0, u - 1.0, near))


@triton.jit
def log1mexp(x):
    """log(1 - exp(x)) for x <= 0."""
    u = tl.exp(x)
    w = 1.0 - u
    tiny = w == 1.0
    log1p = tl.where(tiny, -u, tl.log(w) * (u / tl.where(tiny, 1.0, 1.0 - w)))
    return tl.where(x > -0.6931472, tl.log(-expm1(x)), log1p)


@triton.jit
def preference_loss(x, label_smoothing: tl.constexpr):
    """-log sigmoid(x), where a share `label_smoothing` of the preferences is taken to be the other way round."""
    if label_smoothing == 0.0:
        return softplus(-x)
    else:
        return (1.0 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


@triton.jit
def preference_slope(x, label_smoothing: tl.constexpr):
    """Derivative of `preference_loss` by x."""
    if label_smoothing == 0.0:
        return -tl.sigmoid(-x)
    else:
        return label_smoothing * tl.sigmoid(x) - (1.0 - label_smoothing) * tl.sigmoid(-x)


@triton.jit
def load(ptr, offs, mask):
    """Elements at `offs`, 0 where `mask` is false: floating-point ones in fp32, others as they are."""
    x = tl.load(ptr + offs, mask=mask, other=0)
    if ptr.dtype.element_ty.is_floating():
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _sum_kernel(partial_ptr, loss_ptr, P, N, MEAN: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program adds P partial sums in a fixed order and, for a mean, divides by N."""
    offs_p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, P, BLOCK_P):
        total += tl.load(partial_ptr + start + offs_p, mask=start + offs_p < P, other=0.0)
    loss = tl.sum(total, axis=0)
    if MEAN:
        loss = loss / N
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


def sum_partials(partial: torch.Tensor, loss: torch.Tensor, count: int, mean: bool) -> None:
    """loss, of one element, becomes the sum of `partial` (P,) in fp32, divided by `count` for a mean."""
    launch(_sum_kernel, (1,), partial, loss, partial.numel(), count, MEAN=mean, BLOCK_P=4096, num_warps=16)


# --------------------------------------------------------------------------------------------------------------------
# The same functions on torch tensors
# --------------------------------------------------------------------------------------------------------------------


def arithmetic_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp32, or fp64 if a tensor is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@functools.cache
def torch_language(dtype: torch.dtype) -> types.SimpleNamespace:
    """What `tl` is for a function that runs on torch tensors, in arithmetic of `dtype`."""

    def tensor(x: Any) -> torch.Tensor:
        return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=dtype)

    def lift(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*map(tensor, args))

    def reduce(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x, axis=None, keep_dims=False: function(x, () if axis is None else axis, keep_dims)

    def total(x: torch.Tensor, axis: Any, keep_dims: bool) -> torch.Tensor:
        return x.sum(axis if axis != () else None, keepdim=keep_dims)

    unary = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "sin", "cos", "erf", "sigmoid", "floor", "ceil")
    language = types.SimpleNamespace(**{name: lift(getattr(torch, name)) for name in unary})
    language.where, language.maximum, language.minimum = lift(torch.where), lift(torch.maximum), lift(torch.minimum)
    language.clamp = lift(torch.clamp)
    language.sum, language.max, language.min = reduce(total), reduce(torch.amax), reduce(torch.amin)
    language.zeros_like = torch.zeros_like
    language.static_range = range
    language.float32 = dtype
    language.constexpr = lambda value: value
    language.math = language
    return language


# helpers whose derivative, taken by torch through the kernel's way of computing them, would not be exact
_TORCH: dict[Any, Callable[..., torch.Tensor]] = {
    softplus: lambda x: -torch.nn.functional.logsigmoid(-x),
    log_sigmoid: torch.nn.functional.logsigmoid,
    expm1: torch.expm1,
    log1mexp: lambda x: _log1mexp(x),
}


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    near = x > -0.6931472
    # each formula sees only what it is good for, lest its infinite derivative elsewhere become NaN
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


@functools.cache
def translate(function: Any, dtype: torch.dtype) -> Callable[..., Any]:
    """A @triton.jit function as one of torch tensors: `tl` stands for `torch_language(dtype)` in it and in what it calls."""
    plain = function.fn
    names = dict(plain.__globals__)
    for name in plain.__code__.co_names:
        used = names.get(name)
        if used is tl or used is tl.math:
            names[name] = torch_language(dtype)
        elif used in _TORCH if isinstance(used, type(function)) else False:
            names[name] = _TORCH[used]
        elif isinstance(used, type(function)):
            names[name] = translate(used, dtype)
    return types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)


# --------------------------------------------------------------------------------------------------------------------
# Generated kernels
# --------------------------------------------------------------------------------------------------------------------


def _compile_source(name: str, source: str, names: Mapping[str, Any]) -> Any:
    """The @triton.jit function `name` of generated source; Triton reads it through linecache."""
    file = f"<torch_triton_ops.losses {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = {"triton": triton, "tl": tl, "load": load, "__name__": f"{__name__}.generated", **names}
    exec(compile(source, file, "exec"), module)
    return module[name]


@dataclass(frozen=True)
class _Parameters:
    """What the parameters of `value` say."""

    tensors: tuple[str, ...]  # those given always, then the optional ones
    optional: dict[str, Any]  # tensor -> what stands for None
    options: dict[str, Any]  # constexpr -> default
    order: tuple[str, ...]  # as the function takes them, `column` and `columns` included

    @classmethod
    def of(cls, function: Any, row_wise: bool) -> _Parameters:
        tensors, optional, options, order = [], {}, {}, []
        for p in inspect.signature(function.fn).parameters.values():
            order.append(p.name)
            if row_wise and p.name in ("column", "columns"):
                continue
            if "constexpr" in str(p.annotation):
                if p.default is p.empty:
                    raise TypeError(f"{function.__name__}: the option '{p.name}' needs a default")
                options[p.name] = p.default
            else:
                tensors.append(p.name)
                if p.default is not p.empty:
                    optional[p.name] = p.default
        return cls(tuple(tensors), optional, options, tuple(order))


def _kernel_source(
    name: str, parameters: _Parameters, function: str, outputs: Sequence[str], per_row: Sequence[str] | None, bwd: bool
) -> str:
    """A kernel that loads a block of every tensor, calls `function` and stores what it returns.

    per_row: None for an elementwise loss. Elementwise forward kernels take TILES blocks, one after the other.
    """
    row_wise = per_row is not None
    tensors = (["dloss"] if bwd else []) + list(parameters.tensors)
    pointers = [f"{t}_ptr" for t in tensors] + ([] if bwd else ["loss_ptr"]) + [f"{o}_ptr" for o in outputs]
    sizes = ["M", "N"] if row_wise else ["N"]
    constants = [o.upper() for o in parameters.options] + [f"{t.upper()}_STEP" for t in tensors]
    constants += [f"NEEDS_{o.upper()}" for o in outputs] if bwd else ["LAST"] + ([] if row_wise else ["TILES"])
    constants += ["REDUCTION"] + (["BLOCK_M"] if row_wise else []) + ["BLOCK_N"]
    parts = ["@triton.jit", f"def {name}({', '.join(pointers + sizes)},"]
    parts.append("    " + ", ".join(f"{c}: tl.constexpr" for c in constants) + "):")
    body: list[str] = []
    if row_wise:
        parts += [
            "    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)",
            "    column = tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)",
            "    mask_m = offs_m < M",
            "    mask = mask_m & (column < N)",
            "    offs = offs_m * N + column  # (BLOCK_M, BLOCK_N)",
        ]
    else:
        first = "tl.program_id(0).to(tl.int64) * " + ("BLOCK_N" if bwd else "(BLOCK_N * TILES)")
        parts.append(f"    first = {first}")
        step = "" if bwd else " + tile * BLOCK_N"
        body += [f"offs = first{step} + tl.arange(0, BLOCK_N)  # (BLOCK_N,)", "mask = offs < N"]
    for t in tensors:
        short = row_wise and (t in (per_row or ()) or t == "dloss")
        offs, mask = ("offs_m", "mask_m") if short else ("offs", "mask")
        loaded = f"{t} = load({t}_ptr, {offs} * {t.upper()}_STEP, {mask})"
        if t in parameters.optional:
            body += [f"if {t.upper()}_STEP < 0:", f"    {t} = {parameters.optional[t]!r}", "else:", f"    {loaded}"]
        else:
            body.append(loaded)
    given = {o: o.upper() for o in parameters.options} | {"column": "column", "columns": "N"}
    call = f"{function}({', '.join(given.get(p, p) for p in parameters.order)})"
    if bwd:
        body += [
            'if REDUCTION == "mean":',
            f"    dloss = dloss / {'M' if row_wise else 'N'}",
            f"{', '.join(outputs)} = {call}",
        ]
        for o in outputs:
            stored = f"tl.store({o}_ptr + offs, (dloss * {o}).to({o}_ptr.dtype.element_ty), mask=mask)"
            body += [f"if NEEDS_{o.upper()}:", f"    {stored}"]
        parts += [f"    {line}" for line in body]
        return "\n".join(parts) + "\n"
    body.append(f"{', '.join(['loss', *outputs])} = {call}")
    body += [f"tl.store({o}_ptr + offs, {o}.to({o}_ptr.dtype.element_ty), mask=mask)" for o in outputs]
    offs, mask = ("offs_m", "mask_m") if row_wise else ("offs", "mask")
    add = f"tl.where({mask}, loss, 0.0)"
    body += [
        'if REDUCTION == "none":',
        f"    tl.store(loss_ptr + {offs}, loss.to(loss_ptr.dtype.element_ty), mask={mask})",
        "else:",
        f"    total {'' if row_wise else '+'}= {add}",
    ]
    if not row_wise:
        parts += ["    total = tl.zeros((BLOCK_N,), tl.float32)", "    for tile in range(TILES):"]
    parts += [("    " if row_wise else "        ") + line for line in body]
    parts += [
        '    if REDUCTION != "none":',
        "        sum = tl.sum(total)",
        '        if LAST and REDUCTION == "mean":',
        f"            sum = sum / {'M' if row_wise else 'N'}",
        "        tl.store(loss_ptr + tl.program_id(0), sum.to(loss_ptr.dtype.element_ty))",
    ]
    return "\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# The op
# --------------------------------------------------------------------------------------------------------------------

_BLOCK, _TILES = 1024, 8  # elements of a program of a reduced elementwise loss: 8192


class Loss:
    """One loss: its kernels and the functions that an op's module must have. Made by `elementwise_loss`, `row_loss`."""

    def __init__(
        self,
        qualname: str,
        value: Any,
        derivative: Any,
        gradients: Sequence[str] | None,
        extras: Sequence[str],
        per_row: Sequence[str] | None,
        reference: Callable[..., Any] | None,
        check: Callable[..., None] | None,
        inputs: Callable[..., tuple[Any, ...]] | None,
        options: Sequence[Mapping[str, Any]],
        flops: int,
    ) -> None:
        self.namespace, _, self.name = qualname.rpartition("::")
        if not self.namespace:
            raise ValueError(f"losses: the name of a loss is 'namespace::name', not '{qualname}'")
        self.row_wise, self.per_row, self.extras = per_row is not None, tuple(per_row or ()), tuple(extras)
        self.value, self.derivative, self.own_reference = value, derivative, reference
        self.parameters = p = _Parameters.of(value, self.row_wise)
        if _Parameters.of(derivative, self.row_wise) != p:
            raise TypeError(f"{qualname}: the value and its derivative must have the same parameters and defaults")
        self.gradients = tuple(gradients or p.tensors[:1])
        self.own_check, self.inputs, self.sample_options, self.flops = check, inputs, tuple(options), flops
        names = {value.__name__: value, derivative.__name__: derivative}
        rows = self.per_row if self.row_wise else None
        self.forward_kernel, self.backward_kernel = (
            _compile_source(kernel, _kernel_source(kernel, p, function.__name__, outputs, rows, bwd), names)
            for kernel, function, outputs, bwd in (
                (f"_{self.name}_fwd_kernel", value, self.extras, False),
                (f"_{self.name}_bwd_kernel", derivative, [f"d{g}" for g in self.gradients], True),
            )
        )

    # -- signatures ---------------------------------------------------------------------------------------------------

    def signature(self, ctx: bool = False) -> inspect.Signature:
        """The public op's, with ctx before if asked for."""
        kind = inspect.Parameter
        found = [kind("ctx", kind.POSITIONAL_OR_KEYWORD)] if ctx else []
        for t in self.parameters.tensors:
            default = None if t in self.parameters.optional else kind.empty
            found.append(kind(t, kind.POSITIONAL_OR_KEYWORD, default=default))
        options = {**self.parameters.options, "reduction": "mean"}
        found += [kind(o, kind.KEYWORD_ONLY, default=d) for o, d in options.items()]
        return inspect.Signature(found)

    def backward_signature(self) -> inspect.Signature:
        """(dloss, tensors, options, reduction[, needs]), all by position."""
        names = ["dloss", *self.parameters.tensors, *self.parameters.options, "reduction"]
        names += ["needs"] if len(self.gradients) > 1 else []
        return inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])

    def split(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any], str]:
        """The public op's arguments as (tensors, options, reduction)."""
        count = len(self.parameters.tensors)
        tensors = [*args, *(kwargs.get(t) for t in self.parameters.tensors[len(args) :])]
        options = {o: kwargs.get(o, d) for o, d in self.parameters.options.items()}
        return tensors[:count], options, kwargs.get("reduction", "mean")

    def split_backward(self, args: Sequence[Any]) -> tuple[list[Any], dict[str, Any], str, Sequence[bool]]:
        """What follows dloss in the gradient op's arguments, as (tensors, options, reduction, needs)."""
        t, o = len(self.parameters.tensors), len(self.parameters.options)
        options = dict(zip(self.parameters.options, args[t : t + o], strict=True))
        needs = args[t + o + 1] if len(self.gradients) > 1 else (True,)
        return list(args[:t]), options, args[t + o], needs

    # -- sizes --------------------------------------------------------------------------------------------------------

    def shape(self, first: torch.Tensor) -> torch.Size:
        """Of the loss before its reduction."""
        return first.shape[:-1] if self.row_wise else first.shape

    def rows(self, first: torch.Tensor) -> tuple[int, ...]:
        """(M, N), or (N,) of an elementwise loss."""
        return (math.prod(first.shape[:-1]), first.shape[-1]) if self.row_wise else (first.numel(),)

    def steps(self, tensors: Sequence[torch.Tensor | None]) -> dict[str, int]:
        """1, 0 for a tensor of one element that serves all, -1 for None."""
        first = tensors[0]
        assert first is not None
        found = {}
        for name, t in zip(self.parameters.tensors, tensors, strict=True):
            whole = first.shape[:-1] if name in self.per_row else first.shape
            found[f"{name.upper()}_STEP"] = -1 if t is None else 1 if t.shape == whole else 0
        return found

    # -- launchers ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The public op on a GPU."""
        tensors, options, reduction = self.split(args, kwargs)
        loss, *extras = self.outputs(tensors, reduction)
        sizes = self.rows(tensors[0])
        constants: dict[str, Any] = {o.upper(): value for o, value in options.items()} | self.steps(tensors)
        if self.row_wise:
            constants |= _row_config(sizes[1])
            programs = cdiv(sizes[0], constants["BLOCK_M"])
        else:
            constants |= {"BLOCK_N": _BLOCK, "TILES": 1 if reduction == "none" or sizes[0] <= _BLOCK else _TILES}
            programs = cdiv(sizes[0], constants["BLOCK_N"] * constants["TILES"])
        last = bool(programs <= 1)
        if reduction != "none" and last:
            programs = 1  # also of nothing: a sum is 0 then, a mean NaN
        target = loss if reduction == "none" or last else loss.new_empty(programs, dtype=torch.float32)
        constants |= {"LAST": last, "REDUCTION": reduction}
        launch(self.forward_kernel, (programs,), *map(_flat, tensors), target, *extras, *sizes, **constants)
        if target is not loss:
            sum_partials(target, loss, sizes[0], reduction == "mean")
        return (loss, *extras) if extras else loss

    def backward(self, dloss: torch.Tensor, *args: Any) -> Any:
        """The gradient op on a GPU."""
        tensors, options, reduction, needs = self.split_backward(args)
        found = self.backward_outputs(tensors, needs)
        sizes = self.rows(tensors[0])
        constants: dict[str, Any] = {o.upper(): value for o, value in options.items()} | self.steps(tensors)
        constants |= {f"NEEDS_D{g.upper()}": bool(n) for g, n in zip(self.gradients, needs, strict=True)}
        # an upstream gradient that is the same for all, as a sum's, is not written out
        alike = all(stride == 0 or size == 1 for size, stride in zip(dloss.shape, dloss.stride(), strict=True))
        constants |= {"DLOSS_STEP": 0 if alike else 1, "REDUCTION": reduction}
        if self.row_wise:
            constants |= _row_config(sizes[1])
            programs = cdiv(sizes[0], constants["BLOCK_M"])
        else:
            constants["BLOCK_N"] = _BLOCK
            programs = cdiv(sizes[0], _BLOCK)
        inputs = (dloss if alike else _flat(dloss), *map(_flat, tensors))
        wanted = (d if needed else None for d, needed in zip(found, needs, strict=True))
        launch(self.backward_kernel, (programs,), *inputs, *wanted, *sizes, **constants)
        return found if len(found) > 1 else found[0]

    # -- fakes --------------------------------------------------------------------------------------------------------

    def outputs(self, tensors: Sequence[Any], reduction: str) -> list[torch.Tensor]:
        """Loss and extras, contiguous and not computed."""
        first = tensors[0]
        shape = self.shape(first)
        return [first.new_empty(shape if reduction == "none" else ())] + [first.new_empty(shape) for _ in self.extras]

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        tensors, _, reduction = self.split(args, kwargs)
        found = self.outputs(tensors, reduction)
        return tuple(found) if self.extras else found[0]

    def backward_outputs(self, tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[torch.Tensor, ...]:
        """A gradient for each of `gradients`; empty where it is not needed."""
        named = dict(zip(self.parameters.tensors, tensors, strict=True))
        pairs = zip(self.gradients, needs, strict=True)
        return tuple(named[g].new_empty(named[g].shape if needed else (0,)) for g, needed in pairs)

    def backward_fake(self, dloss: torch.Tensor, *args: Any) -> Any:
        tensors, _, _, needs = self.split_backward(args)
        found = self.backward_outputs(tensors, needs)
        return found if len(found) > 1 else found[0]

    # -- reference ----------------------------------------------------------------------------------------------------

    def on_torch(self, function: Any, tensors: Sequence[Any], options: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """`value` or `derivative` of whole tensors."""
        dtype = arithmetic_dtype(*tensors)
        first = tensors[0]
        given: dict[str, Any] = dict(options)
        for name, t in zip(self.parameters.tensors, tensors, strict=True):
            if t is None:
                given[name] = self.parameters.optional[name]
                continue
            t = t.to(dtype) if t.is_floating_point() else t
            if not self.row_wise:
                given[name] = t if t.shape == first.shape else t.reshape(())
            else:
                given[name] = t.reshape(math.prod(first.shape[:-1]), 1 if name in self.per_row else first.shape[-1])
        if self.row_wise:
            given["columns"] = first.shape[-1]
            given["column"] = torch.arange(first.shape[-1], device=first.device)[None]
        found = translate(function, dtype)(**{name: given[name] for name in self.parameters.order})
        return found if isinstance(found, tuple) else (found,)

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The public op in plain torch; differentiable by torch."""
        tensors, options, reduction = self.split(args, kwargs)
        first = tensors[0]
        shape = self.shape(first)
        if self.own_reference is not None:
            dtype = arithmetic_dtype(*tensors)
            found = self.own_reference(*(t.to(dtype) if _floating(t) else t for t in tensors), **options)
            found = found if isinstance(found, tuple) else (found,)
        else:
            found = self.on_torch(self.value, tensors, options)
        loss, *extras = (t.expand(shape) if t.ndim == 0 else t.reshape(shape) for t in found)
        loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
        made = tuple(t.to(first.dtype).contiguous() for t in (loss, *(e.detach() for e in extras)))
        return made if self.extras else made[0]

    def backward_reference(self, dloss: torch.Tensor, *args: Any) -> Any:
        tensors, options, reduction, needs = self.split_backward(args)
        named = dict(zip(self.parameters.tensors, tensors, strict=True))
        found = self.on_torch(self.derivative, tensors, options)
        dloss = dloss.to(arithmetic_dtype(*tensors))
        if reduction == "mean":
            dloss = dloss / self.rows(tensors[0])[0]
        if self.row_wise and reduction != "none":
            dloss = dloss.reshape(1, 1)
        elif self.row_wise:
            dloss = dloss.reshape(-1, 1)
        made = tuple(
            (dloss * d).to(named[g].dtype).expand(self.rows(tensors[0])).reshape(named[g].shape).contiguous()
            if self.row_wise
            else (dloss * d).to(named[g].dtype).expand(named[g].shape).contiguous()
            if needed
            else named[g].new_empty(0)
            for g, d, needed in zip(self.gradients, found, needs, strict=True)
        )
        return made if len(made) > 1 else made[0]

    # -- check, gradient, cases ---------------------------------------------------------------------------------------

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Shapes and reduction; then the loss's own."""
        tensors, options, reduction = self.split(args, kwargs)
        first = tensors[0]

        def bad(argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> None:
            bad_argument(self.name, argument, given, allowed, error, self.namespace)

        if self.row_wise and (first.ndim == 0 or not 1 <= first.shape[-1] <= MAX_COLUMNS):
            allowed = f"(..., N) with 1 to {MAX_COLUMNS} columns"
            bad(self.parameters.tensors[0], f"of shape {tuple(first.shape)}", allowed)
        for name, t in zip(self.parameters.tensors[1:], tensors[1:], strict=True):
            if t is None:
                continue
            whole = first.shape[:-1] if name in self.per_row else first.shape
            one = t.numel() == 1 and name not in self.gradients and not self.row_wise
            if t.shape != whole and not one:
                more = "" if self.row_wise or name in self.gradients else ", or one element"
                bad(name, f"of shape {tuple(t.shape)}", f"{tuple(whole)}, as {self.parameters.tensors[0]}{more}")
        if reduction not in REDUCTIONS:
            bad("reduction", repr(reduction), "'none', 'mean' or 'sum'")
        for name, option in options.items():
            if isinstance(option, float) and not math.isfinite(option):
                bad(name, option, "a finite number")
        if self.own_check is not None:
            named = dict(zip(self.parameters.tensors, tensors, strict=True))
            self.own_check(bad, **named, **options)

    def context_forward(self, ctx: Any, *args: Any) -> Any:
        """What an autograd.Function's forward does; every argument by position."""
        count = len(self.parameters.tensors)
        tensors, rest = args[:count], args[count:]
        names = [*self.parameters.options, "reduction"]
        op = getattr(getattr(torch.ops, self.namespace), self.name)
        found = op(*tensors, **dict(zip(names, rest, strict=True)))
        ctx.save_for_backward(*tensors)
        ctx.options = rest
        if self.extras:
            ctx.mark_non_differentiable(*found[1:])
        return found

    def context_backward(self, ctx: Any, dloss: torch.Tensor, *_: Any) -> Any:
        op = getattr(getattr(torch.ops, self.namespace), f"{self.name}_bwd")
        needs = (list(ctx.needs),) if len(self.gradients) > 1 else ()
        return op(dloss, *ctx.saved_tensors, *ctx.options, *needs)

    def make_inputs(self, shape: Sequence[int], device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """Tensors of one call: the loss's own, or normal numbers for every tensor that is not optional."""
        if self.inputs is not None:
            return self.inputs(tuple(shape), device, dtype)
        needed = [t for t in self.parameters.tensors if t not in self.parameters.optional]
        shapes = (tuple(shape)[:-1] if t in self.per_row else tuple(shape) for t in needed)
        return tuple(torch.randn(s, device=device, dtype=dtype) for s in shapes)

    def samples(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
        """Every reduction, one element and none, several programs, and one call for each of `options`."""

        def sample(id: str, *shape: int, **options: Any) -> Sample:
            return Sample(id, self.make_inputs(shape, device, dtype), options)

        yield sample("5x33", 5, 33)
        for i, options in enumerate(self.sample_options):
            label = (
                "_".join(f"{o}_{v}" for o, v in options.items() if not isinstance(v, torch.Tensor)) or f"options_{i}"
            )
            yield sample(label, 3, 7, **{"reduction": "none", **options})
        if dtype in (torch.float32, torch.float64):
            yield sample("sum_9000", *((300, 30) if self.row_wise else (9000,)), reduction="sum")
            yield sample("empty_sum", *((0, 5) if self.row_wise else (0,)), reduction="sum")
            yield sample("one_none", 1, 1, reduction="none")

    def error_samples(self, device: torch.device | str) -> Iterator[ErrorSample]:
        args = self.make_inputs((4, 5), device, torch.float32)
        first, *others = self.parameters.tensors
        name = f"{self.namespace}::{self.name}"
        yield ErrorSample("reduction", args, {"reduction": "avg"}, match=f"{name}.*'reduction' is 'avg'.*'mean'")
        yield ErrorSample("dtype", (args[0].int(), *args[1:]), {}, TypeError, f"{name}.*'{first}'.*int32.*float32")
        if len(args) > 1:
            wrong = (args[0], args[1][:3], *args[2:])
            yield ErrorSample("shape", wrong, {}, ValueError, rf"{name}.*'{others[0]}'.*\(3")

    def bench_cases(self) -> Iterator[BenchCase]:
        M, N = (8192, 4096) if self.row_wise else (8192, 8192)
        yield BenchCase(f"{M}x{N}", lambda device, dtype: (self.make_inputs((M, N), device, dtype), {}))

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """Bytes: every tensor read, the loss and the extras written; backward: read again, the gradients written."""
        tensors, _, reduction = self.split(args, kwargs)
        first = tensors[0]
        read = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        size = first.element_size()
        elements = math.prod(self.shape(first))
        wrote = (elements if reduction == "none" else 1) * size + len(self.extras) * elements * size
        named = dict(zip(self.parameters.tensors, tensors, strict=True))
        gradients = sum(named[g].numel() * named[g].element_size() for g in self.gradients)
        work = self.flops * first.numel()
        return Cost(work, read + wrote, 2 * work, read + gradients)

    # -- the module ---------------------------------------------------------------------------------------------------

    def define(self, module: dict[str, Any]) -> None:
        """Put every function of the contract into an op's module, those left out that it has already."""
        n, public, bwd = self.name, self.signature(), self.backward_signature()
        made: dict[str, tuple[Callable[..., Any], inspect.Signature | None]] = {
            n: (self.forward, public),
            f"{n}_fake": (self.fake, public),
            f"{n}_reference": (self.reference, public),
            f"{n}_check": (self.check, public),
            f"{n}_bwd": (self.backward, bwd),
            f"{n}_bwd_fake": (self.backward_fake, bwd),
            f"{n}_bwd_reference": (self.backward_reference, bwd),
            f"{n}_forward": (self.context_forward, self.signature(ctx=True)),
            f"{n}_backward": (self.context_backward, None),
            f"{n}_samples": (self.samples, None),
            f"{n}_error_samples": (self.error_samples, None),
            f"{n}_bench_cases": (self.bench_cases, None),
            f"{n}_cost": (self.cost, public),
        }
        for name, (method, signature) in made.items():
            module.setdefault(name, _function(name, method, signature, module))


def _function(
    name: str, method: Callable[..., Any], signature: inspect.Signature | None, module: dict[str, Any]
) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__module__ = module.get("__name__", __name__)
    function.__doc__ = method.__doc__
    if signature is not None:
        function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _floating(t: Any) -> bool:
    return t is not None and t.is_floating_point()


def _flat(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _row_config(columns: int) -> dict[str, int]:
    """Two rows of 1024 or less to a program, or one; 1024 elements to a warp from 4096 on."""
    block = next_power_of_2(columns)
    return {"BLOCK_M": max(1, 2048 // block), "BLOCK_N": block, "num_warps": max(4, block // 1024)}


def elementwise_loss(
    name: str,
    value: Any,
    derivative: Any,
    module: dict[str, Any],
    *,
    gradients: Sequence[str] | None = None,
    extras: Sequence[str] = (),
    reference: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    inputs: Callable[..., tuple[Any, ...]] | None = None,
    options: Sequence[Mapping[str, Any]] = (),
    flops: int = 8,
) -> Loss:
    """Make the op `name` of a loss whose elements are computed each by itself. The recipe is in the module's docstring.

    Args:
        name: "namespace::name", as in the registry file.
        value, derivative: @triton.jit functions of the same parameters. `value` returns the loss, or the loss and `extras`;
            `derivative` one gradient for each of `gradients`, without the upstream gradient.
        module: `globals()` of the op's module. A function of the contract that it has already is left alone.
        gradients: the tensors with a gradient, in the registry file's order; the first tensor by default. With two or more
            the gradient op's last argument is `bool[n] needs`.
        extras: names of further outputs, of the first tensor's shape and dtype, without a gradient.
        reference: the value in plain torch, of whole tensors in fp32 or fp64; by default `value` itself, translated.
        check: called as check(bad, tensors and options by name); calls bad(argument, given, allowed) for what is wrong.
        inputs: inputs(shape, device, dtype) gives the tensors of a sample; by default normal numbers.
        options: keyword arguments of further samples. flops: arithmetic operations an element.

    Raises ValueError for a name without namespace, TypeError if the two functions' parameters differ.
    """
    loss = Loss(name, value, derivative, gradients, extras, None, reference, check, inputs, options, flops)
    loss.define(module)
    return loss


def row_loss(
    name: str,
    value: Any,
    derivative: Any,
    module: dict[str, Any],
    *,
    per_row: Sequence[str] = (),
    gradients: Sequence[str] | None = None,
    reference: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    inputs: Callable[..., tuple[Any, ...]] | None = None,
    options: Sequence[Mapping[str, Any]] = (),
    flops: int = 8,
) -> Loss:
    """Make the op `name` of a loss of rows, of at most 16384 columns. As `elementwise_loss`, and

    per_row: the tensors that have one element a row, (...) where the first is (..., N).
    """
    loss = Loss(name, value, derivative, gradients, (), per_row, reference, check, inputs, options, flops)
    loss.define(module)
    return loss


# --------------------------------------------------------------------------------------------------------------------
# What the losses of pairs share
# --------------------------------------------------------------------------------------------------------------------


def check_pairs(bad: Callable[..., None], **options: Any) -> None:
    """Raise for a beta, label smoothing, margin, weight or loss type that cpo, simpo or orpo do not know."""
    if not options["beta"] > 0.0:
        bad("beta", options["beta"], "a number above 0")
    smoothing, loss_type = options.get("label_smoothing", 0.0), options.get("loss_type", "sigmoid")
    if loss_type not in ("sigmoid", "hinge", "ipo"):
        bad("loss_type", repr(loss_type), "'sigmoid', 'hinge' or 'ipo'")
    if not 0.0 <= smoothing < 0.5:
        bad("label_smoothing", smoothing, "a number from 0 to below 0.5")
    if smoothing and loss_type != "sigmoid":
        bad("label_smoothing", smoothing, f"0 with loss_type '{loss_type}'")
    for name in ("gamma", "alpha", "sft_weight"):
        if not options.get(name, 0.0) >= 0.0:
            bad(name, options[name], "a number >= 0")


def pairs_case(count: int, pairs: int = 1024) -> BenchCase:
    """`count` tensors of log-probabilities or rewards in fp32."""

    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(-1.0 - torch.rand(pairs, device=device, dtype=dtype) for _ in range(count)), {}

    return BenchCase(str(pairs), make, torch.float32)
