"""The lessons: found by file name, described by the YAML header of their first cell. Imports no torch.

A lesson is `<level>/lesson_NN_<slug>.py` in the folder of lessons. Its header is YAML between two `# ---` lines, as jupytext
writes it, under the key `lesson`:

    # ---
    # lesson:
    #   number: 1
    #   slug: gpu_fundamentals
    #   title: GPU fundamentals
    #   level: beginner
    #   minutes: 45
    #   prerequisites: []
    #   ops: [vector_add]
    #   concepts: [program id, block, mask]
    #   exercises: [ex1, ex2]
    # ---
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

PACKAGE = Path(__file__).resolve().parent
LESSONS_VARIABLE = "TRITON_TUTORIAL_LESSONS"  # a folder of lessons to use instead of the shipped ones
LEVELS = ("beginner", "intermediate", "advanced")

# PyYAML's binding of libyaml where it was built with it: a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEYS: dict[str, type] = {
    "number": int,
    "slug": str,
    "title": str,
    "level": str,
    "minutes": int,
    "prerequisites": list,
    "ops": list,
    "concepts": list,
    "exercises": list,
}
_TYPE_NAMES = {int: "a whole number", str: "text", list: "a list"}
_ITEMS = {"prerequisites": int, "ops": str, "concepts": str, "exercises": str}
_HEADER_WITHIN = 60  # lines
_FILE_NAME = re.compile(r"lesson_(\d\d)_([a-z0-9_]+)\.py")


class TutorialError(Exception):
    """What a user is told: one sentence with the fix."""


class CatalogError(TutorialError):
    """A mistake in a lesson's header: file, line, what is wrong."""


@dataclass(frozen=True)
class Lesson:
    """One lesson, from its header."""

    number: int
    slug: str
    title: str
    level: str
    minutes: int
    prerequisites: tuple[int, ...]
    ops: tuple[str, ...]
    concepts: tuple[str, ...]
    exercises: tuple[str, ...]
    file: Path

    @property
    def name(self) -> str:
        """`lesson_01`: the name of its folder of exercises and of its record."""
        return f"lesson_{self.number:02d}"

    @property
    def root(self) -> Path:
        """The folder of all lessons."""
        return self.file.parent.parent

    @property
    def folder(self) -> Path:
        """Where its exercises are."""
        return self.root / "exercises" / self.name


def lessons_folder() -> Path:
    """The folder of lessons: the shipped one, or $TRITON_TUTORIAL_LESSONS."""
    return Path(os.environ.get(LESSONS_VARIABLE) or PACKAGE / "lessons").resolve()


def lessons(root: Path | None = None) -> list[Lesson]:
    """Every lesson below `root`, by number. Raises CatalogError for the first wrong header."""
    root = root or lessons_folder()
    found: dict[int, Lesson] = {}
    for level in LEVELS:
        for file in sorted((root / level).glob("lesson_*.py")):
            lesson = read(file)
            if lesson.number in found:
                other = found[lesson.number].file
                raise CatalogError(f"{file}:1: lesson {lesson.number} exists already: {other}; number one of them anew")
            found[lesson.number] = lesson
    ordered = [found[number] for number in sorted(found)]
    for lesson in ordered:
        for number in lesson.prerequisites:
            if number not in found and number >= lesson.number:
                raise CatalogError(
                    f"{lesson.file}:1: prerequisite {number} does not come before lesson {lesson.number}"
                )
    return ordered


def read(file: Path) -> Lesson:
    """The header of one lesson. Raises CatalogError with file and line."""
    return _Header(file).parse()


class _Header:
    """The YAML block of one file on its way to a Lesson."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[str, int] = {}

    def fail(self, line: int, message: str) -> NoReturn:
        raise CatalogError(f"{self.file}:{line}: {message}")

    def parse(self) -> Lesson:
        start, text = self._block()
        try:
            node = yaml.compose(text, Loader=_LOADER)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = start + (mark.line if mark else 0)
            self.fail(line, f"the header is not valid YAML: {getattr(error, 'problem', None) or error}")
        pairs = {k.value: (k, v) for k, v in node.value} if isinstance(node, yaml.MappingNode) else {}
        if "lesson" not in pairs or not isinstance(pairs["lesson"][1], yaml.MappingNode):
            self.fail(start, "the header has no mapping 'lesson:'; tutorials/AUTHORING.md shows one")
        values: dict[str, Any] = {}
        loader = yaml.SafeLoader("")
        for key, value in pairs["lesson"][1].value:
            line = start + key.start_mark.line
            if key.value not in _KEYS:
                near = difflib.get_close_matches(key.value, _KEYS, n=1)
                advice = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(_KEYS)}"
                self.fail(line, f"unknown key '{key.value}'; {advice}")
            self.lines[key.value] = line
            values[key.value] = loader.construct_object(value, deep=True)
        head = start + pairs["lesson"][0].start_mark.line
        for key, kind in _KEYS.items():
            if key not in values:
                self.fail(head, f"key '{key}' is missing; every lesson needs {', '.join(_KEYS)}")
            if type(values[key]) is not kind:
                self.fail(self.lines[key], f"{key} is {values[key]!r}; it must be {_TYPE_NAMES[kind]}")
            for item in values[key] if key in _ITEMS else ():
                if type(item) is not _ITEMS[key]:
                    self.fail(self.lines[key], f"{key} holds {item!r}; each must be {_TYPE_NAMES[_ITEMS[key]]}")
        self._check(values)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Lesson(file=self.file, **fields)

    def _block(self) -> tuple[int, str]:
        """Line of the first line inside the block, counted from 1, and its text without the comment signs."""
        with self.file.open(encoding="utf-8") as lines:
            head = [line.rstrip("\n") for line, _ in zip(lines, range(_HEADER_WITHIN), strict=False)]
        marks = [i for i, line in enumerate(head) if line.rstrip() == "# ---"]
        if len(marks) < 2:
            self.fail(1, f"no header: YAML between two '# ---' lines within the first {_HEADER_WITHIN} lines")
        block = head[marks[0] + 1 : marks[1]]
        for i, line in enumerate(block):
            if not line.startswith("#"):
                self.fail(marks[0] + 2 + i, "a line of the header must begin with '#'")
        return marks[0] + 2, "\n".join(re.sub(r"^# ?", "", line) for line in block)

    def _check(self, values: dict[str, Any]) -> None:
        match = _FILE_NAME.fullmatch(self.file.name)
        if match is None:
            self.fail(1, "the file's name must be lesson_NN_<slug>.py")
        if values["number"] != int(match[1]):
            self.fail(self.lines["number"], f"number is {values['number']}; the file's name says {int(match[1])}")
        if values["slug"] != match[2]:
            self.fail(self.lines["slug"], f"slug is '{values['slug']}'; the file's name says '{match[2]}'")
        if values["level"] != self.file.parent.name:
            self.fail(self.lines["level"], f"level is '{values['level']}'; the folder says '{self.file.parent.name}'")
        if values["minutes"] <= 0:
            self.fail(self.lines["minutes"], f"minutes is {values['minutes']}; it must be positive")
        expected = [f"ex{i}" for i in range(1, len(values["exercises"]) + 1)]
        if values["exercises"] != expected:
            self.fail(self.lines["exercises"], f"exercises must be {expected}: numbered from ex1 without a gap")


def find(words: Sequence[str], root: Path | None = None) -> Lesson:
    """The lesson that a user means: `1`, `beginner 1`, `gpu-fundamentals`, `lesson_01`. Raises TutorialError with near misses."""
    known = lessons(root)
    asked = " ".join(words)
    if not known:
        raise TutorialError(f"there are no lessons in {root or lessons_folder()}; reinstall torch-triton-ops")
    rest = [part.lower() for word in words for part in re.split(r"[\s/]+", word) if part]
    level = None
    if rest and rest[0] in LEVELS:
        level = rest.pop(0)
    if not rest:
        inside = [lesson for lesson in known if level in (None, lesson.level)]
        numbers = ", ".join(str(lesson.number) for lesson in inside) or "none"
        raise TutorialError(f"which lesson of {level}? It has {numbers}; say triton-tutorial run {level} NUMBER")
    if len(rest) == 1 and (match := re.fullmatch(r"(?:lesson_?)?0*(\d+)", rest[0])):
        for lesson in known:
            if lesson.number == int(match[1]):
                if level not in (None, lesson.level):
                    raise TutorialError(
                        f"lesson {lesson.number} is {lesson.level}, not {level}; say {lesson.number} alone"
                    )
                return lesson
        numbers = ", ".join(str(lesson.number) for lesson in known)
        raise TutorialError(f"there is no lesson {match[1]}; there are {numbers} (triton-tutorial list)")
    slug = re.sub(r"[\s-]+", "_", "_".join(rest)).removesuffix(".py")
    slug = re.sub(r"^lesson_\d\d_", "", slug)
    by_slug = {lesson.slug: lesson for lesson in known if level in (None, lesson.level)}
    starts = [lesson for name, lesson in by_slug.items() if name.startswith(slug)]
    if slug in by_slug or len(starts) == 1:
        return by_slug.get(slug) or starts[0]
    near = difflib.get_close_matches(slug, by_slug, n=1, cutoff=0.4)
    advice = f"did you mean {near[0].replace('_', '-')}?" if near else "triton-tutorial list shows them"
    raise TutorialError(f"there is no lesson '{asked}'; {advice}")
