"""Attention of one new token a row: the kernel of `pallas_kernels.triton.decode`, in Triton's own language."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from pallas_kernels import splits
from pallas_kernels.blocks import LOG2_E, MASKED
from pallas_kernels.tiles import DecodeTiles
from pallas_kernels.types import Heads, Pools

# A matrix product has at least so many rows and columns.
MIN_ROWS = 16


def split_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    tiles: DecodeTiles,
    capability: int,
) -> Float[Array, "B N H"]:
    """Attention of one token a row over pools that hold it already."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    capacities = splits.capacities_of(pools)
    count = splits.num_splits(capacities, batch * num_kv_heads, tiles)
    # A pool without a slot is never read; the queries stand for it, since an argument cannot be empty.
    present = (pool if pool.shape[0] else q for pool in pools)
    parts = batch, num_kv_heads, count, group
    values, log_total = jax_triton.triton_call(
        q,
        *present,
        heads.is_retrieval.astype(jnp.int32),
        heads.slot,
        lengths,
        kernel=decode_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        grid=(count, num_kv_heads, batch),
        name="decode_kernel",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        compute_capability=capability,
        **sizes(group, head_dim, batch, num_kv_heads, capacities, count, tiles),
    )
    return splits.merge(values, log_total, capacities, heads, lengths, tiles).reshape(q.shape).astype(q.dtype)


def sizes(
    group: int,
    head_dim: int,
    batch: int,
    num_kv_heads: int,
    capacities: tuple[int, int],
    count: int,
    tiles: DecodeTiles,
) -> dict[str, int | float]:
    """What the kernel is compiled with."""
    return {
        "batch": batch,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "rows": max(MIN_ROWS, triton.next_power_of_2(group)),
        "width": max(MIN_ROWS, triton.next_power_of_2(head_dim)),
        "full_capacity": capacities[0],
        "ring_capacity": capacities[1],
        "count": count,
        "block_k": tiles.block_k,
        "min_split": tiles.min_split,
        "scale": head_dim**-0.5 * LOG2_E,
        "masked": MASKED,
    }


@triton.jit
@no_type_check  # Triton reads the function itself, which no check of annotations may wrap.
def decode_kernel(
    q_ptr,  # [B, N, H]
    full_k_ptr,  # [Pr, B, S, H]
    full_v_ptr,
    ring_k_ptr,  # [Ps, B, R, H]
    ring_v_ptr,
    is_retrieval_ptr,  # [K]
    slot_ptr,  # [K]
    length_ptr,  # [B]
    out_ptr,  # [B, K, P, G, H]
    log_ptr,  # [B, K, P, G]
    batch: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    full_capacity: tl.constexpr,
    ring_capacity: tl.constexpr,
    count: tl.constexpr,
    block_k: tl.constexpr,
    min_split: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """One part of the keys of one KV head, for its query heads."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    is_retrieval = tl.load(is_retrieval_ptr + kv_head) == 1
    # Pools may have more than 2 ** 31 elements.
    slot = tl.load(slot_ptr + kv_head).to(tl.int64)
    capacity = tl.where(is_retrieval, full_capacity, ring_capacity)
    size = tl.minimum(tl.load(length_ptr + row), capacity)
    per_split = tl.maximum(tl.cdiv(tl.cdiv(size, count), block_k) * block_k, min_split)
    begin = split * per_split
    end = tl.minimum(begin + per_split, size)
    if begin < end:
        if is_retrieval:
            k_ptr = full_k_ptr
            v_ptr = full_v_ptr
        else:
            k_ptr = ring_k_ptr
            v_ptr = ring_v_ptr
        in_group = tl.arange(0, rows)
        column = tl.arange(0, width)
        query = (row * num_kv_heads + kv_head) * group + in_group
        here = (in_group < group)[:, None] & (column < head_dim)[None, :]
        q = tl.load(q_ptr + query[:, None] * head_dim + column[None, :], mask=here, other=0.0)
        first = (slot * batch + row) * capacity
        maximum = tl.full((rows,), masked, tl.float32)
        total = tl.zeros((rows,), tl.float32)
        values = tl.zeros((rows, width), tl.float32)
        for key in range(begin, end, block_k):
            index = key + tl.arange(0, block_k)
            exists = index < end
            at = (first + index)[:, None] * head_dim + column[None, :]
            mask = exists[:, None] & (column < head_dim)[None, :]
            k = tl.load(k_ptr + at, mask=mask, other=0.0)
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
            # "tf32x3": float32 is not rounded to TF32, but split into two such numbers.
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
            scores = tl.where(exists[None, :], scores, masked)
            newest = tl.maximum(maximum, tl.max(scores, axis=1))
            weights = tl.exp2(scores - newest[:, None])
            decay = tl.exp2(maximum - newest)
            values = values * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
            total = total * decay + tl.sum(weights, axis=1)
            maximum = newest
        part = ((row * num_kv_heads + kv_head) * count + split) * group + in_group
        values = values / total[:, None]
        tl.store(out_ptr + part[:, None] * head_dim + column[None, :], values, mask=here)
        tl.store(log_ptr + part, maximum + tl.log2(total), mask=in_group < group)
