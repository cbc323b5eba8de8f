"""The arrays of a cache: their shapes and data types, which head has which slot, and writing into them.

Knows neither models nor patterns: sizes and head tables come as numbers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import Heads, Pools, TokenShards, Window
from pallas_kernels.quantized import BITS, Stored, empty, store
from pallas_kernels.window import consecutive

# How keys and values may be stored.
KV_DTYPES = ("float32", "bfloat16", "float16", *BITS)


def pool_dtypes(usual: str, dtype: str | jnp.dtype | None, streaming_dtype: str | jnp.dtype | None) -> tuple[str, str]:
    """Names of the data types of retrieval and streaming heads; `usual`: the model's, for what is left out.

    Raises:
        ValueError: an unknown one.
    """
    retrieval = dtype_name(usual if dtype is None else dtype)
    usual = usual if retrieval in BITS else retrieval
    return retrieval, dtype_name(usual if streaming_dtype is None else streaming_dtype)


def dtype_name(dtype: str | jnp.dtype) -> str:
    """The name of a data type that keys and values may have.

    Raises:
        ValueError: an unknown one.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in KV_DTYPES:
        raise ValueError(f"keys and values are stored as {', '.join(KV_DTYPES)}, not as {name!r}")
    return name


def pool_shapes(
    num_retrieval: int, num_streaming: int, *, batch_size: int, max_length: int, ring: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes `[Pr, B, S, H]` and `[Ps, B, R, H]`."""
    return (num_retrieval, batch_size, max_length, head_dim), (num_streaming, batch_size, ring, head_dim)


def pool_axes() -> tuple[PartitionSpec, PartitionSpec]:
    """Mesh axes along which retrieval and streaming pools are divided: slots, rows, of retrieval heads the tokens."""
    return PartitionSpec("tensor", "data", "sequence"), PartitionSpec("tensor", "data")


def empty_pools(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[str, str], mesh: Mesh | None = None
) -> Pools:
    """Pools that hold nothing, of the shapes and data types of retrieval and streaming heads."""
    pools = []
    for shape, dtype, axes in zip(shapes, dtypes, pool_axes(), strict=True):
        make: Callable[[], Stored] = functools.partial(empty, shape, dtype)
        if mesh is not None:
            make = jax.jit(make, out_shardings=NamedSharding(mesh, axes))
        pools += [make(), make()]
    return Pools(*pools)


def number_slots(is_retrieval: np.ndarray) -> np.ndarray:
    """Slots are numbered within each type, layer by layer."""
    flat = is_retrieval.ravel()
    slot = np.where(flat, flat.cumsum(), (~flat).cumsum()).reshape(is_retrieval.shape) - 1
    return slot.astype(np.int32)


def nbytes(pools: Any) -> int:
    """Bytes of all keys and values, of arrays or of their shapes alone."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pools))


def parts(pools: Pools) -> dict[str, Array]:
    """The arrays that pools are made of, by their names in files."""
    return {
        _file_name(jax.tree_util.keystr(path, simple=True, separator="_")): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(pools)
    }


def _file_name(name: str) -> str:
    return name.replace("full_", "retrieval_").replace("ring_", "streaming_")


def stored_as(pool: Stored) -> str:
    """The name of a pool's data type, as `init` takes it."""
    return pool.dtype.name.replace("uint", "int")


def write_chunk(
    pools: Pools,
    heads: Heads,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None,
) -> Pools:
    """Pools with one layer's keys and values of a chunk from position `start` on, but for padding beyond `lengths`."""
    position = consecutive(start, k.shape[1])
    if pools.full_k.shape[0]:
        slot, row = _retrieval_slots(heads, pools)[:, None, None], _rows(len(start))[None, :, None]
        index = _index(pools, position, position < (start + lengths)[:, None], shards)[None]
        pools = pools._replace(
            full_k=_scatter(pools.full_k, (slot, row, index), k.transpose(2, 0, 1, 3)),
            full_v=_scatter(pools.full_v, (slot, row, index), v.transpose(2, 0, 1, 3)),
        )
    if pools.ring_k.shape[0]:
        # The newest token of each ring index comes from the chunk if the chunk holds it, else it stays.
        newest = window.positions(start + lengths)
        source = newest - start[:, None]
        pools = pools._replace(
            ring_k=_refill(pools.ring_k, heads, source, k),
            ring_v=_refill(pools.ring_v, heads, source, v),
        )
    return pools


def write_token(
    pools: Pools,
    heads: Heads,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    *,
    start: Int32[Array, "B"],
    active: Bool[Array, "B"],
    window: Window,
    shards: TokenShards | None,
) -> Pools:
    """Pools with one layer's key and value of a token at position `start`, for the active rows."""
    row, k, v = _rows(len(start))[None, :], k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    if pools.full_k.shape[0]:
        slot = _retrieval_slots(heads, pools)[:, None]
        index = _index(pools, start, active, shards)[None, :]
        pools = pools._replace(
            full_k=_scatter(pools.full_k, (slot, row, index), k),
            full_v=_scatter(pools.full_v, (slot, row, index), v),
        )
    if pools.ring_k.shape[0]:
        slot = _streaming_slots(heads, pools)[:, None]
        index = window.index(start)
        index = jnp.where(active, index, pools.ring_k.shape[2])[None, :]
        pools = pools._replace(
            ring_k=_scatter(pools.ring_k, (slot, row, index), k),
            ring_v=_scatter(pools.ring_v, (slot, row, index), v),
        )
    return pools


def _rows(batch_size: int) -> Int32[Array, "B"]:
    """Row indices."""
    return jnp.arange(batch_size, dtype=jnp.int32)


def _retrieval_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    """Slots of the retrieval heads; out of bounds, and so never written, for the others."""
    return jnp.where(heads.is_retrieval, heads.slot, pools.full_k.shape[0])


def _streaming_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    """Slots of the streaming heads; out of bounds, and so never written, for the others."""
    return jnp.where(heads.is_retrieval, pools.ring_k.shape[0], heads.slot)


def _index(
    pools: Pools, position: Int32[Array, "*p"], valid: Bool[Array, "*p"], shards: TokenShards | None
) -> Int32[Array, "*p"]:
    """Where tokens lie in a retrieval slot of this device; out of bounds means dropped: padding, other devices'."""
    if shards is not None:
        count = jnp.full_like(position, shards.count)
        valid &= lax.rem(position, count) == shards.index
        position = lax.div(position, count)
    return jnp.where(valid, position, pools.full_k.shape[2])


def _scatter(pool: Stored, index: tuple[Array, Array, Array], new: Float[Array, "*index H"]) -> Stored:
    """Write tokens at (slot, row, position); what is out of bounds is dropped."""
    return jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), pool, store(new, pool))


def _refill(pool: Stored, heads: Heads, source: Int32[Array, "B R"], chunk: Float[Array, "B T K H"]) -> Stored:
    """Rings after a chunk: index r takes chunk token `source[b, r]`, or stays where that is negative."""
    slots = jnp.where(heads.is_retrieval, 0, heads.slot)
    written = jnp.where(heads.is_retrieval, pool.shape[0], heads.slot)
    new = jnp.take_along_axis(chunk, jnp.maximum(source, 0)[:, :, None, None], axis=1).transpose(2, 0, 1, 3)

    def renew(pool: Array, new: Array) -> Array:
        is_new = (source >= 0).reshape(1, *source.shape, *(1,) * (pool.ndim - 3))
        return pool.at[written].set(jnp.where(is_new, new, pool[slots]), mode="drop")

    return jax.tree.map(renew, pool, store(new, pool))


@functools.partial(jax.jit, static_argnames="shards")
def fingerprint(pool: Stored, length: Int32[Array, "B"], shards: TokenShards | None = None) -> UInt32[Array, "B"]:
    """Hash of each row's first `length` keys in the deepest retrieval slot, which depend on all layers before it."""
    if not pool.shape[0]:
        return jnp.zeros(length.shape, jnp.uint32)  # Rings are copied whole: nothing can be stale.
    # Of quantized keys, the words: equal ones of other keys differ in all but a few channels.
    keys = jax.tree.leaves(pool)[0][-1]
    bits = lax.bitcast_convert_type(keys, jnp.dtype(f"uint{8 * keys.dtype.itemsize}")).astype(jnp.uint32)
    # A random odd factor for every position and channel: sums of other keys, or of the same in another order, differ.
    index = jnp.arange(keys.shape[1] * keys.shape[2], dtype=jnp.uint32).reshape(1, *keys.shape[1:])
    factor = (index * jnp.uint32(0x9E3779B1)) ^ (index >> 7) | jnp.uint32(1)
    held = length if shards is None else shards.held(length)
    valid = _rows(keys.shape[1])[None, :] < held[:, None]
    return jnp.where(valid[:, :, None], bits * factor, jnp.uint32(0)).sum((1, 2), dtype=jnp.uint32)
