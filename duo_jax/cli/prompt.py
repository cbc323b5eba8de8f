"""The flags of a prompt: where its text comes from, and its tokens, whole or as a part of a longer text."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from transformers import PreTrainedTokenizerBase

from duo_jax.text.lm import chat_frame


@dataclass(frozen=True)
class PromptOptions:
    """The prompt."""

    stdin: tyro.conf.Positional[Literal["-"] | None] = None
    """`-` reads the prompt from standard input."""
    prompt: str | None = None
    """The prompt itself."""
    prompt_file: Path | None = None
    """A UTF-8 file with the prompt."""
    chat: bool = False
    """Wrap the prompt in the model's chat template, as one user message."""

    def text(self) -> str:
        """Read it.

        Raises:
            ValueError: no prompt, more than one, an empty one, or bytes that are not text.
        """
        given = [self.stdin is not None, self.prompt is not None, self.prompt_file is not None]
        if sum(given) != 1:
            raise ValueError("give the prompt once: --prompt TEXT, --prompt-file FILE, or - for standard input")
        try:
            if self.prompt_file is not None:
                text = self.prompt_file.read_text(encoding="utf-8")
            else:
                text = sys.stdin.read() if self.prompt is None else self.prompt
            text.encode("utf-8")  # The shell's own bytes arrive as lone surrogates, which no tokenizer takes.
        except UnicodeError as error:
            raise ValueError(f"{self.prompt_file or 'the prompt'} is not UTF-8 text: {error}") from None
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        return text

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
        """Tokens of a whole prompt."""
        if self.chat:
            _need_template(tokenizer)
            message = [{"role": "user", "content": text}]
            text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        return _tokens(tokenizer, text, special=not self.chat)

    def encode_document(self, tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
        """Tokens of a text that is asked about later; with `chat`, the beginning of a user's message."""
        if not self.chat:
            return _tokens(tokenizer, text, special=True)
        return np.concatenate([_head(tokenizer)[0], _tokens(tokenizer, text, special=False)])

    def encode_question(self, tokenizer: PreTrainedTokenizerBase, text: str, document: np.ndarray) -> np.ndarray:
        """Tokens of what follows a document; with `chat`, the rest of that message.

        Raises:
            ValueError: a document that does not begin as a message.
        """
        if not self.chat:
            return _tokens(tokenizer, text, special=False)
        head, after = _head(tokenizer)
        if not np.array_equal(document[: len(head)], head):
            raise ValueError("the document was prefilled without --chat: leave it out here, or prefill with it")
        return _tokens(tokenizer, f"\n\n{text}{after}", special=False)


def _head(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, str]:
    _need_template(tokenizer)
    frame = chat_frame(tokenizer)
    assert frame is not None
    return np.asarray(frame[0], np.int32), frame[1]


def _need_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template: leave --chat out")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> np.ndarray:
    ids = tokenizer.encode(text, add_special_tokens=special)
    if not ids:
        raise ValueError("the prompt has no tokens; give more than special characters")
    return np.asarray(ids, np.int32)
