"""Blocked attention in plain XLA: memory linear in T and S, work proportional to the visible key blocks.

The production path on CPU and the fallback anywhere. A layer's heads run one after the other, and each takes the branch
of its type, so that the head table stays data. (A loop for each type is no substitute: of one KV head, all that it
computes is the same in each step, and XLA moves that before the loop, where it runs even if the loop never does.)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.append import scatter
from pallas_kernels.gpus import device_kind
from pallas_kernels.merge import accumulate, empty, partial_of
from pallas_kernels.quantized import Stored, read
from pallas_kernels.schedule import block_at, cdiv, div
from pallas_kernels.types import Backend, Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window, consecutive
from pallas_kernels.xla_train import training

T = TypeVar("T")

# Tokens per block. Large enough for a matrix product to be worth its call, small enough that scores stay in cache.
Q_BLOCK = 512
K_BLOCK = 512
STREAMING_Q_BLOCK = 128
# Keys per block off the CPU. There each step of a loop costs tens of microseconds of the host's time, whatever it
# computes; the scores of a block take memory, in prefill for every query of its block.
K_BLOCK_PREFILL, K_BLOCK_DECODE = 4096, 16_384


def k_block(operation: str) -> int:
    """Keys per block, on the device that programs are traced for."""
    if device_kind() == "cpu":
        return K_BLOCK
    return K_BLOCK_DECODE if operation == "decode" else K_BLOCK_PREFILL


def prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    score_cap: float | None = None,
    attend: Callable[..., Partial] | None = None,
) -> Partial:
    """See `pallas_kernels.prefill_attention`; of several shards, each counts every n-th block of the chunk's keys.

    `attend` computes a retrieval head in another way, called like `_prefill_retrieval`.
    """
    attend = attend or partial(_prefill_retrieval, score_cap=score_cap)
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    # Heads first: a head's queries, keys and values are then contiguous.
    q_heads = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(2, 0, 1, 3, 4)
    k_heads, v_heads = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)
    dtype = q.dtype if shards is None else jnp.dtype(jnp.float32)
    blank = _blank(q_heads, dtype)
    longest = lengths.max()

    def retrieval(head: Array) -> Partial:
        slot = Slot.of(pools.full, heads.slot[head], pools.pages)
        args = q_heads[head], k_heads[head], v_heads[head], slot, shards
        return attend(*args, _head(blank), start=start, longest=longest)

    def streaming(head: Array) -> Partial:
        is_written = window.positions(start) >= 0
        ring_k, ring_v = Slot.of(pools.ring, heads.slot[head]).load(jnp.int32(0), is_written, q.dtype)
        ring = ring_k.astype(k.dtype), ring_v.astype(v.dtype)
        args = q_heads[head], k_heads[head], v_heads[head], ring, _head(blank)
        return _prefill_streaming(*args, start=start, longest=longest, window=window, score_cap=score_cap)

    out = _over_heads(retrieval, streaming, pools, heads, blank)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, length, num_heads, *x.shape[4:]), out)


def decode(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    score_cap: float | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention`; of several shards, each attends to the tokens that it stores."""
    del window  # A ring stores nothing but visible tokens.
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    q_heads = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(1, 0, 2, 3)
    held = lengths if shards is None else shards.held(lengths)
    # A CPU's time is that of its work, elsewhere it is that of the steps of the loop.
    attend = _decode_rows if device_kind() == "cpu" else _decode_slot

    def retrieval(head: Array) -> Partial:
        return attend(q_heads[head], Slot.of(pools.full, heads.slot[head], pools.pages), held, score_cap)

    def streaming(head: Array) -> Partial:
        # A ring fills from its first index and then stays full: every index below `length` has a visible token.
        return attend(q_heads[head], Slot.of(pools.ring, heads.slot[head]), lengths, score_cap)

    out = _over_heads(retrieval, streaming, pools, heads, _blank(q_heads, jnp.dtype(jnp.float32)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, num_heads, *x.shape[3:]), out)


class Slot(NamedTuple):
    """Keys and values of one head, read by blocks of tokens: the one place that knows how pools store them."""

    k: Stored
    v: Stored
    slot: Int32[Array, ""]
    pages: Int32[Array, "B n"] | None
    row: Int32[Array, ""] | None = None  # the only row to read; None: all of them

    @classmethod
    def of(cls, pool: tuple[Stored, Stored], slot: Array, pages: Array | None = None) -> "Slot":
        """A slot of the keys and values of one type of head."""
        return cls(*pool, slot, pages)

    @property
    def size(self) -> int:
        """Tokens of a row that there is room for."""
        page = self.k.shape[2]
        return page if self.pages is None else page * self.pages.shape[1]

    def block(self, operation: str) -> int:
        """Tokens of a block, whole pages."""
        page, most = self.k.shape[2], k_block(operation)
        if self.pages is None:
            return min(most, page)
        return page * min(max(1, most // page), self.pages.shape[1])

    def load(
        self, begin: Array, exists: Bool[Array, "B size"], dtype: jnp.dtype
    ) -> tuple[Float[Array, "B size H"], Float[Array, "B size H"]]:
        """Keys and values of `size` tokens of each row, or of `row`; with pages, those begin and end with one.

        Values of tokens that do not exist are zeros: memory may hold NaN there, and a weight of zero does not hide it.
        """
        size = exists.shape[1]

        def part(x: Array, row: Array, begin: Array, count: int) -> Array:
            at = self.slot, row, begin, *(jnp.int32(0),) * (x.ndim - 3)
            return lax.dynamic_slice(x, at, (1, count, size, *x.shape[3:]))[0]

        def contiguous(x: Array) -> Array:
            return part(x, jnp.int32(0), begin, x.shape[1]) if self.row is None else part(x, self.row, begin, 1)

        def paged(x: Array) -> Array:
            assert self.pages is not None
            page = x.shape[2]
            if self.row is not None:
                return part(
                    x, lax.dynamic_slice(self.pages, (self.row, div(begin, page)), (1, 1))[0, 0], jnp.int32(0), 1
                )
            numbers = lax.dynamic_slice_in_dim(self.pages, div(begin, page), size // page, 1)
            found = x.at[self.slot, numbers].get(mode="clip")  # [B, pages of the block, page, ...]
            return found.reshape(found.shape[0], size, *found.shape[3:])

        rows = contiguous if self.pages is None else paged
        k, v = (read(jax.tree.map(rows, pool), dtype) for pool in (self.k, self.v))
        return k, jnp.where(exists[:, :, None], v, jnp.zeros((), v.dtype))


def _over_heads(
    retrieval: Callable[[Array], Partial],
    streaming: Callable[[Array], Partial],
    pools: Pools,
    heads: Heads,
    out: Partial,
) -> Partial:
    """Fill arrays `out [K ...]`, each KV head by the function of its type."""
    functions = [f for f, pool in ((streaming, pools.ring_k), (retrieval, pools.full_k)) if pool.shape[0]]

    def one_head(i: Array, out: Partial) -> Partial:
        # With one type of head only, the index of the other function is clipped.
        new = lax.switch(heads.is_retrieval[i].astype(jnp.int32), functions, i)
        return jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0), out, new)

    return lax.fori_loop(jnp.int32(0), jnp.int32(heads.slot.shape[0]), one_head, out)


def _blank(q: Float[Array, "*B H"], dtype: jnp.dtype) -> Partial:
    """Zeros for the result of every query."""
    return Partial(jnp.zeros(q.shape, dtype), jnp.zeros(q.shape[:-1], jnp.float32))


def _head(blank: Partial) -> Partial:
    """The same, of one KV head."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), blank)


def _prefill_retrieval(q, k, v, slot, shards, blank, *, start, longest, score_cap=None):
    """One retrieval head: query blocks over the filled key blocks of its slot, then over the chunk, causally."""
    batch, length, group, head_dim = q.shape
    q_block, own_block, pool_block = min(Q_BLOCK, length), min(k_block("prefill"), length), slot.block("prefill")
    held = start if shards is None else shards.held(start)
    past_blocks = cdiv(held.max(), pool_block)
    # A device counts every n-th block of the chunk.
    first_own, step = (jnp.int32(0), 1) if shards is None else (shards.index, shards.count)

    def one_q_block(i, out):
        first = jnp.minimum(i * q_block, length - q_block)
        rows = lax.dynamic_slice_in_dim(q, first, q_block, 1)
        q_index = jnp.repeat(first + jnp.arange(q_block, dtype=jnp.int32), group, total_repeat_length=q_block * group)
        rows = rows.reshape(batch, q_block * group, head_dim)

        def past(j, state):
            begin, index = block_at(j, pool_block, slot.size)
            keep = (index >= j * pool_block) & (index < held[:, None])
            keys, values = slot.load(begin, keep, q.dtype)
            return accumulate(state, rows, keys, values, keep[:, None, :], score_cap)

        def own(j, state):
            j = first_own + j * step
            begin, index = block_at(j, own_block, length)
            keep = (index >= j * own_block) & (index <= q_index[:, None])
            keys, values = (lax.dynamic_slice_in_dim(x, begin, own_block, 1) for x in (k, v))
            return accumulate(state, rows, keys, values, keep[None], score_cap)

        state = empty((batch, q_block * group), head_dim)
        state = lax.fori_loop(jnp.int32(0), past_blocks, past, state)
        own_blocks = cdiv(cdiv(first + q_block, own_block) - first_own, step)
        state = _loop(own_blocks, own, state, is_single=own_block == length and shards is None)
        return _write(out, partial_of(state, out.out.dtype), first, q_block)

    return _loop(cdiv(longest, q_block), one_q_block, blank, is_single=q_block == length)


def _prefill_streaming(q, k, v, ring, blank, *, start, longest, window, score_cap=None):
    """One streaming head: each query block sees the sinks and one contiguous band of keys, so work is linear in T."""
    batch, length, group, head_dim = q.shape
    q_block = min(STREAMING_Q_BLOCK, length)
    sink_pos = consecutive(jnp.zeros_like(start), window.sink)
    # The window as it was before the chunk, in order, then the chunk: entry j has position start - recent + j.
    window_pos = consecutive(start - window.recent, window.recent)
    window_index = jnp.maximum(window.index(window_pos), 0)
    in_chunk = jnp.clip(sink_pos - start[:, None], 0, length - 1)

    def gather(ring: Array, chunk: Array) -> tuple[Array, Array]:
        is_cached = (sink_pos < start[:, None])[:, :, None]
        sinks = jnp.where(is_cached, ring[:, : window.sink], _take(chunk, in_chunk))
        return sinks, jnp.concatenate([_take(ring, window_index), chunk], axis=1)

    (sink_k, band_k), (sink_v, band_v) = gather(ring[0], k), gather(ring[1], v)
    width = q_block + window.recent

    def one_q_block(i, out):
        first = jnp.minimum(i * q_block, length - q_block)
        rows = lax.dynamic_slice_in_dim(q, first, q_block, 1).reshape(batch, q_block * group, head_dim)
        offset = jnp.repeat(jnp.arange(q_block, dtype=jnp.int32), group, total_repeat_length=q_block * group)
        q_pos = (start[:, None] + first + offset[None, :])[:, :, None]
        band_pos = consecutive(start - window.recent + first, width)[:, None, :]
        # Sinks come from `sink_k` only: a band that reaches back to them must not count them twice.
        keep_band = window.visible(q_pos, band_pos) & (band_pos >= window.sink)
        keys = jnp.concatenate([sink_k, lax.dynamic_slice_in_dim(band_k, first, width, 1)], axis=1)
        values = jnp.concatenate([sink_v, lax.dynamic_slice_in_dim(band_v, first, width, 1)], axis=1)
        keep = jnp.concatenate([sink_pos[:, None, :] <= q_pos, keep_band], axis=2)
        state = accumulate(empty((batch, q_block * group), head_dim), rows, keys, values, keep, score_cap)
        return _write(out, partial_of(state, out.out.dtype), first, q_block)

    return _loop(cdiv(longest, q_block), one_q_block, blank, is_single=q_block == length)


def _loop(count: Array, body: Callable[[Array, T], T], state: T, *, is_single: bool) -> T:
    """`count` steps. One that is never repeated needs no loop, of which a program would have one for each layer."""
    return body(jnp.int32(0), state) if is_single else lax.fori_loop(jnp.int32(0), count, body, state)


def _write(out: Partial, block: Partial, first: Array, q_block: int) -> Partial:
    """Put the result of a block of queries, `[B q_block*G ...]`, into `out [B T G ...]`."""

    def put(x: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, new.reshape(x.shape[0], q_block, *x.shape[2:]), first, 1)

    return jax.tree.map(put, out, block)


def _decode_slot(q: Float[Array, "B G H"], slot: Slot, lengths: Int32[Array, "B"], score_cap: float | None) -> Partial:
    """One head's query group over the filled blocks of its slot."""
    block, size = slot.block("decode"), slot.size

    def add_block(j, state):
        begin, index = block_at(j, block, size)
        keep = (index >= j * block) & (index < lengths[:, None])
        keys, values = slot.load(begin, keep, q.dtype)
        return accumulate(state, q, keys, values, keep[:, None, :], score_cap)

    num_blocks = cdiv(jnp.minimum(lengths.max(), size), block)
    state = _loop(num_blocks, add_block, empty(q.shape[:2], q.shape[2]), is_single=block == size)
    return partial_of(state, jnp.float32)


def _decode_rows(q: Float[Array, "B G H"], slot: Slot, lengths: Int32[Array, "B"], score_cap: float | None) -> Partial:
    """Like `_decode_slot`, row after row: each costs its own blocks only, and its bits do not depend on the others."""
    size = slot.size
    block = slot.block("decode") if slot.pages is None else slot.k.shape[2]  # A page is read without a gather.
    counts = cdiv(jnp.minimum(lengths, size), block)
    ends = jnp.cumsum(counts)

    def add_block(step, state):
        row = (step >= ends).sum(dtype=jnp.int32)
        j = step - (ends[row] - counts[row])
        begin, index = block_at(j, block, size)
        keep = (index >= j * block) & (index < lengths[row])
        keys, values = slot._replace(row=row).load(begin, keep, q.dtype)
        queries, own = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1, 0), (q, state))
        own = accumulate(own, queries, keys, values, keep[:, None, :], score_cap)
        return jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, row, 0), state, own)

    is_single = block == size and len(lengths) == 1
    return partial_of(_loop(ends[-1], add_block, empty(q.shape[:2], q.shape[2]), is_single=is_single), jnp.float32)


def _take(rows: Float[Array, "B S H"], index: Int32[Array, "B I"]) -> Float[Array, "B I H"]:
    return jnp.take_along_axis(rows, index[:, :, None], axis=1)


BACKEND = Backend("xla", lambda request: None, prefill, decode, training, scatter, caps_scores=True)
