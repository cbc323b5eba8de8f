"""From the tensors of a checkpoint to a parameter of the decoder: concatenated, transposed, cast, quantized."""

import functools
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from duo_jax.checkpoint.gguf_blocks import Blocks
from duo_jax.checkpoint.mxfp4 import Mxfp4
from duo_jax.checkpoint.source import Source
from duo_jax.checkpoint.stored import Packed
from duo_jax.checkpoint.weight_table import Weight
from duo_jax.model.weights import quantize_kernel

if TYPE_CHECKING:
    import qwix  # imported when weights are quantized

# Tensors that the device dequantizes.
Compact: TypeAlias = Blocks | Packed | Mxfp4
# Numbers that XLA on CPUs cannot write in place: each write copies the whole array.
COPIED = ("float4", "float8", "int4", "uint4")


def read_parameter(
    checkpoint: Source, weight: Weight, dtype: jnp.dtype, weight_dtype: str | None, *, on_host: bool
) -> "Array | np.ndarray | qwix.QArray":
    """A parameter of the decoder, on the default device, or on the host, from where it is divided over a mesh."""
    is_plain = on_host and weight_dtype is None
    arranged = Arrangement(weight.is_kernel and not weight.is_stacked, weight.alternates, weight.is_kernel)

    def matrix(parts: tuple[Any, ...]) -> "Array | np.ndarray | qwix.QArray":
        if is_plain:
            values = [x if isinstance(x, np.ndarray) else np.asarray(x.values()) for x in parts]
            return arranged.of(values, np).astype(dtype)
        if weight_dtype and all(isinstance(part, Packed) and part.coding.fits(weight_dtype) for part in parts):
            return _as_stored(parts, dtype, weight_dtype)
        if weight_dtype == "mxfp4" and isinstance(parts[0], Mxfp4):
            return _as_mxfp4(parts[0], arranged)
        return _convert(parts, dtype, arranged, weight_dtype)

    if weight.experts is None:
        return matrix(tuple(checkpoint.stored(name) for name in weight.names))
    if weight.is_stacked:
        whole: Any = checkpoint.stored(weight.names[0])
        matrices = (matrix((whole[number],)) for number in range(weight.experts))
    else:
        matrices = (matrix(tuple(checkpoint.stored(name) for name in names)) for names in weight.parts)
    first = next(matrices)
    # In place: a second copy of all experts of a layer may take gigabytes.
    if isinstance(first, np.ndarray) or any(leaf.dtype.name.startswith(COPIED) for leaf in jax.tree.leaves(first)):
        stack: Any = jax.tree.map(lambda x: np.empty((weight.experts, *x.shape), x.dtype), first)
        for number, part in enumerate(chain([first], matrices)):
            for all_of_them, one in zip(jax.tree.leaves(stack), jax.tree.leaves(part), strict=True):
                all_of_them[number] = one
        return stack if isinstance(first, np.ndarray) else jax.tree.map(jnp.asarray, stack)
    stack = jax.tree.map(lambda x: jnp.zeros((weight.experts, *x.shape), x.dtype), first)
    for number, part in enumerate(chain([first], matrices)):
        stack = _set_expert(stack, part, number)
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_expert(stack: "Array | qwix.QArray", part: "Array | qwix.QArray", number: Any) -> "Array | qwix.QArray":
    """Write one expert's matrix in place: XLA's scatter of small floats and int4 on CPUs copies all experts."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, number, 0), stack, part)


class Arrangement(NamedTuple):
    """How tensors become a parameter."""

    transposes: bool
    alternates: bool
    is_kernel: bool

    def of(self, parts: Sequence[Any], numpy: Any) -> Any:
        """The parameter's array, by `numpy` or `jax.numpy`."""
        x = numpy.concatenate(parts)
        x = x.T if self.transposes else x
        return numpy.concatenate([x[..., ::2], x[..., 1::2]], axis=-1) if self.alternates else x


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _convert(
    parts: tuple[Array | Compact, ...], dtype: jnp.dtype, arranged: Arrangement, weight_dtype: str | None
) -> "Array | qwix.QArray":
    values = [part.values() if isinstance(part, Blocks | Packed | Mxfp4) else part for part in parts]
    x = arranged.of(values, jnp).astype(dtype)
    return x if weight_dtype is None else quantize_kernel(x, weight_dtype, input_axis=int(not arranged.is_kernel))


@functools.partial(jax.jit, static_argnums=1)
def _as_mxfp4(part: Mxfp4, arranged: Arrangement) -> "qwix.QArray":
    """One expert's kernel with the numbers of the checkpoint."""
    return jax.tree.map(lambda x: arranged.of([x], jnp), part.kernel())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _as_stored(parts: tuple[Packed, ...], dtype: jnp.dtype, weight_dtype: str) -> "qwix.QArray":
    """A kernel with the numbers of the checkpoint."""
    kernels = [part.kernel(weight_dtype, dtype) for part in parts]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays).T, *kernels)
