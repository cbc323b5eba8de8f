"""LongBench's rows: a file of JSON lines for each task in a folder, or the hub. Knows no prompts and no metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duo_train.data.haystack import hub_rows, json_rows


def load_rows(name: str, folder: Path | None, source: tuple[str, str, str]) -> list[dict[str, Any]]:
    """All rows of a task, each checked.

    Args:
        name: the task: its file is NAME.jsonl.
        folder: where the file lies; None takes the hub.
        source: data set, subset and split on the hub.

    Raises:
        FileNotFoundError: no such file or data set, or no connection.
        ValueError: a row that is not one of LongBench's, with its line.
    """
    if folder is None:
        path, subset, split = source
        rows = hub_rows(path, subset, split=split)
    else:
        file = file_of(name, folder)
        try:
            rows = json_rows(file, file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no {file}: --data is a folder of LongBench's files, one TASK.jsonl each"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    found = [_checked(place, row) for place, row in rows]
    if not found:
        raise ValueError(f"{name} has no rows")
    return found


def file_of(name: str, folder: Path) -> Path:
    """Where a task's rows are."""
    return folder.expanduser() / f"{name}.jsonl"


def _checked(place: str, row: object) -> dict[str, Any]:
    """A row with the names that lm-eval's prompts have: there, LongBench's `input` is a question."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    found = {"question": row.get("input", ""), "all_classes": None, **row}
    for name in ("context", "question"):
        if not isinstance(found.get(name), str):
            raise ValueError(f"{place}: no string in field {name!r}, got {str(found.get(name))[:60]!r}")
    for name in ("answers", "all_classes"):
        value = found.get(name)
        is_list = isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
        if not is_list and (name == "answers" or value is not None):
            raise ValueError(f"{place}: no list of strings in field {name!r}, got {str(value)[:60]!r}")
    return found
