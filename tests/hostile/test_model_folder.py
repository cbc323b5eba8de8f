"""Hugging Face folders and saved models whose files are wrong or disagree: what transformers does, or a refusal."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duo_jax import HeadPattern, KVCache, Model, ModelConfig, load_model, load_tokenizer, prefill
from duo_jax.arrays import MOST_HEADER_BYTES, Shards
from duo_jax.checkpoint.folder import INDEX, SINGLE
from duo_jax.checkpoint.load import loaded_config
from duo_jax.checkpoint.open import open_config
from duo_jax.checkpoint.save import save_model
from duo_jax.model.rope import DividedRope
from tests.shapes import GOLDEN
from tests.text_models import save_tokenizer

# A value of a wrong type must reach the project's own checks.
pytestmark = pytest.mark.usefixtures("annotations_off")

Tensors = dict[str, np.ndarray]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the smallest llama checkpoint, to be changed."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "generation_config.json", SINGLE):
        shutil.copy(GOLDEN / "llama" / name, target / name)
    return target


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_refused(act: Callable[[], object], *words: str) -> None:
    """The errors that commands report in one line; short, with every word."""
    with pytest.raises((ValueError, OSError, NotImplementedError)) as error:
        act()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 700, message


# config.json

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "negative KV heads": ({"num_key_value_heads": -2}, "num_key_value_heads"),
    "heads as text": ({"num_attention_heads": "8"}, "num_attention_heads"),
    "heads as true": ({"num_attention_heads": True}, "num_attention_heads"),
    "layers as a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "layers as a list": ({"num_hidden_layers": [3]}, "num_hidden_layers"),
    "layers null": ({"num_hidden_layers": None}, "num_hidden_layers"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a billion layers, qwen2": ({"num_hidden_layers": 10**9, "model_type": "qwen2"}, "num_hidden_layers"),
    "vocabulary": ({"vocab_size": 2**62}, "vocab_size"),
    "head_dim": ({"head_dim": 2**40}, "head_dim"),
    "odd head_dim": ({"head_dim": 15}, "head_dim"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "negative positions": ({"max_position_embeddings": -1}, "max_position_embeddings"),
    "epsilon as text": ({"rms_norm_eps": "nan"}, "rms_norm_eps"),
    "negative epsilon": ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    "large epsilon": ({"rms_norm_eps": 1e30}, "rms_norm_eps"),
    "theta 0": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    "EOS outside": ({"eos_token_id": -1}, "EOS"),
    "EOS beyond": ({"eos_token_id": [2, 97]}, "EOS"),
    "EOS as text": ({"eos_token_id": "</s>"}, "EOS"),
    "EOS as true": ({"eos_token_id": True}, "EOS"),
    "tied as text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "bias as a number": ({"attention_bias": 1}, "attention_bias"),
    "dtype": ({"dtype": "int8"}, "dtype"),
    "dtype as a list": ({"dtype": ["float32"]}, "dtype"),
    "dtype as text": ({"dtype": "x" * 9999}, "dtype"),
    "activation null": ({"hidden_act": None}, "hidden_act"),
    "activation as a list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "activation as text": ({"hidden_act": "x" * 9999}, "activation"),
    "layer types": ({"layer_types": ["warble"] * 3}, "layer_types"),
    "layer types as a number": ({"layer_types": 3}, "contradicts itself"),
    "layers of other sizes": ({"per_layer_config": [{}]}, "per_layer_config"),
    "quantized": ({"quantization_config": ["gptq"]}, "quantized"),
    "quantized as text": ({"quantization_config": {"quant_method": "x" * 9999}}, "quantized"),
    "RoPE as text": ({"rope_scaling": {"rope_type": "x" * 9999}}, "RoPE"),
    "model type as a list": ({"model_type": ["llama"]}, "model_type"),
    "model type as text": ({"model_type": "x" * 9999}, "model_type"),
}


@pytest.mark.parametrize(("values", "word"), CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_configuration_is_refused_by_name(folder: Path, values: dict[str, Any], word: str) -> None:
    change_json(folder / "config.json", **values)
    assert_refused(lambda: open_config(folder), "config.json", word)


RAW = [b"", b"{", b"[]", b"\xff", b'{"model_type": "llama", "rms_norm_eps": NaN}', b"[" * 10**5]


@pytest.mark.parametrize("content", RAW, ids=lambda content: repr(content[:20]))
def test_a_broken_config_is_not_called_a_missing_tokenizer(folder: Path, content: bytes) -> None:
    save_tokenizer(folder, chat=False)
    (folder / "config.json").write_bytes(content)
    for load in (load_tokenizer, load_model, open_config):
        with pytest.raises(ValueError, match=r"config\.json") as error:
            load(folder)
        assert "has no tokenizer" not in str(error.value)


def test_a_byte_order_mark_is_left_out_everywhere(folder: Path) -> None:
    save_tokenizer(folder, chat=False)
    right, ids = open_config(folder), load_tokenizer(folder)("Hi").input_ids
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
        assert open_config(folder) == right and load_model(folder).config == right
        tokenizer = load_tokenizer(folder)
        assert tokenizer("Hi").input_ids == ids and tokenizer.name_or_path == str(folder)


def test_pipes_and_devices_are_not_read(folder: Path) -> None:
    save_tokenizer(folder, chat=False)
    for name in ("config.json", "generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            make(folder / name)
            assert_refused(lambda: (load_tokenizer(folder), load_model(folder)), name, "regular file")
            (folder / name).unlink()
        (folder / name).write_bytes(content)


# A fact in two places.


def tied_folder(folder: Path, head: Callable[[np.ndarray], np.ndarray]) -> Path:
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {HEAD: head(tensors[EMBED])}, folder / SINGLE)
    change_json(folder / "config.json", tie_word_embeddings=True)
    return folder


def test_a_stored_head_that_differs_is_used_with_a_warning(folder: Path) -> None:
    tied_folder(folder, lambda embed: 2 * embed)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        model = load_model(folder)
    assert not model.config.tied_head
    np.testing.assert_array_equal(model.decoder.head.kernel.get_value(), 2 * load_file(folder / SINGLE)[EMBED].T)
    with pytest.warns(UserWarning, match="differs from"):  # What `duo inspect` and `duo plan` count.
        assert loaded_config(folder).num_parameters == model.config.num_parameters


def test_an_equal_head_is_tied(folder: Path) -> None:
    assert load_model(tied_folder(folder, np.copy)).config.tied_head


@pytest.mark.filterwarnings("ignore:.*differs from model.embed_tokens")
def test_a_stored_head_of_another_shape_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"wrong shape \(1\): lm_head"):
        load_model(tied_folder(folder, lambda embed: embed[:-1].copy()))


def test_eos_ids_of_the_generation_config_are_checked(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[2, 97])
    assert_refused(lambda: open_config(folder), "generation_config.json", "97")


def shards(folder: Path, **weight_map: str) -> Path:
    """Two shards and their index, with changes: `embed=`, `norm=` are the shards that it names for them."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    second = {name: x for name, x in tensors.items() if name == "model.norm.weight"}
    save_file({name: x for name, x in tensors.items() if name not in second}, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    names = {name: "b.safetensors" if name in second else "a.safetensors" for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": names | weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({EMBED: "../a.safetensors"}, ["outside its folder", "../a.safetensors"]),
        ({EMBED: "/dev/zero"}, ["outside its folder", "/dev/zero"]),
        ({EMBED: "b.safetensors"}, [EMBED, "b.safetensors"]),
        ({"model.more": "a.safetensors"}, ["model.more", "a.safetensors"]),
        ({EMBED: "c.safetensors"}, ["lacks the shards", "c.safetensors"]),
        ({EMBED: 3}, ["weight_map"]),
        ({EMBED: "x" * 5000}, ["of 5000 characters", "xxx..."]),
    ],
)
def test_an_index_that_the_files_contradict_is_refused(folder: Path, weight_map: Any, words: list[str]) -> None:
    shards(folder, **weight_map)
    assert_refused(lambda: load_model(folder), *words)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).unlink()
    shutil.copy(folder / "b.safetensors", folder / "c.safetensors")
    assert_refused(lambda: load_model(folder), "model.norm.weight", "b.safetensors", "c.safetensors")


def test_a_whole_file_goes_before_an_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    with pytest.warns(UserWarning, match=f"{SINGLE} and {INDEX}: the first is used"):
        load_model(folder)


@pytest.mark.parametrize(("stored", "dtype"), [(np.float16, "float16"), (np.float64, "float32")])
def test_without_a_dtype_the_configuration_has_the_stored_one(folder: Path, stored: type, dtype: str) -> None:
    change_json(folder / "config.json", dtype=None)
    save_file({name: x.astype(stored) for name, x in load_file(folder / SINGLE).items()}, folder / SINGLE)
    assert open_config(folder).dtype == dtype


@pytest.mark.parametrize("stored", ["I8", "U8", "BOOL", "F8_E4M3"])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, stored: str) -> None:
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"] |= {"dtype": stored, "shape": [end - begin]}
    write_header(folder / SINGLE, json.dumps(header).encode(), content[8 + length :])
    assert_refused(lambda: load_model(folder), SINGLE, "model.norm.weight", stored)


# Tokenizers.


def test_part_of_the_tokenizer_files_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    )
    assert_refused(lambda: load_tokenizer(folder), str(folder), "tokenizer", "tokens", "97")


def test_the_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    save_tokenizer(folder, chat=False)
    change_json(folder / "config.json", vocab_size=90)
    assert_refused(lambda: load_tokenizer(folder), "another model", "97", "90")


def test_added_tokens_beyond_the_vocabulary_are_reported(folder: Path) -> None:
    save_tokenizer(folder, chat=False)
    change_json(folder / "tokenizer_config.json", pad_token="<pad>")
    with pytest.warns(UserWarning, match="98 tokens, its model 97"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_max_length", "x"),
        ("model_max_length", True),
        ("chat_template", 3),
        ("padding_side", 1),
        ("eos_token", ["</s>"]),
        ("add_bos_token", "yes"),
        ("added_tokens_decoder", []),
        ("tokenizer_class", 3),
    ],
)
def test_a_wrong_type_in_the_tokenizer_config_is_refused_by_name(folder: Path, name: str, value: Any) -> None:
    save_tokenizer(folder, chat=False)
    change_json(folder / "tokenizer_config.json", **{name: value})
    assert_refused(lambda: load_tokenizer(folder), "tokenizer_config.json", name)


def test_an_empty_special_token_is_none(folder: Path) -> None:
    save_tokenizer(folder, chat=False)
    change_json(folder / "tokenizer_config.json", unk_token="")
    assert load_tokenizer(folder).unk_token is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**5, b'{"model": 3}', b'{"version": 1}'])
def test_a_broken_tokenizer_file_is_named(folder: Path, name: str, content: bytes) -> None:
    save_tokenizer(folder, chat=False)
    (folder / name).write_bytes(content)
    try:
        load_tokenizer(folder)  # An empty configuration of a tokenizer is none.
    except (ValueError, OSError) as error:
        assert name in str(error) or "has no tokenizer" in str(error)
        assert "\n" not in str(error) and len(str(error)) < 900
    else:
        assert name == "tokenizer_config.json" and content.startswith(b"{")


# safetensors headers.


def write_header(path: Path, header: bytes, data: bytes = bytes(64), length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = json.dumps({"a": entry()})
HEADERS: dict[str, str] = {
    "empty": "",
    "a list": "[]",
    "a number": "3",
    "not JSON": "{",
    "deep": "[" * 10**5,
    "an entry that is a number": '{"a": 5}',
    "no offsets": '{"a": {"dtype": "F32", "shape": [4, 4]}}',
    "one offset": json.dumps({"a": entry(offsets=[0])}),
    "offsets as text": json.dumps({"a": entry(offsets="0 64")}),
    "offsets swapped": json.dumps({"a": entry(offsets=[64, 0])}),
    "negative offsets": json.dumps({"a": entry(offsets=[-64, 0])}),
    "offsets beyond the file": json.dumps({"a": entry(shape=[8, 4], offsets=[0, 128])}),
    "huge offsets": json.dumps({"a": entry(shape=[2**60], offsets=[0, 2**62])}),
    "bytes that no array has": json.dumps({"a": entry(shape=[2, 4], offsets=[0, 32])}),
    "overlap": json.dumps({"a": entry(), "b": entry(shape=[4, 2], offsets=[16, 48])}),
    "a shape of other bytes": json.dumps({"a": entry(shape=[4, 5])}),
    "a shape that overflows": json.dumps({"a": entry(shape=[2**40, 2**40])}),
    "negative shape": json.dumps({"a": entry(shape=[-4, -4])}),
    "unknown dtype": json.dumps({"a": entry("Q4")}),
    "dtype as a number": json.dumps({"a": entry() | {"dtype": 3}}),
    "a name twice": f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_wrong_header_is_refused_with_the_file(tmp_path: Path, header: str) -> None:
    path = write_header(tmp_path / "x.safetensors", header.encode())
    assert_refused(lambda: Shards([path]).shapes, "x.safetensors")


def test_a_good_header_is_read(tmp_path: Path) -> None:
    found = Shards([write_header(tmp_path / "x.safetensors", GOOD.encode())])
    assert (found.shapes, found.dtypes) == ({"a": (4, 4)}, {"a": "F32"})
    np.testing.assert_array_equal(found.read("a"), np.zeros((4, 4), np.float32))


@pytest.mark.parametrize("length", [65, 2**32, 2**63, 2**64 - 999])
def test_a_header_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_header(tmp_path / "x.safetensors", GOOD.encode(), b"", length=length + len(GOOD))
    assert_refused(lambda: Shards([path]).shapes, "x.safetensors", "truncated")


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", b"", b"", length=2**32)
    os.truncate(path, 2**33)  # A sparse file.
    assert_refused(lambda: Shards([path]).shapes, "x.safetensors", str(MOST_HEADER_BYTES))


# Saved models.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_model(load_model(GOLDEN / "llama", weight_dtype="int8"), path)
    return path


SAVED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a million layers": (lambda values: values.update(num_layers=10**6), "num_layers"),
    "more layers than arrays": (lambda values: values.update(num_layers=5000), "layers"),
    "another number of layers": (lambda values: values.update(num_layers=2), "do not match"),
    "layers as text": (lambda values: values.update(num_layers="3"), "num_layers"),
    "epsilon": (lambda values: values.update(norm_eps=-1.0), "norm_eps"),
    "no epsilon": (lambda values: values.pop("norm_eps"), "norm_eps"),
    "rope as text": (lambda values: values.update(rope="x"), "version"),
    "rope of another type": (lambda values: values["rope"].update(type="warble"), "warble"),
    "rope without theta": (lambda values: values["rope"].pop("theta"), "theta"),
    "rope with theta 0": (lambda values: values["rope"].update(theta=0.0), "theta"),
    "rope with more": (lambda values: values["rope"].update(more=1), "more"),
    "EOS": (lambda values: values.update(eos_ids=[97]), "EOS"),
    "EOS as a number": (lambda values: values.update(eos_ids=2), "version"),
    "family": (lambda values: values.update(family="warble"), "warble"),
    "dtype": (lambda values: values.update(dtype="int8"), "dtype"),
    "weight_dtype": (lambda values: values.update(weight_dtype=5), "weight_dtype"),
    "other weight_dtype": (lambda values: values.update(weight_dtype=None), "do not match"),
    "tied": (lambda values: values.update(tied_head="no"), "tied_head"),
    "more": (lambda values: values.update(more=1), "more"),
}


@pytest.mark.parametrize(("change", "word"), SAVED.values(), ids=SAVED)
def test_a_wrong_saved_model_is_refused(saved: Path, tmp_path: Path, change: Callable, word: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    values = json.loads((folder / "duo_model.json").read_text())
    change(values)
    (folder / "duo_model.json").write_text(json.dumps(values))
    assert_refused(lambda: load_model(folder), "model", word)


def test_arrays_of_another_type_in_a_saved_model_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    save_file({name: x.astype(np.float16) if x.dtype == np.int8 else x for name, x in load_file(path).items()}, path)
    assert_refused(lambda: load_model(folder), "do not match its configuration")


def test_a_saved_model_with_stored_divisors_is_read_again(tmp_path: Path, tiny: Model) -> None:
    rope = DividedRope(1e4, divisors=tuple(range(1, 9)))
    model = Model.random(ModelConfig(**vars(tiny.config) | {"rope": rope}))
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").config.rope == rope


def test_divisors_of_other_heads_are_refused(tiny: Model) -> None:
    assert_refused(lambda: ModelConfig(**vars(tiny.config) | {"rope": DividedRope(divisors=(1.0,))}), "divisors")


# Arguments.


def test_a_pattern_needs_a_mesh(folder: Path) -> None:
    pattern = HeadPattern.full(open_config(folder))
    assert_refused(lambda: load_model(folder, pattern=pattern), "mesh=", "KVCache.init")


@pytest.mark.parametrize("mesh", ["text", 3, ("data",)])
def test_a_mesh_is_a_mesh(folder: Path, mesh: Any) -> None:
    assert_refused(lambda: load_model(folder, mesh=mesh), "mesh", "make_mesh")


def test_a_source_is_a_path_or_a_name() -> None:
    for source in (3, None, ["a"]):
        assert_refused(lambda source=source: load_model(source), "path or a name")


def test_more_weights_than_memory_are_refused(tiny: Model) -> None:
    huge = ModelConfig(**vars(tiny.config) | {"vocab_size": 10**8, "embed_dim": 10**6})
    assert_refused(lambda: Model.random(huge), "memory", "dtype")


def test_logits_are_those_of_the_stored_head(folder: Path) -> None:
    tied_folder(folder, lambda embed: -embed)
    with pytest.warns(UserWarning, match="differs"):
        model = load_model(folder)
    change_json(folder / "config.json", tie_word_embeddings=False)
    tokens = np.asarray([[3, 4, 5, 6]])
    one, other = (
        prefill(each, tokens, KVCache.init(each.config, None, 1, 8))[0] for each in (model, load_model(folder))
    )
    np.testing.assert_array_equal(one, other)
