"""A speed with its check in the first two minutes: prefill and decode in bfloat16, half of the heads streaming."""

from collections.abc import Iterator
from typing import Any

from duo_eval.gpu_suite import decode, prefill
from duo_eval.gpu_suite.section import Case

SECTIONS = {"prefill": prefill, "decode": decode}


def cases(*, smoke: bool) -> Iterator[Case]:
    """The first case of both operations."""
    for operation, section in SECTIONS.items():
        yield {"operation": operation} | next(section.cases(smoke=smoke))


def measure(case: Case) -> dict[str, Any]:
    """As in the operation's section."""
    return SECTIONS[case["operation"]].measure(case)


def line(case: Case, result: dict[str, Any]) -> str:
    """As in the operation's section."""
    return f"{case['operation']}, {SECTIONS[case['operation']].line(case, result)}"
