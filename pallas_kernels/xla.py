"""Blocked attention in plain XLA: memory linear in T and S, work proportional to the visible key blocks.

The production path on CPU and the fallback anywhere. A layer's heads run one after the other, retrieval heads first, so
that the head table stays data: two loops with trip counts read from it, and no branch to compile per pattern.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import Softmax, accumulate, block_at, cdiv, empty, finish, log_sum_exp
from pallas_kernels.quantized import Stored, read
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window, consecutive
from pallas_kernels.xla_train import full_attention, gated_attention

__all__ = [
    "decode_attention",
    "decode_partial",
    "full_attention",
    "gated_attention",
    "prefill_attention",
    "prefill_partial",
]

# Tokens per block. Large enough for a matrix product to be worth its call, small enough that scores stay in cache.
Q_BLOCK = 512
K_BLOCK = 512
STREAMING_Q_BLOCK = 128


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.prefill_attention`."""
    close = partial(finish, dtype=q.dtype)
    return _prefill(q, k, v, pools, heads, None, close, start, lengths, window)


def prefill_partial(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    shards: TokenShards,
    window: Window,
) -> Partial:
    """A device's part of `prefill_attention`: the tokens of its pools, and every so manieth block of the chunk."""
    return _prefill(q, k, v, pools, heads, shards, _part, start, lengths, window)


def _prefill(q, k, v, pools, heads, shards, close, start, lengths, window):
    """Attention of a chunk; `close` makes of a finished softmax what is returned."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    # Heads first: a head's queries, keys and values are then contiguous.
    q_heads = q.reshape(batch, length, num_kv_heads, group, head_dim).transpose(2, 0, 1, 3, 4)
    k_heads, v_heads = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)
    longest = lengths.max()

    def retrieval(head: Array) -> Any:
        args = q_heads[head], k_heads[head], v_heads[head], pools.full_k, pools.full_v, heads.slot[head]
        return _prefill_retrieval(*args, shards, close, start=start, longest=longest)

    def streaming(head: Array) -> Any:
        slot, whole = heads.slot[head], jnp.int32(0)
        rings = (_load(pool, slot, whole, pool.shape[2], q.dtype).astype(k.dtype) for pool in pools.ring)
        args = q_heads[head], k_heads[head], v_heads[head], *rings, close
        return _prefill_streaming(*args, start=start, longest=longest, window=window)

    out = _over_heads(retrieval, streaming, pools, heads, _blank(close, q_heads))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, length, num_heads, *x.shape[4:]), out)


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`."""
    return _decode(q, pools, heads, partial(finish, dtype=q.dtype), lengths, lengths)


def decode_partial(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    shards: TokenShards,
    window: Window,
) -> Partial:
    """A device's part of `decode_attention`: the tokens of its pools."""
    return _decode(q, pools, heads, _part, shards.held(lengths), lengths)


def _decode(q, pools, heads, close, held, lengths):
    """Attention of one token a row over the first `held` entries of a retrieval slot, or a ring of `lengths` tokens."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    q_heads = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(1, 0, 2, 3)

    def retrieval(head: Array) -> Any:
        return _decode_pool(q_heads[head], pools.full_k, pools.full_v, heads.slot[head], held, close)

    def streaming(head: Array) -> Any:
        # A ring fills from its first index and then stays full: every index below `length` holds a visible token.
        return _decode_pool(q_heads[head], pools.ring_k, pools.ring_v, heads.slot[head], lengths, close)

    out = _over_heads(retrieval, streaming, pools, heads, _blank(close, q_heads))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, num_heads, *x.shape[3:]), out)


def _part(state: Softmax) -> Partial:
    return Partial(finish(state, jnp.dtype(jnp.float32)), log_sum_exp(state))


def _blank(close: Callable[[Softmax], Any], q: Float[Array, "*B H"]) -> Any:
    """Zeros for what `close` makes of every query."""
    made = jax.eval_shape(lambda: close(empty(1, 1, q.shape[-1])))
    return jax.tree.map(lambda x: jnp.zeros((*q.shape[:-1], *x.shape[2:]), x.dtype), made)


def _over_heads(
    retrieval: Callable[[Array], Any], streaming: Callable[[Array], Any], pools: Pools, heads: Heads, out: Any
) -> Any:
    """Fill arrays `out [K ...]`, each KV head by the function of its type."""
    order = jnp.argsort(~heads.is_retrieval, stable=True).astype(jnp.int32)
    num_retrieval = heads.is_retrieval.sum(dtype=jnp.int32)

    def run(function: Callable[[Array], Any]) -> Callable[[Array, Any], Any]:
        def one(i: Array, out: Any) -> Any:
            return jax.tree.map(
                lambda x, new: lax.dynamic_update_index_in_dim(x, new, order[i], 0), out, function(order[i])
            )

        return one

    if pools.full_k.shape[0]:
        out = lax.fori_loop(jnp.int32(0), num_retrieval, run(retrieval), out)
    if pools.ring_k.shape[0]:
        out = lax.fori_loop(num_retrieval, jnp.int32(order.shape[0]), run(streaming), out)
    return out


def _prefill_retrieval(q, k, v, pool_k, pool_v, slot, shards, close, *, start, longest):
    """One retrieval head: query blocks over the filled key blocks of its slot, then over the chunk, causally."""
    batch, length, group, head_dim = q.shape
    q_block, own_block = min(Q_BLOCK, length), min(K_BLOCK, length)
    pool_block = min(K_BLOCK, pool_k.shape[2])
    held = start if shards is None else shards.held(start)
    past_blocks = cdiv(held.max(), pool_block)

    def one_q_block(i, out):
        first = jnp.minimum(i * q_block, length - q_block)
        rows = lax.dynamic_slice_in_dim(q, first, q_block, 1)
        q_index = jnp.repeat(first + jnp.arange(q_block, dtype=jnp.int32), group, total_repeat_length=q_block * group)
        state = empty(batch, q_block * group, head_dim)
        rows = rows.reshape(batch, q_block * group, head_dim)

        def past(j, state):
            begin, index = block_at(j, pool_block, pool_k.shape[2])
            keep = (index >= j * pool_block) & (index < held[:, None])
            keys, values = (_load(pool, slot, begin, pool_block, q.dtype) for pool in (pool_k, pool_v))
            return accumulate(state, rows, keys, values, keep[:, None, :])

        def own(j, state):
            begin, index = block_at(j, own_block, length)
            keep = (index >= j * own_block) & (index <= q_index[:, None])
            keys = lax.dynamic_slice_in_dim(k, begin, own_block, 1)
            values = lax.dynamic_slice_in_dim(v, begin, own_block, 1)
            return accumulate(state, rows, keys, values, keep[None])

        state = lax.fori_loop(jnp.int32(0), past_blocks, past, state)
        own_blocks = cdiv(first + q_block, own_block)
        if shards is None:
            state = lax.fori_loop(jnp.int32(0), own_blocks, own, state)
        else:
            mine = cdiv(own_blocks - shards.index, shards.count)
            state = lax.fori_loop(jnp.int32(0), mine, lambda j, s: own(j * shards.count + shards.index, s), state)
        return _write(out, close(state), first, q_block)

    return lax.fori_loop(jnp.int32(0), cdiv(longest, q_block), one_q_block, _blank(close, q))


def _write(out, block, first, q_block):
    """Put what a block of queries gave, `[B q_block*G ...]`, into `out [B T G ...]`."""

    def one(x, new):
        new = new.reshape(x.shape[0], q_block, *x.shape[2:])
        return lax.dynamic_update_slice_in_dim(x, new, first, 1)

    return jax.tree.map(one, out, block)


def _prefill_streaming(q, k, v, ring_k, ring_v, close, *, start, longest, window):
    """One streaming head: each query block sees the sinks and one contiguous band of keys, so work is linear in T."""
    batch, length, group, head_dim = q.shape
    q_block = min(STREAMING_Q_BLOCK, length)
    sink_pos = consecutive(jnp.zeros_like(start), window.sink)
    # The window as it was before the chunk, in order, then the chunk: entry j holds position start - recent + j.
    window_pos = consecutive(start - window.recent, window.recent)
    window_index = jnp.maximum(window.index(window_pos), 0)
    in_chunk = jnp.clip(sink_pos - start[:, None], 0, length - 1)

    def gather(ring: Array, chunk: Array) -> tuple[Array, Array]:
        cached = (sink_pos < start[:, None])[:, :, None]
        sinks = jnp.where(cached, ring[:, : window.sink], _take(chunk, in_chunk))
        return sinks, jnp.concatenate([_take(ring, window_index), chunk], axis=1)

    (sink_k, band_k), (sink_v, band_v) = gather(ring_k, k), gather(ring_v, v)
    width = q_block + window.recent

    def one_q_block(i, out):
        first = jnp.minimum(i * q_block, length - q_block)
        rows = lax.dynamic_slice_in_dim(q, first, q_block, 1).reshape(batch, q_block * group, head_dim)
        offset = jnp.repeat(jnp.arange(q_block, dtype=jnp.int32), group, total_repeat_length=q_block * group)
        q_pos = (start[:, None] + first + offset[None, :])[:, :, None]
        band_pos = consecutive(start - window.recent + first, width)[:, None, :]
        # Sinks come from `sink_k` alone: a band that reaches back to them must not count them twice.
        keep_band = window.visible(q_pos, band_pos) & (band_pos >= window.sink)
        keys = jnp.concatenate([sink_k, lax.dynamic_slice_in_dim(band_k, first, width, 1)], axis=1)
        values = jnp.concatenate([sink_v, lax.dynamic_slice_in_dim(band_v, first, width, 1)], axis=1)
        keep = jnp.concatenate([sink_pos[:, None, :] <= q_pos, keep_band], axis=2)
        state = accumulate(empty(batch, q_block * group, head_dim), rows, keys, values, keep)
        return _write(out, close(state), first, q_block)

    return lax.fori_loop(jnp.int32(0), cdiv(longest, q_block), one_q_block, _blank(close, q))


def _decode_pool(
    q: Float[Array, "B G H"],
    pool_k: Stored,
    pool_v: Stored,
    slot: Int32[Array, ""],
    lengths: Int32[Array, "B"],
    close: Callable[[Softmax], Any],
) -> Any:
    """One head's query group over the filled blocks of its slot."""
    size = pool_k.shape[2]
    block = min(K_BLOCK, size)

    def one_block(j, state):
        begin, index = block_at(j, block, size)
        keep = (index >= j * block) & (index < lengths[:, None])
        keys, values = (_load(pool, slot, begin, block, q.dtype) for pool in (pool_k, pool_v))
        return accumulate(state, q, keys, values, keep[:, None, :])

    num_blocks = cdiv(jnp.minimum(lengths.max(), size), block)
    return close(lax.fori_loop(jnp.int32(0), num_blocks, one_block, empty(*q.shape)))


def _load(pool: Stored, slot: Array, begin: Array, size: int, dtype: jnp.dtype) -> Float[Array, "B size H"]:
    """One block of one slot. Pools are read here alone: how they are stored matters nowhere else."""

    def block(x: Array) -> Array:
        zero = jnp.int32(0)
        start = slot, zero, begin, *(zero,) * (x.ndim - 3)
        return lax.dynamic_slice(x, start, (1, x.shape[1], size, *x.shape[3:]))[0]

    return read(jax.tree.map(block, pool), dtype)


def _take(rows: Float[Array, "B S H"], index: Int32[Array, "B I"]) -> Float[Array, "B I H"]:
    return jnp.take_along_axis(rows, index[:, :, None], axis=1)
