"""The weight table: which checkpoint tensors make each parameter of the decoder. Names are Hugging Face's.

Every supported family uses the same names, but for norms. Parts that a configuration lacks (biases, q/k-norm, a head)
have no row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from duo_jax.arrays import first_names
from duo_jax.config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """A parameter's source: tensors joined along their first axis, then transposed if the parameter is a kernel.

    Checkpoints store kernels `[out, in]`, this decoder `[in, out]`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_kernel: bool = False


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
    qkv, out = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)
    gate_up, down = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
    # Path in a layer, checkpoint modules joined in it, their output sizes, their input size, whether they have a bias.
    linears: list[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], int, bool]] = [
        (("attention", "qkv"), qkv, (q, kv, kv), dim, config.qkv_bias),
        (("attention", "out"), out, (dim,), q, config.out_bias),
        (("mlp", "gate_up"), gate_up, (mlp, mlp), dim, config.mlp_bias),
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
        for path, modules, sizes, width, has_bias in linears:
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


def linear_maps(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The modules in layers whose kernels `weight_dtype` quantizes, each with its shape `[out, in]`."""
    kernels = (weight for path, weight in weight_table(config).items() if weight.is_kernel and path[0] == "layers")
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for weight in kernels
        for name, shape in zip(weight.names, weight.shapes, strict=True)
    }


def ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors in checkpoints that are not needed: stored RoPE frequencies, a second copy of a tied head.

    The loader has compared that copy with the embeddings.
    """
    return name.endswith("rotary_emb.inv_freq") or (config.tied_head and name == "lm_head.weight")


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[tuple[str | int, ...], Weight],
    config: ModelConfig,
    *,
    label: str,
) -> None:
    """Raise ValueError with every tensor that is missing, extra or misshapen."""
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
