"""The benchmark record: its rows, merging op by op, ratios, the printed table, the comparison of two records.

{"header": {...}, "stamps": {id: header of that run}, "rows": [...]}; a row's `measured` names the stamp of its run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .timing import Spread

Row = dict[str, Any]
Record = dict[str, Any]

SCHEMA_VERSION = 1
REQUIRED = ("op", "case", "dtype", "pass", "impl", "measured")


class RecordError(ValueError):
    """A file that is no benchmark record, or one that must not be merged."""


def slug(gpu: str) -> str:
    """File name of a GPU's record: "NVIDIA H200" -> "nvidia_h200"."""
    return "_".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def load(path: str | Path) -> Record:
    """Read and check a record. Raises RecordError that names the file and what is wrong."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    problem = problems(record)
    if problem:
        raise RecordError(f"{path}: {problem}")
    return record


def problems(record: Any) -> str | None:
    """What keeps `record` from being a benchmark record, or None."""
    if not isinstance(record, dict) or not all(key in record for key in ("header", "stamps", "rows")):
        return "not a benchmark record; it needs 'header', 'stamps' and 'rows' (write one with python -m bench.run)"
    if record["header"].get("schema_version") != SCHEMA_VERSION:
        return f"schema_version is {record['header'].get('schema_version')}; this code reads {SCHEMA_VERSION}"
    for i, row in enumerate(record["rows"]):
        missing = [key for key in REQUIRED if key not in row]
        if missing:
            return f"row {i} has no {', '.join(missing)}"
        if row["measured"] not in record["stamps"]:
            return f"row {i} was measured in '{row['measured']}', which is no stamp of the file"
        if "ms" not in row and "host_us" not in row and "error" not in row:
            return f"row {i} has neither a time nor an error"
    return None


def merge(old: Record | None, new: Record, whole_ops: Iterable[str]) -> Record:
    """`new` over `old`: all rows of `whole_ops` are replaced, and any (op, case, dtype, pass) that `new` measured.

    Rows of one (op, case, dtype, pass) always come from one process, so their ratios hold. Raises RecordError when the
    records are of different GPUs.
    """
    if old is None:
        return new
    if old["header"]["gpu"] != new["header"]["gpu"]:
        raise RecordError(
            f"the record is of {old['header']['gpu']}, this machine has {new['header']['gpu']}; use another --json"
        )
    whole = set(whole_ops)
    measured = {_group(row) for row in new["rows"]}
    kept = [row for row in old["rows"] if row["op"] not in whole and _group(row) not in measured]
    order = {op: i for i, op in enumerate(dict.fromkeys(r["op"] for r in (*old["rows"], *new["rows"])))}
    rows = sorted([*kept, *new["rows"]], key=lambda row: order[row["op"]])  # stable: cases stay in their order
    stamps = {**old["stamps"], **new["stamps"]}
    used = {row["measured"] for row in rows} | set(new["stamps"])
    return {"header": new["header"], "stamps": {k: v for k, v in stamps.items() if k in used}, "rows": rows}


def save(record: Record, path: str | Path) -> None:
    """Write a record, one row on a line, so that a change of one row is a change of one line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row) for row in record["rows"])
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(record[key], indent=2)}" for key in ("header", "stamps"))
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text("{\n" + head + ',\n "rows": [\n' + rows + "\n ]\n}\n", encoding="utf-8")
    temporary.replace(path)


def _group(row: Row) -> tuple[str, str, str, str]:
    return row["op"], row["case"], row["dtype"], row["pass"]


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by (op, case, dtype, pass), in the record's order."""
    grouped: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault(_group(row), []).append(row)
    return grouped


def valid(row: Row) -> bool:
    """Measured, and its output was right: only such a row may stand in a ratio or a chart."""
    return "ms" in row and "error" not in row and bool(row.get("check", {}).get("passed"))


# --------------------------------------------------------------------------------------------------------------------
# What a row says
# --------------------------------------------------------------------------------------------------------------------


def work(cost: Any, pass_name: str) -> tuple[int, int]:
    """(flops, bytes) of a pass."""
    forward, backward = (cost.flops, cost.bytes), (cost.backward_flops, cost.backward_bytes)
    if pass_name == "fwd":
        return forward
    return backward if pass_name == "bwd" else (forward[0] + backward[0], forward[1] + backward[1])


def rate(flops: int, nbytes: int, ms: float, copy_tbps: float, matmul_tflops: float) -> Row:
    """Rate and fraction of the measured limit. The limit is the slower of moving the bytes and doing the arithmetic."""
    memory_ms, compute_ms = nbytes / copy_tbps / 1e9, flops / matmul_tflops / 1e9
    row: Row = {"flops": flops, "bytes": nbytes}
    if max(memory_ms, compute_ms) == 0:
        return row
    if memory_ms >= compute_ms:
        row["tbps"] = round(nbytes / ms / 1e9, 4)
    else:
        row["tflops"] = round(flops / ms / 1e9, 2)
    row["fraction_of_limit"] = round(max(memory_ms, compute_ms) / ms, 4)
    return row


def add_ratios(rows: list[Row], rounds: dict[str, Sequence[float]]) -> None:
    """Give `tt`'s row of one (op, case, pass) its speed-up over the best peer: above one means that ours is faster.

    `rounds`: each impl's milliseconds in every round. The ratio of medians, and the extremes of the rounds' ratios.
    """
    peers = [row for row in rows if row["impl"] != "tt" and valid(row)]
    for row in rows:
        if row["impl"] == "tt" and valid(row) and peers:
            best = min(peers, key=lambda peer: peer["ms"])
            each = [theirs / ours for theirs, ours in zip(rounds[best["impl"]], rounds["tt"], strict=True)]
            row["best_peer"] = best["impl"]
            row["ratio_to_best_peer"] = round(best["ms"] / row["ms"], 4)
            row["ratio_min"], row["ratio_max"] = round(min(each), 4), round(max(each), 4)


def times(spread: Spread) -> Row:
    """A spread as the record's columns."""
    return {"ms": round(spread.median, 6), "ms_min": round(spread.low, 6), "ms_max": round(spread.high, 6)}


# --------------------------------------------------------------------------------------------------------------------
# For people
# --------------------------------------------------------------------------------------------------------------------


def describe(row: Row) -> str:
    """One row as one line."""
    where = f"{row['op']:<16} {row['case']:<28} {row['dtype']:<9} {row['pass']:<7} {row['impl']:<9}"
    if "ms" not in row:
        if "error" in row:
            return f"{where} -- {row['error']}"
        return f"{where} host {row['host_us']:.1f} us"
    parts = [f"{row['ms']:9.4f} ms ({row['ms_min']:.4f}-{row['ms_max']:.4f})", _rate_text(row)]
    if "fraction_of_limit" in row:
        parts.append(f"{100 * row['fraction_of_limit']:5.1f}%")
    if row.get("host_us") is not None:
        parts.append(f"host {row['host_us']:.1f} us")
    if row.get("peak_bytes") is not None:
        parts.append(f"peak {row['peak_bytes'] / 2**20:.0f} MiB")
    if row["method"] != "graph":
        parts.append(row["method"])
    if "setup_s" in row:
        parts.append(f"setup {row['setup_s']:.1f} s")
    check = row.get("check", {})
    parts.append("ok" if check.get("passed") else f"WRONG: {check.get('reason', 'not checked')}")
    return f"{where} " + "  ".join(part for part in parts if part)


def _rate_text(row: Row) -> str:
    if "tbps" in row:
        return f"{row['tbps']:7.3f} TB/s"
    return f"{row['tflops']:7.1f} TFLOP/s" if "tflops" in row else ""


def table(rows: Sequence[Row]) -> str:
    """One line for each (op, case, pass): every impl's rate, ours against the best peer. "-": absent, "x": failed."""
    impls = list(dict.fromkeys(["tt", *(row["impl"] for row in rows)]))
    lines = [["op", "case", "dtype", "pass", "unit", *impls, "of limit", "x best peer"]]
    for (op, case, dtype, pass_name), group in groups(rows).items():
        by_impl = {row["impl"]: row for row in group}
        sample = next((r for r in group if valid(r)), group[0])
        unit = next((u for u in ("tbps", "tflops", "ms") if u in sample), "host_us")
        cells = []
        for impl in impls:
            row = by_impl.get(impl)
            if row is None:
                cells.append("-")
            elif "error" in row or ("ms" in row and not valid(row)) or unit not in row:
                cells.append("x")
            else:
                cells.append(f"{row[unit]:.3g}" + ("*" if row.get("method", "").startswith("events") else ""))
        ours = by_impl.get("tt", {})
        fraction = f"{100 * ours['fraction_of_limit']:.0f}%" if "fraction_of_limit" in ours and valid(ours) else ""
        ratio = f"{ours['ratio_to_best_peer']:.2f} {ours['best_peer']}" if "ratio_to_best_peer" in ours else ""
        name = {"tbps": "TB/s", "tflops": "TFLOP/s", "host_us": "host us"}.get(unit, unit)
        lines.append([op, case, dtype, pass_name, name, *cells, fraction, ratio])
    return _columns(lines)


def _columns(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def compare(before: Record, after: Record) -> str:
    """Change of every row that both records have. A change is marked when the two spreads do not overlap."""
    old = {(*_group(row), row["impl"]): row for row in before["rows"]}
    lines = [["op", "case", "dtype", "pass", "impl", "before ms", "spread", "after ms", "spread", "time", ""]]
    for row in after["rows"]:
        was = old.get((*_group(row), row["impl"]))
        if was is None or not (valid(row) and valid(was)):
            continue
        if row["ms_min"] > was["ms_max"]:
            mark = "slower"
        elif row["ms_max"] < was["ms_min"]:
            mark = "faster"
        else:
            mark = "within the spread"
        spreads = [f"{r['ms_min']:.4f}-{r['ms_max']:.4f}" for r in (was, row)]
        change = f"{100 * (row['ms'] / was['ms'] - 1):+.1f}%"
        lines.append(
            [*_group(row), row["impl"], f"{was['ms']:.4f}", spreads[0], f"{row['ms']:.4f}", spreads[1], change, mark]
        )
    return _columns(lines) if len(lines) > 1 else "the two records have no valid row in common"
