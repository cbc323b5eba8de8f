"""What this device can do at most, and how calls are timed: the ceilings that floors are computed from.

Measured beside each result, not looked up: machines are shared, and what they can do changes.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Side of the square matrices whose product shows the rate of operations; a GPU needs larger ones to be busy.
MATMUL, MATMUL_ON_GPU = 2048, 8192
# Bytes of the matrix that is read once; far more than any cache holds.
READ, READ_ON_GPU = 1 << 28, 1 << 31


def seconds(call: Callable[..., Any], *args: Any) -> float:
    """Wall-clock seconds of one call, which returns when its work is done."""
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


def fastest(function: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of so many calls, after one that does not count."""
    jax.block_until_ready(function())
    return min(seconds(lambda: jax.block_until_ready(function())) for _ in range(times))


def flops_per_second(dtype: str | jnp.dtype, *, times: int = 3) -> float:
    """Operations a second of a large matrix product."""
    side = MATMUL if jax.default_backend() == "cpu" else MATMUL_ON_GPU
    square = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * side**3 / fastest(lambda: multiply(square, square), times)


def bytes_per_second(*, times: int = 3) -> float:
    """Bytes a second that are read from memory: by a product with a vector, as in a decode step, or by a sum."""
    size = READ if jax.default_backend() == "cpu" else READ_ON_GPU
    matrix = jnp.ones((size // 4 // 2048, 2048), jnp.float32)
    vector = jnp.ones(2048, jnp.float32)
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    return matrix.nbytes / min(fastest(lambda: product(matrix, vector), times), fastest(lambda: total(matrix), times))
