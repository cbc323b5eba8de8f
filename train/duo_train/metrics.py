"""The metrics of a training run: one JSON object per step in `metrics.jsonl`, written by the loop, read by plots."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax.files import append_text, write_text
from duo_jax.reading import json_lines, read_json_lines, read_text

# The file's name in a run's folder.
METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to the metrics file; on resume, first drops the lines after the checkpoint that the run resumes from.

    Without a path it writes nothing: in a run of several processes only the first one writes.

    Raises:
        ValueError: a file that is not a file of metrics.
    """

    def __init__(self, path: Path | None, done: int) -> None:
        self.path = path
        if path is None:
            return
        text = read_text(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # Without a line that a kill cut off.
        kept = [record for place, record in json_lines(whole, path) if _numbers(record, place)["step"] <= done]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append a line at once, so that a killed process loses none."""
        if self.path is not None:
            append_text(self.path, json.dumps(record) + "\n")


def read_metrics(path: Path) -> dict[str, Float[np.ndarray, "S"]]:
    """Every numeric field of a metrics file, one number per line; NaN where a line does not have the field.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or a line without metrics; the message has the line's number.
    """
    try:
        records = [_numbers(record, place) for place, record in read_json_lines(path)]
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: give the folder of a training run") from None
    if not records:
        raise ValueError(f"{path} is empty, at line 1: training writes a line for each step, wait for the first")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([record.get(name, np.nan) for record in records], float) for name in names}


def _numbers(record: Mapping[str, Any], place: str) -> dict[str, float]:
    numbers = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if "step" not in numbers:
        raise ValueError(f"{place} has no number 'step': {str(record)[:60]}")
    return numbers
