"""Every lesson in tutorials/: its header, a run on the CPU, its exercises with their solutions, wrong answers and hints.

A lesson or an exercise that is added is walked without a word here.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triton_tutorial import catalog, exercises

ROOT = Path(__file__).resolve().parent.parent
LESSONS = catalog.lessons(ROOT / "tutorials")
EXERCISES = [(lesson, name) for lesson in LESSONS for name in lesson.exercises]
SECONDS = 60  # of one lesson on two cores; less than that in CPU seconds
FILES = sorted((ROOT / "tutorials").glob("*/lesson_*.py"))


def names(value: object) -> str:
    return value.name if isinstance(value, catalog.Lesson) else str(value)


def test_the_catalogue_finds_every_file():
    assert [lesson.file for lesson in LESSONS] == sorted(FILES, key=lambda file: file.name)
    assert LESSONS, "no lesson was found"
    folders = {folder.name for folder in (ROOT / "tutorials" / "exercises").iterdir()}
    assert folders <= {lesson.name for lesson in LESSONS}, "exercises of a lesson that is not there"


@pytest.mark.parametrize("lesson", LESSONS, ids=names)
def test_header(lesson):
    """What the catalogue does not check by itself: ops are registered, prerequisites come before."""
    import torch_triton_ops

    known = [spec.name for spec in torch_triton_ops.specs()]
    unknown = [op for op in lesson.ops if op not in known]
    assert not unknown, f"{lesson.file}:1: ops {unknown} are not in op_registry.yaml"
    assert lesson.ops, f"{lesson.file}:1: a lesson teaches at least one shipped op"
    assert lesson.concepts, f"{lesson.file}:1: no concepts"
    assert len(lesson.exercises) >= 2, f"{lesson.file}:1: a lesson has at least two exercises"
    assert all(number < lesson.number for number in lesson.prerequisites), f"{lesson.file}:1: a later prerequisite"


@pytest.mark.parametrize("lesson", LESSONS, ids=names)
def test_lesson_is_right_on_the_cpu_within_its_time(lesson, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, str(lesson.file), "--device", "cpu", "--check-only"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=10 * SECONDS,
    )
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    # on a busy machine the wall clock says little; a lesson mostly keeps one core busy
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert min(cpu, seconds) < SECONDS, f"{lesson.name} took {seconds:.0f} s, {cpu:.0f} s of CPU"


def test_every_exercise_by_its_three_answers(subtests_of):
    """The unsolved file fails, the solution passes, the wrong answer fails with the message that it names."""
    with exercises.Checker("cpu", quiet=True) as checker:
        for lesson, name in EXERCISES:
            exercise = exercises.find(lesson, name)

            def outcome(file: Path, exercise=exercise) -> exercises.Outcome:
                return checker.check(exercises.Job.of(exercise, file))

            with subtests_of(f"{lesson.name} {name}"):
                solved = outcome(exercise.solution)
                assert solved.passed, f"{exercise.solution}: {solved.message}\n{solved.trace}"
                todo = outcome(exercise.original)
                assert not todo.passed, f"{exercise.original} passes its check as it stands"
                assert f"TODO({name})" in exercise.original.read_text(encoding="utf-8"), f"{exercise.original}: no TODO"
                first = exercise.wrong.read_text(encoding="utf-8").splitlines()[0]
                said = re.fullmatch(r"# fails: (.+)", first)
                assert said, f"{exercise.wrong}:1: the first line must be '# fails: <what the message says>'"
                wrong = outcome(exercise.wrong)
                assert not wrong.passed, f"{exercise.wrong} passes"
                assert re.search(said[1], wrong.message), f"{exercise.wrong}: {said[1]!r} is not in {wrong.message!r}"


@pytest.fixture
def subtests_of():
    """Collect the failures of a loop, so that one exercise does not hide the next; they share one slow start."""
    failures: list[str] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: object, error: object, trace: object) -> bool:
            if isinstance(error, AssertionError):
                failures.append(f"{self.name}: {error}")
            return isinstance(error, AssertionError)

    yield Part
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("lesson", "name"), EXERCISES, ids=names)
def test_hints_and_files(lesson, name):
    exercise = exercises.find(lesson, name)
    hints = exercise.hints()
    assert len(set(hints)) == exercises.HINT_LEVELS, f"{lesson.folder / 'hints.yaml'}: {name} gives one hint twice"
    assert f"TODO({name})" not in exercise.solution.read_text(encoding="utf-8"), f"{exercise.solution} still says TODO"
    for file in (exercise.solution, exercise.wrong):
        assert file.name == exercise.original.name
