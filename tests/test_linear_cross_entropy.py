"""linear_cross_entropy and linear_logprob: what one call of the conformance suite does not reach.

Chunks are made small here, so that small inputs need several; the kernels run in an interpreting child process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import launch

ROOT = Path(__file__).resolve().parents[1]

CHUNKED = """
import torch, torch_triton_ops
from torch_triton_ops.ops.linear_cross_entropy import head, linear_cross_entropy_reference, linear_logprob_reference

head._LCE_ROWS_BYTES = 32 * 320 * 4  # 75 rows, 50 of which count: three chunks of 32, the last of which is empty
head._LCE_COLUMNS_BYTES = 256 * 96 * 4  # 300 columns: two chunks

def run(function, *inputs, **options):
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = function(hidden, weight, inputs[3].clone(), bias, **options)
    loss = sum(((i + 2) * o).sum() for i, o in enumerate(out if isinstance(out, tuple) else (out,)))
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))

torch.manual_seed(0)
hidden, weight, bias = torch.randn(75, 40), torch.randn(300, 40), torch.randn(300)
target = torch.randint(0, 300, (75,))
ignored = target.clone()
ignored[::3] = -100
cases = (
    (torch.ops.tt.linear_cross_entropy, linear_cross_entropy_reference, ignored, {}),
    (torch.ops.tt.linear_cross_entropy, linear_cross_entropy_reference, ignored, {"reduction": "none", "z_loss": 0.01}),
    (torch.ops.tt.linear_logprob, linear_logprob_reference, target, {"temperature": 0.7}),
)
for op, reference, t, options in cases:
    got = run(op, hidden, weight, bias, t, **options)
    want = run(reference, hidden.double(), weight.double(), bias.double(), t, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))
print("right")
"""


def test_chunks_of_rows_and_of_the_vocabulary(interpreted) -> None:
    assert interpreted("-c", CHUNKED) == "right"


def head_of(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden, weight = (torch.randn(n, 8, dtype=dtype, requires_grad=True) for n in (rows, 11))
    return hidden, weight, torch.randint(0, 11, (rows,))


def test_backward_twice_through_one_graph() -> None:
    """The first backward gives the gradients of the forward away; the second computes them again."""
    hidden, weight, target = head_of()
    loss = torch.ops.tt.linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.skipif(launch.INTERPRET, reason="the reference is what is patched")
@pytest.mark.parametrize(
    ("dtype", "reduction", "at_once"),
    [
        (torch.bfloat16, "mean", True),
        (torch.float32, "sum", True),
        (torch.float16, "mean", False),
        (torch.float32, "none", False),
    ],
)
def test_where_the_gradient_is_computed(
    dtype: torch.dtype, reduction: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward, unless every row has an upstream gradient of its own or the dtype has no range for a later factor."""
    hidden, weight, target = head_of(dtype=dtype)
    found = torch.ops.tt.linear_cross_entropy_fwd
    calls = []
    monkeypatch.setattr(torch.ops.tt, "linear_cross_entropy_fwd", lambda *a: (calls.append(a[-1]), found(*a))[1])
    torch.ops.tt.linear_cross_entropy(hidden, weight.detach(), target, reduction=reduction).sum().backward()
    assert calls == [[at_once, False, False]]
    with torch.no_grad():
        torch.ops.tt.linear_cross_entropy(hidden, weight, target)
    assert len(calls) == 1


def test_a_large_loss_scale_in_float16() -> None:
    """Gradients of a mean over many rows survive, as torch's do: the scale is multiplied in before they are rounded."""
    hidden, weight, target = head_of(rows=512, dtype=torch.float16)
    (torch.ops.tt.linear_cross_entropy(hidden, weight, target) * 65536).backward()
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), target) * 65536
    want = torch.autograd.grad(exact, hidden)[0].double()
    torch.testing.assert_close(hidden.grad.double(), want, rtol=2e-3, atol=2e-3)


def test_all_rows_ignored() -> None:
    """As in torch: the mean of nothing is NaN, its gradient zero."""
    hidden, weight, target = head_of()
    loss = torch.ops.tt.linear_cross_entropy(hidden, weight, torch.full_like(target, -100))
    loss.backward()
    assert loss.isnan()
    assert not hidden.grad.any()
    assert not weight.grad.any()
