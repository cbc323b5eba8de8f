"""Rules of eviction stated densely: one pass over a whole text with a mask for every query, token by token in Python.

Nothing is evicted here. A simulation says which positions each head would hold after each block of queries, and
attention runs over all keys with exactly that mask. A rule looks at one layer, after a block: it takes the positions
that each head could hold `[K]`, the block's weights `[K G T S]` and what it remembers `[K S]`, and returns those that
stay.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Block:
    """Queries from `first` to `last - 1`, after which a head may hold `limit` tokens."""

    first: int
    last: int
    limit: int


Rule = Callable[[Block, list[list[int]], np.ndarray, np.ndarray], list[list[int]]]


def blocks(prompt: int, total: int, size: int, limit: Callable[[int], int]) -> list[Block]:
    """A prompt in blocks of `size`, then token by token; `limit` by the tokens seen."""
    firsts = [*range(0, prompt, size), *range(prompt, total)]
    lasts = [min(first + size, prompt) if first < prompt else first + 1 for first in firsts]
    return [Block(a, b, limit(max(prompt, b))) for a, b in zip(firsts, lasts, strict=True)]


def dense(model, tokens, parts, rule, *, before=None):
    """Logits `[S V]` at every position; and by layer, block and head, the positions held after the block.

    `before(layer, block, held, memory)` says what heads still hold ahead of a block.
    """
    config = model.config
    heads, history = config.num_kv_heads, []

    def attend(state, layer, q, k, v):
        q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
        q = q.reshape(len(q), heads, config.num_heads // heads, -1)
        out, memory = np.zeros_like(q), np.zeros((heads, len(q)))
        held: list[list[int]] = [[] for _ in range(heads)]
        history.append([])
        for part in parts:
            if before:
                held = before(layer, part, held, memory)
            rows = np.arange(part.first, part.last)
            mask = np.zeros((heads, len(rows), len(q)), bool)
            for head in range(heads):
                mask[head][:, held[head]] = True
            mask |= (np.arange(len(q)) >= part.first) & (np.arange(len(q)) <= rows[:, None])
            logits = np.einsum("tkgh,skh->kgts", q[rows], k) / np.sqrt(q.shape[-1])
            exp = np.where(mask[:, None], np.exp(logits), 0.0)
            weights = exp / exp.sum(-1, keepdims=True)
            out[rows] = np.einsum("kgts,skh->tkgh", weights, v)
            held = rule(part, [one + list(rows) for one in held], weights, memory)
            history[-1].append([sorted(int(p) for p in one) for one in held])
        return jnp.asarray(out.reshape(1, len(q), config.num_heads, -1), jnp.float32), state

    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    decoder = model.decoder
    hidden, _ = decoder.hidden(jnp.asarray(tokens)[None], positions, attend, None)
    return np.asarray(decoder.logits(hidden[0])), history


def heaviest(positions: list[int], weights: np.ndarray, count: int) -> list[int]:
    """The `count` positions with the largest weights; of equals the younger."""
    return sorted(positions, key=lambda p: (weights[p], p))[max(0, len(positions) - count) :]


def streamingllm(part, candidates, weights, memory):
    """Four sinks, and as many of the last as fit."""
    stay = []
    for positions in candidates:
        sinks = [p for p in positions if p < 4]
        rest = [p for p in positions if p >= 4]
        stay.append(sinks + rest[max(0, len(rest) - (part.limit - len(sinks))) :])
    return stay


def h2o(part, candidates, weights, memory):
    """Half of the limit for the last tokens, half for those with the largest sum of weights so far."""
    memory += weights.mean(1).sum(1)
    stay = []
    for head, positions in enumerate(candidates):
        window = [p for p in positions if p >= part.last - part.limit // 2]
        rest = [p for p in positions if p not in window]
        stay.append(window + heaviest(rest, memory[head], part.limit - len(window)))
    return stay


def tova(part, candidates, weights, memory):
    """Those with the largest weights of the last query, averaged over all heads."""
    newest = weights[:, :, -1].mean((0, 1))
    return [heaviest(positions, newest, part.limit) for positions in candidates]


def snapkv(part, candidates, weights, memory, *, window=8, pool=7):
    """After the prompt: its last tokens, and those with the most of their weights or beside one; then everything."""
    if part.first > 0:
        return candidates
    first = part.last - window
    stay = []
    for head in range(len(candidates)):
        votes = weights[head][:, first:].sum(1).mean(0)[:first]
        near = pool // 2
        pooled = np.array([votes[max(0, p - near) : p + near + 1].max() for p in range(first)])
        stay.append([*heaviest(list(range(first)), pooled, part.limit - window), *range(first, part.last)])
    return stay
