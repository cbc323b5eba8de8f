"""MXFP4: blocks of 32 numbers in 4 bits with a power of two as their scale, as gpt-oss stores experts. Knows no files.

The format is that of the OCP Microscaling specification 1.0: numbers are E2M1 (a sign, two bits of exponent, one of
mantissa), scales E8M0 (2 to the power of a byte minus 127; 255 stands for NaN). Every value is exact in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# Numbers that share a scale.
BLOCK = 32
# Magnitudes of E2M1 by its lower three bits; the fourth is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.partial(jax.jit, static_argnames="dtype")
def mxfp4_values(
    blocks: UInt8[Array | np.ndarray, "*rows n 16"], scales: UInt8[Array | np.ndarray, "*rows n"], *, dtype: jnp.dtype
) -> Float[Array, "*rows m"]:
    """The dequantized rows, 32 values for each block: a byte has an even value in its lower half, then an odd one.

    Args:
        blocks: bytes of the numbers, such as `gate_up_proj_blocks` of gpt-oss, `[experts, out, blocks, 16]`.
        scales: exponents, one byte for each block.
        dtype: of the values.
    """
    table = jnp.array([*_E2M1, *(-x for x in _E2M1)], jnp.float32)
    numbers = table[jnp.stack([blocks & jnp.uint8(15), blocks >> jnp.uint8(4)], axis=-1)]
    values = numbers.reshape(*scales.shape, BLOCK) * _power(scales)[..., None]
    return values.reshape(*scales.shape[:-1], -1).astype(dtype)


def _power(exponents: UInt8[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """2 to the power of each byte minus 127: a float32 has the same exponents, but not 0 and 255."""
    wide = jnp.asarray(exponents).astype(jnp.uint32)
    bits = jnp.where(wide == 0, jnp.uint32(1 << 22), jnp.where(wide == 255, jnp.uint32(0x7FC00000), wide << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
