"""The window of a streaming head: which keys it sees, and at which index of a ring each is stored."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Int32


@dataclass(frozen=True)
class Window:
    """The attention sinks and the recent window of a streaming head (paper section 2.1).

    A ring of `size` entries stores the visible keys: position `p` is at index `p` if `p < sink`, else at
    `sink + (p - sink) % recent`. `Window(0, 0)` sees nothing; it is the window of a cache in which no head streams.

    Attributes:
        sink: tokens at the start that stay visible.
        recent: most recent tokens that are visible, the query's own included.
    """

    sink: int
    recent: int

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 0:
            raise ValueError(f"a window needs sink >= 0 and recent >= 0, got {self.sink=} and {self.recent=}")

    @property
    def size(self) -> int:
        """Entries of a ring."""
        return self.sink + self.recent

    def visible(self, q_pos: Int[Array, "*q"], k_pos: Int[Array, "*k"]) -> Bool[Array, "..."]:
        """Which keys a query sees: sinks and the recent window, never the future. The arguments broadcast."""
        return (k_pos <= q_pos) & ((k_pos < self.sink) | (k_pos > q_pos - self.recent))

    def index(self, position: Int[Array, "*p"]) -> Int[Array, "*p"]:
        """Ring index of the token at `position`."""
        wrapped = self.sink + (position - self.sink) % max(self.recent, 1)
        return jnp.where(position < self.sink, position, wrapped)

    def positions(self, length: Int32[Array, "B"]) -> Int32[Array, "B R"]:
        """Position of the token at each ring index once `length` tokens are in; -1 where nothing was written yet."""
        return self.position_at(jnp.arange(self.size, dtype=jnp.int32)[None, :], length[:, None])

    def position_at(self, index: Int[Array, "*i"], length: Int[Array, "*n"]) -> Int[Array, "..."]:
        """Position of the token at a ring index once `length` tokens are in; -1 where nothing was written yet."""
        last = length - 1
        # The newest position that maps to this index: a ring index and its positions agree modulo `recent`. An index
        # beyond `last` was never written, and stays beyond it.
        newest = last - lax.rem(last - index, lax.full_like(last - index, max(self.recent, 1)))
        position = jnp.where(index < self.sink, index, newest)
        # Not Python numbers: Pallas lowers a choice between two of those to invalid Triton IR.
        first = jnp.where(index < self.sink, jnp.int32(0), jnp.int32(self.sink))
        is_written = (position <= last) & (position >= first) & (index < self.size)
        return jnp.where(is_written, position, jnp.int32(-1))


def consecutive(start: Int32[Array, "B"], count: int) -> Int32[Array, "B count"]:
    """Positions `start, start + 1, ...` of each row."""
    return start[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
