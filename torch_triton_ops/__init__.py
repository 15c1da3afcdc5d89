"""Triton kernels as PyTorch operators: `import torch_triton_ops`, then `torch.ops.tt.*`.

Importing registers every op of op_registry.yaml. It touches no GPU driver, compiles nothing and imports no Triton: an op's
module is loaded at its first call.
"""

from __future__ import annotations

import gc as _gc
import importlib as _importlib
from typing import Any as _Any

from torch_triton_ops import register as _register
from torch_triton_ops import registry as _registry
from torch_triton_ops.register import load_registry
from torch_triton_ops.registry import OpSpec, RegistryError, specs

__all__ = ["OpSpec", "RegistryError", "__version__", "load_registry", "specs"]
__version__ = "0.1.0"

# What registration allocates would set off a garbage collection, which walks all of torch: half of this import's time.
_collects = _gc.isenabled()
_gc.disable()
try:
    _register.register(_registry.read_registry(_registry.REGISTRY_FILE, _registry.NAMESPACE))
finally:
    if _collects:
        _gc.enable()


def __getattr__(name: str) -> _Any:
    """`testing` and `offline` are imported where they are first used."""
    if name in ("testing", "offline"):
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
