"""The flags of a prompt: where its text comes from, and how it becomes tokens."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Int32

from duo_jax.reading import COPY, MOST_BYTES, read_text
from duo_jax.text import template
from duo_jax.text.template import DocumentFrame
from duo_jax.text.tokenizer import TextTokenizer
from duo_jax.text.tokens import encode


@dataclass(frozen=True)
class PromptOptions:
    """The prompt."""

    stdin: Annotated[Literal["-"] | None, tyro.conf.Positional, tyro.conf.arg(metavar="[-]")] = None
    """Give - to read the prompt from standard input."""
    prompt: str | None = None
    """The prompt itself."""
    prompt_file: Path | None = None
    """A UTF-8 file with the prompt."""
    chat: bool = False
    """Wrap the prompt in the model's chat template, as one user message."""
    parse_special: bool = False
    """Special tokens that are written in a message or a document are control tokens; by default they are text. In a
    prompt without --chat they always are control tokens."""

    @property
    def is_given(self) -> bool:
        """Whether any of the three flags names a prompt."""
        return any(value is not None for value in (self.stdin, self.prompt, self.prompt_file))

    def text(self) -> str:
        """Read the prompt.

        Raises:
            ValueError: no prompt, more than one, an empty one, or bytes that are not text.
        """
        given = [self.stdin is not None, self.prompt is not None, self.prompt_file is not None]
        if sum(given) != 1:
            raise ValueError("give the prompt once: --prompt TEXT, --prompt-file FILE, or - for standard input")
        try:
            if self.prompt_file is not None:
                return self.not_empty(read_text(self.prompt_file, way=f"{COPY}, or give - and pipe it"))
            text = sys.stdin.read(MOST_BYTES + 1) if self.prompt is None else self.prompt
            if len(text) > MOST_BYTES:
                raise ValueError(f"standard input has more than {MOST_BYTES} characters: give less")
            # Bytes from the shell that are not UTF-8 arrive as lone surrogates, which tokenizers reject.
            text.encode("utf-8")
        except UnicodeError as error:
            raise ValueError(f"the prompt is not UTF-8 text: {error}") from None
        return self.not_empty(text)

    def not_empty(self, text: str) -> str:
        """The text of a prompt, if there is any."""
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        return text

    def encode(self, tokenizer: TextTokenizer, text: str) -> Int32[np.ndarray, "T"]:
        """Tokens of a whole prompt."""
        if not self.chat:
            return _array(encode(tokenizer, text, special=True))
        template.check_template(tokenizer, _NO_CHAT)
        messages = [{"role": "user", "content": text}]
        return _array(template.encode_chat(tokenizer, messages, parse_special=self.parse_special))

    def encode_document(self, tokenizer: TextTokenizer, text: str) -> Int32[np.ndarray, "T"]:
        """Tokens of a text to ask about later; with `chat`, the beginning of a user's message."""
        return _array(self._frame(tokenizer).document(text))

    def encode_question(
        self,
        tokenizer: TextTokenizer,
        question: str,
        document: Int32[np.ndarray, "D"],
        text: str | None = None,
    ) -> Int32[np.ndarray, "T"]:
        """Tokens of a question, after those of a document that were computed; with `chat`, the rest of that message.

        `text` is the document's; None where only its tokens are known, after which a text is encoded by itself.

        Raises:
            ValueError: a document that was computed with other flags, or is encoded otherwise before this question.
        """
        if text is None:
            if self.chat:
                raise ValueError("this cache has no text, which --chat needs: run duo prefill --chat again")
            return _array(encode(tokenizer, question, parse_special=self.parse_special))
        frame, known = self._frame(tokenizer), document.tolist()
        if not frame.is_document(text, known):
            raise ValueError(
                "the document was prefilled with other flags: give --chat and --parse-special as to duo prefill (it "
                f"was prefilled {'without --chat' if self.chat else 'with --chat'}, or with another tokenizer)"
            )
        tokens = frame.question(text, known, question)
        if tokens is None:
            raise ValueError(
                "before this question, the end of the document has other tokens than those that were prefilled: begin "
                "the question with another character, or give document and question as one prompt"
            )
        return _array(tokens)

    def _frame(self, tokenizer: TextTokenizer) -> DocumentFrame:
        if not self.chat:
            return DocumentFrame(tokenizer, parse_special=self.parse_special)
        template.check_template(tokenizer, _NO_CHAT)
        return DocumentFrame.chat(tokenizer, parse_special=self.parse_special)


_NO_CHAT = "leave --chat out"


def _array(tokens: list[int]) -> Int32[np.ndarray, "T"]:
    if not tokens:
        raise ValueError("the prompt has no tokens; give more than special characters")
    return np.asarray(tokens, np.int32)
