"""Error messages for people: the op, the argument, what was given, what is allowed. Knows no op."""

from __future__ import annotations

from typing import Any, NoReturn


def bad_argument(
    op: str, argument: str, given: Any, allowed: str, error: type[Exception] = ValueError, namespace: str = "tt"
) -> NoReturn:
    """Raise `error` in the house's form.

    >>> bad_argument("rms_norm", "eps", -1.0, "a number >= 0")
    Traceback (most recent call last):
    ...
    ValueError: tt::rms_norm: argument 'eps' is -1.0; allowed: a number >= 0
    """
    raise error(f"{namespace}::{op}: argument '{argument}' is {given}; allowed: {allowed}")
