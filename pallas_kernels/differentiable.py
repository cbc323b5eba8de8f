"""Training by a flash kernel: attention over a sequence's own keys, with a backward pass of its own.

The backward pass computes the weights again from the logarithm of their sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tiles import FlashTiles, tiles_for
from pallas_kernels.types import Heads, Partial
from pallas_kernels.window import Window
from pallas_kernels.works import Scope

# For retrieval heads, which look at no window.
NO_WINDOW = Window(0, 1)


class Arrays(NamedTuple):
    """What gradients are computed from."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    grad: Float[Array, "B T N H"]  # of the output
    log_sum: Float[Array, "B N T"]  # natural logarithm of the sum of each query's weights
    delta: Float[Array, "B N T"]  # sum over H of the output times its gradient, less the gradient of `log_sum`


def training_by(
    flash_attention: Callable[..., Partial],
    gradients: Callable[[Arrays, Window | None, FlashTiles], tuple[Array, Array, Array]],
) -> Callable[..., Partial]:
    """The training operation of a backend.

    Args:
        flash_attention: attention of a chunk, here a whole sequence, without pools.
        gradients: of queries, keys and values; a window of None is that of retrieval heads.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def training(q: Array, k: Array, v: Array, window: Window | None) -> Partial:
        """Causal attention: over all earlier tokens if `window` is None, else over the tokens that it shows."""
        return forward(q, k, v, window)[0]

    def forward(q: Array, k: Array, v: Array, window: Window | None) -> Any:
        batch, length, _, head_dim = q.shape
        num_kv_heads = k.shape[2]
        heads = Heads(jnp.full((num_kv_heads,), window is None), jnp.zeros((num_kv_heads,), jnp.int32))
        start, tiles = jnp.zeros((batch,), jnp.int32), tiles_for("flash", head_dim, q.dtype.itemsize)
        settings: dict[str, Any] = {"window": window or NO_WINDOW, "tiles": tiles}
        settings |= {"start": start, "lengths": start + length, "scope": Scope(start), "dtype": q.dtype}
        part = flash_attention(q, k, v, None, heads, **settings)
        return part, (q, k, v, part)

    def backward(window: Window | None, residuals: Any, gradient: Any) -> Any:
        q, k, v, (out, log_sum) = residuals
        grad, log_grad = gradient
        # Float32: the kernels subtract two nearly equal sums.
        delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1) - log_grad
        arrays = Arrays(q, k, v, grad, log_sum.swapaxes(1, 2), delta.swapaxes(1, 2))
        return gradients(arrays, window, tiles_for("backward", q.shape[3], q.dtype.itemsize))

    training.defvjp(forward, backward)
    return training
