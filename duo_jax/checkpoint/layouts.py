"""The tensors of a linear map in few bits, as other libraries store them, and what they mean. Knows no files.

A layout is a row of `LAYOUTS`: the tensors of a module, and how they become numbers, scales and zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from duo_jax.families.quantization import Coding

Arrays = Mapping[str, Any]
Shape = tuple[int, ...]
# Data types by safetensors' names.
NUMBERS, INTEGERS, SCALES = ("I32", "I8", "F8_E4M3"), ("I32", "I64"), ("F32", "BF16", "F16", "F8_E8M0")
WORD = 32


@dataclass(frozen=True)
class Part:
    """A tensor of a module.

    Attributes:
        names: what it may be called, after the module's name and a dot.
        shapes: those that it may have.
        dtypes: its data types by safetensors' names.
        optional: whether it may be missing.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """A layout of the tensors of a module.

    Attributes:
        parts: the tensors of a linear map `[out, in]`, by what they are: numbers, scales, zeros, groups, shape.
        levels: numbers `[out, in]` and zeros `[out, groups]` as signed integers, and scales `[out, groups]`.
    """

    parts: Callable[[Coding, int, int], dict[str, Part]]
    levels: Callable[[Coding, Arrays, int, int], tuple[Array, Array, Array | None]]


def group_count(coding: Coding, width: int) -> int:
    """Groups of input channels."""
    return 1 if coding.group is None else -(-width // coding.group)


def _signed(numbers: Array, bits: int) -> Array:
    """Numbers from 0 as signed integers: less half of their range."""
    return (numbers.astype(jnp.int32) - 2 ** (bits - 1)).astype(jnp.int8)


def _unpacked(words: Shaped[Array | np.ndarray, "n m"], bits: int, axis: int, order: tuple[int, ...] = ()) -> Array:
    """Numbers that are packed along an axis into words of 32 bits, the first in the lowest bits, or in an order."""
    places = jnp.array(order or range(WORD // bits), jnp.uint32) * bits
    wide = jnp.expand_dims(jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.uint32), axis + 1)
    shape = tuple(len(places) if dim == axis + 1 else 1 for dim in range(3))
    full = tuple(max(pair) for pair in zip(wide.shape, shape, strict=True))
    shifted = jnp.broadcast_to(wide, full) >> jnp.broadcast_to(places.reshape(shape), full)
    joined = (*words.shape[:axis], -1, *words.shape[axis + 1 :])
    return (shifted & jnp.uint32(2**bits - 1)).reshape(joined)


# Column 8c + i of a matrix is in word c at the bits from 4 * AWQ_ORDER[i] on: AutoAWQ packs columns 0, 2, 4, 6, 1, ...
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def _awq_parts(coding: Coding, out: int, width: int) -> dict[str, Part]:
    groups, per = group_count(coding, width), WORD // coding.bits
    return {
        "numbers": Part(("qweight",), ((width, out // per),), ("I32",)),
        "zeros": Part(("qzeros",), ((groups, out // per),), ("I32",)),
        "scales": Part(("scales",), ((groups, out),), SCALES),
    }


def _awq_levels(coding: Coding, arrays: Arrays, out: int, width: int) -> tuple[Array, Array, Array | None]:
    words = arrays["numbers"], arrays.get("zeros")
    numbers, zeros = (
        None if x is None else _signed(_unpacked(x, coding.bits, 1, AWQ_ORDER).T, coding.bits) for x in words
    )
    assert numbers is not None
    return numbers, arrays["scales"].T, zeros


def _gptq_parts(coding: Coding, out: int, width: int) -> dict[str, Part]:
    groups, per = group_count(coding, width), WORD // coding.bits
    return {
        "numbers": Part(("qweight",), ((width // per, out),), ("I32",)),
        "zeros": Part(("qzeros",), ((groups, out // per),), ("I32",)),
        "scales": Part(("scales",), ((groups, out),), SCALES),
        "groups": Part(("g_idx",), ((width,),), INTEGERS, optional=not coding.act_order),
    }


def _gptq_levels(coding: Coding, arrays: Arrays, out: int, width: int) -> tuple[Array, Array, Array | None]:
    zeros = arrays.get("zeros")
    if zeros is not None:
        # Added to whole words, as GPTQModel does, which subtracts it from whole words: a 0 borrows from its neighbour.
        ones = coding.zero_shift * sum(1 << place for place in range(0, WORD, coding.bits))
        words = jax.lax.bitcast_convert_type(zeros, jnp.uint32) + jnp.uint32(ones)
        zeros = _signed(_unpacked(words, coding.bits, 1).T, coding.bits)
    return _signed(_unpacked(arrays["numbers"], coding.bits, 0).T, coding.bits), arrays["scales"].T, zeros


def _scale_shapes(coding: Coding, out: int, width: int) -> tuple[Shape, ...]:
    groups = group_count(coding, width)
    if coding.rows is None:
        return (1,), (), (1, 1)
    rows = -(-out // coding.rows)
    return ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)


def _packed_parts(coding: Coding, out: int, width: int) -> dict[str, Part]:
    per, shapes = WORD // coding.bits, _scale_shapes(coding, out, width)
    parts = {
        "numbers": Part(("weight_packed",), ((out, -(-width // per)),), ("I32",)),
        "scales": Part(("weight_scale",), shapes, SCALES),
        "shape": Part(("weight_shape",), ((2,),), INTEGERS, optional=True),
        "groups": Part(("weight_g_idx",), ((width,),), INTEGERS, optional=not coding.act_order),
    }
    if coding.has_zeros:
        # Packed along rows; the first versions did not pack them.
        packed = (-(-shapes[0][0] // per), *shapes[0][1:])
        parts["zeros"] = Part(("weight_zero_point",), (packed, *shapes), ("I32", "I8"))
    return parts


def _packed_levels(coding: Coding, arrays: Arrays, out: int, width: int) -> tuple[Array, Array, Array | None]:
    numbers = _signed(_unpacked(arrays["numbers"], coding.bits, 1)[:, :width], coding.bits)
    scales, zeros = _by_rows(coding, arrays["scales"], out), arrays.get("zeros")
    if zeros is not None and zeros.dtype == jnp.int32:
        whole = zeros.reshape(zeros.shape[0], -1)
        zeros = _signed(_unpacked(whole, coding.bits, 0)[: scales.shape[0]], coding.bits)
    return numbers, scales, None if zeros is None else _by_rows(coding, zeros, out)


def _plain_parts(coding: Coding, out: int, width: int) -> dict[str, Part]:
    shapes = _scale_shapes(coding, out, width)
    parts = {
        "numbers": Part(("weight",), ((out, width),), ("F8_E4M3" if coding.is_float else "I8",)),
        "scales": Part(("weight_scale", "weight_scale_inv"), shapes, SCALES),
        "groups": Part(("weight_g_idx",), ((width,),), INTEGERS, optional=not coding.act_order),
    }
    return parts | ({"zeros": Part(("weight_zero_point",), shapes, ("I8",))} if coding.has_zeros else {})


def _plain_levels(coding: Coding, arrays: Arrays, out: int, width: int) -> tuple[Array, Array, Array | None]:
    zeros = arrays.get("zeros")
    scales = _by_rows(coding, arrays["scales"], out)
    return arrays["numbers"], scales, None if zeros is None else _by_rows(coding, zeros, out)


def _by_rows(coding: Coding, x: Array, out: int) -> Array:
    """Scales or zeros `[out, groups]`, of one for each output channel, for each block of them, or for all."""
    if coding.rows is None:
        return jnp.broadcast_to(x.reshape(1, 1), (out, 1))
    whole = x.reshape(x.shape[0], -1)
    return whole if coding.rows == 1 else jnp.repeat(whole, coding.rows, axis=0)[:out]


LAYOUTS: Mapping[str, Layout] = {
    "awq": Layout(_awq_parts, _awq_levels),
    "gptq": Layout(_gptq_parts, _gptq_levels),
    "packed": Layout(_packed_parts, _packed_levels),
    "plain": Layout(_plain_parts, _plain_levels),
}
# Tensors of modules that are not used: scales of activations and of a KV cache.
UNUSED = (
    *(f".{what}_{kind}" for what in ("input", "output") for kind in ("scale", "zero_point", "global_scale")),
    *(".activation_scale", ".q_scale", ".k_scale", ".v_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point"),
)


def check_groups(coding: Coding, modules: Mapping[str, tuple[int, int]]) -> None:
    """Check that groups divide the input channels of modules `[out, in]`; blocks of weights may end within one.

    Raises:
        ValueError: they do not, or the channels do not fill whole words.
    """
    for module, (out, width) in modules.items():
        if coding.group is not None and coding.rows == 1 and width % coding.group:
            raise ValueError(
                f"quantization_config has groups of {coding.group} input channels, which do not divide the {width} of "
                f"{module}"
            )
        packed = {"awq": (out,), "gptq": (out, width)}.get(coding.layout, ())
        if any(size % (WORD // coding.bits) for size in packed):
            raise ValueError(
                f"quantization_config packs {WORD // coding.bits} numbers into a word, which do not divide the "
                f"{out} x {width} of {module}"
            )
