"""How every row of a batch chooses its next token, with settings of its own. Knows no cache and no request.

The rules are those of `duo_jax.generation.sampling`, with a number for each row in place of one for all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from duo_jax.arguments import real_number
from duo_jax.generation.sampling import MASKED, above_min_p, penalize
from duo_jax.generation.sampling_settings import SamplingSettings

# Most likely tokens among which `top_k` and `top_p` are looked for first.
FIRST = 256
# OpenAI's range of both penalties.
MOST_PENALTY = 2.0


class Sampling(NamedTuple):
    """Sampling parameters, one number for each row.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: most likely tokens to sample from; 0: all.
        beyond_p: `1 - top_p`, the probability of the tokens that `top_p` leaves out; 0: none.
        min_p: see `MinP`; 0: no restriction.
        repetition: see `RepetitionPenalty`; 1: none.
        presence: subtracted from the logit of each token that was generated before.
        frequency: the same, times how often it was.
    """

    temperature: Float32[Array | np.ndarray, "B"]
    top_k: Int32[Array | np.ndarray, "B"]
    beyond_p: Float32[Array | np.ndarray, "B"]
    min_p: Float32[Array | np.ndarray, "B"]
    repetition: Float32[Array | np.ndarray, "B"]
    presence: Float32[Array | np.ndarray, "B"]
    frequency: Float32[Array | np.ndarray, "B"]

    @classmethod
    def of(
        cls, settings: SamplingSettings = SamplingSettings(), *, presence: float = 0.0, frequency: float = 0.0
    ) -> "Sampling":
        """The parameters of one row, `[1]`.

        Raises:
            ValueError: a value out of range, or restrictions on sampling at temperature 0.
        """
        settings.sampler()
        presence = real_number("presence_penalty", presence, -MOST_PENALTY, MOST_PENALTY)
        frequency = real_number("frequency_penalty", frequency, -MOST_PENALTY, MOST_PENALTY)
        beyond = 0.0 if settings.top_p is None else 1 - settings.top_p
        numbers = (beyond, settings.min_p or 0.0, settings.repetition_penalty or 1.0, presence, frequency)
        temperature, *others = (np.array([x], np.float32) for x in (settings.temperature, *numbers))
        return cls(temperature, np.array([settings.top_k or 0], np.int32), *others)


class Choice(NamedTuple):
    """A token of each row.

    Log-probabilities are those of the model itself, before any transform.

    Attributes:
        token: the token.
        logprob: its log-probability.
        top: the most likely tokens, the best first.
        top_logprobs: their log-probabilities.
        is_finite: False where a logit is NaN or infinite: the row's token is meaningless, and it must end.
    """

    token: Int32[Array, "B"]
    logprob: Float[Array, "B"]
    top: Int32[Array, "B n"]
    top_logprobs: Float[Array, "B n"]
    is_finite: Bool[Array, "B"]

    @classmethod
    def blank(cls, rows: int, top: int) -> "Choice":
        """That of rows which do not choose."""
        token, logprob = (jnp.zeros(rows, dtype) for dtype in (jnp.int32, jnp.float32))
        best, logprobs = (jnp.zeros((rows, top), dtype) for dtype in (jnp.int32, jnp.float32))
        return cls(token, logprob, best, logprobs, jnp.ones(rows, bool))


class Drawn(NamedTuple):
    """What the choice of a row depends on besides its logits; it changes with every token.

    Attributes:
        keys: random keys, split once for each token, as by `generate`.
        seen: tokens in the prompt or generated.
        counts: how often each token was generated.
    """

    keys: Key[Array, "B"]
    seen: Bool[Array | np.ndarray, "B V"]
    counts: Int32[Array | np.ndarray, "B V"]


def choose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    drawn: Drawn,
    active: Bool[Array, "B"],
    forced: Int32[Array, "B"],
    top: int,
) -> tuple[Choice, Drawn]:
    """A token for each active row: `forced`, or its own choice where that is negative.

    A row's result depends on its own arguments only. What is costly, sorting and drawing, is left out if no row needs
    it, which does not change the others. Rows that are not active keep their state.
    """
    split = jax.vmap(jax.random.split)(drawn.keys)
    penalized = _penalized(logits, sampling, drawn)
    greedy = jnp.argmax(penalized, axis=-1).astype(jnp.int32)
    is_random = active & (sampling.temperature > 0)

    def draw() -> Int32[Array, "B"]:
        transformed = _restricted(penalized, sampling, is_random)
        return jax.vmap(jax.random.categorical)(split[:, 0], transformed).astype(jnp.int32)

    sampled = lax.cond(is_random.any(), draw, lambda: greedy)
    token = jnp.where(forced >= 0, forced, jnp.where(is_random, sampled, greedy))
    logprobs = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    best, best_tokens = lax.top_k(logprobs, top)
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    seen, counts = jnp.asarray(drawn.seen), jnp.asarray(drawn.counts)
    seen = seen.at[rows, token].set(seen[rows, token] | active)
    counts = counts.at[rows, token].add(active.astype(jnp.int32))
    keys = jnp.where(active, split[:, 1], drawn.keys)
    choice = Choice(token, logprob, best_tokens, best, ~active | ~jnp.isnan(logprob))
    return choice, Drawn(keys, seen, counts)


def _penalized(logits: Float[Array, "B V"], sampling: Sampling, drawn: Drawn) -> Float[Array, "B V"]:
    def all_rows() -> Float[Array, "B V"]:
        repeated = penalize(logits, jnp.asarray(drawn.seen), sampling.repetition[:, None])
        counts = drawn.counts.astype(jnp.float32)
        added = sampling.presence[:, None] * (counts > 0).astype(jnp.float32) + sampling.frequency[:, None] * counts
        return repeated - added

    is_used = (sampling.repetition != 1) | (sampling.presence != 0) | (sampling.frequency != 0)
    return lax.cond(is_used.any(), all_rows, lambda: logits)


def _restricted(logits: Float[Array, "B V"], sampling: Sampling, is_random: Bool[Array, "B"]) -> Float[Array, "B V"]:
    """Logits to draw from: temperature, then the most likely tokens."""
    size = logits.shape[-1]
    beyond_p = jnp.asarray(sampling.beyond_p)
    top_k = jnp.where((sampling.top_k > 0) & (sampling.top_k < size), sampling.top_k, size)
    is_cut = is_random & ((top_k < size) | (beyond_p > 0))
    logits = logits / jnp.where(is_random, sampling.temperature, 1.0)[:, None]

    def cut() -> Float[Array, "B V"]:
        is_kept, is_known = _kept(logits, top_k, beyond_p, min(FIRST, size))
        is_unknown = is_cut & ~is_known

        def all_tokens() -> Bool[Array, "B V"]:
            return _kept(logits, top_k, beyond_p, size)[0]

        # A row takes what its own tokens need, whatever other rows do.
        whole = lax.cond(is_unknown.any(), all_tokens, lambda: is_kept)
        is_kept = jnp.where(is_unknown[:, None], whole, is_kept)
        return jnp.where(is_kept | ~is_cut[:, None], logits, MASKED)

    logits = lax.cond(is_cut.any(), cut, lambda: logits)
    return jnp.where((sampling.min_p > 0)[:, None], above_min_p(logits, sampling.min_p[:, None]), logits)


def _kept(
    logits: Float[Array, "B V"], top_k: Int32[Array, "B"], beyond_p: Float[Array, "B"], count: int
) -> tuple[Bool[Array, "B V"], Bool[Array, "B"]]:
    """Tokens that `TopK` and then `TopP` keep, found among the `count` most likely ones; and whether those were enough.

    Sorting a whole vocabulary takes longer than a decode step of a small model.
    """
    size = logits.shape[-1]
    # Among equal tokens those with higher ids come first, as in `TopP`.
    best, backwards = lax.top_k(logits[:, ::-1], count)
    tokens = size - 1 - backwards
    least = jnp.take_along_axis(best, jnp.clip(top_k, 1, count)[:, None] - 1, axis=-1)
    least = jnp.where((top_k < size)[:, None], least, -jnp.inf)
    share = jnp.exp(jnp.where(best >= least, best, -jnp.inf) - best[:, :1])
    # Without `top_k`, all tokens share the probability.
    whole = jnp.exp(logits - best[:, :1]).sum(-1, keepdims=True)
    share = share / jnp.where((top_k < size)[:, None], share.sum(-1, keepdims=True), whole)
    more_likely, beyond = jnp.cumsum(share, axis=-1) - share, beyond_p[:, None]
    # The most likely token always remains; a sum of rounded probabilities may reach 1 early.
    is_kept = (best >= least) & ((1 - more_likely > beyond) | (beyond == 0)).at[:, 0].set(True)
    # Tokens above the last one that is kept, which is faster than to look the places of all up.
    last = is_kept.sum(-1, keepdims=True, dtype=jnp.int32) - 1
    least, lowest = (jnp.take_along_axis(x, last, axis=-1) for x in (best, tokens))
    is_equal = (logits == least) & (jnp.arange(size, dtype=jnp.int32)[None, :] >= lowest)
    return (logits > least) | is_equal, ~(is_kept[:, -1] & (count < size))
