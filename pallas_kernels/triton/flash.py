"""Flash attention over a chunk and the cache before it, retrieval and streaming heads in one launch.

A program computes one tile of queries of one head. The head's type decides which keys it visits: everything before the
tile, or the sinks and the window. Only tiles at the edges compute masks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import Softmax, empty
from pallas_kernels.pages import in_pool
from pallas_kernels.quantized import compute_dtype
from pallas_kernels.schedule import Run, Seen, Sizes, div, steps_of
from pallas_kernels.segments import over_plain_pools
from pallas_kernels.tiles import FlashTiles, tiles_for
from pallas_kernels.triton import tile
from pallas_kernels.triton.combine import combine
from pallas_kernels.triton.decode import attend_to_slots
from pallas_kernels.triton.tile import Ref
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window
from pallas_kernels.works import Queries, Scope, share


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
    filled: Int32[Array, "B"]
    has_chunk: Int32[Array, "1"] | None  # see `Scope`; None if that is known when the kernel is compiled


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
    tiles = tiles_for("flash", q.shape[-1], compute_dtype(q, k).itemsize, page=pools.page)
    dtype = q.dtype if shards is None else jnp.dtype(jnp.float32)
    attend = partial(flash_attention, window=window, tiles=tiles, dtype=dtype)
    return over_plain_pools(attend, attend_to_slots, q, k, v, pools, heads, start=start, lengths=lengths, shards=shards)


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
    scope: Scope,
    dtype: Any,
) -> Partial:
    """Attention of a chunk, an output of `dtype`; without pools, nothing precedes it."""
    order, count = heads.by_type()
    filled, is_known = scope.filled, isinstance(scope.has_chunk, bool)
    has_chunk = None if is_known else jnp.asarray(scope.has_chunk, jnp.int32)[None]
    capacity, pages = (pools.capacity if pools.full_k.shape[0] else 0, pools.pages) if pools else (0, None)
    queries = Queries.of(q, k.shape[2], tiles.block_q, capacity)
    packed, parts = queries.pack(q), queries.parts(heads)
    counts = order, heads.slot, count[None], parts[None], start, lengths, filled, has_chunk
    arrays = Arrays(packed, k, v, tile.present(pools), pages, *counts)
    out = queries.results(queries.length, q.shape[3], dtype if queries.most_parts == 1 else jnp.float32)
    kernel = partial(flash_kernel, window=window, tiles=tiles, queries=queries, only_pool=scope.has_chunk is False)
    grid = (queries.most_works,)
    found = tile.call(kernel, out, arrays, grid=grid, warps=tiles.num_warps, stages=tiles.num_stages)
    return queries.merged(found, heads, filled, parts, combine, dtype)


def flash_kernel(
    arrays: Arrays,
    out_ref: Ref,
    log_ref: Ref,
    *,
    window: Window,
    tiles: FlashTiles,
    queries: Queries,
    only_pool: bool,
) -> None:
    """One tile of queries over a part of its keys; outputs as in `Queries.results`."""
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
    q_index = div(q_row, queries.packed)
    filled = arrays.filled[row]
    used = queries.used(is_retrieval, filled, parts)
    exists = (q_row < queries.length) & (number < works) & (part < used)
    # A tile of padding visits nothing, and writes zeros; so does a part that is not used, but writes nothing.
    is_live = (first < arrays.lengths[row]) & (number < works) & (part < used)
    q = tile.load(arrays.q.at[row, pl.ds(first_row, block_q), head, columns], exists, head_dim)

    if arrays.pools.full_k is not None:
        # The next slot begins at its capacity.
        capacity = arrays.pools.full_k.shape[2] * (1 if arrays.pages is None else arrays.pages.shape[1])
        filled = jnp.minimum(filled, jnp.int32(capacity))
    has_chunk = not only_pool if arrays.has_chunk is None else arrays.has_chunk[0] != 0
    sizes = Sizes(length, queries.tile_tokens, block_k, window)
    of_row = start, is_retrieval, sizes
    steps = steps_of(first, *of_row, filled=filled, has_chunk=has_chunk)
    begin, end = share(steps.total, part, used)
    end = jnp.where(is_live, end, begin)
    i = tile.indices(0, block_k)

    def keys_and_values(source: str, number: Array, exists: Array | None) -> tuple[Array, Array]:
        begin, pools = number * block_k, arrays.pools
        pairs: dict[str, tuple[Any, Any]] = {
            "own": (arrays.k, arrays.v),
            "full": (pools.full_k, pools.full_v),
            "ring": (pools.ring_k, pools.ring_v),
        }
        if source == "own":
            at: Any = row, pl.ds(begin, block_k), kv_head, columns
        else:
            pages = arrays.pages if source == "full" else None
            index, begin = in_pool(pages, pairs[source][0].shape[2], row, begin)
            at = slot, index, pl.ds(begin, block_k), columns
        k, v = (tile.load(x.at[*at], exists, head_dim) for x in pairs[source])
        return k, v

    def visit(run: Run, step: Array, state: Softmax) -> Softmax:
        number, keep, exists = steps.tile(run, step), None, None
        if run.is_masked:
            seen = Seen.of(run.source, number, *of_row, filled)
            keep = seen.mask(i, q_index, (block_q, block_k))
            tokens: dict[str, Any] = {"own": length - number * block_k, "full": seen.leading, "ring": seen.size}
            exists = i < tokens[run.source]
        return tile.accumulate(state, q, *keys_and_values(run.source, number, exists), keep, head_dim**-0.5)

    state = empty((block_q,), width)
    sources = {"own": not only_pool, "full": arrays.pools.full_k is not None, "ring": arrays.pools.ring_k is not None}
    for run in steps.runs:
        if sources[run.source]:
            first_step, last_step = jnp.maximum(begin, run.begin), jnp.minimum(end, run.end)
            state = lax.fori_loop(first_step, last_step, partial(visit, run), state)
    values, log_sum = tile.finish(state)
    at_out, at_log = queries.places(row, head, part, pl.ds(first_row, block_q))
    tile.store(out_ref.at[*at_out, columns], values, exists, head_dim)
    tile.store_row(log_ref.at[*at_log], log_sum, exists)
