"""Flags of commands that several devices, or several processes, can share."""

from dataclasses import dataclass

from jax.sharding import Mesh

from duo_jax.mesh import MeshSize, make_mesh


@dataclass(frozen=True)
class DeviceOptions:
    """Devices that share model and cache."""

    mesh: str | None = None
    """Devices along each axis, such as tensor=4,sequence=2: tensor shares heads, sequence the tokens of retrieval
    heads, data the rows of a batch. Without it, one device does all."""

    @property
    def size(self) -> MeshSize:
        """How many devices share what."""
        return MeshSize() if self.mesh is None else MeshSize.parse(self.mesh)

    def make(self) -> Mesh | None:
        """The devices; None: the default one.

        Raises:
            ValueError: text that is no mesh, or more devices than there are.
        """
        return None if self.mesh is None else make_mesh(**vars(self.size))
