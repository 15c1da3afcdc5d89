"""check_op on CPU for every op of the registry: `rms_norm-bf16-M3_N33` is one sample, `rms_norm-bf16` what costs more.

On CPU an op runs its reference, so this proves the registration. tests/test_kernels_interpreted.py proves the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import registry
from torch_triton_ops.testing import CHECKS, ONCE, PER_SAMPLE, check_op, dtype_name, samples_of

OPS = registry.specs()
SEVERAL = tuple(name for name in CHECKS if name not in PER_SAMPLE + ONCE)


def every_sample() -> Iterator[Any]:
    for spec in OPS:
        for dtype in spec.dtypes:
            samples = samples_of(spec, "cpu", dtype)
            for i, sample in enumerate(samples):
                part = (i, len(samples))
                if sample.slow_in_interpreter:
                    continue  # large, for the kernels on a GPU: the reference gains nothing from them
                if dtype is not spec.dtypes[0] and i:
                    continue  # what is registered differs little between dtypes; the kernels are interpreted in all of them
                yield pytest.param(spec, dtype, part, id=f"{spec.name}-{dtype_name(dtype)}-{sample.id}")


def first_and_last_dtype() -> Iterator[Any]:
    for spec in OPS:
        for dtype in dict.fromkeys((spec.dtypes[0], spec.dtypes[-1])):
            yield pytest.param(spec, dtype, id=f"{spec.name}-{dtype_name(dtype)}")


@pytest.mark.parametrize(("spec", "dtype", "part"), list(every_sample()))
def test_sample(spec: registry.OpSpec, dtype: torch.dtype, part: tuple[int, int]) -> None:
    check_op(spec.op, device="cpu", dtypes=[dtype], checks=PER_SAMPLE, part=part).raise_if_failed()


@pytest.mark.parametrize(("spec", "dtype"), list(first_and_last_dtype()))
def test_representative_samples(spec: registry.OpSpec, dtype: torch.dtype) -> None:
    check_op(spec.op, device="cpu", dtypes=[dtype], checks=SEVERAL).raise_if_failed()


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_once(spec: registry.OpSpec) -> None:
    """Gradcheck in fp64, wrong calls, and whether the samples reach the corners."""
    report = check_op(spec.op, device="cpu", checks=ONCE)
    report.raise_if_failed()
    missing = [r.detail for r in report.skipped if r.check == "coverage"]
    assert not missing, f"{spec.name}_samples: {'; '.join(missing)}"
    assert any(r.check == "errors" and r.passed for r in report.results), f"{spec.name} has no error samples"
