"""Compile recorded launches for a GPU that is not there, and say what is wrong with the result.

The Triton wheel carries ptxas, so registers, spills, shared memory and the advisories that cost most (C75xx: wgmma
instructions that ptxas serialises) can be checked on any machine.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_triton_ops import launch as _launch
from torch_triton_ops.launch import Descriptor, Launch

# Shared memory that one block may use, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TARGETS = tuple(SHARED_LIMIT)

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. Bytes, registers per thread."""

    kernel: Any  # triton's CompiledKernel: .asm["ttir" | "ttgir" | "ptx" | "cubin"]
    target: int
    registers: int
    spilled: int  # bytes of spill stores and loads
    shared: int
    advisories: tuple[str, ...]  # C75xx codes of ptxas

    def faults(self) -> list[str]:
        """What must not ship; empty is a pass."""
        found = [f"ptxas advisory {code}: wgmma serialised" for code in self.advisories]
        if self.spilled:
            found.append(f"{self.spilled} bytes of register spills")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory; sm_{self.target} has {SHARED_LIMIT[self.target]}")
        return found


def record(run: Callable[[], Any], target: int) -> list[Launch]:
    """The distinct launches that `run` makes on `target`.

    Call ops in it with tensors on the meta device: `torch.ops.tt.rms_norm(x).sum().backward()` records both directions.
    """
    with _launch.recording(target) as recorded:
        run()
    return list({specialisation(launch): launch for launch in recorded.launches}.values())


def specialisation(launch: Launch) -> tuple[Any, ...]:
    """What decides the compiled code of a launch: equal specialisations give the same binary."""
    signature, constants, attributes = _signature(launch)
    constants = {k: str(v) for k, v in constants.items()}
    return (launch.kernel, *signature.items(), *constants.items(), str(attributes), *launch.options.items())


def compile_launch(launch: Launch, target: int) -> Compiled:
    """Compile for compute capability `target` (80, 90, 100) with this Triton's own ptxas."""
    signature, constants, attributes = _signature(launch)
    source = _source_class(launch)(launch.kernel, signature, constants, attributes)
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached binary has no log
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    text = log.getvalue()
    registers = re.findall(r"Used (\d+) registers", text)
    if not registers:
        raise RuntimeError(f"ptxas said nothing about {launch.kernel.__name__}:\n{text}")
    return Compiled(
        kernel=kernel,
        target=target,
        registers=max(map(int, registers)),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text))),
        shared=kernel.metadata.shared,
        advisories=tuple(sorted(set(re.findall(r"\bC75\d\d\b", text)))),
    )


def _source_class(launch: Launch) -> type[ASTSource]:
    if not launch.kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Triton's signature, constants and attributes of a launch, specialised as its own launcher would."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    runtime = [p for p in launch.kernel.params if not p.is_constexpr]
    if len(runtime) != len(launch.args):
        raise TypeError(f"{launch.kernel.__name__} takes {len(runtime)} run-time arguments, not {len(launch.args)}")
    for parameter, value in zip(runtime, launch.args, strict=True):
        divisible = False
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            # of a meta tensor only the offset is known: allocations themselves are aligned
            divisible = value.storage_offset() * value.element_size() % 16 == 0
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        elif isinstance(value, Descriptor):
            # spelt as Triton's own launcher does; a Gluon descriptor's type holds its shared-memory layout
            box = ",".join(map(str, value.block_shape))
            layout = "" if value.layout is None else f",{value.layout!r}"
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype]}[{box}]{layout}>"
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, int):
            divisible = value % 16 == 0 and not parameter.do_not_specialize
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        elif isinstance(value, float) and launch.kernel.is_gluon():
            signature[parameter.name] = "fp32"  # never inlined into a graph, where a run-time float would be fp64
        else:
            raise TypeError(f"{launch.kernel.__name__}: {parameter.name} is {value!r}; pass floats as tl.constexpr")
        if divisible and not parameter.do_not_specialize_on_alignment:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    for parameter in launch.kernel.params:
        if parameter.is_constexpr:
            default = launch.kernel.signature.parameters[parameter.name].default
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = launch.constexprs.get(parameter.name, default)
    return signature, constants, attributes
