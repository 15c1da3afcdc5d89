"""Preference pairs: which of two answers to a prompt was liked better. JSON lines in and out.

One object a line, in the columns that TRL and Hugging Face datasets use:

    {"prompt": "The interpreter ", "chosen": "stops.", "rejected": "stops, unless it does not."}

An answer that a length limit cut off, and that the model had not ended, is marked by a further column, "chosen_cut" or
"rejected_cut": true. Other columns are left out when reading. A column may also hold a conversation, a list of
{"role", "content"} messages, where the reader is told how to write that as text. A file that another program reads while it
grows never holds half a line: `append_lines` writes whole lines and waits until they are on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("prompt", "chosen", "rejected")
CUT = ("chosen_cut", "rejected_cut")
Render = Callable[[list[dict[str, str]]], str]


class PreferenceError(ValueError):
    """What is wrong in a file of preferences, with file and line."""


@dataclass(frozen=True)
class Preference:
    """`chosen` was preferred to `rejected` as the answer to `prompt`. The answers do not repeat the prompt.

    An answer that was cut off is learned without an end: else the model would be taught to end, or not to, where it did neither.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_cut: bool = False
    rejected_cut: bool = False

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*COLUMNS, *CUT) if name in COLUMNS or getattr(self, name)}


def read_preferences(path: str | os.PathLike[str], render: Render | None = None) -> list[Preference]:
    """The preferences of a JSON lines file, in its order; blank lines are passed over.

    `render` turns a conversation into text, for columns that hold one: with a Hugging Face tokenizer,
    `lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)`.

    Raises PreferenceError, with file and line, for what is no JSON object, a column that is missing or no text, and for two
    answers that are the same; OSError if the file cannot be read. An answer may be empty: a model's that ends at once.
    """
    found = []
    for number, line in read_lines(path):
        where = f"{os.fspath(path)}:{number}"
        value = parse_object(line, where)
        missing = [name for name in COLUMNS if name not in value]
        if missing:
            raise PreferenceError(f"{where}: no column {quoted(missing)}; there are: {quoted(value) or 'none'}")
        texts = {name: _text(value[name], name, where, render) for name in COLUMNS}
        if texts["chosen"] == texts["rejected"]:
            raise PreferenceError(f"{where}: 'chosen' and 'rejected' are the same; leave the line out")
        cut = {name: value[name] for name in CUT if value.get(name) is not None}
        for name, given in cut.items():
            if not isinstance(given, bool):
                raise PreferenceError(f"{where}: '{name}' must be true or false, not {json.dumps(given)[:40]}")
        prompt, chosen, rejected = texts.values()
        found.append(Preference(prompt, chosen, rejected, **cut))
    return found


def write_preferences(path: str | os.PathLike[str], preferences: Iterable[Preference]) -> None:
    """Write a JSON lines file that `read_preferences`, TRL and `datasets.load_dataset("json", ...)` read.

    The file is replaced whole: after a crash it is the old one or the new one.
    """
    with replacing(path) as temporary:
        text = "".join(to_line(preference.as_json()) for preference in preferences)
        temporary.write_text(text, encoding="utf-8")


def shuffled(preferences: Sequence[Preference], epochs: int = 1, seed: int = 0) -> Iterator[Preference]:
    """A stream of all preferences `epochs` times, each time in another order; the same stream for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(preferences), generator=generator).tolist():
            yield preferences[index]


# --------------------------------------------------------------------------------------------------------------------
# JSON lines
# --------------------------------------------------------------------------------------------------------------------


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    content = Path(path).read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PreferenceError(f"{os.fspath(path)}:{number}: not UTF-8 ({error.reason})") from None


def parse_object(line: str, where: str) -> dict[str, Any]:
    """One line's JSON object."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PreferenceError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise PreferenceError(f"{where}: a JSON object is expected, not {json.dumps(value)[:40]}")
    return value


def to_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def append_lines(path: str | os.PathLike[str], values: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines to a file and return when they are on the disk."""
    data = "".join(map(to_line, values)).encode()
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a temporary file that takes a file's place, whole and on the disk, when the block ends without error."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _text(value: Any, name: str, where: str, render: Render | None) -> str:
    if isinstance(value, str):
        return value
    conversation = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not conversation:
        raise PreferenceError(f"{where}: '{name}' must be text, not {json.dumps(value)[:40]}")
    if render is None:
        raise PreferenceError(f"{where}: '{name}' is a conversation; say how it is written as text with render=")
    return render(value)


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
