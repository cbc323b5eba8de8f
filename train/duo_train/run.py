"""The input of a recipe: model, data, output folder, checkpoints, devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.model import Model
from duo_train.data.needles import NeedleData
from duo_train.gated import GatedModel

# Called with the number of steps done, the number of all steps, and the metrics of the last one.
Report = Callable[[int, int, Mapping[str, float | int]], None]


def quiet(done: int, total: int, metrics: Mapping[str, float | int]) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Run:
    """The input of every recipe.

    Attributes:
        model: the frozen weights, on one device, of which every device gets a copy, or in slices
            (`load_model(..., mesh=mesh, fsdp=True)`).
        data: samples by number.
        attention: how the gated forward pass is computed.
        folder: where checkpoints and metrics are written.
        start: initial gates, for example the result of another recipe; None: every gate 1.
        resume: continue from the last checkpoint in `folder`, if there is one.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: number of checkpoints to keep.
        mesh: devices that share samples (`data`) and the tokens of each (`sequence`); None: those of a model in slices,
            otherwise all devices.
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
        """Reject a model whose devices share heads, in an order that is not that of the gates, or another mesh's."""
        if not self.model.config.full_layers:
            raise ValueError("every layer of this model has a window of its own: there is no head to choose")
        on = self.model.mesh
        if on is not None and not self.model.is_fsdp:
            raise ValueError("training needs the order of heads of one device: load the model with fsdp=True")
        if on is not None and self.mesh not in (None, on):
            places = MeshSize.of(on), MeshSize.of(self.mesh)
            raise ValueError(f"the model is on {places[0]}, the run on {places[1]}: give both the same mesh=")

    @property
    def devices(self) -> Mesh | None:
        """The mesh of the run; None: all devices."""
        return self.mesh or self.model.mesh

    @property
    def shape(self) -> tuple[int, int]:
        """Layers with full attention, whose heads have gates, and KV heads of each."""
        return len(self.model.config.full_layers), self.model.config.num_kv_heads
