"""What a section is, and how a GPU is timed."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

Case = dict[str, Any]


class Section(Protocol):
    """A module of this package: its cases, and how one is measured."""

    def cases(self, *, smoke: bool) -> Iterator[Case]:
        """What is to be measured, as JSON, in order; toy sizes for `smoke`."""

    def measure(self, case: Case) -> dict[str, Any]:
        """What was found, as JSON."""

    def line(self, case: Case, found: dict[str, Any]) -> str:
        """That in words."""


def fastest(function: Callable[..., Any], *args: Any, least: float = 0.1, rounds: int = 3) -> float:
    """Seconds of one call: the best mean of a few rounds, each of as many calls as fill `least` seconds.

    Calls are queued without waiting, so that what the host does is hidden behind what the device does.
    """
    jax.block_until_ready(function(*args))
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    count = max(1, min(1000, int(least / max(time.perf_counter() - begin, 1e-6))))
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(count):
            last = function(*args)
        jax.block_until_ready(last)
        found.append((time.perf_counter() - begin) / count)
    return min(found)
