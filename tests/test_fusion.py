"""Dropout's random numbers: that they are Philox, that a mask depends on seed, offset and index alone, and its statistics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import torch_triton_ops  # noqa: F401  (registers the ops)
from torch_triton_ops import fusion, offline
from torch_triton_ops import launch as tt_launch

ROOT = Path(__file__).resolve().parents[1]
tt = torch.ops.tt


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """The vectors that Random123, the authors' library, is tested with."""
    found = fusion.philox_words(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in found) == words


INTERPRETED = """
import importlib, torch
from torch_triton_ops import fusion
from torch_triton_ops.launch import launch
from torch_triton_ops.ops.dropout import _dropout_fwd_kernel

seed, offset, p, n = 2**45 + 11, 2**35 + 2, 0.3, 700
x = torch.ones(n)
want = fusion.keep_reference(x, p, seed, offset)
for block, grouped in ((8, True), (128, True), (1024, True), (64, False)):
    out = torch.empty(n)
    constexprs = dict(THRESHOLD=fusion.drop_threshold(p), SCALE=1.0, GROUPED=grouped, BLOCK_M=1, BLOCK_N=block)
    launch(_dropout_fwd_kernel, (-(-n // block),), x, out, 1, n, n, *fusion.split(seed), *fusion.split(offset), **constexprs)
    assert torch.equal(out != 0, want), (block, grouped)

x = torch.ones(10, 200)
mask = torch.ops.tt.dropout(x, p, seed, offset) != 0
for other in (x.t().contiguous().t(), torch.ones(10, 203)[:, :200], x.view(-1)):
    assert torch.equal((torch.ops.tt.dropout(other, p, seed, offset) != 0).view(10, 200), mask)
fused = torch.ops.tt.bias_dropout_residual(x, torch.zeros(200), torch.zeros(10, 200), p, seed, offset)
assert torch.equal(fused != 0, mask)
leaf = torch.ones(10, 200, requires_grad=True)
torch.ops.tt.dropout(leaf, p, seed, offset).sum().backward()
assert torch.equal(leaf.grad != 0, mask)

# bias gradients from several programs and several rows of partial sums
x, bias, dout = torch.randn(70, 136), torch.randn(136), torch.randn(70, 136)
needs = [True, True]
for name, args in (
    ("bias_gelu_bwd", (dout, x, bias, "tanh", needs)),
    ("bias_dropout_residual_bwd", (dout, bias, p, seed, offset, torch.float32, needs)),
):
    module = importlib.import_module("torch_triton_ops.ops." + name.removesuffix("_bwd"))
    found, want = getattr(torch.ops.tt, name)(*args), getattr(module, name + "_reference")(*args)
    for got, expected in zip(found, want):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
print("done")
"""


def test_the_kernels_mask_is_the_references_whatever_the_block_and_the_strides(interpreted):
    assert interpreted("-c", INTERPRETED) == "done"


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_scale_and_mean(p):
    n = 2**18
    out = tt.dropout(torch.ones(n), p, 1234)
    kept = out != 0
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    # the same share in each of the eight numbers of a counter
    shares = kept.view(-1, 8).double().mean(0)
    assert ((shares - (1 - p)).abs() < 5 * deviation * math.sqrt(8)).all(), shares


@pytest.mark.parametrize(("seed", "offset"), [(6, 0), (5, 1), (5 + 2**32, 0), (5, 2**32)])
def test_other_seeds_and_offsets_are_independent(seed, offset):
    """Two masks of 2**18 elements agree where independent ones would, at every small shift of one against the other."""
    n = 2**18
    x = torch.ones(n)
    a, b = (tt.dropout(x, 0.5, *pair) != 0 for pair in ((5, 0), (seed, offset)))
    for shift in (0, 1, 4, 8, 64):
        agree = (a[shift:] == b[: n - shift]).double().mean().item()
        assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(n - shift), shift
    neighbours = (a[1:] == a[:-1]).double().mean().item()
    assert abs(neighbours - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_p_zero_and_one_are_exact():
    x = torch.tensor([1.0, -3.7, float("inf"), float("nan"), 0.1])
    torch.testing.assert_close(tt.dropout(x, 0.0, 3), x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tt.dropout(x, 1.0, 3), torch.zeros(5))
    residual = torch.randn(5)
    assert torch.equal(tt.bias_dropout_residual(x, None, residual, 1.0, 3), residual)


def test_a_new_seed_compiles_nothing_new():
    """Dynamo makes an int symbolic when it sees a second value; from then on the same graph serves every seed."""
    counter = CompileCounter()

    def step(x, residual, seed, offset):
        return tt.bias_dropout_residual(tt.dropout(x, 0.1, seed, offset), None, residual, 0.2, seed, offset + 1)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    x, residual = torch.randn(4, 24), torch.randn(4, 24)
    pairs = [(7, 2), (8, 3), (123456789, 5), (2**40 + 1, 2**33), (16, 1 << 50)]
    counts = []
    for seed, offset in pairs:
        assert torch.equal(compiled(x, residual, seed, offset), step(x, residual, seed, offset))
        counts.append(counter.frame_count)
    assert counts[1:] == [2] * (len(pairs) - 1), counts


def test_a_new_seed_is_no_new_kernel():
    x = torch.empty(64, 64, device="meta")

    def kernels(*seeds):
        return len(offline.record(lambda: [tt.dropout(x, 0.1, seed, 0) for seed in seeds], 90))

    assert kernels(1, 2, 16, 12345) == 1
    assert kernels(1, 2**40, 2**61) == 1  # a seed goes in as two 32-bit numbers


@pytest.mark.skipif(tt_launch.INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("shape", [(300, 4096), (5, 33)])
def test_symbolic_sizes_stay_out_of_the_constexprs(shape):
    """Under dynamic shapes a comparison of sizes is symbolic, too, and a kernel cannot be compiled for it."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def symbolic(*sizes):
        context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(sizes))
        return mode.from_tensor(torch.empty(sizes, device="meta"), symbolic_context=context)

    x, bias = symbolic(*shape), symbolic(shape[1])
    with mode, tt_launch.recording(90) as recorded:
        tt.dropout(x.t(), 0.1, 1)
        tt.bias_gelu_bwd(x, x, bias, "tanh", [True, True])
        tt.bias_dropout_residual(x, bias, x, 0.1, 1)
        tt.bias_dropout_residual_bwd(x, bias, 0.1, 1, 0, torch.float32, [True, True])
        tt.fused_add_mul_bwd(x, x, x, bias)
    assert len(recorded.launches) == 7
    for launch in recorded.launches:
        assert all(type(c) in (int, float, bool) for c in launch.constexprs.values()), launch
