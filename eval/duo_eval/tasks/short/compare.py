"""Items under full attention and head patterns: which methods there are, what is left to do, how they compare.

Knows no task: an item is a name, a record says what was answered and whether that was right.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, fingerprint, read, sha256
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.stats.intervals import of_differences, of_scores
from duo_eval.stats.scores import FULL, NOTHING
from duo_eval.tasks.harness.batches import Prefiller
from duo_jax import LM, HeadPattern
from duo_jax.cli.options import ModelOptions

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
            ValueError: sizes that are not SINK/RECENT, and what `HeadPattern.load` refuses.
        """
        found: dict[str, HeadPattern | None] = {FULL: None}
        for size in self.sizes:
            sink, given, recent = size.partition("/")
            if not given or not sink.isdigit() or not recent.isdigit():
                raise ValueError(f"--sizes takes SINK/RECENT, such as 32/128, got {size!r}")
            for sparsity in self.sparsity:
                chosen = HeadPattern.load(self.pattern, sparsity=sparsity, sink_size=int(sink), recent_size=int(recent))
                found[f"{sparsity:g} {size}"] = chosen
        return found


# From a model with a pattern and some items to (item, record) pairs, as they are answered.
Answer = Callable[[LM, Prefiller, Sequence[str]], Iterator[tuple[str, Mapping[str, Any]]]]


def run(
    out: Path,
    about: Mapping[str, Any],
    items: Sequence[str],
    answer: Answer,
    *,
    model: ModelOptions,
    patterns: Patterns,
    backend: str | None,
) -> None:
    """Answer what the file lacks, stage by stage, then print how the methods compare.

    Raises:
        ValueError: a file with other settings, or a pattern of another model.
    """
    methods = patterns.load()
    # Methods are named by sizes: the file is about one pattern, whatever its name.
    gates = {"pattern": fingerprint(HeadPattern.load(patterns.pattern))}
    record = Record.open(out, {**asdict(model), **about}, gates)
    stages = [items[begin : begin + STAGE] for begin in range(0, len(items), STAGE)]
    jobs = [Job(method, item) for stage in stages for method in methods for item in stage]
    missing = record.missing(jobs)
    if missing:
        weights, tokenizer = model.load(), model.tokenizer()
        for chosen in methods.values():
            if chosen is not None:
                chosen.check(weights.config)
        with (
            record.writing(dtype=str(weights.dtype)) as append,
            tqdm(total=len(missing), unit="item", dynamic_ncols=True) as bar,
        ):
            for stage in stages:
                for name, chosen in methods.items():
                    left = {job.item for job in missing if job.method == name} & set(stage)
                    if left:
                        prefiller = Prefiller(weights, chosen, backend=backend)
                        asked = [item for item in stage if item in left]
                        for item, result in answer(LM(weights, tokenizer, chosen), prefiller, asked):
                            append(Job(name, item), result)
                            bar.update(1)
    wanted = set(items)
    shown = Table(*COLUMNS)
    for row in compared(result for result in record.results if result["job"]["item"] in wanted):
        shown.add_row(*row)
    Console().print(shown)
    print(f"{out} has all of it")


def compared(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row of `COLUMNS` for each method, over the items that full attention answered too."""
    by_method: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record["job"]["method"], {})[record["job"]["item"]] = record
    full = by_method.get(FULL, {})
    rows = []
    for method, answered in by_method.items():
        pairs = [(full[item], record) for item, record in answered.items() if item in full]
        if not pairs:
            continue
        theirs, ours = (np.array([float(pair[side]["correct"]) for pair in pairs]) for side in (0, 1))
        same = np.array([float(one["answer"] == other["answer"]) for one, other in pairs])
        shares = [of_scores(ours), of_scores(same), of_scores((ours == theirs).astype(float))]
        cells = [share.scaled(100).format(".1f") for share in shares]
        cells.append(of_differences(ours, theirs).scaled(100).format("+.1f"))
        rows.append([method, str(len(pairs)), *(cells if method != FULL else [cells[0], "", "", ""])])
    return rows


def short_table(path: Path) -> str:
    """How full attention and head patterns compare, item by item."""
    head, records = read(path)
    if not records:
        return NOTHING
    command = f"duo eval {head['about']['task']}"
    return f"{rows_to_table(compared(records), COLUMNS)}\n\n95 % intervals. {origin(head['runs'], command)}"


RESULT = ResultType(
    "Short tasks, item by item", of_task("mmlu", "humaneval"), {"Compared with full attention": short_table}
)


def digest(path: Path) -> str:
    """What tells one data file from another."""
    return sha256(path.read_bytes())
