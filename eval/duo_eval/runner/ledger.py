"""A file of results that outlives a kill: a first line that says what it is, then a record for each finished job.

Knows no task: a job is any dataclass, and its record holds it under "job".
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jax
import numpy as np

from duo_eval.runner.record import provenance
from duo_jax import HeadPattern
from duo_jax.differences import changes
from duo_jax.files import lock, write_text

J = TypeVar("J")

# What a first line has, and every other.
HEAD, JOB = {"about", "runs"}, {"job"}


@dataclass(frozen=True, eq=False)
class Ledger:
    """What a file has, and how to go on with it.

    Attributes:
        path: the file, there or not.
        head: its first line: what it is ("about"), what stands behind a name ("gates"), and every run so far.
        records: one for each finished job, in the order in which they were finished.
    """

    path: Path
    head: dict[str, Any]
    records: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any], gates: Mapping[str, str] | None = None) -> "Ledger":
        """What the file has already, or nothing for a new one. Nothing is written yet.

        Args:
            path: the file.
            about: the settings that all of its records share.
            gates: fingerprints of gates and data by name: later runs may add names, but not give one another meaning.

        Raises:
            ValueError: not a file of results, or one with other settings, or other gates or data under a name.
        """
        about = json.loads(json.dumps(about))
        gates = dict(gates or {})
        if path.is_dir():
            raise ValueError(f"{path} is a folder: --out names a file")
        if not path.exists() or not path.stat().st_size:
            return cls(path, {"about": about, "gates": gates, "runs": []}, [])
        try:
            head, records = read(path)
        except ValueError as error:
            raise ValueError(f"{error}; choose another --out") from None
        if unlike := _unlike(head, {"about": about, "gates": gates, "runs": []}):
            raise ValueError(f"{path} was made with {unlike}; choose another --out")
        return cls(path, head | {"gates": head.get("gates", {}) | gates}, records)

    def missing(self, jobs: Iterable[J]) -> list[J]:
        """The jobs without a record, in their order, each once."""
        done = {_key(record["job"]) for record in self.records}
        wanted = {_key(asdict(job)): job for job in jobs}  # type: ignore[call-overload]
        return [job for key, job in wanted.items() if key not in done]

    @contextmanager
    def writing(self, *, dtype: str) -> Iterator[Callable[[Any, Mapping[str, Any]], None]]:
        """Note a new run, then append `(job, result)` as they come; each is on its way to the disk when the call ends.

        Args:
            dtype: in which the run computes.

        Raises:
            ValueError: another process writes to the file, or did since it was opened here; or it has results of
                another data type.
        """
        run = provenance() | {"device": jax.devices()[0].device_kind, "dtype": dtype}
        if unlike := _unlike(self.head, {**self.head, "runs": [run]}):
            raise ValueError(f"{self.path} was made with {unlike}; ask for that one, or choose another --out")
        file = self._replaced(self.head | {"runs": [*self.head["runs"], run]}, self.records)
        try:

            def append(job: Any, result: Mapping[str, Any]) -> None:
                file.write(json.dumps({"job": asdict(job), **result}) + "\n")
                file.flush()

            yield append
        finally:
            file.close()

    def _replaced(self, head: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> TextIO:
        """The file, open and locked, with these lines in place of what was read from it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as held:
            self._lock(held)
            there = read(self.path)[1] if self.path.stat().st_size else []
            if len(there) != len(self.records):
                raise ValueError(f"{self.path} was written to in the meantime: start again")
            # Written anew: a record that a kill cut off is left out.
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in (head, *records)))
            file = self.path.open("a", encoding="utf-8")
            self._lock(file)
        return file

    def _lock(self, file: TextIO) -> None:
        """Lock an open file; whoever wrote the path anew in the meantime has it."""
        try:
            lock(file.fileno(), self.path)
            if os.fstat(file.fileno()).st_ino != self.path.stat().st_ino:
                raise ValueError(f"another process wrote {self.path} anew: start again")
        except ValueError:
            file.close()
            raise


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a result and its records, without a last line that a kill cut off, each job once.

    Raises:
        ValueError: not a file of results, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    found: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) > 1 and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(found[-1], dict) or not (HEAD if number == 1 else JOB) <= set(found[-1]):
            raise ValueError(f"{path}:{number} is no line of a file of results")
    if not found:
        raise ValueError(f"{path} is empty, not a file of results")
    return found[0], list({_key(record["job"]): record for record in found[1:]}.values())


def merge(paths: Sequence[Path], out: Path) -> tuple[int, int]:
    """Write one file with what several have: each job once, as the first file has it.

    Args:
        paths: files that one command wrote with the same settings.
        out: the file to write; one of them, or a new one.

    Returns:
        How many jobs it has, and how many of these were in more than one file.

    Raises:
        ValueError: files that do not belong together, or another result in `out`, or a process that writes to it.
    """
    if len(paths) < 2:
        raise ValueError(f"need two or more files to merge, got {len(paths)}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: --out names a file")
    there = out.exists() and out.stat().st_size > 0
    if there and not any(path.exists() and out.samefile(path) for path in paths):
        raise ValueError(f"{out} is there already: name it among the files too, or choose another --out")
    ledger = Ledger(out, *read(out)) if there else Ledger(out, {}, [])
    files = {path: read(path) for path in paths}
    for (one, (head, _)), (two, (other, _)) in combinations(files.items(), 2):
        if unlike := _unlike(head, other):
            raise ValueError(f"{one} was made with {unlike} in {two}: they do not belong together")
    heads = [head for head, _ in files.values()]
    # Runs and gates, each once; a job's records in the order of the files.
    runs = list({json.dumps(run): run for head in heads for run in head["runs"]}.values())
    gates = {name: value for head in heads for name, value in head.get("gates", {}).items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for record in (record for _, records in files.values() for record in records):
        found.setdefault(_key(record["job"]), []).append(record)
    merged = {"about": heads[0]["about"], "gates": gates, "runs": runs}
    ledger._replaced(merged, [first for first, *_ in found.values()]).close()
    return len(found), sum(len(several) > 1 for several in found.values())


def _unlike(head: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What the first line of another file, or of a run, contradicts; nothing if they go together."""
    if different := changes(head["about"], other["about"]):
        return f"other settings: {'; '.join(different)}"
    known, new = head.get("gates", {}), other.get("gates", {})
    if changed := [name for name in new if known.get(name, new[name]) != new[name]]:
        return f"other gates or data under the name of {', '.join(changed)}"
    # A type that was not asked for is the device's, and not among the settings.
    before, now = ({run.get("dtype", "float32") for run in each["runs"]} for each in (head, other))
    if before and now and before != now:
        return f"another data type: {', '.join(sorted(before))}, not {', '.join(sorted(now))}"
    return ""


def fingerprint(pattern: HeadPattern) -> str:
    """Tells gates of the same name apart."""
    return sha256(np.ascontiguousarray(pattern.gates, np.float64).tobytes())


def sha256(content: bytes) -> str:
    """A fingerprint."""
    return hashlib.sha256(content).hexdigest()[:16]


def _key(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)
