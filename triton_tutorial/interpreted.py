"""Triton kernels on CPU tensors, from a process whose `@triton.jit` functions are compiled ones.

`TRITON_INTERPRET=1` is read when Triton is imported and breaks torch.compile, so one process cannot both interpret a
kernel and compile it. `install()` therefore makes `kernel[grid](...)` look at its tensors:

* on CUDA, nothing changes;
* on the CPU, the kernel's source and its tensors go to a child process that has TRITON_INTERPRET=1 set, and what it wrote
  comes back;
* on the meta device, nothing runs: the launch is recorded for offline compilation (`recorded`).

In the child every tensor lies between guard bands of 0xFF bytes (NaN for floats), and every address is compared with the
tensor that it belongs to: an access outside raises `OutOfBounds`, which names the program, the line and the element,
where a GPU would return whatever lies there. `tracing` keeps all accesses, for pictures.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import inspect
import io
import itertools
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch

GUARD = 1 << 16  # bytes on either side of a tensor: an access further out is refused, one within is counted
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class InterpreterError(RuntimeError):
    """A kernel raised in Triton's interpreter."""


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program. `index`: elements from the tensor's first; `masked`: lanes switched off."""

    program: tuple[int, int, int]
    kind: str  # load | store | atomic
    tensor: str
    line: int
    index: Any  # numpy int64, flat, in the block's order
    masked: Any  # numpy int64: where the switched-off lanes point


@dataclass(frozen=True)
class Stray:
    """Lanes of one program that reached outside their tensor. `line` counts in `file`."""

    kernel: str
    program: tuple[int, int, int]
    kind: str
    tensor: str
    numel: int
    element: int  # the first one outside
    lanes: int
    file: str
    line: int
    source: str = ""
    dims: int = 3  # of the grid

    def __str__(self) -> str:
        verb = {"load": "reads", "store": "writes"}.get(self.kind, "updates")
        ids = self.program[: self.dims]
        program = f"({', '.join(map(str, ids))})" if len(ids) > 1 else f"{ids[0]}"
        return (
            f"program {program} {verb} element {self.element} of {self.tensor}, which has {self.numel}"
            f" ({self.lanes} such lane{'s' * (self.lanes != 1)}); {os.path.basename(self.file)}:{self.line}: {self.source}"
        )


class OutOfBounds(InterpreterError):
    """A kernel touched memory outside its tensors."""

    def __init__(self, strays: Sequence[Stray]) -> None:
        self.strays = list(strays)
        more = f"; and {len(strays) - 1} more accesses" if len(strays) > 1 else ""
        super().__init__(f"{strays[0].kernel}: {strays[0]}{more}")


@dataclass
class LaunchTrace:
    """What one launch touched. `shapes`, `itemsizes`: of the tensor arguments, by name."""

    kernel: str
    grid: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    itemsizes: dict[str, int] = field(default_factory=dict)
    accesses: list[Access] = field(default_factory=list)
    flops: int = 0  # of tl.dot


# --------------------------------------------------------------------------------------------------------------------
# This process: kernel[grid](...) on CPU and meta tensors
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    installed: bool = False
    child: _Child | None = None
    recorder: list[Any] | None = None
    traces: list[LaunchTrace] | None = None
    strays: list[Stray] | None = None


_state = _State()


def install() -> None:
    """Let `kernel[grid](...)` take CPU and meta tensors too. Nothing to do in a process with TRITON_INTERPRET=1."""
    from triton.runtime.jit import JITFunction

    if _state.installed or os.environ.get("TRITON_INTERPRET") == "1":
        return
    _state.installed = True
    compiled_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = map(_tensor_of, (*args, *kwargs.values()))
        device = next((t.device.type for t in tensors if t is not None), "")
        if device not in ("cpu", "meta") or warmup:
            return compiled_run(self, *args, grid=grid, warmup=warmup, **kwargs)
        options = {k: kwargs.pop(k) for k in OPTIONS if kwargs.get(k) is not None}
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.signature.parameters})
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        sizes = tuple(int(n) for n in (sizes if isinstance(sizes, (tuple, list)) else (sizes,)))
        if device == "meta":
            _record(self, sizes, bound.arguments, options)
        elif 0 not in sizes:
            _interpret(self, sizes, bound.arguments)
        return None

    JITFunction.run = run


def start() -> None:
    """Start the child now, so that it imports torch while this process goes on."""
    if _state.child is None or _state.child.dead():
        _state.child = _Child()


def stop() -> None:
    """End the child, if there is one; the next launch starts another."""
    if _state.child is not None:
        _state.child.stop()
        _state.child = None


@contextlib.contextmanager
def recorded(target: int) -> Iterator[list[Any]]:
    """Collect launches on meta tensors, `kernel[grid]` and `launch` alike, as `torch_triton_ops.launch.Launch`es."""
    from torch_triton_ops import launch

    previous = _state.recorder
    with launch.recording(target) as recording:
        _state.recorder = recording.launches
        try:
            yield recording.launches
        finally:
            _state.recorder = previous


@contextlib.contextmanager
def tracing(bounds: bool = True) -> Iterator[list[LaunchTrace]]:
    """Collect the accesses of launches on CPU tensors. bounds=False: strays do not raise; see `collecting_strays`."""
    previous, _state.traces = _state.traces, []
    try:
        if bounds:
            yield _state.traces
        else:
            with collecting_strays():
                yield _state.traces
    finally:
        _state.traces = previous


@contextlib.contextmanager
def collecting_strays() -> Iterator[list[Stray]]:
    """Collect accesses outside a tensor instead of raising at the end of their launch."""
    previous, _state.strays = _state.strays, []
    try:
        yield _state.strays
    finally:
        _state.strays = previous


def traces() -> Sequence[LaunchTrace]:
    """What the enclosing `tracing` has collected so far."""
    return _state.traces or ()


def call_op(op: str, *args: Any, **kwargs: Any) -> Any:
    """`torch.ops.tt.<op>(...)` on CPU tensors with its Triton kernels interpreted (here a CPU tensor gets the reference)."""
    return _request({"do": "op", "op": op.removeprefix("tt::")}, args, kwargs)


def _record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
    from torch_triton_ops.launch import Launch

    if _state.recorder is None:
        raise RuntimeError(f"{kernel.__name__}: launched on meta tensors, which hold nothing")
    constexprs = {p.name: _constant(arguments[p.name]) for p in kernel.params if p.is_constexpr}
    runtime = tuple(_ours(arguments[p.name]) for p in kernel.params if not p.is_constexpr)
    options = {"num_warps": 4, "num_stages": 3, **options}
    _state.recorder.append(Launch(kernel, grid, runtime, constexprs, options))


def _interpret(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    _request({"do": "launch", "kernel": _kernel_spec(kernel), "grid": grid}, (), arguments)


def _request(request: dict[str, Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    start()
    assert _state.child is not None
    pack = _Packer()
    request |= {"args": pack(list(args)), "kwargs": pack(dict(kwargs)), "storages": pack.contents()}
    request["trace"] = _state.traces is not None
    reply = _state.child.ask(request)
    if reply["printed"]:
        print(reply["printed"], end="")
    pack.write_back(reply["storages"])
    if _state.traces is not None:
        _state.traces += reply["traces"]
    if reply["strays"]:
        if _state.strays is None:
            raise OutOfBounds(reply["strays"])
        _state.strays += reply["strays"]
    if reply["error"]:
        raise InterpreterError(reply["error"])
    return _unpack(reply["result"], reply["tensors"])


def _tensor_of(value: Any) -> torch.Tensor | None:
    base = getattr(value, "base", value)  # a TMA descriptor's
    return base if isinstance(base, torch.Tensor) else value if isinstance(value, torch.Tensor) else None


def _ours(value: Any) -> Any:
    """Triton's TensorDescriptor as the one that offline compilation takes."""
    from torch_triton_ops.launch import Descriptor

    if hasattr(value, "block_shape") and not isinstance(value, Descriptor):
        return Descriptor(value.base, tuple(value.block_shape))
    return value


def _constant(value: Any) -> Any:
    return getattr(value, "value", value) if type(value).__name__ == "constexpr" else value


# -- kernels by source ---------------------------------------------------------------------------------------------------


def _kernel_spec(kernel: Any, seen: dict[int, Any] | None = None) -> dict[str, Any]:
    """All that the child needs to define `kernel`: its source and the globals that the source names."""
    seen = {} if seen is None else seen  # the kernels around this one: one that calls itself is named, not repeated
    if id(kernel) in seen:
        return {"again": seen[id(kernel)]}
    seen = seen | {id(kernel): kernel.__name__}
    function = kernel.fn
    lines, first = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if re.match(r"\s*def\s", line))
    indent = len(lines[offset]) - len(lines[offset].lstrip())
    source = "".join(line[indent:] if line.strip() else line for line in lines[offset:])
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    closure = inspect.getclosurevars(function).nonlocals
    scope: dict[str, Any] = {}
    for name in sorted(names):
        value = closure.get(name, function.__globals__.get(name, _state))
        if value is not _state:
            packed = _pack_global(value, seen)
            if packed is not None:
                scope[name] = packed
    file = inspect.getsourcefile(function) or "<kernel>"
    return {"name": function.__name__, "source": source, "file": file, "line": first + offset, "globals": scope}


def _pack_global(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, ModuleType):
        return ("module", value.__name__)
    if hasattr(value, "fn") and hasattr(value, "params") and not type(value).__module__.startswith("torch"):
        if value.__module__.startswith("triton."):
            return ("import", value.__module__, value.__name__)
        return ("kernel", _kernel_spec(value, seen))
    if type(value).__name__ == "constexpr":
        return ("constexpr", value.value)
    if isinstance(value, (bool, int, float, str)) or value is None:
        return ("value", value)
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", getattr(value, "name", ""))
    if isinstance(module, str) and module.startswith("triton") and isinstance(name, str) and name:
        return ("import", module, name) if inspect.isroutine(value) or inspect.isclass(value) else ("value", value)
    return None


# -- values over the pipe ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A tensor as a view of the storage number `storage`."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Box:
    """A TMA descriptor."""

    base: _View
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]


class _Packer:
    """Tensors -> views of storages, each storage once: arguments that alias each other still do in the other process."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[int, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            storage = value.untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            number, _ = self.storages.setdefault(storage.data_ptr(), (len(self.storages), flat))
            return _View(number, value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
        if isinstance(value, dict):
            return {k: self(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self(v) for v in value) if type(value) in (list, tuple) else list(map(self, value))
        if hasattr(value, "block_shape") and hasattr(value, "base"):
            return _Box(self(value.base), tuple(value.shape), tuple(value.strides), tuple(value.block_shape))
        if hasattr(value, "fn") and hasattr(value, "params"):
            return ("kernel argument", _kernel_spec(value))
        return _constant(value)

    def contents(self) -> list[bytes]:
        return [flat.numpy().tobytes() for _, flat in self.storages.values()]

    def write_back(self, contents: list[bytes | None]) -> None:
        for (_, flat), content in zip(self.storages.values(), contents, strict=True):
            if content is not None:
                flat.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _unpack(value: Any, tensors: Sequence[bytes]) -> Any:
    if isinstance(value, _View):
        flat = torch.frombuffer(bytearray(tensors[value.storage]) or bytearray(1), dtype=torch.uint8)
        storage = flat.untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(storage, value.offset, value.shape, value.stride)
    if isinstance(value, (list, tuple)):
        return type(value)(_unpack(v, tensors) for v in value)
    return value


class _Child:
    """The process with TRITON_INTERPRET=1."""

    def __init__(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # the child must find the packages where this process found them
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "triton_tutorial.interpreted", str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.connection, self.parent = ours, os.getpid()
        atexit.register(self.stop)

    def dead(self) -> bool:
        # a fork of its parent may use it, and cannot ask whether it has ended
        return os.getpid() == self.parent and self.process.poll() is not None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self.connection.send(request)
            return self.connection.recv()
        except BaseException as error:
            self.stop()  # the pipe may hold half a message
            if isinstance(error, (EOFError, OSError)):
                raise InterpreterError(f"the interpreter's process ended with status {self.process.poll()}") from None
            raise

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


# --------------------------------------------------------------------------------------------------------------------
# The child
# --------------------------------------------------------------------------------------------------------------------


class _Watch:
    """Compares every address with the launch's tensors, and keeps the accesses when asked to."""

    def __init__(self) -> None:
        self.keep = False
        self.strays: list[Stray] = []
        self.traces: list[LaunchTrace] = []
        self.spans: list[tuple[int, int, str, torch.Tensor]] = []
        self.file = ""

    def begin(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.spans, self.file = [], inspect.getsourcefile(kernel.fn) or ""
        trace = LaunchTrace(kernel.fn.__name__, tuple(grid))
        for name, value in arguments.items():
            tensor = _tensor_of(value)
            if tensor is None or tensor.numel() == 0:
                continue
            name = name.removesuffix("_ptr").removesuffix("_desc")
            low = tensor.data_ptr()
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self.spans.append((low, low + (last + 1) * tensor.element_size(), name, tensor))
            trace.shapes[name], trace.strides[name] = tuple(tensor.shape), tensor.stride()
            trace.itemsizes[name] = tensor.element_size()
        self.traces.append(trace)

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        import numpy as np
        from triton.runtime.interpreter import interpreter_builder

        address = np.asarray(pointers.data).astype(np.int64).ravel()
        if mask is None:
            active, off = address, address[:0]
        else:
            on = np.broadcast_to(np.asarray(mask.data), np.asarray(pointers.data).shape).ravel().astype(bool)
            active, off = address[on], address[~on]
        program = tuple(int(i) for i in interpreter_builder.grid_idx)
        if active.size == 0:
            if self.keep and off.size:
                self.note(program, kind, self.owner(off), active, off)
            return
        span = self.owner(active)
        low, high, name, tensor = span
        size = tensor.element_size()
        outside = self.outside(active, size) if active.min() < low or active.max() + size > high else active[:0]
        if outside.size:
            trace, line = self.traces[-1], self.line()
            stray = Stray(
                kernel=trace.kernel,
                program=program,  # type: ignore[arg-type]
                kind=kind,
                tensor=name,
                numel=(high - low) // size,
                element=int((outside[0] - low) // size),
                lanes=int(outside.size),
                file=re.sub(r" \(\d+\)$", "", self.file),
                line=line,
                source=linecache.getline(self.file, line).strip(),
                dims=len(trace.grid),
            )
            self.strays.append(stray)
            if outside.min() < low - GUARD or outside.max() + size > high + GUARD:
                raise IndexError(str(self.strays[-1]))
        if self.keep:
            self.note(program, kind, span, active, off)

    def note(self, program: Any, kind: str, span: Any, active: Any, off: Any) -> None:
        low, _, name, tensor = span
        size = tensor.element_size()
        access = Access(program, kind, name, self.line(), (active - low) // size, (off - low) // size)
        self.traces[-1].accesses.append(access)

    def outside(self, address: Any, size: int) -> Any:
        """The addresses in none of the tensors: arguments may be views of one another's memory."""
        for low, high, _, _ in self.spans:
            address = address[(address < low) | (address + size > high)]
        return address

    def owner(self, address: Any) -> tuple[int, int, str, torch.Tensor]:
        """The tensor that holds the addresses; else the one that holds the first of them, or is nearest to it."""
        first, low, high = int(address[0]), int(address.min()), int(address.max())

        def distance(span: tuple[int, int, str, torch.Tensor]) -> int:
            if span[0] <= low and high < span[1]:
                return -1
            return 0 if span[0] <= first < span[1] else min(abs(first - span[0]), abs(first - span[1]))

        return min(self.spans, key=distance)

    def line(self) -> int:
        frame = sys._getframe(1)
        line = 0
        # the outermost one below the launch: the kernel's own line, not a helper's, not the launcher's
        while frame is not None and frame.f_code.co_name != "watched_run":
            if frame.f_code.co_filename == self.file:
                line = frame.f_lineno
            frame = frame.f_back  # type: ignore[assignment]
        return line


def _hook_builder(watch: _Watch) -> None:
    """Watch loads, stores, atomics and dots. `create_load` and `create_store` call the masked ones."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    np.seterr(all="ignore")  # 1 / 0 is inf on a GPU, without a word
    builder = interpreter.interpreter_builder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def masked_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.access("load", pointers, mask)
        return load(pointers, mask, *rest, **named)

    def masked_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.access("store", pointers, mask)
        return store(pointers, value, mask, *rest, **named)

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.access("atomic", pointers, mask)
        return rmw(operation, pointers, value, mask, *rest, **named)

    def atomic_cas(pointers: Any, *rest: Any, **named: Any) -> Any:
        watch.access("atomic", pointers, None)
        return cas(pointers, *rest, **named)

    def fp32(x: Any) -> Any:
        # the interpreter keeps bf16 as its bits and would multiply those
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def counted_dot(a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        if watch.traces:
            watch.traces[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(fp32(a), fp32(b), *rest, **named)

    trunc = builder.create_fp_trunc

    def rounded_trunc(source: Any, target: Any) -> Any:
        # the interpreter cuts fp32 off to bf16; a GPU rounds to the nearest, ties to even
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return trunc(source, target)
        value = np.ascontiguousarray(source.data)
        bits = value.view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(value), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)

    builder.create_fp_trunc = rounded_trunc
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas
    builder.create_dot = counted_dot

    run = interpreter.InterpretedFunction.run

    def watched_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        bound = inspect.signature(self.fn).bind_partial(
            *args, **{k: v for k, v in kwargs.items() if k in self.arg_names}
        )
        bound.apply_defaults()
        watch.begin(self, grid(bound.arguments) if callable(grid) else grid, bound.arguments)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = watched_run

    # Triton 3.6 turns a run-time `range` bound of shape (1,) into an int in a way that numpy 2.4 refuses.
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *rest: Any) -> Any:
        scope = patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return scope

    interpreter._patch_lang_tensor = patch_tensor


# --------------------------------------------------------------------------------------------------------------------
# The interpreter's own work
# --------------------------------------------------------------------------------------------------------------------


def quicken() -> None:
    """Spare Triton's interpreter, in this process, work that decides nothing. Most of its time goes into four things:

    * For every sum, difference and product of integers it computes whether they overflow, in int64 and by comparisons of
      its own, and drops the answer: the assertion that would report it exists only with `debug`.
    * For every call of a device function it replaces the functions of `triton.language`, which the launch around it
      has done already. Here that happens once in a launch for each module that kernels come from.
    * For every value it makes a table of numpy's dtypes anew.
    * For every value it makes the parts of its type and of its shape anew. Here equal ones share them.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "quickened", False):
        return
    interpreter.quickened = True
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] | None = None  # in the launch that runs: ids of the globals of the functions met so far

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal patched
        patched = set()
        try:
            call(self, *args, **kwargs)
        finally:
            patched = None

    def patch_once(fn: Any) -> Any:
        if patched is None:
            return patch(fn)
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()  # nothing to restore: the launch restores what it patched
        patched.add(id(fn.__globals__))
        return patch(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, patch_once

    look_up, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return look_up(element)
        if element.name not in known:
            known[element.name] = look_up(element)
        return known[element.name]

    interpreter._get_np_dtype = numpy_dtype

    new_type, types = tl.block_type.__init__, {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(getattr(n, "value", n) for n in shape))
        if key not in types:
            new_type(self, element_ty, shape)  # raises for what is no shape
            types[key] = element_ty, dict(vars(self))  # the id is this dtype's as long as it is kept
        vars(self).update(types[key][1])

    new_tensor, shapes = tl.tensor.__init__, {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in shapes:
            new_tensor(self, handle, type)
            shapes[id(shape)] = shape, self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.numel, self.shape = shapes[id(shape)]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


class _Kernels:
    """Interpreted kernels by source, defined once."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.lines: dict[str, dict[int, str]] = {}  # file -> what is known of it, by line

    def define(self, spec: dict[str, Any], family: dict[str, Any] | None = None) -> Any:
        import triton

        family = {} if family is None else family
        if "again" in spec:
            return family[spec["again"]]
        key = repr(spec)
        if key not in self.known:
            file = self.place(spec["file"], spec["line"], spec["source"])
            text = "\n" * (spec["line"] - 1) + spec["source"]
            scope: dict[str, Any] = {"__name__": "kernel", "__builtins__": builtins}
            scope |= {n: self.value(p, family) for n, p in spec["globals"].items() if p[0] != "kernel"}
            exec(compile(text, file, "exec"), scope)
            self.known[key] = family[spec["name"]] = triton.jit(scope[spec["name"]])
            scope |= {n: self.value(p, family) for n, p in spec["globals"].items() if p[0] == "kernel"}
            scope[spec["name"]] = self.known[key]
        return self.known[key]

    def place(self, file: str, first: int, source: str) -> str:
        """Put a definition on its lines of the file, where `inspect` and messages find it; the name of the file.

        Cells of a notebook and an edited file give the same lines to different texts: then the name gets a number.
        """
        new = dict(enumerate(source.splitlines(keepends=True), first))
        names = itertools.chain([file], (f"{file} ({n})" for n in itertools.count(2)))
        name = next(n for n in names if all(self.lines.get(n, {}).get(k, v) == v for k, v in new.items()))
        known = self.lines.setdefault(name, {})
        known |= new
        lines = [known.get(k, "\n") for k in range(1, max(known) + 1)]
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
        return name

    def value(self, packed: tuple[Any, ...], family: dict[str, Any]) -> Any:
        import importlib

        import triton.language as tl

        kind, what = packed[0], packed[1]
        if kind == "module":
            return importlib.import_module(what)
        if kind == "import":
            return getattr(importlib.import_module(what), packed[2])
        if kind == "kernel":
            return self.define(what, family)
        return tl.constexpr(what) if kind == "constexpr" else what


class _Guarded:
    """The request's storages between guard bands."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents
        self.buffers = []
        for content in contents:
            buffer = torch.full((2 * GUARD + len(content),), 0xFF, dtype=torch.uint8)
            if content:
                buffer[GUARD : GUARD + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self.buffers.append(buffer)

    def unpack(self, value: Any, kernels: _Kernels) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        if isinstance(value, _View):
            offset = GUARD // value.dtype.itemsize + value.offset
            storage = self.buffers[value.storage].untyped_storage()
            return torch.empty(0, dtype=value.dtype).set_(storage, offset, value.shape, value.stride)
        if isinstance(value, _Box):
            base = self.unpack(value.base, kernels)
            return TensorDescriptor(base, list(value.shape), list(value.strides), list(value.block_shape))
        if isinstance(value, dict):
            return {k: self.unpack(v, kernels) for k, v in value.items()}
        if isinstance(value, tuple) and value and value[0] == "kernel argument":
            return kernels.define(value[1])
        if isinstance(value, (list, tuple)):
            return type(value)(self.unpack(v, kernels) for v in value)
        return value

    def changed(self) -> list[bytes | None]:
        now = [b[GUARD : GUARD + len(c)].numpy().tobytes() for b, c in zip(self.buffers, self.contents, strict=True)]
        return [None if a == b else a for a, b in zip(now, self.contents, strict=True)]


def _serve(connection: Connection) -> None:
    """Answer requests until the other side closes the pipe."""
    import torch_triton_ops  # noqa: F401 - registers the ops

    watch, kernels = _Watch(), _Kernels()
    quicken()
    _hook_builder(watch)
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        watch.keep, watch.strays, watch.traces = request["trace"], [], []
        memory = _Guarded(request["storages"])
        packer = _Packer()
        reply: dict[str, Any] = {"error": "", "result": None, "tensors": []}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                args = memory.unpack(request["args"], kernels)
                kwargs = memory.unpack(request["kwargs"], kernels)
                if request["do"] == "op":
                    reply["result"] = packer(getattr(torch.ops.tt, request["op"])(*args, **kwargs))
                    reply["tensors"] = packer.contents()
                else:
                    kernels.define(request["kernel"])[request["grid"]](*args, **kwargs)
            except Exception as error:
                reply["error"] = _explain(error)
        reply |= {"printed": printed.getvalue(), "storages": memory.changed(), "strays": watch.strays}
        reply["traces"] = watch.traces if request["trace"] else []
        connection.send(reply)


def _explain(error: BaseException) -> str:
    """The first cause, with the last line of a kernel's source on the way to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/triton/" not in f.filename]
    frames = [f for f in frames if f.filename != __file__ and "/torch/" not in f.filename]
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}: " if frames else ""
    return f"{where}{type(error).__name__}: {error}"


if __name__ == "__main__":
    # This file is __main__ here; what travels over the pipe must be of the class that the other side knows.
    from triton_tutorial import interpreted

    interpreted._serve(Connection(int(sys.argv[1])))
