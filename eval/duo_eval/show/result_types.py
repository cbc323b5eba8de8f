"""Which kinds of results there are: how each is recognized, which tables and figures show it. One is a row of `KINDS`.

Figures are named, not imported: matplotlib comes with an extra.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from duo_eval.runner.ledger import read
from duo_eval.runner.record import host
from duo_eval.show.efficiency_tables import efficiency_table
from duo_eval.show.score_table import score_summary, score_table
from duo_eval.show.tables import (
    adapter_table,
    harness_table,
    kernels_table,
    memory_table,
    mesh_table,
    plan_table,
    prose_table,
    recall_details,
    recall_table,
    suite_table,
    training_table,
)
from duo_eval.tasks.precision import precision_table
from duo_eval.tasks.short.compare import short_table
from duo_jax.pattern import GATES_FILE


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        title: of its part of a report.
        holds: whether a file is of this kind, by its first JSON value.
        tables: functions of the path, in Markdown, by caption.
        figures: "module:function" of the path, each yields figures, small enough for a phone.
        poster: "module:function" of the path, which gives all that the first of `figures` yields in one figure.
    """

    title: str
    holds: Callable[[dict[str, Any]], bool]
    tables: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)
    figures: tuple[str, ...] = ()
    poster: str | None = None

    def draw(self, path: Path, *, beside_poster: bool = False) -> Iterator[Any]:
        """The figures of a file, or those that its poster lacks."""
        for name in self.figures[1:] if beside_poster and self.poster else self.figures:
            yield from resolve_name(name)(path)


def _of_task(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda first: isinstance(first.get("about"), dict) and first["about"].get("task") in names


def _with(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Its first result has these fields."""

    def holds(first: dict[str, Any]) -> bool:
        results = first.get("results")
        return isinstance(results, list) and bool(results) and set(names) <= set(results[0])

    return holds


def _is_recall(first: dict[str, Any]) -> bool:
    return {"about", "gates"} <= set(first) and {"sink_size", "data"} <= set(first["about"])


# In the order of a report; the first that holds counts.
KINDS: tuple[Kind, ...] = (
    Kind(
        "Needle in a haystack",
        _of_task("needle"),
        {"Scores": score_summary, "Every cell": score_table},
        ("duo_eval.show.heatmaps:needle_maps", "duo_eval.show.curves:score_curves"),
        poster="duo_eval.show.heatmaps:needle_poster",
    ),
    Kind("Short tasks, item by item", _of_task("mmlu", "humaneval"), {"Beside full attention": short_table}),
    Kind("Fewer bits", _of_task("precision"), {"Beside float32": precision_table}),
    Kind(
        "Recall of passkeys",
        _is_recall,
        {"Token accuracy": recall_table, "Every cell": recall_details, "Loss on the text itself": prose_table},
        ("duo_eval.show.curves:recall_curves",),
    ),
    Kind(
        "Scores",
        lambda first: isinstance(first.get("about"), dict) and "task" in first["about"],
        {"Scores": score_summary, "Every cell": score_table},
        ("duo_eval.show.curves:score_curves",),
    ),
    Kind(
        "Tasks of lm-evaluation-harness",
        lambda first: {"about", "results", "n-shot", "n-samples"} <= set(first),
        {"Scores": harness_table},
    ),
    Kind(
        "Time and memory",
        lambda first: _with("point", "prefill_seconds")(first) or _with("point", "cannot")(first),
        {"Every point": efficiency_table},
        ("duo_eval.show.curves:efficiency_curves",),
    ),
    Kind("Several GPUs, planned and compiled", _with("case", "mesh", "verified"), {"Of each GPU": mesh_table}),
    Kind("GPU kernels and models", _with("case"), {"Measurements": suite_table}),
    Kind("lm-eval's adapter beside transformers'", _with("max_difference", "speedup"), {"Requests": adapter_table}),
    Kind("A training step", _with("rematerialize"), {"Steps": training_table}),
    Kind("Memory, from the compiler", _with("program", "temporaries"), {"Programs": memory_table}),
    Kind("Longest contexts, planned and compiled", _with("dtypes", "context"), {"On one GPU": plan_table}),
    Kind("Kernels, from the compiler", _with("kernels", "backend"), {"Kernels": kernels_table}),
)


# A folder, not a file: gates, and what training says of them.
PATTERN = Kind("Head pattern", lambda first: False, figures=("duo_eval.show.curves:pattern_figures",))


def kind_of(path: Path) -> Kind | None:
    """The kind of a file of results, or of a pattern's folder; None if it is of no kind known.

    Raises:
        ValueError: neither JSON nor JSON lines.
    """
    if (path / GATES_FILE).exists():
        return PATTERN
    if path.suffix not in (".json", ".jsonl"):
        return None
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                first = json.loads(file.readline())
        else:
            first = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # Not UTF-8 is one too.
        raise ValueError(f"{path} is not JSON: {error}") from None
    return next((kind for kind in KINDS if isinstance(first, dict) and kind.holds(first)), None)


def about(path: Path) -> dict[str, str]:
    """Where a file's figures come from: device, versions, commit, command; of a file in pieces, every commit."""
    if path.is_dir():
        return {}
    runs = read(path)[0]["runs"] if path.suffix == ".jsonl" else [json.loads(path.read_text(encoding="utf-8"))]
    if not runs:
        return {}
    machine = runs[-1]["machine"]
    device = runs[-1].get("device", "cpu")
    found = {"device": device} if device != "cpu" else {}
    found["processor"] = host(machine)
    versions = {"Python": machine["python"], **machine["versions"]}
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    found["commit"] = ", ".join(dict.fromkeys(run["machine"]["commit"] for run in runs))
    found["command"] = runs[-1]["command"]
    return found
