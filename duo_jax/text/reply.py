"""Reply: generated text with what is known of it, and how it grows token by token. Knows no model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from duo_jax.text.detokenize import Detokenizer


class Reply(str):
    """Generated text, with what is known of it.

    Attributes:
        tokens: token ids, the EOS or stop token included.
        logprobs: log-probability of each under the model itself.
        finish_reason: "eos", "stop" (a stop string came) or "length" (`max_new_tokens` ran out).
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str

    def __new__(cls, text: str, tokens: list[int], logprobs: list[float], finish_reason: str) -> "Reply":
        """Make a string that carries more."""
        reply = super().__new__(cls, text)
        reply.tokens, reply.logprobs, reply.finish_reason = tokens, logprobs, finish_reason
        return reply


class Row:
    """One reply in the making."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...], stop: Sequence[str]) -> None:
        """Begin without a token; `stop`: strings that end the text."""
        self._text = Detokenizer(tokenizer, stop)
        self._eos_ids = eos_ids
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finish_reason = "length"

    def add(self, token: int, logprob: float) -> str:
        """Append a token; the text that can be shown now."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if token in self._eos_ids:
            self._finish_reason = "eos"
            return ""
        new = self._text.add(token)
        if self.stopped:
            self._finish_reason = "stop"
        return new

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._text.stopped

    def rest(self) -> str:
        """Text held back until now."""
        return self._text.rest()

    @property
    def reply(self) -> Reply:
        """The text so far."""
        return Reply(self._text.text, self._tokens, self._logprobs, self._finish_reason)
