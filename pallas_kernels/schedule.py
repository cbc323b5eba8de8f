"""Which tiles of keys a kernel visits, in which order, and which of them need a mask; scalars only.

Every kernel reads the same schedule, so that it is written once. All numbers are int32 scalars of the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.tiles import DecodeTiles
from pallas_kernels.types import Pools
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

    @property
    def runs(self) -> tuple["Run", ...]:
        """All steps, in their order: masked tiles come first, of those the tail of the full pool, if there is one."""
        own, ring, masked = self.tail, self.tail + self.edges, self.masked
        whole = masked + (self.diagonal - self.inner)
        return (
            Run("full", True, jnp.zeros_like(own), own),
            Run("own", True, own, ring),
            Run("ring", True, ring, masked),
            Run("own", False, masked, whole),
            Run("full", False, whole, whole + self.whole),
        )

    @property
    def stretches(self) -> tuple["Stretch", ...]:
        """All steps, in their order: `runs`, cut where the numbers of tiles do not follow each other."""
        zero = jnp.zeros_like(self.whole)
        return (
            Stretch("full", True, self.whole, self.tail),
            Stretch("own", True, self.diagonal, self.end - self.diagonal),
            Stretch("own", True, zero, self.sinks),
            Stretch("own", True, self.left, self.inner - self.left),
            Stretch("ring", True, zero, self.ring),
            Stretch("own", False, self.inner, self.diagonal - self.inner),
            Stretch("full", False, zero, self.whole),
        )

    def tile(self, run: "Run", step: Array) -> Array:
        """Number of a step's tile in its source."""
        if run.source == "own" and run.is_masked:
            return self.edge(step - run.begin)
        # Of the tail too: a tile that did not depend on the step would be loaded and multiplied before the loop.
        first = self.inner if run.source == "own" else self.whole if run.source == "full" and run.is_masked else 0
        return first + (step - run.begin)

    def place(self, step: Array, since: int = 0) -> tuple[Array, Array, Array]:
        """Whether a step's tile is in the full pool, whether in the ring (else in the chunk), and its number.

        The step is of one of the `runs` from number `since` on.
        """
        first, *others = self.runs[since:]
        is_full, is_ring = (jnp.bool_(first.source == source) for source in ("full", "ring"))
        number = self.tile(first, step)
        for run in others:
            is_here = step >= run.begin
            number = jnp.where(is_here, self.tile(run, step), number)
            is_full, is_ring = (
                is_here | found if run.source == source else ~is_here & found
                for source, found in (("full", is_full), ("ring", is_ring))
            )
        return is_full, is_ring, number


class Run(NamedTuple):
    """Consecutive steps whose tiles are of one kind."""

    source: str  # "own", the chunk; "full" or "ring", the pools
    is_masked: bool
    begin: Array
    end: Array


class Stretch(NamedTuple):
    """Consecutive steps whose tiles are of one kind, and follow each other."""

    source: str  # as of a `Run`
    is_masked: bool
    first: Array  # number of the first tile
    tiles: Array


RUNS = 5  # of `Steps.runs`
# Beyond every index and distance.
FAR = 1 << 30


class Seen(NamedTuple):
    """Which keys of a tile are seen: those whose distance from a query is below `limit`.

    That of the `leading` keys (sinks, or all tokens of a retrieval slot) counts as small, that of keys from `size` on,
    which are no tokens, as large. In a ring, the keys from `cut` on are older than those before it, by `reach`. In the
    chunk, a key is not seen by queries before it. What does not matter for a kind of tile is None there.
    """

    leading: Array
    ago: Array | None = None
    cut: Array | None = None
    reach: int = 0
    size: Array | None = None
    limit: Array | None = None
    last: Array | None = None

    @classmethod
    def of(
        cls, source: str, tile: Array, start: Array, is_retrieval: Array, sizes: "Sizes", filled: Array | None = None
    ) -> "Seen":
        """Of a tile by its source and number; the other arguments are those of `steps_of`."""
        first, (sink, recent) = tile * sizes.block_k, (sizes.window.sink, sizes.window.recent)
        if source == "full":
            return cls((start if filled is None else filled) - first)
        if source == "own":
            limit = jnp.where(is_retrieval, jnp.int32(FAR), jnp.int32(recent))
            return cls(sink - start - first, ago=-first, limit=limit, last=-first)
        wraps = div(jnp.maximum(start - sink, jnp.zeros_like(start)), max(recent, 1))
        # The next index of a ring that is overwritten: indices below it have newer tokens than those from it on.
        cut = jnp.maximum(start, jnp.int32(sink)) - wraps * recent - first
        return cls(
            jnp.minimum(start, jnp.int32(sink)) - first,
            ago=cut,
            cut=cut,
            reach=recent,
            size=jnp.minimum(start, jnp.int32(sizes.window.size)) - first,
            limit=jnp.full_like(start, recent),
        )

    @classmethod
    def either(cls, is_full: Array, full: "Seen", is_ring: Array, ring: "Seen", own: "Seen") -> "Seen":
        """The one of three that a tile has whose kind is known only on the device."""
        far, zero = jnp.full_like(own.leading, FAR), jnp.zeros_like(own.leading)
        full = full._replace(ago=zero, cut=far, size=zero, limit=far, last=far)
        ring, own = ring._replace(last=far), own._replace(cut=far, size=far)

        def pick(of_full: Any, of_ring: Any, of_own: Any) -> Array:
            return jnp.where(is_full, of_full, jnp.where(is_ring, of_ring, of_own))

        fields = ("leading", "ago", "cut", "size", "limit", "last")
        picked = {name: pick(*(getattr(seen, name) for seen in (full, ring, own))) for name in fields}
        return cls(**picked, reach=ring.reach)

    def mask(self, i: Array, q: Array, shape: tuple[int, int]) -> Bool[Array, "M S"]:
        """Which of the keys with indices `i [S]` in the tile each query sees; `q [M]` are indices in the chunk."""

        def by_key(x: Array) -> Array:
            return lax.broadcast_in_dim(x, shape, (1,))

        def by_query(x: Array) -> Array:
            return lax.broadcast_in_dim(x, shape, (0,))

        if self.ago is None or self.limit is None:
            return by_key(i < self.leading)
        # The first choice of each `where` is no constant: Mosaic would compare the result without its sign.
        far, distance = jnp.full_like(i, FAR), self.ago - i
        if self.cut is not None:
            distance = jnp.where(i < self.cut, distance, distance + self.reach)
        if self.size is not None:
            distance = jnp.where(i < self.size, distance, far)
        distance = jnp.where(i >= self.leading, distance, -far)
        keep = by_key(distance) < by_query(self.limit - q)
        return keep if self.last is None else keep & (by_key(i) <= by_query(self.last + q))


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
    has_chunk: Array | bool = True,
) -> Steps:
    """The tiles of keys for the tile of queries that begins at index `first` of the chunk.

    Args:
        first: index of the first query.
        start: position of the chunk's first token.
        is_retrieval: type of the head.
        sizes: the static sizes.
        filled: tokens in the full pool, where they are not `start`.
        has_chunk: whether retrieval heads see the chunk's own keys; False, not traced: only the full pool is visited.
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
    if has_chunk is False:
        return Steps(whole, tail, *(jnp.zeros_like(whole),) * 6)
    # Beyond the reach of the window only the sinks of a ring remain visible.
    reach = jnp.where(first + 2 <= window.recent, jnp.int32(window.size), jnp.int32(window.sink))
    ring = streaming(cdiv(jnp.minimum(start, reach), block_k))
    end = cdiv(jnp.minimum(first + block_q, length), block_k)
    if not isinstance(has_chunk, bool):
        end = jnp.where(is_retrieval & ~has_chunk, zero, end)
    left = streaming(div(jnp.maximum(first + 1 - window.recent, zero), block_k))
    sinks = jnp.minimum(cdiv(jnp.maximum(window.sink - start, zero), block_k), left)
    inner = jnp.clip(streaming(cdiv(jnp.maximum(first + block_q - window.recent, zero), block_k)), left, end)
    diagonal = jnp.clip(div(first + 1, block_k), inner, end)
    return Steps(whole, tail, ring, sinks, left, inner, diagonal, end)


def last_tile_of_queries(first: Array, is_retrieval: Array, sizes: Sizes) -> Array:
    """Number after the last tile of queries that sees the tile of keys that begins at index `first`, in training."""
    length, block_q, block_k, window = sizes
    end = jnp.int32(-(-length // block_q))
    reach = cdiv(jnp.minimum(first + (block_k - 1 + window.recent), length), block_q)
    return jnp.where(is_retrieval | (first < window.sink), end, reach)


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
