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
    """A phrase for each setting that changed, first those that both have, and a count of those that are too many."""
    different = sorted(differing(before, now), key=lambda change: None in change[1:])
    phrases = [f"{_short(name)} was {_short(repr(old))}, now {_short(repr(new))}" for name, old, new in different]
    more = len(phrases) - MOST_SHOWN
    return phrases if more <= 0 else [*phrases[:MOST_SHOWN], f"{more} more"]


def _short(text: str) -> str:
    """Both ends of a long text: the name of a file is at the end of its path."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[: MOST_CHARACTERS // 2 - 3]}...{text[-MOST_CHARACTERS // 2 :]}"
