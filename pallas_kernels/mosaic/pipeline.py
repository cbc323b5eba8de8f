"""The pipeline of keys and values through shared memory: a producer warpgroup fetches tiles, consumers use them.

A stage has a tile of keys and one of values. Its `full` barriers complete when a tile has arrived, its `empty` barriers
when every consumer has used it. Steps are numbered; step `s` uses stage `s % stages`.

Memory without a token may hold NaN. Scores of such keys are masked; a value is not hidden by a weight of zero, so the
first consumer overwrites it, and `v_clean` completes when all consumers have waited for that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.merge import LN_2, LOG2_E, MASKED, Softmax, add, finish
from pallas_kernels.mosaic.compat import ROW_LAYOUT, TILE_LAYOUT, Ref, Warpgroup
from pallas_kernels.schedule import rem
from pallas_kernels.types import Pools

# Queries of a warpgroup: the rows of one wgmma.
ROWS = 64

# Called with the keys and values of one tile in global memory, it begins their copy into the step's stage.
Copy = Callable[[Ref, Ref], None]


class Pipeline(NamedTuple):
    """Stages and their barriers, in the order of `scratch`."""

    k: Ref  # [stages, block_k, H]
    v: Ref
    k_full: Ref  # [stages]
    v_full: Ref
    k_empty: Ref
    v_empty: Ref
    v_clean: Ref

    @staticmethod
    def scratch(stages: int, block_k: int, head_dim: int, dtype: Any, *, consumers: int) -> list[Any]:
        """The kernel's `scratch_types`."""
        tile = tile_memory((stages, block_k, head_dim), dtype)
        full = plgpu.Barrier(num_barriers=stages)
        empty = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
        return [tile, tile, full, full, empty, empty, plgpu.Barrier(num_arrivals=consumers)]

    def fetch(self, count: Array, load: Callable[[Array, Copy], None]) -> None:
        """Copy the tiles of steps 0 to `count - 1`, each once its stage is empty; `load(step, copy)` calls `copy`."""
        stages = self.k.shape[0]

        def acquire(step: Array) -> Array:
            """The stage of a step, once the tile that was in it has been used."""
            stage = rem(step, stages)

            @pl.when(step >= stages)
            def wait() -> None:
                plgpu.barrier_wait(self.k_empty.at[stage])
                plgpu.barrier_wait(self.v_empty.at[stage])

            return stage

        def begin(step: Array, _: None) -> None:
            stage = acquire(step)

            def copy(k_ref: Ref, v_ref: Ref) -> None:
                plgpu.copy_gmem_to_smem(k_ref, self.k.at[stage], self.k_full.at[stage])
                plgpu.copy_gmem_to_smem(v_ref, self.v.at[stage], self.v_full.at[stage])

            load(step, copy)

        lax.fori_loop(jnp.int32(0), count, begin, None)
        # Wait for the last tiles too: no barrier is left with an arrival.
        last = jnp.maximum(count, jnp.int32(stages))
        lax.fori_loop(last, count + stages, lambda step, _: (acquire(step), None)[1], None)

    def use(
        self,
        warpgroup: Warpgroup,
        q: Ref,
        begin: Array,
        end: Array,
        state: Softmax,
        mask: "Mask | None" = None,
    ) -> Softmax:
        """Add the tiles of steps `begin` to `end - 1`; with a mask, where not every key is seen."""

        def add_step(step: Array, state: Softmax) -> Softmax:
            stage = rem(step, self.k.shape[0])
            if mask is not None:  # Not between the products, where registers are scarce.
                plgpu.barrier_wait(self.v_full.at[stage])
                self._clear(warpgroup, self.v.at[stage], mask.tokens(step), mask.is_first)
            plgpu.barrier_wait(self.k_full.at[stage])
            scores = warpgroup.product_t(q, self.k.at[stage])
            plgpu.barrier_arrive(self.k_empty.at[stage])
            scores = scores * (q.shape[1] ** -0.5 * LOG2_E)
            if mask is not None:
                scores = jnp.where(mask.keep(step), scores, MASKED)

            def add_product(values: Array, weights: Array) -> Array:
                narrow = weights.astype(self.v.dtype)
                if mask is None:
                    plgpu.barrier_wait(self.v_full.at[stage])
                values = warpgroup.add_product(values, narrow, self.v.at[stage])
                plgpu.barrier_arrive(self.v_empty.at[stage])
                return values

            return add(state, scores, add_product, jnp.exp2)

        return lax.fori_loop(begin, end, add_step, state)

    def _clear(self, warpgroup: Warpgroup, values: Ref, tokens: Array, is_first: Array | bool) -> None:
        """Overwrite the values of a tile that are not of its first `tokens`; consumers agree on the number."""

        @pl.when(tokens < values.shape[0])
        def some() -> None:
            pl.when(is_first)(lambda: warpgroup.clear(values, tokens))
            plgpu.barrier_arrive(self.v_clean)
            plgpu.barrier_wait(self.v_clean)


class Mask(NamedTuple):
    """What a consumer sees of the tiles of some steps."""

    keep: Callable[[Array], Array]  # of a step, the keys that each query sees, [ROWS, block_k]
    tokens: Callable[[Array], Array]  # of a step, the first rows of the tile that are tokens
    is_first: Array | bool = True  # of the consumers


def empty_state(warpgroup: Warpgroup, head_dim: int) -> Softmax:
    """A softmax over no key yet, in registers."""
    return Softmax(
        warpgroup.full((ROWS, head_dim), 0.0, TILE_LAYOUT),
        warpgroup.full((ROWS,), MASKED, ROW_LAYOUT),
        warpgroup.full((ROWS,), 0.0, ROW_LAYOUT),
    )


def write(warpgroup: Warpgroup, state: Softmax, out_smem: Ref, log_smem: Ref, *, is_tiled: bool) -> None:
    """Put the weighted mean of the values and the natural logarithm of the sum of the weights into shared memory."""
    values, log_total = finish(state, jnp.log2)
    warpgroup.store(out_smem, values.astype(out_smem.dtype), is_tiled=is_tiled)
    log_smem[...] = log_total * LN_2
    plgpu.commit_smem()


def tile_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles, in the layout of TMA and wgmma."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def stored_tiles(pools: Pools, block_k: int) -> tuple[tuple[Array, Array, Array, Array], int]:
    """Pools for a kernel, which has every argument, and the keys of a tile, no more than a slot of any pool has.

    One tile takes the place of a pool without a slot, and is never read.
    """
    block_k = min([block_k, *(1 << (pool.shape[2].bit_length() - 1) for pool in pools.stored if pool.shape[0])])
    tile = jnp.zeros((1, pools.full_k.shape[1], block_k, pools.full_k.shape[3]), pools.full_k.dtype)
    full_k, full_v, ring_k, ring_v = (pool if pool.shape[0] else tile for pool in pools.stored)
    return (full_k, full_v, ring_k, ring_v), block_k
