"""Which token sits where in a ring, and which keys a head may see: the arithmetic that all backends share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Int32


def consecutive(start: Int32[Array, "B"], count: int) -> Int32[Array, "B count"]:
    """Positions `start, start + 1, ...` of each row."""
    return start[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]


def visible(
    q_pos: Int[Array, "*q"], k_pos: Int[Array, "*k"], *, sink_size: int, recent_size: int
) -> Bool[Array, "..."]:
    """Which keys a streaming head may see (paper section 2.1): sinks and the recent window, never the future.

    `q_pos` and `k_pos` broadcast against each other. The window counts the query's own position.
    """
    return (k_pos <= q_pos) & ((k_pos < sink_size) | (k_pos > q_pos - recent_size))


def ring_index(position: Int[Array, "*p"], *, sink_size: int, recent_size: int) -> Int[Array, "*p"]:
    """Index in the ring at which a token's key lies."""
    window = sink_size + (position - sink_size) % max(recent_size, 1)
    return jnp.where(position < sink_size, position, window)


def ring_positions(length: Int32[Array, "B"], *, sink_size: int, recent_size: int) -> Int32[Array, "B R"]:
    """Position of the token at each ring index once `length` tokens are in; -1 where nothing was written yet."""
    index = jnp.arange(sink_size + recent_size, dtype=jnp.int32)[None, :]
    return position_at(index, length[:, None], sink_size=sink_size, recent_size=recent_size)


def position_at(
    index: Int[Array, "*i"], length: Int[Array, "*n"], *, sink_size: int, recent_size: int
) -> Int[Array, "..."]:
    """Position of the token at a ring index once `length` tokens are in; -1 where nothing was written yet."""
    last = length - 1
    # The newest position that maps to this index: a ring index and its positions agree modulo `recent_size`. An index
    # beyond `last` was never written, and stays beyond it.
    newest = last - lax.rem(last - index, lax.full_like(last - index, max(recent_size, 1)))
    position = jnp.where(index < sink_size, index, newest)
    # Not Python numbers: Pallas lowers a choice between two of those to invalid Triton IR.
    first = jnp.where(index < sink_size, jnp.int32(0), jnp.int32(sink_size))
    held = (position <= last) & (position >= first) & (index < sink_size + recent_size)
    return jnp.where(held, position, jnp.int32(-1))
