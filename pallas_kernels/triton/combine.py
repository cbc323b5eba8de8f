"""The merge of results over parts of the keys, in one launch: it reads only parts that have keys."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels.merge import MASKED
from pallas_kernels.schedule import cdiv, div, rem
from pallas_kernels.triton import tile
from pallas_kernels.types import Partial

# Parts that are read at a time.
BLOCK = 16


class Arrays(NamedTuple):
    """The kernel's inputs."""

    parts: Partial  # `[B, K, P, R, H]` and `[B, K, P, R]`; only those that have keys were written
    is_retrieval: Int32[Array, "K"]
    ends: Int32[Array, "2 B"]  # see `schedule.Splits.ends`


def combine(
    parts: Partial,
    is_retrieval: Int32[Array, "K"],
    ends: Int32[Array, "2 B"],
    shape: tuple[int, int, int],
    dtype: Any,
) -> Partial:
    """See `merge.combine`."""
    out = [jax.ShapeDtypeStruct((*shape, parts.out.shape[4]), dtype), jax.ShapeDtypeStruct(shape, jnp.float32)]
    arrays = Arrays(parts, is_retrieval, ends)
    return Partial(*tile.call(partial(combine_kernel, block=BLOCK), out, arrays, grid=shape[::-1], warps=4, stages=1))


def combine_kernel(arrays: Arrays, out_ref: tile.Ref, log_ref: tile.Ref, *, block: int) -> None:
    """One query head of one token (Dao 2023, section 3.1): of `out_ref [B, T, N, H]`, and of `log_ref [B, T, N]`."""
    _, num_kv_heads, most, _, head_dim = arrays.parts.out.shape
    group = out_ref.shape[2] // num_kv_heads
    head, token, row = (pl.program_id(axis) for axis in range(3))
    kv_head = div(head, group)
    query = token * group + rem(head, group)
    kind = arrays.is_retrieval[kv_head]
    before = jnp.where(row > 0, arrays.ends[kind, jnp.maximum(row - 1, 0)], 0)
    count = arrays.ends[kind, row] - before
    at, columns = (row, kv_head), tile.leading(tile.width(head_dim))

    def logs(first: Any, number: int) -> tuple[Array, Array]:
        exists = tile.indices(first, number) < count
        found = tile.load_row(arrays.parts.log_sum.at[*at, pl.ds(jnp.int32(first), number), query], exists)
        return jnp.where(exists, found, jnp.float32(MASKED)), exists

    log_sums, _ = logs(0, pl.next_power_of_2(most))
    maximum = log_sums.max()
    # A row without a key has the weight of no part.
    total = jnp.maximum(jnp.where(log_sums > MASKED, jnp.exp(log_sums - maximum), 0.0).sum(), 1e-30)

    def add(i: Array, values: Array) -> Array:
        found, exists = logs(i * block, block)
        weights = jnp.where(exists, jnp.exp(found - maximum), 0.0)
        ref = arrays.parts.out.at[*at, pl.ds(i * block, block), query, columns]
        return values + (tile.load(ref, exists, head_dim).astype(jnp.float32) * weights[:, None]).sum(0)

    values = jnp.zeros((tile.width(head_dim),), jnp.float32)
    values = lax.fori_loop(jnp.int32(0), cdiv(count, block), add, values)
    exists = tile.indices(0, len(values)) < head_dim
    tile.store_row(out_ref.at[row, token, head, columns], values / total, exists)
    log_ref[row, token, head] = maximum + jnp.log(total)
