"""Writes linear maps as AutoAWQ, GPTQ, compressed-tensors and DeepSeek store them, number by number from their formats.

Knows nothing of the reader. Each writer gets numbers, scales and zeros, and returns the tensors of a module.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Levels:
    """A linear map: `values = (numbers - zeros) * scales`, all spread over `[out, in]`."""

    numbers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return ((self.numbers.astype(np.float64) - self.zeros) * self.scales.astype(np.float64)).astype(np.float32)


def pack(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Rows of numbers from 0 into words of 32 bits; place i of a word has number `order[i]`."""
    per = 32 // bits
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % per)))
    words = np.zeros((len(padded), padded.shape[1] // per), np.uint32)
    for word in range(words.shape[1]):
        for place in range(per):
            column = per * word + (order[place] if order else place)
            words[:, word] |= padded[:, column].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


@dataclass(frozen=True)
class Case:
    """A way to store a linear map, as a `quantization_config` and tensors.

    Attributes:
        config: its `quantization_config`.
        write: a module's tensors, by the ends of their names.
        weight_dtype: what the reader should make of it; None: dequantized.
        bits: of integers; 0: 8-bit floats.
        group: input channels that share a scale; None: all.
        rows: output channels that share a scale; None: all.
        zeros: the number that stands for 0 where it is fixed, or None for any.
        act_order: whether channels are grouped in another order.
        scale: data type of scales.
    """

    config: dict[str, Any]
    write: Callable[[Levels, "Case"], Tensors]
    weight_dtype: str | None
    bits: int = 4
    group: int | None = 32
    rows: int | None = 1
    zeros: int | None = 0
    act_order: bool = False
    scale: Any = np.float16
    extra: Tensors = field(default_factory=dict)

    def levels(self, out: int, width: int, seed: int) -> Levels:
        """Random ones."""
        rng = np.random.default_rng(seed)
        rows, group = self.rows or out, self.group or width
        grid = -(-out // rows), -(-width // group)
        scales = (rng.uniform(0.5, 1.5, grid) / width**0.5 / (448 if self.bits == 0 else 2**self.bits / 4)).astype(
            self.scale
        )
        index = np.arange(width) // group
        index = rng.permutation(index) if self.act_order else index
        if self.bits == 0:
            numbers = rng.normal(0, 150, (out, width)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            zeros = np.zeros(grid, np.int64)
        else:
            numbers = rng.integers(0, 2**self.bits, (out, width))
            zeros = rng.integers(0, 2**self.bits, grid) if self.zeros is None else np.full(grid, self.zeros)
        spread = np.ix_(np.arange(out) // rows, index)
        return Levels(numbers, scales[spread], zeros[spread], index)

    def grid(self, x: np.ndarray, levels: Levels) -> np.ndarray:
        """Scales or zeros, one for each group and block of rows."""
        first = [int(np.argmax(levels.groups == g)) for g in range(int(levels.groups.max()) + 1)]
        return x[:: self.rows or len(x), first]


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map, awq/modules/linear/gemm.py.


def awq(levels: Levels, case: Case) -> Tensors:
    return {
        "qweight": pack(levels.numbers.T, 4, AWQ_ORDER),
        "qzeros": pack(case.grid(levels.zeros, levels).T, 4, AWQ_ORDER),
        "scales": case.grid(levels.scales, levels).T,
    }


def gptq(levels: Levels, case: Case) -> Tensors:
    zeros = pack(case.grid(levels.zeros, levels).T, case.bits).view(np.uint32)
    if case.config.get("checkpoint_format") != "gptq_v2":  # GPTQModel's convert_gptq_v2_to_v1_format_module.
        zeros = zeros - np.uint32({4: 0x11111111, 8: 0x01010101}[case.bits])
    return {
        "qweight": np.ascontiguousarray(pack(levels.numbers, case.bits).T),
        "qzeros": zeros.view(np.int32),
        "scales": case.grid(levels.scales, levels).T,
        "g_idx": levels.groups.astype(np.int32),
    }


def packed(levels: Levels, case: Case) -> Tensors:
    tensors = {
        "weight_packed": pack(levels.numbers, case.bits),
        "weight_scale": case.grid(levels.scales, levels),
        "weight_shape": np.array(levels.numbers.shape),
    }
    if case.zeros is None:
        zeros = case.grid(levels.zeros, levels)
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(zeros.T, case.bits).T)
    if case.act_order:
        tensors["weight_g_idx"] = levels.groups.astype(np.int32)
    return tensors


def plain(levels: Levels, case: Case) -> Tensors:
    scales = case.grid(levels.scales, levels)
    tensors = {
        "weight": levels.numbers if case.bits == 0 else (levels.numbers - 128).astype(np.int8),
        "weight_scale": scales.reshape(1) if case.rows is None else scales,
    }
    if case.zeros is None:
        tensors["weight_zero_point"] = (case.grid(levels.zeros, levels) - 128).astype(np.int8)
    return tensors | case.extra


def deepseek(levels: Levels, case: Case) -> Tensors:
    scales = case.grid(levels.scales, levels)
    return {"weight": levels.numbers, "weight_scale_inv": scales.reshape(()) if case.rows is None else scales}


def compressed(form: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    """A configuration as llm-compressor writes it."""
    defaults = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None, "group_size": None}
    settings = {"targets": ["Linear"], "weights": defaults | weights, "input_activations": None} | group
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": settings},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def awq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | changes


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True} | changes


BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float"}
GROUPS: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32}
CASES: dict[str, Case] = {
    "awq": Case(awq_config(), awq, "int4-32-asym", zeros=None),
    "awq, symmetric": Case(awq_config(zero_point=False), awq, "int4-32", zeros=8),
    "gptq": Case(gptq_config(), gptq, "int4-32", zeros=8),
    "gptq, zeros": Case(gptq_config(sym=False), gptq, "int4-32-asym", zeros=None),
    "gptq v2, zeros": Case(gptq_config(sym=False, checkpoint_format="gptq_v2"), gptq, "int4-32-asym", zeros=None),
    "gptq, act-order": Case(gptq_config(desc_act=True), gptq, None, zeros=8, act_order=True),
    "gptq, one group": Case(gptq_config(group_size=-1, desc_act=True), gptq, "int4-32", group=None, zeros=8),
    "gptq, 8 bits": Case(gptq_config(bits=8, group_size=-1), gptq, "int8", bits=8, group=None, zeros=128),
    "gptq, 8 bits in groups": Case(gptq_config(bits=8), gptq, None, bits=8, zeros=128),
    "w4a16": Case(compressed("pack-quantized", GROUPS), packed, "int4-32", zeros=8, scale=ml_dtypes.bfloat16),
    "w4a16, zeros": Case(
        compressed("pack-quantized", GROUPS | {"symmetric": False}), packed, "int4-32-asym", zeros=None
    ),
    "w4a16, act-order": Case(
        compressed("pack-quantized", GROUPS | {"actorder": "group"}), packed, None, zeros=8, act_order=True
    ),
    "w4a16, static act-order": Case(
        compressed("pack-quantized", GROUPS | {"actorder": "weight"}), packed, "int4-32", zeros=8
    ),
    "w4a16, channels": Case(
        compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}), packed, "int4-32", group=None, zeros=8
    ),
    "w8a16": Case(
        compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"}), packed, "int8", 8, None, zeros=128
    ),
    "w8a8": Case(
        compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, input_activations=BY_TOKEN),
        *(plain, "w8a8", 8, None),
        zeros=128,
    ),
    "w8a8, zeros": Case(
        compressed("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        *(plain, None, 8, None),
        zeros=None,
    ),
    "fp8, channels": Case(
        compressed("float-quantized", FP8 | {"strategy": "channel"}, input_activations=BY_TOKEN | {"type": "float"}),
        *(plain, "fp8", 0, None),
        scale=ml_dtypes.bfloat16,
    ),
    "fp8, one scale": Case(
        compressed("naive-quantized", FP8 | {"strategy": "tensor"}, input_activations=STATIC),
        *(plain, "fp8", 0, None, None),
        scale=np.float32,
        extra={"input_scale": np.ones(1, np.float32)},
    ),
    "fp8, blocks": Case(
        compressed("float-quantized", FP8 | {"strategy": "block", "block_structure": [16, 32]}),
        *(plain, None, 0, 32, 16),
        scale=np.float32,
    ),
    "deepseek": Case(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        *(deepseek, "fp8-128", 0, 128, 128),
        scale=np.float32,
    ),
    "deepseek, one scale": Case({"quant_method": "fp8"}, deepseek, "fp8", 0, None, None, scale=np.float32),
}


def is_linear(name: str) -> bool:
    return bool(re.search(r"(_proj|\.w[123])\.weight$", name))


def write_folder(folder: Path, case: Case, source: Path, *, keep: Callable[[str], bool] = lambda name: False) -> Path:
    """A quantized folder, and next to it `twin` with its values in float32; what `keep` names is not quantized."""
    config = json.loads((source / "config.json").read_text())
    plain_tensors = load_file(source / "model.safetensors")
    layers = config["num_hidden_layers"]
    stored, values = {}, {}
    for seed, (name, x) in enumerate(sorted(plain_tensors.items())):
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= layers:
            continue
        values[name] = stored[name] = x
        if is_linear(name) and not keep(name):
            levels = case.levels(len(x), x.shape[1], seed)
            values[name] = levels.values
            del stored[name]
            for end, tensor in case.write(levels, case).items():
                stored[name.removesuffix("weight") + end] = np.ascontiguousarray(tensor)
    twin = folder.parent / "twin"
    for path, tensors, extra in ((folder, stored, {"quantization_config": case.config}), (twin, values, {})):
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | extra))
    return folder
