"""Shared by the Triton kernels: a step of the softmax, products, loads that end with the array, and the launch."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import merge
from pallas_kernels.merge import LN_2, LOG2_E, MASKED, Softmax, add
from pallas_kernels.quantized import Stored, compute_dtype
from pallas_kernels.types import Pools

# Least rows of a matrix product.
MIN_ROWS = 16

# A reference to memory that a kernel reads or writes; Pallas has no public name for its type.
Ref = Any


class Present(NamedTuple):
    """The pools that have a slot; kernels are compiled without the others."""

    full_k: Stored | None
    full_v: Stored | None
    ring_k: Stored | None
    ring_v: Stored | None


def present(pools: Pools | None) -> Present:
    """The pools that have a slot; without pools, none."""
    return Present(*(pool if pool.shape[0] else None for pool in pools.stored)) if pools else Present(*4 * [None])


def accumulate(
    state: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, scale: float
) -> Softmax:
    """Add a tile of keys, to base two; `keep [M, S]` are the keys that each query sees, None if it sees all."""
    compute = compute_dtype(q, k)
    q, k, v = q.astype(compute), k.astype(compute), v.astype(compute)
    scores = dot_t(q, k)
    if keep is not None:
        scores = jnp.where(keep, scores, MASKED)
    return add(
        state, scores, lambda values, weights: values + dot(weights.astype(v.dtype), v), exp2, scale * LOG2_E, fma
    )


def exp2(x: jax.Array) -> jax.Array:
    """Powers of two of float32 numbers; those below 2^-126 are zero, which saves three instructions each."""
    return assembly("ex2.approx.ftz.f32 $0, $1;", jnp.exp2, x)


def fma(a: jax.Array, b: jax.Array | float, c: jax.Array | float) -> jax.Array:
    """`a * b + c` of float32 numbers in one instruction, in the shape of `a`: XLA keeps Triton from fusing them."""
    b, c = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), a.shape) for x in (b, c))
    return assembly("fma.rn.f32 $0, $1, $2, $3;", lambda a, b, c: a * b + c, a, b, c)


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """Float32 numbers rounded to `dtype`, two in one instruction even where the results have several uses."""
    if dtype == jnp.float32:
        return x
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]
    text = f"cvt.rn.{kind}.f32 $0, $2, $1;"
    return assembly(text, lambda x: x.astype(dtype), x, dtype=dtype, pack=2, constraints="=r,r,r")


_INTERPRETED = ContextVar("interpreted", default=False)


def assembly(
    text: str,
    plain: Callable[..., jax.Array],
    *args: jax.Array,
    dtype: Any = jnp.float32,
    pack: int = 1,
    constraints: str | None = None,
) -> jax.Array:
    """PTX for each number of some arrays of one shape, or each `pack` of them; interpreted, `plain(*args)` instead."""
    if _INTERPRETED.get():
        return plain(*args)
    constraints = constraints or ",".join(["=f", *"f" * len(args)])
    out = [jax.ShapeDtypeStruct(args[0].shape, dtype)]
    return plgpu.elementwise_inline_asm(text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=out)[0]


def finish(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """The weighted mean of the values, zero without a key, and the natural logarithm of the sum of the weights."""
    values, log_total = merge.finish(state, jnp.log2)
    return values, log_total * jnp.float32(LN_2)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b`, in float32."""
    return _product(a, b, 1, 0)


def dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b.T`, in float32."""
    return _product(a, b, 1, 1)


def t_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a.T @ b`, in float32."""
    return _product(a, b, 0, 0)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        # The precision of the user's configuration is for XLA, not for kernels.
        precision, axes = lax.Precision.DEFAULT, (((a_axis,), (b_axis,)), ((), ()))
        return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)

    if a.dtype != jnp.float32:
        return product(a, b)
    # A GPU's matrix units round float32 to TF32, which has the mantissa of float16: multiply the part that TF32 keeps,
    # and the rest, in turn. (Exact products, without those units, compile for minutes and need too many registers.)
    (a, a_rest), (b, b_rest) = _halves(a), _halves(b)
    return product(a, b) + (product(a, b_rest) + product(a_rest, b))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The part of float32 numbers that TF32 can represent, and the rest."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFE000)
    most = lax.bitcast_convert_type(bits, jnp.float32)
    return most, x - most


def indices(begin: jax.Array | int, count: int) -> jax.Array:
    """`begin, begin + 1, ...`, int32."""
    return begin + jnp.arange(count, dtype=jnp.int32)


def leading(count: int) -> Any:
    """The first `count` entries of an axis, possibly more than it has: a mask must hide the rest.

    Pallas rejects a constant slice that ends beyond the axis, but not one with a traced start.
    """
    return pl.ds(jnp.int32(0), count)


def width(head_dim: int) -> int:
    """Columns of a tile: Triton's have a power of two, at least 16."""
    return max(MIN_ROWS, pl.next_power_of_2(head_dim))


def load(ref: Ref, rows: jax.Array | None, head_dim: int, zero: float | int = 0.0) -> jax.Array:
    """A tile `[M, width(H)]` of `ref`, zero beyond the head dim and where `rows [M]` is false; None: all rows exist."""
    return plgpu.load(ref, mask=(mask := _mask(ref.shape, rows, head_dim)), other=None if mask is None else zero)


def store(ref: Ref, value: jax.Array, rows: jax.Array, head_dim: int) -> None:
    """Write the rows of a tile `[M, width(H)]` that exist."""
    plgpu.store(ref, value.astype(ref.dtype), mask=_mask(value.shape, rows, head_dim))


def load_row(ref: Ref, exists: jax.Array) -> jax.Array:
    """A vector, zero where `exists` is false."""
    return plgpu.load(ref, mask=exists, other=0.0)


def store_row(ref: Ref, value: jax.Array, exists: jax.Array) -> None:
    """Write the entries of a vector that exist."""
    plgpu.store(ref, value.astype(ref.dtype), mask=exists)


def _mask(shape: tuple[int, ...], rows: jax.Array | None, head_dim: int) -> jax.Array | None:
    columns = None if shape[1] == head_dim else (indices(0, shape[1]) < head_dim)[None, :]
    if rows is None:
        return None if columns is None else jnp.broadcast_to(columns, shape)
    return jnp.broadcast_to(rows[:, None] if columns is None else rows[:, None] & columns, shape)


def call(
    kernel: Callable[..., None],
    out: Any,
    arrays: Any,
    *,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    is_in_place: bool = False,
) -> Any:
    """Run a kernel over a grid: compiled for a GPU, interpreted on a CPU.

    The kernel gets references to whole arrays, in the pytree `arrays`, and to the outputs. If it is to work in place,
    the outputs are the last ones of the arrays.
    """

    def run(*leaves: jax.Array, interpret: bool) -> Any:
        tree = jax.tree.unflatten(structure, leaves)
        params = plgpu.CompilerParams(num_warps=warps, num_stages=stages)

        def traced(*refs: Ref) -> None:
            token = _INTERPRETED.set(interpret)
            try:
                kernel(*refs)
            finally:
                _INTERPRETED.reset(token)

        launch: dict[str, Any] = {"grid": grid, "interpret": interpret, "compiler_params": params}
        if is_in_place:
            count = len(jax.tree.leaves(out))
            launch["input_output_aliases"] = {len(leaves) - count + i: i for i in range(count)}
        return pl.pallas_call(traced, out, **launch, name=_name(kernel))(tree)

    leaves, structure = jax.tree.flatten(arrays)
    return lax.platform_dependent(
        *leaves, cpu=lambda *x: run(*x, interpret=True), default=lambda *x: run(*x, interpret=False)
    )


def _name(kernel: Any) -> str:
    return getattr(kernel, "func", kernel).__name__.strip("_")
