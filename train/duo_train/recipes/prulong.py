"""`prulong`: hard-concrete gates, next-token loss, a Lagrangian that reaches a given sparsity (arXiv 2506.17121)."""

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from duo_jax.arguments import real_number
from duo_jax.model.model import Model
from duo_train.data.batches import Batch
from duo_train.gated import GatedModel
from duo_train.objective import Metrics
from duo_train.recipes.learned import Learned, before_labels
from duo_train.run import Run

# The hard-concrete distribution (Louizos et al. 2018): a stretched sigmoid, cut off at 0 and 1.
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3


class PruLongParams(TypedDict):
    """The trained parameters: the log-odds of every gate, and two multipliers."""

    log_alpha: Float[Array, "L K"]
    multipliers: Float[Array, "2"]


@dataclass(frozen=True)
class PruLong(Learned):
    """Random gates that are almost always 0 or 1; the user gives the sparsity."""

    loss_name: ClassVar[str] = "next_token"

    steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1.0
    """Peak learning rate of the gates' log-odds."""
    weight_decay: float = 0.2
    """Pull of the log-odds toward 0; without it they drift to where the sigmoid is flat, and early choices stay."""
    multiplier_rate: float = 1.0
    """Learning rate of the two multipliers, by gradient ascent."""
    target_sparsity: float = 0.7
    """Fraction of KV heads that stream at the end."""
    ramp: float = 0.8
    """Fraction of the steps in which the target rises from 0."""
    initial_log_alpha: float = 4.5
    """Initial log-odds of a gate of 1, plus normal noise of `initial_noise`; a gate of 0 has the negative."""
    initial_noise: float = 0.01
    """Standard deviation of that noise."""

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        for name in ("target_sparsity", "ramp"):
            real_number(name, getattr(self, name), 0, 1)

    @property
    def sparsity(self) -> float:
        """The target: at a gate of 0.5, another number of heads may stream."""
        return self.target_sparsity

    def check(self, run: Run) -> None:
        """Only self mixing: there is no teacher."""
        if run.attention.mixing != "self":
            raise ValueError(f"prulong has no teacher to mix with, got {run.attention.mixing=}: use self mixing")

    def init(self, start: Float[Array, "L K"]) -> PruLongParams:
        """Log-odds: `initial_log_alpha` where the initial gate is 1, its negative where it is 0."""
        noise = self.initial_noise * jax.random.normal(jax.random.key(self.seed), start.shape, jnp.float32)
        log_alpha = self.initial_log_alpha * (2 * jnp.clip(start, 0.0, 1.0) - 1) + noise
        return {"log_alpha": log_alpha, "multipliers": jnp.zeros(2, jnp.float32)}

    def optimizer(self) -> optax.GradientTransformation:
        """Adam: gradient descent for the gates, ascent for the multipliers."""
        ascent = optax.chain(optax.scale(-1.0), optax.adam(self.multiplier_rate))
        rules = {"log_alpha": optax.adamw(self.schedule, weight_decay=self.weight_decay), "multipliers": ascent}
        return optax.partition(rules, {name: name for name in rules})

    def gates(self, params: PruLongParams) -> Float[Array, "L K"]:
        """The sigmoid of the log-odds: the same order as the hard-concrete gates, but without ties at 0 and 1."""
        return jax.nn.sigmoid(params["log_alpha"])

    def losses(
        self,
        attention: GatedModel,
        model: Model,
        params: PruLongParams,
        batch: Batch,
        targets: Float[Array, "B M D"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "B M"]:
        """Negative log-likelihood of each label token under gates drawn at random."""
        hidden = attention.student(model, batch.tokens, _draw(params["log_alpha"], key))
        previous = before_labels(hidden, batch.labels).astype(hidden.dtype)
        tokens = jnp.take_along_axis(batch.tokens, batch.labels, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(model.decoder.logits(previous), tokens)

    def penalty(self, params: PruLongParams, step: Int32[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """`m1 * (s - t) + m2 * (s - t) ** 2`, with expected sparsity s and target t, which rises from 0 first."""
        sparsity = 1 - jax.nn.sigmoid(params["log_alpha"] - TEMPERATURE * math.log(-LOW / HIGH)).mean()
        ramp = jnp.minimum(1.0, (step.astype(jnp.float32) + 1) / max(1.0, self.ramp * self.steps))
        target = self.target_sparsity * ramp
        miss = sparsity - target
        first, second = params["multipliers"]
        return first * miss + second * miss**2, {"sparsity": sparsity, "target_sparsity": target}


def _draw(log_alpha: Float[Array, "L K"], key: PRNGKeyArray) -> Float[Array, "L K"]:
    """Gates of the hard-concrete distribution, differentiable in `log_alpha`."""
    uniform = jax.random.uniform(key, log_alpha.shape, jnp.float32, 1e-6, 1 - 1e-6)
    noise = jnp.log(uniform) - jnp.log1p(-uniform)
    return jnp.clip(jax.nn.sigmoid((noise + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW, 0.0, 1.0)
