"""Mixtures of experts: against a plain sum over experts, their gradients, blocks of any size, experts of a device."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from duo_jax import Model, ModelConfig
from duo_jax.experts import blocks_of, rows_of_block, weighted_sum
from duo_jax.layers import Experts
from tests.shapes import TINY

EXPERTS = replace(TINY, num_experts=6, experts_per_token=2, expert_dim=24, normalize_experts=True, dense_layers=(0,))
# Most tokens choose one expert, some experts none: blocks of every kind.
POPULAR = np.asarray([[0, 4], [0, 1], [4, 0], [0, 4], [0, 5], [0, 1], [1, 0]], np.int32)


def scaled(x: jax.Array, weights: jax.Array) -> jax.Array:
    """An expert that is not linear in `x`."""
    return jnp.tanh(x @ weights)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    sizes = (7, 4), (7, 2), (6, 4, 4)
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)


def plain_sum(x: jax.Array, shares: jax.Array, weights: jax.Array, chosen: np.ndarray) -> jax.Array:
    """Every choice by itself."""
    rows = [
        sum(shares[token, k] * scaled(x[token], weights[expert]) for k, expert in enumerate(row) if 0 <= expert < 6)
        for token, row in enumerate(chosen.tolist())
    ]
    return jnp.stack([row + jnp.zeros(4) for row in rows])


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("chosen", [POPULAR, POPULAR - 2], ids=["all", "of one device"])
def test_blocks_of_any_size_give_the_sum_over_experts_and_its_gradients(chosen: np.ndarray, rows: int) -> None:
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


def test_every_choice_is_in_one_block_of_its_expert() -> None:
    chosen = np.random.default_rng(0).integers(-1, 5, (33, 3), np.int32)
    order, expert, first, count, used = map(np.asarray, jax.jit(blocks_of, static_argnums=(1, 2))(chosen, 4, 8))
    seen = [
        (choice, expert[block]) for block in range(used) for choice in order[first[block] : first[block] + count[block]]
    ]
    assert sorted(seen) == [(i, e) for i, e in enumerate(chosen.ravel()) if 0 <= e < 4]
    assert count[used:].sum() == 0 and used <= len(expert)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (3, 4), (16, 16), (64, 16), (1024, 64), (1 << 16, 512)], ids=str)
def test_blocks_have_about_the_rows_of_an_expert(tokens: int, rows: int) -> None:
    assert rows_of_block(tokens, 8, 128) == rows


def layer(config: ModelConfig, seed: int = 0) -> Experts:
    module = Experts(config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(seed))
    if config.expert_bias:
        for number, part in enumerate((module.router, module.expert_gate_up, module.expert_down)):
            part.bias.set_value(jax.random.normal(jax.random.key(number), part.bias.shape, part.bias.dtype))
    return module


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "probabilities"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_a_layer_is_the_weighted_sum_of_its_experts(bias: bool, normalize: bool) -> None:
    module = layer(replace(EXPERTS, expert_bias=bias, normalize_experts=normalize))
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)

    def affine(x: np.ndarray, part: nnx.Module, expert: int | None = None) -> np.ndarray:
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
    shares, chosen = module.route(jnp.ones((1, 3, 32)))
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
    np.testing.assert_array_equal(broken(x), module(x))


@pytest.mark.parametrize("weight_dtype", ["int8", "w8a8", "int4-32"])
def test_quantized_experts_are_near(weight_dtype: str) -> None:
    config = replace(EXPERTS, expert_dim=32, mlp_dim=32)
    exact, quantized = (Model.random(config, seed=3, weight_dtype=d) for d in (None, weight_dtype))
    x = jax.random.normal(jax.random.key(0), (1, 4, 32))
    wanted, found = (model.decoder.layers[1].mlp(x) for model in (exact, quantized))
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 0 < error < (0.3 if weight_dtype == "int4-32" else 0.03)
