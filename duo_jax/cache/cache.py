"""KVCache: keys and values in two pools, split by head type. A pure pytree; every method returns a new cache.

Retrieval heads keep `max_length` tokens, streaming heads a ring of `sink_size + recent_size`, whatever the context.
Which head lies in which slot of which pool is data (the head table), so patterns with as many retrieval heads share
one compiled program. Attention itself is in `pallas_kernels`.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, UInt32
from numpy.typing import ArrayLike

from duo_jax.cache import store as saved_cache
from duo_jax.cache.pools import (
    empty_pools,
    fingerprint,
    nbytes,
    pool_axes,
    pool_dtypes,
    pool_shapes,
    write_chunk,
    write_token,
)
from duo_jax.config import ModelConfig
from duo_jax.mesh.balance import balance
from duo_jax.mesh.mesh import MeshSize, constrain, place
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from pallas_kernels import Heads, Pools, TokenShards, Window
from pallas_kernels.quantized import Stored

T = TypeVar("T")

# Positions are int32.
MOST_TOKENS = 2**31 - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pools", "is_retrieval", "slot", "length", "order"],
    meta_fields=["window", "mesh"],
)
@dataclass(frozen=True)
class KVCache:
    """The cache of a batch of sequences. Step functions donate it: the one passed in is gone, go on with the new one.

    On a mesh every device has pools of its own, slots of its own and its own columns of the head table; token p of a
    retrieval head lies on the device `p % sequence` of those that share it, at `p // sequence`. Inside `jax.shard_map`
    a cache is one device's part.

    Attributes:
        pools: keys and values; `full_* [Pr, B, S, H]` and `ring_* [Ps, B, window.size, H]`.
        is_retrieval: head table, True where a KV head lies in the retrieval pool.
        slot: head table, the slot in its pool.
        length: tokens in the cache, per row.
        window: what a streaming head keeps (static).
        mesh: the devices that share the cache (static); None: one has it.
        order: on a mesh, the KV head of each column `C` of all devices' head tables, as `balance` has it.
    """

    pools: Pools
    is_retrieval: Bool[Array, "L K"]
    slot: Int32[Array, "L K"]
    length: Int32[Array, "B"]
    window: Window
    mesh: Mesh | None = None
    order: Int32[Array, "L C"] | None = None

    @classmethod
    def init(
        cls,
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: str | jnp.dtype | None = None,
        streaming_dtype: str | jnp.dtype | None = None,
        memory: int | None = None,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache for `batch_size` sequences of up to `max_length` tokens.

        Args:
            config: the model's.
            pattern: which heads stream; None: every head is a retrieval head.
            batch_size: sequences.
            max_length: tokens of each, at most; where it is left out, as many as `memory` holds.
            dtype: of retrieval heads: float32, bfloat16, float16, int8 or int4; by default the configuration's. int8
                and int4 are asymmetric, one scale and zero for each token of each head (paper section 3.4).
            streaming_dtype: of streaming heads, whose rings are small; by default `dtype`, or the configuration's
                where that is int8 or int4.
            memory: bytes that keys and values may take of each device; `duo_jax.Plan` says what weights and activations
                leave. What does not fit is refused before anything is allocated.
            mesh: devices that share the cache, from `make_mesh`: those that share the model.

        Raises:
            ValueError: a pattern of another model, sizes below 1, an unknown data type, more than `memory` holds, or a
                model or batch that the mesh cannot share.
        """
        size = MeshSize.of(mesh)
        if memory is not None:
            dtypes = {"dtype": dtype, "streaming_dtype": streaming_dtype}
            max_length = _fitting(config, pattern, batch_size, max_length, memory, mesh=size, **dtypes)
        if max_length is None:
            raise ValueError("give max_length, the tokens of a sequence, or memory, the bytes that the cache may take")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        shapes = _shapes(config, pattern, batch_size, max_length, size)
        try:
            pools = empty_pools(shapes, pool_dtypes(config.dtype, dtype, streaming_dtype), mesh)
        except RuntimeError as error:
            wanted = cls.bytes_for(
                config, pattern, batch_size, max_length, dtype=dtype, streaming_dtype=streaming_dtype, mesh=size
            )
            raise ValueError(
                f"a cache of {wanted / 1e9:.1f} GB (batch {batch_size}, {max_length} tokens) does not fit into memory: "
                "ask for fewer tokens or rows, stream more heads, or store them in int8 or int4"
            ) from error
        heads = balance(_table(config, pattern), size.tensor)
        put = (lambda x, *axes: jnp.asarray(x)) if mesh is None else functools.partial(place, mesh)
        return cls(
            pools=pools,
            is_retrieval=put(heads.is_retrieval, None, "tensor"),
            slot=put(heads.slot, None, "tensor"),
            length=put(np.zeros(batch_size, np.int32)),
            window=_window(pattern),
            mesh=mesh,
            order=None if mesh is None else put(heads.order),
        )

    @classmethod
    def shapes(
        cls,
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        max_length: int,
        *,
        dtype: str | jnp.dtype | None = None,
        streaming_dtype: str | jnp.dtype | None = None,
        mesh: Mesh | None = None,
    ) -> Any:
        """What `init` makes, as shapes and where they lie: for compiling, on devices that need not be there."""
        size, shape = MeshSize.of(mesh), jax.ShapeDtypeStruct
        pools = _shapes(config, pattern, batch_size, max_length, size)
        dtypes = pool_dtypes(config.dtype, dtype, streaming_dtype)
        columns = (config.num_layers, size.kv_heads(config))
        cache = cls(
            jax.eval_shape(lambda: empty_pools(pools, dtypes)),
            shape(columns, jnp.bool_),  # type: ignore[arg-type]
            shape(columns, jnp.int32),  # type: ignore[arg-type]
            shape((batch_size,), jnp.int32),  # type: ignore[arg-type]
            _window(pattern),
            mesh,
            None if mesh is None else shape(columns, jnp.int32),  # type: ignore[arg-type]
        )
        if mesh is None:
            return cache
        leaves, structure = jax.tree.flatten(cache)
        places = [NamedSharding(mesh, axes) for axes in cache.axes()]
        placed = [shape(x.shape, x.dtype, sharding=place) for x, place in zip(leaves, places, strict=True)]
        return jax.tree.unflatten(structure, placed)

    @staticmethod
    def bytes_for(
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        max_length: int,
        *,
        dtype: str | jnp.dtype | None = None,
        streaming_dtype: str | jnp.dtype | None = None,
        mesh: MeshSize = MeshSize(),
    ) -> int:
        """Bytes of keys and values that `init` allocates: `2 * row * B * (Pr * S + Ps * (sink + recent))`.

        A row of `H` numbers takes their bytes, and 4 more for scale and zero where they are quantized. On a mesh, of
        each device: its slots, its rows of the batch, and its tokens of a retrieval head.
        """
        retrieval, streaming = _shapes(config, pattern, batch_size, max_length, mesh)
        dtypes = pool_dtypes(config.dtype, dtype, streaming_dtype)
        pools = jax.eval_shape(lambda: empty_pools((retrieval, streaming), dtypes))
        of_retrieval, of_streaming = nbytes(pools.full), nbytes(pools.ring)
        return (of_retrieval // mesh.sequence + of_streaming) // (mesh.tensor * mesh.data)

    @staticmethod
    def length_for(
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        memory: int,
        *,
        dtype: str | jnp.dtype | None = None,
        streaming_dtype: str | jnp.dtype | None = None,
        mesh: MeshSize = MeshSize(),
    ) -> int:
        """The largest `max_length` whose keys and values fit into `memory` bytes; 0: not even one token does.

        On a mesh, into `memory` bytes of each device.
        """
        dtypes = {"dtype": dtype, "streaming_dtype": streaming_dtype}
        # Tokens come in as many as there are devices to share them.
        each = mesh.sequence
        one, two = (KVCache.bytes_for(config, pattern, batch_size, n * each, mesh=mesh, **dtypes) for n in (1, 2))
        if memory < one:
            return 0
        # Streaming heads alone hold any length: positions end where an int32 does.
        return min(MOST_TOKENS, each * (1 + (memory - one) // (two - one))) if two > one else MOST_TOKENS

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return nbytes(self.pools)

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return self.length.shape[0]

    @property
    def max_length(self) -> int:
        """Tokens that each sequence can hold."""
        return self.pools.full_k.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of retrieval heads' keys and values: uint8 and uint4 where they are quantized."""
        return self.pools.full_k.dtype

    @property
    def streaming_dtype(self) -> jnp.dtype:
        """Data type of streaming heads' keys and values."""
        return self.pools.ring_k.dtype

    @property
    def shards(self) -> TokenShards | None:
        """The devices that share the tokens of retrieval heads; None: one has all."""
        count = MeshSize.of(self.mesh).sequence
        return None if count == 1 else TokenShards("sequence", count)

    def axes(self) -> list[PartitionSpec]:
        """The mesh axes along which each array is divided, in the order of `jax.tree.leaves`."""
        retrieval, streaming = (len(jax.tree.leaves(pool)) for pool in (self.pools.full, self.pools.ring))
        of_retrieval, of_streaming = pool_axes()
        table = PartitionSpec(None, "tensor")
        others = [table, table, PartitionSpec("data"), PartitionSpec()][: 3 if self.order is None else 4]
        return [of_retrieval] * retrieval + [of_streaming] * streaming + others

    def heads(self, layer: int) -> Heads:
        """One layer's row of the head table."""
        return Heads(self.is_retrieval[layer], self.slot[layer])

    def append_chunk(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int32[Array, "B"]
    ) -> "KVCache":
        """Write one layer's keys and values of a chunk behind `length`, the padding beyond `lengths` left out.

        `length` stays: a chunk counts as appended with `advance`, once every layer has written it.
        """
        pools = write_chunk(self.pools, self.heads(layer), k, v, start=self.length, lengths=lengths, **self._where)
        return replace(self, pools=pools)

    def append_token(
        self, layer: int, k: Float[Array, "B K H"], v: Float[Array, "B K H"], active: Bool[Array, "B"]
    ) -> "KVCache":
        """Write one layer's key and value of a new token behind `length`, for the active rows."""
        pools = write_token(self.pools, self.heads(layer), k, v, start=self.length, active=active, **self._where)
        return replace(self, pools=pools)

    @property
    def _where(self) -> dict[str, Any]:
        """What decides where a token lies."""
        return {"window": self.window, "shards": self.shards}

    def advance(self, count: Int32[Array, "B"]) -> "KVCache":
        """Count tokens that every layer has written."""
        return replace(self, length=constrain(self.length + count, self.mesh))

    def mark(self) -> "Mark":
        """Remember this point: a copy of rings and lengths only, so that one prefilled text can be asked many times."""
        self.check_alive()
        return Mark(
            ring_k=_copy(self.pools.ring_k),
            ring_v=_copy(self.pools.ring_v),
            length=jnp.copy(self.length),
            is_retrieval=jnp.copy(self.is_retrieval),
            window=self.window,
            fingerprint=self._fingerprint(self.length),
        )

    def rewind(self, mark: "Mark") -> "KVCache":
        """This cache as it was at `mark`, without a copy of the retrieval pool: entries beyond `length` are never read.

        Raises:
            ValueError: a mark of another cache, or one whose tokens were overwritten after an earlier rewind.
        """
        self.check_alive()
        theirs, ours = ((x.window, x.length.shape, x.is_retrieval.shape) for x in (mark, self))
        if theirs != ours or not jnp.array_equal(mark.is_retrieval, self.is_retrieval):
            raise ValueError("this mark is of another cache, with other heads, sizes or rows; take marks of this one")
        found = self._fingerprint(mark.length)
        if not np.array_equal(np.asarray(found), np.asarray(mark.fingerprint)):
            raise ValueError(
                "the tokens of this mark are no longer in the cache: it was rewound to an earlier mark and other "
                "tokens were appended; rewind to marks in the reverse order of taking them, or fork() the cache first"
            )
        rings = {"ring_k": _copy(mark.ring_k), "ring_v": _copy(mark.ring_v)}
        return replace(self, pools=self.pools._replace(**rings), length=jnp.copy(mark.length))

    def fork(self, batch_size: int | None = None) -> "KVCache":
        """A real copy, which lives on when this cache is donated; of a single row, `batch_size` rows like it.

        Raises:
            ValueError: rows asked of a cache that has several, or a donated cache.
        """
        self.check_alive()
        if batch_size is None:
            return _copy(self)
        if self.batch_size != 1 or batch_size < 1 or batch_size % MeshSize.of(self.mesh).data:
            raise ValueError(
                f"a cache of one row becomes one or more, got {batch_size=} of a cache of {self.batch_size} rows"
            )
        pools = jax.tree.map(lambda x: jnp.repeat(x, batch_size, axis=1), self.pools)
        heads = {name: _copy(getattr(self, name)) for name in ("is_retrieval", "slot", "order")}
        return replace(self, pools=pools, length=jnp.repeat(self.length, batch_size), **heads)

    def _fingerprint(self, length: Int32[Array, "B"]) -> UInt32[Array, "B"]:
        """See `fingerprint`; on a mesh, the sum of every device's."""
        pool = self.pools.full_k
        if self.mesh is None:
            return fingerprint(pool, length)
        return _fingerprints(self.mesh, self.shards, pool, length)

    def save(self, path: str | Path, model: Model | None = None, *, tokens: ArrayLike | None = None) -> None:
        """Write the cache to a folder: what is filled of it, with a checksum of every array. Not of one on a mesh.

        The folder appears under its name when everything is on disk. The host's memory must hold one copy.

        Args:
            path: a folder that is not there yet.
            model: the weights that computed it; `load` then refuses others.
            tokens: `[B, T]` token ids in the cache, kept beside it for whoever loads it.

        Raises:
            ValueError: a cache that was donated, holds nothing, or lies on a mesh.
            FileExistsError: the path exists.
        """
        self.check_alive()
        if self.mesh is not None:
            raise ValueError("a cache on a mesh cannot be saved: prefill on one device to save it")
        saved_cache.save(path, vars(self), model, tokens)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Model | None = None,
        *,
        pattern: HeadPattern | None = None,
        dtype: str | jnp.dtype | None = None,
        max_length: int | None = None,
    ) -> "KVCache":
        """Read a cache that `save` wrote; generation goes on as it would have, bit for bit.

        Args:
            path: the folder.
            model: the weights to go on with: they must be those that computed the cache.
            pattern: which heads stream, where the caller minds; by default as saved.
            dtype: data type of retrieval heads, where the caller minds; by default as saved.
            max_length: tokens that each sequence may grow to; by default as saved.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a cache of another model, pattern or data type, one that is incomplete or was altered, or one
                that is longer than `max_length`.
        """
        return cls(**saved_cache.load(path, model, pattern=pattern, dtype=dtype, max_length=max_length))

    @property
    def is_alive(self) -> bool:
        """Whether this cache can still be used: False once it, or a cache that shares its pools, was donated."""
        leaves = [leaf for leaf in jax.tree.leaves(self) if not isinstance(leaf, jax.core.Tracer)]
        return not any(leaf.is_deleted() for leaf in leaves)

    def check_alive(self) -> None:
        """Raise ValueError if this cache was donated."""
        if not self.is_alive:
            raise ValueError(
                "this cache was given to a step function before, which donates it: go on with the cache that was "
                "returned, or fork() it first"
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ring_k", "ring_v", "length", "is_retrieval", "fingerprint"],
    meta_fields=["window"],
)
@dataclass(frozen=True)
class Mark:
    """A point to rewind to. `fingerprint` is a hash of the retrieval keys so far: it tells a stale mark."""

    ring_k: Stored
    ring_v: Stored
    length: Int32[Array, "B"]
    is_retrieval: Bool[Array, "L K"]
    fingerprint: UInt32[Array, "B"]
    window: Window


def _fitting(
    config: ModelConfig,
    pattern: HeadPattern | None,
    batch_size: int,
    max_length: int | None,
    memory: int,
    **options: Any,
) -> int:
    """`max_length` if it fits into `memory` bytes; the largest that does if it is None."""
    most = KVCache.length_for(config, pattern, batch_size, memory, **options)
    if max_length is not None and max_length <= most:
        return max_length
    if max_length is None and most:
        return most
    wanted = KVCache.bytes_for(config, pattern, batch_size, max_length or 1, **options)
    way = f"ask for up to {most} tokens" if most else "give more memory"
    raise ValueError(
        f"a cache of {max_length or 1} tokens (batch {batch_size}) takes {wanted / 1e9:.3f} GB, more than "
        f"memory={memory / 1e9:.3f} GB: {way}, stream more heads, or store them in int8 or int4"
    )


def _copy(tree: T) -> T:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fingerprints(
    mesh: Mesh, shards: TokenShards | None, pool: Stored, length: Int32[Array, "B"]
) -> UInt32[Array, "B"]:
    def one(pool: Stored, length: Int32[Array, "B"]) -> UInt32[Array, "B"]:
        return jax.lax.psum(fingerprint(pool, length, shards), ("tensor", "sequence"))

    divided, rows = jax.tree.map(lambda _: pool_axes()[0], pool), PartitionSpec("data")
    return jax.shard_map(one, mesh=mesh, in_specs=(divided, rows), out_specs=rows, check_vma=False)(pool, length)


def _table(config: ModelConfig, pattern: HeadPattern | None) -> np.ndarray:
    if pattern is None:
        return np.ones((config.num_layers, config.num_kv_heads), bool)
    pattern.check(config)
    return pattern.is_retrieval


def _window(pattern: HeadPattern | None) -> Window:
    return pattern.window if pattern else Window(0, 0)


def _shapes(
    config: ModelConfig, pattern: HeadPattern | None, batch_size: int, max_length: int, mesh: MeshSize
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes `[Pr, B, S, H]` and `[Ps, B, R, H]` of all devices' pools together."""
    mesh.check(config)
    if batch_size % mesh.data:
        raise ValueError(f"{batch_size=} rows cannot be divided among data={mesh.data} devices: take a multiple")
    heads, ring = balance(_table(config, pattern), mesh.tensor), _window(pattern).size
    tokens = -(-max_length // mesh.sequence) * mesh.sequence
    slots = mesh.tensor * heads.retrieval_slots, mesh.tensor * heads.streaming_slots
    return pool_shapes(*slots, batch_size=batch_size, max_length=tokens, ring=ring, head_dim=config.head_dim)
