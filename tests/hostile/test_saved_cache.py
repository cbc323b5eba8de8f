"""Descriptions of saved caches whose checksum fits, but whose values do not: refused by name before memory is taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from duo_jax import HeadPattern, KVCache
from duo_jax.cache.store import ABOUT, _text_checksum
from tests.shapes import TINY

VALUES: dict[str, tuple[Any, str]] = {
    "max_length": (0, "max_length must be at least 1"),
    "length": ([30], "length must be the tokens of each row"),
    "head_dim": (10**9, "head_dim must be at most"),
    "is_retrieval": ([[2, 0]], "is_retrieval must be a table of 0 and 1"),
    "window": ([0, "8"], "recent_size must be an integer"),
    "layer_windows": ([None], "layer_windows must have an entry for each of 2 layers"),
    "page_size": ("x", "page_size must be an integer"),
    "dtypes": (["int2", "int2"], "int2"),
    "tokens": ([["a"]], "tokens must be integers"),
    "model": ([], "model must be a dict"),
    "text": (1, "text must be a str"),
}


def altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    del record["own"]
    change(record)
    (folder / ABOUT).write_text(json.dumps({**record, "own": _text_checksum(record)}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, half: HeadPattern) -> Path:
    KVCache.init(TINY, half, 1, 24).advance(jnp.full(1, 7, jnp.int32)).save(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_refused_by_name(folder: Path, name: str) -> None:
    value, words = VALUES[name]
    altered(folder, lambda record: record["about"].update({name: value}))
    with pytest.raises(ValueError, match=rf"{ABOUT} is incomplete or was altered \(.*{words}"):
        KVCache.load(folder)
    altered(folder, lambda record: record["about"].pop(name) and None)
    if name != "text":  # Older caches have none.
        with pytest.raises(ValueError, match=rf"{ABOUT} is incomplete or was altered"):
            KVCache.load(folder)


def test_arrays_of_another_shape_are_refused_by_name(folder: Path) -> None:
    altered(folder, lambda record: record["about"].update(window=[3, 5]))
    with pytest.raises(ValueError, match=r"cache is incomplete or was altered: ring_0_k must be .*\[2, 1, 8, "):
        KVCache.load(folder)
