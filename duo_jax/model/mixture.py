"""A mixture of experts as Flax NNX modules: router, experts, and the devices that share them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from duo_jax.mesh.mesh import AnyMesh, MeshSize
from duo_jax.model.config import ModelConfig
from duo_jax.model.experts import MOST_WEIGHTS, blocks_of, rows_of_block, sum_of_choices, weighted_sum
from duo_jax.model.linear import Linear, linear
from duo_jax.model.mlp import gated
from duo_jax.model.weights import quantize_kernel

# Axes of a mesh that divide experts; how they divide tokens `[B, T, ...]` in inference, and in training.
SHARERS = ("tensor", "sequence")
BY_ROW, BY_TOKEN = PartitionSpec("data"), PartitionSpec("data", SHARERS[::-1])


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
