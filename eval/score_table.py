"""One table for every evaluation that scores answers: method and budget by what was asked, with intervals."""

from pathlib import Path
from typing import Any

import numpy as np

from eval.asking import summarized
from eval.intervals import of_scores
from eval.ledger import read

# Fields of a job that make a row of their own, where a job has them.
ROWS = ("task", "subset", "length")


def score_table(path: Path) -> str:
    """Mean scores in percent with 95 % intervals, and the KV bytes held after the prompt."""
    _, records = read(path)
    if not records:
        return "No job is finished yet."
    names = [name for name in ROWS if name in records[0]["job"]]
    lines = [
        "| " + " | ".join([*names, "method", "budget", "n", "score, %", "KV held, MB"]) + " |",
        "| --- " * (len(names) + 1) + "| --: " * 4 + "|",
    ]
    held: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        key = tuple(record["job"][name] for name in (*names, "method", "budget"))
        held.setdefault(key, []).append(record.get("held_bytes", np.nan) / 1e6)
    for key, scores in sorted(summarized(records, *names, "method", "budget").items(), key=lambda item: str(item[0])):
        found = of_scores(np.array(scores, np.float64)).scaled(100)
        shown = found.format(".1f") if np.isfinite(found.low) else f"{found.mean:.1f}"
        kept = np.nanmean(held[key]) if np.isfinite(held[key]).any() else None
        cells = [*map(str, key[:-1]), f"{key[-1]:g}", str(len(scores)), shown, "" if kept is None else f"{kept:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    refused = sum(record.get("score") is None for record in records)
    if refused:
        lines += ["", f"{refused} questions have no score: their method could not hold them within its budget."]
    return "\n".join(lines)
