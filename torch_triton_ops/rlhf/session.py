"""Tune a model to one user, comparison by comparison: two answers, a choice, an update at once.

In each comparison one answer is the policy's and the other the reference's, in random order, so that the choices teach the
policy and at the same time measure how often it is preferred to what it was.

A session lives in a folder, and nothing that the user chose is lost, whenever the process dies:

| file | holds |
|---|---|
| choices.jsonl | every choice, in order, on the disk before the model learns from it: the journal |
| preferences.jsonl | the same without ties, in the columns prompt, chosen, rejected |
| tuner.pt | the tuner's checkpoint, with the number of choices it has learned from |

Opening the folder again loads the checkpoint and learns the choices that the journal has beyond it. What is sampled, shown
and replayed depends on the seed and the number of the round alone, so a session that was killed and opened again goes on as
the whole one would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from torch_triton_ops.rlhf.models import Example, generate
from torch_triton_ops.rlhf.preferences import (
    Preference,
    PreferenceError,
    append_lines,
    parse_object,
    read_lines,
    replacing,
    write_preferences,
)
from torch_triton_ops.rlhf.tuner import PreferenceTuner, Report

Choice = Literal["1", "2", "tie"]


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, as they are shown. `policy` says which is the policy's: 1 or 2; `cut`, which did not end.

    `guess` is the reward model's probability that the user chooses the first; `kl` the estimate, from this one answer of the
    policy's, of KL(policy || reference) in nats.
    """

    round: int
    prompt: str
    first: str
    second: str
    policy: int
    kl: float
    guess: float | None = None
    first_cut: bool = False
    second_cut: bool = False


@dataclass(frozen=True)
class Judged:
    """A comparison with the user's choice."""

    comparison: Comparison
    choice: Choice

    @property
    def win(self) -> float:
        """Of the policy: 1, 0, or a half for a tie."""
        return 0.5 if self.choice == "tie" else float(self.choice == str(self.comparison.policy))

    @property
    def guessed(self) -> bool | None:
        """Whether the reward model had foreseen it; None for a tie, or where it had no opinion."""
        guess = self.comparison.guess
        if self.choice == "tie" or guess is None or guess == 0.5:
            return None
        return (guess > 0.5) == (self.choice == "1")

    @property
    def preference(self) -> Preference | None:
        """What is learned: nothing from a tie, or from two answers that are the same."""
        c = self.comparison
        if self.choice == "tie" or c.first == c.second:
            return None
        if self.choice == "1":
            return Preference(c.prompt, c.first, c.second, c.first_cut, c.second_cut)
        return Preference(c.prompt, c.second, c.first, c.second_cut, c.first_cut)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self.comparison) | {"choice": self.choice}

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> Judged:
        types: dict[str, type] = {"round": int, "prompt": str, "first": str, "second": str, "policy": int, "kl": float}
        types |= {"first_cut": bool, "second_cut": bool}
        for name, kind in types.items():
            if type(value.get(name)) is not kind:
                raise PreferenceError(f"{where}: '{name}' must be {kind.__name__}, not {value.get(name)!r:.40}")
        if value.get("choice") not in get_args(Choice):
            raise PreferenceError(f"{where}: 'choice' must be 1, 2 or tie, not {value.get('choice')!r:.40}")
        return cls(Comparison(**{name: value[name] for name in types}, guess=value.get("guess")), value["choice"])


class Session:
    """The loop's state, in a folder (see the module). Ask for `comparisons`, `judge` each, then `learn`.

    Args:
        folder: made if absent.
        tuner: as new; opening loads its checkpoint and learns what the journal has beyond it.
        prompts: what the models answer; each round takes the next ones of an order shuffled by `seed`.
        pairs: comparisons of a round, from which one update learns.
        replay: so many earlier preferences, chosen at random, are learned again with them, which steadies an update.
        length: tokens of an answer, at most.
        temperature: of the sampling, above 0.
        save_every: rounds between checkpoints. The journal is always whole: a checkpoint only saves learning it again.

    A folder must be opened again with the options, models and prompts that it was begun with: it does not keep them.
    (`triton-tutorial rlhf` does, in session.json and base.pt.)

    Raises PreferenceError, with file and line, for a journal that cannot be read. A last line without its end, which a
    process left that died while it wrote, was not acknowledged to the user and is dropped.
    """

    def __init__(
        self,
        folder: str | Path,
        tuner: PreferenceTuner,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        pairs: int = 1,
        replay: int = 7,
        length: int = 32,
        temperature: float = 1.0,
        save_every: int = 1,
    ) -> None:
        if not prompts:
            raise ValueError("Session: argument 'prompts' is empty; allowed: at least one")
        self.folder, self.tuner, self.prompts = Path(folder), tuner, list(prompts)
        self.seed, self.pairs, self.replay = seed, pairs, replay
        self.length, self.temperature, self.save_every = length, temperature, save_every
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal, self.checkpoint = self.folder / "choices.jsonl", self.folder / "tuner.pt"
        self.judged: list[Judged] = _read_journal(self.journal)
        write_preferences(self.folder / "preferences.jsonl", self.preferences)
        if self.checkpoint.exists():
            tuner.load(self.checkpoint)
            if tuner.position > len(self.judged):
                raise PreferenceError(
                    f"{self.journal}: {len(self.judged)} choices, but {self.checkpoint.name} has learned from"
                    f" {tuner.position}; put the whole journal back, or begin in a new folder"
                )
        self.learned_again = len(self.judged) - tuner.position
        while len(self.judged) - tuner.position >= pairs:
            self.learn()

    # ---------------------------------------------------------------------------------------------------------------
    # A round
    # ---------------------------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """The number of the round that is played, from 0."""
        return self.tuner.position // self.pairs

    def comparisons(self) -> list[Comparison]:
        """What is left to judge of this round: the same whenever it is asked for."""
        waiting = len(self.judged) - self.tuner.position
        texts = [self._prompt(self.round * self.pairs + i) for i in range(self.pairs)]
        return compare(self.tuner, texts, self.round, self.seed, self.length, self.temperature)[waiting:]

    def judge(self, comparison: Comparison, choice: Choice) -> Judged:
        """Take down a choice; when this returns it is on the disk."""
        if choice not in get_args(Choice):
            raise ValueError(f"Session: argument 'choice' is {choice!r}; allowed: 1, 2, tie")
        judged = Judged(comparison, choice)
        append_lines(self.journal, [judged.as_json()])
        self.judged.append(judged)
        if judged.preference is not None:
            append_lines(self.folder / "preferences.jsonl", [judged.preference.as_json()])
        return judged

    def learn(self) -> Report | None:
        """Update from the round's choices, and some earlier ones; None if there is nothing to learn: ties alone."""
        start, end = self.tuner.position, self.tuner.position + self.pairs
        if end > len(self.judged):
            raise ValueError(f"Session: the round is not over: {end - len(self.judged)} comparisons are not judged")
        new = [p for judged in self.judged[start:end] if (p := judged.preference) is not None]
        old = [p for judged in self.judged[:start] if (p := judged.preference) is not None]
        chance = random.Random(f"replay {self.seed} {start}")
        again = chance.sample(old, min(self.replay, len(old)))
        report = self.tuner.update([*new, *again], position=end) if new else None
        self.tuner.position = end
        if self.round % self.save_every == 0:
            self.save()
        return report

    def save(self) -> None:
        """Write the checkpoint; `learn` does it by itself each `save_every` rounds."""
        self.tuner.save(self.checkpoint)

    def _prompt(self, number: int) -> str:
        epoch, index = divmod(number, len(self.prompts))
        return self.prompts[_order(len(self.prompts), f"{self.seed} {epoch}")[index]]

    # ---------------------------------------------------------------------------------------------------------------
    # How it goes
    # ---------------------------------------------------------------------------------------------------------------

    @property
    def preferences(self) -> list[Preference]:
        """All that was chosen, ties left out."""
        return [p for judged in self.judged if (p := judged.preference) is not None]

    def win_rate(self, last: int | None = None) -> float:
        """How often the policy's answer was chosen, a tie being half; of the `last` choices, or all. NaN before the first."""
        wins = [judged.win for judged in self.judged][-last if last else None :]
        return sum(wins) / len(wins) if wins else math.nan

    def kl(self, last: int = 16) -> float:
        """KL(policy || reference) in nats for an answer, the mean estimate of the `last` comparisons judged; NaN before."""
        found = [judged.comparison.kl for judged in self.judged][-last:]
        return sum(found) / len(found) if found else math.nan

    def guesses(self) -> tuple[int, int]:
        """How many choices the reward model had foreseen, of how many it had an opinion on."""
        found = [judged.guessed for judged in self.judged if judged.guessed is not None]
        return sum(found), len(found)


def compare(
    tuner: PreferenceTuner, prompts: Sequence[str], number: int, seed: int, length: int, temperature: float = 1.0
) -> list[Comparison]:
    """An answer of the policy and one of the reference to each prompt, in random order."""
    tokenizer = tuner.tokenizer
    starts = [tokenizer.encode(prompt) or [tokenizer.end] for prompt in prompts]
    if tuner.config.context is not None:
        if length >= tuner.config.context:
            raise ValueError(
                f"Session: argument 'length' is {length}; allowed: below the context, {tuner.config.context}"
            )
        starts = [start[-(tuner.config.context - length) :] for start in starts]
    answers = []
    for name, model in (("policy", tuner.policy), ("reference", tuner.reference)):
        generator = torch.Generator(tuner.device)
        generator.manual_seed(random.Random(f"{name} {seed} {number}").getrandbits(63))
        answers.append(generate(model, starts, length, tokenizer.end, generator, temperature, tuner.forward))
    kls = tuner.divergence(
        [Example(start, answer) for start, answer in zip(starts, answers[0], strict=True)], temperature
    )
    chance = random.Random(f"order {seed} {number}")
    found = []
    for prompt, ours, theirs, kl in zip(prompts, *answers, kls, strict=True):
        policy = chance.choice((1, 2))
        pair = (ours, theirs) if policy == 1 else (theirs, ours)
        cut = [answer[-1] != tokenizer.end for answer in pair]
        first, second = (tokenizer.decode([t for t in answer if t != tokenizer.end]) for answer in pair)
        guess = None
        if tuner.reward is not None:
            one, two = tuner.rewards(prompt, first, second, cut=cut)
            guess = 1 / (1 + math.exp(min(two - one, 700.0)))
        found.append(Comparison(number, prompt, first, second, policy, kl, guess, *cut))
    return found


def evaluate(
    tuner: PreferenceTuner,
    user: Callable[[Comparison], Choice],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    length: int = 32,
    temperature: float = 1.0,
) -> float:
    """How often a user chooses the policy's answer to these prompts, a tie being half. Nothing is learned."""
    comparisons = compare(tuner, prompts, -1, seed, length, temperature)
    return sum(Judged(c, user(c)).win for c in comparisons) / len(comparisons)


def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(f"prompts {seed}").shuffle(order)
    return order


def _read_journal(path: Path) -> list[Judged]:
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with replacing(path) as temporary:
            temporary.write_bytes(whole)
    return [Judged.from_json(parse_object(line, f"{path}:{n}"), f"{path}:{n}") for n, line in read_lines(path)]


@contextlib.contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """Hold a folder's lock, so that two processes never write one session. Raises BlockingIOError if another holds it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "lock", "w") as lock:
        with contextlib.suppress(ImportError):  # no flock on this system
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


# --------------------------------------------------------------------------------------------------------------------
# Simulated users
# --------------------------------------------------------------------------------------------------------------------

TASTES: dict[str, Callable[[str], float]] = {
    "shorter": lambda answer: -len(answer),
    "longer": lambda answer: len(answer),
    "plain": lambda answer: -sum(not (c.isalpha() or c in " ,.") for c in answer),
    "finished": lambda answer: answer.endswith("."),
}
"""Hidden preferences: the answer of the higher value is liked better."""


class SimulatedUser:
    """Chooses by a hidden taste (a name of TASTES); equal answers are a tie. `mistakes` is how often it errs.

    Its mistakes depend on the comparison and the seed alone, so a resumed session meets the same user.
    """

    def __init__(self, taste: str, mistakes: float = 0.0, seed: int = 0) -> None:
        if taste not in TASTES:
            raise ValueError(f"SimulatedUser: argument 'taste' is {taste!r}; allowed: {', '.join(TASTES)}")
        if not 0 <= mistakes <= 1:
            raise ValueError(f"SimulatedUser: argument 'mistakes' is {mistakes}; allowed: 0 to 1")
        self.taste, self.mistakes, self.seed = taste, mistakes, seed

    def __call__(self, comparison: Comparison) -> Choice:
        value = TASTES[self.taste]
        first, second = value(comparison.first), value(comparison.second)
        if first == second:
            return "tie"
        errs = random.Random(f"{self.seed} {comparison}").random() < self.mistakes
        return "1" if (first > second) != errs else "2"
