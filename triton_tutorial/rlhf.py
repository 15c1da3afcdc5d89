"""`triton-tutorial rlhf`: tune a small language model to what you like, two answers at a time, in the terminal.

The model is trained once on the Python reference and kept in the session's folder; what you choose is kept there too, and
opening the folder again goes on. See torch_triton_ops.rlhf.session for what a folder holds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from torch_triton_ops.rlhf import (
    Comparison,
    PreferenceTuner,
    Report,
    RewardModel,
    Session,
    SimulatedUser,
    TunerConfig,
    evaluate,
    small,
)
from torch_triton_ops.rlhf.preferences import replacing
from torch_triton_ops.rlhf.session import Choice, only_one
from triton_tutorial.catalog import TutorialError

KEYS: dict[str, Choice] = {"1": "1", "2": "2", "t": "tie", "tie": "tie", "=": "tie"}
QUIT = ("q", "quit", "exit")
HELD_OUT_PROMPTS = 48  # for the win rate before and after a simulated session
RECENT = 20  # choices of the running win rate


@dataclass(frozen=True)
class Settings:
    """What a session is begun with, and keeps. The command's options, by their names."""

    seed: int = 0
    pairs: int = 1
    replay: int = 7
    length: int = 24
    temperature: float = 0.8
    beta: float = 0.1
    sft: float = 0.3
    rate: float = 1e-3
    base_steps: int = 200
    simulate: str | None = None
    prompts: str | None = None


def settings(folder: Path, given: dict[str, Any]) -> Settings:
    """Those that the folder keeps, else those given with defaults for the rest, which it keeps from now on."""
    file = folder / "session.json"
    wanted = {name: value for name, value in given.items() if value is not None}
    if not file.exists():
        simulated = {"pairs": 8, "replay": 16} if wanted.get("simulate") else {}
        made = Settings(**{**simulated, **wanted})
        if made.simulate is not None:
            SimulatedUser(made.simulate)  # raises for a taste that there is not, before anything is kept
        if made.prompts is not None:
            read_prompts(Path(made.prompts))
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(made), indent=1) + "\n", encoding="utf-8")
        return made
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        made = Settings(**kept)
    except (ValueError, TypeError) as error:
        raise TutorialError(f"{file} is broken ({error}); begin in another folder with --session") from None
    for name, value in wanted.items():
        if getattr(made, name) != value:
            option = name.replace("_", "-")
            raise TutorialError(
                f"this session was begun with --{option} {getattr(made, name)}; leave the option out to go on, or begin"
                f" another one with --session"
            )
    return made


def read_prompts(path: Path) -> list[str]:
    """One prompt a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TutorialError(f"the prompts in {path} cannot be read ({error})") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise TutorialError(f"{path} has no prompt; write one a line")
    return found


@dataclass(frozen=True)
class Base:
    """The model as it was before any preference, with its vocabulary; made once and kept."""

    model: small.SmallLM
    words: list[str]

    @classmethod
    def get(cls, file: Path, s: Settings, device: torch.device, out: Console) -> Base:
        """From the file, else by training it, which takes half a minute."""
        if file.exists():
            try:
                kept = torch.load(file, map_location="cpu", weights_only=True)
                model = small.SmallLM(small.SmallConfig(**kept["config"]))
                model.load_state_dict(kept["weights"])
            except Exception as error:
                said = (str(error) or type(error).__name__).splitlines()[0]
                raise TutorialError(f"{file} cannot be read ({said}); begin in another folder with --session") from None
            return cls(model.to(device), kept["words"])
        words = small.words()
        torch.manual_seed(s.seed)
        model = small.SmallLM(small.SmallConfig(vocab=small.FIRST_WORD + len(words))).to(device)
        with _progress(out, "the model reads the Python reference", s.base_steps) as advance:
            small.train(model, small.tokenizer(words), s.base_steps, seed=s.seed, report=advance)
        with replacing(file) as temporary:
            config = dataclasses.asdict(model.config)
            torch.save({"config": config, "words": words, "weights": model.state_dict()}, temporary)
        return cls(model, words)


@contextmanager
def _progress(out: Console, label: str, total: int) -> Iterator[Callable[[int, float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=out, disable=not out.is_terminal) as progress:
        task = progress.add_task(label, total=total, loss="")
        yield lambda done, loss: progress.update(task, completed=done, loss=f"loss {loss:.2f}")


def run(folder: Path, given: dict[str, Any], rounds: int | None, device: torch.device, out: Console) -> dict[str, Any]:
    """The whole command: open the session, play, say how it went; what --json prints."""
    with only_one(folder):
        s = settings(folder, given)
        base = Base.get(folder / "base.pt", s, device, out)
        tokenizer, config = small.tokenizer(base.words), base.model.config
        held_out = small.prompts()[:HELD_OUT_PROMPTS]
        prompts = read_prompts(Path(s.prompts)) if s.prompts else small.prompts()[HELD_OUT_PROMPTS:]
        torch.manual_seed(s.seed)
        policy = copy.deepcopy(base.model)
        tuner = PreferenceTuner(
            policy,
            base.model,
            tokenizer,
            TunerConfig(
                beta=s.beta,
                sft_weight=s.sft,
                learning_rate=s.rate,
                reward_learning_rate=s.rate,
                context=config.context,
            ),
            reward=RewardModel(copy.deepcopy(base.model), config.hidden),
        )
        sampling: dict[str, Any] = {"seed": s.seed, "length": s.length, "temperature": s.temperature}
        user = SimulatedUser(s.simulate, seed=s.seed) if s.simulate else None
        before = evaluate(tuner, user, held_out, **sampling) if user else None  # the policy is still the reference
        session = Session(folder, tuner, prompts, pairs=s.pairs, replay=s.replay, **sampling)
        if session.judged:
            out.print(f"going on after {_count(len(session.judged), 'choice')}", style="dim")
        ended = "finished"
        try:
            if user is None:
                ended = _ask(session, rounds, out)
            else:
                _simulate(session, user, 20 if rounds is None else rounds, out)
        except KeyboardInterrupt:
            ended = "interrupted"
        foreseen, of = session.guesses()
        found: dict[str, Any] = {
            "session": str(folder),
            "ended": ended,
            "choices": len(session.judged),
            "learned": tuner.position,
            "win_rate": _number(session.win_rate()),
            "win_rate_recent": _number(session.win_rate(RECENT)),
            "kl": _number(session.kl()),
            "reward_model": {"foreseen": foreseen, "of": of},
        }
        if user is not None and ended != "interrupted":
            found |= {"before": before, "after": evaluate(tuner, user, held_out, **sampling)}
        return found


# --------------------------------------------------------------------------------------------------------------------
# The two players
# --------------------------------------------------------------------------------------------------------------------


def _ask(session: Session, rounds: int | None, out: Console) -> str:
    out.print(
        "Which answer do you like better? 1, 2, t for a tie, q to stop. One of the two is the tuned model's.\n",
        style="dim",
    )
    played = 0
    while rounds is None or played < rounds:
        for comparison in session.comparisons():
            show(comparison, out)
            choice = _choice(out)
            if choice is None:
                return "quit"
            session.judge(comparison, choice)
        report = session.learn()
        played += 1
        out.print(standing(session, report), soft_wrap=True, highlight=False)
        out.print()
    return "finished"


def _choice(out: Console) -> Choice | None:
    """The user's; None to stop, which the end of the input is too."""
    while True:
        try:
            said = out.input("1, 2, t, q: ").strip().lower()
        except EOFError:
            out.print()
            return None
        if said in QUIT:
            return None
        if said in KEYS:
            return KEYS[said]
        out.print(f"{said[:20]!r} is none of them", style="yellow", markup=False)


def _simulate(session: Session, user: SimulatedUser, rounds: int, out: Console) -> None:
    for played in range(rounds):
        comparisons = session.comparisons()
        if played == 0 and comparisons:
            show(comparisons[0], out)
        for comparison in comparisons:
            session.judge(comparison, user(comparison))
        out.print(standing(session, session.learn()), soft_wrap=True, highlight=False)


def show(comparison: Comparison, out: Console) -> None:
    """The two answers side by side, each behind its prompt."""
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    answers = [
        printable(answer) + (" ..." if cut else "")
        for answer, cut in ((comparison.first, comparison.first_cut), (comparison.second, comparison.second_cut))
    ]
    grid.add_row(
        *(
            Panel(
                Text.assemble((printable(comparison.prompt), "dim"), answer or "(nothing)"),
                title=f"[bold]{number}[/]",
                title_align="left",
            )
            for number, answer in enumerate(answers, start=1)
        )
    )
    out.print(grid)


def printable(text: str) -> str:
    """What a model writes may hold anything; a terminal gets signs only."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def standing(session: Session, report: Report | None) -> str:
    """One line: win rate, KL, reward model, loss."""
    foreseen, of = session.guesses()
    parts = [
        f"{_count(len(session.judged), 'choice')}",
        f"tuned model preferred {session.win_rate():.0%}, of the last {min(RECENT, len(session.judged))}"
        f" {session.win_rate(RECENT):.0%}",
        f"KL to the reference {session.kl():.2f} nats",
    ]
    if of:
        parts.append(f"reward model foresaw {foreseen} of {of}")
    parts.append("nothing to learn from that" if report is None else f"loss {report.loss:.3f}")
    return "; ".join(parts)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
