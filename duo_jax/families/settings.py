"""The settings of Hugging Face configurations that are read, with the check of each. Knows no family's defaults."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from duo_jax.arguments import real_number, true_or_false, whole_number
from duo_jax.model.config_checks import MOST, MOST_EXPERTS
from duo_jax.model.rope import MOST_THETA

# Keys of which a configuration must have a value: their defaults would be those of another model.
REQUIRED = (
    *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("rms_norm_eps", "max_position_embeddings"),
)
REQUIRED_EXPERTS = ("num_local_experts", "num_experts_per_tok")  # Of families with experts.


def _size(field: str) -> Callable[[str, Any], int]:
    return partial(whole_number, least=1, most=(MOST | MOST_EXPERTS)[field])


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
# Settings that have two names -> the one by which they are read.
OTHER_NAMES = {"num_experts": "num_local_experts"}


def by_first_name(config: Mapping[str, Any]) -> Mapping[str, Any]:
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
