"""gpt-oss: checkpoints with experts in MXFP4, and what is refused. Its outputs are tested with the other families."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from safetensors.numpy import load_file, save_file

from duo_jax import PRESETS, Model, load_model, make_mesh, save_model
from duo_jax.model.mlp import gated
from duo_jax.text import renderer
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


def values_of(model: Model) -> list[np.ndarray]:
    """All weights, dequantized."""
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, qwix.QArray))
    with jax.numpy_dtype_promotion("standard"):
        return [
            np.stack([np.asarray(qwix.dequantize(jax.tree.map(lambda y, n=n: y[n], x)), np.float32) for n in range(8)])
            if isinstance(x, qwix.QArray)
            else np.asarray(x)
            for x in leaves
        ]


@pytest.mark.full_matrix
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
        assert packed.config.weight_dtype == "mxfp4" and packed.nbytes < 0.4 * plain.nbytes
        jax.tree.map(np.testing.assert_array_equal, values_of(packed), values_of(plain))
    save_model(packed if packed.mesh is None else load_model(tmp_path / "packed"), tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, values_of(load_model(tmp_path / "saved")), values_of(plain))
    again = [load_model(tmp_path / name, weight_dtype="int8").params for name in ("packed", "plain")]
    jax.tree.map(np.testing.assert_array_equal, *again)
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
        "has 8 experts in a layer, its tensors do not: .*gate_up_proj_bias has 4$",
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


HARMONY = """
{%- macro turn(role, text, channel=none) -%}
    {{- "<|start|>" + role }}{%- if channel %}{{- "<|channel|>" + channel }}{%- endif %}
    {{- "<|message|>" + text + "<|end|>" }}
{%- endmacro -%}
{%- set effort = reasoning_effort if reasoning_effort is defined else "medium" %}
{{- turn("system", "Knowledge cutoff: 2024-06\nCurrent date: " + strftime_now("%Y") + "\n\nReasoning: " + effort) }}
{%- if messages[0].role in ["developer", "system"] %}
    {{- turn("developer", "# Instructions\n\n" + messages[0].content) }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set last = namespace(tool=none) %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- if "<|channel|>" in message.content %}{{- raise_exception("put thinking into its own field") }}{%- endif %}
        {{- turn("assistant", message.content, "final") }}
    {%- else %}{{- turn(message.role, message.content) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}"""


def test_a_template_in_the_manner_of_harmony_is_rendered():
    messages = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "{{ 3 + 3 }}?")]
    turns = [{"role": role, "content": content} for role, content in messages]
    text = renderer.render(HARMONY, turns, {"add_generation_prompt": True, "reasoning_effort": "low"})
    assert re.fullmatch(
        r"<\|start\|>system<\|message\|>.*date: \d{4}\n\nReasoning: low<\|end\|>",
        text[: text.index("<|start|>dev")],
        re.S,
    )
    assert text[text.index("<|start|>dev") :] == (
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>2 + 2?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|end|>"
        "<|start|>user<|message|>{{ 3 + 3 }}?<|end|><|start|>assistant"
    )
    with pytest.raises(ValueError, match="put thinking into its own field"):
        renderer.render(HARMONY, [{"role": "assistant", "content": "<|channel|>final"}], {})
