"""Quantized checkpoints of other libraries: their values, and what is refused before weights are read."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from duo_jax import Model, ModelConfig, generate, load_model, make_mesh, save_model
from duo_jax.arrays import Shards
from duo_jax.checkpoint.layouts import LAYOUTS
from duo_jax.checkpoint.mxfp4 import mxfp4_values
from duo_jax.checkpoint.open import open_config
from duo_jax.checkpoint.stored import checked
from duo_jax.checkpoint.weight_table import weight_table
from duo_jax.families.quantization import stored_format
from duo_jax.plan import weight_bytes
from tests.quantized_formats import CASES, awq_config, compressed, gptq_config, is_linear, write_folder
from tests.shapes import FAMILIES, GOLDEN
from tests.test_checkpoint import PEAK, SMALL, random_tensors, save_folder
from tests.text_models import Result, make_model

CORE = ("awq", "gptq, zeros", "w4a16", "fp8, channels")
each_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CORE else pytest.mark.full_matrix) for name in CASES]
)


def plain_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The specification, number by number, in float64."""
    out = []
    for data, exponent in zip(blocks.reshape(-1, 16), scales.ravel(), strict=True):
        for nibble in (x for byte in data.tolist() for x in (byte & 15, byte >> 4)):
            power, mantissa = nibble >> 1 & 3, nibble & 1
            size = (1 + mantissa / 2) * 2.0 ** (power - 1) if power else mantissa / 2
            out.append((-size if nibble & 8 else size) * 2.0 ** (int(exponent) - 127))
    return np.array(out).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_dequantized_exactly(dtype: str) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 4, 16)).astype(np.uint8)
    scales = rng.integers(100, 140, (2, 3, 4)).astype(np.uint8)
    values = mxfp4_values(blocks, scales, dtype=jnp.dtype(dtype))
    assert values.dtype == dtype and values.shape == (2, 3, 128)
    np.testing.assert_array_equal(np.asarray(values, np.float64), plain_mxfp4(blocks, scales))


def test_the_scales_of_mxfp4_reach_from_tiny_to_nan() -> None:
    ones = np.full((4, 16), 0x22, np.uint8)  # Two times 1.0 in every byte.
    values = mxfp4_values(ones, np.array([1, 127, 254, 255], np.uint8), dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(values[::32], np.array([2.0**-126, 1, 2.0**127, np.nan], np.float32))


@each_case
def test_a_linear_map_is_read_bit_for_bit(name: str) -> None:
    case, out, width = CASES[name], 272, 256  # More than two blocks of rows, the last one not whole.
    found = stored_format({"quantization_config": case.config})
    assert found is not None
    module = "model.layers.0.mlp.up_proj"
    assert found.quantizes(module) and not found.quantizes("lm_head")
    levels = case.levels(out, width, seed=1)
    tensors = case.write(levels, case)
    parts = LAYOUTS[found.coding.layout].parts(found.coding, out, width)
    arrays = {what: tensors[end] for what, part in parts.items() for end in part.names if end in tensors}
    packed = checked(module, arrays, found.coding, (out, width))
    np.testing.assert_array_equal(jax.jit(lambda x: x.values())(packed), levels.values)
    widest = found.weight_dtype([width])
    assert widest == (case.weight_dtype if case.group or case.weight_dtype != "int4-32" else "int4-128")
    if widest is not None:
        kernel = jax.jit(lambda x: x.kernel(widest, jnp.dtype("float32")))(packed)
        with jax.numpy_dtype_promotion("standard"):
            np.testing.assert_array_equal(qwix.dequantize(kernel), levels.values)


def golden_maps() -> dict[str, tuple[dict, dict[str, np.ndarray]]]:
    """Configuration and tensors of each linear map that another library stored, see golden/quantized/make.py."""
    shards = Shards([GOLDEN / "quantized" / "linear.safetensors"])
    with safe_open(shards.files[0], framework="numpy") as file:
        configs = file.metadata()
    return {
        name: (
            json.loads(config),
            {key.split("/")[1]: shards.read(key) for key in shards.shapes if key.startswith(f"{name}/")},
        )
        for name, config in configs.items()
    }


def test_the_values_are_those_that_other_libraries_read() -> None:
    packed, expected, exact = {}, {}, set()
    for name, (config, tensors) in golden_maps().items():
        found = stored_format({"quantization_config": config})
        assert found is not None
        expected[name], coding = tensors.pop("values"), found.coding
        parts = LAYOUTS[coding.layout].parts(coding, *expected[name].shape)
        arrays = {what: tensors[end] for what, part in parts.items() for end in part.names if end in tensors}
        assert len(arrays) == len(tensors), name
        packed[name] = checked("x", arrays, coding, expected[name].shape)
        exact.add(found.weight_dtype([expected[name].shape[1]]))
    assert exact == {"int4-32", "int4-32-asym", "int4", "int8", "fp8", None}
    values = jax.jit(lambda maps: {name: each.values() for name, each in maps.items()})(packed)
    for name, found in values.items():  # AutoAWQ multiplies in float16.
        np.testing.assert_array_equal(np.asarray(found).astype(expected[name].dtype), expected[name], err_msg=name)


# Models.


def values(model: Model) -> list[np.ndarray]:
    """All parameters, dequantized, in float32."""
    found = []
    for x in jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, qwix.QArray)):
        with jax.numpy_dtype_promotion("standard"):
            found.append(np.asarray(qwix.dequantize(x) if isinstance(x, qwix.QArray) else x, np.float32))
    return found


def greedy(model: Model) -> list[int]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "on a CPU, weight_dtype")
        return generate(model, np.arange(5, 25)[None], max_new_tokens=16).tokens[0].tolist()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("quantized") / "source", layers=1)


@pytest.mark.full_matrix
@pytest.mark.parametrize("name", CASES)
def test_a_model_has_the_values_of_its_dequantized_twin(name: str, source: Path, tmp_path: Path) -> None:
    case = CASES[name]
    folder = write_folder(tmp_path / "model", case, source)
    # Blocks of 128 do not divide this model's widths.
    weight_dtype = None if name == "deepseek" else case.weight_dtype
    assert open_config(folder).weight_dtype == weight_dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, twin = load_model(folder), load_model(tmp_path / "twin")
    reports = [str(warning.message) for warning in caught]
    assert all("no weight_dtype has these values: all are dequantized to float32" in text for text in reports)
    assert len(reports) == (weight_dtype is None)
    for x, y in zip(values(model), values(twin), strict=True):
        np.testing.assert_array_equal(x, y)
    assert model.nbytes == weight_bytes(model.config)


@pytest.mark.full_matrix
@pytest.mark.filterwarnings("ignore:.*are dequantized")
@pytest.mark.parametrize("name", [name for name in CASES if name != "w8a8"])  # Whose activations are rounded too.
def test_greedy_text_is_that_of_the_dequantized_twin(name: str, source: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES[name], source)
    assert greedy(load_model(folder)) == greedy(load_model(tmp_path / "twin"))


@pytest.mark.full_matrix
def test_a_folder_of_bfloat16_has_the_rounded_values(source: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES["w4a16"], source)
    model, twin = (load_model(path, dtype="bfloat16") for path in (folder, tmp_path / "twin"))
    for x, y in zip(values(model), values(twin), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full_matrix
def test_what_is_asked_for_is_quantized_from_the_values(source: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES["awq"], source)
    with pytest.warns(UserWarning, match="AWQ: 4-bit integers, groups of 32, zero points; .* quantized again to int8"):
        model = load_model(folder, weight_dtype="int8")
    for x, y in zip(values(model), values(load_model(tmp_path / "twin", weight_dtype="int8")), strict=True):
        np.testing.assert_array_equal(x, y)


# The list of modules in each method's configuration, with the down projections of all layers or of layer 0.
LEFT_OUT: dict[str, tuple[str, str, Any, Any]] = {
    "awq": ("awq", "modules_to_not_convert", ["mlp.down_proj"], ["layers.0.mlp.down_proj"]),
    "compressed": ("w4a16", "ignore", ["lm_head", "re:.*mlp.down"], ["lm_head", "model.layers.0.mlp.down_proj"]),
    "gptq": ("gptq", "dynamic", {"-:.*mlp\\.down_proj": {}}, {"-:.*0.mlp\\.down_proj": {}}),
    "fp8": ("deepseek, one scale", "modules_to_not_convert", ["mlp.down_proj"], ["model.layers.0.mlp.down_proj"]),
}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "awq" else pytest.mark.full_matrix) for name in LEFT_OUT]
)
@pytest.mark.full_matrix
def test_a_linear_map_that_is_left_out_is_not_quantized(method: str, source: Path, tmp_path: Path) -> None:
    name, key, in_all, _ = LEFT_OUT[method]
    case = replace(CASES[name], config=CASES[name].config | {key: in_all})
    folder = write_folder(tmp_path / "model", case, source, keep=lambda tensor: "mlp.down_proj" in tensor)
    model = load_model(folder)
    assert (model.config.weight_dtype, model.config.unquantized) == (case.weight_dtype, ("down",))
    for x, y in zip(values(model), values(load_model(tmp_path / "twin")), strict=True):
        np.testing.assert_array_equal(x, y)
    assert model.nbytes == weight_bytes(model.config)
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").config == model.config
    with pytest.warns(UserWarning, match="quantized again to int8"):
        assert load_model(folder, weight_dtype="int8").config.unquantized == ()


@pytest.mark.full_matrix
@pytest.mark.parametrize("method", LEFT_OUT)
def test_a_linear_map_that_is_left_out_in_one_layer_makes_all_dequantized(method: str, tmp_path: Path) -> None:
    name, key, _, in_one = LEFT_OUT[method]
    case = replace(CASES[name], config=CASES[name].config | {key: in_one})
    source = make_model(tmp_path / "source", layers=2)
    folder = write_folder(tmp_path / "model", case, source, keep=lambda tensor: "layers.0.mlp.down_proj" in tensor)
    with pytest.warns(UserWarning, match="not all linear maps are quantized, such as model.layers.0.mlp.down_proj"):
        model = load_model(folder)
    for x, y in zip(values(model), values(load_model(tmp_path / "twin")), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full_matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_values_of_its_dequantized_twin(family: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES["fp8, channels"], GOLDEN / family)
    model, twin = load_model(folder), load_model(tmp_path / "twin")
    stacked = ("expert_gate_up", "expert_down") if family == "gpt_oss" else ()  # In one tensor, without a module each.
    assert model.config == replace(twin.config, weight_dtype="fp8", unquantized=stacked)
    for x, y in zip(values(model), values(twin), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full_matrix
def test_a_model_of_text_and_images_may_be_quantized(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", CASES["awq"], GOLDEN / "gemma3_text")
    config = json.loads((plain / "config.json").read_text())
    outside = {key: config.pop(key) for key in ("eos_token_id", "dtype", "quantization_config")}
    outside["quantization_config"]["modules_to_not_convert"] = ["vision_tower"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config} | outside))
    tensors = load_file(plain / "model.safetensors")
    save_file(
        {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
        | {"model.vision_tower.weight": np.ones((2, 2), np.float32)},
        folder / "model.safetensors",
    )
    assert open_config(folder).weight_dtype == "int4-32-asym"
    for x, y in zip(values(load_model(folder)), values(load_model(tmp_path / "twin")), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full_matrix
@pytest.mark.parametrize("name", ["awq", "w4a16, channels", "fp8, channels"])
def test_experts_are_quantized_and_their_router_is_not(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES[name], GOLDEN / "qwen3_moe")
    model, twin = load_model(folder), load_model(tmp_path / "twin")
    for x, y in zip(values(model), values(twin), strict=True):
        np.testing.assert_array_equal(x, y)
    assert model.config.weight_dtype == CASES[name].weight_dtype and model.nbytes == weight_bytes(model.config)
    assert greedy(model) == greedy(twin)


@pytest.mark.parametrize("name", ["awq", "fp8, channels"])
@pytest.mark.full_matrix
def test_a_quantized_folder_is_saved_bit_for_bit(name: str, source: Path, tmp_path: Path) -> None:
    model = load_model(write_folder(tmp_path / "model", CASES[name], source))
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.mesh
@pytest.mark.parametrize("name", ["awq", "w8a16", "fp8, channels", "gptq, act-order"])
@pytest.mark.filterwarnings("ignore:.*are dequantized")
def test_a_mesh_loads_them(name: str, source: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES[name], source)
    assert greedy(load_model(folder, mesh=make_mesh(tensor=2))) == greedy(load_model(tmp_path / "twin"))


def test_commands_show_what_is_stored(duo: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    config = CASES["fp8, one scale"].config | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    folder = write_folder(tmp_path / "model", replace(CASES["fp8, one scale"], config=config), source)
    shown = duo("inspect", "--model", folder)
    assert shown.code == 0
    assert "stored as: compressed-tensors: 8-bit floats, one scale; loaded as fp8, value by value; " in shown.out
    assert "not used: its quantized activations and a quantized KV cache" in shown.out
    record = json.loads(duo("inspect", "--model", folder, "--json").out)
    assert record["weights"]["bytes"] == load_model(folder, dtype="float32").nbytes
    planned = json.loads(duo("plan", "--model", folder, "--context", 64, "--json").out)
    assert planned["settings"]["weight_dtype"] == "fp8"


def test_the_first_name_of_the_configuration_is_read(source: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES["w4a16"], source)
    values = json.loads((folder / "config.json").read_text())
    values["compression_config"] = values.pop("quantization_config")
    del values["compression_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(values))
    assert open_config(folder).weight_dtype == "int4-32"


# Refusals.


W4: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32}
UNREAD: dict[str, tuple[Any, str]] = {
    "text": ("gptq", "'unknown'"),
    "method": ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not supported: those of awq, "),
    "AWQ by rows": (awq_config(version="gemv"), "awq with version 'gemv'"),
    "AWQ of 3 bits": (awq_config(bits=3), "awq with 3 bits"),
    "AWQ group": (awq_config(group_size=0), "group_size must be at least 1"),
    "AWQ group as text": (awq_config(group_size="32"), "group_size must be an integer"),
    "AWQ modules": (awq_config(modules_to_not_convert="lm_head"), "modules_to_not_convert must be a list"),
    "GPTQ of 3 bits": (gptq_config(bits=3), "gptq with 3 bits"),
    "GPTQ without bits": (gptq_config(bits=None), "gptq with 0 bits"),
    "GPTQ for marlin": (gptq_config(is_marlin_format=True), "gptq with is_marlin_format"),
    "GPTQ format": (gptq_config(checkpoint_format="bitblas"), "gptq with checkpoint_format 'bitblas'"),
    "GPTQ by module": (gptq_config(dynamic={"+:.*": {"bits": 8}}), "gptq with dynamic settings"),
    "GPTQ sym": (gptq_config(sym=1), "sym must be true or false"),
    "FP8 of another kind": ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
    "FP8 block": ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two sizes"),
    "FP8 block of 0": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size must be at least 1"),
    "FP4 experts": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 with expert_dtype 'fp4'"),
    "NVFP4": (compressed("nvfp4-pack-quantized", W4), "compressed-tensors with format 'nvfp4-pack-quantized'"),
    "sparse": (compressed("pack-quantized", W4) | {"sparsity_config": {"format": "bitmask"}}, "sparsity_config"),
    "turned": (compressed("pack-quantized", W4) | {"transform_config": {"a": 1}}, "with transform_config"),
    "several groups": (
        compressed("pack-quantized", W4) | {"config_groups": {"a": {}, "b": {}}},
        "several config_groups",
    ),
    "no groups": (compressed("pack-quantized", W4) | {"config_groups": None}, "config_groups"),
    "no weights": (compressed("pack-quantized", W4) | {"config_groups": {"a": {"targets": []}}}, "has no weights"),
    "2 bits": (compressed("pack-quantized", W4 | {"num_bits": 2}), "2 bits in config_groups.group_0.weights"),
    "4-bit floats": (compressed("pack-quantized", W4 | {"type": "float"}), "with type 'float'"),
    "strategy": (compressed("pack-quantized", W4 | {"strategy": "tensor_group"}), "strategy 'tensor_group'"),
    "group without a size": (compressed("pack-quantized", W4 | {"group_size": None}), "contradicts group_size"),
    "dynamic weights": (compressed("pack-quantized", W4 | {"dynamic": True}), "with dynamic scales"),
    "targets": (compressed("pack-quantized", W4, targets=["LlamaMLP"]), "targets ['LlamaMLP']"),
    "no targets": (compressed("pack-quantized", W4, targets=[]), "targets []"),
    "slow expression": (compressed("pack-quantized", W4) | {"ignore": ["re:(a+)+$"]}, "up to 4 repetitions"),
    "no expression": (compressed("pack-quantized", W4) | {"ignore": ["re:("]}, "not a regular expression"),
}


@pytest.mark.parametrize(("values", "words"), UNREAD.values(), ids=UNREAD)
def test_an_unknown_variant_is_refused_by_name(values: Any, words: str) -> None:
    with pytest.raises((ValueError, NotImplementedError)) as error:
        stored_format({"quantization_config": values})
    assert words in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("config", [awq_config(group_size=64), gptq_config(group_size=64)], ids=["awq", "gptq"])
def test_groups_that_do_not_divide_are_refused_without_weights(config: dict[str, Any], tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    with pytest.raises(ValueError, match=r"config.json: .* groups of 64 input channels, which do not divide the 96 of"):
        open_config(tmp_path)


Change = Callable[[dict[str, np.ndarray], str], object]
DAMAGED: dict[str, tuple[str, Change, str]] = {
    "scales": ("awq", lambda t, m: t.pop(f"{m}.scales"), r"missing \(1\): \S*q_proj.scales"),
    "zeros": ("gptq, zeros", lambda t, m: t.pop(f"{m}.qzeros"), r"missing \(1\): \S*q_proj.qzeros"),
    "scale of floats": ("fp8, channels", lambda t, m: t.pop(f"{m}.weight_scale"), r"missing .*q_proj.weight_scale"),
    "order": ("w4a16, act-order", lambda t, m: t.pop(f"{m}.weight_g_idx"), r"missing .*q_proj.weight_g_idx"),
    "shape of scales": (
        "w4a16",
        lambda t, m: t.update({f"{m}.weight_scale": t[f"{m}.weight_scale"][:, :2].copy()}),
        r"wrong shape .*q_proj.weight_scale \(128, 2\) BF16 instead of \(128, 3\)",
    ),
    "type of numbers": (
        "w8a16",
        lambda t, m: t.update({f"{m}.weight_packed": t[f"{m}.weight_packed"].view(np.float32)}),
        r"wrong shape or type .*q_proj.weight_packed \(128, 24\) F32 instead of \(128, 24\) I32",
    ),
    "not quantized": (
        "awq",
        lambda t, m: [t.pop(f"{m}.{end}") for end in ("scales", "qzeros", "qweight")],
        r"missing \(3\): \S*q_proj.qweight",
    ),
    "stored shape": (
        "w4a16",
        lambda t, m: t.update({f"{m}.weight_shape": np.array([96, 128])}),
        r"q_proj.*weight_shape is \[96, 128\], and its configuration has \[128, 96\]",
    ),
    "zeros of symmetric numbers": (
        "gptq",
        lambda t, m: t[f"{m}.qzeros"].fill(0x66666666),
        r"q_proj.* has zero points, but its quantization_config says that numbers are symmetric",
    ),
    "order that the configuration lacks": (
        "gptq",
        lambda t, m: t.update({f"{m}.g_idx": t[f"{m}.g_idx"][::-1].copy()}),
        r"q_proj.* has input channels in the order of their activations",
    ),
    "groups that do not exist": (
        "gptq, act-order",
        lambda t, m: t.update({f"{m}.g_idx": t[f"{m}.g_idx"] + 1}),
        r"q_proj.* has input channels in group 1 to 3 of 3",
    ),
}


@pytest.mark.parametrize(("name", "change", "words"), DAMAGED.values(), ids=DAMAGED)
def test_tensors_that_contradict_the_configuration_are_refused(
    name: str, change: Change, words: str, source: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model", CASES[name], source)
    shards = Shards([folder / "model.safetensors"])
    tensors = {key: shards.read(key) for key in shards.shapes}
    change(tensors, "model.layers.0.self_attn.q_proj")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*are dequantized")
        load_model(folder)


@pytest.mark.parametrize("count", [7, 9])
def test_another_number_of_experts_is_refused(count: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CASES["awq"], GOLDEN / "qwen3_moe")
    values = json.loads((folder / "config.json").read_text()) | dict.fromkeys(
        ("num_experts", "num_local_experts"), count
    )
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"configuration has {count} experts .*: there are weights of 8"):
        load_model(folder)


@pytest.mark.memory
@pytest.mark.parametrize("name", ["awq", "deepseek", "gptq, 8 bits in groups"])
def test_loading_needs_little_more_memory_than_the_quantized_weights(name: str, tmp_path: Path) -> None:
    """A copy of the largest parameter, its converted copy, and compiled programs; never the model in float32."""
    case = CASES[name]
    big = ModelConfig("llama", 8000, 8, 1024, 16, 8, 64, 3584, 4096, dtype="bfloat16")
    source, some = tmp_path / "source", np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    shapes = {n: s for w in weight_table(big).values() for n, s in zip(w.names, w.shapes, strict=True)}
    plain = {name: np.resize(some, shape).astype("bfloat16") for name, shape in shapes.items() if not is_linear(name)}
    linear = {key: shape for key, shape in shapes.items() if is_linear(key)}
    written = {shape: case.write(case.levels(shape[0], shape[1], seed=0), case) for shape in set(linear.values())}
    for key, shape in linear.items():
        plain |= {key.removesuffix("weight") + end: np.ascontiguousarray(x) for end, x in written[shape].items()}
    save_folder(source, big, plain)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"quantization_config": case.config}))
    del plain
    small = save_folder(tmp_path / "small", SMALL, random_tensors(SMALL))
    done = subprocess.run([sys.executable, "-c", PEAK, str(small), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({key: f"{size / 1e6:.0f} MB" for key, size in found.items()})  # Shown by pytest -s.
    # The largest parameter: its numbers as they are stored, and in float32 before it is rounded.
    assert found["overhead"] < 2 * 7168 * 1024 * 4 + 150e6
