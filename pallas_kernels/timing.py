"""How calls are timed; knows no attention."""

import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(call: Callable[..., Any], *args: Any) -> float:
    """Wall-clock seconds of one call that returns when its work is done."""
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


def fastest(function: Callable[..., Any], *args: Any, rounds: int = 3, least: float = 0.0) -> float:
    """Seconds of one call: the smallest mean of a few rounds, after a call that does not count.

    A round has as many calls as fill `least` seconds, and waits for the last one only: short calls are timed without
    the latency of the host.
    """

    def run(count: int) -> None:
        for _ in range(count):
            out = function(*args)
        jax.block_until_ready(out)

    run(1)
    count = max(1, min(1000, int(least / max(seconds(run, 1), 1e-6)))) if least else 1
    return min(seconds(run, count) / count for _ in range(rounds))


def compile_seconds(call: Callable[[], Any]) -> float:
    """How much longer the first call took than the second."""
    first, second = seconds(call), seconds(call)
    return first - second
