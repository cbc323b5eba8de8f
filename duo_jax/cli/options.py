"""Flags that several commands share: which model, which heads stream, how tokens are chosen."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from duo_jax.checkpoint import load_model, load_tokenizer
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from duo_jax.sampling import Categorical, Greedy, MinP, RepetitionPenalty, Sampler, Temperature, TopK, TopP, Transform


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    model: str
    """Hugging Face folder, .gguf file, packaged model (smollm2-135m-instruct) or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of activations, weights and cache; the checkpoint's own by default, float32 on a CPU."""

    weight_dtype: Literal["int8", "w8a8", "int4", "int4-32", "int4-128"] | None = None
    """Quantize the weights of linear maps; w8a8 multiplies integers, int4-32 has a scale for every 32 channels."""

    def load(self) -> Model:
        """The weights."""
        return load_model(self.model, dtype=self.dtype, weight_dtype=self.weight_dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return load_tokenizer(self.model)


@dataclass(frozen=True)
class PatternOptions:
    """The head pattern."""

    pattern: str | None = None
    """Head pattern: a published name or a folder; without it every head keeps all tokens (full attention)."""
    sparsity: float | None = None
    """Fraction of KV heads that stream, 0 to 1; needs --pattern."""
    threshold: float | None = None
    """Heads with a gate of at least this keep all tokens; needs --pattern."""
    kv_budget: float | None = None
    """Fraction of full attention's KV tokens to keep at the length in use; needs --pattern."""
    sink_size: int | None = None
    """First tokens that streaming heads keep; the pattern's own by default."""
    recent_size: int | None = None
    """Most recent tokens that streaming heads keep; the pattern's own by default."""

    def load(self, context_length: int) -> HeadPattern | None:
        """The pattern; `context_length` is what a KV budget is a fraction of.

        Raises:
            ValueError: a rule without a pattern, or one that cannot be met.
        """
        rules = {name: value for name, value in vars(self).items() if name != "pattern" and value is not None}
        if self.pattern is None:
            if rules:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in rules)
                raise ValueError(f"without --pattern every head keeps all tokens: give one, or leave out {flags}")
            return None
        at = None if self.kv_budget is None else context_length
        return HeadPattern.load(self.pattern, **rules, context_length=at)


@dataclass(frozen=True)
class CacheOptions:
    """The KV cache."""

    kv_dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None
    """Data type of the cache, where not the weights'; int8 and int4 quantize keys and values of retrieval heads."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn at random."""
    top_k: int | None = None
    """Draw from the k most likely tokens only."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to p."""
    min_p: float | None = None
    """Draw from tokens at least p times as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Above 1, tokens seen before become less likely."""
    seed: int = 0
    """Seed of the random draws."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""

    def sampler(self) -> Sampler:
        """The flags as a sampler.

        Raises:
            ValueError: a value out of range, or draws restricted where nothing is drawn.
        """
        transforms: list[Transform] = []
        if self.repetition_penalty is not None:
            transforms.append(RepetitionPenalty(self.repetition_penalty))
        cuts: list[Transform] = [TopK(self.top_k)] if self.top_k is not None else []
        cuts += [TopP(self.top_p)] if self.top_p is not None else []
        cuts += [MinP(self.min_p)] if self.min_p is not None else []
        if self.temperature != 0:
            return Categorical((*transforms, Temperature(self.temperature), *cuts))
        if cuts:
            raise ValueError("--top-k, --top-p and --min-p choose among random draws: give a --temperature above 0")
        return Greedy(tuple(transforms))
