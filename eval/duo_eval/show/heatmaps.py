"""Needle results as heat maps, depths by lengths: all of them in one figure, or one figure each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_eval.runner.record import read
from duo_eval.show.result_type import Drawn, file_name
from duo_eval.stats.scores import by_method, grouped, scored


def needle_poster(path: Path) -> Any:
    """One figure with a map for every method and budget."""
    from duo_eval.show.figures import heatmaps

    maps, lengths, depths, title = _maps(path)
    return heatmaps(maps, lengths, depths, f"{title}; fractions of full attention's KV")


def needle_maps(path: Path) -> Iterator[Drawn]:
    """A figure for every method and budget."""
    from duo_eval.show.figures import heatmaps

    if not scored(read(path)[1]):
        return
    maps, lengths, depths, title = _maps(path)
    for row in maps:
        for name, scores in row.items():
            worst = np.unravel_index(np.nanargmin(scores), scores.shape)
            alt = (
                f"{title}. {name}: mean score {np.nanmean(scores):.2f} over {len(depths)} depths and {len(lengths)} "
                f"lengths from {lengths[0]:,} to {lengths[-1]:,} tokens; the lowest is {scores[worst]:.2f}, at "
                f"{lengths[worst[1]]:,} tokens and a depth of {depths[worst[0]]:.0%}."
            )
            yield Drawn(file_name(f"map-{name}"), heatmaps([{name: scores}], lengths, depths, ""), alt)


def _maps(path: Path) -> tuple[list[dict[str, Float[np.ndarray, "D L"]]], list[int], list[float], str]:
    """Maps by name, a row for each method, then lengths, depths and a title; cells without an answer are NaN."""
    head, records = read(path)
    groups = grouped(scored(records), "method", "budget", "length", "depth")
    cells = {key: [record["score"] for record in group] for key, group in groups.items()}
    lengths, depths = sorted({key[2] for key in cells}), sorted({key[3] for key in cells})
    maps: dict[str, dict[str, np.ndarray]] = {}
    for method, budget in by_method(scored(records)):
        means = [[np.mean(cells.get((method, budget, n, depth), [np.nan])) for n in lengths] for depth in depths]
        name = method if budget == 1 else f"{method} at {budget:g}"
        maps.setdefault(method, {})[name] = np.array(means, float)
    about, samples = head["about"], max(len(scores) for scores in cells.values())
    style = f"{about['style']}, asked later" if about.get("question_later") else about["style"]
    title = f"{Path(about['model']).name}, needle: {style}, {samples} sample{'s' if samples > 1 else ''} in a cell"
    return [*maps.values()], lengths, depths, title
