"""A warpgroup's operations on GPUs before Hopper, from jax 0.11.2 on: copies by cp.async, products by mma.sync.

Interpreted, they are plain ones, since the interpreter has neither: those run with every version of jax.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from pallas_kernels.mosaic.compat import TILE_LAYOUT, Ref, Warpgroup

# Python 3.11 has a version of jax without these operations, where types are checked.
plgpu: Any = mosaic_gpu
# Channels of one product of scores, and values of one product of outputs: fewer registers than all at once.
CHANNELS, VALUES = 64, 16


def is_available() -> bool:
    """Whether this version of jax has these operations."""
    return hasattr(plgpu, "wait_gmem_to_smem")


@dataclass(frozen=True)
class Warps(Warpgroup):
    """Operations on tiles in registers and in shared memory. The results of products have `Warpgroup`'s layouts."""

    dtype: Any  # of the factors

    def copy(self, tile: Ref, to: Ref) -> None:
        """Begin to copy a tile of global memory, which must be within its array, to shared memory."""
        if self.interpreted:
            to[...] = tile[...]
        else:
            plgpu.copy_gmem_to_smem(tile, to, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def wait(self, pending: int) -> None:
        """Until all of this thread's copies have landed but the newest `pending`."""
        if not self.interpreted:
            plgpu.wait_gmem_to_smem(pending)

    def synchronize(self) -> None:
        """Until all threads of the warpgroup are here."""
        if not self.interpreted:
            plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()

    def load_left(self, tile: Ref) -> Array:
        """A left factor from global memory."""
        if self.interpreted:
            return tile[...]
        return plgpu.load(tile, layout=plgpu.Layout.MMA_LHS(self.dtype), optimized=False)

    def scores(self, a: Array, b: Ref) -> Array:
        """`a @ b.T`, float32; `a` is a left factor, `b` a matrix in shared memory."""
        if self.interpreted:
            return lax.dot_general(a, b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        c = self.full((a.shape[0], b.shape[0]), 0.0, TILE_LAYOUT)
        for begin in range(0, a.shape[1], CHANNELS):
            channels = slice(begin, begin + CHANNELS)
            right = plgpu.load(b.at[:, channels].transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(self.dtype))
            c = plgpu.mma(c, a[:, channels], right)
        return c

    def add_weighted(self, c: Array, a: Array, b: Ref, rows: Array | None) -> Array:
        """`c + a @ b`, float32; `a` is a result of products, `b` a matrix in shared memory, zero from row `rows` on."""
        a = a.astype(self.dtype)
        if self.interpreted:
            b = b[...]
            if rows is not None:
                b = jnp.where(lax.broadcasted_iota(jnp.int32, b.shape, 0) < rows, b, jnp.zeros((), b.dtype))
            return c + lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        a, layout = self._as_left(a), plgpu.Layout.MMA_RHS(self.dtype)
        for begin in range(0, a.shape[1], VALUES):
            part = slice(begin, begin + VALUES)
            right = plgpu.load(b.at[part], layout=layout)
            if rows is not None:
                # Of one axis first: where a register has two rows, jax gives both the index of the first.
                index = plgpu.broadcasted_iota(jnp.int32, right.shape[:1], 0, layout=layout.reduce(1))
                index = plgpu.layout_cast(lax.broadcast_in_dim(index, right.shape, (0,)), layout)
                right = jnp.where(index < rows - begin, right, jnp.zeros((), right.dtype))
            c = plgpu.mma(c, a[:, part], right)
        return c

    def _as_left(self, a: Array) -> Array:
        """A result of products as a left factor: each thread has the numbers that it needs, in the same order."""
        left = plgpu.Layout.MMA_LHS(self.dtype)

        @plgpu.inline_mgpu(arg_types=(TILE_LAYOUT,), return_type=plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=left))
        def renamed(_: Any, array: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
            layout = mgpu.MMALayouts(array.mlir_dtype).lhs
            registers = array.registers.reshape(layout.registers_shape(array.shape))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return renamed(a)
