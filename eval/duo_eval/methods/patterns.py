"""Full attention, head patterns, random heads: a pattern that meets the budget, in the library's own `KVCache`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from duo_eval.methods.method import Memory, Method, check_arguments
from duo_jax import HeadPattern, KVCache, Model, decode_step, prefill
from duo_jax.arguments import real_number, seed_number
from duo_jax.generation.chunks import bucket, chunk_width


@dataclass(frozen=True)
class PooledState:
    """A sequence in a `KVCache` of one row, and the size of the chunks of its prefill."""

    cache: KVCache
    chunk: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return self.cache.nbytes

    @property
    def memory(self) -> Memory:
        """Bytes that the sequence takes now. At the peak, one layer's chunk of the prompt is added to the cache."""
        cache, length = self.cache, int(self.cache.length[0])
        rings = [ring.k.shape for ring in cache.rings]
        tokens = cache.full.k.shape[0] * length + sum(slots * min(length, size) for slots, _, size, _ in rings)
        entry = 2 * cache.head_dim * cache.dtype.itemsize
        beside = entry * cache.slot.shape[1] * self.chunk
        metadata = sum(x.nbytes for x in (cache.is_retrieval, cache.slot, cache.length))
        return Memory(self.nbytes, entry * tokens, self.nbytes + beside, metadata)


class Pooled(Method):
    """A method that is a head pattern: a subclass chooses the streaming heads.

    Layers with a window of their own are as in full attention: the budget is for the others.
    """

    knows_windows: ClassVar[bool] = True

    def pattern_for(self, model: Model, budget: float, length: int) -> HeadPattern:
        """The pattern with which `length` tokens take no more than the budget; the same for all if `is_fixed`.

        Raises:
            ValueError: a budget that no pattern meets.
        """
        raise NotImplementedError

    def pattern_at(self, model: Model, budget: float, length: int) -> HeadPattern:
        """The pattern of every prompt whose length rounds up to the same bucket as `length`.

        Raises:
            ValueError: a budget that no pattern meets.
        """
        return self.pattern_for(model, budget, _least_of_bucket(length))

    def check(self, model: Model, budget: float, length: int) -> None:
        """See `Method.check`."""
        super().check(model, budget, length)
        self.pattern_at(model, budget, length)

    def begin(
        self, model: Model, tokens: ArrayLike, *, room: int, budget: float
    ) -> tuple[Float[Array, "V"], PooledState]:
        """See `Method.begin`."""
        tokens = check_arguments(model, tokens, room)
        length = len(tokens)
        self.check(model, budget, length)
        pattern = self.pattern_at(model, budget, length)
        cache = KVCache.init(model.config, pattern, 1, model.config.room(bucket(length + room)))
        # Padded to its bucket, in chunks of the bucket's size: prompts of one bucket run the same programs.
        padded = np.pad(tokens, (0, bucket(length) - length))[None]
        chunk = chunk_width(padded.shape[1])
        logits, cache = prefill(model, padded, cache, lengths=[length], chunk_size=chunk)
        return logits[0], PooledState(cache, chunk)

    def step(self, model: Model, token: int, state: PooledState) -> tuple[Float[Array, "V"], PooledState]:
        """See `Method.step`."""
        logits, cache = decode_step(model, np.array([token], np.int32), state.cache)
        return logits[0], PooledState(cache, state.chunk)


def _least_of_bucket(length: int) -> int:
    """The shortest length of the bucket: all its prompts then have as many retrieval heads, and run one program."""
    below = next((n for n in range(length, 0, -1) if bucket(n) < bucket(length)), 0)
    return below + 1


@dataclass(frozen=True)
class Full(Pooled):
    """Full attention, the reference of every comparison. It holds every token, so its only budget is 1."""

    name: ClassVar[str] = "full attention"

    @property
    def is_fixed(self) -> bool:
        """See `Method.is_fixed`."""
        return True

    def pattern_for(self, model: Model, budget: float, length: int) -> HeadPattern:
        """See `Pooled.pattern_for`."""
        if budget < 1.0:
            raise ValueError(f"full attention holds every token: its budget is 1.0, got {budget=}")
        return HeadPattern.full(model.config)


@dataclass(frozen=True)
class Duo(Pooled):
    """A head pattern: retrieval heads hold every token, streaming heads sinks and a window (arXiv 2410.10819)."""

    pattern: str
    """A folder or a published name."""
    sink_size: int = 64
    """First tokens that a streaming head holds."""
    recent_size: int = 256
    """Most recent tokens that a streaming head holds."""
    sparsity: float | None = None
    """Fraction of KV heads that stream with every prompt; without it the budget decides."""

    name: ClassVar[str] = "duo"
    value_field: ClassVar[str] = "pattern"

    def __post_init__(self) -> None:
        """Check the sparsity."""
        if self.sparsity is not None:
            real_number(f"{self.name}:sparsity", self.sparsity, 0, 1)

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> "Duo":
        """See `Method.create`."""
        if not options.get("pattern"):
            raise ValueError(f"{cls.name} needs a pattern: {cls.name}=FOLDER, or {cls.name}=NAME of a published one")
        return cls(**options)

    @property
    def is_fixed(self) -> bool:
        """See `Method.is_fixed`."""
        return self.sparsity is not None

    def pattern_for(self, model: Model, budget: float, length: int) -> HeadPattern:
        """See `Pooled.pattern_for`."""
        if self.is_fixed and budget < 1.0:
            raise ValueError(
                f"{self.name} with a sparsity is as large at every budget: its budget is 1.0, got {budget=}"
            )
        size: dict[str, Any] = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        size |= {"sparsity": self.sparsity} if self.is_fixed else {"kv_budget": budget, "context_length": length}
        return HeadPattern.load(self.pattern, **size).of(model.config)


@dataclass(frozen=True)
class RandomHeads(Pooled):
    """A head pattern with random retrieval heads, the baseline for a choice of heads."""

    seed: int = 0
    """Seed of the draw."""
    sink_size: int = 64
    """First tokens that a streaming head holds."""
    recent_size: int = 256
    """Most recent tokens that a streaming head holds."""

    name: ClassVar[str] = "random heads"
    value_field: ClassVar[str] = "seed"

    def __post_init__(self) -> None:
        """Check the seed."""
        seed_number("random-heads=SEED", self.seed)

    def pattern_for(self, model: Model, budget: float, length: int) -> HeadPattern:
        """See `Pooled.pattern_for`."""
        shape = model.config.num_layers, model.config.num_kv_heads
        return HeadPattern.from_gates(
            np.random.default_rng(self.seed).random(shape),
            sink_size=self.sink_size,
            recent_size=self.recent_size,
            kv_budget=budget,
            context_length=length,
            window_layers=model.config.window_layers,
        )
