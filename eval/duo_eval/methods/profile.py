"""A profile of a prompt: its keys and values under full attention, and how much attention each token received.

Knows no rule.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from duo_eval.methods.eviction import attention_weights, by_head
from duo_jax import Model
from pallas_kernels import full_attention
from pallas_kernels.schedule import block_at, cdiv

# Queries whose weights are in memory at once while the prompt is profiled.
PROFILE_BLOCK = 128


class Profile(NamedTuple):
    """A prompt's keys and values, and the attention that each token received: the mean over queries and a group."""

    k: Float[Array, "L K S H"]
    v: Float[Array, "L K S H"]
    total: Float[Array, "L K S"]
    near: Float[Array, "L K S"]  # its part from queries that have the token in their local window


def profile(
    model: Model, tokens: Int32[np.ndarray, "S"], length: int, window: Int32[Array, ""]
) -> tuple[Float[Array, "V"], Profile]:
    """A prompt of `length` tokens, padded at its end: the logits after its last token, and its profile.

    `window` is the size of a query's local window, which includes the query's own token.
    """
    config = model.config
    shape = config.num_layers, config.num_kv_heads, len(tokens)
    keys, values = (jnp.zeros((*shape, config.head_dim), model.dtype) for _ in range(2))
    return _profile(model, tokens, Profile(keys, values, jnp.zeros(shape), jnp.zeros(shape)), np.int32(length), window)


@functools.partial(jax.jit, donate_argnums=2)
def _profile(
    model: Model, tokens: Int32[Array, "S"], empty: Profile, length: Int32[Array, ""], window: Int32[Array, ""]
) -> tuple[Float[Array, "V"], Profile]:
    size = tokens.shape[0]
    position = jnp.arange(size, dtype=jnp.int32)
    block = min(PROFILE_BLOCK, size)

    def received(q: Float[Array, "K G S H"], k: Float[Array, "K S H"]) -> tuple[Array, Array]:
        def some_queries(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            first, index = block_at(i, block, size)
            rows = index[0]
            seen = position[None, :] <= rows[:, None]
            weights = attention_weights(lax.dynamic_slice_in_dim(q, first, block, 2), [k], seen[None]).mean(1)
            counts = (rows >= i * block) & (rows < length)
            weights = jnp.where(counts[None, :, None], weights, 0.0)
            is_near = position[None, :] > rows[:, None] - window
            return sums[0] + weights.sum(1), sums[1] + jnp.where(is_near[None], weights, 0.0).sum(1)

        nothing = jnp.zeros(k.shape[:2], jnp.float32)
        total, near = lax.fori_loop(jnp.int32(0), cdiv(length, block), some_queries, (nothing, nothing))
        return total / length.astype(jnp.float32), near / length.astype(jnp.float32)

    def attend(state: Profile, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Profile]:
        keys, values = k[0].transpose(1, 0, 2), v[0].transpose(1, 0, 2)
        new = (keys, values, *received(by_head(q, keys.shape[0]), keys))
        return full_attention(q, k, v), Profile(*(x.at[layer].set(y) for x, y in zip(state, new, strict=True)))

    decoder = model.decoder
    hidden, result = decoder.hidden(tokens[None], position[None], attend, empty)
    return decoder.logits(hidden[0, length - 1]), result
