"""Chat: a conversation of several turns on one cache. Each turn computes only its new tokens."""

from typing import Any

import numpy as np

from duo_jax.arguments import whole_number
from duo_jax.cache.cache import KVCache, Mark
from duo_jax.text.lm import LM, TextStream
from duo_jax.text.template import Message
from duo_jax.text.tokens import check_text


class Chat:
    """A conversation.

    The cache has a fixed size. A turn that does not fit is refused before any of it is computed.
    """

    def __init__(
        self, lm: LM, *, max_length: int = 4096, system: str | None = None, parse_special: bool = False
    ) -> None:
        """Start a conversation.

        Args:
            lm: model, tokenizer and head pattern.
            max_length: size of the cache in tokens.
            system: the system message.
            parse_special: special tokens that are written in messages are control tokens; by default they are text.

        Raises:
            ValueError: a tokenizer without a chat template, or one that refuses a system message.
        """
        self._lm, self._parse_special = lm, parse_special
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages: list[Message] = list(self._system)
        self._encode([*self._system, {"role": "user", "content": "?"}])  # Fail now if the model has no chat template.
        self.max_length = whole_number("max_length", max_length, 1)
        self._running: TextStream | None = None
        self._cached: list[int] = []
        self._cache, self._empty = self._allocate()

    @property
    def messages(self) -> list[Message]:
        """The messages so far, with the newest answer as far as it has been generated."""
        newest = [] if self._running is None else [{"role": "assistant", "content": str(self._running.reply)}]
        return [*self._messages, *newest]

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache."""
        return int(np.asarray(self._newest_cache().length)[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._newest_cache().nbytes

    def reset(self) -> None:
        """Remove all messages except the system message."""
        self._settle()
        self._messages = list(self._system)
        self._restart()

    def say(self, text: str, *, max_new_tokens: int = 512, **options: Any) -> TextStream:
        """Send a message and iterate over the answer. An answer that is left early stays in the conversation as it is.

        Raises:
            ValueError: an empty message, or a conversation that does not fit into the cache any more.
        """
        if not check_text(text, "the message").strip():
            raise ValueError("the message is empty; say something")
        self._settle()
        if not self._cache.is_alive:
            self._restart()
        messages = [*self._messages, {"role": "user", "content": text}]
        tokens = self._encode(messages)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
        room = self.max_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens and the cache has room for {self.max_length}: it is full; "
                "reset it, or start one with a larger max_length"
            )
        known = len(self._cached)
        if not known or tokens[:known] != self._cached or known == len(tokens):
            # Compute everything: a first turn, or a reply whose text is not encoded as the same tokens again.
            self._restart()
            known = 0
        options |= {"max_new_tokens": min(max_new_tokens, room), "cache": self._cache, "history": self._cached}
        self._running = TextStream(self._lm, [tokens[known:]], **options)
        self._messages, self._cached = messages, tokens
        return self._running

    def _encode(self, messages: list[Message]) -> list[int]:
        return self._lm.encode_chat(messages, parse_special=self._parse_special)

    def _allocate(self) -> tuple[KVCache, Mark]:
        cache = self._lm.make_cache(self.max_length)
        return cache, cache.mark()

    def _restart(self) -> None:
        """Empty the cache, or make a new one if an interrupted prefill donated it."""
        self._cached = []
        if self._cache.is_alive:
            self._cache = self._cache.rewind(self._empty)
        else:
            self._cache, self._empty = self._allocate()

    def _settle(self) -> None:
        """Take back the cache from the last answer, finished or not."""
        if self._running is not None:
            self._messages, self._cached = self.messages, self._cached + self._running.reply.tokens
            self._cache, failed, self._running = self._running.cache, self._running.failed, None
            if failed:  # NaN in the cache would spoil every later turn.
                self._cached = []
                self._cache, self._empty = self._allocate()

    def _newest_cache(self) -> KVCache:
        return self._cache if self._running is None else self._running.cache
