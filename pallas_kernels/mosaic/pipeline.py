"""Tiles of keys and values on their way through shared memory: one warpgroup fetches them, others use them.

A buffer holds a tile of keys and one of values. Its barriers say when each has come, and when every consumer has used
it. Steps are numbered; step `s` lies in buffer `s % stages`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.blocks import LOG2_E, MASKED, rem
from pallas_kernels.mosaic import dialect
from pallas_kernels.mosaic.dialect import Dialect, Ref

# Queries of a warpgroup: what one wgmma takes.
ROWS = 64

# (keys, values) of one tile in global memory -> the copy into the step's buffer has begun.
Copy = Callable[[Ref, Ref], None]


class Softmax(NamedTuple):
    """Running softmax of the queries of a warpgroup, to the base of two (Dao 2023, algorithm 1)."""

    values: Array  # [ROWS, H] float32
    maximum: Array  # [ROWS]
    total: Array  # [ROWS]


class Pipeline(NamedTuple):
    """Buffers and barriers, in the order of `scratch`."""

    k: Ref  # [stages, block_k, H]
    v: Ref
    k_here: Ref  # [stages]
    v_here: Ref
    k_free: Ref
    v_free: Ref

    @staticmethod
    def scratch(stages: int, block_k: int, head_dim: int, dtype: Any, *, consumers: int) -> list[Any]:
        """What a kernel must ask for."""
        tile = tile_memory((stages, block_k, head_dim), dtype)
        here = plgpu.Barrier(num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
        return [tile, tile, here, here, free, free]

    def fetch(self, count: Array, one: Callable[[Array, Copy], None]) -> None:
        """Copy the tiles of steps 0 to `count - 1`, each once its buffer is free; `one(step, copy)` calls `copy`."""
        stages = self.k.shape[0]

        def free(step: Array) -> Array:
            """The buffer of a step, once the tile that was in it has been used."""
            buffer = rem(step, stages)

            @pl.when(step >= stages)
            def wait() -> None:
                plgpu.barrier_wait(self.k_free.at[buffer])
                plgpu.barrier_wait(self.v_free.at[buffer])

            return buffer

        def begin(step: Array, _: None) -> None:
            buffer = free(step)

            def copy(k_ref: Ref, v_ref: Ref) -> None:
                plgpu.copy_gmem_to_smem(k_ref, self.k.at[buffer], self.k_here.at[buffer])
                plgpu.copy_gmem_to_smem(v_ref, self.v.at[buffer], self.v_here.at[buffer])

            one(step, copy)

        lax.fori_loop(jnp.int32(0), count, begin, None)
        # No barrier is left with an arrival that nobody waited for.
        last = jnp.maximum(count, jnp.int32(stages))
        lax.fori_loop(last, count + stages, lambda step, _: (free(step), None)[1], None)

    def use(
        self,
        speak: Dialect,
        q: Ref,
        begin: Array,
        end: Array,
        state: Softmax,
        kept: Callable[[Array], Array] | None = None,
    ) -> Softmax:
        """Add the tiles of steps `begin` to `end - 1`; `kept(step) [ROWS, block_k]`, where not every key is seen."""
        return lax.fori_loop(begin, end, partial(self._add, speak, q, kept), state)

    def _add(
        self, speak: Dialect, q: Ref, kept: Callable[[Array], Array] | None, step: Array, state: Softmax
    ) -> Softmax:
        buffer = rem(step, self.k.shape[0])
        plgpu.barrier_wait(self.k_here.at[buffer])
        scores = speak.product_t(q, self.k.at[buffer])
        plgpu.barrier_arrive(self.k_free.at[buffer])
        scores = scores * (q.shape[1] ** -0.5 * LOG2_E)
        if kept is not None:
            scores = jnp.where(kept(step), scores, MASKED)
        maximum = jnp.maximum(state.maximum, scores.max(axis=1))
        decay = jnp.exp2(state.maximum - maximum)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(maximum, scores.shape, [0]))
        total = state.total * decay + weights.sum(axis=1)
        values = state.values * lax.broadcast_in_dim(decay, state.values.shape, [0])
        narrow = weights.astype(self.v.dtype)
        plgpu.barrier_wait(self.v_here.at[buffer])
        values = speak.add_product(values, narrow, self.v.at[buffer])
        plgpu.barrier_arrive(self.v_free.at[buffer])
        return Softmax(values, maximum, total)


def empty(speak: Dialect, head_dim: int) -> Softmax:
    """A softmax over no key yet."""
    return Softmax(
        speak.full((ROWS, head_dim), 0.0, dialect.TILE_LAYOUT),
        speak.full((ROWS,), MASKED, dialect.ROW_LAYOUT),
        speak.full((ROWS,), 0.0, dialect.ROW_LAYOUT),
    )


def finish(state: Softmax) -> tuple[Array, Array]:
    """The weighted mean of the values, zero where no key was added; and the logarithm (base 2) of the weights' sum."""
    total = jnp.maximum(state.total, 1e-30)
    return state.values / lax.broadcast_in_dim(total, state.values.shape, [0]), state.maximum + jnp.log2(total)


def tile_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles, laid out as TMA and wgmma want them."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
