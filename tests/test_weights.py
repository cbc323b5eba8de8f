"""Weights in few bits: error bounds of a kernel, models of them, loading tensor by tensor."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from duo_jax import KVCache, Model, arrays, load_model, load_tokenizer, prefill, save_model, score
from duo_jax.model.linear import Linear
from duo_jax.model.model import abstract_decoder
from duo_jax.model.weights import WEIGHT_FORMATS, multiply, quantize_kernel
from duo_jax.sizes import nbytes
from tests.shapes import GOLDEN, TINY

CORE = ("int8", "w8a8", "int4", "int4-128-asym", "fp8")
formats = pytest.mark.parametrize(
    "weight_dtype",
    [pytest.param(name, marks=() if name in CORE else pytest.mark.full_matrix) for name in WEIGHT_FORMATS],
)
KERNEL = np.random.default_rng(0).normal(size=(128, 48)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2, 5, 128)).astype(np.float32)
TEXT = np.random.default_rng(2).integers(0, 61, (2, 24))


@formats
def test_a_kernel_is_rounded_to_half_a_step_of_its_group(weight_dtype):
    how = WEIGHT_FORMATS[weight_dtype]
    q = quantize_kernel(jnp.asarray(KERNEL), weight_dtype)
    groups = KERNEL.reshape(-1, how.group or 128, 48)
    most = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float4_e2m1fn": 6}
    steps = np.abs(groups).max(1) / most[how.qtype]
    steps = np.ptp(groups, axis=1) / 15 if how.has_zeros else steps
    np.testing.assert_allclose(q.scale, steps, rtol=0.07)
    error = np.abs(np.asarray(multiply(jnp.eye(128), q, dynamic=False)) - KERNEL).reshape(groups.shape)
    half = np.asarray(q.scale)[:, None] * 0.5001
    if how.qtype == "float8_e4m3fn":  # Three bits of mantissa; subnormal numbers have steps of 2 ** -9.
        half = np.maximum(np.abs(groups) * 2.0**-4, half * 2.0**-9)
    if how.qtype == "float4_e2m1fn":  # One bit of mantissa; subnormal numbers have steps of 1/2.
        half = np.maximum(np.abs(groups) * 2.0**-2, half * 2.0**-1) + np.abs(groups) * 2.0**-8  # Scales are bfloat16.
    # The number that stands for 0 is rounded too, by up to half a step.
    assert (error <= (2 if how.has_zeros else 1) * half).all()
    assert error.max() > 0


@formats
def test_products_are_those_of_the_rounded_numbers(weight_dtype):
    how, q = WEIGHT_FORMATS[weight_dtype], quantize_kernel(jnp.asarray(KERNEL), weight_dtype)
    rounded = np.asarray(multiply(jnp.eye(128), q, dynamic=False))
    error = np.abs(np.asarray(multiply(jnp.asarray(X), q, dynamic=how.dynamic)) - X @ rounded)
    # Activations are rounded to half a step of their token, where they are.
    half_step = np.abs(X).max(-1, keepdims=True) / 127 / 2 * how.dynamic
    assert (error <= half_step * np.abs(rounded).sum(0) + 1e-4).all()


def test_a_bias_is_added():
    linear = Linear(128, 48, bias=True, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), weight_dtype="int8")
    without = linear(jnp.asarray(X))
    linear.bias.set_value(jnp.arange(48.0))
    np.testing.assert_allclose(
        linear(jnp.asarray(X)) - without, np.broadcast_to(np.arange(48.0), (2, 5, 48)), atol=1e-4
    )


@pytest.fixture(scope="module")
def wide(tiny) -> Model:
    """The tiny model, with widths that groups of 32 divide."""
    return Model.random(dataclasses.replace(tiny.config, mlp_dim=64, num_heads=4), seed=1)


@pytest.mark.parametrize(
    ("weight_dtype", "error"),
    [("int8", 0.02), ("w8a8", 0.05), pytest.param("int4-32", 0.5, marks=pytest.mark.full_matrix)],
)
def test_a_model_of_them_is_close_to_its_own(wide, half, weight_dtype, error):
    quantized = Model.random(wide.config, seed=1, weight_dtype=weight_dtype)
    exact, _ = score(wide, TEXT, KVCache.init(wide.config, half, 2, 32))
    found, cache = score(quantized, TEXT, KVCache.init(quantized.config, half, 2, 32, dtype="int8"))
    difference = np.abs(np.asarray(exact.logprobs - found.logprobs)).mean()
    assert 0 < difference < error
    assert cache.length.tolist() == [24, 24]
    assert quantized.nbytes < wide.nbytes / 1.9


@pytest.mark.parametrize("weight_dtype", ["int8", "int4-32"])
def test_loaded_weights_are_those_of_the_checkpoint_quantized(weight_dtype):
    plain, found = load_model(GOLDEN / "llama"), load_model(GOLDEN / "llama", weight_dtype=weight_dtype)
    for layer, other in zip(plain.decoder.layers, found.decoder.layers, strict=True):
        for path in (("attention", "qkv"), ("attention", "out"), ("mlp", "gate_up"), ("mlp", "down")):
            kernel, q = (getattr(getattr(x, path[0]), path[1]).kernel.get_value() for x in (layer, other))
            expected = quantize_kernel(kernel, weight_dtype)
            np.testing.assert_array_equal(q.qvalue, expected.qvalue)
            np.testing.assert_array_equal(q.scale, expected.scale)
    assert found.decoder.embed.embedding.dtype == plain.decoder.embed.embedding.dtype
    logits, _ = prefill(found, TEXT[:1], KVCache.init(found.config, None, 1, 32))
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.parametrize(
    ("family", "is_tied"), [pytest.param("llama", False, marks=pytest.mark.full_matrix), ("llama31", True)]
)
def test_embeddings_and_head_are_quantized_if_asked(family, is_tied):
    """Look-up and logits use rounded rows; a table is rounded like its transpose, a kernel."""
    plain, found = (load_model(GOLDEN / family, embed_dtype=embed_dtype) for embed_dtype in (None, "int8"))
    assert plain.config.tied_head == is_tied
    table, rounded = plain.decoder.embed.embedding.get_value(), found.decoder.embed.embedding.get_value()
    expected = quantize_kernel(table.T, "int8")
    np.testing.assert_array_equal(rounded.qvalue, expected.qvalue.T)
    rows = np.asarray(expected.qvalue.T, np.float32) * np.asarray(expected.scale.T)
    tokens = jnp.asarray(TEXT, jnp.int32)
    np.testing.assert_allclose(found.decoder.embed(tokens), rows[TEXT], rtol=1e-6)
    head = rows if is_tied else np.asarray(multiply(jnp.eye(table.shape[1]), found.decoder.head.kernel.get_value())).T
    hidden = np.random.default_rng(3).normal(size=(2, table.shape[1])).astype(np.float32)
    np.testing.assert_allclose(found.decoder.logits(jnp.asarray(hidden)), hidden @ head.T, rtol=1e-4, atol=1e-5)
    assert found.nbytes < plain.nbytes
    exact, near = (score(x, TEXT, KVCache.init(x.config, None, 2, 32))[0].logprobs for x in (plain, found))
    assert 0 < np.abs(np.asarray(exact - near)).mean() < 0.02


def test_numbers_of_four_bits_take_half_a_byte():
    assert nbytes(jax.ShapeDtypeStruct((3, 64), jnp.dtype("int4"))) == 96


def test_what_cannot_be_is_refused(wide):
    with pytest.raises(ValueError, match=r"weight_dtype must be one of int8, .*got 'int3'"):
        Model.random(wide.config, weight_dtype="int3")
    with pytest.raises(ValueError, match="embed_dtype must be one of int8, int4, int4-32, int4-128, got 'w8a8'"):
        Model.random(wide.config, embed_dtype="w8a8")
    with pytest.raises(ValueError, match="int4-128 has groups of 128 input channels, which do not divide"):
        load_model(GOLDEN / "llama", weight_dtype="int4-128")


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16"}, {"weight_dtype": "w8a8"}, {"weight_dtype": "int4-32", "embed_dtype": "int4-32"}],
)
def test_a_saved_model_is_the_same_bit_for_bit(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SHARD_BYTES", 50_000)
    model = load_model(GOLDEN / "llama31", **settings)
    save_model(model, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    for one, other in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    caches = (KVCache.init(model.config, None, 1, 32) for _ in range(2))
    np.testing.assert_array_equal(*(prefill(x, TEXT[:1], c)[0] for x, c in zip((model, again), caches, strict=True)))


def test_a_model_is_quantized_from_the_command_line(duo, text_model, tmp_path):
    out = tmp_path / "small"
    result = duo("quantize", "--model", text_model, "--weight-dtype", "int8", "--out", out)
    assert result.code == 0 and "MB of weights in int8" in result.out
    prompt = ("--prompt", "the a", "--max-new-tokens", 4, "--json")
    once = duo("generate", "--model", out, *prompt)
    again = duo("generate", "--model", text_model, "--weight-dtype", "int8", *prompt)
    assert once.code == again.code == 0
    assert json.loads(once.out)["tokens"] == json.loads(again.out)["tokens"]
    assert load_tokenizer(out).get_vocab() == load_tokenizer(text_model).get_vocab()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    refused = duo("quantize", "--model", text_model, "--weight-dtype", "int4-32", "--out", out)
    assert refused.code == 2 and "small exists already: choose another name" in refused.err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "give --weight-dtype" in duo("quantize", "--model", text_model, "--out", tmp_path / "x").err


def test_a_saved_model_that_is_not_whole_is_refused(tmp_path):
    model = load_model(GOLDEN / "llama", weight_dtype="int8")
    save_model(model, tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        save_model(model, tmp_path / "a")
    with pytest.raises(ValueError, match="which cannot be changed to"):
        load_model(tmp_path / "a", weight_dtype="int4-32")
    (path,) = (tmp_path / "a").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is truncated"):
        load_model(tmp_path / "a")
    save_model(model, tmp_path / "b")
    config = tmp_path / "b" / "duo_model.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_layers": values["num_layers"] + 1}))
    with pytest.raises(ValueError, match="the arrays do not match its configuration, such as layers"):
        load_model(tmp_path / "b")


@pytest.mark.parametrize("settings", [{}, {"weight_dtype": "int8", "embed_dtype": "int8"}])
def test_the_shapes_of_a_model_are_those_of_its_weights(settings):
    config = dataclasses.replace(TINY, qk_norm=True, **settings)
    graphdef, params = abstract_decoder(config)
    model = Model.random(config)
    assert graphdef == model.graphdef
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (params, model.params)]
    assert shapes[0] == shapes[1]
