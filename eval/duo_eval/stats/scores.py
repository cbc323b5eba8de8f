"""Mean scores of methods at budgets, with 95 % intervals, and paired differences. Knows no task and no file.

Methods are compared over the questions for which all of them have a score: some may have been asked more questions than
others, and some could not hold a prompt within their budget. All tasks have the same weight, whatever their number of
questions.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_eval.stats.intervals import Estimate, of_differences, of_scores

# The name of full attention, which has no other budget than 1.
FULL = "full"
# The table of a file without results.
NOTHING = "No job is finished yet."

Record = Mapping[str, Any]


def question_of(record: Record) -> str:
    """Identifies the question of a record: its job without the method and the budget."""
    return json.dumps({name: value for name, value in record["job"].items() if name not in ("method", "budget")})


def scored(records: Iterable[Record]) -> list[Record]:
    """The records with a score."""
    return [record for record in records if record.get("score") is not None]


def shared(records: Iterable[Record]) -> list[Record]:
    """The records of questions for which every method has a score at each of its budgets."""
    with_score = scored(records)
    counts = Counter(question_of(record) for record in with_score)
    methods = len(by_method(with_score))
    return [record for record in with_score if counts[question_of(record)] == methods]


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by these fields of their jobs, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["job"][name] for name in names), []).append(record)
    return groups


def by_method(records: Iterable[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records by method and budget: methods in order of first appearance, budgets in increasing order."""
    groups = grouped(records, "method", "budget")
    methods = list(dict.fromkeys(method for method, _ in groups))
    return {key: groups[key] for key in sorted(groups, key=lambda key: (methods.index(key[0]), key[1]))}


def mean(records: Sequence[Record]) -> Estimate:
    """Mean score of the records of one method, all of which must have a score."""
    return of_scores(np.array([record["score"] for record in records], np.float64), _weights(records))


def difference(records: Sequence[Record], others: Iterable[Record]) -> tuple[Estimate, int] | None:
    """Mean difference between two methods over the questions that both were asked, and the number of questions."""
    other_scores = {question_of(record): record["score"] for record in others}
    paired = [record for record in records if question_of(record) in other_scores]
    if not paired:
        return None
    pairs = np.array([(record["score"], other_scores[question_of(record)]) for record in paired], np.float64)
    return of_differences(pairs[:, 0], pairs[:, 1], _weights(paired)), len(paired)


def _weights(records: Sequence[Record]) -> Float[np.ndarray, "S"]:
    """Weights with the same sum for every task."""
    tasks = [record["job"].get("task") for record in records]
    count = Counter(tasks)
    return np.array([1 / count[task] for task in tasks], np.float64)


def in_words(records: Iterable[Record]) -> Iterator[str]:
    """A line for each method at each budget: mean scores in percent, over all tasks and for each."""
    for (method, budget), group in by_method(shared(records)).items():
        tasks = grouped(group, "task") if "task" in group[0]["job"] else {}
        by_task = ", ".join(f"{task} {100 * mean(part).mean:.1f}" for (task,), part in tasks.items())
        overall = f"{mean(group).scaled(100).format('.1f')}, n = {len(group)}"
        yield f"{method} at {budget:g} of the KV bytes: {overall}{f'; {by_task}' if by_task else ''}"
