"""A checkpoint's `quantization_config`: which linear maps are stored in few bits, and how. Knows no files, no arrays.

A method is a row of `METHODS`. What it does not name is refused: read in another way, weights would be silently wrong.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from duo_jax.families.quantization_settings import Settings, block, named
from duo_jax.model.weights import WEIGHT_FORMATS

MXFP4 = "mxfp4"
# Keys under which configurations have it; the second is that of the first versions of compressed-tensors.
KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Coding:
    """How a linear map `[out, in]` is stored: `(number - zero) * scale`."""

    layout: Literal["awq", "gptq", "packed", "plain"]
    """Tensors of a module, see `checkpoint.stored`."""
    bits: int
    group: int | None
    """Input channels that share a scale; None: all of them."""
    rows: int | None = 1
    """Output channels that share a scale; None: all of them."""
    is_float: bool = False
    """Whether numbers are 8-bit floats (E4M3), or else integers."""
    has_zeros: bool = False
    """Whether each scale has a number that stands for 0; without, it is the middle of the range."""
    act_order: bool = False
    """Whether input channels are grouped in the order of their activations: each has the index of its group."""
    zero_shift: int = 0
    """What was subtracted from the numbers that stand for 0 before they were packed."""

    def fits(self, weight_dtype: str) -> bool:
        """Whether a name of `WEIGHT_FORMATS` represents the same values."""
        how = WEIGHT_FORMATS[weight_dtype]
        same = how.qtype == ("float8_e4m3fn" if self.is_float else f"int{self.bits}")
        divides = self.group is None or (how.group is not None and self.group % how.group == 0)
        return same and divides and how.has_zeros == self.has_zeros and not self.act_order

    def __str__(self) -> str:
        """In words."""
        kind = f"{self.bits}-bit {'floats' if self.is_float else 'integers'}"
        shared = "one scale" if self.rows is None else "a scale for each output channel"
        if self.group is not None:
            shared = f"groups of {self.group}" if self.rows == 1 else f"blocks of {self.rows} x {self.group}"
        ends = [name for name, on in (("zero points", self.has_zeros), ("act-order", self.act_order)) if on]
        return ", ".join([kind, shared, *ends])


@dataclass(frozen=True)
class StoredFormat:
    """The quantized linear maps of a checkpoint.

    Attributes:
        label: the method's name.
        coding: how they are stored.
        quantizes: whether a module is one of them, by its name.
        multiplies_integers: whether activations are quantized too, as by `w8a8`.
        unused: what the checkpoint has beyond weights, and this library does not use.
    """

    label: str
    coding: Coding
    quantizes: Callable[[str], bool]
    multiplies_integers: bool = False
    unused: tuple[str, ...] = ()

    def weight_dtype(self, widths: Iterable[int]) -> str | None:
        """The name of `WEIGHT_FORMATS` for linear maps with `widths` input channels; None: their values have none."""
        sizes = set(widths)
        fitting = [
            (how.group is None, how.group or 0, name)
            for name, how in WEIGHT_FORMATS.items()
            if self.coding.fits(name)
            and how.dynamic == self.multiplies_integers
            and not any(width % (how.group or 1) for width in sizes)
        ]
        return max(fitting)[-1] if fitting else None

    def __str__(self) -> str:
        """In words."""
        return f"{self.label}: {self.coding}"


def stored_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """The format that a Hugging Face configuration names; None: weights are not quantized.

    Raises:
        NotImplementedError: a method, or a variant of one, that is not read, by name.
        ValueError: a value of a wrong type or range.
    """
    values = next((config[key] for key in KEYS if config.get(key)), None)
    if values is None:
        return None
    method = values.get("quant_method", "unknown") if isinstance(values, Mapping) else "unknown"
    if method == "unknown" and isinstance(values, Mapping) and "config_groups" in values:
        method = "compressed-tensors"
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":
        return None  # Only experts, which the names of their tensors tell.
    if not isinstance(method, str) or method not in METHODS:
        raise NotImplementedError(
            f"this model uses weights quantized by {method!r:.60}, which is not supported: those of "
            f"{', '.join((*METHODS, MXFP4))} are read, and GGUF files"
        )
    try:
        return METHODS[method](Settings(method, values))
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None


def _in_layers(module: str) -> bool:
    return "layers." in module


def _awq(settings: Settings) -> StoredFormat:
    """AutoAWQ's GEMM layout. It only quantizes modules of layers, and leaves out those whose names have a key."""
    bits = settings.bits("bits", "w_bit", among=(4,), default=4)
    settings.word("version", "gemm", ("gemm",))
    left_out = settings.names("modules_to_not_convert")
    group, has_zeros = settings.group("group_size", "q_group_size", default=128), settings.flag("zero_point", True)
    return StoredFormat(
        "AWQ",
        Coding("awq", bits, group, has_zeros=has_zeros),
        lambda module: _in_layers(module) and not any(key in module for key in left_out),
    )


def _gptq(settings: Settings) -> StoredFormat:
    """AutoGPTQ's layout, in which numbers that stand for 0 are stored less 1, or GPTQModel's v2, without that."""
    bits = settings.bits("bits", among=(4, 8))
    key = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
    version = settings.word(key, "gptq", ("gptq", "gptq_v2"))
    settings.refuse("is_marlin_format", unless=not settings.get("is_marlin_format"))
    changed = settings.part("dynamic")
    kept = [name for name in changed.values if name.startswith("-:")] if changed else []
    settings.refuse("dynamic settings of modules", unless=changed is None or len(kept) == len(changed.values))
    left_out = named(settings, "dynamic", ["re:" + name.removeprefix("-:") for name in kept])
    blocks = settings.get("modules_in_block_to_quantize", [])
    settings.refuse("modules_in_block_to_quantize", unless=isinstance(blocks, list))
    only = tuple(str(name) for block in blocks for name in (block if isinstance(block, list) else [block]))
    with_head = settings.flag("lm_head", False)
    group = settings.group("group_size", default=128)

    def quantizes(module: str) -> bool:
        if not _in_layers(module):
            return with_head and module == "lm_head"
        return (not only or module.endswith(only)) and not left_out(module)

    coding = Coding(
        "gptq",
        bits,
        group,
        has_zeros=not settings.flag("sym", True),
        # Of one group, or where groups were made before, the order of channels does not matter.
        act_order=settings.flag("desc_act", False) and group is not None and not settings.flag("static_groups", False),
        zero_shift=int(version == "gptq"),
    )
    return StoredFormat("GPTQ", coding, quantizes)


def _fp8(settings: Settings) -> StoredFormat:
    """DeepSeek's: E4M3 with a float32 scale for each block of weights, or for all; the head is not quantized."""
    settings.word("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    settings.word("expert_dtype", "fp8", ("fp8",))
    settings.refuse("modules_to_convert", unless=not settings.get("modules_to_convert"))
    settings.word("activation_scheme", "dynamic", ("dynamic", "static"))
    key = "modules_to_not_convert" if settings.get("modules_to_not_convert") is not None else "ignored_layers"
    left_out = named(settings, key, settings.names(key), by_part=True)
    rows, group = block(settings, "weight_block_size")
    return StoredFormat(
        "FP8",
        Coding("plain", 8, group, rows, is_float=True),
        lambda module: _in_layers(module) and not left_out(module),
        unused=("quantized activations",),
    )


# Formats of compressed-tensors: where numbers are, and their type.
COMPRESSED: dict[str, tuple[Literal["packed", "plain"], str | None]] = {
    "pack-quantized": ("packed", "int"),
    "int-quantized": ("plain", "int"),
    "float-quantized": ("plain", "float"),
    "naive-quantized": ("plain", None),
}


# Activations as `w8a8` quantizes them.
BY_TOKEN = {"num_bits": 8, "type": "int", "dynamic": True, "symmetric": True, "strategy": "token"}


def _compressed(settings: Settings) -> StoredFormat:
    """compressed-tensors, with one group of modules."""
    for key, off in (("sparsity_config", "dense"), ("transform_config", None)):
        inner = settings.part(key)
        active = inner is not None and any(inner.values.values()) and inner.get("format", "") != off
        settings.refuse(key, unless=not active)
    groups = settings.part("config_groups")
    settings.refuse("no or several config_groups", unless=groups is not None and len(groups.values) == 1)
    assert groups is not None
    group = groups.part(next(iter(groups.values)))
    weights = group and group.part("weights")
    if group is None or weights is None:
        raise ValueError("config_groups has no weights")
    coding = _compressed_coding(weights, group if group.get("format") is not None else settings)
    targets = group.names("targets")
    others = [name for name in targets if name != "Linear" and not name.startswith("re:") and "." not in name]
    group.refuse(f"targets {others!s:.60}", unless=bool(targets) and not others)
    chosen, left_out = named(group, "targets", targets), named(settings, "ignore", settings.names("ignore"))
    inputs = group.part("input_activations")
    by_token = inputs is not None and all(inputs.get(key) == value for key, value in BY_TOKEN.items())
    dynamic = by_token and coding == Coding(coding.layout, 8, None, coding.rows)
    used = {
        "quantized activations": inputs is not None and not dynamic,
        "quantized outputs": group.get("output_activations"),
        "a quantized KV cache": settings.get("kv_cache_scheme"),
    }
    return StoredFormat(
        "compressed-tensors",
        coding,
        lambda module: ("Linear" in targets or chosen(module)) and not left_out(module),
        multiplies_integers=dynamic,
        unused=tuple(name for name, on in used.items() if on),
    )


def _compressed_coding(weights: Settings, source: Settings) -> Coding:
    """How compressed-tensors stores the weights of a group of modules, whose format `source` has."""
    layout, expected = COMPRESSED[source.word("format", "unknown", tuple(COMPRESSED))]
    kind = weights.word("type", "int", ("int", "float") if expected is None else (expected,))
    bits = weights.bits("num_bits", among=(4, 8) if layout == "packed" else (8,), default=8)
    size = weights.group("group_size")
    strategy = weights.word("strategy", "channel" if size is None else "group", ("tensor", "channel", "group", "block"))
    if (strategy == "group") != (size is not None):
        raise ValueError(f"{weights.inside}strategy is {strategy!r}, which contradicts group_size {size or -1}")
    rows: int | None = None if strategy == "tensor" else 1
    if strategy == "block":
        rows, size = block(weights, "block_structure")
    weights.refuse("dynamic scales", unless=not weights.get("dynamic"))
    # With "weight" or "static", channels are in groups as they are in the tensor.
    order = weights.get("actorder", False)
    if not isinstance(order, bool):
        order = weights.word("actorder", "weight", ("weight", "static", "group", "dynamic")) in ("group", "dynamic")
    symmetric = weights.flag("symmetric", True)
    weights.refuse("floats with zero points", unless=symmetric or kind == "int")
    return Coding(
        layout,
        bits,
        size,
        rows,
        is_float=kind == "float",
        has_zeros=not symmetric,
        act_order=order and size is not None,
    )


METHODS: Mapping[str, Callable[[Settings], StoredFormat]] = {
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "gptq": _gptq,
}
