"""A cache whose heads hold different numbers of tokens, all in one array. Knows no rule.

The slots of a head are contiguous, heads are in the order of layers; unused slots at the end belong to no head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from duo_eval.methods.method import Memory
from pallas_kernels.merge import Softmax, accumulate, empty, partial_of
from pallas_kernels.schedule import cdiv

# Slots read at a time.
BLOCK = 256


class Ragged(NamedTuple):
    """`M` slots of `P = L * K` heads."""

    k: Float[Array, "M H"]
    v: Float[Array, "M H"]
    position: Int32[Array, "M"]  # -1: an empty slot
    score: Float[Array, "M"]  # attention that a token received so far; `[0]` for a rule that does not use it
    kind: Int32[Array, "M"]  # kind of the token; `[0]` for a rule that does not use it
    head: Int32[Array, "M"]  # head that owns the slot; P: none
    offset: Int32[Array, "P"]  # first slot of each head
    size: Int32[Array, "P"]  # slots of each head

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return self.k.nbytes + self.v.nbytes

    def memory(self, held: int, peak_nbytes: int, per_head: np.ndarray) -> Memory:
        """Bytes that a sequence takes now: `held` slots have a token, `per_head` is what its rule stores beside."""
        metadata = sum(x.nbytes for x in self[2:]) + per_head.nbytes
        return Memory(self.nbytes, self.nbytes // self.k.shape[0] * held, peak_nbytes, metadata)


class Layout(NamedTuple):
    """Where the tokens of a prompt go, and the ranges of the heads; see `Ragged`."""

    source: Int32[np.ndarray, "M"]  # index of each slot's token among the prompt's `P * stride`
    position: Int32[np.ndarray, "M"]
    head: Int32[np.ndarray, "M"]
    offset: Int32[np.ndarray, "P"]
    size: Int32[np.ndarray, "P"]


def layout(held: Bool[np.ndarray, "P T"], size: Int[np.ndarray, "P"], *, stride: int, slots: int) -> Layout:
    """Slots for the tokens that each head holds, `size` slots for each head, out of `slots`.

    `stride` is the number of tokens that are stored for each head of the prompt, padding included.
    """
    heads = len(held)
    offset = np.cumsum(size) - size
    source, position = np.zeros(slots, np.int32), np.full(slots, -1, np.int32)
    head = np.full(slots, heads, np.int32)
    for index in range(heads):
        tokens = np.flatnonzero(held[index])
        where = slice(offset[index], offset[index] + len(tokens))
        source[where], position[where] = index * stride + tokens, tokens
        head[offset[index] : offset[index] + size[index]] = index
    return Layout(source, position, head, offset.astype(np.int32), size.astype(np.int32))


@jax.jit
def compress(k: Float[Array, "L K S H"], v: Float[Array, "L K S H"], source: Int32[Array, "M"], *rest: Array) -> Ragged:
    """The cache with the tokens of a prompt that stay; `rest` are the other fields of `Ragged`."""
    return Ragged(*(x.reshape(-1, x.shape[-1])[source] for x in (k, v)), *rest)


def evicted(priority: Float[Array, "M"], cache: Ragged) -> Int32[Array, "P"]:
    """Slot of each head for a new token: an empty one, else that of the lowest priority, among equals the oldest."""
    heads = cache.offset.shape[0]

    def least(values: Array) -> Array:
        return jax.ops.segment_min(values, cache.head, num_segments=heads + 1, indices_are_sorted=True)

    none = np.iinfo(np.int32).max
    priority = jnp.where(cache.position < 0, -jnp.inf, priority)
    lowest = priority == least(priority)[cache.head]
    oldest = least(jnp.where(lowest, cache.position, none))[cache.head]
    slots = jnp.arange(priority.shape[0], dtype=jnp.int32)
    return least(jnp.where(lowest & (cache.position == oldest), slots, none))[:heads]


def attend_one(
    q: Float[Array, "K G H"], cache: Ragged, first: int, *, remember: bool = True
) -> tuple[Float[Array, "K G H"], Float[Array, "_"]]:
    """Attend from one token in the heads from `first` on: the output, and the scores plus its weights (group mean).

    Without `remember`, the scores stay as they are.
    """
    num_heads, group, head_dim = q.shape
    block = min(BLOCK, cache.k.shape[0])

    def one_head(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, score = carry
        begin, size = cache.offset[first + i], cache.size[first + i]
        queries = q[i][None]

        def load(j: Array) -> tuple[Array, Array, Array]:
            start = begin + j * block
            at = jnp.minimum(start, cache.k.shape[0] - block)
            index = at + jnp.arange(block, dtype=jnp.int32)
            held = lax.dynamic_slice_in_dim(cache.position, at, block) >= 0
            return at, lax.dynamic_slice_in_dim(cache.k, at, block), held & (index >= start) & (index < begin + size)

        def add(j: Array, state: Softmax) -> Softmax:
            at, keys, seen = load(j)
            values = lax.dynamic_slice_in_dim(cache.v, at, block)
            return accumulate(state, queries, keys[None], values[None], seen[None, None, :])

        blocks = cdiv(size, block)
        state = lax.fori_loop(jnp.int32(0), blocks, add, empty((1, group), head_dim))
        attended = partial_of(state, q.dtype)
        out = lax.dynamic_update_index_in_dim(out, attended.out[0], i, 0)
        if not remember:
            return out, score
        total = attended.log_sum[0]

        def add_weights(j: Array, score: Array) -> Array:
            at, keys, seen = load(j)
            logits = jnp.einsum("gh,sh->gs", q[i], keys, preferred_element_type=jnp.float32) * head_dim**-0.5
            weights = jnp.where(seen, jnp.exp(logits - total[:, None]).mean(0), 0.0)
            return lax.dynamic_update_slice_in_dim(score, lax.dynamic_slice_in_dim(score, at, block) + weights, at, 0)

        return out, lax.fori_loop(jnp.int32(0), blocks, add_weights, score)

    return lax.fori_loop(jnp.int32(0), jnp.int32(num_heads), one_head, (jnp.zeros_like(q), cache.score))
