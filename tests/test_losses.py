"""Losses against full attention: the limits hold as often as they say, and the rule that chooses a budget."""

import numpy as np
import pytest
from duo_eval.stats.intervals import Estimate
from duo_eval.stats.losses import Losses, answers_needed, of_answers, of_counts, of_means, smallest_budget
from scipy import stats


def answers(lost: int, gained: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of full attention and of a budget that loses some answers and gains others."""
    full, other = np.ones(number), np.ones(number)
    other[:lost] = 0
    full[lost : lost + gained] = 0
    return full, other


@pytest.mark.parametrize(("number", "at_most"), [(20, 0.1391), (59, 0.0495), (299, 0.00997)])
def test_nothing_lost_in_n_answers_bounds_the_loss_by_about_three_over_n(number, at_most):
    found = of_answers(*answers(0, 0, number))
    assert found.mean == 0 and found.high == pytest.approx(at_most, abs=1e-4) and 0.9 < found.high * number / 3 < 1


@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.0), (0.1, 0.0), (0.05, 0.05), (0.1, 0.02), (0.3, 0.1)])
def test_the_true_loss_is_below_the_limit_at_least_as_often_as_stated(lost, gained):
    # Every outcome of 40 answers, weighted by its probability; those left out count as not covered.
    number, covered = 40, 0.0
    counts = [(downs, ups) for downs in range(number + 1) for ups in range(number + 1 - downs)]
    shares = np.array([lost, gained, 1 - lost - gained])
    outcomes = [(downs, ups, number - downs - ups) for downs, ups in counts]
    for (downs, ups), probability in zip(counts, stats.multinomial.pmf(outcomes, number, shares), strict=True):
        if probability > 1e-5:
            covered += probability * (of_counts(downs, ups, number).high >= lost - gained)
    assert covered >= 0.945


def test_a_part_of_an_answer_counts_as_that_part():
    full, other = answers(4, 0, 50)
    partly = np.where(other < full, 0.75, other)
    assert of_answers(full, partly).mean == pytest.approx(0.02)
    assert of_answers(full, partly) == of_counts(1.0, 0.0, 50)


def test_as_many_answers_are_needed_as_make_the_limit_small_enough():
    assert answers_needed(*answers(0, 0, 20), allowed=0.01) == 299
    assert answers_needed(*answers(0, 0, 400), allowed=0.01) == 299
    some = answers_needed(*answers(1, 0, 200), allowed=0.01)
    assert some is not None and some > 600
    assert of_counts(some / 200, 0, some).high <= 0.01 < of_counts((some - 1) / 200, 0, some - 1).high
    assert answers_needed(*answers(1, 0, 50), allowed=0.01) is None


def test_stretches_that_overlap_count_as_the_independent_ones():
    rng = np.random.default_rng(0)
    full = rng.random(100)
    other = full - 0.01 + 0.02 * rng.standard_normal(100)
    every, some = of_means(full, other), of_means(full, other, independent=4)
    half = stats.t.ppf(0.95, 99) * (full - other).std(ddof=1) / 10
    assert every.high - every.mean == pytest.approx(half)
    assert some.mean == every.mean and some.high - some.mean > 5 * half
    assert of_means(full[:1], other[:1]).high == float("inf")


def test_the_smallest_budget_is_within_the_loss_as_all_larger_ones_are():
    def of(budget: float, *at_most: float) -> Losses:
        return Losses(budget, {str(index): Estimate(0.0, 0.0, high) for index, high in enumerate(at_most)})

    good, bad = (0.005, 0.0), (0.005, 0.02)
    assert smallest_budget([of(0.25, *good), of(0.75, *good), of(0.5, *good)], 0.01) == of(0.25, *good)
    assert smallest_budget([of(0.25, *bad), of(0.5, *good), of(0.75, *good)], 0.01) == of(0.5, *good)
    # One that only happens to look better than a larger one is not chosen.
    assert smallest_budget([of(0.25, *good), of(0.5, *bad), of(0.75, *good)], 0.01) == of(0.75, *good)
    assert smallest_budget([of(0.5, *good), of(0.75, *bad)], 0.01) is None
