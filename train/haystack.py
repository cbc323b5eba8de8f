"""Haystacks: long real texts in which needles are hidden. Text only; knows no tokenizer."""

from pathlib import Path

# The default: reference pages of the Python language, 465 thousand characters that every Python ships.
DEFAULT = "pydoc"


def load_haystack(source: str = DEFAULT) -> str:
    """The text of a haystack: `pydoc`, a UTF-8 text file, or a folder whose `*.txt` files are joined in order.

    Raises:
        FileNotFoundError: no such file, or a folder without text files.
        ValueError: a file that is not UTF-8 text.
    """
    if source == DEFAULT:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(source)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no haystack at {source!r}: give {DEFAULT!r}, a text file, or a folder of *.txt files")
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise ValueError(f"a haystack must be UTF-8 text, in {source!r}: {error}") from None
