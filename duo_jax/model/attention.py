"""The projections of attention; attention itself is a function that the decoder's caller passes in."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from duo_jax.mesh.mesh import AnyMesh, MeshSize, both, constrain
from duo_jax.model.config import ModelConfig
from duo_jax.model.linear import Linear
from duo_jax.model.norm import rms_norm
from duo_jax.model.rope import Angles, rotate
from pallas_kernels.quantized import outliers_first


class Attention(nnx.Module):
    """Grouped-query attention: fused q/k/v projection, optional q/k-norm, RoPE, output projection.

    On a mesh, the fused projection has the queries, keys and values of the first device's heads, then of the second's.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, mesh: AnyMesh | None = None) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.config, self.mesh = config, mesh
        size = MeshSize.of(mesh)
        self.devices, self.num_kv_heads = size.tensor, size.kv_heads(config)
        queries, keys = config.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        build = partial(Linear, dtype=dtype, rngs=rngs)
        formats = {name: config.map_dtype(name) for name in ("qkv", "out")}
        self.divided = both(queries + 2 * keys, size)
        self.qkv = build(config.embed_dim, queries + 2 * keys, bias=config.qkv_bias, weight_dtype=formats["qkv"])
        self.out = build(queries, config.embed_dim, bias=config.out_bias, weight_dtype=formats["out"])
        if config.qk_norm:
            widths = (queries, keys) if config.wide_qk_norm else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (rms_norm(width, config, dtype=dtype, rngs=rngs) for width in widths)
        if config.sink_logits:
            self.sink_logits = nnx.Param(jax.random.normal(rngs.params(), (config.num_heads,), dtype))

    def project(
        self, x: Float[Array, "B T D"], angles: Angles | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values; RoPE turns the first two, unless `angles` is None."""
        config = self.config
        batch, length, _ = x.shape
        # Constrain in two steps: in one, XLA gathers weights over the devices that share a head's tokens, not outputs.
        qkv = constrain(self.qkv(x), self.mesh, "data", None, self.divided)
        qkv = constrain(qkv, self.mesh, "data", None, "tensor")
        qkv = qkv.reshape(batch, length, self.devices, -1, config.head_dim)
        queries, keys = config.num_heads // self.devices, self.num_kv_heads // self.devices
        parts = jnp.split(qkv, [queries, queries + keys], axis=3)
        q, k, v = (part.reshape(batch, length, -1, config.head_dim) for part in parts)
        if config.qk_norm:
            # A norm of all heads is one of all devices'. A head that several have counts as often as every other.
            shape = (batch, length, -1) if config.wide_qk_norm else (batch, length, -1, config.head_dim)
            q, k = self.q_norm(q.reshape(shape)).reshape(q.shape), self.k_norm(k.reshape(shape)).reshape(k.shape)
        scales = [jnp.float32(config.query_scale)] if config.query_scale != 1 else []
        if angles is not None and angles.query_scale is not None:
            scales.append(angles.query_scale)
        wide = functools.reduce(jnp.multiply, scales, q.astype(jnp.float32))
        if angles is None:
            return wide.astype(q.dtype), k, v
        return rotate(wide, angles.cos, angles.sin).astype(q.dtype), rotate(k, angles.cos, angles.sin), v

    def key_channels(self) -> Int32[Array, "K H"]:
        """Order of the channels of queries and keys in a quantized cache, by how large those of keys may be.

        Scores do not depend on it, but their precision does: see `outliers_first`.
        """
        config = self.config
        if config.qk_norm and self.k_norm.scale is not None:
            size = self.k_norm.scale.get_value()
            size = jnp.abs(1 + size.astype(jnp.float32)) if config.norm_offset else size
            size = size.reshape(-1, config.head_dim)
        elif self.qkv.bias is not None:
            queries, keys = config.num_heads // self.devices, self.num_kv_heads // self.devices
            bias = self.qkv.bias.get_value().reshape(self.devices, -1, config.head_dim)
            size = bias[:, queries : queries + keys].reshape(-1, config.head_dim)
        else:
            # Keys have offsets in pairs that RoPE turns by a part of a circle over the trained context (Jonasson 2025,
            # arXiv 2503.01832). SmolLM2's largest are those that turn by about a quarter.
            quarters = config.rope.inverse_frequencies(config.rope_dim) * config.max_positions / (np.pi / 2)
            turned = np.tile(np.exp(-np.abs(np.log(quarters))), 2)
            size = jnp.asarray(np.pad(turned, (0, config.head_dim - config.rope_dim)))
        return outliers_first(jnp.broadcast_to(size.astype(jnp.float32), (self.num_kv_heads, config.head_dim)))
