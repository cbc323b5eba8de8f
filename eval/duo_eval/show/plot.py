"""`duo eval plot`: a file of results as figures, PNG and SVG. Which figures, `kinds` says."""

from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import tyro

from duo_eval.runner.ledger import read
from duo_eval.show.result_types import KINDS, kind_of


@dataclass(frozen=True)
class PlotTask:
    """Draw a file of results; `duo eval needle` does so too when it is done."""

    file: tyro.conf.Positional[Path]
    """What an evaluation wrote, finished or not."""
    out: Path | None = None
    """Name of the figure, without an ending; that of the file by default. Of several, each name begins with it."""

    def run(self) -> None:
        """Draw, print where."""
        for path in draw(self.file, self.out):
            print(path)


def draw(file: Path, out: Path | None = None) -> list[Path]:
    """The figures of a file of results, each as PNG and SVG.

    Raises:
        ValueError: not a file of results, or of a kind that has no figure.
        NotImplementedError: matplotlib is missing.
    """
    kind = kind_of(file)
    if kind is None or not kind.figures:
        known = ", ".join(kind.title.lower() for kind in KINDS if kind.figures)
        what = "no result that is known here" if kind is None else f"about {kind.title.lower()}"
        raise ValueError(f"{file} is {what}, which has no figure; there are figures of {known}")
    if file.suffix == ".jsonl" and not read(file)[1]:
        raise ValueError(f"{file} has no finished job yet")
    require_matplotlib()
    from duo_train.figures import save

    stem = out or file.with_suffix("")
    drawn = [*save(resolve_name(kind.poster)(file), stem)] if kind.poster else []
    for found in kind.draw(file, beside_poster=True):
        drawn += save(found.figure, stem.with_name(f"{stem.name}-{found.name}"))
    if not drawn:
        raise ValueError(f"{file} has nothing to draw yet")
    return drawn


def require_matplotlib() -> None:
    """Raise NotImplementedError if it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NotImplementedError("figures need matplotlib: pip install 'duo-jax[eval]'") from None
