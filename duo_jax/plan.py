"""Plan: the memory that weights, KV cache and activations need on a device, and the longest context that fits.

Arithmetic only: nothing is allocated, no program runs, no weights are read. `duo plan --verify` compares it with the
compiler's own figures.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from duo_jax.arguments import MOST_BYTES, MOST_TOKENS, instance, whole_number
from duo_jax.cache.spec import CacheSpec
from duo_jax.generation.chunks import most_at_a_time
from duo_jax.mesh.mesh import MeshSize, abstract_mesh
from duo_jax.mesh.place import parameter_shapes
from duo_jax.model.config import ModelConfig
from duo_jax.model.experts import rows_of_block
from duo_jax.model.precision import AnyDtype
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.sizes import nbytes, size_text
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.quantized import BITS
from pallas_kernels.segments import scratch_bytes

# What attention to a quantized cache needs for each number of the queries, in numbers of their type: the queries and
# their transform, the sums of all segments and the result of one in float32, by compilation.
ATTENTION = 10


def any_pattern(config: ModelConfig, sparsity: float, *, sink_size: int = 64, recent_size: int = 256) -> HeadPattern:
    """A pattern with this fraction of streaming heads; which heads they are does not change any size."""
    gates = np.zeros((config.num_layers, config.num_kv_heads))
    sizes: dict[str, Any] = {"sink_size": sink_size, "recent_size": recent_size}
    return HeadPattern.from_gates(gates, sparsity=sparsity, **sizes, window_layers=config.window_layers)


@functools.cache
def weight_bytes(config: ModelConfig, mesh: MeshSize = MeshSize()) -> int:
    """Bytes of all weights on each device, as `load_model` places them.

    They are counted with one and two layers of each kind, with experts and without, whose layers have the same size.
    """

    def bytes_of(*layers: int) -> int:
        leaves = jax.tree.leaves(parameter_shapes(config.of_layers(*layers), abstract_mesh(mesh))[1])
        return nbytes([jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves])

    kinds = [config.has_experts(layer) for layer in range(config.num_layers)]
    one = {kind: bytes_of(kinds.index(kind)) for kind in set(kinds)}
    two = {kind: bytes_of(kinds.index(kind), kinds.index(kind)) for kind in set(kinds)}
    return 2 * one[kinds[0]] - two[kinds[0]] + sum(two[kind] - one[kind] for kind in kinds)


@dataclass(frozen=True)
class Plan:
    """A model and how it is served; every size is in bytes.

    Attributes:
        config: the model's, with the data types of weights and activations.
        pattern: which heads stream; None: full attention.
        batch_size: sequences.
        chunk_size: tokens of each sequence's prompt that are computed at a time; None becomes what prefill takes by
            default on this machine, `duo_jax.generation.chunks.most_at_a_time`.
        kv_dtype: data type of the cache, as in `KVCache.init`.
        streaming_dtype: data type of streaming heads, as in `KVCache.init`.
        mesh: devices that share the model and its cache; sizes are per device.
    """

    config: ModelConfig
    pattern: HeadPattern | None = None
    batch_size: int = 1
    chunk_size: int = None  # type: ignore[assignment]  # A number once the plan is made.
    kv_dtype: AnyDtype | None = None
    streaming_dtype: AnyDtype | None = None
    mesh: MeshSize = MeshSize()

    def __post_init__(self) -> None:
        """Check the sizes, and that the mesh can share the model and its cache."""
        instance("config", self.config, ModelConfig, "pass model.config")
        precision = self.cache(1).precision  # Checks the batch, and has the names of the data types.
        # Without starting the device: certification must come before that.
        traced = jax.sharding.get_abstract_mesh().abstract_device
        on_gpu = may_have_gpu() if traced is None else traced.device_kind != "cpu"
        default = most_at_a_time(self.batch_size, on_gpu=on_gpu)
        chunk = default if self.chunk_size is None else self.chunk_size
        object.__setattr__(self, "chunk_size", whole_number("chunk_size", chunk, 1))
        for name in ("kv_dtype", "streaming_dtype"):
            object.__setattr__(self, name, getattr(precision, name))

    @property
    def head_pattern(self) -> HeadPattern:
        """The pattern, or the full one."""
        return HeadPattern.full(self.config) if self.pattern is None else self.pattern.of(self.config)

    def cache(self, length: int, mesh: Mesh | None = None) -> CacheSpec:
        """The cache for contexts of `length` tokens; `mesh` has the devices to make it on."""
        precision = self.config.precision(kv_dtype=self.kv_dtype, streaming_dtype=self.streaming_dtype)
        room = self.config.room(length)
        return CacheSpec(self.config, self.head_pattern, self.batch_size, room, precision, mesh or self.mesh)

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return weight_bytes(self.config, self.mesh)

    def kv(self, length: int) -> int:
        """Bytes of the cache for `length` tokens of each sequence."""
        return self.cache(length).nbytes

    @property
    def kv_per_token(self) -> int:
        """Bytes of cache that one more token of every sequence takes; on a mesh, the average of the devices."""
        each = self.mesh.sequence
        first = self.config.room(each)
        return (self.kv(first + each) - self.kv(first)) // each

    @property
    def activations(self) -> int:
        """Bytes that a chunk of the prompt needs in addition to weights and cache; a decode step needs less.

        The peak is inside the MLP, or inside attention. In the MLP: the residual and its norm, the gate and up
        projections, the same size again for their product and the compiler's temporaries, and the chunk's keys and
        values before they are written to the cache. In attention: queries, the output of heads, and as much again. A
        mixture of experts has the sum of its experts in float32, twice, and a copy of one expert's kernel with the
        channels of a block. With quantized weights the compiler dequantizes one kernel at a time, and the largest one
        is counted. Attention adds nothing that grows with the context: its kernels work on tiles, or unpack a quantized
        cache a segment at a time.
        """
        config, mesh = self.config, self.mesh
        kv_heads = mesh.kv_heads(config) // mesh.tensor
        rows = -(-self.batch_size // mesh.data)
        size, tokens = jnp.dtype(config.dtype).itemsize, rows * self.chunk_size
        shared = 2 * config.embed_dim + 2 * kv_heads * config.head_dim
        is_quantized = config.weight_dtype is not None

        def linear(channels: int, kernels: int) -> int:
            kernel = kernels * channels * config.embed_dim // mesh.sharers if is_quantized else 0
            return tokens * (4 * channels // mesh.sharers + shared) + kernel

        peaks = [linear(config.num_heads * config.head_dim, 1)]
        if not config.num_experts or config.dense_layers:
            peaks.append(linear(config.mlp_dim, 2))
        if config.num_experts:
            block = rows_of_block(tokens, config.experts_per_token, config.num_experts)
            kernel = (3 if is_quantized else 2) * config.expert_dim * config.embed_dim
            peaks.append(tokens * (5 * config.embed_dim + shared) + kernel + 3 * block * config.expert_dim)
        if self.kv_dtype not in BITS:
            return max(peaks) * size
        queries = config.num_heads * config.head_dim // mesh.tensor
        attention = tokens * (ATTENTION * queries + shared)
        scratch = scratch_bytes(rows, MOST_TOKENS, kv_heads, config.head_dim, size)
        return max(max(peaks) * size, attention * size + scratch)

    def total(self, length: int) -> int:
        """Bytes of everything, for contexts of `length` tokens."""
        return self.weights + self.kv(length) + self.activations

    def max_context(self, memory: int) -> int:
        """The most tokens of a sequence, prompt and answer together, in `memory` bytes; 0 if not even one fits."""
        memory = whole_number("memory", memory, 1, MOST_BYTES)
        return self.cache(1).fit(memory - self.weights - self.activations)

    def check(self, length: int, memory: int) -> None:
        """Raise ValueError if contexts of `length` tokens do not fit into `memory` bytes, with settings that would."""
        length, memory = whole_number("length", length, 1), whole_number("memory", memory, 1, MOST_BYTES)
        needed = self.total(length)
        if needed <= memory:
            return
        most = self.max_context(memory)
        parts = {"weights": self.weights, "KV cache": self.kv(length), "activations": self.activations}
        sizes = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        ways = [f"up to {most} tokens" if most else "", self._nearest(length, memory)]
        fitting = " or ".join(filter(None, ways)) or f"at least {_size(self.total(1))} of memory for a first token"
        raise ValueError(
            f"a context of {length} needs {_size(needed)} ({sizes}), but there are {_size(memory)}; "
            f"what would fit: {fitting}"
        )

    def _with(self, *, sparsity: float | None = None, weight_dtype: str | None = None, **changes: Any) -> "Plan":
        if sparsity is not None:
            changes["pattern"] = any_pattern(self.config, sparsity)
        if weight_dtype is not None:
            changes["config"] = replace(self.config, weight_dtype=weight_dtype)
        return replace(self, **changes)

    def _nearest(self, length: int, memory: int) -> str:
        """The smallest change of data types, chunk or heads that makes it fit; empty if none does."""
        for change in CHANGES:
            if "sparsity" in change and self.head_pattern.num_streaming:
                continue
            try:
                other = self._with(**change)
                fits = other.total(length) <= min(memory, self.total(length) - 1)
            except ValueError:  # This data type cannot store these widths.
                continue
            if fits:
                return " and ".join(f"{name}={value}" for name, value in change.items())
        return ""


_size = functools.partial(size_text, digits=2)

# What to try if a context does not fit, in the order of their cost.
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
