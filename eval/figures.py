"""Figures of evaluations, drawn with matplotlib: arrays in, `Figure` out. Knows no files, no tasks and no pyplot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Beyond, numbers in cells would not be readable.
MOST_NUMBERS = 14
COLUMNS = 3


def heatmaps(
    maps: Sequence[Mapping[str, Float[np.ndarray, "D L"]]], lengths: Sequence[int], depths: Sequence[float], title: str
) -> Figure:
    """Maps of scores, depths by lengths, all on one scale from 0 to 1; what is NaN stays grey.

    Maps that belong together share a row; where none do, rows are filled up.
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
