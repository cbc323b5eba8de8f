"""The answers to a file of prompts: a head that states what they are, then a line for each. Survives a kill.

Lines are appended as answers come, in any order; a complete file is in the order of the prompts. Knows no model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duo_jax.differences import differing
from duo_jax.files import append_text, check_output, write_text
from duo_jax.finite import json_text
from duo_jax.reading import decode, json_lines, parse_object, read_bytes

# Fields that an answer adds to those of its prompt.
INDEX = "index"
ANSWER = ("text", "tokens", "finish_reason")
WAY = "choose another --out"


@dataclass(eq=False)
class Answers:
    """A file of answers, and those that it has, by the index of their prompt.

    Attributes:
        path: the file; it need not exist.
        head: "about", the settings, and "contents", fingerprints of prompts, weights and pattern.
        lines: each answer with "index" and the fields of its prompt.
    """

    path: Path
    head: dict[str, Any]
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, head: Mapping[str, Any], count: int) -> "Answers":
        """Read what an earlier run wrote. A last line that a kill cut off is left out. Nothing is written yet.

        Args:
            path: the file.
            head: of this run.
            count: the number of prompts.

        Raises:
            ValueError: another file, or answers of another run, with what differs.
            PermissionError: it cannot be written to.
        """
        check_output(path)
        answers = cls(path, parse_object(json_text(head), path))
        if not path.exists() or not path.stat().st_size:
            return answers
        content = read_bytes(path)
        try:
            # What has no end of line was cut off by a kill, perhaps inside a character.
            rows = list(json_lines(decode(content[: content.rfind(b"\n") + 1], path), path))
        except ValueError as error:
            raise ValueError(f"{error}; it is no file of answers, or damaged: {WAY}") from None
        (place, old), *rest = rows or [(str(path), {})]
        is_head = set(old) == set(answers.head) and all(isinstance(value, dict) for value in old.values())
        if not is_head or old["about"].get("task") != answers.head["about"].get("task"):
            raise ValueError(f"{place} is not the head of a file of answers: {WAY}")
        if different := [_change(*each) for each in differing(old, answers.head)]:
            raise ValueError(f"{path} has answers of another run: {'; '.join(different)}. {WAY.capitalize()}")
        for place, answer in rest:
            index = answer.get(INDEX)
            if type(index) is not int or not 0 <= index < count or not set(ANSWER) <= set(answer):
                raise ValueError(f"{place} is not an answer to one of the {count} prompts: {WAY}")
            answers.lines[index] = answer
        return answers

    def begin(self) -> None:
        """Write the head and the answers that the file has, without a line that was cut off."""
        self._write(self.lines.values())

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append answers; they have left this process when the call returns."""
        new = {line[INDEX]: line for line in lines}
        append_text(self.path, _text(new.values()))
        self.lines |= new

    def finish(self) -> None:
        """Write all answers in the order of the prompts, unless they are."""
        if list(self.lines) != sorted(self.lines):
            self._write(self.lines[index] for index in sorted(self.lines))

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        write_text(self.path, _text([self.head, *lines]))


def _change(name: str, before: Any, now: Any) -> str:
    """What differs in a head: a flag with both values, or contents, of which fingerprints say no more."""
    part, _, inner = name.partition(".")
    if part == "contents":
        return f"other {inner}"
    flag = inner.rpartition(".")[2].replace("_", "-")
    old, new = ("not given" if value is None else f"{value!r:.60}" for value in (before, now))
    return f"--{flag} was {old}, now {new}"


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json_text(line, ensure_ascii=False) + "\n" for line in lines)
