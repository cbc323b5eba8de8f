"""Every type of result, in the order of a report. To add one: a `ResultType` in its measurement's file, a row here."""

from pathlib import Path
from typing import Any

from duo_eval.aot import context, kernels, memory, paper
from duo_eval.gpu_suite import results as gpu_suite
from duo_eval.runner.provenance import host
from duo_eval.runner.record import first_object, read
from duo_eval.show import families, patterns, score_table
from duo_eval.show.result_type import ResultType
from duo_eval.speed import adapter, efficiency_results, startup, training
from duo_eval.speed.serving import bench as serving
from duo_eval.tasks import item_by_item, keys, precision, recall_results
from duo_eval.tasks.choose import results as choose
from duo_eval.tasks.lm_eval import command as harness
from duo_eval.tasks.needle import command as needle
from duo_eval.tasks.needle import heads
from duo_jax.pattern.files import GATES_FILE

# The first that matches a file is its type.
RESULT_TYPES: tuple[ResultType, ...] = (
    needle.RESULT,
    heads.RESULT,
    choose.RESULT,
    score_table.RESULT,
    item_by_item.RESULT,
    recall_results.RESULT,
    harness.RESULT,
    precision.RESULT,
    keys.RESULT,
    efficiency_results.RESULT,
    adapter.RESULT,
    training.RESULT,
    startup.RESULT,
    families.RESULT,
    serving.RESULT,
    context.MESHES_RESULT,
    context.RESULT,
    memory.RESULT,
    paper.RESULT,
    kernels.RESULT,
    gpu_suite.RESULT,
    patterns.RESULT,
    score_table.OTHER_RESULT,
)
# Names of tasks that share a type.
TASKS = {"ruler": "RULER", "longbench": "LongBench", "mmlu": "MMLU", "humaneval": "HumanEval"}


def type_of(path: Path) -> ResultType | None:
    """The type of a file of results, or of the folder of a pattern; None if it is not known.

    Raises:
        ValueError: neither JSON nor JSON lines.
    """
    if (path / GATES_FILE).exists():
        return patterns.RESULT
    # A file of results may have any name, but only these must be one.
    if path.suffix not in (".json", ".jsonl") and not _begins_as_object(path):
        return None
    first = first_object(path)
    return next((kind for kind in RESULT_TYPES if kind.matches(first)), None)


def _begins_as_object(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"{"


def contents(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Head and results of a file; a pattern's folder has none."""
    return ({"about": {}, "runs": []}, []) if path.is_dir() else read(path)


def title_of(kind: ResultType, path: Path) -> str:
    """The heading of a file: its task's name, or that of its type."""
    return TASKS.get(contents(path)[0]["about"].get("task", ""), kind.title)


def order(kind: ResultType, title: str) -> tuple[int, int]:
    """The place of a section: by type, then by task."""
    return RESULT_TYPES.index(kind), [*TASKS.values(), title].index(title)


def about(path: Path) -> dict[str, str]:
    """Provenance of a file: device, processor, versions, command, and the commits and days of all its runs."""
    runs = contents(path)[0]["runs"]
    if not runs:
        return {}
    last, machine = runs[-1], runs[-1]["machine"]
    versions = {"Python": machine["python"], **machine["versions"]}
    # Version 0.1 stored no day.
    days = {"measured": ", ".join(dict.fromkeys(run["date"] for run in runs if "date" in run))}
    return ({"device": last["device"]} if last.get("device", "cpu") != "cpu" else {}) | {
        "processor": host(machine),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": ", ".join(dict.fromkeys(run["machine"]["commit"] for run in runs)),
        **(days if days["measured"] else {}),
        "command": last["command"],
    }
