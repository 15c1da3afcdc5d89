"""What a user would pick instead of each op, behind the op's own signature. Peers are optional, imported on first use.

Every peer function takes the public op's arguments and returns the public op's outputs; an argument that it does not
know raises `Unsupported`, which the record keeps as the reason why there is no number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[..., Any]

DEFAULT = ("eager", "compile", "liger", "quack", "cudnn", "flash2", "fa4")
NAMES = (*DEFAULT, "compile_max")
# Module to import and what to install for it.
PACKAGES = {
    "liger": ("liger_kernel", "liger-kernel"),
    "quack": ("quack", "quack-kernels"),
    "fa4": ("flash_attn.cute", "flash-attn-4"),
}
# torch.compile has nothing to add here: cuBLAS either way, or an attention that writes out its scores.
NOT_COMPILED = ("linear", "matmul", "bmm", "flash_attn")
PASSES = ("fwd", "bwd", "fwdbwd")


class Unsupported(Exception):
    """The peer has no counterpart of this call."""


@dataclass(frozen=True)
class Impl:
    """One column of the record.

    `in_place` names the passes in which it overwrites its inputs: it then works on copies of its own. `not_captured`
    names those in which it is timed by events: a host synchronisation, or inputs to restore before every call. `random`:
    its results depend on a generator of its own, so there is nothing to compare them with.
    """

    name: str
    call: Function
    in_place: tuple[str, ...] = ()
    not_captured: tuple[str, ...] = ()
    random: bool = False


@dataclass(frozen=True)
class _Entry:
    build: Callable[[], Function]
    in_place: tuple[str, ...] = ()
    not_captured: tuple[str, ...] = ()
    random: bool = False


@dataclass
class Found:
    """Impls of one op, and why the others that were asked for are missing."""

    impls: list[Impl] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


_ENTRIES: dict[tuple[str, str], _Entry] = {}
_unavailable: dict[str, str] = {}


def _peer(
    op: str, name: str, in_place: tuple[str, ...] = (), not_captured: tuple[str, ...] = (), random: bool = False
) -> Callable[[Callable[[], Function]], Callable[[], Function]]:
    def register(build: Callable[[], Function]) -> Callable[[], Function]:
        _ENTRIES[op, name] = _Entry(build, in_place, not_captured, random)
        return build

    return register


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def unavailable(name: str) -> str | None:
    """Why the peer's package cannot be used, or None. Tries the import once in a process."""
    if name not in PACKAGES:
        return None
    if name not in _unavailable:
        module, distribution = PACKAGES[name]
        try:
            importlib.import_module(module)
            _unavailable[name] = ""
        except ModuleNotFoundError as error:
            known = error.name is not None and (module + ".").startswith(error.name + ".")
            _unavailable[name] = (
                f"not installed (pip install {distribution})" if known else f"cannot be imported: {error}"
            )
        except Exception as error:
            _unavailable[name] = f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return _unavailable[name] or None


def find(op: str, ours: Function, reference: Function, names: tuple[str, ...]) -> Found:
    """`tt` and the peers of `names` that have a counterpart of `op`.

    `reference` is the eager peer of an op that has none in this file: one whose reference is torch's own function, or for which
    torch has none.
    """
    found = Found([Impl("tt", ours)])
    eager_entry = _ENTRIES.get((op, "eager"))
    eager = eager_entry.build() if eager_entry is not None else reference
    random = eager_entry is not None and eager_entry.random
    for name in names:
        if name == "eager":
            found.impls.append(Impl("eager", eager, random=random))
        elif name == "compile":
            if op not in NOT_COMPILED:
                found.impls.append(Impl("compile", torch.compile(eager, dynamic=False), random=random))
        elif name == "compile_max":
            compiled = torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs")
            found.impls.append(Impl(name, compiled, random=random))
        elif (op, name) in _ENTRIES:
            entry = _ENTRIES[op, name]
            reason = unavailable(name)
            if reason is None:
                try:
                    found.impls.append(Impl(name, entry.build(), entry.in_place, entry.not_captured, entry.random))
                except Exception as error:  # the package is there, this function of it is not
                    reason = f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            if reason is not None:
                found.missing[name] = reason
    return found


# --------------------------------------------------------------------------------------------------------------------
# Eager: what torch itself offers
# --------------------------------------------------------------------------------------------------------------------


@_peer("sum", "eager")
def _sum_eager() -> Function:
    return torch.sum


@_peer("mean", "eager")
def _mean_eager() -> Function:
    return torch.mean


@_peer("cumsum", "eager")
def _cumsum_eager() -> Function:
    return torch.cumsum


@_peer("vector_add", "eager")
def _vector_add_eager() -> Function:
    return lambda x, y: x + y


@_peer("softmax", "eager")
def _softmax_eager() -> Function:
    return lambda x, dim=-1: torch.softmax(x, dim)


@_peer("rms_norm", "eager")
def _rms_norm_eager() -> Function:
    def call(x: torch.Tensor, weight: Any = None, eps: float = 1e-6, weight_offset: float = 0.0) -> torch.Tensor:
        if weight is not None and weight_offset:
            weight = weight + weight_offset
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    return call


@_peer("layer_norm", "eager")
def _layer_norm_eager() -> Function:
    return lambda x, weight=None, bias=None, eps=1e-5: F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@_peer("group_norm", "eager")
def _group_norm_eager() -> Function:
    return lambda x, num_groups, weight=None, bias=None, eps=1e-5: F.group_norm(x, num_groups, weight, bias, eps)


@_peer("add_rms_norm", "eager")
def _add_rms_norm_eager() -> Function:
    norm = _rms_norm_eager()

    def call(x: torch.Tensor, residual: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return norm(total, *args, **options), total

    return call


@_peer("add_layer_norm", "eager")
def _add_layer_norm_eager() -> Function:
    norm = _layer_norm_eager()

    def call(x: torch.Tensor, residual: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return norm(total, *args, **options), total

    return call


@_peer("log_softmax", "eager")
def _log_softmax_eager() -> Function:
    return lambda x, dim=-1: torch.log_softmax(x, dim)


@_peer("geglu", "eager")
def _geglu_eager() -> Function:
    return lambda gate, up, approximate="tanh": F.gelu(gate, approximate=approximate) * up


@_peer("kl_div", "eager")
def _kl_div_eager() -> Function:
    def call(
        logits: torch.Tensor, target_logits: torch.Tensor, *, temperature: float = 1.0, reduction: str = "mean"
    ) -> torch.Tensor:
        p, q = (torch.log_softmax(z / temperature if temperature != 1.0 else z, -1) for z in (logits, target_logits))
        rows = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
        return {"none": lambda: rows, "sum": rows.sum, "mean": rows.mean}[reduction]()

    return call


@_peer("huber_loss", "eager")
def _huber_loss_eager() -> Function:
    return lambda input, target, delta=1.0, reduction="mean": F.huber_loss(input, target, reduction, delta)


@_peer("swiglu", "eager")
def _swiglu_eager() -> Function:
    return lambda gate, up: F.silu(gate) * up


@_peer("rope", "eager")
def _rope_eager() -> Function:
    """As Hugging Face writes it: full-width tables, the rotated half by concatenation."""

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def call(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _need(not interleaved, "the Hugging Face formula rotates halves, not pairs")
        cos, sin = (_rope_table(table, q) for table in (cos, sin))
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    return call


def _rope_table(table: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """cos or sin as `(1 or B, 1, S, D)`, from tables of half or full width with or without a batch dimension."""
    if table.shape[-1] * 2 == q.shape[-1]:
        table = torch.cat((table, table), -1)
    _need(table.shape[-1] == q.shape[-1], "the whole head must be rotated")
    table = table if table.dim() >= 3 else table[None]  # (1 or B, S, D)
    return table[:, None] if table.dim() == 3 else table


@_peer("cross_entropy", "eager")
def _cross_entropy_eager() -> Function:
    def call(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        _plain_cross_entropy(options, also=("weight", "label_smoothing"))
        return F.cross_entropy(
            logits.float(),
            target,
            weight=options.get("weight"),
            ignore_index=options.get("ignore_index", -100),
            label_smoothing=options.get("label_smoothing", 0.0),
            reduction=options.get("reduction", "mean"),
        )

    return call


@_peer("linear_cross_entropy", "eager")
def _linear_cross_entropy_eager() -> Function:
    loss = _cross_entropy_eager()

    def call(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: Any = None, **options: Any
    ) -> torch.Tensor:
        return loss(F.linear(hidden, weight, bias), target, **options)

    return call


def _plain_cross_entropy(options: dict[str, Any], also: tuple[str, ...] = ()) -> None:
    """Every option outside ignore_index, reduction and `also` must be off."""
    for name, value in options.items():
        if name not in ("ignore_index", "reduction", *also):
            _need(value is None or value == 0.0, f"no {name}")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@_peer("linear", "eager")
def _linear_eager() -> Function:
    def call(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, activation: str = "none") -> torch.Tensor:
        return _ACTIVATIONS[activation](F.linear(x, weight, bias))

    return call


@_peer("matmul", "eager")
def _matmul_eager() -> Function:
    return lambda a, b: a @ b


@_peer("bmm", "eager")
def _bmm_eager() -> Function:
    return torch.bmm


@_peer("cast", "eager")
def _cast_eager() -> Function:
    return lambda x, dtype: x.to(dtype)


@_peer("fused_add_mul", "eager")
def _fused_add_mul_eager() -> Function:
    return lambda x, y, z: (x + y) * z


@_peer("bias_gelu", "eager")
def _bias_gelu_eager() -> Function:
    return lambda x, bias, approximate="tanh": F.gelu(x + bias, approximate=approximate)


@_peer("dropout", "eager", random=True)
def _dropout_eager() -> Function:
    return lambda x, p, seed, offset=0: F.dropout(x, p)


@_peer("bias_dropout_residual", "eager", random=True)
def _bias_dropout_residual_eager() -> Function:
    return lambda x, bias, residual, p, seed, offset=0: residual + F.dropout(x if bias is None else x + bias, p)


# --------------------------------------------------------------------------------------------------------------------
# Attention through torch
# --------------------------------------------------------------------------------------------------------------------


def _plain_attention(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> None:
    """Only causal and scale may be set; torch aligns a causal mask to the top left, so the lengths must agree then."""
    off: dict[str, Any] = {"window_left": -1, "window_right": -1, "softcap": 0.0}
    for name in ("window_left", "window_right", "softcap", "alibi_slopes", "attn_bias", "sinks"):
        value = options.get(name, off.get(name))
        _need(not isinstance(value, torch.Tensor) and value == off.get(name), f"no {name}")
    _need(
        not options.get("causal", False) or q.shape[-2] == k.shape[-2],
        "causal with unequal lengths is aligned otherwise",
    )


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    _plain_attention(q, k, options)
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=options.get("causal", False), scale=options.get("scale"), enable_gqa=q.shape[1] != k.shape[1]
    )


@_peer("flash_attn", "eager")
def _flash_attn_eager() -> Function:
    return lambda q, k, v, **options: _sdpa(q, k, v, options)


@_peer("flash_attn_fp8", "eager")
def _flash_attn_fp8_eager() -> Function:
    """Without a float8 attention torch computes in half precision."""

    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_scale: torch.Tensor,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        out_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> torch.Tensor:
        dtype = out_dtype or torch.bfloat16
        pairs = ((q, q_scale), (k, k_scale), (v, v_scale))
        q, k, v = ((x.float() * factor[..., None, None]).to(dtype) for x, factor in pairs)
        return _sdpa(q, k, v, options)

    return call


def _sdpa_backend(backend: SDPBackend) -> Function:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v, options)

    return call


@_peer("flash_attn", "cudnn")
def _flash_attn_cudnn() -> Function:
    return _sdpa_backend(SDPBackend.CUDNN_ATTENTION)


@_peer("flash_attn", "flash2")
def _flash_attn_flash2() -> Function:
    return _sdpa_backend(SDPBackend.FLASH_ATTENTION)


@_peer("flash_attn", "fa4")
def _flash_attn_fa4() -> Function:
    from flash_attn.cute import flash_attn_func

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        _plain_attention(q, k, options)
        # (B, H, S, D) -> (B, S, H, D), a view
        out = flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)),
            softmax_scale=options.get("scale"),
            causal=options.get("causal", False),
        )
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


# --------------------------------------------------------------------------------------------------------------------
# Liger-Kernel
# --------------------------------------------------------------------------------------------------------------------


@_peer("softmax", "liger")
def _softmax_liger() -> Function:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    def call(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        _need(dim in (-1, x.dim() - 1), "the last dimension only")
        return LigerSoftmaxFunction.apply(x)

    return call


@_peer("rms_norm", "liger")
def _rms_norm_liger() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def call(x: torch.Tensor, weight: Any = None, eps: float = 1e-6, weight_offset: float = 0.0) -> torch.Tensor:
        _need(weight is not None, "a weight is required")
        # in_place=False: its default writes the gradient over the upstream gradient, which ours leaves alone
        return LigerRMSNormFunction.apply(x, weight, eps, weight_offset, "llama", False)

    return call


# The backward writes its gradients over gate and up. Replayed on its own results the data would decay, so it is timed
# by events, the inputs restored before every call.
@_peer("swiglu", "liger", in_place=("bwd", "fwdbwd"), not_captured=("bwd", "fwdbwd"))
def _swiglu_liger() -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


# Rotates q and k in place where they are (B, S, H, D) in memory; a rotation keeps the data's size, so replays are fine.
@_peer("rope", "liger", in_place=PASSES)
def _rope_liger() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def call(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _need(not interleaved, "rotates halves, not pairs")
        cos, sin = (_rope_table(table, q).squeeze(1) for table in (cos, sin))  # (1 or B, S, D)
        return LigerRopeFunction.apply(q, k, cos, sin)

    return call


# The forward writes the gradient over the logits, and asks the host for the number of targets.
@_peer("cross_entropy", "liger", in_place=PASSES, not_captured=PASSES)
def _cross_entropy_liger() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def call(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        _need(logits.dim() == 2, "two dimensions only")
        softcap = options.get("softcap", 0.0)
        return liger_cross_entropy(
            logits,
            target,
            weight=options.get("weight"),
            ignore_index=options.get("ignore_index", -100),
            reduction=options.get("reduction", "mean"),
            label_smoothing=options.get("label_smoothing", 0.0),
            lse_square_scale=options.get("z_loss", 0.0),
            softcap=softcap or None,
        )

    return call


# --------------------------------------------------------------------------------------------------------------------
# quack
# --------------------------------------------------------------------------------------------------------------------


@_peer("softmax", "quack")
def _softmax_quack() -> Function:
    from quack.softmax import softmax

    def call(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        _need(x.dim() == 2 and dim in (-1, 1), "the last of two dimensions only")
        return softmax(x)

    return call


@_peer("rms_norm", "quack")
def _rms_norm_quack() -> Function:
    from quack.rmsnorm import rmsnorm

    def call(x: torch.Tensor, weight: Any = None, eps: float = 1e-6, weight_offset: float = 0.0) -> torch.Tensor:
        _need(weight_offset == 0.0, "no weight_offset")
        return rmsnorm(x, weight, eps=eps)

    return call


@_peer("cross_entropy", "quack")
def _cross_entropy_quack() -> Function:
    from quack.cross_entropy import cross_entropy

    def call(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        _plain_cross_entropy(options)
        return cross_entropy(
            logits,
            target,
            ignore_index=options.get("ignore_index", -100),
            reduction=options.get("reduction", "mean"),
        )

    return call


@_peer("matmul", "quack")
def _matmul_quack() -> Function:
    from quack.gemm_interface import gemm

    def call(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        _need(not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)), "no gradient")
        _need(a.dim() == 2 and b.dim() == 2, "two dimensions only")
        return gemm(a, b)

    return call


@_peer("linear", "quack")
def _linear_quack() -> Function:
    from quack.linear import linear_act_func, linear_func

    names = {"relu": "relu", "gelu_tanh": "gelu_tanh_approx", "silu": "silu"}

    def call(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, activation: str = "none") -> torch.Tensor:
        if activation == "none":
            return linear_func(x, weight, bias)
        _need(activation in names, f"no fused {activation}")
        graded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        _need(not graded, "its backward starts from the value before the activation")
        return linear_act_func(x, weight, names[activation], bias=bias, store_preact=False)[1]

    return call
