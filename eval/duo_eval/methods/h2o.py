"""H2O (Zhang et al. 2023, arXiv 2306.14048): every head holds the tokens attended to most, and recent ones."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from duo_eval.methods.eviction import ALWAYS, Eviction, Tokens


@dataclass(frozen=True)
class H2O(Eviction):
    """Heavy hitters by attention accumulated over all queries so far, and a window.

    As in the paper, weights are summed over queries, not averaged: older tokens had more time to gather weight.
    """

    recent: float = 0.5
    """Share of the budget for the most recent tokens; the paper's half."""

    name: ClassVar[str] = "h2o"

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not 0.0 <= self.recent < 1.0:
            raise ValueError(f"recent must be in [0, 1), got {self.recent}")

    def least(self, length: int) -> int:
        """See `Eviction.least`: one heavy hitter and one recent token."""
        return 2

    def scores(
        self, before: Float[Array, "K S"], weights: Float[Array, "K G T S"], valid: Bool[Array, "T"]
    ) -> Float[Array, "K S"]:
        """See `Eviction.scores`: the weights so far, summed over queries, averaged over the query heads of a group."""
        return before + jnp.where(valid[None, None, :, None], weights, 0.0).sum(2).mean(1)

    def priority(self, tokens: Tokens) -> Float[Array, "K S"]:
        """See `Eviction.priority`: the window, then the heavier."""
        window = jnp.floor(self.recent * tokens.limit.astype(jnp.float32)).astype(jnp.int32)
        return jnp.where(tokens.position >= tokens.length - window, ALWAYS, tokens.score)
