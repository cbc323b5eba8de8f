"""Attention of one new token per row: the keys of a head are split over many programs, whose results are merged.

Retrieval and streaming heads share the launch. The number of programs that a row's keys keep busy follows from its
length, which is read on the device: programs beyond it exit at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import Softmax, empty, merge_splits
from pallas_kernels.quantized import any_quantized, compute_dtype
from pallas_kernels.schedule import Splits, cdiv, div
from pallas_kernels.tiles import DecodeTiles, tiles_for
from pallas_kernels.triton import tile
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
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    itemsize = compute_dtype(q, pools.full_k).itemsize
    tiles: DecodeTiles = tiles_for("decode", head_dim, itemsize, quantized=any_quantized(pools.stored))
    splits = Splits.of(pools, batch * num_kv_heads, tiles)
    held = None if shards is None else shards.held(lengths)
    arrays = Arrays(q, tile.present(pools), heads.is_retrieval.astype(jnp.int32), heads.slot, lengths, held)
    parts = batch, num_kv_heads, splits.programs, num_heads // num_kv_heads
    out = [jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)]
    kernel, grid = partial(decode_kernel, splits=splits), (splits.programs, num_kv_heads, batch)
    found = Partial(*tile.call(kernel, out, arrays, grid=grid, warps=tiles.num_warps, stages=tiles.num_stages))
    merged = merge_splits(found, splits.used(heads, lengths, held)[..., None], axis=2)
    return Partial(merged.out.reshape(q.shape), merged.log_sum.reshape(q.shape[:2]))


def decode_kernel(arrays: Arrays, out_ref: tile.Ref, log_ref: tile.Ref, *, splits: Splits) -> None:
    """One part of the keys of one KV head, for its query heads: `out_ref [B, K, P, G, H]`, `log_ref [B, K, P, G]`."""
    block_k = splits.block_k
    _, num_heads, head_dim = arrays.q.shape
    group, width = num_heads // arrays.slot.shape[0], tile.width(head_dim)
    rows = max(tile.MIN_ROWS, pl.next_power_of_2(group))
    split, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slot, length = arrays.slot[kv_head], arrays.lengths[row]
    is_retrieval = arrays.is_retrieval[kv_head] == 1
    if arrays.held is not None:
        length = jnp.where(is_retrieval, arrays.held[row], length)
    filled = splits.filled(is_retrieval, length)
    per_split = splits.size(filled)
    begin = split * per_split
    end = jnp.minimum(begin + per_split, filled)

    @pl.when(begin < end)
    def compute() -> None:
        columns, index = tile.leading(width), tile.indices(0, rows)
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

        state = empty((rows,), width)
        if arrays.pools.full_k is not None:
            state = over(arrays.pools.full_k, arrays.pools.full_v, is_retrieval, state)
        if arrays.pools.ring_k is not None:
            # A ring fills from its first index and then stays full: every index below its size has a visible token.
            state = over(arrays.pools.ring_k, arrays.pools.ring_v, ~is_retrieval, state)
        values, log_sum = tile.finish(state)
        tile.store(out_ref.at[row, kv_head, split, tile.leading(rows), columns], values, in_group, head_dim)
        tile.store_row(log_ref.at[row, kv_head, split, tile.leading(rows)], log_sum, in_group)
