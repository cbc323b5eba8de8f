"""Short tasks under full attention and head patterns, item by item: the loop, and the comparison of what was answered.

Knows no task: an item has a name, requests as lm-evaluation-harness has them, and a function that judges the responses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, fingerprint, read, sha256
from duo_eval.runner.run import Answer, run
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.stats.intervals import of_differences, of_scores
from duo_eval.stats.scores import FULL, NOTHING
from duo_jax import LM, HeadPattern
from duo_jax.cli.options import ModelOptions

SMOLLM2 = ModelOptions(model="smollm2-135m-instruct")
# Items that all methods answer before the next: the file is a usable result after each stage.
STAGE = 500
COLUMNS = ("method", "n", "right, %", "same answer, %", "both right or both wrong, %", "minus full, points")


@dataclass(frozen=True)
class Job:
    """One item under one method."""

    method: str
    item: str


@dataclass(frozen=True)
class Patterns:
    """Which head patterns are compared with full attention."""

    pattern: str = "smollm2-135m-instruct"
    """Head pattern: a published name or a folder."""
    sparsity: tuple[float, ...] = (0.5,)
    """Fractions of KV heads that stream."""
    sizes: tuple[str, ...] = ("32/128", "16/64")
    """Sinks and recent tokens of streaming heads, SINK/RECENT; each with each sparsity."""

    def load(self) -> dict[str, HeadPattern | None]:
        """Patterns by name; the first is full attention.

        Raises:
            ValueError: sizes that are not SINK/RECENT, or arguments that `HeadPattern.load` refuses.
        """
        patterns: dict[str, HeadPattern | None] = {FULL: None}
        for size in self.sizes:
            sink, slash, recent = size.partition("/")
            if not slash or not sink.isdigit() or not recent.isdigit():
                raise ValueError(f"--sizes takes SINK/RECENT, such as 32/128, got {size!r}")
            for sparsity in self.sparsity:
                window = {"sink_size": int(sink), "recent_size": int(recent)}
                patterns[f"{sparsity:g} {size}"] = HeadPattern.load(self.pattern, sparsity=sparsity, **window)
        return patterns


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
    model: ModelOptions,
    patterns: Patterns,
    batch_size: int,
    backend: str | None,
) -> None:
    """Run the missing items, stage by stage, then print how the methods compare.

    Raises:
        ValueError: a file with other settings, a pattern of another model, or an item that is too long for the model.
    """
    methods = patterns.load()
    # Methods are named by their sizes: a file is about one pattern, whatever its name.
    gates = {"pattern": fingerprint(HeadPattern.load(patterns.pattern))}
    record = Record.open(out, {**asdict(model), **about}, gates)
    by_name = {item.name: item for item in items}
    names = list(by_name)
    stages = [names[begin : begin + STAGE] for begin in range(0, len(names), STAGE)]
    jobs = [Job(method, name) for stage in stages for method in methods for name in stage]

    def prepare(missing: list[Job]) -> tuple[str, Answer[Job]]:
        try:
            from duo_eval.tasks.lm_eval.adapter import DuoLM
        except ImportError as error:
            raise NotImplementedError(f"short tasks need lm-eval ({error}): pip install 'duo-jax[eval]'") from None
        weights, tokenizer = model.load(), model.tokenizer()
        for pattern in filter(None, methods.values()):
            pattern.check(weights.config)
        lengths = {name: len(tokenizer.encode(by_name[name].requests[0][0])) for name in {job.item for job in missing}}
        limit = weights.config.trained_positions
        for name, length in lengths.items():
            if length + by_name[name].room > limit:
                raise ValueError(
                    f"{name} has {length} tokens and needs {by_name[name].room} more, beyond the model's {limit}: ask "
                    "for fewer shots or new tokens"
                )

        def answer(jobs: Sequence[Job]) -> Iterator[tuple[Job, Mapping[str, Any]]]:
            stage_of = {name: number for number, stage in enumerate(stages) for name in stage}
            for (method, _), group in groupby(jobs, lambda job: (job.method, stage_of[job.item])):
                lm = LM(weights, tokenizer, methods[method])
                adapter = DuoLM(lm, batch_size=batch_size, backend=backend, progress=False)
                for job, responses in _answers(adapter, list(group), by_name):
                    yield job, by_name[job.item].result(responses, lengths[job.item])

        return str(weights.dtype), answer

    run(record, jobs, prepare, unit="item")
    table = Table(*COLUMNS)
    for row in compared(result for result in record.results if result["job"]["item"] in by_name):
        table.add_row(*row)
    Console().print(table)


def _answers(adapter: Any, jobs: Sequence[Job], items: Mapping[str, Item]) -> Iterator[tuple[Job, list[Any]]]:
    """Each job with the responses to all requests of its item, once it has them."""
    requests = [(job, request) for job in jobs for request in items[job.item].requests]
    responses: dict[Job, dict[int, Any]] = {job: {} for job in jobs}
    for index, response in adapter.responses([request for _, request in requests]):
        job = requests[index][0]
        responses[job][index] = response
        if len(responses[job]) == len(items[job.item].requests):
            yield job, [responses[job][index] for index in sorted(responses[job])]


def compared(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row of `COLUMNS` for each method, over the items that full attention answered too."""
    by_method: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        by_method.setdefault(result["job"]["method"], {})[result["job"]["item"]] = result
    full = by_method.get(FULL, {})
    rows = []
    for method, by_item in by_method.items():
        pairs = [(full[item], result) for item, result in by_item.items() if item in full]
        if not pairs:
            continue
        reference, correct = (np.array([float(pair[side]["correct"]) for pair in pairs]) for side in (0, 1))
        same = np.array([float(base["answer"] == result["answer"]) for base, result in pairs])
        shares = [of_scores(correct), of_scores(same), of_scores((correct == reference).astype(float))]
        cells = [share.scaled(100).format(".1f") for share in shares]
        cells.append(of_differences(correct, reference).scaled(100).format("+.1f"))
        rows.append([method, str(len(pairs)), *(cells if method != FULL else [cells[0], "", "", ""])])
    return rows


def short_table(path: Path) -> str:
    """How full attention and head patterns compare, item by item."""
    head, results = read(path)
    if not results:
        return NOTHING
    command = f"duo eval {head['about']['task']}"
    return f"{rows_to_table(compared(results), COLUMNS)}\n\n95 % intervals. {origin(head['runs'], command)}"


RESULT = ResultType(
    "Short tasks, item by item", of_task("mmlu", "humaneval"), {"Compared with full attention": short_table}
)


def digest(path: Path) -> str:
    """Fingerprint of a data file."""
    return sha256(path.read_bytes())
