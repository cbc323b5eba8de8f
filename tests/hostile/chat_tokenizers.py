"""Tokenizers with chat templates, of every kind that joins text with what comes before it."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.shapes import GOLDEN

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHARACTERS = [chr(code) for code in range(32, 127)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁T", "he", "▁▁", "▁the", "▁a", "th", "▁t", "ab", "aba", "▁[", "ST"]
MERGES = ["▁ T", "h e", "▁ ▁", "t h", "▁ t", "▁t he", "▁ a", "a b", "ab a", "▁ [", "S T"]


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A Llama-like BPE over characters, spaces as ▁, with bytes for unknown characters."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *CHARACTERS, *BYTES, *PIECES]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(
        models.BPE(
            vocab, [tuple(merge.split()) for merge in MERGES], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(undo)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def byte_level() -> PreTrainedTokenizerFast:
    """SmolLM2's."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "smollm2" / "tokenizer.json"), eos_token="<|im_end|>", chat_template=CHATML
    )


MAKERS = {
    "prepend": lambda: sentencepiece("prepend"),
    "metaspace-first": lambda: sentencepiece("first"),
    "metaspace-always": lambda: sentencepiece("always"),
    "byte-level": byte_level,
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Each tokenizer, made once."""
    return MAKERS[name]()
