"""From a Hugging Face configuration to the values of `ModelConfig`, with the rules of transformers.

transformers knows every spelling of a setting and every default of a family, so it reads the values. What is checked
here: types and ranges before it does, and what this decoder does not have. Knows no files.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from duo_jax.arguments import real_number, true_or_false, whole_number
from duo_jax.config import ACTIVATIONS, FAMILIES, MOST, MOST_EXPERTS
from duo_jax.quantization_config import KEYS as STORED_KEYS
from duo_jax.quantization_config import stored_format
from duo_jax.rope import MOST_THETA, ROPES, LongRope, Rope, YarnRope

# Keys of which a configuration must have a value: their defaults would be those of another model.
REQUIRED = (
    *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("rms_norm_eps", "max_position_embeddings"),
)
REQUIRED_EXPERTS = ("num_local_experts", "num_experts_per_tok")  # Of families with experts.


def _size(field: str) -> Callable[[str, Any], int]:
    return partial(whole_number, least=1, most=(MOST | MOST_EXPERTS)[field])


BOOLEANS = ("attention_bias", "attention_out_bias", "mlp_bias", "tie_word_embeddings")
_scale = partial(real_number, least=1e-6, most=1e6)
# Every key that can change a result, with its check; the others are not read. null stands for a family's default.
KEYS: dict[str, Callable[[str, Any], Any] | None] = {
    "vocab_size": _size("vocab_size"),
    "num_hidden_layers": _size("num_layers"),
    "hidden_size": _size("embed_dim"),
    "intermediate_size": _size("mlp_dim"),
    "num_attention_heads": _size("num_heads"),
    "num_key_value_heads": _size("num_kv_heads"),
    "head_dim": _size("head_dim"),
    "max_position_embeddings": _size("max_positions"),
    "rms_norm_eps": partial(real_number, least=0, most=1),
    "tie_word_embeddings": true_or_false,
    "attention_bias": true_or_false,
    "attention_out_bias": true_or_false,
    "mlp_bias": true_or_false,
    "use_sliding_window": true_or_false,
    "sliding_window": partial(whole_number, least=0, most=MOST["max_positions"]),
    "max_window_layers": partial(whole_number, least=0),
    "sliding_window_pattern": _size("num_layers"),
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": _size("num_layers"),
    "hidden_act": None,
    "hidden_activation": None,
    "embedding_multiplier": _scale,
    "attention_multiplier": _scale,
    "residual_multiplier": _scale,
    "logits_scaling": _scale,
    "query_pre_attn_scalar": partial(whole_number, least=1, most=10**6),
    "attn_logit_softcapping": partial(real_number, least=0, most=1e6),
    "final_logit_softcapping": partial(real_number, least=0, most=1e6),
    "use_bidirectional_attention": None,
    "num_local_experts": _size("num_experts"),
    "num_experts_per_tok": _size("experts_per_token"),
    "moe_intermediate_size": _size("expert_dim"),
    "norm_topk_prob": true_or_false,
    "decoder_sparse_step": _size("num_layers"),
    "mlp_only_layers": None,
    "swiglu_limit": partial(real_number, least=1e-6, most=1e6),
    "swiglu_alpha": partial(real_number, least=1e-6, most=1e6),
    "rope_local_base_freq": partial(real_number, least=1, most=MOST_THETA),
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "eos_token_id": None,
}
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
# Features that a value other than null, false or 0 turns on.
OFF = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
# Models of text and images -> families of their text model, and what their configuration has outside of it.
TEXT_OF = {"gemma3": ("gemma3_text",), "mistral3": ("mistral", "ministral3")}
OF_WHOLE = ("eos_token_id", "dtype", "torch_dtype", "tie_word_embeddings", *STORED_KEYS)
# Settings of models that this decoder cannot compute -> what they have, and examples of such models.
UNSUPPORTED = {
    "kv_lora_rank": ("multi-head latent attention", "DeepSeek-V2 and V3, Kimi K2, MiniCPM3"),
    "linear_conv_kernel_dim": ("linear attention in some layers", "Qwen3-Next, Qwen3.5"),
    "linear_attn_config": ("linear attention in some layers", "Kimi Linear"),
    "mamba_d_state": ("state-space layers", "Jamba, Falcon-H1, Granite 4 (hybrid)"),
    "ssm_state_size": ("state-space layers", "Nemotron-H"),
    "state_size": ("state-space layers", "Mamba"),
    "conv_L_cache": ("layers of short convolutions", "LFM2"),
    "lru_width": ("recurrent layers", "RecurrentGemma"),
    "hidden_size_per_layer_input": ("embeddings of each layer", "Gemma 3n, Gemma 4"),
    "num_kv_shared_layers": ("layers that share keys and values", "Gemma 3n, Gemma 4"),
    "attention_chunk_size": ("chunked attention", "Llama 4"),
    "layer_norm_eps": ("LayerNorm", "Cohere, Phi-2, GPT-NeoX, StableLM"),
    "layer_norm_epsilon": ("LayerNorm", "GPT-2, Falcon"),
    "is_encoder_decoder": ("an encoder", "T5, BART, Whisper"),
}
FULL, SLIDING = "full_attention", "sliding_attention"
# Families with a window in every layer or in none: transformers does not read their `layer_types`.
UNIFORM = {"mistral", "ministral3", "mixtral", "phi3", "qwen3_moe"}
# Settings that have two names -> the one by which they are read.
OTHER_NAMES = {"num_experts": "num_local_experts"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def standard(config: Mapping[str, Any], *, is_complete: bool = False) -> dict[str, Any]:
    """The values that transformers' class for this family has after reading `config`, RoPE as `rope`; see `KEYS`.

    Args:
        config: a Hugging Face configuration.
        is_complete: nothing is left to a default of the family, and all of RoPE is in `rope_parameters`: transformers,
            which takes half a second to import its configurations, has nothing to add.

    Raises:
        NotImplementedError: an architecture or a feature that this decoder does not have, by name.
        ValueError: a value of a wrong type or range, or a configuration that contradicts itself.
    """
    family, required = config.get("model_type"), set(REQUIRED)
    if isinstance(family, str) and family in TEXT_OF and isinstance(text := config.get("text_config"), Mapping):
        outside = {key: config[key] for key in OF_WHOLE if config.get(key) is not None}
        if family == "gemma3":
            required = set()  # Published ones leave sizes to the defaults of this class.
        text_families = TEXT_OF[family]
        family = text_families[0] if len(text_families) == 1 else text.get("model_type", text_families[0])
        config = {**text, **outside, "model_type": family}
    if not isinstance(family, str) or family not in FAMILIES:
        reason = _unsupported_part(config)
        raise NotImplementedError(
            f"model_type {str(family)[:60]!r} is not supported{reason}; supported are {_SUPPORTED}"
        )
    if "num_experts" in FAMILIES[family]:
        config, required = _by_first_name(config), required | set(REQUIRED_EXPERTS)
    missing = [key for key in (*REQUIRED, *REQUIRED_EXPERTS) if key in required and config.get(key) is None]
    if missing:
        raise ValueError(f"the configuration of this {family} model lacks {', '.join(missing)}")
    given = {key: config[key] for key in KEYS if key in config}
    given |= {key: check(key, given[key]) for key, check in KEYS.items() if check and given.get(key) is not None}
    parameters = given.get("rope_parameters")
    if "window_rope" in FAMILIES[family] and isinstance(parameters, Mapping) and set(parameters) <= {FULL, SLIDING}:
        for settings in parameters.values():
            _check_rope(given | {"rope_parameters": settings})
    else:
        _check_rope(given)
    values: dict[str, Any] = {key: given.get(key) for key in KEYS} if is_complete else _by_transformers(family, given)
    _refuse_unsupported(family, values, config)
    values["layer_windows"] = _layer_windows(family, values, given)
    if "no_rope_layers" in FAMILIES[family]:
        _check_no_rope(values["no_rope_layers"], values["num_hidden_layers"])
    values["dense_layers"] = _dense_layers(values)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    values["eos_token_id"] = eos_ids(config.get("eos_token_id", values["eos_token_id"]))
    by_type: Any = values["rope_parameters"]
    if FULL in by_type and SLIDING in by_type:
        ropes = {"rope": _rope(family, by_type[FULL], values), "window_rope": _rope(family, by_type[SLIDING], values)}
    else:
        ropes = {"rope": _rope(family, by_type, values)}
    part = (by_type.get(FULL) or by_type).get("partial_rotary_factor") or 1.0
    values["rotary_dim"] = None if part == 1.0 else int(values["head_dim"] * part)
    return values | ropes | {"model_type": family, "dtype": str(dtype).removeprefix("torch.")}


def eos_ids(value: Any) -> tuple[int, ...]:
    """The ids of a configuration's `eos_token_id`: none, one or several."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


_SUPPORTED = ", ".join(FAMILIES)


def _unsupported_part(config: Mapping[str, Any]) -> str:
    """What a model of an unknown type has that this decoder does not have, as far as its settings show it."""
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, Mapping) else {}):
        for key, (part, _) in UNSUPPORTED.items():
            if settings.get(key):
                return f": it has {part} ({key})"
    return ""


def _by_transformers(family: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `KEYS` after all defaults."""
    from transformers import AutoConfig

    try:
        # A copy: it writes into nested values. EOS ids, which are checked here, may be anything there.
        values = {key: copy.deepcopy(value) for key, value in given.items() if key != "eos_token_id"}
        config = AutoConfig.for_model(family, **values)
        # Once more, as a model does when it is built: settings outside `rope_scaling` are known only now.
        config.standardize_rope_params()
        values = {key: getattr(config, key, None) for key in KEYS}
        if hasattr(type(config), "use_sliding_window") and not config.use_sliding_window:
            values["sliding_window"] = None
    except Exception as error:  # Its checks are code for each family, and arithmetic on what was given.
        text = " ".join(str(error).split())
        raise ValueError(f"the configuration contradicts itself: {text[:300]}") from None
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    return values | {key: bool(values[key]) for key in BOOLEANS}


def _refuse_unsupported(family: str, values: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Raise for a feature that this decoder does not have: without it, results would be silently wrong."""
    refused = None
    activation = values["hidden_activation"] or values["hidden_act"]
    values["activation"] = "silu" if activation == "swish" else activation
    if not isinstance(activation, str) or values["activation"] not in ACTIVATIONS:
        refused = f"the activation {activation!r:.60}"
    capped = {"attn_logit_softcapping": "score_cap", "final_logit_softcapping": "logits_cap"}
    if on := [name for name in OFF if values[name] and capped.get(name) not in FAMILIES[family]]:
        refused = f"{on[0]} ({values[on[0]]!r:.60})"
    if "num_experts" not in FAMILIES[family] and any(config.get(key) for key in EXPERTS):
        refused = "a mixture of experts"
    if config.get("per_layer_config"):
        refused = "layers of different sizes (per_layer_config)"
    try:
        stored_format(config)
    except NotImplementedError as error:
        raise NotImplementedError(f"{family}: {error}") from None
    if refused:
        raise NotImplementedError(f"{family}: this model uses {refused}, which is not supported")


def _layer_windows(family: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer, as in `ModelConfig`; empty if no layer has one.

    Raises:
        NotImplementedError: layers of another type, or windows in a family that has none.
        ValueError: types of layers that contradict the other settings.
    """
    layers, window, kinds = values["num_hidden_layers"], values["sliding_window"] or None, values["layer_types"]
    kinds = [SLIDING if window else FULL] * layers if kinds is None else kinds
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types must be a list with the type of each of {layers} layers, got {kinds!r:.80}")
    if others := sorted(set(kinds) - {SLIDING, FULL}):
        raise NotImplementedError(f"{family}: this model uses layers of type {others!s:.80}, which is not supported")
    sliding = [layer for layer, kind in enumerate(kinds) if kind == SLIDING]
    if sliding and not window:
        raise ValueError(
            f"layer_types has {SLIDING} in layers {sliding!s:.60}, but there is no window: sliding_window is "
            f"{given.get('sliding_window')}, use_sliding_window {given.get('use_sliding_window')}"
        )
    first = 0 if family in UNIFORM else given.get("max_window_layers")
    if window and first is not None and sliding != [*range(first, layers)]:
        raise ValueError(
            f"layer_types has {SLIDING} in layers {sliding!s:.60}, but a {family} model with {window=} has it in all "
            f"layers from {first} on"
        )
    # A window as large as the trained context has no effect, unless RoPE goes by it.
    has_no_effect = window and window >= values["max_position_embeddings"] and "window_rope" not in FAMILIES[family]
    if not sliding or has_no_effect:
        return ()
    if "layer_windows" not in FAMILIES[family]:
        raise NotImplementedError(f"{family}: this model uses {SLIDING} ({window=}), which is not supported")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _check_no_rope(flags: Any, layers: int) -> None:
    """Check SmolLM3's list, which has 1 for a layer with RoPE."""
    if not isinstance(flags, list | tuple) or len(flags) != layers or not all(flag in (0, 1) for flag in flags):
        raise ValueError(f"no_rope_layers must be a list with 0 or 1 for each of {layers} layers, got {flags!r:.80}")


def _by_first_name(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with its settings by the names in `KEYS`.

    Raises:
        ValueError: two names of a setting that have different values.
    """
    given = {name: first for name, first in OTHER_NAMES.items() if config.get(name) is not None}
    for name, first in given.items():
        if config.get(first) not in (None, config[name]):
            raise ValueError(
                f"{name} is {config[name]!r:.60} and {first} {config[first]!r:.60}: give one of them, or one value"
            )
    return {**config, **{first: config[name] for name, first in given.items()}}


def _dense_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers of a model with experts that have none, by `mlp_only_layers` and `decoder_sparse_step`.

    Raises:
        ValueError: a list of anything but numbers.
    """
    listed, step = values["mlp_only_layers"] or [], values["decoder_sparse_step"] or 1
    if not isinstance(listed, list | tuple) or not all(type(layer) is int for layer in listed):
        raise ValueError(f"mlp_only_layers must be a list of layers, got {listed!r:.80}")
    return tuple(layer for layer in range(values["num_hidden_layers"]) if layer in listed or (layer + 1) % step)


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
