"""Requests, and the events of their replies. Knows no device, no scheduler and no HTTP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from duo_jax.arguments import ArgumentError, real_number, seed_number, whole_number
from duo_jax.generation.sampling_settings import SamplingSettings

# Replies to one prompt, and likely tokens of each, that a request may ask for.
MOST_REPLIES, MOST_TOP = 128, 20
# Stop strings, and characters of each: the engine's thread looks for all of them after every token.
MOST_STOPS, MOST_STOP_CHARS = 64, 1000
# OpenAI's range of both penalties.
MOST_PENALTY = 2.0

Reason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how to reply to it.

    Attributes:
        prompt: token ids.
        max_tokens: most tokens of a reply; None: as many as there is room for.
        sampling: how tokens are chosen.
        presence_penalty: subtracted from the logit of each token that was generated before.
        frequency_penalty: the same, times how often it was.
        seed: of random draws. With the same seed and prompt, a reply is the same whatever else is served.
        stop: strings that end a reply; they are not part of it.
        eos_ids: tokens that end a reply; None: those of the model.
        n: replies, each with draws of its own.
        top: most likely tokens to report with each.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = 128
    sampling: SamplingSettings = SamplingSettings()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    n: int = 1
    top: int = 0

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if self.max_tokens is not None:
            whole_number("max_tokens", self.max_tokens, 1)
        whole_number("n", self.n, 1, MOST_REPLIES)
        whole_number("top", self.top, 0, MOST_TOP)
        seed_number("seed", self.seed)
        if len(self.stop) > MOST_STOPS or any(len(text) > MOST_STOP_CHARS for text in self.stop):
            raise ArgumentError("stop", f"must be at most {MOST_STOPS} strings of {MOST_STOP_CHARS} characters each")
        for name in ("presence_penalty", "frequency_penalty"):
            real_number(name, getattr(self, name), -MOST_PENALTY, MOST_PENALTY)
        self.sampling.sampler()  # It checks the settings.


class Likely(NamedTuple):
    """A token with its log-probability under the model itself, before any transform."""

    token: int
    logprob: float


class TokenEvent(NamedTuple):
    """A token of a reply.

    Attributes:
        reply: which of the request's replies.
        token: the token.
        logprob: its log-probability.
        top: the most likely tokens at this place, as many as the request asked for.
        text: text that can be shown now; it may be empty, and may be that of earlier tokens.
    """

    reply: int
    token: int
    logprob: float
    top: tuple[Likely, ...]
    text: str


class Usage(NamedTuple):
    """Tokens of a prompt, how many of them were in the cache already, and tokens of the reply."""

    prompt: int
    cached: int
    completion: int


class FinishEvent(NamedTuple):
    """The end of a reply.

    Attributes:
        reply: which of the request's replies.
        reason: "stop" (a stop string or a token that ends a text), "length", "cancelled" or "error".
        text: text that was held back until now.
        usage: what it took.
        error: what is wrong; empty unless the reason is "error".
    """

    reply: int
    reason: Reason
    text: str
    usage: Usage
    error: str = ""


Event: TypeAlias = TokenEvent | FinishEvent
Listener: TypeAlias = Callable[[Event], None]
