"""Products with quantized keys and values as they are packed: no tile of numbers is made.

A number is `scale * (n + offset / 8)`, so the scale and the offset of a key's group are applied to scores, and those of
a value to weights. What remains are products with the small integers `n`. Bits of a word go into the mantissa of a
number whose exponent makes it `base + n`: one instruction for two words, and no conversion. A product with it is too
large by `base` times a sum over the other factor, which joins the offset.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.gpus import chip
from pallas_kernels.quantized import FINE, WORD_BITS, Quantized, scale_and_shifted
from pallas_kernels.triton import tile

MIN_COLUMNS = 32


class Base(NamedTuple):
    """How numbers of a data type contain small integers."""

    bits: int  # of an integer, at most; those of a mantissa are enough
    word: str  # data type of the bits
    exponent: int  # bits of the number `value`
    value: int


BASES = {
    "bfloat16": Base(4, "uint16", 0x4300, 1 << 7),
    "float16": Base(8, "uint16", 0x6400, 1 << 10),
    "float32": Base(8, "uint32", 0x4B000000, 1 << 23),
}


class Plane(NamedTuple):
    """The same bits of every word."""

    part: int  # of the words' numbers
    shift: int
    weight: int  # of the integers in the number


@dataclass(frozen=True)
class Packing:
    """How the words of a row are read for products in one data type.

    A number of 8 bits is two planes of 4 where a mantissa has no room for it. The words of a row are read in `slices`,
    so that a plane of a slice belongs to one group of channels.
    """

    bits: int
    words: int
    groups: int
    dtype: Any

    @classmethod
    def of(cls, pool: Quantized, dtype: Any) -> "Packing":
        """Of a pool."""
        return cls(pool.bits, pool.words.shape[-1], pool.groups, jnp.dtype(dtype))

    @property
    def base(self) -> Base:
        """Of the data type."""
        return BASES[self.dtype.name]

    @property
    def parts(self) -> int:
        """Numbers of a word."""
        return WORD_BITS // self.bits

    @property
    def slices(self) -> int:
        """Slices of the words of a row."""
        return max(1, self.groups // self.parts)

    @property
    def size(self) -> int:
        """Words of a slice."""
        return self.words // self.slices

    @property
    def planes(self) -> list[Plane]:
        """Of a word."""
        bits = min(self.bits, self.base.bits)
        return [Plane(at // self.bits, at, 1 << at % self.bits) for at in range(0, WORD_BITS, bits)]

    @property
    def excess(self) -> int:
        """What all planes of a number add to it."""
        if self.dtype == jnp.float32:  # Subtracted at once: there is no room for a sum.
            return 0
        return self.base.value * sum(plane.weight for plane in self.planes if plane.part == 0)

    @property
    def excess_of_one(self) -> int:
        """What a number that is unpacked by itself is greater by: nothing, if its planes would have to be added."""
        return self.base.value if self.bits <= self.base.bits else 0

    @property
    def _exponents(self) -> int:
        """Bits of two numbers `value`, of a type of 16 bits."""
        return self.base.exponent * 0x10001

    def channel(self, part: int, piece: int) -> int:
        """The first channel of a part of the words of a slice."""
        return part * self.words + piece * self.size

    def group(self, part: int, piece: int) -> int:
        """Its group."""
        return self.channel(part, piece) * self.groups // (self.words * self.parts)

    def places(self) -> Iterator[tuple[int, int]]:
        """Part and slice of all channels, in their order."""
        return ((part, piece) for part in range(self.parts) for piece in range(self.slices))

    def integers(self, words: Array, plane: Plane) -> Array:
        """The integers of a plane, each greater by the data type's base; of float32, as they are."""
        bits = min(self.bits, self.base.bits)
        mask, word = (1 << bits) - 1, jnp.dtype(self.base.word)

        def plain(words: Array) -> Array:
            wide = words.astype(word)
            wide = ((wide >> word.type(plane.shift)) & word.type(mask)) | word.type(self.base.exponent)
            return lax.bitcast_convert_type(wide, self.dtype)

        if self.dtype == jnp.float32:
            return plain(words) - jnp.float32(self.base.value)
        shift = f"shr.u32 $0, $1, {plane.shift}; " if plane.shift else ""
        source = "$0" if plane.shift else "$1"
        # (source & mask) | exponent
        asm = f"{shift}lop3.b32 $0, {source}, {mask * 0x10001:#x}, {self._exponents:#x}, 0xEA;"
        return tile.assembly(asm, plain, words, dtype=self.dtype, pack=2, constraints="=r,r")

    def numbers(self, words: Array, part: int, grid: tuple[Array, Array]) -> Array:
        """Those of a part of some words `[S, W]` of 16-bit types, as `quantized.dequantize` rounds them.

        `grid` is what `load_grid` returns for `excess_of_one`.
        """
        kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[self.dtype.name]
        shift, mask = part * self.bits, (1 << self.bits) - 1

        def plain(words: Array, scale: Array, zero: Array) -> Array:
            steps = ((words >> jnp.uint16(shift)) & jnp.uint16(mask)).astype(jnp.float32)
            return (scale * (steps + jnp.float32(self.excess_of_one)) + zero).astype(self.dtype)

        # Two words are in $1; %wide becomes their numbers in float32, greater by `excess_of_one`.
        if self.excess_of_one:
            text = f"shr.u32 %wide0, $1, {shift}; "
            text += f"lop3.b32 %wide0, %wide0, {mask * 0x10001:#x}, {self._exponents:#x}, 0xEA; "
            text += (
                "and.b32 %wide1, %wide0, 0xFFFF0000; shl.b32 %wide0, %wide0, 16; "
                if self.dtype == jnp.bfloat16
                else "mov.b32 {%half0, %half1}, %wide0; cvt.f32.f16 %wide0, %half0; cvt.f32.f16 %wide1, %half1; "
            )
        else:  # A byte in the last bits of 2^23, which is subtracted.
            text = "".join(
                f"prmt.b32 {x}, $1, 0x4B000000, {0x7440 + 2 * word + part:#x}; add.f32 {x}, {x}, 0fCB000000; "
                for word, x in enumerate(("%wide0", "%wide1"))
            )
        text += "fma.rn.f32 %wide0, %wide0, $2, $4; fma.rn.f32 %wide1, %wide1, $3, $5; "
        text += f"cvt.rn.{kind}.f32 $0, %wide1, %wide0; "
        text = f"{{ .reg .b32 %wide<2>; .reg .b16 %half<2>; {text}}}"
        scale, offset = grid
        wide = (jnp.broadcast_to(x[:, None], words.shape) for x in (scale, scale * offset))
        return tile.assembly(text, plain, words, *wide, dtype=self.dtype, pack=2, constraints="=r,r,f,f,f,f")


def load_words(
    pool: Quantized, packing: Packing, at: tuple[Any, ...], piece: int, exists: Array | None, columns: int
) -> Array:
    """The words of a slice, `[S, columns]`, zero beyond its size and where `exists [S]` is false."""
    ref = pool.words.at[*at, pl.ds(jnp.int32(piece * packing.size), columns)]
    return tile.load(ref, exists, packing.size, zero=0)


def load_grid(pool: Quantized, at: tuple[Any, ...], group: int, exists: Array | None, excess: int) -> Any:
    """Scale of a group of some rows, `[S]`, and its offset in units of the scale less `excess`."""
    grid = plgpu.load(pool.grid.at[*at, jnp.int32(group)], mask=exists, other=None if exists is None else 0)
    scale, shifted, by = scale_and_shifted(grid)
    return scale, tile.fma(shifted, 1 / FINE, -(by / FINE + excess))


class Sums(NamedTuple):
    """Sums of packed values, each times a weight."""

    planes: tuple[Array, ...]  # [M, width(size)] of each plane of each slice: of the integers
    offsets: tuple[Array, ...]  # [M, S] of each group; a column for each key of a tile


class Packed:
    """Attention of some queries of a KV head to tiles of packed keys and values."""

    def __init__(self, q: tile.Ref, heads: tuple[Any, ...], in_group: Array, k: Quantized, v: Quantized) -> None:
        """Read the queries, `[M]` of which are `in_group`, in parts as those of keys."""
        self.k, self.v = k, v
        self.keys, self.values = Packing.of(k, q.dtype), Packing.of(v, q.dtype)
        self.parts: dict[tuple[int, int], Array] = {}
        self.sums: dict[int, Array] = {}  # of the channels of a group, [M]
        for part, piece in self.keys.places():
            columns = pl.ds(jnp.int32(self.keys.channel(part, piece)), tile.width(self.keys.size))
            loaded = tile.load(q.at[*heads, columns], in_group, self.keys.size)
            self.parts[part, piece] = loaded
            _add_to(self.sums, self.keys.group(part, piece), loaded.astype(jnp.float32).sum(1))

    def scores(self, at: tuple[Any, ...], exists: Array | None) -> Array:
        """Scores `[M, S]` of some rows of keys."""
        packing = self.keys
        products: dict[int, Array] = {}
        for piece in range(packing.slices):
            words = load_words(self.k, packing, at, piece, exists, tile.width(packing.size))
            for plane in packing.planes:
                found = tile.dot_t(self.parts[plane.part, piece], packing.integers(words, plane))
                found = found * jnp.float32(plane.weight) if plane.weight > 1 else found
                _add_to(products, packing.group(plane.part, piece), found)
        scores = jnp.zeros_like(next(iter(products.values())))
        for group, found in products.items():
            scale, offset = load_grid(self.k, at, group, exists, packing.excess)
            zero = jnp.broadcast_to((scale * offset)[None, :], found.shape)
            scores = tile.fma(found, scale[None, :], scores)
            scores = tile.fma(zero, self.sums[group][:, None], scores)
        return scores

    def empty(self, rows: int, keys: int) -> Sums:
        """Sums of no value yet."""
        packing = self.values
        planes = packing.slices * len(packing.planes)
        sums = jnp.zeros((rows, _columns(packing)), jnp.float32)
        return Sums((sums,) * planes, (jnp.zeros((rows, keys), jnp.float32),) * packing.groups)

    def add(self, sums: Sums, weights: Array, decay: Array, at: tuple[Any, ...], exists: Array | None) -> Sums:
        """Add some rows of values times `weights [M, S]`; earlier sums are multiplied by `decay [M]`."""
        packing = self.values
        scaled, offsets = [], []
        for group in range(packing.groups):
            scale, offset = load_grid(self.v, at, group, exists, packing.excess)
            narrow = tile.narrow(weights * scale[None, :], packing.dtype)
            # Of the rounded weights: the integers' base is multiplied with those.
            decayed = sums.offsets[group] * decay[:, None]
            offsets.append(tile.fma(narrow.astype(jnp.float32), offset[None, :], decayed))
            scaled.append(narrow)
        planes, old = [], iter(sums.planes)
        for piece in range(packing.slices):
            words = load_words(self.v, packing, at, piece, exists, _columns(packing))
            for plane in packing.planes:
                found = tile.dot(scaled[packing.group(plane.part, piece)], packing.integers(words, plane))
                planes.append(next(old) * decay[:, None] + found)
        return Sums(tuple(planes), tuple(offsets))

    def columns(self, sums: Sums) -> Iterator[tuple[int, int, Array]]:
        """The sum of all values: first channel, number of channels, and at least as many columns."""
        packing = self.values
        offsets = [offset.sum(1) for offset in sums.offsets]
        for part, piece in packing.places():
            total = offsets[packing.group(part, piece)][:, None]
            for plane, numbers in zip(packing.planes, sums.planes[piece * len(packing.planes) :], strict=False):
                if plane.part == part:
                    total = total + numbers * jnp.float32(plane.weight)
            yield packing.channel(part, piece), packing.size, total


class Unpacked:
    """Attention of many queries of a KV head: it unpacks tiles of keys and values, a part of the words at a time.

    A tile has fewer numbers than the scores of 64 queries and more, to which `Packed` applies scales and offsets.
    """

    def __init__(self, q: tile.Ref, heads: tuple[Any, ...], in_group: Array, k: Quantized, v: Quantized) -> None:
        """Read the queries, `[M]` of which are `in_group`, in parts as those of keys."""
        self.k, self.v = k, v
        self.keys, self.values = Packing.of(k, q.dtype), Packing.of(v, q.dtype)
        self.parts: dict[tuple[int, int], Array] = {}
        for part, piece in self.keys.places():
            columns = pl.ds(jnp.int32(self.keys.channel(part, piece)), tile.width(self.keys.size))
            self.parts[part, piece] = tile.load(q.at[*heads, columns], in_group, self.keys.size)

    def scores(self, at: tuple[Any, ...], exists: Array | None) -> Array:
        """Scores `[M, S]` of some rows of keys."""
        products = (tile.dot_t(self.parts[place], keys) for place, keys in _unpacked(self.k, self.keys, at, exists))
        return functools.reduce(lambda scores, product: scores + product, products)

    def empty(self, rows: int, keys: int) -> tuple[Array, ...]:
        """Sums of no value yet, of each part of each slice."""
        del keys
        zeros = jnp.zeros((rows, tile.width(self.values.size)), jnp.float32)
        return (zeros,) * len(list(self.values.places()))

    def add(
        self, sums: tuple[Array, ...], weights: Array, decay: Array, at: tuple[Any, ...], exists: Array | None
    ) -> tuple[Array, ...]:
        """Add some rows of values times `weights [M, S]`; earlier sums are multiplied by `decay [M]`."""
        narrow, unpacked = weights.astype(self.values.dtype), _unpacked(self.v, self.values, at, exists)
        return tuple(
            old * decay[:, None] + tile.dot(narrow, values) for old, (_, values) in zip(sums, unpacked, strict=True)
        )

    def columns(self, sums: tuple[Array, ...]) -> Iterator[tuple[int, int, Array]]:
        """The sum of all values: first channel, number of channels, and at least as many columns."""
        packing = self.values
        for (piece, part), total in zip(product(range(packing.slices), range(packing.parts)), sums, strict=True):
            yield packing.channel(part, piece), packing.size, total


def _unpacked(
    pool: Quantized, packing: Packing, at: tuple[Any, ...], exists: Array | None
) -> Iterator[tuple[tuple[int, int], Array]]:
    """Part and slice of the channels of some rows, and their numbers, `[S, width(size)]`."""
    grids: dict[int, Any] = {}
    for piece in range(packing.slices):
        words = load_words(pool, packing, at, piece, exists, tile.width(packing.size))
        for part in range(packing.parts):
            group = packing.group(part, piece)
            if group not in grids:
                grids[group] = load_grid(pool, at, group, exists, packing.excess_of_one)
            numbers = packing.numbers(words, part, grids[group])
            # Where each warp has the whole tile in registers, Triton would let each unpack all of it. It does not look
            # beyond a maximum, here over one number: the tile is unpacked once, and moved.
            yield (part, piece), numbers if chip().is_hopper else numbers[None].max(0)


def _columns(packing: Packing) -> int:
    """Columns of a product with a plane of values: of less than 32, every warp would compute all."""
    return max(MIN_COLUMNS, packing.size)


def _add_to(totals: dict[Any, Array], key: Any, x: Array) -> None:
    totals[key] = totals[key] + x if key in totals else x
