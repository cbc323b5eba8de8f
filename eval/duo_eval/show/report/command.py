"""`duo report`: which folder, where to."""

from dataclasses import dataclass
from pathlib import Path

from duo_eval.show.result_type import require_matplotlib
from duo_jax.files import write_text


@dataclass(frozen=True)
class Report:
    """Show a folder of results as one HTML page: figures, tables, and where each comes from."""

    results: Path = Path("eval/results")
    """Folder of results; everything below it is read."""
    out: Path = Path("report.html")
    """File to write; it loads nothing from anywhere, and can be sent as it is."""

    def run(self) -> None:
        """Read, draw, write.

        Raises:
            ValueError: files that could not be shown; the page is written all the same, and names them.
        """
        if not self.results.is_dir():
            raise FileNotFoundError(f"no folder {self.results}: --results names a folder of results")
        require_matplotlib()
        from duo_eval.show.report.page import Page

        page = Page.of(self.results)
        write_text(self.out, page.html())
        print(f"{self.out}: {len(page.parts)} results" + (f", {len(page.unknown)} not known" if page.unknown else ""))
        if page.broken:
            listed = "".join(f"\n  {path}: {reason}" for path, reason in page.broken.items())
            raise ValueError(f"{len(page.broken)} files could not be shown, the page says so too:{listed}")
