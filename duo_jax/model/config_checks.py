"""What the fields of `ModelConfig` may be: names, ranges, and which values go together."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from duo_jax.arguments import MOST_TOKENS, instance, real_number, true_or_false, whole_number
from duo_jax.model.precision import ALLOWED, check_name
from duo_jax.model.rope import Rope
from duo_jax.model.weights import EMBED_FORMATS, WEIGHT_FORMATS, check_format

if TYPE_CHECKING:
    from duo_jax.model.config import ModelConfig

# The largest sizes that a model may have, well above any published one: a wrong number must not take all memory or time
# before anything can be compared with it.
MOST = {
    "vocab_size": 10**8,
    "num_layers": 10**4,
    "embed_dim": 10**6,
    "num_heads": 10**4,
    "num_kv_heads": 10**4,
    "head_dim": 10**4,
    "mlp_dim": 10**7,
    "max_positions": MOST_TOKENS,
}
# The same for a mixture of experts; 0: the model has none.
MOST_EXPERTS = {"num_experts": 10**4, "experts_per_token": 10**4, "expert_dim": 10**7}
FLAGS = (
    *("tied_head", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "wide_qk_norm", "norm_offset", "pre_norms"),
    *("post_norms", "sink_logits", "expert_bias", "normalize_experts"),
)
# What a decoder may multiply or divide by, above 0.
SCALES = "embed_scale", "query_scale", "residual_scale", "logits_divisor"
# The linear maps that a layer may have.
LINEAR_MAPS = "qkv", "out", "gate_up", "down", "expert_gate_up", "expert_down"
# The activations that an MLP may have, by transformers' names.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def checked_fields(config: "ModelConfig") -> dict[str, Any]:
    """The fields that are checked one by one, by name, as `ModelConfig` keeps them.

    Raises:
        ValueError: a value of a wrong type or range.
    """
    values: dict[str, Any] = {name: whole_number(name, getattr(config, name), 1, most) for name, most in MOST.items()}
    values |= {name: true_or_false(name, getattr(config, name)) for name in FLAGS}
    values |= _checked_experts(config)
    values["norm_eps"] = real_number("norm_eps", config.norm_eps, 0, 1)
    values |= {name: real_number(name, getattr(config, name), 0, 1e6) for name in ("swiglu_limit", "swiglu_alpha")}
    values |= {name: real_number(name, getattr(config, name), 1e-6, 1e6) for name in SCALES}
    for name in ("score_cap", "logits_cap"):
        values[name] = None if (cap := getattr(config, name)) is None else real_number(name, cap, 1e-6, 1e6)
    values["query_log_scale"] = real_number("query_log_scale", config.query_log_scale, 0, 1e6)
    if config.query_log_scale:
        most = MOST["max_positions"]
        values["query_log_positions"] = whole_number("query_log_positions", config.query_log_positions, 1, most)
    values["activation"] = check_name("activation", config.activation, tuple(ACTIVATIONS))
    values["dtype"] = check_name("dtype", config.dtype, ALLOWED["dtype"])
    values["layer_windows"] = _checked_windows(config)
    values["no_rope_layers"] = _checked_layers("no_rope_layers", config)
    values["eos_ids"] = tuple(whole_number("an EOS id", token, 0, config.vocab_size - 1) for token in config.eos_ids)
    kept = tuple(check_name("unquantized", name, LINEAR_MAPS) for name in config.unquantized)
    return values | {"unquantized": () if config.weight_dtype is None else kept}


def check_together(config: "ModelConfig") -> None:
    """Check what fields must be for each other, once each was checked.

    Raises:
        ValueError: heads that cannot share KV heads, RoPE or a quantized format that does not fit the widths.
    """
    instance("rope", config.rope, Rope)
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, got "
            f"num_heads={config.num_heads}, num_kv_heads={config.num_kv_heads}"
        )
    if config.rotary_dim is not None:
        whole_number("rotary_dim", config.rotary_dim, 2, config.head_dim)
    if config.rope_dim % 2:
        name = "head_dim" if config.rotary_dim is None else "rotary_dim"
        raise ValueError(f"{name} must be even for RoPE, got {config.rope_dim}")
    config.rope.check(config.rope_dim)
    if config.window_rope is not None:
        instance("window_rope", config.window_rope, Rope).check(config.rope_dim)
    if config.weight_dtype is not None:
        check_format("weight_dtype", config.weight_dtype, WEIGHT_FORMATS, *config.map_widths.values())
        if WEIGHT_FORMATS[config.weight_dtype].only_experts and not config.num_experts:
            raise ValueError(
                f"{config.weight_dtype} is for the experts of a mixture, and this model has none: choose another "
                "weight_dtype"
            )
    if config.embed_dtype is not None:
        check_format("embed_dtype", config.embed_dtype, EMBED_FORMATS, config.embed_dim)


def _checked_layers(name: str, config: "ModelConfig") -> tuple[int, ...]:
    """Numbers of layers, in order, each once."""
    last = config.num_layers - 1
    return tuple(sorted({whole_number(f"a layer of {name}", layer, 0, last) for layer in getattr(config, name)}))


def _checked_windows(config: "ModelConfig") -> tuple[int | None, ...]:
    windows = tuple(config.layer_windows)
    if windows and len(windows) != config.num_layers:
        raise ValueError(f"layer_windows has one entry for each of {config.num_layers} layers, got {len(windows)}")
    most = MOST["max_positions"]
    checked = tuple(w if w is None else whole_number("a window of layer_windows", w, 1, most) for w in windows)
    return checked if any(checked) else ()


def _checked_experts(config: "ModelConfig") -> dict[str, Any]:
    given = {name: getattr(config, name) for name in ("experts_per_token", "expert_dim", "dense_layers")}
    if not config.num_experts:
        if any(given.values()):
            raise ValueError(
                "num_experts is 0, so that experts_per_token and expert_dim must be 0 and dense_layers empty, got "
                + ", ".join(f"{name}={value!r:.60}" for name, value in given.items())
            )
        return {"dense_layers": ()}
    values: dict[str, Any] = {
        name: whole_number(name, getattr(config, name), 1, most) for name, most in MOST_EXPERTS.items()
    }
    if values["experts_per_token"] > values["num_experts"]:
        raise ValueError(
            "experts_per_token must be at most num_experts, got "
            f"experts_per_token={config.experts_per_token} (num_experts_per_tok), num_experts={config.num_experts}"
        )
    layers = _checked_layers("dense_layers", config)
    if len(layers) == config.num_layers:
        raise ValueError(f"dense_layers has all {config.num_layers} layers: then num_experts must be 0")
    return values | {"dense_layers": layers}
