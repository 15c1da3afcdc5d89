"""torch_triton_ops.rlhf and `triton-tutorial rlhf`: files, updates and plain formulas, exact resume, a user who is learned."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from torch_triton_ops.rlhf import (
    BYTES,
    Comparison,
    Hidden,
    Preference,
    PreferenceError,
    PreferenceTuner,
    RewardModel,
    Session,
    SimulatedUser,
    Tokenizer,
    TunerConfig,
    collate,
    evaluate,
    generate,
    hugging_face_hidden,
    logprobs,
    read_preferences,
    shuffled,
    small,
    write_preferences,
)
from torch_triton_ops.rlhf.models import Example, call
from torch_triton_ops.rlhf.preferences import replacing
from torch_triton_ops.rlhf.session import TASTES, only_one
from triton_tutorial import cli

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [Preference(f"p{i} ", "a" * (1 + i % 3), "b" * (1 + i % 4) + "!") for i in range(12)]


class Toy(torch.nn.Module):
    """A causal model over bytes: a position sees the mean of what stands before it."""

    def __init__(self, dropout: float = 0.0, hidden: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(256, 16))
        self.mix = torch.nn.Linear(16, 16)
        self.head = torch.nn.Parameter(torch.randn(256, 16) * 0.3)
        self.dropout, self.hidden = torch.nn.Dropout(dropout), hidden

    def forward(self, tokens: torch.Tensor) -> Hidden | torch.Tensor:
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        seen = F.embedding(tokens, self.embedding).cumsum(1) / count[:, None]
        states = self.dropout(torch.tanh(self.mix(seen)))
        return Hidden(states, self.head) if self.hidden else F.linear(states, self.head)


def toy(seed: int = 0, **options: object) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def toy_tuner(reward: bool = True, hidden: bool = True, dropout: float = 0.0, **config: object) -> PreferenceTuner:
    policy = toy(hidden=hidden, dropout=dropout)
    body = RewardModel(toy(2), 16) if reward else None
    settings = TunerConfig(**{"learning_rate": 1e-3, "pairs": 4, **config})
    return PreferenceTuner(policy, toy(1, hidden=hidden), BYTES, settings, reward=body)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def test_json_lines_round_trip(tmp_path):
    pairs = [*PAIRS, Preference("p", "", "r"), Preference("", 'ä\n\u2028 "x" 🙂', "\\", rejected_cut=True)]
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    assert read_preferences(tmp_path / "pairs.jsonl") == pairs
    lines = (tmp_path / "pairs.jsonl").read_bytes().split(b"\n")
    assert len(lines) == len(pairs) + 1
    assert json.loads(lines[0]) == {"prompt": "p0 ", "chosen": "a", "rejected": "b!"}
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_further_columns_blank_lines_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "chosen": "c", "rejected": "r", "score": 1}\r\n\n')
    assert read_preferences(file) == [Preference("p", "c", "r")]


def test_conversations(tmp_path):
    file = tmp_path / "pairs.jsonl"
    said = lambda role, text: [{"role": role, "content": text}]
    row = {"prompt": said("user", "p"), "chosen": said("assistant", "c"), "rejected": said("assistant", "r")}
    file.write_text(json.dumps(row))
    found = read_preferences(file, render=lambda messages: "".join(f"<{m['role']}>{m['content']}" for m in messages))
    assert found == [Preference("<user>p", "<assistant>c", "<assistant>r")]
    with pytest.raises(PreferenceError, match=r"pairs.jsonl:1: 'prompt' is a conversation; .*render="):
        read_preferences(file)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "p", "chosen": "c"', "not JSON: .* at column 30"),
        ("[1]", r"a JSON object is expected, not \[1\]"),
        ('{"prompt": "p", "chosen": "c"}', "no column 'rejected'; there are: 'prompt', 'chosen'"),
        ('{"prompt": 3, "chosen": "c", "rejected": "r"}', "'prompt' must be text, not 3"),
        ('{"prompt": "p", "chosen": [{"role": 1}], "rejected": "r"}', "'chosen' must be text, not"),
        ('{"prompt": "p", "chosen": "c", "rejected": "c"}', "'chosen' and 'rejected' are the same"),
        (
            '{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_cut": 1}',
            "'chosen_cut' must be true or false, not 1",
        ),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_error_names_file_and_line(tmp_path, line, says):
    file = tmp_path / "pairs.jsonl"
    good = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n\n'
    file.write_bytes(good + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(PreferenceError, match=f"^{re.escape(str(file))}:3: {says}"):
        read_preferences(file)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    write_preferences(file, PAIRS)
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_preferences(file) == PAIRS
    assert len(list(tmp_path.iterdir())) == 1


def test_shuffled_is_every_preference_each_epoch_in_another_order():
    stream = list(shuffled(PAIRS, epochs=2, seed=3))
    first, second = stream[:12], stream[12:]
    assert sorted(first, key=str) == sorted(second, key=str) == sorted(PAIRS, key=str)
    assert first != second
    assert stream == list(shuffled(PAIRS, epochs=2, seed=3))


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


def plain_logprob(model: torch.nn.Module, prompt: str, answer: str) -> torch.Tensor:
    """log p(answer | prompt), token by token, without a batch."""
    start, end = BYTES.encode(prompt), [*BYTES.encode(answer), 0]
    output = model(torch.tensor([start + end]))
    logits = F.linear(output.states, output.weight) if isinstance(output, Hidden) else output
    picked = logits[0].log_softmax(-1)[torch.arange(len(start) - 1, len(start + end) - 1), end]
    return picked.sum()


@pytest.mark.parametrize("form", ["hidden", "logits", "object"])
def test_logprobs_of_every_form_of_output(form):
    model = toy(hidden=form == "hidden")
    texts = [("pro", "answer"), ("p", "a"), ("a longer one", "xyz")]
    examples = [Example(BYTES.encode(p), [*BYTES.encode(a), 0]) for p, a in texts]
    batch = collate(examples, BYTES.end, "cpu")
    output = model(batch.tokens)
    found = batch.total(logprobs(SimpleNamespace(logits=output) if form == "object" else output, batch))
    torch.testing.assert_close(found, torch.stack([plain_logprob(model, *text) for text in texts]))
    assert batch.lengths.tolist() == [7, 2, 4]


def test_hugging_face_hidden():
    class Base(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            assert not use_cache
            return SimpleNamespace(last_hidden_state=input_ids[..., None].expand(-1, -1, 4).float())

    config = SimpleNamespace(final_logit_softcapping=30.0, logit_scale=None)
    head = torch.nn.Linear(4, 256)
    model = SimpleNamespace(base_model=Base(), config=config, get_output_embeddings=lambda: head)
    states, weight, bias, softcap = hugging_face_hidden(model, torch.tensor([[1, 2]]))
    assert (states.shape, weight is head.weight, bias is head.bias, softcap) == ((1, 2, 4), True, True, 30.0)
    config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"logit_scale.*forward=call"):
        hugging_face_hidden(model, torch.tensor([[1, 2]]))


def test_generate_continues_prompts_of_any_length_as_if_alone():
    model = toy()
    prompts = [BYTES.encode(text) for text in ("a", "longer", "mid")]
    sample = lambda some: generate(model, some, 6, BYTES.end, torch.Generator(), temperature=0)
    assert sample(prompts) == [sample([prompt])[0] for prompt in prompts]
    assert all(0 < len(answer) <= 6 for answer in sample(prompts))
    draws = [generate(model, prompts, 6, BYTES.end, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_generate_stops_at_the_end_token():
    ends = lambda model, tokens: F.one_hot(torch.where(tokens == 7, BYTES.end, 7), 256) * 50.0
    assert generate(toy(), [[1], [7]], 5, BYTES.end, torch.Generator(), forward=ends) == [[7, 0], [0]]


def test_words_of_the_small_model_spell_every_text():
    tokenizer = small.tokenizer(small.words())
    for text in ("The interpreter may not", "naïve\n\t🙂", "", *small.sentences()[:50]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" interpreter")) == 1


def test_tokens_are_cut_to_the_context():
    tuner = toy_tuner(context=6)
    assert tuner.tokens("prompt", "ab", "c") == (
        Example(list(b"mpt"), [*b"ab", 0]),
        Example(list(b"mpt"), [*b"c", 0]),
    )
    assert tuner.tokens("p", "abcdefgh") == (Example(list(b"p"), list(b"abcde")),)
    assert tuner.tokens("", "a")[0].prompt == [BYTES.end]
    cut = Preference("p", "a", "b", rejected_cut=True)
    assert tuner.examples(cut) == (Example([112], [97, 0]), Example([112], [98]))  # no end where there was none


# --------------------------------------------------------------------------------------------------------------------
# Updates
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("micro", [None, 1, 2, 3])
def test_an_update_is_the_plain_formula(hidden, micro):
    """Loss, measurements and the weights after three AdamW steps, with the gradient cut; however the pairs are divided."""
    tuner = toy_tuner(hidden=hidden, micro_pairs=micro, warm_up=2, max_norm=0.05, beta=0.3, label_smoothing=0.1)
    policy, reference, reward = copy.deepcopy(tuner.policy), toy(1, hidden=hidden), copy.deepcopy(tuner.reward)
    optimizers = [
        torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0),
        torch.optim.AdamW(list(reward.parameters()), lr=1e-4, weight_decay=0),
    ]
    for step in range(3):
        pairs = PAIRS[4 * step : 4 * step + 4]
        losses, gains, fits = [], [], []
        for p in pairs:
            ratio = [
                plain_logprob(policy, p.prompt, a) - plain_logprob(reference, p.prompt, a)
                for a in (p.chosen, p.rejected)
            ]
            x = 0.3 * (ratio[0] - ratio[1])
            losses.append(-0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x))
            gains.append(x)
            scores = []
            for answer in (p.chosen, p.rejected):
                tokens = torch.tensor([[*BYTES.encode(p.prompt + answer), 0]])
                scores.append(reward.body(tokens).states[0, -1] @ reward.score[0])
            fits.append(-F.logsigmoid(scores[0] - scores[1]))
        total, fit = torch.stack(losses).mean(), torch.stack(fits).mean()
        report = tuner.update(pairs)
        assert report.loss == pytest.approx(total.item(), rel=1e-5)
        assert report.margin == pytest.approx(torch.stack(gains).mean().item(), rel=1e-4, abs=1e-6)
        assert report.accuracy == pytest.approx(sum(x.item() > 0 for x in gains) / 4)
        assert report.reward_loss == pytest.approx(fit.item(), rel=1e-5)
        (total + fit).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.05)
        torch.nn.utils.clip_grad_norm_(reward.parameters(), 0.05)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        for optimizer, rate in zip(optimizers, (1e-3, 1e-4), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 2)
            optimizer.step()
            optimizer.zero_grad()
        # Adam divides by the gradient's size: where that is near nothing, rounding decides
        for ours, plain in ((tuner.policy, policy), (tuner.reward, reward)):
            for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    assert (tuner.step, tuner.position) == (3, 12)


def test_the_reward_model_tells_chosen_from_rejected():
    tuner = toy_tuner(reward_learning_rate=2e-2)
    reports = list(tuner.tune(shuffled(PAIRS, epochs=8)))
    assert reports[0].reward_loss == pytest.approx(math.log(2))  # its layer starts at zero
    assert reports[-1].reward_accuracy == 1.0
    assert reports[-1].reward_loss < 0.2
    better, worse = tuner.rewards("p1 ", "aa", "bb!")
    assert better > worse


@pytest.mark.parametrize("loss_type", ["ipo", "bco_pair", "aot"])
def test_loss_types_that_need_more_than_the_pairs(loss_type):
    tuner = toy_tuner(reward=False, loss_type=loss_type)
    reports = list(tuner.tune(shuffled(PAIRS, epochs=4)))
    assert reports[-1].margin > reports[0].margin
    if loss_type == "ipo":  # of the mean over an answer's tokens
        fresh, pair = toy_tuner(reward=False, loss_type="ipo"), PAIRS[2]
        c, r = (
            (plain_logprob(fresh.policy, pair.prompt, a) - plain_logprob(fresh.reference, pair.prompt, a))
            / (len(a) + 1)
            for a in (pair.chosen, pair.rejected)
        )
        assert fresh.update([pair]).loss == pytest.approx((c - r - 5).square().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_precision(dtype):
    exact, mixed = toy_tuner(), toy_tuner(dtype=dtype)
    for a, b in zip(exact.tune(PAIRS), mixed.tune(PAIRS), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=0.02)
        assert b.loss != a.loss
        assert math.isfinite(b.grad_norm)
    assert all(p.dtype == torch.float32 for p in mixed.policy.parameters())


def test_a_gradient_that_is_not_finite_changes_nothing():
    tuner = toy_tuner()
    before = copy.deepcopy(tuner.policy.state_dict())
    usual, tuner.forward = (
        tuner.forward,
        lambda model, tokens: call(model, tokens)._replace(weight=model.head * math.inf),
    )
    with pytest.raises(FloatingPointError, match=r"update 1 is not finite \(loss nan\); no weight was changed.*'p0 '"):
        tuner.update(PAIRS[:2])
    assert all(torch.equal(before[name], value) for name, value in tuner.policy.state_dict().items())
    tuner.forward = usual
    assert tuner.update(PAIRS[:2]).loss == toy_tuner().update(PAIRS[:2]).loss


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TunerConfig(beta=0), "'beta' is 0; allowed: a number above 0"),
        (lambda: TunerConfig(pairs=0), "'pairs' is 0; allowed: a number of at least 1"),
        (lambda: TunerConfig(dtype=torch.int8), "'dtype' is torch.int8"),
        (lambda: toy_tuner(loss_type="best"), "loss_type.*best"),
        (lambda: toy_tuner().update([]), "'preferences' is empty"),
        (lambda: toy_tuner(reward=False).rewards("p", "a"), "'reward' is None"),
        (lambda: PreferenceTuner(p := toy(), p, BYTES), "'reference' is the policy itself"),
        (lambda: PreferenceTuner(toy().requires_grad_(False), toy(), BYTES), "'policy' is without a parameter"),
        (lambda: SimulatedUser("kinder"), "'taste' is 'kinder'; allowed: shorter, longer"),
        (lambda: SimulatedUser("shorter", mistakes=2), "'mistakes' is 2"),
        (lambda: Tokenizer.of_hugging_face(SimpleNamespace(eos_token_id=None)), "no eos_token"),
    ],
)
def test_wrong_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_divergence_is_the_kl_of_the_answers():
    """Against the exact value: answers of one token, whose distribution can be summed."""
    tuner = toy_tuner(reward=False)
    ours, theirs = (m(torch.tensor([[112]])).states[0, 0] @ m.head.T / 0.7 for m in (tuner.policy, tuner.reference))
    exact = (ours.softmax(-1) * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum()
    draws = torch.multinomial(ours.softmax(-1), 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = tuner.divergence([Example([112], [token]) for token in draws.tolist()], temperature=0.7)
    assert min(found) >= 0
    assert sum(found) / len(found) == pytest.approx(exact.item(), rel=0.1)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------

RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_rlhf import PAIRS, shuffled, toy_tuner


def run(checkpoint, die_at=None):
    tuner = toy_tuner(dropout=0.2, micro_pairs=2, dtype=torch.bfloat16, loss_type="bco_pair", warm_up=3)
    if os.path.exists(checkpoint):
        tuner.load(checkpoint)
    for report in tuner.tune(shuffled(PAIRS, epochs=4, seed=5), checkpoint, every=3):
        print(report.step, report.loss.hex(), report.reward_loss.hex(), flush=True)
        if report.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)


run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Killed after update 8 of 12, its last checkpoint being that of update 6; dropout, autocast, accumulation, warm-up."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(ROOT / "tests")))

    def in_this_process(checkpoint: Path) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(script), str(checkpoint)])
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(script))
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out.splitlines()

    whole = in_this_process(tmp_path / "whole.pt")
    assert len(whole) == 12
    killed = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed.pt"), "8"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.splitlines() == whole[:8]
    torch.manual_seed(99)  # the checkpoint's random states count, not this process's
    assert in_this_process(tmp_path / "killed.pt") == whole[6:]
    last = [torch.load(tmp_path / name, weights_only=True)["policy"] for name in ("whole.pt", "killed.pt")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "tuner.pt"
    toy_tuner().save(file)
    with pytest.raises(ValueError, match=r"tuner.pt: made with another configuration: beta was 0.1 and is 0.2"):
        toy_tuner(beta=0.2).load(file)
    with pytest.raises(ValueError, match="made with a reward model"):
        toy_tuner(reward=False).load(file)
    other = toy_tuner()
    other.reference.mix.bias.data += 1
    with pytest.raises(ValueError, match="another reference model"):
        other.load(file)
    for left in (1000, 0):
        file.write_bytes(file.read_bytes()[:left])
        with pytest.raises(ValueError, match=r"tuner.pt: no checkpoint that can be read: \w"):
            toy_tuner().load(file)
    torch.save({"version": 0}, file)
    with pytest.raises(ValueError, match="no checkpoint of a PreferenceTuner of version 1"):
        toy_tuner().load(file)
    with pytest.raises(FileNotFoundError):
        toy_tuner().load(tmp_path / "none.pt")


# --------------------------------------------------------------------------------------------------------------------
# Sessions
# --------------------------------------------------------------------------------------------------------------------

PROMPTS = ["one", "two", "three"]


def play(session: Session, rounds: int) -> list[str]:
    """Rounds of a simulated user; what each update reported."""
    user, found = SimulatedUser("shorter", mistakes=0.2), []
    for _ in range(rounds):
        for comparison in session.comparisons():
            session.judge(comparison, user(comparison))
        report = session.learn()
        found.append("" if report is None else report.loss.hex())
    return found


def open_session(folder: Path, **options: object) -> Session:
    return Session(folder, toy_tuner(learning_rate=3e-3), PROMPTS, pairs=2, replay=3, length=5, **options)


def test_a_session_that_died_anywhere_goes_on_as_the_whole_one(tmp_path):
    whole = open_session(tmp_path / "whole")
    losses = play(whole, 6)
    assert len({*losses}) >= 5
    folder = tmp_path / "died"
    died = open_session(folder, save_every=100)  # no checkpoint: the journal alone
    assert play(died, 2) == losses[:2]
    died.judge(died.comparisons()[0], SimulatedUser("shorter", mistakes=0.2)(died.comparisons()[0]))  # half a round
    with (folder / "choices.jsonl").open("a") as journal:
        journal.write('{"round": 2, "pro')  # and a line that was being written
    again = open_session(folder)
    assert (len(again.judged), again.tuner.position, again.learned_again) == (5, 4, 5)
    assert len(again.comparisons()) == 1
    assert play(again, 2) == losses[2:4]
    assert play(open_session(folder), 2) == losses[4:]
    for name in ("choices.jsonl", "preferences.jsonl"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert read_preferences(folder / "preferences.jsonl") == whole.preferences
    assert 0 <= whole.win_rate() <= 1
    assert whole.kl() > 0


def test_a_tie_counts_half_and_teaches_nothing(tmp_path):
    session = Session(tmp_path, toy_tuner(), PROMPTS, pairs=1, length=4)
    before = copy.deepcopy(session.tuner.policy.state_dict())
    session.judge(session.comparisons()[0], "tie")
    assert session.learn() is None
    assert (session.win_rate(), session.round, session.preferences) == (0.5, 1, [])
    assert all(torch.equal(before[name], value) for name, value in session.tuner.policy.state_dict().items())
    with pytest.raises(ValueError, match="'choice' is '3'; allowed: 1, 2, tie"):
        session.judge(session.comparisons()[0], "3")
    with pytest.raises(ValueError, match="the round is not over: 1 comparison"):
        session.learn()


def test_a_journal_that_does_not_fit_is_refused(tmp_path):
    session = open_session(tmp_path)
    play(session, 1)
    journal = tmp_path / "choices.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0])
    with pytest.raises(PreferenceError, match=r"1 choices, but tuner\.pt has learned from 2"):
        open_session(tmp_path)
    journal.write_text(lines[0] + lines[1].replace('"choice": "', '"choice": "x'))
    with pytest.raises(PreferenceError, match=r"choices.jsonl:2: 'choice' must be 1, 2 or tie, not 'x"):
        open_session(tmp_path)
    journal.write_text(lines[0].replace('"kl": ', '"kl": true, "was": '))
    with pytest.raises(PreferenceError, match=r"choices.jsonl:1: 'kl' must be float, not True"):
        open_session(tmp_path)


def test_one_process_at_a_time(tmp_path):
    with only_one(tmp_path), pytest.raises(BlockingIOError), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


@pytest.mark.parametrize(
    ("taste", "better", "worse"),
    [
        ("shorter", "no", "not yet"),
        ("longer", "not yet", "no"),
        ("finished", "it is.", "it is"),
        ("plain", "it", "__i__"),
    ],
)
def test_simulated_users(taste, better, worse):
    comparison = Comparison(0, "p", better, worse, 1, 0.0)
    user = SimulatedUser(taste)
    assert user(comparison) == "1"
    assert user(Comparison(0, "p", worse, better, 1, 0.0)) == "2"
    assert user(Comparison(0, "p", worse, worse, 1, 0.0)) == "tie"
    assert SimulatedUser(taste, mistakes=1)(comparison) == "2"
    assert taste in TASTES


def test_the_win_rate_rises_clearly(tmp_path):
    """A small model of the Python reference, a user who likes short answers: measured on prompts that were not tuned on."""
    torch.manual_seed(0)
    words = small.words()
    config = small.SmallConfig(small.FIRST_WORD + len(words), layers=1, hidden=64, ffn=128, context=40)
    model, tokenizer = small.SmallLM(config), small.tokenizer(words)
    assert small.train(model, tokenizer, 80, batch=8, learning_rate=5e-3) < 4.5  # 6.6 before
    settings = TunerConfig(sft_weight=0.3, learning_rate=1e-3, reward_learning_rate=1e-3, context=config.context)
    reward = RewardModel(copy.deepcopy(model), config.hidden)
    tuner = PreferenceTuner(model, copy.deepcopy(model), tokenizer, settings, reward=reward)
    user, prompts = SimulatedUser("shorter"), small.prompts()
    sampling = {"length": 16, "temperature": 0.8}
    before = evaluate(tuner, user, prompts[:48], **sampling)
    session = Session(tmp_path, tuner, prompts[48:], pairs=8, replay=16, save_every=4, **sampling)
    for _ in range(9):
        for comparison in session.comparisons():
            session.judge(comparison, user(comparison))
        session.learn()
    after = evaluate(tuner, user, prompts[:48], **sampling)
    assert 0.35 < before < 0.65  # the policy is the reference: chance alone
    assert after > before + 0.2, (before, after)
    assert session.win_rate(40) > 0.6
    foreseen, of = session.guesses()
    assert foreseen > 0.6 * of


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """A state folder of its own, wide lines, no colour."""
    monkeypatch.setenv("TRITON_TUTORIAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_in_a_terminal_and_ctrl_c_loses_nothing(quiet, tmp_path, monkeypatch, capfd, terminal):
    folder = tmp_path / "session"
    judge = terminal("rlhf", "--session", str(folder), "--base-steps", "10", "--length", "6", "--device", "cpu")
    judge.until("1, 2, t, q: ")
    assert re.search(r"─ 1 ─.*─ 2 ─", judge.text), "the answers stand side by side"
    judge.type("best\n")
    judge.until("'best' is none of them[\\s\\S]*1, 2, t, q: ")
    judge.type("1\n")
    judge.until("1 choice; tuned model preferred .*KL to the reference .* nats; loss [\\d.]+[\\s\\S]*1, 2, t, q: ")
    judge.type("t\n")
    judge.until("2 choices; .*nothing to learn from that[\\s\\S]*1, 2, t, q: ")
    assert judge.interrupt() == 130
    assert "Traceback" not in judge.text
    assert f"kept in {folder}" in judge.text
    choices = [json.loads(line)["choice"] for line in (folder / "choices.jsonl").read_text().splitlines()]
    assert choices == ["1", "tie"]
    assert len(read_preferences(folder / "preferences.jsonl")) == 1
    # open it again, in this process: one round more, and the end of the input stops it
    answers = iter(["2"])
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    assert cli.main(["rlhf", "--session", str(folder), "--rounds", "1", "--device", "cpu", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert "going on after 2 choices" in err
    assert (found["choices"], found["learned"], found["ended"]) == (3, 3, "finished")
    assert found["kl"] >= 0


def test_simulated_and_wrong_use(quiet, tmp_path, capfd):
    folder = str(tmp_path / "simulated")
    arguments = ["rlhf", "--session", folder, "--device", "cpu"]
    options = ["--simulate", "shorter", "--base-steps", "10", "--length", "4", "--pairs", "2", "--rounds", "2"]
    assert cli.main([*arguments, *options]) == 0
    out, _ = capfd.readouterr()
    assert re.search(r"4 choices; tuned model preferred \d+%", out)
    assert re.search(r"on prompts it was not tuned on, \d+% before and \d+% now", out)

    def refused(*more: str) -> str:
        assert cli.main([*arguments, *more]) == 1
        said, error = capfd.readouterr()
        assert "Traceback" not in error
        assert not said
        return error

    assert "was begun with --beta 0.1; leave the option out" in refused("--beta", "0.5")
    with only_one(folder):
        assert "is open in another process" in refused()
    (Path(folder) / "base.pt").write_bytes(b"")
    assert "base.pt cannot be read" in refused()
    (Path(folder) / "session.json").write_text("{}}")
    assert "session.json is broken" in refused()
    arguments[2] = str(tmp_path / "other")
    assert "argument 'taste' is 'kinder'" in refused("--simulate", "kinder")
    arguments[2] = str(tmp_path / "third")
    (tmp_path / "prompts").write_text("\n")
    assert "has no prompt; write one a line" in refused("--prompts", str(tmp_path / "prompts"), "--base-steps", "10")
