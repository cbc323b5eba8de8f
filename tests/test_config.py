"""ModelConfig and RoPE: fields read from a configuration, features refused by name, and published sizes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from duo_jax import PRESETS, ModelConfig
from duo_jax.checkpoint.folder import Folder
from duo_jax.checkpoint.gguf_architectures import ARCHITECTURES
from duo_jax.checkpoint.save import SavedModel
from duo_jax.families.hugging_face import from_standard, standard
from duo_jax.model.rope import DividedRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope, rotation
from tests.shapes import FAMILIES, GOLDEN

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


def from_folder(folder: Path, **values: Any) -> ModelConfig:
    """Read a model folder's config.json through transformers."""
    (folder / "config.json").write_text(json.dumps(BASE | values))
    return Folder(folder).config


def rope_of(**parameters: Any) -> Rope:
    return ModelConfig.from_hf(BASE | {"rope_parameters": {"rope_theta": 10000.0, **parameters}}).rope


@pytest.mark.parametrize("family", [row.family for row in ARCHITECTURES.values()])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_a_complete_configuration_is_read_as_by_transformers(family: str, scaling: dict[str, Any]) -> None:
    rope = {"rope_theta": 5e5, "partial_rotary_factor": 1.0} | scaling
    flags = dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), True)
    others = {"head_dim": 16, "hidden_act": "silu", "rope_parameters": rope, "eos_token_id": 3, "sliding_window": None}
    if family == "gemma3_text":
        plain = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
        others |= {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 512}
        others |= {"layer_types": SLIDING, "rope_parameters": dict(zip(SLIDING, (plain, rope), strict=True))}
    values = BASE | flags | others | {"model_type": family}
    assert from_standard(standard(values, is_complete=True)) == ModelConfig.from_hf(values)


SMALL = {"num_layers": 4, "embed_dim": 64, "mlp_dim": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
EXPECTED = {
    "llama": {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "vocab_size": 97},
    "llama31": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 98, "tied_head": True},
    "mistral": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "vocab_size": 99},
    "qwen2": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 100, "tied_head": True},
    "qwen3": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "vocab_size": 101},
    "yarn": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 102},
    "linear": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 103},
    "gemma3_text": SMALL | {"vocab_size": 99, "tied_head": True},
    "smollm3": SMALL | {"vocab_size": 111},
    "gemma2": SMALL | {"vocab_size": 119, "tied_head": True},
    "granite": SMALL | {"vocab_size": 117},
    "seed_oss": SMALL | {"vocab_size": 118},
    "phi3": SMALL | {"vocab_size": 115},
    "phi3_short": SMALL | {"vocab_size": 116},
    "olmo3": SMALL | {"vocab_size": 112},
    "ministral": SMALL | {"vocab_size": 113},
    "ministral3": SMALL | {"vocab_size": 114},
    "qwen3_moe": SMALL | {"vocab_size": 104},
    "mixtral": SMALL | {"vocab_size": 105, "mlp_dim": 32},
    "gpt_oss": SMALL | {"vocab_size": 107, "mlp_dim": 32},
}
ROPES = {
    "llama31": Llama3Rope(500000.0, original_max_position_embeddings=64),
    "yarn": YarnRope(factor=8.0, original_max_position_embeddings=64),
    "linear": LinearRope(factor=4.0),
    "gemma3_text": Rope(1e6),
    "smollm3": Rope(2e6),
    "seed_oss": Rope(1e7),
    "phi3": LongRope(
        short_factor=(1.0, 1.1) * 3,
        long_factor=(1.0, 1.5, 2.0, 4.0, 8.0, 16.0),
        original_max_position_embeddings=32,
        attention_factor=(1 + math.log(16) / math.log(32)) ** 0.5,
    ),
    "phi3_short": LongRope(
        short_factor=(1.0, 1.1) * 4,
        long_factor=(2.0,) * 8,
        original_max_position_embeddings=128,
        attention_factor=(1 + math.log(4) / math.log(128)) ** 0.5,
    ),
    "ministral3": YarnRope(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0),
    "olmo3": YarnRope(factor=8.0, original_max_position_embeddings=64),
    "gpt_oss": YarnRope(150000.0, factor=8.0, original_max_position_embeddings=64, truncate=False),
}
FLAGS = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {
        "qk_norm": True,
        "num_experts": 8,
        "experts_per_token": 3,
        "expert_dim": 32,
        "normalize_experts": True,
        "dense_layers": (1,),
    },
    "mixtral": {"num_experts": 8, "experts_per_token": 2, "expert_dim": 32, "normalize_experts": True},
    "gpt_oss": {
        "qkv_bias": True,
        "out_bias": True,
        "layer_windows": (11, None, 11, None),
        "sink_logits": True,
        "num_experts": 8,
        "experts_per_token": 3,
        "expert_dim": 32,
        "expert_bias": True,
        "normalize_experts": True,
        "swiglu_limit": 0.4,
    },
    "gemma3_text": {
        "qk_norm": True,
        "layer_windows": (12, None, 12, None),
        "window_rope": Rope(10000.0),
        "activation": "gelu_pytorch_tanh",
        "embed_scale": 8.0,
        "query_scale": (16 / 24) ** 0.5,
        "norm_offset": True,
        "post_norms": True,
    },
    "smollm3": {"no_rope_layers": (1,)},
    "gemma2": {
        "layer_windows": (11, None, 11, None),
        "activation": "gelu_pytorch_tanh",
        "embed_scale": 8.0,
        "query_scale": (16 / 24) ** 0.5,
        "norm_offset": True,
        "post_norms": True,
        "score_cap": 1.5,
        "logits_cap": 2.5,
    },
    "granite": {"embed_scale": 6.0, "query_scale": 1.5, "residual_scale": 0.7, "logits_divisor": 3.0},
    "seed_oss": {"qkv_bias": True, "out_bias": True},
    "phi3": {"rotary_dim": 12},
    "ministral": {"layer_windows": (11, None, 11, None)},
    "ministral3": {"query_log_scale": 0.3, "query_log_positions": 16},
    "olmo3": {
        "qk_norm": True,
        "wide_qk_norm": True,
        "pre_norms": False,
        "post_norms": True,
        "layer_windows": (9, None, 9, None),
        "window_rope": Rope(5e5),
    },
}
SIZES = {"num_layers": 3, "embed_dim": 96, "mlp_dim": 160}


@pytest.mark.parametrize("raw", [True, False], ids=["config.json itself", "by AutoConfig"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family: str, raw: bool) -> None:
    folder = GOLDEN / family
    values = json.loads((folder / "config.json").read_text())
    values = values if raw else AutoConfig.from_pretrained(folder).to_dict()
    config = ModelConfig.from_hf(values)
    assert config == ModelConfig(
        family=values["model_type"],
        max_positions=512,
        rope=ROPES.get(family, Rope(10000.0)),
        norm_eps=1e-5,
        dtype="float32",
        eos_ids=(2,),
        **SIZES | EXPECTED[family],
        **FLAGS.get(family, {}),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_survives_a_file(family: str, tmp_path: Path) -> None:
    config = Folder(GOLDEN / family).config
    (tmp_path / "duo_model.json").write_text(json.dumps(config.to_json()))
    assert SavedModel(tmp_path).config == config


def test_methods_that_turn_keys_again_refuse_other_ropes_by_name() -> None:
    layers = replace(PRESETS["llama-3-8b"], no_rope_layers=(1, 3))
    with pytest.raises(NotImplementedError, match=r"layers \[1, 3\] of this llama model have no RoPE"):
        layers.only_rope  # noqa: B018
    context = Folder(GOLDEN / "phi3").config
    with pytest.raises(NotImplementedError, match=r"depends on the most tokens of a context .longrope."):
        context.only_rope  # noqa: B018
    assert [context.rope_at(tokens).is_long for tokens in (32, 33)] == [False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_num_parameters_is_that_of_the_checkpoint(family: str) -> None:
    from safetensors import safe_open

    with safe_open(GOLDEN / family / "model.safetensors", framework="numpy") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert Folder(GOLDEN / family).config.num_parameters == stored


def test_an_older_configuration_of_gemma_3_is_read(tmp_path: Path) -> None:
    """One full layer in three, linear scaling of its RoPE only, and transformers' bases."""
    old = {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 3, "num_hidden_layers": 4}
    old |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e6, "rope_local_base_freq": 5e3}
    for config in (ModelConfig.from_hf(BASE | old), from_folder(tmp_path, **old)):
        assert config.layer_windows == (512, 512, None, 512)
        assert (config.rope, config.window_rope) == (LinearRope(1e6, factor=8.0), Rope(5e3))
        assert (config.activation, config.embed_scale) == ("gelu_pytorch_tanh", BASE["hidden_size"] ** 0.5)


def test_a_configuration_of_before_transformers_5_is_read(tmp_path: Path) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "bfloat16"}
    config = ModelConfig.from_hf(BASE | old)
    assert config.rope == LinearRope(5e5, factor=4.0)
    assert config.dtype == "bfloat16"
    by_transformers = from_folder(tmp_path, **old)
    assert (by_transformers.rope, by_transformers.dtype) == (config.rope, config.dtype)


def test_an_old_configuration_without_scaling_keeps_its_theta(tmp_path: Path) -> None:
    assert ModelConfig.from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": None}).rope == Rope(5e5)
    assert from_folder(tmp_path, rope_theta=5e5).rope == Rope(5e5)


def test_head_dim_and_kv_heads_have_their_defaults() -> None:
    config = ModelConfig.from_hf({key: value for key, value in BASE.items() if key != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim) == (4, 16)


def test_llama_biases_are_read() -> None:
    config = ModelConfig.from_hf(BASE | {"attention_bias": True, "mlp_bias": True})
    assert config.qkv_bias and config.out_bias and config.mlp_bias


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_eos_may_be_absent_one_or_many(eos: Any, ids: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(BASE | {"eos_token_id": eos}).eos_ids == ids


REFUSED = {
    "window of a family without": ({"sliding_window": 4096}, "sliding"),
    "layer_types": ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, "linear"),
    "dynamic NTK": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "experts": ({"num_local_experts": 8}, "mixture of experts"),
    "soft cap": ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "bidirectional": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
    "RoPE by layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for each type of layer"),
    "shared experts": ({"model_type": "qwen2_moe", "num_experts": 8}, "qwen2_moe"),
    "latent attention": ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "it has multi-head latent attention"),
    "hybrid": ({"model_type": "qwen3_next", "linear_conv_kernel_dim": 4}, "it has linear attention in some layers"),
    "gemma3n": (
        {"model_type": "gemma3n", "text_config": {"hidden_size_per_layer_input": 256}},
        r"it has embeddings of each layer \(hidden_size_per_layer_input\)",
    ),
    "unheard of": ({"model_type": "warble"}, "warble"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "partial RoPE": ({"partial_rotary_factor": 0.5}, "partial"),
}


@pytest.mark.parametrize(("values", "name"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(values: dict, name: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=name):
        ModelConfig.from_hf(BASE | values)
    with pytest.raises(NotImplementedError, match=name):
        from_folder(tmp_path, **values)


def test_an_unknown_architecture_is_reported_with_what_is_supported() -> None:
    with pytest.raises(NotImplementedError, match="llama, mistral, qwen2, qwen3, "):
        ModelConfig.from_hf(BASE | {"model_type": "grok"})


ACCEPTED = {
    "no window": {"model_type": "mistral", "sliding_window": None},
    "window of all positions": {"model_type": "mistral", "sliding_window": 32768},
    "window switched off": {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False},
    "window that no layer uses": {
        "model_type": "qwen2",
        "sliding_window": 4096,
        "use_sliding_window": True,
        "max_window_layers": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "wide window in every layer": {
        "model_type": "qwen2",
        "sliding_window": 32768,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention"],
    },
    "whole RoPE": {"partial_rotary_factor": 1.0},
    "swish": {"hidden_act": "swish"},
}


@pytest.mark.parametrize("values", ACCEPTED.values(), ids=ACCEPTED)
def test_what_changes_nothing_is_accepted(values: dict, tmp_path: Path) -> None:
    assert ModelConfig.from_hf(BASE | values).max_positions == 32768
    if "swish" not in values.values():
        assert from_folder(tmp_path, **values).max_positions == 32768


WINDOWS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "mistral": ({"model_type": "mistral", "sliding_window": 4096}, (4096, 4096)),
    "qwen2": (
        {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0},
        (4096, 4096),
    ),
    "qwen2 in some layers": (
        {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1},
        (None, 4096),
    ),
    "qwen3 by layer": (
        {
            "model_type": "qwen3",
            "sliding_window": 512,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (512, None),
    ),
}


@pytest.mark.parametrize(("values", "windows"), WINDOWS.values(), ids=WINDOWS)
def test_the_window_of_each_layer_is_read(values: dict, windows: tuple[int | None, ...], tmp_path: Path) -> None:
    config = ModelConfig.from_hf(BASE | values)
    assert config.layer_windows == windows == from_folder(tmp_path, **values).layer_windows
    assert config.full_layers == tuple(layer for layer, size in enumerate(windows) if size is None)


SLIDING = ["sliding_attention", "full_attention"]
CONTRADICTORY: dict[str, tuple[dict[str, Any], str]] = {
    "no window": ({"model_type": "qwen3", "layer_types": SLIDING}, "layers [0], but there is no window"),
    "switched off": (
        {"model_type": "qwen2", "layer_types": SLIDING, "sliding_window": 512, "use_sliding_window": False},
        "sliding_window is 512, use_sliding_window False",
    ),
    "other layers": (
        {
            "model_type": "qwen2",
            "layer_types": SLIDING,
            "sliding_window": 512,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        "layers [0], but a qwen2 model with window=512 has it in all layers from 1 on",
    ),
    "a family with one window": (
        {"model_type": "mistral", "layer_types": SLIDING, "sliding_window": 512},
        "has it in all layers from 0 on",
    ),
    "another number of layers": (
        {"model_type": "qwen3", "layer_types": SLIDING * 2, "sliding_window": 512, "use_sliding_window": True},
        "layer",
    ),
}


@pytest.mark.parametrize(("values", "words"), CONTRADICTORY.values(), ids=CONTRADICTORY)
def test_types_of_layers_that_contradict_their_windows_are_refused(values: dict, words: str, tmp_path: Path) -> None:
    for read in (lambda: ModelConfig.from_hf(BASE | values), lambda: from_folder(tmp_path, **values)):
        with pytest.raises(ValueError, match=re.escape(words)):
            read()


@pytest.mark.parametrize(
    "field", ["vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"]
)
def test_sizes_of_zero_are_refused_by_name(field: str) -> None:
    sizes = dict.fromkeys(["vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim"], 2)
    with pytest.raises(ValueError, match=field):
        ModelConfig("llama", **(sizes | {"head_dim": 2, "max_positions": 8, field: 0}))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        ModelConfig.from_hf(BASE | {"num_key_value_heads": 3})
    with pytest.raises(ValueError, match="even"):
        ModelConfig.from_hf(BASE | {"head_dim": 15})


PUBLISHED = {
    "llama-2-7b": 6738415616,
    "llama-3-8b": 8030261248,
    "llama-3-70b": 70553706496,
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "mistral-7b": 7248023552,
    "qwen2.5-7b": 7615616512,
    "qwen3-8b": 8190735360,
    "smollm2-135m": 134515008,
    "qwen3-30b-a3b": 30532122624,
    "mixtral-8x7b": 46702792704,
    "gpt-oss-20b": 20914757184,
    "gpt-oss-120b": 116829156672,
    "gemma-3-270m": 268098176,
    "gemma-3-27b": 27009346304,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert PRESETS[name].num_parameters == PUBLISHED[name]


# RoPE: every formula once more, frequency by frequency, in Python's float64.


def plain(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> list[float]:
    scaled = []
    for frequency in plain(theta, head_dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def yarn(
    theta: float, head_dim: int, factor: float, original: int, fast: float = 32, slow: float = 1, truncate: bool = True
) -> list[float]:
    # The dimension whose wave turns r times in the original context: theta^(2d/H) * 2 pi * r = original.
    low, high = (head_dim * math.log(original / (r * 2 * math.pi)) / (2 * math.log(theta)) for r in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    scaled = []
    for i, frequency in enumerate(plain(theta, head_dim)):
        interpolate = min(max((i - low) / (high - low), 0), 1)
        scaled.append(interpolate * frequency / factor + (1 - interpolate) * frequency)
    return scaled


def assert_frequencies(rope: Rope, head_dim: int, expected: list[float]) -> None:
    found = rope.inverse_frequencies(head_dim)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9)


sizes = st.sampled_from([16, 64, 80, 96, 128, 256])
thetas = st.sampled_from([1e4, 1e5, 5e5, 1e6])
factors = st.floats(1.0, 64.0)


@given(sizes, thetas)
def test_default_rope(head_dim: int, theta: float) -> None:
    assert_frequencies(Rope(theta), head_dim, plain(theta, head_dim))


@given(sizes, thetas, factors)
def test_linear_rope(head_dim: int, theta: float, factor: float) -> None:
    rope = rope_of(rope_type="linear", rope_theta=theta, factor=factor)
    assert_frequencies(rope, head_dim, [f / factor for f in plain(theta, head_dim)])


@given(sizes, thetas, factors, st.sampled_from([64, 4096, 8192]), st.sampled_from([(1.0, 4.0), (0.5, 2.0)]))
def test_llama3_rope(head_dim: int, theta: float, factor: float, original: int, cuts: tuple[float, float]) -> None:
    low, high = cuts
    rope = rope_of(
        rope_type="llama3",
        rope_theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    assert_frequencies(rope, head_dim, llama3(theta, head_dim, factor, low, high, original))


@given(sizes, thetas, factors, st.sampled_from([4096, 8192, 32768]), st.booleans())
def test_yarn_rope(head_dim: int, theta: float, factor: float, original: int, truncate: bool) -> None:
    rope = rope_of(
        rope_type="yarn",
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        truncate=truncate,
    )
    assert_frequencies(rope, head_dim, yarn(theta, head_dim, factor, original, truncate=truncate))
    assert rope.attention_factor == pytest.approx(0.1 * math.log(factor) + 1)


def test_yarn_without_truncation_is_another_rope() -> None:
    whole, exact = (YarnRope(1e4, factor=4.0, original_max_position_embeddings=4096, truncate=t) for t in (True, False))
    assert not np.allclose(whole.inverse_frequencies(128), exact.inverse_frequencies(128), rtol=1e-4)


def test_yarn_betas_are_used() -> None:
    rope = rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0)
    assert_frequencies(rope, 64, yarn(1e4, 64, 4.0, 4096, fast=16, slow=2))


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.7, "mscale_all_dim": 0.9}, (0.07 * math.log(40) + 1) / (0.09 * math.log(40) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.7}, 0.1 * math.log(40) + 1),
    ],
    ids=["paper", "given", "both mscales", "equal mscales", "one mscale alone"],
)
def test_yarn_attention_factor(given_values: dict, expected: float) -> None:
    rope = rope_of(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, **given_values)
    assert rope.attention_factor == pytest.approx(expected)


def test_a_yarn_factor_of_null_follows_from_the_positions() -> None:
    rope = rope_of(rope_type="yarn", factor=None, original_max_position_embeddings=8192)
    assert isinstance(rope, YarnRope) and rope.factor == 4.0


@pytest.mark.parametrize(("positions", "trained"), [(8192, 32768), (32768, 32768)])
def test_yarn_extends_the_trained_positions(positions: int, trained: int) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8192}
    config = ModelConfig.from_hf(BASE | {"max_position_embeddings": positions, "rope_parameters": rope})
    assert config.trained_positions == trained


def test_stored_divisors_divide() -> None:
    divisors = (1.0, 2.0, 4.0, 8.0)
    expected = [f / d for f, d in zip(plain(1e4, 8), divisors, strict=True)]
    assert_frequencies(DividedRope(1e4, divisors=divisors), 8, expected)


def test_only_yarn_scales_attention() -> None:
    assert Rope().attention_factor == LinearRope().attention_factor == Llama3Rope().attention_factor == 1.0


POSITIONS = [
    0,
    1,
    4095,
    131071,
    2**20 - 1,
    3_300_000,
    2**22 - 1,
    2**24 - 1,
    2**24,
    2**30 + 12345,
    2**31 - 1,
    -1,
    -70000,
]
SCALED = YarnRope(1e6, factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    "rope", [Rope(1e4), Rope(5e5), Rope(1e7), LinearRope(1e4, factor=0.1), Llama3Rope(5e5), SCALED], ids=str
)
def test_phases_are_right_at_any_position(rope: Rope) -> None:
    phases = np.asarray(POSITIONS, np.float64)[:, None] * rope.inverse_frequencies(128)
    rotate = jax.jit(lambda positions: rotation(rope, 128, positions))
    cos, sin = (np.asarray(x)[0, :, 0] / rope.attention_factor for x in rotate(jnp.asarray([POSITIONS], jnp.int32)))
    np.testing.assert_allclose(cos, np.cos(phases), rtol=0, atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(phases), rtol=0, atol=1e-4)
    near = slice(0, 9)
    np.testing.assert_allclose(cos[near], np.cos(phases[near]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[near], np.sin(phases[near]), rtol=0, atol=1e-6)


def test_phases_need_no_64_bit_numbers() -> None:
    program = jax.jit(lambda positions: rotation(Rope(), 128, positions)).lower(jnp.zeros((1, 4), jnp.int32)).as_text()
    assert "xf32>" in program and not any(f"x{kind}>" in program for kind in ("f64", "i64", "ui64"))
