"""`duo eval plot`: the figures of a file of results, as PNG and SVG."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from duo_eval.show.registry import RESULT_TYPES, type_of


@dataclass(frozen=True)
class PlotTask:
    """Draw a file of results; `duo eval needle` and `duo eval recall` do so too when they finish."""

    file: tyro.conf.Positional[Path]
    """File that an evaluation wrote, finished or not."""
    out: Path | None = None
    """Name of the figure without a suffix, by default the file's name; the prefix of the names if there are several."""
    force: bool = False
    """Replace files that this command did not write."""

    def run(self) -> None:
        """Draw, print the files written."""
        kind = type_of(self.file)
        if kind is None or not kind.figures:
            known = ", ".join(kind.title.lower() for kind in RESULT_TYPES if kind.figures)
            what = "is not a known result" if kind is None else f"is about {kind.title.lower()}, which has no figure"
            raise ValueError(f"{self.file} {what}; there are figures of {known}")
        for path in kind.save_figures(self.file, self.out, force=self.force):
            print(path)
