"""SnapKV (Li et al. 2024, arXiv 2404.14469): the prompt's last queries choose which of its tokens every head holds.

As in the paper, a layer chooses after the whole prompt was attended to: one layer at a time is stored in full, which
`peak_nbytes` counts. Generated tokens are never evicted.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from duo_eval.methods.eviction import (
    ALWAYS,
    EvictedState,
    Eviction,
    Held,
    Tokens,
    attention_weights,
    by_head,
    empty,
    keep,
    ranked,
)
from duo_jax import Model
from duo_jax.arguments import ArgumentError, whole_number
from duo_jax.generation.chunks import bucket
from pallas_kernels import full_attention


@dataclass(frozen=True)
class SnapKV(Eviction):
    """The observation window and the earlier tokens that it attends to most; `block` is not used."""

    window: int = 32
    """Last tokens of the prompt, which observe and stay."""
    pool: int = 7
    """Neighbouring positions, an odd number, that share the largest of their votes, so that clusters of tokens stay."""

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        whole_number("window", self.window, 1)
        if whole_number("pool", self.pool, 1) % 2 == 0:
            raise ArgumentError("pool", f"must be odd, got {self.pool}")

    def least(self, length: int) -> int:
        """See `Eviction.least`: the window and one earlier token."""
        return self.window + 1

    def limit(self, budget: float, prompt: int, length: int) -> int:
        """See `Eviction.limit`: the budget is for the prompt; generated tokens are added to it."""
        return super().limit(budget, prompt, prompt) + length - prompt

    def capacity(self, budget: float, length: int, room: int) -> int:
        """See `Eviction.capacity`."""
        return super().capacity(budget, length, 0) + bucket(room)

    def priority(self, tokens: Tokens) -> Float[Array, "K S"]:
        """See `Eviction.priority`: no token is evicted, there is a slot for each."""
        return jnp.zeros_like(tokens.score)

    def prefill(
        self, model: Model, tokens: Int32[np.ndarray, "T"], capacity: int, budget: float
    ) -> tuple[Float[Array, "V"], EvictedState]:
        """See `Eviction.prefill`."""
        length = len(tokens)
        limit = self.limit(budget, length, length)
        padded = np.pad(tokens, (0, bucket(length) - length))
        logits, layers = _observe(self, model, padded, empty(model, capacity), np.int32(length), np.int32(limit))
        allocated = sum(x.k.nbytes + x.v.nbytes for x in layers)
        whole_layer = 2 * layers[0].k[:, 0].nbytes * len(padded)
        return logits, EvictedState(layers, length, length, budget, limit, allocated + whole_layer)

    def votes(
        self, q: Float[Array, "K G T H"], k: Float[Array, "K T H"], length: Int32[Array, ""]
    ) -> Float[Array, "K T"]:
        """Weights of the window's queries, summed over queries, averaged over the group, pooled over neighbours."""
        size = q.shape[2]
        window = min(self.window, size)
        first = jnp.maximum(length - window, 0)
        position = jnp.arange(size, dtype=jnp.int32)
        observers = first + position[:window]
        seen = position[None, :] <= observers[:, None]
        weights = attention_weights(lax.dynamic_slice_in_dim(q, first, window, 2), [k], seen[None])
        # With a prompt shorter than the window, some rows are padding.
        votes = jnp.where((observers < length)[None, None, :, None], weights, 0.0).sum(2).mean(1)
        earlier = jnp.where(position < first, votes, 0.0)
        pooled = lax.reduce_window(earlier, 0.0, lax.max, (1, self.pool), (1, 1), "SAME")
        return jnp.where(position < first, pooled, ALWAYS)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _observe(
    rule: SnapKV,
    model: Model,
    tokens: Int32[Array, "T"],
    layers: tuple[Held, ...],
    length: Int32[Array, ""],
    limit: Int32[Array, ""],
) -> tuple[Float[Array, "V"], tuple[Held, ...]]:
    """Take in a whole prompt, padded at its end: the logits after its last token, and the caches."""
    position = jnp.arange(tokens.shape[0], dtype=jnp.int32)

    def attend(state: tuple[Held, ...], layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Held, ...]]:
        keys, values = k[0].transpose(1, 0, 2), v[0].transpose(1, 0, 2)
        votes = rule.votes(by_head(q, keys.shape[0]), keys, length)
        valid = jnp.broadcast_to(jnp.where(position < length, position, -1), votes.shape)
        order = ranked(votes, valid)
        kept = keep(order, keys, values, valid, votes, state[layer].k.shape[1], limit)
        return full_attention(q, k, v), (*state[:layer], kept, *state[layer + 1 :])

    decoder = model.decoder
    hidden, layers = decoder.hidden(tokens[None], position[None], attend, layers)
    return decoder.logits(hidden[0, length - 1]), layers
