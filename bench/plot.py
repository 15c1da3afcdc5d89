"""Charts of a record: python -m bench.plot bench/results/nvidia_h200.json

`<record>_bars.png`: every impl's fraction of the measured limit. `<record>_roofline.png`: rate against intensity.
"""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import record
from .record import Record, Row

# Ours stands out; peers keep their colour from chart to chart.
COLOURS = {
    "tt": "#d1495b",
    "eager": "#9aa5b1",
    "compile": "#52606d",
    "compile_max": "#323f4b",
    "liger": "#edae49",
    "quack": "#00798c",
    "cudnn": "#66a182",
    "flash2": "#8d6a9f",
    "fa4": "#30638e",
}
OTHER = "#b8a9c9"
NAMES = {"tt": "torch_triton_ops", "eager": "torch", "compile": "torch.compile", "compile_max": "compile max-autotune"}
MARKERS = {"fwd": "o", "fwdbwd": "D", "bwd": "s"}
BAR = 0.17  # inches
LABEL = 24  # characters of a case's name that fit beside the bars
LEGEND_ROWS, LEGEND_INCHES = 28, 1.9  # of the roofline's legend: rows of a column, and its width


def draw(result: Record, stem: str | Path) -> list[Path]:
    """Write both charts as `<stem>_bars.png` and `<stem>_roofline.png`; the paths written. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise record.RecordError("drawing charts needs matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    shown = [row for row in result["rows"] if "ms" in row or "error" in row]
    if not any(record.valid(row) and "fraction_of_limit" in row for row in shown):
        raise record.RecordError("the record has no valid row with a rate: nothing to draw")
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("bars", _bars(result["header"], shown)), ("roofline", _roofline(result["header"], shown))):
        path = stem.with_name(f"{stem.name}_{name}.png")
        figure.savefig(path, dpi=130, facecolor="white")
        written.append(path)
    import matplotlib.pyplot as plt

    plt.close("all")
    return written


def draw_roofline(result: Record, path: str | Path) -> None:
    """Write the roofline of a record alone to `path`. Needs matplotlib."""
    figure = _roofline(result["header"], result["rows"])
    figure.savefig(path, dpi=130, facecolor="white")


def _subtitle(header: dict[str, Any]) -> str:
    return (
        f"{header['gpu']}, torch {header['torch']}, triton {header['triton']}, {header['date'][:10]};  limit: copy"
        f" {header['copy_tbps']:.2f} TB/s, bf16 matmul {header['matmul_tflops']:.0f} TFLOP/s, both measured in the run"
    )


# --------------------------------------------------------------------------------------------------------------------
# Bars
# --------------------------------------------------------------------------------------------------------------------


def _bars(header: dict[str, Any], rows: Sequence[Row]) -> Any:
    """A panel for each op, a group of bars for each case and pass. An absent impl has no place; a failed one tells."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    by_op: dict[str, list[tuple[str, list[Row]]]] = {}
    for (op, case, _, pass_name), group in record.groups(rows).items():
        if len(case) > LABEL:  # at the last place that leaves both lines within the margin
            cut = case.rfind("_", 0, LABEL) + 1 or LABEL
            case = f"{case[:cut]}\n{case[cut:]}"
        by_op.setdefault(op, []).append((f"{case}\n{pass_name}", group))
    slots = {op: sum(len(group) + 1 for _, group in groups) for op, groups in by_op.items()}

    columns: list[list[str]] = [[], []] if len(by_op) > 1 else [[]]
    for op in sorted(by_op, key=lambda o: -slots[o]):
        min(columns, key=lambda column: sum(slots[o] + 7 for o in column)).append(op)
    order = list(by_op)
    columns = [sorted(column, key=order.index) for column in columns]

    # one scale for all panels, with room for the rate at its right end
    limit = max(
        1.05, 1.03 * max(row["fraction_of_limit"] for row in rows if record.valid(row) and "fraction_of_limit" in row)
    )
    height = max(sum(slots[o] * BAR + 0.75 for o in column) for column in columns) + 1.5
    width = 8.2 * len(columns)
    figure = plt.figure(figsize=(width, height))
    for c, column in enumerate(columns):
        top = height - 1.15
        for op in column:
            panel = slots[op] * BAR
            left, right = (c + 0.225) / len(columns), (c + 0.885) / len(columns)
            axes = figure.add_axes((left, (top - panel - 0.25) / height, right - left, panel / height))
            _panel(axes, op, by_op[op], limit)
            top -= panel + 0.75
    present = [name for name in _impl_order(rows) if any(r["impl"] == name and record.valid(r) for r in rows)]
    handles = [Patch(color=COLOURS.get(name, OTHER), label=NAMES.get(name, name)) for name in present]
    figure.suptitle("Fraction of the measured limit (higher is better)", x=0.5, y=1 - 0.16 / height, va="top", size=15)
    figure.text(0.5, 1 - 0.5 / height, _subtitle(header), ha="center", va="top", size=9.5, color="#52606d")
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1 - 0.66 / height), ncols=len(handles), frameon=False
    )
    return figure


def _panel(axes: Any, op: str, groups: Sequence[tuple[str, list[Row]]], limit: float) -> None:
    at, ticks, labels = 0.0, [], []
    for label, group in groups:
        start = at
        for row in sorted(group, key=lambda r: _impl_order(group).index(r["impl"])):
            colour = COLOURS.get(row["impl"], OTHER)
            if record.valid(row) and "fraction_of_limit" in row:
                fraction = row["fraction_of_limit"]
                axes.barh(at, fraction, height=0.86, color=colour, zorder=2)
                axes.text(
                    limit * 1.008,
                    at,
                    _value(row),
                    va="center",
                    size=7,
                    color="black" if row["impl"] == "tt" else "#52606d",
                    weight="bold" if row["impl"] == "tt" else "normal",
                )
            else:
                axes.text(
                    0.006,
                    at,
                    f"{NAMES.get(row['impl'], row['impl'])}: {_why(row)}",
                    va="center",
                    size=7,
                    style="italic",
                    color="#323f4b",
                )
            at += 1
        ticks.append((start + at - 1) / 2)
        labels.append(label)
        at += 1
    axes.set_ylim(at - 0.6, -0.9)
    axes.set_xlim(0, limit)
    axes.set_yticks(ticks, labels, size=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7, length=2, pad=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.axvline(1.0, color="#323f4b", lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.grid(axis="x", color="#e4e7eb", lw=0.7, zorder=0)
    axes.set_title(op, loc="left", size=11, weight="bold", pad=4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _impl_order(rows: Sequence[Row]) -> list[str]:
    names = {row["impl"] for row in rows}
    return [*(n for n in COLOURS if n in names), *sorted(names - set(COLOURS))]


def _value(row: Row) -> str:
    text = f"{row['tbps']:.2f} TB/s" if "tbps" in row else f"{row['tflops']:.0f} TFLOP/s"
    return text + ("*" if row["method"].startswith("events") else "")


def _why(row: Row) -> str:
    reason = row.get("error") or f"wrong output, no figure ({row.get('check', {}).get('reason', 'not checked')})"
    return reason if len(reason) <= 70 else reason[:67] + "..."


# --------------------------------------------------------------------------------------------------------------------
# Roofline
# --------------------------------------------------------------------------------------------------------------------


def _roofline(header: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Rate against flops a byte, ours filled and the best peer of the same case hollow."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D

    copy, peak = header["copy_tbps"], header["matmul_tflops"]
    points: list[tuple[Row, Row | None]] = []
    for group in record.groups(rows).values():
        ours = next((r for r in group if r["impl"] == "tt" and record.valid(r) and r.get("flops") and r["bytes"]), None)
        if ours is not None:
            points.append((ours, next((r for r in group if r["impl"] == ours.get("best_peer")), None)))

    ops = list(dict.fromkeys(ours["op"] for ours, _ in points))
    columns = max(1, -(-(len(ops) + 4) // LEGEND_ROWS))
    right = LEGEND_INCHES * columns
    figure, axes = plt.subplots(figsize=(9.2 + right, 6.6))
    intensities = [ours["flops"] / ours["bytes"] for ours, _ in points] or [1.0]
    rates = [r["flops"] / r["ms"] / 1e9 for pair in points for r in pair if r is not None] or [copy]
    low, high = min(intensities) / 2.5, max(*intensities, peak / copy) * 3
    xs = [low, peak / copy, high]
    axes.plot(xs, [min(x * copy, peak) for x in xs], color="#323f4b", lw=1.6, zorder=1)
    axes.fill_between(xs, [min(x * copy, peak) for x in xs], 1e9, color="#f5f7fa", zorder=0)
    if len(ops) <= 9:
        colours = [f"C{i}" for i in range(10) if i != 7]  # grey is for the legend
    else:  # a hue for each, neighbours in the legend far apart, dark enough on white
        hues = [(i * 0.618034) % 1 for i in range(len(ops))]
        colours = [to_hex(colorsys.hsv_to_rgb(hue, 0.85, (0.85, 0.6)[i % 2])) for i, hue in enumerate(hues)]
    for ours, best in points:
        colour = colours[ops.index(ours["op"])]
        x, marker = ours["flops"] / ours["bytes"], MARKERS[ours["pass"]]
        y = ours["flops"] / ours["ms"] / 1e9
        if best is not None:
            theirs = best["flops"] / best["ms"] / 1e9
            axes.plot([x, x], [theirs, y], color=colour, lw=0.8, zorder=2)
            axes.scatter(
                x, theirs, s=40, marker=marker, facecolors="white", edgecolors=colour, linewidths=1.2, zorder=3
            )
        axes.scatter(x, y, s=44, marker=marker, color=colour, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(rates) / 2, peak * 2)
    axes.set_xlabel("arithmetic intensity: flops for each compulsory byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(which="major", color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.text(peak / copy * 1.1, peak * 1.08, f"{peak:.0f} TFLOP/s", size=9, color="#323f4b", va="bottom")
    anchor = (low * peak / copy) ** 0.5
    axes.text(
        anchor,
        anchor * copy * 1.15,
        f"{copy:.2f} TB/s",
        size=9,
        color="#323f4b",
        rotation=_angle(axes, figure),
        rotation_mode="anchor",
        ha="center",
        va="bottom",
    )
    passes = [p for p in MARKERS if any(ours["pass"] == p for ours, _ in points)]
    grey = "#7b8794"
    handles = [Line2D([], [], marker="o", ls="", color=colours[i], label=op) for i, op in enumerate(ops)]
    handles += [Line2D([], [], marker=MARKERS[p], ls="", color=grey, label=p) for p in passes]
    handles.append(Line2D([], [], marker="o", ls="", markerfacecolor="white", color=grey, label="hollow: best peer"))
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9, ncols=columns
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle("Roofline: ours (filled) and the best peer (hollow)", x=0.02, y=0.985, ha="left", size=14)
    figure.text(0.02, 0.925, _subtitle(header), size=9, color="#52606d")
    figure.subplots_adjust(left=0.8 / (9.2 + right), right=9.2 / (9.2 + right), top=0.89, bottom=0.09)
    return figure


def _angle(axes: Any, figure: Any) -> float:
    """Slope of the bandwidth roof on the page, in degrees."""
    import math

    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    width, height = 9.2 - 0.8, figure.get_size_inches()[1] * (0.89 - 0.09)
    return math.degrees(math.atan2(height / math.log10(y1 / y0), width / math.log10(x1 / x0)))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the charts of one record."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m bench.plot RECORD.json", file=sys.stderr)
        return 2
    try:
        for path in draw(record.load(arguments[0]), Path(arguments[0]).with_suffix("")):
            print(f"written: {path}")
    except record.RecordError as error:
        print(f"bench.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
