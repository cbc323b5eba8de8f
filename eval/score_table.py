"""Tables for every evaluation that scores answers: methods and budgets, with 95 % intervals and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.asking import FULL, question_of
from eval.intervals import of_differences, of_scores
from eval.ledger import read
from eval.record import origin

# Fields of a job that make a row of their own, where a job has them.
ROWS = ("task", "subset", "length")
NOTHING = "No job is finished yet."

Record = Mapping[str, Any]


def score_summary(path: Path) -> str:
    """Methods by lengths: mean scores in percent; and over all lengths the paired difference to full attention."""
    head, records = read(path)
    scored = _scored(records)
    if not scored:
        return NOTHING
    full, lengths = _of_full(scored), sorted({record["job"]["length"] for record in scored})
    lines = [
        "| method | KV budget | " + " | ".join(f"{length} tokens" for length in lengths) + " | minus full, points |",
        "| --- " + "| --: " * (2 + len(lengths)) + "|",
    ]
    for (method, budget), found in _grouped(scored, "method", "budget").items():
        cells = [_score(here) for here in (_grouped(found, "length").get((length,)) for length in lengths)]
        lines.append("| " + " | ".join([method, f"{budget:.0%}", *cells, _minus_full(found, full)]) + " |")
    return "\n".join([*lines, "", *_about(head, records)])


def score_table(path: Path) -> str:
    """Every cell: mean scores in percent, the paired difference to full attention, KV bytes held after the prompt."""
    head, records = read(path)
    scored = _scored(records)
    if not scored:
        return NOTHING
    full = _of_full(scored)
    names = [name for name in ROWS if name in scored[0]["job"]]
    lines = [
        "| " + " | ".join([*names, "method", "budget", "score, %", "minus full, points", "KV held, MB"]) + " |",
        "| --- " * (len(names) + 1) + "| --: " * 4 + "|",
    ]
    groups = _grouped(scored, *names, "method", "budget")
    # By what was asked; methods in the order in which they were asked.
    for key in sorted(groups, key=lambda key: [str(part).rjust(12) for part in key[: len(names)]]):
        found = groups[key]
        held = np.array([record.get("held_bytes", np.nan) for record in found])
        kept = f"{held[np.isfinite(held)].mean() / 1e6:.1f}" if np.isfinite(held).any() else ""
        cells = [*map(str, key[:-1]), f"{key[-1]:.0%}", _score(found), _minus_full(found, full), kept]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_about(head, records)])


def _scored(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.get("score") is not None]


def _of_full(records: Iterable[Record]) -> dict[str, Record]:
    """Full attention's answers by question."""
    return {question_of(record): record for record in records if record["job"]["method"] == FULL}


def _grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by these fields of their jobs."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record["job"][name] for name in names), []).append(record)
    return found


def _score(records: list[Record] | None) -> str:
    if not records:
        return ""
    return f"{of_scores(_scores(records)).scaled(100).format('.1f')}, n = {len(records)}"


def _minus_full(records: list[Record], full: Mapping[str, Record]) -> str:
    """Over the questions that full attention answered too."""
    pairs = [(record, full[question_of(record)]) for record in records if question_of(record) in full]
    if not pairs or records[0]["job"]["method"] == FULL:
        return ""
    ours, theirs = (_scores([pair[side] for pair in pairs]) for side in (0, 1))
    return of_differences(ours, theirs).scaled(100).format("+.1f")


def _scores(records: Iterable[Record]) -> np.ndarray:
    return np.array([record["score"] for record in records], np.float64)


def _about(head: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    refused = len(records) - len(_scored(records))
    note = f"{refused} questions have no score: their method could not hold them within its budget. " if refused else ""
    command = f"duo eval {head['about']['task']}"
    return [f"95 % intervals; differences are paired. {note}{origin(head['runs'], command)}" if head["runs"] else note]
