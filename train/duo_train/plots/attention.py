"""Attention maps of heads, and their mass on sinks, recent window and the rest (paper figure 1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

# A map with more cells than this shows the largest weight of each block; a mean would hide thin stripes.
MAP_CELLS = 512
# Sinks, recent window, and the keys that a streaming head does not see; distinguishable with any kind of colour vision.
SINKS, WINDOW, REST = "#08519c", "#4292c6", "#d55e00"
INK = "#222222"


def attention_figure(
    weights: Float[np.ndarray, "M T T"], names: Sequence[str], title: str, *, sink_size: int, recent_size: int
) -> Figure:
    """Attention of M heads as maps [queries, keys]; next to each, the mass on its sinks, its window, and the rest.

    The percentages are means over the queries for which a streaming head hides some keys (paper figure 1).
    """
    count, length, _ = weights.shape
    figure = Figure(figsize=(1.2 + 5.6 * count, 5.2), layout="constrained")
    grid = figure.subplots(1, 2 * count, sharey=True, width_ratios=[4.4, 1] * count, squeeze=False)[0]
    kinds = {"sinks": SINKS, "window": WINDOW, "the rest": REST}
    image: Any = None
    for index, name in enumerate(names):
        axes, mass_axes = grid[2 * index], grid[2 * index + 1]
        pooled = _pooled(weights[index])
        # The last pooled row and column may extend beyond the text.
        edge = len(pooled) * -(-length // MAP_CELLS) - 0.5
        image = axes.imshow(
            pooled,
            norm=LogNorm(1e-4, 1, clip=True),
            cmap="magma_r",
            extent=(-0.5, edge, edge, -0.5),
            aspect="auto",
            interpolation="nearest",
        )
        _borders(axes, length, sink_size, recent_size)
        axes.set(xlabel="key position", xlim=(-0.5, length - 0.5), ylim=(length - 0.5, -0.5))
        axes.set_ylabel("query position" if index == 0 else "")
        axes.set_title(name, fontsize=10, parse_math=False)
        shares = attention_shares(weights[index], sink_size=sink_size, recent_size=recent_size)
        means = shares[sink_size + recent_size :].mean(0)
        for row, ((kind, colour), mean) in enumerate(zip(kinds.items(), means, strict=True)):
            place = {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": 10, "weight": "bold"}
            axes.text(0.98, 0.97 - 0.065 * row, f"{kind} {mean:.1%}", color=colour, **place)
        _draw_mass(mass_axes, shares, list(kinds.values()))
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=list(grid), label="attention weight", pad=0.02, aspect=30)
    return figure


def attention_shares(
    weights: Float[np.ndarray, "T T"], *, sink_size: int, recent_size: int
) -> Float[np.ndarray, "T 3"]:
    """Mass of each query's attention on the sinks, on the recent window without the sinks, and on the rest."""
    q, k = np.arange(len(weights))[:, None], np.arange(len(weights))[None, :]
    sink, recent = k < sink_size, k > q - recent_size
    kinds = (sink, ~sink & recent, ~sink & ~recent)
    return np.stack([(weights * kind).sum(1) for kind in kinds], axis=1)


def _pooled(weights: Float[np.ndarray, "T T"]) -> Float[np.ndarray, "P P"]:
    """At most `MAP_CELLS` rows and columns, each cell the largest weight of its block; NaN above the diagonal."""
    length = len(weights)
    block = -(-length // MAP_CELLS)
    padding = -length % block
    blocks = np.pad(weights, (0, padding)).reshape((length + padding) // block, block, -1, block)
    pooled = blocks.max((1, 3))
    pooled[np.triu_indices(len(pooled), 1)] = np.nan
    return pooled


def _borders(axes: Axes, length: int, sink_size: int, recent_size: int) -> None:
    """Dashed lines around the keys that a streaming head does not see."""
    line: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (4, 2))}
    corner = sink_size + recent_size - 0.5
    axes.plot([sink_size - 0.5] * 2, [corner, length - 0.5], **line)
    axes.plot([sink_size - 0.5, length - recent_size - 0.5], [corner, length - 0.5], **line)


def _draw_mass(axes: Axes, shares: Float[np.ndarray, "T 3"], colours: Sequence[str]) -> None:
    """Each query's mass in percent, stacked from the left; the mean of neighbouring queries, at most 64 rows."""
    rows = np.array_split(np.arange(len(shares)), min(64, len(shares)))
    edges = np.array([row[0] for row in rows] + [len(shares)]) - 0.5
    means = np.stack([shares[row].mean(0) for row in rows]) * 100
    left = np.zeros(len(rows))
    for kind, colour in enumerate(colours):
        axes.barh(edges[:-1], means[:, kind], np.diff(edges), left=left, align="edge", color=colour, linewidth=0)
        left += means[:, kind]
    axes.set(xlim=(0, 100), xticks=[0, 50, 100], xlabel="mass in %")
    axes.tick_params(left=False)
