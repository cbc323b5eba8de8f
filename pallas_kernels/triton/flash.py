"""Flash attention over a chunk and the cache before it, retrieval and streaming heads in one launch.

A program computes one tile of queries of one head. The head's type decides which keys it visits: everything before the
tile, or the sinks and the window. Only tiles at the edges compute masks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import Softmax, empty
from pallas_kernels.pages import in_pool
from pallas_kernels.quantized import any_quantized, compute_dtype
from pallas_kernels.schedule import Sizes, div, steps_of
from pallas_kernels.tiles import FlashTiles, tiles_for
from pallas_kernels.triton import tile
from pallas_kernels.triton.tile import Ref
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window
from pallas_kernels.works import Queries, share


class Arrays(NamedTuple):
    """The kernel's inputs."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    pools: tile.Present
    pages: Int32[Array, "B n"] | None  # of the full pool, if it is paged
    order: Int32[Array, "K"]  # KV heads, retrieval heads first
    slot: Int32[Array, "K"]
    num_retrieval: Int32[Array, "1"]
    parts: Int32[Array, "1"]  # of the keys of a retrieval head's tile
    start: Int32[Array, "B"]
    lengths: Int32[Array, "B"]
    # Of several shards: tokens of a retrieval slot that are stored here, and whether the chunk counts here.
    held: Int32[Array, "B"] | None
    has_chunk: Int32[Array, "1"] | None


def prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
) -> Partial:
    """See `pallas_kernels.prefill_attention`; of several shards, the first counts the chunk's own keys."""
    tiles = tiles_for("flash", q.shape[-1], compute_dtype(q, k).itemsize, quantized=any_quantized(pools.stored))
    rows: dict[str, Any] = {"start": start, "lengths": lengths}
    return flash_attention(q, k, v, pools, heads, **rows, window=window, tiles=tiles, shards=shards)


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
) -> Partial:
    """Attention of a chunk; without pools, nothing precedes it. Of several shards, the output is float32."""
    order, count = heads.by_type()
    filled, has_chunk = start, None
    if shards is not None:
        filled, has_chunk = shards.held(start), (shards.index == 0).astype(jnp.int32)[None]
    capacity, pages = (pools.capacity if pools.full_k.shape[0] else 0, pools.pages) if pools else (0, None)
    queries = Queries.of(q, k.shape[2], tiles.block_q, capacity)
    packed, parts = queries.pack(q), queries.parts(heads)
    shared = None if shards is None else filled, has_chunk
    arrays = Arrays(
        packed, k, v, tile.present(pools), pages, order, heads.slot, count[None], parts[None], start, lengths, *shared
    )
    dtype = q.dtype if shards is None else jnp.float32
    shape = queries.most_parts, *packed.shape
    out = [
        jax.ShapeDtypeStruct(shape, dtype if queries.most_parts == 1 else jnp.float32),
        jax.ShapeDtypeStruct((*shape[:2], shape[3], shape[2]), jnp.float32),
    ]
    kernel = partial(flash_kernel, window=window, tiles=tiles, queries=queries)
    grid = (queries.most_works,)
    out, log_sum = tile.call(kernel, out, arrays, grid=grid, warps=tiles.num_warps, stages=tiles.num_stages)
    merged = queries.merged(Partial(out, log_sum.swapaxes(2, 3)), heads, filled, parts)
    return merged._replace(out=merged.out.astype(dtype))


def flash_kernel(
    arrays: Arrays, out_ref: Ref, log_ref: Ref, *, window: Window, tiles: FlashTiles, queries: Queries
) -> None:
    """One tile of queries over a part of its keys: of `out_ref [parts, B, T, N, H]`, and without H of `log_ref`."""
    block_q, block_k = tiles.block_q, tiles.block_k
    length, head_dim = arrays.k.shape[1], arrays.q.shape[3]
    width = tile.width(head_dim)
    columns = tile.leading(width)
    number, num_retrieval, parts = pl.program_id(0), arrays.num_retrieval[0], arrays.parts[0]
    works = queries.works(num_retrieval, parts)
    work = queries.work(jnp.minimum(number, works - 1), arrays.order, num_retrieval, parts)
    row, head, is_retrieval, part = work.row, work.head, work.is_retrieval, work.part
    kv_head, first_row = div(head, queries.group), work.tile * block_q
    first = div(first_row, queries.packed)
    slot, start = arrays.slot[kv_head], arrays.start[row]
    q_row = tile.indices(first_row, block_q)
    q_pos = start + div(q_row, queries.packed)
    filled = start if arrays.held is None else arrays.held[row]
    used = queries.used(is_retrieval, filled, parts)
    exists = (q_row < queries.length) & (number < works) & (part < used)
    # A tile of padding visits nothing, and writes zeros; so does a part that is not used, but writes nothing.
    is_live = (first < arrays.lengths[row]) & (number < works) & (part < used)
    # The last part has everything but whole tiles of the pool.
    is_last = is_live & (part == used - 1)
    q = tile.load(arrays.q.at[row, pl.ds(first_row, block_q), head, columns], exists, head_dim)

    def sees(k_pos: Array) -> Array:
        """Which keys `[Q, S]` each query sees, by position."""
        seen = window.visible(q_pos[:, None], k_pos[None, :])
        return seen | (is_retrieval & (k_pos[None, :] <= q_pos[:, None]))

    def visit(state: Softmax, keys_values: tuple[Array, Array], keep: Array | None) -> Softmax:
        return tile.accumulate(state, q, *keys_values, keep, head_dim**-0.5)

    def cached(
        pool_k: Ref, pool_v: Ref, begin: Array, exists: Array | None, pages: Ref | None = None
    ) -> tuple[Array, Array]:
        index, begin = in_pool(pages, pool_k.shape[2], row, begin)
        at = slot, index, begin, block_k, exists, q.dtype
        return tile.load_keys(pool_k, *at), tile.load_keys(pool_v, *at)

    def over(begin: Array, end: Array, one, state: Softmax) -> Softmax:
        return lax.fori_loop(begin, jnp.where(is_last, end, begin), one, state)

    state, zero = empty((block_q,), width), jnp.int32(0)
    if arrays.pools.full_k is not None:
        # The next slot begins at its capacity.
        capacity = arrays.pools.full_k.shape[2] * (1 if arrays.pages is None else arrays.pages.shape[1])
        filled = jnp.minimum(filled, jnp.int32(capacity))
    has_chunk = None if arrays.has_chunk is None else arrays.has_chunk[0] != 0
    sizes = Sizes(length, queries.tile_tokens, block_k, window)
    steps = steps_of(first, start, is_retrieval, sizes, filled=filled, has_chunk=has_chunk)
    if arrays.pools.full_k is not None:
        pool: tuple[Ref, Ref] = arrays.pools.full_k, arrays.pools.full_v

        def inside(j: Array, state: Softmax) -> Softmax:
            return visit(state, cached(*pool, j * block_k, None, arrays.pages), None)

        def last(j: Array, state: Softmax) -> Softmax:
            exists = tile.indices(j * block_k, block_k) < filled
            return visit(state, cached(*pool, j * block_k, exists, arrays.pages), exists[None, :])

        begin, end = share(steps.whole, part, used)
        state = lax.fori_loop(begin, jnp.where(is_live, end, begin), inside, state)
        state = over(steps.whole, steps.whole + steps.tail, last, state)
    if arrays.pools.ring_k is not None:
        ring: tuple[Ref, Ref] = arrays.pools.ring_k, arrays.pools.ring_v

        def in_ring(j: Array, state: Softmax) -> Softmax:
            index = tile.indices(j * block_k, block_k)
            k_pos = window.position_at(index, start)
            is_written = k_pos >= 0
            return visit(state, cached(*ring, j * block_k, is_written), is_written[None, :] & sees(k_pos))

        state = over(zero, steps.ring, in_ring, state)

    def own(j: Array, exists: Array | None) -> tuple[Array, Array]:
        at = row, pl.ds(j * block_k, block_k), kv_head, columns
        return tile.load(arrays.k.at[*at], exists, head_dim), tile.load(arrays.v.at[*at], exists, head_dim)

    def at_edge(i: Array, state: Softmax) -> Softmax:
        index = tile.indices(steps.edge(i) * block_k, block_k)
        return visit(state, own(steps.edge(i), index < length), sees(start + index))

    def in_sight(j: Array, state: Softmax) -> Softmax:
        return visit(state, own(j, None), None)

    state = over(steps.inner, steps.diagonal, in_sight, state)
    state = over(zero, steps.edges, at_edge, state)
    values, log_sum = tile.finish(state)
    rows = pl.ds(first_row, block_q)
    tile.store(out_ref.at[part, row, rows, head, columns], values, exists, head_dim)
    tile.store_row(log_ref.at[part, row, head, rows], log_sum, exists)
