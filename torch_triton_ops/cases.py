"""What an op's file says about itself: sample inputs, wrong inputs, benchmark cases and cost. Knows no op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """One valid call. `id` reads like `M3_N33`; tests show it as `rms_norm-bf16-M3_N33`.

    `slow_in_interpreter` keeps a sample out of the interpreter suite (many programs or a long loop).
    """

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    slow_in_interpreter: bool = False


@dataclass(frozen=True)
class ErrorSample:
    """One wrong call: it must raise `error` with a message that matches the regular expression `match`."""

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = ValueError
    match: str = ""


@dataclass(frozen=True)
class BenchCase:
    """One real shape. `make(device, dtype)` returns `(args, kwargs)` of random normal data, never zeros.

    `passes` names what is timed: "fwd", "bwd", "fwdbwd".
    """

    id: str
    make: Callable[[torch.device | str, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[str, ...] = ("fwd", "fwdbwd")


@dataclass(frozen=True)
class Cost:
    """Compulsory work of one call: each input read once, each output written once. Bytes; flops count a multiply-add as two."""

    flops: int
    bytes: int
    backward_flops: int = 0
    backward_bytes: int = 0
