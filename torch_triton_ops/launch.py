"""The one launcher: every kernel of every op starts here.

`launch(kernel, grid, *args, **constexprs)` picks one of four ways:

* eager CUDA: the compiled kernel is cached by everything Triton specialises on and started directly with integer pointers
  (about 4 us of host time against 15 us through `kernel[grid]`);
* inlining, while torch.compile traces an op with `visibility: triton`: `wrap_triton(kernel)[grid](...)`;
* `TRITON_INTERPRET=1`: Triton's interpreter, on CPU tensors;
* recording: nothing runs; the call is kept for offline compilation (tests, `explain`).

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

# Options of a launch that are no constexpr of the kernel.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class _State(threading.local):
    inlining = 0
    recording: Recording | None = None


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
    options: dict[str, int]


@contextlib.contextmanager
def recording(target: int) -> Iterator[Recording]:
    """Record launches for compute capability `target` (80, 90, 100) in this thread instead of running them."""
    previous, _state.recording = _state.recording, Recording(target)
    try:
        yield _state.recording
    finally:
        _state.recording = previous


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """Launch through `wrap_triton` in this thread: torch.compile is looking."""
    _state.inlining += 1
    try:
        yield
    finally:
        _state.inlining -= 1


# --------------------------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------------------------


def launch(
    kernel: JITFunction, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any
) -> None:
    """Start `kernel` on `grid`. See the module's docstring and docs/design.md."""
    if INTERPRET or not (_state.inlining or _state.recording):
        if 0 in grid:
            return
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
    elif _state.recording is not None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        _state.recording.launches.append(Launch(kernel, tuple(grid), args, constexprs, options))
    else:
        from torch.library import wrap_triton

        wrap_triton(kernel)[tuple(grid)](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
