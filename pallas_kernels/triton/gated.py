"""Attention for training gates: full and streaming attention by the flash kernel, with a backward pass of their own."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpus import tiles_for
from pallas_kernels.mixing import mix
from pallas_kernels.triton.backward import flash_gradients
from pallas_kernels.triton.flash import flash_attention
from pallas_kernels.triton.tile import check
from pallas_kernels.types import Heads
from pallas_kernels.window import Window


def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gates: Float[Array, "K"],
    *,
    window: Window,
    full: Float[Array, "B T N H"] | None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.gated_attention`."""
    full = full_attention(q, k, v) if full is None else full
    return mix(gates, full, _attention(q, k, v, window))


def full_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.full_attention`."""
    return _attention(q, k, v, None)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, window):
    """Causal attention: over all earlier tokens if `window` is None, else over what it sees."""
    return _forward(q, k, v, window)[0]


def _forward(q, k, v, window):
    check(q, k, v)
    batch, length, _, head_dim = q.shape
    num_kv_heads = k.shape[2]
    heads = Heads(jnp.full((num_kv_heads,), window is None), jnp.zeros((num_kv_heads,), jnp.int32))
    start = jnp.zeros((batch,), jnp.int32)
    tiles = tiles_for("flash", head_dim, q.dtype.itemsize)
    out, log_total = flash_attention(
        q,
        k,
        v,
        None,
        heads,
        start=start,
        lengths=start + length,
        window=window or Window(0, 1),
        tiles=tiles,
    )
    return out, (q, k, v, out, log_total)


def _backward(window, residuals, grad):
    q, k, v, out, log_total = residuals
    tiles = tiles_for("backward", q.shape[3], q.dtype.itemsize)
    # Float32: a difference of two nearly equal sums is taken with it.
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return flash_gradients(q, k, v, grad, log_total, delta, window=window, tiles=tiles)


_attention.defvjp(_forward, _backward)
