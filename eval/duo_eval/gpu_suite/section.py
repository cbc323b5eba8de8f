"""The interface of a section."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

# As JSON: the arguments of one measurement.
Case = dict[str, Any]


@runtime_checkable
class Section(Protocol):
    """A module of this package."""

    def cases(self, *, smoke: bool) -> Iterator[Case]:
        """The measurements in order; toy sizes for `smoke`."""

    def measure(self, case: Case) -> dict[str, Any]:
        """The result, as JSON."""

    def line(self, case: Case, result: dict[str, Any]) -> str:
        """The result in one line of text."""
