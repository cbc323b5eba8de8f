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

from duo_jax import HeadPattern, KVCache, Model, decode_step, generate, load_model, prefill
from duo_jax.cache import store
from duo_jax.generation import infer
from duo_jax.generation.token_loop import Generator, Prompt
from tests.shapes import GOLDEN, SMALL_FAMILIES, TINY, families

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


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.full_matrix), 2])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_equal_the_golden_logits_at_every_position(golden, kind, every):
    """A batch with one row for every prefix, or every second one, in chunks of 48; then one step, up to capacity."""
    model, arrays, pattern = load_golden(golden.name)
    ids, expected = arrays["ids"], arrays[KINDS[kind]]
    length = ids.shape[1]
    lengths = np.arange(1, length + 1, every)
    text = np.arange(len(lengths)) % 2  # Both golden texts, in turn.
    cache = KVCache.init(model.config, pattern if kind == "duo" else None, len(lengths), length)
    logits, cache = prefill(model, ids[text], cache, lengths=lengths, chunk_size=48)
    np.testing.assert_allclose(logits, expected[text, lengths - 1], **TOLERANCE)
    np.testing.assert_array_equal(cache.length, lengths)
    active = lengths < length  # The last row is full.
    following = np.minimum(lengths, length - 1)
    logits, cache = decode_step(model, ids[text, following], cache, active=active)
    np.testing.assert_allclose(logits[active], expected[text, following][active], **TOLERANCE)
    np.testing.assert_array_equal(cache.length, lengths + active)


def test_a_bfloat16_model_and_cache_give_the_golden_logits_rounded():
    _, arrays, pattern = load_golden("qwen3")
    ids, expected = arrays["ids"], arrays["duo_logits"]
    half = load_model(GOLDEN / "qwen3", dtype="bfloat16")
    cache = KVCache.init(half.config, pattern, 2, ids.shape[1])
    assert half.dtype == cache.dtype == jnp.bfloat16
    found = []
    logits, cache = prefill(half, ids[:, :90], cache, chunk_size=32)
    for at in range(90, 96):
        found.append(logits)
        logits, cache = decode_step(half, ids[:, at], cache)
    wanted = expected[:, 89:95].swapaxes(0, 1)
    error = np.abs(np.asarray(found) - wanted)
    assert found[0].dtype == jnp.float32
    assert 0 < error.max() < 0.05 * np.abs(wanted).max() and error.mean() < 0.01 * np.abs(wanted).max()


@settings(max_examples=8, deadline=None)
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
        chunk_size = data.draw(st.sampled_from([5, 16]), label="chunk_size")
        piece = np.zeros((2, count.max()), int)
        for row in range(2):
            piece[row, : count[row]] = ids[row, done[row] : done[row] + count[row]]
        logits, cache = prefill(model, piece, cache, lengths=count, chunk_size=chunk_size)
        done += count
        np.testing.assert_allclose(logits, expected[[0, 1], done - 1], **TOLERANCE)
    decode_rest(model, cache, ids, expected)


@pytest.mark.full_matrix
@pytest.mark.parametrize("chunk_size", [2, 7, 24, 29, 64, 160])
def test_more_chunk_sizes(chunk_size):
    model, arrays, pattern = load_golden("qwen3")
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


def dense_logits(model: Model, tokens: np.ndarray, pattern: HeadPattern, context: int | None = None) -> np.ndarray:
    """Logits `[B, T, V]` of one forward pass with the masks written out: no cache, no kernel."""

    def attend(state, layer, q, k, v):
        group, position = q.shape[2] // k.shape[2], np.arange(q.shape[1])
        past = position[None, :] <= position[:, None]
        own, is_full = model.config.window(layer), pattern.is_retrieval[layer]
        sink, recent = (own.sink, own.recent) if own else (pattern.sink_size, pattern.recent_size)
        window = (position[None, :] < sink) | (position[None, :] > position[:, None] - recent)
        mask = np.repeat(np.where(is_full[:, None, None], past, past & window), group, axis=0)
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
        if (cap := model.config.score_cap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(mask[None], scores, -jnp.inf)
        if (sinks := model.decoder.sink_logits(layer)) is not None:  # As transformers: one more key, then dropped.
            column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, column], axis=-1)
        weights = jax.nn.softmax(scores)[..., : k.shape[1]]
        return jnp.einsum("bnts,bsnh->btnh", weights, v), state

    @jax.jit
    def run(model, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = model.decoder.hidden(
            tokens, positions, attend, None, context=context or tokens.shape[1], caps_scores=True
        )
        return model.decoder.logits(hidden)

    return np.asarray(run(model, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize(
    "family", families("smollm3", "olmo3", "ministral3", "phi3", "granite", "gemma2", of=SMALL_FAMILIES)
)
def test_a_dense_forward_pass_gives_the_golden_logits(family):
    """What a family has outside of attention, without the programs of a cache, which take longer to compile."""
    model, arrays, pattern = load_golden(family)
    logits = dense_logits(model, arrays["ids"], pattern.of(model.config))
    np.testing.assert_allclose(logits, arrays["duo_logits"], **TOLERANCE)


def test_capped_scores_equal_a_dense_forward_pass_and_are_refused_where_a_backend_has_no_cap(half):
    model = Model.random(replace(TINY, score_cap=0.05), seed=3)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 32))
    logits, cache = prefill_tiny(model, half, tokens[:, :31])
    np.testing.assert_allclose(logits, dense_logits(model, tokens, half)[:, 30], **TOLERANCE)
    with pytest.raises(NotImplementedError, match="the triton backend has no soft cap of scores"):
        decode_step(model, tokens[:, 31], cache.fork(), backend="triton")
    for backend in (None, "reference"):
        logits, _ = decode_step(model, tokens[:, 31], cache.fork(), backend=backend)
        np.testing.assert_allclose(logits, dense_logits(model, tokens, half)[:, 31], **TOLERANCE)
    with pytest.raises(NotImplementedError, match="caps the scores of attention, which this method does not"):
        model.decoder.hidden(*jnp.zeros((2, 1, 1), jnp.int32), lambda state, layer, q, k, v: (q, state), None)


@pytest.mark.full_matrix
def test_longrope_goes_by_the_room_of_a_cache(tmp_path):
    model, arrays, pattern = load_golden("phi3")
    ids = arrays["ids"][:, :24]
    for room, context in ((32, 32), (40, 72)):
        cache = KVCache.init(model.config, pattern, 2, room)
        logits, cache = prefill(model, ids, cache, chunk_size=16)
        np.testing.assert_allclose(logits, dense_logits(model, ids, pattern, context)[:, -1], **TOLERANCE)
    np.testing.assert_allclose(logits, arrays["duo_logits"][:, 23], **TOLERANCE)
    cache.save(tmp_path / "cache", model)
    assert KVCache.load(tmp_path / "cache", model, max_length=64).max_length == 64
    least = store.least_length(store.read_about(tmp_path / "cache"))
    assert least == 33 and KVCache.load(tmp_path / "cache", model, max_length=least).max_length == 33
    with pytest.raises(
        ValueError, match=r"room for 40 tokens, and cannot have room for 32: RoPE of its model changes at 32"
    ):
        KVCache.load(tmp_path / "cache", model, max_length=32)


MIXTURES = {
    "every_head_streams": ([[0.0, 0.0], [0.0, 0.0]], 1, 3),
    "no_head_streams": ([[1.0, 1.0], [1.0, 1.0]], 3, 8),
    "a_layer_of_each_type_no_sinks_window_of_one": ([[0.0, 0.0], [1.0, 1.0]], 0, 1),
}


@pytest.mark.parametrize(("gates", "sink_size", "recent_size"), MIXTURES.values(), ids=MIXTURES)
def test_any_mixture_of_head_types_equals_a_dense_forward_pass(tiny, gates, sink_size, recent_size):
    """Small rings wrap many times; a row begins with fewer tokens than sinks; both end at capacity."""
    pattern = HeadPattern.from_gates(np.array(gates), sink_size=sink_size, recent_size=recent_size)
    tokens, lengths = np.random.default_rng(0).integers(0, 61, (2, 32)), np.array([1, 20])
    expected = dense_logits(tiny, tokens, pattern)
    logits, cache = prefill_tiny(tiny, pattern, tokens[:, :20], lengths)
    np.testing.assert_allclose(logits, expected[[0, 1], lengths - 1], **TOLERANCE)
    decode_rest(tiny, cache, tokens, expected)


def prefill_tiny(model, pattern, tokens, lengths=None):
    """Prefill with shapes that the tests of the tiny model share, and so their programs."""
    cache = KVCache.init(model.config, pattern, len(tokens), 32)
    return prefill(model, tokens, cache, lengths=lengths, chunk_size=16)


def test_rows_of_a_ragged_batch_equal_runs_of_one_row(tiny, half):
    tokens, lengths = np.random.default_rng(2).integers(0, 61, (2, 30)), np.array([30, 3])
    together, cache = prefill_tiny(tiny, half, tokens, lengths)
    after, _ = decode_step(tiny, [5, 6], cache)
    for row in range(2):
        logits, alone = prefill_tiny(tiny, half, tokens[row : row + 1], lengths[row : row + 1])
        np.testing.assert_allclose(logits[0], together[row], rtol=0, atol=1e-5)
        logits, _ = decode_step(tiny, [5 + row], alone)
        np.testing.assert_allclose(logits[0], after[row], rtol=0, atol=1e-5)


def test_padding_may_hold_anything(tiny, half):
    tokens, lengths = np.random.default_rng(3).integers(0, 61, (2, 16)), np.array([16, 4])
    results = []
    for padding in (0, 60, -5, 10**9):
        tokens[1, 4:] = padding
        results.append([np.asarray(leaf) for leaf in jax.tree.leaves(prefill_tiny(tiny, half, tokens, lengths))])
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


def test_inactive_rows_of_a_decode_step_stay_untouched(tiny, half):
    _, cache = prefill_tiny(tiny, half, np.random.default_rng(4).integers(0, 61, (2, 16)))
    before = [np.array(pool) for pool in (*cache.full, *cache.rings[0])]
    # An inactive row's token is not looked at.
    _, cache = decode_step(tiny, [3, 10**6], cache, active=[True, False])
    assert cache.length.tolist() == [17, 16]
    for old, new in zip(before, (*cache.full, *cache.rings[0]), strict=True):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
        assert not np.array_equal(old[:, 0], new[:, 0])


def test_an_inactive_row_of_a_full_cache_does_not_overflow(tiny, half):
    tokens = np.random.default_rng(4).integers(0, 61, (2, 32))
    _, cache = prefill_tiny(tiny, half, tokens, [32, 31])
    logits, cache = decode_step(tiny, [3, 4], cache, active=[False, True])
    assert cache.length.tolist() == [32, 32]
    assert np.isfinite(logits).all()


def test_progress_reports_positions_done(tiny, half):
    done = []
    cache = KVCache.init(tiny.config, half, 1, 32)
    prefill(tiny, np.ones((1, 28), int), cache, chunk_size=16, progress=done.append)
    assert done == [16, 28]


@pytest.mark.full_matrix
def test_prompts_in_one_bucket_share_a_program(tiny, half):
    def run(length, max_new_tokens=4):
        tokens = np.ones((1, length), int)
        cache = KVCache.init(tiny.config, half, 1, 400)
        logits, _ = prefill(tiny, tokens, cache)
        generate(tiny, tokens, pattern=half, max_new_tokens=max_new_tokens)
        return logits

    run(40)
    programs = infer._extend._cache_size(), Generator.run._cache_size()
    for length in (33, 37, 43):
        run(length)
    run(3, max_new_tokens=40)  # Small calls are padded to one size.
    assert (infer._extend._cache_size(), Generator.run._cache_size()) == programs
    run(70)  # A wider chunk: another program.
    assert Generator.run._cache_size() == programs[1] + 1
    run(300)
    programs = infer._extend._cache_size(), Generator.run._cache_size()
    for length in (290, 310):
        run(length)
    assert (infer._extend._cache_size(), Generator.run._cache_size()) == programs


def test_patterns_with_equally_many_retrieval_heads_share_a_program(tiny):
    def run(gates):
        pattern = HeadPattern.from_gates(np.array(gates), sink_size=3, recent_size=8)
        tokens = np.arange(16)[None]
        _, cache = prefill_tiny(tiny, pattern, tokens)
        logits, _ = decode_step(tiny, [1], cache)
        np.testing.assert_allclose(logits, dense_logits(tiny, np.append(tokens, 1)[None], pattern)[:, -1], **TOLERANCE)
        generate(tiny, tokens, pattern=pattern, max_new_tokens=4)

    run([[1.0, 0.0], [0.0, 1.0]])
    jitted = infer._extend, infer.jitted_step, Generator.run
    programs = [function._cache_size() for function in jitted]
    for gates in ([[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]):
        run(gates)
    assert [function._cache_size() for function in jitted] == programs


def compiled(phase: str, model: Model, cache: KVCache, tokens: int) -> jax.stages.Compiled:
    one, ids = jnp.ones(1, jnp.int32), jnp.zeros((1, tokens), jnp.int32)
    if phase == "extend":
        last = jnp.zeros((1, model.config.embed_dim))
        return infer._extend.lower(model, ids, cache, one, last, None).compile()
    if phase == "step":
        return infer.jitted_step.lower(model, one, cache, one > 0, None).compile()
    keys = jax.random.split(jax.random.key(0), 1)
    seen = jnp.zeros((1, model.config.vocab_size), bool)
    prompt = Prompt(ids, one, seen, keys)
    return Generator.run.lower(Generator(), model, prompt, cache, one[0], capacity=16, width=tokens).compile()


@pytest.mark.parametrize(
    ("phase", "dtype"), [("extend", None), ("step", None), ("generate", None), ("extend", "int4"), ("step", "int4")]
)
def test_a_phase_writes_into_the_cache_that_it_was_given(annotations_off, fresh_programs, tiny, half, phase, dtype):
    """No second cache, in any precision, and no logits of every position."""
    tokens, vocabulary = 272, tiny.config.vocab_size  # No other axis has 272 or 61 entries.
    cache = KVCache.init(tiny.config, half, 1, 1 << (19 if dtype else 16), dtype=dtype)
    program = compiled(phase, tiny, cache, tokens)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 4  # One pool is a half, or a third where it is quantized.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < cache.nbytes / 4
    shapes = [set(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", program.as_text())]
    assert any(tokens in shape for shape in shapes) == (phase != "step")
    assert not any({tokens, vocabulary} <= shape for shape in shapes)


def test_a_decode_step_keeps_the_buffers(tiny, half):
    _, cache = prefill_tiny(tiny, half, np.ones((2, 16), int))
    before = [pool.unsafe_buffer_pointer() for pool in jax.tree.leaves((cache.full, cache.rings))]
    _, after = decode_step(tiny, [1, 2], cache)
    assert [pool.unsafe_buffer_pointer() for pool in jax.tree.leaves((after.full, after.rings))] == before


def test_prefill_and_decode_step_work_inside_a_users_jit(tiny, half):
    @jax.jit
    def ask(model, tokens, lengths, token, cache):
        first, cache = prefill(model, tokens, cache, lengths=lengths, chunk_size=16)
        second, cache = decode_step(model, token, cache)
        return first, second, cache

    def room():  # Row 0 has room only for the prompt.
        return replace(KVCache.init(tiny.config, half, 2, 32), length=jnp.array([16, 0], jnp.int32))

    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 61, (2, 16)), jnp.int32)
    expected, cache = prefill(tiny, tokens, room(), lengths=[16, 9], chunk_size=16)
    first, second, cache_of_jit = ask(tiny, tokens, jnp.array([16, 9]), jnp.array([1, 2]), room())
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5)
    # No error can be raised in a traced call: the logits of the row that overflows are NaN, not quietly wrong.
    assert np.isnan(second[0]).all()
    after, cache = decode_step(tiny, [1, 2], cache, active=[False, True])
    np.testing.assert_allclose(second[1], after[1], rtol=0, atol=1e-5)
    assert cache_of_jit.length.tolist() == [33, 10]


def test_a_prefill_that_overflows_inside_jit_gives_nan(tiny, half):
    run = jax.jit(lambda tokens, cache: prefill(tiny, tokens, cache, chunk_size=16)[0])
    tokens = jnp.ones((1, 16), jnp.int32)
    empty = KVCache.init(tiny.config, half, 1, 32)
    assert np.isfinite(run(tokens, replace(empty, length=jnp.full(1, 16, jnp.int32)))).all()
    full = replace(empty, length=jnp.full(1, 17, jnp.int32))
    assert np.isnan(run(tokens, full)).all()
