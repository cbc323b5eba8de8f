"""Attention of one new token per row: the keys of a head are split over many programs, whose results are merged.

Retrieval and streaming heads share the launch. Which parts of which rows a program attends to follows from the rows'
lengths, which are read on the device (`Splits`). A second launch merges the parts.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import LN_2, LOG2_E, MASKED, Softmax, weigh
from pallas_kernels.pages import in_pool
from pallas_kernels.quantized import Quantized, any_quantized, compute_dtype
from pallas_kernels.schedule import Splits, cdiv, div, row_of
from pallas_kernels.tiles import LEAST_ROWS, MOST_ROWS, DecodeTiles, tiles_for
from pallas_kernels.triton import tile
from pallas_kernels.triton.combine import combine
from pallas_kernels.triton.packed import Packed, Unpacked
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window


class Arrays(NamedTuple):
    """The kernel's inputs."""

    q: Float[Array, "B N H"]
    pools: tile.Present
    is_retrieval: Int32[Array, "K"]
    slot: Int32[Array, "K"]
    lengths: Int32[Array, "B"]
    held: Int32[Array, "B"] | None  # of several shards: tokens of a retrieval slot that are stored here
    ends: Int32[Array, "2 B"]  # see `Splits.ends`
    pages: Int32[Array, "B n"] | None  # of the full pool, if it is paged


def decode(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention`; of several shards, each attends to the tokens that it stores."""
    del window  # A ring stores nothing but visible tokens.
    batch, _, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    itemsize = compute_dtype(q, pools.full_k).itemsize
    quantized = any_quantized(pools.stored)
    tiles: DecodeTiles = tiles_for("decode", head_dim, itemsize, quantized=quantized, page=pools.page)
    splits = Splits.of(pools, batch, num_kv_heads, tiles)
    held = None if shards is None else shards.held(lengths)
    is_retrieval, ends = heads.is_retrieval.astype(jnp.int32), splits.ends(lengths, held)
    arrays = Arrays(q, tile.present(pools), is_retrieval, heads.slot, lengths, held, ends, pools.pages)
    # What is merged or transformed further stays in float32.
    is_last = shards is None and not quantized
    return _over_parts(arrays, splits, tiles, q.dtype if is_last else jnp.dtype(jnp.float32))


def attend_to_slots(q: Float[Array, "B T N H"], pools: Pools, heads: Heads, *, filled: Int32[Array, "B"]) -> Partial:
    """Attention of a short chunk to all of the first `filled` tokens in quantized slots of retrieval heads, in float32.

    The queries of a chunk that share a KV head are to decode as the query heads of a token: each sees all keys.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    count = -(-length * group // MOST_ROWS)
    size = -(-length * group // count)  # queries of a tile
    turned = q.reshape(batch, length, num_kv_heads, group, head_dim).swapaxes(1, 2)
    turned = turned.reshape(batch, num_kv_heads, length * group, head_dim)
    padded = jnp.pad(turned, ((0, 0), (0, 0), (0, count * size - length * group), (0, 0)))
    none = jnp.zeros((0, batch, 1, head_dim), q.dtype)
    slots = pools._replace(ring_k=none, ring_v=none)
    tiles: DecodeTiles = tiles_for("short", head_dim, q.dtype.itemsize, quantized=True, page=pools.page)
    tiles = replace(tiles, max_programs=tiles.max_programs * num_kv_heads)
    splits = Splits.of(slots, batch, num_kv_heads * count, tiles)
    is_retrieval, slot = (
        jnp.repeat(x, count, total_repeat_length=num_kv_heads * count)
        for x in (heads.is_retrieval.astype(jnp.int32), heads.slot)
    )
    queries = padded.reshape(batch, num_kv_heads * count * size, head_dim)
    arrays = Arrays(queries, tile.present(slots), is_retrieval, slot, filled, None, splits.ends(filled), slots.pages)
    found = _over_parts(arrays, splits, tiles, jnp.dtype(jnp.float32), is_tall=True)

    def unpadded(x: Array) -> Array:
        """`[B, K * count * size, ...]` as `[B, T, N, ...]`."""
        x = x.reshape(batch, num_kv_heads, count * size, *x.shape[2:])[:, :, : length * group]
        x = x.reshape(batch, num_kv_heads, length, group, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, length, num_heads, *x.shape[4:])

    return Partial(*map(unpadded, found))


def _over_parts(arrays: Arrays, splits: Splits, tiles: DecodeTiles, dtype: Any, *, is_tall: bool = False) -> Partial:
    """The parts of each row, and their merge: an output of `dtype`."""
    batch, num_heads, head_dim = arrays.q.shape
    num_kv_heads = len(arrays.slot)
    parts = batch, num_kv_heads, splits.parts, num_heads // num_kv_heads
    out = [jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    kernel, grid = partial(decode_kernel, splits=splits, is_tall=is_tall), (splits.programs, num_kv_heads)
    found = Partial(*tile.call(kernel, out, arrays, grid=grid, warps=tiles.num_warps, stages=tiles.num_stages))
    merged = combine(found, arrays.is_retrieval, arrays.ends, (batch, 1, num_heads), dtype)
    return Partial(*(x[:, 0] for x in merged))


def decode_kernel(arrays: Arrays, out_ref: tile.Ref, log_ref: tile.Ref, *, splits: Splits, is_tall: bool) -> None:
    """Some parts of the keys of one KV head, for its query heads: `out_ref [B, K, P, G, H]`, `log_ref [B, K, P, G]`.

    With many query heads, `is_tall`, quantized tiles are unpacked; a tile has at least `LEAST_ROWS` then.
    """
    program, kv_head = pl.program_id(0), pl.program_id(1)
    batch, kind = arrays.q.shape[0], arrays.is_retrieval[kv_head]

    def one_part(turn: Array, _: None) -> None:
        row, part = row_of(program + turn * splits.programs, lambda b: arrays.ends[kind, b], batch)
        _attend(arrays, out_ref, log_ref, splits, is_tall, (row, kv_head, part))

    count = cdiv(jnp.maximum(arrays.ends[kind, jnp.int32(batch - 1)] - program, 0), splits.programs)
    lax.fori_loop(jnp.int32(0), count, one_part, None)


def _attend(
    arrays: Arrays, out_ref: tile.Ref, log_ref: tile.Ref, splits: Splits, is_tall: bool, place: tuple[Array, ...]
) -> None:
    """One part of the keys: of a row, of a KV head, and its number."""
    row, kv_head, part = place
    block_k = splits.block_k
    _, num_heads, head_dim = arrays.q.shape
    group = num_heads // arrays.slot.shape[0]
    rows = max(LEAST_ROWS if is_tall else tile.MIN_ROWS, pl.next_power_of_2(group))
    slot, length = arrays.slot[kv_head], arrays.lengths[row]
    is_retrieval = arrays.is_retrieval[kv_head] == 1
    if arrays.held is not None:
        length = jnp.where(is_retrieval, arrays.held[row], length)
    filled = splits.filled(is_retrieval, length)
    begin = part * splits.size(filled)
    end = jnp.minimum(begin + splits.size(filled), filled)

    def attend(pool_k: Any, pool_v: Any, pages: Any = None) -> None:
        in_group = tile.indices(0, rows) < group
        kind = (Unpacked if is_tall else Packed) if isinstance(pool_k, Quantized) else Plain
        source = kind(arrays.q, (row, pl.ds(kv_head * group, rows)), in_group, pool_k, pool_v)

        def visit(begin: Array, exists: Array | None, state: Softmax) -> Softmax:
            index, first = in_pool(pages, pool_k.shape[2], row, begin)
            at = slot, index, pl.ds(first, block_k)
            scores = source.scores(at, exists)
            if exists is not None:
                scores = jnp.where(exists[None, :], scores, MASKED)
            scale = head_dim**-0.5 * LOG2_E
            # Of few queries, each warp has other keys: sums over warps take exchanges, and are made in the end.
            add_up = None if is_tall else jnp.asarray
            weights, decay, maximum, total = weigh(
                state.maximum, state.total, scores, tile.exp2, scale, add_up, tile.fma
            )
            return Softmax(source.add(state.values, weights, decay, at, exists), maximum, total)

        def inside(j: Array, state: Softmax) -> Softmax:
            return visit(begin + j * block_k, None, state)

        def last(j: Array, state: Softmax) -> Softmax:
            first = begin + j * block_k
            return visit(first, tile.indices(first, block_k) < end, state)

        whole = div(end - begin, block_k)
        zeros = jnp.zeros((rows,), jnp.float32)
        sums = zeros if is_tall else jnp.zeros((rows, block_k), jnp.float32)
        state = Softmax(source.empty(rows, block_k), zeros + MASKED, sums)
        state = lax.fori_loop(jnp.int32(0), whole, inside, state)
        state = lax.fori_loop(whole, cdiv(end - begin, block_k), last, state)
        total = state.total if is_tall else state.total.sum(1)
        to = *place, tile.leading(rows)
        for first, count, values in source.columns(state.values):
            columns = pl.ds(jnp.int32(first), values.shape[1])
            tile.store(out_ref.at[*to, columns], values / total[:, None], in_group, count)
        log_sum = (state.maximum + jnp.log2(total)) * jnp.float32(LN_2)
        tile.store_row(log_ref.at[*to], log_sum, in_group)

    if arrays.pools.full_k is not None:
        pl.when(is_retrieval)(lambda: attend(arrays.pools.full_k, arrays.pools.full_v, arrays.pages))
    if arrays.pools.ring_k is not None:
        # A ring fills from its first index and then stays full: every index below its size has a visible token.
        pl.when(~is_retrieval)(lambda: attend(arrays.pools.ring_k, arrays.pools.ring_v))


class Plain:
    """Attention of some queries of a KV head to tiles of keys and values that are numbers."""

    def __init__(self, q: tile.Ref, heads: tuple[Any, ...], in_group: Array, k: tile.Ref, v: tile.Ref) -> None:
        """Read the queries, `[M]` of which are `in_group`."""
        self.k, self.v, self.head_dim = k, v, q.shape[-1]
        self.dtype, self.all = compute_dtype(q, k), tile.leading(tile.width(self.head_dim))
        self.q = tile.load(q.at[*heads, self.all], in_group, self.head_dim).astype(self.dtype)

    def scores(self, at: tuple[Any, ...], exists: Array | None) -> Array:
        """Scores `[M, S]` of some rows of keys."""
        return tile.dot_t(self.q, tile.load(self.k.at[*at, self.all], exists, self.head_dim).astype(self.dtype))

    def empty(self, rows: int, keys: int) -> Array:
        """Sums of no value yet."""
        del keys
        return jnp.zeros((rows, tile.width(self.head_dim)), jnp.float32)

    def add(self, sums: Array, weights: Array, decay: Array, at: tuple[Any, ...], exists: Array | None) -> Array:
        """Add some rows of values times `weights [M, S]`; earlier sums are multiplied by `decay [M]`."""
        values = tile.load(self.v.at[*at, self.all], exists, self.head_dim).astype(self.dtype)
        return sums * decay[:, None] + tile.dot(weights.astype(self.dtype), values)

    def columns(self, sums: Array) -> Iterator[tuple[int, int, Array]]:
        """The sum of all values: first channel, number of channels, and at least as many columns."""
        yield 0, self.head_dim, sums
