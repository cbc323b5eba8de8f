"""What a recipe is: a way to give every KV head a gate, large where the head must keep the whole context."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from duo_jax.config import ModelConfig
from duo_jax.mesh.mesh import MeshSize
from duo_jax.model import Model
from duo_train.data.needles import NeedleData
from duo_train.gated import GatedModel

# In a run's folder: one JSON object a step.
METRICS_FILE = "metrics.jsonl"

# Called with the steps done, the steps in all, and the figures of the last one.
Report = Callable[[int, int, Mapping[str, float | int]], None]


def quiet(done: int, total: int, figures: Mapping[str, float | int]) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Run:
    """What every recipe is given.

    Attributes:
        model: the frozen weights.
        data: samples by number.
        attention: how the gated model is made.
        folder: where checkpoints and metrics go.
        start: gates to begin with, from another recipe's result; None: every gate 1.
        resume: go on from the last checkpoint in `folder`, if there is one.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of them are kept.
        mesh: devices that share samples (`data`) and the tokens of each (`sequence`); None: all there are.
        report: called after every step.
    """

    model: Model
    data: NeedleData
    attention: GatedModel
    folder: Path
    start: Float[np.ndarray, "L K"] | None = None
    resume: bool = False
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    mesh: Mesh | None = None
    report: Report = quiet

    def __post_init__(self) -> None:
        """Refuse a model whose heads lie elsewhere than its gates would."""
        if self.model.mesh is not None:
            raise ValueError("training shares samples and tokens, not models: load the model without mesh=")

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return self.model.config.num_layers, self.model.config.num_kv_heads


class Recipe(abc.ABC):
    """A frozen dataclass whose fields are the recipe's settings. A new one is a file and a field of `Identify`."""

    def check(self, run: Run) -> None:
        """Raise ValueError if this recipe cannot do with what the run gives it; `find` has not begun yet."""
        return

    def check_devices(self, config: ModelConfig, mesh: Mesh | None) -> None:
        """Raise ValueError for devices that cannot share the work; no weights are read yet."""
        if MeshSize.of(mesh).devices > 1:
            raise ValueError(f"{type(self).__name__} trains nothing and takes one device: leave the mesh out")

    @abc.abstractmethod
    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """The gates, in [0, 1]."""
