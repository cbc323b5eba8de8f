"""`duo eval merge`: one file of results from several, such as those of devices that each measured a part of a grid."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from duo_eval.runner.record import merge


@dataclass(frozen=True)
class Merge:
    """Merge files of results that one command wrote with the same settings; each finished job is kept once."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """JSON lines of `duo eval needle`, `ruler`, `longbench`, `recall`, `precision`, `mmlu` or `humaneval`."""
    out: Path
    """File to write; one of them, or a new one. Where two have the same job, the first counts."""

    def run(self) -> None:
        """Read all, write one."""
        results, repeated = merge(self.files, self.out)
        also = f", {repeated} of them in several files (the first counts)" if repeated else ""
        print(f"{self.out} has {results} results{also}")
