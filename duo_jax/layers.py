"""The blocks of the decoder, as Flax NNX modules. Attention itself is a function that the caller passes in."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from duo_jax.config import ModelConfig
from duo_jax.rope import rotate

State = TypeVar("State")
# (state, layer, q [B T N H], k [B T K H], v [B T K H]) -> attention output [B T N H] and the new state.
Attend = Callable[[State, int, Array, Array, Array], tuple[Array, State]]


def linear(width_in: int, width_out: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map with weights `[in, out]`, stored and computed in one data type."""
    return nnx.Linear(width_in, width_out, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


class RMSNorm(nnx.RMSNorm):
    """RMSNorm over the last axis; statistics in float32."""

    def __call__(self, x: Float[Array, "*B D"], mask: Array | None = None) -> Float[Array, "*B D"]:
        """Apply to every token. Flax promotes bfloat16 without saying so, which a strict configuration would refuse."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask)


def rms_norm(width: int, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> RMSNorm:
    """An RMSNorm of this model, stored in one data type."""
    return RMSNorm(width, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention: fused q/k/v projection, optional q/k-norm, RoPE, output projection."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = linear(config.embed_dim, queries + 2 * keys, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = linear(queries, config.embed_dim, bias=config.out_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = rms_norm(config.head_dim, config, dtype=dtype, rngs=rngs)
            self.k_norm = rms_norm(config.head_dim, config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotation: tuple[Array, Array], attend: Attend[State], state: State, layer: int
    ) -> tuple[Float[Array, "B T D"], State]:
        """Project, rotate, attend, project back."""
        config = self.config
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, -1, config.head_dim)
        q, k, v = jnp.split(qkv, [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out, state = attend(state, layer, rotate(q, *rotation), rotate(k, *rotation), v)
        return self.out(out.reshape(batch, length, -1)), state


class Mlp(nnx.Module):
    """Gated SiLU MLP with gate and up projections fused: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.gate_up = linear(config.embed_dim, 2 * config.mlp_dim, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.down = linear(config.mlp_dim, config.embed_dim, bias=config.mlp_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each after an RMSNorm and beside a residual connection."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.attention_norm = rms_norm(config.embed_dim, config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = rms_norm(config.embed_dim, config, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotation: tuple[Array, Array], attend: Attend[State], state: State, layer: int
    ) -> tuple[Float[Array, "B T D"], State]:
        """Apply to every token; `attend` mixes them."""
        attended, state = self.attention(self.attention_norm(x), rotation, attend, state, layer)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state
