"""KVCache: exact bytes, mark and rewind, donation, and everything that must be refused before any compute."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import HeadPattern, KVCache, Model, checks, decode_step, generate, prefill, stream
from duo_jax.generation import infer
from duo_jax.generation.token_loop import Generator
from tests.shapes import TINY

RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 61, (2, 16))
MORE = RNG.integers(0, 61, (2, 16))


def new(half, *, pattern=True):
    return KVCache.init(TINY, half if pattern else None, 2, 32)


def extend(model, cache, tokens, lengths=None):
    return prefill(model, tokens, cache, lengths=lengths, chunk_size=16)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails a check that comes too late: the compiled functions must not be called."""

    def reached(*args, **kwargs):
        raise AssertionError("computed before it was checked")

    for module, name in ((infer, "_extend"), (infer, "jitted_step"), (Generator, "run")):
        monkeypatch.setattr(module, name, reached)


PATTERNS = {
    "none": None,
    "half": [[1, 0], [0, 1]],
    "all_streaming": [[0, 0], [0, 0]],
    "all_retrieval": [[1, 1], [1, 1]],
}


@pytest.mark.parametrize("gates", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_equal_the_formula_and_what_the_device_holds(gates, dtype):
    pattern = HeadPattern.from_gates(np.array(gates), sink_size=3, recent_size=8) if gates else None
    cache = KVCache.init(TINY, pattern, 5, 70, dtype=dtype)
    num_retrieval = pattern.num_retrieval if pattern else 4
    itemsize = 4 if dtype == "float32" else 2
    formula = 2 * 16 * itemsize * 5 * (num_retrieval * 70 + (4 - num_retrieval) * 11)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((cache.full, cache.rings)))
    assert cache.nbytes == KVCache.bytes_for(TINY, pattern, 5, 70, dtype=dtype) == held == formula
    assert (cache.batch_size, cache.max_length, cache.dtype) == (5, 70, dtype)


def test_bytes_of_a_large_cache_are_computed_without_allocating_it():
    assert KVCache.bytes_for(TINY, None, 1000, 10**9) == 2 * 16 * 4 * 1000 * 4 * 10**9


def test_bytes_of_streaming_heads_do_not_grow_with_the_context(half):
    streaming = [sum(pool.nbytes for pool in KVCache.init(TINY, half, 1, length).rings[0]) for length in (16, 4096)]
    assert streaming[0] == streaming[1] == 2 * 2 * 11 * 16 * 4


@pytest.mark.parametrize("gates", [[[1, 0], [0, 1]], [[0, 0], [1, 0]], [[1, 1], [0, 1]]])
def test_every_head_has_a_slot_of_its_own(gates):
    pattern = HeadPattern.from_gates(np.array(gates), sink_size=3, recent_size=8)
    cache = KVCache.init(TINY, pattern, 1, 16)
    for kind, pool in ((True, cache.full.k), (False, cache.rings[0].k)):
        slots = np.asarray(cache.slot)[np.asarray(cache.is_retrieval) == kind]
        assert sorted(slots) == list(range(pool.shape[0]))


@pytest.mark.parametrize("sizes", [(0, 16), (-1, 16), (2, 0), (2, -5)])
def test_sizes_below_one_raise(sizes):
    with pytest.raises(ValueError, match=f"must be at least 1, got {min(sizes)}"):
        KVCache.init(TINY, None, *sizes)


def test_a_pattern_of_another_model_raises():
    pattern = HeadPattern.from_gates(np.ones((3, 2)), sink_size=3, recent_size=8)
    for make in (KVCache.init, KVCache.bytes_for):
        with pytest.raises(ValueError, match="3 layers x 2 KV heads, the model 2 x 2"):
            make(TINY, pattern, 1, 16)


@pytest.mark.parametrize("pattern", [True, False], ids=["half", "full"])
def test_one_document_is_asked_many_times(tiny, half, pattern):
    """With ragged rows, and questions that overwrite the whole rings."""
    lengths = np.array([16, 5])
    _, cache = extend(tiny, new(half, pattern=pattern), TEXT, lengths)
    mark = cache.mark()
    for question in (MORE, MORE[::-1], TEXT[::-1], MORE):
        fresh, _ = extend(tiny, extend(tiny, new(half, pattern=pattern), TEXT, lengths)[1], question)
        answer, cache = extend(tiny, cache, question)
        np.testing.assert_array_equal(answer, fresh)
        cache = cache.rewind(mark)
        assert cache.length.tolist() == [16, 5]


def test_marks_nest(tiny, half):
    _, cache = extend(tiny, new(half), TEXT, [9, 4])
    outer = cache.mark()
    _, cache = extend(tiny, cache, MORE, [3, 12])
    inner = cache.mark()
    expected, cache = decode_step(tiny, [1, 2], cache)
    _, cache = decode_step(tiny, [3, 4], cache.rewind(inner))
    again, cache = decode_step(tiny, [1, 2], cache.rewind(inner))
    np.testing.assert_array_equal(again, expected)
    cache = cache.rewind(outer)
    _, cache = extend(tiny, cache, MORE, [3, 12])
    again, _ = decode_step(tiny, [1, 2], cache)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("count", [1, 3, 7, 16], ids=lambda n: f"{n}_tokens")
def test_a_mark_whose_tokens_were_overwritten_raises(tiny, half, count):
    """Even if the newest token of the mark is still there, or its first tokens are the same."""
    _, cache = extend(tiny, new(half), TEXT, [5, 5])
    early = cache.mark()
    _, cache = extend(tiny, cache, MORE, [8, 8])
    late = cache.mark()
    cache = cache.rewind(early)
    cache = cache.rewind(late)  # Nothing was overwritten yet.
    other = MORE.copy()
    other[0, 0] = (other[0, 0] + 1) % 61
    _, cache = extend(tiny, cache.rewind(early), other, [count, 1])
    with pytest.raises(ValueError, match="the tokens of this mark are no longer in the cache"):
        cache.rewind(late)
    assert cache.rewind(early).length.tolist() == [5, 5]


def test_a_mark_comes_back_if_the_same_tokens_are_written_again(tiny, half):
    _, cache = extend(tiny, new(half), TEXT, [5, 5])
    early = cache.mark()
    _, cache = extend(tiny, cache, MORE, [8, 8])
    late = cache.mark()
    _, cache = extend(tiny, cache.rewind(early), MORE, [8, 8])
    assert cache.rewind(late).length.tolist() == [13, 13]


def test_a_mark_of_another_cache_raises(tiny, half):
    _, cache = extend(tiny, new(half), TEXT)
    mark = cache.mark()
    resized = replace(half, sink_size=half.recent_size, recent_size=half.sink_size)  # Rings of the same shape.
    others = (KVCache.init(TINY, half, 1, 32), new(half, pattern=False), KVCache.init(TINY, resized, 2, 32))
    for other in others:
        with pytest.raises(ValueError, match="this mark is of another cache"):
            other.rewind(mark)
    _, other = extend(tiny, new(half), MORE)
    with pytest.raises(ValueError, match="no longer in the cache"):
        other.rewind(mark)


def test_rewind_to_an_empty_cache(tiny, half):
    cache = new(half)
    mark = cache.mark()
    expected, cache = extend(tiny, cache, TEXT)
    again, _ = extend(tiny, cache.rewind(mark), TEXT)
    np.testing.assert_array_equal(again, expected)


def test_a_mark_survives_donation_and_copies_no_retrieval_pool(tiny, half):
    _, cache = extend(tiny, new(half), TEXT)
    mark = cache.mark()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(mark)) < cache.rings[0].k.nbytes * 2 + 64
    _, cache = decode_step(tiny, [1, 2], cache)
    cache = cache.rewind(mark)
    _, cache = decode_step(tiny, [1, 2], cache)
    assert cache.rewind(mark).length.tolist() == [16, 16]


def test_a_fork_lives_on_its_own(tiny, half):
    _, cache = extend(tiny, new(half), TEXT)
    fork = cache.fork()
    expected, cache = decode_step(tiny, [1, 2], cache)
    other, fork = decode_step(tiny, [3, 4], fork)
    assert not np.array_equal(other, expected)
    assert not any(
        a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(fork), strict=True)
    )
    after, _ = decode_step(tiny, [5, 6], fork)
    _, direct = extend(tiny, new(half), TEXT)
    _, direct = decode_step(tiny, [3, 4], direct)
    np.testing.assert_array_equal(after, decode_step(tiny, [5, 6], direct)[0])


def test_a_fork_into_rows_continues_as_one_row_does(tiny, half):
    text = np.arange(1, 21)[None]
    _, cache = prefill(tiny, text, KVCache.init(TINY, half, 1, 32))
    rows = cache.fork(3)
    assert rows.length.tolist() == [20, 20, 20] and rows.nbytes == 3 * cache.nbytes
    alone, cache = decode_step(tiny, [7], cache)
    together, rows = decode_step(tiny, [7, 8, 7], rows)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(together[2], alone[0], atol=1e-5)
    assert np.abs(np.asarray(together[1] - alone[0])).max() > 1e-3
    for count, of, words in ((2, rows, "one row becomes"), (0, cache, "batch_size must be at least 1, got 0")):
        with pytest.raises(ValueError, match=words):
            of.fork(count)


USES = {
    "prefill": lambda model, cache: prefill(model, TEXT, cache),
    "decode_step": lambda model, cache: decode_step(model, [1, 2], cache),
    "generate": lambda model, cache: generate(model, TEXT, cache=cache, max_new_tokens=2),
    "stream": lambda model, cache: stream(model, TEXT, cache=cache, max_new_tokens=2),
    "mark": lambda model, cache: cache.mark(),
    "fork": lambda model, cache: cache.fork(),
    "rewind": lambda model, cache: cache.rewind(KVCache.init(TINY, None, 2, 32).mark()),
}
uses = pytest.mark.parametrize("use", USES.values(), ids=USES)
calls = pytest.mark.parametrize("use", list(USES.values())[:4], ids=list(USES)[:4])


@uses
def test_a_donated_cache_raises(tiny, half, use):
    cache = new(half)
    extend(tiny, cache, TEXT)
    with pytest.raises(ValueError, match="this cache was given to a step function before"):
        use(tiny, cache)


@calls
def test_an_overfull_cache_raises_before_any_compute(tiny, half, use, nothing_runs):
    cache = new(half).advance(jnp.array([3, 32], jnp.int32))
    with pytest.raises(ValueError, match=r"row 1 has 32 tokens and \d+ more make \d+, .* max_length=32"):
        use(tiny, cache)
    assert not cache.length.is_deleted()


def test_generate_asks_for_room_for_every_new_token(tiny, half, nothing_runs):
    for call in (generate, stream):
        with pytest.raises(ValueError, match="row 0 has 0 tokens and 33 more make 33"):
            call(tiny, TEXT, cache=new(half), max_new_tokens=17)


@calls
def test_a_cache_of_another_batch_raises(tiny, half, use, nothing_runs):
    with pytest.raises(ValueError, match=r"\(layers, kv heads, head dim, batch\) = \(2, 2, 16, 3\)"):
        use(tiny, KVCache.init(TINY, half, 3, 32))


@pytest.mark.parametrize(
    "changed", [{"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 8}], ids=["layers", "kv_heads", "head_dim"]
)
def test_a_cache_of_another_model_raises(tiny, changed, nothing_runs):
    other = KVCache.init(dataclasses.replace(TINY, **changed), None, 2, 32)
    with pytest.raises(ValueError, match="the cache was made for"):
        prefill(tiny, TEXT, other)


def test_passing_the_trained_positions_warns_exactly_once(monkeypatch):
    monkeypatch.setattr(checks, "_warned", set())
    model = Model.random(dataclasses.replace(TINY, max_positions=16, num_layers=1), seed=0)
    cache = KVCache.init(model.config, None, 2, 32)
    _, cache = prefill(model, TEXT, cache, chunk_size=16)  # As many as it was trained for.
    with pytest.warns(UserWarning, match="17 tokens of context, but the model was trained for 16"):
        _, cache = decode_step(model, [1, 2], cache)
    decode_step(model, [1, 2], cache)  # A second warning would be an error.


def test_quantization_on_a_cpu_warns_exactly_once(monkeypatch, tiny):
    monkeypatch.setattr(checks, "_warned_of_quantization", set())
    full, quantized = (KVCache.init(tiny.config, None, 1, 16, dtype=dtype) for dtype in ("float32", "int8"))
    checks.warn_of_quantization(tiny, full)
    with pytest.warns(UserWarning, match="on a CPU, kv_dtype int8 saves memory and costs time"):
        checks.warn_of_quantization(tiny, quantized)
    checks.warn_of_quantization(tiny, quantized)
    monkeypatch.setattr(checks, "_warned_of_quantization", set())
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    checks.warn_of_quantization(tiny, quantized)
