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


def faults(checker: exercises.Checker, exercise: exercises.Exercise) -> list[str]:
    """What is wrong with an exercise: its solution must pass, the unsolved file and the wrong answer must not."""
    solved, todo, wrong = (
        checker.check(exercises.Job.of(exercise, file))
        for file in (exercise.solution, exercise.original, exercise.wrong)
    )
    found = []
    if not solved.passed:
        found.append(f"{exercise.solution} fails: {solved.message}\n{solved.trace}")
    if todo.passed:
        found.append(f"{exercise.original} passes its check as it stands")
    if f"TODO({exercise.name})" not in exercise.original.read_text(encoding="utf-8"):
        found.append(f"{exercise.original} has no TODO({exercise.name})")
    said = re.match(r"# fails: (.+)\n", exercise.wrong.read_text(encoding="utf-8"))
    if said is None:
        found.append(f"{exercise.wrong}:1: the first line must be '# fails: <a regular expression of the message>'")
    elif wrong.passed:
        found.append(f"{exercise.wrong} passes")
    elif not re.search(said[1], wrong.message):
        found.append(f"{exercise.wrong}: {said[1]!r} is not in {wrong.message!r}")
    return found


def test_every_exercise_by_its_three_answers():
    """All in one test: they share a process whose start takes longer than all the checks."""
    found: list[str] = []
    with exercises.Checker("cpu", quiet=True) as checker:
        for lesson, name in EXERCISES:
            try:
                found += faults(checker, exercises.find(lesson, name))
            except catalog.CatalogError as error:
                found.append(str(error))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("lesson", "name"), EXERCISES, ids=names)
def test_hints_and_files(lesson, name):
    exercise = exercises.find(lesson, name)
    hints = exercise.hints()
    assert len(set(hints)) == exercises.HINT_LEVELS, f"{lesson.folder / 'hints.yaml'}: {name} gives one hint twice"
    assert f"TODO({name})" not in exercise.solution.read_text(encoding="utf-8"), f"{exercise.solution} still says TODO"
    for file in (exercise.solution, exercise.wrong):
        assert file.name == exercise.original.name
