"""Where results come from: the command, the machine, versions and commit. Knows no files."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Packages on whose versions results depend.
PACKAGES = [
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "torch",
    "transformers",
    "lm_eval",
    "numpy",
]


def provenance(*, program: str = "duo") -> dict[str, Any]:
    """The command that is running, the day in UTC, and the machine."""
    # A notebook's kernel has a command line too, but it is no way to make the result again.
    command = "a notebook" if "ipykernel" in sys.modules else " ".join([program, *sys.argv[1:]])
    return {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": machine()}


def machine() -> dict[str, Any]:
    """Processor, cores, versions, commit."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
        "commit": _commit(),
    }


def origin(runs: Sequence[Mapping[str, Any]], command: str) -> str:
    """One line on the runs of a command that wrote a file: machines, data types, versions, commits."""
    devices = (run.get("device", "cpu") for run in runs)
    places = [
        f"{'' if device == 'cpu' else f'{device}, '}{host(run['machine'])}"
        for device, run in zip(devices, runs, strict=True)
    ]
    types = [run.get("dtype", "float32") for run in runs]
    last = runs[-1]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    commits = _distinct(run["machine"]["commit"] for run in runs)
    pieces = ", piece by piece," if len(runs) > 1 else ""
    return (
        f"{_distinct(places, ' and ')}, {_distinct(types)}, Python {last['python']}, {versions}. "
        f"Measured by `{command}`{pieces} at {commits}."
    )


def host(machine: Mapping[str, Any]) -> str:
    """Processor and cores."""
    cores = machine["cores"]
    return f"{machine['processor']}, {cores} core{'' if cores == 1 else 's'}"


def _distinct(values: Iterable[str], between: str = ", ") -> str:
    """Each different value once, in order."""
    return between.join(dict.fromkeys(values))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "not a checkout"
    return done.stdout.strip() or "not a checkout"


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
