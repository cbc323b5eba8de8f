"""Reads the header of a GGUF file: its metadata, and the place of every tensor. Knows no model.

Whatever the file claims is compared with the file's size before it is read. A GGUF file has no gaps: each tensor begins
where the one before ends, rounded up to the alignment, and the file ends after the last one. So a wrong count, length,
offset, shape or alignment is refused, and cannot load other bytes as weights.
"""

import functools
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

# Limits several times those of any published model (its largest part is a tokenizer's 10 MB).
MAX_HEADER_BYTES = 1 << 27
MAX_ITEMS = 1 << 22  # elements of all arrays together
MAX_ENTRIES = 1 << 16  # keys, and tensors
MAX_DIMS = 4

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "<u1",
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in a file.

    Attributes:
        path: the file.
        name: as in the file.
        kind: quantization.
        shape: slowest axis first, as numpy has it.
        start: first byte, from the beginning of the file.
    """

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def byte_shape(self) -> tuple[int, int]:
        """Rows, and bytes of a row."""
        elements, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape[:-1]), self.shape[-1] // elements * size

    def data(self) -> np.ndarray:
        """The tensor's bytes, mapped into memory, `[rows, bytes of a row]`."""
        # A plain array: every view of a memmap is registered, which takes as long as to dequantize it.
        return np.asarray(np.memmap(self.path, np.uint8, "r", offset=self.start, shape=self.byte_shape))


@dataclass(frozen=True)
class GgufHeader:
    """A file's metadata as plain Python values (arrays are lists), and its tensors in the order of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path) -> GgufHeader:
    """Read and check a header.

    Raises:
        ValueError: the file is truncated, damaged or no GGUF file.
        NotImplementedError: a version, byte order or tensor type that is not supported.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
    return _read_header(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _read_header(path: Path, _version: tuple[int, ...]) -> GgufHeader:
    """A model's configuration, tokenizer and weights are opened one by one; its vocabulary takes 0.3 s to read."""
    with path.open("rb") as file:
        return _Reader(path, file).header()


class _Reader:
    """A position in a file, and what has been read up to it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0
        self._items = 0

    def header(self) -> GgufHeader:
        """See `read_header`."""
        if (magic := self._take(4, "its first bytes")) != b"GGUF":
            raise self._broken(f"it begins with {magic!r}")
        version = self._number("<u4", "version")
        if version not in (2, 3):
            kind = "big-endian numbers" if version and version & 0xFFFF == 0 else f"GGUF version {version}"
            raise NotImplementedError(
                f"{self._path} has {kind}; little-endian versions 2 and 3 are supported: convert the model again"
            )
        num_tensors, num_keys = self._count("tensors"), self._count("keys")
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self._text(f"key {index}")
            if key in metadata:
                raise self._broken(f"key {key!r} appears twice")
            metadata[key] = self._value(key)
        tensors = tuple(self._tensors(num_tensors, metadata.get("general.alignment", 32)))
        return GgufHeader(self._path, metadata, tensors)

    def _tensors(self, count: int, alignment: Any) -> Iterator[GgufTensor]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment must be a power of 2, got {alignment!r}")
        infos = [self._tensor(index) for index in range(count)]
        names = [name for name, *_ in infos]
        if len(set(names)) < len(names):
            raise self._broken(f"tensor {max(names, key=names.count)!r} appears twice")
        start, end, expected = _round_up(self._position, alignment), self._position, 0
        for name, kind, shape, offset in infos:
            if offset != expected:
                raise self._broken(f"tensor {name!r} is at offset {offset}, and those before it end at {expected}")
            tensor = GgufTensor(self._path, name, kind, shape, start + offset)
            end = tensor.start + math.prod(tensor.byte_shape)
            if end > self._size:
                raise self._broken(f"tensor {name!r} ends at byte {end}, and the file has {self._size}")
            expected = _round_up(end - start, alignment)
            yield tensor
        if self._size > _round_up(end, alignment):
            raise self._broken(f"its last tensor ends at byte {end}, and the file has {self._size}")

    def _tensor(self, index: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        """Name, quantization, shape and offset of a tensor."""
        name = self._text(f"name of tensor {index}")
        num_dims = self._number("<u4", f"number of dimensions of {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._broken(f"tensor {name!r} has {num_dims} dimensions, and 1 to {MAX_DIMS} are possible")
        shape = tuple(self._number("<u8", f"shape of {name!r}") for _ in range(num_dims))[::-1]
        kind = self._number("<u4", f"type of {name!r}")
        if kind not in GGML_QUANT_SIZES:
            raise NotImplementedError(
                f"{self._path}: tensor {name!r} has type {kind}, which this version of gguf does not know; "
                "upgrade gguf, or download the file again if it may be damaged"
            )
        elements, _ = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in shape or shape[-1] % elements:
            raise self._broken(
                f"tensor {name!r} has shape {list(shape)}, and rows have a multiple of {elements} values"
            )
        return name, GGMLQuantizationType(kind), shape, self._number("<u8", f"offset of {name!r}")

    def _value(self, key: str) -> Any:
        kind = self._number("<u4", f"type of {key!r}")
        if kind == GGUFValueType.STRING:
            return self._text(key)
        if kind != GGUFValueType.ARRAY:
            return self._numbers(kind, 1, key)[0]
        kind, length = self._number("<u4", f"type of {key!r}"), self._number("<u8", f"length of {key!r}")
        self._items += length
        if self._items > MAX_ITEMS:
            raise self._broken(f"its arrays, up to {key!r}, have {self._items} elements, more than {MAX_ITEMS}")
        if kind == GGUFValueType.STRING:
            return [self._text(key) for _ in range(length)]
        return self._numbers(kind, length, key)

    def _numbers(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in _NUMBERS:
            raise self._broken(f"key {key!r} has a value of type {kind}, which is no number, string or array of them")
        dtype = np.dtype(_NUMBERS[GGUFValueType(kind)])
        values = np.frombuffer(self._take(count * dtype.itemsize, key), dtype)
        if kind != GGUFValueType.BOOL:
            return values.tolist()
        if (values > 1).any():
            raise self._broken(f"key {key!r} is a boolean with value {values.max()}")
        return values.astype(bool).tolist()

    def _text(self, what: str) -> str:
        content = self._take(self._number("<u8", what), what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self._broken(f"{what} is not UTF-8: {content[:40]!r}") from None

    def _count(self, what: str) -> int:
        count = self._number("<u8", f"number of {what}")
        if count > MAX_ENTRIES:
            raise self._broken(f"it claims {count} {what}, more than {MAX_ENTRIES}")
        return count

    def _number(self, dtype: str, what: str) -> int:
        return int(_STRUCTS[dtype].unpack(self._take(_STRUCTS[dtype].size, what))[0])

    def _take(self, count: int, what: str) -> bytes:
        end = self._position + count
        if end > self._size:
            raise self._broken(f"{what} ends at byte {end}, and the file has {self._size}")
        if end > MAX_HEADER_BYTES:
            raise self._broken(f"{what} ends at byte {end}, and a header has at most {MAX_HEADER_BYTES}")
        self._position = end
        content = self._file.read(count)
        if len(content) < count:
            raise self._broken("it became shorter while it was read")
        return content

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self._path} is truncated or not a GGUF file ({why[:200]}); download it again")


_STRUCTS = {"<u4": struct.Struct("<I"), "<u8": struct.Struct("<Q")}


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
