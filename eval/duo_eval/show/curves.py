"""Charts of lines with intervals: how estimates become points, and score against KV bytes for every task that scores.

Knows no matplotlib until a chart is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duo_eval.runner.record import read
from duo_eval.show.result_type import Drawn, file_name
from duo_eval.show.style import Style, label
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.scores import FULL, Record, by_method, mean, question_of, scored, shared

# With more lengths of text than this, all of them are one panel.
MAX_PANELS = 6
FULL_ATTENTION = "full attention"


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


@dataclass(frozen=True, eq=False)
class Panel:
    """Lines on one pair of axes; `level` is one value for all x, with its interval as a band."""

    name: str
    title: str
    lines: Sequence[Line]
    level: Line | None = None

    @property
    def in_words(self) -> str:
        """The level, then the first and the last point of each line."""
        parts = [f"{self.level.name} {self.level.y[0]:.3g}"] if self.level else []
        for line in self.lines:
            order = np.argsort(line.x)
            ends = [f"{line.y[index]:.3g} at {line.x[index]:.4g}" for index in dict.fromkeys((order[0], order[-1]))]
            parts.append(f"{line.name} {' to '.join(ends)}")
        return f"{self.title}: {'; '.join(parts)}"


@dataclass(frozen=True, eq=False)
class Chart:
    """Panels with the same axes and styles: one figure each, or all of them in one.

    Attributes:
        name: of the figure with all of them.
        title: above that figure.
        panels: at least one.
        x, y: labels of the axes.
        x_is_tokens: x may be logarithmic, with ticks at the points.
        is_percent: y, and x unless it is tokens, go from 0 to 100 in every panel.
        intervals: what the intervals are, for the legend.
    """

    name: str
    title: str
    panels: Sequence[Panel]
    x: str
    y: str
    x_is_tokens: bool = False
    is_percent: bool = False
    intervals: str = "95 % intervals"

    def each(self) -> Iterator[Drawn]:
        """A figure for each panel, narrow enough for a phone."""
        for panel in self.panels:
            yield self._drawn(f"{self.name}-{panel.name}" if panel.name else self.name, [panel], "")

    def whole(self) -> Drawn:
        """One figure."""
        return self._drawn(self.name, self.panels, self.title)

    def _drawn(self, name: str, panels: Sequence[Panel], title: str) -> Drawn:
        from duo_eval.show.figures import lines_figure

        alt = f"{self.y}, against {self.x}. {'. '.join(panel.in_words for panel in panels)}."
        return Drawn(file_name(name), lines_figure(self, panels, title=title), alt)


def percent_line(name: str, x: Sequence[float], estimates: Sequence[Estimate], *, method: str = "") -> Line:
    """Estimates in percent; where an interval is unknown (a single sample), its ends are the mean."""
    scaled = [estimate.scaled(100) for estimate in estimates]
    means, low, high = (np.array([getattr(estimate, end) for estimate in scaled]) for end in ("mean", "low", "high"))
    below, above = (np.where(np.isfinite(values), values, means).tolist() for values in (low, high))
    return Line(name, x, means.tolist(), below, above, method=method)


def score_curves(path: Path) -> Iterator[Chart]:
    """Score against the KV bytes held, a panel for each length of text; with many lengths, one panel.

    A panel covers the questions for which all of its methods have a score.
    """
    head, every = read(path)
    records = [record for record in scored(every) if "held_bytes" in record]
    lengths = sorted({record["job"].get("length", 0) for record in records})
    split = len(lengths) <= MAX_PANELS
    later = ", question later" if head["about"].get("question_later") else ""
    panels = []
    for length in lengths if split else [0]:
        compared = shared(record for record in records if not split or record["job"].get("length", 0) == length)
        if compared:
            panels.append(_scores(length if split else 0, compared, later))
    if panels:
        yield Chart(
            "score", title_of(head), panels, "KV held, % of full attention's bytes", "score, %", is_percent=True
        )


def title_of(head: Record) -> str:
    """Model and task of a file of results; files of version 0.1 name no task."""
    about = head["about"]
    words = [Path(about["model"]).name] if isinstance(about.get("model"), str) else []
    words += [about["task"]] if "task" in about else []
    return ", ".join([*words, *([about["style"]] if "style" in about else [])])


def _scores(length: int, records: Sequence[Record], note: str) -> Panel:
    """A line for each method; without an answer of full attention, the budget replaces the fraction that was held."""
    full_bytes = {question_of(record): record["held_bytes"] for record in records if record["job"]["method"] == FULL}
    groups = by_method(records)

    def percent_held(record: Record) -> float:
        question = question_of(record)
        if question in full_bytes:
            return 100 * record["held_bytes"] / full_bytes[question]
        return 100 * record["job"]["budget"]

    lines, level = [], None
    for method in dict.fromkeys(method for method, _ in groups):
        budgets = [group for key, group in groups.items() if key[0] == method]
        x = [float(np.mean([percent_held(record) for record in group])) for group in budgets]
        estimates = [mean(group) for group in budgets]
        if method == FULL:
            level = percent_line(FULL_ATTENTION, x, estimates)
        else:
            lines.append(percent_line(label(method), x, estimates, method=method))
    count = f"n = {len(records) // len(groups)}{note}"
    title = f"{length:,} tokens, {count}" if length else count
    return Panel(str(length) if length else "", title, lines, level)
