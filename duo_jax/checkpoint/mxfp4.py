"""MXFP4: blocks of 32 numbers in 4 bits with a power of two as their scale, as gpt-oss stores experts. Knows no files.

The format is that of the OCP Microscaling specification 1.0: numbers are E2M1 (a sign, two bits of exponent, one of
mantissa), scales E8M0 (2 to the power of a byte minus 127; 255 stands for NaN). Every value is exact in bfloat16.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

if TYPE_CHECKING:
    import qwix  # imported when weights are quantized

# Numbers that share a scale.
BLOCK = 32
# The tensors that make `name`: its numbers, and their scales.
BLOCKS, SCALES = "_blocks", "_scales"
# Magnitudes of E2M1 by its lower three bits; the fourth is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks", "scales"], meta_fields=[])
@dataclass(frozen=True)
class Mxfp4:
    """A tensor `[..., in, out]` as gpt-oss stores it: `blocks [..., out, n, 16]` and `scales [..., out, n]`, bytes."""

    blocks: Any
    scales: Any

    def __getitem__(self, index: int) -> "Mxfp4":
        """One expert."""
        return Mxfp4(self.blocks[index], self.scales[index])

    def values(self) -> Float[Array, "*rows in out"]:
        """The dequantized tensor, in float32."""
        return mxfp4_values(self.blocks, self.scales, dtype=jnp.dtype("float32")).swapaxes(-1, -2)

    def kernel(self) -> "qwix.QArray":
        """The same numbers `[in, out]` in 4 bits, and their scales in bfloat16, in which they are exact."""
        import qwix

        ones = jnp.full(self.scales.shape, 127, jnp.uint8)
        numbers = mxfp4_values(self.blocks, ones, dtype=jnp.dtype("float4_e2m1fn"))
        scales = _power(self.scales).astype(jnp.bfloat16)
        return qwix.QArray(numbers.swapaxes(-1, -2), scales.swapaxes(-1, -2), None)


def mxfp4_shapes(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors that are stored as blocks and scales.

    Args:
        shapes: of all stored tensors, by name.
        dtypes: their data types, as safetensors names them.

    Raises:
        ValueError: blocks without scales or scales without blocks, or shapes that do not belong together, by name.
    """
    found = {}
    for part, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        names = [name for name, dtype in dtypes.items() if dtype == "U8" and name.endswith(part)]
        if alone := [name for name in names if dtypes.get(name.removesuffix(part) + other) != "U8"]:
            raise ValueError(f"{alone[0]} has no {other[1:]}: MXFP4 needs both as bytes; download the files again")
        if part == BLOCKS:
            found = {name.removesuffix(part): shapes[name] for name in names}
    for name, (*rows, last) in found.items():
        if last != BLOCK // 2 or len(rows) < 2 or tuple(rows) != shapes[name + SCALES]:
            raise ValueError(
                f"{name}{BLOCKS} {(*rows, last)} and {name}{SCALES} {shapes[name + SCALES]} do not belong together: "
                f"MXFP4 has [..., blocks, {BLOCK // 2}] and [..., blocks]"
            )
    return {name: (*rows[:-2], rows[-1] * BLOCK, rows[-2]) for name, (*rows, _) in found.items()}


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
