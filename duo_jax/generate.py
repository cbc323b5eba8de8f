"""Generation: `generate` as one compiled program, and `stream`, the same tokens one step at a time. Knows no text.

Both run one loop body, `Generator.advance`. Afterwards the cache holds the prompt and every token generated: to
continue a conversation, pass the cache and only the new tokens.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key
from numpy.typing import ArrayLike

from duo_jax import infer
from duo_jax.cache.cache import KVCache
from duo_jax.checks import check_cache, check_prompt, check_room, check_vocabulary
from duo_jax.chunks import bucket, chunk_width
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from duo_jax.sampling import Greedy, Sampler


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
    data_fields=["cache", "logits", "seen", "active", "keys"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """Everything that changes from one token to the next. The cache is whatever the generator's `step` works on."""

    cache: Any
    logits: Float[Array, "B V"]
    seen: Bool[Array | np.ndarray, "B V"]
    active: Bool[Array, "B"]
    keys: Key[Array, "B"]


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
        backend: attention backend; None takes the best one verified on this device.
        step: appends a token to the cache; `stream` also accepts a function that cannot be traced.
    """

    sampler: Sampler = Greedy()
    eos_ids: tuple[int, ...] = ()
    backend: str | None = None
    step: StepFunction = infer.jitted_step

    def advance(self, model: Model, state: State) -> tuple[State, Int32[Array, "B"], Float[Array, "B"]]:
        """Choose a token for every active row, append it, and compute the logits after it."""
        token, logprob, seen, active, keys = _choose(
            state.logits, state.seen, state.active, state.keys, self.sampler, self.eos_ids
        )
        logits, cache = self.step(model, token, state.cache, state.active, self.backend)
        return State(cache, logits, seen, active, keys), token, logprob

    @functools.partial(jax.jit, static_argnames=("self", "capacity", "width"), donate_argnames="cache")
    def run(
        self, model: Model, prompt: Prompt, cache: KVCache, limit: Int32[Array, ""], *, capacity: int, width: int
    ) -> Generation:
        """Prefill and generate in one program.

        Args:
            model: the weights.
            prompt: its tokens padded to a multiple of `width`.
            cache: the cache to continue from; it is donated.
            limit: most tokens generated per row.
            capacity: columns of the result, at least `limit`.
            width: prompt tokens computed at a time.
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
            return (index < limit) & state.active.any()

        def one_token(carry: _Carry) -> _Carry:
            index, state, tokens, logprobs, count = carry
            count = count + state.active.astype(jnp.int32)
            state, token, logprob = self.advance(model, state)
            tokens = lax.dynamic_update_index_in_dim(tokens, token, index, 1)
            return index + 1, state, tokens, lax.dynamic_update_index_in_dim(logprobs, logprob, index, 1), count

        state = State(cache, infer.head(model, last), seen, jnp.ones(batch, bool), keys)
        filled = jnp.full((batch, capacity), _padding(self.eos_ids), jnp.int32)
        carry = (jnp.int32(0), state, filled, jnp.zeros((batch, capacity)), jnp.zeros(batch, jnp.int32))
        _, state, tokens, logprobs, count = lax.while_loop(is_unfinished, one_token, carry)
        return Generation(tokens, count, logprobs, state.cache)

    def stream(
        self,
        model: Model,
        logits: Float[Array, "B V"],
        cache: Any,
        max_new_tokens: int,
        *,
        seen: Bool[np.ndarray, "B V"] | None = None,
        keys: Key[Array, "B"] | None = None,
        watch: Watch | None = None,
    ) -> "Stream":
        """Generate step by step from the logits after a prompt; `seen` and `keys` are for samplers that use them."""
        seen = np.zeros(logits.shape, bool) if seen is None else seen
        keys = _row_keys(0, len(logits)) if keys is None else keys
        state = State(cache, logits, seen, jnp.ones(len(logits), bool), keys)
        return Stream(self, model, state, max_new_tokens, watch)


class Stream(Iterator[Step]):
    """An iterator over steps. `cache` holds the prompt and the tokens so far; take it to stop early."""

    def __init__(
        self, generator: Generator, model: Model, state: State, max_new_tokens: int, watch: Watch | None = None
    ) -> None:
        """See `stream`."""
        self._generator, self._model, self._state = generator, model, state
        self._remaining, self._watch = max_new_tokens, watch or (lambda phase: None)

    @property
    def cache(self) -> KVCache:
        """The cache as it is now. The next step donates it."""
        return self._state.cache

    def stop(self, row: int) -> None:
        """End one row here, as an EOS token would."""
        self._state = replace(self._state, active=self._state.active.at[row].set(False))

    def __next__(self) -> Step:
        """Generate one token for every active row."""
        active = np.asarray(self._state.active)
        if not self._remaining or not active.any():
            raise StopIteration
        self._watch("decode")
        self._remaining -= 1
        self._state, token, logprob = self._generator.advance(self._model, self._state)
        step = Step(np.asarray(token), np.asarray(logprob), active)
        self._watch(None)
        return step


@dataclass(frozen=True)
class Request:
    """A prompt that was checked against its model and cache, ready to be continued in either way."""

    generator: Generator
    model: Model
    prompt: Prompt
    cache: KVCache
    max_new_tokens: int
    width: int

    def run(self) -> Generation:
        """Continue it in one compiled program."""
        tokens, most = self.prompt.tokens, self.max_new_tokens
        padded = bucket(-(-tokens.shape[1] // self.width)) * self.width
        prompt = self.prompt._replace(tokens=np.pad(tokens, ((0, 0), (0, padded - tokens.shape[1]))))
        sizes = {"capacity": bucket(most), "width": self.width}
        out = self.generator.run(self.model, prompt, self.cache, np.int32(most), **sizes)
        return out._replace(tokens=out.tokens[:, :most], logprobs=out.logprobs[:, :most])

    def stream(self, progress: Callable[[int], None] | None = None, watch: Watch | None = None) -> Stream:
        """Compute the prompt and return the steps after it.

        With `watch`, the programs are compiled first, so that the times of the later phases do not include compilation.
        """
        cache, (tokens, lengths, seen, keys) = self.cache, self.prompt
        if watch:
            watch("compile")
            cache = self._compile()
            watch("prefill")
        logits, cache = infer.run_prefill(
            self.model, tokens, cache, lengths, self.width, backend=self.generator.backend, progress=progress
        )
        if watch:
            watch(None)
        return self.generator.stream(self.model, logits, cache, self.max_new_tokens, seen=seen, keys=keys, watch=watch)

    def _compile(self) -> KVCache:
        """Run the programs of `stream` once, on the first chunk of the prompt, and rewind the cache."""
        mark = self.cache.mark()
        tokens, lengths = self.prompt.tokens[:, : self.width], np.minimum(self.prompt.lengths, self.width)
        running = replace(self, prompt=self.prompt._replace(tokens=tokens, lengths=lengths)).stream()
        next(running)
        return running.cache.rewind(mark)


def prepare(
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
) -> Request:
    """Check the arguments of `generate` and `stream`, and make a cache if none was given.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        pattern: which heads stream; None for full attention. Not with `cache`, which has one.
        max_new_tokens: most tokens generated per row.
        sampler: how a token is chosen.
        lengths: `[B]` valid tokens of each row; all of them by default.
        eos_ids: tokens that end a row; `model.config.eos_ids` has the model's own.
        key: a `jax.random` key or a seed; needed by a random sampler. Row b depends only on (key, b).
        cache: a cache to continue from; it is donated. By default, one of the right size is made.
        kv_dtype: data type of the cache that is made, as in `KVCache.init`; the weights' by default.
        history: `[B, n]` token ids that a repetition penalty counts besides the prompt: those in `cache`.
        chunk_size: prompt tokens computed at a time; by default chosen by the prompt's length.
        backend: attention backend; None takes the best one verified on this device.

    Raises:
        ValueError: an invalid argument, before any compute.
    """
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
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    longest = int(np.max(lengths))
    tokens = tokens[:, :longest]
    width = chunk_width(longest, chunk_size)
    if cache is None:
        room = bucket(longest + max_new_tokens)
        cache = KVCache.init(model.config, pattern, len(tokens), room, dtype=kv_dtype, mesh=model.mesh)
    check_cache(model, cache, len(tokens))
    check_room(model.config, cache, lengths + max_new_tokens)
    seen = np.zeros((len(tokens), model.config.vocab_size), bool)
    for row, count in enumerate(lengths):
        seen[row, tokens[row, :count]] = True
    if history is not None:
        history = np.asarray(history)
        check_vocabulary(model.config, history)
        seen[np.arange(len(seen))[:, None], history] = True
    prompt = Prompt(tokens, lengths, seen, _row_keys(key, len(tokens)))
    return Request(Generator(sampler, tuple(eos_ids), backend), model, prompt, cache, max_new_tokens, width)


def generate(model: Model, tokens: ArrayLike, **options: Any) -> Generation:
    """Continue a batch of prompts in one compiled program; every row ends independently.

    `options` are the keyword arguments of `prepare`: `pattern=`, `max_new_tokens=`, `sampler=`, `eos_ids=`, ...

    Raises:
        ValueError: an invalid argument, before any compute.
    """
    return prepare(model, tokens, **options).run()


def stream(model: Model, tokens: ArrayLike, *, progress: Callable[[int], None] | None = None, **options: Any) -> Stream:
    """Like `generate`, one step at a time: `for step in stream(...): step.token`.

    The prompt is computed before this returns; `progress` is called as in `prefill`.
    """
    return prepare(model, tokens, **options).stream(progress)


def _show_arguments(function: Callable[..., Any]) -> None:
    """Let `help` and editors show the arguments of `prepare` in place of `**options`."""
    own, full = inspect.signature(function), inspect.signature(prepare)
    extra = [own.parameters[name] for name in own.parameters if name not in {"options", *full.parameters}]
    function.__signature__ = own.replace(parameters=[*full.parameters.values(), *extra])  # type: ignore[attr-defined]


_show_arguments(generate)
_show_arguments(stream)


def _row_keys(key: Array | int | None, batch: int) -> Key[Array, "B"]:
    """One random key for each row, which depends only on `key` and the row's index."""
    if key is None or isinstance(key, int | np.integer):
        key = jax.random.key(int(key or 0))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))


@functools.partial(jax.jit, static_argnames=("sampler", "eos_ids"))
def _choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    active: Bool[Array, "B"],
    keys: Key[Array, "B"],
    sampler: Sampler,
    eos_ids: tuple[int, ...],
) -> tuple[Int32[Array, "B"], Float[Array, "B"], Bool[Array, "B V"], Bool[Array, "B"], Key[Array, "B"]]:
    """A token for every active row with its log-probability; then what was seen, which rows remain, and new keys."""
    split = jax.vmap(jax.random.split)(keys)
    token = jnp.where(active, sampler(logits, seen, split[:, 0]), _padding(eos_ids))
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    remaining = active & ~jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
    return token, jnp.where(active, logprob, 0.0), seen, remaining, split[:, 1]


def _padding(eos_ids: tuple[int, ...]) -> int:
    return eos_ids[0] if eos_ids else 0
