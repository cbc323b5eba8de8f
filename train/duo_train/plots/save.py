"""Writing a figure as PNG and SVG."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg, and create their folder; text in the SVG stays text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    figure.savefig(png, dpi=200)
    # No date and fixed ids, so that the same figure gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "duo"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg
