"""The figure of distance against head, drawn with matplotlib."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from duo_eval.runner.record import Result
from duo_eval.show.style import style_of


def distance_figure(
    results: Sequence[Result], effects: Float[np.ndarray, "S H"], heads: Sequence[tuple[int, int]]
) -> Figure:
    """Needles by distance, the farthest at the top; a column for each head, and who finds the needle on the left.

    Args:
        results: one a needle, from the nearest on.
        effects: of each head on each needle, nats.
        heads: layer and number of each column.
    """
    rows = len(results)
    figure = Figure(figsize=(6.4, 1.6 + 0.24 * rows), layout="constrained")
    marks, grid = figure.subplots(1, 2, sharey=True, width_ratios=(2, len(heads)))
    image = grid.imshow(
        effects, cmap="PuOr_r", norm=CenteredNorm(), aspect="auto", origin="lower", interpolation="nearest"
    )
    grid.set_xticks(range(len(heads)), [f"{layer}.{number}" for layer, number in heads], rotation=60, fontsize=8)
    grid.set_xlabel("streaming head, layer.head")
    for row, result in enumerate(results):
        for column, (name, method) in enumerate((("full", "full"), ("pattern", "duo"))):
            style, is_found = style_of(method), all(result[name]["hits"])
            face = style.colour if is_found else "none"
            marks.plot(column, row, marker=style.marker, color=style.colour, markerfacecolor=face, markersize=6)
        for turn in result["turned"]:
            place = tuple(turn["heads"][0])
            if len(turn["heads"]) == 1 and place in heads and all(turn["hits"]):
                column = heads.index((place[0], place[1]))
                grid.text(column, row, "✓", ha="center", va="center", fontsize=9, color="black")
    marks.set_xticks((0, 1), ("full", "duo"), fontsize=8)
    marks.set(xlim=(-0.6, 1.6), ylabel="tokens from needle to answer")
    marks.set_yticks(range(rows), [f"{result['distance']:,}" for result in results], fontsize=8)
    marks.spines[["top", "right", "bottom"]].set_visible(False)
    grid.tick_params(left=False, labelleft=False)
    figure.colorbar(image, ax=grid, label="likelier answer, nats per unit of the gate", aspect=25, pad=0.02)
    title = "Needles found (filled) and the effect of single heads on the answer\n✓: this head alone brings it back"
    figure.suptitle(title, fontsize=10)
    return figure
