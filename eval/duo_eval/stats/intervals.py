"""Means with 95 % intervals over samples: the passkeys of one sample share its text, so samples are what is counted."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

# Of the normal distribution, two-sided, 95 %.
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

    The interval is Student's, of the ratio linearized around its value: over a dozen samples a bootstrap's is short.
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

    Wilson's interval where each is right or wrong and counts the same, and where all are equal; else Student's, which
    would be a point where all are. No score in [0, 1] with this mean varies more than right and wrong do.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    found, number = ratio(weights * scores, weights), len(scores)
    if _alike(scores) or (_alike(weights) and np.isin(scores, (0.0, 1.0)).all()):
        square = Z**2 / number
        centre = (found.mean + square / 2) / (1 + square)
        half = np.sqrt(square * found.mean * (1 - found.mean) + square**2 / 4) / (1 + square)
        found = Estimate(found.mean, centre - half, centre + half)
    # Of all right or all wrong an end is the mean itself, but for rounding.
    low, high = min(found.low, found.mean), max(found.high, found.mean)
    return Estimate(found.mean, float(max(low, 0.0)), float(min(high, 1.0)))


def of_differences(
    ours: Float[np.ndarray, "S"], theirs: Float[np.ndarray, "S"], weights: Float[np.ndarray, "S"] | None = None
) -> Estimate:
    """The weighted mean of what independent scores in [0, 1] differ from those that they are paired with.

    The interval of Bonett and Price (2012), which adds a disagreement either way, where each score is right or wrong
    and counts the same, and where all differences are equal; else Student's, which would be a point where all are.
    """
    weights = np.ones(len(ours)) if weights is None else weights
    change, number = ours - theirs, len(ours)
    found = ratio(weights * ours, weights, weights * theirs)
    if _alike(change) or (_alike(weights) and np.isin([ours, theirs], (0.0, 1.0)).all()):
        up, down = ((part.sum() + 1) / (number + 2) for part in (change.clip(min=0), (-change).clip(min=0)))
        half = Z * np.sqrt((up + down - (up - down) ** 2) / (number + 2))
        found = Estimate(found.mean, up - down - half, up - down + half)
    return Estimate(found.mean, float(max(found.low, -1.0)), float(min(found.high, 1.0)))


def _alike(values: Float[np.ndarray, "S"]) -> bool:
    return bool(np.ptp(values) < 1e-12)
