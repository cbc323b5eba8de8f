"""Meshes of devices: their axes, which models they can share, and how arrays are placed. Knows no weights.

There are three axes. `data` divides the rows of a batch. `tensor` divides heads, and the weights that belong to them.
`sequence` divides the tokens of retrieval heads, and the same weights again (Helix parallelism, arXiv 2507.07120). A
device has `1 / (tensor * sequence)` of the weights, `1 / tensor` of the heads and `1 / sequence` of a retrieval head's
tokens. Training of gates has no cache: there, `sequence` divides all tokens (`duo_train.devices`), and the devices of
both axes share the weights (`duo_jax.mesh.fsdp`).
"""

from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from duo_jax.arguments import ArgumentError, whole_number
from duo_jax.model.config import ModelConfig

T = TypeVar("T")
AnyMesh: TypeAlias = Mesh | AbstractMesh

AXES = ("data", "sequence", "tensor")


@dataclass(frozen=True)
class MeshSize:
    """Devices along each axis of a mesh."""

    tensor: int = 1
    sequence: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, whole_number(name, value, 1, way="it is a number of devices"))

    @classmethod
    def of(cls, mesh: "AnyMesh | MeshSize | None") -> "MeshSize":
        """The sizes of a mesh; None is one device.

        Raises:
            ValueError: a mesh with other axes.
        """
        if mesh is None:
            return cls()
        if isinstance(mesh, MeshSize):
            return mesh
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise ArgumentError("mesh", f"must be a mesh from duo_jax.make_mesh, got {mesh!r}")
        if set(mesh.axis_names) != set(AXES):
            raise ValueError(f"a mesh has the axes {', '.join(AXES)}, got {mesh.axis_names}: use duo_jax.make_mesh")
        return cls(**mesh.shape)

    @classmethod
    def parse(cls, text: str) -> "MeshSize":
        """Parse text such as `tensor=4,sequence=2`.

        Raises:
            ValueError: any other text.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in (field.name for field in fields(cls)) or name in sizes or not value.isdecimal():
                raise ValueError(f"a mesh is written as tensor=4,sequence=2,data=1, each at most once, got {text!r}")
            sizes[name] = int(value)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.tensor * self.sequence * self.data

    @property
    def sharers(self) -> int:
        """Devices that share one copy of the weights."""
        return self.tensor * self.sequence

    def kv_heads(self, config: ModelConfig) -> int:
        """KV heads with their copies: with `tensor` larger than their number, each is on several devices."""
        return max(config.num_kv_heads, self.tensor)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a model that cannot be divided in this way, with sizes that would fit.

        The vocabulary need not be divisible: the head is then divided by channel.
        """
        check_heads(config, "tensor", self.tensor)
        if config.num_experts % self.sharers:
            raise ValueError(
                f"{config.num_experts} experts cannot be divided among tensor * sequence = {self.sharers} devices: "
                "use a number of devices that divides the number of experts"
            )
        if config.mlp_dims != (config.expert_dim,) and config.mlp_dim % self.sharers:
            fitting = [n for n in _fitting_sizes(config) if config.mlp_dim % (n * self.sequence) == 0]
            way = f"tensor may be {', '.join(map(str, fitting))}" if fitting else "no tensor fits: change sequence"
            raise ValueError(
                f"an MLP of {config.mlp_dim} channels cannot be divided among tensor * sequence = {self.sharers} "
                f"devices; with sequence={self.sequence}, {way}"
            )


def make_mesh(*, tensor: int = 1, sequence: int = 1, data: int = 1) -> Mesh:
    """A mesh of the first `tensor * sequence * data` devices, for `load_model` and `KVCache.init`, or for training.

    Args:
        tensor: devices that share the heads, and the weights that belong to them. It divides the number of KV heads, or
            is a multiple of it: each KV head is then on several devices.
        sequence: devices that share the tokens of every retrieval head, and again the weights; in training, the tokens
            of a sample.
        data: devices, or groups of them, that share the rows of a batch; each has all weights, except in training.

    Raises:
        ValueError: sizes below 1, or more devices than exist.
    """
    size = MeshSize(tensor, sequence, data)
    devices = jax.devices()
    if size.devices > len(devices):
        raise ValueError(
            f"a mesh of tensor={tensor}, sequence={sequence}, data={data} has {size.devices} devices, but there are "
            f"{len(devices)} ({devices[0].device_kind}): ask for fewer"
        )
    if jax.process_count() > 1 and size.devices != len(devices):
        raise ValueError(
            f"a mesh over {jax.process_count()} processes must use all of their {len(devices)} devices, got "
            f"tensor={tensor}, sequence={sequence}, data={data}: {size.devices}"
        )
    return mesh_of(size, devices[: size.devices])


def mesh_of(size: MeshSize, devices: Any) -> Mesh:
    """A mesh of these devices: those that share heads exchange the most, so they are neighbours."""
    grid = np.asarray(devices).reshape(size.data, size.sequence, size.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(size: MeshSize) -> AbstractMesh:
    """A mesh without devices, for shapes only."""
    return AbstractMesh((size.data, size.sequence, size.tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def constrain(tree: T, mesh: AnyMesh | None, *axes: Any) -> T:
    """Constrain how the arrays of a traced pytree are divided; no effect without a mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def place(mesh: Mesh, array: np.ndarray, *axes: Any) -> jax.Array:
    """Copy an array from the host to the devices: each process gives its own devices their parts."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_heads(config: ModelConfig, axis: str, devices: int) -> None:
    """Raise ValueError if this number of devices along an axis cannot share the heads, with numbers that can."""
    if not divides_heads(config, devices):
        raise ValueError(
            f"{config.num_kv_heads} KV heads and {config.num_heads} query heads cannot be divided among "
            f"{axis}={devices} devices: it must divide the KV heads, or be a multiple of them that divides the query "
            f"heads; {axis} may be {', '.join(map(str, _fitting_sizes(config)))}"
        )


def divides_heads(config: ModelConfig, devices: int) -> bool:
    """Whether this number of devices can share the heads."""
    keys = config.num_kv_heads
    return max(keys, devices) % min(keys, devices) == 0 and config.num_heads % devices == 0


def _fitting_sizes(config: ModelConfig) -> list[int]:
    """Common numbers of devices that can share the heads."""
    return [n for n in (1, 2, 3, 4, 6, 8, 9, 12, 16) if divides_heads(config, n)]


def both(dim: int, size: MeshSize) -> tuple[str, ...] | None:
    """The mesh axes that divide weights with this number of channels: as many as divide it evenly."""
    if dim % size.sharers == 0:
        return ("tensor", "sequence")
    return ("tensor",) if dim % size.tensor == 0 else None
