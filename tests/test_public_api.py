"""The public Python API and the command line, compared with the list in public_api.txt.

After an intended change, write the list again and commit it: `python -m tests.test_public_api`.
"""

import contextlib
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import duo_jax
import pallas_kernels
from duo_jax.cli import main

LISTING = Path(__file__).parent / "public_api.txt"
OURS = ("duo_jax", "pallas_kernels")
# Only functions of the library make these.
NO_CONSTRUCTOR = {"Document", "Generation", "KVCache", "LM", "Model", "Scores", "Step", "Stream", "TextStream"}
# What only the library's own files use.
INTERNAL = {
    "HeadPattern": {"check"},
    "KVCache": {
        "advance", "append_chunk", "append_token", "axes", "check_alive", "full", "head_dim", "heads", "is_quantized",
        "is_retrieval", "order", "pages", "pools_of", "ring_of_layer", "rings", "shards", "slot", "window", "windows",
    },
    "LM": {"complete", "encode", "encode_chat", "ends", "make_cache", "request"},
    "Model": {"by_output", "from_decoder", "graphdef", "is_plain", "order", "params"},
    "ModelConfig": {"precision"},
    "Plan": {"cache", "check", "head_pattern"},
    "TextStream": {"finish"},
}  # fmt: skip


def _parameters(function: object) -> str:
    names = []
    for parameter in inspect.signature(function).parameters.values():
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind == parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        if parameter.name not in ("self", "cls") and not parameter.name.startswith("_"):
            names.append(f"{star}{parameter.name}{'=' if parameter.default is not parameter.empty else ''}")
    return f"({', '.join(names)})"


def _members(cls: type) -> Iterator[str]:
    """The public methods and attributes that a class or its bases in this project define."""
    members = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(OURS):
            members |= dict.fromkeys(inspect.get_annotations(base)) | base.__dict__
    for name in sorted(members):
        if not name.startswith("_") and name not in INTERNAL.get(cls.__name__, ()):
            value = inspect.getattr_static(cls, name, None)
            value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            yield name + (_parameters(value) if inspect.isfunction(value) else "")


def python_api() -> Iterator[str]:
    for name in duo_jax.__all__:
        value = getattr(duo_jax, name)
        if inspect.isclass(value):
            yield f"duo_jax.{name}{'' if name in NO_CONSTRUCTOR else _parameters(value)}"
            yield from (f"duo_jax.{name}.{member}" for member in _members(value))
        else:
            yield f"duo_jax.{name}{_parameters(value) if callable(value) else ''}"
    yield from (f"pallas_kernels.{name}" for name in pallas_kernels.__all__)


def _help(*command: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["duo", *command, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="80"),  # a wider page has two columns
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main()
    return printed.getvalue()


def command_line(*command: str) -> Iterator[str]:
    """A command and its flags, as its help lists them, then its subcommands."""
    text = _help(*command)
    flags = re.findall(r"^[│ ] (-[\w.-]+(?:, -[\w.-]+)*)", text, re.MULTILINE)
    yield " ".join(["duo", *command])
    for flag in flags:
        if flag != "-h, --help":
            yield f"  {flag}"
    for name in re.findall(r"^[│ ] +• ([\w-]+)", text, re.MULTILINE):
        yield from command_line(*command, name)


def listing() -> str:
    lines = list(python_api())
    for name in sorted({entry.name for entry in entry_points(group="duo.commands")}):
        lines += command_line(name)
    return "".join(f"{line}\n" for line in lines)


def test_nothing_public_changes_unnoticed():
    expected, found = LISTING.read_text().splitlines(), listing().splitlines()
    change = "\n".join(difflib.unified_diff(expected, found, "public_api.txt", "now", lineterm="", n=2))
    assert not change, f"{change}\nIf this is intended: python -m tests.test_public_api"


if __name__ == "__main__":
    LISTING.write_text(listing())
