"""Every kernel in Triton's interpreter against fp64: values, gradients, layouts, bounds. No GPU is needed.

TRITON_INTERPRET is read when Triton is imported, so each op and dtype runs in a process of its own: the fork of one that has
imported everything, since imports would take longer than most kernels.
"""

from __future__ import annotations

import json
import os
import select
import signal
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
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

# Reads [arguments of torch_triton_ops.testing, file for its output] from each line, answers with its status.
SERVER = """
import json, os, sys, traceback
import sympy, torch.fx.experimental.symbolic_shapes  # imported by a first gradient
from torch_triton_ops import registry, testing
from triton_tutorial.interpreted import quicken
quicken()
for spec in registry.specs():
    spec.module
for line in sys.stdin:
    arguments, output = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(output, "w")
        try:
            status = testing.main(arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Interpreter:
    """Runs `python -m torch_triton_ops.testing` with TRITON_INTERPRET=1."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], output: Path) -> int:
        """The status of testing.main(arguments); what it prints goes to `output`."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", SERVER],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, str(output)]) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self.stop()
            pytest.fail(f"not done after {TIMEOUT} s: {' '.join(arguments)}\n{output.read_text()}")
        return int(self.process.stdout.readline())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    server = Interpreter()
    yield server
    server.stop()


def every_dtype() -> Iterator[Any]:
    for spec in registry.specs():
        for dtype in spec.dtypes:
            # fp16 takes bf16's way through a kernel: a quarter of the samples, in one layout, proves its loads and stores
            parts = 4 if dtype == torch.float16 and torch.bfloat16 in spec.dtypes else 1
            yield pytest.param(spec, dtype, parts, id=f"{spec.name}-{dtype_name(dtype)}")


@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize(("spec", "dtype", "parts"), list(every_dtype()))
def test_kernel(
    spec: registry.OpSpec, dtype: torch.dtype, parts: int, interpreter: Interpreter, tmp_path: Path
) -> None:
    """`guard` compares values and gradients of every sample between guard bands, on poisoned memory. `gradients` adds which of
    them are wanted and how their upstream lies, which no dtype changes."""
    names = ["guard"]
    if parts == 1:
        names.append("strides")
    if dtype == spec.dtypes[0]:
        names.append("gradients")
    checks = [f"--check={name}" for name in names]
    samples = [f"--dtype={str(dtype).removeprefix('torch.')}", "--part", "0", str(parts)]
    output = tmp_path / "output"
    status = interpreter.run(["--device=cpu", f"--op={spec.qualname}", *samples, *checks], output)
    assert status == 0, f"\n{output.read_text()}"


def test_the_kernels_are_what_runs() -> None:
    """Without this a suite that ran references would pass too."""
    program = """
import torch, torch_triton_ops
from triton.runtime import interpreter
ran, run = [], interpreter.GridExecutor.__call__
interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: (ran.append(self.fn.__name__), run(self, *args, **kwargs))
print(torch.equal(torch.ops.tt.vector_add(torch.ones(5), torch.ones(5)), torch.full((5,), 2.0)), ran)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.stdout.strip() == "True ['_vector_add_fwd_kernel']", done.stdout + done.stderr[-3000:]
