"""Head patterns: files, choices of heads, and what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from duo_jax import PRESETS, HeadPattern, KVCache, published_patterns
from duo_jax.pattern.files import CONFIG_FILE, GATES_FILE

SHIPPED = Path(__file__).parent.parent / "duo_jax" / "pattern" / "published"
SIZES = {"sink_size": 4, "recent_size": 12}
GATES = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-0.5, 1.5))


def test_published_patterns_are_shipped_with_their_licence():
    assert len([name for name in published_patterns() if "smollm2" not in name]) == 6
    assert "smollm2-135m-instruct" in published_patterns()
    assert "Copyright (c) 2024 MIT HAN Lab" in (SHIPPED / "NOTICE").read_text()


@pytest.mark.parametrize("name", published_patterns())
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_a_published_pattern_round_trips_byte_for_byte(name, sparsity, tmp_path):
    HeadPattern.load(name, sparsity=sparsity).save(tmp_path)
    for file in (GATES_FILE, CONFIG_FILE):
        assert (tmp_path / file).read_bytes() == (SHIPPED / name / file).read_bytes()


def test_a_changed_size_is_saved_and_the_rest_of_the_config_kept(tmp_path):
    HeadPattern.load("mistral-7b-instruct-v0.2", sink_size=16, recent_size=64).save(tmp_path)
    again = HeadPattern.load(tmp_path)
    assert (again.sink_size, again.recent_size) == (16, 64)
    assert again.metadata["lr"] == 0.02


@settings(deadline=None)
@given(gates=GATES)
def test_raw_gates_survive_a_file_exactly(gates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pattern")
    HeadPattern.from_gates(gates, **SIZES).save(folder)
    assert np.array_equal(HeadPattern.load(folder).gates, gates)


@settings(deadline=None)
@given(gates=GATES, sparsity=st.floats(0, 1))
def test_sparsity_streams_that_share_of_the_smallest_gates(gates, sparsity):
    pattern = HeadPattern.from_gates(gates, sparsity=sparsity, **SIZES)
    assert pattern.num_streaming == int(sparsity * gates.size + 1e-9)
    clipped = gates.clip(0, 1)
    if 0 < pattern.num_streaming < gates.size:
        assert clipped[~pattern.is_retrieval].max() <= clipped[pattern.is_retrieval].min()


@settings(deadline=None)
@given(gates=GATES, threshold=st.floats(0, 1))
def test_threshold_alone_is_a_rule(gates, threshold):
    pattern = HeadPattern.from_gates(gates, threshold=threshold, **SIZES)
    assert np.array_equal(pattern.is_retrieval, gates.clip(0, 1) >= threshold)


@settings(deadline=None)
@given(gates=GATES, budget=st.floats(0, 1), context=st.integers(1, 2000))
def test_kv_budget_takes_as_many_retrieval_heads_as_fit(gates, budget, context):
    least = min(context, 16) / context
    if budget < least:
        with pytest.raises(ValueError, match="streaming heads keep already"):
            HeadPattern.from_gates(gates, kv_budget=budget, context_length=context, **SIZES)
        return
    pattern = HeadPattern.from_gates(gates, kv_budget=budget, context_length=context, **SIZES)
    assert pattern.kv_fraction(context) <= budget + 1e-6
    if pattern.num_streaming:
        one_more = pattern.kv_fraction(context) + (context - min(context, 16)) / (gates.size * context)
        assert one_more > budget - 1e-6


def test_ties_are_broken_by_kv_head_then_layer():
    pattern = HeadPattern.from_gates(np.ones((3, 2)), sparsity=0.5, **SIZES)
    # All gates equal: head 0 of every layer streams before head 1 of any, which spreads streaming over the layers.
    assert pattern.is_retrieval.tolist() == [[False, True]] * 3
    fewer = HeadPattern.from_gates(np.ones((3, 2)), sparsity=1 / 3, **SIZES)
    assert fewer.is_retrieval.tolist() == [[False, True], [False, True], [True, True]]


def test_gates_beyond_the_ends_are_in_order_too():
    gates = np.array([[1.0, 1.002], [-0.003, 0.0], [1.001, -0.001]])
    kept = [HeadPattern.from_gates(gates, sparsity=n / 6, **SIZES).is_retrieval for n in range(6)]
    order = [np.argwhere(more & ~less).tolist()[0] for more, less in pairwise(kept)]
    assert order == [[1, 0], [2, 1], [1, 1], [0, 0], [2, 0]]
    assert HeadPattern.from_gates(gates, threshold=0.0, **SIZES).num_streaming == 0


def test_the_same_gates_choose_these_heads_on_every_machine():
    # Four published patterns have more exact ones than retrieval heads at this sparsity, so ties decide.
    chosen = {
        name: np.packbits(HeadPattern.load(name, sparsity=0.75).is_retrieval).tobytes().hex()
        for name in published_patterns()
    }
    expected = json.loads((Path(__file__).parent / "golden" / "patterns_075.json").read_text())
    assert chosen == expected


def test_names_match_in_any_case():
    assert HeadPattern.load("Llama-2-7B-32K-Instruct").num_layers == 32


def test_a_published_pattern_fits_its_model():
    pattern = HeadPattern.load("llama-3-8b-instruct-gradient-1048k", sparsity=0.5)
    assert KVCache.bytes_for(PRESETS["llama-3-8b"], pattern, 1, 1000) == 512 * (128 * 1000 + 128 * (128 + 256))
    with pytest.raises(ValueError, match="32 layers x 8 KV heads, the model 32 x 32"):
        pattern.check(PRESETS["llama-2-7b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\], got 1.5"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": float("nan")}, "sparsity must be in"),
        ({"threshold": 2.0}, "threshold must be in"),
        ({"sparsity": 0.5, "threshold": 0.5}, "one of sparsity, threshold and kv_budget"),
        ({"kv_budget": 0.5}, "go together"),
        ({"context_length": 100}, "go together"),
        ({"kv_budget": 0.5, "context_length": 0}, "context_length must be at least 1"),
        ({"recent_size": 0}, "recent_size must be at least 1"),
        ({"sink_size": -1}, "sink_size must be at least 0"),
    ],
)
def test_a_bad_rule_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HeadPattern.from_gates(np.ones((2, 2)), **(SIZES | options))


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="gates"):
        HeadPattern.from_gates(np.ones((0, 2)), **SIZES)


def test_gates_with_nan_are_refused_with_their_place():
    with pytest.raises(ValueError, match=r"\(layer, kv head\) \[\(1, 0\)\]"):
        HeadPattern.from_gates(np.array([[1.0, 0.0], [np.nan, 1.0]]), **SIZES)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (GATES_FILE, "1.0\t0.5\n1.0\n", "same number of tab-separated gates"),
        (GATES_FILE, "1.0\tx\n", "not a number"),
        (GATES_FILE, "nan\t1.0\n", r"heads\.tsv: gates must be finite"),
        (GATES_FILE, "", "same number of tab-separated gates"),
        (CONFIG_FILE, "{", "not JSON"),
        (CONFIG_FILE, '{"sink_size": 4}', "has no 'recent_size'"),
        (CONFIG_FILE, '{"sink_size": 4, "recent_size": "12"}', "recent_size must be an integer"),
        (
            CONFIG_FILE,
            '{"sink_size": 4, "recent_size": 12, "default_sparsity": 2}',
            r"json: default_sparsity must be in",
        ),
        (CONFIG_FILE, "[]", "must contain a JSON object, not a list"),
    ],
)
def test_a_damaged_file_is_named(file, text, message, tmp_path):
    shutil.copytree(SHIPPED / "smollm2-135m-instruct", tmp_path / "p")
    (tmp_path / "p" / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(tmp_path / "p")


def test_a_missing_file_and_an_unknown_name_say_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a pattern is full_attention_heads\.tsv and config\.json"):
        HeadPattern.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="smollm2-135m-instruct"):
        HeadPattern.load("no-such-pattern")


def test_metadata_that_was_changed_is_saved(tmp_path):
    pattern = HeadPattern.load("mistral-7b-instruct-v0.2")
    pattern.metadata["note"] = "mine"
    pattern.save(tmp_path)
    assert HeadPattern.load(tmp_path).metadata["note"] == "mine"


def test_the_default_sparsity_of_a_file_applies_where_no_rule_is_given(tmp_path):
    pattern = HeadPattern.load("smollm2-135m-instruct")
    pattern.metadata["default_sparsity"] = 0.4
    pattern.save(tmp_path)
    assert HeadPattern.load(tmp_path).sparsity == HeadPattern.load(tmp_path, recent_size=8).sparsity == 0.4
    for rule in ({"sparsity": 0.5}, {"threshold": 0.5}, {"kv_budget": 0.5, "context_length": 4096}):
        assert HeadPattern.load(tmp_path, **rule) == HeadPattern.load("smollm2-135m-instruct", **rule)
