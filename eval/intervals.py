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
