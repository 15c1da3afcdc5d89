"""A language model small enough to tune by hand on a CPU: a Llama over words, trained on the Python reference.

Every Python carries `pydoc_data.topics`, the language's reference manual. Its sentences are the documents: each ends with
the token `end`, so that the model learns to stop. A prompt is a sentence's first words; the answer is the rest.

Tokens are the words that the text has often, with the space before them, and bytes for everything else.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_triton_ops.nn import LlamaBlock, RMSNorm, RotaryEmbedding
from torch_triton_ops.rlhf.models import Hidden, Tokenizer

PROMPT_WORDS = 3
FIRST_WORD = 257  # tokens below it: the bytes, and the end
LEAST = 5  # how often a word must stand in the text to be a token
HELD_OUT = 7  # one sentence in so many is never trained on, and gives prompts

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
    context: int = 64  # tokens of a training sample


class SmallLM(nn.Module):
    """(B, S) tokens to Hidden: the Llama blocks of torch_triton_ops.nn."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.ModuleList(
            LlamaBlock(config.hidden, config.ffn, config.heads, config.kv_heads) for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.rotary = RotaryEmbedding(config.hidden // config.heads)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Hidden:
        x = self.embedding(tokens)
        tables = self.rotary(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x, *tables)
        return Hidden(self.norm(x), self.head.weight)


# --------------------------------------------------------------------------------------------------------------------
# Text and training
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def sentences() -> tuple[str, ...]:
    """The sentences of the Python reference that are prose and of moderate length, in its order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        message = "this Python came without pydoc_data.topics; use a Python with its whole standard library"
        raise ModuleNotFoundError(message) from error
    found: list[str] = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            found += filter(_PROSE.fullmatch, re.split(r"(?<=[a-z)]\.) (?=[A-Z])", text))
    return tuple(dict.fromkeys(found))


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
    """The first words of sentences that are not trained on, where they are words of letters."""
    starts = (" ".join(sentence.split()[:PROMPT_WORDS]) for sentence in sentences()[::HELD_OUT])
    return [start for start in dict.fromkeys(starts) if re.fullmatch(r"[A-Za-z ,-]+", start)]


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
    device, context = model.head.weight.device, model.config.context
    kept = [s for i, s in enumerate(sentences()) if i % HELD_OUT]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(kept), generator=generator).tolist()
    text = torch.tensor([t for i in order for t in (*tokens.encode(kept[i]), tokens.end)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    # up over a tenth of the steps, then a cosine down to nothing
    factor = lambda step: min(10 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    window = torch.arange(context + 1)
    losses: list[float] = []
    for step in range(steps):
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        sample = text[starts + window].to(device)
        states, weight, *_ = model(sample[:, :-1])
        loss = torch.ops.tt.linear_cross_entropy(states.flatten(0, 1), weight, sample[:, 1:].flatten())
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
