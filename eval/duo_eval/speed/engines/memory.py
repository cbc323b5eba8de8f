"""Bytes that a process needs of the device, or of a CPU's memory. Knows no engine."""

import resource
from pathlib import Path

import jax

from duo_jax.memory import host_available, read_kilobytes


def available() -> int | None:
    """Bytes free for weights and cache: on the device, or in the CPU's memory; None where nobody says."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_available()


def of_jax() -> dict[str, int]:
    """What jax holds of its device; on a CPU what the process holds."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak": stats["peak_bytes_in_use"], "now": stats["bytes_in_use"]}
    return of_process()


def of_process() -> dict[str, int]:
    """Resident bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "now": read_kilobytes(Path("/proc/self/status"), "VmRSS:") or peak}
