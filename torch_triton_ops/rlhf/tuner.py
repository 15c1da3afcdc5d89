"""Tune a language model on preferences: a reward model by Bradley-Terry, the policy by DPO, both from the same pairs.

For a pair with prompt x, chosen answer c and rejected answer r, and log p(answer | x) summed over the answer's tokens:

reward model   -log sigmoid(score(x, c) - score(x, r))                       https://doi.org/10.2307/2334029
policy         -log sigmoid(beta * (log p(c) / p_ref(c) - log p(r) / p_ref(r)))    https://arxiv.org/abs/2305.18290

or another loss type of `torch.ops.tt.dpo_loss`. An update takes all its pairs in micro-batches and adds up their gradients,
each micro-batch weighted by its share of the pairs, so that a loss that is a mean over pairs does not depend on how they were
divided. Weights and optimizer are float32; `dtype` switches autocast on, and float16 brings loss scaling with it.

A checkpoint holds weights, optimizers, loss scale, random states and the position in the stream. A run that was killed and
resumed from it computes what the whole run computes; on a CPU, bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_triton_ops.rlhf.models import Batch, Example, Forward, Tokenizer, call, collate, logprobs
from torch_triton_ops.rlhf.preferences import Preference, replacing

VERSION = 1


@dataclass(frozen=True)
class TunerConfig:
    """How to tune. A checkpoint continues under the configuration it was made with.

    Args:
        beta: of DPO: how strongly the policy is held to the reference; above 0.
        loss_type, label_smoothing: of `torch.ops.tt.dpo_loss`.
        sft_weight: of the chosen answers' mean negative log-likelihood, in nats per token, added to the loss
            (https://arxiv.org/abs/2404.19733). DPO alone widens the margin also by making both answers unlikely.
        learning_rate: of the policy's AdamW; `reward_learning_rate` of the reward model's.
        warm_up: updates over which both rates rise from 0, in a straight line.
        pairs: preferences an update takes from a stream.
        micro_pairs: preferences that are in memory at a time; None: all of an update's.
        max_norm: to which the gradient of all parameters together is cut.
        dtype: of autocast, torch.bfloat16 or torch.float16; None: none.
        context: tokens of prompt and answer together; what is over is cut from the prompt's beginning, and from the end of
            an answer that alone is longer. None: nothing is cut.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    learning_rate: float = 1e-5
    reward_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warm_up: int = 0
    pairs: int = 8
    micro_pairs: int | None = None
    max_norm: float = 1.0
    dtype: torch.dtype | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "reward_learning_rate", "max_norm"):
            if not getattr(self, name) > 0:
                raise _bad(name, getattr(self, name), "a number above 0")
        for name, least in (
            ("pairs", 1),
            ("micro_pairs", 1),
            ("context", 2),
            ("warm_up", 0),
            ("weight_decay", 0),
            ("sft_weight", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise _bad(name, value, f"a number of at least {least}")
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise _bad("dtype", self.dtype, "None, torch.bfloat16, torch.float16")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dtype": None if self.dtype is None else str(self.dtype)}


@dataclass(frozen=True)
class Report:
    """What one update did, as it stood before the weights changed.

    Of the policy: `loss`, with the SFT term if there is one; `accuracy`, the share of pairs whose chosen answer gained more
    over the reference than the rejected one; `margin`, by how much, in DPO's rewards; `grad_norm` before it was cut, infinite or
    NaN where float16's loss scale was too high, and then the weights stayed as they were. Of the reward model, or None without
    one: `reward_loss`, `reward_accuracy`.
    """

    step: int
    pairs: int
    loss: float
    margin: float
    accuracy: float
    grad_norm: float
    reward_loss: float | None = None
    reward_accuracy: float | None = None


class PreferenceTuner:
    """Tunes `policy` towards what is preferred, held to `reference`, and fits `reward` to the same preferences.

    Args:
        policy: a causal language model; its parameters that require a gradient are trained, in place.
        reference: the same model as it was before: it is switched to eval and never trained.
        tokenizer: of both.
        config: see TunerConfig.
        reward: for example a RewardModel: called with a `Batch`, it gives a score for each sequence, (B,). None: no reward model.
        forward: what calls policy and reference; see torch_triton_ops.rlhf.models.

    The models are on one device, which is where the tuner works. `step` counts updates, `position` the preferences that they
    took from the stream.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        tokenizer: Tokenizer,
        config: TunerConfig | None = None,
        *,
        reward: nn.Module | None = None,
        forward: Forward = call,
    ) -> None:
        if policy is reference:
            raise _bad("reference", "the policy itself", "a copy of it: copy.deepcopy(policy)")
        self.policy, self.reference, self.reward = policy, reference.eval().requires_grad_(False), reward
        self.tokenizer, self.config, self.forward = tokenizer, config or TunerConfig(), forward
        self.step = self.position = 0
        trained = [p for p in policy.parameters() if p.requires_grad]
        if not trained:
            raise _bad("policy", "without a parameter that requires a gradient", "one that can be trained")
        self.device = trained[0].device
        decay = self.config.weight_decay
        self._learners = [_Learner(trained, self.config.learning_rate, decay)]
        if reward is not None:
            scored = [p for p in reward.parameters() if p.requires_grad]
            self._learners.append(_Learner(scored, self.config.reward_learning_rate, decay))
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.dtype is torch.float16)
        self._reference_mark: int | None = None
        self._rewards = torch.zeros(2, dtype=torch.float64, device=self.device)  # of "bco_pair": sum, number
        self._loss(*torch.zeros(4, 1, device=self.device))  # a loss type or smoothing that there is not raises here
        self._rewards.zero_()

    # ---------------------------------------------------------------------------------------------------------------
    # Learning
    # ---------------------------------------------------------------------------------------------------------------

    def tune(
        self, stream: Iterable[Preference], checkpoint: str | os.PathLike[str] | None = None, every: int = 100
    ) -> Iterator[Report]:
        """Update until the stream ends; a report after each update.

        The first `position` preferences are passed over, so that a loaded tuner goes on where it was when it is given the
        same stream from its beginning. `checkpoint`: a file to save to after each `every` updates and at the end.
        """
        rest = itertools.islice(stream, self.position, None)
        while batch := list(itertools.islice(rest, self.config.pairs)):
            report = self.update(batch)
            if checkpoint is not None and self.step % every == 0:
                self.save(checkpoint)
            yield report
        if checkpoint is not None:
            self.save(checkpoint)

    def update(self, preferences: Sequence[Preference], position: int | None = None) -> Report:
        """One update of policy and reward model from all of `preferences`.

        `position`: where in the stream it leaves the tuner, if not `len(preferences)` further on. Raises FloatingPointError,
        with no weight changed, if a gradient is infinite or NaN (other than by float16's loss scale).
        """
        if not preferences:
            raise _bad("preferences", "empty", "at least one")
        examples = [self.examples(preference) for preference in preferences]
        micro = self.config.micro_pairs or len(examples)
        self.policy.train()
        if self.reward is not None:
            self.reward.train()
        measured = []
        for start in range(0, len(examples), micro):
            chosen, rejected = zip(*examples[start : start + micro], strict=True)
            batch = collate([*chosen, *rejected], self.tokenizer.end, self.device)
            measured.append(self._accumulate(batch, len(chosen) / len(examples)))
        norms = [learner.cut(self._scaler, self.config.max_norm) for learner in self._learners]
        # the one place where the host waits for the device
        numbers = torch.cat((torch.stack(measured).sum(0), torch.stack(norms).float())).tolist()
        means, grad_norms = numbers[: -len(norms)], numbers[-len(norms) :]
        if not self._scaler.is_enabled() and not all(map(math.isfinite, grad_norms)):
            for learner in self._learners:
                learner.optimizer.zero_grad()
            named = ", ".join(map(repr, (preference.prompt[:40] for preference in preferences[:4])))
            raise FloatingPointError(
                f"PreferenceTuner: the gradient of update {self.step + 1} is not finite (loss {means[0]:g}); no weight was"
                f" changed. Its prompts: {named}"
            )
        rise = min(1.0, (self.step + 1) / self.config.warm_up) if self.config.warm_up else 1.0
        for learner in self._learners:
            learner.step(self._scaler, rise)
        if self._scaler.is_enabled():
            self._scaler.update()
        self.step += 1
        self.position = self.position + len(preferences) if position is None else position
        loss, margin, accuracy, *of_reward = means
        reward_loss, reward_accuracy = of_reward or (None, None)
        return Report(self.step, len(preferences), loss, margin, accuracy, grad_norms[0], reward_loss, reward_accuracy)

    def _accumulate(self, batch: Batch, share: float) -> Tensor:
        """Add a micro-batch's gradients; its share of loss, margin, accuracy and, with a reward model, its loss and accuracy.

        The first half of `batch` are the chosen answers, the second half the rejected ones, in the same order.
        """
        reference = self.score(self.reference, batch).chunk(2)
        with torch.enable_grad(), self._autocast():
            policy = self._score(self.policy, batch).chunk(2)
        loss, chosen, rejected = self._loss(*policy, *reference)
        if self.config.sft_weight:
            tokens = 1.0 if self.config.loss_type == "ipo" else batch.lengths.chunk(2)[0]
            loss = loss - self.config.sft_weight * (policy[0] / tokens).mean()
        self._scaler.scale(loss * share).backward()
        gain = (chosen - rejected).detach()
        measured = [loss.detach(), gain.mean(), (gain > 0).float().mean()]
        if self.reward is not None:
            with torch.enable_grad(), self._autocast():
                better, worse = self.reward(batch).float().chunk(2)
            loss = torch.ops.tt.bradley_terry_loss(better, worse).mean()
            self._scaler.scale(loss * share).backward()
            measured += [loss.detach(), (better > worse).float().mean()]
        return torch.stack(measured) * share

    def _loss(self, *logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`torch.ops.tt.dpo_loss` as configured: loss (), rewards (B,)."""
        c, delta = self.config, None
        if c.loss_type == "bco_pair":  # compares with the mean of all rewards so far
            ours, theirs = torch.stack(logprobs).detach().chunk(2)
            self._rewards += torch.stack(
                (c.beta * (ours - theirs).double().sum(), self._rewards.new_tensor(ours.numel()))
            )
            delta = (self._rewards[0] / self._rewards[1]).float()
        return torch.ops.tt.dpo_loss(
            *logprobs, delta, beta=c.beta, label_smoothing=c.label_smoothing, loss_type=c.loss_type
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.config.dtype, enabled=self.config.dtype is not None)

    def _score(self, model: nn.Module, batch: Batch) -> Tensor:
        total = batch.total(logprobs(self.forward(model, batch.tokens), batch))
        return total / batch.lengths if self.config.loss_type == "ipo" else total

    # ---------------------------------------------------------------------------------------------------------------
    # Asking
    # ---------------------------------------------------------------------------------------------------------------

    def examples(self, preference: Preference) -> tuple[Example, Example]:
        """The two sequences of a preference: (chosen, rejected)."""
        cut = (preference.chosen_cut, preference.rejected_cut)
        chosen, rejected = self.tokens(preference.prompt, preference.chosen, preference.rejected, cut=cut)
        return chosen, rejected

    def tokens(self, prompt: str, *answers: str, cut: Sequence[bool] = ()) -> tuple[Example, ...]:
        """The sequences of a prompt's answers, all with the same prompt, brought to `config.context`.

        The tokenizer's `end` follows each answer, unless `cut` says that it was cut off.
        """
        tokenizer, context = self.tokenizer, self.config.context
        start = tokenizer.encode(prompt) or [tokenizer.end]
        ends = [tokenizer.encode(answer) for answer in answers]
        for i, end in enumerate(ends):
            if not end or not any(cut[i : i + 1]):
                end.append(tokenizer.end)
        if context is not None:
            ends = [end[: context - 1] for end in ends]
            start = start[-(context - max(map(len, ends))) :]
        return tuple(Example(start, end) for end in ends)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p of each answer under `model`, summed over its tokens ("ipo": their mean): (B,) float32, without a gradient."""
        with self._autocast():
            return self._score(model, batch)

    @torch.no_grad()
    def rewards(self, prompt: str, *answers: str, cut: Sequence[bool] = ()) -> list[float]:
        """The reward model's scores of some answers to a prompt; only their differences mean something. `cut`: see tokens."""
        if self.reward is None:
            raise _bad("reward", "None", "a reward model, given when the tuner is made")
        self.reward.eval()
        batch = collate(self.tokens(prompt, *answers, cut=cut), self.tokenizer.end, self.device)
        with self._autocast():
            return self.reward(batch).tolist()

    @torch.no_grad()
    def divergence(self, samples: Sequence[Example], temperature: float = 1.0) -> list[float]:
        """KL(policy || reference) of a whole answer, in nats, as each of these answers that the policy sampled estimates it.

        Each token adds r - 1 - log r with r = p_ref / p, which has the same mean as -log r, is never negative and varies
        less (http://joschu.net/blog/kl-approx.html). `temperature` is that of the sampling, and of the two distributions.
        """
        self.policy.eval()
        batch = collate(samples, self.tokenizer.end, self.device)
        with self._autocast():
            ours, theirs = (
                logprobs(self.forward(model, batch.tokens), batch, temperature)
                for model in (self.policy, self.reference)
            )
        ratio = theirs - ours
        return batch.total(ratio.exp() - 1 - ratio).tolist()

    # ---------------------------------------------------------------------------------------------------------------
    # Checkpoints
    # ---------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint; a file of that name is replaced whole, or stays as it is if this process dies meanwhile."""
        state = {
            "version": VERSION,
            "config": self.config.as_dict(),
            "reference": self._mark(),
            "step": self.step,
            "position": self.position,
            "policy": self.policy.state_dict(),
            "reward": None if self.reward is None else self.reward.state_dict(),
            "optimizers": [learner.optimizer.state_dict() for learner in self._learners],
            "scaler": self._scaler.state_dict(),
            "rewards": self._rewards,
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "python": random.getstate(),
            },
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint: weights, optimizers, random states (torch's and Python's, of the whole process), position.

        Raises ValueError, with nothing changed, if the file is no checkpoint, or one of another configuration, reference or
        kind of reward model; OSError if it cannot be read.
        """
        name = os.fspath(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name}: no checkpoint that can be read: {said}") from error
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise ValueError(f"{name}: no checkpoint of a PreferenceTuner of version {VERSION}")
        now, then = self.config.as_dict(), state["config"]
        changed = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if then.get(key) != now[key]]
        if changed:
            raise ValueError(f"{name}: made with another configuration: {'; '.join(changed)}")
        if state["reference"] != self._mark():
            raise ValueError(f"{name}: made with another reference model; give the one that the run began with")
        if (state["reward"] is None) != (self.reward is None):
            raise ValueError(f"{name}: made {'without' if state['reward'] is None else 'with'} a reward model")
        self.policy.load_state_dict(state["policy"])
        if self.reward is not None:
            self.reward.load_state_dict(state["reward"])
        for learner, saved in zip(self._learners, state["optimizers"], strict=True):
            learner.optimizer.load_state_dict(saved)
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self._rewards.copy_(state["rewards"])
        self.step, self.position = state["step"], state["position"]
        torch.set_rng_state(state["random"]["torch"])
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        random.setstate(state["random"]["python"])

    def _mark(self) -> int:
        """Tells one reference from another: of every weight its name, shape and first elements. Training changes them all."""
        if self._reference_mark is None:
            mark = 0
            for name, value in self.reference.state_dict().items():
                head = value.detach().flatten()[:64].float().cpu()
                mark = zlib.crc32(f"{name} {tuple(value.shape)} {head.tolist()}".encode(), mark)
            self._reference_mark = mark
        return self._reference_mark


class _Learner:
    """Parameters with their optimizer."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        self.parameters, self.rate = parameters, rate
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)

    def cut(self, scaler: torch.amp.GradScaler, max_norm: float) -> Tensor:
        """Cut the gradient to `max_norm`; its norm before."""
        scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def step(self, scaler: torch.amp.GradScaler, rise: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rise
        scaler.step(self.optimizer)
        self.optimizer.zero_grad()


def _bad(argument: str, given: Any, allowed: str) -> ValueError:
    return ValueError(f"PreferenceTuner: argument '{argument}' is {given}; allowed: {allowed}")
