"""`distill`: the paper's recipe (section 2.2). The gated model matches the full model's hidden states, under L1."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from duo_jax.model.model import Model
from duo_train.data.batches import Batch
from duo_train.gated import GatedModel
from duo_train.objective import Metrics
from duo_train.recipes.learned import Learned, before_labels, stop

DistillParams = dict[str, Float[Array, "L K"]]
# Small, so that gates stay numbers from 0 to 1 for every other reader of a pattern; a step overshoots by at most about
# the learning rate.
OVERSHOOT = 1e-3


@dataclass(frozen=True)
class Distill(Learned):
    """Gates in [0, 1], for the least distance of hidden states from the full model's."""

    loss_name: ClassVar[str] = "distillation"

    reg_weight: float = 0.05
    """Weight of the gates' L1 norm."""
    reg: Literal["mean", "sum"] = "mean"
    """L1 as a mean over the gates (the reference implementation) or as a sum (the paper's formula)."""

    def init(self, start: Float[Array, "L K"]) -> DistillParams:
        """The gates themselves, and how far the optimizer overshot their range."""
        return {"gates": jnp.clip(start, 0.0, 1.0), "overshoot": jnp.zeros_like(start)}

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW without weight decay."""
        return optax.adamw(self.schedule, weight_decay=0.0)

    def gates(self, params: DistillParams) -> Float[Array, "L K"]:
        """The gates; those at 0 or 1 are just beyond it, and so ordered by how long and hard they were pushed there."""
        gates, beyond = params["gates"], OVERSHOOT * params["overshoot"]
        below, above = jnp.minimum(beyond, 0.0), jnp.maximum(beyond, 0.0)
        return gates + jnp.where(gates <= 0, below, jnp.where(gates >= 1, above, 0.0))

    def penalty(self, params: DistillParams, step: Int32[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """The L1 norm; gates are never negative."""
        gates = params["gates"]
        return self.reg_weight * (gates.mean() if self.reg == "mean" else gates.sum()), {}

    def project(self, params: DistillParams) -> DistillParams:
        """Clip the gates to [0, 1], and add up what that takes away."""
        gates = optax.projections.projection_hypercube(params["gates"])
        return {"gates": gates, "overshoot": params["overshoot"] + params["gates"] - gates}

    def targets(self, attention: GatedModel, model: Model, batch: Batch) -> Float[Array, "B M D"] | None:
        """The teacher's hidden states that predict the labels. With teacher mixing, `losses` runs the teacher."""
        if attention.mixing == "teacher":
            return None
        return before_labels(attention.teacher(model, batch.tokens)[0], batch.labels)

    def losses(
        self,
        attention: GatedModel,
        model: Model,
        params: DistillParams,
        batch: Batch,
        targets: Float[Array, "B M D"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "B M"]:
        """Squared distance of the final-norm hidden states, mean over the hidden dimension."""
        full = None
        if targets is None:
            hidden, full = stop(attention.teacher(model, batch.tokens))
            targets = before_labels(hidden, batch.labels)
        student = attention.student(model, batch.tokens, params["gates"], full)
        return jnp.square(before_labels(student, batch.labels) - targets).mean(-1)
