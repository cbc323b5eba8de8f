"""How much a budget loses against full attention at most, with 95 % confidence, and the smallest one that is allowed.

A loss is paired: the mean of full attention's score minus the budget's, question by question, each score in [0, 1].
Both ends of its `Estimate` are one-sided: it is at most `high` with 95 % confidence. Knows no task and no file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from duo_eval.stats.intervals import Estimate

CONFIDENCE = 0.95
# No one waits for more.
MOST_QUESTIONS = 10_000_000


def of_answers(full: Float[np.ndarray, "S"], other: Float[np.ndarray, "S"]) -> Estimate:
    """The loss of answers that are right or wrong, or right in part.

    Exact limits (Clopper and Pearson 1934) of what was lost and of what was gained, combined as by Newcombe (1998):
    with nothing lost in n answers the loss is at most 1 - 0.05^(1 / n), about 3 / n. An answer that is lost in part
    counts as that part; its true variance is smaller, so that the limits are wide enough.
    """
    change, number = full - other, len(full)
    return of_counts(float(change.clip(min=0).sum()), float((-change).clip(min=0).sum()), number)


def of_counts(lost: int | float, gained: int | float, number: int | float) -> Estimate:
    """The same of `lost` and `gained` answers of `number`, fractions of answers included."""
    (lost_low, lost_high), (gained_low, gained_high) = (_limits(count, number) for count in (lost, gained))
    lost, gained = lost / number, gained / number
    # Both are parts of the same answers: where more are lost, fewer can be gained.
    against = lost * gained / max((1 - lost) * (1 - gained), 1e-12)
    below, above = (
        float(np.sqrt(one**2 + two**2 + 2 * np.sqrt(against) * one * two))
        for one, two in ((lost - lost_low, gained_high - gained), (lost_high - lost, gained - gained_low))
    )
    mean = lost - gained
    return Estimate(mean, max(mean - below, -1.0), min(mean + above, 1.0))


def _limits(count: int | float, number: int | float) -> tuple[float, float]:
    """One-sided limits of a fraction."""
    low = float(stats.beta.ppf(1 - CONFIDENCE, count, number - count + 1)) if count > 0 else 0.0
    high = float(stats.beta.ppf(CONFIDENCE, count + 1, number - count)) if count < number else 1.0
    return low, high


def of_means(
    full: Float[np.ndarray, "S"], other: Float[np.ndarray, "S"], *, independent: int | None = None
) -> Estimate:
    """The loss of scores that vary continuously, such as probabilities: Student's limits of the mean difference.

    Args:
        full: scores of full attention.
        other: scores of the budget for the same questions.
        independent: as many questions as are independent, if there are fewer than scores: stretches of a text overlap.
    """
    change = full - other
    mean, number = float(change.mean()), min(len(change), independent or len(change))
    if number < 2 or len(change) < 2:
        return Estimate(mean, float("-inf"), float("inf"))
    half = float(stats.t.ppf(CONFIDENCE, number - 1) * change.std(ddof=1) / np.sqrt(number))
    return Estimate(mean, mean - half, mean + half)


def answers_needed(full: Float[np.ndarray, "S"], other: Float[np.ndarray, "S"], allowed: float) -> int | None:
    """Answers with which the loss would be within `allowed`, if the same parts of them were lost and gained.

    None: more answers would not help, as the loss itself is not below `allowed`.
    """
    change, number = full - other, len(full)
    lost, gained = float(change.clip(min=0).mean()), float((-change).clip(min=0).mean())
    if lost - gained >= allowed:
        return None

    def is_enough(count: int) -> bool:
        return of_counts(lost * count, gained * count, count).high <= allowed

    few, enough = 0, max(1, number)
    while not is_enough(enough):
        few, enough = enough, 2 * enough
        if enough > MOST_QUESTIONS:
            return None
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if is_enough(middle) else (middle, enough)
    return enough


@dataclass(frozen=True)
class Losses:
    """The losses of one budget, by the name of the measure.

    Attributes:
        budget: fraction of full attention's KV bytes.
        by_measure: an estimate for each measure.
    """

    budget: float
    by_measure: Mapping[str, Estimate]

    def within(self, allowed: float) -> bool:
        """Whether every measure loses no more than `allowed`, with 95 % confidence."""
        return all(estimate.high <= allowed for estimate in self.by_measure.values())


def smallest_budget(losses: Sequence[Losses], allowed: float) -> Losses | None:
    """The smallest budget that is within the loss as all larger ones are; None if the largest is not.

    Budgets are tested from the largest to the smallest, up to the first that fails, and a budget passes only if all
    measures do. A test in a fixed order, and one that needs all of its parts, keep their confidence: no correction for
    the number of budgets and measures is needed.
    """
    chosen = None
    for each in sorted(losses, key=lambda each: -each.budget):
        if not each.within(allowed):
            break
        chosen = each
    return chosen
