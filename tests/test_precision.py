"""Precision: one value for the data types of a model and its cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import KVCache, Model, load_model
from duo_jax.model.precision import ALLOWED, Precision
from duo_jax.model.weights import EMBED_FORMATS, WEIGHT_FORMATS
from pallas_kernels.quantized import BITS
from tests.shapes import GOLDEN, TINY


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.dtype(jnp.bfloat16)], ids=str)
def test_names_and_data_types_are_the_same(dtype):
    assert Precision(dtype) == Precision("bfloat16")
    assert Model.random(TINY, dtype=dtype).config.dtype == "bfloat16"
    assert KVCache.init(TINY, None, 1, 8, dtype=dtype).dtype == jnp.bfloat16


def test_a_checkpoint_is_loaded_in_any_data_type():
    model = load_model(GOLDEN / "llama", dtype=np.float16, weight_dtype=np.int8)
    assert (model.config.dtype, model.config.weight_dtype) == ("float16", "int8")


@pytest.mark.parametrize(
    ("given", "kv", "streaming"),
    [
        ({}, "bfloat16", "bfloat16"),
        ({"kv_dtype": "float32"}, "float32", "float32"),
        ({"kv_dtype": "int4"}, "int4", "bfloat16"),  # Rings are small: not quantized unless asked for.
        ({"kv_dtype": "int4", "streaming_dtype": "int8"}, "int4", "int8"),
        ({"streaming_dtype": "float32"}, "bfloat16", "float32"),
    ],
)
def test_what_is_left_out_follows_from_the_rest(given, kv, streaming):
    precision = Precision("bfloat16", **given)
    assert (precision.kv, precision.streaming) == (kv, streaming)


def test_what_is_not_allowed_is_refused_with_what_is():
    for field, value in (
        ("dtype", "int8"),
        ("weight_dtype", "int3"),
        ("embed_dtype", "w8a8"),
        ("kv_dtype", np.float64),
    ):
        with pytest.raises(ValueError, match=rf"{field} must be one of .*, got '\w+'"):
            Precision(**{"dtype": "float32"} | {field: value})


def test_every_name_has_its_format():
    assert ALLOWED["weight_dtype"] == tuple(WEIGHT_FORMATS) and ALLOWED["embed_dtype"] == tuple(EMBED_FORMATS)
    assert ALLOWED["kv_dtype"] == (*ALLOWED["dtype"], *BITS)
