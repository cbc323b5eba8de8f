"""Flash attention over a chunk and the cache before it, retrieval and streaming heads in one launch.

A program computes one tile of queries of one head. Which keys it visits follows from the head's type, which it looks
up: everything before the tile, or the sinks and the window. Masks are computed for the tiles at the edges alone.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import cdiv, div, rem
from pallas_kernels.gpus import FlashTiles
from pallas_kernels.triton import tile
from pallas_kernels.triton.tile import Ref, Softmax
from pallas_kernels.types import Heads, Pools, TokenShards
from pallas_kernels.window import Window


class Arrays(NamedTuple):
    """What the kernel reads."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    pools: tile.Present
    order: Int32[Array, "K"]  # KV heads, retrieval heads first
    slot: Int32[Array, "K"]
    num_retrieval: Int32[Array, "1"]
    start: Int32[Array, "B"]
    lengths: Int32[Array, "B"]
    # Where devices share the tokens: how many of a retrieval slot's lie here, and whether the chunk counts here.
    held: Int32[Array, "B"] | None
    counts: Int32[Array, "1"] | None


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools | None,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    tiles: FlashTiles,
    shards: TokenShards | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention of a chunk, and the logarithm (base 2) of each query's sum of weights; no pools: nothing before it.

    With shards, this device's part of it, in float32; the chunk's own keys are the first device's.
    """
    batch, length, num_heads, _ = q.shape
    order = jnp.argsort(~heads.is_retrieval, stable=True).astype(jnp.int32)
    count = heads.is_retrieval.sum(dtype=jnp.int32, keepdims=True)
    shared = (None, None) if shards is None else (shards.held(start), (shards.index == 0).astype(jnp.int32)[None])
    arrays = Arrays(q, k, v, tile.present(pools), order, heads.slot, count, start, lengths, *shared)
    dtype = q.dtype if shards is None else jnp.float32
    out = [jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)]
    kernel = partial(flash_kernel, window=window, tiles=tiles)
    grid = (num_heads * -(-length // tiles.block_q), batch)
    out, log_total = tile.call(kernel, out, arrays, grid=grid, warps=tiles.num_warps, stages=tiles.num_stages)
    return out, log_total


def flash_kernel(arrays: Arrays, out_ref: Ref, log_ref: Ref, *, window: Window, tiles: FlashTiles) -> None:
    """One tile of queries of one head: of `out_ref [B, T, N, H]` and `log_ref [B, N, T]`."""
    block_q, block_k = tiles.block_q, tiles.block_k
    _, length, num_heads, head_dim = arrays.q.shape
    num_kv_heads = arrays.k.shape[2]
    group, width = num_heads // num_kv_heads, tile.width(head_dim)
    columns = pl.ds(0, width)
    row = pl.program_id(1)
    head, is_retrieval, first = _work(arrays, num_heads, group, -(-length // block_q), block_q)
    kv_head = div(head, group)
    slot, start = arrays.slot[kv_head], arrays.start[row]
    q_index = tile.indices(first, block_q)
    q_pos = start + q_index
    exists = q_index < length
    # A tile of padding visits nothing, and writes zeros.
    is_live = first < arrays.lengths[row]
    q = tile.load(arrays.q.at[row, pl.ds(first, block_q), head, columns], exists, head_dim)

    def sees(k_pos: Array) -> Array:
        """Which keys `[Q, S]` each query sees, by position."""
        seen = window.visible(q_pos[:, None], k_pos[None, :])
        return seen | (is_retrieval & (k_pos[None, :] <= q_pos[:, None]))

    def visit(state: Softmax, keys_values: tuple[Array, Array], keep: Array | None) -> Softmax:
        return tile.accumulate(state, q, *keys_values, keep, head_dim**-0.5)

    def cached(pool_k: Ref, pool_v: Ref, begin: Array, exists: Array | None) -> tuple[Array, Array]:
        at = slot, row, begin, block_k, exists, q.dtype
        return tile.load_keys(pool_k, *at), tile.load_keys(pool_v, *at)

    def over(begin: Array, end: Array, one, state: Softmax) -> Softmax:
        return lax.fori_loop(begin, jnp.where(is_live, end, begin), one, state)

    state, zero = tile.empty(block_q, width), jnp.int32(0)
    if arrays.pools.full_k is not None:
        pool: tuple[Ref, Ref] = arrays.pools.full_k, arrays.pools.full_v
        held = start if arrays.held is None else arrays.held[row]
        filled = jnp.minimum(held, jnp.int32(pool[0].shape[2]))  # beyond its end lies another slot
        whole = jnp.where(is_retrieval, div(filled, block_k), zero)
        every = jnp.where(is_retrieval, cdiv(filled, block_k), zero)

        def inside(j: Array, state: Softmax) -> Softmax:
            return visit(state, cached(*pool, j * block_k, None), None)

        def last(j: Array, state: Softmax) -> Softmax:
            exists = tile.indices(j * block_k, block_k) < filled
            return visit(state, cached(*pool, j * block_k, exists), exists[None, :])

        state = over(whole, every, last, over(zero, whole, inside, state))
    if arrays.pools.ring_k is not None:
        ring: tuple[Ref, Ref] = arrays.pools.ring_k, arrays.pools.ring_v
        # Beyond the window's reach only the sinks are left to see.
        reach = jnp.where(first + 2 <= window.recent, jnp.int32(window.size), jnp.int32(window.sink))
        blocks = jnp.where(is_retrieval, zero, cdiv(jnp.minimum(start, reach), block_k))

        def in_ring(j: Array, state: Softmax) -> Softmax:
            index = tile.indices(j * block_k, block_k)
            k_pos = window.position_at(index, start)
            held = k_pos >= 0
            return visit(state, cached(*ring, j * block_k, held), held[None, :] & sees(k_pos))

        state = over(zero, blocks, in_ring, state)

    # The chunk's own keys: sinks, the window's left edge, what every query of the tile sees, the diagonal.
    end = cdiv(jnp.minimum(first + block_q, length), block_k)
    if arrays.counts is not None:
        end = jnp.where(is_retrieval & (arrays.counts[0] == 0), zero, end)
    left = jnp.where(is_retrieval, zero, div(jnp.maximum(first + 1 - window.recent, zero), block_k))
    sinks = jnp.minimum(cdiv(jnp.maximum(window.sink - start, zero), block_k), left)
    inner = jnp.where(is_retrieval, zero, cdiv(jnp.maximum(first + block_q - window.recent, zero), block_k))
    inner = jnp.clip(inner, left, end)
    diagonal = jnp.clip(div(first + 1, block_k), inner, end)

    def own(j: Array, exists: Array | None) -> tuple[Array, Array]:
        at = row, pl.ds(j * block_k, block_k), kv_head, columns
        return tile.load(arrays.k.at[*at], exists, head_dim), tile.load(arrays.v.at[*at], exists, head_dim)

    def at_edge(i: Array, state: Softmax) -> Softmax:
        # Tiles 0 to sinks, left to inner, diagonal to end, counted through.
        j = jnp.where(i < sinks, i, left + i - sinks)
        j = jnp.where(j < inner, j, diagonal + j - inner)
        index = tile.indices(j * block_k, block_k)
        return visit(state, own(j, index < length), sees(start + index))

    def in_sight(j: Array, state: Softmax) -> Softmax:
        return visit(state, own(j, None), None)

    state = over(inner, diagonal, in_sight, state)
    # Last, so that every query has met a key it sees: weights of a tile without one vanish then.
    state = over(zero, sinks + (inner - left) + (end - diagonal), at_edge, state)
    values, log_total = tile.finish(state)
    tile.store(out_ref.at[row, pl.ds(first, block_q), head, columns], values, exists, head_dim)
    tile.store_row(log_ref.at[row, head, pl.ds(first, block_q)], log_total, exists)


def _work(arrays: Arrays, num_heads: int, group: int, q_blocks: int, block_q: int) -> tuple[Array, Array, Array]:
    """Query head of this program, whether it retrieves, and its first query: heavy tiles first.

    Programs start in the order of their numbers: those of retrieval heads, late tiles before early ones, then the
    streaming heads', which are short and fill the gaps at the end.
    """
    number, heavy = pl.program_id(0), arrays.num_retrieval[0] * group
    is_retrieval = number < heavy * q_blocks
    rank = jnp.where(is_retrieval, number, number - heavy * q_blocks)
    heads = jnp.where(is_retrieval, heavy, num_heads - heavy)
    place = rem(rank, heads) + jnp.where(is_retrieval, jnp.int32(0), heavy)
    head = arrays.order[div(place, group)] * group + rem(place, group)
    return head, is_retrieval, (q_blocks - 1 - div(rank, heads)) * block_q
