"""Modules over the ops: what a Llama-style decoder is made of, a paged key-value cache to generate with, and the losses.

Parameters have the names that Hugging Face's Llama gives them, so its checkpoints load: `LlamaBlock` takes the state dict of one
`LlamaDecoderLayer`. The projections are `torch.nn.Linear`, which quantisation, LoRA and sharding tools know; everything else is
`torch.ops.tt.*`. Every module trains, compiles with `fullgraph=True` and runs on CPU.

Training, or any forward without a cache:

>>> import torch
>>> block = LlamaBlock(64, 128, heads=4, kv_heads=2)
>>> rotary = RotaryEmbedding(16)
>>> x = torch.randn(2, 10, 64)
>>> y = block(x, *rotary(torch.arange(10)))

Generating: `allocate` once before each forward, for all layers; the prompt first, then one token at a time (or up to 8, to verify
a draft model's).

>>> cache = KVCache(layers=1, batch=2, max_length=512, kv_heads=2, head_dim=16)
>>> with torch.no_grad():
...     y = block(x, *rotary(cache.allocate(10)), cache)
...     y = block(x[:, :1], *rotary(cache.allocate(1)), cache)
>>> cache.lengths
[11, 11]
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import torch_triton_ops

__all__ = [
    "Attention",
    "BradleyTerryLoss",
    "CPOLoss",
    "CrossEntropyLoss",
    "DPOLoss",
    "FocalLoss",
    "GRPOLoss",
    "HuberLoss",
    "InfoNCELoss",
    "JSDivLoss",
    "KLDivLoss",
    "KTOLoss",
    "KVCache",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LlamaBlock",
    "ORPOLoss",
    "RMSNorm",
    "RotaryEmbedding",
    "SimPOLoss",
    "SwiGLU",
]

_MAX_NEW_TOKENS = 8  # of paged_decode_attn


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension by `tt.rms_norm`; parameter `weight`.

    hidden_size: its length. weight_offset: 1.0 for Gemma, whose weight begins at 0.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weight_offset = weight_offset
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size), any floating dtype; the result has x's."""
        return torch.ops.tt.rms_norm(x, self.weight, self.eps, self.weight_offset)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension by `tt.layer_norm`; parameters `weight` and, unless bias=False, `bias`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size), any floating dtype; the result has x's."""
        return torch.ops.tt.layer_norm(x, self.weight, self.bias, self.eps)


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines for `tt.rope`. No parameters.

    head_dim: even. theta: the base of the wavelengths.
    """

    inverse: Tensor

    def __init__(self, head_dim: int, theta: float = 10_000.0, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim is {head_dim}; allowed: an even number")
        inverse = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (S,), or (B, S) where sequences stand at different places, to two float32 tables (1 or B, S, head_dim)."""
        angles = positions.reshape(-1, positions.shape[-1], 1).float() * self.inverse.float()
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), Llama's feed-forward network."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        return self.down_proj(torch.ops.tt.swiglu(self.gate_proj(x), self.up_proj(x)))


class KVCache:
    """Keys and values of all layers, in blocks of `page` tokens that sequences take as they grow.

    layers, batch, kv_heads, head_dim: sizes of the model and the number of sequences. max_length: the longest that one sequence
    may become. page: 16 to 256. blocks: how many there are for all sequences together; by default enough for all at max_length,
    less where most stay shorter. dtype: the model's, or float8_e4m3fn or float8_e5m2: then each layer's keys and values are
    divided by its scale, `k_scales[layer]` and `v_scales[layer]`, float32 of shape () or (kv_heads,), 1 by default.

    One `allocate` before a forward makes room for its new tokens in every layer; `Attention` then calls `append` and reads
    `keys`, `values`, `block_table` and `seq_lens`. Lengths are known on the host, so nothing here waits for the GPU. Up to 8 new
    tokens, all tensors keep their places from step to step, positions too: capture the forward in a CUDA graph, and replay it
    after each `allocate`.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        *,
        page: int = 64,
        blocks: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 16 <= page <= 256:
            raise ValueError(f"KVCache: page is {page}; allowed: 16 to 256 tokens")
        for name, size in (("layers", layers), ("batch", batch), ("max_length", max_length)):
            if size < 1:
                raise ValueError(f"KVCache: {name} is {size}; allowed: a number >= 1")
        pages = -(-max_length // page)
        self.blocks = batch * pages if blocks is None else blocks
        self.batch, self.max_length, self.page = batch, max_length, page
        shape = (self.blocks, page, kv_heads, head_dim)
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )
        scaled = dtype.itemsize == 1
        self.k_scales = [torch.ones((), device=device) if scaled else None for _ in range(layers)]
        self.v_scales = [torch.ones((), device=device) if scaled else None for _ in range(layers)]
        self.block_table = torch.zeros(batch, pages, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.slots = torch.empty(0, dtype=torch.int64, device=device)
        """(batch * T,): where the newest tokens go; -1 for padding."""
        self.prefilling = False
        """Whether the newest tokens are the first ones of every sequence."""
        self._places: dict[int, Tensor] = {}  # (2, batch, T): positions and slots, by T
        self._free = list(range(self.blocks))[::-1]
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._lengths = [0] * batch

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return list(self._lengths)

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    def allocate(self, tokens: int | Sequence[int]) -> Tensor:
        """Make room for new tokens of every sequence, and count them in.

        tokens: how many each sequence gets, T. For prompts of different lengths a number for each sequence; x is then padded on
        the right to the largest, T, and the padding is not kept. Onto tokens that are there already, all get the same T <= 8.

        Returns the tokens' positions, (batch, T), int64. Raises RuntimeError, and changes nothing, if a sequence would exceed
        max_length or blocks run out.
        """
        counts = [tokens] * self.batch if isinstance(tokens, int) else list(tokens)
        if len(counts) != self.batch or min(counts) < 0 or max(counts) < 1:
            raise ValueError(f"KVCache.allocate: tokens is {tokens}; allowed: numbers > 0, one or {self.batch}")
        T = max(counts)
        prefilling = not any(self._lengths)
        if not prefilling and (T > _MAX_NEW_TOKENS or min(counts) != T):
            raise ValueError(
                f"KVCache.allocate: tokens is {tokens} with sequences of lengths {self._lengths}; allowed: one number up to"
                f" {_MAX_NEW_TOKENS} for all sequences, or any numbers when all are empty"
            )
        lengths = [n + more for n, more in zip(self._lengths, counts, strict=True)]
        needed = [-(-n // self.page) - len(owned) for n, owned in zip(lengths, self._owned, strict=True)]
        for b, n in enumerate(lengths):
            if n > self.max_length:
                raise RuntimeError(
                    f"KVCache.allocate: sequence {b} would have {n} tokens; max_length is {self.max_length}: reset() it, or make"
                    " a cache for longer ones"
                )
        if sum(needed) > len(self._free):
            raise RuntimeError(
                f"KVCache.allocate: {sum(needed)} more blocks of {self.page} tokens are needed and {len(self._free)} of"
                f" {self.blocks} are free: reset() a sequence, or make a cache of more blocks"
            )
        for owned, more in zip(self._owned, needed, strict=True):
            owned += [self._free.pop() for _ in range(more)]
        if any(needed):
            self._send_table()

        device = self.seq_lens.device
        places = self._places.get(T)
        if places is None:
            places = torch.empty(2, self.batch, T, dtype=torch.int64, device=device)
            if T <= _MAX_NEW_TOKENS:
                self._places[T] = places
        positions, slots = places.unbind(0)
        torch.add(self.seq_lens[:, None], torch.arange(T, device=device), out=positions)
        row = positions // self.page
        torch.add(
            self.block_table.gather(1, row.clamp(max=self.block_table.shape[1] - 1)) * self.page,
            positions % self.page,
            out=slots,
        )
        self._lengths, self.prefilling, self.slots = lengths, prefilling, slots.view(-1)
        self._send_lengths()
        if min(counts) != T:
            slots.masked_fill_(positions >= self.seq_lens[:, None], -1)
        return positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of the newest tokens, (batch, kv_heads, T, head_dim), for one layer."""
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
        torch.ops.tt.kv_cache_write(
            *(k, v, self.keys[layer], self.values[layer], self.slots),
            k_scale=self.k_scales[layer],
            v_scale=self.v_scales[layer],
        )

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of each sequence and free the blocks behind them, as after rejected draft tokens."""
        if len(lengths) != self.batch or any(not 0 <= n <= m for n, m in zip(lengths, self._lengths, strict=True)):
            raise ValueError(f"KVCache.truncate: lengths is {list(lengths)}; allowed: 0 up to each of {self._lengths}")
        self._lengths = list(lengths)
        for n, owned in zip(lengths, self._owned, strict=True):
            kept = -(-n // self.page)
            self._free += owned[kept:][::-1]
            del owned[kept:]
        self._send_lengths()

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Forget these sequences, all by default, and free their blocks."""
        gone = range(self.batch) if sequences is None else sequences
        self.truncate([0 if b in gone else n for b, n in enumerate(self._lengths)])

    def _send_table(self) -> None:
        table = torch.zeros(self.block_table.shape, dtype=torch.int32)
        for row, owned in zip(table, self._owned, strict=True):
            row[: len(owned)] = torch.tensor(owned, dtype=torch.int32)
        self._send(table, self.block_table)

    def _send_lengths(self) -> None:
        self._send(torch.tensor(self._lengths, dtype=torch.int32), self.seq_lens)

    @staticmethod
    def _send(source: Tensor, target: Tensor) -> None:
        """Host to device, without waiting for the device."""
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


class Attention(nn.Module):
    """Causal self-attention with grouped heads and rotary positions; Llama's q_proj, k_proj, v_proj and o_proj.

    hidden_size: of x. heads, kv_heads: of queries, and of keys and values (by default as many). head_dim: hidden_size / heads by
    default. layer: which of a cache's layers is this module's. scale, softcap, window_left: as in `tt.flash_attn`.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer: int = 0,
        bias: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        window_left: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"Attention: kv_heads is {kv_heads}; allowed: a number that divides heads, {heads}")
        if head_dim is None and hidden_size % heads:
            raise ValueError(
                f"Attention: heads is {heads}; allowed: a divisor of hidden_size, {hidden_size}, or give head_dim"
            )
        self.head_dim = hidden_size // heads if head_dim is None else head_dim
        self.layer, self.scale, self.softcap, self.window_left = layer, scale, softcap, window_left
        inner, inner_kv = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias, device, dtype)
        self.k_proj = nn.Linear(hidden_size, inner_kv, bias, device, dtype)
        self.v_proj = nn.Linear(hidden_size, inner_kv, bias, device, dtype)
        self.o_proj = nn.Linear(inner, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, S, hidden_size), tables of its positions as `tt.rope` takes them; the result is like x.

        With a cache, whose `allocate(S)` has been called for this forward, x is what follows its tokens. Inference only: a write
        to the cache cuts gradients, so that without torch.no_grad() it raises NotImplementedError.
        """
        # (B, heads, S, head_dim): views, the ops take any strides
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = torch.ops.tt.rope(q, k, cos, sin)
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "window_left": self.window_left}
        if cache is not None:
            cache.append(self.layer, k, v)
        if cache is None or cache.prefilling:
            out = torch.ops.tt.flash_attn(q, k, v, causal=True, **options).transpose(1, 2)
        else:
            out = torch.ops.tt.paged_decode_attn(
                *(q.transpose(1, 2), cache.keys[self.layer], cache.values[self.layer]),
                *(cache.block_table, cache.seq_lens),
                k_scale=cache.k_scales[self.layer],
                v_scale=cache.v_scales[self.layer],
                **options,
            )
        return self.o_proj(out.flatten(2))


class LlamaBlock(nn.Module):
    """One layer of Llama: x + self_attn(input_layernorm(x)), then h + mlp(post_attention_layernorm(h)).

    hidden_size, intermediate_size: of x, and of the feed-forward network. The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer: int = 0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_layernorm = RMSNorm(hidden_size, eps, **where)
        self.self_attn = Attention(hidden_size, heads, kv_heads, head_dim, layer=layer, **where)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, **where)
        self.mlp = SwiGLU(hidden_size, intermediate_size, **where)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, S, hidden_size) to the same; tables and cache as in `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Loss(nn.Module):
    """A loss op as a module: the op's options are the constructor's arguments, its tensors are forward's."""

    op: ClassVar[str]

    def __init_subclass__(cls) -> None:
        # The registry's schema is the signature, so that help() and editors show it and nothing is written twice.
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(a.name, inspect.Parameter.KEYWORD_ONLY, default=a.default)
                for a in torch_triton_ops.registry.spec(cls.op).arguments
                if not a.is_tensor
            ]
        )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        allowed = inspect.signature(type(self)).parameters
        for name in options:
            if name not in allowed:
                raise TypeError(f"{type(self).__name__}: no option '{name}'; allowed: {', '.join(allowed)}")
        self.options = {name: options.get(name, parameter.default) for name, parameter in allowed.items()}

    def forward(self, *tensors: Tensor | None, **named: Tensor | None) -> Any:
        """The op's tensors, in its order or by name; the op's results."""
        return getattr(torch.ops.tt, self.op)(*tensors, **named, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CrossEntropyLoss(_Loss):
    """(logits, target, weight=None): `tt.cross_entropy`."""

    op = "cross_entropy"


class LinearCrossEntropyLoss(_Loss):
    """(hidden, weight, target, bias=None), the head's weight (V, H): `tt.linear_cross_entropy`. The logits are never whole."""

    op = "linear_cross_entropy"


class DPOLoss(_Loss):
    """(policy_chosen, policy_rejected, ref_chosen, ref_rejected, delta=None), log-probabilities (B,): `tt.dpo_loss`.

    Results: loss, chosen reward, rejected reward.
    """

    op = "dpo_loss"


class CPOLoss(_Loss):
    """(policy_chosen, policy_rejected), log-probabilities (B,): `tt.cpo_loss`. Results as DPOLoss."""

    op = "cpo_loss"


class SimPOLoss(_Loss):
    """(policy_chosen, policy_rejected), mean log-probabilities (B,): `tt.simpo_loss`. Results as DPOLoss."""

    op = "simpo_loss"


class ORPOLoss(_Loss):
    """(policy_chosen, policy_rejected), mean log-probabilities (B,): `tt.orpo_loss`. Results as DPOLoss."""

    op = "orpo_loss"


class KTOLoss(_Loss):
    """(policy, reference, label, kl=None): `tt.kto_loss`. Results: loss, reward."""

    op = "kto_loss"


class GRPOLoss(_Loss):
    """(logprob, advantage, mask, old_logprob=None, ref_logprob=None, num_tokens=None): `tt.grpo_loss`.

    Results: loss, KL to the reference, fraction of clipped tokens.
    """

    op = "grpo_loss"


class BradleyTerryLoss(_Loss):
    """(chosen, rejected, margin=None), a reward model's rewards: `tt.bradley_terry_loss`."""

    op = "bradley_terry_loss"


class KLDivLoss(_Loss):
    """(logits, target_logits): `tt.kl_div`."""

    op = "kl_div"


class JSDivLoss(_Loss):
    """(logits, target_logits): `tt.js_div`."""

    op = "js_div"


class FocalLoss(_Loss):
    """(logits, target): `tt.focal_loss`."""

    op = "focal_loss"


class HuberLoss(_Loss):
    """(input, target): `tt.huber_loss`."""

    op = "huber_loss"


class InfoNCELoss(_Loss):
    """(query, key): `tt.info_nce_loss`."""

    op = "info_nce_loss"
