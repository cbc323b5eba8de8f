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
    maps: Mapping[str, Float[np.ndarray, "D L"]], lengths: Sequence[int], depths: Sequence[float], title: str
) -> Figure:
    """A map of scores for each name, depths by lengths, all on one scale from 0 to 1; NaN is left grey."""
    columns = min(len(maps), COLUMNS)
    rows = -(-len(maps) // columns)
    wide = max(3.2, 0.42 * len(lengths) + 1.0)
    high = max(2.2, 0.22 * len(depths) + 1.0)
    figure = Figure(figsize=(columns * wide + 1.0, rows * high + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for axes, (name, scores) in zip(grid.flat, maps.items(), strict=False):
        axes.set_facecolor("#d0d0d0")
        image = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto", interpolation="nearest")
        mean = f"{np.nanmean(scores):.2f}" if np.isfinite(scores).any() else "nothing yet"
        axes.set_title(f"{name}: {mean}", fontsize=10, parse_math=False)
        if len(lengths) <= MOST_NUMBERS:
            _numbers(axes, scores)
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    every = max(1, len(depths) // 10)
    for index, axes in enumerate(grid.flat[: len(maps)]):
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], rotation=45, fontsize=8)
        axes.set_yticks(range(0, len(depths), every), [f"{100 * depth:.0f}" for depth in depths[::every]], fontsize=8)
        # Below it there may be no map.
        axes.tick_params(labelbottom=index + columns >= len(maps))
        if index + columns >= len(maps):
            axes.set_xlabel("tokens")
        if index % columns == 0:
            axes.set_ylabel("depth in %")
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=grid, label="score", ticks=[0, 0.5, 1], aspect=30, pad=0.02)
    return figure


def _numbers(axes: Axes, scores: Float[np.ndarray, "D L"]) -> None:
    for (row, column), score in np.ndenumerate(scores):
        if np.isfinite(score):
            colour = "black" if 0.15 < score < 0.85 else "white"
            axes.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=6, color=colour)


def _tokens(length: int) -> str:
    """1024 as 1k, 80000 as 80k."""
    for unit, name in ((1024, "Ki"), (1000, "k")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length / 1000:.0f}k" if length >= 10_000 else f"{length:,}"
