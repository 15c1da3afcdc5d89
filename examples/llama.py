"""A small Llama: the same `nn.Module` on `torch.ops.tt.*` or on plain torch operators.

RMSNorm before each block, rotary positions, grouped-query causal attention, SwiGLU, cross entropy. `ops="tt"` takes
every one of them, and all matrix products, from `torch.ops.tt`; `ops="torch"` takes PyTorch's own. Parameters, initial
values and arithmetic are the same, so the two can be trained side by side. The embedding look-up and the residual
additions are PyTorch's in both.

Parameters stay in float32 (the master weights that the optimiser updates); activations and the weights' working copies
have `config.dtype`.

| tensor | shape | dtype |
|---|---|---|
| tokens, targets | (B, S) | int64 |
| hidden state | (B, S, hidden) | config.dtype |
| q; k, v | (B, heads, S, head_dim); (B, kv_heads, S, head_dim) | config.dtype |
| logits | (B, S, vocab) | config.dtype |
| loss | () | float32 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model. `heads` is a multiple of `kv_heads`; `hidden` is `heads * head_dim`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    vocab: int = 256
    rope_theta: float = 10_000.0
    eps: float = 1e-6
    dtype: torch.dtype = torch.float32

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class TritonOps:
    """The operators of this package."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.ops.tt.rms_norm(x, weight, eps)

    @staticmethod
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.tt.linear(x, weight)

    @staticmethod
    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.tt.rope(q, k, cos, sin)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.tt.flash_attn(q, k, v, causal=True)

    @staticmethod
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return torch.ops.tt.swiglu(gate, up)

    @staticmethod
    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return torch.ops.tt.cross_entropy(logits, target)


class TorchOps:
    """The same operators in plain PyTorch."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

        return rotate(q), rotate(k)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


OPS = {"tt": TritonOps, "torch": TorchOps}


class RMSNorm(nn.Module):
    def __init__(self, config: LlamaConfig, ops: type[TritonOps] | type[TorchOps]) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.eps
        self.weight = nn.Parameter(torch.ones(config.hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight.to(x.dtype), self.eps)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, std: float, ops: type[TritonOps] | type[TorchOps]) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, ops: type[TritonOps] | type[TorchOps]) -> None:
        super().__init__()
        self.ops, self.head_dim = ops, config.head_dim
        self.sizes = [config.hidden, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim]
        self.qkv = Linear(config.hidden, sum(self.sizes), 0.02, ops)
        self.out = Linear(config.hidden, config.hidden, 0.02 / math.sqrt(2 * config.layers), ops)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # (B, S, heads * head_dim) to (B, heads, S, head_dim): a view, the operators take any strides
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(x).split(self.sizes, dim=-1))
        q, k = self.ops.rope(q, k, cos, sin)
        return self.out(self.ops.attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig, ops: type[TritonOps] | type[TorchOps]) -> None:
        super().__init__()
        self.ops = ops
        self.gate = Linear(config.hidden, config.ffn, 0.02, ops)
        self.up = Linear(config.hidden, config.ffn, 0.02, ops)
        self.down = Linear(config.ffn, config.hidden, 0.02 / math.sqrt(2 * config.layers), ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.ops.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, ops: type[TritonOps] | type[TorchOps]) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config, ops), Attention(config, ops)
        self.ffn_norm, self.ffn = RMSNorm(config, ops), FeedForward(config, ops)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """The model; `ops` is "tt" or "torch". Seed torch before building two of them to give both the same weights."""

    def __init__(self, config: LlamaConfig, ops: str = "tt") -> None:
        super().__init__()
        self.config, self.ops = config, OPS[ops]
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config, self.ops) for _ in range(config.layers))
        self.norm = RMSNorm(config, self.ops)
        self.head = Linear(config.hidden, config.vocab, 0.02, self.ops)
        # (context, head_dim / 2): element i of a head turns with element i + head_dim / 2
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.context).float(), inverse)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S) tokens, S at most `config.context`, to (B, S, vocab) logits."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens).to(self.config.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per token, a float32 scalar."""
        return self.ops.cross_entropy(self.logits(tokens).float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Append `count` sampled tokens to a (1, S) prompt; `temperature=0` takes the likeliest."""
        tokens = prompt
        for _ in range(count):
            logits = self.logits(tokens[:, -self.config.context :])[:, -1].float()
            if temperature == 0:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, following), dim=1)
        return tokens
