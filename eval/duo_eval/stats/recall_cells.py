"""Recall's results by cell: how well each method does at each length, sparsity and size, with intervals."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duo_eval.runner.record import read
from duo_eval.stats.intervals import Estimate, ratio

# The baselines, as jobs name them; each random pattern has a number as well.
FULL_ATTENTION, STREAMING, RANDOM = "full attention", "all streaming", "random"


class Key(NamedTuple):
    """Identifies a cell. Full attention has neither sinks nor a window."""

    length: int
    method: str
    sparsity: float
    sink_size: int
    recent_size: int

    @property
    def kv_fraction(self) -> float:
        """KV tokens held, as a fraction of full attention's."""
        ring = min(self.length, self.sink_size + self.recent_size)
        return 1 - self.sparsity * (1 - ring / self.length)


@dataclass(frozen=True)
class Cell:
    """Accuracy and likelihood of a cell's passkeys."""

    passkeys: int
    accuracy: Estimate
    accuracy_difference: Estimate
    nll: Estimate
    nll_difference: Estimate


def full(length: int) -> Key:
    """The cell with which others are compared."""
    return Key(length, FULL_ATTENTION, 0.0, 0, 0)


def recall_cells(path: Path, *, prose: bool = False) -> tuple[dict[str, Any], dict[Key, Cell]]:
    """The head of a file and its cells; random patterns are one method.

    Cells of a length without results of full attention, with which they are compared, are left out.
    """
    head, records = read(path)
    samples: dict[Key, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["job"]["prose"] == prose:
            samples.setdefault(_key(record["job"], head["about"]), {})[record["job"]["sample"]] = record
    cells = {}
    for key, own in samples.items():
        base = samples.get(full(key.length), {})
        numbers = sorted(set(own) & set(base))
        if not numbers:
            continue
        drawn = _drawn(own, numbers)
        tokens, hits, nll = (_column(own, drawn, name) for name in ("tokens", "hits", "nll"))
        cells[key] = Cell(
            sum(len(own[number]["tokens"]) for number in numbers),
            ratio(hits, tokens),
            ratio(hits, tokens, _column(base, drawn, "hits")),
            ratio(nll, tokens),
            ratio(nll, tokens, _column(base, drawn, "nll")),
        )
    return head, cells


def _key(job: dict[str, Any], about: dict[str, Any]) -> Key:
    method = RANDOM if job["method"].startswith(RANDOM) else job["method"]
    if method == FULL_ATTENTION:
        return full(job["length"])
    sizes = (job.get(name, about[name]) for name in ("sink_size", "recent_size"))
    return Key(job["length"], method, job["sparsity"], *sizes)


def _drawn(samples: dict[int, dict[str, Any]], numbers: list[int]) -> list[list[int]]:
    """Samples by independent draw: all samples of one random pattern are one draw, any other sample is its own."""
    groups: dict[Any, list[int]] = {}
    for number in numbers:
        method = samples[number]["job"]["method"]
        groups.setdefault(method if method.startswith(RANDOM) else number, []).append(number)
    return [*groups.values()]


def _column(samples: dict[int, dict[str, Any]], drawn: list[list[int]], name: str) -> np.ndarray:
    return np.array([sum(sum(samples[number][name]) for number in group) for group in drawn], np.float64)
