"""A figure as SVG inside a page: its ink takes the page's colour, its ids are its own, a title says what it shows."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib import rc_context

# Everything drawn in this colour takes that of the page's text.
INK = "#232425"
# Colours are looked up while a figure is made.
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "font.family": "sans-serif",
}


@contextmanager
def page_style() -> Iterator[None]:
    """Figures made inside fit a page, light or dark."""
    with rc_context(STYLE):
        yield


def inline(figure: Any, number: int, alt: str) -> str:
    """An `<svg>` element; `number` is the figure's on its page."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "duo"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page's parser knows the namespaces. Its width is the page's matter.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    wide = round(float(re.search(r'width="([\d.]+)pt"', text).group(1)) * 4 / 3)  # type: ignore[union-attr]
    text = re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1", text)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>f{number}-", text)
    text = text.replace(INK, "currentColor").replace("DejaVu Sans", "system-ui")
    name = f"f{number}-title"
    opening = f'<svg role="img" aria-labelledby="{name}" style="max-width: {wide}px"'
    return text.replace("<svg", opening, 1).replace(">", f'><title id="{name}">{escape(alt)}</title>', 1)
