"""What this GPU can do at most: the ceilings of every other section."""

from collections.abc import Iterator
from typing import Any

from duo_eval.gpu_suite.section import Case
from duo_eval.speed.ceilings import bytes_per_second, flops_per_second


def cases(*, smoke: bool) -> Iterator[Case]:
    """Reading memory, and a large matrix product."""
    yield {"what": "read"}
    yield {"what": "matmul"}


def measure(case: Case) -> dict[str, Any]:
    """Bytes or operations a second."""
    if case["what"] == "read":
        return {"bytes_per_second": bytes_per_second()}
    return {"flops_per_second": flops_per_second("bfloat16")}


def line(case: Case, result: dict[str, Any]) -> str:
    """The rate."""
    if case["what"] == "read":
        return f"read: {result['bytes_per_second'] / 1e12:.2f} TB/s"
    return f"matmul: {result['flops_per_second'] / 1e12:.0f} TFLOP/s"
