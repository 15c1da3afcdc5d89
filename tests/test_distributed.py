"""DTensor: every op and every placement that its rule offers gives what one process gives, forward and backward.

This file is also the program that each of the two gloo processes runs: `python test_distributed.py RANK STORE OUT`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_triton_ops
from torch_triton_ops import registry

RANKS = 2
PACKAGE_ROOT = Path(torch_triton_ops.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """A call whose tensors are placed by `placements` ("R" replicated, "S0" sharded along dim 0, "P" partial)."""

    id: str
    op: str
    make: Callable[[], tuple[Any, ...]]
    placements: str  # one word for each positional tensor
    result: str  # one word for each output; "?" where DTensor may choose among costs
    kwargs: dict[str, Any] = field(default_factory=dict)
    local: bool = True  # no communication in the op, forward and backward


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def attention(hq: int, hkv: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (randn(2, hq, 5, 16), randn(2, hkv, 5, 16), randn(2, hkv, 5, 16))


def rotary(*table: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (randn(2, 4, 6, 8), randn(2, 2, 6, 8), torch.randn(table), torch.randn(table))


def logits(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (randn(*shape), torch.randint(0, shape[-1], shape[:-1]))


def linear(bias: bool = True) -> Callable[[], tuple[Any, ...]]:
    return lambda: (randn(4, 6, 8), randn(10, 8), randn(10) if bias else None)


def cases() -> Iterator[Case]:
    pair = lambda: (randn(4, 6), randn(4, 6))
    yield Case("vector_add_S0", "vector_add", pair, "S0 S0", "S0")
    yield Case("vector_add_S1", "vector_add", pair, "S1 S1", "S1")
    yield Case("vector_add_uneven", "vector_add", lambda: (randn(5, 3), randn(5, 3)), "S0 S0", "S0")
    yield Case("vector_add_mixed", "vector_add", pair, "S0 R", "S0")
    yield Case("swiglu_S0", "swiglu", pair, "S0 S0", "S0")
    yield Case("swiglu_S1", "swiglu", pair, "S1 S1", "S1")
    yield Case("strided_copy_S1", "strided_copy", lambda: (randn(4, 6),), "S1", "S1")
    yield Case("cast_S0", "cast", lambda: (randn(4, 6), torch.float16), "S0 -", "S0")
    yield Case("transpose_S0", "transpose", lambda: (randn(4, 6, 8), 0, -1), "S0 - -", "S2")
    yield Case("transpose_S1", "transpose", lambda: (randn(4, 6, 8), 0, -1), "S1 - -", "S1")
    row = lambda: (randn(4, 6), randn(6))
    yield Case("mul_row_S0", "mul", row, "S0 R", "S0")
    yield Case("mul_row_S1", "mul", row, "S1 S0", "S1")
    yield Case("add_column_S1", "add", lambda: (randn(4, 6), randn(4, 1)), "S1 R", "S1")
    yield Case("maximum_frozen", "maximum", lambda: (randn(4, 6), torch.randn(6)), "S0 R", "S0")
    for name in ("sub", "div", "minimum"):
        yield Case(f"{name}_row", name, row, "S0 R", "S0")
    for name in ("relu", "sigmoid", "tanh", "exp", "silu", "gelu"):
        yield Case(f"{name}_S1", name, lambda: (randn(4, 6),), "S1", "S1")
    mask = lambda: (randn(4, 6), torch.randn(6) > 0, -1.0)
    yield Case("masked_fill_S0", "masked_fill", mask, "S0 R R", "S0")
    yield Case("bias_gelu_S0", "bias_gelu", row, "S0 R", "S0")
    yield Case("fused_add_mul_S0", "fused_add_mul", lambda: (randn(4, 6), randn(6), randn(4, 6)), "S0 R S0", "S0")
    norm = lambda: (randn(4, 6, 8), randn(8))
    yield Case("rms_norm_S0", "rms_norm", norm, "S0 R", "S0")
    yield Case("rms_norm_S1", "rms_norm", norm, "S1 R", "S1")
    yield Case("rms_norm_replicated", "rms_norm", norm, "R R", "R")
    yield Case("rms_norm_no_weight", "rms_norm", lambda: (randn(4, 8), None), "S0 R", "S0")
    yield Case("rms_norm_frozen_weight", "rms_norm", lambda: (randn(4, 8), torch.ones(8)), "S0 R", "S0")
    yield Case("rms_norm_frozen_x", "rms_norm", lambda: (torch.randn(4, 8), randn(8)), "S0 R", "S0")
    yield Case("rms_norm_along_rows", "rms_norm", norm, "S2 R", "?", local=False)
    yield Case("layer_norm_S1", "layer_norm", lambda: (randn(4, 6, 8), randn(8), randn(8)), "S1 R R", "S1")
    yield Case("add_rms_norm_S0", "add_rms_norm", lambda: (randn(4, 8), randn(4, 8), randn(8)), "S0 S0 R", "S0 S0")
    yield Case("add_layer_norm_S0", "add_layer_norm", lambda: (randn(4, 8), randn(4, 8)), "S0 S0", "S0 S0")
    yield Case("group_norm_S0", "group_norm", lambda: (randn(4, 6, 3), 2, randn(6), randn(6)), "S0 - R R", "S0")
    yield Case("geglu_S1", "geglu", pair, "S1 S1", "S1")
    yield Case("softmax_S0", "softmax", lambda: (randn(4, 6),), "S0", "S0")
    yield Case("log_softmax_S0", "log_softmax", lambda: (randn(4, 6),), "S0", "S0")
    yield Case("softmax_dim0_S1", "softmax", lambda: (randn(4, 6),), "S1", "S1", {"dim": 0})
    yield Case("softmax_dim0_S0", "softmax", lambda: (randn(4, 6),), "S0", "?", {"dim": 0}, local=False)
    cube = lambda: (randn(4, 6, 2),)
    yield Case("sum_kept", "sum", cube, "S1", "S0", {"dim": [0, 2]})
    yield Case("sum_reduced", "sum", cube, "S0", "P", {"dim": [0, 2], "keepdim": True})
    yield Case("mean_keepdim", "mean", cube, "S1", "S1", {"dim": [-1], "keepdim": True})
    yield Case("mean_all", "mean", cube, "S0", "?")
    yield Case("amax_kept", "amax", cube, "S2", "S1", {"dim": [1]})
    # local in the forward; the gradient needs the whole minimum
    yield Case("amin_all", "amin", cube, "S0", "?", local=False)
    yield Case("argmax_kept", "argmax", lambda: (torch.randn(4, 6),), "S0", "S0", {"dim": 1})
    yield Case("cumsum_S0", "cumsum", lambda: (randn(4, 6),), "S0", "S0", {"dim": 1})
    yield Case("rope_batch", "rope", rotary(6, 4), "S0 S0 R R", "S0 S0")
    yield Case("rope_heads", "rope", rotary(6, 4), "S1 S1 R R", "S1 S1")
    yield Case("rope_table_for_all_batches", "rope", rotary(1, 6, 8), "S0 S0 R R", "S0 S0")
    yield Case("rope_table_for_each_batch", "rope", rotary(2, 6, 8), "S0 S0 R R", "S0 S0")
    yield Case("rope_table_for_each_batch_heads", "rope", rotary(2, 6, 8), "S1 S1 R R", "S1 S1")
    causal = {"causal": True}
    yield Case("flash_attn_batch", "flash_attn", attention(4, 2), "S0 S0 S0", "S0", causal)
    yield Case("flash_attn_heads", "flash_attn", attention(4, 2), "S1 S1 S1", "S1", causal)
    frozen = lambda: (randn(2, 4, 5, 16), *(torch.randn(2, 2, 5, 16) for _ in "kv"))
    yield Case("flash_attn_frozen_kv", "flash_attn", frozen, "S1 S1 S1", "S1")
    yield Case("flash_attn_uneven_heads", "flash_attn", attention(3, 3), "S1 S1 S1", "?", causal, local=False)
    # Hkv = 1: a rank would hold query heads and no key head
    yield Case("flash_attn_mqa_heads", "flash_attn", attention(4, 1), "S1 R R", "?", causal, local=False)
    cu_seqlens = torch.tensor([0, 2, 2, 7])
    packed = lambda: (randn(7, 4, 16), randn(7, 2, 16), randn(7, 2, 16), cu_seqlens, cu_seqlens, 5, 5)
    yield Case("flash_attn_varlen_heads", "flash_attn_varlen", packed, "S1 S1 S1 R R - -", "S1", causal)
    yield Case("linear_data_parallel", "linear", linear(), "S0 R R", "S0", {"activation": "silu"})
    yield Case("linear_column_parallel", "linear", linear(), "R S0 S0", "S2", {"activation": "gelu"})
    yield Case("linear_column_parallel_none", "linear", linear(), "R S0 S0", "S2")
    yield Case("linear_row_parallel", "linear", linear(bias=False), "S2 S1 R", "P")
    # the same placements, after the case above is in DTensor's cache: a partial result would be wrong here
    relu = {"activation": "relu"}
    yield Case("linear_row_parallel_relu", "linear", linear(bias=False), "S2 S1 R", "?", relu, local=False)
    yield Case("linear_row_parallel_bias", "linear", linear(), "S2 S1 R", "?", local=False)
    # local in the forward; the gradient flattens the rows, for which DTensor gathers the sequences
    yield Case("linear_sequence", "linear", linear(), "S1 R R", "S1", {"activation": "silu"}, local=False)
    product = lambda: (randn(4, 6), randn(6, 8))
    yield Case("matmul_rows", "matmul", product, "S0 R", "S0")
    yield Case("matmul_columns", "matmul", product, "R S1", "S1")
    yield Case("matmul_inner", "matmul", product, "S1 S0", "P")
    yield Case("matmul_batch", "matmul", lambda: (randn(2, 3, 4), randn(2, 4, 5)), "S0 S0", "S0")
    yield Case("matmul_broadcast", "matmul", lambda: (randn(2, 3, 4), randn(4, 5)), "S0 R", "S0")
    yield Case("bmm_batch", "bmm", lambda: (randn(2, 3, 4), randn(2, 4, 5)), "S0 S0", "S0")
    yield Case("bmm_inner", "bmm", lambda: (randn(2, 3, 4), randn(2, 4, 5)), "S2 S1", "P")
    head = lambda: (randn(4, 6), randn(9, 6), torch.arange(4), randn(9))
    yield Case("linear_logprob_S0", "linear_logprob", head, "S0 R S0 R", "S0 S0", {"temperature": 0.7})
    ce = "cross_entropy"
    yield Case("cross_entropy_none", ce, logits(4, 9), "S0 S0", "S0", {"reduction": "none"})
    yield Case("cross_entropy_sum", ce, logits(4, 9), "S0 S0", "P", {"reduction": "sum", "softcap": 5.0})
    yield Case("cross_entropy_sum_3d", ce, logits(2, 3, 9), "S0 S0", "P", {"reduction": "sum"})
    yield Case("cross_entropy_uneven", ce, logits(5, 9), "S0 S0", "P", {"reduction": "sum", "z_loss": 0.1})
    # same shapes and placements as "sum": nothing but the option differs
    pairs = lambda: tuple(randn(4) for _ in range(2))
    four = lambda: (*pairs(), torch.randn(4), torch.randn(4))
    for reduction, result in ("none", "S0"), ("sum", "P"):
        own = {"reduction": reduction}
        yield Case(f"huber_loss_{reduction}", "huber_loss", lambda: (randn(5, 3), randn(5, 3)), "S0 S0", result, own)
        yield Case(
            f"focal_loss_{reduction}", "focal_loss", lambda: (randn(4, 9), torch.rand(4, 9)), "S0 S0", result, own
        )
        yield Case(f"bradley_terry_loss_{reduction}", "bradley_terry_loss", pairs, "S0 S0", result, own)
        for name in ("cpo_loss", "simpo_loss", "orpo_loss"):
            likely = lambda: tuple((-torch.rand(4) - 0.1).requires_grad_() for _ in range(2))
            yield Case(f"{name}_{reduction}", name, likely, "S0 S0", f"{result} S0 S0", own)
        kto = lambda: (randn(4), torch.randn(4), torch.tensor([True, False, True, True]), torch.tensor([0.1]))
        yield Case(f"kto_loss_{reduction}", "kto_loss", kto, "S0 S0 S0 R", f"{result} S0", own)
        yield Case(f"dpo_loss_{reduction}", "dpo_loss", four, "S0 S0 S0 S0", f"{result} S0 S0", own)
        distributions = lambda: (randn(6, 9), randn(6, 9))
        for name in ("kl_div", "js_div"):
            yield Case(f"{name}_{reduction}", name, distributions, "S0 S0", result, own)
    cube = lambda: (randn(2, 3, 9), randn(2, 3, 9))
    yield Case("kl_div_3d", "kl_div", cube, "S0 S0", "P", {"reduction": "sum"})
    # sorted over all pairs: whole
    aot = {"reduction": "none", "loss_type": "aot"}
    yield Case("dpo_loss_aot", "dpo_loss", four, "S0 S0 S0 S0", "R R R", aot, local=False)
    yield Case("kl_div_mean", "kl_div", distributions, "S0 S0", "R", local=False)
    heads = lambda: tuple(torch.randn(2, n, 5, 16).to(torch.float8_e4m3fn) for n in (4, 2, 2))
    scales = lambda *batch: tuple(torch.rand(*batch, n) for n in (4, 2, 2))
    fp8, out = "flash_attn_fp8", {"out_dtype": torch.float32}
    yield Case("flash_attn_fp8_batch", fp8, lambda: heads() + scales(2), "S0 S0 S0 S0 S0 S0", "S0", out)
    yield Case("flash_attn_fp8_heads", fp8, lambda: heads() + scales(), "S1 S1 S1 S0 S0 S0", "S1", out)
    yield Case("cross_entropy_mean", ce, logits(4, 9), "S0 S0", "R", {"reduction": "mean", "softcap": 5.0}, local=False)


# --------------------------------------------------------------------------------------------------------------------
# One of the processes
# --------------------------------------------------------------------------------------------------------------------


def placement(word: str) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return {"R": Replicate(), "P": Partial("sum")}.get(word) or Shard(int(word[1:]))


def place(x: torch.Tensor, mesh: Any, where: Any) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if x.dtype == torch.float8_e4m3fn:  # gloo does not send it; every rank has the whole
        part = x.chunk(RANKS, where.dim)[mesh.get_rank()] if where.is_shard() else x
        return DTensor.from_local(part, mesh, [where], run_check=False)
    return distribute_tensor(x.detach(), mesh, [where]).requires_grad_(x.requires_grad)


def run_case(case: Case, mesh: Any) -> str | None:
    """None if all is well, else what is wrong."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)  # the same numbers on every rank
    op = getattr(torch.ops.tt, case.op)
    args = case.make()
    words = case.placements.split()
    placed = [
        place(arg, mesh, placement(word)) if isinstance(arg, torch.Tensor) else arg
        for arg, word in zip(args, words, strict=True)
    ]
    as_tuple = lambda out: out if isinstance(out, tuple) else (out,)
    want = as_tuple(op(*args, **case.kwargs))
    with CommDebugMode() as forward:
        got = as_tuple(op(*placed, **case.kwargs))
    found = [out.placements for out in got]
    expected = [(placement(word),) for word in case.result.split() if word != "?"]
    if expected and found != expected:
        return f"result placed {found}, expected {expected}"
    with torch.no_grad():  # the same without autograd: the public op's own rule
        inference = as_tuple(op(*placed, **case.kwargs))
    for a, b, c in zip(want, got, inference, strict=True):
        torch.testing.assert_close(b.full_tensor(), a)
        torch.testing.assert_close(c.full_tensor(), a)
        if b.placements != c.placements:
            return f"without autograd placed {c.placements}, with it {b.placements}"
    derived = [i for i, out in enumerate(want) if out.requires_grad]
    if not derived:  # no gradient
        return f"communicates: {forward.get_total_counts()}" if forward.get_total_counts() else None
    want, got = [want[i] for i in derived], [got[i] for i in derived]
    upstream = [torch.randn_like(out) for out in want]
    wanted = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    asked = [arg for arg in placed if isinstance(arg, DTensor) and arg.requires_grad]
    whole = [[Replicate() if p.is_partial() else p for p in out.placements] for out in got]
    sharded = [distribute_tensor(g, mesh, p) for g, p in zip(upstream, whole, strict=True)]
    gradients = torch.autograd.grad(want, wanted, upstream)
    with CommDebugMode() as backward:
        found = torch.autograd.grad(got, asked, sharded)
    for a, b in zip(gradients, found, strict=True):
        torch.testing.assert_close(b.full_tensor(), a)
    moved = forward.get_total_counts(), backward.get_total_counts()
    if case.local and any(moved):
        return f"communicates, forward and backward: {moved}"
    if not case.local and not any(moved):
        return "expected to communicate, did not"
    return None


def run_compiled(mesh: Any) -> str | None:
    """A DTensor through rms_norm in one graph, forward and backward."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    x, weight = randn(4, 8), randn(8)
    want = torch.ops.tt.rms_norm(x, weight)
    gradients = torch.autograd.grad(want.square().sum(), (x, weight))
    dx = distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
    dweight = distribute_tensor(weight.detach(), mesh, [Replicate()]).requires_grad_()
    compiled = torch.compile(torch.ops.tt.rms_norm, backend="aot_eager", fullgraph=True)
    got = compiled(dx, dweight)
    if got.placements != (Shard(0),):
        return f"result placed {got.placements}"
    torch.testing.assert_close(got.full_tensor(), want)
    found = torch.autograd.grad(got.square().sum(), (dx, dweight))
    for a, b in zip(gradients, found, strict=True):
        torch.testing.assert_close(b.full_tensor(), a)
    return None


def run_refusal(mesh: Any) -> str | None:
    """DTensor does not redistribute keyword arguments: a sharded one must raise, not be used as if it were whole."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, target = distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)]), torch.zeros(4, dtype=torch.int64)
    weight = torch.ones(8)
    call = lambda placement: torch.ops.tt.cross_entropy(
        x,
        distribute_tensor(target, mesh, [Shard(0)]),
        weight=distribute_tensor(weight, mesh, [placement]),
        reduction="none",
    )
    torch.testing.assert_close(
        call(Replicate()).full_tensor(), torch.ops.tt.cross_entropy(x.full_tensor(), target, reduction="none")
    )
    try:
        call(Shard(0))
    except (ValueError, RuntimeError) as error:
        said = "argument 'weight' is a DTensor placed" in str(error) and "allowed: Replicate()" in str(error)
        return None if said else f"unclear error: {error}"
    return "a sharded keyword argument was accepted"


def main(rank: int, store: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    results: dict[str, str | None] = {}
    todo: list[tuple[str, Callable[[], str | None]]] = [
        (case.id, lambda case=case: run_case(case, mesh)) for case in cases()
    ]
    todo += [("keyword_argument", lambda: run_refusal(mesh)), ("compiled", lambda: run_compiled(mesh))]
    for name, function in todo:
        try:
            results[name] = function()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error} at {traceback.format_exc().splitlines()[-4:-1]}"
    Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------------
# The tests
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    outs = [tmp_path / f"{rank}.json" for rank in range(RANKS)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store"), str(out)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(errors)
    for rank, out in enumerate(outs):
        results = json.loads(out.read_text())
        assert len(results) > len(list(cases()))
        wrong = [f"{name}: {what}" for name, what in results.items() if what is not None]
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


MESH_2D = """
import torch, torch.distributed as dist, torch_triton_ops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

# One process that plays rank 0 of eight: collectives do nothing, placements and local shapes are real.
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "model"))


def place(shape, *placements):
    return distribute_tensor(torch.randn(shape), mesh, placements).requires_grad_()


def run(op, *args, **kwargs):
    with CommDebugMode() as mode:
        out = op(*args, **kwargs)
        torch.autograd.grad(out, args, torch.ones_like(out.detach()))
    return out.placements, mode.get_total_counts()


batch, heads, whole = Shard(0), Shard(1), Replicate()
# four key heads: each of the four ranks of "model" has one, with the four query heads of its group
qkv = [place((4, h, 3, 16), batch, heads) for h in (16, 4, 4)]
assert run(torch.ops.tt.flash_attn, *qkv, causal=True) == ((batch, heads), 0)
# two key heads are too few for "model"
qkv = [place((4, 16, 3, 16), batch, heads), *(place((4, 2, 3, 16), batch, whole) for _ in "kv")]
placements, moved = run(torch.ops.tt.flash_attn, *qkv)
assert heads not in placements and moved
# rows over "data", the weight's rows over "model"
x, weight = place((4, 8), batch, whole), place((12, 8), whole, batch)
assert run(torch.ops.tt.linear, x, weight) == ((batch, Shard(1)), 0)
x, weight = place((4, 8), batch, Shard(1)), place((12, 8), whole, Shard(1))
assert run(torch.ops.tt.linear, x, weight)[0] == (batch, Partial("sum"))
x, weight = place((8, 4, 6), batch, heads), place((6,), whole, whole)
assert run(torch.ops.tt.rms_norm, x, weight) == ((batch, heads), 0)
print("placed")
"""


def test_two_dimensional_mesh() -> None:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MESH_2D], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "placed", done.stderr


def test_every_shipped_rule_is_tried() -> None:
    tried = {case.op for case in cases()}
    assert tried == {spec.name for spec in registry.specs() if spec.sharding is not None}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
