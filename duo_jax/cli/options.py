"""Flags that several commands share: the model, its head pattern, memory, and sampling."""

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from duo_jax.arguments import MOST_BYTES, ArgumentError, whole_number
from duo_jax.checkpoint.load import load_model, loaded_config
from duo_jax.checkpoint.open import load_text_tokenizer, load_tokenizer, open_config, open_source, usual_dtype
from duo_jax.generation.chunks import cache_room
from duo_jax.generation.sampling import Sampler
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.processes import gather
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model
from duo_jax.model.precision import EmbedDtype, FloatDtype, KvDtype, WeightDtype
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.plan import Plan
from duo_jax.sizes import free_memory
from duo_jax.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    model: str
    """Hugging Face folder, .gguf file, packaged model (smollm2-135m-instruct) or hub id."""
    dtype: FloatDtype | None = None
    """Data type of activations, weights and cache; the checkpoint's own by default, float32 on a CPU."""

    weight_dtype: WeightDtype | None = None
    """Quantize the weights of linear maps; w8a8 multiplies integers, int4-32 has a scale for every 32 channels."""

    embed_dtype: EmbedDtype | None = None
    """Quantize embeddings and head too, which keep their data type by default."""

    def load(self, *, mesh: Mesh | None = None, pattern: HeadPattern | None = None, fsdp: bool = False) -> Model:
        """Load the weights; on a mesh, the pattern decides where each head is placed, or devices get slices (`fsdp`).

        A pattern of another model is refused before the weights are read.
        """
        if pattern is not None:
            pattern.check(open_config(self.model))
        dtypes: dict[str, Any] = {
            "dtype": self.dtype,
            "weight_dtype": self.weight_dtype,
            "embed_dtype": self.embed_dtype,
        }
        return load_model(self.model, **dtypes, mesh=mesh, pattern=pattern if mesh is not None else None, fsdp=fsdp)

    def plan(self, pattern: HeadPattern | None, chunk_size: int, mesh: MeshSize = MeshSize()) -> Plan:
        """The memory that this model needs, computed before its weights are read."""
        config = loaded_config(self.model)
        dtype = usual_dtype(config, self.dtype)
        config = config.with_dtypes(dtype=dtype, weight_dtype=self.weight_dtype, embed_dtype=self.embed_dtype)
        return Plan(config, pattern, chunk_size=chunk_size, mesh=mesh)

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """Load the tokenizer."""
        return load_tokenizer(self.model)

    def text_tokenizer(self) -> TextTokenizer:
        """Load the tokenizer for text in and out, if possible without importing transformers."""
        return load_text_tokenizer(self.model)

    def sampling(self) -> SamplingSettings:
        """The model's own generation settings."""
        return open_source(self.model, weights=False).sampling


@dataclass(frozen=True)
class PatternOptions:
    """The head pattern."""

    pattern: str | None = None
    """Head pattern: a published name or a folder; without it every head keeps all tokens (full attention)."""
    sparsity: float | None = None
    """Fraction of KV heads that stream, 0 to 1: those with the smallest gates of --pattern. Without any rule: what duo
    choose --apply stored with the pattern, else --threshold 0.5."""
    threshold: float | None = None
    """Heads with a gate of at least this keep all tokens; needs --pattern."""
    kv_budget: float | None = None
    """Fraction of full attention's KV tokens to keep at the length in use; needs --pattern."""
    sink_size: int | None = None
    """First tokens that streaming heads keep; the pattern's own by default."""
    recent_size: int | None = None
    """Most recent tokens that streaming heads keep; the pattern's own by default."""

    def load(self, context_length: int) -> HeadPattern | None:
        """Load the pattern; a KV budget is a fraction of `context_length` tokens.

        Raises:
            ValueError: a rule without a pattern, or one that no pattern meets.
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

    kv_dtype: KvDtype | None = None
    """Data type of the cache, the weights' by default; int8 and int4 quantize keys and values of retrieval heads."""


@dataclass(frozen=True)
class RoomOptions:
    """The length of the KV cache."""

    max_context: Annotated[int | Literal["max"] | None, tyro.conf.arg(metavar="INT|max")] = None
    """Size of the KV cache in tokens, prompt and answer together: as many as needed by default; max: as many as fit."""
    memory: str | None = None
    """Memory for weights, KV cache and activations, such as 80GB; by default that of the device, or the free memory on
    a CPU. A request that does not fit is refused before anything is allocated."""

    def tokens(self, plan: Plan, needed: int) -> int:
        """The length of the cache in tokens.

        Raises:
            ValueError: fewer tokens than needed, or more than fit.
        """
        memory = device_memory() if self.memory is None else parse_bytes(self.memory)
        if isinstance(self.max_context, int):
            check_room("max_context", self.max_context, plan.config)
        if self.max_context == "max":
            plan.check(needed, memory)
            return plan.max_context(memory)
        if self.max_context is not None and self.max_context < needed:
            raise ValueError(f"prompt and answer may take {needed} tokens, more than --max-context {self.max_context}")
        room = self.max_context or cache_room(needed, plan.batch_size)
        plan.check(room, memory)
        return room


def check_room(name: str, tokens: int, config: ModelConfig) -> None:
    """Check the length of a cache that an argument sets.

    Raises:
        ValueError: no tokens, or fewer than a window of the model's layers.
    """
    whole_number(name, tokens, 1)
    if tokens < (widest := config.room(1)):
        raise ArgumentError(name, f"must be at least {widest}, the window of layers of this model")


def device_memory() -> int:
    """Bytes that programs may use on the default device; on a CPU, the free memory of the host.

    Several processes use the smallest value among them, so that all make the same decision.
    """
    return min(row[0] for row in gather([_memory_here() >> 20])) << 20 if jax.process_count() > 1 else _memory_here()


def _memory_here() -> int:
    return free_memory(allocated=True) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, name: str = "memory") -> int:
    """A size such as 80GB (80e9 bytes), 79.1GiB or a number of bytes; `name` is the argument's, for the message.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]+)?)\s*([A-Za-z]*)", text.strip())
    size = 0.0
    if match is not None and match.group(2).upper() in UNITS:
        size = float(match.group(1)) * UNITS[match.group(2).upper()]
    if not 1 <= size < MOST_BYTES:
        raise ArgumentError(name, f"must be a number above 0 and a unit, such as 80GB or 79.1GiB, got {text!r:.60}")
    return int(size)


@dataclass(frozen=True)
class _SamplingFlags:
    """Flags of all commands that generate text."""

    temperature: float | None = None
    """0 chooses the most likely token; above 0, tokens are sampled; the model's own by default."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose probabilities sum to p."""
    min_p: float | None = None
    """Sample from tokens at least p times as likely as the most likely one."""
    repetition_penalty: float | None = None
    """Above 1, tokens that have already occurred become less likely."""
    seed: int = 0
    """Random seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""


@dataclass(frozen=True)
class SamplingOptions(_SamplingFlags):
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 chooses the most likely token, also with --chat; above 0, tokens are sampled. duo chat has the model's own
    temperature by default."""

    def settings(self) -> SamplingSettings:
        """The numbers of the flags."""
        return SamplingSettings(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def sampler(self) -> Sampler:
        """The sampler that the flags describe.

        Raises:
            ValueError: a value out of range, or restrictions on sampling at temperature 0.
        """
        return self.settings().sampler()


@dataclass(frozen=True)
class ChatSamplingOptions(_SamplingFlags):
    """How tokens are chosen; by default as the model's generation_config.json says, or else the most likely token."""

    def settings(self, own: SamplingSettings) -> SamplingSettings:
        """The model's own settings, with those that were given; at temperature 0, without its cuts."""
        if self.temperature == 0:
            own = SamplingSettings(repetition_penalty=own.repetition_penalty)
        given = {name: value for name in vars(own) if (value := getattr(self, name)) is not None}
        return replace(own, **given)
