"""Batches of contexts: which contexts are computed together, and which of their tokens only once. Knows no task.

A beginning that several contexts share, such as the worked examples of a few-shot prompt, is prefilled as one row and
forked to the rows of the batch. Several continuations of one context, such as the choices of a question, are for the
caller to score in turn, rewinding the cache in between: `fork` copies whole pools, `rewind` only rings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int32

from duo_jax import HeadPattern, KVCache, Model, prefill
from duo_jax.generation.chunks import CHUNK_OVERHEAD

Tokens: TypeAlias = tuple[int, ...]

# Chunk sizes of a batch: few, since each is a program to compile.
WIDTHS = (16, 64, 256, 1024)
# Cache lengths are powers of two, at least this one, for the same reason.
MIN_ROOM = 128
# A beginning is shared only if it has at least this many tokens and is at least half of each context.
MIN_SHARED = 64


@dataclass(frozen=True)
class Batch:
    """Contexts that are computed together.

    Attributes:
        rows: indices of the contexts.
        shared: tokens at the beginning of all of them that are computed once.
        room: tokens of cache that each row needs.
    """

    rows: tuple[int, ...]
    shared: int
    room: int


def plan(contexts: Sequence[Tokens], extra: Sequence[int], turns: Sequence[int], batch_size: int) -> list[Batch]:
    """Batches of contexts of similar length, and of contexts with a common beginning.

    Args:
        contexts: token ids, at least one each.
        extra: most tokens that will be appended to each context.
        turns: how often something will be appended; contexts with the same number of turns are batched together.
        batch_size: most rows of a batch. The rows of a smaller one are a power of two, to limit compilation.
    """
    batches = []
    for family, shared in _families(contexts):
        family.sort(key=lambda row: (turns[row], len(contexts[row]) + extra[row]), reverse=True)
        # One cache length for a family: its common beginning is then computed once for all of its batches.
        rooms = {row: room(len(contexts[row]) + extra[row]) for row in family}
        while family:
            size = min(batch_size, 1 << (len(family).bit_length() - 1))
            rows, family = family[:size], family[size:]
            batches.append(Batch(tuple(rows), shared, max(rooms[row] for row in (rooms if shared else rows))))
    return batches


def room(length: int) -> int:
    """Length of a cache for `length` tokens: the next power of two."""
    return max(MIN_ROOM, 1 << (length - 1).bit_length())


def width(longest: int, rows: int) -> int:
    """Tokens per chunk for a batch whose longest row has `longest`, chosen for the least estimated time."""
    return min(WIDTHS, key=lambda size: -(-longest // size) * (size * rows + CHUNK_OVERHEAD))


def padded(rows: Sequence[Tokens], size: int) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B"]]:
    """Rows padded at the right to a multiple of `size`, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), -(-int(lengths.max()) // size) * size), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths


class Prefiller:
    """Prefills batches of contexts, and keeps the cache of the last common beginning."""

    def __init__(self, model: Model, pattern: HeadPattern | None, *, backend: str | None = None) -> None:
        """Nothing is computed yet."""
        self.model, self.pattern, self.backend = model, pattern, backend
        self._shared: tuple[Tokens, KVCache] | None = None

    def open(self, batch: Batch, contexts: Sequence[Tokens]) -> tuple[KVCache, list[Tokens]]:
        """A cache with the common beginning of the rows, and the rest of each row, at least one token."""
        rows = [contexts[row] for row in batch.rows]
        if not batch.shared:
            self._shared = None
            return self._cache(len(rows), batch.room), rows
        begin = rows[0][: batch.shared]
        if self._shared is None or self._shared[0] != begin or self._shared[1].max_length != batch.room:
            self._shared = None  # Free it first, so that only one is in memory.
            _, cache = self.append(self._cache(1, batch.room), [begin])
            self._shared = begin, cache
        return self._shared[1].fork(len(rows)), [row[batch.shared :] for row in rows]

    def append(self, cache: KVCache, rows: Sequence[Tokens]) -> tuple[Float[Array, "B V"], KVCache]:
        """Append to every row: the logits after its last token, and the cache."""
        size = width(max(map(len, rows)), len(rows))
        tokens, lengths = padded(rows, size)
        return prefill(self.model, tokens, cache, chunk_size=size, lengths=lengths, backend=self.backend)

    def _cache(self, rows: int, length: int) -> KVCache:
        config = self.model.config
        return KVCache.init(config, self.pattern, rows, config.room(length), dtype=self.model.dtype)


def _families(contexts: Sequence[Tokens]) -> list[tuple[list[int], int]]:
    """Groups of contexts with a common beginning, and its length; all other contexts are one group that shares none."""
    order = sorted(range(len(contexts)), key=lambda row: contexts[row])
    families: list[tuple[list[int], int]] = []
    for row in order:
        if families:
            members, shared = families[-1]
            # Neighbours in this order share the most. One token of each row is not shared: its logits are needed.
            common = min(_common(contexts[members[-1]], contexts[row]), len(contexts[row]) - 1, shared)
            if common >= MIN_SHARED and 2 * common >= len(contexts[row]):
                families[-1] = [*members, row], common
                continue
        families.append(([row], len(contexts[row]) - 1))
    single = [members[0] for members, _ in families if len(members) == 1]
    return [(single, 0), *(family for family in families if len(family[0]) > 1)]


def _common(first: Tokens, second: Tokens) -> int:
    """Number of tokens that both begin with."""
    size = min(len(first), len(second))
    different = np.flatnonzero(np.array(first[:size]) != np.array(second[:size]))
    return int(different[0]) if len(different) else size
