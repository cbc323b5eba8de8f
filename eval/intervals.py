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


def of_scores(scores: Float[np.ndarray, "S"]) -> Estimate:
    """The mean of independent scores in [0, 1]: Wilson's interval where each is right or wrong, else Student's.

    Student's would be a point where all are right.
    """
    if not np.isin(scores, (0.0, 1.0)).all():
        found = ratio(scores, np.ones_like(scores))
        return Estimate(found.mean, max(found.low, 0.0), min(found.high, 1.0))
    low, high = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
    return Estimate(float(scores.mean()), float(low), float(high))


def of_differences(ours: Float[np.ndarray, "S"], theirs: Float[np.ndarray, "S"]) -> Estimate:
    """The mean difference of paired scores in [0, 1]: Bonett and Price's interval where each is right or wrong.

    Else Student's. Both would be a point where all pairs agree, however few; one more disagreement either way, as in
    the interval of Bonett and Price (2012), leaves room for doubt.
    """
    number, ones = len(ours), np.ones(len(ours))
    gained, lost = (ours > theirs).sum(), (theirs > ours).sum()
    if not np.isin([ours, theirs], (0.0, 1.0)).all() and gained + lost:
        found = ratio(ours, ones, theirs)
    else:
        up, down = (gained + 1) / (number + 2), (lost + 1) / (number + 2)
        half = stats.norm.ppf(0.975) * np.sqrt((up + down - (up - down) ** 2) / (number + 2))
        found = Estimate((ours - theirs).mean(), up - down - half, up - down + half)
    return Estimate(float(found.mean), float(max(found.low, -1.0)), float(min(found.high, 1.0)))
