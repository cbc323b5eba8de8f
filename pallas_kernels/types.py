"""The nouns of attention: pools, heads, shards of tokens, requests, and the backends that answer them.

Axis letters: `B` batch, `T` query length, `S` key length, `N` query heads, `K` KV heads, `G = N // K`, `H` head dim,
`P` pool slots (`Pr` retrieval, `Ps` streaming), `R = window.size` ring entries.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.quantized import BITS, Quantized
from pallas_kernels.window import Window


class Pools(NamedTuple):
    """Keys and values of the whole model, split by head type; a slot stores one KV head of one layer.

    Either pair may be quantized. Keys are stored after RoPE at their absolute position; a streaming head's slot is a
    ring, see `Window`.

    Attributes:
        full_k: keys of retrieval heads, `[Pr, B, S, H]`; paged, `[Pr, pages, page, H]`.
        full_v: their values.
        ring_k: keys of streaming heads, `[Ps, B, R, H]`.
        ring_v: their values.
        pages: None, or the page table that all retrieval heads share: entry `[b, i]` is the page with the tokens of
            row `b` from `i * page` on. Entries beyond a row's tokens are ignored.
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

    @property
    def capacity(self) -> int:
        """Tokens of a row that a retrieval slot has room for."""
        page = self.full_k.shape[2]
        return page if self.pages is None else page * self.pages.shape[1]

    @property
    def page(self) -> int | None:
        """Tokens of a page of the full pool; None: a row's tokens are contiguous."""
        return None if self.pages is None else self.full_k.shape[2]


class Heads(NamedTuple):
    """One layer's row of the head table: the pool and the slot of each KV head. Traced, not static."""

    is_retrieval: Bool[Array, "K"]
    slot: Int32[Array, "K"]

    def by_type(self) -> tuple[Int32[Array, "K"], Int32[Array, ""]]:
        """KV heads, retrieval heads first, and the number of retrieval heads."""
        order = jnp.argsort(~self.is_retrieval, stable=True).astype(jnp.int32)
        return order, self.is_retrieval.sum(dtype=jnp.int32)


@dataclass(frozen=True)
class TokenShards:
    """Devices that share the tokens of a retrieval slot: device `p % count` stores token p, at index `p // count`.

    Rings are not shared: every device stores all of each. Used inside `jax.shard_map`.

    Attributes:
        axis: the mesh axis of the devices (static).
        count: their number (static).
        at: index of the one whose part is computed, in a program without the mesh; None: the one that computes it.
    """

    axis: str
    count: int
    at: int | None = None

    @property
    def index(self) -> Int32[Array, ""]:
        """Index of this device among them."""
        return lax.axis_index(self.axis) if self.at is None else jnp.int32(self.at)

    def held(self, length: Int32[Array, "B"]) -> Int32[Array, "B"]:
        """Number of the first `length` tokens that this device stores."""
        return lax.div(length + (self.count - 1) - self.index, lax.full_like(length, self.count))


class Partial(NamedTuple):
    """Attention over some of the keys, to be merged with attention over the others."""

    out: Float[Array, "*rows H"]
    log_sum: Float[Array, "*rows"]  # natural logarithm of the softmax's denominator


class Unsupported(NotImplementedError):
    """A backend cannot do what was asked of it; any other NotImplementedError is a fault."""


OPERATIONS = ("prefill", "decode", "append", "training")
# The oldest GPUs that any kernel is for: Ampere's.
OLDEST_GPU = (8, 0)
# Keys of a tile at most.
MOST_KEYS = 128


def keys_of_page(tokens: int) -> int:
    """The largest tile of keys that crosses no page of so many tokens; kernels know no more of a page."""
    return min(MOST_KEYS, tokens & -tokens)


@dataclass(frozen=True)
class Request:
    """Everything that decides whether a backend can run an operation, known before tracing.

    Attributes:
        operation: a name in `OPERATIONS`.
        device: kind of device, as `jax.Device.device_kind` names it.
        dtypes: data types of queries, keys, values and the pools that are not quantized.
        head_dim: H.
        group: query heads of a KV head.
        bits: bits of the quantized pools.
        capacities: tokens of a slot, or of a page, for each pool that has slots.
        page: tokens of a page, where a page table leads to the tokens of retrieval heads; None: they are contiguous.
        is_sharded: whether devices share the tokens of retrieval heads.
        is_short: whether the chunk of a prefill is so short that kernels read quantized keys as they are packed.
        capability: compute capability of the device, as in (9, 0); None if it is not a GPU of NVIDIA.
        window: what streaming heads see; None for training retrieval heads.
        q: data type of queries.
        full: how the pool of retrieval heads is stored, a data type or a name in `BITS`; None if it has no slot.
        ring: how the pool of streaming heads is stored; None if it has no slot.
        score_cap: what scores are capped by, softly; None: they are not.
    """

    operation: str
    device: str
    dtypes: frozenset[str]
    head_dim: int
    group: int
    bits: frozenset[int] = frozenset()
    capacities: tuple[int, ...] = ()
    page: int | None = None
    is_sharded: bool = False
    is_short: bool = False
    capability: tuple[int, int] | None = None
    window: Window | None = None
    q: str = ""
    full: str | None = None
    ring: str | None = None
    score_cap: float | None = None

    @classmethod
    def of(
        cls, operation: str, *, q: str, full: str | None = None, ring: str | None = None, **fields: Any
    ) -> "Request":
        """A request that is described by how queries and pools are stored; on no device in particular."""
        stored = {name for name in (q, full, ring) if name is not None}
        bits = frozenset(BITS[name] for name in stored if name in BITS)
        dtypes = frozenset(stored - BITS.keys())
        return cls(operation, "", dtypes, bits=bits, q=q, full=full, ring=ring, **fields)

    # Rules that several backends have: the reason why they cannot run a request, or None.

    def refused_layout(self) -> str | None:
        """By a backend whose kernels read contiguous slots with all tokens of a row."""
        return "takes no paged caches" if self.page is not None else self.refused_shards()

    def refused_shards(self) -> str | None:
        """By a backend whose kernels read all tokens of a row."""
        return "takes no caches whose tokens devices share" if self.is_sharded else None

    def refused_types(self, allowed: Collection[str]) -> str | None:
        """By a backend that multiplies queries and cache as they are stored, in one type."""
        types = {*self.dtypes, *(f"int{bits}" for bits in self.bits)}
        if len(types) > 1 or types - set(allowed):
            names = " or ".join(allowed)
            return f"takes {names}, one of them for queries and cache, got {', '.join(sorted(types))}"
        return None

    def refused_packing(self) -> str | None:
        """By a kernel that reads the words of a quantized cache as they are packed."""
        head_dim = self.head_dim
        if self.bits and (head_dim < 16 or head_dim.bit_count() > 1):
            return f"takes quantized caches of head dims that are powers of two, at least 16, got {head_dim}"
        return None

    def refused_gpu(self) -> str | None:
        """By a backend that is compiled for GPUs from `OLDEST_GPU` on, and not interpreted."""
        if self.capability is None or self.capability < OLDEST_GPU:
            return f"runs only on GPUs of compute capability 8.0 or higher, this is {self.device}"
        return None


@dataclass(frozen=True)
class Backend:
    """One implementation of attention: its operations, and the requests it refuses.

    Attributes:
        name: as the operations' `backend` argument.
        refuses: the reason why the backend cannot run a request, as in "takes no paged caches", or None.
        prefill: `(q, k, v, pools, heads, *, start, lengths, window, shards) -> Partial`, `[B, T, N, H]`.
        decode: `(q, pools, heads, *, lengths, window, shards) -> Partial`, `[B, N, H]`.
        training: `(q, k, v, window) -> Partial`, `[B, T, N, H]`, differentiable causal attention over a sequence's own
            keys, of retrieval heads where `window` is None, of streaming heads otherwise.
        append: `(pools, heads, k, v, *, start, active, window, shards) -> Pools`, see `append_token`; named backends
            without it write as `xla`.
        caps_scores: whether `prefill` and `decode` take `score_cap`.
    """

    name: str
    refuses: Callable[[Request], str | None]
    prefill: Callable[..., Partial] | None = None
    decode: Callable[..., Partial] | None = None
    training: Callable[..., Partial] | None = None
    append: Callable[..., Pools] | None = None
    caps_scores: bool = False

    def supports(self, request: Request) -> str | None:
        """None if this backend can run the request, otherwise the reason why not."""
        if getattr(self, request.operation) is None:
            return f"has no kernel for {request.operation}"
        if request.score_cap is not None and not self.caps_scores:
            return "has no soft cap of scores"
        return self.refuses(request)
