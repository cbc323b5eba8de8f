"""CacheSpec: bytes of every kind of cache, several windows in one cache, and full pools in pages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from duo_jax import HeadPattern, KVCache, Model, decode_step, prefill
from duo_jax.cache.cache import KeyValues
from duo_jax.cache.pools import fingerprint
from duo_jax.cache.spec import CacheSpec
from duo_jax.mesh.mesh import MeshSize
from tests.shapes import TINY
from tests.test_infer import TOLERANCE, decode_rest, dense_logits

PLAIN = replace(TINY, num_layers=3)
GATES = np.array([[1, 0], [1, 1], [0, 1]])
PATTERN = HeadPattern.from_gates(GATES, sink_size=3, recent_size=8)
# Layers in which both kinds of heads meet, all stream with a window of their own, and the pattern decides again.
THREE = replace(PLAIN, layer_windows=(None, 5, None))
HYBRID = HeadPattern.from_gates(GATES, sink_size=3, recent_size=8, window_layers=(1,))
RNG = np.random.default_rng(0)


def spec(layers=(None, 5, None), **changes):
    config = replace(PLAIN, layer_windows=layers)
    pattern = HeadPattern.from_gates(GATES, sink_size=3, recent_size=8, window_layers=config.window_layers)
    return replace(CacheSpec(config, pattern, 2, 45, config.precision()), **changes)


@pytest.fixture(scope="module")
def model():
    return Model.random(THREE, seed=1)


@pytest.fixture(scope="module")
def expected(model):
    tokens = RNG.integers(0, 61, (2, 45))
    return tokens, dense_logits(model, tokens, HYBRID)


def held_bytes(cache):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((cache.full, cache.rings)))


@pytest.mark.parametrize(
    ("changes", "slots", "tokens", "rings"),
    [
        ({}, 2, 45, 2 * 11 + 2 * 5),
        ({"layers": ()}, 4, 45, 2 * 11),
        ({"layers": (2, 5, None)}, 1, 45, 2 * 2 + 2 * 5 + 11),
        ({"layers": (3, 3, 3)}, 0, 45, 6 * 3),
        ({"page_size": 8}, 2, 48, 2 * 11 + 2 * 5),
        ({"layers": (), "pattern": HeadPattern.full(PLAIN)}, 6, 45, 0),
        ({"pattern": HeadPattern.full(THREE)}, 4, 45, 2 * 5),
        ({"pattern": HeadPattern.from_gates(GATES, sink_size=0, recent_size=5, window_layers=[1])}, 2, 45, 4 * 5),
    ],
    ids=["two windows", "none", "three windows", "only windows", "pages", "full", "no pattern", "one window twice"],
)
def test_bytes_equal_the_formula_and_the_allocation(monkeypatch, changes, slots, tokens, rings):
    made = spec(**changes)
    cache = made.empty()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Shapes take the place of arrays.
    shapes = made.abstract()
    assert made.nbytes == cache.nbytes == held_bytes(cache) == 2 * 4 * 16 * 2 * (slots * tokens + rings)
    assert jax.tree.structure(cache) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(cache), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert cache.max_length == tokens
    if slots:
        most = made.fit(made.nbytes)
        assert most == tokens and replace(made, max_length=most + 1).nbytes > made.nbytes


@pytest.mark.parametrize("chunk_size", [3, 16])
def test_a_cache_with_two_windows_equals_a_dense_pass_at_every_position(model, expected, chunk_size):
    tokens, logits_at = expected
    lengths = np.array([20, 7])
    logits, cache = prefill(model, tokens[:, :20], spec().empty(), lengths=lengths, chunk_size=chunk_size)
    np.testing.assert_allclose(logits, logits_at[[0, 1], lengths - 1], **TOLERANCE)
    mark = cache.mark()
    decode_rest(model, cache.fork(), tokens, logits_at)
    # Over all rings, and back.
    _, cache = prefill(model, tokens[:, ::-1][:, :20], cache, chunk_size=chunk_size)
    decode_rest(model, cache.rewind(mark), tokens, logits_at, until=30)


def test_a_mark_of_other_windows_raises():
    mark = spec().empty().mark()
    for other in (spec(()), spec((None, None, 5))):
        with pytest.raises(ValueError, match="this mark is of another cache"):
            other.empty().rewind(mark)


def random_chunk(length):
    k, v = jax.random.normal(jax.random.key(length), (2, 2, length, 2, 16))
    return k, v


def contiguous(cache):
    """The full pools in the order of the tokens."""
    take = lambda x: x[:, cache.pages].reshape(len(x), 2, -1, x.shape[3])  # noqa: E731
    return jax.tree.map(take, cache.full)


def test_tokens_are_written_where_the_page_table_says():
    """The same entries and hashes as in a contiguous cache, with pages in any order; overflow is dropped."""
    plain, paged = spec(max_length=48).empty(), spec(page_size=8, max_length=48).empty()
    pages = jnp.asarray(RNG.permutation(12).reshape(2, 6), jnp.int32)
    paged = replace(paged, pages=pages)
    poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), paged.full)
    paged, plain = (
        replace(paged, full=poison),
        replace(plain, full=KeyValues(*(jnp.full_like(x, jnp.nan) for x in plain.full))),
    )
    for length, lengths in ((21, [21, 5]), (16, [0, 16]), (30, [30, 2])):
        k, v = random_chunk(length)
        counts = jnp.asarray(lengths, jnp.int32)
        for layer in range(3):
            paged, plain = (x.append_chunk(layer, k, v, counts) for x in (paged, plain))
        paged, plain = (x.advance(jnp.asarray(lengths, jnp.int32)) for x in (paged, plain))
        k, v = (x[:, 0] for x in random_chunk(1))
        active = jnp.asarray([False, True])
        for layer in range(3):
            paged, plain = (x.append_token(layer, k, v, active) for x in (paged, plain))
        paged, plain = (x.advance(active.astype(jnp.int32)) for x in (paged, plain))
        for pool, wanted in zip((*contiguous(paged), *paged.rings[0]), (*plain.full, *plain.rings[0]), strict=True):
            np.testing.assert_array_equal(pool, wanted)
        count = jnp.minimum(plain.length, 48)
        hashes = fingerprint(paged.full.k, count, paged.pages), fingerprint(plain.full.k, count)
        np.testing.assert_array_equal(*hashes)


def test_what_no_cache_can_be_is_refused():
    for changes, words in (
        ({"page_size": 0}, "page_size must be at least 1, got 0"),
        ({"page_size": 8, "mesh": MeshSize(sequence=2)}, "a paged cache is divided by heads only, got .*sequence=2"),
        ({"page_size": 8, "mesh": MeshSize(data=2)}, "a paged cache is divided by heads only, got .*data=2"),
        ({"num_pages": 3}, "num_pages=3 counts pages: give page_size"),
        ({"layers": (2,)}, "one entry for each of 3 layers, got 1"),
        ({"layers": (None, 0, None)}, "a window of layer_windows must be at least 1, got 0"),
        ({"pattern": PATTERN}, r"heads in 3 layers, \[0, 1, 2\], but the model has full attention in 2, \[0, 2\]"),
        ({"pattern": HeadPattern.full(TINY)}, "2 layers x 2 KV heads, the model 3 x 2"),
    ):
        with pytest.raises(ValueError, match=words):
            spec(**changes)
    with pytest.raises(ValueError, match="max_length=4 tokens is shorter than the window of 5 tokens that layers"):
        spec(max_length=4).empty()
    assert spec().fit(spec(max_length=4).nbytes) == 0 and spec().fit(spec(max_length=5).nbytes) == 5
    with pytest.raises(ValueError, match="a cache is made on devices"):
        spec(mesh=MeshSize(tensor=2)).empty()


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_a_paged_cache_equals_a_contiguous_one(model, expected, backend):
    """Rows own any pages; then one of them is forked, and the cache is rewound."""
    tokens, logits_at = expected
    cache = spec(page_size=8).empty()
    pages = jnp.asarray(RNG.permutation(12).reshape(2, 6), jnp.int32)
    cache = replace(cache, pages=pages)
    lengths = np.array([20, 7])
    logits, cache = prefill(model, tokens[:, :20], cache, lengths=lengths, chunk_size=16, backend=backend)
    np.testing.assert_allclose(logits, logits_at[[0, 1], lengths - 1], **TOLERANCE)
    mark = cache.mark()
    for step in range(12):
        at = lengths + step
        logits, cache = decode_step(model, tokens[[0, 1], at], cache, backend=backend)
        np.testing.assert_allclose(logits, logits_at[[0, 1], at], **TOLERANCE)
    cache = cache.rewind(mark)
    logits, cache = decode_step(model, tokens[[0, 1], lengths], cache, backend=backend)
    np.testing.assert_allclose(logits, logits_at[[0, 1], lengths], **TOLERANCE)


def test_a_paged_row_is_forked_into_rows(model, expected):
    tokens, logits_at = expected
    cache = spec(page_size=8, batch_size=1).empty()
    _, cache = prefill(model, tokens[:1, :20], replace(cache, pages=cache.pages[:, ::-1]), chunk_size=16)
    rows = cache.fork(2)
    assert rows.nbytes == 2 * cache.nbytes and len(np.unique(rows.pages)) == rows.pages.size
    logits, rows = decode_step(model, tokens[[0, 1], 20], rows)
    np.testing.assert_allclose(logits[0], logits_at[0, 20], **TOLERANCE)
    # The other row wrote into pages of its own.
    logits, _ = decode_step(model, tokens[[0, 0], 21], rows)
    np.testing.assert_allclose(logits[0], logits_at[0, 21], **TOLERANCE)


def test_init_makes_what_the_spec_says(half):
    cache, made = (
        KVCache.init(TINY, half, 2, 32, dtype="int8"),
        CacheSpec(TINY, half, 2, 32, TINY.precision(kv_dtype=np.int8)),
    )
    assert cache.nbytes == made.nbytes == KVCache.bytes_for(TINY, half, 2, 32, dtype=jnp.int8)
