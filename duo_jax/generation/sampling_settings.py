"""SamplingSettings: a sampler by its numbers, from flags, a model's generation_config.json or GGUF. Knows no files."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duo_jax.arguments import real_number, spelling, true_or_false, whole_number
from duo_jax.generation.sampling import (
    LEAST,
    MOST,
    Categorical,
    Greedy,
    MinP,
    RepetitionPenalty,
    Sampler,
    Temperature,
    TopK,
    TopP,
    Transform,
)

# What transformers uses where a model that samples leaves these out.
HF_TEMPERATURE, HF_TOP_K = 1.0, 50
# Settings of transformers that would choose other tokens and are not supported here, with what turns each off.
UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "stop_strings": None,
}
# The same for the keys of a GGUF file, and the names here of those that are supported.
GGUF_PREFIX = "general.sampling."
GGUF_UNSUPPORTED: dict[str, Any] = {"mirostat": 0, "xtc_probability": 0.0, "sequence": None}
GGUF_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen; None leaves a restriction out.

    Attributes:
        temperature: 0 takes the most likely token; above 0, tokens are sampled.
        top_k: sample only from the k most likely tokens.
        top_p: sample from the smallest set of tokens whose probabilities sum to p.
        min_p: sample from tokens at least p times as likely as the most likely one.
        repetition_penalty: above 1, tokens that have already occurred become less likely.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampler(self) -> Sampler:
        """The sampler with these numbers.

        Raises:
            ValueError: a value out of range, or restrictions on sampling at temperature 0.
        """
        transforms: list[Transform] = []
        if self.repetition_penalty is not None:
            transforms.append(RepetitionPenalty(self.repetition_penalty))
        cuts: list[Transform] = [TopK(self.top_k)] if self.top_k is not None else []
        cuts += [TopP(self.top_p)] if self.top_p is not None else []
        cuts += [MinP(self.min_p)] if self.min_p is not None else []
        if self.temperature != 0:
            real_number("temperature", self.temperature, LEAST, MOST, way="0 takes the most likely token")
            return Categorical((*transforms, Temperature(self.temperature), *cuts))
        if cuts:
            given = [spelling.get()(name) for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
            raise ValueError(f"{' and '.join(given)} choose among random draws: give a temperature above 0")
        return Greedy(tuple(transforms))

    def __str__(self) -> str:
        """As a user would say it: temperature 0.7, top-p 0.9."""
        first = f"temperature {self.temperature:g}" if self.temperature else "the most likely token"
        others = {name.replace("_", "-"): value for name, value in vars(self).items() if name != "temperature"}
        return ", ".join([first, *(f"{name} {value:g}" for name, value in others.items() if value is not None)])

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "SamplingSettings":
        """The settings of a generation_config.json, with the defaults of transformers; {} takes the most likely token.

        Settings that are not supported are left out with a warning.

        Raises:
            ValueError: a value of a wrong type or range.
        """
        given = {name: value for name, value in values.items() if value is not None}
        _warn("generation_config.json", given, UNSUPPORTED)
        # In quotes: names of a file, not of a caller's arguments.
        penalty = real_number("'repetition_penalty'", given.get("repetition_penalty", 1), LEAST, MOST)
        settings = cls(repetition_penalty=None if penalty == 1 else penalty)
        temperature = real_number("'temperature'", given.get("temperature", HF_TEMPERATURE), 0, MOST)
        if not true_or_false("'do_sample'", given.get("do_sample", False)) or not temperature:
            return settings
        top_k = whole_number("'top_k'", given.get("top_k", HF_TOP_K), -1)  # -1 is off too, in vLLM's files.
        top_p = real_number("'top_p'", given.get("top_p", 1), 0, 1)
        min_p = real_number("'min_p'", given.get("min_p", 0), 0, 1)
        return cls(
            temperature=max(temperature, LEAST),
            top_k=top_k if top_k > 0 else None,
            top_p=None if top_p == 1 else max(top_p, LEAST),
            min_p=min_p or None,
            repetition_penalty=settings.repetition_penalty,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "SamplingSettings":
        """The settings in the metadata of a GGUF file, which come from a generation_config.json; see `from_hf`."""
        keys = {key.removeprefix(GGUF_PREFIX): value for key, value in metadata.items() if key.startswith(GGUF_PREFIX)}
        _warn(f"{GGUF_PREFIX}*", keys, GGUF_UNSUPPORTED)
        values = {name: keys[key] for key, name in GGUF_KEYS.items() if key in keys}
        return cls.from_hf(values | {"do_sample": bool(values.keys() - {"repetition_penalty"})})

    def to_hf(self) -> dict[str, Any]:
        """As in a generation_config.json; `from_hf` reads the same settings."""
        off = {"do_sample": self.temperature > 0, "temperature": HF_TEMPERATURE, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        given = {name: value for name, value in vars(self).items() if value}
        return {**off, "repetition_penalty": 1.0, **given}


def _warn(place: str, given: Mapping[str, Any], unsupported: Mapping[str, Any]) -> None:
    """Name the settings that are not supported, unless they are turned off."""
    if left_out := [name for name, off in unsupported.items() if given.get(name, off) not in (off, [], {})]:
        warnings.warn(f"{place}: {', '.join(left_out)} is not supported and is left out", stacklevel=4)
