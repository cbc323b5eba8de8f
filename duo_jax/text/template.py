"""Chat templates: render messages, and split the result around a text. The only module that knows templates exist.

Knows tokenizers, but no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

# Placeholder for a text while a template is rendered around it.
_HOLE = "<<the text>>"


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(tokenizer.chat_template)


def check_template(tokenizer: PreTrainedTokenizerBase, way_out: str = "call it with plain text instead") -> None:
    """Raise ValueError for a tokenizer without a chat template; `way_out` ends the message."""
    if not has_template(tokenizer):
        raise ValueError(f"this model's tokenizer has no chat template: {way_out}")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """A conversation as text; `options` as for transformers' `apply_chat_template`.

    The answer's opening is added unless `add_generation_prompt=False`.

    Raises:
        ValueError: messages that the template refuses.
    """
    options = {"add_generation_prompt": True, **options}
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from None


def split(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message] = ({"role": "user", "content": ""},),
    *,
    way_out: str = "use plain text instead",
    **options: Any,
) -> tuple[str, str]:
    """The text of a conversation before and from the first message's content on; `options` as for `render`.

    A document can be inserted between the two parts.

    Raises:
        ValueError: a template that does not show the first message exactly once.
    """
    first, *others = messages
    parts = render(tokenizer, [first | {"content": _HOLE + first["content"]}, *others], **options).split(_HOLE)
    if len(parts) != 2:
        raise ValueError(f"this model's chat template does not show a message exactly once: {way_out}")
    return parts[0], parts[1]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, or of a part of one, which gets no special tokens."""
    # Not verbose: documents may be longer than the length that the tokenizer warns about.
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


@dataclass(frozen=True)
class DocumentFrame:
    """How a document, and later a question about it, become the tokens of one prompt.

    Attributes:
        tokenizer: the model's.
        head: token ids before the document; None for the tokenizer's own special tokens.
        between: text between the document and the question.
        after: text after the question.
    """

    tokenizer: PreTrainedTokenizerBase
    head: tuple[int, ...] | None = None
    between: str = ""
    after: str = ""

    @classmethod
    def chat(cls, tokenizer: PreTrainedTokenizerBase) -> "DocumentFrame":
        """Both in one user message of the chat template."""
        before, after = split(tokenizer)
        return cls(tokenizer, tuple(encode(tokenizer, before)), "\n\n", after)

    def document(self, text: str) -> list[int]:
        """Token ids of the prompt up to the end of the document."""
        if self.head is None:
            return encode(self.tokenizer, text, special=True)
        return [*self.head, *encode(self.tokenizer, text)]

    def question(self, text: str) -> list[int]:
        """Token ids of the rest of the prompt."""
        return encode(self.tokenizer, f"{self.between}{text}{self.after}")

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether a document's tokens begin as this frame does."""
        return self.head is None or tuple(tokens[: len(self.head)]) == self.head
