"""Numbers that come from files: of the right type, finite and within a range. Knows no model."""

from typing import Any

import numpy as np


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer within `[low, high]`.

    Raises:
        ValueError: another type (true and false are not numbers), or a number outside the range.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {_shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {_shown(value)}")
    return int(value)


def number(name: str, value: Any, low: int | float, high: int | float) -> float:
    """A finite number within `[low, high]`.

    Raises:
        ValueError: another type (true and false are not numbers), or a number outside the range, as NaN is.
    """
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {_shown(value)}")
    if not low <= value <= high:  # In this order: an integer may be too large for a float.
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {_shown(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or false.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be true or false, got {_shown(value)}")
    return bool(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
