"""One decoder layer. Attention itself is a function that the caller passes in."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from duo_jax.mesh.mesh import AnyMesh
from duo_jax.model.attention import Attention
from duo_jax.model.config import ModelConfig
from duo_jax.model.mixture import Experts
from duo_jax.model.mlp import Mlp
from duo_jax.model.norm import RMSNorm, rms_norm
from duo_jax.model.rope import Angles
from duo_jax.model.row_groups import ByRow, at_once

State = TypeVar("State")
# (state, layer, q [B T N H], k [B T K H], v [B T K H]) -> attention output [B T N H] and the new state.
Attend = Callable[[State, int, Array, Array, Array], tuple[Array, State]]


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
        by_row: ByRow = at_once,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Apply to every token; `attend` mixes them. Devices of `token_mesh` share the tokens, in training."""
        out, state = attend(state, layer, *by_row(partial(_before_attention, self), x, angles))
        x, channels = by_row(partial(_after_attention, self), x, out)
        return by_row(lambda x, channels: _after_channels(self, x, channels, token_mesh), x, channels), state


# Jitted, so that they are traced and lowered once for all layers, which are alike.


@jax.jit
def _before_attention(
    layer: Layer, x: Float[Array, "B T D"], angles: Angles | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    return layer.attention.project(_normed(layer.attention_norm, x), angles)


@jax.jit
def _after_attention(
    layer: Layer, x: Float[Array, "B T D"], out: Float[Array, "B T N H"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T C"]]:
    """The residual stream after attention, and what the rest of the layer needs besides: channels of the MLP."""
    mixed = layer.attention.out(out.reshape(*x.shape[:2], -1))
    scale = layer.attention.config.residual_scale
    x = x + _scaled(_normed(layer.attention_post_norm, mixed), scale)
    normal = _normed(layer.mlp_norm, x)
    return x, normal if isinstance(layer.mlp, Experts) else layer.mlp.channels(normal)


@partial(jax.jit, static_argnums=3)
def _after_channels(
    layer: Layer, x: Float[Array, "B T D"], channels: Float[Array, "B T C"], token_mesh: AnyMesh | None
) -> Float[Array, "B T D"]:
    y = layer.mlp(channels, token_mesh) if isinstance(layer.mlp, Experts) else layer.mlp.down(channels)
    scale = layer.attention.config.residual_scale
    return x + _scaled(_normed(layer.mlp_post_norm, y), scale)


def _scaled(x: Float[Array, "*B D"], scale: float) -> Float[Array, "*B D"]:
    return x if scale == 1 else (x.astype(jnp.float32) * scale).astype(x.dtype)


def _normed(norm: RMSNorm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)
