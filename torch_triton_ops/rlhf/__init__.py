"""User-preference-based tuning: preferences in, a reward model and a DPO-tuned policy out.

    preferences = read_preferences("pairs.jsonl")                 # prompt, chosen, rejected
    tuner = PreferenceTuner(policy, reference, tokenizer, TunerConfig(beta=0.1))
    for report in tuner.tune(shuffled(preferences, epochs=2), checkpoint="tuner.pt"):
        print(report.step, report.loss, report.accuracy)

`Session` is the interactive loop (`triton-tutorial rlhf` in a terminal). Any causal language model will do: see
torch_triton_ops.rlhf.models. The losses are `torch.ops.tt.dpo_loss`, `bradley_terry_loss` and `linear_logprob`.
"""

from __future__ import annotations

from torch_triton_ops.rlhf.models import (
    BYTES,
    Batch,
    Hidden,
    RewardModel,
    Tokenizer,
    collate,
    generate,
    hugging_face_hidden,
    logprobs,
)
from torch_triton_ops.rlhf.preferences import (
    Preference,
    PreferenceError,
    read_preferences,
    shuffled,
    write_preferences,
)
from torch_triton_ops.rlhf.session import Comparison, Judged, Session, SimulatedUser, evaluate
from torch_triton_ops.rlhf.tuner import PreferenceTuner, Report, TunerConfig

__all__ = [
    "BYTES",
    "Batch",
    "Comparison",
    "Hidden",
    "Judged",
    "Preference",
    "PreferenceError",
    "PreferenceTuner",
    "Report",
    "RewardModel",
    "Session",
    "SimulatedUser",
    "Tokenizer",
    "TunerConfig",
    "collate",
    "evaluate",
    "generate",
    "hugging_face_hidden",
    "logprobs",
    "read_preferences",
    "shuffled",
    "write_preferences",
]
