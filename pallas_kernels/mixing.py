"""The gated model's mixture of full and streaming attention (paper section 2.2): the same for every backend."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def mix(
    gates: Float[Array, "K"], full: Float[Array, "B T N H"], streaming: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """`gates * full + (1 - gates) * streaming`, a gate for each KV head's query group; computed in the gates' type."""
    num_heads = full.shape[2]
    gate = jnp.repeat(gates, num_heads // gates.shape[0], total_repeat_length=num_heads)[None, None, :, None]
    return (gate * full.astype(gate.dtype) + (1 - gate) * streaming.astype(gate.dtype)).astype(full.dtype)
