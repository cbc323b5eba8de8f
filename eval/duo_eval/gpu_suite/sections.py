"""The sections of the suite, and how their results are measured and shown."""

from typing import Any

from duo_eval.gpu_suite import addresses, ceilings, decode, first, model, numerics, prefill, tune
from duo_eval.gpu_suite.section import Case, Section
from duo_eval.runner.process import first_line
from pallas_kernels import Unsupported

# In the order in which they run: what time must not run out for comes first.
SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "first": first,
    "prefill": prefill,
    "decode": decode,
    "tune": tune,
    "addresses": addresses,
    "model": model,
    "numerics": numerics,
}
# Sections whose cases have no backend.
WITHOUT_BACKEND = {"ceilings", "tune"}


def measure(section: str, case: Case) -> dict[str, Any]:
    """The result of one case; "cannot" if the backend does not support it."""
    try:
        return SECTIONS[section].measure(case)
    except Unsupported as error:
        return {"cannot": first_line(error)}


def describe(section: str, result: dict[str, Any]) -> str:
    """A stored result in one line."""
    return result.get("failed") or result.get("cannot") or SECTIONS[section].line(result["case"], result)
