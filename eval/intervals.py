"""Means with 95 % intervals over samples: the passkeys of one sample share its text, so samples are what is counted."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats


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


def mean_score(scores: Float[np.ndarray, "S"]) -> Estimate:
    """The mean of scores between 0 and 1, with Wilson's interval, which stays there.

    It is made for scores that are 0 or 1, which vary the most: of others it is wide rather than short.
    """
    number, mean, z = len(scores), scores.mean(), stats.norm.ppf(0.975)
    centre, scale = mean + z**2 / (2 * number), 1 + z**2 / number
    half = z * np.sqrt(mean * (1 - mean) / number + z**2 / (4 * number**2))
    return Estimate(float(mean), float(max(0, centre - half) / scale), float(min(scale, centre + half) / scale))
