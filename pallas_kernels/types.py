"""The two arguments that every attention operation shares: the KV pools and one layer's row of the head table.

Axis letters: `B` batch, `T` query length, `S` key length, `N` query heads, `K` KV heads, `G = N // K`, `H` head dim,
`P` pool slots (`Pr` retrieval, `Ps` streaming), `R = sink_size + recent_size` ring slots.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.quantized import Quantized


class Pools(NamedTuple):
    """Keys and values of the whole model, split by head type; a slot holds one KV head of one layer.

    Either pair may be quantized.

    A streaming head's slot is a ring: position `p` lies at index `p` while `p < sink_size`, and at
    `sink_size + (p - sink_size) % recent_size` after that. Keys are stored after RoPE at their absolute position.
    """

    retrieval_k: Float[Array, "Pr B S H"] | Quantized
    retrieval_v: Float[Array, "Pr B S H"] | Quantized
    streaming_k: Float[Array, "Ps B R H"] | Quantized
    streaming_v: Float[Array, "Ps B R H"] | Quantized


class Unsupported(NotImplementedError):
    """A backend says that it cannot do what it was asked; a NotImplementedError from elsewhere is a fault."""


class Heads(NamedTuple):
    """One layer's row of the head table: which pool, and which slot of it, holds each KV head. Traced, not static."""

    is_retrieval: Bool[Array, "K"]
    slot: Int32[Array, "K"]


@dataclass(frozen=True)
class Stripe:
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
