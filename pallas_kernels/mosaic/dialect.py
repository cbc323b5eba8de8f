"""Mosaic as the kernels here speak it: where jax's versions differ, and where its interpreter knows less than a GPU.

The one file with a private import.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# A reference to memory of the GPU, or to a multiprocessor's; Pallas has no public name for its type.
Ref = Any
# How a warpgroup holds the result of a product, and sums or maxima of its rows.
TILE_LAYOUT = plgpu.Layout.WGMMA
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Dialect:
    """Operations of a warpgroup on a tile in its registers."""

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

    def product_t(self, a: Ref, b: Ref) -> Array:
        """`a @ b.T` of two matrices in shared memory, float32."""
        if self.interpreted:  # It has no transposed matrices.
            return lax.dot_general(a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        transposed = b.transpose((1, 0)) if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(b, (1, 0))

        def multiply(accumulator: Ref) -> Array:
            plgpu.wgmma(accumulator, a, transposed)
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def add_product(self, c: Array, a: Array, b: Ref) -> Array:
        """`c + a @ b`, float32; `b` is in shared memory."""
        if self.interpreted:  # It has no accumulator that begins with a value.
            return c + lax.dot_general(a, b[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        def multiply(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, b)

        return pl.run_state(multiply)(plgpu.ACC.init(c))

    def registers(self, count: int, action: Literal["increase", "decrease"]) -> None:
        """Give a warpgroup more or fewer registers than an even share."""
        if not self.interpreted:
            plgpu.set_max_registers(count, action=action)


def interpreter(**options: Any) -> Any:
    """What makes `plgpu.kernel` run on a CPU; a copy that reaches over an array's end fills with zeros, as TMA does."""
    if hasattr(plgpu, "InterpretGPUParams"):
        params = plgpu.InterpretGPUParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    return params(out_of_bounds_reads="uninitialized", uninitialized_memory="zero", **options)
