"""How a decode kernel spreads the keys of a head over programs, and makes one softmax out of theirs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import MASKED, cdiv
from pallas_kernels.gpus import DecodeTiles
from pallas_kernels.types import Heads, Pools


def capacities_of(pools: Pools) -> tuple[int, int]:
    """Tokens that a slot of either pool has room for; 0 for a pool without slots."""
    retrieval, streaming = pools.full_k, pools.ring_k
    return (retrieval.shape[2] if retrieval.shape[0] else 0), (streaming.shape[2] if streaming.shape[0] else 0)


def num_splits(capacities: tuple[int, int], programs: int, tiles: DecodeTiles) -> int:
    """Programs for each head of each row, of which there are `programs`; how many have work is seen on the device."""
    return min(-(-max(capacities) // tiles.min_split), max(1, tiles.max_programs // programs))


def filled(capacities: tuple[int, int], is_retrieval: Array, length: Array) -> Array:
    """Tokens that a head's slot holds; never more than it has room for, which would be another slot's."""
    return jnp.minimum(length, jnp.where(is_retrieval, jnp.int32(capacities[0]), jnp.int32(capacities[1])))


def split_size(size: Array, splits: int, tiles: DecodeTiles) -> Array:
    """Keys of each program: an even share in whole tiles, but enough to be worth it."""
    return jnp.maximum(cdiv(cdiv(size, splits), tiles.block_k) * tiles.block_k, jnp.int32(tiles.min_split))


def merge(
    values: Float[Array, "B K P G H"],
    log_total: Float[Array, "B K P G"],
    capacities: tuple[int, int],
    heads: Heads,
    lengths: Int32[Array, "B"],
    tiles: DecodeTiles,
    held: Int32[Array, "B"] | None = None,
) -> tuple[Float[Array, "B K G H"], Float[Array, "B K G"]]:
    """One softmax out of those over parts of the keys; what programs without a key left may be anything.

    `log_total` is the logarithm of the sum of a part's weights, to the base of two; so is what is returned beside the
    values. `held`: tokens of a retrieval slot, where they are not `lengths`.
    """
    parts, is_retrieval = values.shape[2], heads.is_retrieval[None, :]
    length = lengths[:, None]
    if held is not None:
        length = jnp.where(is_retrieval, held[:, None], length)
    size = filled(capacities, is_retrieval, length)
    begin = jnp.arange(parts, dtype=jnp.int32)[None, None, :] * split_size(size, parts, tiles)[:, :, None]
    used = begin < size[:, :, None]
    log_total = jnp.where(used[..., None], log_total, MASKED)
    most = log_total.max(axis=2, keepdims=True)
    weights = jnp.exp2(log_total - most)
    total = weights.sum(axis=2, keepdims=True)
    weights = weights / total
    merged = (jnp.where(used[..., None, None], values, 0.0) * weights[..., None]).sum(axis=2)
    return merged, (most + jnp.log2(total))[:, :, 0]
