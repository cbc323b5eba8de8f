"""KVCache: keys and values in pools, split by head type. A pure pytree; every method returns a new cache.

Retrieval heads keep `max_length` tokens. A streaming head keeps a ring of `window.size` tokens, at any context length.
Which head has which slot of which pool is data (the head table), so patterns with the same number of retrieval heads
share one compiled program. `spec` computes the shapes, `store` reads and writes folders, `pallas_kernels` attends.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, UInt32
from numpy.typing import ArrayLike

from duo_jax import pytree
from duo_jax.arguments import MOST_BYTES, instance, integers, whole_number
from duo_jax.cache.pools import fingerprint, write_chunk
from duo_jax.mesh.mesh import MeshSize, constrain, place
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model
from duo_jax.model.precision import ALLOWED, AnyDtype, check_name
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.sizes import check_free, nbytes
from pallas_kernels import Heads, Pools, TokenShards, Window, append_token
from pallas_kernels.quantized import any_quantized

if TYPE_CHECKING:
    from duo_jax.cache.spec import CacheSpec

T = TypeVar("T")

# Mesh axes that divide the pools: slots, rows, and the tokens of retrieval heads.
FULL_AXES, RING_AXES = PartitionSpec("tensor", "data", "sequence"), PartitionSpec("tensor", "data")

# In a page table: no page yet.
NO_PAGE = -1

# Jitted, so that it is traced and lowered once for all layers, which are alike.
_append_token = jax.jit(append_token, static_argnames=("window", "shards", "backend"))


class KeyValues(NamedTuple):
    """Keys and values of one pool: arrays, quantized or not, or their shapes."""

    k: Any
    v: Any


@pytree.register(
    arrays=("full", "rings", "pages", "is_retrieval", "slot", "length", "order"),
    static=("windows", "ring_of_layer", "mesh", "window_layers"),
)
@dataclass(frozen=True)
class KVCache:
    """The cache of a batch of sequences. Step functions donate it: use the cache that they return from then on.

    On a mesh every device has its own pools, slots and columns of the head table. Token p of a retrieval head is stored
    on device `p % sequence` of those that share it, at `p // sequence`. Inside `jax.shard_map` a cache is one device's
    part.

    Attributes:
        full: keys and values of retrieval heads, `[P, B, S, H]`; paged, `[P, pages, page, H]`.
        rings: keys and values of streaming heads, `[P, B, window.size, H]`, one pool for each of `windows`.
        pages: each row's page numbers in order, shared by all heads and layers; None: the full pool is not paged. Rows
            may share pages; an entry may be -1, no page yet.
        is_retrieval: head table, True where a KV head is in the full pool.
        slot: head table, the slot in its pool.
        length: tokens in the cache, per row.
        windows: the distinct windows of streaming heads (static).
        ring_of_layer: for each layer, which of `windows` its streaming heads use (static).
        mesh: the devices that share the cache (static); None: one device.
        order: on a mesh, the KV head of each column `C` of all devices' head tables, as in `Balance`.
        window_layers: layers whose window is the model's, not a pattern's (static).
    """

    full: KeyValues
    rings: tuple[KeyValues, ...]
    pages: Int32[Array, "B n"] | None
    is_retrieval: Bool[Array, "L K"]
    slot: Int32[Array, "L K"]
    length: Int32[Array, "B"]
    windows: tuple[Window, ...]
    ring_of_layer: tuple[int, ...]
    mesh: Mesh | None = None
    order: Int32[Array, "L C"] | None = None
    window_layers: tuple[int, ...] = ()

    @classmethod
    def init(
        cls,
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: AnyDtype | None = None,
        streaming_dtype: AnyDtype | None = None,
        memory: int | None = None,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache for `batch_size` sequences of up to `max_length` tokens.

        `duo_jax.cache.spec.CacheSpec` has a further option: paged storage.

        Args:
            config: the model's.
            pattern: which heads stream; None: full attention.
            batch_size: sequences.
            max_length: the most tokens of a sequence, at least the widest window of the model's layers; by default as
                many as fit into `memory`.
            dtype: of retrieval heads: float32, bfloat16, float16, int8 or int4; by default the configuration's. int8
                and int4 have a scale and an offset for every group of channels: see `pallas_kernels.quantized`.
            streaming_dtype: of streaming heads, whose rings are small; by default `dtype`, or the configuration's
                where that is int8 or int4.
            memory: bytes of each device that keys and values may take; `duo_jax.Plan` computes what weights and
                activations leave. A cache that does not fit is refused before anything is allocated.
            mesh: devices that share the cache, from `make_mesh`: the same as the model's.

        Raises:
            ValueError: a pattern of another model, sizes below 1, an unknown data type, a cache larger than `memory`,
                or a model or batch that cannot be divided over the mesh.
        """
        if max_length is None and memory is None:
            raise ValueError("give max_length, the tokens of a sequence, or memory, the bytes that the cache may take")
        for name, value in (("dtype", dtype), ("streaming_dtype", streaming_dtype)):
            if value is not None:
                check_name(name, value, ALLOWED["kv_dtype"])
        length = 1 if max_length is None else max_length
        spec = _spec(config, pattern, batch_size, length, mesh, kv_dtype=dtype, streaming_dtype=streaming_dtype)
        if memory is not None:
            memory = whole_number("memory", memory, 1, MOST_BYTES)
            spec = spec if max_length is not None else replace(spec, max_length=spec.fit(memory) or config.room(1))
            spec.check(memory)
        return spec.empty()

    @staticmethod
    def bytes_for(
        config: ModelConfig,
        pattern: HeadPattern | None,
        batch_size: int,
        max_length: int,
        *,
        dtype: AnyDtype | None = None,
        streaming_dtype: AnyDtype | None = None,
        mesh: MeshSize = MeshSize(),
    ) -> int:
        """Bytes of keys and values that `init` allocates, on each device: see `CacheSpec.nbytes`."""
        dtypes = {"kv_dtype": dtype, "streaming_dtype": streaming_dtype}
        return _spec(config, pattern, batch_size, max_length, mesh, **dtypes).nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, over all devices."""
        return nbytes((self.full, self.rings))

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return self.length.shape[0]

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence."""
        size = self.full.k.shape[2]
        return size if self.pages is None else self.pages.shape[1] * size

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.full.k.shape[3]

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of retrieval heads' keys and values: uint8 and uint4 where they are quantized."""
        return self.full.k.dtype

    @property
    def streaming_dtype(self) -> jnp.dtype:
        """Data type of streaming heads' keys and values."""
        return self.rings[0].k.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether any of its keys and values are."""
        return any_quantized([*self.full, *(pool for ring in self.rings for pool in ring)])

    @property
    def shards(self) -> TokenShards | None:
        """The devices that share the tokens of retrieval heads; None: every device has all tokens of its heads."""
        count = MeshSize.of(self.mesh).sequence
        return None if count == 1 else TokenShards("sequence", count)

    def axes(self) -> list[PartitionSpec]:
        """The mesh axes that divide each array, in the order of `jax.tree.leaves`."""
        full, rings = len(jax.tree.leaves(self.full)), len(jax.tree.leaves(self.rings))
        table = PartitionSpec(None, "tensor")
        is_paged = self.pages is not None
        pages = [PartitionSpec("data")] * is_paged
        others = [table, table, PartitionSpec("data"), PartitionSpec()][: 3 if self.order is None else 4]
        return [full_axes(is_paged)] * full + [RING_AXES] * rings + pages + others

    def heads(self, layer: int) -> Heads:
        """One layer's row of the head table."""
        return Heads(self.is_retrieval[layer], self.slot[layer])

    def window(self, layer: int) -> Window:
        """What the streaming heads of a layer see."""
        return self.windows[self.ring_of_layer[layer]]

    def pools_of(self, layer: int) -> Pools:
        """The full pool, and the ring pool of a layer's window."""
        return Pools(*self.full, *self.rings[self.ring_of_layer[layer]], self.pages)

    def append_chunk(
        self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int32[Array, "B"]
    ) -> "KVCache":
        """Write one layer's keys and values of a chunk after `length`; padding beyond `lengths` is left out.

        `length` does not change: call `advance` once every layer has written the chunk.
        """
        return self._write(layer, write_chunk, k, v, lengths=lengths)

    def append_token(
        self,
        layer: int,
        k: Float[Array, "B K H"],
        v: Float[Array, "B K H"],
        active: Bool[Array, "B"],
        *,
        backend: str | None = None,
    ) -> "KVCache":
        """Write one layer's key and value of a new token after `length`, for the active rows."""
        return self._write(layer, _append_token, k, v, active=active, backend=backend)

    def _write(self, layer: int, write: Callable[..., Pools], k: Array, v: Array, **options: Any) -> "KVCache":
        where = {"start": self.length, "window": self.window(layer), "shards": self.shards}
        pools = write(self.pools_of(layer), self.heads(layer), k, v, **where, **options)
        rings = list(self.rings)
        rings[self.ring_of_layer[layer]] = KeyValues(*pools.ring)
        return replace(self, full=KeyValues(*pools.full), rings=tuple(rings))

    def advance(self, count: Int32[Array, "B"]) -> "KVCache":
        """Count tokens that every layer has written."""
        return replace(self, length=constrain(self.length + count, self.mesh))

    def is_overfull(self, length: Int32[Array, "B"]) -> Bool[Array, "B"]:
        """Rows without room for this many tokens: more than `max_length`, or than their pages hold."""
        if self.pages is None:
            return length > self.max_length
        first = jnp.arange(self.pages.shape[1], dtype=jnp.int32) * self.full.k.shape[2]
        is_missing = (self.pages < 0) & (first[None, :] < length[:, None])
        return (length > self.max_length) | is_missing.any(1)

    def with_pages(self, pages: ArrayLike) -> "KVCache":
        """This paged cache with another page table, `[B, n]`: an entry is the number of a page, or -1.

        Pages that are filled keep their keys and values, whichever rows have them. Their owner must give no row a page
        to write to that another row has too: see `copy_page`.

        Raises:
            ValueError: a cache that is not paged, a table of another shape, or a page that is not in the pool.
        """
        if self.pages is None:
            raise ValueError("this cache has no pages: make one with CacheSpec(..., page_size=, num_pages=).empty()")
        table, count = integers("pages", pages), self.full.k.shape[1]
        if table.shape != self.pages.shape:
            raise ValueError(f"pages must be the page table, {list(self.pages.shape)}, got {list(table.shape)}")
        if table.size and (table.min() < NO_PAGE or table.max() >= count):
            raise ValueError(
                f"pages must be -1 or below {count}, the pages of the pool, got {table.min()} to {table.max()}"
            )
        table = table.astype(np.int32)
        return replace(self, pages=jax.device_put(table) if self.mesh is None else place(self.mesh, table))

    def copy_page(self, source: Int32[Array, ""], target: Int32[Array, ""]) -> "KVCache":
        """Copy the keys and values of one page of all retrieval heads to another, which a row may then write to."""

        def copied(pool: Array) -> Array:
            page = lax.dynamic_slice_in_dim(pool, source, 1, 1)
            return lax.dynamic_update_slice_in_dim(pool, page, target, 1)

        return replace(self, full=jax.tree.map(copied, self.full)) if self.full.k.shape[0] else self

    def row(self, index: Int32[Array, ""]) -> "KVCache":
        """One row of a paged cache, as a cache of one row: its rings, length and page table, and the same full pool."""
        assert self.pages is not None
        rings = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index, 1, 1), self.rings)
        pages, length = (lax.dynamic_slice_in_dim(x, index, 1, 0) for x in (self.pages, self.length))
        return replace(self, rings=rings, pages=pages, length=length)

    def with_row(self, index: Int32[Array, ""], row: "KVCache") -> "KVCache":
        """This cache after `row`, which `row(index)` gave, was written to; its page table does not change."""
        rings = jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, index, 1), self.rings, row.rings)
        length = lax.dynamic_update_slice_in_dim(self.length, row.length, index, 0)
        return replace(self, full=row.full, rings=rings, length=length)

    def mark(self) -> "Mark":
        """Remember this point by a copy of rings and lengths: a prefilled text can then be asked many times."""
        self.check_alive()
        return Mark(
            rings=_copy(self.rings),
            length=jnp.copy(self.length),
            is_retrieval=jnp.copy(self.is_retrieval),
            fingerprint=self._fingerprint(self.length),
            windows=self.windows,
            ring_of_layer=self.ring_of_layer,
        )

    def rewind(self, mark: "Mark") -> "KVCache":
        """This cache as it was at `mark`; the full pool is not copied, as entries beyond `length` are never read.

        Raises:
            ValueError: a mark of another cache, or one whose tokens were overwritten after an earlier rewind.
        """
        self.check_alive()
        instance("mark", mark, Mark, "KVCache.mark makes one")
        marked, own = ((x.windows, x.ring_of_layer, _shapes((x.rings, x.length, x.is_retrieval))) for x in (mark, self))
        if marked != own or not jnp.array_equal(mark.is_retrieval, self.is_retrieval):
            raise ValueError(
                "this mark is of another cache, with other heads, sizes or data types: use marks of this one"
            )
        is_longer = (np.asarray(mark.length) > self.max_length).any()
        if is_longer or not np.array_equal(self._fingerprint(mark.length), np.asarray(mark.fingerprint)):
            raise ValueError(
                "the tokens of this mark are no longer in the cache, or were in another one: it was rewound to an "
                "earlier mark and other tokens were appended; rewind to marks in the reverse order of taking them, or "
                "fork() the cache first"
            )
        return replace(self, rings=_copy(mark.rings), length=jnp.copy(mark.length))

    def fork(self, batch_size: int | None = None) -> "KVCache":
        """A real copy, which outlives the donation of this cache; a cache of one row can become `batch_size` rows.

        Raises:
            ValueError: `batch_size` for a cache of several rows, more rows than memory holds, or a donated cache.
        """
        self.check_alive()
        if batch_size is None:
            return _copy(self)
        batch_size = whole_number("batch_size", batch_size, 1)
        if self.batch_size != 1 or batch_size % MeshSize.of(self.mesh).data:
            raise ValueError(
                f"a cache of one row becomes one or more, got {batch_size=} for a cache of {self.batch_size} rows"
            )
        needed = batch_size * self.nbytes
        too_large = f"{batch_size} rows of this cache take {needed / 1e9:.1f} GB: ask for fewer"
        check_free(needed, too_large, MeshSize.of(self.mesh).devices)
        repeat = functools.partial(jax.tree.map, lambda x: jnp.repeat(x, batch_size, axis=1))
        if self.pages is None:
            full, pages = repeat(self.full), None
        else:
            # Every row gets copies of the pages, in its own order of numbers.
            taken = jnp.tile(self.pages[0], batch_size)
            full = jax.tree.map(lambda x: x[:, taken], self.full)
            pages = jnp.arange(taken.size, dtype=jnp.int32).reshape(batch_size, -1)
        heads = {name: _copy(getattr(self, name)) for name in ("is_retrieval", "slot", "order")}
        length = jnp.repeat(self.length, batch_size)
        return replace(self, full=full, rings=repeat(self.rings), pages=pages, length=length, **heads)

    def _fingerprint(self, length: Int32[Array, "B"]) -> UInt32[Array, "B"]:
        """See `fingerprint`; on a mesh, the sum over all devices."""
        if self.mesh is None:
            return fingerprint(self.full.k, length, self.pages)
        return _fingerprints(self.mesh, self.shards, self.full.k, length, self.pages)

    def save(
        self, path: str | Path, model: Model | None = None, *, tokens: ArrayLike | None = None, text: str | None = None
    ) -> None:
        """Write the filled part of the cache to a folder, with a checksum of every array. Not on a mesh.

        The folder appears under its name once everything is on disk. The host's memory must hold one copy.

        Args:
            path: a folder that does not exist yet.
            model: the weights that computed it; `load` then refuses others.
            tokens: `[B, T]` token ids in the cache, stored with it; ragged rows padded at the right.
            text: the text of these tokens, stored with it: a later question is encoded together with its end.

        Raises:
            ValueError: a cache that was donated, is empty, or is on a mesh; tokens that are not those of its rows.
            FileExistsError: the path exists.
        """
        from duo_jax.cache import store

        self.check_alive()
        if self.mesh is not None:
            raise ValueError("a cache on a mesh cannot be saved: prefill on one device to save it")
        store.save(path, self, model, tokens, text)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Model | None = None,
        *,
        pattern: HeadPattern | None = None,
        dtype: AnyDtype | None = None,
        max_length: int | None = None,
    ) -> "KVCache":
        """Read a cache that `save` wrote; generation continues bit for bit.

        Args:
            path: the folder.
            model: the weights that will use it: they must be those that computed it.
            pattern: the pattern that it must have; None: any.
            dtype: the data type that retrieval heads must have; None: any.
            max_length: the most tokens of a sequence; by default as saved.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a cache of another model, pattern or data type, one that is incomplete or was altered, one
                that is longer than `max_length`, or one that version 0.1 saved.
        """
        from duo_jax.cache import store

        return store.load(path, model, pattern=pattern, dtype=dtype, max_length=max_length)

    @property
    def is_alive(self) -> bool:
        """Whether this cache can still be used: False once it, or a cache that shares its pools, was donated."""
        leaves = [leaf for leaf in jax.tree.leaves(self) if not isinstance(leaf, jax.core.Tracer)]
        return not any(leaf.is_deleted() for leaf in leaves)

    def check_alive(self) -> None:
        """Raise ValueError if this cache was donated."""
        if not self.is_alive:
            raise ValueError(
                "this cache was given to a step function before, which donates it: use the cache that was returned, "
                "or fork() it first"
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rings", "length", "is_retrieval", "fingerprint"],
    meta_fields=["windows", "ring_of_layer"],
)
@dataclass(frozen=True)
class Mark:
    """A point to rewind to. `fingerprint` is a hash of the keys of retrieval heads, used to detect a stale mark."""

    rings: tuple[KeyValues, ...]
    length: Int32[Array, "B"]
    is_retrieval: Bool[Array, "L K"]
    fingerprint: UInt32[Array, "B"]
    windows: tuple[Window, ...]
    ring_of_layer: tuple[int, ...]


def _spec(
    config: ModelConfig,
    pattern: HeadPattern | None,
    batch_size: int,
    max_length: int,
    mesh: Mesh | MeshSize | None,
    **dtypes: AnyDtype | None,
) -> "CacheSpec":
    from duo_jax.cache.spec import CacheSpec  # A spec makes caches.

    instance("config", config, ModelConfig, "pass model.config")
    pattern = HeadPattern.full(config) if pattern is None else pattern
    return CacheSpec(config, pattern, batch_size, max_length, config.precision(**dtypes), mesh)


def full_axes(is_paged: bool) -> PartitionSpec:
    """The mesh axes that divide the full pool."""
    return RING_AXES if is_paged else FULL_AXES


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _copy(tree: T) -> T:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fingerprints(
    mesh: Mesh, shards: TokenShards | None, pool: Any, length: Int32[Array, "B"], pages: Int32[Array, "B n"] | None
) -> UInt32[Array, "B"]:
    def of_device(pool: Any, length: Int32[Array, "B"], pages: Int32[Array, "B n"] | None) -> UInt32[Array, "B"]:
        return jax.lax.psum(fingerprint(pool, length, pages, shards), ("tensor", "sequence"))

    axes, rows = full_axes(pages is not None), PartitionSpec("data")
    specs = (jax.tree.map(lambda _: axes, pool), rows, rows)
    return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(pool, length, pages)
