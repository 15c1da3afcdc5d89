"""Golden graphs: what Dynamo captures of an op, and what AOTAutograd makes of its forward and backward.

One accept switch: `make accept` (EXPECTTEST_ACCEPT=1) rewrites the expectations; look at the diff.
Graphs are those of CPU tensors, where every op is one node. The names of nodes belong to torch: pinned to its minor version.
"""

from __future__ import annotations

import re

import expecttest
import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, normalize_gm

import torch_triton_ops
from torch_triton_ops.cases import BenchCase
from triton_tutorial import explain

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


def calls():
    """One call of every op; of those with kernels of their own for an option, that option too."""
    for spec in torch_triton_ops.specs():
        yield pytest.param(spec, next(iter(spec.function("bench_cases")())), id=spec.name)
    spec = next(s for s in torch_triton_ops.specs() if s.name == "dpo_loss")

    def aot(device, dtype):
        return [torch.empty(21, device=device, dtype=dtype) for _ in range(4)], {"loss_type": "aot"}

    yield pytest.param(spec, BenchCase("aot", aot, torch.float32), id="dpo_loss-aot")


@pytest.mark.parametrize(("spec", "case"), list(calls()))
def test_inlined_kernels_write_no_input(spec, case):
    """torch.compile presumes that a kernel writes where its analysis cannot follow it (a scatter, say): to an op's inputs then, too,
    which it copies at best."""
    text = explain.graph(spec, case, 90)
    mutated = {f"arg{i}" for i, a in enumerate(spec.arguments) if a.mutated}
    for names, written in re.findall(r"triton \w+\[.*?\]\((.*?)\), writes (.*)", text):
        given = dict(name.strip().split("=", 1) for name in names.split(", "))
        wrong = [
            name for name in written.split(", ") if re.fullmatch(r"arg\d+", given[name]) and given[name] not in mutated
        ]
        assert not wrong, text


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
    args += [leaf(64, 96), leaf(32, 64), torch.ones(8, 8), torch.ones(8, 8), torch.zeros(16, dtype=torch.long)]
    expecttest.assert_expected_inline(
        graphs(block, *args),
        """\
== FX
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[2, 8, 64][512, 64, 1]", L_wq_: "f32[64, 64][64, 1]", L_wk_: "f32[32, 64][64, 1]", L_wv_: "f32[32, 64][64, 1]", L_cos_: "f32[8, 8][8, 1]", L_sin_: "f32[8, 8][8, 1]", L_wo_: "f32[64, 64][64, 1]", L_gate_: "f32[96, 64][64, 1]", L_up_: "f32[96, 64][64, 1]", L_down_: "f32[64, 96][96, 1]", L_head_: "f32[32, 64][64, 1]", L_target_: "i64[16][1]"):
        l_x_ = L_x_
        l_wq_ = L_wq_
        l_wk_ = L_wk_
        l_wv_ = L_wv_
        l_cos_ = L_cos_
        l_sin_ = L_sin_
        l_wo_ = L_wo_
        l_gate_ = L_gate_
        l_up_ = L_up_
        l_down_ = L_down_
        l_head_ = L_head_
        l_target_ = L_target_
        h: "f32[2, 8, 64][512, 64, 1]" = torch.ops.tt.rms_norm(l_x_)
        linear: "f32[2, 8, 64][512, 64, 1]" = torch.ops.tt.linear(h, l_wq_);  l_wq_ = None
        view: "f32[2, 8, 4, 16][512, 64, 16, 1]" = linear.view(2, 8, 4, 16);  linear = None
        q: "f32[2, 4, 8, 16][512, 16, 64, 1]" = view.transpose(1, 2);  view = None
        linear_1: "f32[2, 8, 32][256, 32, 1]" = torch.ops.tt.linear(h, l_wk_);  l_wk_ = None
        view_1: "f32[2, 8, 2, 16][256, 32, 16, 1]" = linear_1.view(2, 8, 2, 16);  linear_1 = None
        k: "f32[2, 2, 8, 16][256, 16, 32, 1]" = view_1.transpose(1, 2);  view_1 = None
        linear_2: "f32[2, 8, 32][256, 32, 1]" = torch.ops.tt.linear(h, l_wv_);  h = l_wv_ = None
        view_2: "f32[2, 8, 2, 16][256, 32, 16, 1]" = linear_2.view(2, 8, 2, 16);  linear_2 = None
        v: "f32[2, 2, 8, 16][256, 16, 32, 1]" = view_2.transpose(1, 2);  view_2 = None
        rope = torch.ops.tt.rope(q, k, l_cos_, l_sin_);  q = k = l_cos_ = l_sin_ = None
        q_1: "f32[2, 4, 8, 16][512, 16, 64, 1]" = rope[0]
        k_1: "f32[2, 2, 8, 16][256, 16, 32, 1]" = rope[1];  rope = None
        flash_attn: "f32[2, 4, 8, 16][512, 16, 64, 1]" = torch.ops.tt.flash_attn(q_1, k_1, v, causal = True);  q_1 = k_1 = v = None
        transpose_3: "f32[2, 8, 4, 16][512, 64, 16, 1]" = flash_attn.transpose(1, 2);  flash_attn = None
        reshape: "f32[2, 8, 64][512, 64, 1]" = transpose_3.reshape(2, 8, 64);  transpose_3 = None
        linear_3: "f32[2, 8, 64][512, 64, 1]" = torch.ops.tt.linear(reshape, l_wo_);  reshape = l_wo_ = None
        x: "f32[2, 8, 64][512, 64, 1]" = l_x_ + linear_3;  l_x_ = linear_3 = None
        h_1: "f32[2, 8, 64][512, 64, 1]" = torch.ops.tt.rms_norm(x)
        linear_4: "f32[2, 8, 96][768, 96, 1]" = torch.ops.tt.linear(h_1, l_gate_);  l_gate_ = None
        linear_5: "f32[2, 8, 96][768, 96, 1]" = torch.ops.tt.linear(h_1, l_up_);  h_1 = l_up_ = None
        swiglu: "f32[2, 8, 96][768, 96, 1]" = torch.ops.tt.swiglu(linear_4, linear_5);  linear_4 = linear_5 = None
        linear_6: "f32[2, 8, 64][512, 64, 1]" = torch.ops.tt.linear(swiglu, l_down_);  swiglu = l_down_ = None
        x_1: "f32[2, 8, 64][512, 64, 1]" = x + linear_6;  x = linear_6 = None
        linear_7: "f32[2, 8, 32][256, 32, 1]" = torch.ops.tt.linear(x_1, l_head_);  x_1 = l_head_ = None
        view_3: "f32[16, 32][32, 1]" = linear_7.view(-1, 32);  linear_7 = None
        cross_entropy: "f32[][]" = torch.ops.tt.cross_entropy(view_3, l_target_);  view_3 = l_target_ = None
        return (cross_entropy,)
== forward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[2, 8, 64][512, 64, 1]", primals_2: "f32[64, 64][64, 1]", primals_3: "f32[32, 64][64, 1]", primals_4: "f32[32, 64][64, 1]", primals_5: "f32[8, 8][8, 1]", primals_6: "f32[8, 8][8, 1]", primals_7: "f32[64, 64][64, 1]", primals_8: "f32[96, 64][64, 1]", primals_9: "f32[96, 64][64, 1]", primals_10: "f32[64, 96][96, 1]", primals_11: "f32[32, 64][64, 1]", primals_12: "i64[16][1]"):
        rms_norm_fwd = torch.ops.tt.rms_norm_fwd.default(primals_1, None, 1e-06, 0.0)
        getitem: "f32[2, 8, 64][512, 64, 1]" = rms_norm_fwd[0]
        getitem_1: "f32[2, 8][8, 1]" = rms_norm_fwd[1];  rms_norm_fwd = None
        linear_fwd = torch.ops.tt.linear_fwd.default(getitem, primals_2, None, 'none')
        getitem_2: "f32[2, 8, 64][512, 64, 1]" = linear_fwd[0];  linear_fwd = None
        view: "f32[2, 8, 4, 16][512, 64, 16, 1]" = torch.ops.aten.view.default(getitem_2, [2, 8, 4, 16]);  getitem_2 = None
        transpose: "f32[2, 4, 8, 16][512, 16, 64, 1]" = torch.ops.aten.transpose.int(view, 1, 2);  view = None
        linear_fwd_1 = torch.ops.tt.linear_fwd.default(getitem, primals_3, None, 'none')
        getitem_4: "f32[2, 8, 32][256, 32, 1]" = linear_fwd_1[0];  linear_fwd_1 = None
        view_1: "f32[2, 8, 2, 16][256, 32, 16, 1]" = torch.ops.aten.view.default(getitem_4, [2, 8, 2, 16]);  getitem_4 = None
        transpose_1: "f32[2, 2, 8, 16][256, 16, 32, 1]" = torch.ops.aten.transpose.int(view_1, 1, 2);  view_1 = None
        linear_fwd_2 = torch.ops.tt.linear_fwd.default(getitem, primals_4, None, 'none')
        getitem_6: "f32[2, 8, 32][256, 32, 1]" = linear_fwd_2[0];  linear_fwd_2 = None
        view_2: "f32[2, 8, 2, 16][256, 32, 16, 1]" = torch.ops.aten.view.default(getitem_6, [2, 8, 2, 16]);  getitem_6 = None
        transpose_2: "f32[2, 2, 8, 16][256, 16, 32, 1]" = torch.ops.aten.transpose.int(view_2, 1, 2);  view_2 = None
        rope = torch.ops.tt.rope.default(transpose, transpose_1, primals_5, primals_6);  transpose = transpose_1 = None
        getitem_8: "f32[2, 4, 8, 16][512, 16, 64, 1]" = rope[0]
        getitem_9: "f32[2, 2, 8, 16][256, 16, 32, 1]" = rope[1];  rope = None
        flash_attn_fwd = torch.ops.tt.flash_attn_fwd.default(getitem_8, getitem_9, transpose_2, True, None, -1, -1, 0.0, None, None, None)
        getitem_10: "f32[2, 4, 8, 16][512, 16, 64, 1]" = flash_attn_fwd[0]
        getitem_11: "f32[2, 4, 8][32, 8, 1]" = flash_attn_fwd[1];  flash_attn_fwd = None
        detach: "f32[2, 4, 8, 16][512, 16, 64, 1]" = torch.ops.aten.detach.default(getitem_10)
        transpose_3: "f32[2, 8, 4, 16][512, 64, 16, 1]" = torch.ops.aten.transpose.int(getitem_10, 1, 2);  getitem_10 = None
        view_3: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(transpose_3, [2, 8, 64]);  transpose_3 = None
        linear_fwd_3 = torch.ops.tt.linear_fwd.default(view_3, primals_7, None, 'none')
        getitem_12: "f32[2, 8, 64][512, 64, 1]" = linear_fwd_3[0];  linear_fwd_3 = None
        add: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(primals_1, getitem_12);  getitem_12 = None
        rms_norm_fwd_1 = torch.ops.tt.rms_norm_fwd.default(add, None, 1e-06, 0.0)
        getitem_14: "f32[2, 8, 64][512, 64, 1]" = rms_norm_fwd_1[0]
        getitem_15: "f32[2, 8][8, 1]" = rms_norm_fwd_1[1];  rms_norm_fwd_1 = None
        linear_fwd_4 = torch.ops.tt.linear_fwd.default(getitem_14, primals_8, None, 'none')
        getitem_16: "f32[2, 8, 96][768, 96, 1]" = linear_fwd_4[0];  linear_fwd_4 = None
        linear_fwd_5 = torch.ops.tt.linear_fwd.default(getitem_14, primals_9, None, 'none')
        getitem_18: "f32[2, 8, 96][768, 96, 1]" = linear_fwd_5[0];  linear_fwd_5 = None
        swiglu: "f32[2, 8, 96][768, 96, 1]" = torch.ops.tt.swiglu.default(getitem_16, getitem_18)
        linear_fwd_6 = torch.ops.tt.linear_fwd.default(swiglu, primals_10, None, 'none')
        getitem_20: "f32[2, 8, 64][512, 64, 1]" = linear_fwd_6[0];  linear_fwd_6 = None
        add_1: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(add, getitem_20);  getitem_20 = None
        linear_fwd_7 = torch.ops.tt.linear_fwd.default(add_1, primals_11, None, 'none')
        getitem_22: "f32[2, 8, 32][256, 32, 1]" = linear_fwd_7[0];  linear_fwd_7 = None
        view_4: "f32[16, 32][32, 1]" = torch.ops.aten.view.default(getitem_22, [-1, 32]);  getitem_22 = None
        cross_entropy_fwd = torch.ops.tt.cross_entropy_fwd.default(view_4, primals_12, None, -100, 0.0, 0.0, 0.0, 'mean')
        getitem_24: "f32[][]" = cross_entropy_fwd[0]
        getitem_25: "f32[2, 16][16, 1]" = cross_entropy_fwd[1]
        getitem_26: "f32[1][1]" = cross_entropy_fwd[2];  cross_entropy_fwd = None
        view_8: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(add_1, [16, 64]);  add_1 = None
        view_11: "f32[16, 96][96, 1]" = torch.ops.aten.view.default(swiglu, [16, 96]);  swiglu = None
        view_14: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(getitem_14, [16, 64]);  getitem_14 = None
        view_20: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(view_3, [16, 64]);  view_3 = None
        detach_1: "f32[2, 4, 8, 16][512, 16, 64, 1]" = torch.ops.aten.detach.default(detach);  detach = None
        view_25: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(getitem, [16, 64]);  getitem = None
        return (getitem_24, primals_1, primals_2, primals_3, primals_4, primals_5, primals_6, primals_7, primals_8, primals_9, primals_10, primals_11, primals_12, getitem_1, transpose_2, getitem_8, getitem_9, getitem_11, add, getitem_15, getitem_16, getitem_18, view_4, getitem_25, getitem_26, view_8, view_11, view_14, view_20, detach_1, view_25)
== backward
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[2, 8, 64][512, 64, 1]", primals_2: "f32[64, 64][64, 1]", primals_3: "f32[32, 64][64, 1]", primals_4: "f32[32, 64][64, 1]", primals_5: "f32[8, 8][8, 1]", primals_6: "f32[8, 8][8, 1]", primals_7: "f32[64, 64][64, 1]", primals_8: "f32[96, 64][64, 1]", primals_9: "f32[96, 64][64, 1]", primals_10: "f32[64, 96][96, 1]", primals_11: "f32[32, 64][64, 1]", primals_12: "i64[16][1]", getitem_1: "f32[2, 8][8, 1]", transpose_2: "f32[2, 2, 8, 16][256, 16, 32, 1]", getitem_8: "f32[2, 4, 8, 16][512, 16, 64, 1]", getitem_9: "f32[2, 2, 8, 16][256, 16, 32, 1]", getitem_11: "f32[2, 4, 8][32, 8, 1]", add: "f32[2, 8, 64][512, 64, 1]", getitem_15: "f32[2, 8][8, 1]", getitem_16: "f32[2, 8, 96][768, 96, 1]", getitem_18: "f32[2, 8, 96][768, 96, 1]", view_4: "f32[16, 32][32, 1]", getitem_25: "f32[2, 16][16, 1]", getitem_26: "f32[1][1]", view_8: "f32[16, 64][64, 1]", view_11: "f32[16, 96][96, 1]", view_14: "f32[16, 64][64, 1]", view_20: "f32[16, 64][64, 1]", detach_1: "f32[2, 4, 8, 16][512, 16, 64, 1]", view_25: "f32[16, 64][64, 1]", tangents_1: "f32[][]"):
        cross_entropy_bwd: "f32[16, 32][32, 1]" = torch.ops.tt.cross_entropy_bwd.default(tangents_1, view_4, primals_12, getitem_25, getitem_26, None, -100, 0.0, 0.0, 0.0, 'mean');  tangents_1 = view_4 = primals_12 = getitem_25 = getitem_26 = None
        view_5: "f32[2, 8, 32][256, 32, 1]" = torch.ops.aten.view.default(cross_entropy_bwd, [2, 8, 32]);  cross_entropy_bwd = None
        view_6: "f32[16, 32][32, 1]" = torch.ops.aten.view.default(view_5, [16, 32]);  view_5 = None
        matmul: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_6, primals_11);  primals_11 = None
        view_7: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul, [2, 8, 64]);  matmul = None
        t: "f32[32, 16][1, 32]" = torch.ops.aten.t.default(view_6);  view_6 = None
        matmul_1: "f32[32, 64][64, 1]" = torch.ops.tt.matmul.default(t, view_8);  t = view_8 = None
        view_9: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(view_7, [16, 64])
        matmul_2: "f32[16, 96][96, 1]" = torch.ops.tt.matmul.default(view_9, primals_10);  primals_10 = None
        view_10: "f32[2, 8, 96][768, 96, 1]" = torch.ops.aten.view.default(matmul_2, [2, 8, 96]);  matmul_2 = None
        t_1: "f32[64, 16][1, 64]" = torch.ops.aten.t.default(view_9);  view_9 = None
        matmul_3: "f32[64, 96][96, 1]" = torch.ops.tt.matmul.default(t_1, view_11);  t_1 = view_11 = None
        swiglu_bwd = torch.ops.tt.swiglu_bwd.default(view_10, getitem_16, getitem_18);  view_10 = getitem_16 = getitem_18 = None
        getitem_27: "f32[2, 8, 96][768, 96, 1]" = swiglu_bwd[0]
        getitem_28: "f32[2, 8, 96][768, 96, 1]" = swiglu_bwd[1];  swiglu_bwd = None
        view_12: "f32[16, 96][96, 1]" = torch.ops.aten.view.default(getitem_28, [16, 96]);  getitem_28 = None
        matmul_4: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_12, primals_9);  primals_9 = None
        view_13: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul_4, [2, 8, 64]);  matmul_4 = None
        t_2: "f32[96, 16][1, 96]" = torch.ops.aten.t.default(view_12);  view_12 = None
        matmul_5: "f32[96, 64][64, 1]" = torch.ops.tt.matmul.default(t_2, view_14);  t_2 = None
        view_15: "f32[16, 96][96, 1]" = torch.ops.aten.view.default(getitem_27, [16, 96]);  getitem_27 = None
        matmul_6: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_15, primals_8);  primals_8 = None
        view_16: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul_6, [2, 8, 64]);  matmul_6 = None
        t_3: "f32[96, 16][1, 96]" = torch.ops.aten.t.default(view_15);  view_15 = None
        matmul_7: "f32[96, 64][64, 1]" = torch.ops.tt.matmul.default(t_3, view_14);  t_3 = view_14 = None
        add_2: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(view_13, view_16);  view_13 = view_16 = None
        rms_norm_bwd = torch.ops.tt.rms_norm_bwd.default(add_2, add, None, getitem_15, 0.0, [True, False]);  add_2 = add = getitem_15 = None
        getitem_29: "f32[2, 8, 64][512, 64, 1]" = rms_norm_bwd[0];  rms_norm_bwd = None
        add_3: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(view_7, getitem_29);  view_7 = getitem_29 = None
        view_18: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(add_3, [16, 64])
        matmul_8: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_18, primals_7);  primals_7 = None
        view_19: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul_8, [2, 8, 64]);  matmul_8 = None
        t_4: "f32[64, 16][1, 64]" = torch.ops.aten.t.default(view_18);  view_18 = None
        matmul_9: "f32[64, 64][64, 1]" = torch.ops.tt.matmul.default(t_4, view_20);  t_4 = view_20 = None
        view_21: "f32[2, 8, 4, 16][512, 64, 16, 1]" = torch.ops.aten.view.default(view_19, [2, 8, 4, 16]);  view_19 = None
        transpose_4: "f32[2, 4, 8, 16][512, 16, 64, 1]" = torch.ops.aten.transpose.int(view_21, 1, 2);  view_21 = None
        flash_attn_bwd = torch.ops.tt.flash_attn_bwd.default(transpose_4, getitem_8, getitem_9, transpose_2, detach_1, getitem_11, True, None, -1, -1, 0.0, None, None, None, [True, True, True, False, False, False]);  transpose_4 = getitem_8 = getitem_9 = transpose_2 = detach_1 = getitem_11 = None
        getitem_31: "f32[2, 4, 8, 16][512, 16, 64, 1]" = flash_attn_bwd[0]
        getitem_32: "f32[2, 2, 8, 16][256, 16, 32, 1]" = flash_attn_bwd[1]
        getitem_33: "f32[2, 2, 8, 16][256, 16, 32, 1]" = flash_attn_bwd[2];  flash_attn_bwd = None
        rope_bwd = torch.ops.tt.rope_bwd.default(getitem_31, getitem_32, primals_5, primals_6, False);  getitem_31 = getitem_32 = primals_5 = primals_6 = None
        getitem_37: "f32[2, 4, 8, 16][512, 16, 64, 1]" = rope_bwd[0]
        getitem_38: "f32[2, 2, 8, 16][256, 16, 32, 1]" = rope_bwd[1];  rope_bwd = None
        transpose_5: "f32[2, 8, 2, 16][256, 32, 16, 1]" = torch.ops.aten.transpose.int(getitem_33, 1, 2);  getitem_33 = None
        view_22: "f32[2, 8, 32][256, 32, 1]" = torch.ops.aten.view.default(transpose_5, [2, 8, 32]);  transpose_5 = None
        view_23: "f32[16, 32][32, 1]" = torch.ops.aten.view.default(view_22, [16, 32]);  view_22 = None
        matmul_10: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_23, primals_4);  primals_4 = None
        view_24: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul_10, [2, 8, 64]);  matmul_10 = None
        t_5: "f32[32, 16][1, 32]" = torch.ops.aten.t.default(view_23);  view_23 = None
        matmul_11: "f32[32, 64][64, 1]" = torch.ops.tt.matmul.default(t_5, view_25);  t_5 = None
        transpose_6: "f32[2, 8, 2, 16][256, 32, 16, 1]" = torch.ops.aten.transpose.int(getitem_38, 1, 2);  getitem_38 = None
        view_26: "f32[2, 8, 32][256, 32, 1]" = torch.ops.aten.view.default(transpose_6, [2, 8, 32]);  transpose_6 = None
        view_27: "f32[16, 32][32, 1]" = torch.ops.aten.view.default(view_26, [16, 32]);  view_26 = None
        matmul_12: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_27, primals_3);  primals_3 = None
        view_28: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul_12, [2, 8, 64]);  matmul_12 = None
        t_6: "f32[32, 16][1, 32]" = torch.ops.aten.t.default(view_27);  view_27 = None
        matmul_13: "f32[32, 64][64, 1]" = torch.ops.tt.matmul.default(t_6, view_25);  t_6 = None
        add_4: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(view_24, view_28);  view_24 = view_28 = None
        transpose_7: "f32[2, 8, 4, 16][512, 64, 16, 1]" = torch.ops.aten.transpose.int(getitem_37, 1, 2);  getitem_37 = None
        view_30: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(transpose_7, [2, 8, 64]);  transpose_7 = None
        view_31: "f32[16, 64][64, 1]" = torch.ops.aten.view.default(view_30, [16, 64]);  view_30 = None
        matmul_14: "f32[16, 64][64, 1]" = torch.ops.tt.matmul.default(view_31, primals_2);  primals_2 = None
        view_32: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.view.default(matmul_14, [2, 8, 64]);  matmul_14 = None
        t_7: "f32[64, 16][1, 64]" = torch.ops.aten.t.default(view_31);  view_31 = None
        matmul_15: "f32[64, 64][64, 1]" = torch.ops.tt.matmul.default(t_7, view_25);  t_7 = view_25 = None
        add_5: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(add_4, view_32);  add_4 = view_32 = None
        rms_norm_bwd_1 = torch.ops.tt.rms_norm_bwd.default(add_5, primals_1, None, getitem_1, 0.0, [True, False]);  add_5 = primals_1 = getitem_1 = None
        getitem_39: "f32[2, 8, 64][512, 64, 1]" = rms_norm_bwd_1[0];  rms_norm_bwd_1 = None
        add_6: "f32[2, 8, 64][512, 64, 1]" = torch.ops.aten.add.Tensor(add_3, getitem_39);  add_3 = getitem_39 = None
        return (add_6, matmul_15, matmul_13, matmul_11, None, None, matmul_9, matmul_7, matmul_5, matmul_3, matmul_1, None)
""",
    )
