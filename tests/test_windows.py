"""Layers with a window of their own and learned sinks: caches, heads that can choose, training, methods, meshes."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.methods.registry import METHODS, method
from duo_eval.speed.roofline import kv_bytes_read
from duo_train.data.needles import NeedleData
from duo_train.gated import GatedModel
from duo_train.identify import Identify
from duo_train.plot import GatesPlot, check_heads
from duo_train.plots.gates import NO_GATE
from duo_train.recipes.attention_profile import _means
from duo_train.run import Run
from transformers import AutoTokenizer

from duo_jax import HeadPattern, KVCache, Model, decode_step, load_model, make_mesh, prefill, save_model
from duo_jax.certified import inference, training
from duo_jax.cli.options import ModelOptions, RoomOptions
from duo_jax.mesh.place import place_model
from duo_jax.pattern.files import CONFIG_FILE
from duo_jax.plan import Plan, any_pattern
from pallas_kernels import Window
from tests.shapes import GOLDEN, TINY
from tests.test_infer import TOLERANCE, dense_logits
from tests.test_train import DATA
from tests.text_models import assert_refused

CONFIG = replace(TINY, num_layers=3, layer_windows=(5, None, 7), sink_logits=True)
SIZES = {"sink_size": 3, "recent_size": 8}
PATTERN = HeadPattern.from_gates([[0, 0], [0, 1], [0, 0]], **SIZES, window_layers=[0, 2])
ROWS = {"sink_size": 3, "recent_size": 8, "window_layers": [0, 2]}


@pytest.fixture(scope="module")
def model():
    return Model.random(CONFIG, seed=1)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 61, (2, 40))


def test_only_layers_with_full_attention_have_heads_that_can_choose():
    gates = [[9.0, 9.0], [0.2, 0.1], [9.0, 9.0], [0.4, 0.3]]
    half = HeadPattern.from_gates(gates, **ROWS, sparsity=0.5)
    assert half.is_retrieval.tolist() == [[False, False], [False, False], [False, False], [True, True]]
    assert (half.num_retrieval, half.num_streaming, half.num_choosable, half.sparsity) == (2, 2, 4, 0.5)
    assert half.kv_fraction(110) == (2 * 110 + 2 * 11) / (4 * 110)
    budget = HeadPattern.from_gates(gates, **ROWS, kv_budget=0.55, context_length=110)
    assert budget == half and hash(budget) == hash(half)
    assert np.isnan(half.shown_gates).all(1).tolist() == [True, False, True, False]
    none = HeadPattern.from_gates(gates[:2], **SIZES, window_layers=[0, 1], sparsity=0.5)
    assert (none.num_choosable, none.sparsity, none.kv_fraction(100)) == (0, 0.0, 1.0)
    assert none == none.of(replace(TINY, layer_windows=(5, 5)))


def test_a_pattern_is_saved_with_its_window_layers_and_one_without_takes_the_model_s(tmp_path):
    gates = np.array([[0.0, 0.0], [0.2, 0.1], [0.0, 0.0]])
    pattern = HeadPattern.from_gates(gates, **ROWS, sparsity=0.5)
    pattern.save(tmp_path / "own")
    assert HeadPattern.load(tmp_path / "own", sparsity=0.5) == pattern.of(CONFIG) == pattern
    # As other programs write them: rows of zeros, among which heads would be chosen too.
    HeadPattern.from_gates(gates, **SIZES).save(tmp_path / "other")
    other = HeadPattern.load(tmp_path / "other", sparsity=0.5)
    assert other.num_retrieval == 3 and other.of(CONFIG) == pattern
    assert other.of(replace(CONFIG, layer_windows=())) is other


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (HeadPattern.from_gates(np.ones((3, 2)), **SIZES), r"heads in 3 layers, \[0, 1, 2\]"),
        (HeadPattern.from_gates(np.ones((3, 2)), **SIZES, window_layers=[0]), r"in 2 layers, \[1, 2\]"),
        (HeadPattern.full(replace(CONFIG, layer_windows=())), r"in 3 layers, \[0, 1, 2\]"),
    ],
    ids=["no window", "another window", "full attention"],
)
def test_a_pattern_made_for_other_full_layers_is_refused(pattern, words):
    for use in (pattern.check, lambda config: KVCache.init(config, pattern, 1, 16)):
        with pytest.raises(
            ValueError, match=rf"{words}, but the model has full attention in 1, \[1\]: it was made for"
        ):
            use(CONFIG)
    with pytest.raises(ValueError, match="it was made for another model"):
        PATTERN.check(replace(CONFIG, layer_windows=()))


def test_window_layers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers \(0,\) have a window of their own, and so no"):
        replace(PATTERN, window_layers=(0,), is_retrieval=np.ones((3, 2), bool))
    HeadPattern.from_gates(np.ones((3, 2)), **SIZES).save(tmp_path)
    for layers, words in (([3], "must be at most 2, got 3"), ("all", "must be a list of layers")):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(SIZES | {"window_layers": layers}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{CONFIG_FILE}: .*window_layers {words}"):
            HeadPattern.load(tmp_path)


@pytest.mark.parametrize(
    "pattern", [PATTERN, pytest.param(None, marks=pytest.mark.full_matrix)], ids=["pattern", "full attention"]
)
def test_any_chunk_size_and_ragged_rows_equal_a_dense_pass(model, tokens, pattern):
    expected = dense_logits(model, tokens, pattern or HeadPattern.full(CONFIG))
    for chunk_size, lengths in ((7, [30, 30]), (32, [30, 2])):
        cache = KVCache.init(CONFIG, pattern, 2, 40)
        logits, cache = prefill(model, tokens[:, :30], cache, chunk_size=chunk_size, lengths=lengths)
        for step in range(10):
            at = np.asarray(lengths) + step
            np.testing.assert_allclose(logits, expected[[0, 1], at - 1], **TOLERANCE)
            logits, cache = decode_step(model, tokens[[0, 1], at], cache)


def test_a_cache_of_other_windows_is_refused(model, tokens):
    cache = KVCache.init(replace(CONFIG, layer_windows=(5, None, 5)), PATTERN, 2, 40)
    with pytest.raises(ValueError, match="made for a model whose layers have other windows"):
        prefill(model, tokens, cache)


@pytest.mark.mesh
def test_a_mesh_gives_the_logits_of_one_device(model, tokens):
    mesh = make_mesh(tensor=2, sequence=2, data=2)
    placed = place_model(model, mesh, PATTERN)
    results = []
    for each, where in ((model, None), (placed, mesh)):
        cache = KVCache.init(CONFIG, PATTERN, 2, 40, mesh=where)
        logits, cache = prefill(each, tokens[:, :30], cache, chunk_size=16, lengths=[30, 11])
        results += [logits, decode_step(each, [1, 2], cache)[0]]
    np.testing.assert_allclose(results[0], results[2], **TOLERANCE)
    np.testing.assert_allclose(results[1], results[3], **TOLERANCE)


def test_a_saved_model_keeps_its_windows(model, tmp_path):
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").config == CONFIG


def test_gates_of_zero_and_one_make_the_pattern_and_the_teacher_is_the_model(model, tokens):
    attention = GatedModel(**SIZES)
    logits = jax.jit(lambda model, hidden: model.decoder.logits(hidden))
    hidden, outputs = jax.jit(attention.teacher)(model, jnp.asarray(tokens, jnp.int32))
    assert len(outputs) == 1
    np.testing.assert_allclose(
        logits(model, hidden), dense_logits(model, tokens, HeadPattern.full(CONFIG)), **TOLERANCE
    )
    student = jax.jit(attention.student)(model, jnp.asarray(tokens, jnp.int32), jnp.asarray([[0.0, 1.0]]))
    np.testing.assert_allclose(logits(model, student), dense_logits(model, tokens, PATTERN), **TOLERANCE)
    means = _means(model, jnp.asarray(tokens[:1], jnp.int32), None)
    assert len(means) == 1


def test_training_has_gates_for_layers_with_full_attention(model, text_model, tmp_path):
    data = NeedleData(DATA, AutoTokenizer.from_pretrained(text_model))
    assert Run(model, data, GatedModel(), tmp_path).shape == (1, 2)
    pattern = Identify(ModelOptions("x"), tmp_path, **SIZES).pattern(np.array([[0.2, 0.9]]), None, (0, 2))
    assert pattern == PATTERN and pattern.gates.tolist() == [[0, 0], [0.2, 0.9], [0, 0]]
    only = replace(CONFIG, layer_windows=(5, 5, 5))
    with pytest.raises(ValueError, match="every layer of this model has a window of its own"):
        Run(replace(model, config=only), data, GatedModel(), tmp_path)
    with pytest.raises(ValueError, match=r"--layer 2 has a window of 7 tokens .* \[1\]"):
        check_heads(CONFIG, ((1, 0), (2, 0)))


def test_a_figure_of_gates_shows_layers_without_a_choice_apart(tmp_path):
    HeadPattern.from_gates([[0, 0], [0.2, 0.9], [0, 0]], **ROWS).save(tmp_path)
    GatesPlot((str(tmp_path),), sparsity=0.5).run()
    svg = (tmp_path / "gates.svg").read_text()
    assert NO_GATE in svg and (tmp_path / "gates.png").exists()
    title = GatesPlot((str(tmp_path),))._title(str(tmp_path), PATTERN, PATTERN)
    assert "3 × 2, 2 with a window of their own\n1 of 2 gates above 0.5, mean 0.50" in title


@pytest.mark.parametrize(
    ("command", "flag"), [("generate", "--max-context"), ("serve", "--max-context"), ("chat", "--max-length")]
)
def test_a_cache_that_is_shorter_than_a_window_is_refused(duo, text_model, tmp_path, command, flag):
    """Before anything is loaded: the folder has no weights."""
    folder = tmp_path / "model"
    shutil.copytree(text_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(GOLDEN / "gpt_oss" / "config.json", folder)
    prompt = ["--prompt", "Hello"] if command == "generate" else []
    result = duo(command, "--model", folder, flag, 8, *prompt)
    assert_refused(result, f"{flag} must be at least 11, the window of layers of this model")


def test_a_chat_has_room_for_a_window_of_any_size(duo, chat_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 5000, "max_position_embeddings": 8192}))
    assert_refused(duo("chat", "--model", folder, "--max-length", 4096), "must be at least 5000")
    assert_refused(duo("chat", "--model", folder), "no *.safetensors file")


def test_a_plan_counts_each_window_and_certification_asks_for_each():
    plan = Plan(CONFIG, any_pattern(CONFIG, 0.5, **SIZES))
    pair = 2 * 16 * 4
    assert plan.kv(100) == pair * (1 * 100 + 1 * 11 + 2 * 5 + 2 * 7)
    assert plan.kv(3) == plan.kv(7) and plan.kv_per_token == pair
    memory = plan.total(100)
    assert plan.max_context(memory) == 100 and plan.max_context(plan.total(7) - 1) == 0
    with pytest.raises(ValueError, match="shorter than the window of 7 tokens"):
        KVCache.init(CONFIG, PATTERN, 1, 6)
    with pytest.raises(ValueError, match="max_context must be at least 7, the window of layers of this model"):
        RoomOptions(6, "1GB").tokens(plan, 3)
    assert {request.window for request in inference(CONFIG, PATTERN)} == {Window(0, 5), Window(0, 7), PATTERN.window}
    assert {request.window for request in training(CONFIG)} == {None, Window(128, 256), Window(0, 5), Window(0, 7)}
    read = kv_bytes_read(CONFIG, PATTERN, batch_size=1, length=100, itemsize=4)
    assert read == plan.kv(100)


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.full_matrix) for name in ("full", "duo", "random-heads")), "duo+quest"],
)
def test_methods_that_are_patterns_hold_windows_and_learned_sinks_as_they_are(model, tokens, tmp_path, name):
    PATTERN.save(tmp_path / "pattern")
    settings = f"={tmp_path / 'pattern'}" if name.startswith("duo") else ""
    sizes = ({} if name == "full" else SIZES) | ({"dense_layers": 0} if name == "duo+quest" else {})
    chosen = method(name + settings, **sizes)
    logits, state = chosen.begin(model, tokens[0, :30], room=4, budget=1.0)
    expected = dense_logits(model, tokens, HeadPattern.full(CONFIG))
    np.testing.assert_allclose(logits, expected[0, 29], **TOLERANCE)
    logits, state = chosen.step(model, int(tokens[0, 30]), state)
    np.testing.assert_allclose(logits, expected[0, 30], **TOLERANCE)
    assert state.memory.held_nbytes == 2 * 16 * 4 * (2 * 31 + 2 * 5 + 2 * 7)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full", "duo", "random-heads", "duo+quest"}))
def test_methods_without_a_rule_for_windows_say_so(model, tokens, text_model, name):
    chosen = method(name, tokenizer=AutoTokenizer.from_pretrained(text_model))
    with pytest.raises(NotImplementedError, match="has no rule for the 2 layers of this model that have a window"):
        chosen.begin(model, tokens[0], room=4, budget=1.0)
    only_sinks = replace(model, config=replace(CONFIG, layer_windows=()))
    with pytest.raises(NotImplementedError, match=f"{chosen.name} .* has no learned sinks"):
        chosen.begin(only_sinks, tokens[0], room=4, budget=1.0)
