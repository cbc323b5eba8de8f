"""gpt-oss: checkpoints with experts in MXFP4, and what is refused. Its outputs are tested with the other families."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duo_jax import PRESETS, load_model, make_mesh
from duo_jax.layers import gated
from tests.shapes import GOLDEN
from tests.test_quantized_checkpoint import plain_mxfp4


def gpt_oss_in_mxfp4(folder: Path) -> dict[str, np.ndarray]:
    """Write the golden gpt-oss with experts of random blocks and scales; return its tensors."""
    rng, source, tensors = np.random.default_rng(0), GOLDEN / "gpt_oss", {}
    for name, x in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            rows = (x.shape[0], x.shape[2], x.shape[1] // 32)
            tensors[f"{name}_blocks"] = rng.integers(0, 256, (*rows, 16)).astype(np.uint8)
            tensors[f"{name}_scales"] = rng.integers(120, 125, rows).astype(np.uint8)
        else:
            tensors[name] = x
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_experts_in_mxfp4_are_those_of_their_values(tmp_path):
    tensors = gpt_oss_in_mxfp4(tmp_path / "packed")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors.pop(name), tensors.pop(name.replace("_blocks", "_scales"))
        values = plain_mxfp4(blocks, scales).astype(np.float32)
        tensors[name.removesuffix("_blocks")] = np.ascontiguousarray(values.swapaxes(1, 2))
    (tmp_path / "plain").mkdir()
    shutil.copy(GOLDEN / "gpt_oss" / "config.json", tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    plain = load_model(tmp_path / "plain")
    for settings in ({}, {"mesh": make_mesh()}):
        packed = load_model(tmp_path / "packed", **settings)
        jax.tree.map(np.testing.assert_array_equal, packed.params, plain.params)
    # Gate and up alternate in the file, and are halves here.
    kernel, stored = plain.params["layers"][1]["mlp"]["expert_gate_up"]["kernel"], tensors[GATE_UP]
    np.testing.assert_array_equal(kernel.get_value()[..., 32:], stored[..., 1::2])


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
BAD_GPT_OSS = {
    "no scales": ({f"{GATE_UP}_scales": None}, f"{GATE_UP}_blocks has no scales"),
    "no blocks": ({f"{GATE_UP}_blocks": None}, f"{GATE_UP}_scales has no blocks"),
    "scales of fewer blocks": ({f"{GATE_UP}_scales": np.zeros((8, 64, 1), np.uint8)}, "do not belong together"),
    "experts": (
        {f"{GATE_UP}_bias": np.zeros((4, 64), np.float32)},
        r"gate_up_proj_bias \(4, 64\) instead of \(8, 64\)",
    ),
    "sinks": ({"model.layers.0.self_attn.sinks": np.zeros(3, np.float32)}, r"sinks \(3,\) instead of \(4,\)"),
    "no sinks": ({"model.layers.0.self_attn.sinks": None}, r"missing \(1\): model.layers.0.self_attn.sinks"),
}


@pytest.mark.parametrize(("changes", "words"), BAD_GPT_OSS.values(), ids=BAD_GPT_OSS)
def test_a_damaged_gpt_oss_is_refused_by_name(changes, words, tmp_path):
    tensors = {name: x for name, x in (gpt_oss_in_mxfp4(tmp_path) | changes).items() if x is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)


def test_the_gated_mlp_is_clamped():
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, 50)).astype(np.float32) * 6
    config = replace(PRESETS["gpt-oss-20b"], swiglu_limit=3.0)
    low = np.minimum(gate, 3)
    expected = low / (1 + np.exp(-1.702 * low)) * (np.clip(up, -3, 3) + 1)
    np.testing.assert_allclose(gated(config, jnp.asarray(gate), jnp.asarray(up)), expected, rtol=1e-5)
