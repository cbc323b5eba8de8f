"""The real Gemma 3 270M, from its GGUF file: what transformers reads from it, and what its windows save."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from duo_jax import HeadPattern, KVCache, Model, generate, load_model
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.open import load_text_tokenizer
from duo_jax.families.presets import PRESETS
from duo_jax.text.reply import Row
from duo_jax.text.tokenizer import TextTokenizer
from tests.shapes import GOLDEN
from tests.test_gguf_tokenizer import KEY, merged

CONFIG = PRESETS["gemma-3-270m"]
ROWS = [json.loads(line) for line in (GOLDEN / "gemma3-270m.jsonl").read_text(encoding="utf-8").splitlines()]
SHORT, LONG = ROWS[:-1], ROWS[-1]


@pytest.fixture(scope="module")
def gemma(gemma_gguf: Path) -> Model:
    """Gemma 3 270M, float32."""
    return load_model(gemma_gguf)


@pytest.fixture(scope="module")
def tokenizer(gemma_gguf: Path) -> TextTokenizer:
    return load_text_tokenizer(gemma_gguf)


def test_gemma_has_the_shape_of_its_preset(gemma_gguf: Path) -> None:
    config = GgufFile(gemma_gguf).config
    assert config.norm_eps == pytest.approx(1e-6)
    assert replace(config, norm_eps=1e-6) == CONFIG


def test_gemma_continues_short_texts_as_in_transformers(gemma: Model, tokenizer: TextTokenizer) -> None:
    lengths = [len(row["ids"]) for row in SHORT]
    tokens = np.zeros((len(SHORT), max(lengths)), np.int32)
    for row, expected in zip(tokens, SHORT, strict=True):
        row[: len(expected["ids"])] = expected["ids"]
    new = np.asarray(generate(gemma, tokens, lengths=lengths, max_new_tokens=48).tokens)
    for row, expected in zip(new, SHORT, strict=True):
        assert row.tolist() == expected["new"]
        assert tokenizer.encode(expected["prompt"]) == expected["ids"]
        assert tokenizer.decode(row.tolist()) == expected["text"]


def test_gemma_continues_a_text_longer_than_its_window_as_in_transformers(gemma: Model) -> None:
    assert len(LONG["ids"]) > 2 * CONFIG.own_windows[0].size
    new = generate(gemma, np.asarray([LONG["ids"]], np.int32), max_new_tokens=48, chunk_size=512).tokens
    assert np.asarray(new)[0].tolist() == LONG["new"]


def test_gemma_splits_text_as_sentencepiece(gemma_gguf: Path, tokenizer: TextTokenizer) -> None:
    metadata = GgufFile(gemma_gguf).metadata
    kinds = list(zip(metadata[KEY + "tokens"], metadata[KEY + "token_type"], metadata[KEY + "scores"], strict=True))
    score = {token: value for token, kind, value in kinds if kind == 1}
    own = sorted((token for token, kind, _ in kinds if kind == 4), key=len, reverse=True)
    split = re.compile("(" + "|".join(map(re.escape, own)) + ")")
    rng = random.Random(0)
    words = [token.replace("▁", " ") for token, kind, _ in kinds if kind in (1, 4)]
    planes = [*range(1, 127), *range(160, 0x2500), *range(0x4E00, 0x9FFF, 7), *range(0x1F300, 0x1F700)]
    texts = ["".join(rng.choices("ab cdE\t019.,'<>{}éß漢😀łñ  \n", k=rng.randint(1, 60))) for _ in range(1000)]
    texts += ["".join(map(chr, rng.choices(planes, k=40))) for _ in range(500)]
    texts += ["".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(2000)]
    texts += ["", " ", " a", "a ", " " * 77 + "x" + "\n" * 99, "a" * 200, "\t" * 70, "</s><b>"]
    for text in texts:
        pieces = [[piece] if piece in own else merged(piece, score) for piece in split.split(text)]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [tokenizer.convert_ids_to_tokens(token) for token in ids] == [x for piece in pieces for x in piece], text
        if "▁" not in text:
            assert tokenizer.decode(ids) == text


def test_gemma_streams_the_text_that_it_decodes(tokenizer: TextTokenizer) -> None:
    for text in (
        "naïve 漢字 😀👩\u200d👧 \U00010348 \x07\x00\n\n\n  <b>two</b>\t\t end",
        " leading, ᚠᛇᚻ ",
        LONG["text"],
    ):
        row, ids = Row(tokenizer), tokenizer.encode(text, add_special_tokens=False)
        shown = [row.add(token) for token in ids]
        assert sum(map(bool, shown)) >= 4, "text is held back"
        assert "".join(shown) + row.rest() == text


def test_windows_keep_a_fraction_of_the_cache_of_full_attention() -> None:
    config, length = replace(CONFIG, dtype="float32"), 32768
    layer = 2 * config.num_kv_heads * config.head_dim * 4  # Bytes of a token.
    full = replace(config, layer_windows=(), window_rope=None)
    assert KVCache.bytes_for(full, None, 1, length) == 18 * layer * length
    assert KVCache.bytes_for(config, None, 1, length) == layer * (3 * length + 15 * 512)
    gates = np.zeros((18, 1), np.float32)
    gates[5] = 1
    pattern = HeadPattern.from_gates(gates, sink_size=64, recent_size=192).of(config)
    assert (pattern.num_choosable, pattern.num_streaming) == (3, 2)
    cache = jax.eval_shape(lambda: KVCache.init(config, pattern, 1, length, dtype="float32"))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert KVCache.bytes_for(config, pattern, 1, length) == layer * (length + 2 * 256 + 15 * 512)
    assert 0 <= stored - KVCache.bytes_for(config, pattern, 1, length) < 1000  # Lengths and positions.
