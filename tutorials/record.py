"""Record every lesson on this machine's GPU: tutorials/results/<gpu>/lesson_NN.json and its figures.

    python tutorials/record.py                          on a machine with a CUDA GPU
    python tutorials/record.py --tar FILE               the same, packed into one file: lesson_NN.json, figures, logs
    python tutorials/record.py --unpack FILE            elsewhere: take such a file over into tutorials/results/
    python tutorials/record.py --draw                   draw all figures again from the records; needs no GPU

Several lessons run at a time, but take turns on the GPU (a lock file), so that no timing is disturbed: while one measures, the
others compile. A lesson that fails or runs out of time leaves the record that was there, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TUTORIALS = Path(__file__).resolve().parent
RESULTS = TUTORIALS / "results"
LESSON_S = 300  # seconds, at most, for one lesson, its waits for the GPU included


def lesson_files(wanted: list[int]) -> list[Path]:
    """The lessons' scripts by number, all if none is wanted."""
    found = {int(re.sub(r"lesson_(\d+)_.*", r"\1", f.name)): f for f in TUTORIALS.glob("*/lesson_*.py")}
    return [found[number] for number in sorted(wanted or found)]


def run(file: Path, folder: Path, options: list[str], limit: float) -> str:
    """Run one lesson; what went wrong, or "". Its output goes to <folder>/lesson_NN.log."""
    name = file.name[: len("lesson_00")]
    path = os.pathsep.join(p for p in (str(TUTORIALS.parent), os.environ.get("PYTHONPATH", "")) if p)
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            command = [sys.executable, str(file), *options, "--plot", str(folder)]
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=os.environ | {"PYTHONPATH": path}
            )
        except subprocess.TimeoutExpired:
            return f"not done after {limit:.0f} s"
    if done.returncode == 0:
        return ""
    last = [line for line in (folder / f"{name}.log").read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"status {done.returncode}: {last[-1].strip() if last else 'no output'}"


def take_over(folder: Path, names: list[str]) -> Path:
    """Copy the records and figures of `names` to results/<gpu>/; that folder."""
    target = RESULTS
    for name in names:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        target = RESULTS / re.sub(r"[^a-z0-9]+", "_", record["header"]["gpu"].lower().removeprefix("nvidia ")).strip(
            "_"
        )
        target.mkdir(parents=True, exist_ok=True)
        for file in (folder / f"{name}.json", *sorted(folder.glob(f"{name}_*.png"))):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def record(files: list[Path], tar: Path | None, budget_s: float, size: str, jobs: int) -> int:
    """Run `files` on the GPU within `budget_s` seconds, `jobs` at a time; the exit status."""
    started, good, bad = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "records")
        folder.mkdir()
        os.environ["TRITON_TUTORIAL_GPU_LOCK"] = str(Path(temporary, "gpu.lock"))

        def one(file: Path) -> tuple[str, str, float]:
            name = file.name[: len("lesson_00")]
            begun = time.monotonic()
            left = budget_s - (begun - started)
            options = ["--device", "cuda", "--bench", "--size", size, "--json", str(folder / f"{name}.json")]
            problem = run(file, folder, options, min(LESSON_S, left)) if left > 5 else "no time left"
            return name, problem, time.monotonic() - begun

        with ThreadPoolExecutor(jobs) as pool:
            # the later lessons are the longer ones
            for name, problem, seconds in pool.map(one, reversed(files)):
                (bad if problem else good).append(name)
                print(f"{name}: {seconds:.0f} s {problem or 'recorded'}", flush=True)
        if tar is not None:
            with tarfile.open(tar, "w:gz") as archive:
                for file in sorted(folder.iterdir()):
                    archive.add(file, f"{'failed' if file.name[: len('lesson_00')] in bad else 'good'}/{file.name}")
        elif good:
            print(f"records and figures are in {take_over(folder, good)}")
    print(f"{len(good)} of {len(files)} lessons recorded in {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


def unpack(tar: Path) -> int:
    """Take a packed recording over."""
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                content = archive.extractfile(member)
                if content is not None and re.fullmatch(r"(good|failed)/\w+\.\w+", member.name):
                    target = Path(temporary, member.name)
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(content.read())
        folder = Path(temporary) / "good"
        names = sorted(f.stem for f in folder.glob("lesson_??.json"))
        if names:
            print(f"{', '.join(names)}: in {take_over(folder, names)}")
        failed = Path(temporary) / "failed"
        for log in sorted(failed.glob("*.log")):
            print(f"\n{log.stem} failed:\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:]))
        return 1 if any(failed.glob("*.log")) or not names else 0


def draw(files: list[Path]) -> int:
    """Draw the figures of the records again, on the CPU."""
    status = 0
    for file in files:
        name = file.name[: len("lesson_00")]
        if (RESULTS / "h200" / f"{name}.json").is_file():
            problem = run(file, RESULTS / "h200", ["--device", "cpu"], 600)
            (RESULTS / "h200" / f"{name}.log").unlink()
            print(f"{name}: {problem or 'drawn'}", flush=True)
            status |= bool(problem)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lessons", nargs="*", type=int, help="numbers; all if none is given")
    parser.add_argument(
        "--tar", type=Path, metavar="FILE", help="pack everything into FILE instead of tutorials/results/"
    )
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="take such a file over, and do nothing else")
    parser.add_argument(
        "--draw", action="store_true", help="draw the figures again from the records, and do nothing else"
    )
    parser.add_argument("--budget", type=float, default=600, metavar="S", help="seconds for all lessons (default: 600)")
    parser.add_argument("--jobs", type=int, default=3, metavar="N", help="lessons at a time (default: 3)")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    options = parser.parse_args()
    if options.unpack:
        return unpack(options.unpack)
    files = lesson_files(options.lessons)
    return draw(files) if options.draw else record(files, options.tar, options.budget, options.size, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
