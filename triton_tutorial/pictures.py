"""Which addresses each program of a launch touches, in words and as a picture. Traces come from `interpreted.tracing`.

A cell is one element of memory, in the order of its addresses: from left to right, then down. The pictures say nothing
about speed, and nothing about coalescing within a warp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_tutorial import interpreted
from triton_tutorial.interpreted import Access, LaunchTrace

Program = tuple[int, int, int]
VIEWS = ("program", "step", "touches")
MAX_ELEMENTS = 16384  # of one tensor: cells smaller than that cannot be seen
TRIED_SAMPLES = 8  # of an op, to find one with a few programs
MAX_ROWS = 64  # of one tensor, where its shape leaves the choice

_UNTOUCHED, _GRID, _WRONG = "#eef0f3", "#ffffff", "#b00020"
_VERBS = {"load": "read", "store": "written", "atomic": "updated"}


# --------------------------------------------------------------------------------------------------------------------
# In words
# --------------------------------------------------------------------------------------------------------------------


def describe(traces: Sequence[LaunchTrace], programs: int = 4) -> str:
    """For each launch and tensor: bytes asked for, distinct bytes, how often each is reused, which elements whose."""
    import numpy as np

    text = []
    for trace in traces:
        text.append(f"{trace.kernel}, grid {_tuple(trace.grid)}")
        requested = compulsory = 0
        for name in trace.shapes:
            for kind in ("load", "store", "atomic"):
                accesses = [a for a in trace.accesses if a.tensor == name and a.kind == kind]
                if not any(a.index.size or a.masked.size for a in accesses):
                    continue
                size = trace.itemsizes[name]
                asked = sum(a.index.size for a in accesses) * size
                distinct = len(np.unique(np.concatenate([a.index for a in accesses]))) * size
                requested, compulsory = requested + asked, compulsory + distinct
                off = sum(a.masked.size for a in accesses)
                line = f"  {name:<8} {_VERBS[kind]:<7} {asked} bytes asked for, {distinct} distinct"
                line += f" (each {asked / max(distinct, 1):.3g} times)" if asked != distinct else " (each once)"
                text.append(line + (f", {off} lanes masked off" if off else ""))
                owners = list(dict.fromkeys(a.program for a in accesses))
                for program in owners[:programs]:
                    mine = [a for a in accesses if a.program == program]
                    text.append(f"    program {_name(program, trace)}: {_ranges(mine)}")
                if len(owners) > programs:
                    text.append(f"    and {len(owners) - programs} programs more")
        if trace.flops:
            low, high = trace.flops / max(requested, 1), trace.flops / max(compulsory, 1)
            text.append(
                f"  {trace.flops} flops of tl.dot: {low:.2f} a byte without any cache, {high:.2f} with a perfect one"
            )
    return "\n".join(text)


def _ranges(accesses: Sequence[Access], limit: int = 3) -> str:
    import numpy as np

    index = np.unique(np.concatenate([a.index for a in accesses]))
    if index.size == 0:
        return "nothing: every lane is masked off"
    steps = np.diff(index)
    if index.size > 2 and (steps == steps[0]).all() and steps[0] > 1:
        return f"elements {index[0]}, {index[1]}, .. {index[-1]} (every {steps[0]}th)"
    cuts = np.flatnonzero(steps != 1)
    starts, ends = index[np.r_[0, cuts + 1]], index[np.r_[cuts, index.size - 1]]
    parts = [f"{a}..{b}" if a != b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    more = f", and {len(parts) - limit} ranges more" if len(parts) > limit else ""
    return "elements " + ", ".join(parts[:limit]) + more


def _name(program: Program, trace: LaunchTrace) -> str:
    """A program as its grid writes it: (3, 0, 0) of a grid (4,) is 3."""
    ids = program[: max(1, len(trace.grid))]
    while len(ids) > 1 and len(ids) == len(trace.grid) and trace.grid[-1] == 1 and len(trace.grid) > 1:
        ids, trace = ids[:-1], _shorter(trace)
    return str(ids[0]) if len(ids) == 1 else f"({', '.join(map(str, ids))})"


def _shorter(trace: LaunchTrace) -> LaunchTrace:
    return LaunchTrace(trace.kernel, trace.grid[:-1])


def _tuple(grid: Sequence[int]) -> str:
    return f"({grid[0]},)" if len(grid) == 1 else f"({', '.join(map(str, grid))})"


# --------------------------------------------------------------------------------------------------------------------
# As a picture
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Panel:
    """One tensor of one launch, in rows of `columns` consecutive elements."""

    name: str
    verbs: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # where it is not contiguous
    columns: int
    rows: int  # of the tensor and, below, of the lanes that point behind its end
    numel: int  # elements from the first to the last, as memory has them
    keys: dict[int, tuple[Any, ...]]  # element -> what colours it
    off: dict[int, Any]  # element behind the end -> the program whose lane is masked off there
    wrong: set[int]  # elements outside the tensor that were touched


def draw(
    traces: Sequence[LaunchTrace],
    path: str | Path,
    title: str,
    *,
    view: str = "program",
    program: Program | None = None,
    tensors: Sequence[str] = (),
    columns: int = 32,
    launch: int = 0,
) -> None:
    """Draw one launch to `path`, a PNG.

    view: "program" colours an element by the programs that touch it, "step" by the order in which one `program` (the first,
    if none is given) comes to it, "touches" by how often it is touched. tensors: which, in that order; all if empty.
    columns: elements in a row of a tensor that is no matrix. launch: which of the traces.
    """
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}; allowed: {', '.join(VIEWS)}")
    trace = traces[launch]
    focus = program or (trace.accesses[0].program if trace.accesses else (0, 0, 0))
    panels = [_panel(trace, name, view, focus, columns) for name in tensors or trace.shapes]
    panels = [panel for panel in panels if panel.keys or panel.wrong]
    if not panels:
        raise ValueError(f"{trace.kernel} touched none of its tensors")
    _paint(panels, trace, path, title, view, focus)


def draw_op(op: str, path: str | Path, dtype: Any = None) -> str:
    """The address picture of a registered op at one of its own small samples; returns the same in words.

    `op`: "tt::softmax" or "softmax". Raises KeyError for an op that is not registered.
    """
    import torch

    from torch_triton_ops import registry
    from torch_triton_ops.testing import samples_of

    name = op.removeprefix("tt::")
    spec = next((s for s in registry.specs() if s.name == name), None)
    if spec is None:
        raise KeyError(f"no op '{op}'; registered: {', '.join(s.name for s in registry.specs())}")
    torch.manual_seed(0)
    samples = samples_of(spec, "cpu", dtype or spec.dtypes[0])

    def elements(sample: Any) -> int:
        return max((a.numel() for a in sample.args if isinstance(a, torch.Tensor)), default=0)

    def plain(sample: Any) -> bool:
        return all(a.is_contiguous() for a in sample.args if isinstance(a, torch.Tensor))

    small = [s for s in samples if 0 < elements(s) <= 1024 and not s.slow_in_interpreter] or samples[:1]
    small.sort(key=lambda s: (plain(s), elements(s)), reverse=True)
    best: tuple[int, Any, list[LaunchTrace]] | None = None
    for sample in small[:TRIED_SAMPLES]:
        with interpreted.tracing() as traces, torch.no_grad():
            interpreted.call_op(name, *sample.args, **sample.kwargs)
        programs = len({access.program for trace in traces[:1] for access in trace.accesses})
        if programs and (best is None or best[0] < programs <= 12 or best[0] > 12 > programs > 1):
            best = (programs, sample, traces)
    if best is None:
        raise ValueError(f"tt::{name} launches no kernel on its small samples")
    _, sample, traces = best
    draw(traces, path, f"tt::{name}, {sample.id}: {traces[0].kernel}, grid {_tuple(traces[0].grid)}")
    return describe(traces)


def _panel(trace: LaunchTrace, name: str, view: str, focus: Program, columns: int) -> _Panel:
    shape, strides = trace.shapes[name], trace.strides[name]
    numel = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
    if numel > MAX_ELEMENTS:
        raise ValueError(f"{name} spans {numel} elements; a picture shows at most {MAX_ELEMENTS}: use a smaller input")
    accesses = [a for a in trace.accesses if a.tensor == name]
    inner = [s for n, s in zip(shape, strides, strict=True) if n > 1 and s > 1]
    if inner and 2 <= min(inner) <= 128:
        columns = min(inner)  # a row of the picture is a row of the matrix
        rows = MAX_ROWS if columns >= 12 else MAX_ROWS // 3
        if numel > rows * columns:  # or several
            columns *= max(1, min(-(-numel // (columns * rows)), 128 // columns))
    elif numel < columns:
        columns = numel
    else:
        while numel > MAX_ROWS * columns and columns < 128:
            columns *= 2
    touched: dict[int, dict[Any, int]] = {}
    off: dict[int, Any] = {}
    step = 0
    for access in accesses:
        if view == "step" and access.program != focus:
            continue
        key = step if view == "step" else access.program
        for element in access.index.tolist():
            counts = touched.setdefault(element, {})
            counts[key] = counts.get(key, 0) + 1
        for element in access.masked.tolist():
            if numel <= element < numel + columns and view == "program":
                off.setdefault(element, access.program)
        step += 1
    wrong = {e for e in touched if not 0 <= e < numel}
    inside = {e: counts for e, counts in touched.items() if e not in wrong}
    keys: dict[int, tuple[Any, ...]] = {}
    for element, counts in inside.items():
        if view == "touches":
            keys[element] = (sum(counts.values()),)
        else:
            keys[element] = tuple(sorted(counts)) if view == "program" else (min(counts),)
    last = max([numel - 1, *off, *(e for e in wrong if e < numel + 4 * columns)])
    verbs = " and ".join(dict.fromkeys(_VERBS[a.kind] for a in accesses))
    contiguous, run = True, 1
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        contiguous, run = contiguous and (n == 1 or s == run), run * n
    return _Panel(
        name, verbs, shape, () if contiguous else strides, columns, last // columns + 1, numel, keys, off, wrong
    )


def _paint(
    panels: Sequence[_Panel], trace: LaunchTrace, path: str | Path, title: str, view: str, focus: Program
) -> None:
    from matplotlib.patches import Patch

    from triton_tutorial import charts

    plt = charts.style()
    values = sorted({key for panel in panels for key in panel.keys.values()}, key=lambda key: (len(key), key))
    idle = {(program,) for panel in panels for program in panel.off.values()} - set(
        values
    )  # all of whose lanes are masked
    colour = _colours([*values, *sorted(idle)], view)
    side_by_side = sum(p.columns for p in panels) <= 200 and max(p.rows for p in panels) > 8
    widest, tallest = max(p.columns for p in panels), max(p.rows for p in panels)
    cell = max(0.06, min(0.24, 9.4 / (sum(p.columns for p in panels) if side_by_side else widest)))
    if side_by_side:
        width, height = cell * sum(p.columns for p in panels) + 1.0 * len(panels), cell * tallest + 1.0
        grid: dict[str, Any] = {"nrows": 1, "ncols": len(panels), "width_ratios": [p.columns for p in panels]}
    else:
        width, height = cell * widest + 1.6, cell * sum(p.rows for p in panels) + 0.72 * len(panels)
        grid = {"nrows": len(panels), "ncols": 1, "height_ratios": [p.rows for p in panels]}
    ratios = {k: grid.pop(k) for k in ("width_ratios", "height_ratios") if k in grid}
    handles = _legend(values, colour, trace, view, Patch)
    if view == "program" and any("*" in _key_name(key, trace, view) for key in values):
        handles.append(Patch(facecolor="none", edgecolor="none", label="*: every id"))
    if any(p.off for p in panels):
        handles.append(Patch(facecolor="white", edgecolor=charts.MUTED, hatch="////", label="lane masked off"))
    if any(p.wrong for p in panels):
        handles.append(Patch(facecolor="white", edgecolor=_WRONG, linewidth=2, label="outside the tensor"))
    width = max(width, 6.4)
    per_row = max(1, int(width / (0.55 + 0.085 * max((len(h.get_label()) for h in handles), default=1))))
    legend_rows = -(-len(handles) // per_row)
    figure, axes = plt.subplots(
        figsize=(width, height + 0.75 + 0.26 * legend_rows),
        squeeze=False,
        layout="constrained",
        gridspec_kw=ratios,
        **grid,
    )
    for panel, ax in zip(panels, axes.ravel(), strict=True):
        ax.set_anchor("NW")
        _paint_panel(ax, panel, colour, trace, view, cell)
    size = min(13.0, 72 * width / (0.66 * len(title)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=size, fontweight="bold")
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=min(per_row, len(handles)),
            frameon=False,
            fontsize=9.5,
            handlelength=1.2,
            columnspacing=1.4,
        )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _paint_panel(
    ax: Any, panel: _Panel, colour: Callable[[Any], Any], trace: LaunchTrace, view: str, cell: float
) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    from triton_tutorial import charts

    image = np.ones((panel.rows, panel.columns, 3))
    flat = image.reshape(-1, 3)
    flat[: panel.numel] = to_rgb(_UNTOUCHED)
    for element, key in panel.keys.items():
        flat[element] = to_rgb(colour(key))
    ax.imshow(image, interpolation="nearest", aspect="equal")
    line = 0.8 if cell > 0.12 else 0.35
    # lines of one artist each: minor ticks would be an artist for every cell
    ax.vlines(np.arange(-0.5, panel.columns), -0.5, panel.rows - 0.5, color=_GRID, linewidth=line)
    ax.hlines(np.arange(-0.5, panel.rows), -0.5, panel.columns - 0.5, color=_GRID, linewidth=line)
    ax.tick_params(length=0, labelsize=8, colors=charts.MUTED, pad=2)
    for spine in ax.spines.values():
        spine.set_visible(False)
    every = next(g for g in (1, 2, 4, 8, 16, 32, 64) if g * cell > 0.18)
    ax.set_yticks(range(0, panel.rows, every), [str(r * panel.columns) for r in range(0, panel.rows, every)])
    gap = next(g for g in (1, 2, 4, 8, 16, 32, 64, 128) if g * cell > 0.42)
    ax.set_xticks(range(0, panel.columns, gap), [f"+{c}" if c else "0" for c in range(0, panel.columns, gap)])
    ax.xaxis.tick_top()
    shape = " x ".join(map(str, panel.shape)) or "scalar"
    if panel.strides:
        shape += f", strides {', '.join(map(str, panel.strides))}"
    ax.set_title(f"{panel.name}  ({panel.verbs}; {shape})", fontsize=10.5, fontweight="normal", pad=5)

    def box(element: int, **looks: Any) -> None:
        row, column = divmod(element, panel.columns)
        ax.add_patch(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, **looks))

    for element, program in panel.off.items():
        edge = colour((program,)) if view == "program" else charts.MUTED
        box(element, facecolor="white", edgecolor=edge, hatch="////", linewidth=0.7)
    for element in panel.wrong:
        if 0 <= element < panel.rows * panel.columns:
            box(element, facecolor="#ffd9dd", edgecolor=_WRONG, linewidth=1.6)
    if view == "touches":
        return
    for key in dict.fromkeys(panel.keys.values()):
        _label_region(ax, panel, key, _key_name(key, trace, view), cell, colour(key))


def _label_region(ax: Any, panel: _Panel, key: Any, text: str, cell: float, colour: Any) -> None:
    """The name of what touches a region, in the middle of it, if the region is one rectangle that can hold it."""
    import numpy as np
    from matplotlib.colors import to_rgb

    cells = np.array([divmod(e, panel.columns) for e, k in panel.keys.items() if k == key])
    (top, left), (bottom, right) = cells.min(axis=0), cells.max(axis=0)
    if (bottom - top + 1) * (right - left + 1) != len(cells):
        # rows of consecutive elements: the first one is named
        first = cells[cells[:, 0] == top]
        left, right, bottom = first[:, 1].min(), first[:, 1].max(), top
        if right - left + 1 != len(first):
            return
    wide, high = (right - left + 1) * cell * 72, (bottom - top + 1) * cell * 72
    size = min(10.0, 0.72 * high, wide / (0.62 * len(text)))
    if size >= 5:
        red, green, blue = to_rgb(colour)
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.58 else "#1f2933"
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}  # no grid line through a letter
        middle = ((left + right) / 2, (top + bottom) / 2)
        ax.text(*middle, text, ha="center", va="center", fontsize=size, color=ink, bbox=box)


def _key_name(key: tuple[Any, ...], trace: LaunchTrace, view: str) -> str:
    if view == "step":
        return f"{key[0] + 1}"
    if len(key) == 1:
        return _name(key[0], trace)
    # (0, 0), (0, 1), (0, 2) -> (0, *)
    ids = [tuple(p[: len(trace.grid)]) for p in key]
    parts = [str(column[0]) if len(set(column)) == 1 else "*" for column in zip(*ids, strict=True)]
    if len(parts) > 1:
        return f"({', '.join(parts)})"
    names = [str(i) for (i,) in ids]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) <= 4 else f"{len(names)} programs"


def _colours(values: Sequence[Any], view: str) -> Callable[[Any], Any]:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    from triton_tutorial.charts import MUTED, PALETTE

    scale = colormaps["viridis"]
    if view != "program":
        low, top = min(v[0] for v in values), max(v[0] for v in values)
        return lambda key: scale(0.12 + 0.74 * (key[0] - low) / max(1, top - low))
    programs = {program for key in values for program in key}
    rows, columns = (sorted({program[axis] for program in programs}) for axis in (0, 1))
    two = 1 < len(rows) <= len(PALETTE) and len(columns) > 1 and all(program[2] == 0 for program in programs)
    if two and (len(values) > len(PALETTE) or any(len(key) > 1 for key in values)):
        # a grid of two dimensions: the hue says the first id, the lightness the second, grey that it is every first id

        def shade(key: Any) -> Any:
            first, second = {p[0] for p in key}, {p[1] for p in key}
            base = to_rgb(PALETTE[rows.index(min(first))] if len(first) == 1 else MUTED)
            white = 0.6 * columns.index(min(second)) / (len(columns) - 1) if len(second) == 1 else 0.0
            return tuple(c + (1 - c) * white for c in base)

        return shade
    if len(values) <= len(PALETTE):
        table = dict(zip(values, PALETTE, strict=False))
        return lambda key: table.get(key, MUTED)
    # neighbours far apart, by the golden ratio, over the part of the scale that is not too light
    table = {v: scale(0.05 + 0.8 * ((0.618034 * i) % 1.0)) for i, v in enumerate(values)}
    return lambda key: table.get(key, MUTED)


def _legend(
    values: Sequence[Any], colour: Callable[[Any], Any], trace: LaunchTrace, view: str, patch: Any
) -> list[Any]:
    shown = [key for key in values if view != "program" or len(key) == 1]  # the others carry their names
    shown = shown if len(shown) <= 12 else []
    word = {"program": "program ", "step": "access ", "touches": "touched "}[view]
    handles = []
    for key in shown:
        name = f"{key[0]} times" if view == "touches" else _key_name(key, trace, view)
        label = f"{word}{name}".replace("touched 1 times", "touched once")
        handles.append(patch(facecolor=colour(key), label=label))
    return handles
