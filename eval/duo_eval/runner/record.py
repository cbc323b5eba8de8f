"""A file of results that survives a kill: a head that states what it is, and a result for each finished job.

In a file of lines the head is the first line and every result another line. A `.json` file, and every file whose
results are not stored under "job", is one object: the fields of the head, and "results". The head has three fields:
"about", the settings that all results share; "gates", fingerprints of gates and data that settings only name; and
"runs", the provenance of each run that added results.

Knows no task: a job is a dataclass or a mapping, stored in its result under the record's key.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from duo_eval.runner.provenance import provenance
from duo_jax import HeadPattern
from duo_jax.differences import changes
from duo_jax.files import append_text, check_output, locked, write_text
from duo_jax.finite import json_text
from duo_jax.reading import parse_object, read_text

J = TypeVar("J")
Head = dict[str, Any]
Result = dict[str, Any]

# The most jobs of a file: their list is in memory.
MOST_JOBS = 200_000


@dataclass(eq=False)
class Record:
    """The contents of a file of results, and how to add to them.

    Attributes:
        path: the file; it need not exist yet. None: the results are not kept.
        head: "about", "gates" and "runs", and whatever else a command stores there.
        results: one for each finished job, in the order in which they finished.
        key: the field of a result that contains its job.
        one_object: write one object, as into a `.json` file, whatever the path's suffix is.
    """

    path: Path | None
    head: Head
    results: list[Result]
    key: str = "job"
    one_object: bool = False

    def __post_init__(self) -> None:
        """Remember the number of results, to detect another writer."""
        self._stored = len(self.results)
        self.one_object = self.one_object or (self.path is not None and self.path.suffix == ".json")

    @classmethod
    def open(
        cls,
        path: Path | None,
        about: Mapping[str, Any],
        sources: Mapping[str, str] | None = None,
        *,
        key: str = "job",
        again: bool = False,
    ) -> "Record":
        """Read a file that this run would add to, or start a new record. Nothing is written yet.

        Args:
            path: the file.
            about: the settings that all results share; "task" names the command. "out", the path, is not stored.
            sources: fingerprints of gates and data by name. A later run may add names, but not change a fingerprint.
            key: the field of a result that contains its job.
            again: measure everything again: drop the results of an earlier run of the same task, whatever its settings.

        Raises:
            ValueError, PermissionError: nothing can be written there, the file is not a file of results, or it belongs
                to another run.
        """
        settings = {name: value for name, value in about.items() if name != "out"}
        head = {"about": json.loads(json.dumps(settings)), "gates": dict(sources or {}), "runs": []}
        if path is not None:
            check_output(path)
        one_object = again or key != "job"  # Only results with a job can be lines.
        if path is None or not _has_text(path):
            return cls(path, head, [], key, one_object)
        try:
            old, results = read(path)
        except ValueError as error:
            raise ValueError(f"{error}; choose another --out") from None
        names = [each["about"].get("task") for each in (old, head)]
        if again and names[0] != names[1]:
            raise ValueError(f"{path} is a result of {names[0]}, not of {names[1]}; choose another --out")
        if not again and (conflict := contradiction(old, head)):
            raise ValueError(f"{path} was made with {conflict}; choose another --out")
        record = cls(path, head if again else old | {"gates": old["gates"] | head["gates"]}, results, key, one_object)
        record.results = [] if again else results
        return record

    def missing(self, jobs: Iterable[J]) -> list[J]:
        """The jobs without a result, in their order, each once.

        Raises:
            ValueError: the file has a job without the fields that all of these have, or with values of other types; or
                more jobs than anyone waits for, whose list would take all memory.
        """
        by_text, kinds = {}, _Kinds()
        wanted = list(islice(jobs, MOST_JOBS + 1))
        if len(wanted) > MOST_JOBS:
            raise ValueError(f"this asks for more than {MOST_JOBS} results: give fewer lengths, samples or methods")
        for job in wanted:
            plain = _plain(job)
            by_text[_text(plain)] = job
            kinds.add(plain)
        done = set()
        for result in self.results:
            own = result.get(self.key)
            if not kinds.fits(own):
                raise ValueError(
                    f"{self.path} has a {self.key} of another shape, {str(own)[:80]}, than those of this run, such as "
                    f"{next(iter(by_text))[:200]}; choose another --out"
                )
            done.add(_text(own))
        return [job for text, job in by_text.items() if text not in done]

    @contextmanager
    def writing(
        self, *, dtype: str | None = None, device: str | None = None, program: str = "duo"
    ) -> Iterator[Callable[[Any, Mapping[str, Any]], None]]:
        """Note a new run, then `append(job, result)` one by one; each result is flushed before the call returns.

        Args:
            dtype: the data type in which the run computes, where there is one.
            device: where it computes; by default the first device of this process.
            program: the command's first words.

        Raises:
            ValueError: another process writes to the file, or wrote to it since it was opened here; or its results have
                another data type.
        """
        run = provenance(program=program) | {"device": device or jax.devices()[0].device_kind}
        run |= {"dtype": dtype} if dtype else {}
        if conflict := contradiction(self.head, self.head | {"runs": [run]}):
            raise ValueError(f"{self.path} was made with {conflict}; use the same settings, or choose another --out")

        def append(job: Any, result: Mapping[str, Any]) -> None:
            self.results.append(({} if job is None else {self.key: _plain(job)}) | dict(result))
            if self.path is None or self.one_object:
                self._save()
            else:
                append_text(self.path, json_text(self.results[-1]) + "\n")

        with locked(self.path) if self.path else nullcontext():
            self.head["runs"] = [*self.head["runs"], run]
            self.replace()
            yield append

    def replace(self) -> None:
        """Write head and results in place of what was read; a result that a kill cut off is dropped.

        Raises:
            ValueError: the file has other results now than when it was opened.
        """
        if self.path and self._stored != (len(read(self.path)[1]) if _has_text(self.path) else 0):
            raise ValueError(f"{self.path} changed while this run was starting: run the command again")
        self._save()

    def _save(self) -> None:
        if self.path is None:
            return
        if self.one_object:
            write(self.path, self.head | {"results": self.results})
        else:
            write_text(self.path, "".join(json_text(line) + "\n" for line in (self.head, *self.results)))
        self._stored = len(self.results)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, whole or not at all; the folder is created."""
    write_text(path, json_text(content, indent=1) + "\n")


def read(path: Path) -> tuple[Head, list[Result]]:
    """The head and the results of a file, each job once; a last line that a kill cut off is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of results, with the line.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty, not a file of results")
    first, rest = _first(text, path)
    if "results" in first or "machine" in first:
        if rest.strip():
            raise ValueError(f"{path}:2 follows an object that is a whole file of results")
        return _from_object(first, path)
    _check_head(first, f"{path}:1" if rest.strip() else str(path))
    lines = rest.split("\n")
    results: dict[str, Result] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            result = parse_object(line, f"{path}:{number}")
        except ValueError:
            if number == len(lines) + 1:  # It has no end of line: a kill cut it off.
                break
            raise
        _check_result(result, f"{path}:{number}", key="job")
        results[_text(result["job"])] = result
    return {"gates": {}} | first, list(results.values())


def first_object(path: Path) -> dict[str, Any]:
    """The head of a file of lines, or the whole object of another one, from which a type of result is recognized.

    Raises:
        ValueError: neither JSON nor JSON lines.
    """
    return _first(read_text(path), path)[0]


def _first(text: str, path: Path) -> tuple[dict[str, Any], str]:
    """The object in the first line and all other lines; or the object that is the whole text."""
    line, _, rest = text.partition("\n")
    try:
        return parse_object(line, f"{path}:1" if rest.strip() else path), rest
    except ValueError as error:
        try:
            return parse_object(text, path), ""
        except ValueError:
            if line.strip() == "{":
                raise
            raise error from None


def _check_head(head: Mapping[str, Any], place: str) -> None:
    """Refuse a head whose fields have other types than this module writes."""
    runs, gates = head.get("runs"), head.get("gates", {})
    if not isinstance(head.get("about"), dict) or not isinstance(runs, list):
        raise ValueError(f"{place} is not a line of a file of results: a head has 'about', an object, and 'runs'")
    if not all(isinstance(run, dict) and isinstance(run.get("dtype"), str | None) for run in runs):
        raise ValueError(f"{place}: 'runs' must be objects, each with a text as 'dtype'")
    if not isinstance(gates, dict) or not all(isinstance(value, str) for value in gates.values()):
        raise ValueError(f"{place}: 'gates' must be fingerprints by name")


def _check_result(result: Any, place: str, key: str | None = None) -> None:
    """Refuse a result without a job, or with a job or a score of another type."""
    if not isinstance(result, dict) or (key is not None and not isinstance(result.get(key), dict)):
        raise ValueError(f"{place} is not a line of a file of results: it must have an object {key or ''!r}")
    score = result.get("score")
    if score is not None and not isinstance(score, int | float):
        raise ValueError(f"{place}: 'score' must be a number or null, got {str(score)[:40]!r}")


def _from_object(whole: Result, path: Path) -> tuple[Head, list[Result]]:
    """Head and results of a `.json` file; older ones have the fields of their one run in place of a head."""
    for name in ("settings", "machine"):
        if not isinstance(whole.get(name, {}), dict):
            raise ValueError(f"{path}: {name!r} must be an object")
    if not isinstance(whole.get("command", ""), str):
        raise ValueError(f"{path}: 'command' must be a text")
    results = whole.pop("results", None)
    if not isinstance(results, list):  # Of lm-evaluation-harness: by task.
        whole |= {} if results is None else {"results": results}
        results = []
    origin = ("command", "date", "machine", "device", "platform")
    run: dict[str, Any] = {name: whole.pop(name) for name in origin if name in whole}
    words = [*run.get("command", "").split(), "", "", ""]
    task = words[2] if words[1] == "eval" else words[1]
    about = {"task": task, **whole.pop("settings", {})} if run else {}
    if isinstance(whole.get("about"), dict) and isinstance(whole["about"].get("questions"), dict):
        # Of `duo eval mtbench` 0.1, which stored fingerprints among the settings, and no data type.
        settings = whole.pop("about")
        questions = {f"question {name}": value for name, value in settings.pop("questions").items()}
        whole["gates"] = questions | ({"pattern": settings.pop("gates")} if "gates" in settings else {})
        about = {"task": "mtbench"} | settings
        run["dtype"] = None
    head = {"about": about, "gates": {}, "runs": [run] if run else []} | whole
    _check_head(head, str(path))
    for number, result in enumerate(results):
        _check_result(result, f"{path}: results[{number}]")
    return head, results


def merge(paths: Sequence[Path], out: Path) -> tuple[int, int]:
    """Write one file with the results of several: each job once, as the first file has it.

    Args:
        paths: files that one command wrote with the same settings.
        out: the file to write; one of them, or a new one.

    Returns:
        The number of jobs in `out`, and how many of these were in more than one file.

    Raises:
        ValueError: a file without jobs, such as one of measurements; files that do not belong together; another
            result in `out`; or a process that writes to it.
    """
    if len(paths) < 2:
        raise ValueError(f"need two or more files to merge, got {len(paths)}")
    check_output(out)
    exists = _has_text(out)
    if exists and not any(path.exists() and out.samefile(path) for path in paths):
        raise ValueError(f"{out} exists already: name it among the files too, or choose another --out")
    files = {path: read(path) for path in paths}
    for path, (head, results) in files.items():
        if not set(head) <= {"about", "gates", "runs"} or not all("job" in result for result in results):
            raise ValueError(f"{path} is not a file of results by job: only those can be merged")
    for (first, (head, _)), (second, (other, _)) in combinations(files.items(), 2):
        if conflict := contradiction(head, other):
            raise ValueError(f"{first} was made with {conflict} in {second}: they do not belong together")
    record = Record(out, *read(out)) if exists else Record(out, {}, [])
    heads = [head for head, _ in files.values()]
    runs = {_text(run): run for head in heads for run in head["runs"]}
    gates = {name: value for head in heads for name, value in head["gates"].items()}
    by_job: dict[str, list[Result]] = {}
    for result in (result for _, results in files.values() for result in results):
        by_job.setdefault(_text(result["job"]), []).append(result)
    record.head = {"about": heads[0]["about"], "gates": gates, "runs": list(runs.values())}
    record.results = [first for first, *_ in by_job.values()]
    with locked(out):
        record.replace()
    return len(by_job), sum(len(several) > 1 for several in by_job.values())


def contradiction(head: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How two heads contradict each other; empty if both can be of one file."""
    if different := changes(head["about"], other["about"]):
        return f"other settings: {'; '.join(different)}"
    known = head["gates"]
    if changed := [name for name, value in other["gates"].items() if known.get(name, value) != value]:
        return f"other {', '.join(changed)} under the same name"
    # By default the device decides the type, so it is not among the settings. None: unknown.
    before, now = ({run.get("dtype", "float32") for run in each["runs"]} - {None} for each in (head, other))
    if before and now and before != now:
        return f"another data type: {', '.join(sorted(before))}, not {', '.join(sorted(now))}"
    return ""


def fingerprint(pattern: HeadPattern) -> str:
    """Distinguishes gates of the same name."""
    return sha256(np.ascontiguousarray(pattern.gates, np.float64).tobytes())


def sha256(content: bytes) -> str:
    """A fingerprint."""
    return hashlib.sha256(content).hexdigest()[:16]


def _has_text(path: Path) -> bool:
    """A kill may leave an empty file, which counts as none."""
    return path.exists() and path.stat().st_size > 0


def _plain(job: Any) -> Any:
    """A job converted to JSON types."""
    return json.loads(json.dumps(asdict(job) if is_dataclass(job) and not isinstance(job, type) else job))


class _Kinds:
    """The fields that all jobs of a run have, and the types of their values."""

    KINDS: tuple[Any, ...] = (type(None), bool, (int, float), str, list, dict)

    def __init__(self) -> None:
        self.seen: dict[str, set[int]] | None = None

    def add(self, job: Mapping[str, Any]) -> None:
        """Take a job into account."""
        kinds = {name: {self._of(value)} for name, value in job.items()}
        before = kinds if self.seen is None else self.seen
        self.seen = {name: before[name] | kinds[name] for name in before if name in kinds}

    def fits(self, job: Any) -> bool:
        """Whether a job has these fields, with values of these types; null is of every type."""
        if self.seen is None:
            return True
        return isinstance(job, dict) and all(
            name in job and (0 in (own := self._of(job[name]), *kinds) or own in kinds)
            for name, kinds in self.seen.items()
        )

    def _of(self, value: Any) -> int:
        return next(number for number, types in enumerate(self.KINDS) if isinstance(value, types))


def _text(job: Any) -> str:
    return json.dumps(job, sort_keys=True)
