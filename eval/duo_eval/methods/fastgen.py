"""FastGen (Ge et al. 2023, arXiv 2310.01801): each head uses the cheapest of five policies that its attention allows.

The prefill uses full attention and is profiled: `peak_nbytes` counts the whole prompt in addition to the cache.
A head's recovery under a policy is the share of its attention, over all queries of the prompt, that falls on tokens
that the policy holds. The paper fixes a threshold of recovery; here it follows from the budget: the largest threshold
at which the cheapest policies that reach it fit into the budget together. Heads thus differ in size, while their sum
meets the budget.
"""

import functools
import unicodedata
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from duo_eval.methods.eviction import ALWAYS, by_head
from duo_eval.methods.method import Memory, Method, check_arguments
from duo_eval.methods.profile import profile
from duo_eval.methods.ragged import Ragged, attend_one, compress, evicted, layout
from duo_jax import Model
from duo_jax.checks import check_vocabulary
from duo_jax.generation.chunks import bucket

# Policies; each holds the tokens of the one before it, and more.
SPECIAL, PUNCTUATION, FREQUENT, LOCAL, EVERYTHING = range(5)

# Kinds of tokens.
PLAIN, PUNCTUATION_TOKEN, SPECIAL_TOKEN = range(3)


@dataclass(frozen=True)
class Choice:
    """The tokens of the prompt that each head holds, its policy, and the resulting threshold of recovery."""

    held: Bool[np.ndarray, "P T"]
    policy: Int[np.ndarray, "P"]
    size: Int[np.ndarray, "P"]  # slots: one more for the newest token, where not everything is held
    threshold: float


@dataclass(frozen=True)
class FastGenState:
    """A sequence: its cache, its heads' policies, the tokens seen and the most that fit."""

    cache: Ragged
    policy: Int32[np.ndarray, "P"]
    threshold: float
    length: int
    most: int
    peak_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return self.cache.nbytes

    @property
    def memory(self) -> Memory:
        """Bytes that the sequence takes now."""
        held = int((np.asarray(self.cache.position) >= 0).sum())
        return self.cache.memory(held, self.peak_nbytes, self.policy)


@dataclass(frozen=True)
class FastGen(Method):
    """Policies: special tokens; also punctuation; also tokens attended to often; also the most recent; everything.

    After the prompt a head keeps its size, except where it holds everything: a new token takes the place of one that
    the policy does not hold, then of the least frequent, the oldest recent, the oldest punctuation. The first token of
    a text counts as special.
    """

    special: tuple[int, ...]
    """Ids of special tokens."""
    punctuation: tuple[int, ...]
    """Ids of punctuation."""
    frequent: float = 0.3
    """Fraction of the prompt that counts as frequent; the paper's."""
    local: float = 0.3
    """Fraction of the prompt that is the local window; the paper's."""

    name: ClassVar[str] = "fastgen"

    def __post_init__(self) -> None:
        """Check the fractions."""
        for name in ("frequent", "local"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {name}={getattr(self, name)}")

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> "FastGen":
        """See `Method.create`: special tokens and punctuation are the tokenizer's."""
        if tokenizer is None and not {"special", "punctuation"} <= set(options):
            raise ValueError("fastgen needs to know special tokens: pass tokenizer=, or special= and punctuation=")
        if tokenizer is not None:
            kinds = {"special": tuple(tokenizer.all_special_ids), "punctuation": punctuation(tokenizer)}
            options = kinds | options
        return cls(**options)

    def begin(
        self, model: Model, tokens: ArrayLike, *, room: int, budget: float
    ) -> tuple[Float[Array, "V"], FastGenState]:
        """See `Method.begin`."""
        tokens = check_arguments(model, tokens, room)
        self.check(model, budget, len(tokens))
        config, length, kinds = model.config, len(tokens), self.kinds(tokens, 0)
        heads = config.num_layers * config.num_kv_heads
        least = min(length, int((kinds == SPECIAL_TOKEN).sum()) + 1)
        if int(budget * heads * length + 1e-9) < heads * least:
            raise ValueError(
                f"{budget=} of {length} tokens is less than the {least} that {self.name} always holds, special tokens "
                "and the newest: raise the budget, or give a longer prompt"
            )
        size = bucket(length)
        window = self.window(np.int32(length))
        logits, prompt = profile(model, np.pad(tokens, (0, size - length)), length, window)
        total, near = (np.asarray(x, np.float64).reshape(heads, size)[:, :length] for x in (prompt.total, prompt.near))
        choice = choose(self, total, near, kinds, int(budget * heads * length + 1e-9))
        # Enough slots for any choice: prompts of one bucket run the same programs.
        slots = int(budget * heads * size + 1e-9) + heads * bucket(room)
        cache = compress(
            prompt.k, prompt.v, *(jnp.asarray(x) for x in _layout(choice, total, kinds, size, room, slots))
        )
        peak = prompt.k.nbytes + prompt.v.nbytes + cache.k.nbytes + cache.v.nbytes
        policy = choice.policy.astype(np.int32)
        return logits, FastGenState(cache, policy, choice.threshold, length, length + room, peak)

    def step(self, model: Model, token: int, state: FastGenState) -> tuple[Float[Array, "V"], FastGenState]:
        """See `Method.step`."""
        ids = np.array([token], np.int32)
        check_vocabulary(model.config, ids)
        if state.length == state.most:
            raise ValueError(f"the room is used up after {state.most} tokens; begin with a larger room")
        start, kind = np.int32(state.length), self.kinds(ids, state.length)[0]
        logits, cache = _append(self, model, ids, state.cache, state.policy, start, kind)
        return logits, replace(state, cache=cache, length=state.length + 1)

    def kinds(self, tokens: Int32[np.ndarray, "T"], start: int) -> Int32[np.ndarray, "T"]:
        """The kind of each token, the first of which is at position `start`."""
        kinds = np.where(np.isin(tokens, self.punctuation), PUNCTUATION_TOKEN, PLAIN)
        kinds = np.where(np.isin(tokens, self.special), SPECIAL_TOKEN, kinds)
        if start == 0:
            kinds[0] = SPECIAL_TOKEN
        return kinds.astype(np.int32)

    def priority(self, cache: Ragged, policy: Int32[Array, "P"], length: Int32[Array, ""]) -> Float[Array, "M"]:
        """Priority to stay, after `length` tokens."""
        policy = jnp.append(policy, jnp.int32(SPECIAL))[cache.head]
        window = self.window(length)
        is_recent = (policy >= LOCAL) & (cache.position >= length - window)
        is_punctuation = (policy >= PUNCTUATION) & (cache.kind == PUNCTUATION_TOKEN)
        priority = jnp.where(policy >= FREQUENT, cache.score, 0.0)
        priority = jnp.where(is_recent, ALWAYS / 4, priority)
        priority = jnp.where(is_punctuation, ALWAYS / 2, priority)
        return jnp.where(cache.kind == SPECIAL_TOKEN, ALWAYS, priority)

    def window(self, length: Int32[Array, ""] | np.int32) -> Int32[Array, ""]:
        """Tokens of the local window, the newest included."""
        return jnp.floor(self.local * jnp.asarray(length, jnp.float32)).astype(jnp.int32)


def punctuation(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that consist of punctuation, except for spaces."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(
        token
        for token, text in enumerate(texts)
        if text.strip() and all(unicodedata.category(letter).startswith("P") for letter in text.strip())
    )


def choose(
    rule: FastGen,
    total: Float[np.ndarray, "P T"],
    near: Float[np.ndarray, "P T"],
    kinds: Int32[np.ndarray, "T"],
    budget: int,
) -> Choice:
    """The policy of each head: the cheapest that reaches the largest threshold of recovery that all heads can afford.

    Args:
        rule: the settings.
        total: attention that each token received, the mean over queries: a head's sums to 1.
        near: its part from queries that have the token in their local window.
        kinds: kind of each token.
        budget: tokens of all heads.
    """
    heads, length = total.shape
    special = np.broadcast_to(kinds == SPECIAL_TOKEN, total.shape)
    pointed = special | (kinds == PUNCTUATION_TOKEN)[None]
    # In increasing order of weight; among equals, the younger later.
    order = np.lexsort((np.broadcast_to(np.arange(length), total.shape), total), axis=-1)
    heavy = np.zeros(total.shape, bool)
    np.put_along_axis(heavy, order[:, length - int(rule.frequent * length) :], True, axis=-1)
    frequent = pointed | heavy
    recent = np.arange(length)[None] >= length - int(rule.window(np.int32(length)))
    held = np.stack([special, pointed, frequent, frequent | recent, np.ones(total.shape, bool)])

    recovery = (total * held[:LOCAL]).sum(-1)
    # The local window moves with the query.
    local = np.where(frequent, total, near).sum(-1)
    recovery = np.maximum.accumulate([*recovery, local, np.full(heads, np.inf)], axis=0)
    size = np.minimum(held.sum(-1) + 1, length)

    def policies(threshold: float) -> Int[np.ndarray, "P"]:
        return (recovery >= threshold).argmax(0)

    def is_affordable(threshold: float) -> bool:
        return int(np.take_along_axis(size, policies(threshold)[None], 0).sum()) <= budget

    thresholds = np.unique(recovery)
    # A higher threshold never costs less. At the lowest, special tokens are enough for every head.
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_affordable(thresholds[middle]) else (low, middle - 1)
    policy = policies(thresholds[low])
    chosen = np.take_along_axis(held, policy[None, :, None], 0)[0]
    return Choice(chosen, policy, np.take_along_axis(size, policy[None], 0)[0], float(thresholds[low]))


def _layout(
    choice: Choice, total: Float[np.ndarray, "P T"], kinds: Int32[np.ndarray, "T"], stride: int, room: int, slots: int
) -> tuple[np.ndarray, ...]:
    """Index of each slot's token in a profile of `stride` tokens per head, and all of `Ragged` but keys and values."""
    size = choice.size + np.where(choice.policy == EVERYTHING, room, 0)
    at = layout(choice.held, size, stride=stride, slots=slots)
    is_held = at.position >= 0
    kind, score = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
    kind[is_held] = kinds[at.position[is_held]]
    # A sum over queries, to which steps add.
    score[is_held] = total[at.head[is_held], at.position[is_held]] * total.shape[1]
    return at.source, at.position, score, kind, at.head, at.offset, at.size


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _append(
    rule: FastGen,
    model: Model,
    token: Int32[Array, "1"],
    cache: Ragged,
    policy: Int32[Array, "P"],
    start: Int32[Array, ""],
    kind: Int32[Array, ""],
) -> tuple[Float[Array, "V"], Ragged]:
    """Append a token: in all layers, the token that it replaces is evicted first and not attended to."""
    slot = evicted(rule.priority(cache, policy, start), cache)
    cache = cache._replace(
        position=cache.position.at[slot].set(start),
        score=cache.score.at[slot].set(0.0),
        kind=cache.kind.at[slot].set(kind),
    )

    def attend(state: Ragged, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Ragged]:
        count = k.shape[2]
        slots = slot[layer * count : (layer + 1) * count]
        state = state._replace(k=state.k.at[slots].set(k[0, 0]), v=state.v.at[slots].set(v[0, 0]))
        out, score = attend_one(by_head(q, count)[:, :, 0], state, layer * count)
        return out.reshape(q.shape), state._replace(score=score)

    decoder = model.decoder
    hidden, cache = decoder.hidden(token[None], start[None, None], attend, cache)
    return decoder.logits(hidden[0, 0]), cache
