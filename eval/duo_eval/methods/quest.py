"""Quest (Tang et al. 2024, arXiv 2406.10774) inside the retrieval heads of a pattern: decoding reads chosen pages only.

A page is a range of consecutive tokens. Its smallest and largest key in each channel bound the score of any of its keys
with a query; a query head attends to the pages with the highest bounds and to the newest page, as in the authors'
kernels. Query heads that share a KV head choose for themselves. The prefill, the first layers and streaming heads are
as without Quest. It holds everything that the pattern holds, and the bounds in addition, and reads less of it. With
`sparsity=0` every head retrieves: Quest on its own.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from numpy.typing import ArrayLike

from duo_eval.methods.eviction import by_head
from duo_eval.methods.method import Memory
from duo_eval.methods.patterns import Duo, PooledState
from duo_jax import KVCache, Model
from duo_jax.arguments import whole_number
from duo_jax.checks import check_cache, check_step
from pallas_kernels import Heads, decode_attention
from pallas_kernels.schedule import cdiv


class Bounds(NamedTuple):
    """The smallest and the largest key of each page in each channel, for every retrieval head; 0 for an empty page."""

    low: Float[Array, "P H n"]
    high: Float[Array, "P H n"]


class Paging(NamedTuple):
    """The tokens of a page, the pages that a query reads, and the first layers in which everything is read."""

    page: int
    chosen: int
    dense_layers: int


@dataclass(frozen=True)
class QuestState(PooledState):
    """A sequence in a `KVCache`, the bounds of its pages, and what decoding read so far.

    `read` counts pairs of key and value, or of two bounds of a page.
    """

    bounds: Bounds
    read: int
    steps: int

    @property
    def memory(self) -> Memory:
        """Bytes that the sequence takes now, and that a step read, on average."""
        memory = super().memory
        metadata = memory.metadata_nbytes + self.bounds.low.nbytes + self.bounds.high.nbytes
        if not self.steps:
            return memory._replace(metadata_nbytes=metadata)
        pair = 2 * self.cache.head_dim * self.cache.dtype.itemsize
        return memory._replace(metadata_nbytes=metadata, read_nbytes=round(pair * self.read / self.steps))


@dataclass(frozen=True)
class DuoQuest(Duo):
    """A head pattern whose retrieval heads read chosen pages while decoding; the budget is for what is held."""

    page: int = 16
    """Tokens of a page; the paper's."""
    tokens: int = 512
    """Tokens that a query head of a retrieval head reads at each step, whole pages, the newest among them."""
    dense_layers: int = 2
    """First layers, in which everything is read; the paper's."""

    name: ClassVar[str] = "duo+quest"

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        whole_number("page", self.page, 1)
        whole_number("tokens", self.tokens, self.page, way=f"one page has {self.page}")
        whole_number("dense_layers", self.dense_layers, 0)

    def begin(
        self, model: Model, tokens: ArrayLike, *, room: int, budget: float
    ) -> tuple[Float[Array, "V"], QuestState]:
        """See `Method.begin`."""
        logits, state = super().begin(model, tokens, room=room, budget=budget)
        bounds = _bounds(state.cache.full.k[:, 0], state.cache.length[0], self.page)
        return logits, QuestState(state.cache, state.chunk, bounds, 0, 0)

    def step(self, model: Model, token: int, state: PooledState) -> tuple[Float[Array, "V"], QuestState]:
        """See `Method.step`."""
        assert isinstance(state, QuestState)
        ids, active = check_step(model.config, np.array([token], np.int32), None)
        check_cache(model, state.cache, active)
        paging = Paging(self.page, self.tokens // self.page, self.dense_layers)
        logits, cache, bounds, read = _step(paging, model, ids, state.cache, state.bounds)
        # Added up here: on the device, int32 would overflow after some hundred steps of a large model.
        return logits, QuestState(cache, state.chunk, bounds, state.read + int(read), state.steps + 1)


@functools.partial(jax.jit, static_argnums=2)
def _bounds(keys: Float[Array, "P S H"], length: Int32[Array, ""], page: int) -> Bounds:
    """The bounds of the first `length` keys of each head."""
    slots, size, head_dim = keys.shape
    pages = -(-size // page)
    is_held = (jnp.arange(pages * page, dtype=jnp.int32) < length).reshape(1, pages, page, 1)
    padded = jnp.pad(keys, ((0, 0), (0, pages * page - size), (0, 0))).reshape(slots, pages, page, head_dim)
    is_used = is_held.any(2)
    low = jnp.where(is_used, jnp.where(is_held, padded, jnp.inf).min(2), 0)
    high = jnp.where(is_used, jnp.where(is_held, padded, -jnp.inf).max(2), 0)
    return Bounds(*(x.swapaxes(1, 2).astype(keys.dtype) for x in (low, high)))


def _with_key(bounds: Bounds, heads: Heads, key: Float[Array, "K H"], position: Int32[Array, ""], page: int) -> Bounds:
    """The bounds with the key at `position` of each retrieval head."""
    slots = bounds.low.shape[0]
    number, is_first = position // page, position % page == 0
    slot = jnp.where(heads.is_retrieval, heads.slot, slots)  # Out of bounds, and so never written, for the others.

    def grown(old: Array, wider: Any) -> Array:
        current = old.at[slot, :, number].get(mode="clip")
        return old.at[slot, :, number].set(jnp.where(is_first, key, wider(current, key)), mode="drop")

    return Bounds(grown(bounds.low, jnp.minimum), grown(bounds.high, jnp.maximum))


def _paged_attention(
    q: Float[Array, "K G H"],
    keys: Float[Array, "K S H"],
    values: Float[Array, "K S H"],
    bounds: Bounds,
    length: Int32[Array, ""],
    paging: Paging,
    sinks: Float[Array, "K G"] | None,
) -> tuple[Float[Array, "K G H"], Int32[Array, "K"]]:
    """Attend to the chosen pages of `length` tokens: the output, and the pairs that each KV head reads.

    Pages that several query heads of a KV head chose are read once. `sinks` are the learned sinks of models with them.
    """
    low, high = (x.astype(jnp.float32) for x in bounds)
    queries, size = q.astype(jnp.float32), keys.shape[1]
    # In each channel the larger of q * low and q * high.
    bound = jnp.einsum("kgh,khn->kgn", jnp.maximum(queries, 0.0), high)
    bound += jnp.einsum("kgh,khn->kgn", jnp.minimum(queries, 0.0), low)
    page, used = jnp.arange(bound.shape[-1], dtype=jnp.int32)[None, None, :], cdiv(length, paging.page)
    bound = jnp.where(page == used - 1, jnp.inf, jnp.where(page < used, bound, -jnp.inf))
    count = min(paging.chosen, bound.shape[-1])
    _, best = jax.lax.top_k(bound, count)
    is_chosen = (best[..., None] == page[..., None, :]).any(-2)
    position = jnp.arange(size, dtype=jnp.int32)[None, None, :]
    seen = jnp.repeat(is_chosen, paging.page, axis=-1)[..., :size] & (position < length)
    scores = jnp.einsum("kgh,ksh->kgs", queries, keys.astype(jnp.float32)) * q.shape[-1] ** -0.5
    scores = jnp.where(seen, scores, -jnp.inf)
    out = jnp.einsum("kgs,ksh->kgh", jax.nn.softmax(scores, axis=-1), values.astype(jnp.float32))
    if sinks is not None:  # One more term of the denominator.
        out *= jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1) - sinks)[..., None]
    # Where all pages are read, their bounds are not.
    return out.astype(q.dtype), seen.any(1).sum(-1, dtype=jnp.int32) + jnp.where(used > count, used, 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def _step(
    paging: Paging,
    model: Model,
    token: Int32[Array, "1"],
    cache: KVCache,
    bounds: Bounds,
) -> tuple[Float[Array, "V"], KVCache, Bounds, Int32[Array, ""]]:
    """Append a token: the logits after it, the cache, the bounds, and the pairs that were read for it."""
    decoder, active = model.decoder, jnp.ones(1, bool)
    length = cache.length[0] + 1

    def attend(
        state: tuple[KVCache, Bounds, Array], layer: int, q: Array, k: Array, v: Array
    ) -> tuple[Array, tuple[KVCache, Bounds, Array]]:
        cache, bounds, read = state
        cache = cache.append_token(layer, k[:, 0], v[:, 0], active)
        heads, pools, window = cache.heads(layer), cache.pools_of(layer), cache.window(layer)
        sinks = decoder.sink_logits(layer)
        out = decode_attention(q[:, 0], pools, heads, lengths=length[None], window=window, sink_logits=sinks)
        pairs = jnp.where(heads.is_retrieval, length, jnp.minimum(length, window.size))
        if pools.full_k.shape[0]:
            bounds = _with_key(bounds, heads, k[0, 0], length - 1, paging.page)
        if pools.full_k.shape[0] and layer >= paging.dense_layers:
            slot = jnp.where(heads.is_retrieval, heads.slot, 0)
            own = Bounds(*(x[slot] for x in bounds))
            full_k, full_v = (x[slot, 0] for x in pools.full)
            sinks = None if sinks is None else sinks.reshape(k.shape[2], -1)
            queries = by_head(q, k.shape[2])[:, :, 0]
            paged, chosen = _paged_attention(queries, full_k, full_v, own, length, paging, sinks)
            is_paged = jnp.repeat(heads.is_retrieval, q.shape[2] // k.shape[2])[None, :, None]
            out = jnp.where(is_paged, paged.reshape(out.shape), out)
            pairs = jnp.where(heads.is_retrieval, chosen, pairs)
        return out[:, None], (cache, bounds, read + pairs.sum(dtype=jnp.int32))

    state = cache, bounds, jnp.int32(0)
    hidden, (cache, bounds, read) = decoder.hidden(token[None], cache.length[:, None], attend, state)
    return decoder.logits(hidden[0, 0]), cache.advance(active.astype(jnp.int32)), bounds, read
