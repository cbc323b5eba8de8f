"""MkDocs hook that generates the page of commands from the commands when the site is built."""

import io
from contextlib import redirect_stdout, suppress
from contextvars import copy_context
from importlib.metadata import entry_points
from typing import Any

from duo_jax.cli.flags import parse

PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Append the help text of every command to the page of commands; keep other pages as they are."""
    return markdown + commands() if page.file.src_uri == PAGE else markdown


def commands() -> str:
    """One section for each command: its name and the output of `duo NAME --help`."""
    entries = sorted(entry_points(group="duo.commands"), key=lambda entry: entry.name)
    return "".join(f"\n\n## duo {entry.name}\n\n```text\n{_help(entry)}\n```\n" for entry in entries)


def _help(entry: Any) -> str:
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        copy_context().run(parse, entry.load(), f"duo {entry.name}", ["--help"])
    return text.getvalue().strip()
