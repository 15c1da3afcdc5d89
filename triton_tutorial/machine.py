"""What this machine has for the lessons, and the command that mends what it lacks. Imports neither torch nor Triton.

Versions come from the packages' metadata, the GPU from its driver's library; `deep_checks` runs the real thing in a child.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton_tutorial import progress

# the pairs of (torch, triton) that the tests run with
TESTED = (("2.11", "3.6"), ("2.13", "3.7"))
# what the lessons need: distribution, least version, what for
REQUIRED = (("torch", "2.11", "everything"), ("triton", "3.6", "kernels"), ("numpy", "1.26", "Triton's interpreter"))
OPTIONAL = (("matplotlib", "3.8", "figures"), ("rich", "13", "this command"), ("typer", "0.15", "this command"))


@dataclass(frozen=True)
class Item:
    """One line of `info`. ok: None where nothing is wrong and nothing is needed; fix: a command."""

    name: str
    value: str
    ok: bool | None = True
    fix: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver tells."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.capability[0]}{self.capability[1]}, {self.memory / 2**30:.0f} GiB"


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver, the newest CUDA that it runs, and its GPUs."""

    version: str
    cuda: str
    gpus: tuple[Gpu, ...]


class DriverError(RuntimeError):
    """The NVIDIA driver is there and does not answer."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def driver() -> Driver | None:
    """Ask the driver's management library, which takes milliseconds and starts no CUDA; None where there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None

    def call(function: str, *args: Any) -> None:
        status = getattr(nvml, function)(*args)
        if status:
            raise DriverError(f"{function} returned {status}")

    call("nvmlInit_v2")
    try:
        text = ctypes.create_string_buffer(96)
        call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(96))
        version = text.value.decode()
        number = ctypes.c_int()
        call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(number))
        cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            call("nvmlDeviceGetName", handle, text, ctypes.c_uint(96))
            major, minor = ctypes.c_int(), ctypes.c_int()
            call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            memory = _Memory()
            call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
            gpus.append(Gpu(text.value.decode(), (major.value, minor.value), memory.total))
        return Driver(version, cuda, tuple(gpus))
    finally:
        nvml.nvmlShutdown()


def installed(distribution: str) -> str | None:
    """Its version, or None. Reads metadata only."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, without importing it; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "version.py"
    found = re.search(r"^cuda\b.*= *['\"]([\d.]+)", file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
    return found[1] if found else None


def _older(version: str, least: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:2]]

    return parts(version) < parts(least)


def pip(*what: str) -> str:
    """A pip command for the Python that runs this."""
    return f"{sys.executable} -m pip install {' '.join(what)}"


def missing_packages() -> list[str]:
    """Requirements that are not met, for pip."""
    wanted = []
    for name, least, _ in (*REQUIRED, *OPTIONAL):
        version = installed(name)
        if version is None or _older(version, least):
            wanted.append(f"{name}>={least}")
    return wanted


def info() -> list[Item]:
    """Every line of `triton-tutorial info`."""
    return [*_python(), *_packages(), *_gpu(), *_modes(), *_folders()]


def _python() -> Iterator[Item]:
    version = platform.python_version()
    yield Item("python", f"{version} ({sys.executable})")
    system = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        yield Item("system", system)
    else:
        yield Item("system", f"{system}; Triton is built for Linux", False, "use a Linux machine, a container, or WSL")


def _packages() -> Iterator[Item]:
    yield Item("torch-triton-ops", installed("torch-triton-ops") or "a checkout that is not installed", None)
    for name, least, purpose in (*REQUIRED, *OPTIONAL):
        version = installed(name)
        fix = pip(f"'{name}>={least}'")
        if version is None:
            yield Item(name, f"not installed (for {purpose})", False, fix)
        elif _older(version, least):
            yield Item(name, f"{version}; {least} or newer is needed", False, fix)
        elif name == "torch":
            cuda = torch_cuda()
            yield Item(name, f"{version}, {'built for CUDA ' + cuda if cuda else 'built without CUDA'}")
        else:
            yield Item(name, version)
    pair = installed("torch"), installed("triton")
    if None not in pair:
        known = any(all(str(h).startswith(f"{w}.") for w, h in zip(want, pair, strict=True)) for want in TESTED)
        tested = " or ".join(f"torch {a} with triton {b}" for a, b in TESTED)
        yield Item("tested pair", "yes" if known else f"no; the tests run with {tested}", True if known else None)


def _gpu() -> Iterator[Item]:
    try:
        found = driver()
    except DriverError as error:
        yield Item("GPU", f"the NVIDIA driver does not answer ({error})", False, "nvidia-smi")
        return
    if found is None or not found.gpus:
        yield Item("GPU", "none: kernels run in Triton's interpreter, speeds shown are recorded ones", None)
        return
    for gpu in found.gpus:
        old = gpu.capability < (8, 0)
        note = "; the kernels are made for sm_80 and newer" if old else ""
        yield Item("GPU", f"{gpu}{note}", None if old else True)
    yield Item("driver", f"{found.version}, CUDA up to {found.cuda}")
    cuda = torch_cuda()
    if installed("torch") and cuda is None:
        yield Item("torch and GPU", "this torch is a CPU build", False, pip("--upgrade", "--force-reinstall", "torch"))
    elif cuda is not None and int(cuda.split(".")[0]) > int(found.cuda.split(".")[0]):
        fix = "update the NVIDIA driver, or install a torch built for an older CUDA"
        yield Item("torch and GPU", f"torch wants CUDA {cuda}, the driver has {found.cuda}", False, fix)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Item("CUDA_VISIBLE_DEVICES", "hides every GPU", False, "unset CUDA_VISIBLE_DEVICES")
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        yield Item("C compiler", "none; Triton needs one to start kernels", False, "apt-get install gcc")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        yield Item("Python.h", "not found; Triton needs it to start kernels", False, "apt-get install python3-dev")


def _modes() -> Iterator[Item]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        said = "TRITON_INTERPRET=1: kernels are interpreted even where there is a GPU, and torch.compile fails"
        yield Item("interpreter", said, False, "unset TRITON_INTERPRET")
    else:
        yield Item("interpreter", "where there is no GPU (TRITON_INTERPRET is not set)", None)
    found = importlib.util.find_spec("triton")
    if found is not None and found.origin is not None:
        tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
        absent = [tool for tool in ("ptxas", "nvdisasm", "cuobjdump") if not (tools / tool).is_file()]
        if absent:
            yield Item("compiler", f"no {', '.join(absent)} in {tools}", False, pip("--force-reinstall", "triton"))
        else:
            yield Item("compiler", "compiles for sm_80, sm_90 and sm_100 without a GPU (explain)")


def _folders() -> Iterator[Item]:
    folder = progress.home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        yield Item("your files", str(folder))
    else:
        fix = f"export {progress.HOME_VARIABLE}=<a folder of yours>"
        yield Item("your files", f"{folder} cannot be written", False, fix)
    cache = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    yield Item("Triton's cache", cache, None)


# --------------------------------------------------------------------------------------------------------------------
# doctor: the real thing, in a child process
# --------------------------------------------------------------------------------------------------------------------

DEEP = """
import json, sys, time
start = time.time()
def say(name, value, ok=True):
    print("\\t" + json.dumps([name, value, ok]), flush=True)
import torch
say("import torch", f"{time.time() - start:.1f} s")
import torch_triton_ops
from torch_triton_ops import offline
x = torch.empty(1000, device="meta")
launched = offline.record(lambda: torch.ops.tt.vector_add(x, x), 90)[0]
compiled = offline.compile_launch(launched, 90)
say("compile for sm_90", f"{launched.kernel.__name__}: {compiled.registers} registers, {compiled.spilled} bytes spilled")
from triton_tutorial import interpreted
interpreted.install()
a, b = torch.randn(1000), torch.randn(1000)
right = torch.equal(interpreted.call_op("tt::vector_add", a, b), a + b)
say("interpret a kernel", "tt::vector_add is right" if right else "tt::vector_add is WRONG", right)
compiled = torch.compile(lambda x, y: torch.ops.tt.vector_add(x, y), fullgraph=True, backend="aot_eager")
right = torch.equal(compiled(a, b), a + b)
say("torch.compile", "fullgraph, no break" if right else "the result is WRONG", right)
if torch.cuda.is_available():
    a, b = a.cuda(), b.cuda()
    right = torch.equal(torch.ops.tt.vector_add(a, b), a + b)
    say("kernel on the GPU", "tt::vector_add is right" if right else "tt::vector_add is WRONG", right)
"""


def deep_checks(environment: dict[str, str], timeout: float = 300) -> Iterator[Item]:
    """Import torch, compile, interpret, trace, and launch on the GPU: in a child, so that whatever breaks breaks there."""
    environment = {k: v for k, v in environment.items() if k != "TRITON_INTERPRET"}
    child = subprocess.Popen(
        [sys.executable, "-c", DEEP], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        err = f"not done after {timeout:.0f} seconds"
    for line in out.splitlines():
        if line.startswith("\t"):
            yield Item(*json.loads(line))
    if child.returncode:
        last = err.strip().splitlines()[-1] if err.strip() else f"exit status {child.returncode}"
        missing = [f"'{name}'" for name in missing_packages()]
        yield Item("then", last, False, pip(*missing) if missing else pip("--upgrade", "'torch-triton-ops[tutorials]'"))


def as_json(items: list[Item]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]
