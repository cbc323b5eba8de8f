"""How the queries of a chunk, and the keys of a short one, are divided among the programs of a prefill kernel.

`schedule` has which tiles of keys each of them visits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.gpus import chip
from pallas_kernels.schedule import Sizes, Steps, cdiv, div, rem, steps_of
from pallas_kernels.types import Heads, Partial

# Keys of the pool that are worth a program of their own.
LEAST_KEYS = 1024


class Scope(NamedTuple):
    """Which keys a launch counts.

    Attributes:
        filled: tokens in the slots of retrieval heads.
        has_chunk: whether the chunk's own keys count for retrieval heads. False, not traced: nothing counts but the
            slots of retrieval heads, and streaming heads have no key.
    """

    filled: Int32[Array, "B"]
    has_chunk: Bool[Array, ""] | bool = True


class Work(NamedTuple):
    """What a program of prefill does at a time: a tile of queries of one head, over a part of its keys."""

    row: Array
    head: Array  # of those that `Queries` has
    is_retrieval: Array
    tile: Array
    part: Array


class Queries(NamedTuple):
    """How the queries of a chunk are divided among programs. Static.

    With fewer tiles than multiprocessors, the queries of a token that share a KV head follow each other in the tiles
    of one head: `[B, T, N, H]` becomes `[B, T packed, K, H]`. Then several programs share the keys of a tile.
    """

    rows: int  # of the batch
    tokens: int  # of the chunk
    heads: int
    group: int  # heads of a KV head
    packed: int  # queries of a token that follow each other
    block_q: int  # queries of a tile
    most_parts: int  # most parts of the keys of a tile

    @classmethod
    def of(cls, q: Any, num_kv_heads: int, block_q: int, capacity: int) -> "Queries":
        """For queries `[B, T, N, H]`, and as many tokens in a slot of the full pool."""
        rows, tokens, num_heads, _ = q.shape
        group, cores = num_heads // num_kv_heads, multiprocessors()
        packed = cls(rows, tokens, num_kv_heads, 1, group, block_q, 1)
        if rows * num_kv_heads * packed.tiles >= cores:
            return cls(rows, tokens, num_heads, group, 1, block_q, 1)
        parts = min(-(-cores // (rows * packed.tiles)), capacity // LEAST_KEYS)
        return packed._replace(most_parts=max(parts, 1))

    @property
    def length(self) -> int:
        """Queries of a head."""
        return self.tokens * self.packed

    @property
    def tiles(self) -> int:
        """Tiles of queries of a head."""
        return -(-self.length // self.block_q)

    @property
    def tile_tokens(self) -> int:
        """Most tokens that have queries in a tile."""
        whole, rest = divmod(self.block_q, self.packed)
        return whole if rest == 0 else whole + 2

    @property
    def most_works(self) -> int:
        """All works, if every head had as many parts as possible."""
        return self.rows * self.heads * self.tiles * self.most_parts

    def pack(self, q: Array) -> Array:
        """Queries `[B, T, N, H]` as `[B, T packed, N / packed, H]`."""
        if self.packed == 1:
            return q
        rows, tokens, _, head_dim = q.shape
        q = q.reshape(rows, tokens, self.heads, self.packed, head_dim).swapaxes(2, 3)
        return q.reshape(rows, self.length, self.heads, head_dim)

    def unpack(self, x: Array) -> Array:
        """The inverse of `pack`, of an array `[B, T packed, N / packed, ...]`."""
        if self.packed == 1:
            return x
        x = x.reshape(self.rows, self.tokens, self.packed, self.heads, *x.shape[3:]).swapaxes(2, 3)
        return x.reshape(self.rows, self.tokens, self.heads * self.packed, *x.shape[4:])

    def results(self, length: int, head_dim: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What a kernel writes for `length` queries of a head, some of them padding: outputs and `Partial.log_sum`.

        They are `[B, Q, N, H]` and `[B, N, Q]`; if keys have parts, `[B, K, parts, Q, H]` and `[B, K, parts, Q]`.
        """
        out: tuple[int, ...] = self.rows, length, self.heads
        log_sum: tuple[int, ...] = self.rows, self.heads, length
        if self.most_parts > 1:
            out = log_sum = self.rows, self.heads, self.most_parts, length
        return jax.ShapeDtypeStruct((*out, head_dim), dtype), jax.ShapeDtypeStruct(log_sum, jnp.float32)

    def places(self, row: Any, head: Any, part: Any, queries: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Where in `results` some queries of a work are."""
        at = row, head, part, queries
        return (at, at) if self.most_parts > 1 else ((row, queries, head), (row, head, queries))

    def merged(
        self,
        found: Sequence[Array],
        heads: Heads,
        filled: Int32[Array, "B"],
        parts: Array,
        combine: Callable[..., Partial],
        dtype: Any,
    ) -> Partial:
        """The `results` of a kernel for `[B, T, N]`, without padding; what `merge.combine` makes is of `dtype`."""
        out, log_sum = found
        if self.most_parts == 1:
            return Partial(*(self.unpack(x[:, : self.length]) for x in (out, log_sum.swapaxes(1, 2))))
        used = self.used(jnp.array([[False], [True]]), filled[None, :], parts)
        shape = self.rows, self.tokens, self.heads * self.packed
        ends = jnp.cumsum(used, axis=1, dtype=jnp.int32)
        return combine(Partial(out, log_sum), heads.is_retrieval.astype(jnp.int32), ends, shape, dtype)

    def parts(self, heads: Heads) -> Array:
        """Parts of the keys of a retrieval head's tile: the fewest that keep 90 % of the multiprocessors busy.

        Otherwise the number that keeps most of them busy. Programs of streaming heads are short, and do not count.
        """
        cores, most = multiprocessors(), self.most_parts
        parts = jnp.arange(1, most + 1, dtype=jnp.int32)
        works = parts * (heads.is_retrieval.sum(dtype=jnp.int32) * self.group * self.tiles * self.rows)
        # In thousandths, of the time until the last one ends.
        busy = div(works * 1000, jnp.maximum(cdiv(works, cores) * cores, 1))
        good = jnp.minimum(busy, jnp.int32(900))
        return jnp.argmax(good).astype(jnp.int32) + 1

    def works(self, num_retrieval: Array, parts: Array) -> Array:
        """Number of works."""
        tiles = self.rows * self.tiles
        heavy = num_retrieval * self.group
        return tiles * (heavy * parts + self.heads - heavy)

    def work(self, number: Array, order: Any, num_retrieval: Array, parts: Array) -> Work:
        """A work by its number: the longest first.

        Late tiles of retrieval heads come first; the works of streaming heads are short and fill the gaps at the end.
        Those that read the same keys are neighbors. `order` has the KV heads, retrieval heads first.
        """
        heavy = num_retrieval * self.group
        all_heavy = heavy * parts * (self.tiles * self.rows)
        is_retrieval = number < all_heavy
        zero = jnp.int32(0)
        rank = jnp.where(is_retrieval, number, number - all_heavy)
        own_parts = jnp.where(is_retrieval, parts, jnp.int32(1))
        heads = jnp.where(is_retrieval, heavy, self.heads - heavy)
        rank, part = div(rank, own_parts), rem(rank, own_parts)
        rank, place = div(rank, heads), rem(rank, heads) + jnp.where(is_retrieval, zero, heavy)
        head = order[div(place, self.group)] * self.group + rem(place, self.group)
        return Work(rem(rank, self.rows), head, is_retrieval, self.tiles - 1 - div(rank, self.rows), part)

    def used(self, is_retrieval: Array, filled: Array, parts: Array) -> Array:
        """Parts of the keys of a tile, if a slot has `filled` tokens: each has at least `LEAST_KEYS`."""
        one = jnp.ones_like(filled)
        return jnp.where(is_retrieval, jnp.clip(div(filled, LEAST_KEYS), one, parts), one)

    @property
    def programs(self) -> int:
        """Programs that do several works each, one after the other."""
        return min(multiprocessors(), self.most_works)

    def plan(
        self,
        heads: Heads,
        parts: Array,
        sizes: Sizes,
        *,
        start: Int32[Array, "B"],
        lengths: Int32[Array, "B"],
        scope: Scope,
    ) -> "Planned":
        """The works of programs that do several: in each turn, one of every program, in their order.

        The turns go forth and back: who has the longest work of a turn has the shortest of the next one. A work without
        steps is none.
        """
        order, num_retrieval = heads.by_type()
        works = self.works(num_retrieval, parts)
        turns = -(-self.most_works // self.programs)
        forth = jnp.arange(turns * self.programs, dtype=jnp.int32).reshape(turns, self.programs)
        number = jnp.where(jnp.arange(turns)[:, None] % 2 == 0, forth, forth[:, ::-1]).ravel()
        work = self.work(jnp.minimum(number, works - 1), order, num_retrieval, parts)
        kv_head, first = div(work.head, self.group), div(work.tile * self.block_q, self.packed)
        own_start, filled = start[work.row], scope.filled[work.row]
        steps = steps_of(first, own_start, work.is_retrieval, sizes, filled=filled, has_chunk=scope.has_chunk)
        used = self.used(work.is_retrieval, filled, parts)
        begin, end = share(steps.total, work.part, used)
        # Padding visits few keys, but is written.
        end = jnp.where(first < lengths[work.row], end, jnp.minimum(end, begin + 1))
        is_used = (number < works) & (work.part < used)
        end = jnp.where(is_used, end, begin)
        span = begin, jnp.minimum(steps.masked, end), end
        place = Place(kv_head, heads.slot[kv_head], own_start, filled, *span, is_used.astype(jnp.int32))
        return Planned(work._replace(is_retrieval=work.is_retrieval.astype(jnp.int32)), place, steps)


class Place(NamedTuple):
    """Where the keys of a work are, and its share of the steps."""

    kv_head: Array
    slot: Array
    start: Array
    filled: Array
    span_begin: Array
    span_masked: Array
    span_end: Array
    is_used: Array  # whether it is a work, possibly one without a step


class Planned(NamedTuple):
    """Everything that a program needs to know of a work, int32."""

    work: Work
    place: Place
    steps: Steps

    @staticmethod
    def column(name: str) -> int:
        """Number of a field in a row of `table`."""
        return (Work._fields + Place._fields + Steps._fields).index(name)

    def table(self) -> Int32[Array, "W F"]:
        """The plan of works as an array: a row for each."""
        return jnp.stack([*self.work, *self.place, *self.steps], axis=1)


def multiprocessors() -> int:
    """Multiprocessors of the chip that programs are traced for; a few on a CPU, for tests."""
    return chip().cores or 8


def share(total: Array, part: Array, parts: Array) -> tuple[Array, Array]:
    """Begin and end of one of several nearly equal parts of `total` steps."""
    return div(total * part, parts), div(total * (part + 1), parts)
