"""The assembler of GPU programs: which `ptxas` jax will use here, its version, and the versions with known faults.

jax compiles by a process of its own: its wheels are built without NVIDIA's compiler libraries. It takes the first
working `ptxas` of a list of places (`FindPtxAsExecutable` in XLA's `subprocess_compilation.cc`). Kernels of Mosaic skip
the first place, the toolkit that jax itself found, so that two versions can be in use at once.
"""

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# A version, as in (12, 9, 86); `ptxas --version` prints it as V12.9.86.
Version = tuple[int, int, int]

# XLA skips older ones, and one that it knows to be wrong.
OLDEST: Version = (11, 8, 0)
SKIPPED: tuple[Version, ...] = ((12, 3, 103),)

# CUDA 12.8.0 has ptxas 12.8.61, 12.8.1 has 12.8.93, 12.9.0 has 12.9.41 and 12.9.1 has 12.9.86. jax's own attention for
# Hopper refuses causal masks from 12.8.0 up to 12.9.1 "due to a ptxas miscompilation" (attention_mgpu.py). The kernels
# here have such masks.
MISCOMPILES: tuple[Version, Version] = (12, 8, 0), (12, 9, 86)
# Reported once, for other kernels on Hopper (flash-linear-attention, issue 1262): an invalid write to shared memory
# with 13.0.88, which 13.1.80 does not make. Not seen here, so it is no reason to refuse: certification decides.
SUSPECTED: tuple[Version, ...] = ((13, 0, 88),)


@cache
def ptxas_version(backend: str = "mosaic") -> Version | None:
    """Version of the `ptxas` that will assemble a backend's kernels; None if there is none here.

    Args:
        backend: "mosaic", or the name of any other backend: XLA assembles the kernels of those.
    """
    for path in _places(backend):
        version = _version_of(path)
        if version is not None and version >= OLDEST and version not in SKIPPED:
            return version
    return None


def version_text(version: Version | None) -> str:
    """A version as `ptxas` prints it."""
    return "none" if version is None else ".".join(map(str, version))


def miscompiles(version: Version | None) -> bool:
    """Whether a version is known to compile the masks of Mosaic's kernels wrongly."""
    first, fixed = MISCOMPILES
    return version is not None and first <= version < fixed


def _places(backend: str) -> Iterator[Path]:
    packages = [Path(each) for each in _package_folders()]
    if backend == "mosaic":
        yield Path("cuda_sdk_lib/bin/ptxas")  # in the working directory
    else:
        # What jax finds itself, see `jax._src.lib.cuda_path`.
        roots = [Path(os.environ["CUDA_ROOT"])] if os.environ.get("CUDA_ROOT") else packages
        yield from (root / "bin/ptxas" for root in roots)
    yield from (Path(folder) / "ptxas" for folder in os.environ.get("PATH", "").split(os.pathsep) if folder)
    yield Path("/usr/local/cuda/bin/ptxas")
    yield from (root / "bin/ptxas" for root in packages)


def _package_folders() -> Iterator[str]:
    """Folders of the packages nvidia-cuda-nvcc, of CUDA 13 and of CUDA 12."""
    for name in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        try:
            found = importlib.util.find_spec(name)
        except ImportError:  # No package of NVIDIA.
            continue
        yield from (found.submodule_search_locations or ()) if found else ()


def _version_of(path: Path) -> Version | None:
    if not path.is_file():
        return None
    try:
        printed = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)\b", printed)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None
