"""The simplest quantizations of GGUF, dequantized on the device: a sixth of the bytes goes there. Knows no files.

The values are those of the gguf package, to the last bit: a scale of 11 bits times a number of at most 8 is exact in
float32, so that at most one addition rounds. Other quantizations are left to that package, on the host.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Array, Float32, UInt8

Values = TypeVar("Values", Array, np.ndarray)


def _half(x: UInt8[Array, "n blocks 2"]) -> Float32[Array, "n blocks 1"]:
    """A number in half precision."""
    return jax.lax.bitcast_convert_type(x, jnp.dtype(jnp.float16)).astype(jnp.float32)[..., None]


def _nibbles(x: UInt8[Array, "n blocks 16"]) -> Float32[Array, "n blocks 32"]:
    """The lower halves of all bytes, then the upper ones."""
    shifts = jnp.array([0, 4], jnp.uint8).reshape(1, 1, 2, 1)
    shape = (*x.shape[:2], 2, x.shape[2])
    pairs = jnp.broadcast_to(x[:, :, None], shape) >> jnp.broadcast_to(shifts, shape)
    return (pairs & jnp.uint8(15)).astype(jnp.float32).reshape(*x.shape[:2], -1)


def _q4_0(x: UInt8[Array, "n blocks 18"]) -> Float32[Array, "n blocks 32"]:
    return _half(x[..., :2]) * (_nibbles(x[..., 2:]) - 8)


def _q4_1(x: UInt8[Array, "n blocks 20"]) -> Float32[Array, "n blocks 32"]:
    return _half(x[..., :2]) * _nibbles(x[..., 4:]) + _half(x[..., 2:4])


def _q8_0(x: UInt8[Array, "n blocks 34"]) -> Float32[Array, "n blocks 32"]:
    return _half(x[..., :2]) * jax.lax.bitcast_convert_type(x[..., 2:], jnp.dtype(jnp.int8)).astype(jnp.float32)


# Blocks of a quantization, as bytes, -> their values.
ON_DEVICE: Mapping[GGMLQuantizationType, Callable[[Array], Array]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["kind", "pairs"])
@dataclass(frozen=True)
class Blocks:
    """A quantized tensor.

    Attributes:
        data: its bytes, row by row.
        kind: a quantization of `ON_DEVICE` (static).
        pairs: see `in_halves` (static); None: the rows are in order.
    """

    data: UInt8[Array | np.ndarray, "n bytes"]
    kind: GGMLQuantizationType
    pairs: int | None = None

    def values(self) -> Float32[Array, "n m"]:
        """The dequantized tensor."""
        rows, size = len(self.data), GGML_QUANT_SIZES[self.kind][1]
        values = ON_DEVICE[self.kind](jnp.asarray(self.data).reshape(rows, -1, size)).reshape(rows, -1)
        return values if self.pairs is None else in_halves(values, self.pairs)


def in_halves(values: Values, pairs: int) -> Values:
    """Rows of queries or keys whose heads have `pairs` adjacent pairs for RoPE, in the order (half, pair)."""
    return values.reshape(-1, pairs, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
