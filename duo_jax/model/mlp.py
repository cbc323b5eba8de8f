"""The gated MLP."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from duo_jax.mesh.mesh import AnyMesh, MeshSize
from duo_jax.model.config import ModelConfig
from duo_jax.model.config_checks import ACTIVATIONS
from duo_jax.model.linear import Linear


def gated(config: ModelConfig, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """The channels of a gated MLP: `act(gate) * up`, or gpt-oss's clamped variant."""
    if not config.swiglu_limit:
        return ACTIVATIONS[config.activation](gate) * up
    limit, alpha = (jnp.asarray(x, gate.dtype) for x in (config.swiglu_limit, config.swiglu_alpha))
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


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
        return self.down(self.channels(x))

    def channels(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """What `down` is applied to."""
        gate_up = self.gate_up(x)
        gate, up = jnp.split(gate_up.reshape(*gate_up.shape[:-1], self.devices, -1), 2, axis=-1)
        return gated(self.config, gate, up).reshape(*gate_up.shape[:-1], -1)
