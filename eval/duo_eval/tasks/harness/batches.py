"""Contexts in batches: which go together, and what of them is computed once. Knows no task and no text.

What several contexts begin with, such as the worked examples of a few-shot prompt, is prefilled as one row and forked
to as many rows as the batch has. What is asked of one context, such as the choices of a question, is for the caller to
ask in turn, rewinding the batch's cache in between: `fork` copies whole pools, `rewind` only rings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int32

from duo_jax import HeadPattern, KVCache, Model, prefill
from duo_jax.infer import CHUNK_OVERHEAD

Tokens: TypeAlias = tuple[int, ...]

# Chunks of a batch: few sizes, since each is a program to compile.
WIDTHS = (16, 64, 256, 1024)
# Cache lengths are powers of two from here on, for the same reason.
MIN_ROOM = 128
# Contexts share a beginning of at least this many tokens, which is at least half of each: less does not pay.
MIN_SHARED = 64


@dataclass(frozen=True)
class Batch:
    """Contexts that are computed together.

    Attributes:
        rows: their indices.
        shared: tokens at the beginning of all of them that are computed once.
        room: tokens of cache that each row needs.
    """

    rows: tuple[int, ...]
    shared: int
    room: int


def plan(contexts: Sequence[Tokens], extra: Sequence[int], turns: Sequence[int], batch_size: int) -> list[Batch]:
    """Batches of contexts alike in length, and of those that share a beginning.

    Args:
        contexts: token ids, at least one each.
        extra: tokens that will be appended to each context, at most.
        turns: how often something will be; contexts with as many turns go together.
        batch_size: most rows of a batch. Smaller ones have a power of two: few programs.
    """
    batches = []
    for family, shared in _families(contexts):
        family.sort(key=lambda row: (turns[row], len(contexts[row]) + extra[row]), reverse=True)
        # One room for a family: what it shares is then computed once for all of its batches.
        rooms = {row: room(len(contexts[row]) + extra[row]) for row in family}
        while family:
            size = min(batch_size, 1 << (len(family).bit_length() - 1))
            rows, family = family[:size], family[size:]
            batches.append(Batch(tuple(rows), shared, max(rooms[row] for row in (rooms if shared else rows))))
    return batches


def room(length: int) -> int:
    """Tokens of cache for so many tokens: the next power of two."""
    return max(MIN_ROOM, 1 << (length - 1).bit_length())


def width(longest: int, rows: int) -> int:
    """Tokens per chunk for a batch whose longest row has `longest`: what should take the least time."""
    return min(WIDTHS, key=lambda size: -(-longest // size) * (size * rows + CHUNK_OVERHEAD))


def padded(rows: Sequence[Tokens], size: int) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B"]]:
    """Rows padded at the right to a multiple of `size`, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), -(-int(lengths.max()) // size) * size), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths


class Prefiller:
    """Puts batches of contexts into caches, and keeps the last beginning that was shared."""

    def __init__(self, model: Model, pattern: HeadPattern | None, *, backend: str | None = None) -> None:
        """Nothing is computed yet."""
        self.model, self.pattern, self.backend = model, pattern, backend
        self._shared: tuple[Tokens, KVCache] | None = None

    def open(self, batch: Batch, contexts: Sequence[Tokens]) -> tuple[KVCache, list[Tokens]]:
        """A cache that holds what the rows share, and the rest of each row, which is at least a token."""
        rows = [contexts[row] for row in batch.rows]
        if not batch.shared:
            self._shared = None
            return self._cache(len(rows), batch.room), rows
        begin = rows[0][: batch.shared]
        if self._shared is None or self._shared[0] != begin or self._shared[1].max_length != batch.room:
            self._shared = None  # Freed first: two would be in memory at once.
            _, cache = self.append(self._cache(1, batch.room), [begin])
            self._shared = begin, cache
        return self._shared[1].fork(len(rows)), [row[batch.shared :] for row in rows]

    def append(self, cache: KVCache, rows: Sequence[Tokens]) -> tuple[Float[Array, "B V"], KVCache]:
        """Append to every row: the logits after its last token, and the cache."""
        size = width(max(map(len, rows)), len(rows))
        tokens, lengths = padded(rows, size)
        return prefill(self.model, tokens, cache, chunk_size=size, lengths=lengths, backend=self.backend)

    def _cache(self, rows: int, length: int) -> KVCache:
        return KVCache.init(self.model.config, self.pattern, rows, length, dtype=self.model.dtype)


def _families(contexts: Sequence[Tokens]) -> list[tuple[list[int], int]]:
    """Indices of contexts that begin alike, and how many tokens they share; all others are one family, sharing none."""
    order = sorted(range(len(contexts)), key=lambda row: contexts[row])
    families: list[tuple[list[int], int]] = []
    for row in order:
        if families:
            members, shared = families[-1]
            # Neighbours in this order share the most. A token of each row stays: its logits are wanted.
            common = min(_common(contexts[members[-1]], contexts[row]), len(contexts[row]) - 1, shared)
            if common >= MIN_SHARED and 2 * common >= len(contexts[row]):
                families[-1] = [*members, row], common
                continue
        families.append(([row], len(contexts[row]) - 1))
    alone = [members[0] for members, _ in families if len(members) == 1]
    return [(alone, 0), *(family for family in families if len(family[0]) > 1)]


def _common(first: Tokens, second: Tokens) -> int:
    """Tokens at the beginning of both."""
    size = min(len(first), len(second))
    different = np.flatnonzero(np.array(first[:size]) != np.array(second[:size]))
    return int(different[0]) if len(different) else size
