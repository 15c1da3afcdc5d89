"""What a learner did: lessons run, exercises passed, hints taken; one JSON file in the state folder. Imports no torch.

The folder is $TRITON_TUTORIAL_HOME, else $XDG_STATE_HOME/triton_tutorial, else ~/.local/state/triton_tutorial. A file that
cannot be read is kept aside under another name, never overwritten.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_tutorial.catalog import Lesson, TutorialError

HOME_VARIABLE = "TRITON_TUTORIAL_HOME"
VERSION = 1
HINT_LEVELS = 3


def home() -> Path:
    """The state folder; it need not exist."""
    own = os.environ.get(HOME_VARIABLE)
    if own:
        return Path(own).expanduser()
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "triton_tutorial"


def timestamp() -> str:
    """For file names that must not collide: to the microsecond."""
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def not_writable(error: OSError) -> TutorialError:
    """The sentence for a state folder that cannot be written."""
    return TutorialError(
        f"{home()} cannot be written ({error.strerror or error}); set {HOME_VARIABLE} to a folder of yours"
    )


@dataclass
class Progress:
    """The file's content. `warning`: what was wrong with it."""

    ran: dict[str, str] = field(default_factory=dict)  # lesson number -> when it last ran to its end
    exercises: dict[str, dict[str, Any]] = field(default_factory=dict)  # "1/ex1" -> passed, attempts, hints, origin
    warning: str | None = None
    frozen: bool = False  # the file could not be read and is still there: it must not be written over

    def exercise(self, lesson: int, name: str) -> dict[str, Any]:
        """One exercise's entry, made if absent."""
        return self.exercises.setdefault(f"{lesson}/{name}", {})

    def passed(self, lesson: int, name: str) -> bool:
        return bool(self.exercises.get(f"{lesson}/{name}", {}).get("passed"))

    def passed_count(self, lesson: Lesson) -> int:
        return sum(self.passed(lesson.number, name) for name in lesson.exercises)

    def done(self, lesson: Lesson) -> bool:
        """All exercises passed; a lesson without any is done when it ran."""
        if lesson.exercises:
            return self.passed_count(lesson) == len(lesson.exercises)
        return str(lesson.number) in self.ran

    def status(self, lesson: Lesson, known: Sequence[Lesson]) -> str:
        """done, next, started, or open; `later` while a prerequisite is not done (a recommendation, not a lock)."""
        if self.done(lesson):
            return "done"
        upcoming = self.next(known)
        if upcoming is not None and upcoming.number == lesson.number:
            return "next"
        if str(lesson.number) in self.ran or self.passed_count(lesson):
            return "started"
        missing = [other for other in known if other.number in lesson.prerequisites and not self.done(other)]
        return "later" if missing else "open"

    def next(self, known: Sequence[Lesson]) -> Lesson | None:
        """The first lesson that is not done."""
        return next((lesson for lesson in known if not self.done(lesson)), None)

    def record_run(self, lesson: Lesson) -> None:
        self.ran[str(lesson.number)] = _now()

    def record_check(self, lesson: int, name: str, passed: bool) -> None:
        entry = self.exercise(lesson, name)
        entry["attempts"] = entry.get("attempts", 0) + 1
        if passed and not entry.get("passed"):
            entry["passed"] = _now()

    def as_json(self) -> dict[str, Any]:
        return {"version": VERSION, "ran": self.ran, "exercises": self.exercises}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def load() -> Progress:
    """The progress so far. A broken file is moved aside and named in `warning`."""
    path = home() / "progress.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Progress()
    except UnicodeDecodeError:
        return _set_aside(path, "it is not text")
    except OSError as error:
        return Progress(
            warning=f"{path} cannot be read ({error.strerror}); make it readable or move it away", frozen=True
        )
    try:
        data = json.loads(text)
        if isinstance(data, dict) and type(data.get("version")) is int and data["version"] > VERSION:
            newer = f"{path} is of a newer triton-tutorial; upgrade with: pip install --upgrade torch-triton-ops"
            return Progress(warning=newer, frozen=True)
        return _parse(data)
    except ValueError as error:
        return _set_aside(path, str(error))


def _parse(data: Any) -> Progress:
    if not isinstance(data, dict) or type(data.get("version")) is not int:
        raise ValueError("it has no version")
    ran, exercises = data.get("ran"), data.get("exercises")
    if not isinstance(ran, dict) or not isinstance(exercises, dict):
        raise ValueError("'ran' and 'exercises' must be mappings")
    if not all(isinstance(entry, dict) for entry in exercises.values()):
        raise ValueError("every exercise must be a mapping")
    return Progress(ran, exercises)


def _set_aside(path: Path, reason: str) -> Progress:
    aside = path.with_name(f"progress.broken-{timestamp()}.json")
    rebuild = "triton-tutorial check --all rebuilds your progress from your files"
    try:
        path.rename(aside)
    except OSError:
        return Progress(warning=f"{path} is broken ({reason}) and cannot be moved aside; move it away", frozen=True)
    return Progress(warning=f"the progress file was broken ({reason}) and is kept as {aside}; {rebuild}")


@contextlib.contextmanager
def update() -> Iterator[Progress]:
    """Read, let the caller change, write. Two commands at a time wait for each other. Raises TutorialError if not writable."""
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "progress.lock").open("w") as lock:
            _lock(lock)
            progress = load()
            if progress.frozen:
                raise TutorialError(progress.warning)
            yield progress
            temporary = folder / "progress.json.tmp"
            temporary.write_text(json.dumps(progress.as_json(), indent=1) + "\n", encoding="utf-8")
            temporary.replace(folder / "progress.json")
    except OSError as error:
        raise not_writable(error) from error


def _lock(file: Any) -> None:
    with contextlib.suppress(ImportError, OSError):  # no flock: another system, or a network filesystem without it
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
