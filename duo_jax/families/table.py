"""FAMILIES: which optional parts of the decoder the models of a family have. Knows no transformers, no files.

Fields of `ModelConfig` that no row has are read in the same way for all families, in `hugging_face`.
"""

from collections.abc import Callable, Mapping
from typing import Any


def _flag(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda config: config[name]


def _experts(width: str) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
    """A mixture of experts; `width` is the setting that has an expert's channels."""
    experts = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok", "expert_dim": width}
    return {field: _flag(name) for field, name in experts.items()}


# Which optional parts a family has; a callable reads its configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": _flag("attention_bias"), "out_bias": _flag("attention_bias"), "mlp_bias": _flag("mlp_bias")},
    "mistral": {"layer_windows": _flag("layer_windows")},
    "qwen2": {"qkv_bias": True, "layer_windows": _flag("layer_windows")},
    "qwen3": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "qk_norm": True,
        "layer_windows": _flag("layer_windows"),
    },
    "ministral": {"layer_windows": _flag("layer_windows")},
    "ministral3": {
        "layer_windows": _flag("layer_windows"),
        "query_log_scale": lambda config: config["rope_parameters"].get("llama_4_scaling_beta") or 0.0,
        "query_log_positions": lambda config: config["rope_parameters"].get("original_max_position_embeddings") or 0,
    },
    "phi3": {"layer_windows": _flag("layer_windows"), "rotary_dim": _flag("rotary_dim")},
    "granite": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "mlp_bias": _flag("mlp_bias"),
        "embed_scale": _flag("embedding_multiplier"),
        "query_scale": lambda config: config["attention_multiplier"] * config["head_dim"] ** 0.5,
        "residual_scale": _flag("residual_multiplier"),
        "logits_divisor": _flag("logits_scaling"),
    },
    "seed_oss": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_out_bias"),
        "mlp_bias": _flag("mlp_bias"),
    },
    "smollm3": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "mlp_bias": _flag("mlp_bias"),
        "layer_windows": _flag("layer_windows"),
        "no_rope_layers": lambda config: tuple(n for n, rope in enumerate(config["no_rope_layers"]) if not rope),
    },
    "olmo3": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "qk_norm": True,
        "wide_qk_norm": True,
        "pre_norms": False,
        "post_norms": True,
        "layer_windows": _flag("layer_windows"),
        "window_rope": _flag("window_rope"),
    },
    "qwen3_moe": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "qk_norm": True,
        "layer_windows": _flag("layer_windows"),
        **_experts("moe_intermediate_size"),
        "normalize_experts": _flag("norm_topk_prob"),
        "dense_layers": _flag("dense_layers"),
    },
    "mixtral": {
        "layer_windows": _flag("layer_windows"),
        **_experts("intermediate_size"),
        "normalize_experts": True,
    },
    "gpt_oss": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "layer_windows": _flag("layer_windows"),
        "sink_logits": True,
        **_experts("intermediate_size"),
        "expert_bias": True,
        "normalize_experts": True,
        "swiglu_limit": lambda config: config["swiglu_limit"] or 7.0,
        "swiglu_alpha": lambda config: config["swiglu_alpha"] or 1.702,
    },
    "gemma2": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "norm_offset": True,
        "post_norms": True,
        "embed_scale": lambda config: config["hidden_size"] ** 0.5,
        "query_scale": lambda config: (config["head_dim"] / config["query_pre_attn_scalar"]) ** 0.5,
        "layer_windows": _flag("layer_windows"),
        "score_cap": lambda config: config["attn_logit_softcapping"] or None,
        "logits_cap": lambda config: config["final_logit_softcapping"] or None,
    },
    "gemma3_text": {
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "qk_norm": True,
        "norm_offset": True,
        "post_norms": True,
        "embed_scale": lambda config: config["hidden_size"] ** 0.5,
        "query_scale": lambda config: (config["head_dim"] / config["query_pre_attn_scalar"]) ** 0.5,
        "layer_windows": _flag("layer_windows"),
        "window_rope": _flag("window_rope"),
    },
}
