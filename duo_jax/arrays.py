"""Named arrays in safetensors shards: written shard by shard, read array by array. Knows no model and no cache."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duo_jax.sizes import nbytes

# The most bytes of a shard, unless one array has more: this much is copied to the host at a time.
SHARD_BYTES = 1 << 30


def write_shards(folder: Path, stem: str, arrays: Iterable[tuple[str, jax.Array | np.ndarray]]) -> None:
    """Write named arrays to `stem-00000.safetensors` and so on, in a folder that exists.

    Raises:
        OSError: one could not be written, such as on a full disk.
    """
    for number, shard in enumerate(_shards(arrays)):
        path = folder / f"{stem}-{number:05}.safetensors"
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that only their owner can read.
        try:
            save_file({name: np.ascontiguousarray(x) for name, x in shard.items()}, path)
        except SafetensorError as error:
            # As the system raises it, where the message has its number.
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise OSError(f"{path} could not be written: {error}") from None
            raise OSError(code := int(found[1]), os.strerror(code), str(path)) from None
        path.chmod(mode)


def _shards(arrays: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    for name, x in arrays:
        if shard and nbytes(shard) + nbytes(x) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = x
    yield shard


class Shards:
    """Arrays of several safetensors files, by name. One file is open at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Nothing is read yet."""
        self._paths = paths
        self._open: tuple[Path, safe_open] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array, from the files' headers.

        Raises:
            ValueError: a file that is truncated or not in this format, by name.
        """
        return {name: shape for name, (_, shape) in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """Copy one array out of its file."""
        shard, _ = self._arrays[name]
        if self._open is None or self._open[0] != shard:
            self._open = None  # Unmap the last file before the next one: only one counts towards host memory.
            self._open = shard, safe_open(shard, framework="numpy")
        return self._open[1].get_tensor(name)

    @cached_property
    def _arrays(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """File and shape of every array."""
        return {name: (path, shape) for path in self._paths for name, shape in _header(path).items()}


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's arrays. A truncated file is reported with the arrays it lacks; the library only rejects it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size else b""
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        ends = {name: 8 + length + int(entry["data_offsets"][1]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is truncated or not a safetensors file") from None
    cut = [name for name, end in ends.items() if end > size]
    if cut:
        raise ValueError(
            f"{path} is truncated: it has {size} bytes of {max(ends.values())}, so that {_names(cut)} cannot be read"
        )
    try:
        with safe_open(path, framework="numpy") as shard:
            return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
