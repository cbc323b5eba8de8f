"""Chat: a conversation of several turns on one cache. Each turn computes only its new tokens."""

import bisect
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from duo_jax.arguments import seed_number, whole_number
from duo_jax.cache.cache import KVCache, Mark
from duo_jax.sizes import nbytes
from duo_jax.text.lm import LM, TextStream
from duo_jax.text.template import Message, checked_messages
from duo_jax.text.tokens import check_text

# Tokens of a turn that are computed at a time, up to a number of new tokens and beyond. Turns have all sizes, and a
# program for each size would be compiled in the middle of a conversation, which takes longer than to compute padding.
SHORT, LONG, MOST_SHORT = 64, 512, 256


class Chat:
    """A conversation.

    The cache has a fixed size. A turn that does not fit is refused before any of it is computed; `drop_oldest` makes
    room for it.
    """

    def __init__(
        self,
        lm: LM,
        *,
        max_length: int = 4096,
        system: str | None = None,
        parse_special: bool = False,
        seed: int = 0,
    ) -> None:
        """Start a conversation.

        Args:
            lm: model, tokenizer and head pattern.
            max_length: size of the cache in tokens.
            system: the system message.
            parse_special: special tokens that are written in messages are control tokens; by default they are text.
            seed: random seed of the replies, each of which gets a key of its own.

        Raises:
            ValueError: a tokenizer without a chat template, or one that refuses a system message.
        """
        self._lm, self._parse_special = lm, parse_special
        self._seed, self._count = seed_number("seed", seed), 0
        self._system = self._checked_system(system)  # Fail now if the model has no chat template.
        self._messages: list[Message] = list(self._system)
        self.max_length = whole_number("max_length", max_length, 1)
        self._running: TextStream | None = None
        self._cached: list[int] = []
        # The tokens before the newest turn, to which the cache can be rewound.
        self._before: tuple[list[int], Mark] | None = None
        self._cache, self._empty = self._allocate()

    @property
    def messages(self) -> list[Message]:
        """The messages so far, with the newest answer as far as it has been generated."""
        newest = [] if self._running is None else [{"role": "assistant", "content": str(self._running.reply)}]
        return [*self._messages, *newest]

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._system[0]["content"] if self._system else None

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache."""
        cache = self._newest_cache()
        # An interrupted prefill loses the cache; the next turn makes another.
        return int(np.asarray(cache.length)[0]) if cache.is_alive else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._newest_cache().nbytes

    @property
    def nbytes_used(self) -> int:
        """Bytes of keys and values of the tokens in the cache."""
        cache, count = self._newest_cache(), self.num_tokens
        rings = zip(cache.rings, cache.windows, strict=True)
        streaming = sum(nbytes(ring) * min(1, count / window.size) for ring, window in rings if window.size)
        return round(nbytes(cache.full) * count / cache.max_length + streaming)

    def reset(self, system: str | None = None) -> None:
        """Remove all messages except the system message, which is replaced if one is given; "" removes it too.

        Raises:
            ValueError: a system message that the model's chat template refuses.
        """
        if system is not None:
            self._system = self._checked_system(system)
        self._settle()
        self._messages = list(self._system)
        self._back_to(None)

    def restore(self, messages: Sequence[Message]) -> None:
        """Continue another conversation, such as the `messages` of an earlier chat; its system message included.

        Its tokens are computed by the next turn.

        Raises:
            ValueError: messages that are not a conversation, or that the model's chat template refuses.
        """
        checked = [] if messages == [] else checked_messages(messages)
        if checked:
            self._encode(checked)
        self._settle()
        self._system = checked[:1] if checked and checked[0]["role"] == "system" else []
        self._messages = checked
        self._back_to(None)

    def say(self, text: str, *, max_new_tokens: int = 512, **options: Any) -> TextStream:
        """Send a message and iterate over the answer. An answer that is left early stays in the conversation as it is.

        Options are those of `LM.stream`. By default, tokens are chosen as in the model's own generation settings.

        Raises:
            ValueError: an empty message, or a conversation that does not fit into the cache any more.
        """
        return self._answer(self._with(text), max_new_tokens, options)

    def retry(self, *, max_new_tokens: int = 512, **options: Any) -> TextStream:
        """Answer the last message again; the new answer replaces the old one. Options as for `say`.

        Raises:
            ValueError: there is no message yet, or the conversation does not fit into the cache.
        """
        return self._answer(self._with(None), max_new_tokens, options)

    def undo(self) -> str:
        """Remove the last message with its answer, and return it.

        Raises:
            ValueError: there is no message yet.
        """
        *kept, last = self._with(None)
        self._settle()
        self._messages = kept
        self._back_to(self._before)
        self._before = None
        return str(last["content"])

    def room(self, text: str | None = None) -> int:
        """Tokens that are left for the answer to a message, below 1 if it does not fit; None: the last message."""
        return self.max_length - len(self._encode(self._with(text)))

    def drop_oldest(self, text: str | None = None) -> int:
        """Remove the oldest turns, until the others take at most half of the cache together with the next message.

        Half, so that it happens seldom: the next turn computes all that is left again. The system message stays.

        Args:
            text: the next message; None: the last one, to be answered again.

        Returns:
            The number of messages that were removed.

        Raises:
            ValueError: the message does not fit even without earlier turns; nothing is removed.
        """
        messages = self._with(text)
        first = len(self._system)
        turns = [place for place, message in enumerate(messages) if place > first and message["role"] == "user"]
        starts = [first, *turns]

        def fits(start: int) -> bool:
            return len(self._encode([*self._system, *messages[start:]])) <= self.max_length // 2

        start = starts[min(bisect.bisect_left(starts, True, key=fits), len(turns))]
        self._check_room(
            self._encode([*self._system, *messages[start:]]),
            "shorten the message, which is too long by itself, or start a chat with a larger max_length",
        )
        self._settle()
        if start > first:
            del self._messages[first:start]
            self._back_to(None)
        return start - first

    def _answer(self, messages: list[Message], max_new_tokens: int, options: dict[str, Any]) -> TextStream:
        """Stream the answer to the last of the messages, which become the conversation."""
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
        tokens = self._encode(messages)
        room = self._check_room(tokens)
        self._settle()
        known = self._rewind(tokens)
        self._before = (self._cached, self._cache.mark() if known else self._empty)
        self._count += 1
        defaults: dict[str, Any] = {
            "sampler": self._lm.sampling.sampler(),
            "seed": jax.random.fold_in(jax.random.key(self._seed), self._count),
        }
        own: dict[str, Any] = {
            "max_new_tokens": min(max_new_tokens, room),
            "cache": self._cache,
            "history": self._cached,
            "width": SHORT if len(tokens) - known <= MOST_SHORT else LONG,
        }
        self._running = TextStream(self._lm, [tokens[known:]], **defaults | options | own)
        self._messages, self._cached = messages, tokens
        return self._running

    def _with(self, text: str | None) -> list[Message]:
        """The conversation with its next message; None: up to the last one, without its answer."""
        if text is not None:
            if not check_text(text, "the message").strip():
                raise ValueError("the message is empty; say something")
            return [*self.messages, {"role": "user", "content": text}]
        last = max((place for place, message in enumerate(self._messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ValueError("there is no message yet; say something first")
        return self._messages[: last + 1]

    def _check_room(
        self,
        tokens: list[int],
        way: str = "it is full; reset it, drop its oldest turns, or start one with a larger max_length",
    ) -> int:
        """The number of tokens that are left for an answer, at least one."""
        room = self.max_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens and the cache has room for {self.max_length}: {way}"
            )
        return room

    def _checked_system(self, system: str | None) -> list[Message]:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._encode([*messages, {"role": "user", "content": "?"}])
        return messages

    def _encode(self, messages: list[Message]) -> list[int]:
        return self._lm.encode_chat(messages, parse_special=self._parse_special)

    def _allocate(self) -> tuple[KVCache, Mark]:
        cache = self._lm.make_cache(self.max_length)
        return cache, cache.mark()

    def _rewind(self, tokens: list[int]) -> int:
        """Rewind the cache to the most tokens that `tokens` continue, and return how many they are.

        They are all of its tokens, those before the newest turn (to answer it again, or after a reply whose text is not
        encoded as the same tokens again), or none.
        """
        if not (self._cache.is_alive and _continues(tokens, self._cached)):
            is_continued = self._before is not None and _continues(tokens, self._before[0])
            self._back_to(self._before if is_continued else None)
        return len(self._cached)

    def _back_to(self, point: tuple[list[int], Mark] | None) -> None:
        """Rewind the cache to a point; None: empty it."""
        if not self._cache.is_alive:  # An interrupted prefill donated it.
            self._cache, self._empty = self._allocate()
            point = None
        self._before = point
        self._cached, mark = point or ([], self._empty)
        self._cache = self._cache.rewind(mark)

    def _settle(self) -> None:
        """Take back the cache from the last answer, finished or not."""
        if self._running is not None:
            self._messages, self._cached = self.messages, self._cached + self._running.reply.tokens
            self._cache, failed, self._running = self._running.cache, self._running.failed, None
            if failed:  # NaN in the cache would spoil every later turn.
                self._before, self._cached = None, []
                self._cache, self._empty = self._allocate()

    def _newest_cache(self) -> KVCache:
        return self._cache if self._running is None else self._running.cache


def _continues(tokens: list[int], known: list[int]) -> bool:
    """Whether tokens begin with all that are known, and have more."""
    return len(known) < len(tokens) and tokens[: len(known)] == known
