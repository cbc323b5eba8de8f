"""The recipes besides `distill`, each against its rule written out in numpy."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from duo_train.data.needles import NeedleData
from duo_train.gated import GatedModel, in_full_layers
from duo_train.identify import Identify
from duo_train.recipes import RECIPES, AttentionProfile, KVzip, PruLong, Run
from duo_train.recipes.kvzip import REQUEST
from duo_train.recipes.prulong import _draw
from transformers import AutoTokenizer

from duo_jax import load_model, make_mesh
from duo_jax.cli.options import ModelOptions
from pallas_kernels import full_attention
from tests.shapes import GOLDEN, families
from tests.test_train import ATTENTION, DATA, metrics


@pytest.fixture(scope="module")
def run(text_model, tmp_path_factory):
    def make(folder=None, model=text_model, **changed):
        data = NeedleData(DATA, AutoTokenizer.from_pretrained(text_model))
        folder = folder or tmp_path_factory.mktemp("run")
        return Run(load_model(model), data, ATTENTION, folder, mesh=make_mesh(), **changed)

    return make


def layers(model, tokens):
    """Rotated queries and keys of every layer with full attention, `[T, N, H]` and `[T, K, H]`, float64."""
    attention = partial(full_attention, backend="reference")

    def attend(found, layer, q, k, v, sinks):
        return attention(q, k, v, sink_logits=sinks), (*found, (q[0], k[0]))

    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    attend_by_layer = in_full_layers(model.decoder, attend, attention)
    found = model.decoder.hidden(jnp.asarray(tokens)[None], positions, attend_by_layer, ())[1]
    return [tuple(np.asarray(x, np.float64) for x in pair) for pair in found]


def turn(x, angles, scale):
    """Rotate the pairs (i, i + H/2) of `x [T, n, H]` by `angles [T, H/2]`, as complex numbers."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None] * scale
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(
    "family", families("llama", of=("llama", "qwen3", "yarn", "gpt_oss"))
)  # qwen3 has q/k-norm, yarn a rotation longer than 1, gpt_oss learned sinks
def test_the_attention_profile_is_that_of_the_mean_query_and_key(run, family):
    run = run(model=GOLDEN / family)
    recipe = AttentionProfile(num_samples=2, length=50)
    found = recipe.find(run)
    config = run.model.config
    group, scale = config.num_heads // config.num_kv_heads, config.rope.attention_factor
    frequencies = config.rope.inverse_frequencies(config.head_dim)
    angles = lambda count: np.arange(count)[:, None] * frequencies  # noqa: E731
    means = []
    for number in range(2):
        tokens = run.data[number].tokens
        # Back by the angle that RoPE turned by, and by its length.
        pairs = layers(run.model, tokens)
        means.append([[turn(x, -angles(len(tokens)), 1 / scale).mean(0) for x in pair] for pair in pairs])
    wanted = np.zeros((len(config.full_layers), config.num_kv_heads))
    for layer, number in enumerate(config.full_layers):
        sinks = run.model.decoder.sink_logits(number)
        q, k = (np.mean([sample[layer][i] for sample in means], axis=0) for i in (0, 1))
        keys = turn(np.repeat(k[None], 50, axis=0), angles(50), scale)
        last = turn(np.repeat(q[None], 50, axis=0), angles(50), scale)[-1]
        for head in range(config.num_heads):
            scores = keys[:, head // group] @ last[head] / np.sqrt(config.head_dim)
            sink = -np.inf if sinks is None else float(sinks[head])
            weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(sink))
            # The mean distance, as a fraction: the oldest of 50 tokens counts 1, the newest 1 / 50.
            area = weights @ (np.arange(50, 0, -1) / 50)
            wanted[layer, head // group] = max(wanted[layer, head // group], area)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_kvzip_is_the_most_attention_that_a_context_receives_while_it_is_repeated(run):
    run = run()
    found = KVzip(num_samples=2, length=40).find(run)
    tokenizer, text = run.data.tokenizer, run.data.text
    request = tokenizer.encode(REQUEST, add_special_tokens=False)
    scores = []
    for number in range(2):
        begin = np.random.default_rng((0, number)).integers(0, len(text) - 40 + 1)
        context = list(text[begin : begin + 40])
        head = tokenizer.encode("")
        tokens = np.array([*head, *context, *request, *context], np.int32)
        causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
        sample = []
        for q, k in layers(run.model, tokens):
            most = np.zeros(k.shape[1])
            for head in range(q.shape[1]):
                kv_head = head * k.shape[1] // q.shape[1]
                raw = np.where(causal, q[:, head] @ k[:, kv_head].T / np.sqrt(q.shape[2]), -np.inf)
                weights = np.exp(raw - raw.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                # The context without its sinks, seen by what repeats it, from beyond the window.
                far = np.subtract.outer(np.arange(len(tokens)), np.arange(len(tokens))) >= ATTENTION.recent_size
                most[kv_head] = max(most[kv_head], (weights * far)[-40:, ATTENTION.sink_size : 40].max())
            sample.append(most)
        scores.append(sample)
    np.testing.assert_allclose(found, np.mean(scores, axis=0), atol=1e-5)


def test_recipes_without_training_reject_what_they_cannot_do(run):
    with pytest.raises(ValueError, match="fewer than"):
        KVzip(length=10**6).find(run())
    with pytest.raises(ValueError, match="more than the 2 sinks"):
        KVzip(length=2).find(run())
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        AttentionProfile(num_samples=0).find(run())


def test_hard_concrete_gates_are_as_often_zero_as_the_penalty_counts():
    recipe = PruLong(steps=10, target_sparsity=0.5)
    for log_alpha in (-3.0, 0.0, 2.0):
        params = {"log_alpha": jnp.full((50, 400), log_alpha), "multipliers": jnp.zeros(2)}
        gates = np.asarray(_draw(params["log_alpha"], jax.random.key(0)))
        assert gates.min() >= 0 and gates.max() <= 1
        sparsity = recipe.penalty(params, jnp.int32(0))[1]["sparsity"]
        assert (gates == 0).mean() == pytest.approx(float(sparsity), abs=0.01)


def test_the_target_sparsity_rises_and_the_multipliers_go_uphill():
    recipe = PruLong(steps=100, target_sparsity=0.7, ramp=0.8)
    params = recipe.init(jnp.ones((3, 4)))
    assert np.allclose(params["log_alpha"], 4.5, atol=0.05) and np.ptp(np.asarray(params["log_alpha"])) > 0
    targets = [float(recipe.penalty(params, jnp.int32(step))[1]["target_sparsity"]) for step in (0, 39, 79, 99)]
    np.testing.assert_allclose(targets, [0.7 / 80, 0.35, 0.7, 0.7], rtol=1e-5)
    penalty, figures = recipe.penalty(params | {"multipliers": jnp.array([2.0, 3.0])}, jnp.int32(99))
    miss = float(figures["sparsity"]) - 0.7
    assert float(penalty) == pytest.approx(2 * miss + 3 * miss**2, rel=1e-5)
    gradient = {"log_alpha": jnp.zeros((3, 4)), "multipliers": jnp.array([miss, miss**2])}
    optimizer = recipe.optimizer()
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # Too few heads stream (miss < 0): the first multiplier falls, so that its product with the miss rises.
    assert updates["multipliers"][0] < 0 < updates["multipliers"][1]


def test_prulong_reaches_its_target_sparsity(run):
    recipe = PruLong(steps=100, multiplier_rate=0.3, target_sparsity=0.5, pad_multiple=64)
    run = run(checkpoint_every=100)
    recipe.find(run)
    records = metrics(run.folder)
    assert records[0]["sparsity"] < 0.05 and records[0]["next_token"] > 1
    assert records[-1]["sparsity"] == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prulong_reaches_a_high_sparsity_soon_and_keeps_the_heads_that_matter(seed):
    # Without a model: streaming a head costs a loss of its own, small or large, on top of the recipe's penalty.
    recipe = PruLong(steps=200, multiplier_rate=0.3)
    cost = jnp.asarray(np.exp(np.random.default_rng(seed).normal(-4, 2, (30, 3))), jnp.float32)
    params = recipe.init(jnp.ones((30, 3)))
    optimizer = recipe.optimizer()

    @jax.jit
    def train(params):
        def step(number, state):
            params, moments = state

            def loss(params):
                gates = _draw(params["log_alpha"], jax.random.fold_in(jax.random.key(seed), number))
                return (cost * (1 - gates)).sum() + recipe.penalty(params, number)[0]

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return optax.apply_updates(params, updates), moments

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(200), step, (params, optimizer.init(params)))[0]

    with jax.numpy_dtype_promotion("standard"):
        params = train(params)
    assert float(recipe.penalty(params, jnp.int32(199))[1]["sparsity"]) == pytest.approx(0.7, abs=0.06)
    order, gates = np.argsort(-np.ravel(cost)), np.ravel(recipe.gates(params))
    for kept in (27, 45):  # at its target sparsity, and at a lower one
        assert len(set(order[:kept]) & set(np.argsort(-gates)[:kept])) >= 0.85 * kept


def test_prulong_begins_with_another_recipe_s_gates(run):
    start = np.linspace(0, 1, 12).reshape(3, 4)
    params = PruLong(initial_noise=0.0).init(jnp.asarray(start, jnp.float32))
    np.testing.assert_allclose(PruLong().gates(params), 1 / (1 + np.exp(-4.5 * (2 * start - 1))), rtol=1e-5)


def test_prulong_has_no_teacher(run):
    with pytest.raises(ValueError, match="no teacher"):
        PruLong(steps=1).find(replace(run(), attention=GatedModel(mixing="teacher")))


@pytest.mark.parametrize("changed", [{"target_sparsity": 1.2}, {"target_sparsity": -0.1}, {"ramp": 2.0}])
def test_settings_that_make_no_sense_raise(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        PruLong(**changed)


def test_every_recipe_of_the_command_has_its_settings():
    chosen = {name: type(replace(quick(), recipe=name).chosen) for name in RECIPES}
    assert chosen == RECIPES


def quick():
    return Identify(ModelOptions("model"), Path("out"))
