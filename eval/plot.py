"""`duo eval plot`: results as figures, PNG and SVG. Reads; `figures` draws.

What a file is about, its first line says: a figure of another task is a function here and its row in `FIGURES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from eval.asking import summarized
from eval.ledger import read


@dataclass(frozen=True)
class PlotTask:
    """Draw a file of results; `duo eval needle` does so too when it is done."""

    file: tyro.conf.Positional[Path]
    """What an evaluation wrote, finished or not."""
    out: Path | None = None
    """Name of the figure, without an ending; that of the file by default."""

    def run(self) -> None:
        """Draw, print where."""
        for path in draw(self.file, self.out):
            print(path)


def draw(file: Path, out: Path | None = None) -> tuple[Path, Path]:
    """The figure of a file of results, as PNG and SVG.

    Raises:
        ValueError: not a file of results, or of a task that has no figure.
        NotImplementedError: matplotlib is missing.
    """
    head, records = read(file)
    task = head["about"].get("task")
    if task not in FIGURES:
        raise ValueError(f"{file} is about {task!r}, which has no figure; there are figures of {', '.join(FIGURES)}")
    if not records:
        raise ValueError(f"{file} has no finished job yet")
    try:
        from train.figures import save
    except ImportError:
        raise NotImplementedError("figures need matplotlib: pip install 'duo-jax[eval]'") from None
    return save(FIGURES[task](head, records), out or file.with_suffix(""))


def _needle(head: dict[str, Any], records: list[dict[str, Any]]) -> Any:
    """A map of depths by lengths for every method and budget."""
    from eval.figures import heatmaps

    cells = summarized(records, "method", "budget", "length", "depth")
    lengths, depths = sorted({key[2] for key in cells}), sorted({key[3] for key in cells})
    maps: dict[str, dict[str, np.ndarray]] = {}
    for method, budget in dict.fromkeys(key[:2] for key in cells):
        means = [[np.mean(cells.get((method, budget, n, depth), [np.nan])) for n in lengths] for depth in depths]
        name = method if budget == 1 else f"{method} at {budget:g}"
        maps.setdefault(method, {})[name] = np.array(means, float)
    about, most = head["about"], max(len(scores) for scores in cells.values())
    title = f"{Path(about['model']).name}, needle: {about['style']}, {most} in a cell; fractions of full attention's KV"
    return heatmaps(list(maps.values()), lengths, depths, title)


FIGURES: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], Any]] = {"needle": _needle}
