"""The losses against their papers' formulas, written here once more in plain fp64; against Liger's and TRL's where installed.

In this process CPU tensors run the references. `test_kernels_agree_with_the_formulas` runs the same cases, the limits and
examples/my_loss on the kernels, in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torch_triton_ops
from torch_triton_ops import load_registry, testing

tt = torch.ops.tt
ROOT = Path(__file__).resolve().parents[1]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPE, TOLERANCE = (torch.float32, 2e-5) if INTERPRET else (torch.float64, 1e-9)
LN2 = math.log(2)

# --------------------------------------------------------------------------------------------------------------------
# Formulas: straightforward, of fp64 tensors
# --------------------------------------------------------------------------------------------------------------------


def sg(x):
    return 1 / (1 + torch.exp(-x))


def logsg(x):
    return torch.log(sg(x))


def dpo(pc, pr, rc, rr, delta=None, *, beta=0.1, label_smoothing=0.0, loss_type="sigmoid", discopop_tau=0.05):
    s, c, r = label_smoothing, pc - rc, pr - rr
    x = beta * (c - r)
    if loss_type == "aot":
        order, ordered = torch.argsort(pc - pr), torch.sort(rc - rr).values
        matched = torch.empty_like(pc).index_put((order,), ordered)
        x = beta * (pc - pr - matched)
    if loss_type in ("sigmoid", "aot"):
        loss = -(1 - s) * logsg(x) - s * logsg(-x)
    elif loss_type == "hinge":
        loss = torch.relu(1 - x)
    elif loss_type == "ipo":
        loss = (x / beta - 1 / (2 * beta)) ** 2
    elif loss_type == "robust":
        loss = (-(1 - s) * logsg(x) + s * logsg(-x)) / (1 - 2 * s)
    elif loss_type == "exo_pair":
        s = s or 1e-3
        loss = sg(x) * (logsg(x) - math.log(1 - s)) + sg(-x) * (logsg(-x) - math.log(s))
    elif loss_type == "nca_pair":
        loss = -logsg(beta * c) - 0.5 * logsg(-beta * c) - 0.5 * logsg(-beta * r)
    elif loss_type == "bco_pair":
        loss = -logsg(beta * c - delta) - logsg(-(beta * r - delta))
    elif loss_type == "sppo_hard":
        loss = (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2
    elif loss_type == "apo_zero":
        loss = 1 - sg(beta * c) + sg(beta * r)
    elif loss_type == "apo_down":
        loss = sg(beta * c) + 1 - sg(beta * (c - r))
    else:
        m = sg(x / discopop_tau)
        loss = -logsg(x) * (1 - m) + torch.exp(-x) * m
    return loss, beta * c, beta * r


def cpo(pc, pr, *, beta=0.1, label_smoothing=0.0, alpha=1.0, loss_type="sigmoid"):
    zero = torch.zeros_like(pc)
    kind = {"beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type}
    return dpo(pc, pr, zero, zero, **kind)[0] - alpha * pc, beta * pc, beta * pr


def simpo(pc, pr, *, beta=2.0, gamma=1.0, label_smoothing=0.0):
    x = beta * pc - beta * pr - gamma
    return -(1 - label_smoothing) * logsg(x) - label_smoothing * logsg(-x), beta * pc, beta * pr


def orpo(pc, pr, *, beta=0.1, sft_weight=1.0):
    odds = [torch.exp(p) / (1 - torch.exp(p)) for p in (pc, pr)]
    return -sft_weight * pc - beta * logsg(torch.log(odds[0] / odds[1])), beta * pc, beta * pr


def kto(policy, reference, label, kl=None, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    z = 0.0 if kl is None else max(float(kl), 0.0)
    r = policy - reference
    good, bad = desirable_weight * (1 - sg(beta * (r - z))), undesirable_weight * (1 - sg(beta * (z - r)))
    return torch.where(label, good, bad), beta * r


def bradley_terry(chosen, rejected, margin=0.0, *, center_coefficient=0.0):
    return (-logsg(chosen - rejected - margin) + center_coefficient * (chosen + rejected) ** 2,)


def grpo(l, A, mask, old=None, ref=None, num_tokens=None, *, beta=0.0, clip_low=0.2, clip_high=0.2, **options):
    loss_type = options.get("loss_type", "grpo")
    losses, counts, kls, clips = [], [], [], []
    for i in range(l.shape[0]):  # sequence by sequence
        keep = mask[i].bool()
        t = l[i][keep]
        log_ratio = t - (t.detach() if old is None else old[i][keep])
        ratio = torch.exp(log_ratio.mean().expand_as(t) if loss_type == "gspo" else log_ratio)
        clamped = ratio.clamp(1 - clip_low, 1 + clip_high)
        token = -torch.minimum(ratio * A[i], clamped * A[i])
        kl = torch.zeros_like(t) if ref is None else torch.exp(ref[i][keep] - t) - (ref[i][keep] - t) - 1
        losses.append(token + beta * kl)
        counts.append(len(t))
        kls.append(kl.sum())
        clips.append((clamped * A[i] < ratio * A[i]).sum())
    n = sum(counts)
    if loss_type in ("grpo", "gspo"):
        loss = torch.stack([x.mean() for x in losses]).mean()
    elif loss_type == "dr_grpo":
        loss = torch.stack([x.sum() for x in losses]).sum() / (
            len(counts) * (options.get("max_length", 0) or l.shape[1])
        )
    else:
        loss = torch.stack([x.sum() for x in losses]).sum() / (n if num_tokens is None else float(num_tokens))
    return loss, torch.stack(kls).sum() / n, torch.stack(clips).sum().double() / n


def kl(a, b, *, temperature=1.0):
    p, q = torch.softmax(a / temperature, -1), torch.softmax(b / temperature, -1)
    return (torch.where(q > 0, q * torch.log(q / p), 0.0).sum(-1),)


def js(a, b, *, beta=0.5, temperature=1.0):
    p, q = torch.softmax(a / temperature, -1), torch.softmax(b / temperature, -1)
    m = beta * q + (1 - beta) * p
    return (beta * (q * torch.log(q / m)).sum(-1) + (1 - beta) * (p * torch.log(p / m)).sum(-1),)


def focal(x, t, *, alpha=0.25, gamma=2.0):
    p = sg(x)
    p_t = t * p + (1 - t) * (1 - p)
    weight = t * alpha + (1 - t) * (1 - alpha) if alpha >= 0 else 1.0
    return (-weight * (1 - p_t) ** gamma * (t * torch.log(p) + (1 - t) * torch.log(1 - p)),)


def huber(x, y, *, delta=1.0):
    return (F.huber_loss(x, y, delta=delta, reduction="none"),)


def info_nce(query, key, *, temperature=0.07):
    s = query @ key.T / temperature
    return (torch.stack([-torch.log(torch.exp(s[i, i]) / torch.exp(s[i]).sum()) for i in range(len(query))]),)


# --------------------------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32) * scale + shift


def pairs(n: int, scale: float = 4.0) -> list[torch.Tensor]:
    return [normal(7, seed=i, scale=scale) for i in range(n)]


def cases() -> Iterator[tuple[str, Callable[..., Any], Any, list[Any], dict[str, Any]]]:
    """(label, op, formula, tensors, options). Gradients are compared for the op's differentiable tensors."""
    for loss_type in (
        *("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down"),
        *("discopop", "aot"),
    ):
        yield f"dpo-{loss_type}", tt.dpo_loss, dpo, pairs(4), {"loss_type": loss_type, "beta": 0.2}
    for loss_type in ("sigmoid", "robust", "exo_pair", "aot"):
        options = {"loss_type": loss_type, "label_smoothing": 0.15}
        yield f"dpo-{loss_type}-smoothed", tt.dpo_loss, dpo, pairs(4), options
    yield "dpo-bco_pair", tt.dpo_loss, dpo, [*pairs(4), torch.tensor(0.3)], {"loss_type": "bco_pair"}
    yield "dpo-tau", tt.dpo_loss, dpo, pairs(4, 1.0), {"loss_type": "discopop", "discopop_tau": 0.5}
    for loss_type in ("sigmoid", "hinge", "ipo"):
        yield f"cpo-{loss_type}", tt.cpo_loss, cpo, pairs(2), {"loss_type": loss_type, "beta": 0.3, "alpha": 0.7}
    yield "simpo", tt.simpo_loss, simpo, pairs(2, 0.5), {"gamma": 0.5, "label_smoothing": 0.1}
    means = [-torch.rand(9, generator=torch.Generator().manual_seed(i)) - 0.01 for i in range(2)]
    yield "orpo", tt.orpo_loss, orpo, means, {"beta": 0.4, "sft_weight": 0.5}
    label = torch.tensor([True, False, True, True, False, False, True])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    yield "kto", tt.kto_loss, kto, [*pairs(2), label], weights
    for value in (0.4, -0.4):
        yield f"kto-kl{value}", tt.kto_loss, kto, [*pairs(2), label, torch.tensor([value])], {"beta": 0.3}
    yield "bradley_terry", tt.bradley_terry_loss, bradley_terry, pairs(2, 2.0), {"center_coefficient": 0.05}
    yield "bradley_terry-margin", tt.bradley_terry_loss, bradley_terry, [*pairs(2, 2.0), normal(7, seed=5).abs()], {}
    l = normal(4, 9, scale=0.3, shift=-1.0)
    mask = torch.arange(9)[None] < torch.tensor([9, 1, 4, 7])[:, None]
    near = [l + normal(4, 9, seed=i, scale=0.3) for i in (3, 4)]
    for loss_type in ("grpo", "dr_grpo", "bnpo", "dapo", "gspo"):
        options = {"loss_type": loss_type, "beta": 0.1, "clip_low": 0.1, "clip_high": 0.15}
        yield f"grpo-{loss_type}", tt.grpo_loss, grpo, [l, normal(4, seed=7), mask, *near], options
    tokens = torch.tensor([30.0])
    yield "grpo-tokens", tt.grpo_loss, grpo, [l, normal(4, seed=7), mask, near[0], None, tokens], {"loss_type": "dapo"}
    options = {"loss_type": "dr_grpo", "max_length": 20}
    yield "grpo-on-policy", tt.grpo_loss, grpo, [l, normal(4, seed=7), mask.int()], options
    logits = [normal(3, 37, seed=i, scale=2.0) for i in range(2)]
    yield "kl", tt.kl_div, kl, logits, {"temperature": 1.7}
    yield "js", tt.js_div, js, logits, {"beta": 0.2, "temperature": 0.8}
    target = (normal(3, 5, seed=1) > 0.3).float()
    yield "focal", tt.focal_loss, focal, [normal(3, 5, scale=2.0), target], {}
    yield "focal-soft", tt.focal_loss, focal, [normal(3, 5), torch.rand(3, 5)], {"alpha": -1.0, "gamma": 1.5}
    yield "huber", tt.huber_loss, huber, [normal(3, 5), normal(3, 5, seed=1)], {"delta": 0.8}
    yield "info_nce", tt.info_nce_loss, info_nce, [normal(5, 8, scale=0.3), normal(6, 8, seed=1, scale=0.3)], {}


def close(got: torch.Tensor, want: torch.Tensor, label: str) -> None:
    scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(
        got.double(), want.double(), rtol=TOLERANCE, atol=TOLERANCE * scale, msg=lambda m: f"{label}: {m}"
    )


def check_case(label: str, op: Any, formula: Any, tensors: list[Any], options: dict[str, Any]) -> None:
    """Every output, and the gradients for a random upstream gradient of the loss; every reduction."""
    spec = torch_triton_ops.registry.spec(op._qualified_op_name)
    names = [a.name for a in spec.arguments]
    given = [t.to(DTYPE) if t is not None and t.is_floating_point() else t for t in tensors]
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    wanted = [i for i, t in enumerate(tensors) if t is not None and names[i] in spec.differentiable]
    for i in wanted:
        given[i].requires_grad_()
        exact[i].requires_grad_()
    rows, *extras = formula(*exact, **options)
    reductions = ("none", "mean", "sum") if "reduction" in names else ("",)
    for reduction in reductions:
        found = op(*given, **options, **({"reduction": reduction} if reduction else {}))
        found = found if isinstance(found, (tuple, list)) else (found,)
        loss = rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows
        close(found[0], loss, f"{label} {reduction}")
        for got, want in zip(found[1:], extras, strict=True):
            close(got, want, f"{label} extra")
            assert not got.requires_grad
        upstream = normal(*loss.shape, seed=11)
        inputs = [t[i] for t in (given, exact) for i in wanted]
        got = torch.autograd.grad(found[0], inputs[: len(wanted)], upstream.to(DTYPE))
        want = torch.autograd.grad(loss, inputs[len(wanted) :], upstream.double(), retain_graph=True)
        for i, g, w in zip(wanted, got, want, strict=True):
            close(g, w, f"{label} {reduction} gradient of {names[i]}")


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_formula(case: tuple[Any, ...]) -> None:
    check_case(*case)


# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------

INF = math.inf


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[list[float]]:
    return [g.tolist() for g in torch.autograd.grad(loss.sum(), inputs)]


def test_large_margins_do_not_overflow() -> None:
    zero = torch.zeros(4)
    pc, pr = f32(1e4, -1e4, 3e38, -3e38), f32(0.0, 0.0, 0.0, 0.0)
    for loss_type in ("sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "apo_zero", "apo_down", "discopop"):
        loss, *_ = tt.dpo_loss(pc, pr, zero, zero, beta=1.0, loss_type=loss_type, reduction="none")
        assert loss.isfinite().all(), (loss_type, loss)
        found = gradients(loss, pc, pr)
        assert all(math.isfinite(g) for row in found for g in row), (loss_type, found)
    loss, *_ = tt.dpo_loss(pc, pr, zero, zero, beta=1.0, reduction="none")
    assert loss.tolist() == [0.0, 1e4, 0.0, float(torch.tensor(3e38))]
    assert gradients(loss, pc, pr) == [[0.0, -1.0, 0.0, -1.0], [0.0, 1.0, 0.0, 1.0]]
    loss = tt.bradley_terry_loss(f32(80.0, -80.0), f32(0.0, 0.0), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([math.exp(-80.0), 80.0]))  # not rounded to 0 at exp(-17)
    loss = tt.focal_loss(f32(1e4, -1e4), torch.tensor([1.0, 1.0]), reduction="none", alpha=-1.0)
    assert loss.tolist() == [0.0, 1e4]


def test_infinite_log_probabilities() -> None:
    zero = torch.zeros(2)
    pc, pr = f32(0.0, -INF), f32(-INF, 0.0)
    loss, *_ = tt.dpo_loss(pc, pr, zero, zero, beta=1.0, reduction="none")
    assert loss.tolist() == [0.0, INF]
    assert gradients(loss, pc, pr) == [[0.0, -1.0], [0.0, 1.0]]
    loss, *_ = tt.orpo_loss(f32(-0.0, -1e-7), f32(-1.0, -40.0), sft_weight=0.0, beta=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 1e-7 * math.exp(-40.0)]), rtol=1e-4, atol=0.0)


def test_masked_classes_and_equal_rows() -> None:
    row = torch.tensor([[0.0, 1.0, -INF, 2.0]])
    for op in (tt.kl_div, tt.js_div):
        x, y = row.clone().requires_grad_(), row.clone().requires_grad_()
        loss = op(x, y)
        assert abs(float(loss)) < 1e-7
        assert all(abs(g) < 1e-7 for found in gradients(loss, x, y) for g in found[0])
    missing = torch.tensor([[-INF, 1.0, 0.0]])
    assert float(tt.kl_div(missing, torch.zeros(1, 3))) == INF  # q has what p lacks
    apart = tt.js_div(torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]]))
    torch.testing.assert_close(apart, torch.tensor(LN2))  # the most that it can be
    far = tt.kl_div(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert float(far) == 1e4


def test_ties_in_aot_keep_their_order() -> None:
    pc, pr = f32(1.0, 1.0, 0.0, 1.0), f32(0.0, 0.0, 0.0, 0.0)
    rc, rr = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.zeros(4)
    loss, *_ = tt.dpo_loss(pc, pr, rc, rr, beta=1.0, loss_type="aot", reduction="none")
    matched = torch.tensor([1.0, 2.0, 1.0, 3.0])
    torch.testing.assert_close(loss, -F.logsigmoid(pc - matched))


def test_masked_tokens_may_hold_anything() -> None:
    l = torch.tensor([[-1.0, -2.0, math.nan, -INF], [-1.0, math.nan, math.nan, 0.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    for loss_type in ("grpo", "dr_grpo", "bnpo", "dapo", "gspo"):
        loss, kl, clipped = tt.grpo_loss(l, torch.tensor([1.0, 2.0]), mask, l.detach(), l.detach(), loss_type=loss_type)
        assert float(kl) == float(clipped) == 0.0
        (found,) = torch.autograd.grad(loss, l)
        weight = {"grpo": 4, "gspo": 4, "dr_grpo": 8}.get(loss_type, 2)
        assert found.tolist() == [[-1 / weight, -1 / weight, 0.0, 0.0], [0.0] * 4], loss_type


LIMITS = (
    test_large_margins_do_not_overflow,
    test_infinite_log_probabilities,
    test_masked_classes_and_equal_rows,
    test_ties_in_aot_keep_their_order,
    test_masked_tokens_may_hold_anything,
)


def test_kernels_agree_with_the_formulas(interpreted) -> None:
    assert interpreted(__file__).split() == ["checked", str(len(list(cases())) + len(LIMITS))]


# --------------------------------------------------------------------------------------------------------------------
# Others' implementations
# --------------------------------------------------------------------------------------------------------------------


def test_liger_agrees() -> None:
    pytest.importorskip("liger_kernel", exc_type=ImportError)
    from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    pc, pr, rc, rr = (t.double() for t in pairs(4))
    both = torch.zeros(2 * len(pc))
    liger = LigerFusedLinearDPOFunction.preference_loss_fn
    for loss_type in ("sigmoid", "hinge", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"):
        want, chosen, rejected = liger(pc, pr, both, rc, rr, beta=0.3, loss_type=loss_type)
        found = tt.dpo_loss(pc, pr, rc, rr, beta=0.3, loss_type=loss_type)
        for got, expected in zip(found, (want, chosen, rejected), strict=True):
            torch.testing.assert_close(got, expected, msg=lambda m, t=loss_type: f"{t}: {m}")
    for loss_type in ("robust", "exo_pair"):
        want = liger(pc, pr, both, rc, rr, beta=0.3, loss_type=loss_type, label_smoothing=0.1)[0]
        got = tt.dpo_loss(pc, pr, rc, rr, beta=0.3, loss_type=loss_type, label_smoothing=0.1)[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    want = LigerFusedLinearCPOFunction.preference_loss_fn(pc, pr, both, beta=0.3, label_smoothing=0.1)[0]
    torch.testing.assert_close(tt.cpo_loss(pc, pr, beta=0.3, label_smoothing=0.1, alpha=0.0)[0], want)
    want = LigerFusedLinearSimPOFunction.preference_loss_fn(pc, pr, both, beta=0.3, gamma=0.7)[0]
    torch.testing.assert_close(tt.simpo_loss(pc, pr, beta=0.3, gamma=0.7)[0], want)
    mc, mr = -pc.abs() - 0.1, -pr.abs() - 0.1
    want = LigerFusedLinearORPOFunction.preference_loss_fn(mc, mr, both, beta=0.3)[0]
    torch.testing.assert_close(tt.orpo_loss(mc, mr, beta=0.3, sft_weight=0.0)[0], want.abs())
    tensors = next(case[3] for case in cases() if case[0] == "grpo-grpo")
    l, A, mask, old, ref = (t.double() for t in tensors)
    for loss_type, level in (("grpo", "token"), ("bnpo", "token"), ("dr_grpo", "token"), ("grpo", "sequence")):
        options = {"max_completion_length": l.shape[1], "loss_type": loss_type, "importance_sampling_level": level}
        want, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            l, mask, A, mask, ref_per_token_logps=ref, old_per_token_logps=old, beta=0.04, **options
        )
        kind = "gspo" if level == "sequence" else loss_type
        torch.testing.assert_close(tt.grpo_loss(l, A, mask, old, ref, beta=0.04, loss_type=kind)[0], want)


def test_trl_agrees() -> None:
    """TRL up to 0.2x has its loss as a method of the trainer."""
    trl = pytest.importorskip("trl", exc_type=ImportError)
    method = getattr(getattr(trl, "DPOTrainer", None), "dpo_loss", None)
    if method is None:
        pytest.skip("this TRL has no DPOTrainer.dpo_loss")
    from types import SimpleNamespace

    tensors = [t.double() for t in pairs(4)]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        args=SimpleNamespace(discopop_tau=0.05),
        beta=0.3,
        label_smoothing=0.0,
        reference_free=False,
        f_divergence_type="reverse_kl",
        f_divergence_params=None,
    )
    for loss_type in (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard"),
        *("aot", "apo_zero", "apo_down", "discopop"),
    ):
        trainer.loss_type = loss_type
        want, *rewards = method(trainer, *tensors)
        found = tt.dpo_loss(*tensors, beta=0.3, loss_type=loss_type)
        torch.testing.assert_close(found[0], want.mean(), msg=lambda m, t=loss_type: f"{t}: {m}")
        for got, expected in zip(found[1:], rewards, strict=True):
            torch.testing.assert_close(got, expected)


# --------------------------------------------------------------------------------------------------------------------
# One's own losses
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def my_losses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/my_loss, registered in this process."""
    folder = tmp_path_factory.mktemp("my_loss")
    shutil.copytree(ROOT / "examples" / "my_loss", folder, dirs_exist_ok=True)
    load_registry(folder / "my_losses.yaml")
    return folder


def test_the_example_computes_what_it_says(my_losses: Path) -> None:
    x, y = (normal(5, 9, seed=i).double().requires_grad_() for i in range(2))
    label = torch.tensor([0, 8, 3, 3, 1])
    pairs_of_losses = (
        (torch.ops.my.log_cosh_loss(x, y, scale=2.5), torch.log(torch.cosh(2.5 * (x - y))).mean() / 2.5**2),
        (torch.ops.my.brier_loss(x, label), (x.softmax(1) - F.one_hot(label, 9)).square().sum(1).mean()),
    )
    for got, want in pairs_of_losses:
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))
    compiled = torch.compile(torch.ops.my.brier_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, label), pairs_of_losses[1][1])
    with pytest.raises(ValueError, match=r"my::brier_loss: argument 'label' is of shape \(3,\)"):
        torch.ops.my.brier_loss(x, label[:3])


def test_the_examples_own_check_passes(my_losses: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its script, with few of the checks; `test_kernels_agree_with_the_formulas` runs its kernels."""
    few = partial(testing.check_op, device="cpu", checks=["gradients", "gradcheck", "errors", "coverage"])
    monkeypatch.setattr(testing, "check_op", few)
    monkeypatch.setattr(torch_triton_ops, "load_registry", lambda path: torch_triton_ops.specs("my"))
    assert runpy.run_path(str(my_losses / "check.py"))["main"]() == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("my::")]
    assert {"my::log_cosh_loss on cpu: passed", "my::brier_loss on cpu: passed"} <= set(found)


WRONG = """
import triton
import triton.language as tl
from torch_triton_ops.losses import elementwise_loss


@triton.jit
def value(input, target, power: tl.constexpr = 2.0):
    return tl.exp(power * (input - target))


@triton.jit
def derivative(input, target, power: tl.constexpr = 2.0):
    return tl.exp(power * (input - target))


elementwise_loss("wrong::exp_loss", value, derivative, globals())
"""

WRONG_YAML = """
- op: wrong::exp_loss(Tensor input, Tensor target, *, float power=2.0, str reduction="mean") -> Tensor
  summary: A loss whose derivative lacks a factor.
  module: wrong_exp_loss
  backward: wrong::exp_loss_bwd(Tensor dloss, Tensor input, Tensor target, float power, str reduction) -> Tensor
  visibility: triton
  differentiable: [input]
  dtypes: [float32]
"""


def test_a_wrong_derivative_is_found(tmp_path: Path) -> None:
    (tmp_path / "wrong_exp_loss.py").write_text(WRONG)
    (tmp_path / "wrong.yaml").write_text(WRONG_YAML)
    load_registry(tmp_path / "wrong.yaml")
    report = testing.check_op("wrong::exp_loss", device="cpu", checks=["gradients", "gradcheck"])
    assert {r.check for r in report.failures} == {"gradients", "gradcheck"}


if __name__ == "__main__":
    every = list(cases())
    for one in every:
        check_case(*one)
    for limit in LIMITS:
        limit()
    for spec in load_registry(ROOT / "examples" / "my_loss" / "my_losses.yaml"):
        testing.check_op(spec.qualname, device="cpu", checks=["guard", "gradients"]).raise_if_failed()
    print("checked", len(every) + len(LIMITS))
