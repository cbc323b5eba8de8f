"""Every reader of files, with files that are changed in a few places: what it reads is right, or it refuses by name.

`test_readers` tries a few files with each, `fuzz` as many as fit into a time.
"""

import contextlib
import io
import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
from duo_eval.runner.record import Record
from duo_eval.show.registry import RESULT_TYPES, about, type_of
from duo_eval.show.result_type import readable
from duo_eval.tasks import humaneval, mmlu, mtbench
from duo_eval.tasks.longbench import Task
from duo_eval.tasks.rows import read_rows
from duo_eval.tasks.ruler import qa
from duo_train.metrics import MetricsWriter, read_metrics
from gguf import GGUFValueType as Kind
from hypothesis import strategies as st

from duo_jax import HeadPattern, KVCache, load_model, load_tokenizer
from duo_jax.arrays import Shards
from duo_jax.cache import store
from duo_jax.checkpoint.folder import INDEX, Folder
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.save import save_model
from duo_jax.checkpoint.weight_table import check_tensors, weight_table
from duo_jax.cli import USER_ERRORS
from duo_jax.cli.inspect import Inspect
from duo_jax.families.table import FAMILIES
from duo_jax.finite import json_text
from duo_jax.reading import read_json, read_json_lines, read_text, read_text_pieces
from duo_jax.text.ends import eos_ids_of
from duo_jax.text.reply import Row
from duo_jax.text.template import DocumentFrame, encode_chat, end_of_turn, render
from duo_jax.text.tokens import encode, special_tokens
from pallas_kernels.certify import verdicts
from pallas_kernels.certify.machine import environment
from pallas_kernels.certify.verdicts import Found, Verdict, key_of
from pallas_kernels.tiles import KINDS, DecodeTiles, read_tuned
from pallas_kernels.types import Request
from pallas_kernels.window import Window
from tests.hostile.chat_tokenizers import CHATML, INST, tokenizer_of
from tests.hostile.gguf_bytes import Array, File, Raw, Tensor, gemma_metadata, gemma_tensors, metadata, tensors
from tests.hostile.strategies import changed, damaged, json_bytes, values
from tests.quantized_formats import CASES, write_folder
from tests.shapes import GOLDEN, TINY
from tests.text_models import make_model

RESULTS = Path(__file__).parents[2] / "eval" / "results"
MOST_CHARACTERS = 1000


class Reader(NamedTuple):
    """`prepare` writes the right files into a new folder; `example` changes them there, reads them, and checks."""

    prepare: Callable[[Path], object]
    example: Callable[[st.DataObject, Path], None]


@contextlib.contextmanager
def refusal(*names: str) -> Iterator[None]:
    """The block ends well, or with an error that a command reports: short, in one line, with one of the names."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)  # Arithmetic on numbers that were not checked.
        try:
            yield
        except USER_ERRORS as error:
            message = str(error)
            assert "\n" not in message and len(message) < MOST_CHARACTERS, message
            assert any(name in message for name in names), message


def nothing(folder: Path) -> None:
    """No file is needed."""


# JSON, JSON lines and text.


def _json_example(data: st.DataObject, folder: Path) -> None:
    path = folder / "a.json"
    value = data.draw(values | st.dictionaries(st.text(max_size=3), values))
    content = json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode()
    if data.draw(st.booleans()):
        content = b"\n".join([content] * data.draw(st.integers(1, 3)))
    noise = st.sampled_from([b"{", b"[", b'"', b"\\ud800", b",", b"1e9999", b"NaN", b"9" * 400, b"[" * 5000, b"\r\n"])
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content)))
        content = content[:at] + data.draw(noise) + content[at:]
    path.write_bytes(content if data.draw(st.booleans()) or not content else damaged(data, content))
    for read in (read_json, lambda path: list(read_json_lines(path))):
        with refusal("a.json"):
            json.dumps(read(path), allow_nan=False, ensure_ascii=False).encode()
    with refusal("a.json"):
        assert "\r" not in read_text(path)
        "".join(read_text_pieces(path)).encode()


# Files of results and metrics, and rows of data.

SMALL = [
    "cpu/needle-window.jsonl",
    "cpu/training.json",
    "aot/serving.json",
    "cpu/harness.json",
    "cpu/ruler-window.jsonl",
    "cpu/keys.json",
    "cpu/bench.json",
]


@cache
def _results(name: str) -> list[Any]:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[:4]] if name.endswith("l") else [json.loads(text)]


def _results_example(data: st.DataObject, folder: Path) -> None:
    name = data.draw(st.sampled_from(SMALL))
    rows = changed(data, _results(name))
    path = folder / Path(name).name
    text = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(text if data.draw(st.integers(0, 3)) else damaged(data, text))
    with refusal(path.name), readable(path):
        kind = type_of(path)
        assert kind is None or kind in RESULT_TYPES
        for table in kind.tables.values() if kind else ():
            assert isinstance(table(path), str)
        about(path)
    before = path.read_bytes()
    with refusal(path.name):
        record = Record.open(path, {"task": "test"})
        record.missing([{"method": "duo", "budget": 0.5, "sample": 0}])
    assert path.read_bytes() == before
    metrics = folder / "metrics.jsonl"
    lines = changed(data, [{"step": step, "loss": 1.0} for step in (1, 2, 3)])
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    with refusal("metrics.jsonl"):
        read_metrics(metrics)
        MetricsWriter(metrics, 2)


PROBLEM = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f()\n"}
CHOICES = dict.fromkeys(mmlu.FIELDS, "A")
TURNS = {"question_id": 1, "category": "math", "turns": ["Hello"]}
LONG = {"context": "a", "input": "b", "answers": ["c"]}
ROWS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "humaneval": (humaneval.problems, PROBLEM),
    "mmlu": (lambda path: mmlu.questions(path, shots=0, count=1, seed=0), CHOICES),
    "mtbench": (lambda path: read_rows(path, mtbench.QUESTION_FIELDS, mtbench._wrong, texts=("category",)), TURNS),
    "longbench": (lambda path: Task({"task": path.stem}).rows(path.parent), LONG),
}
SQUAD = {
    "data": [{"paragraphs": [{"context": "a b", "qas": [{"question": "b?", "answers": [{"text": "a"}], "id": "0"}]}]}]
}
HOTPOT = [{"question": "b?", "answer": "a", "context": [["t", ["a b", "c"]]], "_id": "0"}]


def _rows_example(data: st.DataObject, folder: Path) -> None:
    name = data.draw(st.sampled_from(sorted(ROWS)))
    reader, row = ROWS[name]
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(changed(data, row)) + "\n", encoding="utf-8")
    with refusal(f"{name}.jsonl:2: "):
        reader(path)
    style, right = data.draw(st.sampled_from([("squad", SQUAD), ("hotpot", HOTPOT)]))
    (folder / f"{style}.json").write_bytes(json_bytes(data, right))
    with refusal(f"{style}.json"):
        qa.load(folder / f"{style}.json", style)


# GGUF files.

_GGUF_NAMES = [
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"),
    *("attention.sliding_window", "attention.value_length", "vocab_size", "expert_count"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "attention.scale", "logit_scale"),
]
_GGUF_KEYS = [
    *(f"llama.{name}" for name in _GGUF_NAMES),
    *("split.count", "split.no", "split.tensors.count", "general.name", "general.file_type", "x"),
    *(f"tokenizer.ggml.{name}" for name in ("scores", "unknown_token_id", "padding_token_id", "add_bos_token")),
    *(f"tokenizer.ggml.{name}" for name in ("add_eos_token", "add_space_prefix", "eom_token_id", "token_type_count")),
]
_numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 300) | st.floats(width=32) | st.booleans()
_texts = st.sampled_from(["", "llama", "qwen2", "gpt2", "bert", "yarn", "linear", "none", "llama-bpe", "x" * 999])
_arrays = st.builds(
    Array,
    st.sampled_from([Kind.UINT8, Kind.INT32, Kind.FLOAT32]),
    st.lists(st.integers(0, 7), max_size=5),
    st.none() | st.sampled_from([0, 1, 2**20, 2**40, 2**63]),
) | st.builds(Array, st.just(Kind.STRING), st.lists(st.text(max_size=3), max_size=5), st.none() | st.just(2**40))
_raw = st.builds(Raw, st.integers(0, 14), st.binary(max_size=12))


def _element(kind: int) -> st.SearchStrategy[Any]:
    """Values of one kind."""
    if kind == Kind.STRING:
        return st.text(max_size=4)
    name = Kind(kind).name.lower()
    if name.startswith(("int", "uint")):
        limits = np.iinfo(name)
        return st.integers(int(limits.min), int(limits.max))
    return st.booleans() if kind == Kind.BOOL else st.floats(width=32)


def _gguf_file(data: st.DataObject) -> File:
    is_gemma = data.draw(st.booleans())
    keys, parts = (gemma_metadata(), gemma_tensors()) if is_gemma else (metadata(), tensors())
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(keys)) | st.sampled_from(_GGUF_KEYS))
        match data.draw(st.sampled_from(["value", "value", "element", "drop", "again", "tensor"])):
            case "value":
                keys[key] = data.draw(_numbers | _texts | _arrays | _raw)
            case "element" if isinstance(keys.get(key), Array) and keys[key].values:
                kind, items, length = keys[key]
                at = data.draw(st.integers(0, len(items) - 1))
                keys[key] = Array(kind, [*items[:at], data.draw(_element(kind)), *items[at + 1 :]], length)
            case "drop":
                keys.pop(key, None)
            case "again":
                keys[f"{key} again"] = data.draw(_numbers)
            case "tensor":
                name = data.draw(st.sampled_from(sorted(parts)))
                wrong = {
                    "kind": st.integers(0, 40),
                    "offset": st.integers(0, 2**64 - 1) | st.integers(0, 9999),
                    "shape": st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 99), max_size=5).map(tuple),
                }
                field = data.draw(st.sampled_from(sorted(wrong)))
                parts[name] = Tensor(parts[name].data, **{field: data.draw(wrong[field])})
    return File(keys, parts)


WHOLE = File().content()
HEADER = len(File().header())


def use_gguf(path: Path) -> tuple[Any, dict[str, np.ndarray], Any]:
    """Configuration, all weights, tokenizer."""
    file = GgufFile(path)
    return file.config, {name: file.read(name) for name in file.shapes}, file.tokenizer()


def _gguf_example(data: st.DataObject, folder: Path) -> None:
    path = folder / "bad.gguf"
    match data.draw(st.sampled_from(["bytes", "structure", "structure", "any"])):
        case "bytes":
            content, is_whole = damaged(data, WHOLE, HEADER), True
        case "structure":
            # A type of a tensor that has as many bytes gives other weights, as it must.
            content, is_whole = _gguf_file(data).content(), False
        case _:
            content, is_whole = data.draw(st.binary(max_size=300).map(lambda tail: WHOLE[:24] + tail)), False
    path.write_bytes(content)
    # A special token that is an ordinary one in the vocabulary makes text with it unwritable.
    with refusal("bad.gguf", "this tokenizer has no way to write"):
        file = GgufFile(path)
        stored = [tensor.data().tobytes() for tensor in file._tensors.values()]
        _, weights, tokenizer = use_gguf(path)
        assert all(np.asarray(value).size for value in weights.values())
        _use_tokenizer(tokenizer, "Hi é<|end|>")
        assert not is_whole or stored == [tensor.data.tobytes() for tensor in tensors().values()]


# safetensors files.


def _entry(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRIES = {
    "__metadata__": {"format": "pt"},
    "a": _entry("F32", [4, 2], [0, 32]),
    "b": _entry("F16", [16], [32, 64]),
    "c": _entry("BF16", [2, 1], [64, 68]),
}
_SHARDS = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}, "metadata": {"total_size": 128}}


def _write_shard(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def _safetensors_example(data: st.DataObject, folder: Path) -> None:
    path = folder / "x.safetensors"
    header = json_bytes(data, ENTRIES) if data.draw(st.booleans()) else damaged(data, json.dumps(ENTRIES).encode())
    size = data.draw(st.sampled_from([68, 68, 68, 0, 67, 69, 4096]))
    length = data.draw(st.none() | st.none() | st.integers(0, 2**64 - 1) | st.integers(0, len(header) + 70))
    _write_shard(path, header, bytes(size), length)
    with refusal("x.safetensors"):
        found = Shards([path])
        arrays = [found.read(name) for name in found.shapes]
        assert [x.shape for x in arrays] == list(found.shapes.values())
        assert sum(x.nbytes for x in arrays) <= size
    for name, entry in (("x", ENTRIES["a"]), ("y", ENTRIES["b"] | {"data_offsets": [0, 32]})):
        _write_shard(
            folder / f"{name}.safetensors", json.dumps({"a" if name == "x" else "b": entry}).encode(), bytes(32)
        )
    (folder / INDEX).write_bytes(json_bytes(data, _SHARDS, names=("a", "b", "weight_map")))
    with refusal(INDEX, "safetensors"):
        assert {"a": (4, 2), "b": (16,)}.items() >= Folder(folder).shapes.items()


def _prepare_safetensors(folder: Path) -> None:
    (folder / "config.json").write_text("{}", encoding="utf-8")


# Tokenizers.

_TEXT = "Hi é the cache</s> 漢"
_TOKENIZER_JSON: dict[str, Any] = {}


def _use_tokenizer(tokenizer: Any, text: str) -> None:
    special_tokens(tokenizer)
    eos_ids_of(TINY, tokenizer)
    for parse_special in (True, False):
        tokens = encode(tokenizer, text, special=True, parse_special=parse_special)
        row = Row(tokenizer)
        for token in tokens:
            row.add(token)
        row.rest()


def _prepare_tokenizer(folder: Path) -> None:
    make_model(folder / "model", chat=True)
    for name in ("prepend", "metaspace-first", "bytes"):
        # SmolLM2's own has 49,152 tokens.
        if name == "bytes":
            source = folder / "model"
        else:
            source = folder / name
            tokenizer_of(name).save_pretrained(source)
        _TOKENIZER_JSON[name] = {
            file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(source.glob("*token*.json"))
        }


_TOKENIZER_NAMES = (
    *("padding", "truncation", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model"),
    *("strategy", "Fixed", "direction", "pattern", "Regex", "content", "pad_to_multiple_of", "max_length", "dropout"),
    *("add_bos_token", "add_prefix_space", "model_max_length", "chat_template", "extra_special_tokens", "legacy"),
    *("tokenizer_class", "auto_map", "added_tokens_decoder", "split_special_tokens", "unk_token", "backend"),
)


def _components(data: st.DataObject, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer with other parts."""
    part = data.draw(
        st.sampled_from(["normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation"])
    )
    number = st.sampled_from([0, 1, 5, -1, 10**6, 2**31, 2**40, 2**63])
    regex = st.sampled_from(["(a+)+$", "(.*)*x", "[", "(?:)", "", "\\p{L}+", "(?=.*)(?=.*)", "x" * 500])
    pieces: dict[str, Any] = {
        "normalizer": st.builds(
            lambda kind, content, pattern: {
                "type": kind, "content": content, "prepend": content, "pattern": pattern, "strip_left": True,
                "strip_right": True, "lowercase": True, "clean_text": True, "handle_chinese_chars": True,
                "strip_accents": None, "precompiled_charsmap": "AAAA", "normalizers": [],
            },
            st.sampled_from(["Replace", "Prepend", "NFKC", "Strip", "Lowercase", "BertNormalizer", "Precompiled"]),
            st.sampled_from(["", "▁", "x" * 1000]),
            regex.map(lambda text: {"Regex": text}) | st.sampled_from(["", " "]).map(lambda text: {"String": text}),
        ),
        "pre_tokenizer": st.builds(
            lambda kind, behavior, pattern, count: {
                "type": kind, "behavior": behavior, "pattern": {"Regex": pattern}, "invert": False, "split": True,
                "replacement": "▁", "prepend_scheme": "always", "add_prefix_space": True, "use_regex": True,
                "trim_offsets": True, "individual_digits": True, "length": count, "delimiter": "x", "pretokenizers": [],
            },
            st.sampled_from(["Split", "Metaspace", "ByteLevel", "Digits", "FixedLength", "Whitespace", "Sequence",
                             "CharDelimiterSplit", "UnicodeScripts", "BertPreTokenizer", "Punctuation"]),
            st.sampled_from(["Isolated", "Removed", "MergedWithPrevious", "Contiguous"]),
            regex,
            number,
        ),
        "post_processor": st.builds(
            lambda index, name: {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": name, "type_id": index}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [index], "tokens": ["<s>"]}},
            },
            number, st.sampled_from(["<s>", "x"]),
        ),
        "decoder": st.builds(
            lambda kind, pattern, count: {
                "type": kind, "pattern": {"Regex": pattern}, "content": " ", "start": count, "stop": count,
                "replacement": "▁", "prepend_scheme": "always", "split": True, "pad_token": "<s>", "suffix": "",
                "word_delimiter_token": "|", "cleanup": True, "prefix": "##", "decoders": [], "add_prefix_space": True,
                "trim_offsets": True, "use_regex": True,
            },
            st.sampled_from(["Replace", "Strip", "Fuse", "ByteFallback", "ByteLevel", "CTC", "WordPiece", "Metaspace",
                             "BPEDecoder", "Sequence"]),
            regex,
            number,
        ),
        "padding": st.builds(
            lambda count, multiple: {
                "strategy": {"Fixed": count} if count else "BatchLongest", "direction": "Right",
                "pad_to_multiple_of": multiple, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
            },
            number, st.none() | number,
        ),
        "truncation": st.builds(
            lambda count, stride: {
                "direction": "Right", "max_length": count, "strategy": "LongestFirst", "stride": stride
            },
            number, number,
        ),
    }  # fmt: skip
    part = data.draw(st.sampled_from(sorted(pieces)))
    return tokenizer | {part: data.draw(pieces[part])}


def _tokenizer_example(data: st.DataObject, folder: Path) -> None:
    target = folder / "model"
    right = _TOKENIZER_JSON[data.draw(st.sampled_from(sorted(_TOKENIZER_JSON)))]
    wrong = data.draw(st.sampled_from(sorted(right)))
    for name, value in right.items():
        if name != wrong:
            content = json.dumps(value).encode()
        elif name == "tokenizer.json" and data.draw(st.booleans()):
            content = json.dumps(_components(data, value)).encode()
        else:
            content = json_bytes(data, value, names=_TOKENIZER_NAMES)
        (target / name).write_bytes(content)
    with refusal("tokenizer", "special token"):
        tokenizer = load_tokenizer(target)
        _use_tokenizer(tokenizer, _TEXT)
        if tokenizer.chat_template:
            encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])


# Configurations.

CONFIG_NAMES = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_type", "type", "factor", "low_freq_factor", "beta_fast"),
    *("high_freq_factor", "original_max_position_embeddings", "attention_factor", "truncate", "mscale", "layer_types"),
    *("partial_rotary_factor", "sliding_window", "max_window_layers", "use_sliding_window", "attention_bias"),
    *("text_config", "hidden_act", "hidden_activation", "query_pre_attn_scalar", "sliding_window_pattern"),
    *("rope_local_base_freq", "attn_logit_softcapping", "swiglu_limit", "swiglu_alpha", "num_local_experts"),
    *("mlp_bias", "head_dim", "quantization_config", "num_experts", "per_layer_config", "torch_dtype", "dtype"),
)
ROPE_NUMBERS = st.sampled_from([None, 0, 1, 2, 0.5, 4.0, 64, 512, 1e4, 5e5, True, "4", -1, 1e300])
_ROPE_NAMES = ["rope_theta", "original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor"]
_ROPE_NAMES += ["truncate", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"]
_rope_kinds = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", None]),
        "type": st.sampled_from(["default", "linear", "llama3", "yarn"]),
    },
)
_rope_inner = st.builds(
    lambda known, kind: known | kind, st.dictionaries(st.sampled_from(_ROPE_NAMES), ROPE_NUMBERS), _rope_kinds
)
# RoPE settings in any spelling.
rope_settings = st.fixed_dictionaries(
    {},
    optional={
        "rope_theta": ROPE_NUMBERS,
        "original_max_position_embeddings": ROPE_NUMBERS,
        "rope_scaling": st.none() | _rope_inner,
        "rope_parameters": st.none() | _rope_inner,
    },
)


def _config_example(data: st.DataObject, folder: Path) -> None:
    config = json.loads((GOLDEN / "llama" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": data.draw(st.sampled_from([*FAMILIES, "gemma3"]))}
    config["sliding_window"] = data.draw(st.sampled_from([None, 64]))
    if data.draw(st.booleans()):
        config.pop("rope_parameters", None)
        config |= data.draw(rope_settings)
    wrong = data.draw(st.sampled_from(["config.json", "config.json", "generation_config.json"]))
    generation = {"eos_token_id": [2], "bos_token_id": 1}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        content = json_bytes(data, value, names=CONFIG_NAMES) if name == wrong else json.dumps(value).encode()
        (folder / name).write_bytes(content)
    with refusal("config.json"):
        found = Folder(folder).config
        assert np.isfinite(found.rope.inverse_frequencies(found.head_dim)).all()
        assert found.num_parameters > 0 and found.trained_positions >= 1
    with refusal("config.json", "tokens"):
        Inspect(str(folder)).run()


# Quantized checkpoints.

_QUANTIZED = ("awq", "gptq, zeros", "gptq, act-order", "w4a16, zeros", "w8a8", "fp8, blocks", "deepseek, one scale")
QUANTIZED_NAMES = (
    *("quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert", "sym", "desc_act"),
    *("checkpoint_format", "dynamic", "lm_head", "weight_block_size", "fmt", "format", "config_groups", "ignore"),
    *("targets", "weights", "input_activations", "num_bits", "type", "symmetric", "strategy", "block_structure"),
    *("actorder", "kv_cache_scheme", "sparsity_config"),
)


def _prepare_quantized(folder: Path) -> None:
    source = make_model(folder / "source", layers=1)
    for name in _QUANTIZED:
        write_folder(folder / "right" / name / "model", CASES[name], source)


def _quantized_example(data: st.DataObject, folder: Path) -> None:
    right = folder / "right" / data.draw(st.sampled_from(_QUANTIZED)) / "model"
    config = json.loads((right / "config.json").read_text(encoding="utf-8"))
    content = (right / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    (folder / "model").mkdir(exist_ok=True)
    path = folder / "model" / "model.safetensors"
    if data.draw(st.booleans()):
        config["quantization_config"] = changed(data, config["quantization_config"], names=QUANTIZED_NAMES)
        path.write_bytes(content)
    elif data.draw(st.booleans()):
        _write_shard(path, json_bytes(data, json.loads(content[8 : 8 + length])), content[8 + length :])
    else:
        header = json.loads(content[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        header[one], header[other] = header[other], header[one]
        _write_shard(path, json.dumps(header).encode(), content[8 + length :])
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with refusal("model"):
        found = Folder(folder / "model")
        check_tensors(found.shapes, weight_table(found.config), found.config, label=str(folder / "model"))
        for name in found.shapes:
            stored = found.stored(name)
            assert stored.shape == found.shapes[name]


# Saved models, patterns and caches.


def _prepare_saved(folder: Path) -> None:
    save_model(load_model(make_model(folder / "source"), weight_dtype="int8"), folder / "model")
    pattern = HeadPattern.from_gates(np.array([[1.0, 0.0], [0.0, 1.0]]), sink_size=3, recent_size=8)
    pattern.save(folder / "pattern")
    for name, dtype in (("cache", None), ("int8", "int8")):
        cache = KVCache.init(TINY, pattern, 1, 24, dtype=dtype)
        tokens = np.ones((1, 7), np.int32)
        cache.advance(jnp.full(1, 7, jnp.int32)).save(folder / name, tokens=tokens)
    shutil.copytree(folder, folder / "right")


def _saved_example(data: st.DataObject, folder: Path) -> None:
    kind = data.draw(st.sampled_from(["model", "pattern", "cache", "int8"]))
    shutil.rmtree(folder / kind)
    shutil.copytree(folder / "right" / kind, folder / kind)
    files = sorted((folder / kind).iterdir())
    path = data.draw(st.sampled_from(files))
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if data.draw(st.booleans()):
            header = json_bytes(data, json.loads(content[8 : 8 + length]))
            _write_shard(path, header, content[8 + length :])
        else:
            path.write_bytes(damaged(data, content, 8 + length))
    elif path.suffix == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        if path.name == store.ABOUT and data.draw(st.integers(0, 3)):
            # As somebody would who alters a cache: with a checksum that fits.
            record = changed(data, {name: value[name] for name in ("about", "checksums")})
            path.write_text(json.dumps({**record, "own": store._text_checksum(record)}), encoding="utf-8")
        else:
            path.write_bytes(json_bytes(data, value))
    else:
        path.write_bytes(damaged(data, path.read_bytes()))
    names = (kind, path.name, "memory")
    with refusal(*names):
        match kind:
            case "model":
                load_model(folder / kind)
            case "pattern":
                pattern = HeadPattern.load(folder / kind)
                assert np.isfinite(pattern.gates).all() and 0 <= pattern.kv_fraction(10**6) <= 1
            case _:
                KVCache.load(folder / kind)


# Chat templates.

_EXPRESSIONS = """
messages; messages[0]; messages[0].content; messages[0]['role']; messages[-1].content; bos_token; x; loop.index; tools
add_generation_prompt; 'a' * 9; 'a' * 99999999999; range(10); range(10 ** 9); 1 // 0; 2 ** 999999; 1e308 * 10; caller()
''.__class__; messages.__class__.__mro__; cycler('a'); lipsum(9); namespace(a=1); dict(a=1); joiner; self; '\\ud800'
raise_exception('no'); strftime_now('%Y'); strftime_now('%' * 99); messages | tojson; (messages * 9999) | tojson
messages | map(attribute='content') | join; messages[0].content | trim | upper; messages | length; messages | sort
'%s' % messages; '%99999999d' % 1; '{:>99999999}'.format(1); 'a'.encode(); messages[0].content.split()
""".replace(";", "\n").split("\n")
_EXPRESSIONS = [text.strip() for text in _EXPRESSIONS if text.strip()]
_operators = st.sampled_from(["+", "~", "==", "and", "in", "*", "%", "if 1 else"])
_filters = st.sampled_from(["string", "int", "list", "e", "indent", "xmlattr", "first"])
_expressions = st.recursive(
    st.sampled_from(_EXPRESSIONS),
    lambda inner: (
        st.builds(
            lambda a, op, b: f"({a} {op} {b})",
            inner,
            st.sampled_from(["+", "~", "==", "and", "in", "*", "%", "if 1 else"]),
            inner,
        )
        | st.builds(
            lambda a, name: f"({a}) | {name}",
            inner,
            _filters,
        )
    ),
    max_leaves=4,
)
_blocks: Any = st.deferred(
    lambda: st.lists(
        st.sampled_from(["text", "<|im_end|>", "</s>", "\n", "é", "{", "{%", "}}", "{#", ""])
        | _expressions.map(lambda text: f"{{{{ {text} }}}}")
        | st.builds(lambda a, inner: f"{{% for m in {a} %}}{inner}{{{{ m }}}}{{% endfor %}}", _expressions, _blocks)
        | st.builds(lambda a, inner: f"{{% if {a} %}}{inner}{{% else %}}{inner}{{% endif %}}", _expressions, _blocks)
        | st.builds(lambda a: f"{{% set x = {a} %}}", _expressions)
        | st.builds(lambda inner: f"{{% macro f(a) %}}{inner}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f(1) }}}}", _blocks)
        | st.builds(lambda inner: f"{{% generation %}}{inner}{{% endgeneration %}}", _blocks)
        | st.sampled_from(["{% break %}", "{% include 'x' %}", "{% import 'os' as os %}", "{% raw %}"]),
        max_size=3,
    ).map("".join)
)


def _template_example(data: st.DataObject, folder: Path) -> None:
    tokenizer = tokenizer_of(data.draw(st.sampled_from(["prepend", "metaspace-first"])))
    right = data.draw(st.sampled_from([CHATML, INST]))
    match data.draw(st.sampled_from(["blocks", "inserted", "damaged"])):
        case "blocks":
            text = data.draw(_blocks) or "x"
        case "inserted":
            at = data.draw(st.integers(0, len(right)))
            text = right[:at] + data.draw(_blocks) + right[at:]
        case _:
            text = damaged(data, right.encode()).decode("utf-8", "replace")
    messages = [
        {"role": data.draw(st.sampled_from(["user", "system", "x"])), "content": data.draw(st.text(max_size=9))},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": data.draw(st.sampled_from(["Hi", "<s>", "</s>{{ x }}", "\ufdd0"]))},
    ]
    before = tokenizer.chat_template
    tokenizer.chat_template = text
    try:
        with refusal("chat template", "special token"):
            assert isinstance(render(tokenizer, messages), str)
            encode_chat(tokenizer, messages)
        with refusal("chat template", "special token"):
            DocumentFrame.chat(tokenizer).whole("The text.", "What?")
        end_of_turn(tokenizer)
    finally:
        tokenizer.chat_template = before


# Verdicts on attention backends, which are made again if damaged, and tuned tiles.

_REQUEST = Request.of("decode", q="bfloat16", full="bfloat16", head_dim=16, group=1, window=Window(0, 0))
_DEVICE = {"kind": "NVIDIA Abacus", "capability": "9.0", "cores": 132, "shared_memory": 232448}
_VERDICTS = {
    "xla": {"is_right": True, "error": 1e-3, "seconds": 2e-3},
    "triton": {"is_right": True, "error": 1e-3, "seconds": 1e-3},
    "mosaic": {"is_right": False, "reason": "hangs"},
    "cudnn": {"reason": "not known"},
}
_TILES = {"sm_90": {"decode": {"128x2": asdict(DecodeTiles(64, 256, 1056, 4, 2))}}}


def _user_cache_example(data: st.DataObject, folder: Path) -> None:
    path = folder / "verdicts.json"
    key = key_of(_REQUEST)
    here = {"device": _DEVICE, "complete": [key], "verdicts": {key: _VERDICTS}, "environment": environment()}
    content = json_bytes(data, [here])
    path.write_bytes(content if data.draw(st.booleans()) else damaged(data, content))
    with mock.patch.dict(os.environ, DUO_JAX_CACHE=str(folder)), mock.patch.object(verdicts, "device", lambda: _DEVICE):
        verdicts.forget()
        with refusal():  # Nothing is refused.
            assert verdicts.best(replace(_REQUEST, device=_DEVICE["kind"]), list(_VERDICTS)) in {
                *_VERDICTS,
                "reference",
            }
            assert json.loads(json_text(verdicts.report()))["environment"] == environment()
            for verdict in verdicts.known().verdicts.get(key, {}).values():
                str(verdict)  # Does not raise.
            verdicts.add(Found({key: {"triton": Verdict(False, "wrong numbers")}}))
        verdicts.forget()
        assert verdicts.known().verdicts[key]["triton"].reason == "wrong numbers"
        verdicts.forget()
    (folder / "tiles.json").write_bytes(json_bytes(data, _TILES))
    with refusal("tiles.json"):
        for kernels in read_tuned(folder / "tiles.json").values():
            assert all(isinstance(each, KINDS[name]) for name, sizes in kernels.items() for each in sizes.values())


READERS = {
    "json": Reader(nothing, _json_example),
    "results": Reader(nothing, _results_example),
    "rows": Reader(nothing, _rows_example),
    "gguf": Reader(nothing, _gguf_example),
    "safetensors": Reader(_prepare_safetensors, _safetensors_example),
    "tokenizer": Reader(_prepare_tokenizer, _tokenizer_example),
    "config": Reader(nothing, _config_example),
    "quantized": Reader(_prepare_quantized, _quantized_example),
    "saved": Reader(_prepare_saved, _saved_example),
    "template": Reader(nothing, _template_example),
    "user cache": Reader(nothing, _user_cache_example),
}
