"""Caches from which tokens are evicted: the code that all rules share. A rule, in its own file, ranks the tokens.

The prefill goes block by block: a block attends to the tokens in the cache and, causally, to itself; then the rule
decides which of them stay. A decode step is a block of one token. Keys are cached after RoPE at their absolute
positions. All KV heads hold the same number of tokens, each its own; the weights of query heads that share a KV head
are averaged.
"""

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32
from numpy.typing import ArrayLike

from duo_eval.methods.method import Memory, Method, check_arguments
from duo_jax import Model, ModelConfig
from duo_jax.arguments import whole_number
from duo_jax.checks import check_vocabulary
from duo_jax.generation.chunks import bucket

# A priority above every other; finite, since an empty slot's is not.
ALWAYS = 1e30


class Held(NamedTuple):
    """The cache of one layer, so that a step rewrites one layer's arrays at a time; slots are in no order."""

    k: Float[Array, "K C H"]
    v: Float[Array, "K C H"]
    position: Int32[Array, "K C"]  # -1: an empty slot
    score: Float[Array, "K C"]  # the rule's memory of a token


class Tokens(NamedTuple):
    """The tokens of one layer among which a rule chooses: those in the cache and the new ones, `S` in one order."""

    position: Int32[Array, "K S"]
    score: Float[Array, "K S"]
    length: Int32[Array, ""]  # tokens seen so far
    limit: Int32[Array, ""]  # tokens that stay


@dataclass(frozen=True)
class EvictedState:
    """A sequence: its cache, the lengths of the prompt and of everything seen, and its budget."""

    layers: tuple[Held, ...]
    prompt: int
    length: int
    budget: float
    limit: int  # tokens that a head may hold now
    peak_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return sum(x.k.nbytes + x.v.nbytes for x in self.layers)

    @property
    def memory(self) -> Memory:
        """Bytes that the sequence takes now."""
        heads, capacity, _ = self.layers[0].k.shape
        slots = len(self.layers) * heads * capacity
        held = self.nbytes // slots * len(self.layers) * heads * min(self.length, self.limit)
        metadata = sum(x.position.nbytes + x.score.nbytes for x in self.layers)
        return Memory(self.nbytes, held, max(self.peak_nbytes, self.nbytes), metadata)


@dataclass(frozen=True)
class Eviction(Method):
    """A rule of eviction. `scores`, `priority` and `keys` are traced."""

    block: int = 256
    """Tokens of a prompt in each block of the prefill; the rule applies after each block."""

    def __post_init__(self) -> None:
        """Check the block."""
        whole_number("block", self.block, 1)

    def scores(
        self, before: Float[Array, "K S"], weights: Float[Array, "K G T S"], valid: Bool[Array, "T"]
    ) -> Float[Array, "K S"]:
        """The new scores of the tokens, by default the old ones.

        Args:
            before: scores so far, 0 for new tokens.
            weights: attention weights of the block's queries.
            valid: False for queries that are padding.
        """
        return before

    @abstractmethod
    def priority(self, tokens: Tokens) -> Float[Array, "K S"]:
        """The `limit` tokens with the highest priority stay; among equals, the younger ones."""

    def keys(self, held: Held, start: Int32[Array, ""], config: ModelConfig) -> Float[Array, "K C H"]:
        """The keys that a block from position `start` on sees."""
        return held.k

    def least(self, length: int) -> int:
        """Fewest tokens that a head must be able to hold with a prompt of `length`."""
        return 1

    def limit(self, budget: float, prompt: int, length: int) -> int:
        """Tokens that a head may hold after `length` tokens: at any time the same fraction of full attention's.

        During the prefill, the prompt's full length counts. The tolerance keeps 0.29 * 100 at 29.
        """
        return int(budget * max(prompt, length) + 1e-9)

    def check(self, model: Model, budget: float, length: int) -> None:
        """See `Method.check`."""
        super().check(model, budget, length)
        self.check_limit(budget, length, limit=self.limit(budget, length, length), least=self.least(length))

    def begin(
        self, model: Model, tokens: ArrayLike, *, room: int, budget: float
    ) -> tuple[Float[Array, "V"], EvictedState]:
        """See `Method.begin`."""
        tokens = check_arguments(model, tokens, room)
        self.check(model, budget, len(tokens))
        return self.prefill(model, tokens, self.capacity(budget, len(tokens), room), budget)

    def capacity(self, budget: float, length: int, room: int) -> int:
        """Slots of a head: the budget's fraction of what full attention would allocate for this bucket of lengths."""
        return self.limit(budget, bucket(length), bucket(length + room))

    def prefill(
        self, model: Model, tokens: Int32[np.ndarray, "T"], capacity: int, budget: float
    ) -> tuple[Float[Array, "V"], EvictedState]:
        """Take in a prompt, block by block, into a cache with `capacity` slots a head."""
        length = len(tokens)
        limit = self.limit(budget, length, length)
        layers = empty(model, capacity)
        # A prompt shorter than a block is padded less, to one of few sizes; the answer is the same.
        width = min(self.block, 1 << max(4, (length - 1).bit_length()))
        padded = np.pad(tokens, (0, -length % width))
        for start in range(0, length, width):
            valid = min(width, length - start)
            block = padded[start : start + width]
            logits, layers = _take_in(self, model, block, layers, np.int32(start), np.int32(valid), np.int32(limit))
        # In addition to the cache, one layer at a time: its tokens and the block's, among which the rule chooses.
        entry = layers[0].k[:, :1].nbytes * 2
        allocated = sum(x.k.nbytes + x.v.nbytes for x in layers)
        return logits, EvictedState(layers, length, length, budget, limit, allocated + entry * (capacity + width))

    def step(self, model: Model, token: int, state: EvictedState) -> tuple[Float[Array, "V"], EvictedState]:
        """See `Method.step`."""
        token_ids = np.array([token], np.int32)
        check_vocabulary(model.config, token_ids)
        limit = self.limit(state.budget, state.prompt, state.length + 1)
        if limit > (capacity := state.layers[0].k.shape[1]):
            raise ValueError(f"the room is used up: a head has {capacity} slots; begin with a larger room")
        logits, layers = _append(self, model, token_ids, state.layers, np.int32(state.length), np.int32(limit))
        return logits, EvictedState(layers, state.prompt, state.length + 1, state.budget, limit, state.peak_nbytes)


def empty(model: Model, capacity: int) -> tuple[Held, ...]:
    """Empty caches of all layers."""
    config = model.config
    shape = config.num_kv_heads, capacity

    def one_layer() -> Held:
        k, v = (jnp.zeros((*shape, config.head_dim), model.dtype) for _ in range(2))
        return Held(k, v, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))

    return tuple(one_layer() for _ in range(config.num_layers))


def by_head(q: Float[Array, "1 T N H"], num_kv_heads: int) -> Float[Array, "K G T H"]:
    """Queries of one sequence, grouped by the KV head that they share."""
    _, length, num_heads, head_dim = q.shape
    return q[0].reshape(length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(1, 2, 0, 3)


def attention_weights(
    q: Float[Array, "K G T H"], keys: list[Float[Array, "K _ H"]], seen: Bool[Array, "#K T S"]
) -> Float[Array, "K G T S"]:
    """Softmax weights in float32 over several arrays of keys, as if concatenated, without copying the keys."""
    logits = [jnp.einsum("kgth,ksh->kgts", q, k, preferred_element_type=jnp.float32) for k in keys]
    scaled = jnp.concatenate(logits, axis=-1) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(seen[:, None], scaled, -jnp.inf), axis=-1)


def ranked(priority: Float[Array, "K S"], position: Int32[Array, "K S"]) -> Int32[Array, "K S"]:
    """Indices in order of priority, the highest first; empty slots last."""
    priority = jnp.where(position < 0, -jnp.inf, priority)
    return jnp.lexsort((position, priority), axis=-1)[:, ::-1].astype(jnp.int32)


def keep(
    order: Int32[Array, "K S"],
    k: Array,
    v: Array,
    position: Array,
    score: Array,
    capacity: int,
    limit: Int32[Array, ""],
) -> Held:
    """The cache with the first `limit` tokens of an order, with `capacity` slots for each head."""
    missing = max(0, capacity - order.shape[1])
    order = jnp.pad(order, ((0, 0), (0, missing)))[:, :capacity]
    rank = jnp.arange(capacity, dtype=jnp.int32)
    stays = (rank < limit) & (rank < capacity - missing)
    k, v = (jnp.take_along_axis(x, order[:, :, None], axis=1) for x in (k, v))
    position = jnp.where(stays[None, :], jnp.take_along_axis(position, order, axis=1), -1)
    return Held(k, v, position, jnp.take_along_axis(score, order, axis=1))


def _attend(
    rule: Eviction,
    config: ModelConfig,
    held: Held,
    new: tuple[Float[Array, "1 T N H"], Float[Array, "1 T K H"], Float[Array, "1 T K H"]],
    start: Int32[Array, ""],
    valid: Bool[Array, "T"],
) -> tuple[Float[Array, "1 T N H"], tuple[Array, Array, Array, Array]]:
    """Attend from a block to the cache and itself: output, the block's keys and values, all positions, new scores."""
    q, k, v = new
    length = q.shape[1]
    q = by_head(q, config.num_kv_heads)
    k, v = k[0].transpose(1, 0, 2), v[0].transpose(1, 0, 2)
    own = jnp.where(valid, start + jnp.arange(length, dtype=jnp.int32), -1)
    position = jnp.concatenate([held.position, jnp.broadcast_to(own, (k.shape[0], length))], axis=1)
    # Padding comes after every valid token, so no valid token sees it; a padded query sees itself.
    causal = jnp.tril(jnp.ones((length, length), bool))
    cached = jnp.broadcast_to((held.position >= 0)[:, None, :], (k.shape[0], length, held.position.shape[1]))
    seen = jnp.concatenate([cached, jnp.broadcast_to(causal, (k.shape[0], length, length))], axis=2)
    weights = attention_weights(q, [rule.keys(held, start, config), k], seen)
    split = held.position.shape[1]
    parts = [(weights[..., :split], held.v), (weights[..., split:], v)]
    cached_out, own_out = (jnp.einsum("kgts,ksh->tkgh", w, x.astype(jnp.float32)) for w, x in parts)
    before = jnp.pad(held.score, ((0, 0), (0, length)))
    scores = rule.scores(before, weights, valid)
    return (cached_out + own_out).reshape(new[0].shape).astype(new[0].dtype), (k, v, position, scores)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _take_in(
    rule: Eviction,
    model: Model,
    tokens: Int32[Array, "T"],
    layers: tuple[Held, ...],
    start: Int32[Array, ""],
    count: Int32[Array, ""],
    limit: Int32[Array, ""],
) -> tuple[Float[Array, "V"], tuple[Held, ...]]:
    """Take in a block of `count` tokens and padding: the logits after it, and the caches with the tokens that stay."""
    valid = jnp.arange(tokens.shape[0], dtype=jnp.int32) < count
    capacity = layers[0].k.shape[1]

    def attend(state: tuple[Held, ...], layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Held, ...]]:
        held = state[layer]
        out, (k, v, position, scores) = _attend(rule, model.config, held, (q, k, v), start, valid)
        order = ranked(rule.priority(Tokens(position, scores, start + count, limit)), position)
        k, v = jnp.concatenate([held.k, k], axis=1), jnp.concatenate([held.v, v], axis=1)
        kept = keep(order, k, v, position, scores, capacity, limit)
        return out, (*state[:layer], kept, *state[layer + 1 :])

    decoder = model.decoder
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    hidden, layers = decoder.hidden(tokens[None], positions[None], attend, layers)
    return decoder.logits(hidden[0, count - 1]), layers


def _evicted(
    priority: Float[Array, "K S"], position: Int32[Array, "K S"], limit: Int32[Array, ""]
) -> Int32[Array, "K"]:
    """Index of the token to evict, or of an empty slot while there are fewer than `limit`, which never shrinks."""
    is_empty = position < 0
    is_full = (~is_empty).sum(1, dtype=jnp.int32) > limit
    priority = jnp.where(is_empty, jnp.where(is_full, jnp.inf, -jnp.inf)[:, None], priority)
    lowest = priority == priority.min(1, keepdims=True)
    return jnp.argmin(jnp.where(lowest, position, np.iinfo(np.int32).max), axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _append(
    rule: Eviction,
    model: Model,
    token: Int32[Array, "1"],
    layers: tuple[Held, ...],
    start: Int32[Array, ""],
    limit: Int32[Array, ""],
) -> tuple[Float[Array, "V"], tuple[Held, ...]]:
    """Append a token in the slot of the one that is evicted: nothing else moves."""

    def attend(state: tuple[Held, ...], layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Held, ...]]:
        held = state[layer]
        out, (k, v, position, scores) = _attend(rule, model.config, held, (q, k, v), start, jnp.ones(1, bool))
        slot = _evicted(rule.priority(Tokens(position, scores, start + 1, limit)), position, limit)
        head = jnp.arange(slot.shape[0], dtype=jnp.int32)
        capacity = held.k.shape[1]
        kept = Held(
            # The newest token is at index `capacity`: if it is evicted, nothing is written.
            held.k.at[head, slot].set(k[:, 0], mode="drop"),
            held.v.at[head, slot].set(v[:, 0], mode="drop"),
            held.position.at[head, slot].set(start, mode="drop"),
            scores[:, :capacity].at[head, slot].set(scores[:, capacity], mode="drop"),
        )
        return out, (*state[:layer], kept, *state[layer + 1 :])

    decoder = model.decoder
    hidden, layers = decoder.hidden(token[None], start[None, None], attend, layers)
    return decoder.logits(hidden[0, 0]), layers
