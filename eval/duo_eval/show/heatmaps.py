"""Needle results as heat maps, depths by lengths: all of them in one figure, or one figure each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_eval.runner.record import read
from duo_eval.show.result_type import Drawn, file_name
from duo_eval.show.style import label
from duo_eval.stats.scores import FULL, by_method, grouped, scored

# Maps in a row, where no method has several budgets.
COLUMNS = 3
Cell = tuple[str, float]


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of a file: scores [depths, lengths] by method and budget, NaN for cells without an answer."""

    by_cell: dict[Cell, Float[np.ndarray, "D L"]]
    lengths: list[int]
    depths: list[float]
    title: str

    @classmethod
    def of(cls, path: Path) -> "Maps":
        """The maps of a file with at least one score."""
        head, records = read(path)
        groups = grouped(scored(records), "method", "budget", "length", "depth")
        scores = {key: [record["score"] for record in group] for key, group in groups.items()}
        lengths, depths = sorted({key[2] for key in scores}), sorted({key[3] for key in scores})
        by_cell = {
            (method, budget): np.array(
                [[np.mean(scores.get((method, budget, n, depth), [np.nan])) for n in lengths] for depth in depths],
                float,
            )
            for method, budget in by_method(scored(records))
        }
        about, samples = head["about"], sorted({len(group) for group in scores.values()})
        style = f"{about['style']}, asked later" if about.get("question_later") else about["style"]
        count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        title = f"{Path(about['model']).name}, needle: {style}, {count} sample{'s' if count != '1' else ''} in a cell"
        return cls(by_cell, lengths, depths, title)

    def summary(self, cell: Cell) -> str:
        """The mean over the cells that the method was asked, and full attention's over the same, if it has them."""
        scores, full = self.by_cell[cell], self.by_cell.get((FULL, 1.0))
        asked = np.isfinite(scores)
        mean = f"{scores[asked].mean():.2f}"
        if cell[0] != FULL and full is not None and np.isfinite(full[asked]).all():
            mean += f" (full {full[asked].mean():.2f})"
        return f"{mean}, {asked.sum()} cells"

    def whole(self) -> Drawn:
        """One figure with a map for every method and budget."""
        from duo_eval.show.figures import Map, heatmaps

        drawn = {cell: Map(f"{_name(cell)}\n{self.summary(cell)}", scores) for cell, scores in self.by_cell.items()}
        note = "Budgets are fractions of full attention's KV.\nMeans are over the cells asked; others are grey."
        rows = [[drawn.get(cell) if cell else None for cell in row] for row in _layout(list(drawn))]
        figure = heatmaps(rows, self.lengths, self.depths, f"{self.title}\n{note}")
        return Drawn(
            "", figure, f"{self.title}. {'; '.join(f'{_name(cell)}: {self.summary(cell)}' for cell in drawn)}."
        )

    def each(self) -> Iterator[Drawn]:
        """A figure for every method and budget."""
        from duo_eval.show.figures import Map, heatmaps

        lengths, depths = self.lengths, self.depths
        for cell, scores in self.by_cell.items():
            worst = np.unravel_index(np.nanargmin(scores), scores.shape)
            alt = (
                f"{self.title}. {_name(cell)}: mean score {self.summary(cell)}, of {len(depths)} depths and "
                f"{len(lengths)} lengths from {lengths[0]:,} to {lengths[-1]:,} tokens; the lowest is "
                f"{scores[worst]:.2f}, at {lengths[worst[1]]:,} tokens and a depth of {depths[worst[0]]:.0%}."
            )
            figure = heatmaps([[Map(f"{_name(cell)}\n{self.summary(cell)}", scores)]], lengths, depths, "")
            yield Drawn(file_name(f"map-{_name(cell)}"), figure, alt)


def needle_poster(path: Path) -> Any:
    """One figure with a map for every method and budget."""
    return Maps.of(path).whole().figure


def needle_maps(path: Path) -> Iterator[Maps]:
    """The maps of a file; nothing without a score."""
    if scored(read(path)[1]):
        yield Maps.of(path)


def _name(cell: Cell) -> str:
    method, budget = cell
    return label(method) if budget == 1 else f"{label(method)} at {budget:g}"


def _layout(cells: Sequence[Cell]) -> list[list[Cell | None]]:
    """Which map is where: a row for each method and a column for each budget.

    Full attention is left of the first row, which has all budgets if any method has. Where no method has several
    budgets, rows are filled up.
    """
    methods = dict.fromkeys(method for method, _ in cells if method != FULL)
    own = {method: {budget: (method, budget) for name, budget in cells if name == method} for method in methods}
    if all(len(budgets) == 1 for budgets in own.values()):
        return [list(cells[begin : begin + COLUMNS]) for begin in range(0, len(cells), COLUMNS)]
    every = sorted({budget for budgets in own.values() for budget in budgets})
    first = max(methods, key=lambda method: len(own[method]))
    rows = [[own[method].get(budget) for budget in every] for method in sorted(methods, key=lambda name: name != first)]
    full = [cell for cell in cells if cell[0] == FULL]
    return [[*(full if index == 0 else [None] * len(full)), *row] for index, row in enumerate(rows)]
