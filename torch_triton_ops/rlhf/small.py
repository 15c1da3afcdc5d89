"""A language model small enough to tune by hand on a CPU: a Llama over words, trained on the Python reference.

Every Python carries `pydoc_data.topics`, the language's reference manual. Its sentences are the documents: each ends with
the token `end`, so that the model learns to stop. A prompt is a sentence's first words; the answer is the rest.

Tokens are the words that the text has often, with the space before them, and bytes for everything else.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_triton_ops.rlhf.models import Hidden, Tokenizer

PROMPT_WORDS = 3
FIRST_WORD = 257  # tokens below it: the bytes, and the end
LEAST = 5  # how often a word must stand in the text to be a token
HELD_OUT = 10  # one sentence in so many is never trained on, and gives prompts

_PROSE = re.compile(r"[A-Z][a-z]* [A-Za-z0-9 ,;:'\"()_-]{20,180}\.")
_PIECE = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)


@dataclass(frozen=True)
class SmallConfig:
    """Sizes. `hidden` is `heads * head_dim`, `heads` a multiple of `kv_heads`."""

    vocab: int
    layers: int = 2
    hidden: int = 64
    heads: int = 2
    kv_heads: int = 1
    ffn: int = 192
    context: int = 64


class _Block(nn.Module):
    def __init__(self, c: SmallConfig) -> None:
        super().__init__()
        self.head_dim = c.hidden // c.heads
        self.sizes = [c.hidden, c.kv_heads * self.head_dim, c.kv_heads * self.head_dim]
        self.attention_norm, self.ffn_norm = nn.Parameter(torch.ones(c.hidden)), nn.Parameter(torch.ones(c.hidden))
        narrow = 0.02 / (2 * c.layers) ** 0.5
        self.qkv, self.out = _weight(sum(self.sizes), c.hidden), _weight(c.hidden, c.hidden, narrow)
        self.gate_up, self.down = _weight(2 * c.ffn, c.hidden), _weight(c.hidden, c.ffn, narrow)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tt = torch.ops.tt
        qkv = tt.linear(tt.rms_norm(x, self.attention_norm), self.qkv)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in qkv.split(self.sizes, dim=-1))
        q, k = tt.rope(q, k, cos, sin)
        x = x + tt.linear(tt.flash_attn(q, k, v, causal=True).transpose(1, 2).flatten(2), self.out)
        gate, up = tt.linear(tt.rms_norm(x, self.ffn_norm), self.gate_up).chunk(2, dim=-1)
        return x + tt.linear(tt.swiglu(gate, up), self.down)


class SmallLM(nn.Module):
    """(B, S) tokens, S at most `config.context`, to Hidden."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding, self.head = _weight(config.vocab, config.hidden), _weight(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden))
        head_dim = config.hidden // config.heads
        angles = torch.outer(torch.arange(config.context), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    cos: Tensor
    sin: Tensor

    def forward(self, tokens: Tensor) -> Hidden:
        length = tokens.shape[1]
        x = torch.nn.functional.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return Hidden(torch.ops.tt.rms_norm(x, self.norm), self.head)


def _weight(outputs: int, inputs: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * std)


# --------------------------------------------------------------------------------------------------------------------
# Text and training
# --------------------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """The sentences of the Python reference that are prose and of moderate length, in its order."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            found += filter(_PROSE.fullmatch, re.split(r"(?<=[a-z)]\.) (?=[A-Z])", text))
    return list(dict.fromkeys(found))


def words() -> list[str]:
    """The words and signs that the sentences have often, in the order of their tokens, from FIRST_WORD on."""
    counts = collections.Counter(piece for sentence in sentences() for piece in _PIECE.findall(sentence))
    return sorted(piece for piece, count in counts.items() if count >= LEAST and len(piece) > 1)


def tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """Tokens 0 to 255 are bytes, 256 is the end, then follow the words of `vocabulary`. Every text can be encoded."""
    numbers = {word: FIRST_WORD + i for i, word in enumerate(vocabulary)}

    def encode(text: str) -> list[int]:
        tokens: list[int] = []
        for piece in _PIECE.findall(text):
            tokens += [numbers[piece]] if piece in numbers else piece.encode()
        return tokens

    def decode(tokens: list[int]) -> str:
        parts = (
            bytes([t]) if t < 256 else vocabulary[t - FIRST_WORD].encode() if t >= FIRST_WORD else b"" for t in tokens
        )
        return b"".join(parts).decode(errors="replace")

    return Tokenizer(encode, decode, end=FIRST_WORD - 1)


def prompts() -> list[str]:
    """The first words of sentences that are not trained on."""
    starts = (" ".join(sentence.split()[:PROMPT_WORDS]) for sentence in sentences()[::HELD_OUT])
    return list(dict.fromkeys(starts))


def train(
    model: SmallLM,
    tokens: Tokenizer,
    steps: int,
    batch: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Teach the model the sentences; the mean loss of the last tenth, in nats per token.

    `report` is called after each step with the steps done and the loss.
    """
    device, context = model.head.device, model.config.context
    kept = [s for i, s in enumerate(sentences()) if i % HELD_OUT]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(kept), generator=generator).tolist()
    text = torch.tensor([t for i in order for t in (*tokens.encode(kept[i]), tokens.end)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    window = torch.arange(context + 1)
    losses: list[float] = []
    for step in range(steps):
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        sample = text[starts + window].to(device)
        states, weight, *_ = model(sample[:, :-1])
        loss = torch.ops.tt.cross_entropy(torch.ops.tt.linear(states, weight).flatten(0, 1), sample[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if report is not None:
            report(step + 1, losses[-1])
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
