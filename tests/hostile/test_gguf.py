"""GGUF files: the right model or a refusal that names file, key and value, whatever the header claims."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Kind

from duo_jax import load_model, load_tokenizer
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.gguf_architectures import MODEL_TENSORS
from duo_jax.checkpoint.gguf_config import config_from_gguf
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.weight_table import weight_table
from duo_jax.cli import USER_ERRORS
from duo_jax.families.presets import PRESETS
from duo_jax.model.rope import LinearRope, Rope, YarnRope
from tests.hostile.gguf_bytes import (
    TOKENS,
    VOCAB,
    Array,
    File,
    Raw,
    Tensor,
    gemma_metadata,
    gemma_tensors,
    metadata,
    strings,
    tensors,
)
from tests.hostile.readers import use_gguf
from tests.text_models import assert_refused

KEY, GGML = "llama.", "tokenizer.ggml."
Q = "blk.0.attn_q.weight"


def with_keys(**changes: Any) -> File:
    """The right file with other keys; `__` is written for a dot, None removes a key."""
    keys = metadata() | {key.replace("__", "."): value for key, value in changes.items()}
    return File({key: value for key, value in keys.items() if value is not None})


def with_tensor(name: str, **changes: Any) -> File:
    """The right file with one wrong tensor."""
    return File(tensors=tensors() | {name: replace(tensors()[name], **changes)})


def write(path: Path, file: File) -> Path:
    path.write_bytes(file.content())
    return path


def test_the_right_file_is_read(tmp_path: Path) -> None:
    config, weights, tokenizer = use_gguf(write(tmp_path / "m.gguf", File()))
    assert (config.vocab_size, config.num_layers, config.rope) == (VOCAB, 2, Rope(10000.0))
    np.testing.assert_array_equal(weights["lm_head.weight"], tensors()["output.weight"].data)
    assert tokenizer.encode("Hi") == [VOCAB - 3, TOKENS.index("Hi")]


# Header.

NESTED = Raw(Kind.ARRAY, b"\x09\0\0\0\x01\0\0\0\0\0\0\0" * 5000 + b"\x04\0\0\0\0\0\0\0\0\0\0\0")
NUMBERS = Array(Kind.UINT8, [], 2**40)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (File(magic=b"GGML"), "begins with b'GGML'"),
        (File(version=1), "version 1"),
        (File(version=4), "version 4"),
        (File(version=0), "version 0"),
        (File(version=3 << 24), "big-endian"),
        (File(num_keys=2**40), "claims 1099511627776 keys"),
        (File(num_keys=60000), ""),
        (File(num_keys=len(metadata()) - 1), ""),
        (File(num_tensors=2**64 - 1), "claims 18446744073709551615 tensors"),
        (File(num_tensors=len(tensors()) - 1), "the file has"),
        (File(num_tensors=len(tensors()) + 1), ""),
        (File(more=b"\0" * 32), "its last tensor ends at byte"),
        (with_keys(x=NUMBERS), "its arrays, up to 'x', have 10995"),
        (with_keys(x=Array(Kind.STRING, [], 2**40)), "have 10995"),
        (with_keys(x=Array(Kind.FLOAT64, [], 2**20)), "'?x'?.* ends at byte"),
        (with_keys(x=NESTED), "'x' has a value of type 9"),
        (with_keys(x=Array(99, [], 0)), "'x' has a value of type 99"),
        (with_keys(x=Raw(13, b"")), "'x' has a value of type 13"),
        (with_keys(x=Raw(Kind.BOOL, b"\x02")), "'x' is a boolean with value 2"),
        (with_keys(x=Raw(Kind.STRING, b"\xff" * 8)), "x ends at byte 18446744073709551615|x ends at byte 1844674407"),
        (with_keys(x=b"\xff\xfe"), "x is not UTF-8"),
        (with_keys(**{"llama.block_count again": 3}), "key 'llama.block_count' appears twice"),
        (with_keys(general__alignment=0), "general.alignment must be a power of 2, got 0"),
        (with_keys(general__alignment=48), "got 48"),
        (with_keys(general__alignment="32"), "got '32'"),
        (with_keys(general__alignment=True), "got True"),
        (with_keys(general__alignment=16), ""),
        (with_keys(general__alignment=1), ""),
        (with_keys(general__alignment=2**31), ""),
        (File(tensors=tensors() | {f"{Q} again": tensors()[Q]}), f"tensor '{Q}' appears twice"),
        (File(tensors=tensors() | {"model.norm.weight": tensors()["output_norm.weight"]}), "under two names"),
        (with_tensor(Q, offset=2**64 - 32), f"tensor '{Q}' is at offset 18446744073709551584"),
        (with_tensor(Q, offset=0), f"tensor '{Q}' is at offset 0"),
        (with_tensor(Q, offset=2**40), f"tensor '{Q}' is at offset"),
        (with_tensor(Q, offset=3), f"tensor '{Q}' is at offset 3"),
        (with_tensor(Q, shape=(2**32, 2**32)), f"tensor '{Q}' ends at byte 73786976294838"),
        (with_tensor(Q, shape=(2**63, 2)), f"tensor '{Q}' ends at byte"),
        (with_tensor(Q, shape=(0, 32)), r"has shape \[0, 32\]"),
        (with_tensor(Q, shape=()), "has 0 dimensions"),
        (with_tensor(Q, shape=(1,) * 5), "has 5 dimensions"),
        (with_tensor(Q, shape=(1,) * 2000), "has 2000 dimensions"),
        (with_tensor(Q, shape=(16, 32)), "at offset"),
        (with_tensor(Q, kind=1), "at offset"),
        (with_tensor(Q, kind=250), "has type 250"),
        (with_tensor(Q, kind=4), "has type 4"),  # a type that ggml removed
        (with_tensor(Q, kind=26), "is I32, which gguf cannot dequantize"),
        (with_tensor(Q, kind=8, shape=(31, 33)), "rows must|rows have"),
    ],
)  # fmt: skip
def test_a_wrong_header_is_refused(file: File, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", file)
    tracemalloc.start()
    try:
        with pytest.raises(USER_ERRORS, match=rf"(?s)bad\.gguf.*({reason})") as refused:
            use_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6, "memory before it is known to be needed"
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 500 and str(refused.value).count("bad.gguf") == 1


# Metadata of the architecture.


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**63 - 1, 2.0, True, "2", Array(Kind.UINT32, [2, 2])], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "rope.dimension_count",
    ],
)
def test_a_size_that_is_no_size_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", File(metadata() | {KEY + key: value}))
    with pytest.raises(ValueError, match=rf"bad\.gguf: llama\.{key} must be an integer in \[1, 2147483647\], got "):
        use_gguf(path)


@pytest.mark.parametrize(
    "value", [0.0, -1.0, float("nan"), float("inf"), "1", False, Array(Kind.FLOAT32, [1.0])], ids=str
)
@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"])
def test_a_number_that_is_no_number_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", File(metadata() | {KEY + key: value}))
    with pytest.raises(ValueError, match=rf"bad\.gguf: llama\.{key} must be a number in .*, got "):
        use_gguf(path)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"general__architecture": Array(Kind.UINT8, [1])}, "architecture an array of 1 is not supported"),
        ({"general__architecture": 7}, "architecture 7 is not supported"),
        ({"general__architecture": None}, "architecture None is not supported"),
        ({"llama__block_count": None}, "no llama.block_count: it does not contain"),
        (
            {"llama__attention__layer_norm_rms_epsilon": None},
            "no llama.attention.layer_norm_rms_epsilon: it does not contain",
        ),
        ({"llama__block_count": 1}, "llama.block_count is 1, but it has tensors of 2 layers"),
        ({"llama__block_count": 10**9}, "llama.block_count is 1000000000, but"),
        ({"llama__embedding_length": 64}, "of the wrong shape"),
        ({"llama__feed_forward_length": 2**31 - 1}, "intermediate_size must be at most"),
        ({"llama__attention__head_count": 4}, "of the wrong shape"),
        ({"llama__attention__head_count_kv": 2}, "of the wrong shape"),
        ({"llama__attention__head_count_kv": 2**30}, "num_key_value_heads must be at most"),
        ({"llama__attention__key_length": None, "llama__attention__head_count": 33}, "key_length must be an integer"),
        ({"llama__attention__value_length": 8}, "value_length is not key_length"),
        ({"llama__vocab_size": 9}, "llama.vocab_size has 9 tokens, but token_embd.weight has"),
        ({GGML + "tokens": strings(TOKENS[:-1])}, f"the tokenizer has {VOCAB - 1} tokens, but token_embd.weight has"),
        ({GGML + "tokens": strings([*TOKENS, "x"])}, f"the tokenizer has {VOCAB + 1} tokens"),
        ({"llama__rope__dimension_count": 8}, "partial RoPE"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope' is not none, linear or yarn"),
        ({"llama__rope__scaling__type": 3}, "rope.scaling.type must be a string, got 3"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type is yarn, but there is no rope.scaling.factor"),
        ({"llama__rope__scaling__factor": 0.5}, "scaling.factor must be a number in"),
        ({"llama__rope__scaling__factor": 4.0, "llama__rope__scale_linear": 2.0}, "4.0, but rope.scale_linear is 2.0"),
        ({"llama__rope__scaling__attn_factor": 2.0}, "rope.scaling.attn_factor = 2.0 is a feature"),
        ({"llama__rope__scaling__alpha": 1000.0}, "rope.scaling.alpha = 1000.0 is a feature"),
        ({"llama__rope__dimension_sections": Array(Kind.INT32, [8, 4, 4])}, "dimension_sections = an array of 3 is a"),
        ({"llama__rope__new_idea": "x" * 1000}, "rope.new_idea = 'xxx"),
        ({"llama__attention__causal": False}, "attention.causal = False is a feature"),
        ({"llama__attention__scale": 0.5}, "attention.scale = 0.5 is a feature"),
        ({"llama__attention__sliding_window": 32}, "sliding_window = 32 is not supported: llama.cpp ignores"),
        ({"llama__attention__sliding_window_pattern": 6}, "sliding_window_pattern = 6 is a feature"),
        ({"llama__logit_scale": 8.0}, "llama.logit_scale = 8.0 is a feature"),
        ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is a feature"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({GGML + "eos_token_id": VOCAB}, f"eos_token_id' must be a token below {VOCAB}, got {VOCAB}"),
        ({GGML + "eot_token_id": -1}, "eot_token_id' must be a token below"),
        ({GGML + "eom_token_id": "</s>"}, "eom_token_id' must be a token below .* got '</s>'"),
        ({"split__count": "2"}, r"metadata split\.\* of a split model"),
        ({"split__new": 2}, "'split.new': 2"),
    ],
)
def test_wrong_metadata_is_refused_by_name(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", with_keys(**keys))
    with pytest.raises(USER_ERRORS, match=rf"(?s)bad\.gguf.*({reason})") as refused:
        use_gguf(path)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope(1e4)),
        ({"rope__freq_base": 5e5}, Rope(5e5)),
        ({"rope__freq_base": None}, Rope(1e4)),
        ({"rope__scale_linear": 4.0}, LinearRope(1e4, factor=4.0)),
        ({"rope__scale_linear": 4.0, "rope__scaling__factor": 4.0}, LinearRope(1e4, factor=4.0)),
        ({"rope__scaling__factor": 4.0}, LinearRope(1e4, factor=4.0)),
        ({"rope__scaling__factor": 4.0, "rope__scaling__type": "linear"}, LinearRope(1e4, factor=4.0)),
        ({"rope__scaling__factor": 4.0, "rope__scaling__type": "none"}, Rope(1e4)),
        ({"rope__scaling__type": "linear"}, Rope(1e4)),
        (
            {"rope__scaling__factor": 4.0, "rope__scaling__type": "yarn"},
            YarnRope(1e4, factor=4.0, original_max_position_embeddings=64),
        ),
        (
            {
                "rope__scaling__factor": 4.0,
                "rope__scaling__type": "yarn",
                "rope__scaling__original_context_length": 16,
                "rope__scaling__yarn_beta_fast": 16.0,
                "rope__scaling__finetuned": True,
                "rope__scaling__yarn_log_multiplier": 0.0,
            },
            YarnRope(1e4, factor=4.0, original_max_position_embeddings=16, beta_fast=16.0),
        ),
        ({"attention__causal": True, "attention__value_length": 16, "attention__scale": 0.25}, Rope(1e4)),
        ({"expert_count": 0, "expert_used_count": 0, "pooling_type": 3, "vocab_size": VOCAB}, Rope(1e4)),
        ({"attention__key_length": None, "rope__dimension_count": None}, Rope(1e4)),
        ({"tensor_data_layout": "Meta AI original pth"}, Rope(1e4)),
    ],
)
def test_rope_is_read_as_in_llama_cpp(keys: dict[str, Any], rope: Rope, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", with_keys(**{KEY + key: value for key, value in keys.items()}))
    assert GgufFile(path).config.rope == rope


# Layers with a window.


def gemma(**changes: Any) -> File:
    """The right Gemma 3 with other keys of its architecture; None removes a key."""
    keys = gemma_metadata() | {f"gemma3.{key.replace('__', '.')}": value for key, value in changes.items()}
    return File({key: value for key, value in keys.items() if value is not None}, gemma_tensors())


PATTERN = "attention__sliding_window_pattern"


@pytest.mark.parametrize(
    ("keys", "windows", "theta"),
    [
        ({}, (12, None), 5000.0),
        ({PATTERN: 2, "rope__freq_base_swa": None}, (12, None), 10000.0),
        ({PATTERN: 1}, (), 5000.0),
        ({PATTERN: None}, (12, 12), 5000.0),
        ({PATTERN: Array(Kind.BOOL, [False, True])}, (None, 12), 5000.0),
        ({"attention__sliding_window": 64}, (64, None), 5000.0),  # As long as the context: RoPE still goes by layer.
        ({"attention__sliding_window": None, PATTERN: None}, (), 5000.0),
        ({"attention__key_length_swa": 16, "rope__dimension_count_swa": 16}, (12, None), 5000.0),
    ],
)
def test_windows_are_read_as_in_llama_cpp(
    keys: dict[str, Any], windows: tuple[int | None, ...], theta: float, tmp_path: Path
) -> None:
    config = GgufFile(write(tmp_path / "m.gguf", gemma(rope__scaling__factor=8.0, **keys))).config
    assert (config.family, config.layer_windows) == ("gemma3_text", windows)
    assert (config.rope, config.window_rope) == (LinearRope(1e4, factor=8.0), Rope(theta))
    assert config.tied_head and config.query_scale == 1.0 and config.activation == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"attention__sliding_window": -1}, "sliding_window must be an integer in"),
        ({"attention__sliding_window": 12.0}, "sliding_window must be an integer in"),
        ({PATTERN: 0}, "sliding_window_pattern must be an integer in"),
        ({PATTERN: True}, "sliding_window_pattern must be an integer in"),
        ({PATTERN: Array(Kind.BOOL, [True])}, "must be an integer, or an array of 2 booleans, got an array of 1"),
        ({PATTERN: Array(Kind.INT32, [1, 0])}, "must be an integer, or an array of 2 booleans"),
        ({PATTERN: Array(Kind.BOOL, [])}, "must be an integer, or an array of 2 booleans, got an array of 0"),
        ({"rope__freq_base_swa": 0.0}, "rope.freq_base_swa must be a number in"),
        ({"rope__freq_base_swa": float("nan")}, "rope.freq_base_swa must be a number in"),
        ({"attention__key_length_swa": 8}, "key_length_swa = 8 is a feature that is not supported"),
        ({"attention__value_length_swa": 8}, "value_length_swa = 8 is a feature that is not supported"),
        ({"rope__dimension_count_swa": 8}, "dimension_count_swa = 8 is a feature that is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is a feature"),
        ({"attention__head_count_kv": 2}, "of the wrong shape"),
    ],
)
def test_wrong_windows_are_refused_by_name(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(USER_ERRORS, match=rf"bad\.gguf.*{reason}"):
        use_gguf(write(tmp_path / "bad.gguf", gemma(**keys)))


def test_norms_of_gemma_are_stored_with_one_added(tmp_path: Path) -> None:
    _, weights, _ = use_gguf(write(tmp_path / "m.gguf", gemma()))
    names = {"ffn_norm": "pre_feedforward_layernorm", "attn_q_norm": "self_attn.q_norm"}
    for ours, theirs in names.items():
        expected = gemma_tensors()[f"blk.1.{ours}.weight"].data - np.float32(1)
        np.testing.assert_array_equal(weights[f"model.layers.1.{theirs}.weight"], expected)
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors()["token_embd.weight"].data)


def test_queries_of_the_largest_gemma_have_a_scale_of_their_own() -> None:
    expected = PRESETS["gemma-3-27b"]
    sizes = {"block_count": 62, "embedding_length": 5376, "feed_forward_length": 21504, "context_length": 131072}
    heads = {"head_count": 32, "head_count_kv": 16, "key_length": 128, "layer_norm_rms_epsilon": 1e-6}
    others = {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    keys = sizes | others | {f"attention.{key}": value for key, value in (heads | {"sliding_window": 1024}).items()}
    metadata = {f"gemma3.{key}": value for key, value in keys.items()} | {"general.architecture": "gemma3"}
    shapes = {name: s for w in weight_table(expected).values() for name, s in zip(w.names, w.shapes, strict=True)}
    config = config_from_gguf(metadata, shapes, divisors=None)
    assert replace(config, eos_ids=expected.eos_ids) == expected


def test_the_ends_are_eos_eot_and_eom(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", with_keys(**{GGML + "eom_token_id": 7}))
    assert GgufFile(path).config.eos_ids == (VOCAB - 2, VOCAB - 1, 7)


# Tokenizer.


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model": 7}, "model' must be a string, got 7"),
        ({"pre": strings(["llama-bpe"])}, "pre' must be a string, got an array of 1"),
        ({"tokens": Array(Kind.UINT32, list(range(VOCAB)))}, "tokens' must be an array of strings"),
        ({"tokens": "abc"}, "tokens' must be an array of strings, got 'abc'"),
        ({"tokens": strings([*TOKENS[:-1], "Hi"])}, "tokens' has 'Hi' twice"),
        ({"token_type": Array(Kind.INT32, [1])}, f"token_type' must have one number a token: 1 for {VOCAB}"),
        ({"token_type": Array(Kind.FLOAT32, [1.0] * VOCAB)}, "token_type' must be an array of numbers of type int"),
        ({"token_type": strings(["1"] * VOCAB)}, "token_type' must be an array of numbers of type int"),
        ({"token_type": Array(Kind.INT32, [1] * (VOCAB - 1) + [99])}, r"token_type' must be in \[0, 6\], got 99"),
        ({"token_type": Array(Kind.INT32, [-1] * VOCAB)}, r"token_type' must be in \[0, 6\], got -1"),
        ({"merges": strings(["Hi"])}, "merges' has 'Hi', which does not join two tokens"),
        ({"merges": strings(["H i x"])}, "merges' has 'H i x'"),
        ({"merges": strings(["H e"])}, "merges' has 'H e'"),
        ({"merges": strings([""])}, "merges' has ''"),
        ({"merges": Array(Kind.UINT8, [1])}, "merges' must be an array of strings"),
        ({"bos_token_id": VOCAB}, f"bos_token_id' must be a token below {VOCAB}, got {VOCAB}"),
        ({"bos_token_id": "<s>"}, "bos_token_id' must be a token below"),
        ({"unknown_token_id": 2**32 - 1}, "unknown_token_id' must be a token below"),
        ({"add_bos_token": 1}, "add_bos_token' must be a boolean, got 1"),
        ({"add_eos_token": "no"}, "add_eos_token' must be a boolean"),
        ({"model": "llama"}, r"no 'tokenizer\.ggml\.scores'"),
        ({"model": "llama", "scores": Array(Kind.FLOAT32, [float("nan")] * VOCAB)}, "scores' must be an array of n"),
        ({"model": "llama", "scores": Array(Kind.FLOAT32, [0.0])}, f"one number a token: 1 for {VOCAB}"),
    ],
)
def test_a_wrong_tokenizer_is_refused_by_name(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", with_keys(**{GGML + key: value for key, value in keys.items()}))
    with pytest.raises(USER_ERRORS, match=rf"bad\.gguf: .*{reason}") as refused:
        GgufFile(path).tokenizer()
    assert len(str(refused.value)) < 500


def test_a_token_that_takes_quadratic_time_is_refused(tmp_path: Path) -> None:
    scores = Array(Kind.FLOAT32, [0.0] * VOCAB)
    keys = {"model": "llama", "tokens": strings([*TOKENS[:-4], "a" * 10**6, *TOKENS[-3:]]), "scores": scores}
    path = write(tmp_path / "bad.gguf", with_keys(**{GGML + key: value for key, value in keys.items()}))
    with pytest.raises(ValueError, match="has a token of 1000000 characters, more than 1024"):
        GgufFile(path).tokenizer()


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", with_keys(tokenizer__chat_template=strings(["a"])))
    with pytest.raises(ValueError, match="chat_template' must be a string, got an array of 1"):
        load_tokenizer(path)


def test_a_padding_id_outside_the_vocabulary_means_no_padding(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", with_keys(**{GGML + "padding_token_id": 2**32 - 1}))
    assert load_tokenizer(path).pad_token is None


# Split models.


def write_parts(folder: Path, count: int = 2, **changes: Any) -> Path:
    """A model in several files, as llama-gguf-split writes it; `changes` are keys of the last part."""
    items = list(tensors().items())
    for index in range(count):
        split = {"split.no": index, "split.count": count, "split.tensors.count": len(items)}
        keys = metadata() | split if index == 0 else {"general.architecture": "llama"} | split
        if index == count - 1:
            keys |= {key.replace("__", "."): value for key, value in changes.items()}
        part = dict(items[index::count])
        write(folder / f"m-{index + 1:05d}-of-{count:05d}.gguf", File(keys, part))
    return folder / f"m-00001-of-{count:05d}.gguf"


@pytest.mark.parametrize("count", [2, 3])
def test_a_split_model_is_read_whole(count: int, tmp_path: Path) -> None:
    _, whole, _ = use_gguf(write(tmp_path / "m.gguf", File()))
    _, weights, _ = use_gguf(write_parts(tmp_path, count))
    assert weights.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(weights[name], whole[name])


@pytest.mark.parametrize("small", [False, True])
def test_a_model_that_gguf_split_is_read_whole(small: bool, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=8, small_first_shard=small)
    for key, value in metadata().items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in tensors().items():
        writer.add_tensor(name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / f"m-00001-of-{3 + small:05d}.gguf")
    assert len(file.files) == 3 + small and file.config.num_layers == 2
    for name, tensor in tensors().items():
        if not name.startswith("blk"):
            np.testing.assert_array_equal(file.read(MODEL_TENSORS[name]), tensor.data)


def test_other_weights_in_a_later_part_are_other_weights(tmp_path: Path) -> None:
    first = write_parts(tmp_path)
    before = weights_fingerprint(first)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    assert weights_fingerprint(first) != before


def test_a_wrong_part_is_refused(tmp_path: Path) -> None:
    first = write_parts(tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    with pytest.raises(ValueError, match=r"00002\.gguf is part 2 of 2 of a split model: give the first part"):
        GgufFile(second)
    renamed = first.rename(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf is part 1 of 2 .* NAME-00001-of-00002\.gguf"):
        GgufFile(renamed)
    renamed.rename(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"part 1 of 2 of a split model, and .*00002-of-00002\.gguf is missing"):
        GgufFile(first)
    for changes in ({"split__no": 0}, {"split__count": 3}, {"split__no": "x"}):
        write_parts(tmp_path, **changes)
        with pytest.raises(ValueError, match="is not part 2 of 2"):
            GgufFile(first)
    write_parts(tmp_path)
    write(second, File({"split.no": 1, "split.count": 2}, {Q: tensors()[Q]}))
    with pytest.raises(ValueError, match=r"the model has \d+ tensors in 2 files, but they have"):
        GgufFile(first)
    write(tmp_path / "n-00001-of-65535.gguf", with_keys(split__no=0, split__count=65535))
    with pytest.raises(FileNotFoundError, match="00002-of-65535"):
        GgufFile(tmp_path / "n-00001-of-65535.gguf")


# Divisors of RoPE frequencies.


@pytest.mark.parametrize(
    ("divisors", "keys"),
    [
        ([0.0] * 8, {}),
        ([float("nan")] * 8, {}),
        ([-1.0] * 8, {}),
        ([1.0] * 7, {}),
        ([1.0] * 8, {"llama__rope__scaling__factor": 2.0}),
    ],
)
def test_wrong_divisors_are_refused(divisors: list[float], keys: dict[str, Any], tmp_path: Path) -> None:
    more = {"rope_freqs.weight": Tensor(np.asarray(divisors, np.float32))}
    path = write(tmp_path / "bad.gguf", replace(with_keys(**keys), tensors=tensors() | more))
    with pytest.raises(USER_ERRORS, match=r"bad\.gguf: rope_freqs\.weight"):
        use_gguf(path)


# Commands.


def test_commands_refuse_in_one_message(duo: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", with_tensor(Q, offset=2**64 - 32))
    assert_refused(duo("inspect", "--model", path), "bad.gguf", Q)
    path = write(tmp_path / "bad.gguf", with_keys(llama__attention__head_count=0))
    assert_refused(duo("inspect", "--model", path), "bad.gguf", "llama.attention.head_count", "got 0")


def test_a_model_is_made_of_the_right_file(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m.gguf", File()))
    np.testing.assert_array_equal(model.params["embed"]["embedding"][...], tensors()["token_embd.weight"].data)
