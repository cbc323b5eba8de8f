"""Writing the keys and values of a chunk into a layer's pools, and hashing them. Knows no model, pattern or cache."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels import Heads, Pools, TokenShards, Window
from pallas_kernels.append import full_entries, full_slots, put
from pallas_kernels.quantized import Stored, store
from pallas_kernels.window import consecutive


@functools.partial(jax.jit, static_argnames=("window", "shards"))
def write_chunk(
    pools: Pools,
    heads: Heads,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None,
) -> Pools:
    """Write a chunk's keys and values at positions from `start` on; padding beyond `lengths` is left out."""
    if pools.full_k.shape[0]:
        position = consecutive(start, k.shape[1])
        valid = position < (start + lengths)[:, None]
        row, entry = full_entries(pools, jnp.arange(len(start), dtype=jnp.int32)[:, None], position, valid, shards)
        index = full_slots(heads, pools)[:, None, None], row[None], entry[None]
        pools = pools._replace(
            full_k=put(pools.full_k, index, k.transpose(2, 0, 1, 3)),
            full_v=put(pools.full_v, index, v.transpose(2, 0, 1, 3)),
        )
    if pools.ring_k.shape[0]:
        # An entry takes the newest token that belongs there if the chunk contains it, otherwise it keeps its own.
        source = window.positions(start + lengths) - start[:, None]
        pools = pools._replace(
            ring_k=_refill(pools.ring_k, heads, source, k),
            ring_v=_refill(pools.ring_v, heads, source, v),
        )
    return pools


@functools.partial(jax.jit, static_argnames="shards")
def fingerprint(
    pool: Stored,
    length: Int32[Array, "B"],
    pages: Int32[Array, "B n"] | None = None,
    shards: TokenShards | None = None,
) -> UInt32[Array, "B"]:
    """Hash of each row's first `length` keys in the deepest full slot, which depend on all layers before it."""
    if not pool.shape[0]:
        return jnp.zeros(length.shape, jnp.uint32)  # Rings are copied whole: nothing can be stale.
    # Quantized keys are hashed by their words: different keys share all of them in a few channels only.
    keys = jax.tree.leaves(pool)[0][-1]
    if pages is not None:
        keys = keys[pages].reshape(len(pages), -1, keys.shape[-1])
    bits = lax.bitcast_convert_type(keys, jnp.dtype(f"uint{8 * keys.dtype.itemsize}")).astype(jnp.uint32)
    # A random odd factor for every position and channel: other keys, or the same in another order, give another sum.
    index = jnp.arange(keys.shape[1] * keys.shape[2], dtype=jnp.uint32).reshape(1, *keys.shape[1:])
    factor = (index * jnp.uint32(0x9E3779B1)) ^ (index >> 7) | jnp.uint32(1)
    count = length if shards is None else shards.held(length)
    valid = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
    return jnp.where(valid[:, :, None], bits * factor, jnp.uint32(0)).sum((1, 2), dtype=jnp.uint32)


def _refill(pool: Stored, heads: Heads, source: Int32[Array, "B R"], chunk: Float[Array, "B T K H"]) -> Stored:
    """Rings after a chunk: entry r takes chunk token `source[b, r]`, or keeps its own where that is negative."""
    slots = jnp.where(heads.is_retrieval, 0, heads.slot)
    written = jnp.where(heads.is_retrieval, pool.shape[0], heads.slot)
    new = jnp.take_along_axis(chunk, jnp.maximum(source, 0)[:, :, None, None], axis=1).transpose(2, 0, 1, 3)

    def renew(pool: Array, new: Array) -> Array:
        is_new = (source >= 0).reshape(1, *source.shape, *(1,) * (pool.ndim - 3))
        return pool.at[written].set(jnp.where(is_new, new, pool[slots]), mode="drop")

    return jax.tree.map(renew, pool, store(new, pool))
