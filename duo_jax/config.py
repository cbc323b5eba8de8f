"""ModelConfig: everything that decides a decoder's shape and arithmetic. Frozen, so that it is static under jit.

A family of models is a row of `FAMILIES` here and a weight table in `checkpoint`; features outside the row are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from duo_jax.precision import ALLOWED, AnyDtype, Precision, check_name
from duo_jax.rope import ROPES, Llama3Rope, Rope
from duo_jax.weights import EMBED_FORMATS, WEIGHT_FORMATS, check_format


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and a gated SiLU MLP.

    `dtype` is the data type of activations and of all weights that are not quantized. `weight_dtype`, a name in
    `weights.WEIGHT_FORMATS`, quantizes the linear maps of the layers, `embed_dtype` embeddings and head.
    """

    family: str
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    weight_dtype: str | None = None
    embed_dtype: str | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that a decoder can have these shapes."""
        for field in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if not getattr(self, field) >= 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads=}, {self.num_kv_heads=}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim=}")
        if self.weight_dtype is not None:
            widths = self.embed_dim, self.num_heads * self.head_dim, self.mlp_dim
            check_format("weight_dtype", self.weight_dtype, WEIGHT_FORMATS, *widths)
        if self.embed_dtype is not None:
            check_format("embed_dtype", self.embed_dtype, EMBED_FORMATS, self.embed_dim)

    def with_dtypes(
        self,
        *,
        dtype: AnyDtype | None = None,
        weight_dtype: AnyDtype | None = None,
        embed_dtype: AnyDtype | None = None,
    ) -> "ModelConfig":
        """This configuration with other data types; None leaves one unchanged.

        Raises:
            ValueError: an unknown data type, or one that does not fit the model's widths.
        """
        given = {"dtype": dtype, "weight_dtype": weight_dtype, "embed_dtype": embed_dtype}
        changes: dict[str, Any] = {
            name: check_name(name, dtype, ALLOWED[name]) for name, dtype in given.items() if dtype is not None
        }
        return replace(self, **changes)

    def precision(self, *, kv_dtype: AnyDtype | None = None, streaming_dtype: AnyDtype | None = None) -> Precision:
        """The model's data types, together with those of its KV cache."""
        return Precision(self.dtype, self.weight_dtype, self.embed_dtype, kv_dtype, streaming_dtype)

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        norms = 2 * self.embed_dim + 2 * self.head_dim * self.qk_norm
        biases = self.qkv_bias * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases += self.out_bias * self.embed_dim + self.mlp_bias * (2 * self.mlp_dim + self.embed_dim)
        layer = attention + 3 * self.embed_dim * self.mlp_dim + norms + biases
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tied_head else 2)
        return self.num_layers * layer + embeddings + self.embed_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Convert a Hugging Face configuration: `AutoConfig.from_pretrained(path).to_dict()`, or config.json.

        Raises:
            NotImplementedError: an architecture or a feature that this decoder does not have, by name.
            ValueError: a configuration that contradicts itself.
        """
        name = config.get("model_type")
        if name not in FAMILIES:
            raise NotImplementedError(f"model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}")
        required = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        missing = [key for key in (*required, "rms_norm_eps", "max_position_embeddings") if config.get(key) is None]
        if missing:
            raise ValueError(f"the configuration of this {name} model lacks {', '.join(missing)}")
        _refuse_unsupported(config)
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        eos = config.get("eos_token_id")
        return cls(
            family=name,
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            embed_dim=hidden,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            mlp_dim=config["intermediate_size"],
            rope=_rope_from_hf(config),
            norm_eps=config["rms_norm_eps"],
            max_positions=config["max_position_embeddings"],
            tied_head=bool(config.get("tie_word_embeddings")),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            **_flags(config, FAMILIES[name]),
        )

    @property
    def trained_positions(self) -> int:
        """Tokens of context that the model was trained for."""
        return self.rope.trained_positions(self.max_positions)


def _flags(config: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, Any]:
    return {flag: bool(value(config) if callable(value) else value) for flag, value in family.items()}


def _flag(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: bool(config.get(name, False))


# Which optional parts a family has; a callable reads its configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": _flag("attention_bias"), "out_bias": _flag("attention_bias"), "mlp_bias": _flag("mlp_bias")},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qkv_bias": _flag("attention_bias"), "out_bias": _flag("attention_bias"), "qk_norm": True},
}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise for a feature that this decoder does not have: without it, results would be silently wrong."""
    refused = None
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    has_window = window and config.get("use_sliding_window", True)
    kinds = set(config.get("layer_types") or ["sliding_attention" if has_window else "full_attention"])
    if window and window >= positions:
        kinds.discard("sliding_attention")  # A window as large as the trained context has no effect.
    kinds.discard("full_attention")
    if kinds:
        refused = f"layers of type {sorted(kinds)} ({window=} of {positions} positions)"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refused = f"the activation {config['hidden_act']!r}"
    if any(config.get(key) for key in _EXPERTS):
        refused = "a mixture of experts"
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        refused = f"weights quantized by {method!r}; GGUF files are dequantized, other formats are not read"
    if refused:
        raise NotImplementedError(f"{config['model_type']}: this model uses {refused}, which is not supported")


def _rope_from_hf(config: Mapping[str, Any]) -> Rope:
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    # Before transformers 5, configurations had these outside the scaling.
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            parameters.setdefault(key, config[key])
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    if name not in ROPES:
        raise NotImplementedError(f"RoPE scaling {name!r} is not supported; supported are {', '.join(ROPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(f"partial RoPE is not supported, got {parameters['partial_rotary_factor']=}")
    if name in ("llama3", "yarn"):
        parameters.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    rope = {key: value for key, value in parameters.items() if value is not None}
    if name == "yarn" and "factor" not in rope:
        rope["factor"] = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
    rope["theta"] = float(rope.pop("rope_theta", 10000.0))
    known = {field.name for field in fields(ROPES[name])}
    return ROPES[name](**{key: value for key, value in rope.items() if key in known})


_LLAMA3 = ModelConfig("llama", 128256, 32, 4096, 32, 8, 128, 14336, 8192, Rope(500000.0), eos_ids=(128001, 128009))
_LLAMA31_ROPE = Llama3Rope(500000.0, factor=8.0)

# Shapes of well-known models, for plans and for benchmarks with random weights.
PRESETS: dict[str, ModelConfig] = {
    "llama-2-7b": ModelConfig("llama", 32000, 32, 4096, 32, 32, 128, 11008, 4096, eos_ids=(2,)),
    "llama-3-8b": _LLAMA3,
    "llama-3-70b": replace(_LLAMA3, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28672),
    "llama-3.1-8b": replace(_LLAMA3, rope=_LLAMA31_ROPE, max_positions=131072),
    "llama-3.1-70b": replace(
        _LLAMA3, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28672, rope=_LLAMA31_ROPE, max_positions=131072
    ),
    "mistral-7b": ModelConfig("mistral", 32768, 32, 4096, 32, 8, 128, 14336, 32768, Rope(1e6), eos_ids=(2,)),
    "qwen2.5-7b": ModelConfig(
        "qwen2", 152064, 28, 3584, 28, 4, 128, 18944, 32768, Rope(1e6), 1e-6, qkv_bias=True, eos_ids=(151645,)
    ),
    "qwen3-8b": ModelConfig(
        "qwen3", 151936, 36, 4096, 32, 8, 128, 12288, 40960, Rope(1e6), 1e-6, qk_norm=True, eos_ids=(151645,)
    ),
    "smollm2-135m": ModelConfig(
        "llama", 49152, 30, 576, 9, 3, 64, 1536, 8192, Rope(100000.0), tied_head=True, eos_ids=(2,)
    ),
}
