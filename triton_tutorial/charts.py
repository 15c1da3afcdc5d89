"""The figures of a lesson, drawn from its record, so that they look the same on the GPU and wherever the record is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
OURS, OTHERS = "#d1495b", "#8d99ae"
# distinct also for readers who see few hues (after Okabe and Ito), red first
PALETTE = ("#d1495b", "#0072b2", "#009e73", "#e69f00", "#8358a3", "#56b4e9", "#7a5c3e", "#4d4d4d")
MEASURES = {"tbps": "TB/s", "tflops": "TFLOP/s", "us": "microseconds", "fraction": "fraction of the limit"}


def style() -> Any:
    """pyplot, drawing to files, with the house's looks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "figure.facecolor": "white",
            "savefig.dpi": 150,
        }
    )
    return plt


def machine(header: Row) -> str:
    """The line under a figure: GPU and versions."""
    return f"{header['gpu']}, torch {header['torch']}, triton {header['triton']}, {header['date'][:10]}"


def bars(
    rows: Sequence[Row], header: Row, title: str, path: Path, measure: str = "tbps", limit: float | None = None
) -> None:
    """One horizontal bar a row, in order from the top; rows with `baseline` are grey. `limit`: a line, in the measure."""
    plt = style()
    figure, axes = plt.subplots(figsize=(8.2, 1.5 + 0.42 * len(rows)), layout="constrained")
    values = [row[measure] for row in rows]
    colours = [OTHERS if row.get("baseline") else OURS for row in rows]
    places = range(len(rows))
    axes.barh(places, values, color=colours, height=0.68)
    top = max([*values, limit or 0.0])
    for place, row, value in zip(places, rows, values, strict=True):
        text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
        if row.get("fraction") is not None and measure != "fraction":
            text += f"  ({100 * row['fraction']:.0f} %)"
        inside = value > 0.72 * top
        axes.text(
            value + (-0.012 if inside else 0.012) * top,
            place,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
            fontsize=10,
        )
    if limit:
        axes.axvline(limit, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.text(limit, -0.62, " measured limit", ha="right", va="bottom", fontsize=9, color=MUTED)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.04 * top)
    axes.set_xlabel(MEASURES.get(measure, measure))
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, pad=14)
    figure.supxlabel(machine(header), fontsize=8.5, color=MUTED, x=0.99, ha="right")
    figure.savefig(path)
    plt.close(figure)


def lines(
    series: Mapping[str, Sequence[tuple[str, float]]],
    header: Row,
    title: str,
    path: Path,
    measure: str = "tbps",
    xlabel: str = "",
    baselines: Sequence[str] = (),
) -> None:
    """One line for each series over the same cases, in order. Series in `baselines` are dashed."""
    plt = style()
    figure, axes = plt.subplots(figsize=(8.2, 4.6), layout="constrained")
    ticks = list(dict.fromkeys(case for points in series.values() for case, _ in points))
    ours = [name for name in series if name not in baselines]
    hues = dict(
        zip(reversed(ours), PALETTE * (1 + len(ours) // len(PALETTE)), strict=False)
    )  # the last one, the best, is red
    for i, (name, points) in enumerate(series.items()):
        xs, ys = [ticks.index(case) for case, _ in points], [value for _, value in points]
        dashed = name in baselines
        axes.plot(
            xs,
            ys,
            label=name,
            color=hues.get(name, (MUTED, INK, OTHERS)[i % 3]),
            linestyle=(0, (5, 2)) if dashed else "-",
            marker="o",
            markersize=4.5,
            linewidth=2,
        )
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(MEASURES.get(measure, measure))
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.set_title(title, pad=12)
    axes.legend(frameon=False, fontsize=10)
    figure.supxlabel(machine(header), fontsize=8.5, color=MUTED, x=0.99, ha="right")
    figure.savefig(path)
    plt.close(figure)
