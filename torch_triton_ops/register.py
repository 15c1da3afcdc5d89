"""OpSpec -> torch.library: schema, kernels, fake, gradient, autocast, FLOPs, sharding and visibility to torch.compile.

Measured reasons for this shape are in docs/design.md ("Registration"). In short: `Library.define/impl` has a third of the host
time of `custom_op` and `triton_op`; our own Autograd-key kernel costs nothing when no gradient is needed; and a torch-dispatch
rule for FunctionalTensorMode lets Inductor see the Triton kernel without `triton_op`'s eager cost.

Op modules are imported at an op's first call, so that importing the package imports no Triton.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from torch_triton_ops import registry
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.registry import OpDecl, OpSpec, RegistryError

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_libraries: list[torch.library.Library] = []  # an op lives as long as its Library


def load_registry(path: str | Path) -> list[OpSpec]:
    """Register the ops of your own registry file, with everything that the package's own ops have.

    Each `op:` names its namespace (`my::scaled_silu(Tensor x) -> Tensor`); `module:` is a Python file beside the YAML, or an
    importable module. Raises RegistryError (file:line and the fix) and registers nothing if the file has a mistake.
    """
    specs = registry.read_registry(Path(path).resolve())
    register(specs)
    return specs


def register(specs: Sequence[OpSpec]) -> None:
    """Define the ops of `specs`, all or none."""
    for spec in specs:
        for decl in spec.decls:
            if torch._C._jit_get_schemas_for_operator(decl.qualname):
                raise RegistryError(
                    f"{spec.where}: the op '{decl.qualname}' is registered already, by another registry file or another"
                    " package in this process; use another name, or do not load both"
                )
        spec.module_files()  # a missing module is an error here, not at the first call
    library = torch.library.Library
    by_namespace = {spec.namespace: library(spec.namespace, "FRAGMENT") for spec in specs}
    _libraries.extend(by_namespace.values())
    for spec in specs:
        _Registration(spec, by_namespace[spec.namespace]).run()
    registry.add_specs(list(specs))
    _extend_compile_cache_key(specs)


def _extend_compile_cache_key(specs: Sequence[OpSpec]) -> None:
    """Make torch's on-disk compile caches depend on our sources.

    AOTAutograd's cache hashes neither backward formulas, nor launchers inlined into a graph, nor fakes: without this an
    edited backward would return the old gradient in a new process (pytorch #144344, #160472).
    """
    digest = hashlib.sha256("".join(d.schema + str(s.differentiable) for s in specs for d in s.decls).encode())
    files = {file for spec in specs for file in spec.module_files()} | set(registry.PACKAGE.glob("*.py"))
    for file in sorted(files):
        digest.update(file.read_bytes())
    # settings of ours may decide whether an op is inlined into a graph or stays one node of it
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("TORCH_TRITON_OPS_"))
    digest.update("\0".join(settings).encode())
    from torch.compiler import config

    config.cache_key_tag += f";{specs[0].namespace if specs else ''}={digest.hexdigest()[:16]}"


# --------------------------------------------------------------------------------------------------------------------
# One op
# --------------------------------------------------------------------------------------------------------------------


class _Registration:
    """Everything that is registered for one entry."""

    def __init__(self, spec: OpSpec, library: torch.library.Library) -> None:
        self.spec, self.library = spec, library
        arguments = spec.arguments
        self.tensors = spec.public.tensor_positions()
        self.differentiable = tuple(i for i, a in enumerate(arguments) if a.name in spec.differentiable)
        # the tensors for which asking a gradient is a mistake that must not pass in silence
        self.without_gradient = tuple(i for i in self.tensors if i not in self.differentiable)
        self.positional = tuple(a.default for a in arguments if not a.keyword_only)
        self.keyword_only = {a.name: a.default for a in arguments if a.keyword_only}
        self.dtypes = frozenset(spec.dtypes)
        self.cpu_dtypes = self.dtypes | {torch.float64} if torch.float32 in self.dtypes else self.dtypes

    def run(self) -> None:
        spec = self.spec
        tags = (torch.Tag.pt2_compliant_tag,)
        for decl in spec.decls:
            self.library.define(decl.schema, tags=tags)
            launcher = self.backend(decl, "")
            self.library.impl(decl.name, launcher, "CUDA")
            self.library.impl(decl.name, launcher if INTERPRET else self.backend(decl, "_reference"), "CPU")
            torch.library.register_fake(decl.qualname, self.backend(decl, "_fake"), lib=self.library)
            if spec.visibility == "triton" and not INTERPRET:
                torch.library.register_torch_dispatch(
                    decl.qualname, FunctionalTensorMode, _inlining_rule(launcher), lib=self.library
                )
            if decl.kind != "public":
                self.library.impl(decl.name, _undifferentiable(spec, decl, launcher), "Autograd")
            if any(a.mutated for a in decl.arguments):
                self.library.impl(decl.name, _version_bump(decl), "ADInplaceOrView", with_keyset=True)
        self.library.impl(spec.name, self.autograd(), "Autograd")
        if spec.autocast is not None:
            for device in ("cuda", "cpu"):
                self.library.impl(spec.name, self.autocast(device), f"Autocast{device.upper()}")
        when_imported("torch.utils.flop_counter", self.register_flops)
        if spec.sharding is not None:
            when_imported("torch.distributed.tensor", self.register_sharding)

    # -- checks -------------------------------------------------------------------------------------------------------

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Every argument by position: the dispatcher leaves out trailing defaults."""
        args += self.positional[len(args) :]
        if self.keyword_only:
            args += tuple((self.keyword_only | kwargs).values())
        return args

    def check_tensors(self, args: tuple[Any, ...]) -> None:
        """Same device everywhere; dtypes that the entry lists."""
        first = args[self.tensors[0]]
        device = first.device
        dtypes = self.cpu_dtypes if device.type != "cuda" else self.dtypes
        for i in self.tensors:
            tensor = args[i]
            if tensor is None:
                continue
            if tensor.device != device:
                self.bad(
                    i, f"on {tensor.device}", f"the device of '{self.spec.arguments[self.tensors[0]].name}', {device}"
                )
            dtype = tensor.dtype
            # the first tensor decides; integer tensors further on are indices or masks, which the op checks itself
            if dtype not in dtypes and (tensor is first or dtype.is_floating_point or dtype.is_complex):
                names = ", ".join(str(d).removeprefix("torch.") for d in self.spec.dtypes)
                self.bad(i, f"of dtype {dtype}", f"{names} on {device.type}", TypeError)

    def bad(self, index: int, given: str, allowed: str, error: type[Exception] = ValueError) -> None:
        bad_argument(self.spec.name, self.spec.arguments[index].name, given, allowed, error, self.spec.namespace)

    # -- kernels ------------------------------------------------------------------------------------------------------

    def backend(self, decl: OpDecl, suffix: str) -> Callable[..., Any]:
        """The function `<op><suffix>` of the module, behind the checks if it is public; the module is imported on first use."""
        function: Callable[..., Any] | None = None
        op_check: Callable[..., Any] | None = None
        launcher: Callable[..., Any] | None = None
        public, fake = decl.kind == "public", suffix == "_fake"
        bind, check_tensors = self.bind, self.check_tensors

        def checked(bound: tuple[Any, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal function, op_check, launcher
            if function is None:
                module = self.spec.module
                op_check = getattr(module, f"{self.spec.name}_check", None)
                function = getattr(module, f"{decl.name}{suffix}")
                launcher = getattr(module, decl.name)
            if public:
                check_tensors(bind(args, kwargs) if bound is None else bound)
                if op_check is not None:
                    op_check(*args, **kwargs)
            if fake and _recording():
                return launcher(*args, **kwargs)  # type: ignore[misc]
            return function(*args, **kwargs)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            return checked(None, args, kwargs)

        kernel.__name__ = kernel.__qualname__ = f"{decl.name}{suffix}"
        kernel.checked = checked  # for a caller that has bound the arguments already
        return kernel

    # -- gradient -----------------------------------------------------------------------------------------------------

    def autograd(self) -> Callable[..., Any]:
        """The Autograd-key kernel: an autograd.Function only when a gradient is needed."""
        spec, op, bind = self.spec, self.spec.op, self.bind
        differentiable, without_gradient, tensors = self.differentiable, self.without_gradient, self.tensors
        count = 0 if self.keyword_only else len(spec.arguments)
        function = self.autograd_function()
        launcher = self.backend(spec.public, "").checked
        straight = not any(a.mutated for a in spec.arguments)
        below_autograd = torch._C._AutoDispatchBelowAutograd
        grad_enabled = torch.is_grad_enabled

        def kernel(*args: Any, **kwargs: Any) -> Any:
            bound = args if len(args) == count else bind(args, kwargs)
            if forward_ad._current_level >= 0:
                _refuse_forward_mode(spec, [bound[i] for i in tensors])
            if grad_enabled():
                for i in without_gradient:
                    if bound[i] is not None and bound[i].requires_grad:
                        if not differentiable:  # indices and the like cut no gradient
                            with below_autograd():
                                found = op(*args, **kwargs)
                            if not any(
                                isinstance(t, torch.Tensor) and t.is_floating_point() for t in tree_leaves(found)
                            ):
                                return found
                        _refuse_gradient(spec, spec.arguments[i].name)
                for i in differentiable:
                    if bound[i] is not None and bound[i].requires_grad:
                        self.check_tensors(bound)
                        return function(bound)
            if straight and _straight(bound, tensors):
                return launcher(bound, args, kwargs)
            with below_autograd():
                return op(*args, **kwargs)

        return kernel

    def autograd_function(self) -> Callable[[tuple[Any, ...]], Any]:
        """Applies the op's autograd.Function to every argument."""
        spec, differentiable = self.spec, self.differentiable
        count = len(spec.arguments)
        below_autograd = torch._C._AutoDispatchBelowAutograd

        def forward(ctx: Any, *args: Any) -> Any:
            ctx.needs = tuple(ctx.needs_input_grad[i] for i in differentiable)
            with below_autograd():
                return spec.function("forward")(ctx, *args)  # type: ignore[misc]

        def backward(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                found = spec.function("backward")(ctx, *grads)  # type: ignore[misc]
            found = found if isinstance(found, tuple) else (found,)
            if torch.is_grad_enabled():  # create_graph=True: a second derivative must fail, not be zero
                sources = (t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad)
                found = _SecondDerivative.apply(spec.qualname, len(found), *found, *sources)
            out: list[Any] = [None] * count
            for i, gradient, needed in zip(differentiable, found, ctx.needs, strict=True):
                out[i] = gradient if needed else None
            return tuple(out)

        function = type(
            f"{spec.namespace}_{spec.name}",
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward)},
        )
        check: Callable[..., Any] | None = None
        checked = False

        def apply(bound: tuple[Any, ...]) -> Any:
            nonlocal check, checked
            if not checked:
                check, checked = spec.function("check"), True
            if check is not None:
                keywords = len(self.keyword_only)
                head = bound[: len(bound) - keywords] if keywords else bound
                check(*head, **dict(zip(self.keyword_only, bound[len(head) :], strict=True)))
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise NotImplementedError(
                    f"{spec.qualname}: torch.func transforms (grad, jvp, jacrev) are not supported; use torch.autograd.grad"
                )
            return function.apply(*bound)

        return apply

    # -- autocast -----------------------------------------------------------------------------------------------------

    def autocast(self, device: str) -> Callable[..., Any]:
        """Casts floating tensors as torch's own op of the same meaning does under torch.autocast."""
        op, to_float32 = self.spec.op, self.spec.autocast == "float32"
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.float32 if to_float32 else torch.get_autocast_dtype(device)

            def cast(value: Any) -> Any:
                eligible = isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == device
                return value.to(dtype) if eligible and value.dtype != torch.float64 else value

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

        return kernel

    # -- registered when torch's module is imported ---------------------------------------------------------------------

    def register_flops(self, flop_counter: ModuleType) -> None:
        """FLOP formulas of the public op and of its internal ops, all from `<op>_cost`."""
        names = [a.name for a in self.spec.arguments]
        defaults = {a.name: a.default for a in self.spec.arguments}

        def formula(decl: OpDecl) -> Callable[..., int]:
            def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
                given = {a.name: a.default for a in decl.arguments}
                given |= dict(zip((a.name for a in decl.arguments), args, strict=False)) | kwargs
                # internal ops name an argument as the public op does
                public = {name: given.get(name, defaults[name]) for name in names}
                cost = self.spec.function("cost")(**public)  # type: ignore[misc]
                return cost.backward_flops if decl.kind == "backward" else cost.flops

            return flops

        for decl in self.spec.decls:
            if decl.kind != "backward" or all(n in [a.name for a in decl.arguments] for n in self.spec.differentiable):
                flop_counter.register_flop_formula(decl.packet, get_raw=True)(formula(decl))

    def register_sharding(self, _: ModuleType) -> None:
        """DTensor rules of the public op and of its internal ops."""
        from torch_triton_ops import distributed

        distributed.register(self.spec)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack


def _straight(bound: tuple[Any, ...], tensors: Sequence[int]) -> bool:
    """Whether nothing between an Autograd-key kernel and the CUDA key would act: going straight to the launcher saves a
    dispatch (about 5 us)."""
    if not bound[tensors[0]].is_cuda or _modes() != 0 or _transforms() is not None:
        return False
    return all(bound[i] is None or type(bound[i]) in _PLAIN for i in tensors)


def _recording() -> bool:
    """Whether launches are being recorded: then an op on meta tensors runs its launcher, through its gradient too."""
    launch = sys.modules.get("torch_triton_ops.launch")
    return launch is not None and launch.is_recording()


def _inlining_rule(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Under AOTAutograd's functionalisation, replace the op by its Triton kernels, so that Inductor sees them."""

    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        kwargs = kwargs or {}
        on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in (*args, *kwargs.values()))
        if not on_gpu or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        known = (torch.Tensor, FunctionalTensor)
        if any(t not in known and not issubclass(t, torch._subclasses.FakeTensor) for t in types):
            return NotImplemented
        from torch_triton_ops import launch

        try:
            with mode, launch.inlining():
                return launcher(*args, **kwargs)
        except launch.NotInlinable:  # what the launcher traced before its Gluon kernel is dead code
            return mode.__torch_dispatch__(op, types, args, kwargs)

    return rule


# --------------------------------------------------------------------------------------------------------------------
# Named refusals
# --------------------------------------------------------------------------------------------------------------------


def _undifferentiable(spec: OpSpec, decl: OpDecl, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd-key kernel of an internal op: without it a gradient would flow through the CPU reference, or be cut."""
    op, tensors = decl.op, decl.tensor_positions()
    straight = not any(a.mutated for a in decl.arguments)
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise NotImplementedError(
                        f"{decl.qualname} has no gradient: it is part of {spec.qualname}'s own. Call {spec.qualname}, or"
                        " detach() the inputs"
                    )
        if straight and not kwargs and _straight(args, tensors):
            return launcher(*args)
        with below_autograd():
            return op(*args, **kwargs)

    return kernel


def _version_bump(decl: OpDecl) -> Callable[..., Any]:
    """ADInplaceOrView-key kernel of an op that mutates: a gradient that saved what is written over must fail, not be wrong."""
    op = decl.op
    mutated = [(i, a.name) for i, a in enumerate(decl.arguments) if a.mutated]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        for i, name in mutated:
            tensor = args[i] if i < len(args) else kwargs.get(name)
            if tensor is not None:
                torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    return kernel


def _refuse_gradient(spec: OpSpec, argument: str) -> None:
    allowed = f"no gradient; those with one: {', '.join(spec.differentiable) or 'none'} (detach() it)"
    bad_argument(spec.name, argument, "a tensor that requires a gradient", allowed, NotImplementedError, spec.namespace)


def _refuse_forward_mode(spec: OpSpec, tensors: list[Any]) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{spec.qualname}: forward-mode derivatives (jvp) are not implemented; use backward mode"
        )


class _SecondDerivative(torch.autograd.Function):
    """Passes gradients on, tied to everything they were computed from, so that differentiating them raises.

    torch's `once_differentiable` ties them to nothing: a second derivative that reaches the inputs by another way, too,
    would silently lack the op's share.
    """

    @staticmethod
    def forward(ctx: Any, qualname: str, count: int, *tensors: Any) -> Any:
        ctx.qualname = qualname
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{ctx.qualname}: second derivatives are not implemented; differentiate once")


# --------------------------------------------------------------------------------------------------------------------
# Registering with a module that is costly to import
# --------------------------------------------------------------------------------------------------------------------

_callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` now if module `name` is imported already, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return
    if not _callbacks:
        sys.meta_path.insert(0, _PostImport())
    _callbacks.setdefault(name, []).append(callback)


class _PostImport(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as the other finders would, and has the callbacks run after their body."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in _callbacks:
            return None
        callbacks = _callbacks.pop(fullname)
        found = importlib.util.find_spec(fullname)
        if found is None or found.loader is None:
            return None
        run = found.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for callback in callbacks:
                callback(module)

        found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found
