"""Named arrays in safetensors shards: written shard by shard, read array by array. Knows no model and no cache."""

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duo_jax.reading import decode, parse_object
from duo_jax.sizes import nbytes

# A header takes about a hundred bytes for each array; it is read whole, and takes many times that in memory.
MOST_HEADER_BYTES = 1 << 24
# The most bytes of a shard, unless one array has more: this much is copied to the host at a time.
SHARD_BYTES = 1 << 30
# Data types by safetensors' names.
DTYPES = {
    name: jnp.dtype(dtype)
    for name, dtype in (
        ("BOOL", "bool"),
        *((f"I{bits}", f"int{bits}") for bits in (8, 16, 32, 64)),
        *((f"U{bits}", f"uint{bits}") for bits in (8, 16, 32, 64)),
        *((f"F{bits}", f"float{bits}") for bits in (16, 32, 64)),
        ("BF16", "bfloat16"),
        ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E8M0", "float8_e8m0fnu"),
    )
}


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
            # If the message has the system's error number, raise what the system would.
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
    """Arrays of several safetensors files, by name.

    Attributes:
        files: their paths.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Nothing is read yet."""
        self.files = paths

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array, from the files' headers.

        Raises:
            ValueError: a file that is truncated or not in this format, by name; an array that is in two files.
        """
        return {name: array.shape for name, array in self._arrays.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Data type of every array, as safetensors names it (F32, BF16, ...); raises as `shapes`."""
        return {name: array.dtype for name, array in self._arrays.items()}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The file that has each array; raises as `shapes`."""
        return {name: array.path for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """Read one array, without mapping its file: pages of a mapped file count as memory of the process.

        Raises:
            ValueError: a data type that numpy does not have, or a file that has become shorter.
        """
        array = self._arrays[name]
        if (dtype := DTYPES.get(array.dtype)) is None:
            raise ValueError(f"{array.path}: {name} is stored as {array.dtype}, not as one of {', '.join(DTYPES)}")
        count = math.prod(array.shape)
        content = np.fromfile(array.path, dtype, count, offset=array.start)
        if len(content) < count:
            raise ValueError(f"{array.path} became shorter while it was read")
        return content.reshape(array.shape)

    @cached_property
    def _arrays(self) -> dict[str, "_Stored"]:
        """Where and how every array is stored."""
        arrays: dict[str, _Stored] = {}
        for path in self.files:
            for array in _header(path):
                if (other := arrays.setdefault(array.name, array)) is not array:
                    raise ValueError(
                        f"{array.name} is in {other.path} and in {path}: remove the one that is not part of the model"
                    )
        return arrays


@dataclass(frozen=True)
class _Stored:
    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Its first byte in the file."""


def _header(path: Path) -> list[_Stored]:
    """A file's arrays.

    safetensors checks offsets, shapes and data types. It accepts a name that appears twice, and rejects a truncated
    file without naming what it lacks.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file: arrays are read from safetensors files")
    size = status.st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length <= size and length > MOST_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes; the most that is read is {MOST_HEADER_BYTES}")
        content = file.read(length) if 8 + length <= size else b""
    try:
        header = parse_object(decode(content, "its header"), "its header")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        offsets = {name: [8 + length + int(x) for x in entry["data_offsets"]] for name, entry in entries.items()}
        ends = {name: end for name, (_, end) in offsets.items()}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        reason = f" ({error})" if content and isinstance(error, ValueError) else ""
        raise ValueError(f"{path} is truncated or not a safetensors file{reason}") from None
    cut = [name for name, end in ends.items() if end > size]
    if cut:
        raise ValueError(
            f"{path} is truncated: it has {size} bytes of {max(ends.values())}, so that {first_names(cut)} "
            "cannot be read"
        )
    try:
        with safe_open(path, framework="numpy") as shard:
            views = [(name, shard.get_slice(name)) for name in shard.keys()]  # noqa: SIM118
            return [
                _Stored(name, path, tuple(view.get_shape()), view.get_dtype(), offsets[name][0]) for name, view in views
            ]
    except SafetensorError as error:
        reason = " ".join(str(error).split())  # It repeats what the file says.
        raise ValueError(f"{path} is not a valid safetensors file: {reason:.200}") from None


def first_names(names: Sequence[str]) -> str:
    """The first three names of a list, in one line, and how many more there are."""
    first = (name if name.isprintable() and len(name) < 200 else repr(name)[:200] for name in names[:3])
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
