"""Writing a figure as PNG and SVG."""

from pathlib import Path

from matplotlib.figure import Figure

from duo_jax.figures import check_figure, write_figure


def save(figure: Figure, stem: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg, and create their folder; raises as `check`."""
    paths = check(stem, force=force)
    for path in paths:
        write_figure(figure, path, force=force)
    return paths


def check(stem: Path, *, force: bool = False) -> tuple[Path, Path]:
    """The paths of both files.

    Raises:
        FileExistsError: there is a file that this project did not write, and it is not to be replaced by `force`.
        ValueError, PermissionError: nothing can be written there.
    """
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    for path in (png, svg):
        check_figure(path, force=force)
    return png, svg
