"""op_registry.yaml -> OpSpec, strictly: an unknown key, a bad schema, a duplicate raises with file:line and the fix.

Reading the registry imports no op and registers nothing; `register.py` does.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import keyword
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import yaml

PACKAGE = Path(__file__).resolve().parent
REGISTRY_FILE = PACKAGE / "op_registry.yaml"
NAMESPACE = "tt"

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "int64")
}
VISIBILITY = ("triton", "opaque")
AUTOCAST = ("float32", "autocast_dtype")
SHARDING = (
    "elementwise",
    "transposed",
    "rowwise",
    "batch",
    "batch_and_heads",
    "packed_heads",
    "cross_entropy",
    "linear",
    "reduction",
    "loss",
)
LESSONS = range(1, 13)
# Ops of another vendor's plugin in the same namespace: never ours.
RESERVED = ("scaled_dot_product_attention", "flash_mla_prefill", "sampling", "paged_update_cache", "fill_cache")


class RegistryError(ValueError):
    """A mistake in a registry file: where it stands, what is wrong and how to mend it."""


@dataclass(frozen=True)
class Argument:
    """One argument of a schema."""

    name: str
    is_tensor: bool
    keyword_only: bool
    has_default: bool
    default: Any
    mutated: bool


@dataclass(frozen=True)
class OpDecl:
    """One operator to register: the public op of an entry, or one that its gradient needs."""

    namespace: str
    name: str
    kind: str  # public | forward | backward
    schema: str  # without namespace: "rms_norm(Tensor x, ...) -> Tensor"
    arguments: tuple[Argument, ...]

    @property
    def qualname(self) -> str:
        return f"{self.namespace}::{self.name}"

    @property
    def packet(self) -> Any:
        """The OpOverloadPacket, once registered: `torch.ops.tt.rms_norm`."""
        return getattr(getattr(torch.ops, self.namespace), self.name)

    @property
    def op(self) -> Any:
        """The OpOverload, once registered."""
        return self.packet.default

    def tensor_positions(self) -> tuple[int, ...]:
        return tuple(i for i, a in enumerate(self.arguments) if a.is_tensor)


@dataclass(frozen=True)
class OpSpec:
    """One entry of a registry file."""

    public: OpDecl
    forward: tuple[OpDecl, ...]
    backward: tuple[OpDecl, ...]
    summary: str
    module_name: str
    visibility: str
    differentiable: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    autocast: str | None
    sharding: str | None
    lesson: int | None
    source: str | None
    file: Path
    line: int

    @property
    def name(self) -> str:
        return self.public.name

    @property
    def namespace(self) -> str:
        return self.public.namespace

    @property
    def qualname(self) -> str:
        return self.public.qualname

    @property
    def schema(self) -> str:
        return self.public.schema

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return self.public.arguments

    @property
    def op(self) -> Any:
        """The public OpOverload, once registered."""
        return self.public.op

    @property
    def decls(self) -> tuple[OpDecl, ...]:
        return (self.public, *self.forward, *self.backward)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @cached_property
    def module(self) -> ModuleType:
        """The op's Python module, imported on first use and checked against the schemas."""
        module = _import_module(self)
        _check_module(self, module)
        return module

    def module_files(self) -> tuple[Path, ...]:
        """The op's source files, found without importing them."""
        base = PACKAGE / "ops" if self.namespace == NAMESPACE else self.file.parent
        folder = base.joinpath(*self.module_name.split("."))
        file = folder.with_suffix(".py")
        if file.is_file():
            return (file,)
        if (folder / "__init__.py").is_file():
            return tuple(sorted(folder.rglob("*.py")))
        found = None
        if self.namespace != NAMESPACE:
            with contextlib.suppress(ModuleNotFoundError):  # no parent package
                found = importlib.util.find_spec(self.module_name)
        if found is None or found.origin is None:
            raise RegistryError(f"{self.where}: module '{self.module_name}' not found; expected the file {file}")
        origin = Path(found.origin)
        return tuple(sorted(origin.parent.rglob("*.py"))) if origin.name == "__init__.py" else (origin,)

    def function(self, suffix: str) -> Callable[..., Any] | None:
        """`<op>_<suffix>` of the op's module, or None. `function("samples")`, `function("reference")` ..."""
        return getattr(self.module, f"{self.name}_{suffix}", None)


_SPECS: dict[str, OpSpec] = {}


def add_specs(specs: list[OpSpec]) -> None:
    """Remember registered entries; called by register.py."""
    _SPECS.update({spec.qualname: spec for spec in specs})


def specs(namespace: str | None = NAMESPACE) -> list[OpSpec]:
    """The registered entries of `namespace` in the file's order; None: of all namespaces."""
    return [spec for spec in _SPECS.values() if namespace in (None, spec.namespace)]


def spec(name: str) -> OpSpec:
    """The entry of an op by "rms_norm", "tt::rms_norm" or "my::op". Raises KeyError with near misses."""
    qualname = name if "::" in name else f"{NAMESPACE}::{name}"
    if qualname not in _SPECS:
        near = difflib.get_close_matches(qualname, _SPECS, n=3)
        raise KeyError(f"no registered op '{name}'" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return _SPECS[qualname]


def source_hash(spec: OpSpec) -> str:
    """Hash of what decides the op's behaviour on a GPU: its own files and schemas, the modules of the package that they
    import (kernels are shared there), the launcher, the registration."""
    digest = hashlib.sha256("\n".join(f"{d.kind} {d.schema}" for d in spec.decls).encode())
    digest.update(f"{spec.visibility} {spec.differentiable} {spec.autocast}".encode())
    files = spec.module_files()
    imported = {match for file in files for match in _FOUNDATION.findall(file.read_text())} - {"cases", "errors"}
    shared = [PACKAGE / f"{name}.py" for name in sorted(imported | {"launch", "register"})]
    for file in (*files, *(file for file in shared if file.exists())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


_FOUNDATION = re.compile(r"^from torch_triton_ops\.(\w+) import", re.MULTILINE)


# --------------------------------------------------------------------------------------------------------------------
# Reading a file
# --------------------------------------------------------------------------------------------------------------------

# PyYAML's binding of libyaml where it was built with it: a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_REQUIRED = ("op", "summary", "module", "visibility", "dtypes")
_OPTIONAL = ("forward", "backward", "differentiable", "autocast", "sharding", "lesson", "source")


def read_registry(path: str | Path, namespace: str | None = None) -> list[OpSpec]:
    """Parse and validate a registry file.

    `namespace` is given to schemas without one; None means that every op must name its own (`my::op(...)`).
    Raises RegistryError with file:line for the first mistake, FileNotFoundError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a YAML file of ops")
    text = path.read_bytes()
    try:
        root = yaml.compose(text.decode("utf-8"), Loader=_LOADER)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise RegistryError(f"{path}:{line}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise RegistryError(f"{path}:{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.SequenceNode):
        line = root.start_mark.line + 1
        raise RegistryError(f"{path}:{line}: the file must be a list of entries, each beginning with '- op: ...'")
    specs: list[OpSpec] = []
    seen: dict[str, int] = {}
    for node in root.value:
        spec = _Entry(path, node, namespace).parse()
        for decl in spec.decls:
            if decl.qualname in seen:
                raise RegistryError(
                    f"{path}:{spec.line}: duplicate op '{decl.qualname}', already declared at line"
                    f" {seen[decl.qualname]}; give it another name or delete one"
                )
            seen[decl.qualname] = spec.line
        specs.append(spec)
    return specs


class _Entry:
    """One YAML node on its way to an OpSpec."""

    def __init__(self, path: Path, node: yaml.Node, namespace: str | None) -> None:
        self.path, self.node, self.default_namespace = path, node, namespace
        self.lines: dict[str, int] = {}
        self.values: dict[str, Any] = {}

    def fail(self, key: str | None, message: str) -> NoReturn:
        line = self.lines.get(key or "", self.node.start_mark.line + 1)
        raise RegistryError(f"{self.path}:{line}: {message}")

    def parse(self) -> OpSpec:
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(None, "an entry must be a mapping that begins with '- op: name(Tensor x) -> Tensor'")
        loader = yaml.SafeLoader("")
        for key_node, value_node in self.node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in self.values:
                raise RegistryError(f"{self.path}:{line}: duplicate key '{key}'; delete one")
            if key not in _REQUIRED + _OPTIONAL:
                near = difflib.get_close_matches(key, _REQUIRED + _OPTIONAL, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(_REQUIRED + _OPTIONAL)}"
                raise RegistryError(f"{self.path}:{line}: unknown key '{key}'; {hint}")
            try:
                self.lines[key], self.values[key] = line, loader.construct_object(value_node, deep=True)
            except yaml.YAMLError as error:
                reason = getattr(error, "problem", None) or error
                raise RegistryError(f"{self.path}:{line}: {key} must be plain text or a list of it: {reason}") from None
        for key in _REQUIRED:
            if key not in self.values:
                self.fail(None, f"key '{key}' is missing; every entry needs {', '.join(_REQUIRED)}")
        public = self.decl("op", self.values["op"], "public")
        module = self.string("module")
        if not all(part.isidentifier() and not keyword.iskeyword(part) for part in module.split(".")):
            self.fail("module", f"module '{module}' is not a Python module name; write the file's name without .py")
        summary = self.string("summary")
        if not summary.endswith(".") or "\n" in summary:
            self.fail("summary", "summary must be one sentence on one line that ends with a full stop")
        differentiable = self.differentiable(public)
        forward, backward = self.decls("forward", public), self.decls("backward", public)
        if (forward or backward) and not differentiable:
            key = "forward" if forward else "backward"
            self.fail(key, f"'{key}' without 'differentiable'; list the arguments that have a gradient, or delete it")
        if differentiable and any(a.mutated for a in public.arguments):
            self.fail(
                "differentiable", "an op that mutates an argument cannot be differentiable; delete one of the two"
            )
        return OpSpec(
            public=public,
            forward=forward,
            backward=backward,
            summary=summary,
            module_name=module,
            visibility=self.choice("visibility", VISIBILITY),
            differentiable=differentiable,
            dtypes=self.dtypes(),
            autocast=self.choice("autocast", AUTOCAST),
            sharding=self.choice("sharding", SHARDING),
            lesson=self.lesson(),
            source=self.string("source") if "source" in self.values else None,
            file=self.path,
            line=self.lines["op"],
        )

    def string(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, f"{key} must be a non-empty string, not {value!r}")
        return value.strip()

    def choice(self, key: str, allowed: tuple[str, ...]) -> Any:
        if key not in self.values:
            return None
        if self.values[key] not in allowed:
            self.fail(key, f"{key} is {self.values[key]!r}; allowed: {', '.join(allowed)}")
        return self.values[key]

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values[key]
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.fail(key, f"{key} must be a list of names like [x, weight], not {value!r}")
        if len(set(value)) != len(value):
            self.fail(key, f"{key} names something twice: {value}")
        return tuple(value)

    def differentiable(self, public: OpDecl) -> tuple[str, ...]:
        if "differentiable" not in self.values:
            return ()
        names = self.names("differentiable")
        tensors = [a.name for a in public.arguments if a.is_tensor]
        for name in names:
            if name not in tensors:
                self.fail("differentiable", f"'{name}' is no Tensor argument of the op; they are {', '.join(tensors)}")
        # a gradient comes back in schema order, so the list has one spelling
        if list(names) != [t for t in tensors if t in names]:
            self.fail("differentiable", f"list the names in the schema's order: {[t for t in tensors if t in names]}")
        return names

    def dtypes(self) -> tuple[torch.dtype, ...]:
        names = self.names("dtypes")
        for name in names:
            if name not in DTYPES:
                self.fail("dtypes", f"unknown dtype '{name}'; allowed: {', '.join(DTYPES)}")
        if not names:
            self.fail("dtypes", "dtypes is empty; list at least one")
        return tuple(DTYPES[name] for name in names)

    def lesson(self) -> int | None:
        value = self.values.get("lesson")
        if value is not None and (type(value) is not int or value not in LESSONS):
            self.fail("lesson", f"lesson is {value!r}; allowed: a number from {LESSONS[0]} to {LESSONS[-1]}")
        return value

    def decls(self, key: str, public: OpDecl) -> tuple[OpDecl, ...]:
        value = self.values.get(key, [])
        decls = tuple(self.decl(key, s, key) for s in (value if isinstance(value, list) else [value]))
        for decl in decls:
            if decl.namespace != public.namespace:
                self.fail(key, f"'{decl.qualname}' must be in the op's namespace, {public.namespace}")
            if any(a.keyword_only for a in decl.arguments):
                self.fail(key, f"the internal op '{decl.name}' has keyword-only arguments; remove the '*'")
        return decls

    def decl(self, key: str, text: Any, kind: str) -> OpDecl:
        if not isinstance(text, str):
            self.fail(key, f"{key} must be a schema like 'name(Tensor x) -> Tensor', not {text!r}")
        try:
            schema = torch._C.parse_schema(text)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self.fail(key, f"bad schema '{text}': {reason}; example: 'rms_norm(Tensor x, float eps=1e-6) -> Tensor'")
        if schema.overload_name:
            self.fail(key, f"overloads are not supported; write '{schema.name}' without '.{schema.overload_name}'")
        namespace, _, name = schema.name.rpartition("::")
        if not namespace:
            if self.default_namespace is None:
                self.fail(key, f"'{name}' needs a namespace of your own: write 'my::{text.strip()}'")
            namespace = self.default_namespace
        elif namespace == NAMESPACE and self.default_namespace != NAMESPACE:
            self.fail(
                key, f"the namespace '{NAMESPACE}' belongs to torch_triton_ops; use one of your own, 'my::{name}'"
            )
        if namespace == NAMESPACE and name in RESERVED:
            self.fail(key, f"the name '{name}' is used by another vendor's plugin in '{NAMESPACE}'; choose another")
        arguments = tuple(
            Argument(
                name=a.name,
                is_tensor=str(a.type) in ("Tensor", "Optional[Tensor]"),
                keyword_only=a.kwarg_only,
                has_default=a.has_default_value(),
                default=a.default_value if a.has_default_value() else None,
                mutated=a.alias_info is not None and a.alias_info.is_write,
            )
            for a in schema.arguments
        )
        if not any(a.is_tensor for a in arguments):
            self.fail(key, f"'{name}' takes no Tensor; an op must take at least one to be dispatched")
        return OpDecl(namespace, name, kind, text.strip().removeprefix(f"{namespace}::"), arguments)


# --------------------------------------------------------------------------------------------------------------------
# The op's module
# --------------------------------------------------------------------------------------------------------------------


def _import_module(spec: OpSpec) -> ModuleType:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{spec.qualname}: Triton cannot be imported ({error}); install it with: pip install 'triton>=3.6'"
        ) from error
    if spec.namespace == NAMESPACE:
        return importlib.import_module(f"torch_triton_ops.ops.{spec.module_name}")
    base = spec.file.parent.joinpath(*spec.module_name.split("."))
    file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
    if file is None:
        return importlib.import_module(spec.module_name)
    # A user's file beside the YAML. Found by path, so it need not be on sys.path; named after it, so that it may be.
    if spec.module_name not in sys.modules:
        found = importlib.util.spec_from_file_location(spec.module_name, file)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[spec.module_name] = module
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.module_name]
            raise
    module = sys.modules[spec.module_name]
    if module.__file__ is None or Path(module.__file__).resolve() != file.resolve():
        raise RegistryError(
            f"{spec.where}: module '{spec.module_name}' is already imported from {module.__file__}, not from {file};"
            " rename one of the two"
        )
    return module


def _check_module(spec: OpSpec, module: ModuleType) -> None:
    """Every function that the entry needs is there and takes the schema's arguments: a mismatch prints both."""
    wanted: list[tuple[str, OpDecl, bool]] = []
    for decl in spec.decls:
        wanted += [(decl.name, decl, False), (f"{decl.name}_fake", decl, False)]
        wanted += [(f"{decl.name}_reference", decl, False)]
    if spec.differentiable:
        wanted.append((f"{spec.name}_forward", spec.public, True))
        if not hasattr(module, f"{spec.name}_backward"):
            raise RegistryError(f"{spec.where}: {module.__file__} must define {spec.name}_backward(ctx, *grads)")
    if hasattr(module, f"{spec.name}_check"):
        wanted.append((f"{spec.name}_check", spec.public, False))
    for name, decl, takes_ctx in wanted:
        function = getattr(module, name, None)
        if function is None:
            raise RegistryError(f"{spec.where}: {module.__file__} must define {name}, declared as {decl.schema}")
        parameters = list(inspect.signature(function).parameters.values())[1 if takes_ctx else 0 :]
        # a ctx function is always called with every argument, by position
        given = [(p.name, p.default) for p in parameters]
        declared = [(a.name, a.default if a.has_default else inspect.Parameter.empty) for a in decl.arguments]
        if takes_ctx:
            given, declared = [(n, None) for n, _ in given], [(n, None) for n, _ in declared]
        if given != declared:
            raise RegistryError(
                f"{spec.where}: {name}{inspect.signature(function)} does not take the schema's arguments:"
                f" {re.sub(' ->.*', '', decl.schema)}; make names, order and defaults agree"
            )
