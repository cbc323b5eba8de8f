"""`attention-profile`: no training. How far back the mean query of a head looks for the mean key.

After kvpress's on-the-fly scores for DuoAttention: mean query and key over sample text, RoPE at every distance, the
area under the cumulative attention. q/k-norm is included, because queries and keys are taken after it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from duo_jax.arguments import whole_number
from duo_jax.mesh.mesh import constrain
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model
from duo_jax.model.rope import rotate, rotation
from duo_train.gated import in_full_layers
from duo_train.recipes.base import Recipe
from duo_train.run import Run
from pallas_kernels import full_attention
from pallas_kernels.merge import softmax_with_sinks

# Distances of every head are in memory at the same time.
MOST_DISTANCES = 1 << 20

# Of each layer with full attention: mean query, mean key, and the scores of learned sinks where there are any.
Means = tuple[tuple[Float[Array, "N H"], Float[Array, "K H"], Float[Array, "N"] | None], ...]


@dataclass(frozen=True)
class AttentionProfile(Recipe):
    """Gates from the attention of mean queries to mean keys."""

    num_samples: int = 8
    """Samples over which queries and keys are averaged."""
    length: int = 2048
    """Number of distances, in tokens, over which the attention of the means is computed."""

    def check(self, run: Run) -> None:
        """At least one sample and two distances."""
        whole_number("num_samples", self.num_samples, 1)
        whole_number("length", self.length, 2, MOST_DISTANCES)

    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """How far back each head's mean query looks, as a fraction of `length`."""
        self.devices(run.model.config, run.devices, fsdp=run.model.is_fsdp)
        self.check(run)
        scores = []
        for number in range(self.num_samples):
            tokens = run.data[number].tokens[None]
            scores.append(_means(run.model, tokens, run.attention.backend))
            run.report(number + 1, self.num_samples, {})
        means = jax.tree.map(lambda *x: jnp.stack(x).mean(0), *scores)
        profile = np.asarray(_profile(run.model.config, means, self.length), np.float64)
        # The queries of a group share a KV head: it must be kept if one of them needs it.
        return profile.reshape(*run.shape, -1).max(-1)


@partial(jax.jit, static_argnums=2)
def _means(model: Model, tokens: Int32[Array, "1 T"], backend: str | None) -> Means:
    """Mean query and key of every head of layers with full attention, before RoPE; and learned sinks."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cos, sin = rotation(model.config.only_rope, model.config.rope_dim, positions)
    unrotate = partial(rotate, cos=cos, sin=-sin)
    attention = partial(full_attention, backend=backend)
    # YaRN's rotation also scales, once in the model and once here.
    scale = 1.0 / model.config.only_rope.attention_factor**2

    def attend(means: Means, layer: int, q: Array, k: Array, v: Array, sinks: Array | None) -> tuple[Array, Means]:
        q_mean, k_mean = (unrotate(x.astype(jnp.float32))[0].mean(0) * scale for x in (q, k))
        return attention(q, k, v, sink_logits=sinks), (*means, (q_mean, k_mean, sinks))

    means: Means = ()
    decoder = model.decoder
    attend_by_layer = in_full_layers(decoder, attend, attention)
    return constrain(decoder.hidden(tokens, positions, attend_by_layer, means)[1], model.mesh)


@partial(jax.jit, static_argnums=(0, 2))
def _profile(config: ModelConfig, means: Means, length: int) -> Float[Array, "L N"]:
    """How far back, as a fraction of `length`, a query at the end looks on average."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    cos, sin = rotation(config.only_rope, config.rope_dim, positions)

    def profile(q: Float[Array, "N H"], k: Float[Array, "K H"], sinks: Float[Array, "N"] | None) -> Float[Array, "N"]:
        last = rotate(q[None, None], cos[:, -1:], sin[:, -1:])[0, 0]
        keys = rotate(jnp.broadcast_to(k, (1, length, *k.shape)), cos, sin)[0]
        keys = jnp.repeat(keys, config.num_heads // config.num_kv_heads, axis=1)
        weights = softmax_with_sinks(jnp.einsum("nh,tnh->nt", last, keys) * config.head_dim**-0.5, sinks)
        # The area under the cumulative attention from the oldest token: 1 if all is on it, 1 / T if on the newest, 0 if
        # on a learned sink, which needs no cache.
        return jnp.cumsum(weights, axis=-1).mean(-1)

    return jnp.stack([profile(*of_layer) for of_layer in means])
