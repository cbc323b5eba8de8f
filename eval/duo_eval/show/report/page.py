"""A folder of results as one self-contained HTML page. Knows no type of result."""

import io
import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from matplotlib import rc_context

from duo_eval.show.registry import RESULT_TYPES, about, type_of
from duo_eval.show.result_type import Drawn, ResultType, readable
from duo_jax.pattern import GATES_FILE

# Figures in the folder were drawn from the results.
FIGURES = (".png", ".svg")
# Tables with more rows are folded.
MAX_ROWS = 25


@dataclass(frozen=True)
class Table:
    """One table as HTML, its caption and number of rows."""

    caption: str
    html: Markup
    rows: int

    @property
    def is_long(self) -> bool:
        """Whether it is folded."""
        return self.rows > MAX_ROWS


@dataclass(frozen=True)
class Image:
    """One figure: its source as a data URI, and its description."""

    src: str
    alt: str


@dataclass(frozen=True)
class Part:
    """One result: its path in the folder, its provenance, figures and tables."""

    title: str
    path: str
    about: dict[str, str]
    figures: list[Image]
    tables: list[Table]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        folder: the folder of results.
        parts: results, in the order of `RESULT_TYPES`.
        unknown: files of no known type.
        broken: files that could not be shown, and why.
    """

    folder: str
    parts: list[Part]
    unknown: list[str]
    broken: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> "Page":
        """Read everything below a folder."""
        parts: list[tuple[int, Part]] = []
        unknown, broken = [], {}
        for path in _results(folder):
            name = path.relative_to(folder).as_posix()
            try:
                with readable(path):
                    kind = type_of(path)
                    if kind is None:
                        unknown.append(name)
                    else:
                        parts.append((RESULT_TYPES.index(kind), _part(kind, path, name)))
            except (ValueError, OSError) as error:
                broken[name] = str(error)
        return cls(str(folder), [part for _, part in sorted(parts, key=lambda part: part[0])], unknown, broken)

    def html(self) -> str:
        """The page."""
        loader = jinja2.PackageLoader("duo_eval.show.report", "")
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        return environment.get_template("page.html").render(page=self)


def _results(folder: Path) -> Iterator[Path]:
    """Files of results, and folders of patterns, without the files inside these."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            if (path / GATES_FILE).exists():
                yield path
        elif path.suffix not in FIGURES and not (path.parent / GATES_FILE).exists():
            yield path


def _part(kind: ResultType, path: Path, name: str) -> Part:
    tables = [_table(caption, table(path)) for caption, table in kind.tables.items()]
    figures = [_image(drawn) for drawn in kind.draw(path)]
    return Part(kind.title, name, about(path), figures, [table for table in tables if table.html])


def _image(drawn: Drawn) -> Image:
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "duo"}):
        drawn.figure.savefig(file, format="svg", metadata={"Date": None})
    return Image(f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}", drawn.alt)


def _table(caption: str, text: str) -> Table:
    """Markdown as HTML; HTML inside it is escaped."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    # Focusable, so that a wide table can be scrolled by keyboard.
    wide = f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
    html = html.replace("<table>", wide).replace("</table>", "</table></div>")
    html = re.sub(r"<th(?=[ >])", '<th scope="col"', html)
    return Table(caption, Markup(html), html.count("<tr>") - html.count("<thead>"))
