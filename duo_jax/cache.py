"""KVCache: keys and values in two pools, split by head type. A pure pytree; every method returns a new cache.

Retrieval heads keep `max_length` tokens, streaming heads a ring of `sink_size + recent_size`, whatever the context.
Which head lies in which slot of which pool is data (the head table), so patterns with as many retrieval heads share
one compiled program. Attention itself is in `pallas_kernels`.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32
from numpy.typing import ArrayLike

from duo_jax import saved
from duo_jax.config import ModelConfig
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from pallas_kernels import Heads, Pools
from pallas_kernels.positions import consecutive, ring_index, ring_positions
from pallas_kernels.quantized import BITS, Stored, empty, store

T = TypeVar("T")

# Positions are int32.
MOST_TOKENS = 2**31 - 1

# How keys and values may be stored.
KV_DTYPES = ("float32", "bfloat16", "float16", *BITS)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pools", "is_retrieval", "slot", "length"],
    meta_fields=["sink_size", "recent_size"],
)
@dataclass(frozen=True)
class KVCache:
    """The cache of a batch of sequences. Step functions donate it: the one passed in is gone, go on with the new one.

    Attributes:
        pools: keys and values; `retrieval_* [Pr, B, S, H]` and `streaming_* [Ps, B, sink + recent, H]`.
        is_retrieval: head table, True where a KV head lies in the retrieval pool.
        slot: head table, the slot in its pool.
        length: tokens in the cache, per row.
        sink_size: first tokens that a streaming head keeps (static).
        recent_size: most recent tokens that a streaming head keeps (static).
    """

    pools: Pools
    is_retrieval: Bool[Array, "L K"]
    slot: Int32[Array, "L K"]
    length: Int32[Array, "B"]
    sink_size: int
    recent_size: int

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
            memory: bytes that keys and values may take; `duo_jax.Plan` says what weights and activations leave. What
                does not fit is refused before anything is allocated.

        Raises:
            ValueError: a pattern of another model, sizes below 1, an unknown data type, or more than `memory` holds.
        """
        if memory is not None:
            max_length = _fitting(
                config, pattern, batch_size, max_length, memory, dtype=dtype, streaming_dtype=streaming_dtype
            )
        if max_length is None:
            raise ValueError("give max_length, the tokens of a sequence, or memory, the bytes that the cache may take")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        is_retrieval = _table(config, pattern)
        sink_size, recent_size = (pattern.sink_size, pattern.recent_size) if pattern else (0, 0)
        shapes = _pool_shapes(is_retrieval, sink_size + recent_size, batch_size, max_length, config)
        dtypes = pool_dtypes(config, dtype, streaming_dtype)
        try:
            pools = _empty_pools(shapes, dtypes)
        except RuntimeError as error:
            wanted = cls.bytes_for(
                config, pattern, batch_size, max_length, dtype=dtype, streaming_dtype=streaming_dtype
            )
            raise ValueError(
                f"a cache of {wanted / 1e9:.1f} GB (batch {batch_size}, {max_length} tokens) does not fit into memory: "
                "ask for fewer tokens or rows, stream more heads, or store them in int8 or int4"
            ) from error
        return cls(
            pools=pools,
            is_retrieval=jnp.asarray(is_retrieval),
            slot=jnp.asarray(_slots(is_retrieval)),
            length=jnp.zeros((batch_size,), jnp.int32),
            sink_size=int(sink_size),
            recent_size=int(recent_size),
        )

    @staticmethod
    def bytes_for(
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        max_length: int,
        *,
        dtype: str | jnp.dtype | None = None,
        streaming_dtype: str | jnp.dtype | None = None,
    ) -> int:
        """Bytes of keys and values that `init` allocates: `2 * row * B * (Pr * S + Ps * (sink + recent))`.

        A row of `H` numbers takes their bytes, and 4 more for scale and zero where they are quantized.
        """
        ring = pattern.sink_size + pattern.recent_size if pattern else 0
        shapes = _pool_shapes(_table(config, pattern), ring, batch_size, max_length, config)
        dtypes = pool_dtypes(config, dtype, streaming_dtype)
        return _nbytes(jax.eval_shape(lambda: _empty_pools(shapes, dtypes)))

    @staticmethod
    def length_for(
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        memory: int,
        *,
        dtype: str | jnp.dtype | None = None,
        streaming_dtype: str | jnp.dtype | None = None,
    ) -> int:
        """The largest `max_length` whose keys and values fit into `memory` bytes; 0: not even one token does."""
        one, two = (
            KVCache.bytes_for(config, pattern, batch_size, n, dtype=dtype, streaming_dtype=streaming_dtype)
            for n in (1, 2)
        )
        if memory < one:
            return 0
        # Streaming heads alone hold any length: positions end where an int32 does.
        return min(MOST_TOKENS, 1 + (memory - one) // (two - one)) if two > one else MOST_TOKENS

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return _nbytes(self.pools)

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return self.length.shape[0]

    @property
    def max_length(self) -> int:
        """Tokens that each sequence can hold."""
        return self.pools.retrieval_k.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of retrieval heads' keys and values: uint8 and uint4 where they are quantized."""
        return self.pools.retrieval_k.dtype

    @property
    def streaming_dtype(self) -> jnp.dtype:
        """Data type of streaming heads' keys and values."""
        return self.pools.streaming_k.dtype

    def heads(self, layer: int) -> Heads:
        """One layer's row of the head table."""
        return Heads(self.is_retrieval[layer], self.slot[layer])

    def append_chunk(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int32[Array, "B"]
    ) -> "KVCache":
        """Write one layer's keys and values of a chunk behind `length`, the padding beyond `lengths` left out.

        `length` stays: a chunk counts as appended with `advance`, once every layer has written it.
        """
        heads, pools = self.heads(layer), self.pools
        position = consecutive(self.length, k.shape[1])
        valid = position < (self.length + lengths)[:, None]
        if pools.retrieval_k.shape[0]:
            slot, row = _retrieval_slots(heads, pools)[:, None, None], _rows(self.batch_size)[None, :, None]
            # Out of bounds means dropped: padding, and heads of the other type.
            index = jnp.where(valid, position, self.max_length)[None]
            pools = pools._replace(
                retrieval_k=_scatter(pools.retrieval_k, (slot, row, index), k.transpose(2, 0, 1, 3)),
                retrieval_v=_scatter(pools.retrieval_v, (slot, row, index), v.transpose(2, 0, 1, 3)),
            )
        if pools.streaming_k.shape[0]:
            # The newest token of each ring index comes from the chunk if the chunk holds it, else it stays.
            newest = ring_positions(self.length + lengths, sink_size=self.sink_size, recent_size=self.recent_size)
            source = newest - self.length[:, None]
            pools = pools._replace(
                streaming_k=_refill(pools.streaming_k, heads, source, k),
                streaming_v=_refill(pools.streaming_v, heads, source, v),
            )
        return replace(self, pools=pools)

    def append_token(
        self, layer: int, k: Float[Array, "B K H"], v: Float[Array, "B K H"], active: Bool[Array, "B"]
    ) -> "KVCache":
        """Write one layer's key and value of a new token behind `length`, for the active rows."""
        heads, pools, row = self.heads(layer), self.pools, _rows(self.batch_size)[None, :]
        k, v = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        if pools.retrieval_k.shape[0]:
            slot = _retrieval_slots(heads, pools)[:, None]
            index = jnp.where(active, self.length, self.max_length)[None, :]
            pools = pools._replace(
                retrieval_k=_scatter(pools.retrieval_k, (slot, row, index), k),
                retrieval_v=_scatter(pools.retrieval_v, (slot, row, index), v),
            )
        if pools.streaming_k.shape[0]:
            slot = _streaming_slots(heads, pools)[:, None]
            index = ring_index(self.length, sink_size=self.sink_size, recent_size=self.recent_size)
            index = jnp.where(active, index, pools.streaming_k.shape[2])[None, :]
            pools = pools._replace(
                streaming_k=_scatter(pools.streaming_k, (slot, row, index), k),
                streaming_v=_scatter(pools.streaming_v, (slot, row, index), v),
            )
        return replace(self, pools=pools)

    def advance(self, count: Int32[Array, "B"]) -> "KVCache":
        """Count tokens that every layer has written."""
        return replace(self, length=self.length + count)

    def mark(self) -> "Mark":
        """Remember this point: a copy of rings and lengths only, so that one prefilled text can be asked many times."""
        self.check_alive()
        return Mark(
            streaming_k=_copy(self.pools.streaming_k),
            streaming_v=_copy(self.pools.streaming_v),
            length=jnp.copy(self.length),
            is_retrieval=jnp.copy(self.is_retrieval),
            sink_size=self.sink_size,
            recent_size=self.recent_size,
            fingerprint=_fingerprint(self.pools.retrieval_k, self.length),
        )

    def rewind(self, mark: "Mark") -> "KVCache":
        """This cache as it was at `mark`, without a copy of the retrieval pool: entries beyond `length` are never read.

        Raises:
            ValueError: a mark of another cache, or one whose tokens were overwritten after an earlier rewind.
        """
        self.check_alive()
        theirs, ours = (
            (x.sink_size, x.recent_size, x.length.shape, np.asarray(x.is_retrieval).tolist()) for x in (mark, self)
        )
        if theirs != ours:
            raise ValueError("this mark is of another cache, with other heads, sizes or rows; take marks of this one")
        found = _fingerprint(self.pools.retrieval_k, mark.length)
        if not np.array_equal(np.asarray(found), np.asarray(mark.fingerprint)):
            raise ValueError(
                "the tokens of this mark are no longer in the cache: it was rewound to an earlier mark and other "
                "tokens were appended; rewind to marks in the reverse order of taking them, or fork() the cache first"
            )
        rings = {"streaming_k": _copy(mark.streaming_k), "streaming_v": _copy(mark.streaming_v)}
        return replace(self, pools=self.pools._replace(**rings), length=jnp.copy(mark.length))

    def fork(self, batch_size: int | None = None) -> "KVCache":
        """A real copy, which lives on when this cache is donated; of a single row, `batch_size` rows like it.

        Raises:
            ValueError: rows asked of a cache that has several, or a donated cache.
        """
        self.check_alive()
        if batch_size is None:
            return _copy(self)
        if self.batch_size != 1 or batch_size < 1:
            raise ValueError(
                f"a cache of one row becomes one or more, got {batch_size=} of a cache of {self.batch_size} rows"
            )
        pools = jax.tree.map(lambda x: jnp.repeat(x, batch_size, axis=1), self.pools)
        heads = jnp.copy(self.is_retrieval), jnp.copy(self.slot)
        length = jnp.repeat(self.length, batch_size)
        return replace(self, pools=pools, is_retrieval=heads[0], slot=heads[1], length=length)

    def save(self, path: str | Path, model: Model | None = None, *, tokens: ArrayLike | None = None) -> None:
        """Write the cache to a folder: what is filled of it, with a checksum of every array.

        The folder appears under its name when everything is on disk. The host's memory must hold one copy.

        Args:
            path: a folder that is not there yet.
            model: the weights that computed it; `load` then refuses others.
            tokens: `[B, T]` token ids in the cache, kept beside it for whoever loads it.

        Raises:
            ValueError: a cache that was donated, or holds nothing.
            FileExistsError: the path exists.
        """
        self.check_alive()
        saved.free(path)
        filled = int(self.length.max())
        if not 0 < filled <= self.max_length:
            raise ValueError(f"a cache of {filled} tokens and {self.max_length=} has nothing to save: prefill it first")
        arrays = {}
        for name, leaf in _parts(self.pools).items():
            # Slots beyond the length hold nothing; a pool without slots is not stored.
            if leaf.size:
                arrays[name] = np.asarray(leaf)[:, :, :filled] if name.startswith("retrieval") else np.asarray(leaf)
        about = {
            "is_retrieval": np.asarray(self.is_retrieval).astype(int).tolist(),
            "sink_size": self.sink_size,
            "recent_size": self.recent_size,
            "length": np.asarray(self.length).tolist(),
            "max_length": self.max_length,
            "head_dim": self.pools.retrieval_k.shape[3],
            "dtypes": [_stored_as(self.pools.retrieval_k), _stored_as(self.pools.streaming_k)],
            "model": model and _identity(model),
            "tokens": None if tokens is None else np.asarray(tokens).tolist(),
        }
        saved.write(path, arrays, about)

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
        about = saved.read_about(path)
        retrieval, streaming = about["dtypes"]
        is_retrieval = np.asarray(about["is_retrieval"], bool)
        sizes = {name: about[name] for name in ("sink_size", "recent_size")}
        if model is not None:
            _check_identity(path, about["model"], _identity(model))
        if dtype is not None and _dtype_name(dtype) != retrieval:
            raise ValueError(f"{path} holds keys and values in {retrieval}, not in {_dtype_name(dtype)}: prefill again")
        if pattern is not None:
            theirs = (
                HeadPattern(is_retrieval, **sizes, gates=is_retrieval.astype(float)) if sizes["recent_size"] else None
            )
            if pattern != theirs:
                raise ValueError(
                    f"{path} was made with {_heads(is_retrieval, **sizes)}, the pattern has "
                    f"{_heads(pattern.is_retrieval, pattern.sink_size, pattern.recent_size)}, or others of them: "
                    "leave the pattern out, or prefill again"
                )
        filled, batch, max_length = max(about["length"]), len(about["length"]), max_length or about["max_length"]
        if filled > max_length:
            raise ValueError(f"{path} holds {filled} tokens, more than {max_length=}: make it at least that long")
        arrays = saved.read_arrays(path, about["checksums"])
        count, ring, head_dim = int(is_retrieval.sum()), sum(sizes.values()), about["head_dim"]
        shapes = (count, batch, max_length, head_dim), (is_retrieval.size - count, batch, ring, head_dim)
        pools = _empty_pools(shapes, (retrieval, streaming))
        flat, tree = jax.tree.flatten(pools)
        flat = [
            _filled(leaf, arrays[name]) if leaf.size else leaf for name, leaf in zip(_parts(pools), flat, strict=True)
        ]
        return cls(
            pools=jax.tree.unflatten(tree, flat),
            is_retrieval=jnp.asarray(is_retrieval),
            slot=jnp.asarray(_slots(is_retrieval)),
            length=jnp.asarray(about["length"], jnp.int32),
            **sizes,
        )

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
    data_fields=["streaming_k", "streaming_v", "length", "is_retrieval", "fingerprint"],
    meta_fields=["sink_size", "recent_size"],
)
@dataclass(frozen=True)
class Mark:
    """A point to rewind to. `fingerprint` is a hash of the retrieval keys so far: it tells a stale mark."""

    streaming_k: Stored
    streaming_v: Stored
    length: Int32[Array, "B"]
    is_retrieval: Bool[Array, "L K"]
    fingerprint: UInt32[Array, "B"]
    sink_size: int
    recent_size: int


def pool_dtypes(
    config: ModelConfig, dtype: str | jnp.dtype | None, streaming_dtype: str | jnp.dtype | None
) -> tuple[str, str]:
    """Names of the data types of retrieval and streaming heads.

    Raises:
        ValueError: an unknown one.
    """
    retrieval = _dtype_name(config.dtype if dtype is None else dtype)
    usual = config.dtype if retrieval in BITS else retrieval
    return retrieval, _dtype_name(usual if streaming_dtype is None else streaming_dtype)


def _fitting(
    config: ModelConfig,
    pattern: HeadPattern | None,
    batch_size: int,
    max_length: int | None,
    memory: int,
    **dtypes: str | jnp.dtype | None,
) -> int:
    """`max_length` if it fits into `memory` bytes; the largest that does if it is None."""
    most = KVCache.length_for(config, pattern, batch_size, memory, **dtypes)
    if max_length is not None and max_length <= most:
        return max_length
    if max_length is None and most:
        return most
    wanted = KVCache.bytes_for(config, pattern, batch_size, max_length or 1, **dtypes)
    way = f"ask for up to {most} tokens" if most else "give more memory"
    raise ValueError(
        f"a cache of {max_length or 1} tokens (batch {batch_size}) takes {wanted / 1e9:.3f} GB, more than "
        f"memory={memory / 1e9:.3f} GB: {way}, stream more heads, or store them in int8 or int4"
    )


def _dtype_name(dtype: str | jnp.dtype) -> str:
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in KV_DTYPES:
        raise ValueError(f"keys and values are stored as {', '.join(KV_DTYPES)}, not as {name!r}")
    return name


def _empty_pools(shapes: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[str, str]) -> Pools:
    retrieval, streaming = zip(shapes, dtypes, strict=True)
    return Pools(empty(*retrieval), empty(*retrieval), empty(*streaming), empty(*streaming))


def _nbytes(pools: Pools) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pools))


def _copy(tree: T) -> T:
    return jax.tree.map(jnp.copy, tree)


def _table(config: ModelConfig, pattern: HeadPattern | None) -> np.ndarray:
    if pattern is None:
        return np.ones((config.num_layers, config.num_kv_heads), bool)
    pattern.check(config)
    return pattern.is_retrieval


def _slots(is_retrieval: np.ndarray) -> np.ndarray:
    """Slots are numbered within each type, layer by layer."""
    flat = is_retrieval.ravel()
    slot = np.where(flat, flat.cumsum(), (~flat).cumsum()).reshape(is_retrieval.shape) - 1
    return slot.astype(np.int32)


def _parts(pools: Pools) -> dict[str, Array]:
    """The arrays that pools are made of, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="_"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(pools)
    }


def _stored_as(pool: Stored) -> str:
    """The name of a pool's data type, as `init` takes it."""
    return pool.dtype.name.replace("uint", "int")


def _filled(pool: Array, new: np.ndarray) -> Array:
    """The pool with rows of `new` at its beginning, slot by slot: no second copy of it is on the device."""
    for slot in range(len(new)):
        pool = _fill(pool, new[slot : slot + 1], np.int32(slot))
    return pool


@functools.partial(jax.jit, donate_argnums=0)
def _fill(pool: Shaped[Array, "P *rows"], new: Shaped[Array, "1 *filled"], slot: Int32[Array, ""]) -> Array:
    return lax.dynamic_update_slice(pool, new, (slot, *(jnp.int32(0),) * (pool.ndim - 1)))


def _identity(model: Model) -> dict[str, Any]:
    """What tells a model: everything of its configuration that its arithmetic depends on, and its weights."""
    config = {name: value for name, value in asdict(model.config).items() if name != "eos_ids"}
    return json.loads(json.dumps(config | {"weights": model.fingerprint}))


def _check_identity(path: str | Path, theirs: dict[str, Any] | None, ours: dict[str, Any]) -> None:
    if theirs is None:
        raise ValueError(f"{path} was saved without a model, so that it cannot be told whether this one made it")
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if names:
        said = ", ".join(f"{name} {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names)
        raise ValueError(f"{path} was made by another model: {said}; prefill again with this one")


def _heads(is_retrieval: np.ndarray, sink_size: int, recent_size: int) -> str:
    sizes = f" ({sink_size} sinks, a window of {recent_size})" if recent_size else ""
    return f"{int(is_retrieval.sum())} retrieval heads of {is_retrieval.size}{sizes}"


def _pool_shapes(
    is_retrieval: np.ndarray, ring: int, batch_size: int, max_length: int, config: ModelConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes `[Pr, B, S, H]` and `[Ps, B, R, H]`."""
    num_retrieval = int(is_retrieval.sum())
    num_streaming = is_retrieval.size - num_retrieval
    return (num_retrieval, batch_size, max_length, config.head_dim), (num_streaming, batch_size, ring, config.head_dim)


def _rows(batch_size: int) -> Int32[Array, "B"]:
    return jnp.arange(batch_size, dtype=jnp.int32)


def _retrieval_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    """Slots of the retrieval heads; out of bounds, and so never written, for the others."""
    return jnp.where(heads.is_retrieval, heads.slot, pools.retrieval_k.shape[0])


def _streaming_slots(heads: Heads, pools: Pools) -> Int32[Array, "K"]:
    return jnp.where(heads.is_retrieval, pools.streaming_k.shape[0], heads.slot)


def _scatter(pool: Stored, index: tuple[Array, Array, Array], new: Float[Array, "*index H"]) -> Stored:
    return jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), pool, store(new, pool))


def _refill(pool: Stored, heads: Heads, source: Int32[Array, "B R"], chunk: Float[Array, "B T K H"]) -> Stored:
    """Rings after a chunk: index r takes chunk token `source[b, r]`, or stays where that is negative."""
    slots = jnp.where(heads.is_retrieval, 0, heads.slot)
    written = jnp.where(heads.is_retrieval, pool.shape[0], heads.slot)
    new = jnp.take_along_axis(chunk, jnp.maximum(source, 0)[:, :, None, None], axis=1).transpose(2, 0, 1, 3)

    def refill(pool: Array, new: Array) -> Array:
        is_new = (source >= 0).reshape(1, *source.shape, *(1,) * (pool.ndim - 3))
        return pool.at[written].set(jnp.where(is_new, new, pool[slots]), mode="drop")

    return jax.tree.map(refill, pool, store(new, pool))


@jax.jit
def _fingerprint(pool: Stored, length: Int32[Array, "B"]) -> UInt32[Array, "B"]:
    """Hash of each row's first `length` keys in the deepest retrieval slot, which depend on all layers before it."""
    if not pool.shape[0]:
        return jnp.zeros(length.shape, jnp.uint32)  # Rings are copied whole: nothing can be stale.
    # Of quantized keys, the words: equal ones of other keys differ in all but a few channels.
    keys = jax.tree.leaves(pool)[0][-1]
    bits = lax.bitcast_convert_type(keys, jnp.dtype(f"uint{8 * keys.dtype.itemsize}")).astype(jnp.uint32)
    # A random odd factor for every position and channel: sums of other keys, or of the same in another order, differ.
    index = jnp.arange(keys.shape[1] * keys.shape[2], dtype=jnp.uint32).reshape(1, *keys.shape[1:])
    factor = (index * jnp.uint32(0x9E3779B1)) ^ (index >> 7) | jnp.uint32(1)
    valid = _rows(keys.shape[1])[None, :] < length[:, None]
    return jnp.where(valid[:, :, None], bits * factor, jnp.uint32(0)).sum((1, 2), dtype=jnp.uint32)
