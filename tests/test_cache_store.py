"""Saved caches: generation continues bit for bit; other models and patterns, and damaged files, are refused."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import HeadPattern, KVCache, Model, decode_step, load_tokenizer, prefill
from duo_jax.cache import store
from duo_jax.cache.cache import KeyValues
from duo_jax.cache.spec import CacheSpec
from duo_jax.cache.store import ABOUT
from duo_jax.cli.prompt import PromptOptions
from pallas_kernels import Window
from tests.shapes import TINY
from tests.text_models import assert_refused

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24)).astype(np.int32)
DTYPES = ("float32", "int4")


def pools_of(cache):
    return jax.tree.leaves((cache.full, cache.rings))


@pytest.fixture(scope="module", params=DTYPES)
def filled(request, tiny, half):
    """A ragged batch in a cache that is not full."""
    cache = KVCache.init(tiny.config, half, 2, 48, dtype=request.param)
    return prefill(tiny, TOKENS, cache, lengths=[24, 15])[1]


@pytest.fixture(scope="module")
def folder(tiny, half, tmp_path_factory):
    """A cache on disk, in int4."""
    cache = prefill(tiny, TOKENS, KVCache.init(tiny.config, half, 2, 48, dtype="int4"), lengths=[24, 15])[1]
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache.save(path, tiny, tokens=TOKENS)
    return path


def test_generation_continues_bit_for_bit(filled, tiny, half, tmp_path):
    filled.save(tmp_path / "cache", tiny)
    loaded = KVCache.load(tmp_path / "cache", tiny, pattern=half)
    assert (loaded.nbytes, loaded.max_length, loaded.dtype) == (filled.nbytes, 48, filled.dtype)
    ours, theirs = filled.fork(), loaded
    for token in TOKENS[:, :4].T:
        expected, ours = decode_step(tiny, token, ours)
        found, theirs = decode_step(tiny, token, theirs)
        np.testing.assert_array_equal(found, expected)


def test_a_cache_grows_when_it_is_loaded(filled, tiny, tmp_path):
    filled.save(tmp_path / "cache", tiny)
    longer = KVCache.load(tmp_path / "cache", tiny, max_length=60)
    assert longer.max_length == 60
    for ours, theirs in zip(pools_of(filled), pools_of(longer), strict=True):
        count = min(24, ours.shape[2])
        np.testing.assert_array_equal(ours[:, :, :count], theirs[:, :, :count])
    with pytest.raises(ValueError, match="24 tokens, more than max_length=20"):
        KVCache.load(tmp_path / "cache", tiny, max_length=20)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_a_pool_may_have_no_slot(tiny, sparsity, tmp_path):
    pattern = HeadPattern.from_gates(np.ones((2, 2)), sparsity=sparsity, sink_size=3, recent_size=8)
    cache = KVCache.init(tiny.config, pattern, 1, 16)
    full, rings = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), (cache.full, cache.rings))
    cache = replace(cache, full=full, rings=rings, length=jnp.full(1, 16, jnp.int32))
    cache.save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache")
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(loaded), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    np.testing.assert_array_equal(cache.rings[0].v, loaded.rings[0].v)


def test_windows_and_pages_are_saved(tiny, half, tmp_path):
    """A layer with its own window, and a full pool in pages."""
    config = replace(tiny.config, layer_windows=(None, 4))
    half = HeadPattern.from_gates(half.gates, sink_size=3, recent_size=8, window_layers=[1])
    cache = CacheSpec(config, half, 2, 45, config.precision(), page_size=8).empty()
    pools = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), (cache.full, cache.rings))
    cache = replace(cache, full=pools[0], rings=pools[1], length=jnp.asarray([48, 17], jnp.int32))
    cache.save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache", pattern=half)
    for original, copy in zip(jax.tree.leaves(cache), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(original, copy)
    assert (loaded.windows, loaded.ring_of_layer) == ((half.window, Window(0, 4)), (0, 1))
    assert loaded.window_layers == (1,)
    with pytest.raises(ValueError, match="or different ones"):
        KVCache.load(tmp_path / "cache", pattern=HeadPattern.full(tiny.config))


def test_rows_that_share_pages_of_a_pool_are_saved(tiny, half, tmp_path):
    """Most pages of the table are missing; a loaded cache has room for all of them."""
    spec = CacheSpec(tiny.config, half, 2, 4096, tiny.config.precision(), page_size=8)
    table = np.full((2, 512), -1)
    table[:, :4] = [[5, 2, 7, 0], [5, 2, 6, 1]]
    _, shared = prefill(tiny, TOKENS, replace(spec, num_pages=9).empty().with_pages(table), lengths=[24, 15])
    # The second row continues from the first one's two pages.
    rings = jax.tree.map(lambda x: x.at[:, 1].set(x[:, 0]), shared.rings)
    shared = replace(shared, rings=rings, length=jnp.asarray([24, 16], jnp.int32))
    shared.save(tmp_path / "cache", tiny)
    loaded = KVCache.load(tmp_path / "cache", tiny)
    assert (loaded.max_length, loaded.full.k.shape[1]) == (4096, 1024)
    for token in TOKENS[:, :4].T:
        expected, shared = decode_step(tiny, token, shared)
        found, loaded = decode_step(tiny, token, loaded)
        np.testing.assert_array_equal(found, expected)


def test_layers_with_windows_of_their_own_and_no_retrieval_heads_are_matched(tiny, tmp_path):
    """The pattern's window is not that of the first layer."""
    pattern = HeadPattern.from_gates(np.zeros((2, 2)), sink_size=3, recent_size=8)
    spec = CacheSpec(replace(tiny.config, layer_windows=(8, None)), pattern, 1, 16, tiny.config.precision())
    replace(spec.empty(), length=jnp.full(1, 9, jnp.int32)).save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache", pattern=pattern)
    assert [loaded.window(layer) for layer in range(2)] == [Window(0, 8), pattern.window]
    other = HeadPattern.from_gates(np.zeros((2, 2)), sink_size=4, recent_size=8)
    with pytest.raises(ValueError, match="or different ones"):
        KVCache.load(tmp_path / "cache", pattern=other)


def test_a_large_cache_takes_its_own_size_on_disk(tmp_path):
    """With 4096 tokens: everything that is not keys and values is small."""
    pattern = HeadPattern.from_gates(np.eye(2), sink_size=3, recent_size=8)
    cache = KVCache.init(TINY, pattern, 4, 4096)
    noise = jax.random.normal(jax.random.key(0), cache.full.k.shape)
    full = KeyValues(noise, noise + 1)
    replace(cache, full=full, length=jnp.full(4, 4096, jnp.int32)).save(tmp_path / "cache")
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert abs(size / cache.nbytes - 1) < 0.02


def test_another_model_pattern_or_data_type_is_refused_with_both_sides_named(folder, tiny, half):
    with pytest.raises(ValueError, match=r"another model: weights was '\w+', now '\w+'"):
        KVCache.load(folder, Model.random(TINY, seed=2))
    wider = HeadPattern.from_gates(half.gates, sink_size=4, recent_size=8)
    with pytest.raises(ValueError, match=r"3 sinks, a window of 8\), the pattern has 2 .* \(4 sinks"):
        KVCache.load(folder, tiny, pattern=wider)
    other = HeadPattern.from_gates(1 - half.gates, sink_size=3, recent_size=8)
    with pytest.raises(ValueError, match="or different ones"):
        KVCache.load(folder, tiny, pattern=other)
    with pytest.raises(ValueError, match="in int4, not in float32"):
        KVCache.load(folder, tiny, dtype="float32")


def test_a_cache_without_a_model_cannot_be_matched(tiny, half, tmp_path):
    replace(KVCache.init(tiny.config, half, 1, 16), length=jnp.full(1, 9, jnp.int32)).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="saved without a model"):
        KVCache.load(tmp_path / "cache", tiny)


def test_what_is_there_is_not_overwritten_and_nothing_is_not_saved(folder, tiny, half, tmp_path):
    cache = KVCache.init(tiny.config, half, 1, 16)
    with pytest.raises(ValueError, match="nothing to save"):
        cache.save(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="exists already"):
        cache.save(folder)
    with pytest.raises(FileNotFoundError, match="not a folder with a saved cache"):
        KVCache.load(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="not a saved cache"):
        KVCache.load(tmp_path / "other")
    (tmp_path / "other" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"saved by duo-jax 0\.1, .*: prefill and save it again"):
        KVCache.load(tmp_path / "other")


@pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
def test_no_damage_goes_unnoticed(folder, damage, tmp_path):
    """Every file is needed, and every byte is checked."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["cache-00000.safetensors", ABOUT]
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        content = bytearray((copy / name).read_bytes())
        if damage == "removed":
            (copy / name).unlink()
        else:
            content[len(content) // 2] ^= 1
            (copy / name).write_bytes(content if damage == "altered" else content[: len(content) // 2])
        with pytest.raises(ValueError, match="altered"):
            KVCache.load(copy)


def test_a_description_that_was_altered_is_detected(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / ABOUT
    record = json.loads(path.read_text())
    record["about"]["length"] = [24, 16]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"altered [(]its checksum does not match"):
        KVCache.load(copy)


def test_a_cache_of_an_older_version_is_refused(folder, tmp_path):
    """Whose arrays have these names too, but contain other numbers."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    record = json.loads((copy / ABOUT).read_text())
    del record["about"]["format"], record["own"]
    (copy / ABOUT).write_text(json.dumps(record | {"own": store._text_checksum(record)}))
    with pytest.raises(ValueError, match="int4 and float32 keys and values as another version of duo-jax stored them"):
        KVCache.load(copy)


def test_a_write_that_is_interrupted_leaves_nothing_under_the_name(filled, tiny, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("duo_jax.cache.store.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        filled.save(tmp_path / "cache", tiny)
    assert not list(tmp_path.iterdir())


def test_a_book_is_prefilled_once_and_asked_later(chat_model, duo, tmp_path):
    """Two commands give the same tokens as one."""
    book, question = "A needle is thin. The key is 7134.", " What is the key?"
    options = ("--model", chat_model, "--pattern", chat_model / "pattern", "--sparsity", 0.5)
    done = duo("prefill", *options, "--prompt", book, "--out", tmp_path / "book", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["tokens"] == len(book)
    new = ("--max-new-tokens", 6, "--json")
    whole = json.loads(duo("generate", *options, "--prompt", book + question, *new).out)
    cached = ("--cache", tmp_path / "book", "--prompt", question)
    found = json.loads(duo("generate", *options, *cached, *new).out)
    assert found["prompt_tokens"] == len(question)
    assert found["tokens"] == whole["tokens"]
    assert_refused(duo("generate", *options, *cached, "--kv-dtype", "int4"), "in float32, not in int4")
    assert_refused(duo("generate", *options, *cached, "--chat"), "without --chat")
    assert_refused(duo("prefill", *options, "--prompt", book, "--out", tmp_path / "book"), "exists already")


def test_a_document_and_a_question_are_one_message(chat_model):
    tokenizer, flags = load_tokenizer(chat_model), PromptOptions(chat=True)
    document = flags.encode_document(tokenizer, "A needle.")
    question = flags.encode_question(tokenizer, "Is it?", document, "A needle.")
    whole = flags.encode(tokenizer, "A needle.\n\nIs it?")
    np.testing.assert_array_equal(np.concatenate([document, question]), whole)
