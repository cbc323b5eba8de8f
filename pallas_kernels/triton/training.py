"""The gradients of attention over a sequence's own keys, for training by the flash kernel.

Two kernels (Dao 2023, algorithm 2): a tile of queries collects its gradient over the keys it sees, and a tile of keys
over the queries that see it; no two programs write to one place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.differentiable import NO_WINDOW, Arrays, training_by
from pallas_kernels.merge import LOG2_E
from pallas_kernels.schedule import Sizes, div, last_tile_of_queries, steps_of
from pallas_kernels.tiles import FlashTiles
from pallas_kernels.triton import tile
from pallas_kernels.triton.flash import flash_attention
from pallas_kernels.window import Window


def gradients(arrays: Arrays, window: Window | None, tiles: FlashTiles) -> tuple[Array, Array, Array]:
    """Of queries, keys and values."""
    q, k, v = arrays[:3]
    batch, length, num_heads, _ = q.shape
    settings: dict[str, Any] = {"window": window, "tiles": tiles}
    launch: dict[str, Any] = {"warps": tiles.num_warps, "stages": tiles.num_stages}
    query_tiles, key_tiles = -(-length // tiles.block_q), -(-length // tiles.block_k)
    like = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    grid = (query_tiles, num_heads, batch)
    d_q = tile.call(partial(query_gradient_kernel, **settings), like(q), arrays, grid=grid, **launch)
    grid = (key_tiles, k.shape[2], batch)
    d_k, d_v = tile.call(partial(key_gradient_kernel, **settings), like([k, v]), arrays, grid=grid, **launch)
    return d_q, d_k, d_v


training = training_by(flash_attention, gradients)


def query_gradient_kernel(arrays: Arrays, out_ref, *, window: Window | None, tiles: FlashTiles) -> None:
    """The gradient of one tile of queries of one head."""
    block_q, block_k = tiles.block_q, tiles.block_k
    _, length, num_heads, head_dim = arrays.q.shape
    number, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first = (-(-length // block_q) - 1 - number) * block_q  # late tiles, which see more, first
    queries = _Queries(arrays, row, head, first, block_q)
    kv_head = div(head, num_heads // arrays.k.shape[2])

    def visit(j: Array, d_q: Array) -> Array:
        index = tile.indices(j * block_k, block_k)
        k, v = _keys(arrays, row, kv_head, j * block_k, block_k)
        _, d_scores = queries.gradients(k, v, _seen(queries.index, index, length, window))
        return d_q + tile.dot(d_scores.astype(k.dtype), k)

    zero, sizes = jnp.int32(0), Sizes(length, block_q, block_k, window or NO_WINDOW)
    steps = steps_of(first, zero, jnp.bool_(window is None), sizes)
    d_q = lax.fori_loop(zero, steps.sinks, visit, jnp.zeros((block_q, tile.width(head_dim)), jnp.float32))
    d_q = lax.fori_loop(steps.left, steps.end, visit, d_q)
    tile.store(out_ref.at[row, pl.ds(first, block_q), head, tile.leading(d_q.shape[1])], d_q, queries.exists, head_dim)


def key_gradient_kernel(arrays: Arrays, d_k_ref, d_v_ref, *, window: Window | None, tiles: FlashTiles) -> None:
    """The gradients of one tile of keys and values of one KV head, from all query heads of its group."""
    block_q, block_k = tiles.block_q, tiles.block_k
    _, length, num_heads, head_dim = arrays.q.shape
    number, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group, first = num_heads // arrays.k.shape[2], number * block_k  # early tiles, which more queries see, first
    index = tile.indices(first, block_k)
    k, v = _keys(arrays, row, kv_head, first, block_k)
    sizes = Sizes(length, block_q, block_k, window or NO_WINDOW)
    end = last_tile_of_queries(first, jnp.bool_(window is None), sizes)

    def one_head(g: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        def visit(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            queries = _Queries(arrays, row, kv_head * group + g, i * block_q, block_q)
            weights, d_scores = queries.gradients(k, v, _seen(queries.index, index, length, window))
            d_k = totals[0] + tile.t_dot(d_scores.astype(k.dtype), queries.q)
            return d_k, totals[1] + tile.t_dot(weights.astype(k.dtype), queries.grad)

        return lax.fori_loop(div(first, block_q), end, visit, totals)

    zeros = jnp.zeros((block_k, tile.width(head_dim)), jnp.float32)
    totals = lax.fori_loop(jnp.int32(0), jnp.int32(group), one_head, (zeros, zeros))
    for ref, value in zip((d_k_ref, d_v_ref), totals, strict=True):
        tile.store(
            ref.at[row, pl.ds(first, block_k), kv_head, tile.leading(k.shape[1])], value, index < length, head_dim
        )


class _Queries:
    """One tile of queries of one head, with what their gradients need."""

    def __init__(self, arrays: Arrays, row: Array, head: Array, first: Array, count: int) -> None:
        _, length, _, self.head_dim = arrays.q.shape
        rows, columns = pl.ds(first, count), tile.leading(tile.width(self.head_dim))
        self.index = tile.indices(first, count)
        self.exists = self.index < length
        self.q, self.grad = (
            tile.load(ref.at[row, rows, head, columns], self.exists, self.head_dim) for ref in (arrays.q, arrays.grad)
        )
        self.log_sum, self.delta = (
            tile.load_row(ref.at[row, head, rows], self.exists) for ref in (arrays.log_sum, arrays.delta)
        )

    def gradients(self, k: Array, v: Array, keep: Array) -> tuple[Array, Array]:
        """Weights and the gradient of the scores, `[Q, S]`."""
        scale = self.head_dim**-0.5
        scores, log_sum = tile.dot_t(self.q, k), self.log_sum * jnp.float32(-LOG2_E)
        weights = jnp.where(keep, tile.exp2(tile.fma(scores, scale * LOG2_E, log_sum[:, None])), 0.0)
        d_weights = tile.dot_t(self.grad, v)
        return weights, weights * (d_weights - self.delta[:, None]) * jnp.float32(scale)


def _keys(arrays: Arrays, row: Array, kv_head: Array, first: Array, count: int) -> tuple[Array, Array]:
    _, length, _, head_dim = arrays.k.shape
    exists = tile.indices(first, count) < length
    at = row, pl.ds(first, count), kv_head, tile.leading(tile.width(head_dim))
    return tile.load(arrays.k.at[*at], exists, head_dim), tile.load(arrays.v.at[*at], exists, head_dim)


def _seen(q_index: Array, k_index: Array, length: int, window: Window | None) -> Array:
    """Which keys `[Q, S]` each query sees."""
    q, k = q_index[:, None], k_index[None, :]
    exists = (q < length) & (k < length)
    if window is None:
        return exists & (k <= q)
    return exists & window.visible(q, k)
