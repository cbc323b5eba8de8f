"""Means with 95 % intervals: bootstrap over samples, since the passkeys of one sample share its text."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000


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
    """`sum(totals) / sum(counts)` over samples; with `minus`, of the paired differences `totals - minus`."""
    totals = totals if minus is None else totals - minus
    chosen = np.random.default_rng(0).integers(0, len(totals), (RESAMPLES, len(totals)))
    found = totals[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(float(totals.sum() / counts.sum()), float(low), float(high))
