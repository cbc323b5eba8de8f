"""A folder of results as one self-contained HTML page: a headline, then sections by task. Knows no type of result."""

import io
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from matplotlib import rc_context

from duo_eval.show.headline import Column, columns_of, headline_figure, headline_table
from duo_eval.show.registry import about, contents, order, title_of, type_of
from duo_eval.show.result_type import GROUPS, Drawn, Group, ResultType, readable
from duo_jax.pattern.files import GATES_FILE

# Figures in the folder were drawn from the results.
FIGURES = (".png", ".svg")
# Tables with more rows are folded, and so are figures of one kind if there are more.
MAX_ROWS = 25
MAX_FIGURES = 6


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


@dataclass(frozen=True, eq=False)
class Part:
    """One file of results, or one pattern.

    Attributes:
        title: of its section.
        path: in the folder.
        group: of its section.
        settings: what all its results share.
        size: number of results.
        about: its provenance.
        figures: those to show, and in `more_figures` those to fold.
        tables: those to show.
        columns: of the headline.
        label: how it differs from the main file of its section, if it is a side experiment.
    """

    title: str
    path: str
    group: Group
    settings: Mapping[str, Any]
    size: int
    about: dict[str, str]
    figures: list[Image]
    more_figures: list[Image]
    tables: list[Table]
    columns: list[Column]

    @property
    def model(self) -> str:
        """Name of the model; empty if the results are of none or of several."""
        model = self.settings.get("model")
        return Path(model).name if isinstance(model, str) else ""


@dataclass(frozen=True)
class Side:
    """A file of the same task with other settings."""

    label: str
    part: Part


@dataclass(frozen=True)
class Section:
    """Results of one task, or of one kind of measurement.

    Attributes:
        id: of its heading.
        title: the task.
        parts: the main file; of measurements that are no task, all of them.
        side: other files of the task, which are folded.
    """

    id: str
    title: str
    parts: list[Part]
    side: list[Side] = field(default_factory=list)


@dataclass(frozen=True)
class Chapter:
    """Sections under one heading."""

    id: str
    title: str
    sections: list[Section]


@dataclass(frozen=True)
class Headline:
    """The headline of one model: all tasks, methods and budgets in one table, and one figure."""

    model: str
    table: Table
    figure: Image


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        folder: the folder of results.
        parts: results, in the order of `RESULT_TYPES`.
        unknown: files of no known type.
        broken: files that could not be shown, and why.
        written: the day.
    """

    folder: str
    parts: list[Part]
    unknown: list[str]
    broken: dict[str, str]
    written: date = field(default_factory=date.today)

    @classmethod
    def of(cls, folder: Path) -> "Page":
        """Read everything below a folder."""
        parts: list[tuple[tuple[int, int], Part]] = []
        unknown, broken = [], {}
        for path in _results(folder):
            name = path.relative_to(folder).as_posix()
            try:
                with readable(path):
                    kind = type_of(path)
                    if kind is None:
                        unknown.append(name)
                    else:
                        part = _part(kind, path, name)
                        parts.append((order(kind, part.title), part))
            except (ValueError, OSError) as error:
                broken[name] = str(error)
        return cls(str(folder), [part for _, part in sorted(parts, key=lambda part: part[0])], unknown, broken)

    @cached_property
    def chapters(self) -> list[Chapter]:
        """The sections in order, by group; a section is of one task and one model."""
        chapters = []
        for number, group in enumerate(GROUPS, 1):
            sections: dict[str, list[Part]] = {}
            for part in self.parts:
                if part.group == group:
                    title = f"{part.title}, {part.model}" if self._of_several and part.model else part.title
                    sections.setdefault(title, []).append(part)
            if sections:
                named = [_section(f"{number}-{at}", *section) for at, section in enumerate(sections.items(), 1)]
                chapters.append(Chapter(f"group-{number}", group, named))
        return chapters

    @cached_property
    def headlines(self) -> list[Headline]:
        """One for each model with scores, from the main file of each task."""
        main = [part for chapter in self.chapters for section in chapter.sections for part in section.parts]
        headlines = []
        models = dict.fromkeys(part.model for part in main if part.columns)
        for model in models if self._of_several else [""]:
            parts = [part for part in main if part.model == model or not self._of_several]
            columns = [column for part in parts for column in part.columns]
            if columns:
                table = _table("Scores", headline_table(columns))
                headlines.append(Headline(model, table, _image(headline_figure(columns))))
        return headlines

    @property
    def _of_several(self) -> bool:
        """Whether scores are of more than one model."""
        return len({part.model for part in self.parts if part.columns and part.model}) > 1

    @property
    def facts(self) -> dict[str, str]:
        """Model, device and date of the headline; without one, of all results."""
        shown = [part for part in self.parts if part.columns] or self.parts
        measured = sorted({day for part in shown for day in part.about.get("measured", "").split(", ") if day})
        when = [f"measured {' to '.join(dict.fromkeys((measured[0], measured[-1])))}"] if measured else []
        facts = {
            "model": ", ".join(dict.fromkeys(part.model for part in shown if part.model)),
            "device": "; ".join(dict.fromkeys(_device(part.about) for part in shown if part.about)),
            "date": ", ".join([*when, f"page written {self.written.isoformat()}"]),
        }
        return {name: value for name, value in facts.items() if value}

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
    figures: list[Image] = []
    folded: list[Image] = []
    for draw in kind.figures:
        drawn = [_image(each) for picture in draw(path) for each in picture.each()]
        (figures if len(drawn) <= MAX_FIGURES else folded).extend(drawn)
    head, results = contents(path)
    title = title_of(kind, path)
    return Part(
        title=title,
        path=name,
        group=kind.group,
        settings=head["about"],
        size=len(results),
        about=about(path),
        figures=figures,
        more_figures=folded,
        tables=[table for table in tables if table.html],
        columns=list(columns_of(title, results)) if kind.group == "Accuracy" else [],
    )


def _section(number: str, title: str, parts: Sequence[Part]) -> Section:
    """Of a task, the file with the most results is the main one, and the others are side experiments."""
    if parts[0].group != "Accuracy":
        return Section(f"section-{number}", title, list(parts))
    main = max(parts, key=lambda part: part.size)
    side = [Side(_difference(part, main), part) for part in parts if part is not main]
    return Section(f"section-{number}", title, [main], side)


def _difference(part: Part, main: Part) -> str:
    """The settings that differ from the main file's, in words; the file's name if none does."""
    words = []
    for name in dict.fromkeys([*part.settings, *main.settings]):
        value, usual = part.settings.get(name), main.settings.get(name)
        if value != usual and not isinstance(value, dict | list) and not isinstance(usual, dict | list):
            label = name.replace("_", " ")
            words.append(label if value is True else f"no {label}" if value in (None, False) else f"{label} {value}")
    return ", ".join(words) or Path(part.path).stem


def _device(provenance: Mapping[str, str]) -> str:
    """The accelerator, if there is one, and the processor."""
    return ", ".join(filter(None, (provenance.get("device", "CPU"), provenance["processor"])))


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
    # Where a table is wider than the page, a cell breaks before an interval or a number, not inside it.
    html = re.sub(
        r"\([^()<>]{1,30}\)|\bn = \d+|\d% KV\b", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), html
    )
    return Table(caption, Markup(html), html.count("<tr>") - html.count("<thead>"))
