"""Tables for every evaluation that scores answers: methods and budgets, with 95 % intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import read
from duo_eval.show.curves import score_curves
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.scores import FULL, NOTHING, Record, by_method, difference, grouped, mean, scored, shared

# Fields of a job that make a row of their own, where a job has them.
ROW_FIELDS = ("task", "subset", "length")
# Sizes that a record may have, with their column and its meaning.
SIZES = {
    "held_bytes": ("KV held, MB", "*Held*: after the prompt."),
    "peak_bytes": ("KV at most, MB", "*At most*: while it was read, including one layer's tokens outside the cache."),
    "read_bytes": ("KV read, MB", "*Read*: by a decode step on average, with the bounds of pages."),
}


def score_summary(path: Path, *, budget: float | None = None) -> str:
    """Methods by lengths, each column over the questions that all its methods have a score for.

    The last column is the paired difference to full attention. With `budget`, only that one and full attention.
    """
    head, records = read(path)
    chosen = [record for record in scored(records) if budget is None or record["job"]["budget"] in (budget, 1.0)]
    if not chosen:
        return NOTHING
    with_length = "length" in chosen[0]["job"]
    columns = {
        key: shared(group) for key, group in sorted(grouped(chosen, *(("length",) if with_length else ())).items())
    }
    headers = []
    for key, column in columns.items():
        questions = len(column) // max(1, len(by_method(column)))
        headers.append(f"{f'{key[0]} tokens' if with_length else 'score, %'}, n = {questions}")
    full = [record for record in chosen if record["job"]["method"] == FULL]
    rows = []
    for (method, share), group in by_method(chosen).items():
        cells = [by_method(column).get((method, share)) for column in columns.values()]
        scores = [_percent(mean(cell)) if cell else "" for cell in cells]
        rows.append([method, f"{share:.0%}", *scores, _minus_full(group, full, count=True)])
    table = rows_to_table(rows, ["method", "KV budget", *headers, "minus full, points"])
    return f"{table}\n\n{_footer(head, records)}"


def score_table(path: Path) -> str:
    """Every cell: mean scores in percent, the paired difference to full attention, and bytes of keys and values."""
    head, records = read(path)
    chosen = scored(records)
    if not chosen:
        return NOTHING
    full = [record for record in chosen if record["job"]["method"] == FULL]
    fields = [name for name in ROW_FIELDS if name in chosen[0]["job"]]
    groups = grouped(chosen, *fields, "method", "budget")
    measured = {field for record in chosen for field in SIZES if field in record}
    rows = []
    # Sorted by question; methods keep the order in which they were asked.
    for key in sorted(groups, key=lambda key: [str(part).rjust(12) for part in key[: len(fields)]]):
        group = groups[key]
        score = f"{_percent(mean(group))}, n = {len(group)}"
        sizes = [_megabytes(group, field) for field in SIZES if field in measured]
        rows.append([*key[:-1], f"{key[-1]:.0%}", score, _minus_full(group, full), *sizes])
    sizes = [name for field, (name, _) in SIZES.items() if field in measured]
    headers = [*fields, "method", "budget", "score, %", "minus full, points", *sizes]
    table = rows_to_table(rows, headers, "l" * (len(fields) + 1) + "r")
    what = " ".join(meaning for field, (_, meaning) in SIZES.items() if field in measured)
    return f"{table}\n\n{what}\n{_footer(head, records)}"


def _percent(estimate: Estimate) -> str:
    return estimate.scaled(100).format(".1f")


def _minus_full(records: Sequence[Record], full: Sequence[Record], *, count: bool = False) -> str:
    compared = difference(records, full) if records[0]["job"]["method"] != FULL else None
    if compared is None:
        return ""
    estimate, questions = compared
    return estimate.scaled(100).format("+.1f") + (f", n = {questions}" if count else "")


def _megabytes(records: Sequence[Record], field: str) -> str:
    values = [record[field] for record in records if field in record]
    return f"{np.mean(values) / 1e6:.1f}" if values else ""


def _footer(head: Mapping[str, Any], records: Sequence[Record]) -> str:
    refused = len(records) - len(scored(records))
    note = f"{refused} questions have no score: their method could not hold them within its budget. " if refused else ""
    where = origin(head["runs"], f"duo eval {head['about']['task']}") if head["runs"] else ""
    what = "95 % intervals; differences are paired; rows with a different n were asked different questions."
    later = "The text was compressed before the question was known. " if head["about"].get("question_later") else ""
    return f"{later}{what} {note}{where}"


RESULT = ResultType(
    "Scores",
    of_task("ruler", "longbench"),
    {"Scores": score_summary, "Every cell": score_table},
    (score_curves,),
    group="Accuracy",
)
# Any other task that scores answers one by one, such as one that a plugin adds.
OTHER_RESULT = replace(
    RESULT,
    title="Scores of other tasks",
    matches=lambda first: isinstance(first.get("about"), dict) and "task" in first["about"] and "results" not in first,
)
