"""Linear maps of other libraries' checkpoints, on their way into this library's formats. Knows no files.

Where a format of `WEIGHT_FORMATS` represents the same values, its kernel gets them bit for bit; otherwise they are
dequantized.
"""

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from duo_jax.arrays import Shards, first_names
from duo_jax.checkpoint.layouts import LAYOUTS, NUMBERS, WORD, Shape, check_groups, group_count
from duo_jax.families.quantization import Coding, StoredFormat
from duo_jax.model.config import ModelConfig
from duo_jax.model.weights import WEIGHT_FORMATS

if TYPE_CHECKING:
    import qwix  # imported when weights are quantized


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["coding", "shape"])
@dataclass(frozen=True)
class Packed:
    """A linear map `[out, in]` as it is stored.

    Attributes:
        arrays: its tensors, by what they are in its layout.
        coding: how it is stored (static).
        shape: of its values (static).
    """

    arrays: dict[str, Any]
    coding: Coding
    shape: Shape

    def values(self) -> Float32[Array, "n m"]:
        """The dequantized map."""
        width = self.shape[1]
        numbers, scales, zeros = self._levels()
        if "groups" in self.arrays:
            index: Int32[Array, " m"] = jnp.asarray(self.arrays["groups"]).astype(jnp.int32)
        else:
            index = jnp.arange(width, dtype=jnp.int32) // (self.coding.group or width)
        wide = numbers.astype(jnp.float32)
        wide = wide if zeros is None else wide - zeros[:, index].astype(jnp.float32)
        return wide * scales[:, index].astype(jnp.float32)

    def kernel(self, weight_dtype: str, dtype: jnp.dtype) -> "qwix.QArray":
        """The same values in a format that fits them, `[out, in]`; scales have `dtype`, or the format's data type."""
        import qwix

        how, width = WEIGHT_FORMATS[weight_dtype], self.shape[1]
        numbers, scales, zeros = self._levels()
        repeats = (1 if how.group is None else width // how.group) // scales.shape[1]
        scales = jnp.repeat(scales, repeats, axis=1).astype(how.scale_dtype or dtype)
        if zeros is not None and how.has_zeros:
            zeros = jnp.repeat(zeros, repeats, axis=1).astype(how.qtype)
        return qwix.QArray(numbers.astype(how.qtype), scales, zeros if how.has_zeros else None)

    def _levels(self) -> tuple[Array, Array, Array | None]:
        arrays = {name: jnp.asarray(x) for name, x in self.arrays.items()}
        return LAYOUTS[self.coding.layout].levels(self.coding, arrays, *self.shape)


def checked(module: str, arrays: dict[str, np.ndarray], coding: Coding, shape: Shape) -> Packed:
    """The stored tensors of a module, once those that say how the others are stored were compared with its coding.

    Raises:
        ValueError: groups of input channels in an order that the configuration does not have, zeros of numbers that
            should be symmetric, or the shape of another tensor.
    """
    width, kept = shape[1], dict(arrays)
    if "shape" in kept and tuple(found := kept.pop("shape").tolist()) != shape:
        raise ValueError(f"{module}.weight_shape is {found}, and its configuration has {list(shape)}")
    if (index := kept.get("groups")) is not None:
        count = group_count(coding, width)
        if index.min() < 0 or index.max() >= count:
            raise ValueError(
                f"{module} has input channels in group {index.min()} to {index.max()} of {count}, counted from 0: its "
                "g_idx is damaged; download the folder again"
            )
        kept["groups"] = index.astype(np.int32)
        if not coding.act_order:
            if not np.array_equal(index, np.arange(width) // (coding.group or width)):
                raise ValueError(
                    f"{module} has input channels in the order of their activations, but its quantization_config says "
                    "that they are in order (desc_act, actorder)"
                )
            del kept["groups"]
    if kept["scales"].dtype.name == "float8_e8m0fnu":  # XLA has few operations on them.
        kept["scales"] = kept["scales"].astype(np.float32)
    if "zeros" in kept and not coding.has_zeros:
        # Every number is half of the range, less the shift.
        number = 2 ** (coding.bits - 1) - coding.zero_shift
        word = np.array(sum(number << place for place in range(0, WORD, coding.bits)), np.uint32).view(np.int32)
        if (kept.pop("zeros") != word).any():
            raise ValueError(f"{module} has zero points, but its quantization_config says that numbers are symmetric")
    return Packed(kept, coding, shape)


def with_format(
    config: ModelConfig, stored: StoredFormat, maps: Mapping[str, Mapping[str, tuple[int, int]]]
) -> ModelConfig:
    """A configuration with the `weight_dtype` that has the values of a checkpoint; None if no format has.

    Layers are alike in a decoder: a linear map that is quantized in some layers only is dequantized in all.

    Args:
        config: the model's.
        stored: the checkpoint's format.
        maps: modules of each linear map, as in `linear_maps`.

    Raises:
        ValueError: groups that do not divide the channels of a quantized module.
    """
    quantized = {name: [module for module in modules if stored.quantizes(module)] for name, modules in maps.items()}
    shapes = {module: maps[name][module] for name, modules in quantized.items() for module in modules}
    check_groups(stored.coding, shapes)
    if not shapes or any(len(found) not in (0, len(maps[name])) for name, found in quantized.items()):
        return config
    left_out = tuple(name for name in config.map_widths if not quantized.get(name))
    weight_dtype = stored.weight_dtype([width for _, width in shapes.values()])
    return replace(config, weight_dtype=weight_dtype, unquantized=left_out)


def parts_of(
    stored: StoredFormat,
    shapes: Mapping[str, Shape],
    names: Mapping[str, str],
    shards: Shards,
    always: Container[str],
) -> dict[str, dict[str, str]]:
    """Quantized tensors by name, each with the arrays that it is made of, by what they are in their layout.

    Args:
        stored: the checkpoint's format.
        shapes: of the tensors that may be quantized.
        names: the model's names of arrays -> those in the shards.
        shards: the checkpoint's.
        always: modules for which the format's word is final. Whether another one, such as a router or the head, is
            quantized shows in its tensors, as many quantizers leave such modules out without recording it.

    Raises:
        ValueError: with those that are missing, and those of another shape or data type.
    """
    tensors: dict[str, dict[str, str]] = {}
    missing, wrong = [], []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        is_plain = module not in always and shards.dtypes.get(names.get(name, "")) not in (*NUMBERS, None)
        if is_plain or not stored.quantizes(module):
            continue
        tensors[name] = {}
        for what, part in LAYOUTS[stored.coding.layout].parts(stored.coding, *shape).items():
            found = [names[f"{module}.{end}"] for end in part.names if f"{module}.{end}" in names]
            if found:
                tensors[name][what] = found[0]
                kind = shards.shapes[found[0]], shards.dtypes[found[0]]
                if kind[0] not in part.shapes or kind[1] not in part.dtypes:
                    wrong.append(
                        f"{found[0]} {kind[0]} {kind[1]} instead of {part.shapes[0]} {' or '.join(part.dtypes)}"
                    )
            elif not part.optional:
                missing.append(f"{module}.{part.names[0]}")
    problems = {"missing": missing, "of the wrong shape or type": wrong}
    lists = [f"{kind} ({len(names)}): {first_names(names)}" for kind, names in problems.items() if names]
    if lists:
        raise ValueError(f"the tensors do not match its quantization_config ({stored}): {'; '.join(lists)}")
    return tensors
