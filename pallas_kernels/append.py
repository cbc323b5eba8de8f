"""Where the token of a decode step belongs in the pools, and its write by XLA. Knows no kernel.

A kernel writes to the same places (`triton/append.py`), which are computed here, once for all layers of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.quantized import Stored, store
from pallas_kernels.types import Heads, Pools, TokenShards
from pallas_kernels.window import Window


class Places(NamedTuple):
    """The indices of each row's token in a slot of either pool; those of a token that is not written are too large."""

    row: Int32[Array, "B"]  # of the full pool: the row, or the page if it is paged
    entry: Int32[Array, "B"]
    ring_entry: Int32[Array, "B"]


def places(
    pools: Pools,
    start: Int32[Array, "B"],
    active: Bool[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
) -> Places:
    """Where the active rows' tokens at position `start` belong."""
    row, entry = full_entries(pools, _rows(start), start, active, shards)
    return Places(row, entry, jnp.where(active, window.index(start), pools.ring_k.shape[2]))


def scatter(
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
    """See `pallas_kernels.append_token`: by XLA's scatters, on any device."""
    k, v, to = k.transpose(1, 0, 2), v.transpose(1, 0, 2), places(pools, start, active, window, shards)
    if pools.full_k.shape[0]:
        index = full_slots(heads, pools)[:, None], to.row[None], to.entry[None]
        pools = pools._replace(full_k=put(pools.full_k, index, k), full_v=put(pools.full_v, index, v))
    if pools.ring_k.shape[0]:
        slots = jnp.where(heads.is_retrieval, pools.ring_k.shape[0], heads.slot)
        index = slots[:, None], _rows(start)[None], to.ring_entry[None]
        pools = pools._replace(ring_k=put(pools.ring_k, index, k), ring_v=put(pools.ring_v, index, v))
    return pools


def full_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    """Slots of the retrieval heads; out of bounds, and so never written, for the others."""
    return jnp.where(heads.is_retrieval, heads.slot, pools.full_k.shape[0])


def full_entries(
    pools: Pools,
    row: Int32[Array, "*r"],
    position: Int32[Array, "*p"],
    valid: Bool[Array, "*p"],
    shards: TokenShards | None,
) -> tuple[Int32[Array, "..."], Int32[Array, "*p"]]:
    """The two indices of tokens in a full slot: row and position, or page and offset if it is paged.

    Tokens that are not written, padding, those of other devices and those without a page, get an index that is out of
    bounds.
    """
    if shards is not None:
        count = jnp.full_like(position, shards.count)
        valid &= lax.rem(position, count) == shards.index
        position = lax.div(position, count)
    if pools.pages is None:
        return row, jnp.where(valid, position, pools.full_k.shape[2])
    size = jnp.full_like(position, pools.full_k.shape[2])
    number = lax.div(position, size)
    page = pools.pages[row, jnp.minimum(number, pools.pages.shape[1] - 1)]
    is_written = valid & (number < pools.pages.shape[1]) & (page >= 0)
    return jnp.where(is_written, page, pools.full_k.shape[1]), lax.rem(position, size)


def put(pool: Stored, index: tuple[Array, Array, Array], new: Float[Array, "*index H"]) -> Stored:
    """Write tokens; an index that is out of bounds is dropped."""
    return jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), pool, store(new, pool))


def _rows(start: Int32[Array, "B"]) -> Int32[Array, "B"]:
    """Row indices."""
    return jnp.arange(start.shape[0], dtype=jnp.int32)
