"""The table of architectures that are read from GGUF files: a family, and where llama.cpp's files of it differ.

A row is added only for an architecture of llama.cpp with this name. Knows no files or weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# GGUF's name -> Hugging Face's, for whole-model tensors and for the modules of a layer.
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Norms before and after attention and MLP.
POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class WindowLayers:
    """What llama.cpp assumes of layers with a window where the file has no key for it.

    Attributes:
        period: the last of so many layers has full attention, the others a window.
        theta: of RoPE in layers with a window, which is not scaled.
    """

    period: int
    theta: float


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        family: a name in `duo_jax.families.table.FAMILIES`.
        modules: GGUF's names of the modules of a layer -> Hugging Face's.
        activation: of the MLP, by transformers' name; it is not in the file.
        paired_rope: rows of q and k are stored for RoPE on adjacent pairs (2i, 2i + 1) instead of halves.
        norms_plus_one: norms are stored with 1 added, where Hugging Face's model adds it.
        windows: the layers with a window; None: llama.cpp gives all layers full attention.
        wide_query_layers: number of layers of the models that divide scores by the square root of
            `embedding_length / head_count` instead of the head dimension's.
    """

    family: str
    modules: Mapping[str, str] = field(default_factory=lambda: LAYER_MODULES)
    activation: str = "silu"
    paired_rope: bool = False
    norms_plus_one: bool = False
    windows: WindowLayers | None = None
    wide_query_layers: int | None = None

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of a tensor; a name that is not in the table is returned, for the loader to report."""
        match name.split("."):
            case ["blk", index, module, kind] if module in self.modules:
                return f"model.layers.{index}.{self.modules[module]}.{kind}"
        return MODEL_TENSORS.get(name, name)


# llama.cpp's names.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", paired_rope=True),
    "mistral": Architecture("mistral"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3": Architecture(
        "gemma3_text",
        modules=LAYER_MODULES | POST_NORMS,
        activation="gelu_pytorch_tanh",
        norms_plus_one=True,
        windows=WindowLayers(period=6, theta=10000.0),
        wide_query_layers=62,  # Gemma 3 27B
    ),
}
