"""Needles: where they lie, how long prompts are, what counts as an answer. And the demo."""

import numpy as np
import pytest
from duo_eval.demo import Demo
from duo_eval.tasks.needle.insert import insert_needle
from duo_eval.tasks.needle.styles import STYLES, digits
from duo_train.data.haystack import load_haystack

from duo_jax import load_tokenizer
from duo_jax.text.tokens import encode


@pytest.fixture(scope="module")
def tokenizer(text_model):
    return load_tokenizer(text_model)


@pytest.fixture(scope="module")
def hay(tokenizer):
    return np.asarray(encode(tokenizer, load_haystack(max_chars=5000)), np.int32)


def hidden(tokenizer, hay, *, seed=0, style=digits, **where):
    rng = np.random.default_rng(seed)
    needle = style(rng)
    return needle, insert_needle(tokenizer, hay, needle, rng, **where)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("style", STYLES.values())
def test_a_prompt_has_the_length_asked_for_and_the_needle_at_its_place(tokenizer, hay, depth, style):
    needle, made = hidden(tokenizer, hay, seed=3, style=style, length=1000, depth=depth)
    text = tokenizer.decode(made.tokens)
    assert len(made.tokens) == 1000 and text.count(needle.sentence.strip()) == 1 and text.endswith(needle.answer)
    sentence = encode(tokenizer, needle.sentence)
    assert made.tokens[made.position :][: len(sentence)].tolist() == sentence
    room = 1000 - len(needle.sentence + needle.question + needle.answer) - 2
    assert abs(made.position - depth * room) <= 3


def test_a_chat_template_is_put_around_it_unless_it_is_not_wanted(chat_model, hay):
    tokenizer = load_tokenizer(chat_model)
    for use_chat in (True, False):
        _, made = hidden(tokenizer, hay, length=500, depth=0.5, use_chat=use_chat)
        text = tokenizer.decode(made.tokens)
        assert len(made.tokens) == 500 and ("[user]" in text) == ("[assistant]" in text) == use_chat


def test_a_seed_decides_key_and_text(tokenizer, hay):
    first, again, other = (hidden(tokenizer, hay, length=500, depth=0.5, seed=seed) for seed in (1, 1, 2))
    assert first[0].key == again[0].key != other[0].key
    assert np.array_equal(first[1].tokens, again[1].tokens)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345.", 1.0), ("It is 12345, not 1", 1.0), (" 123456", 0.0), ("", 0.0), ("1 12345", 0.0)],
)
def test_an_answer_is_right_if_its_first_number_is_the_key(answer, right):
    needle = digits(np.random.default_rng(1))
    assert needle.score(answer.replace("12345", needle.key[0]), needle.key) == right


@pytest.mark.parametrize("style", ["original", "words"])
def test_words_are_counted_whole_and_the_right_answer_scores_one(style):
    needle = STYLES[style](np.random.default_rng(1))
    assert needle.score(needle.sentence, needle.key) == 1.0
    assert needle.score(needle.question + needle.answer, needle.key) == 0.0
    assert needle.score(f"{needle.key[1].upper()}? Or {needle.key[0]}s.", needle.key) == 1 / len(needle.key)


def test_a_length_that_the_text_cannot_fill_is_refused(tokenizer, hay):
    with pytest.raises(ValueError, match=r"5\], the length of the haystack"):
        hidden(tokenizer, hay[:5], length=500, depth=0.5)
    with pytest.raises(ValueError, match="leaves -"):
        hidden(tokenizer, hay, length=20, depth=0.5)
    with pytest.raises(ValueError, match="depth must be"):
        hidden(tokenizer, hay, length=500, depth=1.5)


def test_the_demo_answers_with_half_the_heads_and_fails_with_none(smollm2_gguf, capsys):
    # Depth 0.4 of 1024 tokens is beyond the sinks and before the window.
    Demo(model=str(smollm2_gguf), length=1024).run()
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        line.split(":")[0]: line.endswith("is right") for line in lines if line.endswith(("is right", "is wrong"))
    }
    assert verdicts == {"full attention": True, "45 of 90 heads stream": True, "every head streams": False}
