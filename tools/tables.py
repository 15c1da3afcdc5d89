"""Write README.md's tables from the registry and from the benchmark record: `python tools/tables.py`.

A test fails when the README and its sources disagree.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

README = ROOT / "README.md"
RECORD = ROOT / "bench" / "results" / "nvidia_h200.json"


def op_table() -> str:
    import torch_triton_ops

    rows = ["| `torch.ops.tt.` | what it does | gradients | dtypes | in compiled graphs |", "|---|---|---|---|---|"]
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    for spec in torch_triton_ops.specs():
        dtypes = ", ".join(short.get(str(d).removeprefix("torch."), str(d).removeprefix("torch.")) for d in spec.dtypes)
        seen = "inlined kernel" if spec.visibility == "triton" else "one node"
        rows.append(
            f"| `{spec.name}` | {spec.summary} | {', '.join(spec.differentiable) or 'none'} | {dtypes} | {seen} |"
        )
    return "\n".join(rows)


def figure_table() -> str:
    from bench.record import groups, load, valid

    record = load(RECORD)
    header = record["header"]
    lines = [
        f"{header['gpu']}, torch {header['torch']}, triton {header['triton']}; record:"
        f" [`{RECORD.relative_to(ROOT)}`]({RECORD.relative_to(ROOT)}).",
        "",
        "| op, shape | pass | ours | of the measured limit | best peer | ours / best peer |",
        "|---|---|---|---|---|---|",
    ]
    for (op, case, dtype, pass_name), rows in groups(record["rows"]).items():
        ours = next((row for row in rows if row["impl"] == "tt" and valid(row)), None)
        if ours is None:
            continue
        if record["stamps"][ours["measured"]]["rounds"] < 5:
            continue  # a quick look, not a figure to publish
        rate = f"{ours['tbps']:.2f} TB/s" if "tbps" in ours else f"{ours['tflops']:.0f} TFLOP/s"
        if ours.get("fraction_of_limit", 0) > 1.05:
            continue  # the inputs fit in the L2 cache: no figure of merit
        best = ours.get("best_peer", "-")
        ratio = f"{ours['ratio_to_best_peer']:.2f}x" if "ratio_to_best_peer" in ours else "-"
        limit = f"{100 * ours['fraction_of_limit']:.0f} %"
        name = f"`{op}` {case} {dtype.removeprefix('torch.')}"
        lines.append(f"| {name} | {pass_name} | {rate} | {limit} | {best} | {ratio} |")
    return "\n".join(lines)


def host_table() -> str:
    names = {"tt": "`torch.ops.tt.vector_add(x, y)`", "eager": "`x + y`", "tt_compile": "ours inside `torch.compile`"}
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    lines = ["| host time a call, 1024 elements | microseconds |", "|---|---|"]
    for row in rows:
        if row["op"] == "vector_add" and row["case"] == "1024" and row.get("host_us"):
            lines.append(f"| {names.get(row['impl'], row['impl'])} | {row['host_us']:.1f} |")
    return "\n".join(lines)


TABLES = {"ops": op_table, "figures": figure_table, "host": host_table}


def filled(text: str) -> str:
    """README's text with every table between its markers written anew."""
    for name, make in TABLES.items():
        marker = re.compile(rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        if not marker.search(text):
            raise SystemExit(f"README.md has no markers for the table '{name}'")
        text = marker.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
