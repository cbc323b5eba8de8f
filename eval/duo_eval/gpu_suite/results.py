"""The table of a section's results."""

import json
from pathlib import Path

from duo_eval.gpu_suite.sections import describe
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields


def suite_table(path: Path) -> str:
    """The measurements of one section, a line for each case."""
    record = json.loads(path.read_text(encoding="utf-8"))
    table = rows_to_table([[describe(path.stem, result)] for result in record["results"]], ["measured"])
    return f"{table}\n\n{record['device']}, commit {record['machine']['commit']}; `{record['command']}`."


RESULT = ResultType("GPU kernels and models", with_fields("case"), {"Measurements": suite_table})
