"""Training: attention over a sequence's own keys by the flash kernel, with a backward pass of its own.

The backward pass computes the weights again from the logarithm of their sum. It has two kernels (Dao 2023, algorithm
2): a tile of queries collects its gradient over the keys it sees, and a tile of keys over the queries that see it; no
two programs write to one place.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.merge import LOG2_E
from pallas_kernels.schedule import Sizes, cdiv, div, steps_of
from pallas_kernels.tiles import FlashTiles, tiles_for
from pallas_kernels.triton import tile
from pallas_kernels.triton.flash import flash_attention
from pallas_kernels.types import Heads
from pallas_kernels.window import Window
from pallas_kernels.works import Scope

# For retrieval heads, which look at no window.
NO_WINDOW = Window(0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def training(q, k, v, window):
    """Causal attention: over all earlier tokens if `window` is None, else over the tokens that it shows."""
    return _forward(q, k, v, window)[0]


def _forward(q, k, v, window):
    batch, length, _, head_dim = q.shape
    num_kv_heads = k.shape[2]
    heads = Heads(jnp.full((num_kv_heads,), window is None), jnp.zeros((num_kv_heads,), jnp.int32))
    start = jnp.zeros((batch,), jnp.int32)
    settings: dict[str, Any] = {"window": window or NO_WINDOW, "tiles": tiles_for("flash", head_dim, q.dtype.itemsize)}
    settings |= {"start": start, "lengths": start + length, "scope": Scope(start), "dtype": q.dtype}
    part = flash_attention(q, k, v, None, heads, **settings)
    return part, (q, k, v, part)


def _backward(window, residuals, gradient):
    q, k, v, (out, log_sum) = residuals
    grad, log_grad = gradient
    tiles: FlashTiles = tiles_for("backward", q.shape[3], q.dtype.itemsize)
    # Float32: the kernels subtract two nearly equal sums.
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1) - log_grad
    arrays = Arrays(q, k, v, grad, log_sum.swapaxes(1, 2), delta.swapaxes(1, 2))
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


training.defvjp(_forward, _backward)


class Arrays(NamedTuple):
    """The inputs of the backward kernels."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    grad: Float[Array, "B T N H"]  # of the output
    log_sum: Float[Array, "B N T"]  # natural logarithm of the sum of each query's weights
    delta: Float[Array, "B N T"]  # sum over H of the output times its gradient, less the gradient of `log_sum`


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
    end = jnp.int32(-(-length // block_q))
    if window is not None:
        reach = cdiv(jnp.minimum(first + (block_k - 1 + window.recent), length), block_q)
        end = jnp.where(first < window.sink, end, reach)

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
