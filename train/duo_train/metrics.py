"""The metrics of a training run: one JSON object per step in `metrics.jsonl`, written by the loop, read by plots."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax.files import write_text

# The file's name in a run's folder.
METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to the metrics file; on resume, first drops the lines after the checkpoint that the run resumes from.

    Without a path it writes nothing: in a run of several processes only the first one writes.
    """

    def __init__(self, path: Path | None, done: int) -> None:
        self.file = None
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        write_text(path, "".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append a line and flush it, so that a killed process loses none."""
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


def read_metrics(path: Path) -> dict[str, Float[np.ndarray, "S"]]:
    """Every numeric field of a metrics file, one number per line; NaN where a line does not have the field.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or a line without metrics; the message has the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: give the folder of a training run") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    records = [_numbers(line, f"{path} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise ValueError(f"{path} is empty, at line 1: training writes a line for each step, wait for the first")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([record.get(name, np.nan) for record in records], float) for name in names}


def _numbers(line: str, place: str) -> dict[str, float]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object with metrics: {line[:60]!r}")
    numbers = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if not np.isfinite(numbers.get("step", np.nan)):
        raise ValueError(f"{place} has no number 'step': {line[:60]!r}")
    return numbers
