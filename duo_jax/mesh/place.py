"""Weights on a mesh, for inference: which part of each parameter a device has, and in which order its heads are.

Linear maps are divided by `tensor` and again by `sequence`: those into heads and MLP by output, those back by input, so
that each ends in one sum, which XLA's partitioner adds. A device's part of the fused q/k/v projection has the queries,
keys and values of its own heads; its part of the fused MLP has its own gates and ups. Of a mixture of experts it has
some of the experts. Embeddings are divided by channel, the head by vocabulary if the devices divide it, otherwise by
channel too. Norms and routers are replicated.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, Shaped

from duo_jax.mesh.balance import balance, query_heads
from duo_jax.mesh.fsdp import Slices
from duo_jax.mesh.mesh import AnyMesh, MeshSize, both, place
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model, abstract_decoder
from duo_jax.pattern.pattern import HeadPattern

Path = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Placement:
    """How the weights of a model are divided over a mesh.

    Attributes:
        config: the model's.
        size: devices along each axis.
        order: the KV head of each column, as in `Balance`.
    """

    config: ModelConfig
    size: MeshSize
    order: Int32[np.ndarray, "L C"]

    @classmethod
    def of(cls, config: ModelConfig, size: MeshSize, pattern: HeadPattern) -> "Placement":
        """Balanced for a pattern, see `balance`.

        Raises:
            ValueError: a model that cannot be divided over this mesh, or a pattern of another model.
        """
        size.check(config)
        return cls(config, size, balance(pattern.of(config).is_retrieval, size.tensor).order)

    def axes(self, path: Path, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """The mesh axes that divide each axis of an array of this shape; `path` is its parameter's."""
        if path[-1] == "sink_logits":  # As heads: too few to be divided again.
            return ("tensor",)
        axis = self._divided(path, shape)
        return () if axis is None else (*(None,) * axis, both(shape[axis], self.size))

    def arrange(self, path: Path, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """A parameter's array with its heads, or MLP channels, in the order of the devices.

        Raises:
            ValueError: groups of quantized input channels that span several heads, which would be separated.
        """
        units, index = self._index(path)
        axis = self._divided(path, array.shape)
        if index is None or axis is None or array.shape[axis] == 1 or np.array_equal(index, np.arange(units)):
            return array
        if array.shape[axis] % units:
            raise ValueError(
                f"{self.config.weight_dtype} has scales for groups of input channels that span several heads of "
                f"{self.config.head_dim}, which {self.size.tensor} devices would separate: choose weight_dtype int8"
            )
        width = array.shape[axis] // units
        where = (index[:, None] * width + np.arange(width)).ravel()
        return np.take(array, where, axis=axis)

    def put(self, path: Path, value: Any, mesh: Mesh) -> Any:
        """Arrange a parameter's arrays, on the host or one device, and give each device its part."""

        def placed(leaf: Any) -> jax.Array:
            array = self.arrange(path, np.asarray(leaf))
            return place(mesh, array, *self.axes(path, array.shape))

        return jax.tree.map(placed, value)

    def model(self, flat: dict[Path, Any], mesh: Mesh) -> Model:
        """A model of these parameters, which `put` placed."""
        graphdef, _ = abstract_decoder(self.config, mesh)
        order = place(mesh, self.order)
        return Model(self.config, graphdef, nnx.from_flat_state(flat.items()), mesh, order)

    def _divided(self, path: Path, shape: tuple[int, ...]) -> int | None:
        """The axis along which a parameter's array is divided; None: it is replicated."""
        match path[-2:]:
            case ("embed", "embedding") | ("head", "kernel"):
                # Embeddings not by vocabulary: XLA would gather all of it to look one token up.
                return 1 if shape[1] % self.size.sharers == 0 else 0
            case ("qkv" | "gate_up", _):
                return len(shape) - 1
            case ("out" | "down", "kernel") | (_, "sink_logits") | ("expert_gate_up" | "expert_down", _):
                return 0
            case ("q_norm" | "k_norm", _) if self.config.wide_qk_norm:
                return 0
        return None

    def _index(self, path: Path) -> tuple[int, Int32[np.ndarray, "units"] | None]:
        """The number of parts that a parameter's divided axis has, and their order on the mesh."""
        config, size = self.config, self.size
        if path[-2] == "gate_up":
            shards = size.sharers
            return 2 * shards, np.arange(2 * shards, dtype=np.int32).reshape(2, shards).T.ravel()
        by_head = {"qkv", "out", "q_norm", "k_norm", "sink_logits"}
        if not {path[-2], path[-1]} & by_head or not isinstance(path[1], int):
            return 1, None
        order = self.order[path[1]]
        if path[-2] == "k_norm":
            return config.num_kv_heads, order
        queries = query_heads(order, config.num_heads, config.num_kv_heads)
        if path[-2] != "qkv":
            return config.num_heads, queries
        keys = config.num_heads + order
        parts = (np.split(x, size.tensor) for x in (queries, keys, keys + config.num_kv_heads))
        together = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return config.num_heads + 2 * config.num_kv_heads, np.concatenate(together).astype(np.int32)


def placement_on(
    config: ModelConfig, mesh: Mesh, pattern: HeadPattern | None = None, *, fsdp: bool = False
) -> Placement | Slices:
    """How weights are divided over a mesh: by heads, for a pattern or for full attention, or in slices (`fsdp`).

    Raises:
        ValueError: as `Placement.of`.
    """
    if fsdp:
        return Slices(config, mesh.size)
    return Placement.of(config, MeshSize.of(mesh), pattern or HeadPattern.full(config))


def place_model(model: Model, mesh: Mesh, pattern: HeadPattern | None = None) -> Model:
    """Move a model from one device to a mesh, for a pattern; the host's memory must hold its largest array.

    Raises:
        ValueError: as `Placement.of`, or a model that is on a mesh already.
    """
    if model.mesh is not None:
        raise ValueError("the model is already on a mesh; reload it to use a different one")
    placement = Placement.of(model.config, MeshSize.of(mesh), pattern or HeadPattern.full(model.config))
    flat = {
        path: variable.replace(placement.put(path, variable.get_value(), mesh))
        for path, variable in nnx.to_flat_state(model.params)
    }
    return placement.model(flat, mesh)


def model_shapes(config: ModelConfig, mesh: Mesh | None) -> Any:
    """A model as shapes with shardings: to compile for devices that need not exist."""
    graphdef, params = parameter_shapes(config, mesh)
    if mesh is None:
        return Model(config, graphdef, params)
    columns = (config.num_layers, MeshSize.of(mesh).kv_heads(config))
    order: Any = jax.ShapeDtypeStruct(columns, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return Model(config, graphdef, params, mesh, order)


def parameter_shapes(config: ModelConfig, mesh: AnyMesh | None) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder's static part, and its parameters as shapes with shardings: nothing is read or allocated."""
    graphdef, params = abstract_decoder(config, mesh)
    if mesh is None:
        return graphdef, params
    placement = Placement.of(config, MeshSize.of(mesh), HeadPattern.full(config))

    def placed(path: Path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, PartitionSpec(*placement.axes(path, leaf.shape)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    flat = {
        path: jax.tree.map(lambda leaf, path=path: placed(path, leaf), variable)
        for path, variable in nnx.to_flat_state(params)
    }
    return graphdef, nnx.from_flat_state(flat.items())
