"""Differences between nested settings that are plain values."""

from collections.abc import Iterator, Mapping
from typing import Any

# Of a message: files may have any settings, and as many as they like.
MOST_SHOWN, MOST_CHARACTERS = 5, 60


def differing(first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name of each setting that differs, and both values; None for a missing one."""
    for name in sorted({*first, *other}):
        left, right = first.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differing(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}", left, right


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase for each setting that changed, and one for the number of others if there are many."""
    phrases = [f"{name:.60} was {_shown(old)}, now {_shown(new)}" for name, old, new in differing(before, now)]
    more = len(phrases) - MOST_SHOWN
    return phrases if more <= 0 else [*phrases[:MOST_SHOWN], f"{more} more"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
