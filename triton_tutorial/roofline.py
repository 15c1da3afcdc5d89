"""The roofline of a benchmark record: the GPU's measured ceilings, and every op as a point. Imports torch only to measure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton_tutorial import progress
from triton_tutorial.catalog import PACKAGE, TutorialError
from triton_tutorial.exercises import child_environment

RECORDS = PACKAGE / "bench" / "results"


@dataclass(frozen=True)
class Point:
    """One op at one case: flops for each compulsory byte, TFLOP/s, TB/s, and the share of the nearer ceiling."""

    op: str
    case: str
    dtype: str
    pass_name: str
    intensity: float
    tflops: float
    tbps: float
    fraction: float
    bound: str  # memory | compute


def slug(gpu: str) -> str:
    """File name of a GPU's record."""
    return "_".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def own_record(gpu: str) -> Path:
    """Where `--measure` keeps this machine's record."""
    return progress.home() / "benchmarks" / f"{slug(gpu)}.json"


def find_record(gpu: str | None) -> Path:
    """This GPU's own record, else the one shipped for it, else the shipped one of another GPU. Raises TutorialError."""
    shipped = sorted(RECORDS.glob("*.json"))
    wanted = [own_record(gpu), RECORDS / f"{slug(gpu)}.json"] if gpu is not None else []
    for path in (*wanted, *shipped):
        if path.is_file():
            return path
    raise TutorialError("no record is shipped; measure this GPU with: triton-tutorial roofline --measure")


def load(path: Path) -> dict[str, Any]:
    """A record of bench.run. Raises TutorialError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        header, rows = record["header"], record["rows"]
        _ = header["gpu"], header["copy_tbps"], header["matmul_tflops"]
    except OSError as error:
        raise TutorialError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise TutorialError(
            f"{path} is no benchmark record; write one with: triton-tutorial roofline --measure"
        ) from None
    if not isinstance(rows, list):
        raise TutorialError(f"{path} is no benchmark record: 'rows' is no list")
    return record


def points(record: dict[str, Any]) -> list[Point]:
    """Ours, where the output was right."""
    copy, peak = record["header"]["copy_tbps"], record["header"]["matmul_tflops"]
    found = []
    for row in record["rows"]:
        right = "ms" in row and "error" not in row and row.get("check", {}).get("passed")
        if row["impl"] != "tt" or not right or not row.get("bytes"):
            continue
        tflops, tbps = row["flops"] / row["ms"] / 1e9, row["bytes"] / row["ms"] / 1e9
        memory = tbps / copy >= tflops / peak
        found.append(
            Point(
                row["op"],
                row["case"],
                row["dtype"],
                row["pass"],
                round(row["flops"] / row["bytes"], 3),
                round(tflops, 3),
                round(tbps, 4),
                round(max(tbps / copy, tflops / peak), 4),
                "memory" if memory else "compute",
            )
        )
    return found


def as_json(record: dict[str, Any], path: Path) -> dict[str, Any]:
    return {"record": str(path), "header": record["header"], "points": [asdict(point) for point in points(record)]}


def measure(gpu: str, ops: str | None) -> Path:
    """Run the benchmark's first case of every op on this GPU, beside eager torch; a few minutes."""
    path = own_record(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise progress.not_writable(error) from None
    command = [sys.executable, "-m", "triton_tutorial.bench.run", "--quick", "--peers", "eager", "--json", str(path)]
    command += ["--op", ops] if ops else []
    status = subprocess.run(command, env=child_environment()).returncode
    if status:
        raise TutorialError(f"the benchmark ended with status {status}; try: triton-tutorial doctor")
    return path


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the chart. Raises TutorialError."""
    try:
        import matplotlib
    except ImportError:
        raise TutorialError(
            f"charts need matplotlib; install it with: {sys.executable} -m pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from triton_tutorial.bench import plot

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.draw_roofline(record, path)
    except OSError as error:
        raise TutorialError(f"{path} cannot be written: {error.strerror}") from None
