"""Rules of eviction stated densely: one pass over a whole text with a mask for every query, token by token in Python.

Nothing is evicted here. A simulation says which positions each block and each later token would still hold, and
attention runs over all keys with exactly that mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

# (held positions in order, weights [G T S] of the block's queries, first and last + 1 of the block, limit) -> who stays
Choose = Callable[["DenseLayer", int, list[int], np.ndarray, int, int, int], list[int]]


@dataclass
class DenseLayer:
    """What a rule remembers of one layer, by KV head and position; and who was held after each block."""

    memory: np.ndarray  # [K S]
    held: list[list[list[int]]] = field(default_factory=list)  # block, head, positions


def dense(model, tokens, blocks, limits, choose):
    """Logits `[S V]` at every position, and what each layer held after each block (`[first, last + 1)`)."""
    layers = []
    config = model.config
    group = config.num_heads // config.num_kv_heads

    def attend(state, layer, q, k, v):
        q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
        size = len(q)
        q = q.reshape(size, config.num_kv_heads, group, -1)
        out = np.zeros_like(q)
        found = DenseLayer(np.zeros((config.num_kv_heads, size)))
        held = [[] for _ in range(config.num_kv_heads)]
        for (first, last), limit in zip(blocks, limits, strict=True):
            weights = []
            for head in range(config.num_kv_heads):
                mask = np.zeros((last - first, size), bool)
                mask[:, held[head]] = True
                for row in range(first, last):
                    mask[row - first, first : row + 1] = True
                logits = np.einsum("tgh,sh->gts", q[first:last, head], k[:, head]) / np.sqrt(q.shape[-1])
                logits = np.where(mask, logits, -np.inf)
                exp = np.exp(logits - logits.max(-1, keepdims=True))
                weights.append(exp / exp.sum(-1, keepdims=True))
                out[first:last, head] = np.einsum("gts,sh->tgh", weights[-1], v[:, head])
            for head in range(config.num_kv_heads):
                candidates = held[head] + list(range(first, last))
                held[head] = sorted(choose(found, head, candidates, np.array(weights), first, last, limit))
            found.held.append([list(one) for one in held])
        layers.append(found)
        return jnp.asarray(out.reshape(1, size, config.num_heads, -1), jnp.float32), state

    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    decoder = model.decoder
    hidden, _ = decoder.hidden(jnp.asarray(tokens)[None], positions, attend, None)
    return np.asarray(decoder.logits(hidden[0])), layers


def streamingllm(found, head, candidates, weights, first, last, limit):
    if len(candidates) <= limit:
        return candidates
    sinks = [p for p in candidates if p < 4]
    return sinks + candidates[len(candidates) - (limit - len(sinks)) :]


def h2o(found, head, candidates, weights, first, last, limit):
    found.memory[head] += weights[head].mean(0).sum(0)
    if len(candidates) <= limit:
        return candidates
    window = [p for p in candidates if p >= last - limit // 2]
    rest = [p for p in candidates if p not in window]
    heaviest = sorted(rest, key=lambda p: (found.memory[head, p], p))
    return window + heaviest[len(rest) - (limit - len(window)) :]


def tova(found, head, candidates, weights, first, last, limit):
    newest = weights[:, :, -1].mean((0, 1))
    return sorted(candidates, key=lambda p: (newest[p], p))[max(0, len(candidates) - limit) :]


RULES = {"streamingllm": streamingllm, "h2o": h2o, "tova": tova}
