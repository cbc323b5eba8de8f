"""Data files of tasks: JSON lines, with a check of the fields of every row. Knows no task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from duo_jax.arrays import first_names
from duo_jax.reading import read_json_lines


def read_rows(
    path: Path,
    fields: Sequence[str] = (),
    wrong: Callable[[dict[str, Any]], str | None] = lambda row: None,
    *,
    texts: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of a `.jsonl` or `.jsonl.gz` file, in their order; blank lines are skipped.

    Args:
        path: the file.
        fields: names that every row must have.
        wrong: function of a row that returns a complaint, or None.
        texts: names of fields that every row must have, with text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that `read_json_lines` refuses; a line that lacks a field or gets a complaint, with its
            number; or no rows.
    """
    if not path.exists():
        raise FileNotFoundError(f"no data file at {str(path)!r}")
    rows = []
    for place, row in read_json_lines(path):
        missing = [field for field in (*fields, *texts) if field not in row]
        if missing:
            raise ValueError(f"{place}: no {', '.join(missing)}, only {first_names([*row])}")
        for field in texts:
            if not isinstance(row[field], str):
                raise ValueError(f"{place}: {field} must be a text, got {row[field]!r:.80}")
        if complaint := wrong(row):
            raise ValueError(f"{place}: {complaint}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
