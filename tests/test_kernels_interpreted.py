"""Every kernel in Triton's interpreter against fp64: values, gradients, layouts, bounds. No GPU is needed.

TRITON_INTERPRET is read when Triton is imported, so each op and dtype runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import registry
from torch_triton_ops.testing import dtype_name

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 400  # seconds


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def every_dtype() -> Iterator[Any]:
    """One process for each of fp32, fp16 and bf16; float8 and integers, of which samples are few, are in the last."""
    own = (torch.float32, torch.float16, torch.bfloat16)
    for spec in registry.specs():
        groups = [[dtype] for dtype in spec.dtypes if dtype in own] or [[]]
        groups[-1] += [dtype for dtype in spec.dtypes if dtype not in own]
        for group in groups:
            yield pytest.param(spec, group, id=f"{spec.name}-{'-'.join(map(dtype_name, group))}")


@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize(("spec", "dtypes"), list(every_dtype()))
def test_kernel(spec: registry.OpSpec, dtypes: list[torch.dtype]) -> None:
    """`guard` compares values and gradients of every sample between guard bands, on poisoned memory."""
    checks = [f"--check={name}" for name in ("guard", "gradients", "strides")]
    options = [f"--op={spec.qualname}", *(f"--dtype={str(dtype).removeprefix('torch.')}" for dtype in dtypes)]
    done = interpreted("-m", "torch_triton_ops.testing", "--device=cpu", *options, *checks)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr[-3000:]}"


def test_the_kernels_are_what_runs() -> None:
    """Without this a suite that ran references would pass too."""
    program = """
import torch, torch_triton_ops
from triton.runtime import interpreter
ran, run = [], interpreter.GridExecutor.__call__
interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: (ran.append(self.fn.__name__), run(self, *args, **kwargs))
print(torch.equal(torch.ops.tt.vector_add(torch.ones(5), torch.ones(5)), torch.full((5,), 2.0)), ran)
"""
    done = interpreted("-c", program)
    assert done.stdout.strip() == "True ['_vector_add_fwd_kernel']", done.stdout + done.stderr[-3000:]
