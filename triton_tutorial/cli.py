"""The command `triton-tutorial`. `list`, `info`, `hint` and `--help` import no torch, so they answer at once.

Exit status: 0 done and right; 1 something is wrong that the message names (a failing check, no GPU); 2 wrong command line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
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


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(version("torch-triton-ops"))
        except PackageNotFoundError:
            print("a checkout that is not installed")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Print without colour (or set NO_COLOR).")] = False,
) -> None:
    """Options that stand before the verb; `main` has read the last two already."""


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
    if status in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
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
    with Checking(device.value, quiet=json_) as checking:
        results = check_some(todo, checking, go_on=all_ or json_)
    right = all(result["status"] == "passed" for result in results)
    if json_:
        print_json(results)
    elif right and len(results) == len(todo):
        _congratulate(todo)
    return 0 if right else 1


class Checking:
    """The process that checks, started when there is something to check and kept for the next time."""

    def __init__(self, device: str, quiet: bool) -> None:
        self.device, self.quiet = device, quiet
        self.checker: exercises.Checker | None = None

    def check(self, exercise: Exercise) -> Outcome:
        if self.checker is None:
            self.checker = exercises.Checker(self.device, quiet=self.quiet)
        return self.checker.check(exercises.Job.of(exercise))

    def __enter__(self) -> Checking:
        return self

    def __exit__(self, *_: object) -> None:
        if self.checker is not None:
            self.checker.close()


def check_some(todo: Sequence[Exercise], checking: Checking, go_on: bool) -> list[dict[str, Any]]:
    """Check, report and remember. Stops after the first that does not pass unless `go_on`."""
    results: list[dict[str, Any]] = []
    for exercise in todo:
        outcome = checking.check(exercise) if exercise.start() else None
        status = "not started" if outcome is None else ("passed" if outcome.passed else "failed")
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
        if not checking.quiet:
            report(exercise, status, outcome)
        if outcome is not None:
            number, name, passed = exercise.lesson.number, exercise.name, outcome.passed
            remember(lambda found, n=number, e=name, p=passed: found.record_check(n, e, p))
        if status != "passed" and not go_on:
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
    with Checking(device.value, quiet=False) as checking:
        while True:
            for exercise in todo:
                exercise.start()
            seen = {exercise: _stamp(exercise.copy) for exercise in todo}
            results = check_some(todo, checking, go_on=False)
            if all(result["status"] == "passed" for result in results):
                _congratulate(todo)
                return 0
            say(f"\nwatching {todo[0].copy.parent}; save to check again, Ctrl-C to stop", "dim")
            # asking a handful of files for their time costs nothing, works on every filesystem and needs no package
            while all(_stamp(exercise.copy) in (seen[exercise], None) for exercise in todo):
                time.sleep(0.25)
            say()


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is saved; None while an editor replaces it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


# --------------------------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------------------------


@app.command()
def info(json_: JsonFlag = False) -> int:
    """Show GPU, driver, torch, triton and mode; what is missing, and the command that mends it."""
    from triton_tutorial import machine

    items = machine.info()
    if json_:
        print_json(machine.as_json(items))
        return 0
    _show_items(items)
    return 0


@app.command()
def doctor(json_: JsonFlag = False) -> int:
    """Like info, and then try it: import, compile, interpret, trace, launch. Exit status 1 if something is wrong."""
    from triton_tutorial import machine

    items = machine.info()
    if not json_:
        _show_items(items)
        say("\ntrying it ...", "dim")
    tried = []
    for item in machine.deep_checks(exercises.child_environment()):
        tried.append(item)
        if not json_:
            _show_items([item])
    if json_:
        print_json(machine.as_json([*items, *tried]))
    wrong = [item for item in (*items, *tried) if item.ok is False]
    if not json_:
        say(f"{len(wrong)} to mend" if wrong else "all is well", "bold red" if wrong else "green")
    return 1 if wrong else 0


def _show_items(items: Sequence[Any]) -> None:
    marks = {True: ("ok", "green"), False: ("!!", "bold red"), None: ("--", "dim")}
    for item in items:
        mark, style = marks[item.ok]
        say(f"{mark}  {item.name:<20} {item.value}", style if item.ok is False else None)
        if item.fix:
            say(f"    {'':<20} mend it: {item.fix}", "bold")


@app.command()
def install(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it.")] = False,
) -> int:
    """Print what would be installed for the lessons; with --yes, install it."""
    from triton_tutorial import machine

    missing = machine.missing_packages()
    if not missing:
        say("nothing to install: everything the lessons need is there", "green")
        return 0
    command = [sys.executable, "-m", "pip", "install", *missing]
    say(" ".join(f"'{part}'" if ">" in part else part for part in command), "bold")
    if not yes:
        say(f"to do it: {NAME} install --yes", "dim")
        return 0
    status = subprocess.run(command).returncode
    if status:
        raise TutorialError(f"pip ended with status {status}; its message above says why")
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Ops
# --------------------------------------------------------------------------------------------------------------------

OpName = Annotated[str, typer.Argument(metavar="OP", help="tt::softmax or softmax.")]


@app.command()
def explain(
    op: OpName,
    target: TargetOption = "sm80,sm90,sm100",
    case: Annotated[str | None, typer.Option(help="A benchmark case of the op; default: its first.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="The gradient's kernels too.")] = False,
    stage: Annotated[
        str | None, typer.Option(help="Print this stage whole instead: ttir, ttgir, ptx or sass, of the first target.")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines of each excerpt.")] = 12,
    json_: JsonFlag = False,
) -> int:
    """Look into an op without a GPU: schema, graph, TTIR, PTX, SASS, registers, spills, shared memory, occupancy."""
    os.environ.pop("TRITON_INTERPRET", None)  # it replaces the compiler
    _need_torch()
    from triton_tutorial import explain as explaining

    if stage is not None and stage not in explaining.STAGES:
        raise TutorialError(f"there is no stage '{stage}'; there are: {', '.join(explaining.STAGES)}")
    targets = explaining.parse_targets(target)
    found = explaining.explain(op, targets[:1] if stage else targets, case, backward)
    if json_:
        print_json(found.as_json())
    elif stage:
        for kernel in found.kernels:
            if stage not in kernel.code:
                warn(f"{kernel.kernel} has no {stage}: it is written in Gluon, which begins at ttgir")
                continue
            print(f"// {kernel.kernel}, sm_{kernel.target}, case {found.case} {found.dtype}")
            print(kernel.code[stage])
    else:
        _show_explanation(found, targets, lines)
    return 0


def _need_torch() -> None:
    from triton_tutorial import machine

    for name in ("torch", "triton"):
        if machine.installed(name) is None:
            raise TutorialError(f"{name} is not installed; install it with: {NAME} install --yes")


def _show_explanation(found: Any, targets: Sequence[int], lines: int) -> None:
    from rich.table import Table

    from triton_tutorial import explain as explaining

    out = console()
    seen = {"triton": "inlined kernels", "opaque": "one opaque node"}[found.visibility]
    say(f"tt::{found.schema}" if "::" not in found.schema else found.schema, "bold")
    say(found.summary)
    facts = {
        "dtypes": ", ".join(found.dtypes),
        "gradients for": ", ".join(found.differentiable) or "none: forward only",
        "in compiled graphs": seen,
        "autocast": found.autocast or "",
        "sharding": found.sharding or "",
        "lesson": str(found.lesson or ""),
        "source": found.source or "",
        "file": found.file,
    }
    for name, value in facts.items():
        if value:
            say(f"  {name:<20}{value}")
    for schema in found.internal.values():
        say(f"  {'internal op':<20}{schema}", "dim")
    what = "forward and backward" if found.backward else "forward"
    work = f"{found.bytes / 1e6:.1f} MB to move, {found.flops / 1e9:.3g} GFLOP"
    say(f"\ncase {found.case}, {found.dtype}, {what}: {work}", "bold")
    if found.bytes:
        say(f"  {found.flops / found.bytes:.3g} flops for each byte")
    say(f"\nthe graph that torch.compile gives to Inductor, sm_{targets[0]}", "bold")
    for line in found.graph.splitlines():
        say(f"  {line}")
    names = list(dict.fromkeys(kernel.kernel for kernel in found.kernels))
    for name in names:
        say(f"\n{name}", "bold")
        own = [kernel for kernel in found.kernels if kernel.kernel == name]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("target", "grid", "warps", "registers", "spills", "shared", "occupancy", "bound by"):
            table.add_column(heading, justify="left" if heading in ("target", "bound by", "grid") else "right")
        for kernel in own:
            grid = " x ".join(map(str, kernel.grid))
            row = [f"sm_{kernel.target} {explaining.GPUS[kernel.target]}", grid, kernel.num_warps, kernel.registers]
            row += [f"{kernel.spilled} B", f"{kernel.shared} B", f"{kernel.occupancy:.0%}", kernel.limiter]
            table.add_row(*map(str, row), style="red" if kernel.spilled or kernel.advisories else "")
        out.print(table)
        for kernel in own:
            constants = ", ".join(f"{key}={value}" for key, value in kernel.constexprs.items())
            counts = ", ".join(f"{key} {number}" for key, number in kernel.instructions.items())
            say(f"  sm_{kernel.target}: {counts or 'none of the telling instructions'}", "dim")
            say(f"  {'':<{len(str(kernel.target)) + 3}}  {constants}, num_stages={kernel.num_stages}", "dim")
            for advisory in kernel.advisories:
                say(f"  sm_{kernel.target}: ptxas {advisory}: it serialises the wgmma instructions", "red")
        first = own[0]
        for stage in ("ttir" if "ttir" in first.code else "ttgir", "ptx", "sass"):
            say(
                f"  {stage.upper()}, sm_{first.target}, {len(first.code[stage].splitlines())} lines; the telling ones:",
                "bold",
            )
            for line in explaining.excerpt(stage, first.code[stage], lines):
                say(f"    {line if len(line) <= 160 else line[:157] + '...'}")
    say("\noccupancy is a bound from the SM's limits, not a measurement; registers are a thread's", "dim")
    say(f"a stage whole: {NAME} explain {found.op} --stage ptx --target sm{targets[0]}", "dim")


@app.command()
def viz(
    op: OpName,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PNG", help="Default: <op>_addresses.png here.")
    ] = None,
) -> int:
    """Draw which addresses each program of an op's kernels touches, from Triton's interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter runs in a child of its own
    _need_torch()
    from triton_tutorial import explain as explaining
    from triton_tutorial import pictures

    spec = explaining.find_op(op)
    path = out if out is not None else Path(f"{spec.name}_addresses.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        words = pictures.draw_op(spec.name, path)
    except ImportError as error:
        raise TutorialError(f"pictures need {error.name}; install it with: {NAME} install --yes") from None
    except OSError as error:
        raise TutorialError(f"{path} cannot be written: {error.strerror or error}") from None
    say(words.rstrip())
    say(f"\nwritten: {path}", "green")
    return 0


@app.command()
def rlhf(
    session: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it is kept, and goes on; default: rlhf in your files.")
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="TASTE", help="A simulated user chooses, who likes answers shorter, longer, plain or finished."
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many rounds; default: with q, or 20 if simulated.")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: the GPU if there is one, else the CPU.")] = Device.auto,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts of yours, one a line.")] = None,
    length: Annotated[int | None, typer.Option(min=1, max=48, help="Tokens of an answer, at most (24).")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.05, help="Of the sampling (0.8).")] = None,
    beta: Annotated[float | None, typer.Option(min=1e-3, help="How strongly to hold to the reference (0.1).")] = None,
    sft: Annotated[float | None, typer.Option(min=0, help="Weight of the chosen answers' likelihood (0.3).")] = None,
    rate: Annotated[float | None, typer.Option(min=1e-8, help="Learning rate (0.001).")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Comparisons before an update (1; simulated 8).")] = None,
    replay: Annotated[int | None, typer.Option(min=0, help="Earlier choices learned again in each (7; 16).")] = None,
    base_steps: Annotated[int | None, typer.Option(min=10, help="Training steps of the untuned model (200).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything that is random (0).")] = None,
    json_: JsonFlag = False,
) -> int:
    """Tune a small language model to what you like: two answers, you choose, it learns at once. Goes on where it was."""
    os.environ.pop("TRITON_INTERPRET", None)  # on a CPU the references are meant, not interpreted kernels
    _need_torch()
    import torch

    from triton_tutorial import rlhf as tuning

    if device is Device.cuda and not torch.cuda.is_available():
        raise TutorialError("this PyTorch sees no CUDA GPU; use --device cpu")
    where = torch.device("cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu")
    folder = (session or progress.home() / "rlhf").absolute()
    given = {
        "simulate": simulate,
        "prompts": None if prompts is None else str(prompts.absolute()),
        "length": length,
        "temperature": temperature,
        "beta": beta,
        "sft": sft,
        "rate": rate,
        "pairs": pairs,
        "replay": replay,
        "base_steps": base_steps,
        "seed": seed,
    }
    try:
        found = tuning.run(folder, given, rounds, where, console(stderr=json_))
    except BlockingIOError:
        raise TutorialError(f"{folder} is open in another process; end that one, or give another --session") from None
    except OSError as error:
        raise TutorialError(f"{folder} cannot be written ({error.strerror or error}); give another --session") from None
    except ValueError as error:  # a journal or checkpoint that does not fit; its message names file and line
        raise TutorialError(str(error)) from error
    if json_:
        print_json(found)
    else:
        if "after" in found:
            say(
                f"\non prompts it was not tuned on, {found['before']:.0%} before and {found['after']:.0%} now",
                "bold green",
            )
        say(f"kept in {folder}: choices.jsonl, preferences.jsonl (prompt, chosen, rejected), tuner.pt", "dim")
        say(f"to go on: {NAME} rlhf" + ("" if session is None else f" --session {session}"), "dim")
    return 130 if found["ended"] == "interrupted" else 0


@app.command()
def roofline(
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A record of bench.run; default: this GPU's.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this GPU first (some minutes).")] = False,
    op: Annotated[str | None, typer.Option(help="With --measure: only these ops, comma-separated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="PNG", help="Default: roofline.png here.")] = None,
    json_: JsonFlag = False,
) -> int:
    """Draw a GPU's measured ceilings and every op as a point."""
    from triton_tutorial import roofline as roof

    if op is not None and not measure:
        raise TutorialError("--op goes with --measure; leave it out to draw a record whole")
    gpu = _gpu_name()
    if measure:
        if record is not None:
            raise TutorialError("--measure writes its own record; leave out --record")
        if gpu is None:
            raise TutorialError(f"--measure needs a CUDA GPU; without it a recorded roofline is drawn: {NAME} roofline")
        source = roof.measure(gpu, op)
    else:
        source = record if record is not None else roof.find_record(gpu)
    data = roof.load(source)
    points = roof.points(data)
    if not points:
        raise TutorialError(f"{source} has no valid figure of ours to draw; measure with: {NAME} roofline --measure")
    path = out if out is not None else Path("roofline.png")
    roof.draw(data, path)
    if json_:
        print_json({**roof.as_json(data, source), "written": str(path)})
        return 0
    header = data["header"]
    here = "measured here" if gpu == header["gpu"] else "recorded, not this machine"
    say(f"{header['gpu']} ({here}, {header['date'][:10]})", "bold")
    say(f"ceilings: copy {header['copy_tbps']:.2f} TB/s, bf16 matmul {header['matmul_tflops']:.0f} TFLOP/s")
    if any(point.intensity == 0 for point in points):
        say("an op that only moves data has no flops: it is listed, and not on the chart", "dim")
    for point in points:
        rate = f"{point.tbps:.2f} TB/s" if point.bound == "memory" else f"{point.tflops:.0f} TFLOP/s"
        where = f"{point.op} {point.case} {point.dtype} {point.pass_name}"
        say(
            f"  {where:<52} {point.intensity:>9.3g} flop/B  {rate:>12}  {point.fraction:>5.0%} of the {point.bound} ceiling"
        )
    say(f"written: {path}", "green")
    return 0


def _gpu_name() -> str | None:
    """The first GPU by its driver's name, without torch."""
    from triton_tutorial import machine

    try:
        found = machine.driver()
    except machine.DriverError:
        return None
    return found.gpus[0].name if found is not None and found.gpus else None


@app.command()
def benchmark(
    lesson: Annotated[str | None, typer.Option(help="The lesson to measure: a number or a name.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every lesson.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the record.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A record to compare with, or a folder of lesson_NN.json.")
    ] = None,
    fail_if_slower: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="Exit with 1 if a figure takes more time than this: 5%.")
    ] = None,
) -> int:
    """Measure lessons on this GPU, record it, and compare with a baseline."""
    import tempfile

    from triton_tutorial import benchmark as measuring

    if (lesson is None) == (not all_):
        raise TutorialError(f"say which lesson: {NAME} benchmark --lesson 1, or {NAME} benchmark --all")
    tolerance = measuring.percent(fail_if_slower) if fail_if_slower is not None else None
    if tolerance is not None and baseline is None:
        raise TutorialError("--fail-if-slower compares with a record; add --baseline FILE")
    before = measuring.load(baseline) if baseline is not None else None
    todo = catalog.lessons() if all_ else [catalog.find([str(lesson)])]
    if _gpu_name() is None:
        raise TutorialError(f"benchmark needs a CUDA GPU; recorded figures are shown by: {NAME} run {todo[0].number}")
    record: dict[str, Any] = {"version": measuring.VERSION, "lessons": {}}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for one in todo:
            written = Path(folder) / f"{one.name}.json"
            say(f"lesson {one.number}, {one.title}", "bold")
            status = run_lesson(one, ["--device", "cuda", "--bench", "--json", str(written)])
            if status:
                failed.append(one.number)
                warn(f"lesson {one.number} ended with status {status}; see: {NAME} run {one.number}")
        record |= measuring.load(Path(folder)) if any(Path(folder).iterdir()) else {}
    if json_ is not None:
        measuring.save(record, json_)
        say(f"written: {json_}", "green")
    if failed:
        raise TutorialError(f"lesson {', '.join(map(str, failed))} failed, so the record is not whole; mend it first")
    return 0 if before is None else _compare(before, record, tolerance)


def _compare(before: dict[str, Any], now: dict[str, Any], tolerance: float | None) -> int:
    from triton_tutorial import benchmark as measuring

    changes, gone = measuring.compare(before, now)
    slow = [change for change in changes if tolerance is not None and change.slower > tolerance]
    for change in changes:
        lesson, table, name, case = change.key
        text = f"lesson {lesson} {table} {name} {case}".strip()
        say(
            f"{text:<60} {change.before:>10.2f} us {change.after:>10.2f} us {change.slower:>+7.1%}",
            "red" if change in slow else None,
        )
    for lesson, table, name, case in gone:
        warn(f"lesson {lesson} {table} {name} {case} is in the baseline and was not measured now")
    if slow:
        raise TutorialError(
            f"{len(slow)} of {len(changes)} figures are more than {tolerance:.0%} slower than the baseline"
        )
    say(
        f"{len(changes)} figures compared; none is slower than allowed"
        if tolerance is not None
        else f"{len(changes)} compared"
    )
    return 0
