"""The command `triton-tutorial`. `list`, `info`, `hint` and `--help` import no torch, so they answer at once.

Exit status: 0 done and right; 1 something is wrong that the message names (a failing check, no GPU); 2 wrong command line.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from triton_tutorial import catalog, exercises, progress
from triton_tutorial.catalog import Lesson, TutorialError
from triton_tutorial.exercises import HINT_LEVELS, Exercise, Outcome

NAME = "triton-tutorial"
STYLE = {"done": "green", "next": "bold cyan", "started": "yellow", "later": "dim", "open": ""}


class Device(str, Enum):
    """Where kernels run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Size(str, Enum):
    """How large a lesson's inputs are."""

    small = "small"
    full = "full"


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[LESSON] [EXERCISE]", help="1, beginner 1 or gpu-fundamentals; then ex1. Left out: the next to do."
    ),
]
LessonWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[LESSON]", help="1, beginner 1 or gpu-fundamentals. Left out: the next to do."),
]
DeviceOption = Annotated[
    Device, typer.Option(help="auto: the GPU if there is one, else Triton's interpreter on the CPU.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TargetOption = Annotated[str, typer.Option("--target", help="GPUs to compile for, comma-separated: sm80, sm90, sm100.")]

app = typer.Typer(
    name=NAME,
    help="Learn Triton kernels lesson by lesson, with checked exercises; no GPU is needed to learn.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class _Settings:
    debug = False
    color = True


def console(stderr: bool = False) -> Console:
    """Where everything is printed. Without a terminal: no colour, and lines as long as they are."""
    made = Console(stderr=stderr, no_color=not _Settings.color or None, highlight=False, soft_wrap=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 120
    return made


def say(text: str = "", style: str | None = None) -> None:
    """One line, its words as they are."""
    console().print(escape(text), style=style, soft_wrap=True)


def warn(text: str) -> None:
    console(stderr=True).print(escape(f"note: {text}"), style="yellow", soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Print without colour (or set NO_COLOR).")] = False,
) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        with contextlib.suppress(PackageNotFoundError):
            print(installed("torch-triton-ops"))
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Every error is one sentence on stderr, and the exit status is returned."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # these three read well anywhere on the line: `triton-tutorial check 1 --debug`
    _Settings.debug = "--debug" in arguments
    _Settings.color = "--no-color" not in arguments
    arguments = [a for a in arguments if a not in ("--debug", "--no-color")] or ["--help"]
    usage_error: Any = typer.BadParameter.__bases__[0]  # click's own class, wherever typer keeps it
    try:
        status = app(args=arguments, prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except TutorialError as error:
        return _fail(str(error), error, 1)
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 0
    except usage_error as error:
        return _fail(_usage(error, arguments), error, 2)
    except Exception as error:
        said = " ".join(str(error).split())
        return _fail(f"{type(error).__name__}: {said}; run it again with --debug for the traceback", error, 1)


def _fail(message: str, error: BaseException, status: int) -> int:
    if _Settings.debug:
        import traceback

        traceback.print_exception(error)
    console(stderr=True).print(f"[red]{NAME}:[/red] {escape(message)}", soft_wrap=True)
    return status


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """Click's complaint as one sentence with the fix."""
    said = " ".join(error.format_message().split()).rstrip(".")
    verbs = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    unknown = re.match(r"No such command '(.*?)'", said)
    if unknown:
        near = difflib.get_close_matches(unknown[1], verbs, n=1)
        advice = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(verbs)}"
        return f"there is no command '{unknown[1]}'; {advice}"
    verb = next((a for a in arguments if a in verbs), "")
    command = f"{NAME} {verb} --help".replace("  ", " ")
    return f"{said[:1].lower()}{said[1:]}; see: {command}"


# --------------------------------------------------------------------------------------------------------------------
# Which lesson, which exercise
# --------------------------------------------------------------------------------------------------------------------


def state() -> progress.Progress:
    """The progress; a broken file is told once."""
    found = progress.load()
    if found.warning:
        warn(found.warning)
    return found


def remember(change: Any) -> None:
    """Write progress; a state folder that cannot be written is a note, since what was asked for is done."""
    try:
        with progress.update() as found:
            change(found)
    except TutorialError as error:
        warn(f"progress is not kept: {error}")


def chosen(words: Sequence[str] | None, found: progress.Progress) -> Lesson:
    """The lesson named, or the next one to do."""
    if words:
        return catalog.find(words)
    known = catalog.lessons()
    lesson = found.next(known) or (known[-1] if known else None)
    if lesson is None:
        raise TutorialError("there are no lessons; reinstall torch-triton-ops")
    return lesson


def split(words: Sequence[str] | None) -> tuple[list[str], str | None]:
    """["beginner", "1", "ex2"] -> the lesson's words and the exercise's name."""
    rest = list(words or [])
    if rest and re.fullmatch(r"ex[-_ ]?\w*", rest[-1].lower()):
        return rest[:-1], rest[-1].lower()
    return rest, None


def one_exercise(words: Sequence[str] | None) -> Exercise:
    """The exercise named; else the first of the lesson that has not passed, or its first."""
    lesson_words, name = split(words)
    found = state()
    lesson = chosen(lesson_words, found)
    if name is None:
        if not lesson.exercises:
            raise TutorialError(f"lesson {lesson.number} has no exercises; run it with: {NAME} run {lesson.number}")
        name = next((e for e in lesson.exercises if not found.passed(lesson.number, e)), lesson.exercises[0])
    return exercises.find(lesson, name)


# --------------------------------------------------------------------------------------------------------------------
# The lessons
# --------------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(json_: JsonFlag = False) -> int:
    """List the lessons: level, title, minutes, prerequisites, and what you have done."""
    from rich.table import Table

    known, found = catalog.lessons(), state()
    rows: list[dict[str, Any]] = []
    for lesson in known:
        passed = found.passed_count(lesson)
        rows.append(
            {
                "number": lesson.number,
                "slug": lesson.slug,
                "level": lesson.level,
                "title": lesson.title,
                "minutes": lesson.minutes,
                "prerequisites": list(lesson.prerequisites),
                "ops": list(lesson.ops),
                "concepts": list(lesson.concepts),
                "exercises": len(lesson.exercises),
                "passed": passed,
                "status": found.status(lesson, known),
                "file": str(lesson.file),
            }
        )
    if json_:
        print_json(rows)
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("", "right"), ("level", "left"), ("lesson", "left"), ("minutes", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in ("after", "exercises", "status"):
        table.add_column(heading)
    for row in rows:
        style = STYLE[row["status"]]
        after = ", ".join(map(str, row["prerequisites"])) or "-"
        count = f"{row['passed']} of {row['exercises']}" if row["exercises"] else "-"
        cells = [str(row["number"]), row["level"], row["title"], str(row["minutes"]), after, count, row["status"]]
        table.add_row(*map(escape, cells), style=style)
    console().print(table)
    upcoming = found.next(known)
    if upcoming is not None:
        say(f"\nnext: {NAME} run {upcoming.number}", "dim")
    elif known:
        say("\nall lessons done", "green")
    return 0


@app.command()
def run(
    lesson: LessonWords = None,
    device: DeviceOption = Device.auto,
    size: Annotated[
        Size | None, typer.Option(help="Input sizes; default: full on a GPU, small in the interpreter.")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Measure (needs a GPU).")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the figures there.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured.")] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Correctness only.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the random inputs.")] = None,
) -> int:
    """Run a lesson: run beginner 1, run 1, run gpu-fundamentals."""
    chosen_lesson = chosen(lesson, state())
    options: list[str] = []
    if device is not Device.auto:
        options += ["--device", device.value]
    if size is not None:
        options += ["--size", size.value]
    options += ["--bench"] if bench else []
    options += ["--plot", str(plot)] if plot is not None else []
    options += ["--json", str(json_)] if json_ is not None else []
    options += ["--check-only"] if check_only else []
    options += ["--seed", str(seed)] if seed is not None else []
    status = run_lesson(chosen_lesson, options)
    if status == 0:
        remember(lambda found: found.record_run(chosen_lesson))
        if chosen_lesson.exercises and not check_only:
            say(f"\nexercises: {NAME} check {chosen_lesson.number}", "dim")
    return status


def run_lesson(lesson: Lesson, options: Sequence[str]) -> int:
    """Run a lesson's script in a process of its own; its exit status."""
    color = {} if _Settings.color else {"NO_COLOR": "1"}
    command = [sys.executable, str(lesson.file), *options]
    process = subprocess.Popen(command, env=exercises.child_environment(**color))
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the terminal sent it to the lesson too: wait for its end
    if status < 0:
        raise TutorialError(f"lesson {lesson.number} died of signal {-status}; try: {NAME} doctor")
    return status


@app.command("next")
def next_() -> int:
    """Say what to do next, and the command for it."""
    known, found = catalog.lessons(), state()
    lesson = found.next(known)
    if lesson is None:
        say("Every lesson is done. To write an op of your own: CONTRIBUTING.md of torch_triton_ops", "green")
        return 0
    if str(lesson.number) not in found.ran:
        say(f"lesson {lesson.number}, {lesson.title} ({lesson.level}, {lesson.minutes} minutes)")
        say(f"{NAME} run {lesson.number}", "bold cyan")
        return 0
    name = next(name for name in lesson.exercises if not found.passed(lesson.number, name))
    exercise = exercises.find(lesson, name)
    exercise.start()
    say(f"{exercise.title} of {lesson.title}: edit {exercise.copy}, then")
    say(f"{NAME} check {lesson.number} {name}", "bold cyan")
    return 0


@app.command("progress")
def progress_(json_: JsonFlag = False) -> int:
    """Show what you have done, and where your files are."""
    known, found = catalog.lessons(), state()
    if json_:
        print_json({"home": str(progress.home()), **found.as_json()})
        return 0
    total = sum(len(lesson.exercises) for lesson in known)
    passed = sum(found.passed_count(lesson) for lesson in known)
    done = sum(found.done(lesson) for lesson in known)
    say(f"{done} of {len(known)} lessons done, {passed} of {total} exercises passed")
    for lesson in known:
        marks = []
        for name in lesson.exercises:
            entry = found.exercises.get(f"{lesson.number}/{name}", {})
            mark = "passed" if entry.get("passed") else (f"{entry['attempts']} tries" if entry.get("attempts") else "-")
            marks.append(f"{name} {mark}")
        ran = "ran" if str(lesson.number) in found.ran else "not run"
        status = found.status(lesson, known)
        say(f"{lesson.number:3}  {lesson.title:<28} {status:<8} {ran:<8} {', '.join(marks)}".rstrip(), STYLE[status])
    say(f"\nyour files: {progress.home()}", "dim")
    return 0


# --------------------------------------------------------------------------------------------------------------------
# The exercises
# --------------------------------------------------------------------------------------------------------------------


@app.command()
def check(
    words: Words = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Go on after a failure; without a lesson, check all lessons.")
    ] = False,
    device: DeviceOption = Device.auto,
    json_: JsonFlag = False,
) -> int:
    """Run the hidden checks of your exercises; says the first wrong element and the line."""
    lesson_words, name = split(words)
    found = state()
    if all_ and not lesson_words:
        todo = [exercise for lesson in catalog.lessons() for exercise in exercises.of_lesson(lesson)]
    else:
        lesson = chosen(lesson_words, found)
        todo = [exercises.find(lesson, name)] if name else exercises.of_lesson(lesson)
        if not todo:
            raise TutorialError(f"lesson {lesson.number} has no exercises; run it with: {NAME} run {lesson.number}")
    results = check_some(todo, device.value, go_on=all_ or json_, quiet=json_)
    right = all(result["status"] == "passed" for result in results)
    if json_:
        print_json(results)
    elif right and len(results) == len(todo):
        _congratulate(todo)
    return 0 if right else 1


def check_some(todo: Sequence[Exercise], device: str, go_on: bool, quiet: bool) -> list[dict[str, Any]]:
    """Check, report and remember. Stops after the first that does not pass unless `go_on`."""
    results: list[dict[str, Any]] = []

    def add(exercise: Exercise, status: str, outcome: Outcome | None = None) -> None:
        results.append(
            {
                "lesson": exercise.lesson.number,
                "exercise": exercise.name,
                "status": status,
                "file": str(exercise.copy),
                "line": outcome.line if outcome else None,
                "message": outcome.message if outcome else "",
                "device": outcome.device if outcome else "",
            }
        )
        if not quiet:
            report(exercise, status, outcome)

    edited = []
    for exercise in todo:
        if exercise.start():
            edited.append(exercise)
        elif not go_on:
            break
    outcomes = exercises.run_checks([exercises.Job.of(e) for e in edited], device, quiet=quiet)
    with contextlib.closing(outcomes):
        for exercise in todo:
            if exercise not in edited:
                add(exercise, "not started")
            else:
                outcome = next(outcomes)
                add(exercise, "passed" if outcome.passed else "failed", outcome)
                passed = outcome.passed
                number, name = exercise.lesson.number, exercise.name
                remember(lambda found, n=number, e=name, p=passed: found.record_check(n, e, p))
            if results[-1]["status"] != "passed" and not go_on:
                break
    return results


def report(exercise: Exercise, status: str, outcome: Outcome | None) -> None:
    """One exercise's result for people."""
    number = exercise.lesson.number
    if status == "not started":
        say(f"{exercise.title}: not started", "yellow")
        say(f"  edit {exercise.copy}")
        say(f"  then {NAME} check {number} {exercise.name}    (a hint: {NAME} hint {number} {exercise.name})", "dim")
        return
    assert outcome is not None
    where = "on the GPU" if outcome.device == "cuda" else "in the interpreter"
    if outcome.passed:
        say(f"{exercise.title}: passed {where} ({outcome.seconds:.1f} s)", "green")
        return
    say(f"{exercise.title}: FAILED {where}", "bold red")
    say(f"  {outcome.message}")
    if outcome.line:
        say(f"  {exercise.copy}:{outcome.line}", "cyan")
        say(f"      {outcome.text}", "bold")
    else:
        say(f"  {exercise.copy}", "cyan")
    say(f"  a hint: {NAME} hint {number} {exercise.name}", "dim")
    if _Settings.debug and outcome.trace:
        say(outcome.trace.rstrip(), "dim")


def _congratulate(todo: Sequence[Exercise]) -> None:
    known, found = catalog.lessons(), progress.load()
    upcoming = found.next(known)
    if upcoming is None:
        say("Every exercise of every lesson passes. Well done.", "bold green")
    elif upcoming.number == todo[-1].lesson.number:
        left = [name for name in upcoming.exercises if not found.passed(upcoming.number, name)]
        say(f"next: {NAME} check {upcoming.number} {left[0]}", "dim")
    else:
        say(f"next: {NAME} run {upcoming.number}  ({upcoming.title})", "dim")


@app.command()
def hint(
    words: Words = None,
    level: Annotated[
        int | None, typer.Option(min=1, max=HINT_LEVELS, help="Default: the next you have not seen.")
    ] = None,
) -> int:
    """Give the next of three hints, from a nudge to nearly the answer."""
    exercise = one_exercise(words)
    hints = exercise.hints()
    taken = progress.load().exercises.get(f"{exercise.lesson.number}/{exercise.name}", {}).get("hints", 0)
    shown = level or min(taken + 1, HINT_LEVELS)
    say(f"{exercise.title}, hint {shown} of {HINT_LEVELS}", "bold")
    say(hints[shown - 1])
    if shown < HINT_LEVELS:
        say(f"\nmore: {NAME} hint {exercise.lesson.number} {exercise.name}", "dim")
    else:
        say(f"\nthe answer: {NAME} solution {exercise.lesson.number} {exercise.name}", "dim")
    if shown > taken:
        number, name = exercise.lesson.number, exercise.name
        remember(lambda found: found.exercise(number, name).update(hints=shown))
    return 0


@app.command()
def solution(
    words: Words = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what differs from your file.")] = False,
) -> int:
    """Print an exercise's solution."""
    from rich.syntax import Syntax

    exercise = one_exercise(words)
    text = exercise.solution.read_text(encoding="utf-8")
    if diff:
        exercise.start()
        yours = exercise.copy.read_text(encoding="utf-8").splitlines()
        lines = difflib.unified_diff(yours, text.splitlines(), str(exercise.copy), "the solution", lineterm="")
        text = "\n".join(lines) or "your file is the solution"
    out = console()
    if out.is_terminal and _Settings.color:
        out.print(Syntax(text, "diff" if diff else "python", background_color="default"), soft_wrap=True)
    else:
        print(text.rstrip("\n"))
    return 0


@app.command()
def reset(
    words: Words = None,
    all_: Annotated[bool, typer.Option("--all", help="All exercises of the lesson; without a lesson, of all.")] = False,
) -> int:
    """Put an exercise's original file back; what you wrote is kept in a backup."""
    lesson_words, name = split(words)
    if all_ and not lesson_words:
        todo = [exercise for lesson in catalog.lessons() for exercise in exercises.of_lesson(lesson)]
    elif all_:
        todo = exercises.of_lesson(catalog.find(lesson_words))
    elif not lesson_words or name is None:
        raise TutorialError(f"say which exercise: {NAME} reset 1 ex1, or {NAME} reset 1 --all")
    else:
        todo = [one_exercise(words)]
    for exercise in todo:
        kept = exercise.reset()
        number, name = exercise.lesson.number, exercise.name
        remember(lambda found, n=number, e=name: [found.exercise(n, e).pop(key, None) for key in ("passed", "hints")])
        say(f"{exercise.title}: {exercise.copy} is the original again")
        if kept is not None:
            say(f"  what you wrote is kept: {kept}", "green")
    return 0


@app.command()
def watch(
    words: Words = None,
    device: DeviceOption = Device.auto,
) -> int:
    """Check again whenever you save; ends when the lesson's exercises pass, or with Ctrl-C."""
    lesson_words, name = split(words)
    lesson = chosen(lesson_words, state())
    todo = [exercises.find(lesson, name)] if name else exercises.of_lesson(lesson)
    if not todo:
        raise TutorialError(f"lesson {lesson.number} has no exercises; run it with: {NAME} run {lesson.number}")
    while True:
        seen = {exercise: _stamp(exercise.copy) for exercise in todo}
        results = check_some(todo, device.value, go_on=False, quiet=False)
        if all(result["status"] == "passed" for result in results):
            _congratulate(todo)
            return 0
        seen = {exercise: seen[exercise] or _stamp(exercise.copy) for exercise in todo}
        say(f"\nwatching {todo[0].copy.parent}; save to check again, Ctrl-C to stop", "dim")
        # asking a handful of files for their time costs nothing, works on every filesystem and needs no package
        while all(_stamp(exercise.copy) == seen[exercise] for exercise in todo):
            time.sleep(0.25)
        say()


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is saved; None while an editor replaces it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
