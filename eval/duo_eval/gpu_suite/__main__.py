"""The command: which sections, where to, how long."""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from duo_eval.gpu_suite.section import Case
from duo_eval.gpu_suite.worker import SECTIONS, Worker
from duo_eval.runner.record import provenance, write


@dataclass(frozen=True)
class Suite:
    """Check the kernels on this GPU and measure them."""

    out: Path
    """Folder of results, a file a section; what is there already is not measured again."""
    sections: tuple[str, ...] = tuple(SECTIONS)
    """Sections, in this order."""
    backends: tuple[str, ...] = ("triton", "mosaic", "jax_triton")
    """Attention backends; what one says it cannot do is written down, and is no failure."""
    minutes: float = 6.0
    """No case is begun after so long; call again to go on."""
    case_seconds: float = 150.0
    """A case that takes longer is given up: a kernel may hang."""
    smoke: bool = False
    """Toy sizes: does it run? On a CPU too."""

    def run(self) -> bool:
        """Measure what the folder lacks, and what failed before; False if time ran out first.

        Raises:
            ValueError: an unknown section, no GPU, or a folder of other code or another machine.
            ArithmeticError: a kernel is wrong, or could not be run; everything else was measured.
        """
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
        worker = Worker(self.case_seconds)
        try:
            return self._measure(worker)
        finally:
            worker.stop()

    def _measure(self, worker: Worker) -> bool:
        begin, bad, here = time.monotonic(), 0, worker.device()
        if not here["is_gpu"] and not self.smoke:
            raise ValueError(f"no GPU here, only {here['device']}: --smoke tries the suite at toy sizes")
        for name in self.sections:
            path = self.out / f"{name}.json"
            record = self._open(path, here["device"])
            record["results"] = [result for result in record["results"] if "failed" not in result]
            done = [result["case"] for result in record["results"]]
            for case in self._cases(name):
                if case in done:
                    continue
                if time.monotonic() - begin > 60 * self.minutes:
                    print(f"{self.minutes:g} minutes are over: call again to go on with {name}")
                    return False
                result = worker.measured(name, case)
                record["results"].append(result)
                write(path, record)
                said = result.get("failed") or result.get("cannot") or SECTIONS[name].line(case, result)
                print(f"{name}: {said}", flush=True)
            bad += sum("failed" in result or not result.get("is_right", True) for result in record["results"])
        if bad:
            raise ArithmeticError(f"{bad} results in {self.out} are wrong or failed")
        return True

    def _cases(self, name: str) -> list[Case]:
        """As they read back from JSON; of each backend, where it matters which."""
        cases = list(SECTIONS[name].cases(smoke=self.smoke))
        if name != "ceilings":
            cases = [case | {"backend": backend} for case in cases for backend in self.backends]
        return json.loads(json.dumps(cases))

    def _open(self, path: Path, device: str) -> dict[str, Any]:
        """The section's record, begun if there is none."""
        about = provenance(
            asdict(self) | {"sections": None, "minutes": None, "case_seconds": None},
            program="python -m duo_eval.gpu_suite",
        )
        about |= {"device": device, "code": _code()}
        if not path.exists():
            return about | {"results": []}
        record = json.loads(path.read_text(encoding="utf-8"))
        if any(record.get(name) != about[name] for name in ("device", "code")):
            raise ValueError(f"{path} was measured on another device or with other code; choose another --out")
        return record


def _code() -> str:
    """A fingerprint of what is measured: a commit changes with everything, and says nothing of a dirty tree."""
    root, found = Path(__file__).parents[3], hashlib.sha256()
    for folder in ("pallas_kernels", "duo_jax", "eval/duo_eval/gpu_suite"):
        for path in sorted((root / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    try:
        sys.exit(0 if tyro.cli(Suite, prog="python -m duo_eval.gpu_suite").run() else 75)
    except (ValueError, ArithmeticError) as error:
        sys.exit(f"error: {error}")
