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


class Attention(nnx.Module):
    """Grouped-query attention: fused q/k/v projection, optional q/k-norm, RoPE, output projection."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        self.config = config
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nnx.Linear(config.embed_dim, width, use_bias=config.qkv_bias, **kinds)
        self.out = nnx.Linear(config.num_heads * config.head_dim, config.embed_dim, use_bias=config.out_bias, **kinds)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, **kinds)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, **kinds)

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
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs, "use_bias": config.mlp_bias}
        self.gate_up = nnx.Linear(config.embed_dim, 2 * config.mlp_dim, **kinds)
        self.down = nnx.Linear(config.mlp_dim, config.embed_dim, **kinds)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each after an RMSNorm and beside a residual connection."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Build with random weights; `checkpoint` fills them in."""
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(config.embed_dim, **norm)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.embed_dim, **norm)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotation: tuple[Array, Array], attend: Attend[State], state: State, layer: int
    ) -> tuple[Float[Array, "B T D"], State]:
        """Apply to every token; `attend` mixes them."""
        attended, state = self.attention(self.attention_norm(x), rotation, attend, state, layer)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state
