"""A type of result: how its files are recognized, and which tables and figures show them.

A measurement defines its own, next to the code that makes the data; `registry` lists all of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duo_eval.runner.record import read


@dataclass(frozen=True, eq=False)
class Drawn:
    """A matplotlib figure, its name (letters, digits and dashes), and a description for those who cannot see it."""

    name: str
    figure: Any
    alt: str


@dataclass(frozen=True)
class ResultType:
    """One type of result.

    Attributes:
        title: heading of its part of a report.
        matches: whether a file is of this type, given its first JSON value.
        tables: functions of the path that return Markdown, by caption.
        figures: functions of the path that yield figures, each small enough for a phone.
        poster: function of the path that returns one figure with everything that the first of `figures` yields.
    """

    title: str
    matches: Callable[[dict[str, Any]], bool]
    tables: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)
    figures: tuple[Callable[[Path], Iterator[Drawn]], ...] = ()
    poster: Callable[[Path], Any] | None = None

    def draw(self, path: Path) -> Iterator[Drawn]:
        """Every figure of a file, as a report shows them."""
        for figures in self.figures:
            yield from figures(path)

    def save_figures(self, path: Path, out: Path | None = None) -> list[Path]:
        """Write the figures of a file, each as PNG and SVG; the poster replaces the figures that it contains.

        Args:
            path: the file of results.
            out: name of the poster without a suffix, and prefix of the other names; by default the file's name.

        Raises:
            ValueError: a type without figures, or a file with nothing to draw yet.
            NotImplementedError: matplotlib is not installed.
        """
        if not self.figures:
            raise ValueError(f"{path} is about {self.title.lower()}, which has no figure")
        if path.suffix == ".jsonl" and not read(path)[1]:
            raise ValueError(f"{path} has no finished job yet")
        require_matplotlib()
        from duo_train.plots import save

        stem = out or path.with_suffix("")
        written = [*save(self.poster(path), stem)] if self.poster else []
        for figures in self.figures[1:] if self.poster else self.figures:
            for drawn in figures(path):
                written += save(drawn.figure, stem.with_name(f"{stem.name}-{drawn.name}"))
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
        return isinstance(results, list) and bool(results) and set(names) <= set(results[0])

    return matches


def require_matplotlib() -> None:
    """Raise NotImplementedError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NotImplementedError("figures need matplotlib: pip install 'duo-jax[eval]'") from None


def file_name(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"\W+", "-", text).strip("-")
