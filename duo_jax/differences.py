"""Differences between nested settings that are plain values."""

from collections.abc import Iterator, Mapping
from typing import Any


def differing(first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name of each setting that differs, and both values; None for a missing one."""
    for name in sorted({*first, *other}):
        left, right = first.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differing(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}", left, right


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase for each setting that changed."""
    return [f"{name} was {old!r}, now {new!r}" for name, old, new in differing(before, now)]
