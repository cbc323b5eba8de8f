"""The interface of a recipe: it gives every KV head a gate, large where the head must keep the whole context."""

import abc

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.config import ModelConfig
from duo_train.run import Run


class Recipe(abc.ABC):
    """A frozen dataclass whose fields are the recipe's settings. A new one is a file and a row of `RECIPES`."""

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the gates are for, which becomes the pattern's default; None: they are for any."""
        return None

    def check(self, run: Run) -> None:
        """Raise ValueError if this recipe cannot work with `run`; called before `find`."""
        return

    def devices(self, config: ModelConfig, mesh: Mesh | None, *, fsdp: bool) -> Mesh | None:
        """The devices of a run, given those that the user chose; None: one. Called before any weights are read.

        With `fsdp` they share the weights, otherwise each has a copy.

        Raises:
            ValueError: devices that cannot share the work.
        """
        if MeshSize.of(mesh).devices == 1:
            return None
        if not fsdp:
            raise ValueError(
                f"{type(self).__name__} trains nothing: several devices can only share its weights (--fsdp, "
                "load_model(..., fsdp=True)); leave the mesh out for one device"
            )
        return mesh

    @abc.abstractmethod
    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """The gates, in [0, 1]."""
