"""Recipes that train: the settings that all of them share. `duo_train.objective` is what each defines."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from duo_jax.arguments import real_number, seed_number, whole_number
from duo_jax.model.config import ModelConfig
from duo_train.devices import Sharding
from duo_train.loop import train
from duo_train.objective import Objective
from duo_train.recipes.base import Recipe
from duo_train.run import Run


@dataclass(frozen=True)
class Learned(Recipe, Objective):
    """Settings of the optimization. The defaults are the paper's (section 3.1)."""

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
    """Pad samples to a multiple of this many tokens; a larger value compiles fewer programs and wastes more tokens."""
    seed: int = 0
    """Seed of the recipe's own randomness; the data has a seed of its own."""

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("steps", "batch_size", "accumulate", "pad_multiple"):
            whole_number(name, getattr(self, name), 1)
        seed_number("seed", self.seed)
        real_number("learning_rate", self.learning_rate, 1e-30, 1e30)
        for name in ("warmup", "cooldown"):
            real_number(name, getattr(self, name), 0, 1)

    def devices(self, config: ModelConfig, mesh: Mesh | None, *, fsdp: bool) -> Mesh | None:
        """They must be able to share the batch and the heads; by default all devices do."""
        return Sharding(mesh, config, self.batch_size).mesh

    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """Train; see `duo_train.loop.train`."""
        self.check(run)
        return train(self, run)

    def schedule(self, step: Int32[Array, ""]) -> Float[Array, ""]:
        """The learning rate of a step, counted from 0: a trapezoid, and never below a tenth of the peak."""
        done = step.astype(jnp.float32)
        rising = (done + 1) / max(1.0, self.warmup * self.steps)
        falling = (self.steps - done) / max(1.0, self.cooldown * self.steps)
        return self.learning_rate * jnp.minimum(1.0, jnp.maximum(jnp.minimum(rising, falling), 0.1))


def before_labels(x: Float[Array, "B T D"], labels: Int32[Array, "B M"]) -> Float[Array, "B M D"]:
    """Rows of `x` that predict the label tokens, float32: at the position before each."""
    positions = jnp.maximum(labels - 1, 0)  # 0 is padding.
    return jnp.take_along_axis(x, positions[:, :, None], axis=1).astype(jnp.float32)


def stop(x: Any) -> Any:
    """A pytree through which no gradient flows."""
    return jax.tree.map(jax.lax.stop_gradient, x)
