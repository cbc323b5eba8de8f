"""`duo report`: writes the page of a folder."""

from dataclasses import dataclass
from pathlib import Path

from duo_jax.files import check_output, write_text


@dataclass(frozen=True)
class Report:
    """Show a folder of results as one HTML page: figures, tables, and their provenance."""

    packages = ("matplotlib", "scipy", "tabulate")
    results: Path = Path("eval/results")
    """Folder of results, read with all its subfolders."""
    out: Path = Path("report.html")
    """File to write; it is self-contained and can be sent by itself."""
    force: bool = False
    """Replace a file at --out that this command did not write."""

    def run(self) -> None:
        """Read, draw, write.

        Raises:
            ValueError: no result, and nothing is written; or files that could not be shown, which the page lists.
            FileExistsError: --out is a file that is no report.
        """
        check_output(self.out, is_report, force=self.force)
        if not self.results.is_dir():
            raise FileNotFoundError(f"no folder {self.results}: --results names a folder of results")
        from duo_eval.show.report.page import Page

        page = Page.of(self.results)
        if not page.parts and not page.broken:
            others = f", only {len(page.unknown)} other files" if page.unknown else ""
            raise ValueError(f"{self.results} has no results{others}: --results names a folder with files of duo eval")
        write_text(self.out, page.html())
        print(
            f"{self.out}: {len(page.parts)} results" + (f", {len(page.unknown)} unknown files" if page.unknown else "")
        )
        if page.broken:
            listed = "".join(f"\n  {path}: {reason}" for path, reason in page.broken.items())
            raise ValueError(f"{len(page.broken)} files could not be shown; the page lists them too:{listed}")


def is_report(head: bytes) -> bool:
    """Whether a file that begins like this is a page of this command."""
    return b'<meta name="color-scheme" content="light dark">\n<title>Results in ' in head
