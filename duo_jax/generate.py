"""Generation: `generate` as one jitted program, and `stream`, the same tokens one at a time. Tokens in, tokens out.

Both advance the same state by the same function. After a call the cache holds the prompt and every token that was
generated, so that a conversation goes on by passing the cache and the new tokens alone.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key
from numpy.typing import ArrayLike

from duo_jax.cache.cache import KVCache
from duo_jax.checks import check_cache, check_prompt, check_room, check_vocabulary
from duo_jax.infer import bucket, chunk_width, extend, head, prefill, step
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from duo_jax.sampling import Greedy, Sampler


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: `[B, max_new_tokens]`; beyond a row's length it repeats an EOS id (0 if there is none).
        lengths: `[B]` tokens generated, an EOS token counted.
        logprobs: `[B, max_new_tokens]` log-probability of each token under the model itself, before any transform.
        cache: the cache with the prompt and `tokens[b, :lengths[b]]` in it.
    """

    tokens: Int32[Array, "B M"]
    lengths: Int32[Array, "B"]
    logprobs: Float[Array, "B M"]
    cache: KVCache


class Step(NamedTuple):
    """One step of a stream: for each row a token, its log-probability, and whether the row was still going."""

    token: np.ndarray
    logprob: np.ndarray
    active: np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "seen", "active", "keys"],
    meta_fields=[],
)
@dataclass(frozen=True)
class _State:
    cache: KVCache
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    active: Bool[Array, "B"]
    keys: Key[Array, "B"]


# Loop index, state, tokens [B M], log-probabilities [B M], tokens generated [B].
_Carry: TypeAlias = tuple[Array, _State, Array, Array, Array]


def generate(
    model: Model,
    tokens: ArrayLike,
    *,
    pattern: HeadPattern | None = None,
    max_new_tokens: int = 128,
    sampler: Sampler = Greedy(),
    lengths: ArrayLike | None = None,
    eos_ids: tuple[int, ...] = (),
    key: Array | int | None = None,
    cache: KVCache | None = None,
    kv_dtype: str | None = None,
    history: ArrayLike | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Generation:
    """Continue a batch of prompts, in one compiled program; every row stops on its own.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        pattern: which heads stream; None for full attention. Not beside `cache`, which has one.
        max_new_tokens: most tokens generated per row.
        sampler: how a token is chosen.
        lengths: `[B]` valid tokens of each row; all of them by default.
        eos_ids: tokens that end a row; `model.config.eos_ids` has the model's own.
        key: a `jax.random` key or a seed; needed by a random sampler. Row b depends on (key, b) alone.
        cache: a cache to go on from; it is donated. Without one, one of the right size is made.
        kv_dtype: data type of the cache that is made, as in `KVCache.init`; the weights' by default.
        history: `[B, n]` token ids that a repetition penalty should count beside the prompt: those in `cache`.
        chunk_size: prompt tokens computed at a time; by default chosen by the prompt's length.
        backend: attention backend; None takes the best one verified on this device.

    Raises:
        ValueError: anything in the arguments that cannot be right, before any compute.
    """
    prompt, counts, seen, cache, keys = _prepare(
        model, tokens, lengths, pattern, cache, kv_dtype, history, max_new_tokens, sampler, eos_ids, key
    )
    length = prompt.shape[1]
    width = chunk_width(length, chunk_size)
    padded = bucket(-(-length // width)) * width
    prompt = jnp.pad(prompt, ((0, 0), (0, padded - length)))
    return _generate(model, prompt, counts, seen, cache, keys, max_new_tokens, sampler, tuple(eos_ids), width, backend)


def stream(
    model: Model,
    tokens: ArrayLike,
    *,
    pattern: HeadPattern | None = None,
    max_new_tokens: int = 128,
    sampler: Sampler = Greedy(),
    lengths: ArrayLike | None = None,
    eos_ids: tuple[int, ...] = (),
    key: Array | int | None = None,
    cache: KVCache | None = None,
    kv_dtype: str | None = None,
    history: ArrayLike | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> "Stream":
    """Like `generate`, one step at a time: `for step in stream(...): step.token`.

    The prompt is computed here, before the first step; `progress` is called as in `prefill`.
    """
    prompt, counts, seen, cache, keys = _prepare(
        model, tokens, lengths, pattern, cache, kv_dtype, history, max_new_tokens, sampler, eos_ids, key
    )
    logits, cache = prefill(
        model, prompt, cache, chunk_size=chunk_size, lengths=counts, backend=backend, progress=progress
    )
    state = _State(cache, logits, seen, jnp.ones(len(keys), bool), keys)
    return Stream(model, state, max_new_tokens, sampler, tuple(eos_ids), backend)


class Stream(Iterator[Step]):
    """An iterator over steps. `cache` holds the prompt and what was generated so far; take it when you stop early."""

    def __init__(
        self,
        model: Model,
        state: _State,
        max_new_tokens: int,
        sampler: Sampler,
        eos_ids: tuple[int, ...],
        backend: str | None,
    ) -> None:
        """See `stream`."""
        self._model, self._state, self._remaining = model, state, max_new_tokens
        self._static = sampler, eos_ids, backend

    @property
    def cache(self) -> KVCache:
        """The cache as it is now. Going on with the iterator donates it."""
        return self._state.cache

    def stop(self, row: int) -> None:
        """End one row here, as an EOS token would."""
        self._state = replace(self._state, active=self._state.active.at[row].set(False))

    def __next__(self) -> Step:
        """Generate one token for every row that is still going."""
        active = np.asarray(self._state.active)
        if not self._remaining or not active.any():
            raise StopIteration
        self._remaining -= 1
        self._state, token, logprob = _advance_jit(self._model, self._state, *self._static)
        return Step(np.asarray(token), np.asarray(logprob), active)


def _prepare(
    model: Model,
    tokens: ArrayLike,
    lengths: ArrayLike | None,
    pattern: HeadPattern | None,
    cache: KVCache | None,
    kv_dtype: str | None,
    history: ArrayLike | None,
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: tuple[int, ...],
    key: Array | int | None,
) -> tuple[Int32[Array, "B T"], Int32[Array, "B"], Bool[Array, "B V"], KVCache, Key[Array, "B"]]:
    """Check everything, make what was not given."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if pattern is not None and cache is not None:
        raise ValueError("a cache has its pattern already: give pattern or cache, not both")
    if kv_dtype is not None and cache is not None:
        raise ValueError("a cache has its data type already: give kv_dtype or cache, not both")
    if sampler.is_random and key is None:
        raise ValueError(f"{type(sampler).__name__} draws at random: pass key=, a jax.random key or a seed")
    if not isinstance(eos_ids, tuple | list):
        raise ValueError(f"eos_ids must be a tuple of token ids, got {eos_ids!r}")
    check_vocabulary(model.config, np.asarray(eos_ids, np.int64))
    key = int(key) if isinstance(key, np.integer) else key
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    longest = int(np.max(lengths))
    tokens = tokens[:, :longest]
    if cache is None:
        room = bucket(longest + max_new_tokens)
        cache = KVCache.init(model.config, pattern, tokens.shape[0], room, dtype=kv_dtype, mesh=model.mesh)
    check_cache(model, cache, tokens.shape[0])
    check_room(model.config, cache, np.asarray(lengths) + max_new_tokens)
    key = jax.random.key(0 if key is None else key) if key is None or isinstance(key, int) else key
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(tokens.shape[0]))
    seen = np.zeros((tokens.shape[0], model.config.vocab_size), bool)
    for row, count in enumerate(np.asarray(lengths)):
        seen[row, np.asarray(tokens[row])[:count]] = True
    if history is not None:
        history = np.asarray(history)
        check_vocabulary(model.config, history)
        seen[np.arange(len(seen))[:, None], history] = True
    return tokens, lengths, jnp.asarray(seen), cache, keys


@functools.partial(
    jax.jit, static_argnames=("max_new_tokens", "sampler", "eos_ids", "width", "backend"), donate_argnames="cache"
)
def _generate(
    model: Model,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, "B"],
    seen: Bool[Array, "B V"],
    cache: KVCache,
    keys: Key[Array, "B"],
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: tuple[int, ...],
    width: int,
    backend: str | None,
) -> Generation:
    batch = tokens.shape[0]

    def one_chunk(index: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        last, cache = carry
        chunk = lax.dynamic_slice_in_dim(tokens, index * width, width, 1)
        return extend(model, chunk, cache, jnp.clip(lengths - index * width, 0, width), last, backend)

    last = jnp.zeros((batch, model.config.embed_dim), model.dtype)
    num_chunks = (lengths.max() + width - 1) // width
    last, cache = lax.fori_loop(jnp.int32(0), num_chunks, one_chunk, (last, cache))
    state = _State(cache, head(model, last), seen, jnp.ones(batch, bool), keys)

    def going(carry: _Carry) -> Array:
        index, state = carry[:2]
        return (index < max_new_tokens) & state.active.any()

    def one_token(carry: _Carry) -> _Carry:
        index, state, tokens, logprobs, count = carry
        count = count + state.active.astype(jnp.int32)
        state, token, logprob = _advance(model, state, sampler, eos_ids, backend)
        tokens = lax.dynamic_update_index_in_dim(tokens, token, index, 1)
        return index + 1, state, tokens, lax.dynamic_update_index_in_dim(logprobs, logprob, index, 1), count

    filled = jnp.full((batch, max_new_tokens), _padding(eos_ids), jnp.int32)
    carry = (jnp.int32(0), state, filled, jnp.zeros((batch, max_new_tokens)), jnp.zeros(batch, jnp.int32))
    _, state, tokens, logprobs, count = lax.while_loop(going, one_token, carry)
    return Generation(tokens, count, logprobs, state.cache)


def _advance(
    model: Model, state: _State, sampler: Sampler, eos_ids: tuple[int, ...], backend: str | None
) -> tuple[_State, Int32[Array, "B"], Float[Array, "B"]]:
    """Choose a token for every active row, append it, and compute the logits after it."""
    split = jax.vmap(jax.random.split)(state.keys)
    chosen = sampler(state.logits, state.seen, split[:, 0])
    token = jnp.where(state.active, chosen, _padding(eos_ids))
    logprob = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
    seen = state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    logits, cache = step(model, token, state.cache, state.active, backend)
    active = state.active & ~jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
    return _State(cache, logits, seen, active, split[:, 1]), token, jnp.where(state.active, logprob, 0.0)


def _padding(eos_ids: tuple[int, ...]) -> int:
    return eos_ids[0] if eos_ids else 0


_advance_jit = functools.partial(jax.jit, static_argnames=("sampler", "eos_ids", "backend"), donate_argnames="state")(
    _advance
)
