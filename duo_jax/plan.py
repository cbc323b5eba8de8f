"""Planner: what weights, KV cache and activations take of a device's memory, and the longest context that fits.

Arithmetic alone: nothing is allocated, no device is asked, no weights are read. `duo plan --verify` holds it against
the compiler's own figures.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from duo_jax.cache import KVCache
from duo_jax.config import ModelConfig
from duo_jax.pattern import HeadPattern
from duo_jax.phases import CHUNK_SIZE

# Numbers that one scale of an int4 weight stands for, at most and by default.
WEIGHT_GROUP = 128


def any_pattern(config: ModelConfig, sparsity: float, *, sink_size: int = 64, recent_size: int = 256) -> HeadPattern:
    """A pattern with a fraction of streaming heads spread over the layers: which heads they are changes no byte."""
    gates = np.zeros((config.num_layers, config.num_kv_heads))
    return HeadPattern.from_gates(gates, sparsity=sparsity, sink_size=sink_size, recent_size=recent_size)


def weight_bytes(config: ModelConfig, dtype: str | None = None) -> int:
    """Bytes of all weights; in int8 and int4 those of linear layers, while embeddings, head, norms and biases stay."""
    dtype = dtype or config.dtype
    high = jnp.dtype(config.dtype).itemsize
    if dtype not in WEIGHT_BITS:
        return config.num_parameters * jnp.dtype(dtype).itemsize
    maps = _linear_shapes(config)
    numbers = config.num_layers * sum(width_in * width_out for width_in, width_out in maps)
    # int8 has a scale for each output, int4 one for each output and group of inputs.
    groups = [1 if WEIGHT_BITS[dtype] == 8 else -(-width_in // WEIGHT_GROUP) for width_in, _ in maps]
    scales = config.num_layers * sum(count * shape[1] for count, shape in zip(groups, maps, strict=True))
    return (config.num_parameters - numbers) * high + numbers * WEIGHT_BITS[dtype] // 8 + scales * high


WEIGHT_BITS = {"int8": 8, "int8-w8a8": 8, "int4": 4}


def _linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's linear maps, fused as they are stored."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = config.embed_dim
    return [(wide, queries + 2 * keys), (queries, wide), (wide, 2 * config.mlp_dim), (config.mlp_dim, wide)]


@dataclass(frozen=True)
class Plan:
    """A model and how it is served; every size is in bytes.

    Attributes:
        config: the model's; activations are of its data type.
        pattern: which heads stream; None: every head keeps all tokens.
        batch_size: sequences.
        chunk_size: tokens of each sequence's prompt that are computed at a time.
        kv_dtype: data type of the cache, as in `KVCache.init`.
        streaming_dtype: of streaming heads, as in `KVCache.init`.
        weight_dtype: data type of the weights; the configuration's by default.
    """

    config: ModelConfig
    pattern: HeadPattern | None = None
    batch_size: int = 1
    chunk_size: int = CHUNK_SIZE
    kv_dtype: str | None = None
    streaming_dtype: str | None = None
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no run can have."""
        for name in ("batch_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return weight_bytes(self.config, self.weight_dtype)

    def kv(self, length: int) -> int:
        """Bytes of a cache of `length` tokens a sequence."""
        return KVCache.bytes_for(
            self.config,
            self.pattern,
            self.batch_size,
            length,
            dtype=self.kv_dtype,
            streaming_dtype=self.streaming_dtype,
        )

    @property
    def kv_per_token(self) -> int:
        """Bytes of cache that one more token takes in every sequence."""
        return self.kv(2) - self.kv(1)

    @property
    def activations(self) -> int:
        """Bytes that a chunk of the prompt needs beside weights and cache; a decode step needs far less.

        The most is needed inside the MLP: the residual and its norm, the gate and up projections, as much again for
        their product and what the compiler keeps beside it; and the chunk's keys and values, on their way into the
        cache. Attention adds nothing of the context's length: its kernels work on tiles.
        """
        config = self.config
        keys = 2 * config.num_kv_heads * config.head_dim
        numbers = 4 * config.mlp_dim + 2 * config.embed_dim + keys
        return self.batch_size * self.chunk_size * numbers * jnp.dtype(config.dtype).itemsize

    def total(self, length: int) -> int:
        """Bytes of everything, for contexts of `length` tokens."""
        return self.weights + self.kv(length) + self.activations

    def max_context(self, memory: int) -> int:
        """Most tokens that each sequence can have in `memory` bytes, prompt and answer together; 0: not even one."""
        left = memory - self.weights - self.activations
        dtypes = {"dtype": self.kv_dtype, "streaming_dtype": self.streaming_dtype}
        return KVCache.length_for(self.config, self.pattern, self.batch_size, left, **dtypes)

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
            f"{length} tokens of context need {_size(needed)} ({said}), but there are {_size(memory)}; "
            f"what would fit: {found}"
        )

    def _nearest(self, length: int, memory: int) -> str:
        """The least change of data types, chunk or heads that makes it fit; empty if none of these does."""
        for change in CHANGES:
            if "sparsity" in change:
                if self.pattern is not None:
                    continue
                other = replace(self, pattern=any_pattern(self.config, change["sparsity"]))
            else:
                other = replace(self, **change)
            try:
                fits = other.total(length) <= min(memory, self.total(length) - 1)
            except ValueError:  # A head dim that this data type cannot pack.
                continue
            if fits:
                return " and ".join(f"{name}={value}" for name, value in change.items())
        return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


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
