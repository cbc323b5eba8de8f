"""Planner: what weights, KV cache and activations take of a device's memory, and the longest context that fits.

Arithmetic alone: nothing is allocated, no device is asked, no weights are read. `duo plan --verify` holds it against
the compiler's own figures.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.cache.cache import KVCache
from duo_jax.config import ModelConfig
from duo_jax.infer import CHUNK_SIZE
from duo_jax.memory import nbytes, size_text
from duo_jax.mesh.mesh import MeshSize, abstract_mesh
from duo_jax.mesh.place import parameter_shapes
from duo_jax.pattern import HeadPattern


def any_pattern(config: ModelConfig, sparsity: float, *, sink_size: int = 64, recent_size: int = 256) -> HeadPattern:
    """A pattern with a fraction of streaming heads spread over the layers: which heads they are changes no byte."""
    gates = np.zeros((config.num_layers, config.num_kv_heads))
    return HeadPattern.from_gates(gates, sparsity=sparsity, sink_size=sink_size, recent_size=recent_size)


@functools.cache
def weight_bytes(config: ModelConfig, mesh: MeshSize = MeshSize()) -> int:
    """Bytes of all weights as `load_model` places them, counted in one and two layers: each takes as much.

    On a mesh, of each device.
    """

    def bytes_of(layers: int) -> int:
        fewer = replace(config, num_layers=layers)
        leaves = jax.tree.leaves(parameter_shapes(fewer, abstract_mesh(mesh))[1])
        return sum(nbytes(jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)) for x in leaves)

    one, two = bytes_of(1), bytes_of(2)
    return one + (config.num_layers - 1) * (two - one)


@dataclass(frozen=True)
class Plan:
    """A model and how it is served; every size is in bytes.

    Attributes:
        config: the model's, with the data types of weights and activations.
        pattern: which heads stream; None: every head keeps all tokens.
        batch_size: sequences.
        chunk_size: tokens of each sequence's prompt that are computed at a time.
        kv_dtype: data type of the cache, as in `KVCache.init`.
        streaming_dtype: of streaming heads, as in `KVCache.init`.
        mesh: devices that share all of this; sizes are then of each of them.
    """

    config: ModelConfig
    pattern: HeadPattern | None = None
    batch_size: int = 1
    chunk_size: int = CHUNK_SIZE
    kv_dtype: str | None = None
    streaming_dtype: str | None = None
    mesh: MeshSize = MeshSize()

    def __post_init__(self) -> None:
        """Refuse sizes that no run can have, and models that this mesh cannot share."""
        self.mesh.check(self.config)
        for name in ("batch_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return weight_bytes(self.config, self.mesh)

    def kv(self, length: int) -> int:
        """Bytes of a cache of `length` tokens a sequence."""
        return KVCache.bytes_for(
            self.config,
            self.pattern,
            self.batch_size,
            length,
            dtype=self.kv_dtype,
            streaming_dtype=self.streaming_dtype,
            mesh=self.mesh,
        )

    @property
    def kv_per_token(self) -> int:
        """Bytes of cache that one more token takes in every sequence; of each device's, on average."""
        each = self.mesh.sequence
        return (self.kv(2 * each) - self.kv(each)) // each

    @property
    def activations(self) -> int:
        """Bytes that a chunk of the prompt needs beside weights and cache; a decode step needs less.

        The most is needed inside the MLP: the residual and its norm, the gate and up projections, as much again for
        their product and what the compiler keeps beside it; and the chunk's keys and values, on their way into the
        cache. Attention adds nothing of the context's length: its kernels work on tiles. Where weights are quantized,
        the compiler writes out one kernel at a time, the largest is counted, before it multiplies.
        """
        config, mesh = self.config, self.mesh
        keys = 2 * mesh.kv_heads(config) * config.head_dim // mesh.tensor
        rows = -(-self.batch_size // mesh.data)
        numbers = rows * self.chunk_size * (4 * config.mlp_dim // mesh.sharers + 2 * config.embed_dim + keys)
        if config.weight_dtype is not None:
            numbers += 2 * config.mlp_dim * config.embed_dim // mesh.sharers
        return numbers * jnp.dtype(config.dtype).itemsize

    def total(self, length: int) -> int:
        """Bytes of everything, for contexts of `length` tokens."""
        return self.weights + self.kv(length) + self.activations

    def max_context(self, memory: int) -> int:
        """Most tokens that each sequence can have in `memory` bytes, prompt and answer together; 0: not even one."""
        left = memory - self.weights - self.activations
        options: dict[str, Any] = {"dtype": self.kv_dtype, "streaming_dtype": self.streaming_dtype, "mesh": self.mesh}
        return KVCache.length_for(self.config, self.pattern, self.batch_size, left, **options)

    def check(self, length: int, memory: int) -> None:
        """Raise ValueError if contexts of `length` tokens do not fit into `memory` bytes: the numbers, the way out."""
        if length < 1:
            raise ValueError(f"a context has at least 1 token, got {length}")
        needed = self.total(length)
        if needed <= memory:
            return
        most = self.max_context(memory)
        parts = {"weights": self.weights, "KV cache": self.kv(length), "activations": self.activations}
        said = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        ways = [f"up to {most} tokens" if most else "", self._nearest(length, memory)]
        found = " or ".join(filter(None, ways)) or f"at least {_size(self.total(1))} of memory for a first token"
        raise ValueError(
            f"a context of {length} needs {_size(needed)} ({said}), but there are {_size(memory)}; "
            f"what would fit: {found}"
        )

    def _with(self, *, sparsity: float | None = None, weight_dtype: str | None = None, **changes: Any) -> "Plan":
        if sparsity is not None:
            changes["pattern"] = any_pattern(self.config, sparsity)
        if weight_dtype is not None:
            changes["config"] = replace(self.config, weight_dtype=weight_dtype)
        return replace(self, **changes)

    def _nearest(self, length: int, memory: int) -> str:
        """The least change of data types, chunk or heads that makes it fit; empty if none of these does."""
        for change in CHANGES:
            if "sparsity" in change and self.pattern is not None:
                continue
            try:
                other = self._with(**change)
                fits = other.total(length) <= min(memory, self.total(length) - 1)
            except ValueError:  # Widths that this data type cannot pack.
                continue
            if fits:
                return " and ".join(f"{name}={value}" for name, value in change.items())
        return ""


_size = functools.partial(size_text, digits=2)

# What to try where something does not fit, from what costs least to what costs most.
CHANGES: tuple[dict[str, Any], ...] = (
    {"chunk_size": 1024},
    {"kv_dtype": "int8"},
    {"weight_dtype": "int8"},
    {"kv_dtype": "int8", "weight_dtype": "int8"},
    {"sparsity": 0.5},
    {"kv_dtype": "int4"},
    {"kv_dtype": "int4", "weight_dtype": "int8"},
    {"kv_dtype": "int4", "weight_dtype": "int4"},
)
