"""The pipeline of keys and values through shared memory: a producer warpgroup fetches tiles, consumers use them.

A stage has a tile of keys and one of values. Its `full` barriers complete when a tile has arrived, its `empty` barriers
when every consumer has used it. Steps are numbered; step `s` uses stage `s % stages`.

Memory without a token may hold NaN. Scores of such keys are masked; a value is not hidden by a weight of zero, so the
first consumer overwrites it, and `v_clean` completes when all consumers have waited for that.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.merge import LN_2, LOG2_E, MASKED, Softmax, across, finish, weigh
from pallas_kernels.mosaic.compat import ROW_LAYOUT, TILE_LAYOUT, Ref, Warpgroup
from pallas_kernels.schedule import rem
from pallas_kernels.types import Pools

# Queries of a warpgroup: the rows of one wgmma.
ROWS = 64
# Columns that neighboring threads hold side by side: a sum over every eighth one stays within a thread.
PARTS = 8

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

    def fetch(self, span: "Span", begin: Array, end: Array, load: Callable[[Array, Copy], None]) -> None:
        """Copy the tiles of some of a span's steps, each once its stage is empty; `load(step, copy)` calls `copy`."""

        def acquire(step: Array, empty: Ref) -> Array:
            """The stage of a step, once the tile that was in it has been used."""
            stage = span.stage(step, self.k.shape[0])
            pl.when(span.number(step) >= self.k.shape[0])(lambda: plgpu.barrier_wait(empty.at[stage]))
            return stage

        def one(step: Array, _: None) -> None:
            def copy(k_ref: Ref, v_ref: Ref) -> None:
                # Keys are needed, and their memory becomes empty, before values.
                stage = acquire(step, self.k_empty)
                plgpu.copy_gmem_to_smem(k_ref, self.k.at[stage], self.k_full.at[stage])
                acquire(step, self.v_empty)
                plgpu.copy_gmem_to_smem(v_ref, self.v.at[stage], self.v_full.at[stage])

            load(step, copy)

        lax.fori_loop(jnp.maximum(span.begin, begin), jnp.minimum(span.end, end), one, None)

    def drain(self, count: Array) -> None:
        """Wait until the last of `count` tiles have been used: no barrier is left with an arrival."""

        def wait(number: Array, _: None) -> None:
            stage = rem(number, self.k.shape[0])
            plgpu.barrier_wait(self.k_empty.at[stage])
            plgpu.barrier_wait(self.v_empty.at[stage])

        lax.fori_loop(jnp.maximum(count - self.k.shape[0], jnp.int32(0)), count, wait, None)

    def attend(
        self, warpgroup: Warpgroup, q: Ref, steps: "Span", masks: "Masks", turns: "Turns | None" = None
    ) -> Softmax:
        """The softmax over the keys of some steps, at least one.

        In the loop, the values of one tile are multiplied while the weights of the next one are computed. Of two
        consumers, one multiplies while the other computes weights: they take turns at the tensor cores.
        """
        scale = q.shape[1] ** -0.5 * LOG2_E

        def arrive(step: Array, mask: "Mask | None") -> Array:
            """The stage of a step whose keys are there, and its values if some of them are no tokens."""
            stage = steps.stage(step, self.k.shape[0])
            if mask is not None and mask.tokens is not None:
                plgpu.barrier_wait(self.v_full.at[stage])
                self._clear(warpgroup, self.v.at[stage], mask.tokens(step), masks.is_first)
            plgpu.barrier_wait(self.k_full.at[stage])
            if turns is not None:
                turns.wait()
            return stage

        def issued() -> None:
            if turns is not None:
                turns.pass_on()

        def weights_of(scores: Array, maximum: Array, total: Array) -> Any:
            return weigh(maximum, total, scores, jnp.exp2, scale, add_up)

        def add_step(step: Array, carry: Any, *, mask: "Mask | None") -> Any:
            values, weights, maximum, total = carry
            stage, before = arrive(step, mask), steps.stage(step - 1, self.k.shape[0])

            def meanwhile(scores: Array) -> Any:
                plgpu.barrier_arrive(self.k_empty.at[stage])
                # There are too few registers for a mask as long as the product needs those of the weights before.
                return weights_of(scores, maximum, total) if mask is None else (scores,)

            products = q, self.k.at[stage], values, weights, self.v.at[before]
            like = (warpgroup.full(weights.shape, 0.0, TILE_LAYOUT), maximum, maximum, total)[
                : 4 if mask is None else 1
            ]
            values, found = warpgroup.overlapped(products, meanwhile, like, issued)
            plgpu.barrier_arrive(self.v_empty.at[before])
            if mask is not None:
                (scores,) = found
                found = weights_of(jnp.where(mask.keep(step), scores, MASKED), maximum, total)
            new_weights, decay, maximum, total = found
            if mask is None or mask.tokens is None:
                plgpu.barrier_wait(self.v_full.at[stage])
            # Not earlier: the product reads the registers of the weights before.
            return values * across(decay, values), new_weights.astype(self.v.dtype), maximum, total

        state = empty_state(warpgroup, self.k.shape[2])
        stage = arrive(steps.begin, masks.first)
        scores = warpgroup.product_t(q, self.k.at[stage], issued)
        plgpu.barrier_arrive(self.k_empty.at[stage])
        scores = jnp.where(masks.first.keep(steps.begin), scores, MASKED)
        weights, _, *sums = weights_of(scores, state.maximum, state.total)
        carry = state.values, weights.astype(self.v.dtype), *sums
        for bounds, mask in masks.others:
            begin, end = bounds()
            begin, end = jnp.maximum(steps.begin + 1, begin), jnp.minimum(steps.end, end)
            carry = lax.fori_loop(begin, end, partial(add_step, mask=mask), carry)
        begin = jnp.maximum(steps.begin + 1, steps.masked)
        carry = lax.fori_loop(begin, steps.end, partial(add_step, mask=None), carry)
        values, weights, maximum, total = carry
        last = steps.stage(steps.end - 1, self.k.shape[0])
        values = warpgroup.add_product(values, weights, self.v.at[last])
        plgpu.barrier_arrive(self.v_empty.at[last])
        return Softmax(values, maximum, total.sum(axis=-1))

    def _clear(self, warpgroup: Warpgroup, values: Ref, tokens: Array, is_first: Array | bool) -> None:
        """Overwrite the values of a tile that are not of its first `tokens`; consumers agree on the number."""

        @pl.when(tokens < values.shape[0])
        def some() -> None:
            pl.when(is_first)(lambda: warpgroup.clear(values, tokens))
            plgpu.barrier_arrive(self.v_clean)
            plgpu.barrier_wait(self.v_clean)


class Span(NamedTuple):
    """The steps of a program for one tile of queries: `begin` to `end - 1`; before `masked`, they need a mask.

    The first step is always masked. Among all steps of the program, whose stages follow each other, step `s` is number
    `offset + s`.
    """

    offset: Array
    begin: Array
    masked: Array
    end: Array

    def number(self, step: Array) -> Array:
        """Number of a step among those of the program."""
        return self.offset + step

    def stage(self, step: Array, stages: int) -> Array:
        """Stage of a step."""
        return rem(self.number(step), stages)


class Turns(NamedTuple):
    """Turns of two consumers at the tensor cores."""

    ready: Ref  # [2], barriers
    own: Array  # number of this consumer

    def wait(self) -> None:
        """Wait until it is this consumer's turn."""
        plgpu.barrier_wait(self.ready.at[self.own])

    def pass_on(self) -> None:
        """Give the other consumer its turn."""
        plgpu.barrier_arrive(self.ready.at[1 - self.own])


class Mask(NamedTuple):
    """What a consumer sees of the tiles of some steps."""

    keep: Callable[[Array], Array]  # of a step, the keys that each query sees, [ROWS, block_k]
    tokens: Callable[[Array], Array] | None  # of a step, the first rows of the tile that are tokens; None: all are


class Masks(NamedTuple):
    """The masks of a program's steps."""

    first: Mask  # of the first step
    # The masks of others, and between which steps they are needed: computed late, as there are few registers.
    others: tuple[tuple[Callable[[], tuple[Array, Array]], Mask], ...] = ()
    is_first: Array | bool = True  # of the consumers


def empty_state(warpgroup: Warpgroup, head_dim: int) -> Softmax:
    """A softmax over no key yet, in registers."""
    return Softmax(
        warpgroup.full((ROWS, head_dim), 0.0, TILE_LAYOUT),
        warpgroup.full((ROWS,), MASKED, ROW_LAYOUT),
        warpgroup.full((ROWS, PARTS), 0.0, TILE_LAYOUT),
    )


def add_up(weights: Array) -> Array:
    """Sums over every `PARTS`-th column, `[ROWS, PARTS]`: without exchange between threads, until the end."""
    columns = range(0, weights.shape[1], PARTS)
    return functools.reduce(lambda a, b: a + b, (weights[:, begin : begin + PARTS] for begin in columns))


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
