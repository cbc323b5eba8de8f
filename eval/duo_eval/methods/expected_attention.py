"""Expected Attention (Devoto et al. 2025, arXiv 2510.00636): heads hold the tokens that future queries would attend to.

Queries before RoPE are taken to be normally distributed, with the mean and covariance of the prompt's. RoPE at the next
positions, averaged, turns them into those of future queries, whose expected weight on a key has a closed form: the
exponential of `k @ mean / sqrt(H) + k @ cov @ k / 2H`. A token's score is its share of the head's expected weights,
times the norm of its value. As on kvpress's leaderboard, the heads of a layer share its budget (AdaKV, arXiv
2407.11550).
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from duo_eval.methods.eviction import ALWAYS, by_head
from duo_eval.methods.scored import Scored, Scoring, highest, share
from duo_jax import Model, ModelConfig
from duo_jax.arguments import real_number, whole_number
from duo_jax.generation.chunks import bucket
from duo_jax.model.rope import rotate, rotation
from pallas_kernels import full_attention

# Their rotations are in memory, one for each position.
MOST_FUTURE = 2**20


@dataclass(frozen=True)
class ExpectedAttention(Scoring):
    """Scores by expected attention; the sinks always stay, and their queries do not count."""

    future: int = 512
    """Next positions over which RoPE is averaged."""
    sinks: int = 4
    """First tokens, which always stay."""
    epsilon: float = 0.01
    """Added to the expected weight before it is multiplied by the value's norm; kvpress's on its leaderboard."""
    safeguard: float = 0.2
    """Fraction of an equal share that every head holds at least; AdaKV's."""

    name: ClassVar[str] = "expected-attention"

    def __post_init__(self) -> None:
        """Check the numbers."""
        whole_number("future", self.future, 1, MOST_FUTURE)
        whole_number("sinks", self.sinks, 0)
        real_number("epsilon", self.epsilon, 0, 1)
        real_number("safeguard", self.safeguard, 0, 1)

    def least(self) -> int:
        """See `Scoring.least`: the sinks and one more token."""
        return self.sinks + 1

    def observe(self, model: Model, tokens: Int32[np.ndarray, "T"]) -> tuple[Float[Array, "V"], Scored, int]:
        """See `Scoring.observe`."""
        padded = np.pad(tokens, (0, bucket(len(tokens)) - len(tokens)))
        logits, prompt = _observe(self, model, padded, np.int32(len(tokens)))
        return logits, prompt, prompt.k.nbytes + prompt.v.nbytes

    def choose(self, scores: Float[np.ndarray, "L K T"], budget: float) -> Bool[np.ndarray, "L K T"]:
        """See `Scoring.choose`: in each layer, the safe tokens of each head, then the highest scores of all heads."""
        _, heads, length = scores.shape
        equal = share(budget, length)
        safe = int(self.safeguard * equal)
        held = np.zeros(scores.shape, bool)
        for layer, own in enumerate(scores):
            is_safe = np.concatenate([highest(head[None], safe) for head in own])
            held[layer] = highest(np.where(is_safe, np.inf, own), heads * equal)
        return held


def future_queries(
    q: Float[Array, "K G S H"],
    counts: Bool[Array, "S"],
    turned: Float[Array, "H H"],
) -> tuple[Float[Array, "K G H"], Float[Array, "K G H H"]]:
    """Mean and covariance of future queries from the prompt's before RoPE; row i of `turned` is RoPE of channel i."""
    number = counts.sum(dtype=jnp.int32).astype(jnp.float32)
    is_query = counts[:, None]
    mean = jnp.where(is_query, q, 0.0).sum(2) / number
    centered = jnp.where(is_query, q - mean[:, :, None], 0.0)
    covariance = jnp.einsum("kgsh,kgsi->kghi", centered, centered) / number
    return mean @ turned, jnp.einsum("ha,kghi,ib->kgab", turned, covariance, turned)


def expected_weights(
    mean: Float[Array, "K G H"],
    covariance: Float[Array, "K G H H"],
    keys: Float[Array, "K S H"],
    counts: Bool[Array, "S"],
) -> Float[Array, "K G S"]:
    """Each key's share of the expected weights of a head."""
    head_dim = keys.shape[-1]
    linear = jnp.einsum("kgh,ksh->kgs", mean, keys) / head_dim**0.5
    squared = jnp.einsum("kgsh,ksh->kgs", jnp.einsum("ksi,kgih->kgsh", keys, covariance), keys) / (2 * head_dim)
    return jax.nn.softmax(jnp.where(counts, linear + squared, -jnp.inf), axis=-1)


def before_rope(
    q: Float[Array, "1 S N H"], config: ModelConfig, position: Int32[Array, "1 S"]
) -> Float[Array, "1 S N H"]:
    """Queries as they were before RoPE, in float32."""
    cos, sin = rotation(config.only_rope, config.rope_dim, position)
    # cos and sin have the factor once, the rotated queries a second time.
    scale = config.only_rope.attention_factor**-2
    return rotate(q.astype(jnp.float32), cos * scale, -sin * scale)


def mean_rope(config: ModelConfig, start: Int32[Array, ""], count: int) -> Float[Array, "H H"]:
    """RoPE of each unit vector, averaged over `count` positions from `start` on."""
    position = start + jnp.arange(count, dtype=jnp.int32)
    cos, sin = (x.mean(1, keepdims=True) for x in rotation(config.only_rope, config.rope_dim, position[None]))
    return rotate(jnp.eye(config.head_dim, dtype=jnp.float32)[None, None], cos, sin)[0, 0]


@functools.partial(jax.jit, static_argnums=0)
def _observe(
    rule: ExpectedAttention, model: Model, tokens: Int32[Array, "S"], length: Int32[Array, ""]
) -> tuple[Float[Array, "V"], Scored]:
    """Read a prompt, padded at its end: the logits after its last token, and its tokens with their scores."""
    config = model.config
    position = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    is_sink, counts = position < rule.sinks, (position >= rule.sinks) & (position < length)
    turned = mean_rope(config, length, rule.future)

    def attend(state: tuple[Scored, ...], layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Scored, ...]]:
        keys, values = k[0].transpose(1, 0, 2), v[0].transpose(1, 0, 2)
        queries = by_head(before_rope(q, config, position[None]), config.num_kv_heads)
        future = future_queries(queries, counts, turned)
        weights = expected_weights(*future, keys.astype(jnp.float32), counts).mean(1)
        norm = jnp.linalg.norm(values.astype(jnp.float32), axis=-1)
        score = jnp.where(is_sink, ALWAYS, jnp.where(counts, (weights + rule.epsilon) * norm, -jnp.inf))
        return full_attention(q, k, v), (*state, Scored(keys, values, score))

    decoder = model.decoder
    layers: tuple[Scored, ...] = ()
    hidden, layers = decoder.hidden(tokens[None], position[None], attend, layers)
    return decoder.logits(hidden[0, length - 1]), jax.tree.map(lambda *x: jnp.stack(x), *layers)
