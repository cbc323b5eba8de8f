"""Weights in few bits, through qwix: kernels and embeddings are stored, multiplied and looked up. Knows no model.

Integers or floats of 8 or 4 bits, with a scale for each output channel or for each group of input channels of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from duo_jax.model.precision import check_name

if TYPE_CHECKING:
    import qwix  # imported when weights are quantized


@dataclass(frozen=True)
class WeightFormat:
    """How a kernel `[I, O]` is quantized."""

    qtype: Literal["int8", "int4", "float8_e4m3fn", "float4_e2m1fn"]
    group: int | None = None
    """Input channels that share a scale; None: all of them."""
    dynamic: bool = False
    """Whether activations are quantized too, to int8 with a scale for each token, so that integers are multiplied."""
    has_zeros: bool = False
    """Whether a group also has the number that stands for 0; without, it is 0."""
    only_experts: bool = False
    """Whether only the MLPs of a mixture of experts are quantized, as gpt-oss is published."""

    @property
    def scale_dtype(self) -> str | None:
        """Data type of scales; None: the kernel's. Published 8-bit floats have them in float32."""
        return {"float8_e4m3fn": "float32", "float4_e2m1fn": "bfloat16"}.get(self.qtype)


WEIGHT_FORMATS = {
    "int8": WeightFormat("int8"),
    "w8a8": WeightFormat("int8", dynamic=True),
    "int4": WeightFormat("int4", group=64),
    "int4-32": WeightFormat("int4", group=32),
    "int4-128": WeightFormat("int4", group=128),
    "int4-asym": WeightFormat("int4", group=64, has_zeros=True),
    "int4-32-asym": WeightFormat("int4", group=32, has_zeros=True),
    "int4-128-asym": WeightFormat("int4", group=128, has_zeros=True),
    "int8-128": WeightFormat("int8", group=128),
    "fp8": WeightFormat("float8_e4m3fn"),
    "fp8-128": WeightFormat("float8_e4m3fn", group=128),
    "mxfp4": WeightFormat("float4_e2m1fn", group=32, only_experts=True),
}
# Embeddings are looked up, not multiplied: there are no activations to quantize.
EMBED_FORMATS = {name: WEIGHT_FORMATS[name] for name in ("int8", "int4", "int4-32", "int4-128")}


def quantize_kernel(kernel: Float[Array, "n m"], weight_dtype: str, *, input_axis: int = 0) -> "qwix.QArray":
    """A kernel `[I, O]`, or a table `[O, I]` with `input_axis=1`, in few bits; see `WeightFormat`."""
    import qwix

    how = WEIGHT_FORMATS[weight_dtype]
    tiles = {} if how.group is None else {input_axis: how.group}
    return qwix.quantize(
        kernel,
        how.qtype,
        channelwise_axes=(1 - input_axis,),
        tiled_axes=tiles,
        calibration_method="minmax" if how.has_zeros else "absmax",
        scale_dtype=how.scale_dtype,
    )


def multiply(
    x: Float[Array, "*B I"],
    kernel: "qwix.QArray",
    *,
    dynamic: bool = False,
    input_axis: int = 0,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*B O"]:
    """`x @ kernel`, in `dtype` or the type of `x`; `dynamic` first rounds `x` to int8, token by token."""
    import qwix

    dimensions = (((x.ndim - 1,), (input_axis,)), ((), ()))
    # qwix promotes integers implicitly, which a strict configuration would refuse.
    with jax.numpy_dtype_promotion("standard"):
        if kernel.scale.dtype != x.dtype:  # Dequantized in the data type of the scales, and multiplied in that of `x`.
            kernel = qwix.dequantize(kernel).astype(x.dtype)
        left = qwix.quantize(x, "int8", channelwise_axes=range(x.ndim - 1)) if dynamic else x
        return qwix.dot_general(left, kernel, dimensions, preferred_element_type=dtype).astype(dtype or x.dtype)


def look_up(table: "qwix.QArray", tokens: Int[Array, "*B"]) -> Float[Array, "*B I"]:
    """Rows of a quantized table, in the data type of its scales."""
    import qwix

    rows = jax.tree.map(lambda x: x[tokens], table)
    with jax.numpy_dtype_promotion("standard"):
        return qwix.dequantize(rows).astype(rows.scale.dtype)


def check_format(setting: str, chosen: str, formats: Mapping[str, WeightFormat], *widths: int) -> None:
    """Check that a format is in `formats` and that its groups divide `widths`, the inputs of the kernels.

    Raises:
        ValueError: with the formats that fit.
    """
    check_name(setting, chosen, formats)
    fitting = [name for name, how in formats.items() if not any(width % (how.group or 1) for width in widths)]
    if chosen not in fitting:
        raise ValueError(
            f"{chosen} has groups of {formats[chosen].group} input channels, which do not divide "
            f"this model's {', '.join(map(str, sorted(set(widths))))}: choose one of {', '.join(fitting)}"
        )
