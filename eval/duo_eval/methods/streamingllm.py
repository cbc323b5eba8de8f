"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): every head holds attention sinks and the most recent tokens."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from duo_eval.methods.eviction import ALWAYS, Eviction, Held, Tokens
from duo_jax import ModelConfig
from duo_jax.arguments import whole_number
from duo_jax.model.rope import rotate, rotation


@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """The first tokens and the last ones, as many as the budget allows."""

    sink_size: int = 4
    """First tokens that stay; the paper's 4."""
    renumber: bool = False
    """Count positions inside the cache, as the paper does: the sinks then come right before the window. Meant for texts
    longer than the model was trained for; by default every token keeps its own position."""

    name: ClassVar[str] = "streamingllm"

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        whole_number("sink_size", self.sink_size, 0)

    def least(self, length: int) -> int:
        """See `Eviction.least`: the sinks and one recent token."""
        return self.sink_size + 1

    def priority(self, tokens: Tokens) -> Float[Array, "K S"]:
        """See `Eviction.priority`: sinks, then younger tokens."""
        return jnp.where(tokens.position < self.sink_size, ALWAYS, tokens.position.astype(jnp.float32))

    def keys(self, held: Held, start: Int32[Array, ""], config: ModelConfig) -> Float[Array, "K C H"]:
        """See `Eviction.keys`: renumbered, the sinks move forward by the number of evicted tokens."""
        if not self.renumber:
            return held.k
        evicted = start - (held.position[0] >= 0).sum(dtype=jnp.int32)
        moved = jnp.where(held.position < self.sink_size, evicted, 0)
        cos, sin = rotation(config.only_rope, config.rope_dim, moved)
        # A key was scaled when it was first rotated: rotate it further without scaling.
        factor = config.only_rope.attention_factor
        return rotate(held.k[:, :, None], cos / factor, sin / factor)[:, :, 0]
