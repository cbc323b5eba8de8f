"""Needle data: every hidden passkey is asked for and labelled, and sample i depends only on (seed, i)."""

from dataclasses import replace

import numpy as np
import pytest
from duo_train.data.batches import Batch, padded_size, stack
from duo_train.data.needles import NeedleData, Needles
from duo_train.data.vocabulary import COMMON, HELD_OUT, NATO
from transformers import AutoTokenizer

from duo_jax import load_tokenizer

SMALL = Needles(num_passkeys=3, passkey_words=4, min_length=400, max_length=600, num_lengths=3)


@pytest.fixture(scope="module")
def plain(text_model):
    return AutoTokenizer.from_pretrained(text_model)


@pytest.fixture(scope="module")
def chat(chat_model):
    return AutoTokenizer.from_pretrained(chat_model)


def check(data, number):
    """A sample against its own words: every needle is in the text, every answer is right and labelled."""
    sample, config = data[number], data.config
    text = data.tokenizer.decode
    assert len(sample.passkeys) == len(sample.needles) == len(sample.answers) == config.num_passkeys
    for words, needle, answer in zip(sample.passkeys, sample.needles, sample.answers, strict=True):
        assert len(words.split()) == config.passkey_words and set(words.split()) <= set(config.vocabulary)
        assert f"{words}." in text(sample.tokens[slice(*needle)])
        assert text(sample.tokens[slice(*answer)]).strip() == words
        assert needle[1] <= sample.tail <= answer[0]
    assert sample.text_length in config.lengths
    if config.label_tokens == "passkeys":
        labelled = {i for answer in sample.answers for i in range(*answer)}
        assert set(np.flatnonzero(sample.labels)) == labelled
    else:
        assert set(np.flatnonzero(sample.labels)) == set(range(sample.tail, len(sample.tokens)))
    return sample


@pytest.mark.parametrize("label_tokens", ["passkeys", "tail"])
@pytest.mark.parametrize("which", ["plain", "chat"])
def test_hides_asks_and_labels(which, label_tokens, request):
    data = NeedleData(replace(SMALL, label_tokens=label_tokens), request.getfixturevalue(which))
    for number in range(5):
        sample = check(data, number)
        tail = data.tokenizer.decode(sample.tokens[sample.tail :])
        assert [word for word in ("first", "second", "third") if word in tail] == ["first", "second", "third"]
        assert ("[assistant]" in tail) == (which == "chat")


def test_a_chat_template_may_be_left_out(chat):
    sample = NeedleData(replace(SMALL, chat=False), chat)[0]
    assert "[assistant]" not in chat.decode(sample.tokens)


def test_a_sample_depends_only_on_the_seed_and_its_number(plain):
    data, again = NeedleData(SMALL, plain), NeedleData(SMALL, plain)
    want = [data[i].tokens for i in range(4)]
    for number in (3, 0, 2, 1):
        np.testing.assert_array_equal(again[number].tokens, want[number])
    assert not np.array_equal(want[0], want[1])
    other = NeedleData(replace(SMALL, seed=1), plain)
    assert data[0].passkeys != other[0].passkeys


def test_words_may_be_distinct_in_a_sample(plain):
    data = NeedleData(replace(SMALL, distinct_words=True, vocabulary=tuple("abcdefghijkl")), plain)
    assert all(sorted(" ".join(data[i].passkeys).split()) == list("abcdefghijkl") for i in range(5))


def test_depths_are_sorted_and_within_their_range(plain):
    data = NeedleData(
        replace(SMALL, num_passkeys=10, passkey_words=1, min_length=900, max_length=900, min_depth=0.2, max_depth=0.6),
        plain,
    )
    for number in range(10):
        sample = data[number]
        begins = [begin for begin, _ in sample.needles]
        assert begins == sorted(begins)
        sizes = np.cumsum([0] + [end - begin for begin, end in sample.needles])
        depths = [(begin - sample.head - size) / sample.text_length for begin, size in zip(begins, sizes, strict=False)]
        assert min(depths) >= 0.19 and max(depths) <= 0.61


def test_lengths_are_evenly_spaced_and_all_occur(plain):
    assert Needles().lengths[:3] == (1000, 1633, 2265) and Needles().lengths[-1] == 32000
    assert len(Needles().lengths) == 50
    data = NeedleData(replace(SMALL, num_passkeys=1), plain)
    found = {data[i].text_length for i in range(30)}
    assert found == set(SMALL.lengths) == {400, 500, 600}
    assert replace(SMALL, max_length=1600, spacing="geometric").lengths == (400, 800, 1600)


def test_samples_come_round_again(plain):
    data = NeedleData(replace(SMALL, num_samples=3), plain)
    np.testing.assert_array_equal(data[1].tokens, data[7].tokens)
    np.testing.assert_array_equal(data[2].tokens, NeedleData(SMALL, plain)[2].tokens)


def test_defaults_are_the_paper_s():
    config = Needles()
    assert (config.num_passkeys, config.passkey_words, len(config.vocabulary)) == (10, 32, 26)
    assert (config.min_depth, config.max_depth, config.min_length, config.max_length) == (0.05, 0.95, 1000, 32000)
    assert len(set(NATO)) == 26 and [word[0] for word in NATO] == [chr(ord("a") + i) for i in range(26)]


def test_what_recall_asks_for_was_never_trained_on():
    for seen in (NATO, COMMON):
        assert len(set(seen)) == len(seen) and not set(seen) & set(HELD_OUT)


def test_stacked_samples_keep_their_labels(plain):
    samples = [NeedleData(SMALL, plain)[i] for i in range(4)]
    width, num_labels = padded_size(samples, pad_multiple=128)
    batch = Batch(*stack(samples, accumulate=2, width=width, num_labels=num_labels))
    assert batch.tokens.shape[:2] == (2, 2) and batch.tokens.shape[2] % 128 == 0 and batch.labels.shape[2] % 256 == 0
    for number, sample in enumerate(samples):
        row = tuple(x[number // 2, number % 2] for x in batch)
        np.testing.assert_array_equal(row[0][: len(sample.tokens)], sample.tokens)
        np.testing.assert_array_equal(row[1][row[2]], np.flatnonzero(sample.labels))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_passkeys": 21}, r"num_passkeys must be at most 20.*ordinals"),
        ({"num_passkeys": 0}, "num_passkeys"),
        ({"passkey_words": 0}, "passkey_words must be at least 1, got 0"),
        ({"vocabulary": ()}, "a passkey needs words"),
        ({"min_depth": 0.9, "max_depth": 0.1}, r"max_depth must be in \[0\.9, 1\], got 0\.1"),
        ({"max_depth": 1.5}, r"max_depth must be in \[0\.05, 1\], got 1\.5"),
        ({"min_length": 700}, "max_length must be at least min_length=700, got 600"),
        ({"num_lengths": 0}, "num_lengths"),
        ({"distinct_words": True, "vocabulary": ("a", "b")}, "3 passkeys of 4 distinct words need as many.*has 2"),
        ({"num_lengths": 1}, "num_lengths of 1 needs min_length == max_length"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_lengths": 10**9}, "num_lengths must be at most 100000"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"needle": "{ordinal} {words} {ordinal.__class__}"}, "needle may have no other braces"),
        ({"answer": "{ordinal} {words} {words!r}"}, "answer may have no other braces"),
        ({"question": "{ordinal} {ordinal:9}"}, "question may have no other braces"),
        ({"question": "{ordinal} {"}, "question may have no other braces"),
        ({"needle": "{words}"}, r"needle must contain \{ordinal\} and \{words\}"),
        ({"question": "what?"}, r"question must contain \{ordinal\}"),
    ],
)
def test_settings_that_make_no_sense_raise(changed, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changed)


def test_a_text_too_short_for_the_length_raises(plain, tmp_path):
    (tmp_path / "short.txt").write_text("Not much to say. " * 10)
    with pytest.raises(ValueError, match=r"has 170 tokens, the longest sample needs 600"):
        NeedleData(replace(SMALL, haystack=str(tmp_path / "short.txt")), plain)


def test_a_length_too_short_for_the_needles_raises(plain):
    with pytest.raises(ValueError, match=r"3 passkeys of 4 words take about \d+ tokens, more than the 40 tokens"):
        NeedleData(replace(SMALL, min_length=40), plain)


def test_a_real_tokenizer_s_answers_are_the_words_exactly(smollm2_gguf):
    data = NeedleData(
        Needles(num_passkeys=4, passkey_words=8, min_length=700, max_length=700, num_lengths=1),
        load_tokenizer(smollm2_gguf),
    )
    for number in range(10):
        check(data, number)
