"""RoPE from the settings of a Hugging Face configuration: `rope_parameters`, and `rope_scaling` of older ones."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from duo_jax.arguments import real_number, whole_number
from duo_jax.families.layer_settings import FULL, SLIDING
from duo_jax.families.table import FAMILIES
from duo_jax.model.rope import MOST_THETA, ROPES, LongRope, Rope, YarnRope

# Settings inside `rope_scaling` or `rope_parameters` that must be numbers, and those that may be outside.
OUTSIDE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
ROPE_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta"),
    *OUTSIDE,
)
# What null stands for in transformers' formula of YaRN: for `truncate`, the opposite of its default.
YARN_NULL = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "attention_factor": 0.0,
    "truncate": False,
}


def check_rope(family: str, given: Mapping[str, Any]) -> None:
    """Check the RoPE settings of a configuration, before transformers reads them.

    Raises:
        NotImplementedError: a scaling that is not supported.
        ValueError: a value of a wrong type or range.
    """
    parameters = given.get("rope_parameters")
    if "window_rope" in FAMILIES[family] and isinstance(parameters, Mapping) and set(parameters) <= {FULL, SLIDING}:
        for settings in parameters.values():
            _check_rope({**given, "rope_parameters": settings})
    else:
        _check_rope(given)


def ropes(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `rope`, `window_rope` and `rotary_dim` of `ModelConfig`, from the values after all defaults.

    Raises:
        NotImplementedError: partial RoPE in a family that has none.
        ValueError: a value of a wrong type or range.
    """
    by_type = values["rope_parameters"]
    if FULL in by_type and SLIDING in by_type:
        found = {"rope": _rope(family, by_type[FULL], values), "window_rope": _rope(family, by_type[SLIDING], values)}
    else:
        found = {"rope": _rope(family, by_type, values)}
    part = (by_type.get(FULL) or by_type).get("partial_rotary_factor") or 1.0
    return found | {"rotary_dim": None if part == 1.0 else int(values["head_dim"] * part)}


def _check_rope(given: Mapping[str, Any]) -> None:
    """Check the types of RoPE settings, and warn where two places differ: transformers then uses one of them."""
    for name in ("rope_scaling", "rope_parameters"):
        settings = given.get(name)
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(f"{name} must be an object, got {type(settings).__name__}")
        for key, value in (settings or {}).items():
            if isinstance(value, Mapping):
                raise NotImplementedError(f"{name} has settings for each type of layer ({key}), which is not supported")
            if key in ROPE_NUMBERS and value is not None:
                real_number(key, value, 0, MOST_THETA)
    top = {key: given[key] for key in OUTSIDE if given.get(key) is not None}
    for key, value in top.items():
        real_number(key, value, 0, MOST_THETA)
    used = given.get("rope_scaling") or given.get("rope_parameters") or {}
    other = given.get("rope_parameters") or used
    kind = used.get("rope_type", used.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # The first name that it had, in Phi-3.
    if not isinstance(kind, str) or kind not in ROPES:
        raise NotImplementedError(f"RoPE scaling {kind!r:.60} is not supported; supported are {', '.join(ROPES)}")
    if kind in ("llama3", "yarn") and not used.get("original_max_position_embeddings", 1):
        raise ValueError(f"original_max_position_embeddings must be at least 1 for {kind}, got null or 0")
    pairs = [("rope_scaling", used, "rope_parameters", other), ("rope_type", kind, "type", used.get("type", kind))]
    for key in set(top) & set(used):
        inside, outside = (f"{key} in the RoPE settings", used[key]), (f"{key} outside", top[key])
        # As transformers: only this one counts more outside.
        first, second = (outside, inside) if key == "original_max_position_embeddings" else (inside, outside)
        pairs.append((*first, *second))
    for first_name, first_value, second_name, second_value in pairs:
        if first_value != second_value:
            warnings.warn(
                f"{first_name} is {first_value!r:.200} and {second_name} {second_value!r:.200}: the first is used, as "
                "by transformers",
                stacklevel=2,
            )


def _rope(family: str, settings: Mapping[str, Any], values: Mapping[str, Any]) -> Rope:
    """RoPE by its settings, after transformers has put them into one place."""
    positions = values["max_position_embeddings"]
    part = settings.get("partial_rotary_factor", 1.0)
    if part != 1.0 and "rotary_dim" not in FAMILIES[family]:
        raise NotImplementedError(f"{family}: partial RoPE is not supported, got partial_rotary_factor={part}")
    kind = ROPES[settings["rope_type"]]
    known = {field.name: settings[field.name] for field in fields(kind) if field.name in settings}
    if kind is YarnRope:
        if known.get("attention_factor") == 0:
            raise ValueError("attention_factor must be above 0, got 0")
        known |= {key: value for key, value in YARN_NULL.items() if key in known and known[key] is None}
        if known["factor"] is None:
            known["factor"] = positions / known["original_max_position_embeddings"]
    if kind is LongRope:
        known |= _long_rope(settings, positions)
    values = known | {"theta": settings["rope_theta"]}
    real = {name: float(value) for name, value in values.items() if type(value) is int and name not in OUTSIDE}
    return kind(**values | real)


def _long_rope(settings: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """The divisors, and what scores are multiplied by, which follows from how much longer contexts became."""
    values: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        if not isinstance(numbers := settings.get(name), list | tuple):
            raise ValueError(f"{name} of longrope must be a list of numbers, got {numbers!r:.60}")
        values[name] = tuple(real_number(f"a {name} of longrope", number, 0, MOST_THETA) for number in numbers)
    original = whole_number("original_max_position_embeddings", settings.get("original_max_position_embeddings"), 2)
    factor = settings.get("factor") or positions / original
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    given = settings.get("attention_factor")
    return values | {"attention_factor": default if given is None else float(given)}
