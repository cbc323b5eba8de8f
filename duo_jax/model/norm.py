"""RMSNorm, and the variant whose scale is an offset from 1."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from duo_jax.model.config import ModelConfig


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
