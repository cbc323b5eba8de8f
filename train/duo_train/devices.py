"""How devices share a training step: the samples of a batch along `data`, the tokens of each along `sequence`.

They share the weights too (`duo_jax.mesh.fsdp`), or each has a copy. Outside attention a device computes its part of
the tokens; in attention, all tokens of its part of the heads (Ulysses, arXiv 2309.14509). This balances causal
attention and works with any backend. Only queries, keys, values, the output and shared weights are exchanged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float

from duo_jax.mesh.mesh import MeshSize, check_heads, constrain, divides_heads, make_mesh
from duo_jax.model.config import ModelConfig
from duo_train.gated import GatedModel

BY_TOKEN = "data", "sequence"
# `tensor` has one device. It is named because gradients would be summed over an axis that is not named.
BY_HEAD = "data", None, ("sequence", "tensor")


@dataclass(frozen=True)
class ShardedModel(GatedModel):
    """A gated model on the devices of a mesh."""

    mesh: Mesh | None = None
    """Devices that share samples and their tokens."""

    def attend(
        self,
        attention: Callable[..., Array],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        gates: Float[Array, "K"] | None = None,
        full: Float[Array, "B T N H"] | None = None,
        sink_logits: Float[Array, "N"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of one layer; each device computes all tokens of its heads."""
        # Devices beyond the number of KV heads share the queries of one.
        copies = max(1, MeshSize.of(self.mesh).sequence // k.shape[2])
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        sequences = {"q": q, "k": k, "v": v, "full": full}
        arrays = {name: constrain(x, self.mesh, *BY_TOKEN) for name, x in sequences.items() if x is not None}
        specs = dict.fromkeys(arrays, PartitionSpec(*BY_HEAD))
        if gates is not None:
            arrays["gates"], specs["gates"] = jnp.repeat(gates, copies), PartitionSpec(BY_HEAD[2])
        if sink_logits is not None:
            arrays["sink_logits"], specs["sink_logits"] = sink_logits, PartitionSpec(BY_HEAD[2])
        sharded = jax.shard_map(
            lambda arrays: attention(**arrays),
            mesh=self.mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec(*BY_HEAD),
            check_vma=False,
        )
        return constrain(sharded(arrays), self.mesh, *BY_TOKEN)


class Sharding:
    """Which devices store which arrays of a training run, and which rows of a batch this process draws.

    Without a mesh, all devices share the work: as many as divide the batch share its samples, the others their tokens.
    A single device gets no mesh, because a program over a mesh uses one core of a CPU (10.5 s a step of SmolLM2 instead
    of 6.6).

    Raises:
        ValueError: a batch, or a model, that the devices cannot share.
    """

    def __init__(self, mesh: Mesh | None, config: ModelConfig, batch_size: int) -> None:
        if mesh is None:
            devices = jax.device_count()
            data = math.gcd(batch_size, devices)
            share_tokens = divides_heads(config, devices // data)
            mesh = make_mesh(data=data, sequence=devices // data) if share_tokens else make_mesh(data=devices)
        self.size, self.devices, self.batch_size = MeshSize.of(mesh), mesh.devices, batch_size
        self.mesh = None if self.size.devices == 1 else mesh
        if self.size.tensor > 1:
            raise ValueError(
                f"training has no tensor parallelism, got tensor={self.size.tensor}: use data and sequence, whose "
                "devices share the weights too"
            )
        if batch_size % self.size.data:
            raise ValueError(
                f"batch_size must be a multiple of the {self.size.data} devices that share it, or groups of them, got "
                f"{batch_size=}: raise it, give more devices to each sample (sequence), or hide some "
                "(CUDA_VISIBLE_DEVICES)"
            )
        check_heads(config, "sequence", self.size.sequence)

    def model(self, attention: GatedModel) -> GatedModel:
        """The gated model on these devices."""
        return attention if self.mesh is None else ShardedModel(**vars(attention), mesh=self.mesh)

    def replicate(self, tree: Any) -> Any:
        """Copy a pytree to every device."""
        whole = self._sharding()
        if jax.process_count() == 1:
            return jax.device_put(tree, whole)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), tree)

    @cached_property
    def rows(self) -> list[int]:
        """Rows of a batch that the devices of this process store, whole or in part."""
        rows_per_group = self.batch_size // self.size.data
        process = jax.process_index()
        rows = np.arange(self.batch_size).reshape(self.size.data, rows_per_group)
        groups = self.devices.reshape(self.size.data, -1)
        local = [any(device.process_index == process for device in group) for group in groups]
        return [int(row) for row in rows[local].ravel()]

    def put(self, rows: np.ndarray, *, tokens: bool = False) -> Array:
        """A batch on the devices from this process's rows, `[A, rows, ...]`; `tokens`: also divide the next axis."""
        axes = (None, *BY_TOKEN) if tokens else (None, "data")

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[1].indices(self.batch_size)
            first = self.rows.index(begin)
            return rows[index[0], first : first + end - begin, *index[2:]]

        shape = (rows.shape[0], self.batch_size, *rows.shape[2:])
        return jax.make_array_from_callback(shape, self._sharding(*axes), part)

    def local_rows(self, shared: Array) -> np.ndarray:
        """This process's rows of an array that is divided by rows."""
        if jax.process_count() == 1:
            return np.asarray(shared)
        parts = {shard.index[1].start or 0: np.asarray(shard.data) for shard in shared.addressable_shards}
        return np.concatenate([parts[begin] for begin in sorted(parts)], axis=1)

    def _sharding(self, *axes: Any) -> jax.sharding.Sharding:
        if self.mesh is None:
            return SingleDeviceSharding(self.devices.item())
        return NamedSharding(self.mesh, PartitionSpec(*axes))
