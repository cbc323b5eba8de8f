"""Chat templates: messages as text and as tokens, and a document and its question in one message.

The only module that knows templates exist. Knows tokenizers, but no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from duo_jax.text import renderer
from duo_jax.text.tokenizer import TextTokenizer
from duo_jax.text.tokens import check_text, encode, encode_marked, mark, special_tokens, unmark

# A conversation's message: {"role": "user", "content": "Hello"}. The content may be a list of text parts.
Message = dict[str, Any]

# Placeholder for a text while a template is rendered around it.
_HOLE = "<<the text>>"
# A text that a template is unlikely to write, and to change in other ways than to capitals.
_WORD = "duojaxmessage"
# Continuations of a document that begin in all ways that may be joined with its end: what they all share is its own.
_TAIL = 2000  # characters of the end of a document that are tried with each
_SAME = 64  # tokens before a question that show that the end of a document is split as the whole is
_JOINT = 16  # tokens at the end of a text that its continuation may change
_PROBES = ("a", " a", "A", "1", ".", "\n", "\n\n", "  ", "(", "\u4e00")


def has_template(tokenizer: TextTokenizer) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(tokenizer.chat_template)


def check_template(tokenizer: TextTokenizer, way_out: str = "call it with plain text instead") -> None:
    """Raise ValueError for a tokenizer without a chat template; `way_out` ends the message."""
    if not has_template(tokenizer):
        raise ValueError(f"this model's tokenizer has no chat template: {way_out}")


def start(tokenizer: TextTokenizer) -> None:
    """Prepare to render the tokenizer's template, if it has one, while something else is done."""
    if has_template(tokenizer):
        renderer.start()


def render(tokenizer: TextTokenizer, messages: Sequence[Message], **options: Any) -> str:
    """A conversation as text; `options` as for transformers' `apply_chat_template`.

    The answer's opening is added unless `add_generation_prompt=False`.

    Raises:
        ValueError: an argument that is not a list of messages, or messages that the template refuses or leaves out.
    """
    messages, options = checked_messages(messages), {"add_generation_prompt": True, **options}
    return _shown(tokenizer, messages, options)


def encode_chat(
    tokenizer: TextTokenizer, messages: Sequence[Message], *, parse_special: bool = False, **options: Any
) -> list[int]:
    """Token ids of a conversation; `options` as for `render`.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        parse_special: special tokens in messages are control tokens, otherwise text like any other.
        **options: as for `render`.

    Raises:
        ValueError: as for `render` and `encode`.
    """
    if parse_special:
        return encode(tokenizer, render(tokenizer, messages, **options))
    marked = [mark(tokenizer, message) for message in checked_messages(messages)]
    text = _shown(tokenizer, marked, {"add_generation_prompt": True, **options})
    return encode_marked(tokenizer, text)


def end_of_turn(tokenizer: TextTokenizer) -> int | None:
    """The special token that the template writes after an assistant's message; None if it writes none."""
    if not has_template(tokenizer):
        return None
    try:
        after = _after_turn(tokenizer.get_chat_template(), tuple(_named_tokens(tokenizer).items()))
    except ValueError:  # A template that cannot be used is reported where it is used.
        return None
    return next((index for token, index in special_tokens(tokenizer).items() if after.startswith(token)), None)


@lru_cache(maxsize=16)  # Commands and evaluations ask for every reply.
def _after_turn(template: str, named_tokens: tuple[tuple[str, str], ...]) -> str:
    """The text that a template writes after an assistant's message."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _HOLE}]
    options = dict(named_tokens) | {"add_generation_prompt": False}
    return renderer.render(template, turns, options).rpartition(_HOLE)[2].lstrip()


def split(
    tokenizer: TextTokenizer,
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
    holed = [first | {"content": _HOLE + first["content"]}, *others]
    parts = _rendered(tokenizer, checked_messages(holed), {"add_generation_prompt": True, **options}).split(_HOLE)
    if len(parts) != 2:
        raise ValueError(f"this model's chat template does not show a message exactly once: {way_out}")
    return parts[0], parts[1]


def checked_messages(messages: object) -> list[Message]:
    """The messages, the text parts of each content joined.

    Raises:
        ValueError: an argument that is not a list of messages, with the index of the wrong one.
    """
    example = '[{"role": "user", "content": "Hello"}]'
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list such as {example}, and not empty; got {messages!r:.80}")
    checked = []
    for place, message in enumerate(messages):
        what = f"message {place}"
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise ValueError(f"{what} must be an object as in {example}, got {message!r:.80}")
        if not check_text(message.get("role"), f"the role of {what}"):
            raise ValueError(f"{what} has an empty role; give it one as in {example}")
        content = message.get("content")
        if content is not None or not message.get("tool_calls"):
            content = _joined(content, what)
        _check_texts({key: value for key, value in message.items() if key != "content"}, what)
        checked.append({**message, "content": content})
    return checked


@dataclass(frozen=True)
class DocumentFrame:
    """How a document and a question about it become the tokens of one prompt.

    Attributes:
        tokenizer: the model's.
        is_chat: both are one user message of the chat template; otherwise they are plain text.
        between: text between the document and the question.
        after: text after the question.
        parse_special: special tokens in both are control tokens, otherwise text like any other.
    """

    tokenizer: TextTokenizer
    is_chat: bool = False
    between: str = ""
    after: str = ""
    parse_special: bool = False

    @classmethod
    def chat(cls, tokenizer: TextTokenizer, *, parse_special: bool = False) -> "DocumentFrame":
        """Both in one user message of the chat template."""
        return cls(tokenizer, True, "\n\n", parse_special=parse_special)

    def whole(self, document: str, question: str) -> list[int]:
        """Token ids of the prompt."""
        text = f"{check_text(document)}{self.between}{check_text(question, 'the question')}{self.after}"
        if self.is_chat:
            messages = [{"role": "user", "content": text}]
            return encode_chat(self.tokenizer, messages, parse_special=self.parse_special)
        return encode(self.tokenizer, text, special=True, parse_special=self.parse_special)

    def document(self, text: str) -> list[int]:
        """Token ids that a prompt with this document begins with, at least one, whatever the question.

        The last ones of the document are missing if a question may be joined with them. What a question is joined with
        is near the end of the document, so only the end is tried with several.
        """
        tail, shared = self._end(text)
        tokens = self.whole(text, _PROBES[0])
        return tokens[: max(1, len(tokens) - (len(tail) - shared))]

    def question(self, text: str, known: Sequence[int], question: str) -> list[int] | None:
        """Token ids of a prompt after `known`, the tokens of `document(text)`; None if it does not begin with them.

        Only the end of the document is encoded again, with the question: the tokens that it shares with the document's
        own end are known.
        """
        if len(text) > _TAIL:
            tail, shared = self._end(text)
            whole = self.whole(text[-_TAIL:], question)
            # The end must be split as it is in the whole document, but for its first tokens.
            if shared > _SAME and tail[shared - _SAME : shared] == list(known[-_SAME:]):
                return whole[shared:] if whole[:shared] == tail[:shared] else None
        whole = self.whole(text, question)
        return whole[len(known) :] if whole[: len(known)] == list(known) else None

    def is_document(self, text: str, known: Sequence[int]) -> bool:
        """Whether `known` are the tokens of `document(text)`; of a long text, only both ends are compared."""
        # Between the ends, special tokens show how the text was encoded.
        if len(text) <= _TAIL or mark(self.tokenizer, text) != text:
            return self.document(text) == list(known)
        begin, (tail, shared) = self.document(text[:_TAIL]), self._end(text)
        is_same_end = tail[max(0, shared - _SAME) : shared] == list(known[-min(shared, _SAME) :])
        return is_same_end and common(begin, known) >= len(begin) - _JOINT

    def _end(self, text: str) -> tuple[list[int], int]:
        """Token ids of a prompt with the end of a document, and how many of them any question leaves as they are."""
        tries = [self.whole(text[-_TAIL:], probe) for probe in _PROBES]
        return tries[0], min(common(tries[0], other) for other in tries)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(first), len(second)))


def _shown(tokenizer: TextTokenizer, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    """The rendered text, which must contain the user's and the system's messages."""
    text = _rendered(tokenizer, messages, options)
    for place, message in enumerate(messages):
        content = (message["content"] or "").strip()
        if message["role"] in ("user", "system") and content not in text:
            # A template may change a text, but what it does not show at all, the model would not read.
            other = [*messages[:place], {**message, "content": _WORD}, *messages[place + 1 :]]
            if _WORD not in _rendered(tokenizer, other, options).lower():
                quoted = unmark(tokenizer, content)
                raise ValueError(
                    f"the model's chat template leaves out message {place}, {message['role']!r}: {quoted!r:.60}; the "
                    "model would not see it"
                )
    return text


def _rendered(tokenizer: TextTokenizer, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    check_template(tokenizer)
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return renderer.render(tokenizer.get_chat_template(), given, {**_named_tokens(tokenizer), **options})


def _named_tokens(tokenizer: TextTokenizer) -> dict[str, str]:
    """The special tokens that a template knows by name, such as `bos_token`."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _joined(content: object, what: str) -> str:
    """The text of a message, given as one or in parts."""
    if not isinstance(content, list | tuple):
        return check_text(content, f"the content of {what}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise ValueError(f"{what} has a part of type {kind!r}: this model reads text only, so leave it out")
        texts.append(check_text(part.get("text"), f"a text part of {what}"))
    return "".join(texts)


def _check_texts(value: object, what: str, levels: int = 64) -> None:
    """Refuse texts that are not Unicode, at any depth."""
    if isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, Mapping | list | tuple):
        if not levels:
            raise ValueError(f"{what} is nested more than 64 levels deep")
        for item in (item for pair in value.items() for item in pair) if isinstance(value, Mapping) else value:
            _check_texts(item, what, levels - 1)
