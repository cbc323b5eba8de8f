"""Quantized checkpoints of other libraries: their values, and what is refused before weights are read."""

import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.checkpoint.mxfp4 import mxfp4_values


def plain_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The specification, number by number, in float64."""
    out = []
    for data, exponent in zip(blocks.reshape(-1, 16), scales.ravel(), strict=True):
        for nibble in (x for byte in data.tolist() for x in (byte & 15, byte >> 4)):
            power, mantissa = nibble >> 1 & 3, nibble & 1
            size = (1 + mantissa / 2) * 2.0 ** (power - 1) if power else mantissa / 2
            out.append((-size if nibble & 8 else size) * 2.0 ** (int(exponent) - 127))
    return np.array(out).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_dequantized_exactly(dtype):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 4, 16)).astype(np.uint8)
    scales = rng.integers(100, 140, (2, 3, 4)).astype(np.uint8)
    values = mxfp4_values(blocks, scales, dtype=jnp.dtype(dtype))
    assert values.dtype == dtype and values.shape == (2, 3, 128)
    np.testing.assert_array_equal(np.asarray(values, np.float64), plain_mxfp4(blocks, scales))


def test_the_scales_of_mxfp4_reach_from_tiny_to_nan():
    ones = np.full((4, 16), 0x22, np.uint8)  # Two times 1.0 in every byte.
    values = mxfp4_values(ones, np.array([1, 127, 254, 255], np.uint8), dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(values[::32], np.float32([2.0**-126, 1, 2.0**127, np.nan]))
