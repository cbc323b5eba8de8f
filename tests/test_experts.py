"""Mixtures of experts: against a plain sum over experts, their gradients, blocks of any size, experts of a device."""

import functools
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.aot.compile import memory_of
from flax import nnx

from duo_jax import KVCache, Model, ModelConfig, load_model, make_mesh, prefill, save_model
from duo_jax.checkpoint.parameters import _set_expert
from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.experts import blocks_of, rows_of_block, sum_of_choices, weighted_sum
from duo_jax.model.mixture import Experts
from tests.shapes import GOLDEN, TINY

EXPERTS = replace(TINY, num_experts=6, experts_per_token=2, expert_dim=24, normalize_experts=True, dense_layers=(0,))
# Most tokens choose one expert, some experts none: blocks of every kind.
POPULAR = np.asarray([[0, 4], [0, 1], [4, 0], [0, 4], [0, 5], [0, 1], [1, 0]], np.int32)


def scaled(x: jax.Array, weights: jax.Array) -> jax.Array:
    """An expert that is not linear in `x`."""
    return jnp.tanh(x @ weights)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x, shares, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((7, 4), (7, 2), (6, 4, 4)))
    return x, shares, weights


def plain_sum(x: jax.Array, shares: jax.Array, weights: jax.Array, chosen: np.ndarray) -> jax.Array:
    """Every choice by itself."""
    rows = [
        sum(shares[token, k] * scaled(x[token], weights[expert]) for k, expert in enumerate(row) if 0 <= expert < 6)
        for token, row in enumerate(chosen.tolist())
    ]
    return jnp.stack([row + jnp.zeros(4) for row in rows])


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (2, POPULAR - 2),  # As on a device that has some of the experts.
        *(pytest.param(rows, POPULAR, marks=pytest.mark.full_matrix) for rows in (1, 8)),
    ],
)
def test_blocks_of_any_size_give_the_sum_over_experts_and_its_gradients(rows: int, chosen: np.ndarray) -> None:
    x, shares, weights = inputs()
    slope = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def blocks(x: jax.Array, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = weighted_sum(scaled, rows, x, shares, weights, blocks_of(jnp.asarray(chosen), 6, rows))
        return jnp.vdot(out, slope), out

    def plain(x: jax.Array, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = plain_sum(x, shares, weights, chosen)
        return jnp.vdot(out, slope), out

    gradient = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    found, wanted = jax.jit(gradient(blocks))(x, shares), gradient(plain)(x, shares)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_choices_one_by_one_give_the_sum_over_experts() -> None:
    """As a GPU computes those of a few tokens."""
    x, shares, weights = inputs()
    found = jax.jit(sum_of_choices, static_argnums=0)(scaled, x, shares, jnp.asarray(POPULAR), weights)
    np.testing.assert_allclose(found, plain_sum(x, shares, weights, POPULAR), atol=1e-6)


def test_every_choice_is_in_one_block_of_its_expert() -> None:
    chosen = np.random.default_rng(0).integers(-1, 5, (33, 3), np.int32)
    order, expert, first, size, used = map(np.asarray, jax.jit(blocks_of, static_argnums=(1, 2))(chosen, 4, 8))
    seen = [
        (choice, expert[block]) for block in range(used) for choice in order[first[block] : first[block] + size[block]]
    ]
    assert sorted(seen) == [(i, e) for i, e in enumerate(chosen.ravel()) if 0 <= e < 4]
    assert size[used:].sum() == 0 and used <= len(expert)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (3, 4), (16, 16), (64, 16), (1024, 64), (1 << 16, 512)], ids=str)
def test_blocks_have_about_the_rows_of_an_expert(tokens: int, rows: int) -> None:
    assert rows_of_block(tokens, 8, 128) == rows


def layer(config: ModelConfig, seed: int = 0) -> Experts:
    module = Experts(config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(seed))
    if config.expert_bias:
        for number, part in enumerate((module.router, module.expert_gate_up, module.expert_down)):
            part.bias.set_value(jax.random.normal(jax.random.key(number), part.bias.shape, part.bias.dtype))
    return module


@pytest.mark.parametrize(
    ("bias", "normalize"), [(True, False), pytest.param(False, True, marks=pytest.mark.full_matrix)]
)
def test_a_layer_is_the_weighted_sum_of_its_experts(bias: bool, normalize: bool) -> None:
    module = layer(replace(EXPERTS, expert_bias=bias, normalize_experts=normalize))
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)

    def affine(x: np.ndarray, part: Any, expert: int | None = None) -> np.ndarray:
        kernel, shift = np.asarray(part.kernel[...], np.float64), part.bias and np.asarray(part.bias[...], np.float64)
        kernel, shift = (y if expert is None or y is None else y[expert] for y in (kernel, shift))
        return x @ kernel + (0 if shift is None else shift)

    wanted = np.zeros(x.shape)
    for index in np.ndindex(2, 5):
        logits = affine(x[index], module.router)
        chosen = np.argsort(-logits, kind="stable")[:2]
        share = np.exp(logits[chosen]) / np.exp(logits[chosen] if normalize else logits).sum()
        for expert, factor in zip(chosen, share, strict=True):
            gate, up = np.split(affine(x[index], module.expert_gate_up, expert), 2)
            wanted[index] += factor * affine(gate / (1 + np.exp(-gate)) * up, module.expert_down, expert)
    np.testing.assert_allclose(jax.jit(lambda module, x: module(x))(module, x), wanted, atol=2e-6)


def test_of_equal_experts_the_first_are_chosen() -> None:
    module = layer(EXPERTS)
    module.router.kernel.set_value(jnp.zeros((32, 6)))
    shares, chosen = jax.jit(lambda module, x: module.route(x))(module, jnp.ones((1, 3, 32)))
    np.testing.assert_array_equal(chosen, np.broadcast_to([0, 1], (1, 3, 2)))
    np.testing.assert_allclose(shares, 0.5)


def test_an_unchosen_expert_may_be_anything() -> None:
    """Its weights are not even read."""
    module = layer(EXPERTS)
    x = jnp.ones((1, 3, 32))
    _, chosen = module.route(x)
    other = next(number for number in range(6) if number not in np.asarray(chosen))
    broken = nnx.clone(module)
    broken.expert_down.kernel.set_value(module.expert_down.kernel[...].at[other].set(jnp.nan))
    run = jax.jit(lambda module, x: module(x))
    np.testing.assert_array_equal(run(broken, x), run(module, x))


@pytest.mark.full_matrix
@pytest.mark.parametrize("weight_dtype", ["int8", "w8a8", "int4-32"])
def test_quantized_experts_are_near(weight_dtype: str) -> None:
    config = replace(EXPERTS, expert_dim=32, mlp_dim=32)
    exact, quantized = (Model.random(config, seed=3, weight_dtype=d) for d in (None, weight_dtype))
    x = jax.random.normal(jax.random.key(0), (1, 4, 32))
    wanted, found = (model.decoder.layers[1].mlp(x) for model in (exact, quantized))
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 0 < error < (0.3 if weight_dtype == "int4-32" else 0.03)


FOLDER = GOLDEN / "qwen3_moe"


@pytest.mark.mesh
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_devices_that_share_experts_give_the_golden_logits(weight_dtype: str | None) -> None:
    with np.load(FOLDER / "golden.npz") as golden:
        ids, logits = golden["ids"], []
    for mesh in (None, make_mesh(data=2, sequence=2, tensor=2)):
        model = load_model(FOLDER, weight_dtype=weight_dtype, mesh=mesh)
        if mesh is not None:
            experts = model.decoder.layers[0].mlp
            assert isinstance(experts, Experts)
            kernel = jax.tree.leaves(experts.expert_down.kernel.get_value())[0]
            assert {shard.data.shape[0] for shard in kernel.addressable_shards} == {2}
        cache = KVCache.init(model.config, None, 2, ids.shape[1], mesh=mesh)
        logits.append(np.asarray(prefill(model, ids, cache, chunk_size=64)[0]))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_experts_that_devices_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 experts cannot be divided among tensor . sequence = 4 devices"):
        MeshSize(tensor=4).check(EXPERTS)


def changed_folder(folder: Path, family: str = FOLDER.name, **values: Any) -> Path:
    shutil.copytree(GOLDEN / family, folder)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another number": ({"num_local_experts": 6}, "has 6 experts in a layer, .* weights of 8"),
    "more than there are": ({"num_experts_per_tok": 9}, "experts_per_token must be at most num_experts"),
    "two numbers": ({"num_experts": 4}, "num_experts is 4 and num_local_experts 8"),
    "none": ({"num_local_experts": None}, "lacks num_local_experts"),
    "other layers": ({"mlp_only_layers": [2]}, "missing .* model.layers.1.mlp.gate.weight"),
    "no layer": ({"mlp_only_layers": [0, 1, 2, 3]}, "dense_layers has all 4 layers"),
    "another width": ({"moe_intermediate_size": 16}, "of the wrong shape"),
}


@pytest.mark.parametrize(("values", "words"), BAD.values(), ids=BAD)
def test_a_configuration_that_contradicts_itself_or_its_tensors_is_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        load_model(changed_folder(tmp_path / "model", **values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "float8_e4m3fn", "float4_e2m1fn"])
@pytest.mark.usefixtures("fresh_programs")
def test_an_expert_is_loaded_without_a_copy_of_the_others(dtype: str) -> None:
    stack, expert = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in ((64, 32, 16), (32, 16)))
    memory = memory_of(_set_expert.lower(stack, expert, 3).compile())
    assert memory.aliased > 8000 and memory.temporaries < 1000


@pytest.mark.parametrize(("family", "count"), [*product(("mixtral", "gpt_oss"), (4, 16))])
def test_another_number_of_experts_is_refused_however_they_are_stored(family: str, count: int, tmp_path: Path) -> None:
    folder = changed_folder(tmp_path / "model", family, num_local_experts=count)
    with pytest.raises(ValueError, match=f"its configuration has {count} experts in a layer, .* (of|has) 8"):
        load_model(folder)


def test_layers_between_experts_are_read() -> None:
    values = json.loads((FOLDER / "config.json").read_text()) | {"mlp_only_layers": None, "decoder_sparse_step": 2}
    config = ModelConfig.from_hf(values)
    assert config.dense_layers == (0, 2)
    assert config.first_layers(1).num_experts == 0 and config.first_layers(2).dense_layers == (0,)


@pytest.mark.full_matrix
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_a_saved_mixture_of_experts_loads_as_it_was(weight_dtype: str | None, tmp_path: Path) -> None:
    model = load_model(FOLDER, weight_dtype=weight_dtype)
    save_model(model, tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    assert saved.config == model.config and saved.fingerprint == model.fingerprint
    for a, b in zip(jax.tree.leaves(saved.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
