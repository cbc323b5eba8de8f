"""Samplers choose the next token from logits. They are frozen dataclasses, so that they are static under jit.

`Greedy` and `Categorical` choose a token; transforms are applied to the logits before, in the order given:
`Categorical((RepetitionPenalty(1.1), Temperature(0.7), TopP(0.9)))`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from duo_jax.arguments import real_number, whole_number

MASKED = -1e30
# Factors of logits: beyond these, float32 could overflow or underflow.
LEAST, MOST = 1e-30, 1e30


@runtime_checkable
class Transform(Protocol):
    """Changes logits; `seen` marks the tokens of the vocabulary that occurred in the prompt or were generated."""

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """Return the logits to choose from."""
        ...


@dataclass(frozen=True)
class Temperature:
    """Divide logits by `value`: the distribution is sharper below 1 and flatter above."""

    value: float

    def __post_init__(self) -> None:
        """Check the range."""
        way = "for the most likely token use Greedy()"
        object.__setattr__(self, "value", real_number("temperature", self.value, LEAST, MOST, way=way))

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """See `Transform`."""
        return logits / self.value


@dataclass(frozen=True)
class TopK:
    """Keep the `k` most likely tokens, and ties with the last of them, as transformers does."""

    k: int

    def __post_init__(self) -> None:
        """Check the range."""
        object.__setattr__(self, "k", whole_number("top_k", self.k, 1))

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """See `Transform`."""
        least = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits >= least, logits, MASKED)


@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of most likely tokens with a total probability of at least `p` (Holtzman et al. 2019).

    Exactly that many, as in transformers: among equally likely tokens, those with higher ids are kept. 1 keeps all.
    """

    p: float

    def __post_init__(self) -> None:
        """Check the range."""
        object.__setattr__(self, "p", real_number("top_p", self.p, LEAST, 1))

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """See `Transform`."""
        if self.p == 1:  # A sum of rounded probabilities may reach 1 early.
            return logits
        order = jnp.argsort(logits, axis=-1)  # stable
        less_likely = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
        is_kept = (less_likely > 1 - self.p).at[:, -1].set(True)
        return jnp.where(jnp.put_along_axis(is_kept, order, is_kept, axis=-1, inplace=False), logits, MASKED)


@dataclass(frozen=True)
class MinP:
    """Keep tokens at least `p` times as likely as the most likely one (Nguyen et al. 2024)."""

    p: float

    def __post_init__(self) -> None:
        """Check the range."""
        object.__setattr__(self, "p", real_number("min_p", self.p, 0, 1))

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """See `Transform`."""
        return above_min_p(logits, self.p)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Make seen tokens less likely: divide positive logits by `value`, multiply negative ones (Keskar et al. 2019)."""

    value: float

    def __post_init__(self) -> None:
        """Check the range."""
        way = "1 changes nothing"
        object.__setattr__(self, "value", real_number("repetition_penalty", self.value, LEAST, MOST, way=way))

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """See `Transform`."""
        return penalize(logits, seen, self.value)


def above_min_p(logits: Float[Array, "B V"], p: Any) -> Float[Array, "B V"]:
    """The formula of `MinP`; `p` is a number, or one for each row, `[B, 1]`."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities >= p * probabilities.max(-1, keepdims=True), logits, MASKED)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], value: Any) -> Float[Array, "B V"]:
    """The formula of `RepetitionPenalty`; `value` is a number, or one for each row, `[B, 1]`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / value, logits * value), logits)


@dataclass(frozen=True)
class Sampler:
    """Apply transforms in order, then choose."""

    transforms: Sequence[Transform] = ()

    # Whether the choice needs a random key.
    is_random = False

    def __post_init__(self) -> None:
        """Accept a list of transforms too."""
        if isinstance(self.transforms, Transform) or not all(isinstance(x, Transform) for x in self.transforms):
            raise ValueError(f"transforms must be a tuple such as (Temperature(0.7),), got {self.transforms!r}")
        object.__setattr__(self, "transforms", tuple(self.transforms))

    def __call__(
        self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"], keys: Key[Array, "B"]
    ) -> Int32[Array, "B"]:
        """Choose a token for each row; row b uses only `keys[b]`, so that it does not depend on other rows."""
        for transform in self.transforms:
            logits = transform(logits, seen)
        return self.choose(logits, keys)

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int32[Array, "B"]:
        """Choose from transformed logits."""
        raise NotImplementedError(f"{type(self).__name__} does not implement choose(): use Greedy or Categorical")


@dataclass(frozen=True)
class Greedy(Sampler):
    """The most likely token."""

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int32[Array, "B"]:
        """See `Sampler`."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Categorical(Sampler):
    """Sample from the probabilities; needs a key."""

    is_random = True

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int32[Array, "B"]:
        """See `Sampler`."""
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
