"""Inference over a model and a cache: prefill, decode step, and score. Knows nothing of sampling or text.

`prefill`, `decode_step` and `score` check their arguments and run compiled programs, which donate the cache. Below them
are the pure functions that are compiled: `extend`, `step` and `head`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int32
from numpy.typing import ArrayLike

from duo_jax.cache.cache import KVCache
from duo_jax.checks import check_cache, check_model, check_prompt, check_step, is_traced
from duo_jax.generation.chunks import chunk_width, chunks, pad_columns
from duo_jax.mesh.attend import on_devices
from duo_jax.mesh.mesh import constrain
from duo_jax.model.model import Model
from duo_jax.model.row_groups import ByRow, at_once
from pallas_kernels import decode_attention, prefill_attention
from pallas_kernels.window import consecutive

# Tokens whose logits are in memory at the same time in `score`.
SCORE_BLOCK = 128

# Jitted, so that attention is traced and lowered once for all layers, which are alike.
_STATIC = ("window", "score_cap", "shards", "backend")
_prefill_attention = jax.jit(prefill_attention, static_argnames=_STATIC)
_decode_attention = jax.jit(decode_attention, static_argnames=_STATIC)


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
    """Append a prompt to the cache (paper section 2.3); the result does not depend on the chunk size.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        cache: the cache to append to; it is donated.
        chunk_size: tokens computed at a time; by default chosen by the prompt's length.
        lengths: `[B]` valid tokens of each row; all of them by default.
        backend: attention backend; None takes the fastest one that is right on this device.
        progress: called after each chunk with the number of positions computed so far.

    Returns:
        Logits `[B, V]` (float32) after the last token of each row, and the new cache.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a cache of another model, one that would overflow.
    """
    check_model(model)
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    check_cache(model, cache, lengths)
    # Columns that are padding in every row cost nothing where the lengths are known.
    longest = tokens.shape[1] if is_traced(lengths) else int(np.max(lengths))
    width = chunk_width(longest, chunk_size, rows=len(tokens))
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
    """Like `prefill`, with arguments that have been checked, `width` tokens at a time."""
    last = _no_hidden(model, tokens.shape[0])
    for begin, chunk, counts in chunks(tokens, lengths, width):
        last, cache = _extend(model, chunk, cache, counts, last, backend)
        if progress:
            last.block_until_ready()
            progress(min(begin + width, tokens.shape[1]))
    return _head(model, last), cache


def compile_prefill(
    model: Model,
    tokens: Int32[Array | np.ndarray, "B T"],
    cache: KVCache,
    lengths: Int32[Array | np.ndarray, "B"],
    width: int,
    *,
    backend: str | None = None,
) -> tuple[jax.ShapeDtypeStruct, KVCache]:
    """Compile the programs of `run_prefill` without running them; return what it returns, as shapes."""
    _, chunk, counts = next(chunks(tokens, lengths, width))
    last, cache = compiled(_extend, model, chunk, cache, counts, _no_hidden(model, tokens.shape[0]), backend)
    return compiled(_head, model, last), cache


def compiled(function: Any, *args: Any) -> Any:
    """Compile a jitted function for these arguments; return what it will return as shapes.

    A call with such arguments then runs that program.
    """
    lowered = function.lower(*args)
    shardings = lowered.compile().output_shardings

    def shape(out: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        # An array on one device may be used with any other; a program for it names no device.
        several = None if isinstance(sharding, SingleDeviceSharding) else sharding
        return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=several)

    return jax.tree.map(shape, lowered.out_info, shardings)


def _no_hidden(model: Model, rows: int) -> Float[Array, "B D"]:
    """The hidden states before the first chunk."""
    return jax.device_put(np.zeros((rows, model.config.embed_dim), model.dtype))


def decode_step(
    model: Model, token: ArrayLike, cache: KVCache, *, active: ArrayLike | None = None, backend: str | None = None
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append one token per row to the cache.

    Args:
        model: the weights.
        token: `[B]` token ids.
        cache: the cache to append to; it is donated.
        active: `[B]` rows to append to; the cache of the others does not change, and their logits are meaningless.
        backend: attention backend; None takes the fastest one that is right on this device.

    Returns:
        Logits `[B, V]` (float32) of the next token, and the new cache.

    Raises:
        ValueError: a token outside the vocabulary, a cache of another model, one that would overflow.
    """
    check_model(model)
    token, active = check_step(model.config, token, active)
    check_cache(model, cache, active)
    return jitted_step(model, token, cache, active, backend)


class Scores(NamedTuple):
    """How likely each token of a text was, `[B, T - 1]`: entry t belongs to token t + 1."""

    logprobs: Float[Array, "B T1"]  # natural logarithm of its probability, given everything before it
    is_top: Bool[Array, "B T1"]  # whether no other token was more likely, so that greedy decoding would have chosen it


def score(
    model: Model,
    tokens: ArrayLike,
    cache: KVCache,
    *,
    chunk_size: int | None = None,
    lengths: ArrayLike | None = None,
    backend: str | None = None,
) -> tuple[Scores, KVCache]:
    """Append a text to the cache and compute how likely each of its tokens was (teacher forcing).

    To score the first token too, put the text before it into the cache without its last token, and begin with that.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        cache: the cache to append to; it is donated.
        chunk_size: tokens computed at a time; by default chosen by the text's length.
        lengths: `[B]` valid tokens of each row; all of them by default. Scores beyond them are meaningless.
        backend: attention backend; None takes the fastest one that is right on this device.

    Returns:
        The scores, and the new cache.

    Raises:
        ValueError: an empty text, a token outside the vocabulary, a cache of another model, one that would overflow.
    """
    check_model(model)
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    targets = pad_columns(tokens[:, 1:], 1)
    scores, cache = score_targets(
        model, tokens, targets, cache, chunk_size=chunk_size, lengths=lengths, backend=backend
    )
    return Scores(*(x[:, :-1] for x in scores)), cache


def score_targets(
    model: Model,
    tokens: ArrayLike,
    targets: ArrayLike,
    cache: KVCache,
    *,
    chunk_size: int | None = None,
    lengths: ArrayLike | None = None,
    backend: str | None = None,
) -> tuple[Scores, KVCache]:
    """Like `score`, with the token that follows each: `targets` `[B, T]`, of which the last of a row is not appended.

    Returns:
        The scores `[B, T]` of the targets, and the new cache.

    Raises:
        ValueError: as for `score`, or targets of another shape.
    """
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    targets, _ = check_prompt(model.config, targets, lengths)
    if targets.shape != tokens.shape:
        raise ValueError(f"each token needs a target, got {targets.shape=} for {tokens.shape=}")
    check_cache(model, cache, lengths)
    width = chunk_width(tokens.shape[1], chunk_size, rows=len(tokens))
    following = chunks(targets, lengths, width)
    parts = []
    for (_, chunk, counts), (_, chosen, _) in zip(chunks(tokens, lengths, width), following, strict=True):
        part, cache = _score(model, chunk, chosen, cache, counts, backend)
        parts.append(part)
    return Scores(*(jnp.concatenate(x, axis=1)[:, : tokens.shape[1]] for x in zip(*parts, strict=True))), cache


def extend(
    model: Model,
    tokens: Int32[Array, "B T"],
    cache: KVCache,
    lengths: Int32[Array, "B"],
    last: Float[Array, "B D"],
    backend: str | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Append a chunk; return the hidden state of each row's last token (`last` for a row without one) and the cache."""
    hidden, new = _hidden(model, tokens, cache, lengths, backend)
    newest = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.where((lengths > 0)[:, None], newest, last)
    return _poison(last, cache.is_overfull(new.length)), new


def _hidden(
    model: Model, tokens: Int32[Array, "B T"], cache: KVCache, lengths: Int32[Array, "B"], backend: str | None
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Append a chunk; return the hidden states of all its tokens and the cache."""

    def attend(
        cache: KVCache, layer: int, q: Array, k: Array, v: Array, lengths: Int32[Array, "B"], sinks: Array | None
    ) -> tuple[Array, KVCache]:
        out = _prefill_attention(
            q,
            k,
            v,
            cache.pools_of(layer),
            cache.heads(layer),
            start=cache.length,
            lengths=lengths,
            window=cache.window(layer),
            sink_logits=sinks,
            score_cap=model.config.score_cap,
            shards=cache.shards,
            backend=backend,
        )
        return out, cache.append_chunk(layer, k, v, _after(out, lengths))

    positions = consecutive(cache.length, tokens.shape[1])
    decoder = model.decoder
    hidden, new = decoder.hidden(
        tokens, positions, on_devices(attend, lengths, decoder), cache, context=cache.max_length, caps_scores=True
    )
    return hidden, new.advance(lengths)


def _score_chunk(
    model: Model,
    tokens: Int32[Array, "B T"],
    targets: Int32[Array, "B T"],
    cache: KVCache,
    lengths: Int32[Array, "B"],
    backend: str | None,
) -> tuple[Scores, KVCache]:
    """Append a chunk and score the targets that follow its tokens, block by block: all logits may not fit in memory."""
    decoder = model.decoder
    hidden, new = _hidden(model, tokens, cache, lengths, backend)

    def score_token(inputs: tuple[Float[Array, "B D"], Int32[Array, "B"]]) -> Scores:
        hidden, target = inputs
        logits = decoder.logits(hidden)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return Scores(chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= logits.max(-1))

    by_token = jax.lax.map(score_token, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)), batch_size=SCORE_BLOCK)
    scores = Scores(*(x.swapaxes(0, 1) for x in by_token))
    return scores._replace(logprobs=_poison(scores.logprobs, cache.is_overfull(new.length))), new


def step(
    model: Model,
    token: Int32[Array, "B"],
    cache: KVCache,
    active: Bool[Array, "B"],
    backend: str | None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Append one token to the active rows; return the logits after it and the cache."""
    hidden, cache, is_overfull = append(model, token, cache, active, backend)
    return after(model, hidden, is_overfull), cache


def append(
    model: Model,
    token: Int32[Array, "B"],
    cache: KVCache,
    active: Bool[Array, "B"],
    backend: str | None,
    by_row: ByRow = at_once,
) -> tuple[Float[Array, "B D"], KVCache, Bool[Array, "B"]]:
    """Append one token to the active rows, computed through `by_row`.

    Returns:
        Its hidden state, the cache, and the rows that did not fit, from which `after` computes logits.
    """
    lengths = cache.length + active.astype(jnp.int32)
    # Attention reads nothing of a row that is not active.
    visible = jnp.where(active, lengths, 0)

    def attend(
        cache: KVCache, layer: int, q: Array, k: Array, v: Array, visible: Int32[Array, "B"], sinks: Array | None
    ) -> tuple[Array, KVCache]:
        q, k, v = (x[:, 0] for x in (q, k, v))
        cache = cache.append_token(layer, k, v, visible > 0, backend=backend)
        out = _decode_attention(
            q,
            cache.pools_of(layer),
            cache.heads(layer),
            lengths=visible,
            window=cache.window(layer),
            sink_logits=sinks,
            score_cap=model.config.score_cap,
            shards=cache.shards,
            backend=backend,
        )
        return out[:, None], cache

    decoder = model.decoder
    attend_on_devices = on_devices(attend, visible, decoder)
    hidden, new = decoder.hidden(
        token[:, None],
        cache.length[:, None],
        attend_on_devices,
        cache,
        context=cache.max_length,
        caps_scores=True,
        by_row=by_row,
    )
    return hidden[:, 0], new.advance(active.astype(jnp.int32)), cache.is_overfull(lengths)


def after(model: Model, hidden: Float[Array, "B D"], is_overfull: Bool[Array, "B"]) -> Float[Array, "B V"]:
    """Logits after the tokens that `append` has appended."""
    return _poison(head(model, hidden), is_overfull)


def head(model: Model, last: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Logits of one hidden state per row; on a mesh, replicated on every device."""
    return constrain(model.decoder.logits(last), model.mesh)


def _after(out: Float[Array, "B T N H"], lengths: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """`lengths`, as a value that depends on `out`: a write that uses it happens after the pools have been read.

    Without this order XLA copies the whole pools in every layer, to write while it reads. An `optimization_barrier`
    is not enough: XLA removes it before it decides to copy. No number is both NaN and positive.
    """
    first = out[0, 0, 0, 0]
    never = jnp.isnan(first) & (first > 0)
    return lengths + never.astype(jnp.int32)


def _poison(values: Float[Array, "B n"], overfull: Bool[Array, "B"]) -> Float[Array, "B n"]:
    """NaN for rows whose cache overflowed: a traced call cannot raise an error, and must not be silently wrong."""
    return jnp.where(overfull[:, None], jnp.asarray(jnp.nan, values.dtype), values)


_extend = functools.partial(jax.jit, static_argnums=5, donate_argnums=(2, 4))(extend)
jitted_step = functools.partial(jax.jit, static_argnums=4, donate_argnums=2)(step)
_score = functools.partial(jax.jit, static_argnums=5, donate_argnums=3)(_score_chunk)
_head = jax.jit(head)
