"""What the elementwise ops share, and the values at which they could differ from torch: ties, zeros, infinities, NaN."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import elementwise

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.float64)


@pytest.mark.parametrize("shapes", [((2,), (2,)), ((), (2,)), ((2,), ()), ((), ()), ((1,), (2, 1))])
def test_result_dtype_is_torchs(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    for a, b in itertools.product(DTYPES, DTYPES):
        x, y = torch.ones(shapes[0], dtype=a), torch.ones(shapes[1], dtype=b)
        assert elementwise.result_dtype(x, y) == torch.result_type(x, y), (a, b)


def test_collapse_addresses_the_same_elements() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    views = [x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :1].expand(2, 3, 4, 5), x.permute(3, 1, 2, 0)]
    for view in views:
        dims = elementwise.collapse(view.shape, [view.stride()])
        again = view.as_strided([n for n, _ in dims], [s for _, (s,) in dims])
        assert torch.equal(again.flatten(), view.flatten())
    assert len(elementwise.collapse(x.shape, [x.stride()])) == 1
    assert elementwise.collapse((4, 1, 6), [(6, 6, 1), (0, 9, 1)]) == [(4, (6, 0)), (6, (1, 1))]
    assert elementwise.collapse((), [()]) == []


def gradients(op: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What torch.ops.tt's op and torch's own give as gradients of a sum, one after the other."""
    found = []
    for namespace in (torch.ops.tt, torch):
        leaves = [t.clone().requires_grad_() for t in inputs]
        getattr(namespace, op)(*leaves).sum().backward()
        found += [t.grad for t in leaves]
    return found


@pytest.mark.parametrize("op", ["maximum", "minimum"])
def test_ties_split_the_gradient(op: str) -> None:
    x, y = torch.tensor([1.0, 2.0, -0.0, float("nan")]), torch.tensor([1.0, 3.0, 0.0, 1.0])
    dx, dy, dx_torch, dy_torch = gradients(op, x, y)
    assert torch.equal(dx, dx_torch)
    assert torch.equal(dy, dy_torch)
    assert dx[0] == dy[0] == dx[2] == 0.5


def test_relu_has_no_gradient_at_zero() -> None:
    dx, dx_torch = gradients("relu", torch.tensor([0.0, -0.0, 1.0, -1.0]))
    assert dx.tolist() == dx_torch.tolist() == [0, 0, 1, 0]


def test_division_of_integers_gives_the_default_dtype() -> None:
    x = torch.tensor([7, -3])
    assert torch.equal(torch.ops.tt.div(x, torch.tensor([2, 4])), torch.tensor([3.5, -0.75]))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.ops.tt.div(x, x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_masked_fill_of_integers_truncates_as_torch() -> None:
    x, mask = torch.arange(4), torch.tensor([True, False, True, False])
    assert torch.equal(torch.ops.tt.masked_fill(x, mask, -2.7), x.masked_fill(mask, -2.7))


# Every op's samples of special values, forward and backward, through the kernels.
SPECIAL = """
import torch
from torch_triton_ops import registry, testing

for name in {ops!r}:
    special = registry.spec(name).function("gpu_samples")
    report = testing.check_op(f"tt::{{name}}", special, device="cpu", dtypes=[torch.float32], checks=["guard"])
    report.raise_if_failed()
    print(name)
"""
OPS = ["add", "sub", "mul", "div", "maximum", "minimum", "relu", "sigmoid", "tanh", "exp", "silu", "gelu"]


def test_special_values_in_the_interpreter(interpreted) -> None:
    assert interpreted("-c", SPECIAL.format(ops=OPS)).split() == OPS


# In half precision tanh and gelu are computed by approximations: every value there is, against fp64.
EVERY_HALF = """
import torch, torch_triton_ops

# the interpreter cuts fp32 off to bf16 where a GPU rounds
for dtype, most in (torch.bfloat16, 1.03), (torch.float16, 0.53):
    x = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    x = x[(x.abs() >= 4 * torch.finfo(dtype).tiny) & (x.abs() <= 7)]
    d = x.double()
    cases = {
        "tanh": (torch.ops.tt.tanh(x), d.tanh()),
        "gelu": (torch.ops.tt.gelu(x), d * torch.erfc(-d / 2**0.5) / 2),
        "gelu_tanh": (torch.ops.tt.gelu(x, "tanh"), d * torch.sigmoid(1.5957691216057308 * (d + 0.044715 * d**3))),
    }
    for name, (got, exact) in cases.items():
        info = torch.finfo(dtype)
        unit = torch.exp2(exact.abs().clamp_min(info.tiny).log2().floor()) * info.eps
        error = ((got - exact) / unit).abs()
        assert x.numel() > 20000 and error.max() < most, (dtype, name, error.max(), x[error.argmax()])
print("done")
"""


def test_every_half_precision_value_is_rounded_nearly_right(interpreted) -> None:
    """Half a unit in the last place is the least there can be, one where numbers are cut off."""
    assert interpreted("-c", EVERY_HALF) == "done"
