"""Reply: generated text and its facts, and how it grows token by token. Knows no model."""

import re

from duo_jax.text.ends import Ends
from duo_jax.text.tokenizer import TextTokenizer
from duo_jax.text.tokens import decode, special_tokens

# Tokens whose text a later one may change: more are settled, so that the work for each is bounded.
MOST_OPEN = 64
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
    known not to be one. The work for a token does not grow with the reply: each is decoded together with a few before
    it. Only a run of more than `MOST_OPEN` byte tokens is settled before it ends: bytes in it that are not text do not
    change what was decoded before them, as they would if all tokens were decoded at once.
    """

    def __init__(self, tokenizer: TextTokenizer, ends: Ends = Ends()) -> None:
        """Start with no tokens; `ends` are not part of the text."""
        self._tokenizer, self._ends = tokenizer, ends
        self._special = frozenset(special_tokens(tokenizer).values())
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
        if token in self._ends.eos_ids or token in self._ends.stop_ids:
            self._finish_reason = "eos" if token in self._ends.eos_ids else "stop"
            return self.rest() if self._finish_reason == "stop" else ""
        if token in self._special:  # Decoding leaves it out.
            return ""
        self._open.append(token)
        self._tail = self._decoded(self._open)
        text = self._held + self._tail
        ends = [at for at in (text.find(stop) for stop in self._ends.strings) if at >= 0]
        if ends:
            self._finish_reason = "stop"
            self._held, self._tail = text[: min(ends)], ""
            return self.rest()
        if self._tail and self._is_settled(token):
            self._context, self._open = self._open, []
            self._held, self._tail = text, ""
        elif len(self._open) > MOST_OPEN:
            self._settle_some()
        begun = (
            size
            for stop in self._ends.strings
            for size in range(min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:size])
        )
        return self._show(len(self._held) - max(begun, default=0))

    def add_all(self, tokens: list[int], logprobs: list[float]) -> None:
        """Append all tokens of a reply, none of which is shown before the last; the text is that of `add`."""
        left_out = self._special.union(self._ends.ids)
        text = self._decode([token for token in tokens if token not in left_out])
        # Invalid bytes are decoded in groups of tokens: they would spoil a whole run of byte tokens.
        if self._ends.strings or self._tokenizer.clean_up_tokenization_spaces or "\N{REPLACEMENT CHARACTER}" in text:
            for token, logprob in zip(tokens, logprobs, strict=True):
                self.add(token, logprob)
            return
        self._tokens, self._logprobs, self._held = tokens, logprobs, text
        if tokens and tokens[-1] in self._ends.ids:
            self._finish_reason = "eos" if tokens[-1] in self._ends.eos_ids else "stop"

    def rest(self) -> str:
        """Return the text that was held back, once there are no more tokens."""
        self._held, self._tail = self._held + self._tail, ""
        self._open = []
        return self._show(len(self._held))

    def _show(self, end: int) -> str:
        new, self._held = self._held[:end], self._held[end:]
        self._shown.append(new)
        return new

    def _settle_some(self) -> None:
        """Settle the first half of the open tokens, or as much of it as can be decoded by itself."""
        half = len(self._open) // 2
        for cut in range(half, half - 4, -1):  # A character has at most four bytes.
            first, second = self._decoded(self._open[:cut]), self._decoded(self._open[cut:])
            if first + second == self._tail:
                break
        else:
            cut, first, second = half, self._decoded(self._open[:half]), self._decoded(self._open[half:])
        self._open, self._held, self._tail = self._open[cut:], self._held + first, second

    def _decoded(self, tokens: list[int]) -> str:
        """The text of tokens after the context."""
        return self._decode(self._context + tokens)[len(self._decode(self._context)) :]

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens)

    def _is_settled(self, token: int) -> bool:
        """Whether no later token can change the text that ends with this one."""
        # A run of byte tokens is decoded as a whole, special tokens within it skipped.
        is_byte = _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token)))
        return not (is_byte or self._tail.endswith("\N{REPLACEMENT CHARACTER}"))
