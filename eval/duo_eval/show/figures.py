"""Figures of evaluations, drawn with matplotlib: arrays in, `Figure` out. Knows no files, no tasks and no pyplot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from duo_eval.show.curves import Line

# With more lengths than this, numbers in cells would be unreadable.
MOST_NUMBERS = 14
COLUMNS = 3
MOST_TICKS = 7
# Distinguishable with any colour vision, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#7570b3", "#56b4e9", "#a0522d")
MARKERS = "osD^vPX"  # One fewer than colours: a ninth line differs from the first in its marker.
# Offset in points between intervals of neighbouring lines, which would hide each other at the same x.
APART = 2.5


def heatmaps(
    maps: Sequence[Mapping[str, Float[np.ndarray, "D L"]]], lengths: Sequence[int], depths: Sequence[float], title: str
) -> Figure:
    """Maps of scores, depths by lengths, all on one scale from 0 to 1; NaN is grey.

    Each mapping is a row; mappings of one map each are packed into rows of `COLUMNS`.
    """
    if all(len(row) == 1 for row in maps):
        every = [item for row in maps for item in row.items()]
        maps = [dict(every[begin : begin + COLUMNS]) for begin in range(0, len(every), COLUMNS)]
    columns = max(len(row) for row in maps)
    wide, high = max(3.2, 0.42 * len(lengths) + 1.0), max(2.2, 0.22 * len(depths) + 0.6)
    figure = Figure(figsize=(columns * wide + 1.0, len(maps) * high + 1.0), layout="constrained")
    grid = figure.subplots(len(maps), columns, squeeze=False, sharex=True, sharey=True)
    some = max(1, len(depths) // 10)
    image: Any = None
    for row, named in enumerate(maps):
        for column, axes in enumerate(grid[row]):
            if column >= len(named):
                axes.set_axis_off()
                continue
            name, scores = list(named.items())[column]
            image = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto", interpolation="nearest")
            axes.set_facecolor("#d0d0d0")
            axes.set_title(f"{name}: {np.nanmean(scores):.2f}", fontsize=10, parse_math=False)
            axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], rotation=45, fontsize=8)
            axes.set_yticks(range(0, len(depths), some), [f"{100 * depth:.0f}" for depth in depths[::some]], fontsize=8)
            lowest = row + 1 == len(maps) or column >= len(maps[row + 1])
            axes.tick_params(labelbottom=lowest)
            axes.set(xlabel="tokens" if lowest else "", ylabel="" if column else "depth in %")
            if len(lengths) <= MOST_NUMBERS:
                _numbers(axes, scores)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=grid, label="score", ticks=[0, 0.5, 1], aspect=30, pad=0.02)
    return figure


def lines_figure(
    lines: Sequence[Line], *, title: str, x: str, y: str, level: Line | None = None, x_is_tokens: bool = False
) -> Figure:
    """Lines with intervals, narrow enough for a phone; `level` is one value for all x, with its interval as a band.

    Intervals at the same x are drawn side by side, in the order of the lines. The x axis is logarithmic if it shows
    tokens over more than a factor of 8, the y axis if values span more than a factor of 50.
    """
    figure = Figure(figsize=(4.6, 3.5 + 0.1 * len(lines)), layout="constrained")
    axes = figure.subplots()
    number, with_intervals = -1, [line for line in lines if line.low is not None]
    for line in lines:
        number += not line.is_floor
        order = np.argsort(line.x)
        values = np.asarray(line.y, float)[order]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": line.name, "linewidth": 1.4}
        if line.is_floor:
            axes.plot(np.asarray(line.x)[order], values, linestyle="--", **style | {"linewidth": 1.0})
            continue
        if line.low is not None and line.high is not None:
            ends = np.stack([values - np.asarray(line.low)[order], np.asarray(line.high)[order] - values])
            offset = APART * (with_intervals.index(line) - (len(with_intervals) - 1) / 2) / 72
            shift = ScaledTranslation(offset, 0, figure.dpi_scale_trans)
            style |= {"yerr": ends, "capsize": 2, "elinewidth": 0.8, "transform": axes.transData + shift}
            # Artists with a transform of their own do not count for the limits.
            axes.update_datalim(np.column_stack([[*line.x, *line.x], [*line.low, *line.high]]))
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(np.asarray(line.x, float)[order], values, marker=marker, markersize=4, **style)
    axes.autoscale_view()
    if level is not None:
        axes.axhline(level.y[0], color="#808080", linewidth=1.4, linestyle=":", label=level.name)
        if level.low is not None and level.high is not None:
            axes.axhspan(level.low[0], level.high[0], color="#808080", alpha=0.2, linewidth=0)
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
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
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
