"""Writes small GGUF files, right or wrong in any place: gguf's own writer refuses to write wrong ones."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFValueType as Kind
from tokenizers import pre_tokenizers

SCALARS = {
    Kind.UINT8: "B",
    Kind.INT8: "b",
    Kind.UINT16: "H",
    Kind.INT16: "h",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.UINT64: "Q",
    Kind.INT64: "q",
    Kind.FLOAT32: "f",
    Kind.FLOAT64: "d",
    Kind.BOOL: "?",
}
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Hi", "<|begin|>", "<|end|>", "<|turn|>"]
DIM, HEADS, HEAD_DIM, MLP, LAYERS, VOCAB = 32, 2, 16, 32, 2, len(TOKENS)


class Array(NamedTuple):
    """A value that is an array; `length` is what the file claims."""

    kind: int
    values: list[Any]
    length: int | None = None


class Raw(NamedTuple):
    """A value of any type code, as bytes."""

    kind: int
    content: bytes


@dataclass
class Tensor:
    """A float32 tensor; what is set differs from what the data is."""

    data: np.ndarray
    kind: int = 0
    shape: tuple[int, ...] | None = None
    offset: int | None = None


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string with the length that the file claims."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def encode(value: Any) -> bytes:
    """Type and value of a key."""
    if isinstance(value, Raw):
        return struct.pack("<I", value.kind) + value.content
    if isinstance(value, Array):
        length = len(value.values) if value.length is None else value.length
        items = [text(x) if value.kind == Kind.STRING else _number(value.kind, x) for x in value.values]
        return struct.pack("<IIQ", Kind.ARRAY, value.kind, length) + b"".join(items)
    kinds = {str: Kind.STRING, bytes: Kind.STRING, bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32}
    kind = Kind.INT64 if isinstance(value, int) and not 0 <= value < 2**32 else kinds[type(value)]
    return struct.pack("<I", kind) + (text(value) if kind == Kind.STRING else _number(kind, value))


def _number(kind: int, value: float) -> bytes:
    return struct.pack(f"<{SCALARS[Kind(kind)]}", value)


def strings(values: list[str]) -> Array:
    """An array of strings."""
    return Array(Kind.STRING, values)


def metadata() -> dict[str, Any]:
    """The keys of a small Llama with a byte-level tokenizer."""
    return {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": DIM,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": strings(TOKENS),
        "tokenizer.ggml.token_type": Array(Kind.INT32, [1] * (VOCAB - 3) + [3] * 3),
        "tokenizer.ggml.merges": strings(["H i"]),
        "tokenizer.ggml.bos_token_id": VOCAB - 3,
        "tokenizer.ggml.eos_token_id": VOCAB - 2,
        "tokenizer.ggml.eot_token_id": VOCAB - 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}",
    }


def tensors() -> dict[str, Tensor]:
    """Random weights of that model."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, DIM), "output_norm": (DIM,), "output": (VOCAB, DIM)}
    for layer in range(LAYERS):
        q, kv = HEADS * HEAD_DIM, HEAD_DIM
        parts = {"attn_q": (q, DIM), "attn_k": (kv, DIM), "attn_v": (kv, DIM), "attn_output": (DIM, q)}
        parts |= {"ffn_gate": (MLP, DIM), "ffn_up": (MLP, DIM), "ffn_down": (DIM, MLP)}
        parts |= {"attn_norm": (DIM,), "ffn_norm": (DIM,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return {f"{name}.weight": Tensor(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def gemma_metadata() -> dict[str, Any]:
    """The keys of a small Gemma 3 with a SentencePiece tokenizer."""
    keys = {key.replace("llama.", "gemma3.", 1): value for key, value in metadata().items()}
    for name in ("pre", "merges"):
        del keys[f"tokenizer.ggml.{name}"]
    return keys | {
        "general.architecture": "gemma3",
        "gemma3.attention.value_length": HEAD_DIM,
        "gemma3.attention.sliding_window": 12,
        "gemma3.attention.sliding_window_pattern": Array(Kind.BOOL, [True, False]),
        "gemma3.rope.freq_base_swa": 5000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": Array(Kind.FLOAT32, [-float(index) for index in range(VOCAB)]),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }


def gemma_tensors() -> dict[str, Tensor]:
    """Random weights of that model, with a tied head."""
    rng, found = np.random.default_rng(1), tensors()
    del found["output.weight"]
    sizes = {"attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM, "post_attention_norm": DIM, "post_ffw_norm": DIM}
    names = {f"blk.{layer}.{name}.weight": size for layer in range(LAYERS) for name, size in sizes.items()}
    return found | {name: Tensor(rng.standard_normal(size, np.float32)) for name, size in names.items()}


@dataclass
class File:
    """A GGUF file; the fields from `magic` on may be wrong."""

    keys: Mapping[str, Any] = field(default_factory=metadata)
    tensors: Mapping[str, Tensor] = field(default_factory=tensors)
    magic: bytes = b"GGUF"
    version: int = 3
    num_keys: int | None = None
    num_tensors: int | None = None
    more: bytes = b""

    def header(self) -> bytes:
        """Everything before the padding and the data."""
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        parts = [self.magic, struct.pack("<IQQ", self.version, num_tensors, num_keys)]
        parts += [text(key.removesuffix(" again")) + encode(value) for key, value in self.keys.items()]
        offset = 0
        for name, tensor in self.tensors.items():
            shape = tensor.data.shape if tensor.shape is None else tensor.shape
            place = offset if tensor.offset is None else tensor.offset
            parts.append(text(name.removesuffix(" again")) + struct.pack("<I", len(shape)))
            parts.append(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), tensor.kind, place))
            offset += -(-tensor.data.nbytes // 32) * 32
        return b"".join(parts)

    def content(self) -> bytes:
        """The file."""
        data = [tensor.data.tobytes() for tensor in self.tensors.values()]
        return b"".join(part + b"\0" * (-len(part) % 32) for part in (self.header(), *data)) + self.more
