import numpy as np
import pytest

from duo_jax import load_tokenizer
from eval.demo import Demo
from eval.passkey import passkey
from train.haystack import load_haystack


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_prompt_has_the_length_asked_for_and_the_key_at_its_place(tokenizer, depth):
    task = passkey(tokenizer, load_haystack(), length=1000, depth=depth, seed=3)
    assert len(task.tokens) == 1000
    assert tokenizer.decode(task.tokens).count(task.key) == 1
    assert f"vault is {task.key}." in tokenizer.decode(task.tokens[task.position :][:40])


def test_a_seed_decides_key_and_text(tokenizer):
    text = load_haystack()
    first, again, other = (passkey(tokenizer, text, length=500, depth=0.5, seed=seed) for seed in (1, 1, 2))
    assert first.key == again.key != other.key
    assert np.array_equal(first.tokens, again.tokens)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345.", True), ("It is 12345, not 1", True), (" 123456", False), ("", False), ("1 12345", False)],
)
def test_an_answer_is_right_if_its_first_number_is_the_key(tokenizer, answer, right):
    task = passkey(tokenizer, load_haystack(), length=500, depth=0.5, seed=1)
    assert task.is_right(answer.replace("12345", task.key)) == right


def test_a_length_that_the_text_cannot_fill_is_refused(tokenizer):
    with pytest.raises(ValueError, match="all there is"):
        passkey(tokenizer, "short", length=500, depth=0.5, seed=1)
    with pytest.raises(ValueError, match="leaves -"):
        passkey(tokenizer, load_haystack(), length=20, depth=0.5, seed=1)
    with pytest.raises(ValueError, match="depth must be"):
        passkey(tokenizer, load_haystack(), length=500, depth=1.5, seed=1)


@pytest.mark.slow
def test_the_demo_answers_with_half_the_heads_and_fails_with_none(smollm2_gguf, capsys):
    # Depth 0.4 of 1024 tokens is beyond the sinks and before the window.
    Demo(model=str(smollm2_gguf), length=1024).run()
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        line.split(":")[0]: line.endswith("is right") for line in lines if line.endswith(("is right", "is wrong"))
    }
    assert verdicts == {"full attention": True, "45 of 90 heads stream": True, "every head streams": False}
