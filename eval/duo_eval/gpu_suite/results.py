"""The table of a section's results."""

from pathlib import Path

from duo_eval.gpu_suite.sections import describe
from duo_eval.runner.provenance import origin
from duo_eval.runner.record import read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields


def suite_table(path: Path) -> str:
    """The measurements of one section, a line for each case."""
    head, results = read(path)
    table = rows_to_table([[describe(path.stem, result)] for result in results], ["measured"])
    return f"{table}\n\n{origin(head['runs'], head['runs'][-1]['command'])}"


RESULT = ResultType("GPU kernels and models", with_fields("case"), {"Measurements": suite_table})
