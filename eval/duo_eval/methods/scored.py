"""Compress a prompt once, after it was read: the code that rules share which give every token of every head a score.

Full attention reads the prompt, a rule scores its tokens, and those with the highest scores stay, so that heads differ
in size. Every token after the prompt is added, in all heads. Knows no rule. The whole prompt is in memory until its
tokens are chosen, which `peak_nbytes` counts.
"""

import functools
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32
from numpy.typing import ArrayLike

from duo_eval.methods.eviction import by_head
from duo_eval.methods.method import Memory, Method, check_arguments
from duo_eval.methods.ragged import Ragged, attend_one, compress, layout
from duo_jax import Model
from duo_jax.checks import check_vocabulary
from duo_jax.generation.chunks import bucket


class Scored(NamedTuple):
    """A prompt's keys and values under full attention, padded at its end, and the score of each token."""

    k: Float[Array, "L K S H"]
    v: Float[Array, "L K S H"]
    score: Float[Array, "L K S"]  # `eviction.ALWAYS` for tokens that always stay


@dataclass(frozen=True)
class ScoredState:
    """A sequence: its cache, the prompt's tokens that each head holds, the lengths of the prompt and so far."""

    cache: Ragged
    kept: Int32[np.ndarray, "P"]
    prompt: int
    length: int
    most: int
    peak_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return self.cache.nbytes

    @property
    def memory(self) -> Memory:
        """Bytes that the sequence takes now."""
        held = int(self.kept.sum()) + len(self.kept) * (self.length - self.prompt)
        return self.cache.memory(held, self.peak_nbytes, self.kept)


class Scoring(Method):
    """A rule that scores the tokens of a prompt, and chooses by the scores."""

    @abstractmethod
    def observe(self, model: Model, tokens: Int32[np.ndarray, "T"]) -> tuple[Float[Array, "V"], Scored, int]:
        """Read a prompt: the logits after it, its tokens with their scores, and the most bytes that this took."""

    @abstractmethod
    def choose(self, scores: Float[np.ndarray, "L K T"], budget: float) -> Bool[np.ndarray, "L K T"]:
        """The tokens that stay, no more than the fraction `budget` of all."""

    @abstractmethod
    def least(self) -> int:
        """Fewest tokens that a head must be able to hold."""

    def check(self, model: Model, budget: float, length: int) -> None:
        """See `Method.check`."""
        super().check(model, budget, length)
        self.check_limit(budget, length, limit=share(budget, length), least=self.least())

    def begin(
        self, model: Model, tokens: ArrayLike, *, room: int, budget: float
    ) -> tuple[Float[Array, "V"], ScoredState]:
        """See `Method.begin`."""
        tokens = check_arguments(model, tokens, room)
        length = len(tokens)
        self.check(model, budget, length)
        logits, prompt, peak = self.observe(model, tokens)
        stride = prompt.score.shape[2]
        held = self.choose(np.asarray(prompt.score)[:, :, :length], budget).reshape(-1, length)
        kept = held.sum(-1, dtype=np.int32)
        # Enough slots for any choice: prompts of one bucket run the same programs.
        slots = share(budget, len(kept) * bucket(length)) + len(kept) * bucket(room)
        at = layout(held, kept + room, stride=stride, slots=slots)
        unused = np.zeros(0, np.float32), np.zeros(0, np.int32)
        fields = at.source, at.position, *unused, at.head, at.offset, at.size
        cache = compress(prompt.k, prompt.v, *(jnp.asarray(x) for x in fields))
        state = ScoredState(cache, kept, length, length, length + room, 0)
        whole = prompt.k.nbytes + prompt.v.nbytes
        return logits, replace(state, peak_nbytes=max(peak, whole + state.nbytes))

    def step(self, model: Model, token: int, state: ScoredState) -> tuple[Float[Array, "V"], ScoredState]:
        """See `Method.step`."""
        ids = np.array([token], np.int32)
        check_vocabulary(model.config, ids)
        if state.length == state.most:
            raise ValueError(f"the room is used up after {state.most} tokens; begin with a larger room")
        used = state.kept + np.int32(state.length - state.prompt)
        logits, cache = _append(model, ids, state.cache, used, np.int32(state.length))
        return logits, replace(state, cache=cache, length=state.length + 1)


def share(budget: float, count: int) -> int:
    """A fraction of a number of tokens; the tolerance keeps 0.29 * 100 at 29."""
    return int(budget * count + 1e-9)


def highest(scores: Float[np.ndarray, "n T"], count: int) -> Bool[np.ndarray, "n T"]:
    """The `count` highest scores of all rows together; among equals, the younger tokens, then those of later rows."""
    position = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    stays = np.zeros(scores.size, bool)
    stays[np.lexsort((position.ravel(), scores.ravel()))[scores.size - count :]] = True
    return stays.reshape(scores.shape)


@functools.partial(jax.jit, donate_argnums=2)
def _append(
    model: Model, token: Int32[Array, "1"], cache: Ragged, used: Int32[Array, "P"], start: Int32[Array, ""]
) -> tuple[Float[Array, "V"], Ragged]:
    """Append a token in the first free slot of every head, of which `used` slots are not free."""
    slot = cache.offset + used
    cache = cache._replace(position=cache.position.at[slot].set(start))

    def attend(state: Ragged, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Ragged]:
        count = k.shape[2]
        slots = slot[layer * count : (layer + 1) * count]
        state = state._replace(k=state.k.at[slots].set(k[0, 0]), v=state.v.at[slots].set(v[0, 0]))
        out, _ = attend_one(by_head(q, count)[:, :, 0], state, layer * count, remember=False)
        return out.reshape(q.shape), state

    decoder = model.decoder
    hidden, cache = decoder.hidden(token[None], start[None, None], attend, cache)
    return decoder.logits(hidden[0, 0]), cache
