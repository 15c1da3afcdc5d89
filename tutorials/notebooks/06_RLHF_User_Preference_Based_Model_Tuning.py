# %% [markdown]
# # Notebook 6. RLHF: tuning a model to what its user prefers
#
# A language model learns from text what is *likely*. What a user *likes* is another question, and it is answered by
# showing two answers and asking which is better. This notebook takes such choices all the way into the weights:
#
# 1. preference pairs, and the file that they are kept in;
# 2. the log-probability of an answer, from which everything below is computed;
# 3. a reward model, fitted by Bradley and Terry's rule;
# 4. DPO, which needs no reward model and no reinforcement learning;
# 5. the whole loop with a user whose taste is hidden from the model, until it is hidden no more;
# 6. a process that dies, and a run that goes on as if it had not.
#
# Everything runs on a CPU, where `torch.ops.tt.*` are plain PyTorch references, and unchanged on a GPU, where they are
# Triton kernels. No speed is shown: speeds are measured on a GPU alone and stand, with machine and versions, in the records
# under `bench/results/`.

# %%
import copy
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from torch_triton_ops.rlhf import (
    Preference,
    PreferenceError,
    PreferenceTuner,
    RewardModel,
    Session,
    SimulatedUser,
    TunerConfig,
    collate,
    evaluate,
    generate,
    logprobs,
    read_preferences,
    shuffled,
    small,
    write_preferences,
)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)

# %% [markdown]
# ## A model small enough to watch
#
# A Llama of one layer reads the sentences of the Python reference manual, which every Python carries. Its tokens are
# words, with bytes for what is rare, and one token that ends a sentence. A prompt is three words; the answer is what the
# model makes of them. After some seconds of training it writes nonsense of the right shape, which is enough: preferences
# do not teach it the language, they move probability between things that it can write already.

# %%
words = small.words()
tokenizer = small.tokenizer(words)
config = small.SmallConfig(small.FIRST_WORD + len(words), layers=1, hidden=64, ffn=128, context=40)
base = small.SmallLM(config).to(device)
loss = small.train(base, tokenizer, steps=150, batch=8, learning_rate=5e-3)
prompts = small.prompts()
held_out, prompts = prompts[:48], prompts[48:]
print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {loss:.2f} nats per token, {config.vocab} tokens")


def answers(model: torch.nn.Module, count: int = 6) -> list[str]:
    generator = torch.Generator(device).manual_seed(1)
    starts = [tokenizer.encode(prompt) for prompt in held_out[:count]]
    return [tokenizer.decode(a) for a in generate(model, starts, 16, tokenizer.end, generator, temperature=0.8)]


for prompt, answer in zip(held_out, answers(base), strict=False):
    print(f"{prompt} |{answer}")

# %% [markdown]
# ## 1. Preference pairs
#
# One JSON object a line, with the columns `prompt`, `chosen` and `rejected`: what TRL and Hugging Face's `datasets` read
# and write. Files grow by hand and by many programs, so what is wrong in one is said with file and line.

# %%
pairs = [
    Preference("The interpreter", " stops.", " stops, unless it does not."),
    Preference("A module", " may be imported.", " must not be imported twice by the same statement."),
]
write_preferences(folder / "pairs.jsonl", pairs)
print((folder / "pairs.jsonl").read_text())
assert read_preferences(folder / "pairs.jsonl") == pairs

with (folder / "pairs.jsonl").open("a") as file:
    file.write(json.dumps({"prompt": "A class", "chosen": " is an object."}) + "\n")
try:
    read_preferences(folder / "pairs.jsonl")
except PreferenceError as error:
    print(str(error).replace(str(folder), "..."))

# %% [markdown]
# ## 2. The log-probability of an answer
#
# All of it rests on one number: $\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})$, how likely the model finds the
# answer $y$ to the prompt $x$. Written down naively this needs the logits of every token, a tensor of tokens times
# vocabulary, which for a real model is larger than everything else together. `torch.ops.tt.linear_logprob` takes the
# hidden states and the last layer's weight instead, and never has the logits whole in memory.
#
# That is why the small model returns `Hidden(states, weight)`. A model that returns logits, Hugging Face's for instance,
# works too; `hugging_face_hidden` gives it the lean path.

# %%
reference = copy.deepcopy(base)
tuner = PreferenceTuner(base, reference, tokenizer, TunerConfig(context=config.context))
chosen, rejected = tuner.examples(pairs[0])
batch = collate([chosen, rejected], tokenizer.end, device)
with torch.no_grad():
    hidden = base(batch.tokens)
    lean = batch.total(logprobs(hidden, batch))
    logits = F.linear(hidden.states, hidden.weight)  # whole, for comparison
for example, value, row in zip((chosen, rejected), lean, logits, strict=True):
    first = len(example.prompt) - 1
    plain = row[first : first + len(example.answer)].log_softmax(-1)
    plain = plain[range(len(example.answer)), example.answer].sum()
    print(
        f"{value.item():9.4f} nats by linear_logprob, {plain.item():9.4f} from the logits, {len(example.answer)} tokens"
    )
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## 3. A reward model: Bradley and Terry, 1952
#
# Give every answer a score $r(x, y)$ and say that $y_1$ is preferred to $y_2$ with probability
# $\sigma(r(x, y_1) - r(x, y_2))$. The negative logarithm of that is the loss: `torch.ops.tt.bradley_terry_loss`. Only
# differences are determined, a constant cancels. The score is one linear layer on the hidden state of the answer's last
# token.
#
# ## 4. DPO: the same, without the reward model
#
# The policy that maximises a reward while it pays $\beta$ for each nat of KL divergence from the reference has the closed
# form $\pi(y \mid x) \propto \pi_\mathrm{ref}(y \mid x)\, e^{r(x, y) / \beta}$. Solve for $r$, put it into Bradley and
# Terry's loss, and the normaliser cancels ([Rafailov et al.](https://arxiv.org/abs/2305.18290)):
#
# $$-\log \sigma\!\left(\beta \left[\log\frac{\pi(y_c \mid x)}{\pi_\mathrm{ref}(y_c \mid x)}
#   - \log\frac{\pi(y_r \mid x)}{\pi_\mathrm{ref}(y_r \mid x)}\right]\right)$$
#
# What follows is the derivative that the backward kernel computes, beside autograd's of the plain formula.

# %%
beta = 0.1
ours = (lean + torch.tensor([0.8, -0.5], device=device)).requires_grad_()  # a policy that has moved already
theirs = lean
total, chosen_reward, rejected_reward = torch.ops.tt.dpo_loss(
    ours[:1], ours[1:], theirs[:1], theirs[1:], beta=beta, loss_type="sigmoid"
)
(gradient,) = torch.autograd.grad(total.sum(), ours)
margin = beta * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
(plain_gradient,) = torch.autograd.grad(-F.logsigmoid(margin), ours)
print(f"loss {total.item():.4f}, rewards {chosen_reward.item():.3f} and {rejected_reward.item():.3f}")
print(f"d loss / d log p: chosen {gradient[0]:.4f}, rejected {gradient[1]:.4f}")
torch.testing.assert_close(gradient, plain_gradient)

# %% [markdown]
# The gradient pulls the chosen answer up and pushes the rejected one down by $\beta\,\sigma(-\text{margin})$: strongly
# where the model is wrong about the user, hardly where it is right already. Only the margin counts, so DPO may also widen
# it by making *both* answers unlikely. A little of the chosen answer's own likelihood in the loss, `sft_weight`, holds
# against that ([Pang et al.](https://arxiv.org/abs/2404.19733)).
#
# ### From a file of pairs
#
# `PreferenceTuner` does both updates from the same pairs: gradient accumulation (`micro_pairs`), mixed precision (`dtype`),
# warm-up, clipping, checkpoints. An answer that the length limit cut off is marked (`chosen_cut`, `rejected_cut`): it is
# learned without an end, or the model would be taught about ends where it made none. Here are pairs as a labelling
# campaign would leave them: two answers of the untuned model to each prompt, of which somebody liked the shorter.


# %%
def samples(seed: int) -> list[tuple[str, bool]]:
    """An answer to each prompt, and whether the length limit cut it off."""
    generator = torch.Generator(device).manual_seed(seed)
    found = generate(reference, [tokenizer.encode(prompt) for prompt in prompts], 16, tokenizer.end, generator)
    return [(tokenizer.decode(answer), answer[-1] != tokenizer.end) for answer in found]


labelled = []
for prompt, *two in zip(prompts, samples(1), samples(2), strict=True):
    (short, short_cut), (long, long_cut) = sorted(two, key=lambda answer: len(answer[0]))
    if 0 < len(short) < len(long):
        labelled.append(Preference(prompt, short, long, short_cut, long_cut))


def new_tuner(**options: object) -> PreferenceTuner:
    policy = copy.deepcopy(reference).requires_grad_(True)
    reward = RewardModel(copy.deepcopy(policy), config.hidden)
    settings = {
        "learning_rate": 1e-3,
        "sft_weight": 0.3,
        "reward_learning_rate": 1e-3,
        "context": config.context,
        "micro_pairs": 4,
    }
    return PreferenceTuner(policy, reference, tokenizer, TunerConfig(**{**settings, **options}), reward=reward)


tuner = new_tuner(dtype=torch.bfloat16)  # the weights stay float32
for report in tuner.tune(shuffled(labelled, epochs=3), checkpoint=folder / "tuner.pt"):
    if report.step % 3 == 1:
        print(
            f"update {report.step:2}: loss {report.loss:.3f}, {report.accuracy:.0%} of pairs right;"
            f" reward model {report.reward_loss:.3f}, {report.reward_accuracy:.0%}"
        )

# %% [markdown]
# ## 5. The loop
#
# A *session* asks while it learns. Each comparison sets an answer of the tuned model beside one of the reference, in random
# order, so that every choice is both a lesson and a measurement: how often is the tuned model preferred to what it was? At
# the start the two are the same model and the win rate is a half, up to chance.
#
# The user here is simulated and likes the shorter answer. The model is never told so. `triton-tutorial rlhf` is the same loop
# with you as the user.

# %%
user = SimulatedUser("shorter")
tuner = new_tuner()
session = Session(folder / "session", tuner, prompts, pairs=8, replay=16, length=16, temperature=0.8)
before = evaluate(tuner, user, held_out, length=16, temperature=0.8)
first = session.comparisons()[0]
print(f"{first.prompt}\n  1: {first.first}\n  2: {first.second}\n  the user chooses {user(first)}\n")

history = []
for number in range(20):
    for comparison in session.comparisons():
        session.judge(comparison, user(comparison))
    report = session.learn()
    history.append((session.win_rate(last=24), session.kl(last=24), report.loss))
    if number % 4 == 3:
        foreseen, of = session.guesses()
        print(
            f"{len(session.judged):3} choices: preferred {session.win_rate(24):.0%} of the last 24, KL {session.kl(24):.2f} nats,"
            f" reward model foresaw {foreseen} of {of}"
        )
after = evaluate(tuner, user, held_out, length=16, temperature=0.8)
print(f"\non prompts that were never tuned on: {before:.0%} before, {after:.0%} after")
assert after > before + 0.1

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
titles = ("preferred to the reference (last 24)", "KL to the reference (nats an answer)", "DPO loss")
for axis, title, values in zip(axes, titles, zip(*history, strict=True), strict=True):
    axis.plot([8 * (i + 1) for i in range(len(values))], values, color="#d1495b", linewidth=2)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("choices")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].axhline(0.5, color="#66727f", linestyle="--", linewidth=1)
axes[0].set_ylim(0, 1)
plt.show()

# %%
for prompt, old, new in zip(held_out, answers(reference), answers(tuner.policy), strict=False):
    print(f"{prompt}\n  before:{old}\n  after: {new}")

# %% [markdown]
# **What to watch.** The win rate says that the model learns the taste; the KL says what it pays. A policy that runs far from
# its reference has found the loophole in the preference (here: to stop at once). `beta` is the price: a larger one holds the
# policy nearer. It is estimated on the policy's own answers with $r - 1 - \log r$, $r = \pi_\mathrm{ref} / \pi$, which is
# unbiased and never negative.
#
# ## 6. A process that dies
#
# Every choice is written to the disk before the model learns from it, and what is sampled depends on the seed and the round
# alone. So a session can be opened again after anything: it loads its last checkpoint and learns what the journal has beyond
# it. Here the tuner and the session are dropped in the middle of a round.

# %%
comparison = session.comparisons()[0]
session.judge(comparison, user(comparison))
weights = copy.deepcopy(tuner.policy.state_dict())
del tuner, session

session = Session(folder / "session", new_tuner(), prompts, pairs=8, replay=16, length=16, temperature=0.8)
print(f"{len(session.judged)} choices are there, {len(session.comparisons())} of the round are left to make")
assert all(torch.equal(weights[name], value) for name, value in session.tuner.policy.state_dict().items())
print(sorted(file.name for file in (folder / "session").iterdir()))
print((folder / "session" / "preferences.jsonl").read_text().splitlines()[0])

# %% [markdown]
# `preferences.jsonl` is what section 1 reads, so what one user chose can tune another model.
#
# ## Your own model
#
# ```python
# from torch_triton_ops.rlhf import PreferenceTuner, Tokenizer, TunerConfig, hugging_face_hidden
#
# policy = AutoModelForCausalLM.from_pretrained(name)
# reference = AutoModelForCausalLM.from_pretrained(name)
# tuner = PreferenceTuner(
#     policy, reference, Tokenizer.of_hugging_face(AutoTokenizer.from_pretrained(name)),
#     TunerConfig(learning_rate=5e-7, pairs=32, micro_pairs=2, dtype=torch.bfloat16, context=2048),
#     forward=hugging_face_hidden,
# )
# for report in tuner.tune(shuffled(read_preferences("pairs.jsonl"), epochs=1), checkpoint="tuner.pt"):
#     print(report)
# ```
#
# ## Try
#
# 1. `SimulatedUser("finished")`, `"plain"` and `"longer"`: which is learned soonest, and what does the KL say?
# 2. A user who errs: `SimulatedUser("shorter", mistakes=0.2)` with `TunerConfig(label_smoothing=0.2)`.
# 3. Another loss: `TunerConfig(loss_type="ipo")` holds the margin at a fixed size instead of widening it for ever.
