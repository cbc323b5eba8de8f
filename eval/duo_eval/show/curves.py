"""Charts of lines with intervals: how estimates become points, and score against KV bytes for every task that scores.

Knows no matplotlib until a chart is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duo_eval.runner.record import read
from duo_eval.show.result_type import Drawn, file_name
from duo_eval.show.style import Style
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.scores import FULL, Record, by_method, mean, question_of, scored, shared

# With at most this many lengths of text, each has a figure of its own; with more, one figure shows all.
MAX_FIGURES = 4


@dataclass(frozen=True, eq=False)
class Line:
    """One line: a name, points, and the ends of their intervals if they have any.

    Its style is that of its method, which is named if the line's name is another one, or a given one. A floor is
    dashed, in the colour of the line before it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    is_floor: bool = False
    method: str = ""
    style: Style | None = None


def percent_line(name: str, x: Sequence[float], estimates: Sequence[Estimate]) -> Line:
    """Estimates in percent; where an interval is unknown (a single sample), its ends are the mean."""
    scaled = [estimate.scaled(100) for estimate in estimates]
    means, low, high = (np.array([getattr(estimate, end) for estimate in scaled]) for end in ("mean", "low", "high"))
    ends = (np.where(np.isfinite(values), values, means).tolist() for values in (low, high))
    return Line(name, x, means.tolist(), *ends)


def chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    level: Line | None = None,
    x_is_tokens: bool = False,
) -> Drawn:
    """The figure, described by the first and the last point of each line; arguments as in `figures.lines_figure`."""
    from duo_eval.show.figures import lines_figure

    parts = [f"{level.name} {level.y[0]:.3g}"] if level else []
    for line in lines:
        order = np.argsort(line.x)
        ends = [f"{line.y[index]:.3g} at {line.x[index]:.4g}" for index in dict.fromkeys((order[0], order[-1]))]
        parts.append(f"{line.name} {' to '.join(ends)}")
    alt = f"{title}: {y}, against {x}. {'; '.join(parts)}."
    return Drawn(file_name(name), lines_figure(lines, title=title, x=x, y=y, level=level, x_is_tokens=x_is_tokens), alt)


def score_curves(path: Path) -> Iterator[Drawn]:
    """Score against the KV bytes held, all methods in one figure; with few lengths, one figure for each.

    A figure covers the questions for which all of its methods have a score.
    """
    head, results = read(path)
    records = [record for record in scored(results) if "held_bytes" in record]
    later = ", question later" if head["about"].get("question_later") else ""
    lengths = sorted({record["job"].get("length", 0) for record in records})
    split = len(lengths) <= MAX_FIGURES
    for length in lengths if split else [0]:
        compared = shared(record for record in records if not split or record["job"].get("length", 0) == length)
        if compared:
            suffix, title = (f"-{length}", f" at {length:,} tokens") if split and length else ("", "")
            yield _scores(f"score{suffix}", f"Score{title}{later}", compared)


def _scores(name: str, title: str, records: Sequence[Record]) -> Drawn:
    """A line for each method; without an answer of full attention, the budget replaces the fraction that was held."""
    full_bytes = {question_of(record): record["held_bytes"] for record in records if record["job"]["method"] == FULL}
    groups = by_method(records)

    def percent_held(record: Record) -> float:
        question = question_of(record)
        if question in full_bytes:
            return 100 * record["held_bytes"] / full_bytes[question]
        return 100 * record["job"]["budget"]

    lines = []
    for method in dict.fromkeys(method for method, _ in groups):
        budgets = [group for key, group in groups.items() if key[0] == method]
        x = [float(np.mean([percent_held(record) for record in group])) for group in budgets]
        lines.append(percent_line(method, x, [mean(group) for group in budgets]))
    return chart(name, lines, title=title, x="KV held, % of full attention's", y="score, %")
