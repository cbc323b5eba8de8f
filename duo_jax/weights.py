"""Weights in few bits, through qwix: how the kernel of a linear map is stored and multiplied. Knows no model.

Symmetric integers, with a scale for each output channel or for each group of input channels of it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import qwix
from jaxtyping import Array, Float


@dataclass(frozen=True)
class WeightFormat:
    """How a kernel `[I, O]` is stored."""

    qtype: Literal["int8", "int4"]
    group: int | None = None
    """Input channels that share a scale; None: all of them."""
    dynamic: bool = False
    """Whether activations are quantized too, to int8 with a scale for each token, so that integers are multiplied."""


WEIGHT_FORMATS = {
    "int8": WeightFormat("int8"),
    "w8a8": WeightFormat("int8", dynamic=True),
    "int4": WeightFormat("int4", group=64),
    "int4-32": WeightFormat("int4", group=32),
    "int4-128": WeightFormat("int4", group=128),
}


def quantize_kernel(kernel: Float[Array, "I O"], weight_dtype: str) -> qwix.QArray:
    """A kernel in few bits; its scales have its own data type."""
    how = WEIGHT_FORMATS[weight_dtype]
    tiles = {} if how.group is None else {0: how.group}
    return qwix.quantize(kernel, how.qtype, channelwise_axes=(1,), tiled_axes=tiles)


def multiply(x: Float[Array, "*B I"], kernel: qwix.QArray, *, dynamic: bool) -> Float[Array, "*B O"]:
    """`x @ kernel`, in the type of `x`; with `dynamic`, of `x` rounded to int8, token by token."""
    # qwix promotes integers without saying so, which a strict configuration would refuse.
    with jax.numpy_dtype_promotion("standard"):
        left = qwix.quantize(x, "int8", channelwise_axes=range(x.ndim - 1)) if dynamic else x
        return qwix.dot_general(left, kernel, (((x.ndim - 1,), (0,)), ((), ()))).astype(x.dtype)


def nbytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on a device, where numbers of 4 bits take half a byte."""
    return math.prod(x.shape) // 2 if x.dtype.name in ("int4", "uint4") else math.prod(x.shape) * x.dtype.itemsize


def check_weight_dtype(weight_dtype: str, *widths: int) -> None:
    """Refuse an unknown format, or one whose groups do not fit `widths`, the inputs of the kernels.

    Raises:
        ValueError: with what would fit.
    """
    if weight_dtype not in WEIGHT_FORMATS:
        raise ValueError(f"weight_dtype must be one of {', '.join(WEIGHT_FORMATS)}, got {weight_dtype!r}")
    fitting = [name for name, how in WEIGHT_FORMATS.items() if not any(width % (how.group or 1) for width in widths)]
    if weight_dtype not in fitting:
        raise ValueError(
            f"{weight_dtype} has groups of {WEIGHT_FORMATS[weight_dtype].group} input channels, which do not divide "
            f"this model's {', '.join(map(str, sorted(set(widths))))}: choose one of {', '.join(fitting)}"
        )
