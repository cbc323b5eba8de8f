"""`generate` and `stream` against a decode loop written by hand, and every bad argument refused before any compute."""

import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import (
    Categorical,
    Greedy,
    KVCache,
    RepetitionPenalty,
    Temperature,
    TopP,
    decode_step,
    generate,
    prefill,
    stream,
)
from duo_jax.generation import infer
from duo_jax.generation.generation import prepare
from duo_jax.generation.token_loop import Generator
from tests.shapes import TINY

PROMPT = np.random.default_rng(0).integers(0, 61, (2, 12))
LENGTHS = np.array([12, 5])
NEW = 12
SAMPLED = Categorical((RepetitionPenalty(1.3), Temperature(0.9), TopP(0.95)))
EOS = (8, 24)


def by_hand(model, pattern, prompt, steps, capacity=32):
    """Greedy tokens and their log-probabilities of one row: prefill, then one decode step a token."""
    logits, cache = prefill(model, prompt[None], KVCache.init(model.config, pattern, 1, capacity), chunk_size=16)
    tokens, logprobs = [], []
    for _ in range(steps):
        row = np.asarray(logits[0], np.float64)
        token = int(row.argmax())
        tokens.append(token)
        logprobs.append(row[token] - np.log(np.exp(row - row.max()).sum()) - row.max())
        logits, cache = decode_step(model, [token], cache)
    return tokens, logprobs


def collect(steps):
    """Tokens, log-probabilities `[B, steps]` and lengths `[B]` of a stream."""
    steps = list(steps)
    columns = [np.stack(column, axis=1) for column in zip(*steps, strict=True)]
    return columns[0], columns[1], columns[2].sum(1)


@pytest.fixture(scope="module")
def greedy(tiny, half):
    return generate(tiny, PROMPT, pattern=half, lengths=LENGTHS, max_new_tokens=NEW)


def programs_by_phase(request, caplog):
    """The programs that each phase of a watched stream compiled."""
    phase, programs = "compile", {}

    def watch(name):
        nonlocal phase
        messages = [record.getMessage() for record in caplog.records]
        programs.setdefault(phase, []).extend(x.split()[4] for x in messages if "XLA compilation of" in x)
        phase = name or phase
        caplog.clear()

    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        for _ in request.stream(watch=watch):
            pass
    return programs


def test_a_watched_stream_compiles_everything_in_its_first_phase(tiny, half, caplog):
    cache = KVCache.init(tiny.config, half, 2, 77)  # Of a length that no other test has, so that its programs are new.
    request = prepare(tiny, PROMPT, cache=cache, lengths=LENGTHS, max_new_tokens=3, eos_ids=(60,))
    programs = programs_by_phase(request, caplog)
    assert {"jit(extend)", "jit(_choose)", "jit(step)"} <= set(programs["compile"])
    assert programs["prefill"] == programs["decode"] == []


@pytest.mark.parametrize("pattern", [True, pytest.param(False, marks=pytest.mark.full_matrix)], ids=["half", "full"])
def test_rows_of_a_ragged_batch_equal_a_decode_loop(tiny, half, pattern):
    pattern = half if pattern else None
    out = generate(tiny, PROMPT, pattern=pattern, lengths=LENGTHS, max_new_tokens=NEW)
    for row, length in enumerate(LENGTHS):
        tokens, logprobs = by_hand(tiny, pattern, PROMPT[row, :length], NEW)
        assert out.tokens[row].tolist() == tokens
        np.testing.assert_allclose(out.logprobs[row], logprobs, rtol=0, atol=1e-4)
    assert out.lengths.tolist() == [NEW, NEW]
    # Every token that was generated is in the cache, the last one too.
    assert out.cache.length.tolist() == [12 + NEW, 5 + NEW]


@pytest.mark.parametrize(("sampler", "eos_ids"), [(Greedy(), ()), (SAMPLED, EOS)], ids=["greedy", "sampled"])
def test_stream_gives_the_tokens_of_generate(tiny, half, sampler, eos_ids):
    options = {"lengths": LENGTHS, "max_new_tokens": NEW, "sampler": sampler, "key": 3, "eos_ids": eos_ids}
    out = generate(tiny, PROMPT, pattern=half, **options)
    steps = stream(tiny, PROMPT, pattern=half, **options)
    tokens, logprobs, lengths = collect(steps)
    done = tokens.shape[1]
    assert done == out.lengths.max()
    np.testing.assert_array_equal(tokens, out.tokens[:, :done])
    np.testing.assert_allclose(logprobs, out.logprobs[:, :done], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(lengths, out.lengths)
    np.testing.assert_array_equal(steps.cache.length, out.cache.length)


def test_a_stream_that_is_left_early_has_its_tokens_in_the_cache(tiny, half, greedy):
    steps = stream(tiny, PROMPT, pattern=half, lengths=LENGTHS, max_new_tokens=NEW)
    given = [next(steps).token for _ in range(3)]
    np.testing.assert_array_equal(np.stack(given, 1), greedy.tokens[:, :3])
    assert steps.cache.length.tolist() == [15, 8]
    rest = [step.token for step in steps]
    np.testing.assert_array_equal(np.stack(given + rest, 1), greedy.tokens)


def first_index(row, ids):
    return next((i for i, token in enumerate(row) if token in ids), len(row) - 1)


def test_each_row_stops_at_its_own_eos(tiny, half, greedy):
    """Several ids, one that ends a row at once. What follows is padding, and not in the cache."""
    free = greedy.tokens.tolist()
    later = next(token for token in free[1] if token not in free[0])
    eos_ids = (free[0][2], later) if free[0][2] not in free[1] else (free[0][0], later)
    out = generate(tiny, PROMPT, pattern=half, lengths=LENGTHS, max_new_tokens=NEW, eos_ids=eos_ids)
    for row in range(2):
        length = first_index(free[row], eos_ids) + 1
        assert out.lengths[row] == length
        assert out.tokens[row].tolist() == free[row][:length] + [eos_ids[0]] * (NEW - length)
        np.testing.assert_allclose(out.logprobs[row, :length], greedy.logprobs[row, :length], rtol=0, atol=1e-5)
        assert not out.logprobs[row, length:].any()
        assert out.cache.length[row] == LENGTHS[row] + length
    assert len(set(out.lengths.tolist())) == 2  # One row continued after the other had ended.


def test_one_new_token(tiny, half, greedy):
    steps = list(stream(tiny, PROMPT, pattern=half, lengths=LENGTHS, cache=None, max_new_tokens=1))
    assert len(steps) == 1
    np.testing.assert_array_equal(steps[0].token, greedy.tokens[:, 0])


def test_a_conversation_equals_one_run_over_the_concatenation(tiny, half):
    """The second turn passes only its own tokens and the cache; the rows have different lengths in both turns."""
    more, counts = np.random.default_rng(1).integers(0, 61, (2, 6)), [2, 6]
    cache = KVCache.init(TINY, half, 2, 64)
    first = generate(tiny, PROMPT, lengths=LENGTHS, cache=cache, max_new_tokens=NEW)
    second = generate(tiny, more, lengths=counts, cache=first.cache, max_new_tokens=NEW)
    for row in range(2):
        text = [*PROMPT[row, : LENGTHS[row]], *np.asarray(first.tokens[row]), *more[row, : counts[row]]]
        assert by_hand(tiny, half, np.array(text), NEW, capacity=64)[0] == second.tokens[row].tolist()
        assert second.cache.length[row] == len(text) + NEW


@pytest.mark.full_matrix
def test_the_chunk_size_changes_nothing(tiny, half, greedy):
    out = generate(tiny, PROMPT, pattern=half, lengths=LENGTHS, max_new_tokens=NEW, chunk_size=5)
    np.testing.assert_array_equal(out.tokens, greedy.tokens)
    np.testing.assert_allclose(out.logprobs, greedy.logprobs, rtol=0, atol=1e-4)


def sample(tiny, half, key, prompt=PROMPT, lengths=LENGTHS):
    options = {"lengths": lengths, "max_new_tokens": NEW, "sampler": SAMPLED, "eos_ids": EOS}
    out = generate(tiny, prompt, pattern=half, key=key, **options)
    return np.asarray(out.tokens)


def test_a_seed_is_a_key_and_gives_the_same_tokens(tiny, half):
    first = sample(tiny, half, 5)
    np.testing.assert_array_equal(first, sample(tiny, half, 5))
    np.testing.assert_array_equal(first, sample(tiny, half, jax.random.key(5)))
    assert not np.array_equal(first, sample(tiny, half, 6))


def test_a_row_does_not_depend_on_the_other_rows(tiny, half):
    """Row b depends only on (key, b), not on the other rows or on their number."""
    other = PROMPT.copy()
    other[1] = (other[1] + 1) % 61
    both, changed = sample(tiny, half, 5), sample(tiny, half, 5, prompt=other)
    alone = sample(tiny, half, 5, PROMPT[:1], LENGTHS[:1])
    assert changed[0].tolist() == both[0].tolist() == alone[0].tolist()
    twice = sample(tiny, half, 5, PROMPT[[0, 0]], [12, 12])
    assert not np.array_equal(twice[0], twice[1])  # Equal prompts do not draw equally.


def test_the_repetition_penalty_sees_prompt_and_answer_but_not_padding(tiny, half):
    """A penalty so large that no token occurs twice, nor one of the prompt; tokens of the padding may occur."""
    allowed = set(range(61))
    prompt = np.full((1, 12), 9)
    prompt[0, :5] = [1, 2, 3, 4, 5]
    sampler = Greedy((RepetitionPenalty(1e6),))
    logits = []

    def penalized(padding):
        prompt[0, 5:] = padding
        out = generate(tiny, prompt, lengths=[5], pattern=half, max_new_tokens=NEW, sampler=sampler)
        logits.append(out.logprobs)
        return out.tokens[0].tolist()

    tokens = penalized(9)
    assert len(set(tokens)) == NEW
    assert set(tokens) <= allowed - {1, 2, 3, 4, 5}
    assert penalized(tokens[0]) == tokens  # The padding is now the first token of the answer: it is not penalized.


GOOD = {"max_new_tokens": 4}
BAD = {
    "empty_prompt": (np.zeros((1, 0), int), {}, "the prompt is empty"),
    "no_rows": (np.zeros((0, 4), int), {}, "the prompt is empty"),
    "one_dimension": (np.ones(4, int), {}, r"tokens\[None\]"),
    "length_of_zero": (PROMPT, {"lengths": [12, 0]}, r"lengths must be in \[1, 12\].*got \[12, 0\]"),
    "length_over_the_width": (PROMPT, {"lengths": [13, 5]}, r"lengths must be in \[1, 12\].*got \[13, 5\]"),
    "lengths_of_another_batch": (PROMPT, {"lengths": [3]}, r"one entry a row.*\(1,\)"),
    "float_lengths": (PROMPT, {"lengths": [1.5, 2.0]}, "lengths must be integers, got float64"),
    "negative_token": (np.array([[3, -1]]), {}, r"token ids must be in \[0, 61\), got -1"),
    "token_over_the_vocabulary": (np.array([[3, 61]]), {}, r"token ids must be in \[0, 61\), got 61"),
    "token_beyond_int32": (np.array([[2**32 + 3]]), {}, f"got {2**32 + 3}"),
    "float_tokens": (np.ones((1, 4)), {}, "tokens must be integers, got float64"),
    "ragged_lists": ([[1, 2, 3], [4]], {}, "pad ragged rows at the right and pass lengths="),
    "no_new_tokens": (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "random_without_key": (PROMPT, {"sampler": Categorical()}, "Categorical draws at random: pass key="),
    "eos_outside_the_vocabulary": (PROMPT, {"eos_ids": (2, 61)}, r"\[0, 61\), got 61"),
    "negative_eos": (PROMPT, {"eos_ids": (-1,)}, r"\[0, 61\), got -1"),
    "chunk_size_of_zero": (PROMPT, {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    "unknown_backend": (PROMPT, {"backend": "cuda"}, "unknown attention backend 'cuda'"),
}


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail if a compiled program is called: all checks must come before."""

    def reached(*args, **kwargs):
        raise AssertionError("computed before it was checked")

    for owner, name in ((infer, "_extend"), (infer, "jitted_step"), (infer, "_head"), (Generator, "run")):
        monkeypatch.setattr(owner, name, reached)


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(("tokens", "options", "message"), BAD.values(), ids=BAD)
def test_a_bad_argument_raises_before_any_compute(request, tiny, half, call, tokens, options, message):
    if "backend" not in options:  # The backend is looked up while the program is traced.
        request.getfixturevalue("nothing_runs")
    with pytest.raises(ValueError, match=message):
        call(tiny, tokens, pattern=half, **(GOOD | options))


@pytest.mark.parametrize("call", [generate, stream])
def test_a_pattern_with_a_cache_raises(tiny, half, call, nothing_runs):
    with pytest.raises(ValueError, match="give pattern or cache, not both"):
        call(tiny, PROMPT, pattern=half, cache=KVCache.init(TINY, half, 2, 32), max_new_tokens=4)


PROMPT_ERRORS = [name for name, (_, options, _) in BAD.items() if not set(options) - {"lengths", "chunk_size"}]


@pytest.mark.parametrize("name", PROMPT_ERRORS)
def test_prefill_refuses_the_same_prompts(tiny, half, name, nothing_runs):
    tokens, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        prefill(tiny, tokens, KVCache.init(TINY, half, max(1, len(tokens)), 32), **options)


@pytest.mark.parametrize(
    ("token", "active", "message"),
    [
        ([3, -1], None, r"\[0, 61\), got -1"),
        ([61, 3], None, r"\[0, 61\), got 61"),
        ([3, 2**40], None, f"got {2**40}"),
        ([1.0, 2.0], None, "token must be integers, got float64"),
        ([[1], [2]], None, r"token must be \[batch\] integers, got int64\(2, 1\)"),
        ([1, 2], [True], r"active must be a bool for each of 2 rows, got bool\(1,\)"),
        ([1, 2], [1, 0], "active must be a bool for each of 2 rows, got int64"),
        (jnp.array([1, -7]), None, "got -7"),
    ],
)
def test_decode_step_refuses_bad_tokens(tiny, half, token, active, message, nothing_runs):
    with pytest.raises(ValueError, match=message):
        decode_step(tiny, token, KVCache.init(TINY, half, 2, 32), active=active)


@pytest.mark.parametrize("function", [generate, stream])
def test_a_wrong_name_is_refused_in_the_name_of_the_function(tiny, function):
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument 'max_tokens'"):
        inspect.unwrap(function)(tiny, PROMPT, max_tokens=3)  # Shape checks have another message.


@pytest.mark.usefixtures("annotations_off")
def test_a_numpy_integer_of_new_tokens_is_taken_and_a_fraction_is_refused(tiny):
    tokens = np.arange(3, 9)[None]
    out = generate(tiny, tokens, max_new_tokens=np.int64(3))
    assert np.array_equal(out.tokens, generate(tiny, tokens, max_new_tokens=3).tokens)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer"):
        generate(tiny, tokens, max_new_tokens=2.5)
