"""The interface of a recipe: it gives every KV head a gate, large where the head must keep the whole context."""

import abc

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from duo_jax.config import ModelConfig
from duo_jax.mesh.mesh import MeshSize
from duo_train.run import Run


class Recipe(abc.ABC):
    """A frozen dataclass whose fields are the recipe's settings. A new one is a file and a row of `RECIPES`."""

    def check(self, run: Run) -> None:
        """Raise ValueError if this recipe cannot work with `run`; called before `find`."""
        return

    def check_devices(self, config: ModelConfig, mesh: Mesh | None) -> None:
        """Raise ValueError for devices that cannot share the work; called before any weights are read."""
        if MeshSize.of(mesh).devices > 1:
            raise ValueError(f"{type(self).__name__} trains nothing and takes one device: leave the mesh out")

    @abc.abstractmethod
    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """The gates, in [0, 1]."""
