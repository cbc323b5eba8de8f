"""RoPE settings in every spelling: the numbers of transformers' own functions, or a refusal."""

import copy
import types
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, modeling_rope_utils

from duo_jax import ModelConfig
from duo_jax.model.rope import Rope
from tests.hostile.readers import rope_settings

Values = dict[str, Any]
BASE: Values = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
}

# A value of a wrong type must reach the project's own checks.
pytestmark = pytest.mark.usefixtures("annotations_off")


class Tensor(np.ndarray):
    """What transformers' RoPE functions need of a torch tensor."""

    def to(self, *, device: object = None, dtype: type = np.float32) -> "Tensor":
        return self.astype(dtype)


def arange(*ends: int, dtype: type = np.int64) -> np.ndarray:
    return np.arange(*ends, dtype=dtype).view(Tensor)


torch = types.SimpleNamespace(
    arange=arange, where=np.where, clamp=np.clip, int64=np.int64, float=np.float32, float32=np.float32
)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' functions compute with numpy."""
    monkeypatch.setattr(modeling_rope_utils, "torch", torch, raising=False)


def by_transformers(family: str, values: Values) -> tuple[np.ndarray, float]:
    """Inverse frequencies and attention factor, as a model computes them when it is built."""
    config = AutoConfig.for_model(family, **BASE, **copy.deepcopy(values))  # It writes into nested values.
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, 16, 2, dtype=np.float32) / 16), 1.0
    return modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config)


def ours(family: str, values: Values) -> Rope:
    return ModelConfig.from_hf({"model_type": family, **BASE, **values}).rope


def assert_same(family: str, values: Values) -> None:
    frequencies, factor = by_transformers(family, values)
    rope = ours(family, values)
    np.testing.assert_allclose(rope.inverse_frequencies(16), frequencies, rtol=1e-5)
    assert rope.attention_factor == pytest.approx(factor)


YARN: Values = {"rope_type": "yarn", "factor": 4.0}
LLAMA3: Values = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
INSIDE: Values = {"original_max_position_embeddings": 64}
SPELLINGS: dict[str, Values] = {
    "nothing": {},
    "theta outside": {"rope_theta": 5e4},
    "theta inside": {"rope_parameters": {"rope_theta": 5e4}},
    "theta inside, of rope_scaling": {"rope_scaling": {"rope_theta": 5e4, "rope_type": "default"}},
    "theta as an integer": {"rope_theta": 500000},
    "scaling null": {"rope_theta": 5e4, "rope_scaling": None},
    "scaling empty": {"rope_theta": 5e4, "rope_scaling": {}},
    "parameters null": {"rope_theta": 5e4, "rope_parameters": None},
    "type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 5e4}},
    "no type": {"rope_scaling": {"factor": 4.0}},
    "llama3": {"rope_theta": 5e4, "rope_scaling": LLAMA3 | INSIDE},
    "llama3, original outside": {"rope_theta": 5e4, "rope_scaling": LLAMA3, **INSIDE},
    "llama3, no original": {"rope_theta": 5e4, "rope_scaling": LLAMA3},
    "yarn": {"rope_theta": 5e4, "rope_scaling": YARN | INSIDE},
    "yarn, original outside": {"rope_theta": 5e4, "rope_scaling": YARN, **INSIDE},
    "yarn, original outside, rope_parameters": {"rope_parameters": YARN | {"rope_theta": 5e4}, **INSIDE},
    "yarn, no original": {"rope_theta": 5e4, "rope_scaling": YARN},
    "yarn, factor null": {"rope_scaling": YARN | INSIDE | {"factor": None}},
    "yarn, all null": {
        "rope_scaling": YARN
        | INSIDE
        | dict.fromkeys(["beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"])
    },
    "yarn, truncate": {"rope_scaling": YARN | INSIDE | {"truncate": True}},
    "yarn, no truncate": {"rope_scaling": YARN | INSIDE | {"truncate": False}},
    "yarn, attention_factor": {"rope_scaling": YARN | INSIDE | {"attention_factor": 1.25}},
    "yarn, mscale": {"rope_scaling": YARN | INSIDE | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    "yarn, mscale alone": {"rope_scaling": YARN | INSIDE | {"mscale": 0.7}},
    "yarn, betas": {"rope_scaling": YARN | INSIDE | {"beta_fast": 16, "beta_slow": 2}},
    "yarn, betas swapped": {"rope_scaling": YARN | INSIDE | {"beta_fast": 1, "beta_slow": 8}},
    "yarn, few positions": {"rope_scaling": YARN | {"original_max_position_embeddings": 4}},
    "yarn, factor below 1": {"rope_scaling": YARN | INSIDE | {"factor": 0.5}},
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("values", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_gives_the_numbers_of_transformers(family: str, values: Values) -> None:
    assert_same(family, values)


DIFFERENT: dict[str, tuple[Values, str]] = {
    "original outside and inside": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 256}, **INSIDE},
        "original_max_position_embeddings outside is 64",
    ),
    "theta outside and inside": (
        {"rope_theta": 5e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
        "rope_theta in the RoPE settings is 100000.0",
    ),
    "both names": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "rope_scaling is",
    ),
    "both types": ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}}, "rope_type is 'linear'"),
}


@pytest.mark.parametrize(("values", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_settings_that_differ_are_those_of_transformers_with_a_warning(values: Values, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert_same("llama", values)


REFUSED: dict[str, tuple[Values, str]] = {
    "theta null": ({"rope_theta": None}, "rope_theta"),
    "theta 0": ({"rope_theta": 0}, "rope_theta"),
    "theta text": ({"rope_theta": "10000"}, "rope_theta"),
    "theta true": ({"rope_theta": True}, "rope_theta"),
    "theta not finite": ({"rope_theta": float("inf")}, "rope_theta"),
    "theta no number": ({"rope_theta": float("nan")}, "rope_theta"),
    "theta huge": ({"rope_theta": 10**400}, "rope_theta"),
    "a list": ({"rope_scaling": [1]}, "rope_scaling"),
    "text": ({"rope_parameters": "yarn"}, "rope_parameters"),
    "type null": ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "None"),
    "type list": ({"rope_scaling": {"rope_type": ["yarn"]}}, "yarn"),
    "type unknown": ({"rope_scaling": {"type": "warble"}}, "warble"),
    "linear, no factor": ({"rope_scaling": {"type": "linear"}}, "factor"),
    "linear, factor null": ({"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
    "linear, factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    "yarn, no factor": ({"rope_scaling": {"type": "yarn"} | INSIDE}, "factor"),
    "yarn, factor text": ({"rope_scaling": YARN | {"factor": "4"}}, "factor"),
    "yarn, original null": ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "original_max"),
    "yarn, original null outside": ({"rope_scaling": YARN, "original_max_position_embeddings": None}, "original_max"),
    "yarn, original 0": ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max"),
    "yarn, attention_factor 0": ({"rope_scaling": YARN | INSIDE | {"attention_factor": 0}}, "attention_factor"),
    "yarn, truncate text": ({"rope_scaling": YARN | INSIDE | {"truncate": "no"}}, "truncate"),
    "yarn, theta 1": ({"rope_theta": 1, "rope_scaling": YARN | INSIDE}, "rope_theta"),
    "llama3, no low_freq_factor": ({"rope_scaling": {"type": "llama3", "factor": 8.0} | INSIDE}, "low_freq_factor"),
    "llama3, low above high": ({"rope_scaling": LLAMA3 | INSIDE | {"low_freq_factor": 5}}, "low_freq_factor"),
    "each type of layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each type of layer"),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("values", "name"), REFUSED.values(), ids=REFUSED)
def test_settings_without_a_meaning_are_refused_by_name(family: str, values: Values, name: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=name):
        ours(family, values)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["llama", "qwen2"]), rope_settings)
def test_any_settings_have_the_numbers_of_transformers_or_are_refused(family: str, values: Values) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rope = ours(family, values)
        except (ValueError, NotImplementedError) as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            return
        frequencies, factor = by_transformers(family, values)
    np.testing.assert_allclose(rope.inverse_frequencies(16), frequencies, rtol=1e-5, atol=1e-30)
    assert rope.attention_factor == pytest.approx(factor)
