"""The command: checks and measures the kernels section by section, within a time limit."""

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from duo_eval.gpu_suite.section import Case
from duo_eval.gpu_suite.sections import SECTIONS, WITHOUT_BACKEND, describe
from duo_eval.runner.process import ProcessError, Worker
from duo_eval.runner.record import Record

# Exit status when time ran out before the end: call the command again.
UNFINISHED = 75


@dataclass(frozen=True)
class Suite:
    """Check the kernels on this GPU and measure them."""

    out: Path
    """Folder of results, a file for each section; stored results are not measured again."""
    sections: tuple[str, ...] = tuple(SECTIONS)
    """Sections, in this order."""
    backends: tuple[str, ...] = ("mosaic", "triton", "jax_triton")
    """Attention backends, the one that compiles fastest first; a case that one does not support is no failure."""
    minutes: float = 6.0
    """No case starts after this time; call again to continue."""
    case_seconds: float = 150.0
    """Time limit of a case: a kernel may hang."""
    smoke: bool = False
    """Toy sizes, to see that the suite runs, also on a CPU."""

    def run(self) -> bool:
        """Measure the cases that are missing or failed before; False if time ran out first.

        Raises:
            ValueError: an unknown section, no GPU, or a folder of other code or another machine.
            ArithmeticError: a kernel is wrong or could not run; everything else was measured.
        """
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
        with Worker(self.case_seconds) as worker:
            device = worker.call("duo_eval.speed.device:describe")
            if device["platform"] != "gpu" and not self.smoke:
                raise ValueError(f"no GPU here, only {device['device']}: --smoke tries the suite at toy sizes")
            end = time.monotonic() + 60 * self.minutes
            records = {name: self._record(name, device["device"]) for name in self.sections}
            if not all(self._measure(name, record, worker, end) for name, record in records.items()):
                return False
        results = [result for record in records.values() for result in record.results]
        bad = sum("failed" in result or not result.get("is_right", True) for result in results)
        if bad:
            raise ArithmeticError(f"{bad} results in {self.out} are wrong or failed")
        return True

    def _measure(self, name: str, record: Record, worker: Worker, end: float) -> bool:
        """Add the missing cases of a section; False if time ran out first."""
        missing = record.missing(self._cases(name))
        if not missing:
            return True
        with record.writing(device=record.head["about"]["device"], program="python -m duo_eval.gpu_suite") as append:
            for case in missing:
                if time.monotonic() > end:
                    print(f"{self.minutes:g} minutes are over: call again to continue with {name}")
                    return False
                try:
                    result = worker.call("duo_eval.gpu_suite.sections:measure", {"section": name, "case": case})
                except ProcessError as error:
                    result = {"failed": str(error)}
                append(case, result)
                print(f"{name}: {describe(name, record.results[-1])}", flush=True)
        return True

    def _cases(self, name: str) -> list[Case]:
        """The cases of a section, for each backend if that matters."""
        cases = list(SECTIONS[name].cases(smoke=self.smoke))
        if name in WITHOUT_BACKEND:
            return cases
        return [case | {"backend": backend} for case in cases for backend in self.backends]

    def _record(self, name: str, device: str) -> Record:
        """The results of a section so far, without failures; a file has those of one device and one state of the code.

        Raises:
            ValueError: a file of another device or other code.
        """
        about = {"task": "gpu-suite", "section": name, "smoke": self.smoke, "device": device, "code": _code()}
        record = Record.open(self.out / f"{name}.json", about, key="case")
        record.results = [result for result in record.results if "failed" not in result]
        return record


def _code() -> str:
    """A fingerprint of the measured code: a commit changes with any file, and does not describe a dirty tree."""
    root, digest = Path(__file__).parents[3], hashlib.sha256()
    for folder in ("pallas_kernels", "duo_jax", "eval/duo_eval/gpu_suite"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    try:
        sys.exit(0 if tyro.cli(Suite, prog="python -m duo_eval.gpu_suite").run() else UNFINISHED)
    except (ValueError, ArithmeticError) as error:
        sys.exit(f"error: {error}")
