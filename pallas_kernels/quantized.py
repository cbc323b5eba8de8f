"""Keys and values in 8 or 4 bits: how pools store them, and how they are read back. Knows no attention.

A row, one token's key or value of one head, is stored in the Hadamard basis, where no channel is much larger than the
others (QuaRot, arXiv 2404.00456): `store` transforms it, and the operations transform queries and outputs of heads with
a quantized pool. Neighbouring channels form groups. Each group has a scale and an offset of its own:

    x = scale * (n + offset / 8),  n from 0 to 2 ** bits - 1,  offset an integer

so a score is `sum over groups of scale * (q . n + offset / 8 * sum(q))`: a kernel can multiply queries with the packed
numbers. Scales are rounded up and offsets down, so that the grid always covers the group. A scale is bfloat16, which
has the range of float32.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped, UInt32

# Numbers are packed into words of 16 bits, not bytes: Pallas's Triton lowering counts in 32-bit numbers up to 2 ** 32
# bytes, and so cannot address more than 2 ** 31 elements of one byte.
WORD_BITS = 16

BITS = {"int8": 8, "int4": 4}

# Groups of a key, at least. A value has one: a softmax amplifies the errors of keys, not of values.
KEY_GROUPS = 4
# Steps of an offset between two numbers.
FINE = 8
# Offsets are 16-bit integers.
MOST_OFFSET = 2**15 - 1

# The smallest scale: below it bfloat16 loses bits, and processors that flush subnormal numbers lose all of them.
TINY = float(jnp.finfo(jnp.bfloat16).tiny)
# The largest number: the whole range of a group must be a float32 too, in the Hadamard basis of up to 256 channels.
HUGE = float(jnp.finfo(jnp.bfloat16).max) / 64


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words", "grid"], meta_fields=["head_dim", "bits"])
@dataclass(frozen=True)
class Quantized:
    """Rows `[..., H]` of numbers in few bits: a pool, a part of one, or a kernel's references to one.

    Attributes:
        words: `[..., W]` uint16; channel h is in word `h % W` at bit `bits * (h // W)`, with `W` words a row.
        grid: `[..., C]` uint32, one per group: the scale in the upper half, as bfloat16, the offset in the lower one.
        head_dim: H (static).
        bits: 8 or 4 (static).
    """

    # Arrays; before a compilation, shapes; inside a kernel, references.
    words: Any
    grid: Any
    head_dim: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return (*self.words.shape[:-1], self.head_dim)

    @property
    def groups(self) -> int:
        """Groups of channels in a row."""
        return self.grid.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the stored numbers."""
        return jnp.dtype(f"uint{self.bits}")


Stored = Float[Array, "..."] | Quantized


def empty(shape: tuple[int, ...], dtype: str, *, values: bool = False) -> Stored:
    """Rows of zeros, of keys or of values; `dtype` is one of jax's or a name in `BITS`.

    Raises:
        ValueError: rows that do not fill whole words.
    """
    if dtype not in BITS:
        return jnp.zeros(shape, jnp.dtype(dtype))
    bits, head_dim = BITS[dtype], shape[-1]
    if head_dim * bits % WORD_BITS:
        raise ValueError(f"{dtype} needs a head dim that is a multiple of {WORD_BITS // bits}, got {head_dim}")
    words = jnp.zeros((*shape[:-1], head_dim * bits // WORD_BITS), jnp.uint16)
    # Groups are powers of two, for kernels, and divide both halves of a key, for `outliers_first`.
    group = _block(head_dim) if values else min(_block(head_dim // 2), max(1, head_dim // KEY_GROUPS))
    return Quantized(words, jnp.zeros((*shape[:-1], head_dim // group), jnp.uint32), head_dim, bits)


def any_quantized(pools: Iterable[Stored]) -> bool:
    """Whether a pool is quantized."""
    return any(isinstance(pool, Quantized) for pool in pools)


def store(x: Float[Array, "*rows H"], like: Stored) -> Stored:
    """`x` as `like` stores it; numbers beyond `HUGE` are clipped if it is quantized."""
    if not isinstance(like, Quantized):
        return x.astype(like.dtype)
    return quantize(hadamard(jnp.clip(x.astype(jnp.float32), -HUGE, HUGE)), like.bits, like.groups)


def read(stored: Stored, dtype: jnp.dtype) -> Float[Array, "*rows H"]:
    """Stored numbers, for use with numbers of `dtype`: quantized ones in that type and in the Hadamard basis."""
    return dequantize(stored, dtype) if isinstance(stored, Quantized) else stored


def read_dtype(stored: Any, dtype: jnp.dtype) -> jnp.dtype:
    """Data type of the result of `read`."""
    return dtype if isinstance(stored, Quantized) else stored.dtype


def compute_dtype(q: Any, k: Any) -> np.dtype:
    """Data type of products of queries and keys: theirs if they agree, else their common type, at least float32."""
    of_keys = read_dtype(k, q.dtype)
    return q.dtype if q.dtype == of_keys else np.promote_types(np.promote_types(np.float32, q.dtype), of_keys)


def hadamard(x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
    """Rows in the Hadamard basis, or back: the transform is orthogonal and its own inverse. Computed in float32.

    A head dim that is no power of two is transformed in blocks of the largest power of two that divides it.
    """
    block = _block(x.shape[-1])
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    matrix = jnp.asarray(_matrix(block))
    turned = jnp.einsum("...h,hg->...g", blocks, matrix, precision=lax.Precision.HIGHEST)
    return turned.reshape(x.shape).astype(x.dtype)


def outliers_first(size: Float[Array, "*heads H"]) -> Int32[Array, "*heads H"]:
    """An order of channels of queries and keys for which large offsets of a few keys' channels cost no precision.

    In the Hadamard basis, some channels are a constant in each group of the new channels, which the group's offset
    represents whatever its size. These places get the channels with the largest `size`, in pairs that RoPE rotates
    together, h and `h + H // 2`: a bias of keys stays in its pair at any position.

    Returns:
        For each place, the channel to put there; a pair stays one.
    """
    head_dim = size.shape[-1]
    half, block = head_dim // 2, _block(head_dim)
    pairs = jnp.square(size[..., :half]) + jnp.square(size[..., half:])
    order = jnp.argsort(-pairs, axis=-1, stable=True)

    def constant_over(place: int) -> int:
        """Neighbouring channels of the Hadamard basis over which a channel of the rows is a constant."""
        return _block(place % block or block)

    # The places that are constant over the largest groups come first.
    best = [-min(constant_over(place), constant_over(place + half)) for place in range(half)]
    rank = np.argsort(np.argsort(best, kind="stable"))
    first = order[..., rank].astype(jnp.int32)
    return jnp.concatenate([first, first + half], axis=-1)


def quantize(x: Float[Array, "*rows H"], bits: int, groups: int) -> Quantized:
    """Round every group of channels to its own grid; no change of the basis."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    scale, offset = fit_grid(grouped.min(-1), grouped.max(-1), bits)
    steps = to_steps(grouped, scale[..., None], offset[..., None], bits)
    parts = WORD_BITS // bits
    numbers = steps.astype(jnp.uint16).reshape(*x.shape[:-1], parts, x.shape[-1] // parts)
    words = functools.reduce(jnp.bitwise_or, (numbers[..., i, :] << jnp.uint16(i * bits) for i in range(parts)))
    return Quantized(words, packed_grid(scale, offset), x.shape[-1], bits)


def fit_grid(
    low: Float[Array, "*groups"], high: Float[Array, "*groups"], bits: int, *, divide: Callable[..., Array] = jnp.divide
) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
    """The scale of a group with these extremes, and its offset in steps."""
    # An offset is rounded down by less than one of its steps. A product, since XLA divides by a constant in two ways.
    scale = jnp.maximum((high - low) * (1 / (2**bits - 1 - 1 / FINE)), jnp.maximum(-low, high) * (FINE / MOST_OFFSET))
    scale = jnp.maximum(_rounded_up(scale), TINY)
    return scale, jnp.floor(divide(low, scale) * FINE)


def to_steps(
    x: Float[Array, "*n"],
    scale: Float[Array, "*g"],
    offset: Float[Array, "*g"],
    bits: int,
    *,
    divide: Callable[..., Array] = jnp.divide,
    rounded: Callable[[Array], Array] = jnp.round,
) -> Float[Array, "*n"]:
    """The integers on a grid that are nearest to `x`."""
    return jnp.clip(rounded(divide(x, scale) - offset / FINE), 0, 2**bits - 1)


def packed_grid(scale: Float[Array, "*groups"], offset: Float[Array, "*groups"]) -> UInt32[Array, "*groups"]:
    """Scales and offsets as they are stored."""
    lower = lax.bitcast_convert_type(offset.astype(jnp.int32), jnp.uint32) & jnp.uint32(0xFFFF)
    return lax.bitcast_convert_type(scale, jnp.uint32) | lower


def dequantize(q: Quantized, dtype: jnp.dtype) -> Float[Array, "*rows H"]:
    """The numbers, computed in float32 and rounded to `dtype`."""
    parts = WORD_BITS // q.bits
    words = jnp.broadcast_to(q.words[..., None, :], (*q.words.shape[:-1], parts, q.words.shape[-1]))
    shifts = lax.broadcasted_iota(jnp.uint16, words.shape, words.ndim - 2) * jnp.uint16(q.bits)
    numbers = (words >> shifts) & jnp.uint16(2**q.bits - 1)
    return on_grid(numbers.reshape(q.shape), q.grid, dtype)


def on_grid(
    numbers: Shaped[Array, "*rows H"], grid: UInt32[Array, "*rows C"], dtype: jnp.dtype
) -> Float[Array, "*rows H"]:
    """`scale * (n + offset / 8)`, exact in float32."""
    scale, offset = scale_and_offset(grid)
    groups = numbers.astype(jnp.float32).reshape(*grid.shape, numbers.shape[-1] // grid.shape[-1])
    return ((groups + offset[..., None]) * scale[..., None]).reshape(numbers.shape).astype(dtype)


def scale_and_offset(grid: UInt32[Array, "*rows C"]) -> tuple[Float[Array, "*rows C"], Float[Array, "*rows C"]]:
    """A group's scale, and its offset in units of the scale."""
    scale, shifted, by = scale_and_shifted(grid)
    return scale, (shifted - jnp.float32(by)) * jnp.float32(1 / FINE)


def scale_and_shifted(grid: UInt32[Array, "*rows"]) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"], float]:
    """A group's scale, and its offset in steps, greater by a constant, which is the third result."""
    # A bfloat16 is the upper half of a float32.
    scale = lax.bitcast_convert_type(grid & jnp.uint32(0xFFFF0000), jnp.float32)
    # The signed integer plus 2^15, in the last bits of 2^23: no GPU converts integers as fast.
    bits = (grid & jnp.uint32(0xFFFF)) ^ jnp.uint32(0x4B008000)
    return scale, lax.bitcast_convert_type(bits, jnp.float32), 2.0**23 + 2.0**15


def _rounded_up(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Float32 numbers, not negative, rounded up to ones that bfloat16 can represent."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    away = jnp.where((bits & jnp.uint32(0xFFFF)) != 0, jnp.uint32(0x10000), jnp.uint32(0))
    return lax.bitcast_convert_type((bits & jnp.uint32(0xFFFF0000)) + away, jnp.float32)


def _block(number: int) -> int:
    """The largest power of two that divides a number."""
    return number & -number


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of a power of two, orthonormal; symmetric."""
    matrix: np.ndarray = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (matrix / np.sqrt(size)).astype(np.float32)
