"""The lessons' measurements as one record, and the comparison of two records. Imports no torch.

A record is {"version": 1, "lessons": {"1": what the lesson wrote with --bench --json}}. A folder of `lesson_NN.json` files, as
tutorials/results/h200, reads as one too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_tutorial.catalog import TutorialError

VERSION = 1
Record = dict[str, Any]
Key = tuple[int, str, str, str]  # lesson, table, name, case


def percent(text: str) -> float:
    """ "5%" or "5" -> 0.05. Raises TutorialError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if match is None:
        raise TutorialError(f"--fail-if-slower is '{text}'; write a percentage like 5%")
    return float(match[1]) / 100


def load(path: Path) -> Record:
    """A record from a file, or from a folder of lesson records. Raises TutorialError."""
    if path.is_dir():
        files = {int(f.stem[-2:]): f for f in sorted(path.glob("lesson_*.json")) if f.stem[-2:].isdigit()}
        if not files:
            raise TutorialError(
                f"{path} holds no lesson_NN.json; write a record with: triton-tutorial benchmark --all --json F"
            )
        return {"version": VERSION, "lessons": {str(n): _lesson(_json(f), f) for n, f in files.items()}}
    record = _json(path)
    if not isinstance(record, dict) or not isinstance(record.get("lessons"), dict):
        raise TutorialError(f"{path} is no benchmark record; write one with: triton-tutorial benchmark --all --json F")
    if record.get("version") != VERSION:
        raise TutorialError(f"{path} has version {record.get('version')}; this triton-tutorial reads {VERSION}")
    for lesson in record["lessons"].values():
        _lesson(lesson, path)
    return record


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TutorialError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TutorialError(f"{path} is not JSON: {error}") from None


def _lesson(record: Any, path: Path) -> Record:
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list) or "header" not in record:
        raise TutorialError(f"{path} is no record of a lesson: it needs 'header' and 'rows'")
    return record


def save(record: Record, path: Path) -> None:
    """Write a record. Raises TutorialError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TutorialError(f"{path} cannot be written: {error.strerror}") from None


def times(record: Record) -> dict[Key, dict[str, Any]]:
    """Every measured row of ours; rows marked as a baseline (torch, a library) are not ours."""
    return {
        (int(number), row["table"], row["name"], str(row.get("case", ""))): row
        for number, lesson in record["lessons"].items()
        for row in lesson["rows"]
        if row.get("us") is not None and not row.get("baseline")
    }


def gpus(record: Record) -> set[str]:
    """The GPUs that a record was measured on."""
    return {str(lesson["header"].get("gpu")) for lesson in record["lessons"].values()}


@dataclass(frozen=True)
class Change:
    """One figure in both records, microseconds. slower: +0.05 is 5 % more time."""

    key: Key
    before: float
    after: float

    @property
    def slower(self) -> float:
        return self.after / self.before - 1


def compare(baseline: Record, now: Record) -> tuple[list[Change], list[Key]]:
    """Every figure that both have, slowest change first; and figures of the lessons run that only the baseline has.

    Raises TutorialError where the two are of different GPUs or have nothing in common.
    """
    measured = set(now["lessons"])
    baseline = {**baseline, "lessons": {n: lesson for n, lesson in baseline["lessons"].items() if n in measured}}
    old, new = times(baseline), times(now)
    if gpus(baseline) and gpus(baseline) != gpus(now):
        theirs, ours = ", ".join(sorted(gpus(baseline))), ", ".join(sorted(gpus(now)))
        raise TutorialError(f"the baseline is of {theirs}, this machine has {ours}; compare records of one GPU")
    both = [Change(key, old[key]["us"], new[key]["us"]) for key in old if key in new and old[key]["us"] > 0]
    if not both:
        raise TutorialError("the baseline has no figure in common with this run; was it made of other lessons?")
    return sorted(both, key=lambda change: -change.slower), [key for key in old if key not in new]
