"""TOVA (Oren et al. 2024, arXiv 2401.06104): a layer holds the tokens that its newest query attends to most."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from duo_eval.methods.eviction import Eviction


@dataclass(frozen=True)
class TOVA(Eviction):
    """By the weights of the newest query alone, averaged over all heads of the layer, which so hold the same tokens.

    No token is safe, sinks and the newest included.
    """

    name: ClassVar[str] = "tova"

    def scores(
        self, before: Float[Array, "K S"], weights: Float[Array, "K G T S"], valid: Bool[Array, "T"]
    ) -> Float[Array, "K S"]:
        """See `Eviction.scores`: the last query's weights, nothing of before."""
        last = weights[:, :, valid.sum(dtype=jnp.int32) - 1]
        return jnp.broadcast_to(last.mean((0, 1)), before.shape)

    def priority(
        self,
        position: Int32[Array, "K S"],
        score: Float[Array, "K S"],
        length: Int32[Array, ""],
        limit: Int32[Array, ""],
    ) -> Float[Array, "K S"]:
        """See `Eviction.priority`: the heavier."""
        return score
