"""The figures of a lesson, drawn from its record, so that they look the same on the GPU and wherever the record is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
OURS, SHIPPED, OTHERS = "#d1495b", "#0072b2", "#6b778d"
# distinct also for readers who see few hues (after Okabe and Ito), red first
PALETTE = ("#d1495b", "#0072b2", "#009e73", "#e69f00", "#8358a3", "#56b4e9", "#7a5c3e", "#4d4d4d")
MEASURES = {"tbps": "TB/s", "tflops": "TFLOP/s", "us": "microseconds", "fraction": "fraction of the limit"}
KINDS = {OURS: "this lesson's", SHIPPED: "the shipped op", OTHERS: "torch"}
LOG_FROM = 300.0  # the largest value over the smallest, from where a line would lie on the axis


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


def shipped(name: str) -> bool:
    """Whether a row or a line is of an op of this library, by its name."""
    return name.startswith("torch.ops.tt")


def _colour(row: Row) -> str:
    return SHIPPED if shipped(row["name"]) else OTHERS if row.get("baseline") else OURS


def _bars(axes: Any, rows: Sequence[Row], measure: str, limit: float | None, top: float) -> None:
    values = [row[measure] for row in rows]
    axes.barh(range(len(rows)), values, color=[_colour(row) for row in rows], height=0.68)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        text = f"{value:.2g}" if value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
        if row.get("fraction") is not None and measure != "fraction":
            percent = 100 * row["fraction"]
            text += f"  ({percent:.1f} %)" if percent < 1 else f"  ({percent:.0f} %)"
        # long bars carry their number at the left end, away from the line of the limit
        inside = value > 0.34 * top
        axes.text(
            (0.0 if inside else value) + 0.012 * top,
            place,
            text,
            va="center",
            color="white" if inside else INK,
            fontsize=10,
        )
    if limit:
        axes.axvline(limit, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            "measured limit",
            (limit, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            color=MUTED,
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.04 * top)
    axes.tick_params(axis="y", length=0)


def _finish(figure: Any, header: Row, rows: Sequence[Row], measure: str, path: Path) -> None:
    """What all figures of bars have below: the unit, whose bar is whose, the machine."""
    from matplotlib.patches import Patch

    unit = MEASURES.get(measure, measure)
    if measure != "fraction" and any(row.get("fraction") is not None for row in rows):
        unit += "  (in brackets: of the limit)"
    figure.axes[-1].set_xlabel(unit)
    colours = [colour for colour in KINDS if any(_colour(row) == colour for row in rows)]
    if len(colours) > 1:
        handles = [Patch(facecolor=colour, label=KINDS[colour]) for colour in colours]
        figure.legend(handles=handles, loc="lower left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.0)
    figure.supxlabel(machine(header), fontsize=8.5, color=MUTED, x=0.99, ha="right")
    figure.savefig(path)


def bars(
    rows: Sequence[Row], header: Row, title: str, path: Path, measure: str = "tbps", limit: float | None = None
) -> None:
    """One horizontal bar a row, in order from the top; grey is torch, blue the shipped op. `limit`: a line, in the measure."""
    plt = style()
    figure, axes = plt.subplots(figsize=(8.2, 1.6 + 0.42 * len(rows)), layout="constrained")
    _bars(axes, rows, measure, limit, max([*(row[measure] for row in rows), limit or 0.0]))
    axes.set_title(title, pad=18 if limit else 10)
    _finish(figure, header, rows, measure, path)
    plt.close(figure)


def panels(
    groups: Mapping[str, Sequence[Row]],
    header: Row,
    title: str,
    path: Path,
    measure: str = "tbps",
    limit: float | None = None,
) -> None:
    """The same bars for a few cases that are no series, one below the other on one scale. groups: case -> rows."""
    plt = style()
    most = max(len(rows) for rows in groups.values())
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8.2, 1.3 + (0.8 + 0.36 * most) * len(groups)), layout="constrained", squeeze=False
    )
    everything = [row for rows in groups.values() for row in rows]
    top = max([*(row[measure] for row in everything), limit or 0.0])
    for ax, (case, rows) in zip(axes[:, 0], groups.items(), strict=True):
        _bars(ax, rows, measure, limit, top)
        ax.set_title(case, fontsize=10.5, fontweight="normal", pad=6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _finish(figure, header, everything, measure, path)
    plt.close(figure)


def _places(ticks: Sequence[str]) -> list[int]:
    """Where the cases stand: powers of two by their exponent, anything else at even distances."""
    powers = [re.fullmatch(r"2\^(\d+)", tick) for tick in ticks]
    return [int(power[1]) for power in powers if power] if all(powers) else list(range(len(ticks)))


def lines(
    series: Mapping[str, Sequence[tuple[str, float]]],
    header: Row,
    title: str,
    path: Path,
    measure: str = "tbps",
    xlabel: str = "",
    baselines: Sequence[str] = (),
    limit: float | None = None,
) -> None:
    """One line for each series over the same cases, in order. Series in `baselines` are dashed. `limit`: in the measure."""
    plt = style()
    figure, axes = plt.subplots(figsize=(9.4, 4.6), layout="constrained")
    longest_first = sorted(series.values(), key=len, reverse=True)  # where a point is missing, the order is not
    ticks = list(dict.fromkeys(case for points in longest_first for case, _ in points))
    place = dict(zip(ticks, _places(ticks), strict=True))
    ours = [name for name in series if name not in baselines]
    hues = dict(
        zip(reversed(ours), PALETTE * (1 + len(ours) // len(PALETTE)), strict=False)
    )  # the last one, the best, is red
    greys = dict(zip(baselines, (MUTED, INK, "#a3adbd") * (1 + len(baselines) // 3), strict=False))
    for name, points in series.items():
        dashed = name in baselines
        axes.plot(
            [place[case] for case, _ in points],
            [value for _, value in points],
            label=name,
            color=greys[name] if dashed else hues[name],
            linestyle=(0, (5, 2)) if dashed else "-",
            marker="o",
            markersize=5.5 if dashed else 4.5,
            markerfacecolor="white" if dashed else None,
            linewidth=1.6 if dashed else 2,
            zorder=4 if dashed else 3,  # what is compared with is seen where it is equalled
        )
    if limit:
        axes.axhline(limit, color=INK, linestyle=":", linewidth=1.2, label="measured limit", zorder=2)
    values = [value for points in series.values() for _, value in points if value > 0]
    if values and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(list(place.values()), ticks)
    axes.margins(x=0.06)
    axes.set_ylabel(MEASURES.get(measure, measure))
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.set_title(title, pad=12)
    if len(series) + bool(limit) > 1:
        figure.legend(loc="outside right upper", frameon=False, fontsize=10)
    figure.supxlabel(machine(header), fontsize=8.5, color=MUTED, x=0.99, ha="right")
    figure.savefig(path)
    plt.close(figure)
