"""Fully sharded weights (FSDP), for training: every device has a slice of each array. Knows no heads.

The order of the weights is that of one device. A layer is whole only while it computes (`Decoder.whole`), so a device
needs the memory of its slices and of about two layers, as the next may be gathered early, whatever the number of KV
heads. Arrays that the devices do not divide, and norms, are copied.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duo_jax.mesh.mesh import AXES, place
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model, abstract_decoder

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Slices:
    """How the weights of a model are divided into slices.

    Attributes:
        config: the model's.
        devices: all devices of the mesh.
    """

    config: ModelConfig
    devices: int

    def axes(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """The mesh axes that divide each axis of an array of this shape: all divide one axis of it, or none does.

        It is the first axis that they divide evenly: slices of it are gathered without a transpose.
        """
        divided = [axis for axis, size in enumerate(shape) if size % self.devices == 0]
        return (*(None,) * divided[0], AXES) if len(shape) > 1 and divided else ()

    def put(self, path: Path, value: Any, mesh: Mesh) -> Any:
        """Give each device its slice of a parameter's arrays, which are on the host or one device."""
        return jax.tree.map(lambda leaf: place(mesh, array := np.asarray(leaf), *self.axes(array.shape)), value)

    def model(self, flat: dict[Path, Any], mesh: Mesh) -> Model:
        """A model of these parameters, which `put` placed."""
        graphdef, _ = abstract_decoder(self.config)
        return Model(self.config, graphdef, nnx.from_flat_state(flat.items()), mesh)


def fsdp_shapes(config: ModelConfig, mesh: Mesh) -> Any:
    """A model with sliced weights as shapes with shardings: to compile for devices that need not exist."""
    slices = Slices(config, mesh.size)

    def sliced(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, PartitionSpec(*slices.axes(leaf.shape)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    graphdef, params = abstract_decoder(config)
    return Model(config, graphdef, jax.tree.map(sliced, params), mesh)
