"""Reading text, JSON and JSON lines. All are bounded and checked here, and every error names the file and the line.

A byte order mark at the beginning, as some editors write, is left out everywhere.

Knows no format beyond that: a caller checks which fields an object has.
"""

import codecs
import gzip
import io
import json
import math
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from duo_jax.extras import require

# A file that is larger, packed or unpacked, is refused: reading takes a few times its size in memory.
MOST_BYTES = 1 << 29
# Objects in memory take up to twenty times the bytes of their JSON.
MOST_JSON_BYTES = 1 << 27
# Code that walks a structure (to copy, compare or write it) calls itself: far below Python's limit of 1000 calls.
MOST_LEVELS = 64
# Every integer of this many digits is also a finite float.
MOST_DIGITS = 308
# Bytes that are read, and packed bytes of .zst that are unpacked, at a time.
PIECE, ZST_PIECE = 1 << 20, 1024
# What to do about a pipe or a device.
COPY = "copy it to a file"
# JSON may have half of a UTF-16 pair as \ud83d. The resulting text is not Unicode and could not be written.
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, *, most: int = MOST_BYTES, way: str = COPY) -> str:
    r"""The text of a UTF-8 file, with `\n` at the ends of lines and no byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_bytes`; or bytes that are not UTF-8.
    """
    return decode(read_bytes(path, most=most, way=way), path).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, *, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_text` and `parse_object`.
    """
    return parse_object(read_text(path, most=most), path)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, each after `FILE:LINE` for messages; blank lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_text` and `parse_object`, with the line.
    """
    return json_lines(read_text(path), path)


def json_lines(text: str, name: object) -> Iterator[tuple[str, dict[str, Any]]]:
    r"""As `read_json_lines`, of text read before. Only `\n` ends a line: strings may contain other separators."""
    return _objects(text.split("\n"), name)


def stream_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_json_lines`, line by line: a caller that stops early reads only the beginning of a file."""
    return _objects(_lines(read_text_pieces(path)), path)


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    begun: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        begun.append(first)
        for line in others:
            yield "".join(begun)
            begun = [line]
    yield "".join(begun)


def _objects(lines: Iterable[str], name: object) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}:{number}", parse_object(line, f"{name}:{number}")


def parse_object(text: str, place: object) -> dict[str, Any]:
    """As `parse_json`, of text that must be an object."""
    value = parse_json(text, place)
    if not isinstance(value, dict):
        raise ValueError(f"{place} must contain a JSON object, not {_kind(value)}")
    return value


def parse_json(text: str, place: object) -> Any:
    """The value of a JSON text.

    Args:
        text: the whole text.
        place: the file, or file and line, for messages.

    Raises:
        ValueError: text that is not JSON; a name twice in an object; a number that is not finite; more than
            `MOST_LEVELS` levels; or half of a surrogate pair.
    """
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        # In JSON lines the place has the line already.
        line = f":{error.lineno}" if "\n" in text.strip() else ""
        raise ValueError(f"{place}{line} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{place} has JSON of more than {MOST_LEVELS} levels") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if text.count("[") + text.count("{") > MOST_LEVELS and _is_deep(value):
        raise ValueError(f"{place} has JSON of more than {MOST_LEVELS} levels")
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place} has half of a surrogate pair (\\ud800 to \\udfff), which is not text") from None
    return value


def read_bytes(path: Path, *, most: int = MOST_BYTES, way: str = COPY) -> bytes:
    """The content of a regular file; `.gz` and `.zst` are unpacked.

    Args:
        path: the file.
        most: bytes that are allowed, packed and unpacked.
        way: what to do about a pipe or a device, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, pipe or device; more than `most` bytes; or a packed file that is truncated or damaged.
    """
    if path.is_file() and path.stat().st_size > most:
        raise _too_large(path, most)
    content = io.BytesIO()
    for piece in read_pieces(path, most=most, way=way):
        content.write(piece)
    return content.getvalue()


def read_pieces(path: Path, *, most: int = MOST_BYTES, way: str = COPY) -> Iterator[bytes]:
    """As `read_bytes`, piece by piece: a caller that stops early reads only the beginning of a file, however large."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is a folder, and only regular files are read here: give a file")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe or a device, and only regular files are read here: {way}")
    size = 0
    with path.open("rb") as file:
        for piece in _unpacked(path, file):
            size += len(piece)
            if size > most:
                raise _too_large(path, most)
            yield piece


@contextmanager
def without_marks(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder for libraries that read files themselves and know no byte order mark, which is accepted here everywhere.

    It is the folder itself, unless one of the named files begins with a mark: then it is a temporary folder with links,
    and copies of these files without the mark.
    """
    marked = [name for name in names if _has_mark(folder / name)]
    if not marked:
        yield folder
        return
    with TemporaryDirectory(prefix="duo-jax-") as temporary:
        for file in folder.iterdir():
            copy = Path(temporary) / file.name
            if file.name in marked:
                copy.write_bytes(read_bytes(file).removeprefix(codecs.BOM_UTF8))
            else:
                copy.symlink_to(file.absolute())
        yield Path(temporary)


def _has_mark(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def read_text_pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, piece by piece, without a byte order mark; ends of lines are as in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_bytes`; or bytes that are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for piece in read_pieces(path):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_text(path, f"byte {error.object[error.start]:#x}: {error.reason}") from None


def decode(content: bytes, place: object) -> str:
    """UTF-8 text, without a byte order mark.

    Raises:
        ValueError: other bytes, with the place.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(place, error) from None


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _unpacked_zst(path, file)
        return
    source: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    while True:
        try:
            piece = source.read(PIECE)
        except (EOFError, OSError, zlib.error) as error:
            if source is file:
                raise
            raise ValueError(f"{path} is no gzip file, or is truncated: {error}") from None
        if not piece:
            return
        yield piece


def _unpacked_zst(path: Path, file: BinaryIO) -> Iterator[bytes]:
    require(str(path), ("zstandard",))
    from zstandard import ZstdDecompressor, ZstdError

    # A frame whose window is larger would take as much memory before its first byte.
    unpack = ZstdDecompressor(max_window_size=1 << 27)
    # Frame by frame: zstandard's file objects accept a truncated file as complete. In small pieces: a kilobyte may
    # stand for 30 MB.
    packed = file.read(ZST_PIECE)
    while packed:
        frame = unpack.decompressobj()
        while not frame.eof:
            if not packed:
                raise ValueError(f"{path} is cut off: its last zstd frame has no end")
            try:
                piece = frame.decompress(packed)
            except ZstdError as error:
                raise ValueError(f"{path} is not a zstd file: {error}") from None
            yield piece
            packed = frame.unused_data if frame.eof else file.read(ZST_PIECE)
        packed = packed or file.read(ZST_PIECE)


def _too_large(path: Path, most: int) -> ValueError:
    return ValueError(f"{path} has more than {most} bytes, the most that is read of such a file: make it smaller")


def _not_text(place: object, reason: object) -> ValueError:
    return ValueError(f"{place} is not UTF-8 text: {reason}; save it in that encoding")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the name {twice[:80]!r} appears twice in one object")
    return values


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits, more than {MOST_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _is_deep(value: Any) -> bool:
    level, left = 0, [value]
    while left:
        level += 1
        values = (each for parent in left for each in (parent.values() if isinstance(parent, dict) else parent))
        left = [each for each in values if isinstance(each, dict | list)]
    return level > MOST_LEVELS


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
