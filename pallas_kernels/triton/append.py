"""The token of a decode step, written to the pools in place: all rows, KV heads and types of heads in one launch.

A quantized key or value is transformed, rounded and packed on its way, which takes XLA a kernel each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.append import Places, places
from pallas_kernels.quantized import HUGE, WORD_BITS, Quantized, fit_grid, packed_grid, to_steps
from pallas_kernels.triton import tile
from pallas_kernels.types import Heads, Pools, TokenShards
from pallas_kernels.window import Window


class Arrays(NamedTuple):
    """The kernel's inputs."""

    kv: Float[Array, "B 2 K H"]  # one array, which XLA writes at once
    is_retrieval: Int32[Array, "K"]
    slot: Int32[Array, "K"]
    places: Places
    pools: tile.Present  # written in place, as outputs


def append(
    pools: Pools,
    heads: Heads,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    *,
    start: Int32[Array, "B"],
    active: Bool[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
) -> Pools:
    """See `pallas_kernels.append_token`."""
    stored, to = tile.present(pools), places(pools, start, active, window, shards)
    arrays = Arrays(jnp.stack([k, v], axis=1), heads.is_retrieval.astype(jnp.int32), heads.slot, to, stored)
    grid = k.shape[1], k.shape[0]
    out = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)
    new = tile.Present(*tile.call(append_kernel, out, arrays, grid=grid, warps=4, stages=1, is_in_place=True))
    return pools._replace(**{name: x for name, x in new._asdict().items() if x is not None})


def append_kernel(arrays: Arrays, *pools: tile.Ref) -> None:
    """The key and the value of one KV head, of one row."""
    kv_head, row = pl.program_id(0), pl.program_id(1)
    slot, is_retrieval = arrays.slot[kv_head], arrays.is_retrieval[kv_head] == 1

    def write(pool_k: Any, pool_v: Any, is_of_type: Array, row_of_pool: Array, entry: Array) -> None:
        rows, entries = pool_k.shape[1:3]

        @pl.when(is_of_type & (row_of_pool < rows) & (entry < entries))
        def _() -> None:
            for number, pool in enumerate((pool_k, pool_v)):
                _store(pool, (slot, row_of_pool, entry), arrays.kv, (row, jnp.int32(number), kv_head))

    new, to = tile.Present(*pools), arrays.places
    if new.full_k is not None:
        write(new.full_k, new.full_v, is_retrieval, to.row[row], to.entry[row])
    if new.ring_k is not None:
        write(new.ring_k, new.ring_v, ~is_retrieval, row, to.ring_entry[row])


def _store(pool: Any, to: tuple[Array, ...], x: tile.Ref, at: tuple[Array, ...]) -> None:
    """Store the vector `x[at]` at `pool[to]`."""
    head_dim = x.shape[-1]
    columns = tile.leading(tile.width(head_dim))
    exists = tile.indices(0, tile.width(head_dim)) < head_dim
    numbers = tile.load_row(x.at[*at, columns], exists)
    if not isinstance(pool, Quantized):
        tile.store_row(pool.at[*to, columns], numbers, exists)
        return
    parts = WORD_BITS // pool.bits
    turned = _hadamard(jnp.clip(numbers.astype(jnp.float32), -HUGE, HUGE))
    grouped = turned.reshape(pool.grid.shape[-1], -1)
    scale, offset = fit_grid(grouped.min(1), grouped.max(1), pool.bits, divide=_divide)
    steps = to_steps(grouped, scale[:, None], offset[:, None], pool.bits, divide=_divide, rounded=_rounded)
    integers = steps.astype(jnp.int32).reshape(parts, -1)
    shifts = pool.bits * lax.broadcasted_iota(jnp.int32, integers.shape, 0)
    words = (integers << shifts).sum(0).astype(jnp.uint16)
    plgpu.store(pool.words.at[*to, tile.leading(len(words))], words)
    plgpu.store(pool.grid.at[*to, tile.leading(len(scale))], packed_grid(scale, offset))


def _hadamard(x: Float[Array, "H"]) -> Float[Array, "H"]:
    """See `quantized.hadamard`; the matrix is the Kronecker product of two, which are applied one after the other."""
    inner = 1 << (len(x).bit_length() // 2)
    table = (x * jnp.float32(len(x) ** -0.5)).reshape(-1, inner)
    table = (_signs(inner)[None] * table[:, None, :]).sum(2)
    table = (_signs(len(x) // inner)[:, :, None] * table[None]).sum(1)
    return table.reshape(-1)


def _signs(size: int) -> Float[Array, "n n"]:
    """Sylvester's Hadamard matrix."""
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return (1 - 2 * (lax.population_count(row & column) & 1)).astype(jnp.float32)


def _divide(a: Array, b: Array) -> Array:
    """Float32 quotients as XLA rounds them; Triton's may be off by two units."""
    b = jnp.broadcast_to(b, a.shape)
    return tile.assembly("div.rn.f32 $0, $1, $2;", jnp.divide, a, b)


def _rounded(x: Array) -> Array:
    return tile.assembly("cvt.rni.f32.f32 $0, $1;", jnp.round, x)
