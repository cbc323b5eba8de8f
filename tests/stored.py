"""Quantization as a program for each shape: called as it is, every operation in it is a program of its own."""

import jax

from pallas_kernels import quantized
from pallas_kernels.quantized import Quantized, Stored

dequantize = jax.jit(quantized.dequantize, static_argnames="dtype")
hadamard = jax.jit(quantized.hadamard)
quantize = jax.jit(quantized.quantize, static_argnames=("bits", "groups"))
_store = jax.jit(quantized.store)


def store(x: jax.Array, like: Stored) -> Stored:
    return _store(x, like) if isinstance(like, Quantized) else quantized.store(x, like)


def read(stored: Stored, dtype: jax.numpy.dtype) -> jax.Array:
    return dequantize(stored, dtype) if isinstance(stored, Quantized) else stored
