"""Bytes: of arrays or their shapes, of the host's free memory, and as text."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Data types of which a byte has two numbers.
FOUR_BITS = ("int4", "uint4", "float4_e2m1fn")


def nbytes(arrays: Any) -> int:
    """Bytes that the arrays of a pytree, or their shapes, take on a device; a 4-bit number takes half a byte."""
    return sum(_leaf_bytes(x) for x in jax.tree.leaves(arrays))


def _leaf_bytes(x: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) // 2 if x.dtype.name in FOUR_BITS else math.prod(x.shape) * x.dtype.itemsize


def size_text(count: int | float, *, digits: int = 1) -> str:
    """A number of bytes with its decimal unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.{digits}f} {units[0]}"


def free_memory(*, allocated: bool = False) -> int | None:
    """Bytes that are free on the default device; on a CPU, those of the host. None where the system reports neither.

    With `allocated`, what this process has allocated on the device counts as free.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return int(limit - (0 if allocated else stats.get("bytes_in_use", 0))) if limit else host_available()


def check_free(count: int, message: str, devices: int = 1) -> None:
    """Raise ValueError(message) for more bytes than are free: the system may end a process that takes them.

    `count` is the sum over `devices`, which share the memory of a CPU.
    """
    free = free_memory()
    if free is not None and count > free * (1 if jax.default_backend() == "cpu" else devices):
        raise ValueError(f"{message} ({size_text(free)} are free)")


def host_available() -> int | None:
    """Bytes of the host's memory that are free for this process; None where the system does not report them."""
    free = [read_kilobytes(Path("/proc/meminfo"), "MemAvailable:"), group_available()]
    return min((count for count in free if count is not None), default=None)


# Files of the limit and of what is used, for control groups of version 2 and 1, below the folder of memory.
_GROUPS = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))


def group_available(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that are free in the control groups of this process, as of a container or a batch job; None: no limit.

    Cached pages of files count as used there, but are freed when memory is needed, so they are added.
    """
    free = []
    for folder, names in ((root / folder, names) for folder, *names in _GROUPS):
        for group in _groups(own, folder):
            try:
                limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in names)
                if limit != "max":
                    free.append(max(0, int(limit) - int(used) + _cached(group)))
            except (OSError, ValueError):
                continue
    return min(free, default=None)


def _groups(own: Path, root: Path) -> list[Path]:
    """The folders of a process's control group and of those around it; a container may show only its root."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    kind = root.name if root.name == "memory" else ""
    names = [path for _, kinds, path in (line.split(":", 2) for line in lines) if kind in kinds.split(",")]
    return [root / parent.relative_to("/") for name in names for parent in (Path(name), *Path(name).parents)]


def _cached(group: Path) -> int:
    """Bytes of file pages that were not used lately."""
    lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    counts = dict(line.split(maxsplit=1) for line in lines)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def host_total() -> int | None:
    """Bytes of the host's memory and swap; None where the system does not report them."""
    sizes = [read_kilobytes(Path("/proc/meminfo"), name) for name in ("MemTotal:", "SwapTotal:")]
    return None if None in sizes else sum(size or 0 for size in sizes)


def read_kilobytes(path: Path, name: str) -> int | None:
    """An entry of a file such as /proc/meminfo, in bytes; None where it is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
