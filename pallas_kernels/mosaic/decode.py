"""Attention of one new token a row on Hopper: the keys of a head are split over programs, whose results are merged.

Retrieval and streaming heads share the launch. In a program, one warpgroup fetches tiles of keys and values by TMA, and
another multiplies them with the query heads of a group, in one tile. Programs beyond a row's length exit at once.
"""

from functools import partial, update_wrapper
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import splits
from pallas_kernels.blocks import cdiv, div
from pallas_kernels.gpus import DecodeTiles
from pallas_kernels.mosaic.dialect import Dialect, Ref
from pallas_kernels.mosaic.pipeline import ROWS, Copy, Pipeline, empty, finish, tile_memory
from pallas_kernels.quantized import plain
from pallas_kernels.types import Heads, Pools

COMPUTE, FETCH = 0, 1  # warpgroups


class Arrays(NamedTuple):
    """What the kernel reads."""

    q: Float[Array, "B K ROWS H"]
    full_k: Float[Array, "Pr B S H"]
    full_v: Float[Array, "Pr B S H"]
    ring_k: Float[Array, "Ps B R H"]
    ring_v: Float[Array, "Ps B R H"]
    is_retrieval: Int32[Array, "K"]
    slot: Int32[Array, "K"]
    lengths: Int32[Array, "B"]


def split_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    tiles: DecodeTiles,
    interpret: Any = None,
) -> Float[Array, "B N H"]:
    """Attention of one token a row over pools that hold it already."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    capacities = splits.capacities_of(pools)
    count = splits.num_splits(capacities, batch * num_kv_heads, tiles)
    grouped = q.reshape(batch, num_kv_heads, group, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    # A kernel has every argument; one tile stands for a pool without a slot, and is never read.
    tile = jnp.zeros((1, batch, tiles.block_k, head_dim), q.dtype)
    full_k, full_v, ring_k, ring_v = (pool if pool.shape[0] else tile for pool in plain(pools.stored))
    arrays = Arrays(grouped, full_k, full_v, ring_k, ring_v, heads.is_retrieval.astype(jnp.int32), heads.slot, lengths)
    parts = batch, num_kv_heads, count
    values, log_total = plgpu.kernel(
        update_wrapper(
            partial(decode_kernel, tiles=tiles, capacities=capacities, interpreted=bool(interpret)), decode_kernel
        ),
        out_type=(
            jax.ShapeDtypeStruct((*parts, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*parts, ROWS), jnp.float32),
        ),
        scratch_types=[
            tile_memory((ROWS, head_dim), q.dtype),
            plgpu.SMEM((ROWS, head_dim), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            *Pipeline.scratch(tiles.num_stages, tiles.block_k, head_dim, q.dtype, consumers=1),
        ],
        grid=(count, num_kv_heads, batch),
        grid_names=("split", "kv_head", "row"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*arrays)
    merged, _ = splits.merge(values, log_total[..., :group], capacities, heads, lengths, tiles)
    return merged.reshape(q.shape).astype(q.dtype)


def decode_kernel(*refs, tiles: DecodeTiles, capacities: tuple[int, int], interpreted: bool = False) -> None:
    """One part of the keys of a KV head, for its query heads: `out_ref [B, K, P, G, H]`, `log_ref [B, K, P, ROWS]`."""
    inputs = len(Arrays._fields)
    arrays, (out_ref, log_ref, *own) = Arrays(*refs[:inputs]), refs[inputs:]
    q_smem, out_smem, log_smem, q_here, *buffers = own
    pipeline, speak = Pipeline(*buffers), Dialect(interpreted)
    block_k, head_dim = tiles.block_k, arrays.q.shape[3]
    split, kv_head, row = (lax.axis_index(name) for name in ("split", "kv_head", "row"))
    warpgroup = lax.axis_index("warpgroup")
    slot, is_retrieval = arrays.slot[kv_head], arrays.is_retrieval[kv_head] == 1
    size = splits.filled(capacities, is_retrieval, arrays.lengths[row])
    per_split = splits.split_size(size, out_ref.shape[2], tiles)
    begin = split * per_split
    keys_here = jnp.minimum(begin + per_split, size) - begin

    @pl.when((keys_here > 0) & (warpgroup == FETCH))
    def fetch() -> None:
        def one(step: Array, copy: Copy) -> None:
            keys = pl.ds(begin + step * block_k, block_k)

            @pl.when(is_retrieval)
            def from_pool() -> None:
                copy(arrays.full_k.at[slot, row, keys], arrays.full_v.at[slot, row, keys])

            @pl.when(~is_retrieval)
            def from_ring() -> None:
                # A ring fills from its first index and then stays full: every index below its size is visible.
                copy(arrays.ring_k.at[slot, row, keys], arrays.ring_v.at[slot, row, keys])

        pipeline.fetch(cdiv(keys_here, block_k), one)

    @pl.when((keys_here > 0) & (warpgroup == COMPUTE))
    def compute() -> None:
        own_q: Ref = arrays.q.at[row, kv_head]
        plgpu.copy_gmem_to_smem(own_q, q_smem, q_here)
        plgpu.barrier_wait(q_here)

        def kept(step: Array) -> Array:
            """Which keys of the last tile exist."""
            return speak.iota((ROWS, block_k), 1) + step * block_k < keys_here

        whole = div(keys_here, block_k)
        state = pipeline.use(speak, q_smem, jnp.int32(0), whole, empty(speak, head_dim))
        values, log_total = finish(pipeline.use(speak, q_smem, whole, cdiv(keys_here, block_k), state, kept))
        out_smem[...] = values
        log_smem[...] = log_total
        plgpu.commit_smem()
        rows = pl.ds(0, out_ref.shape[3])
        plgpu.copy_smem_to_gmem(out_smem.at[rows], out_ref.at[row, kv_head, split])
        plgpu.copy_smem_to_gmem(log_smem, log_ref.at[row, kv_head, split])
        plgpu.wait_smem_to_gmem(0)
