"""Generator: the loop body that chooses a token and appends it, run as one program or step by step. Knows no text.

Arguments have been checked; `duo_jax.generate` does that.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from duo_jax.cache.cache import KVCache
from duo_jax.finite import not_finite
from duo_jax.generation import infer
from duo_jax.generation.sampling import Greedy, Sampler
from duo_jax.model.model import Model


class Generation(NamedTuple):
    """Result of `generate`.

    Attributes:
        tokens: `[B, max_new_tokens]`; beyond a row's length it repeats an EOS id (0 if there is none).
        lengths: `[B]` tokens generated, an EOS token included.
        logprobs: `[B, max_new_tokens]` log-probability of each token under the model itself, before any transform.
        cache: the cache with the prompt and `tokens[b, :lengths[b]]` in it.
    """

    tokens: Int32[Array, "B M"]
    lengths: Int32[Array, "B"]
    logprobs: Float[Array, "B M"]
    cache: KVCache


class Step(NamedTuple):
    """One step of a stream: for each row a token, its log-probability, and whether the row was still active."""

    token: np.ndarray
    logprob: np.ndarray
    active: np.ndarray


class Prompt(NamedTuple):
    """Token ids, right-padded, with the number of valid ones; the tokens that each row has seen; and its random key."""

    tokens: Int32[Array | np.ndarray, "B T"]
    lengths: Int32[Array | np.ndarray, "B"]
    seen: Bool[Array | np.ndarray, "B V"]
    keys: Key[Array, "B"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "seen", "active", "keys", "is_finite"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """Everything that changes from one token to the next. The cache is whatever the generator's `step` works on.

    `is_finite` becomes False with the first token that was chosen from NaN or infinite logits; generation then ends.
    """

    cache: Any
    logits: Float[Array, "B V"]
    seen: Bool[Array | np.ndarray, "B V"]
    active: Bool[Array, "B"]
    keys: Key[Array, "B"]
    is_finite: Bool[Array, ""]


# (model, token [B], cache, active rows [B], backend) -> logits [B, V] of the next token and the new cache.
StepFunction: TypeAlias = Callable[[Any, Array, Any, Array, str | None], tuple[Array, Any]]

# Loop index, state, tokens [B, M], log-probabilities [B, M], tokens generated [B].
_Carry: TypeAlias = tuple[Array, State, Array, Array, Array]

# Called with the phase that begins, or None while the generator waits for its caller.
Watch: TypeAlias = Callable[[Literal["compile", "prefill", "decode"] | None], None]


@dataclass(frozen=True)
class Generator:
    """How tokens are generated. Hashable, so that it is static under jit.

    Attributes:
        sampler: chooses a token from logits.
        eos_ids: tokens that end a row.
        backend: attention backend; None takes the fastest one that is right on this device.
        step: appends a token to the cache; `stream` also accepts a function that cannot be traced.
    """

    sampler: Sampler = Greedy()
    eos_ids: tuple[int, ...] = ()
    backend: str | None = None
    step: StepFunction = infer.jitted_step

    def advance(self, model: Model, state: State) -> tuple[State, Int32[Array, "B"], Float[Array, "B"]]:
        """Choose a token for every active row, append it, and compute the logits after it."""
        token, logprob, seen, active, keys, is_finite = _choose(
            state.logits, state.seen, state.active, state.keys, self.sampler, self.eos_ids
        )
        logits, cache = self.step(model, token, state.cache, state.active, self.backend)
        return State(cache, logits, seen, active, keys, is_finite), token, logprob

    def compile(
        self,
        model: Model,
        logits: jax.ShapeDtypeStruct,
        cache: KVCache,
        *,
        seen: Bool[Array | np.ndarray, "B V"],
        keys: Key[Array, "B"],
    ) -> None:
        """Compile the programs of `stream`, for logits and a cache of these shapes, without running them."""
        seen, active, keys, _ = _beginning(logits, seen, keys)
        token, *_ = infer.compiled(_choose, logits, seen, active, keys, self.sampler, self.eos_ids)
        infer.compiled(self.step, model, token, cache, active, self.backend)

    @functools.partial(jax.jit, static_argnames=("self", "capacity", "width"), donate_argnames="cache")
    def run(
        self, model: Model, prompt: Prompt, cache: KVCache, limit: Int32[Array, ""], *, capacity: int, width: int
    ) -> tuple[Generation, Int32[Array, ""]]:
        """Prefill, `width` tokens at a time, and generate up to `limit` tokens per row, in one program.

        The prompt is padded to a multiple of `width`; the result has `capacity` columns. The cache is donated. The
        second result is the step, from 1, at which NaN or infinite logits ended the loop; 0: none did.
        """
        tokens, lengths, seen, keys = prompt
        batch = tokens.shape[0]

        def one_chunk(index: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            last, cache = carry
            chunk = lax.dynamic_slice_in_dim(tokens, index * width, width, 1)
            return infer.extend(model, chunk, cache, jnp.clip(lengths - index * width, 0, width), last, self.backend)

        last = jnp.zeros((batch, model.config.embed_dim), model.dtype)
        num_chunks = (lengths.max() + width - 1) // width
        last, cache = lax.fori_loop(jnp.int32(0), num_chunks, one_chunk, (last, cache))

        def is_unfinished(carry: _Carry) -> Array:
            index, state = carry[:2]
            return (index < limit) & state.active.any() & state.is_finite

        def one_token(carry: _Carry) -> _Carry:
            index, state, tokens, logprobs, count = carry
            count = count + state.active.astype(jnp.int32)
            state, token, logprob = self.advance(model, state)
            tokens = lax.dynamic_update_index_in_dim(tokens, token, index, 1)
            return index + 1, state, tokens, lax.dynamic_update_index_in_dim(logprobs, logprob, index, 1), count

        state = State(cache, infer.head(model, last), seen, jnp.ones(batch, bool), keys, jnp.bool_(True))
        filled = jnp.full((batch, capacity), _padding(self.eos_ids), jnp.int32)
        carry = (jnp.int32(0), state, filled, jnp.zeros((batch, capacity)), jnp.zeros(batch, jnp.int32))
        index, state, tokens, logprobs, count = lax.while_loop(is_unfinished, one_token, carry)
        return Generation(tokens, count, logprobs, state.cache), jnp.where(state.is_finite, 0, index)

    def stream(
        self,
        model: Model,
        logits: Float[Array, "B V"],
        cache: Any,
        max_new_tokens: int,
        *,
        seen: Bool[Array | np.ndarray, "B V"] | None = None,
        keys: Key[Array, "B"] | None = None,
        watch: Watch | None = None,
    ) -> "Stream":
        """Generate step by step from the logits after a prompt; `seen` and `keys` are for samplers that use them."""
        seen = np.zeros(logits.shape, bool) if seen is None else seen
        keys = row_keys(0, np.arange(len(logits))) if keys is None else keys
        seen, active, keys, is_finite = _beginning(logits, seen, keys)
        return Stream(self, model, State(cache, logits, seen, active, keys, is_finite), max_new_tokens, watch)


class Stream(Iterator[Step]):
    """An iterator over steps. `cache` holds the prompt and the tokens so far; take it to stop early."""

    def __init__(
        self, generator: Generator, model: Model, state: State, max_new_tokens: int, watch: Watch | None = None
    ) -> None:
        """See `stream`."""
        self._generator, self._model, self._state = generator, model, state
        self._done, self._remaining, self._watch = 0, max_new_tokens, watch or (lambda phase: None)
        self._active = np.asarray(state.active)
        self._has_failed = False

    @property
    def cache(self) -> KVCache:
        """The cache as it is now. The next step donates it. After a failure it is unusable, even rewound."""
        return self._state.cache

    @property
    def failed(self) -> bool:
        """Whether NaN or infinite logits ended the stream."""
        return self._has_failed

    def stop(self, row: int) -> None:
        """End one row here, as an EOS token would."""
        self._state = replace(self._state, active=self._state.active.at[row].set(False))
        self._active = np.where(np.arange(len(self._active)) == row, False, self._active)

    def __next__(self) -> Step:
        """Generate one token for every active row.

        Raises:
            ValueError: the stream's cache was given to another function, which donated it.
            FloatingPointError: NaN or infinite logits, with the step; the stream has then ended.
        """
        active = self._active
        if not self._remaining or not active.any():
            raise StopIteration
        if isinstance(self._state.cache, KVCache):
            self._state.cache.check_alive()
        self._watch("decode")
        self._done, self._remaining = self._done + 1, self._remaining - 1
        self._state, token, logprob = self._generator.advance(self._model, self._state)
        # One transfer for each token. A log-probability is NaN exactly when `is_finite` is False.
        token, logprob, self._active = jax.device_get((token, logprob, self._state.active))
        step = Step(token, logprob, active)
        self._watch(None)
        if np.isnan(logprob).any():
            self._has_failed, self._remaining = True, 0
            check_logits(self._done, self._model.dtype)
        return step


def check_logits(failed: int, dtype: Any) -> None:
    """Raise FloatingPointError if the logits of this step were not finite; 0: all were."""
    if failed:
        raise not_finite(f"step {failed}: the logits are", dtype)


def row_keys(key: Array | int | None, rows: Int[np.ndarray, "B"]) -> Key[Array, "B"]:
    """One random key for each row, which depends only on `key` and the row's index in `rows`."""
    if key is None or isinstance(key, int):
        key = jax.random.key(key or 0)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jax.device_put(rows.astype(np.uint32)))


def _beginning(logits: Any, seen: Any, keys: Any) -> tuple[Any, Any, Any, Any]:
    """`seen`, active rows, keys and "all logits were finite" before the first token, on the devices of the logits."""
    state = seen, np.ones(logits.shape[0], bool), keys, np.bool_(True)
    sharding = getattr(logits, "sharding", None)
    # A program is compiled for the places of its arguments: these are put where they are after the first token.
    if isinstance(sharding, NamedSharding) and sharding.is_fully_addressable:
        return jax.device_put(state, NamedSharding(sharding.mesh, PartitionSpec()))
    return (seen, *jax.device_put(state[1:]))


@functools.partial(jax.jit, static_argnames=("sampler", "eos_ids"))
def _choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    active: Bool[Array, "B"],
    keys: Key[Array, "B"],
    sampler: Sampler,
    eos_ids: tuple[int, ...],
) -> tuple[
    Int32[Array, "B"], Float[Array, "B"], Bool[Array, "B V"], Bool[Array, "B"], Key[Array, "B"], Bool[Array, ""]
]:
    """A token for every active row with its log-probability; what was seen, which rows remain, new keys, is it finite?

    The log-probability of any token is NaN if a logit is NaN or infinite, and -inf only for one that a mask excludes.
    """
    split = jax.vmap(jax.random.split)(keys)
    token = jnp.where(active, sampler(logits, seen, split[:, 0]), _padding(eos_ids))
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    remaining = active & ~jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
    logprob = jnp.where(active, logprob, 0.0)
    return token, logprob, seen, remaining, split[:, 1], ~jnp.isnan(logprob).any()


def _padding(eos_ids: tuple[int, ...]) -> int:
    return eos_ids[0] if eos_ids else 0
