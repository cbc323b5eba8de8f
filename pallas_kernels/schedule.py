"""Which tiles of keys a kernel visits, in which order, and which of them need a mask; scalars only.

Every kernel reads the same schedule, so that it is written once. All numbers are int32 scalars of the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.tiles import DecodeTiles
from pallas_kernels.types import Heads, Pools
from pallas_kernels.window import Window


class Steps(NamedTuple):
    """The tiles of keys for one tile of queries of one head in prefill.

    A retrieval head visits the full pool (`whole` tiles, then a partly filled `tail`), a streaming head the `ring`.
    Both then visit the chunk's own keys:

        0 .. sinks            the sinks, if they are in the chunk          mask
        left .. inner         the left edge of the window                  mask
        inner .. diagonal     keys that every query of the tile sees       no mask
        diagonal .. end       the causal diagonal                          mask

    For a retrieval head `sinks`, `left` and `inner` are 0. A tile without a visible key does no harm: the weights of
    its keys vanish at the first visible one.
    """

    whole: Array
    tail: Array
    ring: Array
    sinks: Array
    left: Array
    inner: Array
    diagonal: Array
    end: Array

    @property
    def edges(self) -> Array:
        """Tiles of the chunk that need a mask."""
        return self.sinks + (self.inner - self.left) + (self.end - self.diagonal)

    @property
    def masked(self) -> Array:
        """Tiles that need a mask."""
        return self.edges + self.tail + self.ring

    @property
    def total(self) -> Array:
        """All tiles."""
        return self.masked + (self.diagonal - self.inner) + self.whole

    def edge(self, i: Array) -> Array:
        """The i-th tile of the chunk that needs a mask: the causal diagonal, sinks, the left edge of the window."""
        sinks = i - (self.end - self.diagonal)
        left = sinks - self.sinks
        return jnp.where(sinks < 0, self.diagonal + i, jnp.where(left < 0, sinks, self.left + left))

    def source(self, step: Array) -> tuple[Array, Array, Array]:
        """Whether a step's tile is in the full pool, whether in the ring (else in the chunk), and its number.

        The order is: edges, tail, ring, which need a mask; unmasked tiles of the chunk, whole tiles of the pool.
        """
        tail = step - self.edges
        ring = tail - self.tail
        own = ring - self.ring
        whole = own - (self.diagonal - self.inner)
        is_full = ((tail >= 0) & (ring < 0)) | (whole >= 0)
        is_ring = (ring >= 0) & (own < 0)
        tile = jnp.where(tail < 0, self.edge(step), self.whole)
        tile = jnp.where(ring < 0, tile, ring)
        tile = jnp.where(own < 0, tile, self.inner + own)
        return is_full, is_ring, jnp.where(whole < 0, tile, whole)

    def seen(self, step: Array, start: Array, is_retrieval: Array, sizes: "Sizes") -> "Seen":
        """Which keys of a step's tile the queries of the chunk see; the arguments are those of `steps_of`."""
        is_full, is_ring, tile = self.source(step)
        (sink, recent), far, zero = (sizes.window.sink, sizes.window.recent), jnp.int32(FAR), jnp.int32(0)
        first = tile * sizes.block_k
        wraps = div(jnp.maximum(start - sink, zero), max(recent, 1))
        # The next index of a ring that is overwritten: indices below it have newer tokens than those from it on.
        cut = jnp.maximum(start, jnp.int32(sink)) - wraps * recent

        def pick(full: Array, ring: Array, own: Array) -> Array:
            return jnp.where(is_full, full, jnp.where(is_ring, ring, own))

        return Seen(
            ago=pick(start, cut, zero) - first,
            cut=pick(far, cut, far) - first,
            reach=jnp.int32(recent),
            leading=pick(start, jnp.minimum(start, jnp.int32(sink)), sink - start) - first,
            size=pick(zero, jnp.where(wraps > 0, jnp.int32(sizes.window.size), start), far) - first,
            limit=jnp.where(is_retrieval, far, jnp.int32(recent)),
            last=pick(far, far, zero) - first,
        )


# Beyond every index and distance.
FAR = 1 << 30


class Seen(NamedTuple):
    """Which keys of a tile are seen, by one rule for all kinds of tiles: their distance from a query is below `limit`.

    That of the `leading` keys (sinks, or all tokens of a retrieval slot) counts as small, that of keys from `size` on,
    which are no tokens, as large. In a ring, the keys from `cut` on are older than those before it. In the chunk, a
    key is not seen by queries before it.
    """

    ago: Array
    cut: Array
    reach: Array
    leading: Array
    size: Array
    limit: Array
    last: Array

    def of_keys(self, i: Array) -> Array:
        """Keys with indices `i` in the tile: tokens from each to the chunk's first query."""
        zero, far = jnp.zeros_like(i), jnp.full_like(i, FAR)
        distance = self.ago - i + jnp.where(i < self.cut, zero, zero + self.reach)
        return jnp.where(i < self.leading, -far, jnp.where(i < self.size, distance, far))

    def of_queries(self, q: Array) -> tuple[Array, Array]:
        """Queries with indices `q` in the chunk: of keys they see, the least distance beyond and the last index."""
        return self.limit - q, self.last + q


class Sizes(NamedTuple):
    """The static sizes of a schedule."""

    length: int  # tokens of the chunk
    block_q: int  # tokens that have queries in a tile
    block_k: int  # keys of a tile
    window: Window  # of streaming heads


def steps_of(
    first: Array,
    start: Array,
    is_retrieval: Array,
    sizes: Sizes,
    *,
    filled: Array | None = None,
    has_chunk: Array | None = None,
) -> Steps:
    """The tiles of keys for the tile of queries that begins at index `first` of the chunk.

    Args:
        first: index of the first query.
        start: position of the chunk's first token.
        is_retrieval: type of the head.
        sizes: the static sizes.
        filled: tokens in the full pool, where they are not `start`.
        has_chunk: False where another device counts the chunk's own keys for retrieval heads.
    """
    length, block_q, block_k, window = sizes
    zero = jnp.int32(0)
    filled = start if filled is None else filled

    def retrieval(x: Array) -> Array:
        return jnp.where(is_retrieval, x, zero)

    def streaming(x: Array) -> Array:
        return jnp.where(is_retrieval, zero, x)

    whole = retrieval(div(filled, block_k))
    tail = retrieval(cdiv(filled, block_k)) - whole
    # Beyond the reach of the window only the sinks of a ring remain visible.
    reach = jnp.where(first + 2 <= window.recent, jnp.int32(window.size), jnp.int32(window.sink))
    ring = streaming(cdiv(jnp.minimum(start, reach), block_k))
    end = cdiv(jnp.minimum(first + block_q, length), block_k)
    if has_chunk is not None:
        end = jnp.where(is_retrieval & ~has_chunk, zero, end)
    left = streaming(div(jnp.maximum(first + 1 - window.recent, zero), block_k))
    sinks = jnp.minimum(cdiv(jnp.maximum(window.sink - start, zero), block_k), left)
    inner = jnp.clip(streaming(cdiv(jnp.maximum(first + block_q - window.recent, zero), block_k)), left, end)
    diagonal = jnp.clip(div(first + 1, block_k), inner, end)
    return Steps(whole, tail, ring, sinks, left, inner, diagonal, end)


class Splits(NamedTuple):
    """How decode spreads the keys of a head over programs.

    Static. Each row of a head is cut into parts of equal length, as many as its length, which is read on the device, is
    worth; a row's parts, and so its result, do not depend on the other rows. The programs of a head take the parts of
    all rows in turn: part i of them is for program `i % programs`. A long row has a part for each program, and the
    parts of short rows are short, so that programs do equal work whatever the lengths.
    """

    programs: int  # of each head
    parts: int  # of each row of a head, at most
    capacities: tuple[int, int]  # tokens of a slot of the full pool and of a ring; 0 for a pool without slots
    block_k: int
    min_split: int

    @classmethod
    def of(cls, pools: Pools, batch: int, num_kv_heads: int, tiles: DecodeTiles) -> "Splits":
        """Splits for the rows of a batch."""
        full, ring = pools.capacity if pools.full_k.shape[0] else 0, pools.ring_k.shape[2]
        ring = ring if pools.ring_k.shape[0] else 0
        programs = max(1, tiles.max_programs // num_kv_heads)
        parts = min(-(-max(full, ring) // tiles.min_split), programs)
        return cls(min(programs, batch * parts), parts, (full, ring), tiles.block_k, tiles.min_split)

    def filled(self, is_retrieval: Array | bool, length: Array) -> Array:
        """Tokens in a head's slot, at most its capacity: the next slot begins there."""
        full, ring = self.capacities
        return jnp.minimum(length, jnp.where(is_retrieval, jnp.int32(full), jnp.int32(ring)))

    def size(self, filled: Array) -> Array:
        """Keys of a part: an even share in whole tiles, and at least `min_split`."""
        share = cdiv(cdiv(filled, self.parts), self.block_k) * self.block_k
        return jnp.maximum(share, jnp.int32(self.min_split))

    def ends(self, lengths: Int32[Array, "B"], held: Int32[Array, "B"] | None = None) -> Int32[Array, "2 B"]:
        """Number of all parts of the rows up to each, of a streaming and of a retrieval head.

        The same for all layers. `held` are the tokens in a retrieval slot, where they are not `lengths`.
        """
        filled = self.filled(False, lengths), self.filled(True, lengths if held is None else held)
        counts = [lax.div(x + self.size(x) - 1, self.size(x)) for x in filled]
        return jnp.cumsum(jnp.stack(counts), axis=1, dtype=jnp.int32)

    def used(self, ends: Int32[Array, "2 B"], heads: Heads) -> Bool[Array, "B K P"]:
        """Which parts have keys."""
        counts = jnp.diff(ends, axis=1, prepend=jnp.int32(0))[heads.is_retrieval.astype(jnp.int32)]
        return jnp.arange(self.parts, dtype=jnp.int32)[None, None, :] < counts.T[:, :, None]


def row_of(part: Array, ends: Callable[[Array], Array], batch: int) -> tuple[Array, Array]:
    """Row of one of the parts of all rows, and its number in the row; `ends(b)` is read from `Splits.ends`."""
    row = jnp.int32(0)
    for step in reversed([1 << i for i in range((batch - 1).bit_length())]):
        after = row + step
        is_later = (after < batch) & (ends(jnp.minimum(after, batch) - 1) <= part)
        row = jnp.where(is_later, after, row)
    before = jnp.where(row > 0, ends(jnp.maximum(row - 1, 0)), 0) if batch > 1 else jnp.int32(0)
    return row, part - before


def block_at(j: Array, block: int, size: int) -> tuple[Array, Int32[Array, "1 block"]]:
    """Begin of block j and the indices in it; the last one reaches back instead of over the end."""
    begin = jnp.minimum(j * block, size - block)
    return begin, (begin + jnp.arange(block, dtype=jnp.int32))[None, :]


def cdiv(a: Array, b: int) -> Array:
    """Blocks of size `b` that cover `a`, which is not negative."""
    return div(a + (b - 1), b)


def div(a: Array, b: Array | int) -> Array:
    """`a // b` of numbers that are not negative: one instruction, where `//` tests signs."""
    return lax.div(a, _like(a, b))


def rem(a: Array, b: Array | int) -> Array:
    """`a % b` of numbers that are not negative."""
    return lax.rem(a, _like(a, b))


def _like(a: Array, b: Array | int) -> Any:
    if not isinstance(b, int):
        return b if b.ndim == a.ndim else jnp.broadcast_to(b, a.shape)
    # Mosaic cannot lower an operation that makes a number out of a number.
    return a.dtype.type(b) if a.ndim == 0 else lax.full_like(a, b)
