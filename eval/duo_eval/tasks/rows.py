"""Data files of tasks: JSON lines, with a check of the fields of every row. Knows no task."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def read_rows(
    path: Path, fields: Sequence[str] = (), wrong: Callable[[dict[str, Any]], str | None] = lambda row: None
) -> list[dict[str, Any]]:
    """Rows of a `.jsonl` or `.jsonl.gz` file, in their order; blank lines are skipped.

    Args:
        path: the file.
        fields: names that every row must have.
        wrong: function of a row that returns a complaint, or None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object, lacks a field or gets a complaint, with its number; or no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {str(path)!r}")
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not UTF-8 text, or is a truncated gzip file: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        missing = [field for field in fields if field not in row]
        if missing:
            raise ValueError(f"{path}:{number}: no {', '.join(missing)}, only {', '.join(row)}")
        complaint = wrong(row)
        if complaint:
            raise ValueError(f"{path}:{number}: {complaint}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
