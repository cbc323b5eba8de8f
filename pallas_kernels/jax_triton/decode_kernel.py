"""Attention of one new token per row: the kernel of `pallas_kernels.triton.decode`, in Triton's own language."""

from dataclasses import replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from pallas_kernels.jax_triton.launch import launch, of_softmax
from pallas_kernels.jax_triton.packed import GROUPS, MIN_COLUMNS, over_packed
from pallas_kernels.jax_triton.tile import MIN_ROWS, accumulate, empty, finish, load_rows, place, store_rows, width
from pallas_kernels.merge import combine
from pallas_kernels.quantized import KEY_GROUPS, Quantized, any_quantized
from pallas_kernels.schedule import Splits
from pallas_kernels.tiles import DecodeTiles, tiles_for
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window


def tiles_here(head_dim: int, itemsize: int, quantized: bool, page: int | None = None) -> DecodeTiles:
    """Tiles of decode: those of the triton backend, but that four warps spill registers of the largest ones."""
    tiles: DecodeTiles = tiles_for("decode", head_dim, itemsize, quantized=quantized, page=page)
    return replace(tiles, num_warps=max(tiles.num_warps, 8)) if head_dim > 128 else tiles


def decode(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention`."""
    del window  # A ring stores nothing but visible tokens.
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    tiles = tiles_here(head_dim, q.dtype.itemsize, any_quantized(pools.stored), pools.page)
    splits = Splits.of(pools, batch, num_kv_heads, tiles)
    held = lengths if shards is None else shards.held(lengths)
    filled = jnp.stack([splits.filled(False, lengths), splits.filled(True, held)])
    ends = splits.ends(lengths, held)
    # A pool without a slot is never read; the queries take its place, since an argument cannot be empty.
    present = [pool if pool.shape[0] else q for pool in pools.stored]
    stored = [pool.words if isinstance(pool, Quantized) else pool for pool in present]
    grids = [pool.grid if isinstance(pool, Quantized) else q for pool in present]
    pages = ends if pools.pages is None else pools.pages
    table = heads.is_retrieval.astype(jnp.int32), heads.slot, filled, splits.size(filled), ends, pages
    parts = batch, num_kv_heads, splits.parts, group
    full = pools.full_k.shape if pools.full_k.shape[0] else (0, 0, 0)
    sizes = sizes_of(group, head_dim, batch, num_kv_heads, splits, full) | {
        "full_bits": bits_of(present[0]),
        "ring_bits": bits_of(present[2]),
        "full_columns": max(MIN_COLUMNS, stored[0].shape[-1]),
        "ring_columns": max(MIN_COLUMNS, stored[2].shape[-1]),
        "row_pages": pages.shape[1],
        "is_paged": pools.pages is not None,
    }
    values, log_sums = launch(
        decode_kernel,
        (q, *stored, *grids, *table),
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*parts, head_dim), parts)],
        grid=(splits.programs, num_kv_heads),
        warps=tiles.num_warps,
        stages=tiles.num_stages,
        sizes=sizes,
    )
    merged = combine(Partial(values, log_sums), table[0], ends, (batch, 1, num_heads), jnp.float32)
    return Partial(*(x[:, 0] for x in merged))


def bits_of(pool: Any) -> int:
    """Bits of a quantized pool's numbers; 0: it is not quantized."""
    return pool.bits if isinstance(pool, Quantized) else 0


def sizes_of(
    group: int, head_dim: int, batch: int, num_kv_heads: int, splits: Splits, full: tuple[int, ...]
) -> dict[str, int | float]:
    """The constants that the kernel is compiled with; `full` is the shape of the retrieval heads' pool."""
    return {
        "batch": batch,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "rows": max(MIN_ROWS, triton.next_power_of_2(group)),
        "width": width(head_dim),
        "part_width": width(head_dim // KEY_GROUPS),
        "full_rows": full[1],
        "full_tokens": full[2],
        "ring_tokens": splits.capacities[1],
        "programs": splits.programs,
        "parts": splits.parts,
        "block_k": splits.block_k,
        **of_softmax(head_dim),
    }


@triton.jit
@no_type_check
def over_keys(
    q,  # [G, H]
    k_ptr,  # of the slot
    v_ptr,
    row,  # of the batch
    begin,
    end,
    pages_ptr,  # [n], of the row
    is_paged: tl.constexpr,
    tokens: tl.constexpr,  # of a slot of a row, or of a page
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """Running softmax over the keys from `begin` to `end`."""
    values, maximum, _ = empty(rows, width, masked)
    # Each warp has other keys: sums over warps take exchanges.
    total = tl.zeros((rows, block_k), tl.float32)
    whole = begin + tl.maximum(end - begin, 0) // block_k * block_k
    if whole < end:  # The last tile is not whole.
        exists = whole + tl.arange(0, block_k) < end
        at = place(row, whole, pages_ptr, is_paged, tokens) * head_dim
        k = load_rows(k_ptr + at, head_dim, exists, False, block_k, head_dim, width)
        v = load_rows(v_ptr + at, head_dim, exists, False, block_k, head_dim, width)
        keep = exists[None, :]
        values, maximum, total = accumulate(values, maximum, total, q, k, v, keep, True, scale, masked)
    for first in range(begin, whole, block_k):
        exists = first + tl.arange(0, block_k) < end
        at = place(row, first, pages_ptr, is_paged, tokens) * head_dim
        k = load_rows(k_ptr + at, head_dim, exists, True, block_k, head_dim, width)
        v = load_rows(v_ptr + at, head_dim, exists, True, block_k, head_dim, width)
        values, maximum, total = accumulate(values, maximum, total, q, k, v, exists[None, :], False, scale, masked)
    return values, maximum, tl.sum(total, axis=1)


@triton.jit
@no_type_check
def attend(
    q_ptr,  # [G, H]
    k_ptr,  # of the slot
    v_ptr,
    k_grid_ptr,
    v_grid_ptr,
    row,  # of the batch
    begin,
    end,
    pages_ptr,  # [n], of the row
    out_ptr,  # [G, H], of the part
    log_ptr,  # [G]
    bits: tl.constexpr,
    is_paged: tl.constexpr,
    tokens: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    part_width: tl.constexpr,
    columns: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
    ln_2: tl.constexpr,
):
    """The keys from `begin` to `end`, of which there is at least one."""
    in_group = tl.arange(0, rows) < group
    if bits == 0:
        q = load_rows(q_ptr, head_dim, in_group, False, rows, head_dim, width)
        values, maximum, total = over_keys(
            q, k_ptr, v_ptr, row, begin, end, pages_ptr, is_paged, tokens, head_dim, rows, width, block_k, scale,
            masked,
        )  # fmt: skip
        values, log_sum = finish(values, maximum, total, ln_2)
        store_rows(out_ptr, head_dim, values, in_group, rows, head_dim, width)
    else:
        parts, maximum, total = over_packed(
            q_ptr, k_ptr, v_ptr, k_grid_ptr, v_grid_ptr, row, begin, end, pages_ptr, is_paged, tokens, group, bits,
            rows, head_dim, block_k, columns, part_width, scale, masked,
        )  # fmt: skip
        size: tl.constexpr = head_dim * bits // 16
        for part in tl.static_range(16 // bits):
            values, log_sum = finish(parts[part], maximum, total, ln_2)
            store_rows(out_ptr + part * size, head_dim, values, in_group, rows, size, columns)
    tl.store(log_ptr + tl.arange(0, rows), log_sum, mask=in_group)


@triton.jit
@no_type_check
def decode_kernel(
    q_ptr,  # [B, N, H]
    full_k_ptr,  # [Pr, B, S, H], or pages; words [..., W] if they are quantized
    full_v_ptr,
    ring_k_ptr,  # [Ps, B, R, H]
    ring_v_ptr,
    full_k_grid_ptr,  # [Pr, B, S, C]
    full_v_grid_ptr,  # [Pr, B, S, 1]
    ring_k_grid_ptr,
    ring_v_grid_ptr,
    is_retrieval_ptr,  # [K]
    slot_ptr,  # [K]
    filled_ptr,  # [2, B], tokens in the slots of streaming and of retrieval heads
    size_ptr,  # [2, B], keys of a part
    ends_ptr,  # [2, B], see `Splits.ends`
    pages_ptr,  # [B, n]
    out_ptr,  # [B, K, P, G, H]
    log_ptr,  # [B, K, P, G]
    batch: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    part_width: tl.constexpr,
    full_rows: tl.constexpr,
    full_tokens: tl.constexpr,
    ring_tokens: tl.constexpr,
    programs: tl.constexpr,
    parts: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
    ln_2: tl.constexpr,
    full_bits: tl.constexpr,
    ring_bits: tl.constexpr,
    full_columns: tl.constexpr,
    ring_columns: tl.constexpr,
    row_pages: tl.constexpr,
    is_paged: tl.constexpr,
):
    """Some parts of the keys of one KV head, for its query heads."""
    program, kv_head = tl.program_id(0), tl.program_id(1)
    kind = tl.load(is_retrieval_ptr + kv_head)
    # Pools may have more than 2 ** 31 elements.
    slot = tl.load(slot_ptr + kv_head).to(tl.int64)
    full = slot * (full_rows * full_tokens)
    ring = slot * (batch * ring_tokens)
    full_size: tl.constexpr = head_dim * full_bits // 16 if full_bits else head_dim
    ring_size: tl.constexpr = head_dim * ring_bits // 16 if ring_bits else head_dim
    for number in range(program, tl.load(ends_ptr + kind * batch + batch - 1), programs):
        row = 0
        before = 0
        for earlier in range(batch - 1):
            end = tl.load(ends_ptr + kind * batch + earlier)
            row = tl.where(end <= number, earlier + 1, row)
            before = tl.where(end <= number, end, before)
        part = number - before
        size = tl.load(size_ptr + kind * batch + row)
        begin = part * size
        end = tl.minimum(begin + size, tl.load(filled_ptr + kind * batch + row))
        query = (row * num_kv_heads + kv_head) * group * head_dim
        to = ((row * num_kv_heads + kv_head) * parts + part) * group
        if kind == 1:
            attend(
                q_ptr + query, full_k_ptr + full * full_size, full_v_ptr + full * full_size,
                full_k_grid_ptr + full * GROUPS, full_v_grid_ptr + full, row, begin, end, pages_ptr + row * row_pages,
                out_ptr + to * head_dim, log_ptr + to, full_bits, is_paged, full_tokens, group, head_dim, rows, width,
                part_width, full_columns, block_k, scale, masked, ln_2,
            )  # fmt: skip
        else:
            attend(
                q_ptr + query, ring_k_ptr + ring * ring_size, ring_v_ptr + ring * ring_size,
                ring_k_grid_ptr + ring * GROUPS, ring_v_grid_ptr + ring, row, begin, end, pages_ptr,
                out_ptr + to * head_dim, log_ptr + to, ring_bits, False, ring_tokens, group, head_dim, rows, width,
                part_width, ring_columns, block_k, scale, masked, ln_2,
            )  # fmt: skip
