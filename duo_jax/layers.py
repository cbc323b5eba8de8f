"""The blocks of the decoder, as Flax NNX modules. Attention itself is a function that the caller passes in."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from duo_jax.config import ModelConfig
from duo_jax.config_checks import ACTIVATIONS
from duo_jax.experts import MOST_WEIGHTS, blocks_of, rows_of_block, sum_of_choices, weighted_sum
from duo_jax.mesh.mesh import AnyMesh, MeshSize, both, constrain
from duo_jax.rope import Angles, rotate
from duo_jax.weights import WEIGHT_FORMATS, look_up, multiply, quantize_kernel
from pallas_kernels.quantized import outliers_first

State = TypeVar("State")
# (state, layer, q [B T N H], k [B T K H], v [B T K H]) -> attention output [B T N H] and the new state.
Attend = Callable[[State, int, Array, Array, Array], tuple[Array, State]]
# Axes of a mesh that divide experts; how they divide tokens `[B, T, ...]` in inference, and in training.
SHARERS = ("tensor", "sequence")
BY_ROW, BY_TOKEN = PartitionSpec("data"), PartitionSpec("data", SHARERS[::-1])


class Linear(nnx.Linear):
    """A linear map with weights `[in, out]`, in the data type of its outputs, or quantized."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        weight_dtype: str | None = None,
    ) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        super().__init__(width_in, width_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.weight_dtype = weight_dtype
        if weight_dtype is not None:
            self.kernel.set_value(quantize_kernel(self.kernel.get_value(), weight_dtype))

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Float[Array, "*B O"]:
        """Apply to every token."""
        if self.weight_dtype is None:
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias.get_value()
        return linear(inputs, self.kernel.get_value(), bias, self.weight_dtype)


def linear(x: Float[Array, "*B I"], kernel: Any, bias: Array | None, weight_dtype: str | None) -> Float[Array, "*B O"]:
    """A linear map in the data type of `x`; a quantized kernel has the format `weight_dtype`."""
    if weight_dtype is None:
        y = jnp.matmul(x, kernel)
    else:
        y = multiply(x, kernel, dynamic=WEIGHT_FORMATS[weight_dtype].dynamic)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def gated(config: ModelConfig, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """The channels of a gated MLP: `act(gate) * up`, or gpt-oss's clamped variant."""
    if not config.swiglu_limit:
        return ACTIVATIONS[config.activation](gate) * up
    limit, alpha = (jnp.asarray(x, gate.dtype) for x in (config.swiglu_limit, config.swiglu_alpha))
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


class Embed(nnx.Embed):
    """Token embeddings `[vocabulary, width]`, in the data type of their outputs, or quantized."""

    def __init__(
        self, size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, weight_dtype: str | None = None
    ) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        super().__init__(size, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.weight_dtype = weight_dtype
        if weight_dtype is not None:
            self.embedding.set_value(quantize_kernel(self.embedding.get_value(), weight_dtype, input_axis=1))

    def __call__(self, inputs: Int32[Array, "*B"], out_sharding: Any = None) -> Float[Array, "*B D"]:
        """Look tokens up."""
        if self.weight_dtype is None:
            return super().__call__(inputs, out_sharding)
        return look_up(self.embedding.get_value(), inputs)


class RMSNorm(nnx.RMSNorm):
    """RMSNorm over the last axis; statistics in float32."""

    def __call__(self, x: Float[Array, "*B D"], mask: Array | None = None) -> Float[Array, "*B D"]:
        """Apply to every token. Flax promotes bfloat16 implicitly, which a strict configuration would refuse."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 more than its weights, in float32."""

    def __call__(self, x: Float[Array, "*B D"], mask: Array | None = None) -> Float[Array, "*B D"]:
        """Apply to every token."""
        assert self.scale is not None
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        scale = jnp.float32(1) + self.scale.get_value().astype(jnp.float32)
        return (normal * jnp.broadcast_to(scale, normal.shape)).astype(x.dtype)


def rms_norm(width: int, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> RMSNorm:
    """An RMSNorm of this model, stored in one data type."""
    if config.norm_offset:
        zeros = nnx.initializers.zeros_init()
        return OffsetRMSNorm(
            width, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, scale_init=zeros, rngs=rngs
        )
    return RMSNorm(width, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


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


class Mlp(nnx.Module):
    """Gated MLP with gate and up projections fused: `down(act(gate(x)) * up(x))`; on a mesh, device by device."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, mesh: AnyMesh | None = None) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.devices, self.config = MeshSize.of(mesh).sharers, config
        build = partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_up = build(config.embed_dim, 2 * config.mlp_dim, weight_dtype=config.map_dtype("gate_up"))
        self.down = build(config.mlp_dim, config.embed_dim, weight_dtype=config.map_dtype("down"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        gate_up = self.gate_up(x)
        gate, up = jnp.split(gate_up.reshape(*gate_up.shape[:-1], self.devices, -1), 2, axis=-1)
        return self.down(gated(self.config, gate, up).reshape(*gate_up.shape[:-1], -1))


class ExpertLinear(nnx.Module):
    """A linear map `[experts, in, out]` of each expert, or quantized ones."""

    def __init__(
        self,
        experts: int,
        width_in: int,
        width_out: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        weight_dtype: str | None = None,
    ) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        kernel: Any = nnx.initializers.lecun_normal(batch_axis=0)(rngs.params(), (experts, width_in, width_out), dtype)
        if weight_dtype is not None:
            kernel = jax.vmap(partial(quantize_kernel, weight_dtype=weight_dtype))(kernel)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((experts, width_out), dtype)) if bias else nnx.data(None)

    @property
    def weights(self) -> tuple[Any, Array | None]:
        """Kernel and bias; the first axis of each array is the expert."""
        return self.kernel.get_value(), None if self.bias is None else self.bias.get_value()


class Experts(nnx.Module):
    """A mixture of experts: a router weights a few MLPs for each token. Weights are frozen: they have no gradient.

    On a mesh, each device has some of the experts, and the sum of their outputs is that over the devices.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, mesh: AnyMesh | None = None) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.config, self.mesh = config, mesh
        build: Any = partial(ExpertLinear, config.num_experts, bias=config.expert_bias, dtype=dtype, rngs=rngs)
        # Not quantized: it is small, and the choice of experts is not continuous.
        self.router = Linear(config.embed_dim, config.num_experts, bias=config.expert_bias, dtype=dtype, rngs=rngs)
        gate_up, down = config.map_dtype("expert_gate_up"), config.map_dtype("expert_down")
        self.expert_gate_up = build(config.embed_dim, 2 * config.expert_dim, weight_dtype=gate_up)
        self.expert_down = build(config.expert_dim, config.embed_dim, weight_dtype=down)

    def __call__(self, x: Float[Array, "B T D"], token_mesh: AnyMesh | None = None) -> Float[Array, "B T D"]:
        """Apply to every token; devices of `token_mesh` share the tokens and each has all weights, in training."""
        weights = self.expert_gate_up.weights, self.expert_down.weights
        compute: Callable[..., Array] = partial(self._sum, self.config.num_experts)
        mesh, tokens, experts = token_mesh, BY_TOKEN, PartitionSpec()
        if self.mesh is not None:
            mesh, tokens, experts, compute = self.mesh, BY_ROW, PartitionSpec(SHARERS), self._of_device
        if mesh is not None:
            specs = (tokens, tokens, tokens, experts)
            compute = jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
        return compute(x, *self.route(x), weights).astype(x.dtype)

    def route(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T k"], Int32[Array, "B T k"]]:
        """Shares and numbers of each token's experts, in float32; of equal ones, the first are chosen."""
        kernel, bias = self.router.kernel.get_value(), self.router.bias
        highest = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(x, kernel, precision=highest, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += jnp.broadcast_to(bias.get_value().astype(jnp.float32), logits.shape)
        shares, chosen = jax.lax.top_k(jax.nn.softmax(logits), self.config.experts_per_token)
        if self.config.normalize_experts:
            shares /= jnp.sum(shares, axis=-1, keepdims=True)
        return shares, chosen.astype(jnp.int32)

    def _of_device(
        self, x: Float[Array, "B T D"], shares: Float[Array, "B T k"], chosen: Int32[Array, "B T k"], weights: Any
    ) -> Float[Array, "B T D"]:
        """The sum over all devices, of which this one adds its experts' part."""
        experts = self.config.num_experts // MeshSize.of(self.mesh).sharers
        first = jax.lax.axis_index(SHARERS) * experts
        return jax.lax.psum(self._sum(experts, x, shares, chosen - first, weights), SHARERS)

    def _sum(
        self,
        experts: int,
        x: Float[Array, "B T D"],
        shares: Float[Array, "B T k"],
        chosen: Int32[Array, "B T k"],
        weights: Any,
    ) -> Float[Array, "B T D"]:
        """The weighted sum of these experts, in float32; `chosen` may have others, outside of `[0, experts)`."""
        per_token, flat = self.config.experts_per_token, x.reshape(-1, x.shape[-1])
        shares, chosen = shares.reshape(-1, per_token), chosen.reshape(-1, per_token)
        expert = partial(_expert, self.config)
        rows = rows_of_block(len(flat), per_token, self.config.num_experts)

        def by_block(x: Array, shares: Array, chosen: Array, weights: Any) -> Array:
            return weighted_sum(expert, rows, x, shares, weights, blocks_of(chosen, experts, rows))

        size, args = self.config.embed_dim * self.config.expert_dim, (flat, shares, chosen, weights)
        if chosen.size > experts or experts < self.config.num_experts or size > MOST_WEIGHTS:
            return by_block(*args).reshape(x.shape)
        by_choice = partial(sum_of_choices, expert)
        return jax.lax.platform_dependent(*args, cuda=by_choice, default=by_block).reshape(x.shape)


def _expert(config: ModelConfig, x: Float[Array, "R D"], weights: Any) -> Float[Array, "R D"]:
    """One expert's MLP."""
    gate_up, (down, down_bias) = weights

    def half(number: int) -> Array:
        # In halves, which XLA may multiply with one row without a copy: see `MOST_WEIGHTS`.
        kernel, bias = jax.tree.map(lambda leaf: jnp.split(leaf, 2, axis=-1)[number], gate_up)
        return linear(x, kernel, bias, config.map_dtype("expert_gate_up"))

    return linear(gated(config, half(0), half(1)), down, down_bias, config.map_dtype("expert_down"))


class Layer(nnx.Module):
    """One decoder layer: attention and MLP with residual connections, and RMSNorms of their inputs, outputs or both.

    The MLP may be a mixture of experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        has_experts: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: AnyMesh | None = None,
    ) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        norm = partial(rms_norm, config.embed_dim, config, dtype=dtype, rngs=rngs)
        self.attention_norm = norm() if config.pre_norms else None
        self.attention = Attention(config, dtype=dtype, rngs=rngs, mesh=mesh)
        self.mlp_norm = norm() if config.pre_norms else None
        self.mlp = (Experts if has_experts else Mlp)(config, dtype=dtype, rngs=rngs, mesh=mesh)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles | None,
        attend: Attend[State],
        state: State,
        layer: int,
        token_mesh: AnyMesh | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Apply to every token; `attend` mixes them. Devices of `token_mesh` share the tokens, in training."""
        out, state = attend(state, layer, *_before_attention(self, x, angles))
        return _after_attention(self, x, out, token_mesh), state


# Jitted, so that they are traced and lowered once for all layers, which are alike.


@jax.jit
def _before_attention(
    layer: Layer, x: Float[Array, "B T D"], angles: Angles | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    return layer.attention.project(_normed(layer.attention_norm, x), angles)


@partial(jax.jit, static_argnums=3)
def _after_attention(
    layer: Layer, x: Float[Array, "B T D"], out: Float[Array, "B T N H"], token_mesh: AnyMesh | None
) -> Float[Array, "B T D"]:
    mixed = layer.attention.out(out.reshape(*x.shape[:2], -1))
    scale = layer.attention.config.residual_scale
    x = x + _scaled(_normed(layer.attention_post_norm, mixed), scale)
    normal = _normed(layer.mlp_norm, x)
    y = layer.mlp(normal, token_mesh) if isinstance(layer.mlp, Experts) else layer.mlp(normal)
    return x + _scaled(_normed(layer.mlp_post_norm, y), scale)


def _scaled(x: Float[Array, "*B D"], scale: float) -> Float[Array, "*B D"]:
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


def _normed(norm: RMSNorm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)
