"""Flash attention over a chunk and the cache before it on Ampere and Ada: the kernel of `flash`, without TMA and wgmma.

A program computes one tile of queries of one head, which a plan lists, with one warpgroup. While it multiplies with
mma.sync, cp.async fetches the next keys and values.
"""

from dataclasses import replace
from functools import partial, update_wrapper
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.merge import LN_2, LOG2_E, MASKED, Softmax, across, finish, weigh
from pallas_kernels.mosaic.compat import Ref, combine, interpreter
from pallas_kernels.mosaic.flash import Arrays, Program
from pallas_kernels.mosaic.pipeline import ROWS, add_up, empty_state, stored_tiles, tile_memory
from pallas_kernels.mosaic.warps import Warps, is_available
from pallas_kernels.pages import in_pool, refused_pages
from pallas_kernels.schedule import RUNS, Seen, Sizes, Steps, div, rem
from pallas_kernels.segments import over_plain_pools
from pallas_kernels.tiles import PipelineTiles, tiles_for
from pallas_kernels.types import Backend, Heads, Partial, Pools, Request, TokenShards
from pallas_kernels.window import Window
from pallas_kernels.works import Planned, Queries, Scope

__all__ = ["BACKEND"]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
# Keys of the smallest tile that the threads of a warpgroup can copy.
LEAST_KEYS = 32


def refuses(request: Request) -> str | None:
    """The reason why the kernel cannot run a request, or None."""
    # Quantized pools are unpacked before.
    if reason := request.refused_shards() or replace(request, bits=frozenset()).refused_types(DTYPES):
        return reason
    if request.head_dim not in HEAD_DIMS:
        return f"takes head dims of {' or '.join(map(str, HEAD_DIMS))}, got {request.head_dim}"
    if reason := refused_pages("mosaic", request):
        return reason
    if any(length < LEAST_KEYS for length in request.capacities):
        return (
            f"needs a cache length and a window size (sinks and recent tokens) of at least {LEAST_KEYS}, got "
            f"{', '.join(map(str, request.capacities))}"
        )
    if request.device == "cpu":
        return None
    if request.capability is None or request.capability[0] != 8:
        return f"is for GPUs of compute capability 8.0 to 8.9, this is {request.device}"
    return None if is_available() else f"needs jax 0.11.2 or newer on GPUs before Hopper, this is {jax.__version__}"


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
    return over_plain_pools(attend, None, q, k, v, pools, heads, start=start, lengths=lengths, shards=shards)


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
    capacity = pools.capacity if pools.full_k.shape[0] else 0
    if capacity:  # The next slot begins there.
        scope = scope._replace(filled=jnp.minimum(scope.filled, jnp.int32(capacity)))
    queries = Queries.of(q, k.shape[2], ROWS, capacity)
    # Whole tiles: copies do not end with the array. Keys of a head follow each other, as in a pool.
    q, (k, v) = whole(queries.pack(q), ROWS), (whole(x, block_k).swapaxes(1, 2) for x in (k, v))
    head_dim = q.shape[3]
    sizes = Sizes(k.shape[2], queries.tile_tokens, block_k, window)
    parts = queries.parts(heads)
    plan = queries.plan(heads, parts, sizes, start=start, lengths=lengths, scope=scope).table()
    arrays = Arrays(q, k, v, *stored, plan, pools.pages)
    interpret = interpreter()
    program = Program(queries, sizes, pools.pages is not None)
    kernel = partial(flash_kernel, program=program, interpreted=bool(interpret))
    tile = tile_memory((tiles.num_stages, block_k, head_dim), q.dtype)
    found = plgpu.kernel(
        update_wrapper(kernel, flash_kernel),
        out_type=queries.results(q.shape[1], head_dim, q.dtype),
        scratch_types=[tile, tile],
        grid=(len(plan),),
        grid_names=("work",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # No thread reads what it has written; `Stages` has the barriers.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )(*arrays.given)
    return queries.merged(found, heads, scope.filled, parts, combine, jnp.float32)


def whole(x: Array, size: int) -> Array:
    """Tokens `[B, T, ...]` in whole tiles."""
    pad = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) if pad else x


def flash_kernel(*refs, program: Program, interpreted: bool = False) -> None:
    """A tile of queries with a part of its keys; outputs as in `Queries.results`."""
    inputs = len(Arrays._fields) - (not program.is_paged)
    arrays, (out_ref, log_ref, k_smem, v_smem) = Arrays(*refs[:inputs]), refs[inputs:]
    work = Work(arrays, program, Warps(interpreted, arrays.q.dtype), k_smem, v_smem)
    begin, end = work.read("span_begin", "span_end")
    pl.when(begin < end)(lambda: work.attend(begin, end, out_ref, log_ref))


class Work(NamedTuple):
    """A tile of queries with a part of its keys, and shared memory for tiles of these, `[stages, block_k, H]`."""

    arrays: Arrays
    program: Program
    warps: Warps
    k: Ref
    v: Ref

    def read(self, *names: str) -> tuple[Array, ...]:
        """Fields of the plan. They are read where they are needed: there are few registers to keep them in."""
        return tuple(self.arrays.plan[lax.axis_index("work"), Planned.column(name)] for name in names)

    def steps(self) -> Steps:
        """The tiles of keys."""
        return Steps(*self.read(*Steps._fields))

    def begins(self, source: str, number: Array) -> tuple[Array, Array]:
        """First key of a tile, and the first key of which there is a copy: none reaches over the end of a slot."""
        first, block_k = number * self.program.sizes.block_k, self.program.sizes.block_k
        arrays = self.arrays
        size = {"own": arrays.k, "full": arrays.full_k, "ring": arrays.ring_k}[source].shape[2]
        if size % block_k == 0:
            return first, first
        return first, jnp.minimum(first, jnp.int32(size - block_k))

    def place(self, step: Array, end: Array, since: int) -> "Place":
        """Where the tile of a step is, which is of a run from number `since` on."""
        steps = self.steps()
        is_full, is_ring, number = steps.place(step, since)
        kinds = {"full": is_full, "ring": is_ring, "own": ~(is_full | is_ring)}
        sources = {run.source: kinds[run.source] & (step < end) for run in steps.runs[since:]}
        return Place(sources, step, number)

    def copy(self, name: str, place: "Place") -> None:
        """Begin to copy the tile of a step, if there is one, of keys or values, `name`."""
        stages: Ref = getattr(self, name)
        to = stages.at[rem(place.step, stages.shape[0])]
        for source, is_here in place.sources.items():
            pl.when(is_here)(partial(self._copy, name, source, place.number, to))

    def _copy(self, name: str, source: str, number: Array, to: Ref) -> None:
        arrays, block_k = self.arrays, self.program.sizes.block_k
        slot, row, kv_head = self.read("slot", "row", "kv_head")
        _, first = self.begins(source, number)
        if source == "own":
            chunk: Ref = getattr(arrays, name)
            self.warps.copy(chunk.at[row, kv_head, pl.ds(first, block_k)], to)
            return
        pool: Ref = getattr(arrays, f"{source}_{name}")
        if source == "full":
            row, first = in_pool(arrays.pages, pool.shape[2], row, first)
        self.warps.copy(pool.at[slot, row, pl.ds(first, block_k)], to)

    def attend(self, begin: Array, end: Array, out_ref: Ref, log_ref: Ref) -> None:
        """Compute and write the rows of the tile."""
        warps, stages = self.warps, self.k.shape[0]
        part, row, head, tile = self.read("part", "row", "head", "tile")
        rows = pl.ds(tile * ROWS, ROWS)
        q = warps.load_left(self.arrays.q.at[row, rows, head])
        for ahead in range(stages - 1):
            place = self.place(begin + ahead, end, 0)
            self.copy("k", place)
            self.copy("v", place)

        def arrive(step: Array) -> None:
            """Wait for the next tile: those of later steps are newer copies, unless there are none."""
            warps.wait(2 * stages - 3)
            pl.when(step + (stages - 1) >= end)(lambda: warps.wait(0))
            warps.synchronize()

        def add_step(step: Array, state: Softmax, *, number: int, is_masked: bool) -> Softmax:
            stage, later = rem(step, stages), self.place(step + (stages - 1), end, number)
            arrive(step)
            self.copy("k", later)
            scores, tokens = warps.scores(q, self.k.at[stage]), None
            if is_masked:
                keep, tokens = self.mask(number, step)
                scores = jnp.where(keep, scores, MASKED)
            scale = q.shape[1] ** -0.5 * LOG2_E
            weights, decay, maximum, total = weigh(state.maximum, state.total, scores, jnp.exp2, scale, add_up)
            arrive(step)
            self.copy("v", later)
            values = warps.add_weighted(state.values * across(decay, state.values), weights, self.v.at[stage], tokens)
            return Softmax(values, maximum, total)

        state = empty_state(warps, q.shape[1])
        for number in range(RUNS):
            run = self.steps().runs[number]
            first, last = jnp.maximum(begin, run.begin), jnp.minimum(end, run.end)
            of_run = partial(add_step, number=number, is_masked=run.is_masked)
            state = lax.fori_loop(first, last, of_run, state)
        values, log_total = finish(state._replace(total=state.total.sum(axis=-1)), jnp.log2)
        at_out, at_log = self.program.queries.places(row, head, part, rows)
        warps.store(out_ref.at[*at_out], values.astype(q.dtype), is_tiled=False)
        warps.store(log_ref.at[*at_log], log_total * LN_2, is_tiled=False)

    def mask(self, number: int, step: Array) -> tuple[Array, Array | None]:
        """Which keys of a step's tile each query sees, and the rows of it that are tokens; None: all are.

        Pools fill from their first index; the chunk's padding is finite.
        """
        warps, sizes = self.warps, self.program.sizes
        steps = self.steps()
        run = steps.runs[number]
        start, is_retrieval, filled, tile = self.read("start", "is_retrieval", "filled", "tile")
        tile_number = steps.tile(run, step)
        first, copied = self.begins(run.source, tile_number)
        seen = Seen.of(run.source, tile_number, start, is_retrieval == 1, sizes, filled)
        index, shape = warps.columns(sizes.block_k), (ROWS, sizes.block_k)
        query = div(warps.rows(ROWS) + tile * ROWS, self.program.queries.packed)
        keep = seen.mask(index - (first - copied), query, shape)
        if first is not copied:  # Keys before those of the tile belong to another one.
            keep = keep & lax.broadcast_in_dim(index >= first - copied, shape, (1,))
        stored = {"full": filled, "ring": start, "own": None}[run.source]
        return keep, None if stored is None else stored - copied


class Place(NamedTuple):
    """Where the tile of a step is."""

    sources: dict[str, Array]  # whether it is in the chunk, "own", or in the "full" pool or the "ring"
    step: Array
    number: Array  # of the tile in its source


BACKEND = Backend("mosaic", refuses, prefill)
