"""Flash attention over a chunk and the cache before it on Hopper: retrieval and streaming heads in one launch.

A program computes one tile of queries of one head with three warpgroups: a producer fetches tiles of keys and values by
TMA, two consumers multiply half of the queries each. All of them look up the head's type, which decides the keys.
"""

from functools import partial, update_wrapper
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic.compat import Ref, Warpgroup, interpreter
from pallas_kernels.mosaic.pipeline import ROWS, Copy, Mask, Pipeline, empty_state, stored_tiles, tile_memory, write
from pallas_kernels.schedule import Sizes, div, query_tile, steps_of
from pallas_kernels.tiles import PipelineTiles, tiles_for
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window

CONSUMERS = 2  # warpgroups that multiply
BLOCK_Q = CONSUMERS * ROWS  # queries of a program
# Registers of a consumer's thread and of a producer's: they share the 65536 of a multiprocessor.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


class Arrays(NamedTuple):
    """The kernel's inputs."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    full_k: Float[Array, "Pr B S H"]
    full_v: Float[Array, "Pr B S H"]
    ring_k: Float[Array, "Ps B R H"]
    ring_v: Float[Array, "Ps B R H"]
    order: Int32[Array, "K"]  # KV heads, retrieval heads first
    slot: Int32[Array, "K"]
    num_retrieval: Int32[Array, "1"]
    start: Int32[Array, "B"]
    lengths: Int32[Array, "B"]


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
    """See `pallas_kernels.prefill_attention`."""
    del shards  # Refused.
    tokens = q.shape[1]
    # Whole tiles: TMA writes no part of one. The usual chunks are whole tiles, and are not copied here.
    pad = ((0, 0), (0, -tokens % BLOCK_Q), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad) if tokens % BLOCK_Q else x for x in (q, k, v))
    batch, length, num_heads, head_dim = q.shape
    tiles: PipelineTiles = tiles_for("mosaic_flash", head_dim, q.dtype.itemsize)
    stored, block_k = stored_tiles(pools, tiles.block_k)
    order, count = heads.by_type()
    arrays = Arrays(q, k, v, *stored, order, heads.slot, count[None], start, lengths)
    interpret = interpreter()
    kernel = partial(flash_kernel, window=window, block_k=block_k, interpreted=bool(interpret))
    out, log_sum = plgpu.kernel(
        update_wrapper(kernel, flash_kernel),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        ),
        scratch_types=[
            tile_memory((CONSUMERS, ROWS, head_dim), q.dtype),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            *Pipeline.scratch(tiles.num_stages, block_k, head_dim, q.dtype, consumers=CONSUMERS),
        ],
        grid=(num_heads * (length // BLOCK_Q), batch),
        grid_names=("tile", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*arrays)
    return Partial(out[:, :tokens], log_sum.swapaxes(1, 2)[:, :tokens])


def flash_kernel(*refs, window: Window, block_k: int, interpreted: bool = False) -> None:
    """One tile of queries of one head."""
    inputs = len(Arrays._fields)
    arrays, (out_ref, log_ref, qo_smem, log_smem, q_full, *stages) = Arrays(*refs[:inputs]), refs[inputs:]
    pipeline, registers = Pipeline(*stages), Warpgroup(interpreted)
    _, length, num_heads, head_dim = arrays.q.shape
    group = num_heads // arrays.k.shape[2]
    row, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
    program, num_retrieval = lax.axis_index("tile"), arrays.num_retrieval[0]
    head, is_retrieval, number = query_tile(program, arrays.order, num_retrieval, num_heads, group, length // BLOCK_Q)
    kv_head, first = div(head, group), number * BLOCK_Q
    slot, start = arrays.slot[kv_head], arrays.start[row]
    steps = steps_of(first, start, is_retrieval, Sizes(length, BLOCK_Q, block_k, window))
    # A tile of padding visits no key, and is written as zeros.
    is_live = first < arrays.lengths[row]
    unmasked, count = (jnp.where(is_live, x, jnp.int32(0)) for x in (steps.unmasked, steps.total))

    @pl.when(warpgroup == CONSUMERS)
    def fetch() -> None:
        registers.limit(PRODUCER_REGISTERS, "decrease")

        def load(step: Array, copy: Copy) -> None:
            is_full, is_ring, number = steps.source(step)
            keys = pl.ds(number * block_k, block_k)

            @pl.when(is_full)
            def from_full() -> None:
                copy(arrays.full_k.at[slot, row, keys], arrays.full_v.at[slot, row, keys])

            @pl.when(is_ring)
            def from_ring() -> None:
                copy(arrays.ring_k.at[slot, row, keys], arrays.ring_v.at[slot, row, keys])

            @pl.when(~is_full & ~is_ring)
            def own() -> None:
                copy(arrays.k.at[row, keys, kv_head], arrays.v.at[row, keys, kv_head])

        pipeline.fetch(count, load)

    @pl.when(warpgroup < CONSUMERS)
    def compute() -> None:
        registers.limit(CONSUMER_REGISTERS, "increase")
        own_first = first + warpgroup * ROWS
        rows = pl.ds(own_first, ROWS)
        qo: Ref = qo_smem.at[warpgroup]
        own_q: Ref = arrays.q.at[row, rows, head]
        plgpu.copy_gmem_to_smem(own_q, qo, q_full.at[warpgroup])
        plgpu.barrier_wait(q_full.at[warpgroup])

        def keep(step: Array) -> Array:
            """Which keys of a step's tile each query sees."""
            is_full, is_ring, number = steps.source(step)
            q_pos = registers.iota((ROWS, block_k), 0) + (start + own_first)
            index = registers.iota((ROWS, block_k), 1) + number * block_k
            in_order = index + jnp.where(is_full, jnp.int32(0), start)
            k_pos = jnp.where(is_ring, window.position_at(index, start), in_order)
            end = jnp.where(is_full, start, jnp.where(is_ring, jnp.int32(window.size), jnp.int32(length)))
            seen = (k_pos >= 0) & (index < end) & (k_pos <= q_pos)
            return seen & (is_retrieval | (k_pos < window.sink) | (k_pos > q_pos - window.recent))

        def tokens(step: Array) -> Array:
            """Rows of a step's tile that are tokens: pools fill from their first index, a chunk's padding is finite."""
            is_full, is_ring, number = steps.source(step)
            return jnp.where(is_full | is_ring, start - number * block_k, jnp.int32(block_k))

        log: Ref = log_smem.at[warpgroup]
        state = pipeline.use(registers, qo, jnp.int32(0), unmasked, empty_state(registers, head_dim))
        mask = Mask(keep, tokens, warpgroup == 0)
        write(registers, pipeline.use(registers, qo, unmasked, count, state, mask), qo, log, is_tiled=True)
        plgpu.copy_smem_to_gmem(qo, out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(log, log_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)
