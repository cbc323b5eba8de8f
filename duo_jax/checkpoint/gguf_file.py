"""A GGUF file: configuration, tokenizer and quantized weights in one, read as a checkpoint with Hugging Face names."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from transformers import PreTrainedTokenizerBase

from duo_jax.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from duo_jax.checkpoint.source import Source
from duo_jax.config import FAMILIES, ModelConfig
from duo_jax.rope import DividedRope

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
# Architectures whose q and k rows are stored for RoPE on adjacent pairs (2i, 2i + 1) instead of halves.
PAIRED_ROPE = ("llama",)
ROPE_DIVISORS = "rope_freqs.weight"


class GgufFile(Source):
    """See `Source`. Weights are dequantized tensor by tensor as they are read."""

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            # For a truncated file the reader only passes on numpy's error about the memory map.
            raise ValueError(f"{path} is truncated or not a GGUF file ({error}); download it again") from None
        self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        size = path.stat().st_size
        cut = [tensor.name for tensor in self._reader.tensors if tensor.data_offset + tensor.n_bytes > size]
        if cut:
            raise ValueError(f"{path} is truncated: {cut[0]} ends beyond its {size} bytes; download it again")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The file's key-value pairs as plain Python values."""
        return {name: field.contents() for name, field in self._reader.fields.items()}

    @cached_property
    def config(self) -> ModelConfig:
        """From the metadata, with the rules for a Hugging Face configuration."""
        arch = self.metadata.get("general.architecture")

        def get(key: str, default: Any = None) -> Any:
            return self.metadata.get(f"{arch}.{key}", default)

        if arch not in FAMILIES:
            raise NotImplementedError(
                f"{self.path}: architecture {arch!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
        missing = [f"{arch}.{key}" for key in required if get(key) is None]
        if missing:
            raise ValueError(f"{self.path} has no {', '.join(missing)}: it does not contain a language model")
        if "model.embed_tokens.weight" not in self._tensors:
            raise ValueError(f"{self.path} has no token_embd.weight; a GGUF model in several files is not supported")
        heads, scaling = get("attention.head_count"), get("rope.scaling.type", "none")
        head_dim = get("attention.key_length") or get("embedding_length") // heads
        eos = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        config = ModelConfig.from_hf(
            {
                "model_type": arch,
                "vocab_size": self.shapes["model.embed_tokens.weight"][0],
                "num_hidden_layers": get("block_count"),
                "hidden_size": get("embedding_length"),
                "intermediate_size": get("feed_forward_length"),
                "num_attention_heads": heads,
                "num_key_value_heads": get("attention.head_count_kv", heads),
                "head_dim": head_dim,
                "max_position_embeddings": get("context_length"),
                "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
                "sliding_window": get("attention.sliding_window"),
                "num_experts": get("expert_count"),
                "tie_word_embeddings": "lm_head.weight" not in self._tensors,
                "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
                "mlp_bias": "model.layers.0.mlp.down_proj.bias" in self._tensors,
                "rope_parameters": {
                    "rope_theta": get("rope.freq_base", 10000.0),
                    "rope_type": "default" if scaling == "none" else scaling,
                    "factor": get("rope.scaling.factor"),
                    "original_max_position_embeddings": get("rope.scaling.original_context_length"),
                    "beta_fast": get("rope.scaling.yarn_beta_fast"),
                    "beta_slow": get("rope.scaling.yarn_beta_slow"),
                    "partial_rotary_factor": get("rope.dimension_count", head_dim) / head_dim,
                },
                "eos_token_id": [token for token in dict.fromkeys(eos) if token is not None],
                "dtype": "bfloat16",
            }
        )
        unread = [key for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier")]
        unread = [key for key in unread if scaling == "yarn" and get(f"rope.scaling.{key}") is not None]
        if unread or (ROPE_DIVISORS in self._tensors and scaling != "none"):
            what = ", ".join(f"rope.scaling.{key}" for key in unread) or f"{ROPE_DIVISORS} with {scaling} scaling"
            raise NotImplementedError(f"{self.path}: {what} is not supported")
        if ROPE_DIVISORS in self._tensors:
            divisors = tuple(float(x) for x in self.read(ROPE_DIVISORS))
            config = replace(config, rope=DividedRope(config.rope.theta, divisors=divisors))
        return config

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """In Hugging Face's order of axes: GGUF lists the fastest first. Unsupported quantizations are refused here."""
        for kind, tensor in {tensor.tensor_type: tensor for tensor in self._tensors.values()}.items():
            try:
                dequantize(tensor.data[:1], kind)
            except NotImplementedError:
                raise NotImplementedError(
                    f"{self.path}: {tensor.name} is {kind.name}, which gguf cannot dequantize"
                ) from None
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Dequantize one tensor, and put q and k rows in Hugging Face's order."""
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if self.metadata["general.architecture"] in PAIRED_ROPE and (".q_proj." in name or ".k_proj." in name):
            # The decoder has the rows of a head as (half, pair), the file as (pair, half).
            pairs = values.reshape(-1, self.config.head_dim // 2, 2, *values.shape[1:])
            return pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """From the metadata."""
        return tokenizer_from_gguf(self.metadata)


def _hf_name(name: str) -> str:
    match name.split("."):
        case ["blk", index, module, kind] if module in LAYER_MODULES:
            return f"model.layers.{index}.{LAYER_MODULES[module]}.{kind}"
    return MODEL_TENSORS.get(name, name)  # The loader reports unknown names.
