"""A softmax over keys that are met in parts: the running state, and the merge of parts by their log-sum-exp."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.quantized import compute_dtype
from pallas_kernels.types import Heads, Partial

# Kernels compute powers of two: a GPU has no other exponential.
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# Finite: a block without a visible key leaves no NaN, and its weights vanish at the first visible one. A power of two:
# times any scale it is exact, and such a block has scores equal to its maximum, also if they were never rounded.
MASKED = -(2.0**100)


class Softmax(NamedTuple):
    """Running softmax over blocks of keys (Milakov & Gimelshein 2018), in the base of the `exp` that `add` gets."""

    values: Any  # [*rows, H] float32, the weighted sum
    maximum: Any  # [*rows]
    total: Any  # [*rows], the sum of the weights


def empty(rows: tuple[int, ...], head_dim: int) -> Softmax:
    """A softmax over no key yet."""
    zeros = jnp.zeros(rows, jnp.float32)
    return Softmax(jnp.zeros((*rows, head_dim), jnp.float32), zeros + MASKED, zeros)


def multiply_add(a: Array, b: Any, c: Array) -> Array:
    """`a * b + c`."""
    return a * b + c


def weigh(
    maximum: Array,
    total: Array,
    scores: Array,
    exp: Callable,
    scale: float = 1.0,
    add_up: Callable | None = None,
    fma: Callable = multiply_add,
) -> tuple[Array, Array, Array, Array]:
    """Weights of a block of keys with `scores [*rows, S]`, the factor of earlier values, the new maximum and total.

    The scores are multiplied by `scale` after their maximum is known: this and the subtraction are one instruction,
    `fma(a, b, c)`, where a compiler does not make one by itself. `add_up(weights)` is their sum, or several for each
    row, in the shape of `total`.
    """
    new = jnp.maximum(maximum, scores.max(axis=-1) * scale)
    decay = exp(maximum - new)
    weights = exp(fma(scores, scale, across(-new, scores)))
    total = fma(total, across(decay, total), weights.sum(axis=-1) if add_up is None else add_up(weights))
    return weights, decay, new, total


def add(
    state: Softmax,
    scores: Array,
    add_product: Callable[[Array, Array], Array],
    exp: Callable,
    scale: float = 1.0,
    fma: Callable = multiply_add,
) -> Softmax:
    """Add a block of keys with `scores [*rows, S]`; `add_product(values, weights)` is `values + weights @ v`."""
    weights, decay, maximum, total = weigh(state.maximum, state.total, scores, exp, scale, fma=fma)
    return Softmax(add_product(state.values * across(decay, state.values), weights), maximum, total)


def finish(state: Softmax, log: Callable) -> tuple[Array, Array]:
    """The weighted mean of the values, zero without a key, and the logarithm of the sum of the weights."""
    total = jnp.maximum(state.total, 1e-30)
    return state.values / across(total, state.values), state.maximum + log(total)


def across(x: Array, like: Array) -> Array:
    """Numbers of rows in every column of an array."""
    # Not `x[..., None]`: Mosaic has no such shape.
    return lax.broadcast_in_dim(x, like.shape, tuple(range(x.ndim)))


def capped(scores: Float[Array, "*rows S"], score_cap: float | None) -> Float[Array, "*rows S"]:
    """Scores between -`score_cap` and `score_cap`; None: as they are."""
    return scores if score_cap is None else score_cap * jnp.tanh(scores / score_cap)


def accumulate(
    state: Softmax,
    q: Float[Array, "B M H"],
    k: Float[Array, "B S H"],
    v: Float[Array, "B S H"],
    keep: Bool[Array, "#B #M S"],
    score_cap: float | None = None,
) -> Softmax:
    """Add one block of keys in plain XLA, to base e; products in `compute_dtype`, sums in float32."""
    compute = compute_dtype(q, k)
    f32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bmh,bsh->bms", q.astype(compute), k.astype(compute), **f32) * q.shape[-1] ** -0.5

    scores = capped(scores, score_cap)

    def add_product(values: Array, weights: Array) -> Array:
        return values + jnp.einsum("bms,bsh->bmh", weights.astype(compute), v.astype(compute), **f32)

    return add(state, jnp.where(keep, scores, MASKED), add_product, jnp.exp)


def partial_of(state: Softmax, dtype: Any) -> Partial:
    """The result of a softmax to base e, its output in `dtype`."""
    out, log_sum = finish(state, jnp.log)
    return Partial(out.astype(dtype), log_sum)


def combine(
    parts: Partial,
    is_retrieval: Int32[Array, "K"],
    ends: Int32[Array, "2 B"],
    shape: tuple[int, int, int],
    dtype: Any,
) -> Partial:
    """One softmax out of those over the parts of the keys of each row and KV head.

    Args:
        parts: `[B, K, P, R, H]` and `[B, K, P, R]`, the first ones written. R: the queries of a KV head, those of a
            token following each other; there may be padding behind them.
        is_retrieval: 1 for a retrieval head.
        ends: number of all parts of the rows up to each, of a streaming and of a retrieval head.
        shape: B, T and N, of the queries.
        dtype: of the output.

    Returns:
        `[B, T, N, H]` and `[B, T, N]`; zero without a part.
    """
    batch, tokens, num_heads = shape
    counts = jnp.diff(ends, axis=1, prepend=jnp.int32(0))[is_retrieval].T
    is_used = jnp.arange(parts.out.shape[2], dtype=jnp.int32)[None, None, :] < counts[:, :, None]
    merged = merge_splits(parts, is_used[..., None], axis=2)
    group = num_heads // len(is_retrieval)

    def by_token(x: Array) -> Array:
        x = x[:, :, : tokens * group].reshape(batch, len(is_retrieval), tokens, group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(*shape, *x.shape[4:])

    out, log_sum = map(by_token, merged)
    return Partial(out.astype(dtype), log_sum)


def merge_splits(parts: Partial, is_used: Bool[Array, "..."], axis: int) -> Partial:
    """One softmax out of those over parts of the keys, along an array axis; unused parts may have any values."""
    out, log_sum = jnp.where(is_used[..., None], parts.out, 0.0), jnp.where(is_used, parts.log_sum, MASKED)
    most = log_sum.max(axis)
    return _merged(Partial(out, log_sum), jnp.expand_dims(most, axis), most, lambda *x: [y.sum(axis) for y in x])


def merge_parts(parts: Sequence[Partial], is_used: Sequence[Bool[Array, "..."] | None] | None = None) -> Partial:
    """One softmax out of those over parts of the keys, such as those of several devices; float32.

    A part may have any values where it is not used; None: it is used everywhere.
    """
    kept = [
        part
        if used is None
        else Partial(jnp.where(used[..., None], part.out, 0), jnp.where(used, part.log_sum, MASKED))
        for part, used in zip(parts, is_used or [None] * len(parts), strict=True)
    ]
    most = functools.reduce(jnp.maximum, (part.log_sum for part in kept))
    weights = [jnp.exp(part.log_sum - most) for part in kept]
    weighted = (part.out.astype(jnp.float32) * weight[..., None] for part, weight in zip(kept, weights, strict=True))
    values, total = functools.reduce(jnp.add, weighted), functools.reduce(jnp.add, weights)
    return Partial(values / total[..., None], most + jnp.log(total))


def merge_shards(part: Partial, axis: str) -> Partial:
    """One softmax out of those over the keys of every device, along a mesh axis.

    The message has the size of the output, whatever the number of keys. Devices that all have the same keys have the
    same weight, and the result is their mean.
    """

    def total(weighted: Array, weights: Array) -> tuple[Array, Array]:
        # One message with values and weights.
        summed = lax.psum(jnp.concatenate([weighted, weights[..., None]], axis=-1), axis)
        return summed[..., :-1], summed[..., -1]

    most = lax.pmax(part.log_sum, axis)
    return _merged(part, most, most, total)


def log_copies(heads: Heads, devices: int, num_heads: int) -> Float[Array, "N"]:
    """What a merge of devices adds to `log_sum` of each query head: each of them has all keys of a streaming head."""
    copies = jnp.where(heads.is_retrieval, 0.0, math.log(devices)).astype(jnp.float32)
    return jnp.repeat(copies, num_heads // len(copies), total_repeat_length=num_heads)


def with_sinks(part: Partial, sink_logits: Float[Array, "N"]) -> Float[Array, "*rows N H"]:
    """The output of a softmax whose denominator has one more term for each query head: of a key without a value."""
    logits = jnp.broadcast_to(sink_logits.astype(jnp.float32), part.log_sum.shape)
    return part.out.astype(jnp.float32) * jax.nn.sigmoid(part.log_sum - logits)[..., None]


def softmax_with_sinks(scores: Float[Array, "*rows S"], sink_logits: Float[Array, "*#rows"] | None) -> Array:
    """Weights of keys by their scores, which sum to less than 1 where there is a learned sink; for maps and scores."""
    if sink_logits is None:
        return jax.nn.softmax(scores, axis=-1)
    total = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), sink_logits.astype(scores.dtype))
    return jnp.exp(scores - total[..., None])


def _merged(part: Partial, most: Array, most_of_all: Array, total: Callable[[Array, Array], Any]) -> Partial:
    """Dao 2023, section 3.1; in float32."""
    weights = jnp.exp(part.log_sum - most)
    values, weight = total(part.out.astype(jnp.float32) * weights[..., None], weights)
    return Partial(values / weight[..., None], most_of_all + jnp.log(weight))
