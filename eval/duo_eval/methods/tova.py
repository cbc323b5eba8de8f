"""TOVA (Oren et al. 2024, arXiv 2401.06104): a layer holds the tokens that its newest query attends to most."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from duo_eval.methods.eviction import Eviction, Tokens


@dataclass(frozen=True)
class TOVA(Eviction):
    """Only the newest query's weights count, averaged over all heads of the layer, which thus hold the same tokens.

    Any token may be evicted, sinks and the newest included.
    """

    name: ClassVar[str] = "tova"

    def scores(
        self, before: Float[Array, "K S"], weights: Float[Array, "K G T S"], valid: Bool[Array, "T"]
    ) -> Float[Array, "K S"]:
        """See `Eviction.scores`: only the last query's weights."""
        last = weights[:, :, valid.sum(dtype=jnp.int32) - 1]
        return jnp.broadcast_to(last.mean((0, 1)), before.shape)

    def priority(self, tokens: Tokens) -> Float[Array, "K S"]:
        """See `Eviction.priority`: the heavier."""
        return tokens.score
