"""Files of figures: drawn in memory and written whole, with a mark by which this project knows its own."""

import io
from pathlib import Path
from typing import Any

from duo_jax.files import check_output, write_bytes

# Where PNG files name the program, and SVG files the author.
MARK = "duo-jax"


def check_figure(path: Path, *, force: bool = False) -> None:
    """Check before the work that a figure can be written.

    Raises:
        ValueError: a suffix other than .png and .svg; others as `check_output`.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"figures are written as .png and .svg, got {path}")
    check_output(path, is_figure, force=force)


def write_figure(figure: Any, path: Path, *, dpi: int = 200, force: bool = False) -> None:
    """Write a matplotlib figure as PNG or SVG, by the suffix; raises as `check_figure` and `write_bytes`."""
    check_figure(path, force=force)
    write_bytes(path, figure_bytes(figure, path.suffix.lower().lstrip("."), dpi=dpi))


def figure_bytes(figure: Any, kind: str, *, dpi: int = 200) -> bytes:
    """A matplotlib figure as `png` or `svg`. The same figure gives the same bytes; text in an SVG stays text."""
    from matplotlib import rc_context

    file = io.BytesIO()
    metadata = {"Software": MARK} if kind == "png" else {"Creator": MARK, "Date": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "duo"}):
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)
    return file.getvalue()


def is_figure(head: bytes) -> bool:
    """Whether a file that begins like this is a figure that `figure_bytes` made."""
    return MARK.encode() in head and (head.startswith(b"\x89PNG\r\n") or b"<svg" in head)
