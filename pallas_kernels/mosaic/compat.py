"""Compatibility layer over jax's versions of Mosaic GPU, and over its interpreter, which lacks some operations.

The only file with a private import.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import merge
from pallas_kernels.gpus import device_kind
from pallas_kernels.types import Partial

# What Mosaic has no kernel for; in XLA, or not at all, once jax has removed Pallas's lowering to Triton.
combine: Callable[..., Partial] = merge.combine
attend_to_slots: Callable[..., Partial] | None = None
with suppress(ImportError):
    from pallas_kernels.triton.combine import combine  # noqa: F401
    from pallas_kernels.triton.decode import attend_to_slots  # noqa: F401

# A reference to global or shared memory; Pallas has no public name for its type.
Ref = Any
# Registers of a warpgroup for the result of a product, and for sums or maxima of its rows.
TILE_LAYOUT = plgpu.Layout.WGMMA
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)
# Rows that are cleared at a time; every tile of keys or values has a multiple.
CLEARED = 32


@dataclass(frozen=True)
class Warpgroup:
    """Operations of a warpgroup on tiles in its registers."""

    interpreted: bool

    def full(self, shape: tuple[int, ...], value: float, layout: Any) -> Array:
        """A constant tile, float32."""
        tile = jnp.full(shape, value, jnp.float32)
        return tile if self.interpreted else plgpu.layout_cast(tile, layout)

    def iota(self, shape: tuple[int, int], axis: int) -> Array:
        """Indices along an axis of a tile, int32."""
        if self.interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE_LAYOUT)

    def columns(self, count: int) -> Array:
        """Indices of a tile's columns, int32, to be broadcast along its rows."""
        return self._indices(count, COLUMN_LAYOUT)

    def rows(self, count: int) -> Array:
        """Indices of a tile's rows, int32, to be broadcast along its columns."""
        return self._indices(count, ROW_LAYOUT)

    def _indices(self, count: int, layout: Any) -> Array:
        if self.interpreted:
            return lax.iota(jnp.int32, count)
        return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)

    def product_t(self, a: Ref, b: Ref, issued: Callable[[], None] | None = None) -> Array:
        """`a @ b.T` of two matrices in shared memory, float32; `issued()` is called while it is computed."""
        if self.interpreted:  # The interpreter has no transposed matrices.
            return self._interpreted_product_t(a, b, issued)

        def multiply(accumulator: Ref) -> Array:
            plgpu.wgmma(accumulator, a, _transposed(b))
            if issued is not None:
                issued()
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def overlapped(
        self,
        products: tuple[Ref, Ref, Array, Array, Ref],
        meanwhile: Callable[[Array], tuple[Array, ...]],
        like: tuple[Array, ...],
        issued: Callable[[], None],
    ) -> tuple[Array, tuple[Array, ...]]:
        """`c + d @ e` for `products` a, b, c, d, e, and `meanwhile(a @ b.T)`, which does not wait for the former.

        Args:
            products: a, b and e are in shared memory; sums are float32.
            meanwhile: returns arrays with the shapes of `like`.
            like: arrays with those shapes; their contents are not used.
            issued: is called when both products have begun.
        """
        a, b, c, d, e = products
        if self.interpreted:
            scores = self._interpreted_product_t(a, b, issued)
            return self.add_product(c, d, e), meanwhile(scores)

        def multiply(refs: tuple[Ref, tuple[Ref, ...]]) -> None:
            sums, results = refs

            def with_scores(scores: Ref) -> None:
                plgpu.wgmma(scores, a, _transposed(b))
                plgpu.wgmma(sums, d, e)
                issued()
                # Only the first of the two products has to be complete.
                for result, value in zip(
                    results, meanwhile(plgpu.wgmma_accumulator_load(scores, wait_n=1)), strict=True
                ):
                    result[...] = value

            pl.run_scoped(with_scores, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

        return pl.run_state(multiply)((plgpu.ACC.init(c), like))

    def _interpreted_product_t(self, a: Ref, b: Ref, issued: Callable[[], None] | None) -> Array:
        tiles = a[...], b[...]
        plgpu.commit_smem()  # As if wgmma had read them: before the next copy into their memory.
        if issued is not None:
            issued()
        return lax.dot_general(*tiles, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def add_product(self, c: Array, a: Array, b: Ref) -> Array:
        """`c + a @ b`, float32; `b` is in shared memory."""
        if self.interpreted:  # The interpreter has no accumulator with an initial value.
            tile = b[...]
            plgpu.commit_smem()
            return c + lax.dot_general(a, tile, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        def multiply(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, b)

        return pl.run_state(multiply)(plgpu.ACC.init(c))

    def clear(self, tile: Ref, first: Array) -> None:
        """Write zeros to the rows of a tile in shared memory from `first` on, for the next product to read."""

        def some_rows(i: Array, _: None) -> None:
            rows = tile.at[pl.ds(pl.multiple_of(i * CLEARED, CLEARED), CLEARED)]
            layout = plgpu.Layout.SMEM_GMEM_COPY(rows.shape, rows.dtype, 128)
            if self.interpreted:
                kept, index = rows[...], lax.broadcasted_iota(jnp.int32, rows.shape, 0)
            else:
                # jax 0.10 has an argument for indices; 0.12 has none.
                whole = ((),) if "idx" in signature(plgpu.load).parameters else ()
                kept = plgpu.load(rows, *whole, layout=layout)
                index = plgpu.broadcasted_iota(jnp.int32, rows.shape, 0, layout=layout)
            rows[...] = jnp.where(index < first - i * CLEARED, kept, jnp.zeros((), tile.dtype))

        # Few rows at a time: they need few registers.
        lax.fori_loop(lax.div(first, jnp.int32(CLEARED)), jnp.int32(tile.shape[0] // CLEARED), some_rows, None)
        plgpu.commit_smem()

    def store(self, ref: Ref, value: Array, *, is_tiled: bool) -> None:
        """Write registers to memory; rows of shared memory that is not tiled share banks, and take longer."""
        # From jax 0.12 on, an assignment insists on a store without bank conflicts; before, there was no other one.
        if is_tiled or self.interpreted or not hasattr(plgpu, "store"):
            ref[...] = value
        else:
            plgpu.store(ref, value, optimized=False)

    def limit(self, count: int, action: Literal["increase", "decrease"]) -> None:
        """Give a warpgroup more or fewer registers than an even share."""
        if not self.interpreted:
            plgpu.set_max_registers(count, action=action)


def _transposed(matrix: Ref) -> Ref:
    return matrix.transpose((1, 0)) if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(matrix, (1, 0))


def interpreter() -> Any:
    """On a CPU, options that interpret `plgpu.kernel`; copies beyond an array's end give zeros, as with TMA.

    From jax 0.11 on, the interpreter detects races between warpgroups and copies. It does not notice a buffer that is
    given back too early, and it does not run wgmma: only equal results of many runs on a GPU show those.
    """
    # Not by `lax.platform_dependent`: the interpreter's side effects cannot be in a branch that is not taken.
    if device_kind() != "cpu":
        return None
    if hasattr(plgpu, "InterpretGPUParams"):
        params = plgpu.InterpretGPUParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    return params(
        out_of_bounds_reads="uninitialized",
        uninitialized_memory="zero",
        detect_races=jax.__version_info__ >= (0, 11),
    )
