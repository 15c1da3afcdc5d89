"""Golden graphs: what Dynamo captures of an op, and what AOTAutograd makes of its forward and backward.

One accept switch: `make accept` (EXPECTTEST_ACCEPT=1) rewrites the expectations; look at the diff.
Graphs are those of CPU tensors, where every op is one node. The names of nodes belong to torch: pinned to its minor version.
"""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, normalize_gm

import torch_triton_ops  # noqa: F401  (registers the ops)

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="golden graphs are those of torch 2.13 (node names change)"
)


def graphs(fn, *args) -> str:
    """The FX graph and the AOT forward and backward graphs of fn, as text."""
    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    out = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward([o for o in out if o.requires_grad], [torch.ones_like(o) for o in out if o.requires_grad])
    parts = [("FX", backend.graphs), ("forward", backend.fw_graphs), ("backward", backend.bw_graphs)]
    texts = []
    for name, found in parts:
        assert len(found) == 1, f"{len(found)} {name} graphs: a graph break"
        text = normalize_gm(found[0].print_readable(print_output=False, include_stride=True))
        texts.append(f"== {name}\n" + "\n".join(line.rstrip() for line in text.splitlines() if line.strip()))
    return "\n".join(texts) + "\n"


def leaf(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype).requires_grad_()


def test_vector_add():
    expecttest.assert_expected_inline(
        graphs(torch.ops.tt.vector_add, leaf(3, 4), leaf(3, 4)),
        """\
== FX
class GraphModule(torch.nn.Module):
    def forward(self, L_args_0_: "f32[3, 4][4, 1]", L_args_1_: "f32[3, 4][4, 1]"):
        l_args_0_ = L_args_0_
        l_args_1_ = L_args_1_
        vector_add: "f32[3, 4][4, 1]" = torch.ops.tt.vector_add(l_args_0_, l_args_1_);  l_args_0_ = l_args_1_ = None
        return (vector_add,)
== forward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[3, 4][4, 1]", primals_2: "f32[3, 4][4, 1]"):
        vector_add: "f32[3, 4][4, 1]" = torch.ops.tt.vector_add.default(primals_1, primals_2);  primals_1 = primals_2 = None
        return (vector_add,)
== backward
class GraphModule(torch.nn.Module):
    def forward(self, tangents_1: "f32[3, 4][4, 1]"):
        return (tangents_1, tangents_1)
""",
    )


def test_rms_norm_saves_what_the_backward_needs():
    expecttest.assert_expected_inline(
        graphs(torch.ops.tt.rms_norm, leaf(3, 8), leaf(8)),
        """\
== FX
class GraphModule(torch.nn.Module):
    def forward(self, L_args_0_: "f32[3, 8][8, 1]", L_args_1_: "f32[8][1]"):
        l_args_0_ = L_args_0_
        l_args_1_ = L_args_1_
        rms_norm: "f32[3, 8][8, 1]" = torch.ops.tt.rms_norm(l_args_0_, l_args_1_);  l_args_0_ = l_args_1_ = None
        return (rms_norm,)
== forward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[3, 8][8, 1]", primals_2: "f32[8][1]"):
        rms_norm_fwd = torch.ops.tt.rms_norm_fwd.default(primals_1, primals_2, 1e-06, 0.0)
        getitem: "f32[3, 8][8, 1]" = rms_norm_fwd[0]
        getitem_1: "f32[3][1]" = rms_norm_fwd[1];  rms_norm_fwd = None
        return (getitem, primals_1, primals_2, getitem_1)
== backward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[3, 8][8, 1]", primals_2: "f32[8][1]", getitem_1: "f32[3][1]", tangents_1: "f32[3, 8][8, 1]"):
        rms_norm_bwd = torch.ops.tt.rms_norm_bwd.default(tangents_1, primals_1, primals_2, getitem_1, 0.0, [True, True]);  tangents_1 = primals_1 = primals_2 = getitem_1 = None
        getitem_2: "f32[3, 8][8, 1]" = rms_norm_bwd[0]
        getitem_3: "f32[8][1]" = rms_norm_bwd[1];  rms_norm_bwd = None
        return (getitem_2, getitem_3)
""",
    )


def test_rms_norm_without_the_weights_gradient():
    weight = torch.ones(8)
    expecttest.assert_expected_inline(
        graphs(lambda x: torch.ops.tt.rms_norm(x, weight), leaf(3, 8)),
        """\
== FX
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[3, 8][8, 1]", L_weight_: "f32[8][1]"):
        l_x_ = L_x_
        l_weight_ = L_weight_
        rms_norm: "f32[3, 8][8, 1]" = torch.ops.tt.rms_norm(l_x_, l_weight_);  l_x_ = l_weight_ = None
        return (rms_norm,)
== forward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[3, 8][8, 1]", primals_2: "f32[8][1]"):
        rms_norm_fwd = torch.ops.tt.rms_norm_fwd.default(primals_1, primals_2, 1e-06, 0.0)
        getitem: "f32[3, 8][8, 1]" = rms_norm_fwd[0]
        getitem_1: "f32[3][1]" = rms_norm_fwd[1];  rms_norm_fwd = None
        return (getitem, primals_1, primals_2, getitem_1)
== backward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[3, 8][8, 1]", primals_2: "f32[8][1]", getitem_1: "f32[3][1]", tangents_1: "f32[3, 8][8, 1]"):
        rms_norm_bwd = torch.ops.tt.rms_norm_bwd.default(tangents_1, primals_1, primals_2, getitem_1, 0.0, [True, False]);  tangents_1 = primals_1 = primals_2 = getitem_1 = None
        getitem_2: "f32[3, 8][8, 1]" = rms_norm_bwd[0];  rms_norm_bwd = None
        return (getitem_2, None)
""",
    )


def test_llama_block_and_loss():
    """Norm, attention, MLP and loss: every op one node, no clone between them, in both directions."""

    def block(x, wq, wk, wv, wo, gate, up, down, head, cos, sin, target):
        tt = torch.ops.tt
        B, S, _ = x.shape
        h = tt.rms_norm(x)
        q = tt.linear(h, wq).view(B, S, 4, 16).transpose(1, 2)
        k = tt.linear(h, wk).view(B, S, 2, 16).transpose(1, 2)
        v = tt.linear(h, wv).view(B, S, 2, 16).transpose(1, 2)
        q, k = tt.rope(q, k, cos, sin)
        x = x + tt.linear(tt.flash_attn(q, k, v, causal=True).transpose(1, 2).reshape(B, S, 64), wo)
        h = tt.rms_norm(x)
        x = x + tt.linear(tt.swiglu(tt.linear(h, gate), tt.linear(h, up)), down)
        return tt.cross_entropy(tt.linear(x, head).view(-1, 32), target)

    args = [leaf(2, 8, 64), leaf(64, 64), leaf(32, 64), leaf(32, 64), leaf(64, 64), leaf(96, 64), leaf(96, 64)]
    args += [leaf(64, 96), leaf(32, 64), torch.ones(8, 16), torch.ones(8, 16), torch.zeros(16, dtype=torch.long)]
    expecttest.assert_expected_inline(graphs(block, *args), """""")
