"""What a section is, and how a GPU is timed."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax

Case = dict[str, Any]
# Calls in a row.
CHAIN = 8


@runtime_checkable
class Section(Protocol):
    """A module of this package: its cases, and how one is measured."""

    def cases(self, *, smoke: bool) -> Iterator[Case]:
        """What is to be measured, as JSON, in order; toy sizes for `smoke`."""

    def measure(self, case: Case) -> dict[str, Any]:
        """What was found, as JSON."""

    def line(self, case: Case, found: dict[str, Any]) -> str:
        """That in words."""


def fastest(function: Callable[..., Any], *args: Any, least: float = 0.1, rounds: int = 3) -> float:
    """Seconds of one call: the best mean of a few rounds, each of as many calls as fill `least` seconds."""
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


def seconds_of_layer(attend: Callable[..., jax.Array], q: jax.Array, *rest: Any) -> float:
    """Seconds of one call of `attend(q, *rest)`, of many in one program: a short kernel is over before the next launch.

    Each call's queries are the outputs of the one before.
    """

    @jax.jit
    def chain(q: jax.Array, *rest: Any) -> jax.Array:
        return jax.lax.fori_loop(0, CHAIN, lambda _, q: attend(q, *rest), q)

    return fastest(chain, q, *rest) / CHAIN


def first_line(error: Exception) -> str:
    """An error in a line."""
    said = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {said}"
