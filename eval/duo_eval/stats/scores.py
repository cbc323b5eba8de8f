"""Scores of records: of which questions, by whom, with 95 % intervals. Knows no task and no file.

Methods are compared over the questions that all of them have a score for: some may have been asked more than others,
and some could not hold a prompt within their budget. Where there are tasks, each counts the same, however many
questions it has.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_eval.stats.intervals import Estimate, of_differences, of_scores

# Holds every token whatever the budget.
FULL = "full"
# What tables say of a file that has no record.
NOTHING = "No job is finished yet."

Record = Mapping[str, Any]


def question_of(record: Record) -> str:
    """Which question a record is about, whoever was asked."""
    return json.dumps({name: value for name, value in record["job"].items() if name not in ("method", "budget")})


def scored(records: Iterable[Record]) -> list[Record]:
    """Those with a score."""
    return [record for record in records if record.get("score") is not None]


def shared(records: Iterable[Record]) -> list[Record]:
    """Those of questions for which every method here has a score at every budget."""
    having = scored(records)
    asked = Counter(question_of(record) for record in having)
    everybody = len(by_method(having))
    return [record for record in having if asked[question_of(record)] == everybody]


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by these fields of their jobs, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record["job"][name] for name in names), []).append(record)
    return found


def by_method(records: Iterable[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records by method and budget: methods in the order in which they come, their budgets from the smallest on."""
    groups = grouped(records, "method", "budget")
    methods = list(dict.fromkeys(method for method, _ in groups))
    return {key: groups[key] for key in sorted(groups, key=lambda key: (methods.index(key[0]), key[1]))}


def mean(records: Sequence[Record]) -> Estimate:
    """Of the scores of one method, which all records must have."""
    return of_scores(np.array([record["score"] for record in records], np.float64), _weights(records))


def difference(records: Sequence[Record], others: Iterable[Record]) -> tuple[Estimate, int] | None:
    """How much more one method scores than another on the questions that both were asked, and how many these are."""
    theirs = {question_of(record): record["score"] for record in others}
    both = [record for record in records if question_of(record) in theirs]
    if not both:
        return None
    pairs = np.array([(record["score"], theirs[question_of(record)]) for record in both], np.float64)
    return of_differences(pairs[:, 0], pairs[:, 1], _weights(both)), len(both)


def _weights(records: Sequence[Record]) -> Float[np.ndarray, "S"]:
    """Such that every task has as much of them."""
    tasks = [record["job"].get("task") for record in records]
    count = Counter(tasks)
    return np.array([1 / count[task] for task in tasks], np.float64)


def in_words(records: Iterable[Record]) -> Iterator[str]:
    """A line for each method at each budget: mean scores in percent, all in all and of each task."""
    for (method, budget), found in by_method(shared(records)).items():
        tasks = grouped(found, "task") if "task" in found[0]["job"] else {}
        each = ", ".join(f"{task} {100 * mean(here).mean:.1f}" for (task,), here in tasks.items())
        about = f"{mean(found).scaled(100).format('.1f')}, n = {len(found)}"
        yield f"{method} at {budget:g} of the KV bytes: {about}{f'; {each}' if each else ''}"
