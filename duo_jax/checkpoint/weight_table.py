"""The weight table: which checkpoint tensors make each parameter of the decoder. Names are Hugging Face's.

Every supported family uses the same names, but for norms and experts. Parts that a configuration lacks (biases,
q/k-norm, a head) have no row.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from duo_jax.arrays import first_names
from duo_jax.model.config import ModelConfig

# Families whose checkpoints store queries, keys and values in one tensor, and gate and up projections.
FUSED = {"phi3"}


@dataclass(frozen=True)
class Weight:
    """A parameter's source: tensors joined along their first axis, then transposed if the parameter is a kernel.

    Checkpoints store kernels `[out, in]`, this decoder `[in, out]`. A parameter with `experts` has a new first axis:
    the tensors of its first expert come first, and each expert's make one matrix. Or one tensor `is_stacked`: it has
    all experts along that axis, and kernels `[in, out]`. Where `alternates`, its last axis has a channel of the gate
    and one of up in turn.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_kernel: bool = False
    experts: int | None = None
    is_quantizable: bool = True
    is_stacked: bool = False
    alternates: bool = False

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """The tensors that are joined: of each expert, or of the whole parameter."""
        count = self.experts or 1
        each = len(self.names) // count
        return [self.names[number * each : (number + 1) * each] for number in range(count)]


EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")
# The modules of a mixture of experts in a layer: what has it, and an expert's gate, up and down projections.
EXPERT_MODULES = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}


def weight_table(config: ModelConfig) -> dict[tuple[str | int, ...], Weight]:
    """Parameter path in the decoder -> the source of its values."""
    dim, vocab, mlp = config.embed_dim, config.vocab_size, config.mlp_dim
    q, kv, head = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.head_dim
    table: dict[tuple[str | int, ...], Weight] = {
        ("embed", "embedding"): Weight(("model.embed_tokens.weight",), ((vocab, dim),)),
        ("norm", "scale"): Weight(("model.norm.weight",), ((dim,),)),
    }
    if not config.tied_head:
        table["head", "kernel"] = Weight(("lm_head.weight",), ((vocab, dim),), is_kernel=True)
    out, down = ("self_attn.o_proj",), ("mlp.down_proj",)
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    qkv_sizes: tuple[int, ...] = (q, kv, kv)
    gate_up_sizes: tuple[int, ...] = (mlp, mlp)
    if config.family in FUSED:
        qkv, qkv_sizes = ("self_attn.qkv_proj",), (q + 2 * kv,)
        gate_up, gate_up_sizes = ("mlp.gate_up_proj",), (2 * mlp,)
    # Path in a layer, checkpoint modules joined in it, their output sizes, their input size, whether they have a bias.
    linears: list[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], int, bool]] = [
        (("attention", "qkv"), qkv, qkv_sizes, dim, config.qkv_bias),
        (("attention", "out"), out, (dim,), q, config.out_bias),
    ]
    mlps: list[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], int, bool]] = [
        (("mlp", "gate_up"), gate_up, gate_up_sizes, dim, config.mlp_bias),
        (("mlp", "down"), down, (dim,), mlp, config.mlp_bias),
    ]
    norms: list[tuple[tuple[str, ...], str, int]] = [
        (("attention_norm",), "input_layernorm", dim),
        (("mlp_norm",), "post_attention_layernorm", dim),
    ]
    if config.post_norms:
        norms[1:] = [
            (("attention_post_norm",), "post_attention_layernorm", dim),
            (("mlp_norm",), "pre_feedforward_layernorm", dim),
            (("mlp_post_norm",), "post_feedforward_layernorm", dim),
        ]
    if not config.pre_norms:
        norms = [norm for norm in norms if norm[0] not in (("attention_norm",), ("mlp_norm",))]
    if config.qk_norm:
        widths = (q, kv) if config.wide_qk_norm else (head, head)
        norms += [
            (("attention", f"{x}_norm"), f"self_attn.{x}_norm", width) for x, width in zip("qk", widths, strict=True)
        ]
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        if config.has_experts(index):
            table |= {("layers", index, "mlp", *path): weight for path, weight in _experts(config, prefix).items()}
        for path, modules, sizes, width, has_bias in linears + mlps * (not config.has_experts(index)):
            kernels = tuple(f"{prefix}{module}.weight" for module in modules)
            shapes = tuple((size, width) for size in sizes)
            table["layers", index, *path, "kernel"] = Weight(kernels, shapes, is_kernel=True)
            if has_bias:
                biases = tuple(f"{prefix}{module}.bias" for module in modules)
                table["layers", index, *path, "bias"] = Weight(biases, tuple((size,) for size in sizes))
        for path, module, size in norms:
            table["layers", index, *path, "scale"] = Weight((f"{prefix}{module}.weight",), ((size,),))
        if config.sink_logits:
            sinks = Weight((f"{prefix}self_attn.sinks",), ((config.num_heads,),))
            table["layers", index, "attention", "sink_logits"] = sinks
    return table


def linear_maps(config: ModelConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """The modules of each linear map that `weight_dtype` may quantize, in all layers, with their shapes `[out, in]`."""
    maps: dict[str, dict[str, tuple[int, int]]] = {}
    for path, weight in weight_table(config).items():
        is_linear = weight.is_kernel and weight.is_quantizable and not weight.is_stacked
        if is_linear and path[0] == "layers":
            modules = {
                name.removesuffix(".weight"): (shape[0], shape[1])
                for name, shape in zip(weight.names, weight.shapes, strict=True)
            }
            maps.setdefault(str(path[-2]), {}).update(modules)
    return maps


def _experts(config: ModelConfig, prefix: str) -> dict[tuple[str, str], Weight]:
    """The parameters of a mixture of experts."""
    if config.family == "gpt_oss":
        return _stacked_experts(config, f"{prefix}mlp.")
    block, gate, up, down = EXPERT_MODULES[config.family]
    dim, width, count = config.embed_dim, config.expert_dim, config.num_experts
    experts = [f"{prefix}{block}.experts.{number}." for number in range(count)]
    gate_up = tuple(f"{expert}{module}.weight" for expert in experts for module in (gate, up))
    downs = tuple(f"{expert}{down}.weight" for expert in experts)
    router = Weight((f"{prefix}{block}.gate.weight",), ((count, dim),), is_kernel=True, is_quantizable=False)
    return {
        ("router", "kernel"): router,
        ("expert_gate_up", "kernel"): Weight(gate_up, ((width, dim),) * (2 * count), is_kernel=True, experts=count),
        ("expert_down", "kernel"): Weight(downs, ((dim, width),) * count, is_kernel=True, experts=count),
    }


def _stacked_experts(config: ModelConfig, prefix: str) -> dict[tuple[str, str], Weight]:
    """As `_experts`, with one tensor for all experts."""
    dim, width, count = config.embed_dim, config.expert_dim, config.num_experts
    table = {
        ("router", "kernel"): Weight(
            (f"{prefix}router.weight",), ((count, dim),), is_kernel=True, is_quantizable=False
        ),
        ("router", "bias"): Weight((f"{prefix}router.bias",), ((count,),)),
    }
    for name, ins, outs, alternates in (("gate_up", dim, 2 * width, True), ("down", width, dim, False)):
        tensor = f"{prefix}experts.{name}_proj"
        settings: dict[str, Any] = {"experts": count, "is_stacked": True, "alternates": alternates}
        table[f"expert_{name}", "kernel"] = Weight((tensor,), ((count, ins, outs),), is_kernel=True, **settings)
        table[f"expert_{name}", "bias"] = Weight((f"{tensor}_bias",), ((count, outs),), **settings)
    return table


def ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors in checkpoints that are not needed: stored RoPE frequencies, a second copy of a tied head.

    The loader has compared that copy with the embeddings.
    """
    return name.endswith("rotary_emb.inv_freq") or (config.tied_head and name == "lm_head.weight")


def check_experts(
    shapes: Mapping[str, tuple[int, ...]], weights: Iterable[Weight], config: ModelConfig, label: str
) -> None:
    """Raise ValueError if the tensors are those of another number of experts."""
    numbers = {int(match[1]) for name in shapes if (match := EXPERT.search(name))}
    stacked = {name for weight in weights if weight.is_stacked for name in weight.names}
    experts = config.num_experts
    others = [f"there are weights of {len(numbers)}"] if numbers and len(numbers) != experts else []
    others += [f"{x} has {shapes[x][0]}" for x in sorted(stacked) if shapes.get(x) and shapes[x][0] != experts]
    if experts and others:
        raise ValueError(
            f"{label}: its configuration has {experts} experts in a layer, its tensors do not: "
            f"{', '.join(others[:3])}{', ...' if others[3:] else ''}"
        )


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[tuple[str | int, ...], Weight],
    config: ModelConfig,
    *,
    label: str,
) -> None:
    """Raise ValueError with every tensor that is missing, extra or misshapen."""
    check_experts(shapes, table.values(), config, label)
    expected = {
        name: shape for weight in table.values() for name, shape in zip(weight.names, weight.shapes, strict=True)
    }
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected and not ignorable(name, config)]
    wrong = [f"{n} {shapes[n]} instead of {expected[n]}" for n in expected if n in shapes and shapes[n] != expected[n]]
    problems = {"missing": missing, "unknown to this architecture": extra, "of the wrong shape": wrong}
    lists = [f"{kind} ({len(names)}): {first_names(names)}" for kind, names in problems.items() if names]
    if lists:
        raise ValueError(f"{label}: the tensors do not match its configuration: {'; '.join(lists)}")
