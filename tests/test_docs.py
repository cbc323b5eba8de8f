"""What the documentation shows exists: Python examples, command lines, links. Examples are read here, not run."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from contextvars import copy_context
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import duo_jax
import pallas_kernels
from duo_jax.cli.flags import parse

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
OURS = ("duo_jax", "pallas_kernels", "duo_train", "duo_eval")


def fenced(page: Path, language: str) -> list[str]:
    """The contents of a page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples(language: str) -> list:
    return [
        pytest.param(block, id=f"{relative(page)}-{index}")
        for page in PAGES
        for index, block in enumerate(fenced(page, language))
    ]


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of an attribute chain that begins with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return None


def look_up(name: str) -> None:
    """Follow a dotted name, as far as it is a module's or a class's."""
    package, *attributes = name.split(".")
    value = importlib.import_module(package)
    for attribute in attributes:
        if not isinstance(value, type) and not hasattr(value, "__path__"):
            return  # a member of what a function returns
        assert hasattr(value, attribute), f"{name}: there is no {attribute!r}"
        value = getattr(value, attribute)


@pytest.mark.parametrize("block", examples("python"))
def test_every_name_in_a_python_example_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Attribute) and (name := dotted(node)) and name.split(".")[0] in OURS:
            look_up(name)


@pytest.mark.parametrize("block", examples("python"))
def test_every_keyword_in_a_call_of_ours_is_a_parameter(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call) and (name := dotted(node.func)) and name.startswith("duo_jax."):
            function = duo_jax
            for part in name.split(".")[1:]:
                function = getattr(function, part)
            call = inspect.signature(function)
            call.bind_partial(**{keyword.arg: None for keyword in node.keywords if keyword.arg})


def command_lines(text: str) -> list[list[str]]:
    """The arguments after `duo` of every command in shell text; pipes, comments and continuation lines are known."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "|"]:
            if set(word) <= set("|;&<>"):
                if words and Path(words[0]).name == "duo":
                    found.append(words[1:])
                words = []
            else:
                words.append(word)
    return found


@pytest.mark.parametrize("block", examples("bash"))
def test_every_command_line_parses(block, capsys, monkeypatch):
    monkeypatch.setenv("DUO_ACCEPT_TERMS", "")  # A flag changes it.
    commands = {entry.name: entry for entry in entry_points(group="duo.commands")}
    for arguments in command_lines(block):
        name, *flags = arguments
        if name in ("--help", "--version"):
            continue
        assert name in commands, f"duo {name}: no such command"
        try:
            copy_context().run(parse, commands[name].load(), f"duo {name}", flags)
        except SystemExit as exit:
            assert exit.code == 0, f"duo {' '.join(arguments)}\n{capsys.readouterr()}"


def test_command_lines_are_found():
    text = 'make demo  # duo none\necho "a | b" | .venv/bin/duo generate --chat - > out\nduo inspect \\\n  --model x\n'
    assert command_lines(text) == [["generate", "--chat", "-"], ["inspect", "--model", "x"]]


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_every_relative_link_leads_to_a_file(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{relative(page)}: {target}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=relative)
def test_every_file_of_this_project_that_a_page_names_exists(page):
    for path in re.findall(r"`((?:duo_jax|pallas_kernels|train|eval|tests|notebooks|docs)/[\w./]*)`", page.read_text()):
        assert (ROOT / path).exists(), f"{relative(page)}: {path}"


def messages() -> list[str]:
    """Every string of the sources; what is computed in an f-string is left out."""
    found = [(ROOT / "Makefile").read_text()]
    for folder in ("pallas_kernels", "duo_jax", "train", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    )
    return found


@pytest.mark.parametrize("page", ["troubleshooting.md", "guides/identify.md"])
def test_every_error_message_that_a_page_explains_exists(page):
    sources = messages()
    shown = re.findall(r"^\| (?:warning: )?`([^`]*)` \|", (DOCS / page).read_text(), re.MULTILINE)
    shown = [text for text in shown if " " in text]  # names and flags are no messages
    assert len(shown) > 10
    missing = [text for text in shown if not any(all(part in source for part in parts(text)) for source in sources)]
    assert missing == [], "no message of the sources has these words"


def parts(text: str) -> list[str]:
    """The words around each `...` of a message."""
    return [part.strip() for part in text.split("...")]


def test_the_numbers_that_the_readme_repeats_are_those_of_the_results():
    readme, results, budgets = (
        (ROOT / page).read_text() for page in ("README.md", "docs/results.md", "docs/budgets.md")
    )
    recall = re.findall(r"(\d+\.\d) % (\(\d+\.\d to \d+\.\d\))", readme)
    assert len(recall) == 6
    for accuracy, interval in recall:
        assert f"| {accuracy} {interval} |" in re.sub(" +", " ", results)
    # Needles, by length: full attention, the pattern at half of the bytes, random heads.
    needles = re.findall(r"\| (\d{4}) \| (\d+ of \d+) \| (\d+ of \d+) \| (\d+ of \d+)?", readme)
    assert [length for length, *_ in needles] == ["2048", "4096", "8192"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in budgets.splitlines()]
    for length, *found in needles:
        for method, number in zip((["full", "100%"], ["duo", "50%"], ["random-heads", "50%"]), found, strict=True):
            row = next((row for row in cells if row[:3] == [length, *method]), None)
            score, count = re.match(r"(\S+) \(.*\), n = (\d+)", row[3]).groups() if row else (0, 0)
            expected = f"{round(float(score) / 100 * int(count))} of {count}" if row else ""
            assert number == expected, (method, length)


@pytest.mark.parametrize("package", [duo_jax, pallas_kernels], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    name = package.__name__
    text = (DOCS / "reference" / f"{name}.md").read_text()
    shown = re.findall(rf"^::: {name}\.([\w.]+)$", text, re.MULTILINE)
    shown = {path.split(".")[-1] for path in shown} | set(re.findall(rf"`{name}\.(\w+)`", text))
    assert not set(package.__all__) - shown


def test_the_page_of_commands_has_every_command():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = hooks.commands()
    names = [entry.name for entry in entry_points(group="duo.commands")]
    assert names
    for name in names:
        assert f"## duo {name}\n\n```text\nusage: duo {name}" in text
