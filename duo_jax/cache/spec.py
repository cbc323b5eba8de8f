"""CacheSpec: which cache to make. Its shapes, its bytes, the longest one that fits into memory, and the arrays."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from duo_jax.arguments import MOST_TOKENS, instance, whole_number
from duo_jax.cache.cache import NO_PAGE, RING_AXES, KeyValues, KVCache, full_axes
from duo_jax.mesh.balance import Balance, balance
from duo_jax.mesh.mesh import MeshSize, place
from duo_jax.model.config import ModelConfig
from duo_jax.model.precision import Precision
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.sizes import check_free, nbytes
from pallas_kernels import Window
from pallas_kernels.quantized import empty


@dataclass(frozen=True)
class CacheSpec:
    """A cache before its arrays exist. Nothing is allocated until `empty`.

    Attributes:
        config: the model's; in layers with a window of their own, all heads stream with that.
        pattern: which heads of the other layers stream, and what they see.
        batch_size: sequences.
        max_length: the most tokens of a sequence; rounded up to what the devices share, or to whole pages. At least as
            many as the widest window of a layer.
        precision: data types; those of the cache are `precision.kv` and `precision.streaming`.
        mesh: devices that share the cache. Their numbers are enough for bytes and shapes.
        page_size: tokens of a page of the full pool; None: a row's tokens are contiguous.
        num_pages: pages of the full pool, whatever the rows and their length; the page table is then empty, and its
            owner assigns pages to rows, see `KVCache.with_pages`. None: every row has pages of its own for
            `max_length` tokens.

    Raises:
        ValueError: a pattern of another model, sizes below 1, or a model or batch that cannot be divided over the mesh.
    """

    config: ModelConfig
    pattern: HeadPattern
    batch_size: int
    max_length: int
    precision: Precision
    mesh: Mesh | MeshSize | None = None
    page_size: int | None = None
    num_pages: int | None = None

    def __post_init__(self) -> None:
        """Check that such a cache can exist."""
        instance("config", self.config, ModelConfig, "pass model.config")
        instance("pattern", self.pattern, HeadPattern, "HeadPattern.load makes one from a name or folder")
        for name in ("batch_size", "max_length", "page_size", "num_pages"):
            value = getattr(self, name)
            if value is not None or name not in ("page_size", "num_pages"):
                object.__setattr__(self, name, whole_number(name, value, 1))
        if self.num_pages is not None and self.page_size is None:
            raise ValueError(f"num_pages={self.num_pages} counts pages: give page_size, the tokens of one, too")
        object.__setattr__(self, "pattern", self.pattern.of(self.config))
        self.size.check(self.config)
        if self.batch_size % self.size.data:
            raise ValueError(
                f"batch_size={self.batch_size} rows cannot be divided among data={self.size.data} devices: "
                "use a multiple"
            )
        if self.page_size is not None and (self.size.data > 1 or self.size.sequence > 1):
            raise ValueError(
                f"a paged cache is divided by heads only, got {self.size}: use a mesh with tensor=, or leave out "
                "page_size"
            )

    @property
    def size(self) -> MeshSize:
        """Devices along each axis of the mesh."""
        return MeshSize.of(self.mesh)

    @property
    def windows(self) -> tuple[Window, ...]:
        """The distinct windows of all layers, in the order of their first layer."""
        return tuple(dict.fromkeys(self._window_of_layer))

    @property
    def ring_of_layer(self) -> tuple[int, ...]:
        """For each layer, which of `windows` its streaming heads have."""
        windows = self.windows
        return tuple(windows.index(window) for window in self._window_of_layer)

    @property
    def _window_of_layer(self) -> tuple[Window, ...]:
        layers = range(self.config.num_layers)
        return tuple(self.config.window(layer) or self.pattern.window for layer in layers)

    @property
    def heads(self) -> Balance:
        """The head table of every device."""
        return _heads(self.pattern, self.ring_of_layer, self.size.tensor)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the pools over all devices: `[P, B, S, H]` or, paged, `[P, pages, page, H]`; then each ring pool's.

        `P` counts as many slots for each device as the one with the most heads needs.
        """
        devices, head_dim = self.size.tensor, self.config.head_dim
        if self.page_size is None:
            tokens: tuple[int, ...] = (self.batch_size, -(-self.max_length // self.size.sequence) * self.size.sequence)
        else:
            tokens = (self.num_pages or self.batch_size * self._pages_of_row, self.page_size)
        rings = zip(self.heads.ring_slots, self.windows, strict=True)
        return (
            (devices * self.heads.retrieval_slots, *tokens, head_dim),
            *((devices * slots, self.batch_size, window.size, head_dim) for slots, window in rings),
        )

    @property
    def _pages_of_row(self) -> int:
        return -(-self.max_length // (self.page_size or 1))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on each device: `(key + value) * (P * B * S + P_w * B * window.size + ...)`.

        A key or value of `H` numbers takes their bytes, and 4 more for every group of channels if it is quantized.
        """
        sizes = [
            math.prod(shape[:-1]) * _row_bytes(self.config.head_dim, dtype)
            for shape, dtype in zip(self.shapes, self._dtypes, strict=True)
        ]
        return (sizes[0] // self.size.sequence + sum(sizes[1:])) // (self.size.tensor * self.size.data)

    @property
    def _dtypes(self) -> tuple[str, ...]:
        return (self.precision.kv, *(self.precision.streaming for _ in self.windows))

    def fit(self, memory: int) -> int:
        """The largest `max_length` whose keys and values fit into `memory` bytes of each device; 0 if none does."""
        # The unit in which tokens are allocated.
        unit = self.page_size or self.size.sequence
        one_unit, two_units = (replace(self, max_length=n * unit).nbytes for n in (1, 2))
        if memory < one_unit:
            return 0
        # Without retrieval heads any length fits: positions end at the largest int32.
        if two_units == one_unit:
            return MOST_TOKENS
        most = min(MOST_TOKENS, unit * (1 + (memory - one_unit) // (two_units - one_unit)))
        return most if most >= self.config.room(1) else 0

    def fit_pages(self, memory: int) -> int:
        """The most `num_pages` whose keys and values, with all rings, fit into `memory` bytes of each device.

        0 if not one fits. Without retrieval heads a page takes nothing: there are as many as rows may need.
        """
        one, two = (replace(self, num_pages=count).nbytes for count in (1, 2))
        if memory < one:
            return 0
        needed = self.batch_size * self._pages_of_row
        return needed if two == one else min(needed, 1 + (memory - one) // (two - one))

    def check(self, memory: int) -> None:
        """Raise ValueError if keys and values do not fit into `memory` bytes of each device."""
        if self.nbytes > memory:
            most = self.fit(memory)
            way = f"ask for up to {most} tokens" if most else "give more memory"
            raise ValueError(
                f"a cache of {self.max_length} tokens (batch {self.batch_size}) takes {self.nbytes / 1e9:.3f} GB, more "
                f"than memory={memory / 1e9:.3f} GB: {way}, stream more heads, or store them in int8 or int4"
            )

    def empty(self) -> KVCache:
        """Allocate a cache without tokens.

        Raises:
            ValueError: it does not fit into the device's memory, or the mesh has no devices.
        """
        if self.max_length < (widest := self.config.room(1)):
            raise ValueError(
                f"a cache of max_length={self.max_length} tokens is shorter than the window of {widest} tokens that "
                f"layers of this model have: make it at least {widest} long"
            )
        if isinstance(self.mesh, MeshSize) and self.mesh.devices > 1:
            raise ValueError(f"a cache is made on devices, got {self.mesh}: use duo_jax.make_mesh")
        too_large = (
            f"a cache of {self.nbytes / 1e9:.1f} GB (batch {self.batch_size}, {self.max_length} tokens) does not fit "
            "into memory: ask for fewer tokens or rows, stream more heads, or store them in int8 or int4"
        )
        check_free(self.size.devices * self.nbytes, too_large, self.size.devices)
        try:
            return self._make(None if isinstance(self.mesh, MeshSize) else self.mesh)
        except RuntimeError as error:
            raise ValueError(too_large) from error

    def abstract(self) -> Any:
        """The cache that `empty` makes, as shapes with shardings: to compile for devices that need not exist."""
        cache = jax.eval_shape(functools.partial(self._make, None))
        if not isinstance(self.mesh, Mesh):
            return cache
        columns = cache.is_retrieval.shape
        cache = replace(cache, mesh=self.mesh, order=jax.ShapeDtypeStruct(columns, jnp.dtype(jnp.int32)))
        leaves, structure = jax.tree.flatten(cache)
        shardings = [NamedSharding(self.mesh, axes) for axes in cache.axes()]
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, shardings, strict=True)]
        return jax.tree.unflatten(structure, placed)

    def _make(self, mesh: Mesh | None) -> KVCache:
        pools: list[KeyValues] = []
        for shape, dtype in zip(self.shapes, self._dtypes, strict=True):
            make: list[Any] = [functools.partial(empty, shape, dtype, values=values) for values in (False, True)]
            if mesh is not None:
                sharding = NamedSharding(mesh, RING_AXES if pools else full_axes(self.page_size is not None))
                make = [jax.jit(one, out_shardings=sharding) for one in make]
            pools.append(KeyValues(*(one() for one in make)))
        heads, pages = self.heads, None
        put = (lambda x, *_: jax.device_put(x)) if mesh is None else functools.partial(place, mesh)
        if self.page_size is not None:
            shape = self.batch_size, self._pages_of_row
            own = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
            pages = put(own if self.num_pages is None else np.full(shape, NO_PAGE, np.int32))
        return KVCache(
            full=pools[0],
            rings=tuple(pools[1:]),
            pages=pages,
            is_retrieval=put(heads.is_retrieval, None, "tensor"),
            slot=put(heads.slot, None, "tensor"),
            length=put(np.zeros(self.batch_size, np.int32)),
            windows=self.windows,
            ring_of_layer=self.ring_of_layer,
            window_layers=self.config.window_layers,
            mesh=mesh,
            order=None if mesh is None else put(heads.order),
        )


@functools.lru_cache(maxsize=64)
def _heads(pattern: HeadPattern, rings: tuple[int, ...], tensor: int) -> Balance:
    return balance(pattern.is_retrieval, tensor, rings)


@functools.cache
def _row_bytes(head_dim: int, dtype: str) -> int:
    """Bytes of a key and a value."""
    rows = (functools.partial(empty, (head_dim,), dtype, values=values) for values in (False, True))
    return sum(nbytes(jax.eval_shape(row)) for row in rows)
