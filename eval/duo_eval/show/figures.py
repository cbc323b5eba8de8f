"""Figures of evaluations, drawn with matplotlib: arrays in, `Figure` out. Knows no files, no tasks and no pyplot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duo_eval.show.curves import Chart, Line, Panel
from duo_eval.show.style import Style, style_of, styles_of
from duo_eval.stats.intervals import Estimate

# With more lengths than this, numbers in cells would be unreadable.
MOST_NUMBERS = 14
MOST_TICKS = 7
MOST_COLUMNS = 2
# Points that are nearer than this fraction of the axis would hide each other: they are drawn so many points apart.
NEAR = 0.025
APART = 5.0


@dataclass(frozen=True, eq=False)
class Map:
    """Scores of depths by lengths, from 0 to 1, NaN where nothing was asked; and the title above them."""

    title: str
    scores: Float[np.ndarray, "D L"]


def heatmaps(
    rows: Sequence[Sequence[Map | None]], lengths: Sequence[int], depths: Sequence[float], title: str
) -> Figure:
    """Rows of maps, all on one scale from 0 to 1; NaN is grey, and nothing is drawn at None."""
    columns = max(len(row) for row in rows)
    wide, high = max(3.2, 0.42 * len(lengths) + 1.0), max(2.4, 0.22 * len(depths) + 0.8)
    figure = Figure(figsize=(columns * wide + 1.0, len(rows) * high + 1.0), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    filled = [[*row, *[None] * (columns - len(row))] for row in rows]
    some = max(1, len(depths) // 10)
    image: Any = None
    for (row, column), axes in np.ndenumerate(grid):
        drawn = filled[row][column]
        if drawn is None:
            axes.set_axis_off()
            continue
        image = axes.imshow(drawn.scores, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto", interpolation="nearest")
        axes.set_facecolor("#d0d0d0")
        axes.set_title(drawn.title, fontsize=10, parse_math=False)
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], rotation=45, fontsize=8)
        axes.set_yticks(range(0, len(depths), some), [f"{100 * depth:.0f}" for depth in depths[::some]], fontsize=8)
        is_lowest = row + 1 == len(rows) or filled[row + 1][column] is None
        is_leftmost = column == 0 or filled[row][column - 1] is None
        axes.tick_params(labelbottom=is_lowest, labelleft=is_leftmost)
        axes.set(xlabel="tokens" if is_lowest else "", ylabel="depth in %" if is_leftmost else "")
        if len(lengths) <= MOST_NUMBERS:
            _numbers(axes, drawn.scores)
    figure.suptitle(title, fontsize=10, parse_math=False)
    shrink = max(0.25, 1 / len(rows))
    figure.colorbar(image, ax=grid, label="score", ticks=[0, 0.5, 1], aspect=20, pad=0.02, shrink=shrink, anchor=(0, 1))
    return figure


def lines_figure(chart: Chart, panels: Sequence[Panel], *, title: str = "") -> Figure:
    """Panels of a chart, all with the same axes and one legend; a single one is narrow enough for a phone.

    Points at about the same x are drawn side by side with their intervals, in the order of the lines, which the legend
    states. The x axis is logarithmic if it shows tokens over more than a factor of 8, the y axis if values span more
    than a factor of 50.
    """
    alone = len(panels) == 1
    columns = min(len(panels), MOST_COLUMNS)
    rows = -(-len(panels) // columns)
    named = {line.name: line for panel in panels for line in panel.lines}
    measured = {name: line for name, line in named.items() if not line.is_floor}
    given = styles_of([line.method or line.name for line in measured.values()])
    styles = {name: line.style or style for (name, line), style in zip(measured.items(), given, strict=True)}
    size = (4.6, 3.5 + 0.1 * len(named)) if alone else (5.6 * columns, 3.4 * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for unused in grid.flat[len(panels) :]:
        unused.set_axis_off()
    first = grid.flat[0]
    _scale(first, chart, panels)
    width = 72 * (size[0] / columns - 0.8)  # Of a panel, about, in points.
    handles: dict[str, Any] = {}
    moved = [_draw(axes, panel, styles, handles, width) for axes, panel in zip(grid.flat, panels, strict=False)]
    for at, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.set_title(panel.title, fontsize=10, parse_math=False)
        axes.set_xlabel(chart.x if at + columns >= len(panels) else "")
        axes.set_ylabel(chart.y if at % columns == 0 else "")
        axes.tick_params(labelbottom=at + columns >= len(panels))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    notes = [chart.intervals] if any(line.low is not None for panel in panels for line in panel.lines) else []
    notes += ["points at about the same x are side by side"] if any(moved) else []
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9, "title_fontsize": 9}
    place |= {"ncols": 2 if alone else min(5, len(handles)), "title": "; ".join(notes)}
    legend = figure.legend(handles.values(), list(handles), **place)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _scale(axes: Axes, chart: Chart, panels: Sequence[Panel]) -> None:
    """The axes that all panels share: scales, limits and ticks."""
    levels = [panel.level for panel in panels if panel.level is not None]
    lines = [line for panel in panels for line in panel.lines] or levels  # Full attention may be the only method.
    x, y = (np.concatenate([np.asarray(getattr(line, name), float) for line in lines]) for name in "xy")
    if chart.x_is_tokens and x.min() > 0 and x.max() > 8 * x.min():
        axes.set_xscale("log")
        # Ticks at the points, not at powers of ten.
        ticks = np.unique(x)[:: -(-len(np.unique(x)) // MOST_TICKS)]
        axes.set_xticks(ticks, [_tokens(int(tick)) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(x.min() * 0.85, x.max() / 0.85)
    elif chart.is_percent and not chart.x_is_tokens:
        axes.set_xlim(0, 104)
    else:
        edge = 0.06 * (float(np.ptp(x)) or 1.0)
        axes.set_xlim(x.min() - edge, x.max() + edge)
    if chart.is_percent:
        axes.set_ylim(0, 103)
    elif y.min() > 0 and y.max() > 50 * y.min():
        axes.set_yscale("log")
    else:
        intervals = [end for line in lines for end in (line.low, line.high) if end is not None]
        ends = np.concatenate([y, *intervals, *(level.y for level in levels)])
        if ends.min() >= 0:
            axes.set_ylim(0, 1.06 * float(ends.max()) or 1.0)


def _draw(axes: Axes, panel: Panel, styles: Mapping[str, Style], handles: dict[str, Any], width: float) -> bool:
    """Draw the lines and the level of a panel, note new names for the legend; whether points were moved."""
    style, moved = style_of(""), False
    apart = [line for line in panel.lines if line.low is not None]
    beside = _side_by_side(axes, apart, APART / width)
    for line in panel.lines:
        order = np.argsort(line.x)
        at, values = np.asarray(line.x, float)[order], np.asarray(line.y, float)[order]
        if line.is_floor:
            (drawn,) = axes.plot(at, values, color=style.colour, linestyle="--", linewidth=1.0)
            handles.setdefault(line.name, drawn)
            continue
        style = styles[line.name]
        if line in apart:
            at = beside[line][order]
            moved |= not np.array_equal(at, np.asarray(line.x, float)[order])
        (drawn,) = axes.plot(
            at,
            values,
            color=style.colour,
            linestyle=style.pattern,
            linewidth=1.4,
            marker=style.marker,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        handles.setdefault(line.name, drawn)
        if line.low is not None and line.high is not None:
            low, high = np.asarray(line.low, float)[order], np.asarray(line.high, float)[order]
            axes.vlines(at, low, high, colors=style.colour, linewidths=1.1, alpha=0.7)
    if (level := panel.level) is not None:
        colour = style_of(level.name).colour
        drawn = axes.axhline(level.y[0], color=colour, linewidth=1.4, linestyle=":")
        handles.setdefault(level.name, drawn)
        if level.low is not None and level.high is not None:
            axes.axhspan(level.low[0], level.high[0], color=colour, alpha=0.12, linewidth=0)
    return moved


def _side_by_side(axes: Axes, lines: Sequence[Line], step: float) -> dict[Line, Float[np.ndarray, "S"]]:
    """Where to draw points, which would hide each other at the same x; `step` is a fraction of the axis."""
    logarithmic, limits = axes.get_xscale() == "log", np.asarray(axes.get_xlim())
    low, high = np.log(limits) if logarithmic else limits
    points = [(x, line, index) for line in lines for index, x in enumerate(line.x)]
    groups: list[list[tuple[float, Line, int]]] = []
    for x, line, index in sorted(points, key=lambda point: point[0]):
        place = (float(np.log(x) if logarithmic else x) - low) / (high - low)
        if not groups or place - groups[-1][-1][0] > NEAR:
            groups.append([])
        groups[-1].append((place, line, index))
    beside = {line: np.asarray(line.x, float) for line in lines}
    for group in groups:
        members = [line for line in lines if any(line is other for _, other, _ in group)]
        if len(members) > 1:
            middle = np.mean([place for place, _, _ in group])
            for _, line, index in group:
                place = low + (high - low) * (middle + step * (members.index(line) - (len(members) - 1) / 2))
                beside[line][index] = np.exp(place) if logarithmic else place
    return beside


def dots_figure(groups: Mapping[str, Mapping[str, Estimate]], *, labels: Mapping[str, str], x: str) -> Figure:
    """Estimates in percent with their intervals, a row each, under the names of their groups; narrow as a phone.

    Args:
        groups: estimates by method, by group.
        labels: of the methods.
        x: label of the axis.
    """
    rows = [(group, method) for group, estimates in groups.items() for method in ("", *estimates)]
    figure = Figure(figsize=(4.6, 0.6 + 0.19 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (group, method) in enumerate(rows):
        if not method:
            axes.text(-2, row, group, ha="left", va="center", fontsize=8, weight="bold", parse_math=False)
            continue
        style, estimate = style_of(method), groups[group][method]
        axes.hlines(row, estimate.low, estimate.high, colors=style.colour, linewidths=1.2)
        axes.plot(estimate.mean, row, marker=style.marker, color=style.colour, markersize=5)
    shown = [labels[method] if method else "" for _, method in rows]
    axes.set_yticks(range(len(rows)), shown, fontsize=8, parse_math=False)
    axes.set(xlabel=x, xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6))
    axes.tick_params(left=False)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _numbers(axes: Axes, scores: Float[np.ndarray, "D L"]) -> None:
    for (row, column), score in np.ndenumerate(scores):
        if np.isfinite(score):
            colour = "black" if 0.15 < score < 0.85 else "white"
            axes.text(column, row, f"{score:.2g}", ha="center", va="center", fontsize=6, color=colour)


def _tokens(length: int) -> str:
    """1024 as 1k, 80000 as 80k."""
    for unit, name in ((1024, "Ki"), (1000, "k")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length / 1000:.0f}k" if length >= 10_000 else f"{length:,}"
