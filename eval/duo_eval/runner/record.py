"""What a figure depends on beside the code, and results as JSON files: every measurement here writes them this way."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from duo_jax.files import write_text


def provenance(settings: Mapping[str, Any] | None = None, *, program: str = "duo") -> dict[str, Any]:
    """The command that runs, the machine, and the settings if they are given (but for where results go)."""
    # A notebook's kernel has a command line too, which is no way to make the result again.
    command = "a notebook" if "ipykernel" in sys.modules else " ".join([program, *sys.argv[1:]])
    found: dict[str, Any] = {"command": command, "machine": machine()}
    if settings is not None:
        found["settings"] = {name: value for name, value in settings.items() if name != "out"}
    return found


def begun(out: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of what is measured anew each time: where it comes from, and no results yet.

    Args:
        out: where it goes, if anywhere.
        settings: of the measurement.

    Raises:
        ValueError: `out` is a folder, or holds what another command wrote.
    """
    found = provenance(settings) | {"results": []}
    if out is not None and out.is_dir():
        raise ValueError(f"{out} is a folder: --out names a file")
    if out is not None and out.exists():
        try:
            theirs = json.loads(out.read_text(encoding="utf-8"))["command"]
        except (ValueError, LookupError, TypeError):
            theirs = ""
        if theirs.split()[:3] != found["command"].split()[:3]:
            raise ValueError(f"{out} is not a result of this command; choose another --out")
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, versions, commit."""
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "torch", "transformers", "lm_eval")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in (*packages, "numpy") if (found := _version(name))},
        "commit": _commit(),
    }


def origin(runs: Sequence[Mapping[str, Any]], command: str) -> str:
    """Where a file comes from that one or several runs of a command wrote, in a line: machine, versions, commits."""
    devices = (run.get("device", "cpu") for run in runs)
    places = [
        f"{'' if device == 'cpu' else f'{device}, '}{host(run['machine'])}"
        for device, run in zip(devices, runs, strict=True)
    ]
    types = [run.get("dtype", "float32") for run in runs]
    last = runs[-1]["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in last["versions"].items())
    commits = _each(run["machine"]["commit"] for run in runs)
    pieces = ", piece by piece," if len(runs) > 1 else ""
    return (
        f"{_each(places, ' and ')}, {_each(types)}, Python {last['python']}, {versions}. "
        f"Measured by `{command}`{pieces} at {commits}."
    )


def host(machine: Mapping[str, Any]) -> str:
    """Processor and cores."""
    cores = machine["cores"]
    return f"{machine['processor']}, {cores} core{'' if cores == 1 else 's'}"


def _each(values: Iterable[str], between: str = ", ") -> str:
    """Different ones, in their order."""
    return between.join(dict.fromkeys(values))


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a result whole or not at all; the folder is made."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return found or "not a checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
