"""`topk`: heads chosen for one target sparsity, by what each would gain or lose next to the others that are kept.

The student computes with gates that are 0 or 1, as a deployed pattern does: there is no gap between training and use.
Gradients pass the choice as if it were the identity (Ramanujan et al. 2020, arXiv 1911.13299), so they say what a
streaming head would gain as a retrieval head, and a retrieval head lose. Scores are running means of that; the heads
with the largest are kept. The loss is that of `distill`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from duo_jax.arguments import real_number
from duo_train.objective import Metrics
from duo_train.recipes.distill import Distilled
from duo_train.run import Run


@dataclass(frozen=True)
class TopK(Distilled):
    """Scores trained by distillation, for exactly the number of heads that a sparsity keeps."""

    learning_rate: float = 0.1
    """Weight of a step's gradient in the running mean of all, at its peak; the initial scores lose as much weight."""
    target_sparsity: float = 0.5
    """Fraction of KV heads that stream, rounded down to whole heads as in a pattern."""

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        real_number("learning_rate", self.learning_rate, 1e-30, 1, way="it is a weight in a mean")
        real_number("target_sparsity", self.target_sparsity, 0, 1)

    def check(self, run: Run) -> None:
        """Equal scores would choose heads by their position."""
        if run.start is None:
            raise ValueError("topk needs scores to begin with: --start PATTERN, such as one of attention-profile")

    def init(self, start: Float[Array, "L K"]) -> Float[Array, "L K"]:
        """The initial gates are the scores."""
        return start

    def optimizer(self) -> optax.GradientTransformation:
        """Gradients of one length, so that all samples count alike, and their running mean.

        Adam would move every score by the same length, and so lose which gains are large.
        """
        number = optax.scale_by_learning_rate(self.schedule)
        return optax.chain(optax.normalize_by_update_norm(), optax.add_decayed_weights(1.0), number)

    def applied(self, params: Float[Array, "L K"]) -> Float[Array, "L K"]:
        """1 for the largest scores, 0 for the others, with the gradient of the scores themselves."""
        scores = params.ravel()
        kept = jax.lax.top_k(scores, self._num_kept(scores.size))[1]
        chosen = jnp.zeros_like(scores).at[kept].set(1.0).reshape(params.shape)
        return chosen + (params - jax.lax.stop_gradient(params))

    def gates(self, params: Float[Array, "L K"]) -> Float[Array, "L K"]:
        """The scores, shifted so that 0.5 is between the heads that are kept and the others."""
        ascending = jnp.sort(params, axis=None)
        border = params.size - self._num_kept(params.size)
        ends = ascending[max(border - 1, 0)], ascending[min(border, params.size - 1)]
        middle = {0: ends[0] - 0.5, params.size: ends[1] + 0.5}.get(border, (ends[0] + ends[1]) / 2)
        return params - middle + 0.5

    def penalty(self, params: Float[Array, "L K"], step: Int32[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """None: the number of heads is fixed."""
        return jnp.zeros((), jnp.float32), {}

    def _num_kept(self, number: int) -> int:
        # The tolerance is that of `HeadPattern`.
        return number - int(self.target_sparsity * number + 1e-9)
