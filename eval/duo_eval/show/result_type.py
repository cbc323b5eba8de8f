"""A type of result: how its files are recognized, and which tables and figures show them.

A measurement defines its own, next to the code that makes the data; `registry` lists all of them.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from duo_eval.runner.record import read
from duo_jax.extras import require


@dataclass(frozen=True, eq=False)
class Drawn:
    """A matplotlib figure, its name (letters, digits and dashes), and a description for those who cannot see it."""

    name: str
    figure: Any
    alt: str

    def each(self) -> "Iterator[Drawn]":
        """Itself, small enough for a phone."""
        yield self

    def whole(self) -> "Drawn":
        """Itself."""
        return self


class Picture(Protocol):
    """What can be shown as several figures, each small enough for a phone, or as one with all of them."""

    def each(self) -> Iterator[Drawn]:
        """The figures of a report."""

    def whole(self) -> Drawn:
        """The figure of a file of its own; without a name, its file has the name of the results."""


# The groups of a report, in order. Files of one task in the first are a main one and side experiments.
Group = Literal["Accuracy", "Speed and memory", "Compiled, not run", "Head patterns"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class ResultType:
    """One type of result.

    Attributes:
        title: heading of its section of a report, unless `registry.TASKS` has a name for the task.
        matches: whether a file is of this type, given its first JSON value.
        tables: functions of the path that return Markdown, by caption.
        figures: functions of the path that yield pictures.
        group: of its section.
    """

    title: str
    matches: Callable[[dict[str, Any]], bool]
    tables: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)
    figures: tuple[Callable[[Path], Iterator[Picture]], ...] = ()
    group: Group = "Speed and memory"

    def draw(self, path: Path) -> Iterator[Drawn]:
        """Every figure of a file, as a report shows them."""
        for figures in self.figures:
            for picture in figures(path):
                yield from picture.each()

    def show_figures(self, path: Path) -> None:
        """Write the figures of a file next to it, after the work that made it, and print their names.

        A figure that this project did not draw stays, and is reported: the results are complete without.
        """
        try:
            for written in self.save_figures(path):
                print(written)
        except FileExistsError as error:
            reason = str(error).rpartition(": ")[0]  # Without the way out: this command has no --force.
            print(f"{reason}: keeping it; `duo eval plot --force` replaces it", file=sys.stderr)

    def save_figures(self, path: Path, out: Path | None = None, *, force: bool = False) -> list[Path]:
        """Write the pictures of a file whole, each as PNG and SVG.

        Args:
            path: the file of results.
            out: name of a figure without a suffix, and prefix of the other names; by default the file's name.
            force: replace files that this project did not write.

        Raises:
            FileExistsError: a file that this project did not write.
            ValueError: a type without figures, or a file with nothing to draw yet.
            NotImplementedError: matplotlib is not installed.
        """
        if not self.figures:
            raise ValueError(f"{path} is about {self.title.lower()}, which has no figure")
        if not read(path)[1]:
            raise ValueError(f"{path} has no finished job yet")
        require("a figure", ("matplotlib",))
        from duo_train.plots import check, save

        stem = out or path.with_suffix("")
        check(stem, force=force)
        written: list[Path] = []
        with readable(path):
            for figures in self.figures:
                for drawn in (picture.whole() for picture in figures(path)):
                    name = f"{stem.name}-{drawn.name}" if drawn.name else stem.name
                    written += save(drawn.figure, stem.with_name(name), force=force)
        if not written:
            raise ValueError(f"{path} has nothing to draw yet")
        return written


def of_task(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Matches files whose first line names one of these tasks."""
    return lambda first: isinstance(first.get("about"), dict) and first["about"].get("task") in names


def with_fields(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Matches files whose first result has these fields."""

    def matches(first: dict[str, Any]) -> bool:
        results = first.get("results")
        return isinstance(results, list) and bool(results) and set(names) <= set(fields(results[0]))

    return matches


def fields(value: Any) -> dict[str, Any]:
    """The fields of a value of a file; none if it is not an object."""
    return value if isinstance(value, dict) else {}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise ValueError with the path for all that results of another shape raise in a table or a figure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # Of numpy, for means of nothing and the like.
            yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeWarning) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} has results of another shape ({reason:.200})") from error


def file_name(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"\W+", "-", text).strip("-")
