"""Attention over a chunk and the cache before it: `pallas_kernels.triton.flash`, in Triton's own language.

A program computes one tile of queries of one head, over the tiles of keys that a row of the plan lists.
"""

from functools import partial
from typing import Any, no_type_check

import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from pallas_kernels.jax_triton.launch import launch, of_softmax
from pallas_kernels.jax_triton.plan import Row, table
from pallas_kernels.jax_triton.tile import accumulate, empty, finish, load_rows, place, store_rows, width
from pallas_kernels.merge import combine
from pallas_kernels.quantized import compute_dtype
from pallas_kernels.schedule import Sizes
from pallas_kernels.segments import over_plain_pools
from pallas_kernels.tiles import FlashTiles, tiles_for
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window
from pallas_kernels.works import Queries, Scope


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
) -> Partial:
    """See `pallas_kernels.prefill_attention`; of several shards, the first counts the chunk's own keys."""
    tiles = tiles_for("flash", q.shape[-1], compute_dtype(q, k).itemsize, page=pools.page)
    dtype = q.dtype if shards is None else jnp.dtype(jnp.float32)
    attend = partial(flash_attention, window=window, tiles=tiles, dtype=dtype)
    return over_plain_pools(attend, None, q, k, v, pools, heads, start=start, lengths=lengths, shards=shards)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools | None,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    tiles: FlashTiles,
    scope: Scope,
    dtype: Any,
) -> Partial:
    """Attention of a chunk, an output of `dtype`; without pools, nothing precedes it."""
    full, ring = (pools.full, pools.ring) if pools else ((None, None), (None, None))
    has_full, has_ring = (pair[0] is not None and pair[0].shape[0] > 0 for pair in (full, ring))
    capacity = pools.capacity if pools and has_full else 0
    queries = Queries.of(q, k.shape[2], tiles.block_q, capacity)
    packed, parts = queries.pack(q), queries.parts(heads)
    if has_full:  # The next slot begins at its capacity.
        scope = scope._replace(filled=jnp.minimum(scope.filled, jnp.int32(capacity)))
    steps = Sizes(k.shape[1], queries.tile_tokens, tiles.block_k, window)
    plan = table(queries.plan(heads, parts, steps, start=start, lengths=lengths, scope=scope), steps)
    outputs = queries.results(queries.length, q.shape[3], dtype if queries.most_parts == 1 else jnp.float32)
    # What a kernel never reads is given another array, since an argument cannot be empty.
    pages = pools.pages if pools and has_full else None
    stored = [*(full if has_full else (k, v)), *(ring if has_ring else (k, v)), plan if pages is None else pages]
    sizes = sizes_of(packed.shape, k.shape, [pool.shape for pool in stored[::2]], queries, tiles, window)
    sizes |= {
        "has_own": scope.has_chunk is not False,
        "has_full": has_full,
        "has_ring": has_ring,
        "is_paged": pages is not None,
    }
    found = launch(
        flash_kernel,
        (packed, k, v, *stored, plan),
        outputs,
        grid=(len(plan),),
        warps=tiles.num_warps,
        stages=tiles.num_stages,
        sizes=sizes,
    )
    return queries.merged(found, heads, scope.filled, parts, combine, dtype)


def sizes_of(
    q: tuple[int, ...],
    k: tuple[int, ...],
    stored: Any,
    queries: Queries,
    tiles: FlashTiles,
    window: Window,
) -> dict[str, int | float]:
    """The constants that the kernel is compiled with, by the shapes of queries, keys, pools and pages."""
    full, ring, pages = stored
    return {
        "batch": q[0],
        "queries": q[1],
        "num_heads": q[2],
        "tokens": k[1],
        "num_kv_heads": k[2],
        "head_dim": k[3],
        "width": width(k[3]),
        "packed": queries.packed,
        "most_parts": queries.most_parts,
        "full_rows": full[1],
        "full_tokens": full[2],
        "row_pages": pages[1],
        "ring_tokens": ring[2],
        "reach": window.recent,
        "block_q": tiles.block_q,
        "block_k": tiles.block_k,
        **of_softmax(k[3]),
    }


# Columns of the plan.
FIELDS = tl.constexpr(len(Row._fields))
ROW, HEAD, KV_HEAD, SLOT, TILE, PART, IS_USED = (tl.constexpr(i) for i in range(7))
TAIL, DIAGONAL, RING, INNER, WHOLE = (
    tl.constexpr(Row._fields.index(f"{name}_begin")) for name in ("tail", "diagonal", "ring", "inner", "whole")
)
SEEN = tl.constexpr(Row._fields.index("full_leading"))


@triton.jit
@no_type_check
def over_own(
    values,
    maximum,
    total,
    q,  # [M, H]
    q_index,  # [M], in the chunk
    work,  # row of the plan
    stretch,  # its column
    is_masked: tl.constexpr,
    k_ptr,  # of the KV head
    v_ptr,
    row,  # of the batch
    stride: tl.constexpr,
    tokens: tl.constexpr,
    block_k: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """A stretch of the chunk's own keys."""
    leading = tl.load(work + SEEN + 1)
    limit = tl.load(work + SEEN + 2)
    for number in range(tl.load(work + stretch), tl.load(work + stretch + 1)):
        first = number * block_k
        i = first + tl.arange(0, block_k)
        at = (row.to(tl.int64) * tokens + first) * stride
        k = load_rows(k_ptr + at, stride, i < tokens, not is_masked, block_k, head_dim, width)
        v = load_rows(v_ptr + at, stride, i < tokens, not is_masked, block_k, head_dim, width)
        keep = (i < leading)[None, :] | (q_index[:, None] - i[None, :] < limit)
        keep = keep & (i[None, :] <= q_index[:, None])
        values, maximum, total = accumulate(values, maximum, total, q, k, v, keep, is_masked, scale, masked)
    return values, maximum, total


@triton.jit
@no_type_check
def over_full(
    values,
    maximum,
    total,
    q,  # [M, H]
    work,  # row of the plan
    stretch: tl.constexpr,
    is_masked: tl.constexpr,
    k_ptr,  # of the slot
    v_ptr,
    row,  # of the batch
    pages_ptr,  # [n], of the row
    is_paged: tl.constexpr,
    full_tokens: tl.constexpr,
    block_k: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """A stretch of a retrieval head's slot."""
    leading = tl.load(work + SEEN)
    for number in range(tl.load(work + stretch), tl.load(work + stretch + 1)):
        first = number * block_k
        exists = first + tl.arange(0, block_k) < leading
        at = place(row, first, pages_ptr, is_paged, full_tokens) * head_dim
        k = load_rows(k_ptr + at, head_dim, exists, not is_masked, block_k, head_dim, width)
        v = load_rows(v_ptr + at, head_dim, exists, not is_masked, block_k, head_dim, width)
        keep = exists[None, :]
        values, maximum, total = accumulate(values, maximum, total, q, k, v, keep, is_masked, scale, masked)
    return values, maximum, total


@triton.jit
@no_type_check
def over_ring(
    values,
    maximum,
    total,
    q,  # [M, H]
    q_index,  # [M], in the chunk
    work,  # row of the plan
    k_ptr,  # of the row's ring
    v_ptr,
    reach: tl.constexpr,
    block_k: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """The ring of a streaming head, as it was before the chunk."""
    leading = tl.load(work + SEEN + 3)
    cut = tl.load(work + SEEN + 4)
    size = tl.load(work + SEEN + 5)
    limit = tl.load(work + SEEN + 6)
    for number in range(tl.load(work + RING), tl.load(work + RING + 1)):
        first = number * block_k
        i = first + tl.arange(0, block_k)
        k = load_rows(k_ptr + first * head_dim, head_dim, i < size, False, block_k, head_dim, width)
        v = load_rows(v_ptr + first * head_dim, head_dim, i < size, False, block_k, head_dim, width)
        # Of tokens that a query does not see: larger than any limit.
        ago = tl.where(i < size, cut - i + tl.where(i < cut, 0, reach), 1 << 30)
        keep = (i < leading)[None, :] | (ago[None, :] + q_index[:, None] < limit)
        values, maximum, total = accumulate(values, maximum, total, q, k, v, keep, True, scale, masked)
    return values, maximum, total


@triton.jit
@no_type_check
def flash_kernel(
    q_ptr,  # [B, Q, N, H], packed
    k_ptr,  # [B, T, K, H]
    v_ptr,
    full_k_ptr,  # [Pr, B, S, H], or pages
    full_v_ptr,
    ring_k_ptr,  # [Ps, B, R, H]
    ring_v_ptr,
    pages_ptr,  # [B, n]
    plan_ptr,  # [W, F]
    out_ptr,  # as in `Queries.results`
    log_ptr,
    batch: tl.constexpr,
    queries: tl.constexpr,
    num_heads: tl.constexpr,
    tokens: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    packed: tl.constexpr,
    most_parts: tl.constexpr,
    full_rows: tl.constexpr,
    full_tokens: tl.constexpr,
    row_pages: tl.constexpr,
    ring_tokens: tl.constexpr,
    reach: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
    ln_2: tl.constexpr,
    has_own: tl.constexpr,
    has_full: tl.constexpr,
    has_ring: tl.constexpr,
    is_paged: tl.constexpr,
):
    """A tile of queries of one head, over a part of its keys."""
    work = plan_ptr + tl.program_id(0) * FIELDS
    row = tl.load(work + ROW)
    head = tl.load(work + HEAD)
    kv_head = tl.load(work + KV_HEAD)
    part = tl.load(work + PART)
    # Pools, and long chunks, may have more than 2 ** 31 elements.
    slot = tl.load(work + SLOT).to(tl.int64)
    first_row = tl.load(work + TILE) * block_q
    q_row = first_row + tl.arange(0, block_q)
    exists = (q_row < queries) & (tl.load(work + IS_USED) == 1)
    q_index = q_row // packed
    at_q = ((row.to(tl.int64) * queries + first_row) * num_heads + head) * head_dim
    q = load_rows(q_ptr + at_q, num_heads * head_dim, exists, False, block_q, head_dim, width)
    own = kv_head * head_dim
    full = slot * (full_rows * full_tokens * head_dim)
    ring = (slot * batch + row) * (ring_tokens * head_dim)
    pages_ptr += row * row_pages

    values, maximum, total = empty(block_q, width, masked)
    if has_full:
        values, maximum, total = over_full(
            values, maximum, total, q, work, TAIL, True, full_k_ptr + full, full_v_ptr + full, row, pages_ptr, is_paged,
            full_tokens, block_k, head_dim, width, scale, masked,
        )  # fmt: skip
    if has_own:
        for edge in range(3):  # The diagonal, the sinks, the left edge of the window.
            values, maximum, total = over_own(
                values, maximum, total, q, q_index, work, DIAGONAL + 2 * edge, True, k_ptr + own, v_ptr + own, row,
                num_kv_heads * head_dim, tokens, block_k, head_dim, width, scale, masked,
            )  # fmt: skip
    if has_ring:
        values, maximum, total = over_ring(
            values, maximum, total, q, q_index, work, ring_k_ptr + ring, ring_v_ptr + ring, reach, block_k, head_dim,
            width, scale, masked,
        )  # fmt: skip
    if has_own:
        values, maximum, total = over_own(
            values, maximum, total, q, q_index, work, INNER, False, k_ptr + own, v_ptr + own, row,
            num_kv_heads * head_dim, tokens, block_k, head_dim, width, scale, masked,
        )  # fmt: skip
    if has_full:
        values, maximum, total = over_full(
            values, maximum, total, q, work, WHOLE, False, full_k_ptr + full, full_v_ptr + full, row, pages_ptr,
            is_paged, full_tokens, block_k, head_dim, width, scale, masked,
        )  # fmt: skip
    values, log_sum = finish(values, maximum, total, ln_2)
    first = ((row.to(tl.int64) * num_heads + head) * most_parts + part) * queries
    if most_parts == 1:
        store_rows(out_ptr + at_q, num_heads * head_dim, values, exists, block_q, head_dim, width)
    else:
        store_rows(out_ptr + (first + first_row) * head_dim, head_dim, values, exists, block_q, head_dim, width)
    tl.store(log_ptr + first + q_row, log_sum, mask=exists)
