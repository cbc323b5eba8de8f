"""ModelConfig: everything that decides a decoder's shape and arithmetic. Frozen, so that it is static under jit.

What its fields may be is in `config_checks`, which of them a family of models sets in `families`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from duo_jax.model.config_checks import MOST_EXPERTS, check_together, checked_fields
from duo_jax.model.precision import ALLOWED, AnyDtype, Precision, check_name
from duo_jax.model.rope import Rope
from duo_jax.model.weights import WEIGHT_FORMATS
from pallas_kernels.window import Window


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
        for name, value in checked_fields(self).items():
            object.__setattr__(self, name, value)
        check_together(self)

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
        from duo_jax.families.hugging_face import from_standard, standard  # It needs this class.

        return from_standard(standard(config))

    @property
    def trained_positions(self) -> int:
        """Tokens of context that the model was trained for."""
        return self.rope.trained_positions(self.max_positions)


def added_fields() -> tuple[str, ...]:
    """Fields that earlier versions did not write: what they wrote means the defaults."""
    names = [field.name for field in fields(ModelConfig)]
    return tuple(names[names.index("layer_windows") :])
