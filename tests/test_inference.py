"""Prefill and decode step against golden logits at every position, and the programs that they compile to."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duo_jax import Greedy, HeadPattern, KVCache, Model, decode_step, generate, load_model, phases, prefill
from duo_jax.generate import _generate
from tests.conftest import GOLDEN

TOLERANCE = {"rtol": 0, "atol": 1e-4}
KINDS = {"full": "full_logits", "duo": "duo_logits"}


@functools.cache
def load_golden(family: str) -> tuple[Model, dict[str, np.ndarray], HeadPattern]:
    folder = GOLDEN / family
    with np.load(folder / "golden.npz") as arrays:
        return load_model(folder), dict(arrays), HeadPattern.load(folder / "pattern")


def decode_rest(model, cache, ids, expected, *, until=None):
    """Feed every row its own next token until all are at the end, and compare the logits after each."""
    until = ids.shape[1] if until is None else until
    length = np.asarray(cache.length)
    rows = np.arange(len(ids))
    while (length < until).any():
        active = length < until
        at = np.minimum(length, ids.shape[1] - 1)
        logits, cache = decode_step(model, ids[rows, at], cache, active=active)
        np.testing.assert_allclose(logits[active], expected[rows, at][active], **TOLERANCE)
        length = length + active
    np.testing.assert_array_equal(cache.length, length)
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_equals_the_golden_logits_at_every_position(golden, kind):
    """A batch with one row for every prefix: ragged rows from one token to the whole capacity, in chunks of 48."""
    model, arrays, pattern = load_golden(golden.name)
    ids, expected = arrays["ids"], arrays[KINDS[kind]]
    length = ids.shape[1]
    lengths = np.arange(1, length + 1)
    text = lengths % 2  # Both golden texts, in turn.
    cache = KVCache.init(model.config, pattern if kind == "duo" else None, length, length)
    logits, cache = prefill(model, ids[text], cache, lengths=lengths, chunk_size=48)
    np.testing.assert_allclose(logits, expected[text, lengths - 1], **TOLERANCE)
    np.testing.assert_array_equal(cache.length, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_then_decode_equals_the_golden_logits_up_to_capacity(golden, kind):
    """Rows are split at different places: one within the sinks, one after its rings wrapped."""
    model, arrays, pattern = load_golden(golden.name)
    ids, expected = arrays["ids"], arrays[KINDS[kind]]
    cache = KVCache.init(model.config, pattern if kind == "duo" else None, 2, ids.shape[1])
    lengths = np.array([1, 75])
    logits, cache = prefill(model, ids[:, :75], cache, lengths=lengths, chunk_size=75)
    np.testing.assert_allclose(logits, expected[[0, 1], lengths - 1], **TOLERANCE)
    decode_rest(model, cache, ids, expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_chunk_size_and_split_gives_the_golden_logits(data):
    """Several prefills of ragged pieces with different chunk sizes, then decode steps, in one cache."""
    model, arrays, pattern = load_golden("llama")
    ids, expected = arrays["ids"][:, :100], arrays["duo_logits"]
    cache = KVCache.init(model.config, pattern, 2, 100)
    done = np.zeros(2, int)
    for _ in range(data.draw(st.integers(1, 3), label="pieces")):
        if (done == 100).any():
            break
        count = np.array([data.draw(st.integers(1, 100 - n), label="count") for n in done])
        chunk_size = data.draw(st.sampled_from([1, 5, 16]), label="chunk_size")
        piece = np.zeros((2, count.max()), int)
        for row in range(2):
            piece[row, : count[row]] = ids[row, done[row] : done[row] + count[row]]
        logits, cache = prefill(model, piece, cache, lengths=count, chunk_size=chunk_size)
        done += count
        np.testing.assert_allclose(logits, expected[[0, 1], done - 1], **TOLERANCE)
    decode_rest(model, cache, ids, expected, until=min(done.max() + 3, 100))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [2, 3, 7, 24, 28, 29, 64, 100, 160])
def test_more_chunk_sizes(golden, chunk_size):
    model, arrays, pattern = load_golden(golden.name)
    ids = arrays["ids"]
    cache = KVCache.init(model.config, pattern, 2, ids.shape[1])
    logits, _ = prefill(model, ids, cache, chunk_size=chunk_size)
    np.testing.assert_allclose(logits, arrays["duo_logits"][:, -1], **TOLERANCE)


@pytest.mark.parametrize("backend", ["reference"])
def test_a_named_backend_gives_the_golden_logits(backend):
    model, arrays, pattern = load_golden("llama31")
    cache = KVCache.init(model.config, pattern, 2, 40)
    logits, cache = prefill(model, arrays["ids"][:, :39], cache, chunk_size=39, backend=backend)
    np.testing.assert_allclose(logits, arrays["duo_logits"][:, 38], **TOLERANCE)
    logits, cache = decode_step(model, arrays["ids"][:, 39], cache, backend=backend)
    np.testing.assert_allclose(logits, arrays["duo_logits"][:, 39], **TOLERANCE)


def dense_logits(model: Model, tokens: np.ndarray, pattern: HeadPattern | None) -> np.ndarray:
    """Logits `[B, T, V]` of one forward pass with the mask written out: no cache, no kernel."""
    is_retrieval = np.ones((model.config.num_layers, model.config.num_kv_heads), bool)
    sink, recent = 0, 1
    if pattern:
        is_retrieval, sink, recent = pattern.is_retrieval, pattern.sink_size, pattern.recent_size

    def attend(state, layer, q, k, v):
        group, position = q.shape[2] // k.shape[2], np.arange(q.shape[1])
        past = position[None, :] <= position[:, None]
        window = (position[None, :] < sink) | (position[None, :] > position[:, None] - recent)
        mask = np.repeat(np.where(is_retrieval[layer][:, None, None], past, past & window), group, axis=0)
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
        weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, v), state

    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = model.decoder.hidden(tokens, positions, attend, None)
    return np.asarray(model.decoder.logits(hidden))


GATES = {
    "every_head_streams": [[0.0, 0.0], [0.0, 0.0]],
    "no_head_streams": [[1.0, 1.0], [1.0, 1.0]],
    "a_layer_of_each_type": [[0.0, 0.0], [1.0, 1.0]],
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_any_mixture_of_head_types_equals_a_dense_forward_pass(tiny, gates):
    """Rings of 3 + 5 wrap a dozen times."""
    pattern = HeadPattern.from_gates(np.array(gates), sink_size=3, recent_size=5)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 64))
    expected = dense_logits(tiny, tokens, pattern)
    cache = KVCache.init(tiny.config, pattern, 2, 64)
    lengths = np.array([2, 20])
    logits, cache = prefill(tiny, tokens[:, :20], cache, lengths=lengths, chunk_size=16)
    np.testing.assert_allclose(logits, expected[[0, 1], lengths - 1], **TOLERANCE)
    decode_rest(tiny, cache, tokens, expected)


def test_a_window_of_one_token_without_sinks(tiny):
    pattern = HeadPattern.from_gates(np.array([[1.0, 0.0], [0.0, 1.0]]), sink_size=0, recent_size=1)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 24))
    expected = dense_logits(tiny, tokens, pattern)
    logits, cache = prefill(tiny, tokens[:, :16], KVCache.init(tiny.config, pattern, 2, 24), chunk_size=16)
    np.testing.assert_allclose(logits, expected[:, 15], **TOLERANCE)
    decode_rest(tiny, cache, tokens, expected)


def test_rows_of_a_ragged_batch_equal_runs_of_one_row(tiny, half):
    rng = np.random.default_rng(2)
    tokens, lengths = rng.integers(0, 61, (3, 30)), np.array([30, 2, 17])
    together, cache = prefill(tiny, tokens, KVCache.init(tiny.config, half, 3, 32), lengths=lengths, chunk_size=16)
    after, _ = decode_step(tiny, [5, 6, 7], cache)
    for row, length in enumerate(lengths):
        alone = KVCache.init(tiny.config, half, 1, 32)
        logits, alone = prefill(tiny, tokens[row : row + 1, :length], alone, chunk_size=16)
        np.testing.assert_allclose(logits[0], together[row], rtol=0, atol=1e-5)
        logits, _ = decode_step(tiny, [5 + row], alone)
        np.testing.assert_allclose(logits[0], after[row], rtol=0, atol=1e-5)


def test_padding_may_hold_anything(tiny, half):
    tokens, lengths = np.random.default_rng(3).integers(0, 61, (2, 16)), np.array([16, 4])
    results = []
    for padding in (0, 60, -5, 10**9):
        tokens[1, 4:] = padding
        logits, cache = prefill(tiny, tokens, KVCache.init(tiny.config, half, 2, 32), lengths=lengths, chunk_size=16)
        results.append([np.asarray(leaf) for leaf in jax.tree.leaves((logits, cache))])
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


def test_inactive_rows_of_a_decode_step_stay_untouched(tiny, half):
    tokens = np.random.default_rng(4).integers(0, 61, (3, 16))
    _, cache = prefill(tiny, tokens, KVCache.init(tiny.config, half, 3, 32), chunk_size=16)
    before = jax.tree.map(np.array, cache)
    active = np.array([True, False, True])
    _, cache = decode_step(tiny, [3, 10**6, 4], cache, active=active)  # An inactive row's token is not looked at.
    assert cache.length.tolist() == [17, 16, 17]
    for old, new in zip(before.pools, cache.pools, strict=True):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
        assert not np.array_equal(old[:, 0], new[:, 0])


def test_an_inactive_row_of_a_full_cache_does_not_overflow(tiny, half):
    tokens = np.random.default_rng(4).integers(0, 61, (2, 16))
    _, cache = prefill(tiny, tokens, KVCache.init(tiny.config, half, 2, 16), lengths=[16, 15], chunk_size=16)
    logits, cache = decode_step(tiny, [3, 4], cache, active=[False, True])
    assert cache.length.tolist() == [16, 16]
    assert np.isfinite(logits).all()


def test_progress_reports_positions_done(tiny, half):
    done = []
    tokens = np.ones((1, 40), int)
    prefill(tiny, tokens, KVCache.init(tiny.config, half, 1, 64), chunk_size=16, progress=done.append)
    assert done == [16, 32, 40]


def test_prompts_in_one_bucket_share_a_program(tiny, half):
    def run(length):
        tokens = np.ones((1, length), int)
        cache = KVCache.init(tiny.config, half, 1, 64)
        logits, _ = prefill(tiny, tokens, cache)
        generate(tiny, tokens, pattern=half, max_new_tokens=4)
        return logits

    run(40)
    programs = phases._extend._cache_size(), _generate._cache_size()
    for length in (33, 37, 43):
        run(length)
    assert (phases._extend._cache_size(), _generate._cache_size()) == programs
    run(70)  # A longer prompt needs a longer cache: the count can change.
    assert _generate._cache_size() == programs[1] + 1


def test_patterns_with_as_many_retrieval_heads_share_a_program(tiny):
    def run(gates):
        pattern = HeadPattern.from_gates(np.array(gates), sink_size=3, recent_size=8)
        tokens = np.arange(16)[None]
        logits, cache = prefill(tiny, tokens, KVCache.init(tiny.config, pattern, 1, 32), chunk_size=16)
        logits, _ = decode_step(tiny, [1], cache)
        np.testing.assert_allclose(logits, dense_logits(tiny, np.append(tokens, 1)[None], pattern)[:, -1], **TOLERANCE)
        generate(tiny, tokens, pattern=pattern, max_new_tokens=4)

    run([[1.0, 0.0], [0.0, 1.0]])
    jitted = phases._extend, phases._step, _generate
    programs = [function._cache_size() for function in jitted]
    for gates in ([[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]):
        run(gates)
    assert [function._cache_size() for function in jitted] == programs


def extend_program(model: Model, pattern: HeadPattern, tokens: int) -> jax.stages.Compiled:
    cache = KVCache.init(model.config, pattern, 1, 1024)
    last = jnp.zeros((1, model.config.embed_dim))
    ids, lengths = jnp.zeros((1, tokens), jnp.int32), jnp.ones(1, jnp.int32)
    return phases._extend.lower(model, ids, cache, lengths, last, None).compile()


def generate_program(model: Model, pattern: HeadPattern, tokens: int) -> jax.stages.Compiled:
    cache = KVCache.init(model.config, pattern, 1, 1024)
    ids, lengths = jnp.zeros((1, tokens), jnp.int32), jnp.ones(1, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 1)
    return _generate.lower(model, ids, lengths, cache, keys, 8, Greedy(), (), tokens, None).compile()


def test_prefill_computes_logits_of_the_last_position_only(tiny, half):
    vocabulary, tokens = 61, 272  # 61 occurs nowhere else.
    for program in (extend_program(tiny, half, tokens), generate_program(tiny, half, tokens)):
        shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", program.as_text())}
        assert (1, vocabulary) in shapes or program is not None
        assert not [s for s in shapes if vocabulary in s and tokens in s]
        assert max(np.prod(s) for s in shapes if vocabulary in s) <= vocabulary * tiny.config.embed_dim


@pytest.mark.parametrize("phase", ["extend", "step"])
def test_a_step_writes_into_the_cache_that_it_was_given(tiny, half, phase):
    cache = KVCache.init(tiny.config, half, 1, 16384)
    assert cache.nbytes > 4 * 2**20
    if phase == "extend":
        last, ids = jnp.zeros((1, tiny.config.embed_dim)), jnp.zeros((1, 16), jnp.int32)
        lowered = phases._extend.lower(tiny, ids, cache, jnp.ones(1, jnp.int32), last, None)
    else:
        lowered = phases._step.lower(tiny, jnp.zeros(1, jnp.int32), cache, jnp.ones(1, bool), None)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 8
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < cache.nbytes / 8


def test_prefill_and_decode_step_work_inside_a_users_jit(tiny, half):
    @jax.jit
    def ask(model, tokens, lengths, token, cache):
        first, cache = prefill(model, tokens, cache, lengths=lengths, chunk_size=16)
        second, cache = decode_step(model, token, cache)
        return first, second, cache

    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 61, (2, 16)), jnp.int32)
    lengths, token = jnp.array([16, 9]), jnp.array([1, 2])
    expected, cache = prefill(tiny, tokens, KVCache.init(tiny.config, half, 2, 16), lengths=[16, 9], chunk_size=16)
    first, second, cache_of_jit = ask(tiny, tokens, lengths, token, KVCache.init(tiny.config, half, 2, 16))
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5)
    # Row 0 was full: no error can be raised in a traced call, so its logits are NaN rather than quietly wrong.
    assert np.isnan(second[0]).all()
    after, cache = decode_step(tiny, token, cache, active=[False, True])
    np.testing.assert_allclose(second[1], after[1], rtol=0, atol=1e-5)
    assert cache_of_jit.length.tolist() == [17, 10]


def test_a_prefill_that_overflows_inside_jit_gives_nan(tiny, half):
    run = jax.jit(lambda tokens, cache: prefill(tiny, tokens, cache, chunk_size=16)[0])
    tokens = jnp.ones((1, 16), jnp.int32)
    assert np.isfinite(run(tokens, KVCache.init(tiny.config, half, 1, 16))).all()
    full = replace(KVCache.init(tiny.config, half, 1, 16), length=jnp.ones(1, jnp.int32))
    assert np.isnan(run(tokens, full)).all()
