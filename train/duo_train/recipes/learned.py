"""Recipes that train: what such a recipe defines. `duo_train.loop` does the rest."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from duo_jax.config import ModelConfig
from duo_jax.model import Model
from duo_train.data.batches import Batch
from duo_train.devices import Sharding
from duo_train.gated import GatedModel
from duo_train.recipes.base import Recipe, Run

Params = Any  # a pytree of arrays
Figures = dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class Learned(Recipe):
    """Settings of the optimization that all training recipes share. The defaults are the paper's (section 3.1)."""

    # What the mean over the label tokens is called in the metrics.
    loss_name: ClassVar[str]

    steps: int = 2000
    """Optimizer steps."""
    learning_rate: float = 0.02
    """Peak learning rate of AdamW; no weight decay, no clipping."""
    warmup: float = 0.2
    """Fraction of the steps in which the rate rises from a tenth of the peak."""
    cooldown: float = 0.2
    """Fraction of the steps in which the rate falls to a tenth of the peak."""
    batch_size: int = 1
    """Samples computed at a time, over all devices."""
    accumulate: int = 1
    """Batches whose gradients are added up for one step."""
    pad_multiple: int = 128
    """Samples are padded to a multiple of so many tokens: fewer programs to compile, more tokens wasted."""
    seed: int = 0
    """Seed of the recipe's own randomness; that of the data is the data's."""

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("steps", "batch_size", "accumulate", "pad_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0 or not 0 <= self.warmup <= 1 or not 0 <= self.cooldown <= 1:
            raise ValueError(
                f"need learning_rate > 0 and warmup and cooldown in [0, 1], got {self.learning_rate=}, {self.warmup=}, "
                f"{self.cooldown=}"
            )

    def check_devices(self, config: ModelConfig, mesh: Mesh | None) -> None:
        """A batch, and heads, that the devices can share."""
        Sharding(mesh, config, self.batch_size)

    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """Train; see `duo_train.loop.train`."""
        from duo_train.loop import train  # Brings in Orbax, which takes a second: not before it is needed.

        return train(self, run)

    def schedule(self, step: Int32[Array, ""]) -> Float[Array, ""]:
        """The learning rate of a step, counted from 0: a trapezoid that never falls below a tenth of its height."""
        done = step.astype(jnp.float32)
        rising = (done + 1) / max(1.0, self.warmup * self.steps)
        falling = (self.steps - done) / max(1.0, self.cooldown * self.steps)
        return self.learning_rate * jnp.minimum(1.0, jnp.maximum(jnp.minimum(rising, falling), 0.1))

    @abc.abstractmethod
    def init(self, start: Float[Array, "L K"]) -> Params:
        """What is trained, given the gates to begin with."""

    @abc.abstractmethod
    def optimizer(self) -> optax.GradientTransformation:
        """How it is trained."""

    @abc.abstractmethod
    def gates(self, params: Params) -> Float[Array, "L K"]:
        """The gates that the parameters stand for, as they are saved."""

    def targets(self, attention: GatedModel, model: Model, batch: Batch) -> Float[Array, "B M D"] | None:
        """What the model's own forward pass gives the loss at each label; the same every time a sample comes round."""
        return None

    @abc.abstractmethod
    def losses(
        self,
        attention: GatedModel,
        model: Model,
        params: Params,
        batch: Batch,
        targets: Float[Array, "B M D"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "B M"]:
        """Loss of every label token of one micro-batch (no accumulation axis); what it is at padding does not count."""

    @abc.abstractmethod
    def penalty(self, params: Params, step: Int32[Array, ""]) -> tuple[Float[Array, ""], Figures]:
        """What is added to the mean loss once a step, and figures to write down."""

    def project(self, params: Params) -> Params:
        """Bring parameters back to where they may be, after each step."""
        return params


def at_labels(x: Float[Array, "B T D"], positions: Int32[Array, "B M"]) -> Float[Array, "B M D"]:
    """Rows of `x` at the label positions, float32."""
    return jnp.take_along_axis(x, positions[:, :, None], axis=1).astype(jnp.float32)


def stop(x: Any) -> Any:
    """A pytree through which no gradient flows."""
    return jax.tree.map(jax.lax.stop_gradient, x)
