"""Rotary position embedding (Su et al. 2021) and its scalings: one small class each, found by name in `ROPES`.

A scaling computes inverse frequencies from a head dimension. The rotation is the same for all of them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from duo_jax.arguments import real_number, true_or_false, whole_number

# More than any model has.
MOST_THETA, MOST_FACTOR = 1e30, 1e6


@dataclass(frozen=True)
class Rope:
    """Unscaled RoPE: `theta ** (-2i / H)`."""

    theta: float = 10000.0
    type: ClassVar[str] = "default"
    # Multiplies cos and sin, and so attention scores by its square; only YaRN has one.
    attention_factor: ClassVar[float] = 1.0
    depends_on_context: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check that the frequencies are finite numbers."""
        self._set(theta=real_number("rope_theta", self.theta, 1, MOST_THETA))

    def check(self, head_dim: int) -> None:
        """Raise ValueError for a head dimension that these settings are not for."""

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Inverse frequencies `[H // 2]` in radians a position, float64."""
        return self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    def trained_positions(self, max_positions: int) -> int:
        """Positions that the model was trained for, given its configuration's `max_position_embeddings`."""
        return max_positions

    def at(self, context: int) -> "Rope":
        """RoPE for a context of up to so many tokens."""
        return self


@dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float = 1.0
    type: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        self._set(factor=_factor("factor", self.factor))

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """See `Rope`."""
        return super().inverse_frequencies(head_dim) / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, the middle blended."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    type: ClassVar[str] = "llama3"

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        names = ("factor", "low_freq_factor", "high_freq_factor")
        self._set(**{name: _factor(name, getattr(self, name)) for name in names})
        self._set(original_max_position_embeddings=_original(self.original_max_position_embeddings))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor must be less than high_freq_factor, got {self.low_freq_factor=}, "
                f"{self.high_freq_factor=}"
            )

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """See `Rope`."""
        frequencies = super().inverse_frequencies(head_dim)
        rotations = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        smooth = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


@dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (Peng et al. 2023): interpolation by wavelength, and a temperature on attention."""

    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float = 0.0  # type: ignore[misc]  # 0: by the paper's formula
    type: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        """Check the numbers, and compute the temperature (paper section 3.4), so that the field has the one in use."""
        super().__post_init__()
        if self.theta == 1:
            raise ValueError("rope_theta must be above 1 for yarn, which divides by its logarithm, got 1")
        self._set(**{name: _factor(name, getattr(self, name)) for name in ("factor", "beta_fast", "beta_slow")})
        self._set(
            **{name: real_number(name, getattr(self, name), 0, MOST_FACTOR) for name in ("mscale", "mscale_all_dim")}
        )
        self._set(truncate=true_or_false("truncate", self.truncate))
        self._set(original_max_position_embeddings=_original(self.original_max_position_embeddings))
        if real_number("attention_factor", self.attention_factor, 0, MOST_FACTOR) == 0:
            scales = (self.mscale, self.mscale_all_dim) if self.mscale and self.mscale_all_dim else (1.0, 0.0)
            first, second = (0.1 * m * math.log(max(self.factor, 1.0)) + 1.0 for m in scales)
            self._set(attention_factor=first / second)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """See `Rope`."""

        def dimension(rotations: float) -> float:
            wavelengths = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelengths) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # As transformers: a ramp of no width is a step, and one from high to low interpolates nothing.
        ramp = (np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low or 1e-3)
        interpolated = np.clip(ramp, 0.0, 1.0)
        frequencies = super().inverse_frequencies(head_dim)
        return frequencies / self.factor * interpolated + frequencies * (1 - interpolated)

    def trained_positions(self, max_positions: int) -> int:
        """Some configurations include the factor in `max_position_embeddings`, others do not: the larger reading."""
        return max(max_positions, int(self.factor * self.original_max_position_embeddings))


@dataclass(frozen=True, kw_only=True)
class DividedRope(Rope):
    """A divisor for each frequency, as GGUF files store Llama 3.1's scaling (`rope_freqs.weight`)."""

    divisors: tuple[float, ...] = ()
    type: ClassVar[str] = "divided"

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        self._set(divisors=tuple(_factor("a divisor of RoPE frequencies", divisor) for divisor in self.divisors))

    def check(self, head_dim: int) -> None:
        """See `Rope`."""
        if len(self.divisors) != head_dim // 2:
            raise ValueError(f"{len(self.divisors)} RoPE divisors for heads of {head_dim}, which need {head_dim // 2}")

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """See `Rope`."""
        return super().inverse_frequencies(head_dim) / np.asarray(self.divisors, np.float64)


@dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
    """LongRoPE (Ding et al. 2024): a divisor for each frequency, others for contexts beyond the original ones.

    All tokens of a context have the same divisors: `at` chooses them by the most tokens that it may have.
    """

    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0  # type: ignore[misc]
    is_long: bool = False
    type: ClassVar[str] = "longrope"
    depends_on_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        for name in ("short_factor", "long_factor"):
            self._set(**{name: tuple(_factor(f"a {name} of longrope", divisor) for divisor in getattr(self, name))})
        self._set(attention_factor=_factor("attention_factor", self.attention_factor))
        self._set(original_max_position_embeddings=_original(self.original_max_position_embeddings))

    def check(self, head_dim: int) -> None:
        """See `Rope`."""
        for name in ("short_factor", "long_factor"):
            if len(divisors := getattr(self, name)) != head_dim // 2:
                raise ValueError(f"{name} of longrope must have {head_dim // 2} numbers, got {len(divisors)}")

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """See `Rope`."""
        divisors = self.long_factor if self.is_long else self.short_factor
        return super().inverse_frequencies(head_dim) / np.asarray(divisors, np.float64)

    def at(self, context: int) -> "LongRope":
        """See `Rope`."""
        return replace(self, is_long=context > self.original_max_position_embeddings)


def _factor(name: str, value: Any) -> float:
    return real_number(name, value, 1 / MOST_FACTOR, MOST_FACTOR)


def _original(value: Any) -> int:
    return whole_number("original_max_position_embeddings", value, 1)


class Angles(NamedTuple):
    """How queries and keys are turned at each position, and what queries are multiplied by there (None: nothing)."""

    cos: Float[Array, "B T 1 H2"]
    sin: Float[Array, "B T 1 H2"]
    query_scale: Float[Array, "B T 1 1"] | None = None


ROPES: dict[str, type[Rope]] = {rope.type: rope for rope in (Rope, LinearRope, Llama3Rope, YarnRope, LongRope)}


def rotation(
    rope: Rope, head_dim: int, positions: Int32[Array, "B T"]
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """cos and sin of every position and frequency, float32, broadcastable over heads (`H2 = H // 2`).

    In float32, `position * frequency` is off by 0.25 radians at 4 million. Positions are integers, so only the fraction
    of a turn that one position adds matters. It is a fixed-point number here, and whole turns overflow: phases are
    right to 1e-4 radians at every int32 position.
    """
    turns = np.asarray(rope.inverse_frequencies(head_dim), np.float64) / (2 * np.pi)
    # 48 binary digits: `high` counts 2^-32 of a turn, `low` 2^-48.
    digits = np.divmod(np.rint((turns % 1.0) * 2.0**48).astype(np.uint64), np.uint64(2**16))
    high, low = (jnp.asarray(x.astype(np.uint32))[None, None, None, :] for x in digits)
    position = positions[:, :, None, None]
    # position * low needs 48 bits, in two parts; the shift is arithmetic, so that negative positions are right too.
    upper, lower = ((x.astype(jnp.uint32)) for x in (position >> 16, position & 0xFFFF))
    phase = position.astype(jnp.uint32) * high + upper * low + (lower * low >> 16)
    # As a signed number, the phase is at most half a turn in either direction.
    angles = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * jnp.float32(2 * np.pi / 2**32)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "B T n H"], cos: Float[Array, "B T 1 H2"], sin: Float[Array, "B T 1 H2"]
) -> Float[Array, "B T n H"]:
    """Rotate the pairs (i, i + H2) of every head by the angles of its position, in float32 (Hugging Face's layout).

    Channels beyond the pairs do not change (partial RoPE).
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x.dtype)
