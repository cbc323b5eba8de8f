"""Heat maps of patterns' gates, layers by KV heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

# Neutral: in figures of this project blue is retrieval, as the gates here, and orange is streaming.
DOT = "#222222"
# Where heads have no gate: in layers with a window of their own.
NO_GATE = "#bbbbbb"


@dataclass(frozen=True, eq=False)
class GateMap:
    """Gates of one pattern, NaN for heads without one; if `retrieval` is given, a dot marks each retrieval head."""

    gates: Float[np.ndarray, "L K"]
    retrieval: Bool[np.ndarray, "L K"] | None
    title: str


def gates_figure(gates: Float[np.ndarray, "L K"], retrieval: Bool[np.ndarray, "L K"] | None, title: str) -> Figure:
    """Gates of every KV head as colour, 0 to 1; if `retrieval` is given, a dot marks each retrieval head."""
    return gate_maps_figure([GateMap(gates, retrieval, title)])


def gate_maps_figure(maps: Sequence[GateMap]) -> Figure:
    """Gates of patterns of one shape on one scale, 0 to 1: side by side, or below each other if they are wide.

    Raises:
        ValueError: patterns of other shapes.
    """
    layers, heads = maps[0].gates.shape
    if any(each.gates.shape != (layers, heads) for each in maps):
        shapes = ", ".join("{} x {}".format(*each.gates.shape) for each in maps)
        raise ValueError(f"patterns must have the same layers x KV heads to be compared, got {shapes}")
    cell = float(np.clip(8.0 / layers, 0.1, 0.3))
    # With few heads, cells are up to twice as high as wide, so that the map is not a thin strip.
    high = cell * float(np.clip(1.6 / (heads * cell), 1, 2))
    rows, columns = (len(maps), 1) if layers * cell > 2 * heads * high else (1, len(maps))
    size = max(columns * (layers * cell + 0.6) + 0.85, 4.8), max(rows * (heads * high + 0.75) + 0.35, 2.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for index, (axes, each) in enumerate(zip(grid.flat, maps, strict=True)):
        image = _draw(axes, each, cell, high)
        axes.set(
            xlabel="layer" if rows == 1 or index + 1 == rows else "", ylabel="KV head" if index % columns == 0 else ""
        )
        if len(maps) > 1:
            axes.set_title(each.title, fontsize=10, parse_math=False)
    if len(maps) == 1:
        figure.suptitle(maps[0].title, fontsize=10, parse_math=False)
    # The colour bar is as high as a map and a seventh of an inch wide.
    bar = grid.flat[columns - 1].inset_axes((1 + 0.12 / (layers * cell), 0, 0.14 / (layers * cell), 1))
    figure.colorbar(image, cax=bar, label="gate", ticks=[0, 0.5, 1])
    return figure


def _draw(axes: Axes, each: GateMap, cell: float, high: float) -> AxesImage:
    """One map, its dots and its ticks."""
    layers, heads = each.gates.shape
    shown = each.gates.clip(0, 1).T
    image = axes.imshow(shown, aspect=high / cell, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    if np.isnan(shown).any():
        axes.set_facecolor(NO_GATE)
    if each.retrieval is not None:
        x, y = np.nonzero(each.retrieval)
        # Areas are in square points: a dot takes 45 % of its cell's width.
        axes.scatter(x, y, s=(0.45 * 72 * cell) ** 2, color=DOT, edgecolors="white", linewidths=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 5, 8, 10], min_n_ticks=1))
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(heads - 0.5, -0.5))
    return image
