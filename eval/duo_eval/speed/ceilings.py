"""What this device can do at most: the rates that floors are computed from.

Measured next to each result, not looked up: machines are shared, and their rates change.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.timing import fastest

# Side of the square matrices whose product gives the rate of operations; a GPU needs larger ones to be busy.
MATMUL, MATMUL_ON_GPU = 2048, 8192
# Bytes of the matrix that is read once; far more than any cache holds.
READ, READ_ON_GPU = 1 << 28, 1 << 31


def flops_per_second(dtype: str | jnp.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = MATMUL if jax.default_backend() == "cpu" else MATMUL_ON_GPU
    square = jnp.ones((side, side), dtype)
    return 2 * side**3 / fastest(jax.jit(jnp.matmul), square, square)


def bytes_per_second() -> float:
    """Bytes a second read from memory: by a product with a vector, as in a decode step, or by a sum."""
    size = READ if jax.default_backend() == "cpu" else READ_ON_GPU
    matrix = jnp.ones((size // 4 // 2048, 2048), jnp.float32)
    vector = jnp.ones(2048, jnp.float32)
    return matrix.nbytes / min(fastest(jax.jit(jnp.matmul), matrix, vector), fastest(jax.jit(jnp.sum), matrix))
