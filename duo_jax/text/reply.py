"""Reply: generated text and its facts, and how it grows token by token. Knows no model."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A token that is one byte of a character that the vocabulary lacks.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Reply(str):
    """Generated text, with the tokens that it was decoded from.

    Attributes:
        tokens: token ids, the EOS or stop token included.
        logprobs: log-probability of each under the model itself.
        finish_reason: "eos", "stop" (a stop string was generated) or "length" (`max_new_tokens` ran out).
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str

    def __new__(cls, text: str, tokens: list[int], logprobs: list[float], finish_reason: str) -> "Reply":
        """Make a string with attributes."""
        reply = super().__new__(cls, text)
        reply.tokens, reply.logprobs, reply.finish_reason = tokens, logprobs, finish_reason
        return reply


class Row:
    """One reply in the making. No text is shown that a later token could change.

    A character split over tokens is held back until it is complete, and the beginning of a stop string until it is
    known not to be one. Time is linear in the number of tokens: each is decoded together with the few before it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """Start with no tokens; `eos_ids` and the strings `stop` end the text and are not part of it."""
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a list of strings, none of them empty, got {stop!r}")
        self._tokenizer, self._eos_ids, self._stop = tokenizer, frozenset(eos_ids), tuple(stop)
        self._special = frozenset(tokenizer.all_special_ids)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finish_reason = "length"
        # The newest tokens whose text is settled: later ones are decoded after them, since the leading space of a first
        # token may be stripped. Then the tokens whose text a later one may still change.
        self._context: list[int] = []
        self._open: list[int] = []
        self._shown: list[str] = []
        self._held = ""  # settled, but it may begin a stop string
        self._tail = ""  # the text of the open tokens

    @property
    def reply(self) -> Reply:
        """The reply so far."""
        text = "".join(self._shown) + self._held + self._tail
        return Reply(text, self._tokens, self._logprobs, self._finish_reason)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was generated."""
        return self._finish_reason == "stop"

    def add(self, token: int, logprob: float = 0.0) -> str:
        """Append a token and return the text that can be shown now."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if token in self._eos_ids:
            self._finish_reason = "eos"
            return ""
        self._open.append(token)
        before = self._decode(self._context)
        self._tail = self._decode(self._context + self._open)[len(before) :]
        text = self._held + self._tail
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self._finish_reason = "stop"
            self._held, self._tail = text[: min(ends)], ""
            return self.rest()
        if self._tail and self._is_settled(token):
            self._context, self._open = self._open, []
            self._held, self._tail = text, ""
        begun = (size for stop in self._stop for size in range(len(stop)) if self._held.endswith(stop[:size]))
        return self._show(len(self._held) - max(begun, default=0))

    def rest(self) -> str:
        """Return the text that was held back, once there are no more tokens."""
        self._held, self._tail = self._held + self._tail, ""
        return self._show(len(self._held))

    def _show(self, end: int) -> str:
        new, self._held = self._held[:end], self._held[end:]
        self._shown.append(new)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _is_settled(self, token: int) -> bool:
        """Whether no later token can change the text that ends with this one."""
        # A run of byte tokens is decoded as a whole, special tokens within it skipped.
        is_byte = _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token)))
        return not (is_byte or token in self._special or self._tail.endswith("\N{REPLACEMENT CHARACTER}"))
