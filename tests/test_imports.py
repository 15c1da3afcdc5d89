"""Who may import whom, by reading the sources; and what `import torch_triton_ops` costs and touches.

The arrows are those of docs/design.md.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_triton_ops

PACKAGE = Path(torch_triton_ops.__file__).resolve().parent
NAME = "torch_triton_ops"
FOUNDATION = ("launch", "cases", "errors")
FAMILIES = (
    "attention_hopper",
    "elementwise",
    "float8",
    "fusion",
    "losses",
    "norms",
    "reductions",
    "special",
)  # what the ops of one family share
OUTSIDE = ("tests", "bench", "tutorials", "triton_tutorial", "examples")
# CPU seconds above `import torch`. Measured for 61 ops: 0.10, half of it torch's for its tables; the rest is for a slow machine.
IMPORT_BUDGET = 0.1 + 0.002 * len(torch_triton_ops.specs())


def modules() -> list[str]:
    """Dotted names below the package: "launch", "ops.rms_norm" ..."""
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    return sorted(".".join(file.parts) for file in files)


def module_path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, at import time?) of everything that a module imports, inside functions too."""
    tree = ast.parse(module_path(module).read_text(encoding="utf-8"))
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    package = [NAME, *module.split(".")][:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) not in in_functions


def own(module: str) -> set[str]:
    """What a module imports of the package, as dotted names below it."""
    found = set()
    for name, _ in imports(module):
        parts = name.split(".")
        if parts[0] == NAME:
            below = ".".join(parts[1:])
            # `from torch_triton_ops.errors import bad_argument` is errors; `from torch_triton_ops import launch` is launch
            while below and below not in modules() and f"{below}.__init__" not in modules():
                below = below.rpartition(".")[0]
            found.add(below or "__init__")
    return found


def test_the_reader_sees_imports() -> None:
    """So that the rules below cannot pass for want of sight."""
    assert {"registry", "register"} <= own("__init__")
    assert {"launch", "cases", "errors"} <= own("ops.vector_add")
    assert ("triton", True) in set(imports("launch"))
    assert ("torch.distributed.tensor.DTensor", False) in set(imports("distributed"))


@pytest.mark.parametrize("module", FOUNDATION)
def test_foundation_knows_nothing_of_the_package(module: str) -> None:
    assert own(module) == set()


@pytest.mark.parametrize("module", [m for m in FAMILIES if m in modules()])
def test_family_imports_the_foundation_only(module: str) -> None:
    assert own(module) <= set(FOUNDATION)


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("ops.")])
def test_op_imports_the_foundation_and_a_family_only(module: str) -> None:
    """Another op is reached through torch.ops.tt."""
    folder = module.rpartition(".")[0]  # an op that outgrew one file is a folder: its files may import each other
    siblings = {m for m in modules() if folder != "ops" and m.startswith(f"{folder}.")} | ({folder} - {"ops"})
    assert own(module) - siblings <= {*FOUNDATION, *FAMILIES}


@pytest.mark.parametrize("module", modules())
def test_nothing_imports_tests_bench_tutorials_examples(module: str) -> None:
    assert {name.split(".")[0] for name, _ in imports(module)} & set(OUTSIDE) == set()


def attributes_of_modules(source: str) -> list[str]:
    """`module.name` of the package's modules in functions under @triton.jit. Inductor copies the source of a kernel and of
    what it calls by name; these it does not find."""
    tree = ast.parse(source)
    known = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME)
        for alias in node.names
        if alias.name in modules()
    }
    kernels = [
        f for f in tree.body if isinstance(f, ast.FunctionDef) and "triton.jit" in map(_called, f.decorator_list)
    ]
    return [
        f"{kernel.name}: {ast.unparse(node)}"
        for kernel in kernels
        for node in ast.walk(kernel)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
    ]


def _called(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def test_kernels_name_what_they_call() -> None:
    wrong = "from torch_triton_ops import norms\n@triton.jit\ndef kernel(x):\n    return norms.f(x) + x.dtype"
    assert attributes_of_modules(wrong) == ["kernel: norms.f"]
    found = {module: attributes_of_modules(module_path(module).read_text(encoding="utf-8")) for module in modules()}
    assert not {module: names for module, names in found.items() if names}, "import the function by its name"


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith("ops.")])
def test_no_module_imports_an_op(module: str) -> None:
    """Ops are imported by the name that their entry gives, at the first call."""
    assert not [name for name in own(module) if name.split(".")[0] == "ops"]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("registry", set()),
        ("register", {"registry", "errors", "launch", "distributed"}),
        ("distributed", {"registry"}),
        ("__init__", {"registry", "register"}),
    ],
)
def test_registration_knows_what_it_stands_on(module: str, allowed: set[str]) -> None:
    assert own(module) <= allowed


HEAVY = ("triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.flop_counter", "numpy")


@pytest.mark.parametrize("module", ["__init__", "registry", "register", "errors"])
def test_no_costly_import_at_import_time(module: str) -> None:
    early = {name for name, at_import in imports(module) if at_import}
    assert not [name for name in early for heavy in HEAVY if f"{name}.".startswith(f"{heavy}.")]


# --------------------------------------------------------------------------------------------------------------------
# Running it
# --------------------------------------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh process."""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", **environment}
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TIMED = """
import time, torch
start = time.process_time()
import torch_triton_ops
print(time.process_time() - start)
"""


def test_import_is_cheap() -> None:
    """Best of up to five: what else the machine does may slow any one of them."""
    times: list[float] = []
    for _ in range(5):
        times.append(float(python(TIMED)))
        if times[-1] < IMPORT_BUDGET:
            return
    pytest.fail(f"import torch_triton_ops takes {min(times):.2f} s above torch; the budget is {IMPORT_BUDGET:.2f} s")


UNTOUCHED = """
import sys, torch
before = set(sys.modules)
import torch_triton_ops
assert torch.ops.tt.rms_norm.default and torch_triton_ops.specs()
heavy = {heavy!r}
print([m for m in set(sys.modules) - before if any(f"{{m}}.".startswith(f"{{h}}.") for h in heavy)])
print([m for m in sys.modules if m.startswith("torch_triton_ops.ops")])
print(torch.cuda.is_initialized())
"""


def test_import_loads_nothing_costly_and_no_driver() -> None:
    assert python(UNTOUCHED.format(heavy=HEAVY)).splitlines() == ["[]", "[]", "False"]


# Asking for the GPU driver raises, and is remembered in case someone catches it.
NO_DRIVER = """
import torch, triton
from triton.runtime import driver

asked = []


def gone(self):
    asked.append("driver")
    raise RuntimeError("0 active drivers ([]). There should only be one.")


type(driver).active = type(driver).default = property(gone)
import torch_triton_ops

x = torch.randn(4, 8, requires_grad=True)
torch.ops.tt.rms_norm(x, torch.ones(8)).sum().backward()
for spec in torch_triton_ops.specs():
    for sample in list(spec.function("samples")("cpu", torch.float32))[:2]:
        spec.op(*sample.args, **sample.kwargs)
assert x.grad is not None
print("ran", asked, torch.cuda.is_initialized())
"""


def test_cpu_tensors_need_no_driver() -> None:
    assert python(NO_DRIVER, CUDA_VISIBLE_DEVICES="") == "ran [] False"


NO_TRITON = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
import torch, torch_triton_ops

try:
    torch.ops.tt.vector_add(torch.ones(2), torch.ones(2))
except ImportError as error:
    print(error)
"""


def test_missing_triton_is_a_sentence_with_the_fix() -> None:
    said = python(NO_TRITON)
    assert said.startswith("tt::vector_add: Triton cannot be imported (No module named 'triton'")
    assert "pip install 'triton>=3.6'" in said
