"""Keys and values in 8 or 4 bits: how pools store them, and how they are read back. Knows no attention.

Quantization is asymmetric, with one scale and one zero for each token of each head (the paper's 4-bit cache, section
3.4): a number is `scale * n + zero`, n from 0 to `2 ** bits - 1`. Zeros are rounded down and scales up, so that the
grid always covers the row. Both are bfloat16, which has the range of float32.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt32

# Numbers are packed into words of 16 bits, not bytes: Pallas's Triton lowering counts in 32-bit numbers up to 2 ** 32
# bytes, and so cannot address more than 2 ** 31 elements of one byte.
WORD_BITS = 16

BITS = {"int8": 8, "int4": 4}

# The smallest scale: below it bfloat16 loses bits, and processors that flush subnormal numbers lose all of them.
TINY = float(jnp.finfo(jnp.bfloat16).tiny)
# The largest number: the whole range of a row must be a float32 too.
HUGE = float(jnp.finfo(jnp.bfloat16).max) / 4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words", "grid"], meta_fields=["head_dim", "bits"])
@dataclass(frozen=True)
class Quantized:
    """Rows `[..., H]` of numbers in few bits: a pool, a part of one, or a kernel's references to one.

    Attributes:
        words: `[..., W]` uint16; channel h is in word `h % W` at bit `bits * (h // W)`, with `W` words a row.
        grid: `[...]` uint32, one per row: the scale in the upper half, the zero in the lower one, as bfloat16.
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
    def dtype(self) -> jnp.dtype:
        """Data type of the stored numbers."""
        return jnp.dtype(f"uint{self.bits}")


Stored = Float[Array, "..."] | Quantized


def empty(shape: tuple[int, ...], dtype: str) -> Stored:
    """Rows of zeros; `dtype` is one of jax's or a name in `BITS`.

    Raises:
        ValueError: rows that do not fill whole words.
    """
    if dtype not in BITS:
        return jnp.zeros(shape, jnp.dtype(dtype))
    bits, head_dim = BITS[dtype], shape[-1]
    if head_dim * bits % WORD_BITS:
        raise ValueError(f"{dtype} needs a head dim that is a multiple of {WORD_BITS // bits}, got {head_dim}")
    words = jnp.zeros((*shape[:-1], head_dim * bits // WORD_BITS), jnp.uint16)
    return Quantized(words, jnp.zeros(shape[:-1], jnp.uint32), head_dim, bits)


def any_quantized(pools: Iterable[Stored]) -> bool:
    """Whether a pool is quantized."""
    return any(isinstance(pool, Quantized) for pool in pools)


def store(x: Float[Array, "*rows H"], like: Stored) -> Stored:
    """`x` as `like` stores it."""
    return quantize(x, like.bits) if isinstance(like, Quantized) else x.astype(like.dtype)


def read(stored: Stored, dtype: jnp.dtype) -> Float[Array, "*rows H"]:
    """Stored numbers, for use with numbers of `dtype`: quantized ones in that type, others unchanged."""
    return dequantize(stored, dtype) if isinstance(stored, Quantized) else stored


def read_dtype(stored: Stored, dtype: jnp.dtype) -> jnp.dtype:
    """Data type of the result of `read`."""
    return dtype if isinstance(stored, Quantized) else stored.dtype


def compute_dtype(q: Array, k: Stored) -> np.dtype:
    """Data type of products of queries and keys: theirs if they agree, else their common type, at least float32."""
    of_keys = read_dtype(k, q.dtype)
    return q.dtype if q.dtype == of_keys else np.promote_types(np.promote_types(np.float32, q.dtype), of_keys)


def quantize(x: Float[Array, "*rows H"], bits: int) -> Quantized:
    """Round every row to its own grid; numbers beyond `HUGE` are clipped."""
    x = jnp.clip(x.astype(jnp.float32), -HUGE, HUGE)
    most = 2**bits - 1
    zero = _rounded(x.min(-1), up=False)
    scale = jnp.maximum(_rounded((x.max(-1) - zero) / most, up=True), TINY)
    steps = jnp.round((x - zero[..., None]) / scale[..., None])
    numbers = jnp.clip(steps, 0, most).astype(jnp.uint16)
    parts = WORD_BITS // bits
    numbers = numbers.reshape(*x.shape[:-1], parts, x.shape[-1] // parts)
    words = functools.reduce(jnp.bitwise_or, (numbers[..., i, :] << jnp.uint16(i * bits) for i in range(parts)))
    grid = lax.bitcast_convert_type(scale, jnp.uint32) | lax.bitcast_convert_type(zero, jnp.uint32) >> jnp.uint32(16)
    return Quantized(words, grid, x.shape[-1], bits)


def dequantize(q: Quantized, dtype: jnp.dtype) -> Float[Array, "*rows H"]:
    """The numbers, computed in float32 and rounded to `dtype`."""
    parts = WORD_BITS // q.bits
    words = jnp.broadcast_to(q.words[..., None, :], (*q.words.shape[:-1], parts, q.words.shape[-1]))
    shifts = lax.broadcasted_iota(jnp.uint16, words.shape, words.ndim - 2) * jnp.uint16(q.bits)
    numbers = (words >> shifts) & jnp.uint16(2**q.bits - 1)
    return on_grid(numbers.reshape(q.shape), q.grid, dtype)


def on_grid(
    numbers: Shaped[Array, "*rows H"], grid: UInt32[Array, "*rows"], dtype: jnp.dtype
) -> Float[Array, "*rows H"]:
    """`scale * n + zero` of each row."""
    scale, zero = scale_and_zero(grid)
    return (numbers.astype(jnp.float32) * scale[..., None] + zero[..., None]).astype(dtype)


def scale_and_zero(grid: UInt32[Array, "*rows"]) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """A row's scale and zero: a bfloat16 is the upper half of a float32."""
    halves = grid & jnp.uint32(0xFFFF0000), grid << jnp.uint32(16)
    scale, zero = (lax.bitcast_convert_type(half, jnp.float32) for half in halves)
    return scale, zero


def _rounded(x: Float[Array, "*n"], *, up: bool) -> Float[Array, "*n"]:
    """Float32 numbers rounded to ones that bfloat16 can represent, up or down."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    away = ((bits & jnp.uint32(0xFFFF)) != 0) & ((x > 0) == up)
    bits = (bits & jnp.uint32(0xFFFF0000)) + jnp.where(away, jnp.uint32(0x10000), jnp.uint32(0))
    return lax.bitcast_convert_type(bits, jnp.float32)
