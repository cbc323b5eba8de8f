"""Attention by blocks of keys: a running softmax, its gradients, and where a block of a given size lies."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.quantized import Stored, read_dtype

# Kernels take powers of two: a GPU has no other exponential.
LOG2_E = 1.4426950408889634

# Finite, so that a block with no visible key leaves no NaN: its weights vanish at the first visible one.
MASKED = -1e30


class Softmax(NamedTuple):
    """Running softmax over key blocks (Milakov & Gimelshein 2018): maximum, sum of weights, weighted values."""

    maximum: Float[Array, "B M"]
    total: Float[Array, "B M"]
    values: Float[Array, "B M H"]


def accumulate(
    state: Softmax,
    q: Float[Array, "B M H"],
    k: Float[Array, "B S H"],
    v: Float[Array, "B S H"],
    keep: Bool[Array, "#B #M S"],
) -> Softmax:
    """Add one block of keys to a running softmax; products in `compute_dtype`, sums in float32."""
    compute = compute_dtype(q, k)
    f32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bmh,bsh->bms", q.astype(compute), k.astype(compute), **f32) * q.shape[-1] ** -0.5
    scores = jnp.where(keep, scores, MASKED)
    maximum = jnp.maximum(state.maximum, scores.max(-1))
    weights = jnp.exp(scores - maximum[:, :, None])
    decay = jnp.exp(state.maximum - maximum)
    values = jnp.einsum("bms,bsh->bmh", weights.astype(compute), v.astype(compute), **f32)
    total = state.total * decay + weights.sum(-1)
    return Softmax(maximum, total, state.values * decay[:, :, None] + values)


def compute_dtype(q: Array, k: Stored) -> np.dtype:
    """Type of the products of queries and keys: theirs if they agree, else one that holds both, float32 at least."""
    theirs = read_dtype(k, q.dtype)
    return q.dtype if q.dtype == theirs else np.promote_types(np.promote_types(np.float32, q.dtype), theirs)


def empty(batch: int, rows: int, head_dim: int) -> Softmax:
    """A softmax over no key yet."""
    zeros = jnp.zeros((batch, rows), jnp.float32)
    return Softmax(zeros + MASKED, zeros, jnp.zeros((batch, rows, head_dim), jnp.float32))


def finish(state: Softmax, dtype: jnp.dtype) -> Float[Array, "B M H"]:
    """The weighted mean of the values; zero where no block was visited at all."""
    return (state.values / jnp.maximum(state.total, 1e-30)[:, :, None]).astype(dtype)


def log_sum_exp(state: Softmax) -> Float[Array, "B M"]:
    """Logarithm of the softmax's denominator: what a backward pass needs to compute its weights again."""
    return state.maximum + jnp.log(jnp.maximum(state.total, 1e-30))


def gradients(
    q: Float[Array, "B M H"],
    k: Float[Array, "B S H"],
    v: Float[Array, "B S H"],
    keep: Bool[Array, "#B #M S"],
    log_total: Float[Array, "B M"],
    delta: Float[Array, "B M"],
    grad: Float[Array, "B M H"],
) -> tuple[Float[Array, "B M H"], Float[Array, "B S H"], Float[Array, "B S H"]]:
    """What one block of queries and keys adds to the gradients of q, k and v, float32 (Dao 2023, algorithm 2).

    `delta` is the sum over H of the output times its gradient `grad`.
    """
    scale, f32 = q.shape[-1] ** -0.5, {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bmh,bsh->bms", q, k, **f32) * scale
    weights = jnp.where(keep, jnp.exp(jnp.minimum(scores - log_total[:, :, None], 0.0)), 0.0)
    d_weights = jnp.einsum("bmh,bsh->bms", grad, v, **f32)
    d_scores = (weights * (d_weights - delta[:, :, None]) * scale).astype(q.dtype)
    d_q = jnp.einsum("bms,bsh->bmh", d_scores, k, **f32)
    d_k = jnp.einsum("bms,bmh->bsh", d_scores, q, **f32)
    d_v = jnp.einsum("bms,bmh->bsh", weights.astype(grad.dtype), grad, **f32)
    return d_q, d_k, d_v


def block_at(j: Array, block: int, size: int) -> tuple[Array, Int32[Array, "1 block"]]:
    """Where block j begins and the indices in it; the last one reaches back rather than over the end."""
    begin = jnp.minimum(j * block, size - block)
    return begin, (begin + jnp.arange(block, dtype=jnp.int32))[None, :]


def cdiv(a: Array, b: int) -> Array:
    """Blocks of size `b` that cover `a`, which is not negative."""
    return div(a + (b - 1), b)


def div(a: Array, b: Array | int) -> Array:
    """`a // b` of numbers that are not negative: one instruction, where `//` asks for signs."""
    return lax.div(a, _like(a, b))


def rem(a: Array, b: Array | int) -> Array:
    """`a % b` of numbers that are not negative."""
    return lax.rem(a, _like(a, b))


def _like(a: Array, b: Array | int) -> Any:
    if not isinstance(b, int):
        return b
    # Mosaic cannot lower an operation that makes a number out of a number.
    return a.dtype.type(b) if a.ndim == 0 else lax.full_like(a, b)
