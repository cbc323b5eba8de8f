"""Writing keys and values into one layer's pools, and hashing what was written. Knows no model, pattern or cache."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import Heads, Pools, TokenShards, Window
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
        row, entry = _full_entries(pools, _rows(start)[:, None], position, valid, shards)
        index = _full_slots(heads, pools)[:, None, None], row[None], entry[None]
        pools = pools._replace(
            full_k=_scatter(pools.full_k, index, k.transpose(2, 0, 1, 3)),
            full_v=_scatter(pools.full_v, index, v.transpose(2, 0, 1, 3)),
        )
    if pools.ring_k.shape[0]:
        # An entry takes the newest token that belongs there if the chunk contains it, otherwise it keeps its own.
        source = window.positions(start + lengths) - start[:, None]
        pools = pools._replace(
            ring_k=_refill(pools.ring_k, heads, source, k),
            ring_v=_refill(pools.ring_v, heads, source, v),
        )
    return pools


@functools.partial(jax.jit, static_argnames=("window", "shards"))
def write_token(
    pools: Pools,
    heads: Heads,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    *,
    start: Int32[Array, "B"],
    active: Bool[Array, "B"],
    window: Window,
    shards: TokenShards | None,
) -> Pools:
    """Write the key and value of one token at position `start`, for the active rows."""
    rows, k, v = _rows(start), k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    if pools.full_k.shape[0]:
        row, entry = _full_entries(pools, rows, start, active, shards)
        index = _full_slots(heads, pools)[:, None], row[None], entry[None]
        pools = pools._replace(full_k=_scatter(pools.full_k, index, k), full_v=_scatter(pools.full_v, index, v))
    if pools.ring_k.shape[0]:
        entry = jnp.where(active, window.index(start), pools.ring_k.shape[2])
        index = (_ring_slots(heads, pools)[:, None], rows[None], entry[None])
        pools = pools._replace(ring_k=_scatter(pools.ring_k, index, k), ring_v=_scatter(pools.ring_v, index, v))
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


def _rows(start: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """Row indices."""
    return jnp.arange(start.shape[0], dtype=jnp.int32)


def _full_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    """Slots of the retrieval heads; out of bounds, and so never written, for the others."""
    return jnp.where(heads.is_retrieval, heads.slot, pools.full_k.shape[0])


def _ring_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    """Slots of the streaming heads; out of bounds, and so never written, for the others."""
    return jnp.where(heads.is_retrieval, pools.ring_k.shape[0], heads.slot)


def _full_entries(
    pools: Pools,
    row: Int32[Array, "*r"],
    position: Int32[Array, "*p"],
    valid: Bool[Array, "*p"],
    shards: TokenShards | None,
) -> tuple[Int32[Array, "..."], Int32[Array, "*p"]]:
    """The two indices of tokens in a full slot: row and position, or page and offset if it is paged.

    Tokens that are not written, padding, those of other devices and those without a page, get an index that is out of
    bounds.
    """
    if shards is not None:
        count = jnp.full_like(position, shards.count)
        valid &= lax.rem(position, count) == shards.index
        position = lax.div(position, count)
    if pools.pages is None:
        return row, jnp.where(valid, position, pools.full_k.shape[2])
    size = jnp.full_like(position, pools.full_k.shape[2])
    number = lax.div(position, size)
    page = pools.pages[row, jnp.minimum(number, pools.pages.shape[1] - 1)]
    is_written = valid & (number < pools.pages.shape[1]) & (page >= 0)
    return jnp.where(is_written, page, pools.full_k.shape[1]), lax.rem(position, size)


def _scatter(pool: Stored, index: tuple[Array, Array, Array], new: Float[Array, "*index H"]) -> Stored:
    """Write tokens; an index that is out of bounds is dropped."""
    return jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), pool, store(new, pool))


def _refill(pool: Stored, heads: Heads, source: Int32[Array, "B R"], chunk: Float[Array, "B T K H"]) -> Stored:
    """Rings after a chunk: entry r takes chunk token `source[b, r]`, or keeps its own where that is negative."""
    slots = jnp.where(heads.is_retrieval, 0, heads.slot)
    written = jnp.where(heads.is_retrieval, pool.shape[0], heads.slot)
    new = jnp.take_along_axis(chunk, jnp.maximum(source, 0)[:, :, None, None], axis=1).transpose(2, 0, 1, 3)

    def renew(pool: Array, new: Array) -> Array:
        is_new = (source >= 0).reshape(1, *source.shape, *(1,) * (pool.ndim - 3))
        return pool.at[written].set(jnp.where(is_new, new, pool[slots]), mode="drop")

    return jax.tree.map(renew, pool, store(new, pool))
