"""From a Hugging Face configuration to the values of `ModelConfig`, with the rules of transformers.

transformers knows every spelling of a setting and every default of a family, so it reads the values. What is checked
here: types and ranges before it does, and what this decoder does not have. Knows no files.
"""

import copy
from collections.abc import Mapping
from typing import Any

from duo_jax.families.layer_settings import layer_fields
from duo_jax.families.quantization import KEYS as STORED_KEYS
from duo_jax.families.quantization import stored_format
from duo_jax.families.rope_settings import check_rope, ropes
from duo_jax.families.settings import KEYS, REQUIRED, REQUIRED_EXPERTS, by_first_name
from duo_jax.families.table import FAMILIES
from duo_jax.model.config import ModelConfig
from duo_jax.model.config_checks import ACTIVATIONS

BOOLEANS = ("attention_bias", "attention_out_bias", "mlp_bias", "tie_word_embeddings")
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
            f"model_type {str(family)[:60]!r} is not supported{reason}; supported are {', '.join(FAMILIES)}"
        )
    if "num_experts" in FAMILIES[family]:
        config, required = by_first_name(config), required | set(REQUIRED_EXPERTS)
    missing = [key for key in (*REQUIRED, *REQUIRED_EXPERTS) if key in required and config.get(key) is None]
    if missing:
        raise ValueError(f"the configuration of this {family} model lacks {', '.join(missing)}: use its original one")
    given = {key: config[key] for key in KEYS if key in config}
    given |= {key: check(key, given[key]) for key, check in KEYS.items() if check and given.get(key) is not None}
    check_rope(family, given)
    values: dict[str, Any] = {key: given.get(key) for key in KEYS} if is_complete else _by_transformers(family, given)
    _refuse_unsupported(family, values, config)
    values |= layer_fields(family, values, given) | ropes(family, values)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    values["eos_token_id"] = eos_ids(config.get("eos_token_id", values["eos_token_id"]))
    return values | {"model_type": family, "dtype": str(dtype).removeprefix("torch.")}


def from_standard(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration with the values of `standard`."""
    family = values["model_type"]
    return ModelConfig(
        family=family,
        vocab_size=values["vocab_size"],
        num_layers=values["num_hidden_layers"],
        embed_dim=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        mlp_dim=values["intermediate_size"],
        rope=values["rope"],
        activation=values["activation"],
        norm_eps=values["rms_norm_eps"],
        max_positions=values["max_position_embeddings"],
        tied_head=values["tie_word_embeddings"],
        dtype=values["dtype"],
        eos_ids=values["eos_token_id"],
        **{flag: value(values) if callable(value) else value for flag, value in FAMILIES[family].items()},
    )


def eos_ids(value: Any) -> tuple[int, ...]:
    """The ids of a configuration's `eos_token_id`: none, one or several."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


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
