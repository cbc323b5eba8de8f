"""Attention of one new token per row on Hopper: the keys of a head are split over programs, whose results are merged.

Retrieval and streaming heads share the launch. In a program, a producer warpgroup fetches tiles of keys and values by
TMA, and a consumer multiplies them with the query heads of a group, in one tile. Which parts of which rows a program
attends to follows from the rows' lengths, which are read on the device (`Splits`). A second launch merges the parts.
"""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic.compat import Ref, Warpgroup, combine, interpreter
from pallas_kernels.mosaic.pipeline import ROWS, Copy, Mask, Masks, Pipeline, Span, stored_tiles, tile_memory, write
from pallas_kernels.pages import in_pool
from pallas_kernels.schedule import Splits, cdiv, row_of
from pallas_kernels.tiles import DecodeTiles, tiles_for
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window

CONSUMER, PRODUCER = 0, 1  # warpgroups


class Arrays(NamedTuple):
    """The kernel's inputs."""

    q: Float[Array, "B K ROWS H"]
    full_k: Float[Array, "Pr B S H"]
    full_v: Float[Array, "Pr B S H"]
    ring_k: Float[Array, "Ps B R H"]
    ring_v: Float[Array, "Ps B R H"]
    is_retrieval: Int32[Array, "K"]
    slot: Int32[Array, "K"]
    lengths: Int32[Array, "B"]
    ends: Int32[Array, "2B"]  # `Splits.ends`, of streaming heads, then of retrieval heads
    pages: Int32[Array, "B n"] | None = None  # of the full pool, if it is paged

    @property
    def given(self) -> list[Array]:
        """Those that there are."""
        return [array for array in self if array is not None]


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
    del window, shards  # A ring stores nothing but visible tokens; shards are refused.
    batch, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    group = num_heads // num_kv_heads
    tiles: DecodeTiles = tiles_for("mosaic_decode", head_dim, q.dtype.itemsize)
    stored, block_k = stored_tiles(pools, tiles.block_k)
    splits = Splits.of(pools, batch, num_kv_heads, tiles)._replace(block_k=block_k)
    is_retrieval, ends = heads.is_retrieval.astype(jnp.int32), splits.ends(lengths)
    grouped = q.reshape(batch, num_kv_heads, group, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    arrays = Arrays(grouped, *stored, is_retrieval, heads.slot, lengths, ends.reshape(-1), pools.pages)
    parts = batch, num_kv_heads, splits.parts
    interpret, is_paged = interpreter(), pools.pages is not None
    kernel = partial(decode_kernel, splits=splits, is_paged=is_paged, interpreted=bool(interpret))
    values, log_sums = plgpu.kernel(
        update_wrapper(kernel, decode_kernel),
        out_type=(
            jax.ShapeDtypeStruct((*parts, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*parts, ROWS), jnp.float32),
        ),
        scratch_types=[
            tile_memory((ROWS, head_dim), q.dtype),
            plgpu.SMEM((ROWS, head_dim), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            *Pipeline.scratch(tiles.num_stages, block_k, head_dim, q.dtype, consumers=1),
        ],
        grid=(splits.programs, num_kv_heads),
        grid_names=("program", "kv_head"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*arrays.given)
    merged = combine(Partial(values, log_sums), is_retrieval, ends, (batch, 1, num_heads), q.dtype)
    return Partial(*(x[:, 0] for x in merged))


def decode_kernel(*refs, splits: Splits, is_paged: bool = False, interpreted: bool = False) -> None:
    """Some parts of the keys of a KV head, for its queries: `out_ref [B, K, P, G, H]`, `log_ref [B, K, P, ROWS]`."""
    inputs = len(Arrays._fields) - (not is_paged)
    arrays, (out_ref, log_ref, *own) = Arrays(*refs[:inputs]), refs[inputs:]
    q_smem, out_smem, log_smem, q_full, *stages = own
    pipeline, registers = Pipeline(*stages), Warpgroup(interpreted)
    block_k = splits.block_k
    program, kv_head = (lax.axis_index(name) for name in ("program", "kv_head"))
    warpgroup = lax.axis_index("warpgroup")
    slot, kind, batch = arrays.slot[kv_head], arrays.is_retrieval[kv_head], arrays.q.shape[0]
    is_retrieval = kind == 1

    def ends(row: Array | int) -> Array:
        return arrays.ends[kind * batch + row]

    def each_part(run: Callable[[Array, Array, Array, Array], None]) -> None:
        """Of the program's parts in turn: row, number, first key and number of keys."""

        def one_part(turn: Array, _: None) -> None:
            row, part = row_of(program + turn * splits.programs, ends, batch)
            filled = splits.filled(is_retrieval, arrays.lengths[row])
            begin = part * splits.size(filled)
            run(row, part, begin, jnp.minimum(splits.size(filled), filled - begin))

        count = cdiv(jnp.maximum(ends(batch - 1) - program, 0), splits.programs)
        lax.fori_loop(jnp.int32(0), count, one_part, None)

    def steps_of(num_keys: Array) -> tuple[Span, Callable[[Array], Array]]:
        """The steps of a part, and their tiles: the last one, which may be partly filled, comes first."""
        zero, count = jnp.int32(0), cdiv(num_keys, block_k)
        return Span(zero, zero, jnp.int32(1), count), lambda step: count - 1 - step

    def fetch(row: Array, _: Array, begin: Array, num_keys: Array) -> None:
        span, tile_of = steps_of(num_keys)

        def load(step: Array, copy: Copy) -> None:
            key = begin + tile_of(step) * block_k

            @pl.when(is_retrieval)
            def from_full() -> None:
                index, first = in_pool(arrays.pages, arrays.full_k.shape[2], row, key)
                at = slot, index, pl.ds(first, block_k)
                copy(arrays.full_k.at[*at], arrays.full_v.at[*at])

            @pl.when(~is_retrieval)
            def from_ring() -> None:
                keys = pl.ds(key, block_k)
                # A ring fills from its first index and then stays full: every index below its size is visible.
                copy(arrays.ring_k.at[slot, row, keys], arrays.ring_v.at[slot, row, keys])

        pipeline.fetch(span, span.begin, span.end, load)
        pipeline.drain(span.end)

    def compute(row: Array, part: Array, _: Array, num_keys: Array) -> None:
        own_q: Ref = arrays.q.at[row, kv_head]
        plgpu.copy_gmem_to_smem(own_q, q_smem, q_full)
        plgpu.barrier_wait(q_full)
        span, tile_of = steps_of(num_keys)

        def tokens(step: Array) -> Array:
            return num_keys - tile_of(step) * block_k

        def keep(step: Array) -> Array:
            return registers.iota((ROWS, block_k), 1) < tokens(step)

        state = pipeline.attend(registers, q_smem, span, Masks(Mask(keep, tokens)))
        # Not tiled: only the rows of the group are copied, and a tile has eight.
        write(registers, state, out_smem, log_smem, is_tiled=False)
        rows = pl.ds(0, out_ref.shape[3])
        plgpu.copy_smem_to_gmem(out_smem.at[rows], out_ref.at[row, kv_head, part])
        plgpu.copy_smem_to_gmem(log_smem, log_ref.at[row, kv_head, part])
        plgpu.wait_smem_to_gmem(0)

    pl.when(warpgroup == PRODUCER)(lambda: each_part(fetch))
    pl.when(warpgroup == CONSUMER)(lambda: each_part(compute))
