"""Attention of one new token per row: the kernel of `pallas_kernels.triton.decode`, in Triton's own language."""

import inspect
from dataclasses import replace
from typing import no_type_check

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import LN_2, LOG2_E, MASKED, merge_splits
from pallas_kernels.schedule import Splits
from pallas_kernels.tiles import DecodeTiles, tiles_for
from pallas_kernels.types import Heads, Partial, Pools

# Least rows and columns of a matrix product.
MIN_ROWS = 16
# jax-triton 0.4 renamed out_shape.
OUT_TYPE = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"

# jax 0.12 calls rules of dead-code elimination with the live inputs too, which jax-triton 0.4.1's rule does not accept.
# Without that rule, jax uses its default.
if jax.__version_info__ >= (0, 12):
    for primitive, rule in list(partial_eval.dce_rules.items()):
        if primitive.name == "triton_kernel_call" and len(inspect.signature(rule).parameters) == 2:
            del partial_eval.dce_rules[primitive]


def tiles_here(head_dim: int, itemsize: int) -> DecodeTiles:
    """Tiles of decode: those of the triton backend, but that four warps spill registers of the largest ones."""
    tiles: DecodeTiles = tiles_for("decode", head_dim, itemsize)
    return replace(tiles, num_warps=max(tiles.num_warps, 8)) if head_dim > 128 else tiles


def decode(
    q: Float[Array, "B N H"], pools: Pools, heads: Heads, *, lengths: Int32[Array, "B"], capability: int
) -> Partial:
    """See `pallas_kernels.decode_attention`."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    tiles = tiles_here(head_dim, q.dtype.itemsize)
    splits = Splits.of(pools, batch, num_kv_heads, tiles)
    is_retrieval, ends = heads.is_retrieval.astype(jnp.int32), splits.ends(lengths)
    # A pool without a slot is never read; the queries take its place, since an argument cannot be empty.
    present = (pool if pool.shape[0] else q for pool in pools.stored)
    parts = batch, num_kv_heads, splits.parts, group
    values, log_sums = jax_triton.triton_call(
        q,
        *present,
        is_retrieval,
        heads.slot,
        lengths,
        ends,
        kernel=decode_kernel,
        **{OUT_TYPE: [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*parts, head_dim), parts)]},
        grid=(splits.programs, num_kv_heads, 1),
        name="decode_kernel",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        compute_capability=capability,
        **sizes(group, head_dim, batch, num_kv_heads, splits),
    )
    merged = merge_splits(Partial(values, log_sums), splits.used(ends, heads)[..., None], axis=2)
    return Partial(merged.out.reshape(q.shape), merged.log_sum.reshape(q.shape[:2]))


def sizes(group: int, head_dim: int, batch: int, num_kv_heads: int, splits: Splits) -> dict[str, int | float]:
    """The constants that the kernel is compiled with."""
    return {
        "batch": batch,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "rows": max(MIN_ROWS, triton.next_power_of_2(group)),
        "width": max(MIN_ROWS, triton.next_power_of_2(head_dim)),
        "full_capacity": splits.capacities[0],
        "ring_capacity": splits.capacities[1],
        "programs": splits.programs,
        "parts": splits.parts,
        "block_k": splits.block_k,
        "min_split": splits.min_split,
        "scale": head_dim**-0.5 * LOG2_E,
        "masked": MASKED,
        "ln_2": LN_2,
    }


@triton.jit
@no_type_check  # Triton reads the functions themselves, which no check of annotations may wrap.
def load_rows(
    ptr,  # [rows of the pool, H]
    row,  # [M]
    exists,  # [M]
    head_dim: tl.constexpr,
    width: tl.constexpr,
):
    """Keys or values of some tokens."""
    column = tl.arange(0, width)
    mask = exists[:, None] & (column < head_dim)[None, :]
    return tl.load(ptr + row[:, None] * head_dim + column[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def over_keys(
    q,  # [G, H]
    k_ptr,  # of the pool
    v_ptr,
    first,  # row of the slot's first token in the pool
    begin,
    end,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    block_k: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
):
    """Running softmax over the keys from `begin` to `end`: the weighted values, the maximum and the weights' sum."""
    maximum = tl.full((rows,), masked, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    values = tl.zeros((rows, width), tl.float32)
    for key in range(begin, end, block_k):
        index = key + tl.arange(0, block_k)
        exists = index < end
        at = first + index
        k = load_rows(k_ptr, at, exists, head_dim, width)
        v = load_rows(v_ptr, at, exists, head_dim, width)
        # "tf32x3": float32 is not rounded to TF32, but split into two such numbers.
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        scores = tl.where(exists[None, :], scores, masked)
        newest = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - newest[:, None])
        decay = tl.exp2(maximum - newest)
        values = values * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
        total = total * decay + tl.sum(weights, axis=1)
        maximum = newest
    return values, maximum, total


@triton.jit
@no_type_check
def decode_kernel(
    q_ptr,  # [B, N, H]
    full_k_ptr,  # [Pr, B, S, H]
    full_v_ptr,
    ring_k_ptr,  # [Ps, B, R, H]
    ring_v_ptr,
    is_retrieval_ptr,  # [K]
    slot_ptr,  # [K]
    length_ptr,  # [B]
    ends_ptr,  # [2, B], see `Splits.ends`
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
    programs: tl.constexpr,
    parts: tl.constexpr,
    block_k: tl.constexpr,
    min_split: tl.constexpr,
    scale: tl.constexpr,
    masked: tl.constexpr,
    ln_2: tl.constexpr,
):
    """Some parts of the keys of one KV head, for its query heads."""
    program, kv_head = tl.program_id(0), tl.program_id(1)
    kind = tl.load(is_retrieval_ptr + kv_head)
    is_retrieval = kind == 1
    # Pools may have more than 2 ** 31 elements.
    slot = tl.load(slot_ptr + kv_head).to(tl.int64)
    capacity = tl.where(is_retrieval, full_capacity, ring_capacity)
    in_group = tl.arange(0, rows)
    column = tl.arange(0, width)
    is_real = (in_group < group)[:, None] & (column < head_dim)[None, :]
    for number in range(program, tl.load(ends_ptr + kind * batch + batch - 1), programs):
        row = 0
        before = 0
        for earlier in range(batch - 1):
            end = tl.load(ends_ptr + kind * batch + earlier)
            row = tl.where(end <= number, earlier + 1, row)
            before = tl.where(end <= number, end, before)
        part = number - before
        size = tl.minimum(tl.load(length_ptr + row), capacity)
        per_part = tl.maximum(tl.cdiv(tl.cdiv(size, parts), block_k) * block_k, min_split)
        begin = part * per_part
        end = tl.minimum(begin + per_part, size)
        query = (row * num_kv_heads + kv_head) * group + in_group
        q = tl.load(q_ptr + query[:, None] * head_dim + column[None, :], mask=is_real, other=0.0)
        first = (slot * batch + row) * capacity
        if is_retrieval:
            values, maximum, total = over_keys(
                q, full_k_ptr, full_v_ptr, first, begin, end, head_dim, rows, width, block_k, scale, masked
            )
        else:
            values, maximum, total = over_keys(
                q, ring_k_ptr, ring_v_ptr, first, begin, end, head_dim, rows, width, block_k, scale, masked
            )
        to = ((row * num_kv_heads + kv_head) * parts + part) * group + in_group
        values = values / total[:, None]
        tl.store(out_ptr + to[:, None] * head_dim + column[None, :], values, mask=is_real)
        tl.store(log_ptr + to, (maximum + tl.log2(total)) * ln_2, mask=in_group < group)
