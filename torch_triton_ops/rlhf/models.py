"""What tuning asks of a model: a causal language model that can be called with tokens, and a tokenizer of three parts.

A *forward* is a function `(model, tokens) -> output`; tokens are (B, S) int64, padded on the right, which a causal model does
not notice. The output is one of

| output | for | log-probabilities by |
|---|---|---|
| a tensor, the logits (B, S, V) | any module | `torch.ops.tt.cross_entropy` |
| an object with `.logits` | Hugging Face's `...ForCausalLM` | the same |
| `Hidden(states, weight, bias, softcap)` | a module that leaves out its last layer | `torch.ops.tt.linear_logprob` |

With `Hidden` the logits are never whole in memory. `hugging_face_hidden` is such a forward for Hugging Face's models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor], Any]


class Hidden(NamedTuple):
    """The last hidden states (B, S, H) and the layer that would make logits of them: weight (V, H), bias (V,) or None.

    `softcap` > 0: the logits are softcap * tanh(logits / softcap), as in Gemma 2.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0


def call(model: nn.Module, tokens: Tensor) -> Any:
    """The usual forward: the model itself."""
    return model(tokens)


def hugging_face_hidden(model: Any, tokens: Tensor) -> Hidden:
    """A forward for Hugging Face's `...ForCausalLM` that stops before the last layer.

    For models whose logits are that layer's output, with a softcap or without. Those that scale logits (Cohere, Granite)
    need the usual forward.
    """
    head, config = model.get_output_embeddings(), model.config
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"hugging_face_hidden: this model scales its logits ({name}); use forward=call instead")
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    return Hidden(states, head.weight, head.bias, float(softcap))


@dataclass(frozen=True)
class Tokenizer:
    """Text to token numbers and back. `end` follows every answer, and begins an empty prompt.

    `encode` adds nothing of its own: what must begin a text, a chat template's markers for instance, stands in the prompt.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int

    @classmethod
    def of_hugging_face(cls, tokenizer: Any) -> Tokenizer:
        """From a tokenizer of `transformers`."""
        if tokenizer.eos_token_id is None:
            raise ValueError("Tokenizer: the tokenizer has no eos_token; set one")
        return cls(
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            tokenizer.eos_token_id,
        )


def _encode_bytes(text: str) -> list[int]:
    return list(text.encode().replace(b"\0", b""))


def _decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


BYTES = Tokenizer(_encode_bytes, _decode_bytes, end=0)
"""A token is a byte of UTF-8; zero ends an answer."""


# --------------------------------------------------------------------------------------------------------------------
# Batches and their log-probabilities
# --------------------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One prompt with one answer, as tokens; the answer has at least one, and so has the prompt."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Batch:
    """Sequences as tensors. `rows` and `targets` have one element for each token of an answer, N in all."""

    tokens: Tensor  # (B, S) int64, padded on the right
    rows: Tensor  # (N,) int64: b * S + s, where the model predicts an answer's token
    targets: Tensor  # (N,) int64: that token
    lengths: Tensor  # (B,) float32: tokens of each answer
    last: Tensor  # (B,) int64: b * S + s of each sequence's last token

    @property
    def size(self) -> int:
        return self.tokens.shape[0]

    def total(self, values: Tensor) -> Tensor:
        """Sum a value for each answer's token, (N,), over each sequence: (B,). In a fixed order, without atomics."""
        spread = values.new_zeros(self.tokens.numel()).index_copy(0, self.rows, values)
        return spread.view(self.tokens.shape).sum(1)


def collate(sequences: Sequence[Example], pad: int, device: torch.device | str) -> Batch:
    """A batch of sequences. The indices are made on the host, so that no GPU waits for a mask to be counted."""
    width = max(len(s.prompt) + len(s.answer) for s in sequences)
    tokens = torch.full((len(sequences), width), pad)
    rows: list[int] = []
    for b, (prompt, answer) in enumerate(sequences):
        tokens[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        first = b * width + len(prompt) - 1
        rows += range(first, first + len(answer))
    ends = [b * width + len(s.prompt) + len(s.answer) - 1 for b, s in enumerate(sequences)]
    targets = [token for s in sequences for token in s.answer]
    lengths = [float(len(s.answer)) for s in sequences]
    return Batch(
        tokens.to(device),
        torch.tensor(rows).to(device),
        torch.tensor(targets).to(device),
        torch.tensor(lengths).to(device),
        torch.tensor(ends).to(device),
    )


def logprobs(output: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log p of every answer's token given what stands before it: (N,) float32."""
    if isinstance(output, Hidden):
        states = output.states.flatten(0, 1).index_select(0, batch.rows)
        found, _entropy = torch.ops.tt.linear_logprob(
            states, output.weight, batch.targets, output.bias, temperature=temperature, softcap=output.softcap
        )
        return found.float()
    logits = getattr(output, "logits", output).flatten(0, 1).index_select(0, batch.rows).float()
    return -torch.ops.tt.cross_entropy(logits / temperature, batch.targets, reduction="none")


def last_logits(output: Any, rows: Tensor) -> Tensor:
    """Logits at the flat positions `rows` (B,): (B, V) float32."""
    if not isinstance(output, Hidden):
        return getattr(output, "logits", output).flatten(0, 1).index_select(0, rows).float()
    states = output.states.flatten(0, 1).index_select(0, rows)
    weight, bias = (t if t is None else t.to(states.dtype) for t in (output.weight, output.bias))
    logits = torch.ops.tt.linear(states, weight, bias).float()
    return output.softcap * torch.tanh(logits / output.softcap) if output.softcap else logits


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    length: int,
    end: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    forward: Forward = call,
) -> list[list[int]]:
    """Sample one answer for each prompt, of at most `length` tokens; `end` is its last one unless the length cut it off.

    Args:
        prompts: tokens, at least one each; of any lengths.
        length: tokens, at least 1.
        generator: on the model's device.
        temperature: of the softmax; 0 takes the likeliest token.
    """
    device = generator.device
    starts = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(prompts), int(starts.max()) + length), end)
    for b, prompt in enumerate(prompts):
        tokens[b, : len(prompt)] = torch.tensor(prompt)
    tokens, starts = tokens.to(device), starts.to(device)
    every = torch.arange(len(prompts), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    training = model.training
    model.eval()
    for step in range(length):
        width = int(starts.max()) + step
        at = starts + step - 1  # each row's last token
        logits = last_logits(forward(model, tokens[:, :width]), every * width + at)
        if temperature == 0:
            following = logits.argmax(-1)
        else:
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        following = following.masked_fill(done, end)
        tokens[every, at + 1] = following
        done |= following == end
        if bool(done.all()):
            break
    model.train(training)
    answers = []
    for b, row in enumerate(tokens.tolist()):
        answer = row[len(prompts[b]) : len(prompts[b]) + length]
        answers.append(answer[: answer.index(end) + 1] if end in answer else answer)
    return answers


class RewardModel(nn.Module):
    """A score for each sequence: a linear layer over the hidden state of its last token.

    `body` is a causal model whose `forward` gives `Hidden`; its states are `width` wide. The layer starts at zero, so that
    before the first update every answer scores 0.
    """

    def __init__(self, body: nn.Module, width: int, forward: Forward = call) -> None:
        super().__init__()
        self.body, self.body_forward = body, forward
        self.score = nn.Parameter(torch.zeros(1, width))

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32."""
        output = self.body_forward(self.body, batch.tokens)
        if not isinstance(output, Hidden):
            raise TypeError(f"RewardModel: the body's forward must give Hidden, not {type(output).__name__}")
        states = output.states.flatten(0, 1).index_select(0, batch.last)
        return torch.ops.tt.linear(states, self.score.to(states.dtype)).float()[:, 0]
