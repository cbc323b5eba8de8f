"""Figures of evaluations, drawn with matplotlib: arrays in, `Figure` out. Knows no files, no tasks and no pyplot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from duo_eval.show.curves import Line
from duo_eval.show.style import style_of, styles_of
from duo_eval.stats.intervals import Estimate

# With more lengths than this, numbers in cells would be unreadable.
MOST_NUMBERS = 14
MOST_TICKS = 7
# Intervals of points whose x differ by less than this fraction would hide each other: they are so many points apart.
NEAR = 0.03
APART = 2.5


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


def lines_figure(
    lines: Sequence[Line], *, title: str, x: str, y: str, level: Line | None = None, x_is_tokens: bool = False
) -> Figure:
    """Lines with intervals, narrow enough for a phone; `level` is one value for all x, with its interval as a band.

    Points are at their values. Intervals of points at about the same x are drawn side by side, in the order of the
    lines, and the legend says so. The x axis is logarithmic if it shows tokens over more than a factor of 8, the y
    axis if values span more than a factor of 50.
    """
    figure = Figure(figsize=(4.6, 3.5 + 0.1 * len(lines)), layout="constrained")
    axes = figure.subplots()
    measured = [line for line in lines if not line.is_floor]
    styles = dict(zip(measured, styles_of([line.method or line.name for line in measured]), strict=True))
    with_intervals = [line for line in measured if line.low is not None]
    style, are_moved = style_of(""), False
    for line in lines:
        order = np.argsort(line.x)
        at, values = np.asarray(line.x, float)[order], np.asarray(line.y, float)[order]
        if line.is_floor:
            axes.plot(at, values, color=style.colour, linestyle="--", linewidth=1.0, label=line.name)
            continue
        style = line.style or styles[line]
        # Markers that one can see through: methods with the same value stay visible.
        points: dict[str, Any] = {"marker": style.marker, "markersize": 5, "markerfacecolor": (style.colour, 0.35)}
        axes.plot(at, values, color=style.colour, linestyle=style.pattern, linewidth=1.4, label=line.name, **points)
        if line.low is not None and line.high is not None:
            low, high = np.asarray(line.low, float)[order], np.asarray(line.high, float)[order]
            for place, bottom, top in zip(at, low, high, strict=True):
                offset = _offset(line, place, with_intervals)
                are_moved |= offset != 0
                moved = axes.transData + ScaledTranslation(offset / 72, 0, figure.dpi_scale_trans)
                axes.vlines(place, bottom, top, colors=style.colour, linewidths=0.9, alpha=0.8, transform=moved)
            # Artists with a transform of their own do not count for the limits.
            axes.update_datalim(np.column_stack([[*at, *at], [*low, *high]]))
    axes.autoscale_view()
    if level is not None:
        colour = style_of(level.name).colour
        axes.axhline(level.y[0], color=colour, linewidth=1.4, linestyle=":", label=level.name)
        if level.low is not None and level.high is not None:
            axes.axhspan(level.low[0], level.high[0], color=colour, alpha=0.12, linewidth=0)
    x_values, y_values = (np.concatenate(parts) for parts in ([line.x for line in lines], [line.y for line in lines]))
    if x_is_tokens and x_values.min() > 0 and x_values.max() > 8 * x_values.min():
        axes.set_xscale("log")
        # Ticks at the points, not at powers of ten.
        ticks = np.unique(x_values)[:: -(-len(np.unique(x_values)) // MOST_TICKS)]
        axes.set_xticks(ticks, [_tokens(int(tick)) for tick in ticks])
        axes.set_xticks([], minor=True)
    if y_values.min() > 0 and y_values.max() > 50 * y_values.min():
        axes.set_yscale("log")
    elif y_values.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    note = "95 % intervals; those of neighbouring points are side by side" if are_moved else None
    place = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend(**place, fontsize=8, title=note, title_fontsize=8)
    return figure


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


def _offset(line: Line, x: float, others: Sequence[Line]) -> float:
    """By how many points the interval at `x` is moved to the right, given all lines with intervals."""
    near = [other for other in others if any(abs(x - at) <= NEAR * max(abs(x), abs(at)) for at in other.x)]
    return APART * (near.index(line) - (len(near) - 1) / 2)


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
