"""Heat map of a pattern's gates, layers by KV heads."""

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Neutral: in figures of this project blue is retrieval, as the gates here, and orange is streaming.
DOT = "#222222"


def gates_figure(gates: Float[np.ndarray, "L K"], retrieval: Bool[np.ndarray, "L K"] | None, title: str) -> Figure:
    """Gates of every KV head as colour, 0 to 1; if `retrieval` is given, a dot marks each retrieval head."""
    layers, heads = gates.shape
    cell = float(np.clip(8.0 / layers, 0.1, 0.3))
    # With few heads, cells are up to twice as high as wide, so that the map is not a thin strip.
    high = cell * float(np.clip(1.6 / (heads * cell), 1, 2))
    size = max(layers * cell + 1.45, 4.8), max(heads * high + 1.1, 2.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates.clip(0, 1).T, aspect=high / cell, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    if retrieval is not None:
        x, y = np.nonzero(retrieval)
        # Areas are in square points: a dot takes 45 % of its cell's width.
        axes.scatter(x, y, s=(0.45 * 72 * cell) ** 2, color=DOT, edgecolors="white", linewidths=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 5, 8, 10], min_n_ticks=1))
    axes.set(xlabel="layer", ylabel="KV head", xlim=(-0.5, layers - 0.5), ylim=(heads - 0.5, -0.5))
    figure.suptitle(title, fontsize=10, parse_math=False)
    # The colour bar is as high as the map and a seventh of an inch wide.
    bar = axes.inset_axes((1 + 0.12 / (layers * cell), 0, 0.14 / (layers * cell), 1))
    figure.colorbar(image, cax=bar, label="gate", ticks=[0, 0.5, 1])
    return figure
