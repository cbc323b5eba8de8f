"""The device of this process, and memory: of the device, or on a CPU of the process."""

import resource
from pathlib import Path

import jax

from duo_jax.sizes import host_available, read_kilobytes


def describe() -> dict[str, str]:
    """Kind and platform of the first device."""
    return {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}


def available() -> int | None:
    """Bytes free for weights and cache; None if the system does not report it."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_available()


def memory() -> dict[str, int]:
    """Bytes that jax uses of its device now, and at most so far; on a CPU, those of the process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak": stats["peak_bytes_in_use"], "now": stats["bytes_in_use"]}
    return process_memory()


def process_memory() -> dict[str, int]:
    """Resident bytes of this process now, and at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "now": read_kilobytes(Path("/proc/self/status"), "VmRSS:") or peak}
