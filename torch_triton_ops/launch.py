"""The one launcher: every kernel of every op starts here.

`launch(kernel, grid, *args, **constexprs)` picks one of four ways:

* eager CUDA: the compiled kernel is cached by everything Triton specialises on and started directly with integer pointers,
  past the Python of `kernel[grid]`;
* inlining, while torch.compile traces an op with `visibility: triton`: `wrap_triton(kernel)[grid](...)`, or, for a Gluon
  kernel, which cannot be inlined, `NotInlinable`, upon which the op stays one node of the graph;
* `TRITON_INTERPRET=1`: Triton's interpreter, on CPU tensors;
* recording: nothing runs; the call is kept for offline compilation (tests, `explain`).

A kernel with a `PDL: tl.constexpr` parameter takes part in programmatic dependent launch (sm_90 on): its programs may be
set up while the kernel before it in the stream still drains, and it must call `gdc_wait()` before its first access to
memory. The launcher fills in PDL; the kernel's author passes nothing.

Importing this module touches no GPU driver. It knows no op.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Gluon's language still changes from version to version, and the interpreter does not take it.
_GLUON = triton.__version__.startswith(("3.6.", "3.7.")) and not INTERPRET


class _State(threading.local):
    inlining = 0
    recording: Recording | None = None
    watching = False  # either of the two: the one thing that the hot path asks


_state = _State()


# --------------------------------------------------------------------------------------------------------------------
# What a launcher may ask of the machine
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    p = torch.cuda.get_device_properties(index)
    return p.major * 10 + p.minor, p.multi_processor_count


def _device_facts(device: torch.device) -> tuple[int, int]:
    if _state.recording is not None:
        return _state.recording.target, {80: 108, 90: 132, 100: 148}.get(_state.recording.target, 108)
    if device.type == "cuda":
        return _properties(torch.cuda.current_device() if device.index is None else device.index)
    return 80, 4  # the interpreter: few programs, portable path


def capability(device: torch.device) -> int:
    """Compute capability as one number: 80, 90, 100."""
    return _device_facts(device)[0]


def sm_count(device: torch.device) -> int:
    """Number of streaming multiprocessors: the natural size of a persistent grid."""
    return _device_facts(device)[1]


def gluon_ready(device: torch.device, target: int = 90) -> bool:
    """Whether a Gluon kernel for compute capability `target` may run: real or recorded GPU, tested Triton version."""
    return _GLUON and capability(device) >= target


def aligned(tensor: torch.Tensor) -> bool:
    """Whether `tensor` begins on 16 bytes; traced and meta tensors, which have no address, by their offset."""
    if _state.watching:
        return tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.data_ptr() % 16 == 0


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n. Also for SymInt, where triton's bit tricks would leave a monstrous guard."""
    p = 1
    while p < n:
        p *= 2
    return p


def cdiv(a: int, b: int) -> int:
    """Ceiling division; also for SymInt."""
    return (a + b - 1) // b


# --------------------------------------------------------------------------------------------------------------------
# Recording: what would be launched, for compilation without a GPU
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """The launches an op would make on a target. Give the launcher tensors on the meta device."""

    target: int
    launches: list[Launch] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: `kernel[grid](*args, **constexprs)` with `options`."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recording(target: int) -> Iterator[Recording]:
    """Record launches for compute capability `target` (80, 90, 100) in this thread instead of running them."""
    previous, _state.recording = _state.recording, Recording(target)
    _state.watching = True
    try:
        yield _state.recording
    finally:
        _state.recording = previous
        _state.watching = previous is not None or _state.inlining > 0


def is_recording() -> bool:
    """Whether this thread records launches."""
    return _state.recording is not None


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """Launch through `wrap_triton` in this thread: torch.compile is looking."""
    _state.inlining += 1
    _state.watching = True
    try:
        yield
    finally:
        _state.inlining -= 1
        _state.watching = _state.recording is not None or _state.inlining > 0


# --------------------------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------------------------


class NotInlinable(Exception):
    """The launcher chose a kernel that `wrap_triton` cannot take: torch.compile must keep the op as one node."""


class Descriptor:
    """A TMA descriptor of `base` (last stride 1, 16-byte aligned) with boxes of `block_shape`; made by `descriptor`."""

    __slots__ = ("base", "block_shape", "layout", "shape", "strides")

    def __init__(self, base: torch.Tensor, block_shape: tuple[int, ...], layout: Any = None) -> None:
        self.base, self.block_shape, self.layout = base, block_shape, layout
        self.shape, self.strides = tuple(base.shape), base.stride()

    def for_triton(self) -> Any:
        arguments = self.base, list(self.shape), list(self.strides), list(self.block_shape)
        if self.layout is not None:
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

            return GluonTensorDescriptor(*arguments, self.layout)
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(*arguments)


def descriptor(tensor: torch.Tensor, block_shape: tuple[int, ...], layout: Any = None) -> Descriptor:
    """A TMA descriptor to pass to `launch` in the place of a pointer.

    layout: a Gluon kernel's shared-memory layout, one lasting object for all calls.

    The driver's encoding is cached by address, shape, strides and box, so a repeated launch costs no driver call.
    Ask `can_describe(tensor)` first. An op that makes one for a Triton kernel is `visibility: opaque`.
    """
    return Descriptor(tensor, block_shape, layout)


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether TMA takes `tensor`: last stride 1, other strides positive multiples of 16 bytes, base aligned to 16 bytes."""
    strides, unit = tensor.stride(), 16 // tensor.element_size()
    if strides[-1] != 1 or tensor.numel() == 0:
        return False
    for stride in strides[:-1]:
        if stride <= 0 or stride % unit:
            return False
    return aligned(tensor)


def launch(
    kernel: JITFunction, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any
) -> None:
    """Start `kernel` on `grid`. See the module's docstring and docs/design.md.

    args: the kernel's run-time arguments in order: tensors, ints, None, `descriptor`s. constexprs: by keyword.
    """
    if _state.watching or INTERPRET:
        return _launch_otherwise(kernel, grid, args, num_warps, num_stages, constexprs)
    # The hot path: one frame, because each costs. The key holds at least everything that Triton specialises a kernel on (dtype
    # and 16-byte alignment of a pointer; width, 1 and divisibility by 16 of an int; every constexpr and option): a finer key
    # costs a dictionary entry, a coarser one would be a wrong result.
    key: list[Any] = [num_warps, num_stages, *constexprs, *constexprs.values()]
    values: list[Any] = []
    device = -1
    described = False
    for a in args:
        kind = type(a)
        if kind is int:  # the commonest first
            values.append(a)
            key.append(7 if a == 1 else (a % 16 == 0) + 2 * (-_MAX_INT32 <= a <= _MAX_INT32))
        elif isinstance(a, torch.Tensor):
            pointer = a.data_ptr()
            values.append(pointer)
            key.append(a.dtype)
            key.append(pointer % 16 == 0)
            index = a.get_device()
            if index != device:
                if device >= 0 or index < 0:
                    raise RuntimeError(f"{kernel.__name__}: its tensors must all be on one GPU; one is on {a.device}")
                device = index
        elif kind is Descriptor:
            values.append(a)
            key.append((a.base.dtype, a.block_shape, id(a.layout)))  # hashing a layout would take a microsecond
            device = a.base.get_device()
            described = True
        else:
            values.append(a)
            key.append((kind, a) if a is None or kind is bool else kind)
    key.append(device)
    if 0 in grid:
        return None
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, **constexprs)
    entry = _started.get(id(kernel))
    if entry is None:
        entry = _started[id(kernel)] = (kernel, {})
    start = entry[1].get(tuple(key))
    if start is None or _HOOKS[0].calls or _HOOKS[1].calls:  # a profiler listens: Triton's own way tells it
        entry[1][tuple(key)] = _launch_and_find(kernel, grid, args, num_warps, num_stages, constexprs, device) or start
        return None
    c_launcher, head, tail, metas, encoded = start
    if described:
        values = _encode(values, metas, encoded)
    y = grid[1] if len(grid) > 1 else 1
    z = grid[2] if len(grid) > 2 else 1
    c_launcher(grid[0], y, z, torch._C._cuda_getCurrentRawStream(device), *head, *values, *tail)
    return None


class Prepared:
    """A launch in which all but the tensors is settled: `launch`, without what its arguments cost at every call.

    Made from the arguments of a first launch, which it does not make. Then `prepared(*tensors)` launches with these in the
    places of the first tensors and descriptors, in order: of the same dtypes and on the same GPU, and for a descriptor with the
    described memory at the same place from their beginning. Keep it under a key that holds all that, the ints and the options.
    """

    __slots__ = ("args", "boxes", "constexprs", "device", "encoded", "grid", "kernel", "options", "places", "starts")

    def __init__(
        self,
        kernel: JITFunction,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        **constexprs: Any,
    ) -> None:
        self.kernel, self.grid, self.constexprs = kernel, grid, constexprs
        self.options = num_warps, num_stages
        self.places = [i for i, a in enumerate(args) if isinstance(a, (torch.Tensor, Descriptor))]
        first = args[self.places[0]]
        self.device = (first.base if type(first) is Descriptor else first).get_device()
        # the first tensors are not kept alive
        self.boxes = {
            i: (a.block_shape, a.layout, a.shape, a.strides) for i, a in enumerate(args) if type(a) is Descriptor
        }
        self.args = [None if i in self.places else a for i, a in enumerate(args)]
        self.starts: dict[int, Any] = {}  # by which pointers are aligned to 16 bytes, on which Triton specialises
        self.encoded: dict[tuple[int, int], list[Any]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        if _state.watching or INTERPRET or self.device != torch._C._cuda_getDevice() or 0 in self.grid:
            num_warps, num_stages = self.options
            args = self._arguments(tensors)
            launch(self.kernel, self.grid, *args, num_warps=num_warps, num_stages=num_stages, **self.constexprs)
            return
        values: list[Any] = self.args.copy()
        aligned_pointers = 0
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = pointer = tensor.data_ptr()
            aligned_pointers = aligned_pointers << 1 | (pointer % 16 == 0)
        start = self.starts.get(aligned_pointers)
        if start is None or _HOOKS[0].calls or _HOOKS[1].calls:
            args = self._arguments(tensors)
            found = _launch_and_find(self.kernel, self.grid, args, *self.options, self.constexprs, self.device)
            self.starts[aligned_pointers] = start or found
            return
        c_launcher, head, tail, metas, _ = start
        if metas:
            shift = 0  # a descriptor is several of the C function's arguments
            for place, meta in zip(self.boxes, metas, strict=True):
                key = place, values[place + shift]
                parts = self.encoded.get(key)
                if parts is None:
                    bases = dict(zip(self.places, tensors, strict=True))
                    parts = _make_parts(self._descriptor(place, bases[place]), meta, self.encoded, key)
                values[place + shift : place + shift + 1] = parts
                shift += len(parts) - 1
        grid = self.grid
        y = grid[1] if len(grid) > 1 else 1
        z = grid[2] if len(grid) > 2 else 1
        c_launcher(grid[0], y, z, torch._C._cuda_getCurrentRawStream(self.device), *head, *values, *tail)

    def _arguments(self, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """As `launch` takes them."""
        args = self.args.copy()
        for place, tensor in zip(self.places, tensors, strict=True):
            args[place] = self._descriptor(place, tensor) if place in self.boxes else tensor
        return tuple(args)

    def _descriptor(self, place: int, base: torch.Tensor) -> Descriptor:
        """As the first one there, of `base`'s memory; `base` itself need not be the view that was described."""
        block_shape, layout, shape, strides = self.boxes[place]
        made = Descriptor(base, block_shape, layout)
        made.shape, made.strides = shape, strides
        return made


class Plans(dict[Any, Any]):
    """What an op decided, by all that it decided from: deciding takes the host longer than launching, and programs repeat.

    Bounded, because shapes may change from call to call. Nothing is found or kept while launches are recorded or inlined.
    """

    LIMIT = 4096

    def find(self, key: Any) -> Any:
        """The plan kept under `key`, or None."""
        return None if _state.watching else self.get(key)

    def keep(self, key: Any, plan: Any) -> Any:
        """`plan`, from now on found under `key`."""
        if not _state.watching:
            if len(self) >= self.LIMIT:
                self.clear()
            self[key] = plan
        return plan


def _launch_and_find(
    kernel: JITFunction,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    constexprs: dict[str, Any],
    device: int,
) -> Any:
    """Launch in Triton's own way, which compiles; what starts the kernel directly from now on, None if nothing does."""
    constexprs, options = _options(kernel, constexprs, num_warps, num_stages, _properties(device)[0])
    compiled = kernel[grid](*_for_triton(args), **constexprs, **options)
    return _direct_start(kernel, compiled, constexprs) if _DIRECT and compiled is not None else None


def _launch_otherwise(
    kernel: JITFunction,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    constexprs: dict[str, Any],
) -> None:
    """Inlining, recording and the interpreter."""
    target = 0 if _state.recording is None else _state.recording.target
    constexprs, options = _options(kernel, constexprs, num_warps, num_stages, target)
    if _state.inlining:
        if kernel.is_gluon():
            raise NotInlinable(kernel.__name__)
        from torch.library import wrap_triton

        wrap_triton(kernel)[tuple(grid)](*args, **constexprs, **options)
    elif _state.recording is not None:
        _state.recording.launches.append(Launch(kernel, tuple(grid), args, constexprs, options))
    elif 0 not in grid:
        kernel[grid](*_for_triton(args), **constexprs)


def _options(
    kernel: JITFunction, constexprs: dict[str, Any], num_warps: int, num_stages: int, target: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constexprs and compiler options of a launch on `target` (0: inlined or interpreted, where no launch is programmatic)."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if "PDL" in kernel.arg_names:
        constexprs = {**constexprs, "PDL": target >= 90}
        if target >= 90:
            options["launch_pdl"] = True
    return constexprs, options


def _for_triton(args: tuple[Any, ...]) -> list[Any]:
    return [a.for_triton() if type(a) is Descriptor else a for a in args]


# What Triton's own launcher looks like is private and differs between versions: only tested ones are started directly.
_DIRECT = triton.__version__.startswith("3.6.")
_HOOKS = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)

# kernel's id -> (kernel, {specialisation: start}); the kernel is kept so that its id stays its own
_started: dict[int, tuple[JITFunction, dict[tuple[Any, ...], Any]]] = {}
_MAX_INT32 = 2**31 - 1


def _direct_start(kernel: JITFunction, compiled: Any, constexprs: dict[str, Any]) -> Any:
    """What starts `compiled` with nothing between but C: the C launcher, the arguments before and after ours, how descriptors
    are encoded and those that are.

    None where that is not possible.
    """
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None  # scratch is allocated per launch: Triton's own way
    c_launcher, metadata = run.launch, compiled.packed_metadata
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, None, None, None)
    # every constexpr keeps a slot; they stand last in our kernels' signatures, in their own order
    names = [p.name for p in kernel.params if p.is_constexpr]
    runtime = len(kernel.params) - len(names)
    if any(p.is_constexpr for p in kernel.params[:runtime]):
        raise TypeError(f"{kernel.__name__}: put the tl.constexpr parameters last")
    tail = tuple(
        constexprs[name] if name in constexprs else kernel.signature.parameters[name].default for name in names
    )
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    if metas:
        # Triton's wrapper encodes the descriptors at every launch; below it is the C function, which takes encoded ones.
        cells = zip(c_launcher.__code__.co_freevars, (c.cell_contents for c in c_launcher.__closure__), strict=True)
        c_launcher = dict(cells)["launcher"]
    return c_launcher, head, tail, metas, {}


def _encode(values: list[Any], metas: Any, encoded: dict[Any, list[Any]]) -> list[Any]:
    """`values` with every Descriptor as the arguments that the C function takes for it."""
    final: list[Any] = []
    position = 0
    for value in values:
        if type(value) is not Descriptor:
            final.append(value)
            continue
        key = (position, value.base.data_ptr(), value.shape, value.strides)
        final += encoded.get(key) or _make_parts(value, metas[position], encoded, key)
        position += 1
    return final


def _make_parts(value: Descriptor, meta: Any, encoded: dict[Any, list[Any]], key: Any) -> list[Any]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    if len(encoded) > 4096:  # addresses change from step to step in some programs: stay bounded
        encoded.clear()
    parts: list[Any] = make_tensordesc_arg(value.for_triton(), meta)
    encoded[key] = parts
    return parts
