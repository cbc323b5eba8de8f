"""Means with 95 % intervals over samples, not over passkeys: the passkeys of one sample share its text."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

# Quantile of the normal distribution for a two-sided 95 % interval.
Z = stats.norm.ppf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float | int) -> "Estimate":
        """In another unit, such as percent."""
        return Estimate(factor * self.mean, factor * self.low, factor * self.high)

    def format(self, spec: str) -> str:
        """`mean (low to high)`."""
        return f"{self.mean:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def ratio(
    totals: Float[np.ndarray, "S"], counts: Float[np.ndarray, "S"], minus: Float[np.ndarray, "S"] | None = None
) -> Estimate:
    """`sum(totals) / sum(counts)` over samples; with `minus`, of the paired differences `totals - minus`.

    The interval is Student's, for the ratio linearized around its value; with a dozen samples a bootstrap's is short.
    """
    totals = totals if minus is None else totals - minus
    mean, number = totals.sum() / counts.sum(), len(totals)
    if number < 2:
        return Estimate(float(mean), float("-inf"), float("inf"))
    residuals = (totals - mean * counts) / counts.mean()
    half = stats.t.ppf(0.975, number - 1) * residuals.std(ddof=1) / np.sqrt(number)
    return Estimate(float(mean), float(mean - half), float(mean + half))


def of_scores(scores: Float[np.ndarray, "S"], weights: Float[np.ndarray, "S"] | None = None) -> Estimate:
    """The weighted mean of independent scores in [0, 1].

    Wilson's interval where each score is 0 or 1 and all have the same weight, and where all scores are equal; otherwise
    Student's, which would have no width where all are equal. Scores of 0 and 1 vary most among those with this mean.
    (`scipy.stats.binomtest` has Wilson's interval too, but only for whole numbers of successes.)
    """
    weights = np.ones(len(scores)) if weights is None else weights
    estimate, number = ratio(weights * scores, weights), len(scores)
    if _equal(scores) or (_equal(weights) and np.isin(scores, (0.0, 1.0)).all()):
        square = Z**2 / number
        centre = (estimate.mean + square / 2) / (1 + square)
        half = np.sqrt(square * estimate.mean * (1 - estimate.mean) + square**2 / 4) / (1 + square)
        estimate = Estimate(estimate.mean, centre - half, centre + half)
    # Where all are right or all are wrong, one end is the mean itself, up to rounding.
    low, high = min(estimate.low, estimate.mean), max(estimate.high, estimate.mean)
    return Estimate(estimate.mean, float(max(low, 0.0)), float(min(high, 1.0)))


def of_differences(
    scores: Float[np.ndarray, "S"], others: Float[np.ndarray, "S"], weights: Float[np.ndarray, "S"] | None = None
) -> Estimate:
    """The weighted mean difference between independent scores in [0, 1] and the scores that they are paired with.

    The interval of Bonett and Price (2012), which adds one disagreement each way, where each score is 0 or 1 and all
    have the same weight, and where all differences are equal; otherwise Student's, which would have no width there.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    change, number = scores - others, len(scores)
    estimate = ratio(weights * scores, weights, weights * others)
    if _equal(change) or (_equal(weights) and np.isin([scores, others], (0.0, 1.0)).all()):
        up, down = ((part.sum() + 1) / (number + 2) for part in (change.clip(min=0), (-change).clip(min=0)))
        half = Z * np.sqrt((up + down - (up - down) ** 2) / (number + 2))
        estimate = Estimate(estimate.mean, up - down - half, up - down + half)
    return Estimate(estimate.mean, float(max(estimate.low, -1.0)), float(min(estimate.high, 1.0)))


def _equal(values: Float[np.ndarray, "S"]) -> bool:
    return bool(np.ptp(values) < 1e-12)
