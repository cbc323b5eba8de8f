"""Samplers against plain numpy statements of what each one keeps, and the seeds that draws come from."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from duo_jax import Categorical, Greedy, MinP, RepetitionPenalty, Temperature, TopK, TopP
from duo_jax.generation.sampling import MASKED, Sampler, Transform

BATCH, VOCAB = 2, 12
SETTINGS = settings(max_examples=30, deadline=None)
# Few values, so that ties are common; halves, so that sums are exact.
tied_logits = hnp.arrays(np.float32, (BATCH, VOCAB), elements=st.integers(-8, 8).map(lambda i: i / 2))
seen_masks = hnp.arrays(np.bool_, (BATCH, VOCAB))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def apply(transform: Transform, logits: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    seen = np.zeros(logits.shape, bool) if seen is None else seen
    return np.asarray(transform(jnp.asarray(logits), jnp.asarray(seen)))


def keys(seed: int, batch: int = BATCH) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


@SETTINGS
@given(logits=tied_logits, value=st.sampled_from([0.25, 0.7, 1.0, 3.0]))
def test_temperature_divides(logits, value):
    np.testing.assert_allclose(apply(Temperature(value), logits), logits / value, rtol=1e-6)


@SETTINGS
@given(logits=tied_logits, k=st.sampled_from([1, 2, 5, VOCAB, 100]))
def test_top_k_keeps_the_k_largest_and_ties_with_the_last(logits, k):
    found = apply(TopK(k), logits)
    for row, kept in zip(logits, found, strict=True):
        least = sorted(row, reverse=True)[min(k, VOCAB) - 1]
        np.testing.assert_array_equal(kept, np.where(row >= least, row, np.float32(MASKED)))
        assert (kept > MASKED).sum() >= min(k, VOCAB)


@SETTINGS
@given(logits=tied_logits, p=st.floats(0.05, 0.95))
def test_top_p_keeps_what_transformers_keeps(logits, p):
    """The rule of its TopPLogitsWarper, which removes tokens from the least likely on; the sort is stable."""
    for row, kept in zip(logits, apply(TopP(p), logits), strict=True):
        order = np.argsort(row, kind="stable")
        sums = np.cumsum(softmax(row)[order])
        if np.abs(sums - (1 - p)).min() < 1e-5:  # Which side of p a sum falls on is a matter of rounding.
            continue
        removed = sums <= 1 - p
        removed[-1] = False
        expected = row.copy()
        expected[order[removed]] = MASKED
        np.testing.assert_array_equal(kept, expected)


def test_top_p_keeps_no_more_of_equally_likely_tokens_than_it_needs():
    kept = apply(TopP(0.5), np.zeros((1, 8), np.float32))
    assert (kept > MASKED).tolist() == [[False] * 4 + [True] * 4]


def test_top_p_of_one_keeps_every_token():
    logits = np.array([[0.0, 1.0, 2.0, -300.0]], np.float32)
    np.testing.assert_array_equal(apply(TopP(1.0), logits), logits)


def test_a_tiny_top_p_keeps_the_most_likely_token():
    kept = apply(TopP(1e-6), np.array([[0.0, 5.0, 2.0, -3.0]], np.float32))
    assert (kept > MASKED).tolist() == [[False, True, False, False]]


@SETTINGS
@given(logits=tied_logits, p=st.sampled_from([0.0, 0.05, 0.33, 0.9]))
def test_min_p_keeps_tokens_near_the_most_likely(logits, p):
    for row, kept in zip(logits, apply(MinP(p), logits), strict=True):
        probabilities = softmax(row)
        np.testing.assert_array_equal(kept, np.where(probabilities >= p * probabilities.max(), row, np.float32(MASKED)))


def test_min_p_of_one_keeps_ties_of_the_most_likely():
    kept = apply(MinP(1.0), np.array([[2.0, 1.0, 2.0]], np.float32))
    assert (kept > MASKED).tolist() == [[True, False, True]]


@SETTINGS
@given(logits=tied_logits, seen=seen_masks, value=st.sampled_from([0.5, 1.0, 1.3]))
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens(logits, seen, value):
    expected = [
        [(x / value if x > 0 else x * value) if was_seen else x for x, was_seen in zip(row, mask, strict=True)]
        for row, mask in zip(logits, seen, strict=True)
    ]
    np.testing.assert_allclose(apply(RepetitionPenalty(value), logits, seen), expected, rtol=1e-6)


def test_transforms_run_in_the_order_given():
    logits = jnp.asarray([[3.0, 2.9, -1.0]])
    seen = jnp.asarray([[True, False, False]])
    # Penalty first: token 0 falls to 1.5, and only token 1 survives top-k. Top-k first: token 0 survives, then falls.
    penalty_first = Greedy((RepetitionPenalty(2.0), TopK(1)))
    top_k_first = Greedy((TopK(1), RepetitionPenalty(2.0)))
    assert penalty_first(logits, seen, keys(0, 1)).tolist() == [1]
    assert top_k_first(logits, seen, keys(0, 1)).tolist() == [0]


@SETTINGS
@given(logits=tied_logits)
def test_greedy_takes_the_first_of_the_most_likely(logits):
    seen = jnp.zeros(logits.shape, bool)
    chosen = Greedy()(jnp.asarray(logits), seen, keys(0))
    np.testing.assert_array_equal(chosen, logits.argmax(-1))
    assert chosen.dtype == jnp.int32


def test_categorical_draws_in_proportion_to_the_probabilities():
    draws = 4000
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (draws, 1))
    chosen = Categorical()(logits, jnp.zeros(logits.shape, bool), keys(0, draws))
    np.testing.assert_allclose(np.bincount(chosen, minlength=4) / draws, probabilities, atol=0.03)


def test_categorical_never_draws_a_masked_token():
    logits = jnp.tile(jnp.asarray([[1.0, 0.9, 0.8, 0.7]]), (500, 1))
    sampler = Categorical((TopK(2),))
    assert set(sampler(logits, jnp.zeros(logits.shape, bool), keys(1, 500)).tolist()) == {0, 1}


def test_the_same_keys_draw_the_same_tokens_and_others_do_not():
    logits = jnp.zeros((64, VOCAB))
    seen = jnp.zeros(logits.shape, bool)
    first, again, other = (Categorical()(logits, seen, keys(seed, 64)).tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_row_draws_only_from_its_own_key():
    sampler = Categorical((RepetitionPenalty(1.2), Temperature(0.8), TopK(6), TopP(0.9), MinP(0.01)))
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, VOCAB)), jnp.float32)
    seen = jnp.asarray(rng.random((8, VOCAB)) < 0.3)
    together = sampler(logits, seen, keys(5, 8))
    for row in range(8):
        alone = sampler(logits[row : row + 1], seen[row : row + 1], keys(5, 8)[row : row + 1])
        assert alone.tolist() == [together[row]]


@pytest.mark.parametrize(
    ("transform", "value"),
    [
        (Temperature, 0.0),
        (Temperature, -1.0),
        (Temperature, float("nan")),
        (Temperature, float("inf")),
        (Temperature, 1e-320),
        (Temperature, "1"),
        (Temperature, True),
        (TopK, 0),
        (TopK, -3),
        (TopK, 2.0),
        (TopK, True),
        (TopK, 10**20),
        (TopP, 0.0),
        (TopP, 1.01),
        (TopP, float("nan")),
        (TopP, 1e-320),
        (MinP, -0.1),
        (MinP, 1.5),
        (MinP, float("nan")),
        (RepetitionPenalty, 0.0),
        (RepetitionPenalty, float("nan")),
        (RepetitionPenalty, float("inf")),
        (RepetitionPenalty, 1e-320),
    ],
)
@pytest.mark.usefixtures("annotations_off")
def test_a_parameter_out_of_range_raises_and_is_named(transform, value):
    with pytest.raises(ValueError, match=f"got {re.escape(repr(value))}"):
        transform(value)


@pytest.mark.usefixtures("annotations_off")
def test_numbers_of_numpy_are_taken():
    logits = jnp.asarray([[0.0, 3.0, 1.0]])
    sampler = Greedy((Temperature(np.float64(0.5)), TopK(np.int64(2)), TopP(np.float32(0.5)), MinP(np.float64(0.1))))
    assert sampler(logits, jnp.zeros((1, 3), bool), keys(0, 1)).tolist() == [1]
    assert Greedy((Temperature(0.5), TopK(2), TopP(0.5), MinP(0.1))) == sampler


def test_a_sampler_without_a_choice_raises():
    with pytest.raises(NotImplementedError, match="Greedy or Categorical"):
        Sampler()(jnp.zeros((1, 3)), jnp.zeros((1, 3), bool), keys(0, 1))


def test_samplers_are_static_values():
    assert hash(Categorical((TopK(3),))) == hash(Categorical((TopK(3),)))
    assert Categorical((TopK(3),)) != Categorical((TopK(4),))
    assert Greedy() != Categorical()
    assert isinstance(TopK(3), Transform)
