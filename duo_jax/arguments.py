"""Arguments of public functions: integers, numbers and types, refused in the caller's own words. Knows no model."""

import math
import operator
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex, TypeVar

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

T = TypeVar("T")

# Positions are int32.
MOST_TOKENS = 2**31 - 1
# Bytes and seeds are int64.
MOST_BYTES = 2**63 - 1
MOST_SEED = 2**63 - 1


# How messages spell the name of an argument. The command line sets it to the flags that were given.
spelling: ContextVar[Callable[[str], str]] = ContextVar("spelling", default=str)


class ArgumentError(ValueError):
    """An argument that breaks a rule, in the words of the caller."""

    def __init__(self, name: str, rule: str) -> None:
        """The message is the name and the rule."""
        super().__init__(f"{spelling.get()(name)} {rule}")


def in_flags(message: str) -> str:
    """A message in which f"{self.depths=}" wrote the names of arguments, in the words of the caller."""
    return re.sub(r"\bself\.(\w+)=", lambda match: f"{spelling.get()(match.group(1))}=", message)


def whole_number(name: str, value: Any, least: int, most: int = MOST_TOKENS, *, way: str = "") -> int:
    """A size, count or seed as an `int`; any type of integer is taken, but neither bools nor floats.

    Args:
        name: of the argument, for the message.
        value: the argument.
        least: the smallest value allowed.
        most: the largest value allowed.
        way: what to do instead, for the end of the message.

    Raises:
        ArgumentError: another type, or a value outside `[least, most]`.
    """
    end = way and f"; {way}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        raise ArgumentError(name, f"must be an integer, got {_text(value)}{end}")
    try:
        number = operator.index(value)
    except TypeError:  # An array that is no single integer.
        raise ArgumentError(name, f"must be an integer, got {_text(value)}{end}") from None
    if number < least:
        raise ArgumentError(name, f"must be at least {least}, got {_text(number)}{end}")
    if number > most:
        raise ArgumentError(name, f"must be at most {most}, got {_text(number)}{end}")
    return number


def seed_number(name: str, value: Any) -> int:
    """A random seed.

    Raises:
        ArgumentError: anything but an integer from 0 to the largest int64.
    """
    return whole_number(name, value, 0, MOST_SEED)


def real_number(name: str, value: Any, least: int | float, most: int | float, *, way: str = "") -> float:
    """A number as a `float`.

    Raises:
        ArgumentError: another type, NaN, or a value outside `[least, most]`.
    """
    end = way and f"; {way}"
    if isinstance(value, bool | np.bool_ | str) or not isinstance(value, SupportsFloat):
        raise ArgumentError(name, f"must be a number, got {_text(value)}{end}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # An array, or an integer beyond every float.
        number = math.nan
    if not least <= number <= most:
        raise ArgumentError(name, f"must be in [{least:g}, {most:g}], got {_text(value)}{end}")
    return number


def true_or_false(name: str, value: Any) -> bool:
    """A `bool`.

    Raises:
        ArgumentError: any other type; a number or a text is no truth value.
    """
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(name, f"must be true or false, got {_text(value)}")
    return bool(value)


def instance(name: str, value: Any, kind: type[T], way: str = "") -> T:
    """The argument, if it has the type.

    Raises:
        ArgumentError: another type.
    """
    if not isinstance(value, kind):
        raise ArgumentError(name, f"must be a {kind.__name__}, got {_text(value)}{way and f'; {way}'}")
    return value


def path_of(name: str, value: Any, what: str = "the path of a file or folder") -> Path:
    """The path of a file or folder, `~` replaced by the user's home folder.

    Raises:
        ArgumentError: another type, an empty text, or a character that no path has; it must be `what`.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(name, f"must be {what}, got {_text(value)}")
    return Path(os.path.expanduser(text))


def integers(name: str, values: ArrayLike) -> np.ndarray:
    """An array of integers.

    Raises:
        ValueError: ragged rows, or another type.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name} must be a rectangular array; pad ragged rows at the right and pass lengths="
        ) from None
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ArgumentError(name, f"must be integers, got {array.dtype}")
    return array


def check_rows(name: str, values: ArrayLike, rows: int) -> Int[np.ndarray, "B n"]:
    """An array of integers with this number of rows.

    Raises:
        ValueError: another type or shape.
    """
    array = integers(name, values)
    if array.ndim != 2 or len(array) != rows:
        raise ArgumentError(name, f"must be [batch, n] with {rows} rows, got {array.shape}")
    return array


def _text(value: object) -> str:
    """A value in a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits.
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"
