"""Bytes: of arrays or their shapes, of the host's free memory, and as text."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np


def nbytes(arrays: Any) -> int:
    """Bytes that the arrays of a pytree, or their shapes, take on a device; a 4-bit number takes half a byte."""
    return sum(_leaf_bytes(x) for x in jax.tree.leaves(arrays))


def _leaf_bytes(x: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) // 2 if x.dtype.name in ("int4", "uint4") else math.prod(x.shape) * x.dtype.itemsize


def size_text(count: int | float, *, digits: int = 1) -> str:
    """A number of bytes with its decimal unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.{digits}f} {units[0]}"


def host_available() -> int | None:
    """Bytes of the host's memory that are free for programs; None where the system does not report them."""
    return read_kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def read_kilobytes(path: Path, name: str) -> int | None:
    """An entry of a file such as /proc/meminfo, in bytes; None where it is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
