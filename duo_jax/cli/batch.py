"""A file of prompts, answered in batches: its flags, its rows, and which rows are computed together."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from duo_jax.arguments import whole_number
from duo_jax.cli.answers import ANSWER, INDEX
from duo_jax.cli.prompt import PromptOptions
from duo_jax.reading import read_json_lines
from duo_jax.text import template
from duo_jax.text.reply import Reply
from duo_jax.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class BatchOptions:
    """A file of prompts in place of one."""

    prompts: Path | None = None
    """JSON lines, each with prompt, a text, or messages, a conversation; an id and other fields are copied to the
    answer."""
    out: Path | None = None
    """File for the answers to --prompts: after a first line with the settings, a JSON line for each. The same command
    again resumes a run that was stopped."""
    batch_size: int = 8
    """Prompts of the file that are answered at a time; the answers depend on it only by rounding."""

    def files(self) -> tuple[Path, Path]:
        """The file of prompts and that of answers.

        Raises:
            ValueError: only one of them, or a batch size below 1.
        """
        whole_number("batch_size", self.batch_size, 1)
        if self.prompts is None:
            raise ValueError("--out is the file of answers to --prompts FILE: give both")
        if self.out is None:
            raise ValueError("--prompts needs a file for the answers: add --out FILE")
        return self.prompts, self.out


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file.

    Attributes:
        index: its place among the prompts, from 0.
        tokens: `[T]` token ids.
        fields: what its answer repeats.
    """

    index: int
    tokens: Int32[np.ndarray, "T"]
    fields: dict[str, Any]


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file of prompts, each after `FILE:LINE` for messages. Prompts are checked by `encode_rows`.

    Raises:
        ValueError: not JSON lines; no row; one without exactly one of prompt and messages, with a field of the answer,
            or with an id that is no text or integer or that another has.
    """
    rows, ids = list(read_json_lines(path)), dict[str | int, str]()
    if not rows:
        raise ValueError(f'{path} has no prompts: give lines such as {{"prompt": "Hello"}}')
    for place, row in rows:
        if ("prompt" in row) == ("messages" in row):
            raise ValueError(f'{place} must have either "prompt" or "messages", has {_names(row)}')
        if taken := sorted({INDEX, *ANSWER} & set(row)):
            raise ValueError(f"{place} has {_names(taken)}, which the answer sets: rename it")
        if "id" not in row:
            continue
        if not isinstance(row["id"], str | int) or isinstance(row["id"], bool):
            raise ValueError(f"{place}: the id must be a text or an integer, got {row['id']!r:.60}")
        if row["id"] in ids:
            raise ValueError(f"{place} has the id of {ids[row['id']]}, {row['id']!r:.60}: give each prompt its own")
        ids[row["id"]] = place
    return rows


def encode_rows(
    rows: Sequence[tuple[str, dict[str, Any]]], options: PromptOptions, tokenizer: TextTokenizer
) -> list[PromptRow]:
    """The prompts with their tokens.

    Raises:
        ValueError: a prompt or messages that are not text, or that the chat template refuses, with the line.
    """

    def encoded(row: dict[str, Any]) -> Int32[np.ndarray, "T"]:
        if "prompt" in row:
            if not isinstance(row["prompt"], str):
                raise ValueError(f"the prompt must be a text, got {row['prompt']!r:.60}")
            return options.encode(tokenizer, options.not_empty(row["prompt"]))
        template.check_template(tokenizer, 'give "prompt" instead of "messages"')
        tokens = template.encode_chat(tokenizer, row["messages"], parse_special=options.parse_special)
        return np.asarray(tokens, np.int32)

    encoded_rows = []
    for index, (place, row) in enumerate(rows):
        try:
            tokens = encoded(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        fields = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
        encoded_rows.append(PromptRow(index, tokens, fields))
    return encoded_rows


def fingerprint(rows: Sequence[PromptRow]) -> str:
    """Distinguishes files of prompts by tokens and fields: a tokenizer or a chat template that changed differs too."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row.tokens)} {json.dumps(row.fields, sort_keys=True)}\n".encode())
        digest.update(row.tokens.tobytes())
    return digest.hexdigest()[:16]


def batches(rows: Sequence[PromptRow], size: int) -> Iterator[Sequence[PromptRow]]:
    """Rows of similar length together, as a short one is computed at the length of the longest; the longest first.

    What takes the most memory is then the first, and lengths that fall need few programs.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.index))
    for begin in range(0, len(ordered), size):
        yield ordered[begin : begin + size]


def filled(rows: Sequence[PromptRow], size: int) -> list[PromptRow]:
    """A batch of this size: the last row is repeated, as another size would compile other programs."""
    return [*rows, *[rows[-1]] * (size - len(rows))]


def answer(row: PromptRow, reply: Reply) -> dict[str, Any]:
    """The line of an answer."""
    facts = dict(zip(ANSWER, (str(reply), reply.tokens, reply.finish_reason), strict=True))
    return {INDEX: row.index, **row.fields, **facts}


def _names(fields: Iterable[str]) -> str:
    """Names of fields in a message, cut where there are many."""
    return f"{', '.join(map(repr, fields)) or 'no field':.80}"
