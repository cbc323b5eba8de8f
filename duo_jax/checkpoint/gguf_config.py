"""A model's configuration from the metadata of a GGUF file, as llama.cpp reads it. Knows no files or weights.

Every key of the architecture is read, or is known not to change the logits, or is refused: a key that nobody reads may
be a feature that this decoder does not have.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from duo_jax.arguments import MOST_TOKENS
from duo_jax.checkpoint.gguf_architectures import ARCHITECTURES, Architecture
from duo_jax.checkpoint.gguf_tokenizer import special_id
from duo_jax.families.hugging_face import from_standard, standard
from duo_jax.families.layer_settings import FULL, SLIDING
from duo_jax.model.config import ModelConfig
from duo_jax.model.rope import DividedRope

# Keys that change no logit here.
HARMLESS = {
    "pooling_type",  # for embedding models
    "rope.scaling.finetuned",  # a note
}
# Keys of features that this decoder does not have -> the value that turns the feature off.
OFF: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "nextn_predict_layers": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "tensor_data_layout": "Meta AI original pth",  # the order of rows that every GGUF file of a Llama has
    "use_parallel_residual": False,
}
# Keys that every model has: a default would be another model's.
REQUIRED = (
    *("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"),
    "attention.layer_norm_rms_epsilon",
)
# The tokens that end a text, a turn, and a message to a tool.
ENDS = ("eos", "eot", "eom")


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    divisors: tuple[float, ...] | None,
) -> ModelConfig:
    """The configuration, with the rules for a Hugging Face configuration.

    Args:
        metadata: the file's keys and values.
        shapes: of its tensors, by Hugging Face's names.
        divisors: of the RoPE frequencies, if the file has them.

    Raises:
        ValueError: a key that is missing, has a wrong type, is out of range, or contradicts the tensors.
        NotImplementedError: an architecture or a feature that is not supported, by name.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise NotImplementedError(f"architecture {_short(arch)} is not supported; supported are {known}")
    row, keys = ARCHITECTURES[arch], _Keys(metadata, arch)
    keys.require(*REQUIRED)
    if "model.embed_tokens.weight" not in shapes:
        raise ValueError("no token_embd.weight: it does not contain a language model")
    layers = keys.integer("block_count")
    if layers != (stored := _num_layers(shapes)):
        raise ValueError(f"{arch}.block_count is {layers}, but it has tensors of {stored} layers")
    rows = shapes["model.embed_tokens.weight"][0]
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else rows
    for name, count in ((f"{arch}.vocab_size", keys.integer("vocab_size", rows)), ("the tokenizer", num_tokens)):
        if count != rows:
            raise ValueError(f"{name} has {count} tokens, but token_embd.weight has {rows}; convert it again")
    heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", dim // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise NotImplementedError(f"{arch}.attention.value_length is not key_length, which is not supported")
    positions = keys.integer("context_length")
    query_dim = dim // heads if layers == row.wide_query_layers else head_dim
    values: dict[str, Any] = {
        "model_type": row.family,
        "vocab_size": rows,
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "num_experts": keys.integer("expert_count", 0, at_least=0),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in shapes,
        "rope_parameters": _rope(keys, positions=positions, head_dim=head_dim),
        "eos_token_id": _ends(metadata, rows),
        "dtype": "bfloat16",
        "hidden_act": row.activation,
        "query_pre_attn_scalar": query_dim,
    }
    values |= _windows(keys, row, positions=positions, layers=layers, rope=values["rope_parameters"])
    dims = dict.fromkeys(
        ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"), head_dim
    )
    keys.refuse_others(OFF | dims | {"attention.scale": query_dim**-0.5})
    config = from_standard(standard(values, is_complete=True))
    if divisors is None:
        return config
    if config.rope.type != "default":
        raise NotImplementedError(f"rope_freqs.weight with {config.rope.type} scaling is not supported")
    if len(divisors) != head_dim // 2 or not all(0 < divisor < math.inf for divisor in divisors):
        raise ValueError(f"rope_freqs.weight must be {head_dim // 2} numbers above 0, got {divisors[:4]}...")
    return replace(config, rope=DividedRope(config.rope.theta, divisors=divisors))


def _windows(
    keys: "_Keys", row: Architecture, *, positions: int, layers: int, rope: Mapping[str, Any]
) -> dict[str, Any]:
    """Hugging Face's settings of layers with a window, and RoPE by type of layer; none if all have full attention."""
    window = keys.integer("attention.sliding_window", 0, at_least=0)
    if row.windows is None:
        if 0 < window < positions:  # The model may have had such layers; llama.cpp computes full attention.
            raise NotImplementedError(
                f"{keys.name('attention.sliding_window')} = {window} is not supported: llama.cpp ignores windows of "
                "this architecture; load the model's Hugging Face folder instead"
            )
        return {}
    theta = keys.number("rope.freq_base_swa", row.windows.theta, at_least=1.001)
    is_sliding = _sliding(keys, row.windows.period, layers) if window else [False] * layers
    return {
        "sliding_window": window or None,
        "layer_types": [SLIDING if slides else FULL for slides in is_sliding],
        "rope_parameters": {
            FULL: rope,
            SLIDING: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0},
        },
    }


def _sliding(keys: "_Keys", period: int, layers: int) -> list[bool]:
    """Which layers have a window: all but the last of each period, or as a list says."""
    key = "attention.sliding_window_pattern"
    if not keys.is_list(key):
        period = keys.integer(key, period)
        return [(layer + 1) % period != 0 for layer in range(layers)]
    return keys.flags(key, layers)


def _rope(keys: "_Keys", *, positions: int, head_dim: int) -> dict[str, Any]:
    """Hugging Face's `rope_parameters`.

    As in llama.cpp, scaling is linear unless the file has another type, its factor may have an older key, and YaRN's
    original context is the context.
    """
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise NotImplementedError(f"{keys.name('rope.scaling.type')} {_short(kind)} is not none, linear or yarn")
    older = keys.number("rope.scale_linear", 1.0, at_least=1.0)
    factor = keys.number("rope.scaling.factor", older, at_least=1.0)
    if keys.has("rope.scale_linear") and older != factor and kind != "none":
        raise ValueError(f"{keys.name('rope.scaling.factor')} is {factor}, but rope.scale_linear is {older}")
    rope = {
        "rope_theta": keys.number("rope.freq_base", 10000.0, at_least=1.001),
        "partial_rotary_factor": keys.integer("rope.dimension_count", head_dim) / head_dim,
    }
    yarn = {
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", positions),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    extrapolation = keys.number("rope.scaling.yarn_ext_factor", 1.0)
    if kind == "yarn":
        if extrapolation != 1.0:
            raise NotImplementedError(f"{keys.name('rope.scaling.yarn_ext_factor')} {extrapolation} is not supported")
        if not (keys.has("rope.scaling.factor") or keys.has("rope.scale_linear")):
            raise ValueError(f"{keys.name('rope.scaling.type')} is yarn, but there is no rope.scaling.factor")
        return rope | yarn | {"rope_type": "yarn", "factor": factor}
    if kind == "none" or factor == 1.0:
        return rope | {"rope_type": "default"}
    return rope | {"rope_type": "linear", "factor": factor}


def _ends(metadata: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The ids of the tokens that end a text or a turn, EOS first."""
    ids = [special_id(metadata, name, vocab_size) for name in ENDS]
    return [index for index in dict.fromkeys(ids) if index is not None]


def _num_layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})


class _Keys:
    """The metadata of an architecture: values checked as they are read, and the keys that nobody read."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        prefix = f"{arch}."
        self._values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self._prefix = prefix
        self._unread = set(self._values) - HARMLESS

    def name(self, key: str) -> str:
        """The key as it is in the file."""
        return f"{self._prefix}{key}"

    def has(self, key: str) -> bool:
        """Whether the file has a key."""
        return key in self._values

    def require(self, *keys: str) -> None:
        """Raise ValueError if keys are missing."""
        if missing := [self._prefix + key for key in keys if not self.has(key)]:
            raise ValueError(f"no {', '.join(missing)}: it does not contain a language model, or not all of one")

    def integer(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        """An integer that a model can have as a size."""
        value = self._read(key, default)
        if type(value) is not int or not at_least <= value <= MOST_TOKENS:
            raise self._wrong(key, value, f"an integer in [{at_least}, {MOST_TOKENS}]")
        return value

    def number(self, key: str, default: float | None = None, *, at_least: float = 0.0) -> float:
        """A number above 0 that is far from the limits of float32."""
        value = self._read(key, default)
        if type(value) not in (int, float) or not max(at_least, 1e-30) <= value < 1e30:
            raise self._wrong(key, value, f"a number in [{max(at_least, 1e-30)}, 1e+30)")
        return float(value)

    def is_list(self, key: str) -> bool:
        """Whether a key has an array."""
        return isinstance(self._values.get(key), list)

    def flags(self, key: str, count: int) -> list[bool]:
        """An array of booleans."""
        value = self._read(key, None)
        if not isinstance(value, list) or len(value) != count or not all(type(each) is bool for each in value):
            raise self._wrong(key, value, f"an integer, or an array of {count} booleans")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._read(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def refuse_others(self, off: Mapping[str, Any]) -> None:
        """Raise NotImplementedError for keys that were not read, unless they turn a feature off."""
        for key in sorted(self._unread):
            value, expected = self._values[key], off.get(key)
            same = value == expected
            if isinstance(value, int | float) and isinstance(expected, int | float):
                same = math.isclose(value, expected, rel_tol=1e-5)
            if expected is None or not same:
                raise NotImplementedError(
                    f"{self.name(key)} = {_short(value)} is a feature that is not supported; "
                    "without it, the model would give other logits"
                )

    def _read(self, key: str, default: Any) -> Any:
        self._unread.discard(key)
        return self._values.get(key, default)

    def _wrong(self, key: str, value: Any, rule: str) -> ValueError:
        return ValueError(f"{self.name(key)} must be {rule}, got {_short(value)}")


def _short(value: Any) -> str:
    return f"an array of {len(value)}" if isinstance(value, list) else repr(value)[:80]
