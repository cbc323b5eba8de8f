"""Prefill over quantized pools, for kernels that read plain ones: slots are unpacked a segment at a time.

Each program of a kernel would unpack the keys that it visits, and a long chunk has many tiles of queries for each key.
So a segment of every slot of the layer is unpacked once into memory that all segments share, the kernel runs on it, and
its result is merged with that of the segments before. Only segments with tokens are visited.

A short chunk has few tiles of queries, and memory is what it waits for: a kernel of decode reads the packed slots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpus import chip
from pallas_kernels.merge import merge_parts
from pallas_kernels.quantized import any_quantized
from pallas_kernels.schedule import cdiv
from pallas_kernels.tiles import MOST_ROWS
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.works import Scope, multiprocessors
from pallas_kernels.xla import Slot

# Tokens of a segment, all rows together, and the least of a row. A result is merged in the time in which about 1,000
# keys are attended to; a head's 65,536 keys and values of 128 numbers in bfloat16 take 34 MB.
SEGMENT, LEAST = 65_536, 8192
# Whole tiles of keys.
UNIT = 128
# Most tiles of queries of a KV head for which unpacking a key for each of them takes less time than unpacking it once
# into memory: on Hopper, and elsewhere. By the model in docs/guides/kernels.md.
MOST_TILES, MOST_TILES_ELSEWHERE = 4, 2

# Tokens of a row's segment, where they are chosen otherwise.
_CHOSEN: ContextVar[int | None] = ContextVar("segment", default=None)


@contextmanager
def segments_of(tokens: int | None) -> Iterator[None]:
    """Within it, programs are traced with segments of so many tokens of each row: for short slots, to have several.

    So are those of short chunks. None: the number is not chosen.
    """
    token = _CHOSEN.set(tokens)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def segment(rows: int, capacity: int, page: int = 1) -> int:
    """Tokens of a row's segment, whole pages and at most the capacity."""
    tokens = _CHOSEN.get() or max(SEGMENT // rows, LEAST) // UNIT * UNIT
    return min(-(-tokens // page) * page, capacity)


def scratch_bytes(rows: int, capacity: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a segment's keys and values while they are unpacked, of one layer's KV heads."""
    return 2 * num_kv_heads * rows * segment(rows, capacity) * head_dim * itemsize


def is_short(q: Float[Array, "B T N H"], num_kv_heads: int) -> bool:
    """Whether a chunk's queries are so few that decode's kernel should read packed keys for them, and can."""
    rows, tokens, num_heads, head_dim = q.shape
    tiles = -(-tokens * (num_heads // num_kv_heads) // MOST_ROWS)
    # Results of parts of the keys, at most one for each multiprocessor and head, take no more memory than a segment.
    parts = rows * multiprocessors() * MOST_ROWS * 4
    return (
        _CHOSEN.get() is None
        and can_be_short(q.dtype, head_dim)
        and tiles <= (MOST_TILES if chip().is_hopper else MOST_TILES_ELSEWHERE)
        and parts <= 2 * rows * segment(rows, SEGMENT) * q.dtype.itemsize
    )


def can_be_short(dtype: Any, head_dim: int) -> bool:
    """Whether decode's kernel can read packed keys for queries of a chunk, if there are few of them."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim >= 16 and head_dim.bit_count() == 1


def over_plain_pools(
    attend: Callable[..., Partial],
    attend_to_slots: Callable[..., Partial] | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    shards: TokenShards | None = None,
) -> Partial:
    """Attention by `attend(q, k, v, pools, heads, start=, lengths=, scope=)`, which gets pools that are not quantized.

    Of several shards, the first counts the chunk's own keys. The output is float32 where several results are merged.
    For a short chunk, `attend_to_slots(q, pools, heads, filled=)` is attention to quantized slots; None: they are
    unpacked for it too.
    """
    filled = start if shards is None else shards.held(start)
    scope = Scope(filled, True if shards is None else shards.index == 0)
    rows: dict[str, Any] = {"start": start, "lengths": lengths}
    numbers = jnp.arange(heads.slot.shape[0], dtype=jnp.int32)
    none = jnp.zeros((0, *q.shape[:1], 1, q.shape[3]), q.dtype)

    def unpacked(kind: tuple[Any, Any], is_here: Array, begin: Array, exists: Array, pages: Any) -> tuple[Array, Array]:
        """Some tokens of the slots of the layer's heads of a type, `[K, B, size, H]`; those of others are any."""
        slots = jnp.where(is_here, heads.slot, heads.slot[jnp.argmax(is_here)])
        return jax.vmap(lambda slot: Slot.of(kind, slot, pages).load(begin, exists, q.dtype))(slots)

    if not any_quantized(pools.stored):
        return attend(q, k, v, pools, heads, **rows, scope=scope)
    slot, full, ring, pages = heads.slot, pools.full, pools.ring, pools.pages
    is_ring_stored, is_full_stored = (kind[0].shape[0] > 0 and any_quantized(kind) for kind in (ring, full))
    if is_ring_stored:
        is_written = jnp.ones((q.shape[0], ring[0].shape[2]), bool)
        ring = unpacked(ring, ~heads.is_retrieval, jnp.int32(0), is_written, None)
        slot = jnp.where(heads.is_retrieval, slot, numbers)
    elif any_quantized(ring):
        ring = none, none
    if not is_full_stored:
        full = (none, none) if any_quantized(full) else full
        return attend(q, k, v, Pools(full[0], full[1], *ring, pages), heads._replace(slot=slot), **rows, scope=scope)
    first = attend(
        q, k, v, Pools(none, none, *ring), heads._replace(slot=slot), **rows, scope=scope._replace(filled=0 * filled)
    )
    found = Partial(first.out.astype(jnp.float32), first.log_sum)
    if attend_to_slots is not None and is_short(q, heads.slot.shape[0]):
        return merge_parts([found, attend_to_slots(q, pools, heads, filled=filled)])
    capacity = pools.capacity
    size = segment(q.shape[0], capacity, pools.page or 1)
    # The first segment is the one that is shorter: every other one then has `size` tokens up to the end of a slot.
    short = capacity - (-(-capacity // size) - 1) * size
    group = q.shape[2] // heads.slot.shape[0]
    is_retrieval = jnp.repeat(heads.is_retrieval, group, total_repeat_length=q.shape[2])

    def add(number: Array, found: Partial) -> Partial:
        end = short + number * size
        begin = jnp.maximum(end - size, jnp.int32(0))
        tokens = jnp.clip(filled, begin, end) - begin
        exists = jnp.arange(size, dtype=jnp.int32)[None, :] < tokens[:, None]
        keys, values = unpacked(full, heads.is_retrieval, begin, exists, pages)
        of_segment = heads._replace(slot=numbers)
        part = attend(
            q, k, v, Pools(keys, values, none, none), of_segment, **rows, scope=Scope(tokens, has_chunk=False)
        )
        is_used = is_retrieval[None, None, :] & (tokens > 0)[:, None, None]
        return merge_parts([found, part], [None, is_used])

    count = jnp.where(heads.is_retrieval.any(), cdiv(jnp.maximum(filled.max() + size - short, 0), size), 0)
    return lax.fori_loop(jnp.int32(0), jnp.where(filled.max() > 0, count, 0), add, found)
