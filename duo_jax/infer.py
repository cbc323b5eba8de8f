"""The phases of inference: prefill, decode step, and score, a prefill that says how likely each token was.

Over a model and a cache; knows nothing of sampling or text.

Each phase is one pure function that traces (`extend`, `step`), which `generate` builds on, and one public function
around it that checks its arguments and runs it jitted, donating the cache.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32
from numpy.typing import ArrayLike

from duo_jax.cache.cache import KVCache
from duo_jax.checks import check_cache, check_prompt, check_room, check_step, is_traced
from duo_jax.layers import Attend
from duo_jax.mesh.mesh import constrain
from duo_jax.model import Model
from pallas_kernels import decode_attention, prefill_attention
from pallas_kernels.window import consecutive

# Most tokens of a prompt computed at a time by default: bounds the memory of activations, not the result.
CHUNK_SIZE = 1024

# Tokens whose logits are in memory at once while a text is scored.
SCORE_BLOCK = 128

# What a chunk costs beside its tokens, in tokens: reading the weights, loops over heads. Measured on two CPU cores with
# SmolLM2 at 2048 tokens: chunks of 256, 512 and 1024 take 3.5, 2.7 and 2.3 s.
CHUNK_OVERHEAD = 100


def prefill(
    model: Model,
    tokens: ArrayLike,
    cache: KVCache,
    *,
    chunk_size: int | None = None,
    lengths: ArrayLike | None = None,
    backend: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append a prompt to the cache (paper section 2.3); any chunk size gives the same answer.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        cache: the cache to go on from; it is donated.
        chunk_size: tokens computed at a time; by default chosen by the prompt's length.
        lengths: `[B]` valid tokens of each row; all of them by default.
        backend: attention backend; None takes the best one verified on this device.
        progress: called after each chunk with the number of positions done so far.

    Returns:
        Logits `[B, V]` (float32) after the last token of each row, and the new cache.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a cache of another model, one that would overflow.
    """
    tokens, lengths = _check(model, tokens, cache, lengths)
    # Columns that are padding in every row cost nothing where the lengths are known.
    longest = tokens.shape[1] if is_traced(lengths) else int(np.max(lengths))
    width = chunk_width(longest, chunk_size)
    return run_prefill(model, tokens[:, :longest], cache, lengths, width, backend=backend, progress=progress)


def run_prefill(
    model: Model,
    tokens: Int32[Array | np.ndarray, "B T"],
    cache: KVCache,
    lengths: Int32[Array | np.ndarray, "B"],
    width: int,
    *,
    backend: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """`prefill` of checked arguments, `width` tokens at a time."""
    last = jnp.zeros((tokens.shape[0], model.config.embed_dim), model.dtype)
    for begin, chunk, counts in _chunks(tokens, lengths, width):
        last, cache = _extend(model, chunk, cache, counts, last, backend)
        if progress:
            last.block_until_ready()
            progress(min(begin + width, tokens.shape[1]))
    return _head(model, last), cache


def decode_step(
    model: Model, token: ArrayLike, cache: KVCache, *, active: ArrayLike | None = None, backend: str | None = None
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append one token a row to the cache.

    Args:
        model: the weights.
        token: `[B]` token ids.
        cache: the cache to go on from; it is donated.
        active: `[B]` rows to append to; the others keep their cache as it is and their logits mean nothing.
        backend: attention backend; None takes the best one verified on this device.

    Returns:
        Logits `[B, V]` (float32) of the token after, and the new cache.

    Raises:
        ValueError: a token outside the vocabulary, a cache of another model, one that would overflow.
    """
    token, active = check_step(model.config, token, active)
    check_cache(model, cache, token.shape[0])
    check_room(model.config, cache, active)
    return jitted_step(model, token, cache, active, backend)


class Scores(NamedTuple):
    """How likely each token of a text was; `[B, T - 1]`: entry t is of token t + 1."""

    logprobs: Float[Array, "B T1"]  # natural logarithm of its probability, given everything before it
    is_top: Bool[Array, "B T1"]  # whether no other token was more likely: what greedy decoding would have taken


def score(
    model: Model,
    tokens: ArrayLike,
    cache: KVCache,
    *,
    chunk_size: int | None = None,
    lengths: ArrayLike | None = None,
    backend: str | None = None,
) -> tuple[Scores, KVCache]:
    """Append a text to the cache and say how likely each of its tokens was (teacher forcing).

    To score the first token too, end the text before it in the cache one token earlier.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        cache: the cache to go on from; it is donated.
        chunk_size: tokens computed at a time; by default chosen by the text's length.
        lengths: `[B]` valid tokens of each row; all of them by default. Scores beyond them mean nothing.
        backend: attention backend; None takes the best one verified on this device.

    Returns:
        The scores, and the new cache.

    Raises:
        ValueError: an empty text, a token outside the vocabulary, a cache of another model, one that would overflow.
    """
    tokens, lengths = _check(model, tokens, cache, lengths)
    width = chunk_width(tokens.shape[1], chunk_size)
    pad = jnp.pad if is_traced(tokens) else np.pad
    following = _chunks(pad(tokens[:, 1:], ((0, 0), (0, 1))), lengths, width)
    parts = []
    for (_, chunk, counts), (_, targets, _) in zip(_chunks(tokens, lengths, width), following, strict=True):
        part, cache = _score(model, chunk, targets, cache, counts, backend)
        parts.append(part)
    return Scores(*(jnp.concatenate(x, axis=1)[:, : tokens.shape[1] - 1] for x in zip(*parts, strict=True))), cache


def _check(
    model: Model, tokens: ArrayLike, cache: KVCache, lengths: ArrayLike | None
) -> tuple[Int32[Array | np.ndarray, "B T"], Int32[Array | np.ndarray, "B"]]:
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    check_cache(model, cache, tokens.shape[0])
    check_room(model.config, cache, lengths)
    return tokens, lengths


def _chunks(
    tokens: Int32[Array | np.ndarray, "B T"], lengths: Int32[Array | np.ndarray, "B"], width: int
) -> Iterator[tuple[int, Array | np.ndarray, Array | np.ndarray]]:
    """The beginning, the tokens `[B, width]` and each row's number of valid tokens `[B]` of every chunk."""
    pad = jnp.pad if is_traced(tokens) else np.pad
    for begin in range(0, tokens.shape[1], width):
        chunk = tokens[:, begin : begin + width]
        yield begin, pad(chunk, ((0, 0), (0, width - chunk.shape[1]))), (lengths - begin).clip(0, width)


def bucket(count: int) -> int:
    """`count` rounded up so that few different sizes occur: to one of eight steps an octave, at most 1/8 more."""
    step = max(16, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def chunk_width(length: int, chunk_size: int | None = None) -> int:
    """Tokens per chunk for a prompt: `chunk_size`, or by default the power of two that should take the least time.

    Only a few widths occur, so a new prompt seldom compiles.
    """
    if chunk_size is not None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        return min(chunk_size, 1 << max(4, (length - 1).bit_length()))
    widths = [1 << power for power in range(4, CHUNK_SIZE.bit_length())]
    return min(widths, key=lambda width: -(-length // width) * (width + CHUNK_OVERHEAD))


def extend(
    model: Model,
    tokens: Int32[Array, "B T"],
    cache: KVCache,
    lengths: Int32[Array, "B"],
    last: Float[Array, "B D"],
    backend: str | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Append a chunk: the hidden state of each row's last token (`last` where the row has none here), and the cache."""
    hidden, new = _hidden(model, tokens, cache, lengths, backend)
    newest = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.where((lengths > 0)[:, None], newest, last)
    return _poison(last, new.length > cache.max_length), new


def _hidden(
    model: Model, tokens: Int32[Array, "B T"], cache: KVCache, lengths: Int32[Array, "B"], backend: str | None
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Append a chunk: the hidden states of all its tokens, and the cache."""
    sizes = _sizes(cache, backend)

    def attend(
        state: KVCache, layer: int, q: Array, k: Array, v: Array, lengths: Int32[Array, "B"]
    ) -> tuple[Array, KVCache]:
        pools, heads, window = state.pools_of(layer), state.heads(layer), state.window(layer)
        out = prefill_attention(q, k, v, pools, heads, start=state.length, lengths=lengths, window=window, **sizes)
        return out, state.append_chunk(layer, k, v, _after(out, lengths))

    positions = consecutive(cache.length, tokens.shape[1])
    hidden, new = model.decoder.hidden(tokens, positions, _on_devices(attend, lengths), cache)
    return hidden, new.advance(lengths)


def _score_chunk(
    model: Model,
    tokens: Int32[Array, "B T"],
    targets: Int32[Array, "B T"],
    cache: KVCache,
    lengths: Int32[Array, "B"],
    backend: str | None,
) -> tuple[Scores, KVCache]:
    """Append a chunk and score what follows each of its tokens, some at a time: all logits would be larger than it."""
    decoder = model.decoder
    hidden, new = _hidden(model, tokens, cache, lengths, backend)

    def one(at: tuple[Float[Array, "B D"], Int32[Array, "B"]]) -> Scores:
        logits = decoder.logits(at[0])
        found = jnp.take_along_axis(logits, at[1][:, None], axis=1)[:, 0]
        return Scores(found - jax.nn.logsumexp(logits, axis=-1), found >= logits.max(-1))

    by_token = jax.lax.map(one, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)), batch_size=SCORE_BLOCK)
    scores = Scores(*(x.swapaxes(0, 1) for x in by_token))
    logprobs = jnp.where((new.length > cache.max_length)[:, None], jnp.nan, scores.logprobs)
    return Scores(logprobs, scores.is_top), new


def step(
    model: Model, token: Int32[Array, "B"], cache: KVCache, active: Bool[Array, "B"], backend: str | None
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append one token to the active rows: the logits after it, and the cache."""
    sizes = _sizes(cache, backend)
    lengths = cache.length + active.astype(jnp.int32)

    def attend(
        state: KVCache, layer: int, q: Array, k: Array, v: Array, active: Bool[Array, "B"]
    ) -> tuple[Array, KVCache]:
        state = state.append_token(layer, k[:, 0], v[:, 0], active)
        lengths = state.length + active.astype(jnp.int32)
        pools, heads, window = state.pools_of(layer), state.heads(layer), state.window(layer)
        out = decode_attention(q[:, 0], pools, heads, lengths=lengths, window=window, **sizes)
        return out[:, None], state

    hidden, new = model.decoder.hidden(token[:, None], cache.length[:, None], _on_devices(attend, active), cache)
    logits = head(model, hidden[:, 0])
    return _poison(logits, lengths > cache.max_length), new.advance(active.astype(jnp.int32))


def head(model: Model, last: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Logits of one hidden state a row; on a mesh, every device has them."""
    return constrain(model.decoder.logits(last), model.mesh)


def _sizes(cache: KVCache, backend: str | None) -> dict[str, Any]:
    return {"shards": cache.shards, "backend": backend}


def _on_devices(
    attend: Callable[[KVCache, int, Array, Array, Array, Array], tuple[Array, KVCache]], of_row: Array
) -> Attend[KVCache]:
    """Attention of every device over its own pools, heads and rows; `of_row [B]` is passed on to `attend`."""

    def over(state: KVCache, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
        if state.mesh is None:
            return attend(state, layer, q, k, v, of_row)
        mesh, (whole, structure), every = state.mesh, jax.tree.flatten(state), state.axes()
        # Each device makes empty pools for itself: the compiler of jax 0.11 ends the process where one is handed over.
        is_held = [leaf.size > 0 for leaf in whole]
        own = [NamedSharding(mesh, axes).shard_shape(leaf.shape) for leaf, axes in zip(whole, every, strict=True)]

        def one(leaves: list[Array], q: Array, k: Array, v: Array, of_row: Array) -> tuple[Array, list[Array]]:
            held, shapes = iter(leaves), zip(whole, own, is_held, strict=True)
            mine = [next(held) if given else jnp.zeros(shape, leaf.dtype) for leaf, shape, given in shapes]
            out, state = attend(jax.tree.unflatten(structure, mine), layer, q, k, v, of_row)
            return out, list(compress(jax.tree.leaves(state), is_held))

        heads, axes = PartitionSpec("data", None, "tensor"), list(compress(every, is_held))
        specs = axes, heads, heads, heads, PartitionSpec("data")
        divided = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=(heads, axes), check_vma=False)
        out, leaves = divided(list(compress(whole, is_held)), q, k, v, of_row)
        new = iter(leaves)
        return out, jax.tree.unflatten(
            structure, [next(new) if given else leaf for leaf, given in zip(whole, is_held, strict=True)]
        )

    return over


def _after(out: Float[Array, "B T N H"], lengths: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """`lengths`, as a value that XLA cannot have before `out`: what is written by it is written after `out` was read.

    Left to choose, XLA copies the whole pools in every layer, so that it may write while it reads; it removes an
    `optimization_barrier` before that choice. No number is both NaN and positive.
    """
    one = out[0, 0, 0, 0]
    never = jnp.isnan(one) & (one > 0)
    return lengths + never.astype(jnp.int32)


def _poison(values: Float[Array, "B n"], overfull: Bool[Array, "B"]) -> Float[Array, "B n"]:
    """NaN for rows whose cache overflowed where no error could be raised: a traced call must not be quietly wrong."""
    return jnp.where(overfull[:, None], jnp.asarray(jnp.nan, values.dtype), values)


_extend = functools.partial(jax.jit, static_argnums=5, donate_argnums=(2, 4))(extend)
jitted_step = functools.partial(jax.jit, static_argnums=4, donate_argnums=2)(step)
_score = functools.partial(jax.jit, static_argnums=5, donate_argnums=3)(_score_chunk)
_head = jax.jit(head)
