"""Linear maps and embeddings as Flax NNX modules, with weights in floats or few bits."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from duo_jax.model.precision import AnyDtype
from duo_jax.model.weights import WEIGHT_FORMATS, look_up, multiply, quantize_kernel

# Most rows of which `by_output` turns the product round.
FEW_ROWS = 16


class Linear(nnx.Linear):
    """A linear map with weights `[in, out]`, in the data type of its outputs, or quantized.

    Attributes:
        is_by_output: whether they are stored `[out, in]`, see `duo_jax.model.model.Model.by_output`.
    """

    is_by_output: bool = False

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        weight_dtype: str | None = None,
    ) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        super().__init__(width_in, width_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.weight_dtype = weight_dtype
        if weight_dtype is not None:
            self.kernel.set_value(quantize_kernel(self.kernel.get_value(), weight_dtype))

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Float[Array, "*B O"]:
        """Apply to every token."""
        if self.weight_dtype is None and not self.is_by_output:
            return super().__call__(inputs, out_sharding)
        if self.is_by_output:
            y = by_output(inputs, self.kernel.get_value())
            return y if self.bias is None else y + jnp.broadcast_to(self.bias.get_value(), y.shape)
        bias = None if self.bias is None else self.bias.get_value()
        return linear(inputs, self.kernel.get_value(), bias, self.weight_dtype)


def by_output(
    x: Float[Array, "*B I"], kernel: Float[Array, "O I"], dtype: AnyDtype | None = None
) -> Float[Array, "*B O"]:
    """`x @ kernel.T`, in `dtype` or the type of `x`.

    Of 2 to 16 rows, it is computed as `kernel @ x.T`, with weights as the operand that Eigen, XLA's library on CPUs,
    packs faster: in half to two thirds of the time. The barrier keeps XLA from turning the product round again.
    """
    rows, dtype = x.reshape(-1, x.shape[-1]), dtype or x.dtype
    multiply_last = functools.partial(lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    if not 1 < len(rows) <= FEW_ROWS:
        y = multiply_last(rows, kernel, preferred_element_type=dtype)
    else:
        y = lax.optimization_barrier(multiply_last(kernel, rows, preferred_element_type=dtype)).T
    return y.reshape(*x.shape[:-1], -1)


def linear(x: Float[Array, "*B I"], kernel: Any, bias: Array | None, weight_dtype: str | None) -> Float[Array, "*B O"]:
    """A linear map in the data type of `x`; a quantized kernel has the format `weight_dtype`."""
    if weight_dtype is None:
        y = jnp.matmul(x, kernel)
    else:
        y = multiply(x, kernel, dynamic=WEIGHT_FORMATS[weight_dtype].dynamic)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


class Embed(nnx.Embed):
    """Token embeddings `[vocabulary, width]`, in the data type of their outputs, or quantized."""

    def __init__(
        self, size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, weight_dtype: str | None = None
    ) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        super().__init__(size, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.weight_dtype = weight_dtype
        if weight_dtype is not None:
            self.embedding.set_value(quantize_kernel(self.embedding.get_value(), weight_dtype, input_axis=1))

    def __call__(self, inputs: Int32[Array, "*B"], out_sharding: Any = None) -> Float[Array, "*B D"]:
        """Look tokens up."""
        if self.weight_dtype is None:
            return super().__call__(inputs, out_sharding)
        return look_up(self.embedding.get_value(), inputs)
