"""A folder of results as one HTML page, which loads nothing from anywhere. Knows no type of result."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from duo_eval.show.report.svg import inline, page_style
from duo_eval.show.result_type import ResultType
from duo_eval.show.result_types import RESULT_TYPES, about, type_of
from duo_jax.pattern import GATES_FILE

# Drawn from the results beside them.
FIGURES = (".png", ".svg")
# A longer table is shown when it is asked for.
LONG = 25


@dataclass(frozen=True)
class Table:
    """One table: what it is, as HTML, and its rows."""

    caption: str
    html: Markup
    rows: int

    @property
    def is_long(self) -> bool:
        """Whether it is folded."""
        return self.rows > LONG


@dataclass(frozen=True)
class Part:
    """One result: its place in the folder, where it comes from, and what shows it."""

    title: str
    path: str
    about: dict[str, str]
    figures: list[Markup]
    tables: list[Table]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        parts: results, in the order of their kinds.
        unknown: files that are of no kind known.
        broken: files that could not be shown, and why.
    """

    folder: str
    parts: list[Part]
    unknown: list[str]
    broken: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> "Page":
        """Read everything below a folder."""
        found: list[tuple[int, Part]] = []
        unknown, broken, number = [], {}, 0
        for path in _results(folder):
            place = path.relative_to(folder).as_posix()
            try:
                kind = type_of(path)
                if kind is None:
                    unknown.append(place)
                    continue
                part = _part(kind, path, place, number)
            except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
                # A file may hold anything.
                broken[place] = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
                continue
            number += len(part.figures)
            found.append((RESULT_TYPES.index(kind), part))
        parts = [part for _, part in sorted(found, key=lambda item: item[0])]
        return cls(str(folder), parts, unknown, broken)

    def html(self) -> str:
        """The page."""
        loader = jinja2.PackageLoader("duo_eval.show.report", "")
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        return environment.get_template("page.html").render(page=self)


def _results(folder: Path) -> Iterator[Path]:
    """Files of results, and folders of patterns, whose files are not results of their own."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            if (path / GATES_FILE).exists():
                yield path
        elif path.suffix not in FIGURES and not (path.parent / GATES_FILE).exists():
            yield path


def _part(kind: ResultType, path: Path, place: str, number: int) -> Part:
    with page_style():
        drawn = list(kind.draw(path))
    figures = [Markup(inline(found.figure, number + index, found.alt)) for index, found in enumerate(drawn)]
    tables = [_table(caption, table(path)) for caption, table in kind.tables.items()]
    return Part(kind.title, place, about(path), figures, [table for table in tables if table.html])


def _table(caption: str, text: str) -> Table:
    """Markdown as HTML; what looks like HTML in it is escaped."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    # Focusable, so that a wide table can be scrolled by keyboard.
    wide = f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
    html = html.replace("<table>", wide).replace("</table>", "</table></div>")
    html = re.sub(r"<th(?=[ >])", '<th scope="col"', html)
    return Table(caption, Markup(html), html.count("<tr>") - html.count("<thead>"))
