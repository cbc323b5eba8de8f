"""The headline of a report: methods by tasks and budgets. Knows no file: records in, a table and a figure out.

Each task at each budget is scored over the questions that all of its methods answered.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import Drawn
from duo_eval.show.style import label
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.scores import FULL, Record, by_method, mean, shared


@dataclass(frozen=True, eq=False)
class Column:
    """One task at one budget: the score of every method in percent, over the same questions.

    Attributes:
        task: its name.
        budget: fraction of full attention's KV bytes; None for methods of a fixed size.
        questions: how many.
        scores: of each method, full attention first.
    """

    task: str
    budget: float | None
    questions: int
    scores: Mapping[str, Estimate]

    @property
    def name(self) -> str:
        """Task, budget and number of questions."""
        budget = "" if self.budget is None else f", {self.budget:.0%} KV"
        return f"{self.task}{budget}, n = {self.questions}"


def columns_of(task: str, records: Iterable[Record]) -> Iterator[Column]:
    """The columns of a task, from the smallest budget to the largest; nothing if its records have no scores."""
    records = [scored for record in records if (scored := _scored(record))]
    full = [record for record in records if record["job"]["method"] == FULL]
    others = [record for record in records if record["job"]["method"] != FULL]
    for budget in sorted({record["job"]["budget"] for record in others}):
        compared = shared([*full, *(record for record in others if record["job"]["budget"] == budget)])
        groups = by_method(compared)
        if groups:
            scores = {method: mean(group).scaled(100) for (method, _), group in groups.items()}
            yield Column(task, None if budget == 1 else budget, len(compared) // len(groups), scores)


def headline_table(columns: Sequence[Column]) -> str:
    """A row for each method; a cell is empty where a method was not asked."""
    methods = _methods(columns)
    rows = [[label(method), *(_cell(column.scores.get(method)) for column in columns)] for method in methods]
    return rows_to_table(rows, ["score, %", *(column.name for column in columns)])


def headline_figure(columns: Sequence[Column]) -> Drawn:
    """The scores of each task at the budget that most tasks have, one under the other."""
    from duo_eval.show.figures import dots_figure

    tasks = Counter(column.budget for column in columns if column.budget is not None)
    usual = max(tasks, key=lambda budget: (tasks[budget], -abs(budget - 0.5)), default=None)
    chosen = [column for column in columns if column.budget in (None, usual)]
    alt = "; ".join(
        f"{column.name}: " + ", ".join(f"{label(method)} {score.mean:.1f}" for method, score in column.scores.items())
        for column in chosen
    )
    labels = {method: label(method) for method in _methods(chosen)}
    figure = dots_figure({column.name: column.scores for column in chosen}, labels=labels, x="score, %")
    return Drawn("headline", figure, f"{alt}.")


def _cell(score: Estimate | None) -> str:
    """A mean and its interval, whose ends need no decimals."""
    return f"{score.mean:.1f} ({score.low:.0f} to {score.high:.0f})" if score else ""


def _methods(columns: Sequence[Column]) -> list[str]:
    """Every method once, those of a fixed size last."""
    ordered = sorted(columns, key=lambda column: column.budget is None)
    return list(dict.fromkeys(method for column in ordered for method in column.scores))


def _scored(record: Record) -> Record | None:
    """A record with a method, a budget and a score; None without a score. Right or wrong is a score."""
    job, score = record.get("job", {}), record.get("score", record.get("correct"))
    if score is None or "method" not in job:
        return None
    return {**record} | {"job": {"budget": 1.0} | job, "score": float(score)}
