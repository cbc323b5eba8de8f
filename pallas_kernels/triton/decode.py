"""Attention of one new token a row: the keys of a head are split over many programs, whose results are merged.

Retrieval and streaming heads share the launch. How many programs a row's keys keep busy follows from its length, which
is read on the device: programs beyond it exit at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import splits
from pallas_kernels.blocks import LOG2_E, cdiv, div
from pallas_kernels.gpus import DecodeTiles
from pallas_kernels.triton import tile
from pallas_kernels.triton.tile import Softmax
from pallas_kernels.types import Heads, Partial, Pools, TokenShards


class Arrays(NamedTuple):
    """What the kernel reads."""

    q: Float[Array, "B N H"]
    pools: tile.Present
    is_retrieval: Int32[Array, "K"]
    slot: Int32[Array, "K"]
    lengths: Int32[Array, "B"]
    held: Int32[Array, "B"] | None  # where devices share the tokens: how many of a retrieval slot's lie here


def split_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    tiles: DecodeTiles,
    shards: TokenShards | None = None,
) -> Partial:
    """Attention of one token a row over pools that hold it already; with shards, this device's part of it."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    capacities = splits.capacities_of(pools)
    count = splits.num_splits(capacities, batch * num_kv_heads, tiles)
    held = None if shards is None else shards.held(lengths)
    arrays = Arrays(q, tile.present(pools), heads.is_retrieval.astype(jnp.int32), heads.slot, lengths, held)
    parts = batch, num_kv_heads, count, group
    out = [
        jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
    ]
    kernel = partial(decode_kernel, capacities=capacities, count=count, tiles=tiles)
    values, log_total = tile.call(
        kernel, out, arrays, grid=(count, num_kv_heads, batch), warps=tiles.num_warps, stages=tiles.num_stages
    )
    merged, log_total = splits.merge(values, log_total, capacities, heads, lengths, tiles, held)
    return Partial(merged.reshape(q.shape), log_total.reshape(q.shape[:2]) / LOG2_E)


def decode_kernel(
    arrays: Arrays, out_ref: tile.Ref, log_ref: tile.Ref, *, capacities: tuple[int, int], count: int, tiles: DecodeTiles
) -> None:
    """One part of the keys of one KV head, for its query heads: `out_ref [B, K, P, G, H]`, `log_ref [B, K, P, G]`."""
    block_k = tiles.block_k
    _, num_heads, head_dim = arrays.q.shape
    group, width = num_heads // arrays.slot.shape[0], tile.width(head_dim)
    rows = max(tile.MIN_ROWS, pl.next_power_of_2(group))
    split, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slot, length = arrays.slot[kv_head], arrays.lengths[row]
    is_retrieval = arrays.is_retrieval[kv_head] == 1
    if arrays.held is not None:
        length = jnp.where(is_retrieval, arrays.held[row], length)
    size = splits.filled(capacities, is_retrieval, length)
    per_split = splits.split_size(size, count, tiles)
    begin = split * per_split
    end = jnp.minimum(begin + per_split, size)

    @pl.when(begin < end)
    def compute() -> None:
        columns, index = pl.ds(0, width), tile.indices(0, rows)
        in_group = index < group
        q = tile.load(arrays.q.at[row, pl.ds(kv_head * group, rows), columns], in_group, head_dim)

        def over(pool_k, pool_v, runs: Array, state: Softmax) -> Softmax:
            def visit(begin: Array, exists: Array | None, state: Softmax) -> Softmax:
                at = slot, row, begin, block_k, exists, q.dtype
                keys, values = (tile.load_keys(pool, *at) for pool in (pool_k, pool_v))
                keep = None if exists is None else exists[None, :]
                return tile.accumulate(state, q, keys, values, keep, head_dim**-0.5)

            def inside(j: Array, state: Softmax) -> Softmax:
                return visit(begin + j * block_k, None, state)

            def last(j: Array, state: Softmax) -> Softmax:
                first = begin + j * block_k
                return visit(first, tile.indices(first, block_k) < end, state)

            zero = jnp.int32(0)
            whole = jnp.where(runs, div(end - begin, block_k), zero)
            state = lax.fori_loop(zero, whole, inside, state)
            return lax.fori_loop(whole, jnp.where(runs, cdiv(end - begin, block_k), zero), last, state)

        state = tile.empty(rows, width)
        if arrays.pools.full_k is not None:
            state = over(arrays.pools.full_k, arrays.pools.full_v, is_retrieval, state)
        if arrays.pools.ring_k is not None:
            # A ring fills from its first index and then stays full: every index below its size holds a visible token.
            state = over(arrays.pools.ring_k, arrays.pools.ring_v, ~is_retrieval, state)
        values, log_total = tile.finish(state)
        tile.store(out_ref.at[row, kv_head, split, pl.ds(0, rows), columns], values, in_group, head_dim)
        tile.store_row(log_ref.at[row, kv_head, split, pl.ds(0, rows)], log_total, in_group)
