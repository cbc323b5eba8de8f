"""The two arguments that every attention operation shares: the KV pools and one layer's row of the head table.

Axis letters: `B` batch, `T` query length, `S` key length, `N` query heads, `K` KV heads, `G = N // K`, `H` head dim,
`P` pool slots (`Pr` retrieval, `Ps` streaming), `R = sink_size + recent_size` ring slots.
"""

from typing import NamedTuple

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
