"""Tables for every evaluation that scores answers: methods and budgets, with 95 % intervals and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duo_eval.runner.ledger import read
from duo_eval.runner.record import origin
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.scores import FULL, NOTHING, Record, by_method, difference, grouped, mean, scored, shared

# Fields of a job that make a row of their own, where a job has them.
ROWS = ("task", "subset", "length")


def score_summary(path: Path, *, budget: float | None = None) -> str:
    """Methods by lengths, over the questions that all of a column have a score for; and each beside full attention.

    With `budget` that one alone, and full attention.
    """
    head, records = read(path)
    having = [one for one in scored(records) if budget is None or one["job"]["budget"] in (budget, 1.0)]
    if not having:
        return NOTHING
    with_length = "length" in having[0]["job"]
    columns = grouped(having, *(("length",) if with_length else ()))
    fair = {key: shared(found) for key, found in sorted(columns.items())}
    everybody = by_method(having)
    # As many questions for each method: those that all were asked.
    counts = [len(column) // max(1, len(by_method(column))) for column in fair.values()]
    names = [f"{key[0]} tokens" if with_length else "score, %" for key in fair]
    names = [f"{name}, n = {count}" for name, count in zip(names, counts, strict=True)]
    lines = [
        "| method | KV budget | " + " | ".join(names) + " | minus full, points |",
        "| --- " + "| --: " * (2 + len(names)) + "|",
    ]
    full = [record for record in having if record["job"]["method"] == FULL]
    for (method, share), found in everybody.items():
        mine = [by_method(column).get((method, share)) for column in fair.values()]
        cells = [_percent(mean(here)) if here else "" for here in mine]
        lines.append("| " + " | ".join([method, f"{share:.0%}", *cells, _minus_full(found, full, count=True)]) + " |")
    return "\n".join([*lines, "", *_about(head, records)])


def score_table(path: Path) -> str:
    """Every cell: mean scores in percent, the paired difference to full attention, and bytes of keys and values."""
    head, records = read(path)
    having = scored(records)
    if not having:
        return NOTHING
    full = [record for record in having if record["job"]["method"] == FULL]
    names = [name for name in ROWS if name in having[0]["job"]]
    titles = [*names, "method", "budget", "score, %", "minus full, points", "KV held, MB", "KV at most, MB"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * (len(names) + 1) + "| --: " * 5 + "|"]
    groups = grouped(having, *names, "method", "budget")
    # By what was asked; methods in the order in which they were asked.
    for key in sorted(groups, key=lambda key: [str(part).rjust(12) for part in key[: len(names)]]):
        found = groups[key]
        score = f"{_percent(mean(found))}, n = {len(found)}"
        cells = [*map(str, key[:-1]), f"{key[-1]:.0%}", score, _minus_full(found, full)]
        cells += [_megabytes(found, field) for field in ("held_bytes", "peak_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    what = "*Held* after the prompt; *at most* while it was taken in, one layer's tokens beside the cache included."
    return "\n".join([*lines, "", what, *_about(head, records)])


def _percent(found: Estimate) -> str:
    return found.scaled(100).format(".1f")


def _minus_full(records: Sequence[Record], full: Sequence[Record], *, count: bool = False) -> str:
    found = difference(records, full) if records[0]["job"]["method"] != FULL else None
    if found is None:
        return ""
    return found[0].scaled(100).format("+.1f") + (f", n = {found[1]}" if count else "")


def _megabytes(records: Sequence[Record], field: str) -> str:
    values = [record[field] for record in records if field in record]
    return f"{np.mean(values) / 1e6:.1f}" if values else ""


def _about(head: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    refused = len(records) - len(scored(records))
    note = f"{refused} questions have no score: their method could not hold them within its budget. " if refused else ""
    where = origin(head["runs"], f"duo eval {head['about']['task']}") if head["runs"] else ""
    what = "95 % intervals; differences are paired, over all that was asked: rows of another n had other questions."
    return [f"{what} {note}{where}"]
