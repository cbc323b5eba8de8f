"""Nested settings as plain values: where two of them differ."""

from collections.abc import Iterator, Mapping
from typing import Any


def differing(first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name of each setting that differs, and both values; None where one has none."""
    for name in sorted({*first, *other}):
        ours, theirs = first.get(name), other.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from differing(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            yield f"{prefix}{name}", ours, theirs


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was changed between two nested settings, a phrase for each."""
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in differing(before, now)]
