"""Results of `duo choose`: losses by budget, the budget that is chosen and why, tables and the figure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import read
from duo_eval.show.curves import Chart, Line, Panel, percent_line, title_of
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.show.style import styles_of_settings
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.losses import Losses, answers_needed, of_answers, of_means, smallest_budget
from duo_eval.stats.scores import FULL, NOTHING, Record, by_method, grouped, question_of

ALLOWED = 0.01
# A model that finds fewer needles with full attention has little that a pattern could lose.
LEAST_FOUND = 0.5
LIMITS = "95 % limits of either side"


@dataclass(frozen=True)
class Measure:
    """A score in [0, 1] of each question.

    Attributes:
        name: what is lost, as the heading of a column.
        of: the score of a record.
        is_counted: right or wrong, or right in part: the limits are those of counts.
    """

    name: str
    of: Callable[[Record], float]
    is_counted: bool


def _share(field: str, what: str) -> Callable[[Record], float]:
    return lambda record: record[field][what] / record[field]["tokens"]


NEEDLES = Measure("needles", lambda record: float(record["score"]), True)
MEASURES = (
    NEEDLES,
    Measure("recall", _share("recall", "hits"), True),
    Measure("answer's probability", _share("recall", "probability"), False),
    Measure("text's probability", _share("text", "probability"), False),
)


@dataclass(frozen=True, eq=False)
class Row:
    """A budget, its questions, and the same of full attention."""

    budget: float
    records: Sequence[Record]
    full: Sequence[Record]

    @property
    def sparsity(self) -> float:
        """Fraction of KV heads that stream."""
        return float(self.records[0]["sparsity"])

    @property
    def held(self) -> float:
        """KV bytes held, as a fraction of full attention's."""
        return float(np.mean([own["held_bytes"] / full["held_bytes"] for own, full in self._pairs()]))

    @property
    def losses(self) -> Losses:
        """What the budget loses."""
        return Losses(self.budget, {measure.name: self._loss(measure) for measure in MEASURES})

    def needed(self, measure: Measure, allowed: float) -> int | None:
        """Needles with which the loss of a measure would be shown to be within `allowed`; None: it is not."""
        full, own = self._scores(measure)
        if measure.is_counted:
            return answers_needed(full, own, allowed)
        mean, half = float((full - own).mean()), self._loss(measure).high - float((full - own).mean())
        return int(np.ceil(len(own) * (half / (allowed - mean)) ** 2)) if mean < allowed and np.isfinite(half) else None

    def _loss(self, measure: Measure) -> Estimate:
        full, own = self._scores(measure)
        if measure.is_counted:
            return of_answers(full, own)
        stretches = self.records[0]["stretches"] if measure is MEASURES[-1] else None
        return of_means(full, own, independent=stretches)

    def _scores(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.array([[measure.of(full), measure.of(own)] for own, full in self._pairs()], np.float64)
        return pairs[:, 0], pairs[:, 1]

    def _pairs(self) -> Iterator[tuple[Record, Record]]:
        return zip(self.records, self.full, strict=True)


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each budget of one length, the smallest first, over the questions that full attention answered too."""
    full = {question_of(record): record for record in records if record["job"]["method"] == FULL}
    rows = []
    for (method, budget), group in by_method(records).items():
        paired = [record for record in group if question_of(record) in full]
        if method != FULL and paired:
            rows.append(Row(budget, paired, [full[question_of(record)] for record in paired]))
    return sorted(rows, key=lambda row: row.budget)


@dataclass(frozen=True, eq=False)
class Choice:
    """The row that is chosen, if any, and the reasons in sentences."""

    row: Row | None
    reasons: tuple[str, ...]


def choose(rows: Sequence[Row], allowed: float) -> Choice:
    """The smallest budget within the loss `allowed` (a fraction), and what kept smaller ones out."""
    if not rows:
        return Choice(None, (NOTHING,))
    full = [record["score"] for record in max(rows, key=lambda row: len(row.full)).full]
    if np.mean(full) < LEAST_FOUND:
        found = f"Full attention itself finds {sum(full):g} of {len(full)} needles"
        return Choice(
            None, (f"{found}: what it does not find cannot be lost. Choose a shorter --context, or another model.",)
        )
    best = smallest_budget([row.losses for row in rows], allowed)
    chosen = next((row for row in rows if best is not None and row.budget == best.budget), None)
    reasons = [_failure(row, allowed) for row in rows if not row.losses.within(allowed)]
    points = f"{100 * allowed:g} point{'' if allowed == ALLOWED else 's'}"
    if chosen is None:
        return Choice(None, (f"No budget is shown to lose at most {points}.", *reasons))
    first = (
        f"Chosen: {chosen.budget:.0%} of the KV bytes, a sparsity of {chosen.sparsity:.3f}. With 95 % confidence it "
        f"loses at most {points} in each measure."
    )
    if skipped := [row for row in rows if row.budget < chosen.budget and row.losses.within(allowed)]:
        budgets = ", ".join(f"{row.budget:.0%}" for row in skipped)
        reasons.append(f"{budgets}: within the loss, but a larger budget is not.")
    return Choice(chosen, (first, *reasons))


def _failure(row: Row, allowed: float) -> str:
    """What a budget loses, or has not been shown not to lose; and what would tell, if anything would."""
    failed = [measure for measure in MEASURES if row.losses.by_measure[measure.name].high > allowed]
    parts = [f"{measure.name} {_points(row.losses.by_measure[measure.name], ' points')}" for measure in failed]
    needed = [(measure, row.needed(measure, allowed)) for measure in failed]
    counts = {measure.name: count for measure, count in needed if count is not None}
    way = ""
    if len(counts) == len(failed):  # Else more questions would only confirm the loss.
        short = row.records[0]["stretches"] < len(row.records)
        ways = ["a longer --text"] if short and counts.pop(MEASURES[-1].name, None) else []
        ways += [f"{max(counts.values())} needles"] if counts else []
        way = f". To tell, it takes {' and '.join(ways)}, if the loss stays as it is"
    return f"{row.budget:.0%}, {len(row.records)} needles: loses {'; '.join(parts)}{way}."


def _points(loss: Estimate, unit: str = "") -> str:
    high = f"{100 * loss.high:.2f}" if np.isfinite(loss.high) else "any number"
    return f"{100 * loss.mean + 0.0:.2f}{unit}, at most {high}"


def loss_table(path: Path) -> str:
    """What every budget loses against full attention, in points, and at most with 95 % confidence."""
    head, records = read(path)
    lines = []
    for length, rows in _by_length(records):
        for row in rows:
            losses = row.losses.by_measure.values()
            cells = map(_points, losses)
            lines.append([length, f"{row.budget:.0%}", f"{row.sparsity:.0%}", len(row.records), *cells])
    if not lines:
        return NOTHING
    headers = ["tokens", "KV budget", "heads that stream", "n", *(f"{measure.name} lost" for measure in MEASURES)]
    return f"{rows_to_table(lines, headers, 'r')}\n\nIn points, paired, with one-sided 95 % limits. {_origin(head)}"


def score_table(path: Path) -> str:
    """Every measure of full attention and every budget."""
    _, records = read(path)
    lines = []
    for (length,), group in grouped(records, "length").items():
        for (_, budget), own in by_method(group).items():
            means = [f"{100 * np.mean([measure.of(record) for record in own]):.1f}" for measure in MEASURES]
            nll = [
                f"{sum(record[field]['nll'] for record in own) / sum(record[field]['tokens'] for record in own):.3f}"
                for field in ("recall", "text")
            ]
            lines.append([length, f"{budget:.0%}", len(own), *means, *nll])
    headers = ["tokens", "KV budget", "n", *(f"{measure.name}, %" for measure in MEASURES)]
    return rows_to_table(lines, [*headers, "answer, nats a token", "text, nats a token"], "r") if lines else NOTHING


def loss_curves(path: Path, *, allowed: float = ALLOWED) -> Iterator[Chart]:
    """Loss against the KV bytes held, a panel for each length."""
    head, records = read(path)
    panels = []
    for length, rows in _by_length(records):
        x, losses = [100 * row.held for row in rows], [row.losses for row in rows]
        styles = styles_of_settings(len(MEASURES))
        lines = [
            replace(percent_line(measure.name, x, [each.by_measure[measure.name] for each in losses]), style=style)
            for measure, style in zip(MEASURES, styles, strict=True)
        ]
        title = f"{length:,} tokens, n = {min(len(row.records) for row in rows)}"
        panels.append(Panel(str(length), title, lines, Line("allowed", [0.0], [100 * allowed])))
    if panels:
        x_label, y_label = "KV held, % of full attention's bytes", "lost against full attention, points"
        yield Chart("loss", title_of(head), panels, x_label, y_label, intervals=LIMITS)


def _by_length(records: Sequence[Record]) -> Iterator[tuple[int, list[Row]]]:
    for (length,), group in sorted(grouped(records, "length").items()):
        if rows := rows_of(group):
            yield length, rows


def _origin(head: dict[str, Any]) -> str:
    return origin(head["runs"], "duo choose") if head["runs"] else ""


RESULT = ResultType(
    "Loss by KV budget",
    of_task("choose"),
    {"Lost against full attention": loss_table, "Every measure": score_table},
    (loss_curves,),
    group="Accuracy",
)
