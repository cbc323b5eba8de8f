"""Flash attention over a chunk and the cache before it on Hopper: retrieval and streaming heads in one launch.

There are as many programs as multiprocessors. Each computes tiles of queries, one after the other, which a plan lists,
with three warpgroups: a producer fetches tiles of keys and values by TMA, and is ahead of the two consumers, which
multiply half of the queries each.
"""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic.compat import Ref, Warpgroup, attend_to_slots, combine, interpreter
from pallas_kernels.mosaic.pipeline import (
    ROWS,
    Copy,
    Mask,
    Masks,
    Pipeline,
    Span,
    Turns,
    stored_tiles,
    tile_memory,
    write,
)
from pallas_kernels.pages import in_pool
from pallas_kernels.schedule import RUNS, Run, Seen, Sizes, Steps, div
from pallas_kernels.segments import over_plain_pools
from pallas_kernels.tiles import PipelineTiles, tiles_for
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window
from pallas_kernels.works import Planned, Queries, Scope

CONSUMERS = 2  # warpgroups that multiply
BLOCK_Q = CONSUMERS * ROWS  # queries of a program
# Registers of a consumer's thread and of a producer's: they share the 65536 of a multiprocessor.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


class Arrays(NamedTuple):
    """The kernel's inputs."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    full_k: Float[Array, "Pr B S H"]
    full_v: Float[Array, "Pr B S H"]
    ring_k: Float[Array, "Ps B R H"]
    ring_v: Float[Array, "Ps B R H"]
    plan: Int32[Array, "W F"]  # see `Planned.table`
    pages: Int32[Array, "B n"] | None = None  # of the full pool, if it is paged

    @property
    def given(self) -> list[Array]:
        """Those that there are."""
        return [array for array in self if array is not None]


class Program(NamedTuple):
    """The static description of a program."""

    queries: Queries
    sizes: Sizes
    is_paged: bool


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
    attend = partial(flash_attention, window=window)
    return over_plain_pools(attend, attend_to_slots, q, k, v, pools, heads, start=start, lengths=lengths, shards=shards)


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
    scope: Scope,
) -> Partial:
    """Attention of a chunk; the output of a tile of queries without a key is unspecified."""
    tiles: PipelineTiles = tiles_for("mosaic_flash", q.shape[3], q.dtype.itemsize)
    stored, block_k = stored_tiles(pools, tiles.block_k)
    queries = Queries.of(q, k.shape[2], BLOCK_Q, pools.capacity if pools.full_k.shape[0] else 0)
    # Whole tiles: TMA writes no part of one. The usual chunks are whole tiles, and are not copied here.
    q, k, v = _whole_tiles(queries.pack(q)), _whole_tiles(k), _whole_tiles(v)
    head_dim = q.shape[3]
    sizes = Sizes(k.shape[1], queries.tile_tokens, block_k, window)
    parts = queries.parts(heads)
    plan = queries.plan(heads, parts, sizes, start=start, lengths=lengths, scope=scope)
    arrays = Arrays(q, k, v, *stored, plan.table(), pools.pages)
    interpret = interpreter()
    program = Program(queries, sizes, pools.pages is not None)
    kernel = partial(flash_kernel, program=program, interpreted=bool(interpret))
    found = plgpu.kernel(
        update_wrapper(kernel, flash_kernel),
        out_type=queries.results(q.shape[1], head_dim, q.dtype),
        scratch_types=[
            tile_memory((CONSUMERS, ROWS, head_dim), q.dtype),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=CONSUMERS),
            plgpu.Barrier(num_barriers=CONSUMERS),
            *Pipeline.scratch(tiles.num_stages, block_k, head_dim, q.dtype, consumers=CONSUMERS),
        ],
        grid=(program.queries.programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*arrays.given)
    return queries.merged(found, heads, scope.filled, parts, combine, jnp.float32)


def _whole_tiles(x: Array) -> Array:
    pad = -x.shape[1] % BLOCK_Q
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) if pad else x


def flash_kernel(*refs, program: Program, interpreted: bool = False) -> None:
    """Some tiles of queries, one after the other; outputs as in `Queries.results`."""
    inputs = len(Arrays._fields) - (not program.is_paged)
    arrays, (out_ref, log_ref, qo_smem, log_smem, q_full, turn, *stages) = Arrays(*refs[:inputs]), refs[inputs:]
    pipeline, registers = Pipeline(*stages), Warpgroup(interpreted)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def fetch() -> None:
        registers.limit(PRODUCER_REGISTERS, "decrease")
        pipeline.drain(_each_work(arrays, program, lambda tile, span: tile.fetch(span, pipeline)))

    @pl.when(warpgroup < CONSUMERS)
    def compute() -> None:
        registers.limit(CONSUMER_REGISTERS, "increase")
        turns = Turns(turn, warpgroup)
        pl.when(warpgroup == 1)(turns.pass_on)
        own = Consumer(warpgroup, registers, qo_smem.at[warpgroup], log_smem.at[warpgroup], q_full.at[warpgroup], turns)
        _each_work(arrays, program, lambda tile, span: tile.attend(span, pipeline, own, out_ref, log_ref))
        plgpu.wait_smem_to_gmem(0)
        pl.when(warpgroup == 0)(turns.wait)


def _each_work(arrays: Arrays, program: Program, run: Callable[["Tile", Span], None]) -> Array:
    """Run the works of this program; returns the number of their steps."""

    def one(turn: Any, before: Array) -> Array:
        tile = Tile(arrays, program, turn * program.queries.programs + lax.axis_index("program"))
        begin, masked, end = tile.read("span_begin", "span_masked", "span_end")
        pl.when(begin < end)(lambda: run(tile, Span(before - begin, begin, masked, end)))
        return before + (end - begin)

    return lax.fori_loop(0, arrays.plan.shape[0] // program.queries.programs, one, jnp.int32(0))


class Consumer(NamedTuple):
    """A warpgroup that multiplies, and its memory."""

    number: Array
    registers: Warpgroup
    qo: Ref  # [ROWS, H], queries, then the output
    log: Ref  # [ROWS]
    q_full: Ref
    turns: Turns


class Tile(NamedTuple):
    """A tile of queries with a part of its keys."""

    arrays: Arrays
    program: Program
    work: Array

    def read(self, *names: str) -> tuple[Array, ...]:
        """Fields of the plan. They are read where they are needed: there are few registers to keep them in."""
        return tuple(self.arrays.plan[self.work, Planned.column(name)] for name in names)

    def steps(self) -> Steps:
        """The tiles of keys."""
        return Steps(*self.read(*Steps._fields))

    def run(self, number: int) -> tuple[Steps, Run]:
        """Some of the tiles of keys, by their number in `Steps.runs`."""
        steps = self.steps()
        return steps, steps.runs[number]

    def fetch(self, span: Span, pipeline: Pipeline) -> None:
        """Copy the tiles of keys."""
        arrays, (slot, row, kv_head) = self.arrays, self.read("slot", "row", "kv_head")

        def load(number: int, step: Array, copy: Copy) -> None:
            steps, run = self.run(number)
            block_k = self.program.sizes.block_k
            first_key = steps.tile(run, step) * block_k
            keys = pl.ds(first_key, block_k)
            if run.source == "own":
                copy(arrays.k.at[row, keys, kv_head], arrays.v.at[row, keys, kv_head])
            elif run.source == "full":
                index, first = in_pool(arrays.pages, arrays.full_k.shape[2], row, first_key)
                at = slot, index, pl.ds(first, block_k)
                copy(arrays.full_k.at[*at], arrays.full_v.at[*at])
            else:
                copy(arrays.ring_k.at[slot, row, keys], arrays.ring_v.at[slot, row, keys])

        for number in range(RUNS):
            _, run = self.run(number)
            pipeline.fetch(span, run.begin, run.end, partial(load, number))

    def attend(self, span: Span, pipeline: Pipeline, consumer: Consumer, out_ref: Ref, log_ref: Ref) -> None:
        """Compute and write the rows of one consumer."""
        _, registers, qo, log, q_full, turns = consumer
        sizes, packed = self.program.sizes, self.program.queries.packed

        def place() -> tuple[Array, Array, Array, Array]:
            part, row, head, tile = self.read("part", "row", "head", "tile")
            return part, row, head, tile * BLOCK_Q + consumer.number * ROWS

        _, row, head, first = place()
        own_q: Ref = self.arrays.q.at[row, pl.ds(first, ROWS), head]
        plgpu.wait_smem_to_gmem(0)  # The output before.
        plgpu.copy_gmem_to_smem(own_q, qo, q_full)
        plgpu.barrier_wait(q_full)

        def keep(seen: Seen) -> Array:
            rows = div(registers.rows(ROWS) + place()[3], packed)
            return seen.mask(registers.columns(sizes.block_k), rows, (ROWS, sizes.block_k))

        def first_tile(step: Array) -> tuple[Array, Array, Seen, Array]:
            """Of any kind: whether it is in the full pool, in a ring, which of its keys are seen, and its first key."""
            start, is_retrieval, filled = self.read("start", "is_retrieval", "filled")
            is_full, is_ring, number = self.steps().place(step)
            at = number, start, is_retrieval == 1, sizes, filled
            full, ring, own = (Seen.of(source, *at) for source in ("full", "ring", "own"))
            return is_full, is_ring, Seen.either(is_full, full, is_ring, ring, own), number * sizes.block_k

        def first_tokens(step: Array) -> Array:
            """Rows of a step's tile that are tokens: pools fill from their first index, a chunk's padding is finite."""
            is_full, is_ring, _, first_key = first_tile(step)
            start, filled = self.read("start", "filled")
            stored = jnp.where(is_full, filled, start) - first_key
            return jnp.where(is_full | is_ring, stored, jnp.int32(sizes.block_k))

        def others() -> Any:
            for number, run in enumerate(self.steps().runs):
                if run.is_masked and run.source != "full":  # There is one such tile at most, the first one.
                    tokens = partial(tokens_of, number) if run.source == "ring" else None
                    yield partial(bounds, number), Mask(partial(keep_of, number), tokens)

        def bounds(number: int) -> tuple[Array, Array]:
            _, run = self.run(number)
            return run.begin, run.end

        def keep_of(number: int, step: Array) -> Array:
            start, is_retrieval, filled = self.read("start", "is_retrieval", "filled")
            steps, run = self.run(number)
            return keep(Seen.of(run.source, steps.tile(run, step), start, is_retrieval == 1, sizes, filled))

        def tokens_of(number: int, step: Array) -> Array:
            (start,), (steps, run) = self.read("start"), self.run(number)
            return start - steps.tile(run, step) * sizes.block_k

        mask_of_first = Mask(lambda step: keep(first_tile(step)[2]), first_tokens)
        masks = Masks(mask_of_first, tuple(others()), consumer.number == 0)
        state = pipeline.attend(registers, qo, span, masks, turns)
        write(registers, state, qo, log, is_tiled=True)
        part, row, head, first = place()
        at_out, at_log = self.program.queries.places(row, head, part, pl.ds(first, ROWS))
        plgpu.copy_smem_to_gmem(qo, out_ref.at[*at_out])
        plgpu.copy_smem_to_gmem(log, log_ref.at[*at_log])
