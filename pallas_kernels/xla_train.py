"""Attention for training gates, in plain XLA: differentiable, memory linear in T forward and backward.

Full and streaming attention share one custom backward pass: for each block of queries, the weights are computed again
from the logarithm of their sum. They differ only in the keys that a block of queries visits. Heads run one after the
other, so that scores stay in cache.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.merge import Softmax, accumulate, empty, partial_of
from pallas_kernels.schedule import block_at, cdiv
from pallas_kernels.types import Partial
from pallas_kernels.window import Window

# Tokens per block of queries, and of keys in full attention. Smaller blocks waste less above the diagonal.
BLOCK = 256


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def training(q, k, v, window):
    """Causal attention: over all earlier tokens if `window` is None, else over the tokens that it shows."""
    return _forward(q, k, v, window)[0]


def _forward(q, k, v, window):
    heads = _to_heads(q, k.shape[2]), _heads_first(k), _heads_first(v)
    out, log_total = lax.map(partial(_forward_head, window=window), heads)
    part = Partial(_from_heads(out), _from_heads(log_total[..., None])[..., 0])
    return part, (q, k, v, part.out, log_total)


def _backward(window, residuals, gradient):
    q, k, v, out, log_total = residuals
    grad, log_grad = gradient
    num_kv_heads = k.shape[2]
    # Float32: two nearly equal sums are subtracted.
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1, keepdims=True) - log_grad[..., None]
    delta = _to_heads(delta, num_kv_heads)[..., 0]
    heads = (
        _to_heads(q, num_kv_heads),
        _heads_first(k),
        _heads_first(v),
        log_total,
        delta,
        _to_heads(grad, num_kv_heads),
    )
    d_q, d_k, d_v = lax.map(partial(_backward_head, window=window), heads)
    heads_back = partial(jnp.transpose, axes=(1, 2, 0, 3))
    return _from_heads(d_q).astype(q.dtype), heads_back(d_k).astype(k.dtype), heads_back(d_v).astype(v.dtype)


training.defvjp(_forward, _backward)


def _forward_head(head, window):
    """One KV head, q `[B T G H]`, k and v `[B T H]`: the output, and the logarithm of each query's sum of weights."""
    q, k, v = head
    batch, length, group, head_dim = q.shape
    block = min(BLOCK, length)

    def rows(i, carry):
        out, log_total = carry
        first, index = block_at(i, block, length)
        queries = _flat(lax.dynamic_slice_in_dim(q, first, block, 1))

        def keys(key_block, keep, state):
            return accumulate(state, queries, key_block(k), key_block(v), keep)

        state: Softmax = _over_keys(i, index, group, length, window, keys, empty((batch, block * group), head_dim))
        new = partial_of(state, q.dtype)
        out = lax.dynamic_update_slice_in_dim(out, new.out.reshape(batch, block, group, head_dim), first, 1)
        return out, lax.dynamic_update_slice_in_dim(log_total, new.log_sum.reshape(batch, block, group), first, 1)

    start = jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)
    return lax.fori_loop(0, -(-length // block), rows, start)


def _backward_head(head, window):
    """Gradients of one KV head and its query group, float32: of q `[B T G H]`, k and v `[B T H]`."""
    q, k, v, log_total, delta, grad = head
    batch, length, group, head_dim = q.shape
    block = min(BLOCK, length)

    def rows(i, carry):
        d_q, d_k, d_v = carry
        first, index = block_at(i, block, length)
        queries, grads = (_flat(lax.dynamic_slice_in_dim(x, first, block, 1)) for x in (q, grad))
        logs, deltas = (
            lax.dynamic_slice_in_dim(x, first, block, 1).reshape(batch, block * group) for x in (log_total, delta)
        )
        # The last block reaches back: rows of the block before it must not count twice.
        fresh = jnp.repeat(index[0] >= i * block, group, total_repeat_length=block * group)[None, :, None]

        def keys(key_block, keep, carry):
            d_rows, d_k, d_v = carry
            args = queries, key_block(k), key_block(v), keep & fresh, logs, deltas, grads
            more_q, more_k, more_v = _gradients(*args)
            return d_rows + more_q, key_block.add(d_k, more_k), key_block.add(d_v, more_v)

        nothing = jnp.zeros((batch, block * group, head_dim), jnp.float32)
        d_rows, d_k, d_v = _over_keys(i, index, group, length, window, keys, (nothing, d_k, d_v))
        return _add_block(d_q, d_rows.reshape(batch, block, group, head_dim), first), d_k, d_v

    zeros = jnp.zeros(k.shape, jnp.float32)
    return lax.fori_loop(0, -(-length // block), rows, (jnp.zeros(q.shape, jnp.float32), zeros, zeros))


def _gradients(
    q: Float[Array, "B M H"],
    k: Float[Array, "B S H"],
    v: Float[Array, "B S H"],
    keep: Bool[Array, "#B #M S"],
    log_total: Float[Array, "B M"],
    delta: Float[Array, "B M"],
    grad: Float[Array, "B M H"],
) -> tuple[Float[Array, "B M H"], Float[Array, "B S H"], Float[Array, "B S H"]]:
    """Contribution of one block of queries and keys to the gradients of q, k and v, float32 (Dao 2023, algorithm 2).

    `delta` is the sum over H of the output times its gradient `grad`, less the gradient of `log_total`.
    """
    scale, f32 = q.shape[-1] ** -0.5, {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bmh,bsh->bms", q, k, **f32) * scale
    weights = jnp.where(keep, jnp.exp(jnp.minimum(scores - log_total[:, :, None], 0.0)), 0.0)
    d_weights = jnp.einsum("bmh,bsh->bms", grad, v, **f32)
    d_scores = (weights * (d_weights - delta[:, :, None]) * scale).astype(q.dtype)
    d_q = jnp.einsum("bms,bsh->bmh", d_scores, k, **f32)
    d_k = jnp.einsum("bms,bmh->bsh", d_scores, q, **f32)
    d_v = jnp.einsum("bms,bmh->bsh", weights.astype(grad.dtype), grad, **f32)
    return d_q, d_k, d_v


class _KeyBlock:
    """A contiguous block of keys: read from an array `[B T H]`, or added to in it."""

    def __init__(self, begin: Array, size: int) -> None:
        self.begin, self.size = begin, size

    def __call__(self, x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, self.begin, self.size, 1)

    def add(self, x: Array, more: Array) -> Array:
        return _add_block(x, more, self.begin)


def _over_keys(i: Array, index: Array, group: int, length: int, window: Window | None, visit: Callable, carry):
    """Visit every block of keys that the queries at `index` see: all up to theirs, or the sinks and one band."""
    block = index.shape[1]
    q_pos = jnp.repeat(index[0], group, total_repeat_length=block * group)[None, :, None]
    if window is None:

        def one(j, carry):
            begin, k_pos = block_at(j, block, length)
            keep = (k_pos >= j * block) & (k_pos <= q_pos[0])
            return visit(_KeyBlock(begin, block), keep[None], carry)

        return lax.fori_loop(0, cdiv(index[0, -1] + 1, block), one, carry)
    sinks, width = min(window.sink, length), min(block + window.recent, length)
    begin = jnp.clip(index[0, 0] - window.recent, 0, length - width)
    band = begin + jnp.arange(width, dtype=jnp.int32)[None, None, :]
    # Sinks are a block of their own: a band that reaches back to them must not count them twice.
    carry = visit(_KeyBlock(begin, width), window.visible(q_pos, band) & (band >= window.sink), carry)
    if sinks:
        sink_pos = jnp.arange(sinks, dtype=jnp.int32)[None, None, :]
        carry = visit(_KeyBlock(jnp.int32(0), sinks), sink_pos <= q_pos, carry)
    return carry


def _add_block(x: Array, more: Array, begin: Array) -> Array:
    old = lax.dynamic_slice_in_dim(x, begin, more.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(x, old + more, begin, 1)


def _flat(x: Float[Array, "B Q G H"]) -> Float[Array, "B QG H"]:
    return x.reshape(x.shape[0], -1, x.shape[3])


def _heads_first(x: Float[Array, "B T K H"]) -> Float[Array, "K B T H"]:
    return x.transpose(2, 0, 1, 3)


def _to_heads(x: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "K B T G H"]:
    batch, length, num_heads, head_dim = x.shape
    return x.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(2, 0, 1, 3, 4)


def _from_heads(x: Float[Array, "K B T G H"]) -> Float[Array, "B T N H"]:
    kv_heads, batch, length, group, head_dim = x.shape
    return x.transpose(1, 2, 0, 3, 4).reshape(batch, length, kv_heads * group, head_dim)
