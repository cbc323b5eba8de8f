"""A mix of requests: texts that several share, lengths, and times of arrival. Knows no server."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from duo_jax.arguments import MOST_SEED, real_number, whole_number
from duo_jax.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        system: the text that it shares with others; empty: none.
        question: what only this request has.
        reply_tokens: most tokens of the reply.
        at: seconds after the start at which it arrives; None: when a client is free.
    """

    system: str
    question: str
    reply_tokens: int
    at: float | None


@dataclass(frozen=True)
class Mix:
    """How requests are drawn."""

    requests: int = 64
    """Requests that are measured."""
    prefixes: int = 1
    """Different texts at the beginning of prompts; each request has one of them."""
    prefix_tokens: int = 2048
    """Tokens of each, about; 0: prompts share nothing."""
    question_tokens: tuple[int, ...] = (32,)
    """Tokens of what only one request has, about; each request draws one of these."""
    reply_tokens: tuple[int, ...] = (64,)
    """Most tokens of a reply; each request draws one of these."""
    rate: float | None = None
    """Arrivals a second, at random times (Poisson); by default the next one is sent when a client is free."""
    seed: int = 0
    """Texts, lengths and times depend on it."""

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        for name in ("requests", "prefixes"):
            whole_number(name, getattr(self, name), 1, 100_000)
        whole_number("prefix_tokens", self.prefix_tokens, 0, 10_000_000)
        whole_number("seed", self.seed, 0, MOST_SEED)
        for name in ("question_tokens", "reply_tokens"):
            lengths = getattr(self, name)
            if not lengths:
                raise ValueError(f"{name} must have at least one length")
            for length in lengths:
                whole_number(name, length, 1, 1_000_000)
        if self.rate is not None:
            real_number("rate", self.rate, 1e-6, 1e6)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.prefix_tokens, *self.question_tokens)

    def draw(self, tokens: Sequence[int], tokenizer: TextTokenizer) -> tuple[list[str], list[Ask]]:
        """The shared texts, and the requests in the order in which they arrive.

        Args:
            tokens: a text that is cut into pieces.
            tokenizer: its tokenizer.

        Raises:
            ValueError: a text that is too short.
        """
        if len(tokens) < 2 * self.longest:
            raise ValueError(
                f"a text of {len(tokens)} tokens is too short for pieces of {self.longest}: give a longer haystack, or "
                "ask for fewer tokens"
            )
        rng = random.Random(self.seed)

        def piece(count: int) -> str:
            begin = rng.randrange(len(tokens) - count)
            return str(tokenizer.decode(list(tokens[begin : begin + count])))

        # Numbers make them differ from the first word on.
        systems = [f"Text {n + 1}. {piece(self.prefix_tokens)}" for n in range(self.prefixes)]
        systems = systems if self.prefix_tokens else [""]
        asks = [
            Ask(
                rng.choice(systems),
                f"{number + 1}. {piece(rng.choice(self.question_tokens))}",
                rng.choice(self.reply_tokens),
                at,
            )
            for number, at in zip(range(self.requests), self._arrivals(rng), strict=False)
        ]
        return systems, asks

    def _arrivals(self, rng: random.Random) -> Iterator[float | None]:
        at = 0.0
        while True:
            yield at if self.rate else None
            at += rng.expovariate(self.rate) if self.rate else 0.0
