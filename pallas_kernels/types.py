"""The two arguments that every attention operation shares: the KV pools and one layer's row of the head table.

Axis letters: `B` batch, `T` query length, `S` key length, `N` query heads, `K` KV heads, `G = N // K`, `H` head dim,
`P` pool slots (`Pr` retrieval, `Ps` streaming), `R = window.size` ring entries.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.quantized import Quantized


class Pools(NamedTuple):
    """Keys and values of the whole model, split by head type; a slot holds one KV head of one layer.

    Either pair may be quantized. Keys are stored after RoPE at their absolute position; a streaming head's slot is a
    ring, see `Window`.

    Attributes:
        full_k: keys of retrieval heads, `[Pr, B, S, H]`; paged, `[Pr, pages, page, H]`.
        full_v: their values.
        ring_k: keys of streaming heads, `[Ps, B, R, H]`.
        ring_v: their values.
        pages: None, or the page table that all retrieval heads share: entry `[b, i]` is the page of row `b` with the
            tokens from `i * page` on.
    """

    full_k: Float[Array, "Pr B S H"] | Quantized
    full_v: Float[Array, "Pr B S H"] | Quantized
    ring_k: Float[Array, "Ps B R H"] | Quantized
    ring_v: Float[Array, "Ps B R H"] | Quantized
    pages: Int32[Array, "B n"] | None = None

    # Of any type: before a compilation, shapes take the place of arrays.

    @property
    def full(self) -> tuple[Any, Any]:
        """Keys and values of retrieval heads."""
        return self.full_k, self.full_v

    @property
    def ring(self) -> tuple[Any, Any]:
        """Keys and values of streaming heads."""
        return self.ring_k, self.ring_v

    @property
    def stored(self) -> tuple[Any, Any, Any, Any]:
        """All keys and values."""
        return self.full + self.ring


class Unsupported(NotImplementedError):
    """A backend says that it cannot do what it was asked; a NotImplementedError from elsewhere is a fault."""


class Heads(NamedTuple):
    """One layer's row of the head table: which pool, and which slot of it, holds each KV head. Traced, not static."""

    is_retrieval: Bool[Array, "K"]
    slot: Int32[Array, "K"]


@dataclass(frozen=True)
class TokenShards:
    """Where several devices share the tokens of a retrieval slot: token p lies on device `p % count`, at `p // count`.

    Rings are not shared: every device holds all of each. Used inside `jax.shard_map`.

    Attributes:
        axis: the mesh axis along which the devices lie (static).
        count: how many there are (static).
    """

    axis: str
    count: int

    @property
    def index(self) -> Int32[Array, ""]:
        """Which of them this device is."""
        return lax.axis_index(self.axis)

    def held(self, length: Int32[Array, "B"]) -> Int32[Array, "B"]:
        """How many of the first `length` tokens lie on this device."""
        return lax.div(length + (self.count - 1) - self.index, lax.full_like(length, self.count))


class Partial(NamedTuple):
    """Attention over some of the keys, to be merged with that over the others."""

    out: Float[Array, "*rows H"]
    log_sum: Float[Array, "*rows"]  # of the softmax's denominator, the natural logarithm
