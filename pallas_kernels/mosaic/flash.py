"""Flash attention over a chunk and the cache before it on Hopper: retrieval and streaming heads in one launch.

A program computes one tile of queries of one head with three warpgroups: one fetches tiles of keys and values by TMA,
two multiply half of the queries each. Which keys come follows from the head's type, which all of them look up.
"""

from functools import partial, update_wrapper
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import cdiv, div, rem
from pallas_kernels.gpus import PipelineTiles
from pallas_kernels.mosaic.dialect import Dialect, Ref
from pallas_kernels.mosaic.pipeline import ROWS, Copy, Pipeline, empty, finish, tile_memory
from pallas_kernels.quantized import plain
from pallas_kernels.types import Heads, Pools
from pallas_kernels.window import Window

COMPUTE = 2  # warpgroups that multiply
BLOCK_Q = COMPUTE * ROWS  # queries of a program
# Registers of a thread that multiplies, and of one that fetches: 65536 of a multiprocessor, shared out.
COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40


class Steps(NamedTuple):
    """The tiles of keys that a tile of queries meets, in order: first those that every query sees whole.

    Counts are of tiles; `own` tiles are the chunk's.
    """

    whole_pool: Array  # 0, 1, ... of the retrieval pool
    whole_own: Array  # from `inner` on
    tail: Array  # the pool's last, partly filled
    ring: Array  # 0, 1, ... of the ring
    sinks: Array  # own, 0, 1, ...
    left: Array  # own, from `first_left` up to `inner`
    diagonal: Array  # own, from `inner + whole_own` on
    first_left: Array
    inner: Array

    @property
    def unmasked(self) -> Array:
        """How many steps need no mask."""
        return self.whole_pool + self.whole_own

    @property
    def total(self) -> Array:
        """How many steps there are."""
        return self.unmasked + self.tail + self.ring + self.sinks + self.left + self.diagonal

    def source(self, step: Array) -> tuple[Array, Array, Array]:
        """Whether a step's tile lies in the retrieval pool, whether in the ring (else it is the chunk's), and which."""
        zero = jnp.int32(0)
        s = step
        in_pool = s < self.whole_pool
        tile = jnp.where(in_pool, s, zero)
        s = s - self.whole_pool
        tile = jnp.where(~in_pool & (s < self.whole_own), self.inner + s, tile)
        s = s - self.whole_own
        at_tail = (s >= 0) & (s < self.tail)
        tile = jnp.where(at_tail, self.whole_pool, tile)
        s = s - self.tail
        in_ring = (s >= 0) & (s < self.ring)
        tile = jnp.where(in_ring, s, tile)
        s = s - self.ring
        tile = jnp.where((s >= 0) & (s < self.sinks), s, tile)
        s = s - self.sinks
        tile = jnp.where((s >= 0) & (s < self.left), self.first_left + s, tile)
        s = s - self.left
        tile = jnp.where(s >= 0, self.inner + self.whole_own + s, tile)
        return in_pool | at_tail, in_ring, tile


def steps_of(
    first: Array,
    start: Array,
    is_retrieval: Array,
    *,
    length: int,
    block_k: int,
    window: Window,
) -> Steps:
    """The tiles of keys for the tile of queries that begins at `first` of the chunk."""
    zero = jnp.int32(0)

    def retrieval(x: Array) -> Array:
        return jnp.where(is_retrieval, x, zero)

    def streaming(x: Array) -> Array:
        return jnp.where(is_retrieval, zero, x)

    whole_pool = retrieval(div(start, block_k))
    tail = retrieval(cdiv(start, block_k)) - whole_pool
    # Beyond the window's reach only the sinks of a ring are left to see.
    reach = jnp.where(first + 2 <= window.recent, jnp.int32(window.size), jnp.int32(window.sink))
    ring = streaming(cdiv(jnp.minimum(start, reach), block_k))
    end = cdiv(jnp.minimum(first + BLOCK_Q, length), block_k)
    left = streaming(div(jnp.maximum(first + 1 - window.recent, zero), block_k))
    sinks = jnp.minimum(cdiv(jnp.maximum(window.sink - start, zero), block_k), left)
    inner = jnp.clip(streaming(cdiv(jnp.maximum(first + BLOCK_Q - window.recent, zero), block_k)), left, end)
    diagonal = jnp.clip(div(first + 1, block_k), inner, end)
    return Steps(whole_pool, diagonal - inner, tail, ring, sinks, inner - left, end - diagonal, left, inner)


class Arrays(NamedTuple):
    """What the kernel reads."""

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


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    tiles: PipelineTiles,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """Attention of a chunk whose length is a multiple of the tiles'."""
    batch, length, num_heads, head_dim = q.shape
    order = jnp.argsort(~heads.is_retrieval, stable=True).astype(jnp.int32)
    count = heads.is_retrieval.sum(dtype=jnp.int32, keepdims=True)
    # A kernel has every argument; one tile stands for a pool without a slot, and is never read.
    tile = jnp.zeros((1, batch, tiles.block_k, head_dim), q.dtype)
    full_k, full_v, ring_k, ring_v = (pool if pool.shape[0] else tile for pool in plain(pools.stored))
    arrays = Arrays(q, k, v, full_k, full_v, ring_k, ring_v, order, heads.slot, count, start, lengths)
    settings = {"window": window, "block_k": tiles.block_k}
    return plgpu.kernel(
        update_wrapper(partial(flash_kernel, **settings, interpreted=bool(interpret)), flash_kernel),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            tile_memory((COMPUTE, ROWS, head_dim), q.dtype),
            plgpu.Barrier(num_barriers=COMPUTE),
            *Pipeline.scratch(tiles.num_stages, tiles.block_k, head_dim, q.dtype, consumers=COMPUTE),
        ],
        grid=(num_heads * (length // BLOCK_Q), batch),
        grid_names=("tile", "row"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*arrays)


def flash_kernel(*refs, window: Window, block_k: int, interpreted: bool = False) -> None:
    """One tile of queries of one head."""
    inputs = len(Arrays._fields)
    arrays, (out_ref, qo_smem, q_here, *buffers) = Arrays(*refs[:inputs]), refs[inputs:]
    pipeline, speak = Pipeline(*buffers), Dialect(interpreted)
    _, length, num_heads, head_dim = arrays.q.shape
    group = num_heads // arrays.k.shape[2]
    row, group_of_warps = lax.axis_index("row"), lax.axis_index("warpgroup")
    head, is_retrieval, first = _work(arrays, num_heads, group, length // BLOCK_Q)
    kv_head = div(head, group)
    slot, start = arrays.slot[kv_head], arrays.start[row]
    steps = steps_of(first, start, is_retrieval, length=length, block_k=block_k, window=window)
    # A tile of padding meets no key, and is written as zeros.
    is_live = first < arrays.lengths[row]
    unmasked, count = (jnp.where(is_live, x, jnp.int32(0)) for x in (steps.unmasked, steps.total))

    @pl.when(group_of_warps == COMPUTE)
    def fetch() -> None:
        speak.registers(FETCH_REGISTERS, "decrease")

        def one(step: Array, copy: Copy) -> None:
            in_pool, in_ring, number = steps.source(step)
            keys = pl.ds(number * block_k, block_k)

            @pl.when(in_pool)
            def from_pool() -> None:
                copy(arrays.full_k.at[slot, row, keys], arrays.full_v.at[slot, row, keys])

            @pl.when(in_ring)
            def from_ring() -> None:
                copy(arrays.ring_k.at[slot, row, keys], arrays.ring_v.at[slot, row, keys])

            @pl.when(~in_pool & ~in_ring)
            def own() -> None:
                copy(arrays.k.at[row, keys, kv_head], arrays.v.at[row, keys, kv_head])

        pipeline.fetch(count, one)

    @pl.when(group_of_warps < COMPUTE)
    def compute() -> None:
        speak.registers(COMPUTE_REGISTERS, "increase")
        own_first = first + group_of_warps * ROWS
        rows = pl.ds(own_first, ROWS)
        qo: Ref = qo_smem.at[group_of_warps]
        own_q: Ref = arrays.q.at[row, rows, head]
        plgpu.copy_gmem_to_smem(own_q, qo, q_here.at[group_of_warps])
        plgpu.barrier_wait(q_here.at[group_of_warps])

        def kept(step: Array) -> Array:
            """Which keys of a step's tile each query sees."""
            in_pool, in_ring, number = steps.source(step)
            q_pos = speak.iota((ROWS, block_k), 0) + (start + own_first)
            index = speak.iota((ROWS, block_k), 1) + number * block_k
            in_order = index + jnp.where(in_pool, jnp.int32(0), start)
            k_pos = jnp.where(in_ring, window.position_at(index, start), in_order)
            end = jnp.where(in_pool, start, jnp.where(in_ring, jnp.int32(window.size), jnp.int32(length)))
            seen = (k_pos >= 0) & (index < end) & (k_pos <= q_pos)
            return seen & (is_retrieval | (k_pos < window.sink) | (k_pos > q_pos - window.recent))

        state = pipeline.use(speak, qo, jnp.int32(0), unmasked, empty(speak, head_dim))
        values, _ = finish(pipeline.use(speak, qo, unmasked, count, state, kept))
        qo[...] = values.astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(qo, out_ref.at[row, rows, head])
        plgpu.wait_smem_to_gmem(0)


def _work(arrays: Arrays, num_heads: int, group: int, q_tiles: int) -> tuple[Array, Array, Array]:
    """Query head of this program, whether it retrieves, and its first query: heavy tiles first."""
    number, heavy = lax.axis_index("tile"), arrays.num_retrieval[0] * group
    is_retrieval = number < heavy * q_tiles
    rank = jnp.where(is_retrieval, number, number - heavy * q_tiles)
    heads = jnp.where(is_retrieval, heavy, num_heads - heavy)
    place = rem(rank, heads) + jnp.where(is_retrieval, jnp.int32(0), heavy)
    head = arrays.order[div(place, group)] * group + rem(place, group)
    return head, is_retrieval, (q_tiles - 1 - div(rank, heads)) * BLOCK_Q
