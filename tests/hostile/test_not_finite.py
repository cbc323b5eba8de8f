"""NaN and infinite logits end a generation with an error that names the step; -inf of a mask does not."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duo_eval.methods.registry import greedy, method
from flax import nnx

from duo_jax import LM, Greedy, KVCache, Model, decode_step, generate, load, load_model, save_model, stream
from duo_jax.finite import check_finite, json_text
from tests.shapes import TINY
from tests.text_models import assert_refused

PROMPT = np.arange(3, 9)[None]
STEP = r"step 1: the logits are not finite; .*(check the checkpoint|float16)"


def damaged(model: Model, value: float, token: int | None = None) -> Model:
    """A model with one number of its final norm, or of one token's embedding, replaced."""
    flat = dict(nnx.to_flat_state(model.params))
    path = next(path for path in flat if path[0] == ("norm" if token is None else "embed"))
    array = flat[path].get_value()
    array = array.at[0].set(value) if token is None else array.at[token, 0].set(value)
    flat[path] = flat[path].replace(array)
    return replace(model, params=nnx.from_flat_state(flat.items()))


@pytest.fixture(scope="module", params=[math.nan, math.inf], ids=str)
def broken(request: pytest.FixtureRequest, tiny: Model) -> Model:
    return damaged(tiny, request.param)


def test_generate_and_stream_name_the_step(broken, half):
    options = {"pattern": half, "max_new_tokens": 4}
    with pytest.raises(FloatingPointError, match=STEP):
        generate(broken, PROMPT, **options)
    steps = stream(broken, PROMPT, **options)
    with pytest.raises(FloatingPointError, match=STEP):
        next(steps)
    assert list(steps) == []


def test_float16_that_overflows_is_named(tiny):
    half = Model.random(TINY, seed=1, dtype="float16")
    with pytest.raises(FloatingPointError, match=r"above 65504 overflow in float16: .* bfloat16 or float32"):
        generate(damaged(half, math.inf), PROMPT, max_new_tokens=4)


def test_a_later_step_is_named_and_ended_rows_do_not_count(tiny, half):
    tokens = np.asarray(generate(tiny, PROMPT, pattern=half, max_new_tokens=4).tokens)[0].tolist()
    later = damaged(tiny, math.nan, tokens[1])  # The logits after the second new token are NaN.
    assert tokens[1] not in (*PROMPT[0], tokens[0])
    for call in (generate, lambda *args, **options: list(stream(*args, **options))):
        with pytest.raises(FloatingPointError, match="step 3: "):
            call(later, PROMPT, pattern=half, max_new_tokens=4)
        call(later, PROMPT, pattern=half, max_new_tokens=2)
        call(later, PROMPT, pattern=half, max_new_tokens=4, eos_ids=(tokens[1],))


def test_what_a_sampler_masks_with_minus_infinity_is_no_error(tiny):
    class Only:
        def __call__(self, logits, seen):
            return jnp.where(jnp.arange(logits.shape[1]) == 5, logits, -jnp.inf)

    assert np.asarray(generate(tiny, PROMPT, max_new_tokens=3, sampler=Greedy((Only(),))).tokens).tolist() == [[5] * 3]


def test_methods_of_the_evaluation_stop_too(broken):
    for name in ("full", "tova"):
        with pytest.raises(FloatingPointError, match=STEP):
            greedy(method(name, model="", tokenizer=None, defaults={}), broken, PROMPT[0], max_new_tokens=2)


def test_a_document_answers_after_a_question_that_failed(text_model):
    lm = load(text_model, progress=False)
    untied = Model.random(replace(lm.model.config, tied_head=False), seed=1)  # The logits of other tokens stay finite.
    lm = LM(damaged(untied, math.nan, lm.encode("}")[-1]), lm.tokenizer)
    with lm.document("The key is under the mat.") as document:
        expected = document.ask("Where?", max_new_tokens=4)
        for ask in (document.ask, lambda *args, **options: document.stream(*args, **options).finish()):
            with pytest.raises(FloatingPointError, match="step 1: "):
                ask("Where}?", max_new_tokens=4)
            assert document.ask("Where?", max_new_tokens=4) == expected


def test_a_cache_that_overflowed_in_a_users_jit_is_still_nan(tiny):
    cache = replace(KVCache.init(TINY, None, 1, 16), length=jnp.array([16], jnp.int32))
    logits, _ = jax.jit(decode_step)(tiny, jnp.array([3], jnp.int32), cache)
    assert np.isnan(np.asarray(logits)).all()


def test_the_command_refuses_and_prints_no_json(text_model, tmp_path, duo):
    save_model(damaged(load_model(text_model, progress=False), math.nan), tmp_path / "m", load(text_model).tokenizer)
    for flags in ((), ("--json",)):
        result = duo("generate", "--model", tmp_path / "m", "--prompt", "hi", "--max-new-tokens", 2, *flags)
        assert_refused(replace(result, out=result.out.strip()), "step 1: the logits are not finite")


def test_a_chat_reports_it_and_takes_the_next_line(chat_model, tmp_path, duo, monkeypatch):
    save_model(damaged(load_model(chat_model, progress=False), math.nan), tmp_path / "m", load(chat_model).tokenizer)
    lines = iter(["hi", "ho", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    result = duo("chat", "--model", tmp_path / "m", "--max-length", 64)
    assert result.code == 0 and result.err.count("(step 1: the logits are not finite") == 2


def test_json_has_no_numbers_that_json_lacks():
    record = {"a": [math.nan, -math.inf, 1.5], "b": {"c": (math.inf, "x", None, 3)}}
    assert json.loads(json_text(record)) == {"a": [None, None, 1.5], "b": {"c": [None, "x", None, 3]}}


def test_scores_that_are_not_finite_are_refused():
    check_finite("", [0.0, -1e30], np.float32)
    for bad in (math.nan, -math.inf):
        with pytest.raises(FloatingPointError, match="the scores are not finite"):
            check_finite("the scores are", [0.0, bad], np.float32)
