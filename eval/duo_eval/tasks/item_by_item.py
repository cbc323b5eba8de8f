"""Short tasks, item by item: methods answer in batches, through lm-eval's adapter; and how their answers compare.

Knows no task: an item has a name, requests as lm-evaluation-harness has them, and a function that judges the responses.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import read, sha256
from duo_eval.runner.run import Comparison, MethodJob, refused
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.show.style import label
from duo_eval.stats.intervals import of_differences, of_scores
from duo_eval.stats.scores import FULL, NOTHING
from duo_jax import LM, Model

# Half of the heads stream: a KV budget of a half is less than such windows take of a short prompt.
SHORT = Comparison(
    methods=(FULL, "duo:sparsity=0.5,sink_size=32,recent_size=128", "duo:sparsity=0.5,sink_size=16,recent_size=64")
)
# Items that all methods answer before the next: the file is a usable result after each stage.
STAGE = 500
COLUMNS = ("method", "n", "right, %", "same answer, %", "both right or both wrong, %", "minus full, points")


@dataclass(frozen=True)
class ItemJob(MethodJob):
    """One item, for one method."""

    item: str


@dataclass(frozen=True, eq=False)
class Item:
    """A question.

    Attributes:
        name: identifies it.
        requests: context and continuation, to be scored; or context and settings of a generation.
        room: most tokens that a request needs after its context.
        result: the fields of a result from the responses to all requests and the number of tokens of the first context;
            among them "answer" and "correct".
    """

    name: str
    requests: Sequence[tuple[str, Any]]
    room: int
    result: Callable[[list[Any], int], Mapping[str, Any]]


def compare(
    out: Path,
    about: Mapping[str, Any],
    items: Sequence[Item],
    *,
    comparison: Comparison,
    batch_size: int,
    backend: str | None,
) -> None:
    """Run the missing items, stage by stage, then print how the methods compare.

    Raises:
        ValueError: two items of one name, or what `Comparison.run` refuses.
    """
    try:
        from duo_eval.tasks.lm_eval.adapter import DuoLM
    except ImportError as error:
        raise NotImplementedError(f"short tasks need lm-eval ({error}): pip install 'duo-jax[eval]'") from None
    if repeated := [name for name, count in Counter(item.name for item in items).items() if count > 1]:
        raise ValueError(f"the data has several items named {repeated[0]!r}")
    tokenizer, by_name = comparison.tokenizer, {item.name: item for item in items}
    lengths = {item.name: len(tokenizer.encode(item.requests[0][0])) for item in items}
    stages = [items[begin : begin + STAGE] for begin in range(0, len(items), STAGE)]

    def jobs() -> Iterator[ItemJob]:
        for stage in stages:
            for method, budget in comparison.cells():
                yield from (ItemJob(method, budget, item.name) for item in stage)

    def answer(model: Model, jobs: Sequence[ItemJob]) -> Iterator[tuple[ItemJob, Mapping[str, Any]]]:
        options: dict[str, Any] = {"batch_size": batch_size, "backend": backend, "progress": False}
        adapters = {
            (name, budget): DuoLM(LM(model, tokenizer), method=comparison.resolved[name], budget=budget, **options)
            for name, budget in comparison.cells()
        }
        for cell, group in groupby(jobs, lambda job: (job.method, job.budget)):
            fitting = []
            for job in group:
                try:
                    comparison.resolved[job.method].check(model, job.budget, lengths[job.item])
                    fitting.append(job)
                except ValueError as error:
                    yield job, refused(error, lengths[job.item])
            for job, responses in _answers(adapters[cell], fitting, by_name) if fitting else ():
                yield job, by_name[job.item].result(responses, lengths[job.item])

    longest = max(lengths[item.name] + item.room for item in items)
    results = comparison.run(
        out, about, jobs(), lambda job: by_name[job.item], answer=answer, longest=longest, shortest=None
    )
    table = Table(*COLUMNS)
    for row in compared(result for result in results if result["job"]["item"] in by_name):
        table.add_row(*row)
    Console().print(table)


def _answers(adapter: Any, jobs: Sequence[ItemJob], items: Mapping[str, Item]) -> Iterator[tuple[ItemJob, list[Any]]]:
    """Each job with the responses to all requests of its item, once it has them."""
    requests = [(job, request) for job in jobs for request in items[job.item].requests]
    responses: dict[ItemJob, dict[int, Any]] = {job: {} for job in jobs}
    for index, response in adapter.responses([request for _, request in requests]):
        job = requests[index][0]
        responses[job][index] = response
        if len(responses[job]) == len(items[job.item].requests):
            yield job, [responses[job][index] for index in sorted(responses[job])]


def compared(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row of `COLUMNS` for each method and budget, over the items that it and full attention answered."""
    by_method: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        if "answer" in result:
            job = result["job"]
            budget = job.get("budget", 1.0)  # Files of version 0.1 have none.
            by_method.setdefault((job["method"], budget), {})[job["item"]] = result
    full = by_method.get((FULL, 1.0), {})
    rows = []
    for (method, budget), by_item in by_method.items():
        pairs = [(full[item], result) for item, result in by_item.items() if item in full]
        if not pairs:
            continue
        reference, correct = (np.array([float(pair[side]["correct"]) for pair in pairs]) for side in (0, 1))
        same = np.array([float(base["answer"] == result["answer"]) for base, result in pairs])
        shares = [of_scores(correct), of_scores(same), of_scores((correct == reference).astype(float))]
        cells = [share.scaled(100).format(".1f") for share in shares]
        cells.append(of_differences(correct, reference).scaled(100).format("+.1f"))
        name = label(method) if budget == 1 else f"{label(method)} at {budget:g}"
        rows.append([name, str(len(pairs)), *(cells if method != FULL else [cells[0], "", "", ""])])
    return rows


def short_table(path: Path) -> str:
    """How full attention and other methods compare, item by item."""
    head, results = read(path)
    if not results:
        return NOTHING
    command = f"duo eval {head['about']['task']}"
    return f"{rows_to_table(compared(results), COLUMNS)}\n\n95 % intervals. {origin(head['runs'], command)}"


RESULT = ResultType(
    "Short tasks", of_task("mmlu", "humaneval"), {"Compared with full attention": short_table}, group="Accuracy"
)


def digest(path: Path) -> str:
    """Fingerprint of a data file."""
    return sha256(path.read_bytes())
