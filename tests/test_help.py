"""Help of every command: complete and without noise."""

import re
import subprocess
import sys
from collections.abc import Callable
from contextvars import copy_context
from importlib.metadata import entry_points
from itertools import pairwise

import pytest

from duo_jax.cli.doctor import Doctor
from duo_jax.cli.flags import parse
from tests.text_models import Result

COMMANDS = sorted(entry.name for entry in entry_points(group="duo.commands"))


def all_commands(duo: Callable[..., Result]) -> list[str]:
    nested = {name: re.findall(r"^ *• ([\w-]+)", duo(name, "--help").out, re.MULTILINE) for name in ("eval", "plot")}
    assert all(nested.values())
    return [*COMMANDS, *(f"{name} {each}" for name, names in nested.items() for each in names)]


def broken_lines(text: str) -> list[str]:
    """Lines of a column that end in the middle of a sentence, although the next word had room."""
    lines = text.splitlines()
    edge = max(map(len, map(str.rstrip, lines)))
    found = []
    for line, after in pairwise(lines):
        column, line = len(after) - len(after.lstrip()), line.rstrip()
        is_continued = column > 4 and after.strip() and not after.strip().startswith(("-", "•"))
        if is_continued and line[column - 2 : column] == "  " and line[column : column + 1].strip():
            room = min(edge, 80) - len(line)
            if room > len(after.split()[0]) and line[-1] not in ".:;":
                found.append(line)
    return found


def test_help_is_complete_and_without_noise(duo: Callable[..., Result]) -> None:
    check_help(["generate", "identify", "eval", "eval needle", "plot sample"], duo)


@pytest.mark.full_matrix
def test_help_of_every_command_is_complete_and_without_noise(duo: Callable[..., Result]) -> None:
    check_help(all_commands(duo), duo)


def check_help(commands: list[str], duo: Callable[..., Result]) -> None:
    for command in commands:
        result = duo(*command.split(), "--help")
        assert (result.code, result.err) == (0, ""), command
        assert not re.search(r"\bNone\b|\(default: (False)?\)|\[\{", result.out), command
        assert not broken_lines(result.out), command


def test_the_check_of_broken_lines_finds_them() -> None:
    assert broken_lines("  --flag X   a text that was\n             broken where it should not\n  " + "-" * 60)
    assert not broken_lines("  --flag X   a sentence.\n             Another one that is longer\n")


def test_the_most_used_flags_come_first(duo: Callable[..., Result]) -> None:
    flags = re.findall(r"^[ │]+(--[a-z][\w-]*)", duo("generate", "--help").out, re.MULTILINE)
    assert flags[:2] == ["--model", "--prompt"] and {"--pattern", "--sparsity", "--max-new-tokens"} <= set(flags[:10])
    assert flags.index("--mesh") > flags.index("--temperature")


def test_a_flag_may_be_switched_off_although_help_does_not_list_it(duo: Callable[..., Result]) -> None:
    assert "--no-json" not in duo("doctor", "--help").out
    parsed = [copy_context().run(parse, Doctor, "duo doctor", [flag]) for flag in ("--json", "--no-json")]
    assert [command.json for command in parsed] == [True, False]


@pytest.mark.process
def test_no_command_shows_that_torch_is_missing() -> None:
    command = [sys.executable, "-m", "duo_jax", "generate", "--model", "none", "--prompt", "Hello"]
    done = subprocess.run(command, capture_output=True, timeout=120, text=True)
    assert done.returncode == 2 and done.stderr.startswith("duo generate: no model 'none'")
    assert len(done.stderr.splitlines()) == 1
