"""ModelConfig: everything that decides a decoder's shape and arithmetic. Frozen, so that it is static under jit.

A family of models is a row of `FAMILIES` here and a weight table in `checkpoint`; features outside the row are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import jax

from duo_jax.arguments import MOST_TOKENS, instance, real_number, true_or_false, whole_number
from duo_jax.precision import ALLOWED, AnyDtype, Precision, check_name
from duo_jax.rope import LinearRope, Llama3Rope, Rope, YarnRope
from duo_jax.weights import EMBED_FORMATS, WEIGHT_FORMATS, check_format
from pallas_kernels.window import Window

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


# The linear maps that a layer may have.
LINEAR_MAPS = "qkv", "out", "gate_up", "down", "expert_gate_up", "expert_down"
# What a decoder may multiply or divide by, above 0.
SCALES = "embed_scale", "query_scale", "residual_scale", "logits_divisor"
# The activations that an MLP may have, by transformers' names.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and a gated MLP.

    `dtype` is the data type of activations and of all weights that are not quantized. `weight_dtype`, a name in
    `weights.WEIGHT_FORMATS`, quantizes the linear maps of the layers, but not the names of `LINEAR_MAPS` in
    `unquantized`; `embed_dtype` quantizes embeddings and head.

    `layer_windows` has an entry for each layer: the number of most recent tokens that all of its heads see, the query's
    own included, or None for full attention. It is empty if every layer has full attention. Only in layers with full
    attention does a pattern choose heads. Layers with a window have `window_rope`, or `rope` like the others; those of
    `no_rope_layers` have none. RoPE turns the first `rotary_dim` channels of a head; None: all.

    `embed_scale` multiplies embeddings, `query_scale` queries, in addition to `1 / sqrt(head_dim)`, and so does, at
    position p, `1 + query_log_scale * log(1 + p // query_log_positions)`. `residual_scale` multiplies what attention
    and MLP add, and `logits_divisor` divides logits. Scores of attention are capped to `score_cap * tanh(s /
    score_cap)`, logits in the same way by `logits_cap`.

    With `norm_offset`, norms multiply by 1 more than their weights. `pre_norms` are norms of the inputs of attention
    and MLP, `post_norms` of their outputs. With `qk_norm`, each query and key has a norm; with `wide_qk_norm`,
    all heads together.

    With `sink_logits`, every query head has a learned sink: the score of a key without a value, one more term of the
    softmax's denominator.

    With `num_experts`, the layers outside of `dense_layers` have a mixture of experts, each an MLP of `expert_dim`
    channels, instead of an MLP of `mlp_dim`. A router chooses `experts_per_token` of them for each token and weights
    their outputs by probability, which `normalize_experts` divides by the sum over the chosen ones. With `expert_bias`,
    router and experts have biases.

    With `swiglu_limit`, gated MLPs are gpt-oss's: gate and up are clamped to it, the activation is
    `x * sigmoid(swiglu_alpha * x)`, and 1 is added to up.
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
    layer_windows: tuple[int | None, ...] = ()
    window_rope: Rope | None = None
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float = 1.0
    norm_offset: bool = False
    post_norms: bool = False
    no_rope_layers: tuple[int, ...] = ()
    sink_logits: bool = False
    pre_norms: bool = True
    wide_qk_norm: bool = False
    query_log_scale: float = 0.0
    query_log_positions: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    expert_bias: bool = False
    normalize_experts: bool = False
    dense_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.702
    score_cap: float | None = None
    logits_cap: float | None = None
    unquantized: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the type and range of every field, and that a decoder can have these shapes."""
        values: dict[str, Any] = {name: whole_number(name, getattr(self, name), 1, most) for name, most in MOST.items()}
        flags: tuple[str, ...] = "tied_head", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "norm_offset", "post_norms"
        flags = *flags, "sink_logits", "pre_norms", "wide_qk_norm", "expert_bias", "normalize_experts"
        values |= {name: true_or_false(name, getattr(self, name)) for name in flags}
        values |= self._checked_experts()
        values["norm_eps"] = real_number("norm_eps", self.norm_eps, 0, 1)
        values |= {name: real_number(name, getattr(self, name), 0, 1e6) for name in ("swiglu_limit", "swiglu_alpha")}
        values |= {name: real_number(name, getattr(self, name), 1e-6, 1e6) for name in SCALES}
        for name in ("score_cap", "logits_cap"):
            values[name] = None if (cap := getattr(self, name)) is None else real_number(name, cap, 1e-6, 1e6)
        values["query_log_scale"] = real_number("query_log_scale", self.query_log_scale, 0, 1e6)
        if self.query_log_scale:
            most = MOST["max_positions"]
            values["query_log_positions"] = whole_number("query_log_positions", self.query_log_positions, 1, most)
        values["activation"] = check_name("activation", self.activation, tuple(ACTIVATIONS))
        values["dtype"] = check_name("dtype", self.dtype, ALLOWED["dtype"])
        values["layer_windows"] = self._checked_windows()
        last = self.num_layers - 1
        numbers = {whole_number("a layer of no_rope_layers", layer, 0, last) for layer in self.no_rope_layers}
        values["no_rope_layers"] = tuple(sorted(numbers))
        values["eos_ids"] = tuple(whole_number("an EOS id", token, 0, self.vocab_size - 1) for token in self.eos_ids)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        instance("rope", self.rope, Rope)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads=}, {self.num_kv_heads=}"
            )
        if self.rotary_dim is not None:
            whole_number("rotary_dim", self.rotary_dim, 2, self.head_dim)
        if self.rope_dim % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"{name} must be even for RoPE, got {self.rope_dim}")
        self.rope.check(self.rope_dim)
        if self.window_rope is not None:
            instance("window_rope", self.window_rope, Rope).check(self.rope_dim)
        kept = tuple(check_name("unquantized", name, LINEAR_MAPS) for name in self.unquantized)
        object.__setattr__(self, "unquantized", () if self.weight_dtype is None else kept)
        if self.weight_dtype is not None:
            widths = self.map_widths
            check_format("weight_dtype", self.weight_dtype, WEIGHT_FORMATS, *(widths[name] for name in widths))
            if WEIGHT_FORMATS[self.weight_dtype].only_experts and not self.num_experts:
                raise ValueError(
                    f"{self.weight_dtype} is for the experts of a mixture, and this model has none: choose another "
                    "weight_dtype"
                )
        if self.embed_dtype is not None:
            check_format("embed_dtype", self.embed_dtype, EMBED_FORMATS, self.embed_dim)

    def _checked_windows(self) -> tuple[int | None, ...]:
        windows = tuple(self.layer_windows)
        if windows and len(windows) != self.num_layers:
            raise ValueError(f"layer_windows has one entry for each of {self.num_layers} layers, got {len(windows)}")
        most = MOST["max_positions"]
        checked = tuple(w if w is None else whole_number("a window of layer_windows", w, 1, most) for w in windows)
        return checked if any(checked) else ()

    def _checked_experts(self) -> dict[str, Any]:
        layers = tuple(self.dense_layers)
        if not self.num_experts:
            if layers or self.experts_per_token or self.expert_dim:
                raise ValueError(
                    "num_experts is 0, so that experts_per_token and expert_dim must be 0 and dense_layers empty, got "
                    f"{self.experts_per_token=}, {self.expert_dim=}, {self.dense_layers=}"
                )
            return {"dense_layers": ()}
        values: dict[str, Any] = {
            name: whole_number(name, getattr(self, name), 1, most) for name, most in MOST_EXPERTS.items()
        }
        if values["experts_per_token"] > values["num_experts"]:
            raise ValueError(
                "experts_per_token must be at most num_experts, got "
                f"{self.experts_per_token=} (num_experts_per_tok) and {self.num_experts=}"
            )
        last = self.num_layers - 1
        numbers = sorted({whole_number("a layer of dense_layers", layer, 0, last) for layer in layers})
        if len(numbers) == self.num_layers:
            raise ValueError(f"dense_layers has all {self.num_layers} layers: then num_experts must be 0")
        return values | {"dense_layers": tuple(numbers)}

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts instead of one MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def mlp_dims(self) -> tuple[int, ...]:
        """Channels of the kinds of MLPs that layers have: of a single one, of an expert."""
        is_dense = not self.num_experts or self.dense_layers
        return (self.mlp_dim,) * bool(is_dense) + (self.expert_dim,) * bool(self.num_experts)

    @property
    def map_widths(self) -> dict[str, int]:
        """Input channels of the quantized linear maps of layers."""
        widths = {"qkv": self.embed_dim, "out": self.num_heads * self.head_dim}
        if not self.num_experts or self.dense_layers:
            widths |= {"gate_up": self.embed_dim, "down": self.mlp_dim}
        if self.num_experts:
            widths |= {"expert_gate_up": self.embed_dim, "expert_down": self.expert_dim}
        return {name: width for name, width in widths.items() if name not in self.unquantized}

    def map_dtype(self, name: str) -> str | None:
        """The format of a linear map of `LINEAR_MAPS`; None: it is not quantized."""
        if self.weight_dtype is None or name in self.unquantized:
            return None
        is_expert = name.startswith("expert_")
        return self.weight_dtype if is_expert or not WEIGHT_FORMATS[self.weight_dtype].only_experts else None

    def window(self, layer: int) -> Window | None:
        """What all heads of a layer see; None: it has full attention, and a pattern chooses among its heads."""
        size = self.layer_windows[layer] if self.layer_windows else None
        return None if size is None else Window(0, size)

    def layer_rope(self, layer: int, context: int | None = None) -> Rope | None:
        """How a layer turns queries and keys in a context of up to so many tokens, see `rope_at`; None: it does not."""
        if layer in self.no_rope_layers:
            return None
        own = None if self.window(layer) is None else self.window_rope
        return self.rope_at(context) if own is None else own

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def only_rope(self) -> Rope:
        """RoPE of the layers with full attention, for methods that turn keys by other angles than the model.

        Raises:
            NotImplementedError: these layers have different ones, or contexts have.
        """
        self.rope_at(None)
        if self.no_rope_layers:
            raise NotImplementedError(
                f"layers {list(self.no_rope_layers)!s:.60} of this {self.family} model have no RoPE, and this method "
                "turns the keys of all layers: choose another one"
            )
        return self.rope

    def rope_at(self, context: int | None) -> Rope:
        """RoPE for a context of up to so many tokens; None: a caller that does not know how many.

        Raises:
            NotImplementedError: it depends on the context, which the caller does not know.
        """
        if context is None and self.rope.depends_on_context:
            raise NotImplementedError(
                f"RoPE of this {self.family} model depends on the most tokens of a context ({self.rope.type}), which "
                "this method does not know: choose another one"
            )
        return self.rope if context is None else self.rope.at(context)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers with full attention: those in which a pattern chooses heads."""
        return tuple(layer for layer in range(self.num_layers) if self.window(layer) is None)

    @property
    def window_layers(self) -> tuple[int, ...]:
        """Layers with a window of their own."""
        return tuple(layer for layer, size in enumerate(self.layer_windows) if size is not None)

    @property
    def own_windows(self) -> tuple[Window, ...]:
        """The distinct windows of layers, in the order of their first layer."""
        return tuple(dict.fromkeys(Window(0, size) for size in self.layer_windows if size is not None))

    def room(self, tokens: int) -> int:
        """The `max_length` of a cache for so many tokens: no less than the widest window of a layer."""
        return max([tokens, *(window.size for window in self.own_windows)])

    def first_layers(self, count: int) -> "ModelConfig":
        """The configuration of this model's first layers."""
        return self.of_layers(*range(count))

    def of_layers(self, *layers: int) -> "ModelConfig":
        """The configuration of a model of these layers of this one; a layer may be there several times."""

        def numbers(listed: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(number for number, layer in enumerate(layers) if layer in listed)

        changes: dict[str, Any] = {"no_rope_layers": numbers(self.no_rope_layers)}
        changes["layer_windows"] = tuple(self.layer_windows[layer] for layer in layers) if self.layer_windows else ()
        changes["dense_layers"] = numbers(self.dense_layers)
        if len(changes["dense_layers"]) == len(layers):
            changes |= {"dense_layers": (), **dict.fromkeys(MOST_EXPERTS, 0)}
        return replace(self, num_layers=len(layers), **changes)

    def to_json(self) -> dict[str, Any]:
        """All fields, as earlier versions wrote them where none is set that they did not have."""
        ropes = {name: rope for name in ("rope", "window_rope") if (rope := getattr(self, name)) is not None}
        values = asdict(self) | {name: {"type": rope.type, **asdict(rope)} for name, rope in ropes.items()}
        defaults = {field.name: field.default for field in fields(self) if field.name in added_fields()}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

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
        if changes.get("weight_dtype", self.weight_dtype) != self.weight_dtype:
            changes["unquantized"] = ()
        return replace(self, **changes)

    def precision(self, *, kv_dtype: AnyDtype | None = None, streaming_dtype: AnyDtype | None = None) -> Precision:
        """The model's data types, together with those of its KV cache."""
        return Precision(self.dtype, self.weight_dtype, self.embed_dtype, kv_dtype, streaming_dtype)

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return self._parameters(self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Number of weights that a token is computed with: of a mixture of experts, those of the chosen ones."""
        return self._parameters(self.experts_per_token)

    def _parameters(self, experts: int) -> int:
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        normed = self.num_heads + self.num_kv_heads if self.wide_qk_norm else 2
        norms = 2 * (self.pre_norms + self.post_norms) * self.embed_dim + normed * self.head_dim * self.qk_norm
        sinks = self.num_heads * self.sink_logits
        biases = self.qkv_bias * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases += self.out_bias * self.embed_dim
        mlp = 3 * self.embed_dim * self.mlp_dim + self.mlp_bias * (2 * self.mlp_dim + self.embed_dim)
        expert = 3 * self.embed_dim * self.expert_dim + self.expert_bias * (2 * self.expert_dim + self.embed_dim)
        router = self.num_experts * (self.embed_dim + self.expert_bias)
        mixtures = sum(self.has_experts(layer) for layer in range(self.num_layers))
        mlps = (self.num_layers - mixtures) * mlp + mixtures * (router + experts * expert)
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tied_head else 2)
        return self.num_layers * (attention + norms + biases + sinks) + mlps + embeddings + self.embed_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Convert a Hugging Face configuration: `AutoConfig.from_pretrained(path).to_dict()`, or config.json.

        Raises:
            NotImplementedError: an architecture or a feature that this decoder does not have, by name.
            ValueError: a value of a wrong type or range, or a configuration that contradicts itself.
        """
        from duo_jax.hf_config import standard

        return from_standard(standard(config))

    @property
    def trained_positions(self) -> int:
        """Tokens of context that the model was trained for."""
        return self.rope.trained_positions(self.max_positions)


def added_fields() -> tuple[str, ...]:
    """Fields that earlier versions did not write: what they wrote means the defaults."""
    names = [field.name for field in fields(ModelConfig)]
    return tuple(names[names.index("layer_windows") :])


def from_standard(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration with the values of `hf_config.standard`."""
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

_GEMMA3 = ModelConfig(
    *("gemma3_text", 262208, 62, 5376, 32, 16, 128, 21504, 131072),
    rope=LinearRope(1e6, factor=8.0),
    norm_eps=1e-6,
    tied_head=True,
    qk_norm=True,
    eos_ids=(1, 106),
    layer_windows=((1024,) * 5 + (None,)) * 10 + (1024, 1024),
    window_rope=Rope(1e4),
    activation="gelu_pytorch_tanh",
    embed_scale=5376**0.5,
    query_scale=(128 / 168) ** 0.5,
    norm_offset=True,
    post_norms=True,
)
_GPT_OSS = ModelConfig(
    *("gpt_oss", 201088, 36, 2880, 64, 8, 64, 2880, 131072),
    rope=YarnRope(150000.0, factor=32.0, original_max_position_embeddings=4096, truncate=False),
    qkv_bias=True,
    out_bias=True,
    eos_ids=(200002, 199999, 200012),
    layer_windows=(128, None) * 18,
    sink_logits=True,
    num_experts=128,
    experts_per_token=4,
    expert_dim=2880,
    expert_bias=True,
    normalize_experts=True,
    swiglu_limit=7.0,
)
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
    "qwen3-30b-a3b": ModelConfig(
        *("qwen3_moe", 151936, 48, 2048, 32, 4, 128, 6144, 40960, Rope(1e6), 1e-6),
        qk_norm=True,
        eos_ids=(151645,),
        num_experts=128,
        experts_per_token=8,
        expert_dim=768,
        normalize_experts=True,
    ),
    "mixtral-8x7b": ModelConfig(
        *("mixtral", 32000, 32, 4096, 32, 8, 128, 14336, 32768, Rope(1e6)),
        eos_ids=(2,),
        num_experts=8,
        experts_per_token=2,
        expert_dim=14336,
        normalize_experts=True,
    ),
    "gpt-oss-20b": replace(_GPT_OSS, num_layers=24, layer_windows=(128, None) * 12, num_experts=32),
    "gpt-oss-120b": _GPT_OSS,
    "gemma-3-270m": replace(
        _GEMMA3,
        vocab_size=262144,
        num_layers=18,
        embed_dim=640,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=2048,
        max_positions=32768,
        rope=Rope(1e6),
        eos_ids=(1,),  # The base model's; the instruction-tuned one ends a turn with 106.
        layer_windows=((512,) * 5 + (None,)) * 3,
        embed_scale=640**0.5,
        query_scale=1.0,
    ),
    "gemma-3-27b": _GEMMA3,
    "smollm2-135m": ModelConfig(
        "llama", 49152, 30, 576, 9, 3, 64, 1536, 8192, Rope(100000.0), tied_head=True, eos_ids=(2,)
    ),
}
