"""`check_op`: the conformance suite. It proves any torch.library op, ours or anyone's, and says where it is wrong.

>>> report = check_op("tt::rms_norm", device="cuda")                           # doctest: +SKIP
>>> report = check_op(torch.ops.my.op, [Sample("M3", (x,))], reference=plain)  # doctest: +SKIP
>>> print(report); report.raise_if_failed()                                    # doctest: +SKIP

The error budget, for every element of every output and gradient:

    |op - exact| <= 2 * max|torch - exact| + eps * |exact| + tiny

`exact` is the reference in fp64, `torch` the reference at the input's precision; eps and tiny are the result dtype's.
One sample may be lucky for torch (a scalar loss that rounds to the exact value), so before a result is called wrong the
maximum is taken over a few neighbours of the sample too, whose inputs and upstream gradients differ in their last bits.
Infinities and NaNs must stand where they stand in `exact` (rounded to the dtype) or in `torch`.

On CPU an op of ours runs its own reference: there the suite proves the registration (schema, fake, autograd, compile).
The kernels are proved on CUDA and, under TRITON_INTERPRET=1, in Triton's interpreter.

    python -m torch_triton_ops.testing --device cuda --record tests/gpu_record.json [--op rms_norm]
    python -m torch_triton_ops.testing --status tests/gpu_record.json
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torch_triton_ops import registry
from torch_triton_ops.cases import ErrorSample, Sample
from torch_triton_ops.launch import INTERPRET

__all__ = [
    "CHECKS",
    "ONCE",
    "PER_SAMPLE",
    "CheckResult",
    "ErrorSample",
    "Report",
    "Sample",
    "check_op",
    "dtype_name",
    "samples_of",
    "stale",
]

_CHUNK = 1 << 26  # elements compared at a time: the fp64 temporaries of a 2**31-element tensor would not fit
_SMALL = 1 << 22  # elements of a sample up to which every variant of strides and upstream gradients is tried
_BAND = 4096  # guard elements on either side of an allocation: an unmasked block's tail lands there
_SEED = 20
_LAYOUT_SAMPLES = 8  # samples, at least, on which every layout is tried
_JOB_SAMPLES = 4  # samples of one op and dtype that a process of --jobs takes,
_WHOLE = 16  # unless there are no more than so many: a CUDA context costs seconds, and the driver makes one at a time
_JOB_SECONDS = 900  # a deadlocked kernel must not hold the machine


# --------------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckResult:
    """One check on one sample. `passed` is None if it was skipped; `detail` says why, or what is wrong."""

    check: str
    sample: str
    passed: bool | None
    detail: str = ""


@dataclass
class Report:
    """What `check_op` found. `print(report)` shows a table, every failure and every reason for a skip."""

    op: str
    device: str
    results: list[CheckResult] = field(default_factory=list)

    @property
    def failures(self) -> list[CheckResult]:
        return [r for r in self.results if r.passed is False]

    @property
    def skipped(self) -> list[CheckResult]:
        return [r for r in self.results if r.passed is None]

    @property
    def passed(self) -> bool:
        """Nothing failed, and something was checked."""
        return not self.failures and any(r.passed for r in self.results)

    def counts(self) -> dict[str, dict[str, int]]:
        """Per check: how many samples passed, failed, were skipped."""
        counts: dict[str, dict[str, int]] = {}
        for result in self.results:
            row = counts.setdefault(result.check, {"passed": 0, "failed": 0, "skipped": 0})
            row[{True: "passed", False: "failed", None: "skipped"}[result.passed]] += 1
        return counts

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the whole report unless it passed."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED" if self.failures else "nothing was checked"
        lines = [f"{self.op} on {self.device}: {verdict}", f"  {'check':<16}{'passed':>7}{'failed':>7}{'skipped':>8}"]
        for check, row in self.counts().items():
            lines.append(f"  {check:<16}{row['passed']:>7}{row['failed'] or '':>7}{row['skipped'] or '':>8}")
        lines += [f"FAILED {r.check} [{r.sample}]: {r.detail}" for r in self.failures]
        reasons = Counter((r.check, r.detail) for r in self.skipped)
        lines += [f"skipped {check} ({count}x): {reason}" for (check, reason), count in reasons.items()]
        return "\n".join(lines)


class _Failed(Exception):
    """A check's finding."""


class _Skipped(Exception):
    """Why a check does not apply."""


# --------------------------------------------------------------------------------------------------------------------
# The op, its calls and what they should return
# --------------------------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """Short name for sample ids: fp32, fp16, bf16, fp64, else torch's."""
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
    return short.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Subject:
    """The op under test and what is known of it."""

    op: Any  # OpOverload
    name: str  # "tt::rms_norm"
    reference: Callable[..., Any] | None
    differentiable: tuple[str, ...] | None  # None: every floating-point argument
    spec: registry.OpSpec | None
    device: torch.device
    eager: Callable[..., Any] | None = None  # as eager torch rounds it at the inputs' precision; else the reference

    @property
    def short_name(self) -> str:
        return self.name.partition("::")[2]

    @property
    def arguments(self) -> list[Any]:
        return list(self.op._schema.arguments)

    @cached_property
    def mutated(self) -> tuple[str, ...]:
        """Names of the arguments that the schema declares as written to."""
        return tuple(a.name for a in self.arguments if a.alias_info is not None and a.alias_info.is_write)

    def names(self, error: BaseException) -> bool:
        """Whether the message tells the user which op refused."""
        return self.short_name in str(error)


def _base(name: str) -> str:
    """The argument of a tensor's label: `xs` for `xs[0]`."""
    return name.partition("[")[0]


@dataclass
class _Call:
    """One call: its tensors with their argument's names, and how to put others in their place."""

    names: list[str]
    tensors: list[torch.Tensor]
    leaves: list[Any]
    positions: list[int]
    structure: Any

    @classmethod
    def of(cls, subject: _Subject, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
        leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
        names: list[str] = []
        given = [(a.name, v) for a, v in zip(subject.arguments, args, strict=False)] + list(kwargs.items())
        for name, value in given:
            inner = tree_leaves(value)
            listed = isinstance(value, (list, tuple))
            names += [f"{name}[{i}]" if listed else name for i in range(len(inner))]
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        return cls([names[i] for i in positions], [leaves[i] for i in positions], leaves, positions, structure)

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with other tensors."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        return tree_unflatten(leaves, self.structure)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> _Call:
        args, kwargs = self.rebuild(tensors)
        leaves, structure = tree_flatten((args, kwargs))
        return _Call(self.names, list(tensors), leaves, self.positions, structure)

    def options(self) -> list[Any]:
        """The arguments that are no tensors."""
        return [leaf for i, leaf in enumerate(self.leaves) if i not in set(self.positions)]

    def numel(self) -> int:
        return sum(t.numel() for t in self.tensors)


def _copy(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the same strides, offsets and sharing of storage; no autograd history."""
    storages: dict[int, torch.UntypedStorage] = {}
    out = []
    for t in tensors:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in storages:
            storages[key] = storage.clone()
        new = torch.empty(0, dtype=t.dtype, device=t.device)
        out.append(new.set_(storages[key], t.storage_offset(), t.size(), t.stride()))
    return out


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [t.detach().to(dtype) if t.is_floating_point() else t.detach().clone() for t in tensors]


def _flat_outputs(result: Any) -> list[Any]:
    if result is None:
        return []
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _output_names(subject: _Subject, count: int) -> list[str]:
    returns = subject.op._schema.returns
    names = [r.name or f"output {i}" for i, r in enumerate(returns)]
    return names if len(names) == count else [f"output {i}" for i in range(count)]


@dataclass(frozen=True)
class _Expected:
    """What one result may be: the fp64 value, torch's own at the input's precision, how far torch was off at most.

    `widen` gives torch's largest error on neighbours of the sample; it is asked only before a result is called wrong.
    """

    name: str
    exact: torch.Tensor
    torch: torch.Tensor
    error: float
    widen: Callable[[], float] | None = None


def _max_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    worst = 0.0
    flat, exact = value.reshape(-1), exact.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        v, e = flat[start : start + _CHUNK].double(), exact[start : start + _CHUNK].double()
        error = (v - e).abs()
        worst = max(worst, float(torch.where(error.isfinite(), error, 0.0).max()))
    return worst


def _expect(
    name: str,
    exact: torch.Tensor | None,
    at_precision: torch.Tensor | None,
    widen: Callable[[], float] | None = None,
) -> _Expected | None:
    if exact is None or at_precision is None:
        return None
    floating = at_precision.is_floating_point()
    return _Expected(name, exact, at_precision, _max_error(at_precision, exact) if floating else 0.0, widen)


_Results = list["torch.Tensor | None"]


class _Neighbours:
    """Torch's largest error on samples whose inputs differ from the given ones in the last bits, for each result."""

    COUNT = 6

    def __init__(self, tensors: Sequence[torch.Tensor], evaluate: Callable[[list[torch.Tensor]], _Results]) -> None:
        self.tensors, self.evaluate = tensors, evaluate

    @cached_property
    def errors(self) -> list[float]:
        worst: list[float] = []
        for seed in range(self.COUNT if self.tensors else 0):
            with _seeded(self.tensors[0].device, seed):
                moved = [
                    (t.double() * (1 + 4 * torch.finfo(t.dtype).eps * (2 * torch.rand_like(t.double()) - 1))).to(
                        t.dtype
                    )
                    if t.is_floating_point()
                    else t.clone()
                    for t in (t.detach() for t in self.tensors)
                ]
            plain, exact = self.evaluate(_copy(moved)), self.evaluate(_cast(moved, torch.float64))
            errors = [
                _max_error(p, e) if p is not None and e is not None and p.is_floating_point() else 0.0
                for p, e in zip(plain, exact, strict=True)
            ]
            worst = errors if not worst else [max(pair) for pair in zip(worst, errors, strict=True)]
        return worst

    def error(self, i: int) -> Callable[[], float]:
        return lambda: self.errors[i] if self.errors else 0.0


def _same_class(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _compare(got: torch.Tensor, want: _Expected) -> None:
    """Raise _Failed with the first element of `got` that is outside the budget."""
    if got.shape != want.torch.shape:
        raise _Failed(f"{want.name}: shape {tuple(got.shape)}, expected {tuple(want.torch.shape)}")
    if got.dtype != want.torch.dtype:
        raise _Failed(f"{want.name}: dtype {got.dtype}, expected {want.torch.dtype}")
    if want.widen is not None and _first_bad(got, want) is not None:
        want = replace(want, error=max(want.error, want.widen()), widen=None)
    if (found := _first_bad(got, want)) is not None:
        raise _Failed(found)


def _first_bad(got: torch.Tensor, want: _Expected) -> str | None:
    """The first element of `got` outside the budget, in words."""
    flat, exact, plain = (t.detach().reshape(-1) for t in (got, want.exact, want.torch))
    for start in range(0, flat.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        g, e, p = flat[part], exact[part], plain[part]
        if not got.is_floating_point():
            ok, allowed = (g == e.to(g.dtype)) | (g == p), None
        else:
            info = torch.finfo(got.dtype)
            g64, e64, p64 = g.double(), e.double(), p.double()
            allowed = 2 * want.error + info.eps * e64.abs() + info.tiny
            ok = g64.isfinite() & e64.isfinite() & ((g64 - e64).abs() <= allowed)
            ok |= ~g64.isfinite() & _same_class(g64, e64.to(got.dtype).double())
            ok |= ~p64.isfinite() & _same_class(g64, p64)
        bad = (~ok).nonzero()
        if bad.numel():
            i = int(bad[0])
            more = f"; {bad.numel()} of {flat.numel()} elements are wrong" if bad.numel() > 1 else ""
            poison = "; it still holds the poison, so it was never written" if _is_poison(g[i]) else ""
            budget = f" +- {float(allowed[i]):.3g}" if allowed is not None else ""
            index = tuple(int(n) for n in torch.unravel_index(torch.tensor(start + i), got.shape))
            where = f"{want.name}[{', '.join(map(str, index))}]"
            return f"{where} is {g[i].item()}, expected {e[i].item()}{budget}{poison}{more}"
    return None


def _bits(t: torch.Tensor) -> torch.Tensor:
    """The elements' bytes, (numel, itemsize), so that NaN equals itself and -0 differs from 0."""
    return t.detach().contiguous().reshape(-1, 1).view(torch.uint8)


def _compare_bits(name: str, got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise _Failed(f"{name}: {got.dtype} {tuple(got.shape)}, {what} {want.dtype} {tuple(want.shape)}")
    bad = (_bits(got) != _bits(want)).any(1).nonzero()
    if bad.numel():
        i = int(bad[0])
        index = ", ".join(str(int(n)) for n in torch.unravel_index(torch.tensor(i), got.shape))
        values = f"{got.detach().reshape(-1)[i].item()}, {what} {want.detach().reshape(-1)[i].item()}"
        raise _Failed(f"{name}[{index}] is {values}; {bad.numel()} of {got.numel()} elements differ")


@dataclass
class _Run:
    """Results of a call: outputs with the declared-mutated arguments after them, and gradients by input label."""

    outputs: list[torch.Tensor]
    names: list[str]
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)


@dataclass(eq=False)
class _Case:
    """One sample of one dtype, and, computed once, what it should give."""

    subject: _Subject
    label: str
    sample: Sample
    call: _Call
    large: bool = False
    thorough: bool = True  # the op's first dtype: costly checks try every variant
    every_layout: bool = True  # strides and upstream gradients of every layout, each a compilation of its own
    siblings: list[_Case] = field(default_factory=list, repr=False)

    @property
    def differentiable(self) -> list[int]:
        """Positions in `call.tensors` of the inputs that have a gradient."""
        names = self.subject.differentiable
        return [
            i
            for i, (name, t) in enumerate(zip(self.call.names, self.call.tensors, strict=True))
            if t.is_floating_point()
            and _base(name) not in self.subject.mutated
            and (names is None or _base(name) in names)
        ]

    @property
    def has_gradient(self) -> bool:
        return bool(self.differentiable) and any(v is not None for v in self.upstream)

    def with_tensors(self, label: str, tensors: Sequence[torch.Tensor]) -> _Case:
        """The same call on other tensors."""
        return replace(self, label=f"{self.label}-{label}", call=self.call.with_tensors(tensors))

    @cached_property
    def expected(self) -> list[_Expected | None]:
        if self.subject.reference is None:
            raise _Skipped("no reference given")
        with torch.no_grad():
            plain, names = self._reference(_copy(self.call.tensors))
            exact, _ = self._reference(_cast(self.call.tensors, torch.float64))
        neighbours = self._neighbours(lambda tensors: list(self._reference(tensors)[0]))
        return [
            _expect(n, e, p, None if neighbours is None else neighbours.error(i))
            for i, (n, e, p) in enumerate(zip(names, exact, plain, strict=True))
        ]

    def _neighbours(
        self, evaluate: Callable[[list[torch.Tensor]], _Results], upstream: Sequence[torch.Tensor] = ()
    ) -> _Neighbours | None:
        """None for a large sample, where luck plays no part."""
        return None if self.call.numel() > _SMALL else _Neighbours([*self.call.tensors, *upstream], evaluate)

    def _reference(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[str]]:
        args, kwargs = self.call.rebuild(tensors)
        exact = any(t.dtype == torch.float64 for t in tensors)
        reference = self.subject.reference if exact or self.subject.eager is None else self.subject.eager
        outputs = _flat_outputs(reference(*args, **kwargs))  # type: ignore[misc]
        names = _output_names(self.subject, len(outputs))
        for name, t in zip(self.call.names, tensors, strict=True):
            if _base(name) in self.subject.mutated:
                outputs.append(t)
                names.append(name)
        return outputs, names

    def _reference_gradients(self, tensors: list[torch.Tensor], upstream: Sequence[torch.Tensor | None]) -> _Results:
        """The reference's gradients of the inputs in `differentiable`."""
        inputs = [tensors[i].requires_grad_() for i in self.differentiable]
        with torch.enable_grad():
            outputs, _ = self._reference(tensors)
        pairs = [
            (o, v.to(o.dtype)) for o, v in zip(outputs, upstream, strict=False) if v is not None and o.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs)
        return list(torch.autograd.grad([o for o, _ in pairs], inputs, [v for _, v in pairs], allow_unused=True))

    def expected_gradients(self, upstream: Sequence[torch.Tensor | None]) -> dict[str, _Expected | None]:
        """What the gradient of each input should be; None: the result does not depend on it."""
        if self.subject.reference is None:
            raise _Skipped("no reference given")
        plain = self._reference_gradients(_copy(self.call.tensors), upstream)
        exact = self._reference_gradients(_cast(self.call.tensors, torch.float64), upstream)
        names = [self.call.names[i] for i in self.differentiable]
        given = [v for v in upstream if v is not None]

        def moved(tensors: list[torch.Tensor]) -> _Results:
            rest = iter(tensors[len(self.call.tensors) :])
            return self._reference_gradients(
                tensors[: len(self.call.tensors)], [None if v is None else next(rest) for v in upstream]
            )

        neighbours = self._neighbours(moved, given)
        return {
            n: _expect(f"gradient of {n}", e, p, None if neighbours is None else neighbours.error(i))
            for i, (n, e, p) in enumerate(zip(names, exact, plain, strict=True))
        }

    @cached_property
    def upstream(self) -> list[torch.Tensor | None]:
        """A random gradient for each output that has one, by the reference; by the op itself if there is none."""
        tensors = _copy(self.call.tensors)
        for i in self.differentiable:
            tensors[i].requires_grad_()
        with torch.enable_grad():
            if self.subject.reference is not None:
                outputs, _ = self._reference(tensors)
            else:
                args, kwargs = self.call.rebuild(tensors)
                outputs = _flat_outputs(self.subject.op(*args, **kwargs))
        with _seeded(self.subject.device):
            return [_randn_like(o.detach()) if o.requires_grad else None for o in outputs]

    @cached_property
    def gradients(self) -> dict[str, _Expected | None]:
        """Expected gradients for `upstream`."""
        return self.expected_gradients(self.upstream)

    def run(self, tensors: list[torch.Tensor] | None = None) -> _Run:
        """Call the op without gradients."""
        tensors = _copy(self.call.tensors) if tensors is None else tensors
        args, kwargs = self.call.rebuild(tensors)
        with torch.no_grad():
            outputs = _flat_outputs(self.subject.op(*args, **kwargs))
        names = _output_names(self.subject, len(outputs))
        for name, t in zip(self.call.names, tensors, strict=True):
            if _base(name) in self.subject.mutated:
                outputs.append(t)
                names.append(name)
        return _Run(outputs, names)

    def run_with_gradients(
        self,
        upstream: Sequence[torch.Tensor | None] | None = None,
        tensors: list[torch.Tensor] | None = None,
        inputs: Sequence[int] | None = None,
        function: Callable[..., Any] | None = None,
    ) -> _Run:
        """Call the op and differentiate it by `inputs` (all that it can)."""
        upstream = self.upstream if upstream is None else upstream
        inputs = self.differentiable if inputs is None else inputs
        tensors = _copy(self.call.tensors) if tensors is None else tensors
        for i in inputs:
            tensors[i].requires_grad_()
        with torch.enable_grad():
            if function is not None:
                outputs = _flat_outputs(function(*tensors))
            else:
                args, kwargs = self.call.rebuild(tensors)
                outputs = _flat_outputs(self.subject.op(*args, **kwargs))
        names = _output_names(self.subject, len(outputs))
        pairs = [(n, o, v) for n, o, v in zip(names, outputs, upstream, strict=False) if v is not None]
        for name, out, _ in pairs:
            if not out.requires_grad and inputs == self.differentiable:
                raise _Failed(f"{name} does not require a gradient though {self._label(inputs)} do: it is cut silently")
        pairs = [p for p in pairs if p[1].requires_grad]
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        if pairs and inputs:
            gradients = list(
                torch.autograd.grad(
                    [o for _, o, _ in pairs], [tensors[i] for i in inputs], [v for _, _, v in pairs], allow_unused=True
                )
            )
        found = {self.call.names[i]: g for i, g in zip(inputs, gradients, strict=True)}
        return _Run([o.detach() for o in outputs], names, found)

    def _label(self, inputs: Sequence[int]) -> str:
        return ", ".join(self.call.names[i] for i in inputs)

    def compare(self, run: _Run) -> None:
        """Outputs of a run against `expected`."""
        if len(run.outputs) != len(self.expected) and not run.gradients:
            raise _Failed(f"{len(run.outputs)} outputs, expected {len(self.expected)}")
        for got, want in zip(run.outputs, self.expected, strict=False):
            if want is not None:
                _compare(got, want)

    def compare_gradients(self, run: _Run, expected: dict[str, _Expected | None] | None = None) -> None:
        """Gradients of a run against `expected` (those of `upstream`). No gradient and a zero one are the same."""
        expected = self.gradients if expected is None else expected
        inputs = dict(zip(self.call.names, self.call.tensors, strict=True))
        for name, got in run.gradients.items():
            want = expected[name]
            if want is None:
                zero = torch.zeros_like(inputs[name])
                want = _Expected(f"gradient of {name}", zero, zero, 0.0)
            _compare(torch.zeros_like(want.torch) if got is None else got, want)


def _is_float8(t: torch.Tensor) -> bool:
    return t.is_floating_point() and t.itemsize == 1


def _randn_like(t: torch.Tensor) -> torch.Tensor:
    """Contiguous; also in float8, in which torch draws none."""
    return torch.randn(t.shape, device=t.device).to(t.dtype) if _is_float8(t) else torch.randn_like(t).contiguous()


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int = _SEED) -> Iterator[None]:
    """The same random numbers every time, and the user's generators left as they were."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


# --------------------------------------------------------------------------------------------------------------------
# Guarded allocations
# --------------------------------------------------------------------------------------------------------------------


def _poison_byte(dtype: torch.dtype) -> int:
    """0xFF bytes are a NaN in every floating dtype; for integers something unlikely."""
    return 0xFF if dtype.is_floating_point or dtype.is_complex else 0xA5


def _is_poison(element: torch.Tensor) -> bool:
    if element.dtype == torch.bool:
        return False
    return bool((_bits(element) == _poison_byte(element.dtype)).all())


@dataclass
class _Allocation:
    what: str
    buffer: torch.Tensor  # uint8: band, elements, band
    dtype: torch.dtype
    elements: int


class _Guard:
    """While active, what Python code allocates lies between guard bands and is poisoned: NaN, or 0xA5 bytes.

    It replaces torch.empty and its relatives, which is how launchers allocate; a C++ kernel's own allocations are not
    seen. `verify` finds what was written outside.
    """

    FUNCTIONS = (
        "empty",
        "empty_like",
        "empty_strided",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
    )
    METHODS = ("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")

    def __init__(self) -> None:
        self.allocations: list[_Allocation] = []
        self._make = torch.empty
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> _Guard:
        for owner, prefix, names in ((torch, "torch.", self.FUNCTIONS), (torch.Tensor, "", self.METHODS)):
            for name in names:
                original, own = getattr(owner, name), name in vars(owner)
                setattr(owner, name, self._guarded(prefix + name, original))
                # Tensor inherits its methods: there, undoing is deleting
                self._undo.callback(*((setattr, owner, name, original) if own else (delattr, owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _guarded(self, what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        filled = not what.rpartition(".")[2].startswith(("empty", "new_empty"))

        def allocate(*args: Any, **kwargs: Any) -> Any:
            plain = original(*args, **kwargs)
            if type(plain) is not torch.Tensor or plain.layout != torch.strided or plain.device.type == "meta":
                return plain
            return self.place(what, plain, copy=filled)

        return allocate

    def place(self, what: str, like: torch.Tensor, copy: bool) -> torch.Tensor:
        """A tensor like `like` between bands; not a view, so that ops may return it."""
        elements = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        buffer = self._make((elements + 2 * _BAND) * like.element_size(), dtype=torch.uint8, device=like.device)
        buffer.fill_(_poison_byte(like.dtype))
        self.allocations.append(
            _Allocation(f"{what} of {like.dtype} {tuple(like.shape)}", buffer, like.dtype, elements)
        )
        out = self._make(0, dtype=like.dtype, device=like.device)
        out.set_(buffer.untyped_storage(), _BAND, like.size(), like.stride())
        if copy:
            out.copy_(like)
        return out

    def verify(self) -> None:
        """Raise _Failed for the first element that was written outside an allocation."""
        for allocation in self.allocations:
            flat = allocation.buffer.view(-1, allocation.dtype.itemsize)
            outside = (flat != _poison_byte(allocation.dtype)).any(1)
            outside[_BAND : _BAND + allocation.elements] = False
            bad = outside.nonzero()
            if bad.numel():
                i = int(bad[0])
                value = flat[i].view(allocation.dtype).item()
                raise _Failed(
                    f"out-of-bounds write: element {i - _BAND} of {allocation.what}, which has {allocation.elements},"
                    f" was set to {value}; {bad.numel()} elements outside were written"
                )


# --------------------------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------------------------


def _poisoned(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Memory that a read beside the elements would show: NaN, or 0xA5 bytes."""
    buffer = torch.empty(max(1, math.prod(shape)) * like.element_size(), dtype=torch.uint8, device=like.device)
    buffer.fill_(_poison_byte(like.dtype))
    return buffer.view(like.dtype)[: math.prod(shape)].view(tuple(shape))


def _transposed(t: torch.Tensor) -> torch.Tensor | None:
    return t.mT.contiguous().mT if t.ndim >= 2 else None


def _permuted(t: torch.Tensor) -> torch.Tensor | None:
    """As (B, S, H, D).transpose(1, 2) gives."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.ndim >= 3 else None


def _sliced(t: torch.Tensor) -> torch.Tensor | None:
    """Every second element of the last dimension."""
    if t.ndim == 0:
        return None
    return _poisoned((*t.shape[:-1], 2 * t.shape[-1]), t)[..., ::2].copy_(t)


def _padded(t: torch.Tensor) -> torch.Tensor | None:
    """Rows further apart than they are long, as a slice of a projection gives."""
    return _poisoned((*t.shape[:-1], t.shape[-1] + 3), t)[..., : t.shape[-1]].copy_(t) if t.ndim >= 2 else None


def _misaligned(t: torch.Tensor) -> torch.Tensor | None:
    """A storage offset of one element."""
    return _poisoned((t.numel() + 1,), t)[1:].view(t.shape).copy_(t)


def _expanded_first(t: torch.Tensor) -> torch.Tensor | None:
    """Stride 0 in the first dimension; other values than the sample's."""
    return t[:1].clone().expand(t.shape) if t.ndim and t.shape[0] > 1 and t.is_floating_point() else None


def _expanded_last(t: torch.Tensor) -> torch.Tensor | None:
    return t[..., :1].clone().expand(t.shape) if t.ndim and t.shape[-1] > 1 and t.is_floating_point() else None


_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "transposed": _transposed,
    "permuted": _permuted,
    "sliced": _sliced,
    "padded": _padded,
    "misaligned": _misaligned,
    "expanded": _expanded_first,
    "expanded_last": _expanded_last,
}


def _layout_variants(case: _Case, each: bool) -> Iterator[_Case]:
    """The same call on tensors of other layouts: all tensors at once and, if `each`, one at a time."""
    subject, tensors = case.subject, [t.detach() for t in case.call.tensors]
    free = [i for i, n in enumerate(case.call.names) if _base(n) not in subject.mutated]
    for kind, make in _LAYOUTS.items():
        made = {i: m for i in free if (m := make(tensors[i])) is not None}
        made = {i: m for i, m in made.items() if m.stride() != tensors[i].stride() or m.storage_offset()}
        choices = [(kind, list(made))] if made else []
        if each and len(made) > 1:
            choices += [(f"{kind}_{case.call.names[i]}", [i]) for i in made]
        for label, chosen in choices:
            variant = case.with_tensors(label, [made[i] if i in chosen else t for i, t in enumerate(tensors)])
            if not kind.startswith("expanded"):  # the same values: what is expected is known already
                for name in ("expected", "upstream", "gradients"):
                    if name in case.__dict__:
                        variant.__dict__[name] = case.__dict__[name]
            yield variant


def _upstream_layouts(upstream: Sequence[torch.Tensor | None]) -> Iterator[tuple[str, list[torch.Tensor | None]]]:
    """The same upstream gradients as a transpose, a slice and a row of a concatenation would hand them down."""
    for kind in ("transposed", "sliced", "padded", "misaligned"):
        made = [None if v is None else _LAYOUTS[kind](v) for v in upstream]
        if any(m is not None for m in made):
            yield kind, [v if m is None else m for v, m in zip(upstream, made, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# The checks. Each takes a case and raises _Failed or _Skipped; any other exception is a failure too.
# --------------------------------------------------------------------------------------------------------------------


def _need_gradient(case: _Case) -> None:
    if not case.differentiable:
        raise _Skipped("no argument of this call has a gradient")
    if case.subject.reference is not None and all(v is None for v in case.upstream):
        raise _Skipped("no output depends differentiably on an input")


def _check_values(case: _Case) -> None:
    """Outputs against fp64, under no_grad and under inference_mode."""
    run = case.run()
    case.compare(run)
    if case.large:
        return
    with torch.inference_mode():
        args, kwargs = case.call.rebuild(_copy(case.call.tensors))
        inferred = _flat_outputs(case.subject.op(*args, **kwargs))
    for got, want in zip(inferred, case.expected, strict=False):
        if want is not None:
            _compare(got, want)


def _check_gradients(case: _Case) -> None:
    """Outputs and gradients against fp64: upstream gradients of several layouts, one input or output at a time."""
    _need_gradient(case)
    run = case.run_with_gradients()
    case.compare(run)
    case.compare_gradients(run)
    if case.large or case.call.numel() > _SMALL:
        return
    with _context("expanded upstream gradient"):
        # what out.sum().backward() hands down: stride 0 everywhere
        upstream = [
            v if v is None or not v.numel() else v[(0,) * v.ndim].clone().expand(v.shape) for v in case.upstream
        ]
        case.compare_gradients(case.run_with_gradients(upstream), case.expected_gradients(upstream))
    if not case.every_layout:
        return
    for label, other in _upstream_layouts(case.upstream):
        with _context(f"{label} upstream gradient"):
            case.compare_gradients(case.run_with_gradients(other))
    if len(case.differentiable) > 1:
        for i in case.differentiable:
            with _context(f"only {case.call.names[i]} requires a gradient"):
                case.compare_gradients(case.run_with_gradients(inputs=[i]))
    if sum(v is not None for v in case.upstream) > 1:
        for i, v in enumerate(case.upstream):
            if v is not None:
                with _context(f"only output {i} has an upstream gradient"):
                    one = [u if j == i else None for j, u in enumerate(case.upstream)]
                    case.compare_gradients(case.run_with_gradients(one), case.expected_gradients(one))


def _check_strides(case: _Case) -> str | None:
    """Values and gradients on transposed, permuted, sliced, padded, misaligned and expanded inputs.

    An op may refuse a layout by an error that names it.
    """
    if case.call.numel() > _SMALL:
        raise _Skipped("the sample is large")
    if not case.call.tensors:
        raise _Skipped("no tensor argument")
    if not case.every_layout:
        raise _Skipped(
            "layouts are tried on samples spread over the first dtype, and on representative ones of the others"
        )
    with contextlib.suppress(_Skipped):
        _ = case.expected
        if case.differentiable:
            _ = case.gradients
    refused = []
    for variant in _layout_variants(case, each=not INTERPRET and case in _representatives(case.siblings)):
        with _context(variant.label.removeprefix(case.label + "-")):
            try:
                with_gradients = INTERPRET and variant.has_gradient  # one run less; `guard` tries the other, too
                run = variant.run_with_gradients() if with_gradients else variant.run()
            except (ValueError, RuntimeError, TypeError) as error:
                if not case.subject.names(error):
                    raise
                refused.append(variant.label)
                continue
            if case.subject.reference is None:
                contiguous = case.with_tensors("contiguous", [t.contiguous() for t in variant.call.tensors]).run()
                for name, got, want in zip(run.names, run.outputs, contiguous.outputs, strict=True):
                    slack = _Expected(
                        name, want, want, 8 * _eps(want) * float(want.abs().max()) if want.numel() else 0.0
                    )
                    _compare(got, slack)
                continue
            variant.compare(run)
            if variant.has_gradient:
                variant.compare_gradients(run if with_gradients else variant.run_with_gradients())
    return f"refused by a named error: {', '.join(refused)}" if refused else None


def _eps(t: torch.Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _check_guard(case: _Case) -> None:
    """Nothing is written outside the allocations and every element of an output is; inputs between bands too."""
    if case.call.numel() > _SMALL:
        raise _Skipped("the sample is large")

    def guarded(gradient: bool) -> _Run:
        with _Guard() as guard:
            inputs = [
                guard.place(f"input {n}", t.detach(), copy=True) for n, t in zip(case.call.names, tensors, strict=True)
            ]
            run = case.run_with_gradients(tensors=inputs) if gradient else case.run(inputs)
        guard.verify()
        return run

    # overlapping memory can not be copied into
    tensors = [t.contiguous() if 0 in t.stride() else t for t in case.call.tensors]
    run = guarded(False)
    if case.subject.reference is None:
        for name, out in zip(run.names, run.outputs, strict=True):
            poisoned = (_bits(out) == _poison_byte(out.dtype)).all(1).nonzero() if out.dtype != torch.bool else None
            if poisoned is not None and poisoned.numel():
                raise _Failed(
                    f"{name}: flat element {int(poisoned[0])} still holds the poison, so it was never written"
                )
        return
    case.compare(run)
    if case.has_gradient:
        with _context("with gradients"):
            run = guarded(True)
            case.compare(run)
            case.compare_gradients(run)


@dataclass
class _Inner:
    """A call of an op of the same namespace that the op under test made."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]
    violation: str | None


class _Watch(TorchDispatchMode):
    """Sees every call of an op of the namespace: the op under test, and those that its gradient is made of."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[_Inner] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != self.namespace:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        copies = dict(zip(map(id, tensors), _copy([t.detach() for t in tensors]), strict=True))
        kept = tree_map(lambda v: copies.get(id(v), v), (args, kwargs))
        honest = _Honesty(func, args, kwargs)
        result = func(*args, **kwargs)
        outputs = _flat_outputs(result)
        self.calls.append(_Inner(func, kept[0], kept[1], outputs, honest.violation(outputs)))
        return result


class _Honesty:
    """The inputs of a call before it, to find what the call did to them."""

    def __init__(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.inputs: list[tuple[str, bool, bool, torch.Tensor, torch.Tensor, str]] = []
        arguments = {a.name: a for a in op._schema.arguments}
        given = [(a.name, v) for a, v in zip(op._schema.arguments, args, strict=False)] + list(kwargs.items())
        for name, value in given:
            info = arguments[name].alias_info
            for t in tree_leaves(value):
                if isinstance(t, torch.Tensor):
                    declared = info is not None
                    writable = declared and info.is_write
                    # the whole storage: a write beside the view counts too
                    before = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()
                    self.inputs.append((name, declared, writable, t, before, self.facts(t)))

    @staticmethod
    def facts(t: torch.Tensor) -> str:
        version = "unknown" if t.is_inference() else t._version
        return (
            f"shape {tuple(t.shape)}, strides {t.stride()}, offset {t.storage_offset()}, {t.dtype}, version {version}"
        )

    def violation(self, outputs: Sequence[Any]) -> str | None:
        writable_storages = {t.untyped_storage()._cdata for _, _, writable, t, _, _ in self.inputs if writable}
        for name, declared, writable, t, before, facts in self.inputs:
            undeclared = f"argument '{name}' was changed, which the schema does not declare: "
            if not writable and t.untyped_storage()._cdata not in writable_storages:
                now = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
                changed = (now != before).nonzero()
                if changed.numel():
                    i, size = int(changed[0]) // t.element_size(), t.element_size()
                    was, new = (b[i * size : (i + 1) * size].view(t.dtype).item() for b in (before, now))
                    return f"{undeclared}element {i} of its storage from {was} to {new}"
                if self.facts(t) != facts:
                    return f"{undeclared}{facts} -> {self.facts(t)}"
            if not declared:
                for k, out in enumerate(outputs):
                    if isinstance(out, torch.Tensor) and _share(out, t):
                        return f"output {k} shares memory with argument '{name}', which the schema does not declare"
        tensors = [(k, o) for k, o in enumerate(outputs) if isinstance(o, torch.Tensor)]
        for n, (k, a) in enumerate(tensors):
            for j, b in tensors[n + 1 :]:
                if _share(a, b):
                    return f"outputs {k} and {j} share memory"
        return None


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    pointer = a.untyped_storage().data_ptr()
    return a is b or (pointer != 0 and pointer == b.untyped_storage().data_ptr())


def _watched(case: _Case) -> list[_Inner]:
    """The internal calls of one forward and backward."""
    watch = _Watch(case.subject.op.namespace)
    with watch:
        if case.has_gradient:
            case.run_with_gradients()
        else:
            case.run()
    return [c for c in watch.calls if c.op is not case.subject.op]


def _check_schema(case: _Case) -> None:
    """No mutation and no aliasing that the schema does not declare: the op, its gradient, and the internal ops."""
    op = case.subject.op
    args, kwargs = case.call.rebuild(_copy(case.call.tensors))
    honest = _Honesty(op, args, kwargs)
    with torch.no_grad():
        outputs = _flat_outputs(op(*args, **kwargs))
    if found := honest.violation(outputs):
        raise _Failed(found)
    if case.has_gradient:
        tensors = _copy(case.call.tensors)
        for i in case.differentiable:
            tensors[i].requires_grad_()
        args, kwargs = case.call.rebuild(tensors)
        honest = _Honesty(op, args, kwargs)
        with torch.enable_grad():
            outputs = _flat_outputs(op(*args, **kwargs))
        if found := honest.violation(outputs):
            raise _Failed(f"when a gradient is needed: {found}")
        pairs = [
            (o, v.clone()) for o, v in zip(outputs, case.upstream, strict=False) if v is not None and o.requires_grad
        ]
        kept = [v.clone() for _, v in pairs]
        values = [o.detach().clone() for o in outputs]
        if pairs:
            torch.autograd.grad(
                [o for o, _ in pairs],
                [tensors[i] for i in case.differentiable],
                [v for _, v in pairs],
                allow_unused=True,
            )
        if found := honest.violation([]):
            raise _Failed(f"in the backward: {found}")
        for (_, now), before in zip(pairs, kept, strict=True):
            _compare_bits("the upstream gradient was changed by the backward: it", now, before, "was")
        for name, now, before in zip(_output_names(case.subject, len(outputs)), outputs, values, strict=True):
            _compare_bits(f"{name} was changed by the backward: it", now, before, "was")
    for inner in _watched(case):
        if inner.violation:
            raise _Failed(f"internal op {inner.op}: {inner.violation}")


def _check_fake(case: _Case) -> None:
    """The fake's shape, dtype, device and strides are the real ones: the op, internal ops, every layout of inputs."""
    if case.call.numel() > _SMALL:
        raise _Skipped("the sample is large")
    variants = [case] if INTERPRET else [case, *_layout_variants(case, each=False)]
    for variant in variants:
        with _context(variant.label.removeprefix(case.label).removeprefix("-")):
            args, kwargs = variant.call.rebuild(_copy(variant.call.tensors))
            try:
                with torch.no_grad():
                    outputs = _flat_outputs(case.subject.op(*args, **kwargs))
            except (ValueError, RuntimeError, TypeError) as error:
                if variant is case or not case.subject.names(error):
                    raise
                continue  # a layout that the op refuses
            _compare_fake(case.subject.op, args, kwargs, outputs)
    for inner in _watched(case):
        with _context(f"internal op {inner.op}"):
            _compare_fake(inner.op, inner.args, inner.kwargs, inner.outputs)


def _compare_fake(op: Any, args: Any, kwargs: Any, outputs: Sequence[Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, torch.no_grad():
        fake_args, fake_kwargs = tree_map(
            lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, (tuple(args), dict(kwargs))
        )
        fakes = _flat_outputs(op(*fake_args, **fake_kwargs))
    if len(fakes) != len(outputs):
        raise _Failed(f"the fake returns {len(fakes)} outputs, the op {len(outputs)}")
    for k, (fake, real) in enumerate(zip(fakes, outputs, strict=True)):
        if not isinstance(real, torch.Tensor):
            continue
        for what in ("shape", "dtype", "device"):
            a, b = getattr(fake, what), getattr(real, what)
            if a != b:
                raise _Failed(f"output {k}: the fake's {what} is {a}, the op's is {b}")
        # a stride says nothing where there is at most one element along it
        if real.numel() and any(
            a != b for a, b, n in zip(fake.stride(), real.stride(), real.shape, strict=True) if n > 1
        ):
            raise _Failed(
                f"output {k}: the fake's strides are {fake.stride()}, the op's {real.stride()},"
                f" shape {tuple(real.shape)}"
            )


_OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def _check_opcheck(case: _Case) -> None:
    """torch.library.opcheck, all four utilities, without and with gradients; the internal ops too."""
    if INTERPRET:
        raise _Skipped("opcheck traces, which Triton's interpreter does not support")
    calls = [("", case.subject.op, *case.call.rebuild(_copy(case.call.tensors)))]
    if case.differentiable:
        tensors = _copy(case.call.tensors)
        for i in case.differentiable:
            tensors[i].requires_grad_()
        calls.append(("with gradients: ", case.subject.op, *case.call.rebuild(tensors)))
    calls += [(f"internal op {c.op}: ", c.op, c.args, c.kwargs) for c in _watched(case)]
    for label, op, args, kwargs in calls:
        # torch has neither allclose nor sum of float8, which two utilities use; `schema` and `compile` check the same
        without = ("test_schema", "test_aot_dispatch_dynamic") if label == "with gradients: " else ("test_schema",)
        float8 = any(isinstance(t, torch.Tensor) and _is_float8(t) for t in tree_leaves((args, kwargs)))
        utilities = [name for name in _OPCHECK if not (float8 and name in without)]
        results = torch.library.opcheck(op, args, kwargs, test_utils=utilities, raise_exception=False)
        bad = {name: result for name, result in results.items() if result != "SUCCESS"}
        if bad:
            raise _Failed("; ".join(f"{label}{name}: {_one_line(result)}" for name, result in bad.items()))


def _check_gradcheck(case: _Case) -> None:
    """torch.autograd.gradcheck: analytic gradients against finite differences, in fp64."""
    if INTERPRET:
        raise _Skipped("kernels compute in fp32")
    if not case.differentiable:
        raise _Skipped("no argument of this call has a gradient")
    if not 0 < case.call.numel() <= 20_000:
        raise _Skipped("the sample is empty or large")
    tensors = [t.clone(memory_format=torch.contiguous_format) for t in _cast(case.call.tensors, torch.float64)]
    try:
        args, kwargs = case.call.rebuild(tensors)
        with torch.no_grad():
            case.subject.op(*args, **kwargs)
    except Exception as error:
        if case.subject.spec is not None and case.subject.device.type == "cpu":
            raise
        raise _Skipped(f"the op does not take float64: {_one_line(error)}") from None
    inputs = [tensors[i].requires_grad_() for i in case.differentiable]
    outputs = [i for i, v in enumerate(case.upstream) if v is not None]
    if not outputs:
        raise _Skipped("no output depends differentiably on an input")

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        current = list(tensors)
        for i, t in zip(case.differentiable, given, strict=True):
            current[i] = t
        args, kwargs = case.call.rebuild(current)
        found = _flat_outputs(case.subject.op(*args, **kwargs))
        return tuple(found[i] for i in outputs)

    with _seeded(case.subject.device):
        torch.autograd.gradcheck(function, inputs, fast_mode=True)


def _check_double_backward(case: _Case) -> str | None:
    """A second derivative is right, or raises, never silently zero. Ops of a registry: the error names the op."""
    _need_gradient(case)
    if not case.call.numel():
        raise _Skipped("the sample is empty")
    try:
        got = _second_derivatives(case, case.subject.op, _copy(case.call.tensors))
    except _Failed:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if case.subject.spec is not None and not case.subject.names(error):
            raise _Failed(f"the error does not name the op: {_one_line(error)}") from None
        return f"raises {_one_line(error)}"
    reference = case.subject.reference
    if reference is None:
        raise _Skipped("no reference given")
    try:
        plain = _second_derivatives(case, reference, _copy(case.call.tensors))
        exact = _second_derivatives(case, reference, _cast(case.call.tensors, torch.float64))
    except RuntimeError as error:
        raise _Skipped(f"the reference has no second derivative: {_one_line(error)}") from None
    for name, g, p, e in zip(got, got.values(), plain.values(), exact.values(), strict=True):
        want = _expect(f"second derivative by {name}", e, p)
        if want is not None:
            _compare(torch.zeros_like(want.torch) if g is None else g, want)
    return None


def _second_derivatives(
    case: _Case, function: Callable[..., Any], tensors: list[torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """Gradient of a random combination of the gradients, by inputs and upstream gradients."""
    inputs = [tensors[i].requires_grad_() for i in case.differentiable]
    names = [case.call.names[i] for i in case.differentiable]
    args, kwargs = case.call.rebuild(tensors)
    with torch.enable_grad(), _seeded(case.subject.device, _SEED + 1):
        outputs = _flat_outputs(function(*args, **kwargs))
        pairs = [
            (o, v.detach().to(o.dtype).requires_grad_())
            for o, v in zip(outputs, case.upstream, strict=False)
            if v is not None and o.requires_grad
        ]
        first = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [v for _, v in pairs], create_graph=True, allow_unused=True
        )
        # the random weights are drawn in one precision, so that fp64 sees the same
        weights = [torch.randn(t.shape, device=t.device).to(t.dtype) for t in inputs]
        used = [(g, w) for g, w in zip(first, weights, strict=True) if g is not None and g.requires_grad]
        wanted = [*inputs, *(v for _, v in pairs)]
        second: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if used:
            results, weights = [g for g, _ in used], [w for _, w in used]
            second = torch.autograd.grad(results, wanted, weights, allow_unused=True, retain_graph=True)
            if case.subject.spec is None and any(g is None for g in second):
                # the error of torch's own once_differentiable comes in backward() only
                torch.autograd.backward(results, weights)
    return dict(zip([*names, *(f"upstream gradient {i}" for i in range(len(pairs)))], second, strict=True))


def _check_forward_mode(case: _Case) -> str | None:
    """A forward-mode derivative is right, or raises. Ops of a registry: an error that names the op, never dropped."""
    import torch.autograd.forward_ad as forward_ad

    _need_gradient(case)
    if not case.call.numel():
        raise _Skipped("the sample is empty")

    def tangents(function: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        with _seeded(case.subject.device, _SEED + 2), forward_ad.dual_level():
            for i in case.differentiable:
                t = tensors[i].contiguous()
                tensors[i] = forward_ad.make_dual(t, torch.randn(t.shape, device=t.device).to(t.dtype))
            args, kwargs = case.call.rebuild(tensors)
            outputs = _flat_outputs(function(*args, **kwargs))
            return [forward_ad.unpack_dual(o).tangent if o.is_floating_point() else None for o in outputs]

    try:
        got = tangents(case.subject.op, _copy(case.call.tensors))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if case.subject.spec is not None and not case.subject.names(error):
            raise _Failed(f"the error does not name the op: {_one_line(error)}") from None
        return f"raises {_one_line(error)}"
    if case.subject.reference is None:
        raise _Skipped("no reference given")
    try:
        plain = tangents(case.subject.reference, _copy(case.call.tensors))
        exact = tangents(case.subject.reference, _cast(case.call.tensors, torch.float64))
    except (RuntimeError, NotImplementedError) as error:
        raise _Skipped(f"the reference has no forward-mode derivative: {_one_line(error)}") from None
    if case.subject.spec is None and all(g is None for g in got):
        raise _Skipped("the op drops tangents silently, as every torch.library.custom_op does")
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        want = _expect(f"tangent of output {i}", e, p)
        if want is not None:
            _compare(torch.zeros_like(want.torch) if g is None else g, want)
    return None


def _check_no_gradient(case: _Case) -> None:
    """Where there is no gradient, asking for one raises: arguments that declare none, and the internal ops."""
    subject = case.subject
    declared = set(case.differentiable)
    asked = False
    if subject.differentiable is not None:
        for i, (name, t) in enumerate(zip(case.call.names, case.call.tensors, strict=True)):
            if i in declared or not t.is_floating_point() or _base(name) in subject.mutated:
                continue
            asked = True
            tensors = _copy(case.call.tensors)
            tensors[i].requires_grad_()
            _refuses_gradient(subject, subject.op, *case.call.rebuild(tensors), tensors[i], f"argument '{name}'")
    for inner in _watched(case):
        leaves = [t for t in tree_leaves((inner.args, inner.kwargs)) if isinstance(t, torch.Tensor)]
        for t in leaves:
            if not t.is_floating_point():
                continue
            asked = True
            fresh = t.clone().requires_grad_()
            args, kwargs = tree_map(lambda v, t=t, fresh=fresh: fresh if v is t else v, (inner.args, inner.kwargs))
            _refuses_gradient(subject, inner.op, args, kwargs, fresh, f"internal op {inner.op}")
            break  # one is enough: the rule is the op's
    if not asked:
        raise _Skipped("every floating-point argument has a gradient, and there is no internal op")


def _refuses_gradient(subject: _Subject, op: Any, args: Any, kwargs: Any, by: torch.Tensor, what: str) -> None:
    try:
        with torch.enable_grad():
            outputs = [
                o for o in _flat_outputs(op(*args, **kwargs)) if isinstance(o, torch.Tensor) and o.is_floating_point()
            ]
            needing = [o for o in outputs if o.requires_grad]
            if not outputs:
                return
            if not needing:
                raise _Failed(f"{what}: the gradient is cut silently; it must raise an error")
            (found,) = torch.autograd.grad(needing, [by], [torch.ones_like(o) for o in needing], allow_unused=True)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        name = op._schema.name.partition("::")[2]
        if subject.spec is not None and name not in str(error):
            raise _Failed(f"{what}: the error does not name the op: {_one_line(error)}") from None
        return
    if found is None:
        raise _Failed(f"{what}: the gradient is cut silently; it must raise an error")
    if op is not subject.op and _has_autograd_kernel(op):
        return  # an op in its own right, which this one is made of
    raise _Failed(f"{what}: it is silently differentiated through its implementation; it must raise an error")


def _has_autograd_kernel(op: Any) -> bool:
    """Whether somebody wrote a gradient for the op, so that autograd does not look into its implementation."""
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, key)
        for key in ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
    )


def _check_repeat(case: _Case) -> None:
    """The same bits every time: outputs, and gradients where deterministic algorithms are asked for, as torch promises."""
    times = 4 if case.subject.device.type == "cuda" else 1
    first = case.run()
    for _ in range(times):
        for name, want, got in zip(first.names, first.outputs, case.run().outputs, strict=True):
            _compare_bits(name, got, want, "before it was")
    if case.has_gradient:
        with _deterministic():
            first = case.run_with_gradients()
            for _ in range(times):
                again = case.run_with_gradients().gradients
                for name, before in first.gradients.items():
                    now = again[name]
                    if before is not None and now is not None:
                        _compare_bits(f"gradient of {name}", now, before, "before it was")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # torch's own operators between ours may have no such kernel
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def _check_compile(case: _Case) -> None:
    """torch.compile(fullgraph=True) gives what eager gives: static and dynamic shapes, with and without gradients."""
    if INTERPRET:
        raise _Skipped("torch.compile does not support Triton's interpreter")
    backend = "inductor" if case.subject.device.type == "cuda" else "aot_eager"
    sibling = next((c for c in case.siblings if _same_but_sizes(case.call, c.call)), None)
    variants = [(dynamic, case.has_gradient) for dynamic in (False, True)]
    if not case.thorough:
        variants = variants[:1]
    elif case.has_gradient:
        variants += [(False, False), (True, False)]
    for dynamic, gradient in variants:
        label = f"{backend}, {'dynamic' if dynamic else 'static'}, {'with' if gradient else 'no'} gradient"
        with _context(label):
            torch._dynamo.reset()
            try:
                compiled = torch.compile(_of_tensors(case), fullgraph=True, dynamic=dynamic, backend=backend)
                # with dynamic shapes the same graph must serve another sample's sizes
                for other in [case, *([sibling] if dynamic and sibling is not None else [])]:
                    _compare_compiled(other, compiled, gradient)
            finally:
                torch._dynamo.reset()


def _of_tensors(case: _Case) -> Callable[..., Any]:
    """The op as a function of its tensors alone: options are constants, as in a model."""
    op, call = case.subject.op, case.call
    leaves, positions, structure = call.leaves, call.positions, call.structure

    def function(*tensors: torch.Tensor) -> Any:
        given = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            given[position] = tensor
        args, kwargs = tree_unflatten(given, structure)
        return op(*args, **kwargs)

    return function


def _same_but_sizes(a: _Call, b: _Call) -> bool:
    """Whether one dynamic graph should serve both: other sizes, none of them 0 or 1, everything else alike."""
    if a.names != b.names or a.structure != b.structure or a.options() != b.options():
        return False
    pairs = list(zip(a.tensors, b.tensors, strict=True))
    alike = all(x.dtype == y.dtype and x.ndim == y.ndim for x, y in pairs)
    sized = all(n > 1 for x, y in pairs for n in (*x.shape, *y.shape))
    return alike and sized and any(x.shape != y.shape for x, y in pairs)


def _compare_compiled(case: _Case, compiled: Callable[..., Any], gradient: bool) -> None:
    if gradient:
        eager, got = case.run_with_gradients(), case.run_with_gradients(function=compiled)
    else:
        eager = case.run()
        tensors = _copy(case.call.tensors)
        with torch.no_grad():
            outputs = _flat_outputs(compiled(*tensors))
        mutated = [t for n, t in zip(case.call.names, tensors, strict=True) if _base(n) in case.subject.mutated]
        got = _Run([*outputs, *mutated], eager.names)
    for name, g, e in zip(eager.names, got.outputs, eager.outputs, strict=True):
        if g.numel() and any(a != b for a, b, n in zip(g.stride(), e.stride(), e.shape, strict=True) if n > 1):
            raise _Failed(f"{name}: strides {g.stride()}, in eager {e.stride()}")
        if case.subject.reference is None:
            _compare_bits(name, g, e, "in eager")
    if case.subject.reference is not None:
        case.compare(got)
        if gradient:
            case.compare_gradients(got)


def _need_cuda(case: _Case) -> None:
    if case.subject.device.type != "cuda":
        raise _Skipped("CUDA only")


def _check_host_sync(case: _Case) -> None:
    """No host synchronisation in a warm call, forward and backward."""
    _need_cuda(case)

    def calls(inputs: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
        case.run(inputs)
        if case.has_gradient:
            case.run_with_gradients(tensors=leaves)

    calls(_copy(case.call.tensors), _copy(case.call.tensors))
    inputs, leaves = _copy(case.call.tensors), _copy(case.call.tensors)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls(inputs, leaves)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _check_cuda_graph(case: _Case) -> None:
    """Capture forward, and forward with backward; replayed on other data the graph gives what eager gives."""
    _need_cuda(case)
    if not case.call.numel():
        raise _Skipped("the sample is empty: there is nothing to capture")
    for gradient in (False, True) if case.has_gradient else (False,):
        with _context("forward and backward" if gradient else "forward"), _deterministic():
            static = [t.contiguous() if 0 in t.stride() else t for t in _copy(case.call.tensors)]
            upstream = [None if v is None else v.clone() for v in case.upstream]

            def step(
                tensors: list[torch.Tensor], gradient: bool = gradient, upstream: list[Any] = upstream
            ) -> list[torch.Tensor]:
                if not gradient:
                    return case.run(tensors).outputs
                run = case.run_with_gradients(upstream, [t.detach() for t in tensors])
                return [*run.outputs, *(g for g in run.gradients.values() if g is not None)]

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step(_copy(static))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step(static)
            # the same numbers in another order: valid data, another result
            fresh = [_flipped(t) if t.is_floating_point() and t.ndim else t for t in _copy(case.call.tensors)]
            with torch.no_grad():
                for target, source in zip(static, fresh, strict=True):
                    target.copy_(source)
                for out in captured:
                    if not any(_share(out, t) for t in static):
                        out.fill_(float("nan") if out.is_floating_point() else 0)
                eager = step(_copy(static))
                graph.replay()
            torch.cuda.synchronize()
            for i, (got, want) in enumerate(zip(captured, eager, strict=True)):
                _compare_bits(f"result {i} of the replay", got, want, "in eager")


def _flipped(t: torch.Tensor) -> torch.Tensor:
    """Also in float8, which torch does not flip."""
    return t.view(torch.int8).flip(-1).view(t.dtype) if _is_float8(t) else t.flip(-1)


def _check_coverage(cases: Sequence[_Case]) -> Iterator[CheckResult]:
    """The samples include an empty tensor, a size of one, and a size that is no multiple of 16."""
    shapes = [t.shape for c in cases for t in c.call.tensors]
    found = {
        "an empty tensor": any(0 in s for s in shapes),
        "a size of one": any(1 in s for s in shapes),
        "an odd size": any(n % 2 and n > 1 for s in shapes for n in s),
    }
    for what, present in found.items():
        yield CheckResult("coverage", what, True if present else None, "" if present else f"no sample has {what}")


@contextlib.contextmanager
def _context(label: str) -> Iterator[None]:
    """Put the variant before the finding."""
    try:
        yield
    except _Failed as failed:
        raise _Failed(f"{label}: {failed}" if label else str(failed)) from None
    except _Skipped:
        raise
    except Exception as error:
        raise _Failed(f"{label}: {_error_text(error)}" if label else _error_text(error)) from error


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _error_text(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_one_line(error)}{place}"


@dataclass(frozen=True)
class _Check:
    function: Callable[[_Case], str | None]
    scope: str  # every: each sample; few: representative samples of each dtype; float64: each sample in fp64
    large: bool = False  # runs on an op's GPU samples too


# In the interpreter a kernel takes a second, and the guard check compares values and gradients of every sample anyway.
_SELDOM = "few" if INTERPRET else "every"

_CHECKS: dict[str, _Check] = {
    "values": _Check(_check_values, "every", large=True),
    "gradients": _Check(_check_gradients, _SELDOM, large=True),
    "strides": _Check(_check_strides, _SELDOM),
    "guard": _Check(_check_guard, "every"),
    "schema": _Check(_check_schema, "every"),
    "fake": _Check(_check_fake, "every"),
    "repeat": _Check(_check_repeat, "every"),
    "double_backward": _Check(_check_double_backward, "few"),
    "forward_mode": _Check(_check_forward_mode, "few"),
    "no_gradient": _Check(_check_no_gradient, "few"),
    "gradcheck": _Check(_check_gradcheck, "float64"),
    "opcheck": _Check(_check_opcheck, "few"),
    "compile": _Check(_check_compile, "few"),
    "host_sync": _Check(_check_host_sync, "few"),
    "cuda_graph": _Check(_check_cuda_graph, "few"),
}
CHECKS: tuple[str, ...] = (*_CHECKS, "errors", "coverage")
"""Names for `check_op(checks=...)`: those of `PER_SAMPLE` run on every sample, of `ONCE` once for an op, the others on
representative samples of each dtype."""
PER_SAMPLE: tuple[str, ...] = tuple(name for name, check in _CHECKS.items() if check.scope == "every")
ONCE: tuple[str, ...] = ("gradcheck", "errors", "coverage")


def _representatives(cases: Sequence[_Case]) -> list[_Case]:
    """The first ordinary sample, and the one with the most options switched on."""
    ordinary = [c for c in cases if not c.large and c.call.numel() and c.call.numel() <= _SMALL]
    if not ordinary:
        return list(cases[:1])

    def options(case: _Case) -> int:
        defaults = {a.name: a.default_value for a in case.subject.arguments if a.has_default_value()}
        names = [a.name for a in case.subject.arguments]
        given = dict(zip(names, case.sample.args, strict=False)) | case.sample.kwargs
        return sum(
            isinstance(value, torch.Tensor) or value != defaults[name]
            for name, value in given.items()
            if name in defaults
        )

    first, most = ordinary[0], max(ordinary, key=options)
    return [first] if most is first or options(most) == options(first) else [first, most]


# --------------------------------------------------------------------------------------------------------------------
# check_op
# --------------------------------------------------------------------------------------------------------------------


def check_op(
    op: Any,
    samples: Iterable[Sample] | Callable[[torch.device, torch.dtype], Iterable[Sample]] | None = None,
    *,
    reference: Callable[..., Any] | None = None,
    differentiable: Sequence[str] | None = None,
    error_samples: Iterable[ErrorSample] | None = None,
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    checks: Sequence[str] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Report:
    """Prove an op: schema, fake, values, gradients, strides, bounds, autograd, torch.compile, determinism, CUDA graphs.

    Args:
        op: an OpOverload, an OpOverloadPacket with one overload, a `torch.library.custom_op`, or "namespace::name".
        samples: valid calls, or a function of (device, dtype) that yields them. For an op of the registry they come
            from its module; for any other op they are required.
        reference: the same computation in plain torch, which keeps fp64. From the registry for its ops. Without one,
            what needs it is skipped and reported so.
        differentiable: names of the arguments with a gradient; () for an op without. Default: the registry's, else
            every floating-point argument.
        error_samples: calls that must raise. From the registry for its ops.
        device: where the samples go. Default: that of the given samples, else "cuda" if there is a GPU, else "cpu".
        dtypes: default: the registry's; without it, samples as they are.
        checks: names out of `CHECKS`; default all.
        part: (i, n) leaves all but every n-th sample, beginning at the i-th, to other processes; what runs once for an
            op is in part 0.

    Returns:
        A `Report` with one result per check and sample.

    Raises:
        ValueError: unknown check or op, or no samples.
    """
    chosen = CHECKS if checks is None else tuple(checks)
    for name in chosen:
        if name not in CHECKS:
            raise ValueError(f"check_op: unknown check '{name}'; allowed: {', '.join(CHECKS)}")
    overload = _overload(op)
    name = overload._schema.name
    spec = next((s for s in registry.specs(None) if s.qualname == name), None)
    if samples is not None and not callable(samples):
        samples = list(samples)
    if spec is not None:
        samples = spec.function("samples") if samples is None else samples
        reference = spec.function("reference") if reference is None else reference
        differentiable = spec.differentiable if differentiable is None else differentiable
    if samples is None:
        raise ValueError(f"check_op: {name} is not in a registry, so it needs samples=[Sample(id, args, kwargs), ...]")
    where = _device(device, samples)
    subject = _Subject(
        overload, name, reference, None if differentiable is None else tuple(differentiable), spec, where
    )
    if spec is not None and reference is spec.function("reference"):
        subject = replace(subject, eager=spec.function("eager"))
    if error_samples is None and spec is not None and spec.function("error_samples") is not None:
        with _seeded(where):
            error_samples = list(spec.function("error_samples")(where))  # type: ignore[misc]
    if dtypes is None and callable(samples):
        dtypes = spec.dtypes if spec is not None else (torch.float32, torch.float16, torch.bfloat16)

    report = Report(name, str(where))
    seen: list[_Case] = []
    for dtype in (None,) if dtypes is None else dtypes:
        cases = _cases(subject, samples, dtype, large=spec is not None and where.type == "cuda")
        for case in cases:
            if INTERPRET and case.sample.slow_in_interpreter:
                report.results.append(CheckResult("values", case.label, None, "slow in the interpreter"))
        cases = [c for c in cases if not (INTERPRET and c.sample.slow_in_interpreter)]
        seen += [replace(c, siblings=[]) for c in cases if not c.large]
        few = _representatives(cases)
        first_dtype = dtypes is None or dtype == (spec.dtypes if spec is not None else dtypes)[0]
        for i, case in enumerate(cases):
            case.thorough = first_dtype
            case.every_layout = case in few or (first_dtype and i % max(1, len(cases) // _LAYOUT_SAMPLES) == 0)
        cases = cases[part[0] :: part[1]]
        while cases:
            case = cases.pop(0)  # so that a large sample's memory is free before the next one
            for check_name, check in _CHECKS.items():
                if check_name in chosen and check.scope != "float64":
                    if (check.scope == "few" and case not in few) or (case.large and not check.large):
                        continue
                    report.results.append(_apply(check_name, check, case))
    if part[0] != 0:
        return report
    if "gradcheck" in chosen:
        for case in _cases(subject, samples, torch.float64, large=False):
            report.results.append(_apply("gradcheck", _CHECKS["gradcheck"], case))
    if "errors" in chosen:
        report.results += _error_results(subject, error_samples)
    if "coverage" in chosen:
        report.results += _check_coverage(seen)
    return report


def samples_of(spec: registry.OpSpec, device: torch.device | str, dtype: torch.dtype) -> list[Sample]:
    """The samples of a registered op, the same in every process."""
    function = spec.function("samples")
    if function is None:
        raise ValueError(f"{spec.where}: module '{spec.module_name}' has no {spec.name}_samples(device, dtype)")
    with _seeded(torch.device(device)):
        return list(function(torch.device(device), dtype))


def _overload(op: Any) -> Any:
    if isinstance(op, str):
        namespace, _, name = (op if "::" in op else f"{registry.NAMESPACE}::{op}").partition("::")
        try:
            op = getattr(getattr(torch.ops, namespace), name.partition(".")[0])
        except AttributeError:
            raise ValueError(f"check_op: there is no op '{op}' in torch.ops") from None
    op = getattr(op, "_opoverload", op)  # torch.library.custom_op's object
    if isinstance(op, torch._ops.OpOverloadPacket):
        overloads = op.overloads()
        if len(overloads) != 1:
            raise ValueError(f"check_op: {op} has the overloads {', '.join(overloads)}; pass one of them")
        op = getattr(op, overloads[0])
    if not isinstance(op, torch._ops.OpOverload):
        raise ValueError(f"check_op: {op!r} is no torch.library op; pass torch.ops.<namespace>.<name>")
    return op


def _device(device: torch.device | str | None, samples: Any) -> torch.device:
    if device is None and not callable(samples):
        tensors = [t for s in samples for t in tree_leaves((s.args, s.kwargs)) if isinstance(t, torch.Tensor)]
        device = tensors[0].device if tensors else None
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _cases(subject: _Subject, samples: Any, dtype: torch.dtype | None, large: bool) -> list[_Case]:
    found: list[tuple[Sample, bool]] = []
    with _seeded(subject.device):
        if callable(samples):
            found += [(s, False) for s in samples(subject.device, dtype)]
            gpu_samples = subject.spec.function("gpu_samples") if large and subject.spec is not None else None
            if gpu_samples is not None:
                found += [(s, True) for s in gpu_samples(subject.device, dtype)]
        else:
            found += [(_moved(s, subject.device, dtype), False) for s in samples]
    cases = []
    for sample, is_large in found:
        call = _Call.of(subject, sample.args, sample.kwargs)
        own = next((t.dtype for t in call.tensors if t.is_floating_point()), None)
        shown = dtype or own
        label = f"{dtype_name(shown)}-{sample.id}" if shown is not None else sample.id
        cases.append(_Case(subject, label, sample, call, is_large))
    siblings = [c for c in cases if not c.large]
    for case in cases:
        case.siblings = siblings
    return cases


def _moved(sample: Sample, device: torch.device, dtype: torch.dtype | None) -> Sample:
    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        return value if value.device == device else value.to(device)

    args, kwargs = tree_map(move, (tuple(sample.args), dict(sample.kwargs)))
    return replace(sample, args=args, kwargs=kwargs)


def _apply(name: str, check: _Check, case: _Case) -> CheckResult:
    try:
        detail = check.function(case)
    except _Skipped as skipped:
        return CheckResult(name, case.label, None, str(skipped))
    except _Failed as failed:
        return CheckResult(name, case.label, False, str(failed))
    except Exception as error:
        return CheckResult(name, case.label, False, _error_text(error))
    return CheckResult(name, case.label, True, detail or "")


def _error_results(subject: _Subject, samples: Iterable[ErrorSample] | None) -> Iterator[CheckResult]:
    """Each wrong call raises the right type of error, and its message says what it must."""
    if samples is None:
        yield CheckResult("errors", "", None, "no error samples given")
        return
    for sample in samples:
        try:
            subject.op(*sample.args, **sample.kwargs)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if not isinstance(error, sample.error):
                yield CheckResult(
                    "errors", sample.id, False, f"raises {_one_line(text)}, expected {sample.error.__name__}"
                )
            elif not re.search(sample.match, str(error)):
                yield CheckResult(
                    "errors", sample.id, False, f"raises {_one_line(text)}, which must match '{sample.match}'"
                )
            else:
                yield CheckResult("errors", sample.id, True, _one_line(text))
        else:
            yield CheckResult("errors", sample.id, False, f"raises nothing, expected {sample.error.__name__}")


# --------------------------------------------------------------------------------------------------------------------
# Command line: the record of what passed on a GPU
# --------------------------------------------------------------------------------------------------------------------


def _record(spec: registry.OpSpec, report: Report, device: torch.device, seconds: float) -> dict[str, Any]:
    import triton

    return {
        "source_hash": registry.source_hash(spec),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "passed": report.passed,
        "seconds": round(seconds, 1),
        "checks": report.counts(),
        "samples": len({r.sample for r in report.results}),
        "failures": [f"{r.check} [{r.sample}]: {r.detail}" for r in report.failures],
    }


def stale(record: dict[str, Any]) -> list[str]:
    """Names of the registered ops that have not passed on a GPU since their source last changed, with the reason."""
    lines = []
    for spec in registry.specs():
        entry = record.get(spec.name)
        if entry is None or entry["gpu"] is None:
            lines.append(f"{spec.name}: never ran on a GPU")
        elif not entry["passed"]:
            lines.append(f"{spec.name}: failed on {entry['gpu']} on {entry['date']}")
        elif entry["source_hash"] != registry.source_hash(spec):
            lines.append(f"{spec.name}: changed since it passed on {entry['gpu']} on {entry['date']}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run `check_op` over the registry; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m torch_triton_ops.testing", description=main.__doc__)
    parser.add_argument("--op", action="append", metavar="OP[,OP]", help="only these ops; may be repeated")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", action="append", choices=sorted(registry.DTYPES), help="may be repeated")
    parser.add_argument("--check", action="append", choices=CHECKS, help="may be repeated (default: every check)")
    parser.add_argument("--record", type=Path, help="JSON file that is updated after each op")
    parser.add_argument("--status", type=Path, help="list the ops that changed since the record's pass, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with some samples of an op (default: 1)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="with --jobs: keep there what each process found, and take over what passed there before a run was cut off",
    )
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # where a process of --jobs leaves its results
    options = parser.parse_args(argv)
    if options.status is not None:
        record = json.loads(options.status.read_text()) if options.status.is_file() else {}
        for line in stale(record):
            print(line)
        return 0
    if options.resume and options.jobs <= 1:
        parser.error("--resume keeps the results of --jobs' processes: give --jobs 2 or more")
    if options.record and (options.check or options.dtype):
        parser.error("--record keeps what passed every check in every dtype: leave out --check and --dtype")
    device = _device(options.device, samples_of)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is available here; run it on a machine with one, or with --device cpu", file=sys.stderr)
        return 2
    wanted = ",".join(options.op or ()).replace(" ", "")
    specs = [registry.spec(name) for name in wanted.split(",")] if wanted else registry.specs()
    dtypes = [registry.DTYPES[name] for name in options.dtype] if options.dtype else None
    record = json.loads(options.record.read_text()) if options.record and options.record.is_file() else {}
    failed = 0
    for spec, report, seconds in _reports(specs, device, dtypes, options):
        if options.results:
            options.results.write_text(json.dumps([astuple(r) for r in report.results]))
        failed += not report.passed
        counts = Counter({True: "passed", False: "failed", None: "skipped"}[r.passed] for r in report.results)
        verdict = "ok  " if report.passed else "FAIL"
        print(f"{verdict} {spec.name:<24} {dict(counts)} in {seconds:.1f} s", flush=True)
        for result in report.failures:
            print(f"     {result.check} [{result.sample}]: {result.detail}", flush=True)
        if options.record:
            record[spec.name] = _record(spec, report, device, seconds)
            options.record.parent.mkdir(parents=True, exist_ok=True)
            options.record.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


def run_job(arguments: list[str], log: str) -> None:
    """One process of `--jobs`: `main(arguments)`, what it prints goes to the file `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main(arguments))


def _job_context(specs: Sequence[registry.OpSpec]) -> Any:
    """Where processes come from: the fork of one that has imported everything and never touched a GPU, if that works.

    Most of a process's time would go into imports otherwise.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # Inductor's own processes would compete with ours
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() without a CUDA context
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_triton_ops.testing", *(spec.module.__name__ for spec in specs)])
    if torch.cuda.is_available():
        with _without_main():
            probe = context.Process(target=torch.cuda.init)
            probe.start()
            probe.join()
        if probe.exitcode != 0:  # something imported had begun to use CUDA, and a fork cannot go on with that
            return multiprocessing.get_context("spawn")
    return context


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Spares the processes started inside a second run of this one's main module."""
    main_module = sys.modules["__main__"]
    spec, file = main_module.__spec__, main_module.__dict__.pop("__file__", None)
    main_module.__spec__ = None
    try:
        yield
    finally:
        main_module.__spec__ = spec
        if file is not None:
            main_module.__file__ = file


def _reports(
    specs: Sequence[registry.OpSpec], device: torch.device, dtypes: Sequence[torch.dtype] | None, options: Any
) -> Iterator[tuple[registry.OpSpec, Report, float]]:
    """Each op's report and seconds: in this process, or in `options.jobs` others (most of the time is compilation)."""
    if options.jobs <= 1:
        for spec in specs:
            start = time.perf_counter()
            report = check_op(spec.op, device=device, dtypes=dtypes, checks=options.check, part=tuple(options.part))
            yield spec, report, time.perf_counter() - start
        return

    context = _job_context(specs)
    job = importlib.import_module("torch_triton_ops.testing").run_job  # not __main__'s

    def run(spec: registry.OpSpec, dtype: torch.dtype, i: int, n: int, folder: str) -> tuple[list[CheckResult], float]:
        start = time.perf_counter()
        name = str(dtype).removeprefix("torch.")
        kept = None if options.resume is None else options.resume / f"{spec.name}-{name}-{i}-{_identity(spec, n)}.json"
        if kept is not None and kept.is_file():
            seconds, *rows = json.loads(kept.read_text())
            return [CheckResult(*row) for row in rows], seconds
        results = Path(folder) / f"{spec.name}-{name}-{i}.json"
        log = results.with_suffix(".log")
        arguments = ["--op", spec.qualname, "--dtype", name, "--part", str(i), str(n)]
        arguments += ["--device", str(device), "--results", str(results)]
        arguments += [word for check in options.check or () for word in ("--check", check)]
        process = context.Process(target=job, args=(arguments, str(log)))
        process.start()
        process.join(_JOB_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            why = f"the process was stopped after {_JOB_SECONDS} s: a kernel that hangs, or too little time"
        else:
            why = f"the process ended with {process.exitcode}: {log.read_text()[-2000:] if log.is_file() else ''}"
        if results.is_file():
            found = [CheckResult(*row) for row in json.loads(results.read_text())]
        else:
            found = [CheckResult("process", f"{dtype_name(dtype)} part {i} of {n}", False, why)]
        seconds = time.perf_counter() - start
        if kept is not None and all(r.passed is not False for r in found):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps([seconds, *map(astuple, found)]))
        elif kept is not None:  # the op's report comes when all its processes are done, if it comes
            for r in found:
                if r.passed is False:
                    print(f"     {spec.name} {r.check} [{r.sample}]: {r.detail}", flush=True)
        return found, seconds

    @functools.cache
    def _identity(spec: registry.OpSpec, parts: int) -> str:
        """Of what decides a process's results: the sources, this suite, the versions and the device."""
        suite = b"".join((registry.PACKAGE / f"{name}.py").read_bytes() for name in ("testing", "cases"))
        gpu = torch.cuda.get_device_properties(device).name if device.type == "cuda" else "cpu"
        facts = (registry.source_hash(spec), torch.__version__, triton.__version__, gpu, parts, options.check)
        return hashlib.sha256(suite + repr(facts).encode()).hexdigest()[:16]

    with _without_main(), tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        owner: dict[Future[tuple[list[CheckResult], float]], registry.OpSpec] = {}
        for spec in sorted(specs, key=lambda spec: -len(samples_of(spec, "cpu", spec.dtypes[0]))):  # the longest first
            count = len(samples_of(spec, "cpu", spec.dtypes[0]))
            parts = -(-count // _JOB_SAMPLES) if count > _WHOLE else 1
            for dtype in dtypes or spec.dtypes:
                owner |= {pool.submit(run, spec, dtype, i, parts, folder): spec for i in range(parts)}
        found: dict[str, list[tuple[list[CheckResult], float]]] = {spec.name: [] for spec in specs}
        for future in as_completed(owner):
            spec = owner[future]
            found[spec.name].append(future.result())
            if len(found[spec.name]) == sum(other is spec for other in owner.values()):
                # what does not depend on the dtype was found in several processes: once is enough
                results = list({(r.check, r.sample): r for part, _ in found[spec.name] for r in part}.values())
                yield spec, Report(spec.qualname, str(device), results), sum(seconds for _, seconds in found[spec.name])


if __name__ == "__main__":
    sys.exit(main())
