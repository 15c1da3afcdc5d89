"""`cast` bit by bit: every float8 and half-precision value, random fp32 bits; its reference against torch's own `to`.

The error budget of the conformance suite allows a unit in the last place, which for a float8 is much.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import registry

DTYPES = registry.spec("cast").dtypes
FLOATING = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)


def values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of 8 and 16 bits; 2**16 random ones, in their bits, of 32."""
    bits = 8 * dtype.itemsize
    if bits <= 16:
        codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    else:
        codes = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
    return codes.to({8: torch.int8, 16: torch.int16, 32: torch.int32}[bits]).view(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def wrong(got: torch.Tensor, want: torch.Tensor) -> int:
    """Elements that differ in a bit; two NaNs are the same."""
    both_nan = got.cpu().isnan() & want.cpu().isnan() if got.is_floating_point() else torch.zeros((), dtype=torch.bool)
    return int(((bits(got) != bits(want)) & ~both_nan).sum())


def mismatches(device: str) -> Iterator[str]:
    """Conversions on `device` that differ from the reference.

    The interpreter is spared two that it gets wrong: it truncates what should be rounded to bf16, and loses bf16's
    subnormal values.
    """
    reference = registry.spec("cast").function("reference")
    for source in DTYPES:
        x = values(source)
        if device == "cpu" and source == torch.bfloat16:
            x = x[~(x.abs() < torch.finfo(source).tiny) | (x == 0)]
        for to in DTYPES:
            if device == "cpu" and to == torch.bfloat16:
                continue
            if count := wrong(torch.ops.tt.cast(x.to(device), to), reference(x, to)):
                yield f"{source} to {to}: {count} of {x.numel()}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_value_on_the_gpu() -> None:
    assert list(mismatches("cuda")) == []


def test_every_value_in_the_interpreter(interpreted) -> None:
    """The conversions by integer arithmetic, which GPUs before sm_89 run."""
    interpreted(__file__)


@pytest.mark.parametrize("to", FLOATING)
@pytest.mark.parametrize("source", FLOATING)
def test_reference_is_torchs_own_conversion(source: torch.dtype, to: torch.dtype) -> None:
    x = values(source)
    if to == torch.float8_e4m3fn and torch.__version__ < "2.13":
        x = x[(x.float().abs() <= 464) | x.isnan()]  # older ones do not saturate
    assert wrong(registry.spec("cast").function("reference")(x, to), x.to(to)) == 0


@pytest.mark.parametrize("to", [torch.int8, torch.int32])
def test_out_of_an_integers_range(to: torch.dtype) -> None:
    limits = torch.iinfo(to)
    x = torch.tensor([1e10, -1e10, float("inf"), float("-inf"), float("nan"), 2.9, -2.9])
    want = [limits.max, limits.min, limits.max, limits.min, 0, 2, -2]
    assert torch.ops.tt.cast(x, to).tolist() == want


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    found = list(mismatches("cpu"))
    print("\n".join(found))
    sys.exit(bool(found))
