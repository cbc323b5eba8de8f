"""Every command and Python example of the README and the guides runs as written and prints what the page shows.

A page's blocks run in order in one fresh folder. Comments before a block, which readers do not see:

- `<!-- not run: REASON -->`: the block needs what a test does not have. `NOT_RUN` counts them.
- `<!-- prints: TEXT -->`: its output has this text, after that of the comment before it.
- `<!-- exit N -->`: it ends with this exit code, and its output is that of standard error.

- `<!-- file NAME -->`: it is no command but what this file has from here on.

A `text` block is the output of the block before it. `...` stands for anything. Comments before it:

- `<!-- numbers vary -->`: other numbers and widths of columns are right too.
- `<!-- a part -->`: the output has other lines too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "installation.md",
    ROOT / "docs" / "troubleshooting.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
# How many blocks of a page are not run: more of them need a reason here too.
NOT_RUN = {
    "docs/installation.md": 2,
    "docs/guides/ablations.md": 2,
    "docs/guides/chat.md": 1,
    "docs/guides/choose.md": 3,
    "docs/guides/efficiency.md": 1,
    "docs/guides/gpu.md": 4,
    "docs/guides/harness.md": 6,
    "docs/guides/identify.md": 12,
    "docs/guides/kernels.md": 1,
    "docs/guides/long-tasks.md": 2,
    "docs/guides/models.md": 2,
    "docs/guides/multi-gpu.md": 3,
    "docs/guides/needle.md": 3,
    "docs/guides/plan.md": 1,
    "docs/guides/plots.md": 1,
    "docs/guides/serve.md": 5,
}
BLOCK = re.compile(r"((?:^<!-- [^\n]* -->\n+)*)^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of a page that hangs: the longest takes minutes of CPU time, and a busy machine several times as long.
MOST_SECONDS = 3600


@dataclass(frozen=True)
class Block:
    """One fenced block, and the comments directly before it."""

    where: str
    language: str
    text: str
    comments: tuple[str, ...]

    def comment(self, name: str) -> list[str]:
        """What follows `name` in each comment that begins with it."""
        return [text[len(name) :].strip(" :") for text in self.comments if text.startswith(name)]

    @property
    def runs(self) -> bool:
        return bool(self.comment("file")) or (self.language in ("python", "bash") and not self.comment("not run"))

    @property
    def action(self) -> tuple[str, str, int]:
        """What `run_page` does: the language, or the file's name with a slash before it; the text; the exit code."""
        files = self.comment("file")
        return f"/{files[0]}" if files else self.language, self.text, self.code

    @property
    def code(self) -> int:
        return int((self.comment("exit") or ["0"])[0])


def output_of(block: Block, blocks: list[Block]) -> Block | None:
    """The block with the output of this one: the next one, if it is text."""
    following = blocks[blocks.index(block) + 1 :][:1]
    return following[0] if following and following[0].language == "text" else None


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(text: str, where: str = "page") -> list[Block]:
    """All blocks of a page in order, with the line where each begins."""
    return [
        Block(
            f"{where}:{text[: match.start(2)].count(chr(10)) + 1}",
            match[2],
            match[3],
            tuple(re.findall(r"<!-- (.*?) -->", match[1])),
        )
        for match in BLOCK.finditer(text)
    ]


def pattern(text: str, *, numbers_vary: bool) -> str:
    """A regular expression for an output: `...` is anything; spaces at the ends of lines do not matter."""
    lines = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
    expression = re.escape(lines).replace(r"\.\.\.", ".*")
    if numbers_vary:
        expression = re.sub(r"\d[\d,]*(\\\.\d+)?", lambda _: r"\\d[\\d,]*(\\.\\d+)?".replace("\\\\", "\\"), expression)
        expression = re.sub(r"(\\ |[━─]){2,}|[━─]|(\\ )", "[ ━─]*", expression)
    return expression


def differs(block: Block, output: str, shown: Block | None) -> str | None:
    """How the output of a block differs from what its page says, if it does."""
    output = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    if shown is not None:
        expression = pattern(shown.text, numbers_vary=bool(shown.comment("numbers vary")))
        search = re.search if shown.comment("a part") else re.fullmatch
        if not search(expression, output, re.DOTALL):
            return f"{shown.where} shows\n{shown.text}\nbut {block.where} printed\n{output}"
    begin = 0
    for part in block.comment("prints"):
        found = re.compile(pattern(part, numbers_vary=False), re.DOTALL).search(output, begin)
        if not found:
            return f"{block.where}: {part!r} is missing in\n{output}"
        begin = found.end()
    if output and shown is None and not block.comment("prints"):
        return f"{block.where} prints, and the page does not tell what\n{output}"
    return None


def folder_of_a_reader(folder: Path) -> None:
    """What commands expect in a clone: README, Makefile, committed results, an environment that is up to date."""
    for file in ("README.md", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    (folder / "eval").symlink_to(ROOT / "eval")
    environment = folder / ".venv"
    environment.mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (environment / part).symlink_to(Path(sys.prefix) / part)
    (environment / ".installed").touch()


@pytest.mark.real_model
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.runs for b in blocks_of(page.read_text()))], ids=name)
def test_a_page_prints_what_it_shows(page: Path, smollm2_gguf: Path, tmp_path: Path):
    blocks = blocks_of(page.read_text(), name(page))
    runs = [block for block in blocks if block.runs]
    folder_of_a_reader(tmp_path)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_page.py")],
        input=json.dumps([block.action for block in runs]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=MOST_SECONDS,
        check=True,
    )
    wrong = []
    for block, (code, out, error) in zip(runs, json.loads(done.stdout), strict=False):
        if code != block.code:
            wrong.append(f"{block.where} ended with exit code {code}\n{out}\n{error}")
            break
        if (difference := differs(block, error if block.code else out, output_of(block, blocks))) is not None:
            wrong.append(difference)
    assert not wrong, "\n\n".join(wrong)


def test_blocks_that_are_not_run_have_a_reason_and_are_counted():
    counted: Counter[str] = Counter()
    known = {"python": ("not run: ", "prints: ", "exit "), "text": ("numbers vary", "a part")}
    known["bash"] = known["python"]
    for page in PAGES:
        blocks = blocks_of(page.read_text(), name(page))
        for block in blocks:
            assert all(text.startswith((*known.get(block.language, ()), "file ")) for text in block.comments), block
            counted[name(page)] += bool(block.comment("not run"))
            speaks = block.runs and (block.language == "bash" or "print(" in block.text)
            is_told = block.comment("prints") or output_of(block, blocks) is not None
            assert is_told or not speaks, f"{block.where}: the page does not tell what it prints"
    assert +counted == NOT_RUN


def test_blocks_and_their_comments_are_found():
    text = "a\n\n<!-- prints: x -->\n<!-- exit 2 -->\n```bash\nfalse\n```\n\nIt prints\n\n```text\nx ... 12.5 MB\n```\n"
    shell, output = blocks_of(text)
    assert (shell.where, shell.code, shell.comment("prints"), shell.runs) == ("page:5", 2, ["x"], True)
    assert differs(shell, "x and 12.5 MB \n", output) is None
    assert "but page:5 printed" in differs(shell, "x and 12.6 MB", output)
    assert "'x' is missing" in differs(shell, "y", None)
    (varies,) = blocks_of("<!-- numbers vary -->\n```text\n┃ a  │ 1,024.5 ┃\n```\n")
    assert differs(output, "┃ a │ 7 ┃", varies) is None
    assert differs(output, "┃ b │ 7 ┃", varies) is not None
    (silent,) = blocks_of("```python\nprint(1)\n```\n")
    assert differs(silent, "", None) is None and "does not tell" in differs(silent, "1", None)
    (file,) = blocks_of('<!-- file a.jsonl -->\n```json\n{"id": 1}\n```\n')
    assert file.runs and file.action == ("/a.jsonl", '{"id": 1}\n', 0)
    (unused,) = blocks_of("<!-- not run: needs a GPU -->\n\n```bash\nduo doctor\n```\n")
    assert not unused.runs
