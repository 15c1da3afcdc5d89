"""Look into an op without a GPU: its schema, the graph that torch.compile sees, and what the compiler makes of its kernels.

The Triton wheel carries ptxas and nvdisasm, so registers, spills, shared memory and machine code of any GPU generation are there
on any machine. Occupancy is a bound computed from the limits of an SM, not a measurement.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

import torch_triton_ops
from torch_triton_ops import launch as tt_launch
from torch_triton_ops import offline, registry
from torch_triton_ops.registry import OpSpec
from triton_tutorial.catalog import TutorialError

# threads, 32-bit registers, bytes of shared memory and blocks of one SM; bytes that the driver keeps of a block's shared memory
SM_LIMITS = {80: (2048, 65536, 164 * 1024, 32), 90: (2048, 65536, 228 * 1024, 32), 100: (2048, 65536, 228 * 1024, 32)}
RESERVED_SHARED = 1024
SM_COUNTS = {80: 108, 90: 132, 100: 148}
GPUS = {80: "A100", 90: "H100, H200", 100: "B200"}

# what of an assembly text tells most; the order is that of the table
SASS = {
    "LDG.128": r"LDG\.\S*128",
    "LDG": r"LDG\b(?!\S*128)",
    "STG.128": r"STG\.\S*128",
    "STG": r"STG\b(?!\S*128)",
    "LDGSTS": r"LDGSTS",
    "TMA load": r"UTMALDG",
    "TMA store": r"UTMASTG",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "SHFL": r"SHFL",
    "BAR": r"BAR\b",
    "FFMA": r"FFMA2?\b",
    "MUFU": r"MUFU",
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "UTCMMA": r"UTC\w*MMA",
    "ATOM": r"(?:ATOMG?|REDG?)\b",
    "spill load": r"LDL",
    "spill store": r"STL",
}
_TELLING = {
    "ttir": r"\btt\.(?:load|store|dot|reduce\"|scan\"|atomic|descriptor|get_program_id)|scf\.(?:for|if)|math\.",
    "ttgir": r"^#(?:blocked|mma|shared)\w* = |ttng\.|ttg\.(?:local|async|convert)|\btt\.(?:load|store|dot|reduce\")|scf\.for",
    "ptx": r"\b(?:ld|st)\.global|cp\.async|wgmma|mma\.sync|tcgen05\.mma|\bex2\.|fma\.rn|shfl|bar\.sync|atom\.|red\.",
    "sass": r"\b(?:LDG|STG|LDGSTS|UTMA\w+|HMMA|HGMMA|UTC\w*MMA|MUFU|SHFL|BAR|LDL|STL|FFMA\w*|ATOMG?|REDG?)\b",
}
STAGES = tuple(_TELLING)


@dataclass(frozen=True)
class KernelView:
    """One launch compiled for one target. Bytes; registers a thread."""

    kernel: str
    target: int
    grid: tuple[int, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: int
    occupancy: float
    limiter: str
    advisories: tuple[str, ...]
    instructions: dict[str, int]
    code: dict[str, str] = field(repr=False)  # by stage; a Gluon kernel has no TTIR


@dataclass(frozen=True)
class Explanation:
    """All that `explain` knows of an op at one case."""

    op: str
    schema: str
    summary: str
    internal: dict[str, str]  # qualified name -> schema
    visibility: str
    differentiable: tuple[str, ...]
    dtypes: tuple[str, ...]
    autocast: str | None
    sharding: str | None
    lesson: int | None
    source: str | None
    file: str
    case: str
    dtype: str
    flops: int
    bytes: int
    backward: bool
    graph: str
    kernels: list[KernelView]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_targets(text: str) -> list[int]:
    """ "sm80,sm_90,100" -> [80, 90, 100]."""
    found = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        match = re.fullmatch(r"(?:sm_?)?(\d+)a?", part.lower())
        if match is None or int(match[1]) not in offline.TARGETS:
            known = ", ".join(f"sm{target}" for target in offline.TARGETS)
            raise TutorialError(f"unknown target '{part}'; there are: {known}")
        found.append(int(match[1]))
    if not found:
        raise TutorialError("no target given; say --target sm90")
    return list(dict.fromkeys(found))


def find_op(name: str) -> OpSpec:
    """The entry of `softmax` or `tt::softmax`. Raises TutorialError with near misses."""
    try:
        return registry.spec(name.removeprefix("torch.ops.").replace(".", "::"))
    except KeyError as error:
        known = ", ".join(spec.name for spec in torch_triton_ops.specs())
        said = str(error.args[0])
        raise TutorialError(said if "did you mean" in said else f"{said}; there are: {known}") from None


def find_case(spec: OpSpec, wanted: str | None) -> Any:
    """A benchmark case by its id, or the first."""
    make = spec.function("bench_cases")
    cases = list(make()) if make is not None else []
    if not cases:
        raise TutorialError(f"{spec.qualname} has no benchmark case to compile")
    if wanted is None:
        return cases[0]
    for case in cases:
        if case.id == wanted:
            return case
    raise TutorialError(f"{spec.qualname} has no case '{wanted}'; there are: {', '.join(c.id for c in cases)}")


def explain(name: str, targets: Sequence[int], case_id: str | None = None, backward: bool = False) -> Explanation:
    """Explain an op at one benchmark case, compiled for every target; `backward`: its gradient's kernels too."""
    if tt_launch.INTERPRET:
        raise TutorialError(
            "TRITON_INTERPRET=1 replaces the compiler; unset it: env -u TRITON_INTERPRET triton-tutorial ..."
        )
    spec = find_op(name)
    case = find_case(spec, case_id)
    if backward and not spec.differentiable:
        raise TutorialError(f"{spec.qualname} has no gradient; leave out --backward")
    args, kwargs = case.make("meta", case.dtype)
    names = [argument.name for argument in spec.arguments]
    cost = spec.module.__dict__[f"{spec.name}_cost"](**{**dict(zip(names, args, strict=False)), **kwargs})
    kernels = []
    for target in targets:
        for recorded in offline.record(lambda: _call(spec, args, kwargs, backward), target):
            kernels.append(_view(recorded, target))
    return Explanation(
        op=spec.qualname,
        schema=spec.schema,
        summary=spec.summary,
        internal={decl.qualname: decl.schema for decl in spec.decls[1:]},
        visibility=spec.visibility,
        differentiable=spec.differentiable,
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in spec.dtypes),
        autocast=spec.autocast,
        sharding=spec.sharding,
        lesson=spec.lesson,
        source=spec.source,
        file=str(spec.module_files()[0]),
        case=case.id,
        dtype=str(case.dtype).removeprefix("torch."),
        flops=cost.flops + (cost.backward_flops if backward else 0),
        bytes=cost.bytes + (cost.backward_bytes if backward else 0),
        backward=backward,
        graph=graph(spec, case, targets[0]),
        kernels=kernels,
    )


def _call(spec: OpSpec, args: Sequence[Any], kwargs: dict[str, Any], backward: bool) -> None:
    """The op on meta tensors; with `backward` a training step of it."""
    if not backward:
        with torch.no_grad():
            spec.op(*args, **kwargs)
        return
    names = [argument.name for argument in spec.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in spec.differentiable:
        if isinstance(given.get(name), torch.Tensor):
            given[name] = given[name].detach().requires_grad_()
    out = spec.op(**given)
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    leaves = [given[name] for name in spec.differentiable if isinstance(given.get(name), torch.Tensor)]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])


# --------------------------------------------------------------------------------------------------------------------
# The graph
# --------------------------------------------------------------------------------------------------------------------


class _NamedTarget:
    """The part of Triton's driver that tracing asks for: which GPU to compile for. It launches nothing."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextlib.contextmanager
def _compiling_for(target: int) -> Iterator[None]:
    """Triton and our launchers take this machine's GPU for one of `target`."""
    from triton.runtime import driver

    previous, properties = driver.__dict__.get("_active"), tt_launch._properties
    driver.set_active(_NamedTarget(target))
    tt_launch._properties = lambda index: (target, SM_COUNTS[target])  # type: ignore[assignment]
    try:
        yield
    finally:
        driver.__dict__["_active"], tt_launch._properties = previous, properties


def graph(spec: OpSpec, case: Any, target: int) -> str:
    """The graph that AOTAutograd gives to Inductor for one call on CUDA tensors, made from fake ones."""
    from torch._functorch.aot_autograd import aot_function
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    failure = ""
    try:
        with _compiling_for(target), _quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            args, kwargs = case.make("cuda", case.dtype)
            tensors = [a for a in args if isinstance(a, torch.Tensor)]

            def call(*given: torch.Tensor) -> Any:
                rest = iter(given)
                return spec.op(*(next(rest) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

            aot_function(call, fw_compiler=keep)(*tensors)
    except Exception as error:  # also after the graph was made: its inputs hold nothing that could be written back
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "\n".join(readable(graphs[0])) if graphs else f"not available with torch {torch.__version__}: {failure}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of a kernel that it cannot analyse: the graph shows what it presumes, that all is written."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def readable(module: torch.fx.GraphModule) -> list[str]:
    """One line for each node: name, dtype and shape, what is called. Kernels by name, with what they write."""
    lines: list[str] = []
    names: dict[Any, str] = {}

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return names.get(value, str(value)) if isinstance(value, torch.fx.Node) else str(value)

    for node in module.graph.nodes:
        names[node] = node.name
        if node.op == "placeholder":
            names[node] = f"arg{sum(line.startswith('arg') for line in lines)}"
            lines.append(f"{names[node]}: {_shape(node)}")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(text, _flat(node.args[0])))}")
        elif "triton_kernel_wrapper" in str(node.target):
            from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            names[node] = f"launch{sum(line.startswith('launch') for line in lines)}"
            given = ", ".join(f"{key}={text(value)}" for key, value in node.kwargs["kwargs"].items())
            grid = ", ".join(map(str, node.kwargs["grid"][0]))
            writes = ", ".join(node.kwargs.get("tensors_to_clone", ())) or "nothing"
            lines.append(f"{names[node]} = triton {kernel.fn.__name__}[{grid}]({given}), writes {writes}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name}: {_shape(node)} = {text(node.args[0])}[{node.args[1]}]")
        else:
            named = {key: value for key, value in node.kwargs.items() if key not in ("pin_memory", "memory_format")}
            given = ", ".join([*map(text, node.args), *(f"{key}={text(value)}" for key, value in named.items())])
            lines.append(f"{node.name}: {_shape(node)} = {node.target}({given})")
    return lines


def _flat(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in _flat(v)] if isinstance(value, (list, tuple)) else [value]


def _shape(node: Any) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__ if value is not None else "value"


# --------------------------------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------------------------------


def _view(recorded: tt_launch.Launch, target: int) -> KernelView:
    compiled = offline.compile_launch(recorded, target)
    asm = compiled.kernel.asm
    warps = int(compiled.kernel.metadata.num_warps)
    bound, limiter = occupancy(target, compiled.registers, compiled.shared, warps)
    sass = disassemble(asm["cubin"])
    return KernelView(
        kernel=recorded.kernel.__name__,
        target=target,
        grid=tuple(map(int, recorded.grid)),
        constexprs={
            k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in recorded.constexprs.items()
        },
        num_warps=warps,
        num_stages=int(recorded.options["num_stages"]),
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared=compiled.shared,
        occupancy=bound,
        limiter=limiter,
        advisories=compiled.advisories,
        instructions=count(sass),
        code={**{stage: asm[stage] for stage in ("ttir", "ttgir", "ptx") if stage in asm}, "sass": sass},
    )


def occupancy(target: int, registers: int, shared: int, num_warps: int) -> tuple[float, str]:
    """Upper bound of the fraction of an SM's threads that are resident at once, and what bounds it."""
    threads, register_file, shared_bytes, blocks = SM_LIMITS[target]
    block = 32 * num_warps
    fits = {
        "threads": threads // block,
        "registers": register_file // (-(-registers // 8) * 8 * block),
        "shared memory": shared_bytes // (shared + RESERVED_SHARED),
        "blocks": blocks,
    }
    limiter = min(fits, key=lambda name: fits[name])
    return fits[limiter] * block / threads, limiter


@functools.cache
def _nvdisasm() -> Path:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.is_file():
        raise TutorialError(
            f"this triton has no nvdisasm ({tool}); install it with: pip install --force-reinstall triton"
        )
    return tool


def disassemble(cubin: bytes) -> str:
    """Machine code as text, one instruction on a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_nvdisasm(), "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise TutorialError(f"nvdisasm failed: {done.stderr.strip() or done.returncode}")
    lines = []
    for line in done.stdout.splitlines():
        match = re.match(r"\s*/\*[0-9a-f]+\*/\s*(.*?;)", line)
        if match:
            lines.append(match[1])
        elif re.match(r"\.L_\w+:", line):
            lines.append(line.strip())
    return "\n".join(lines)


def count(sass: str) -> dict[str, int]:
    """How often each telling instruction stands in the code (not how often it runs)."""
    counts: Counter[str] = Counter()
    for line in sass.splitlines():
        operation = re.sub(r"^@!?U?P\w+\s+", "", line)
        for name, pattern in SASS.items():
            if re.match(pattern, operation):
                counts[name] += 1
                break
    return {name: counts[name] for name in SASS if counts[name]}


def excerpt(stage: str, code: str, lines: int) -> list[str]:
    """The telling lines of a stage. Intermediate code in its order; of machine code each kind of instruction once, counted."""
    telling = [line for line in code.splitlines() if re.search(_TELLING[stage], line)]
    if stage in ("ttir", "ttgir"):
        found = [re.sub(r"\s*loc\(.*?\)$", "", line).removeprefix("    ").rstrip() for line in telling]
    else:
        kinds: dict[str, list[str]] = {}
        for line in telling:
            text = " ".join(line.split())
            kinds.setdefault(re.sub(r"^@!?%?\w+ ", "", text).split(" ")[0], []).append(text)
        found = [f"{len(same):>5} x  {same[0]}" for same in kinds.values()]
    return found if len(found) <= lines else [*found[:lines], f"... ({len(found) - lines} more)"]
