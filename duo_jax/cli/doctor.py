"""`duo doctor`: is this machine ready? Versions, devices, and each attention backend tried against the reference."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    BACKENDS,
    Heads,
    Pools,
    Unsupported,
    Window,
    decode_attention,
    gated_attention,
    prefill_attention,
)
from pallas_kernels.gpus import device_kind
from pallas_kernels.ops import VERIFIED

PACKAGES = (
    "duo-jax",
    "jax",
    "jaxlib",
    "flax",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "jax-triton",
)

# Type of what is tried, and the error relative to the dense reference that counts as right. The fastest kernels for
# GPUs take no float32.
TRIED = {"cpu": ("float32", 1e-4), "gpu": ("bfloat16", 1e-2)}


@dataclass(frozen=True)
class Doctor:
    """Check versions, devices and memory, and try every attention backend here."""

    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Look, try, print."""
        record = examine()
        print(json.dumps(record) if self.json else _text(record))
        tried = [found for backend in record["backends"].values() for found in backend.values()]
        if any(found["is_right"] is False for found in tried):
            raise ValueError("a backend fails or computes wrong numbers here: do not use it, and please report this")


def examine() -> dict:
    """Everything that is printed, as plain values."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [
            {"kind": device.device_kind, "platform": device.platform, "memory": device.memory_stats() or {}}
            for device in jax.devices()
        ],
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "default_backend": VERIFIED.get(device_kind(), "xla"),
        "backends": {name: {operation: _try(operation, name) for operation in OPERATIONS} for name in BACKENDS},
    }


def _try(operation: str, backend: str) -> dict:
    """Compare a backend with the reference on a small random case."""
    name, tolerance = TRIED["cpu" if jax.default_backend() == "cpu" else "gpu"]
    dtype = jnp.dtype(name)
    try:
        found = OPERATIONS[operation](dtype, backend).astype(jnp.float32)
    except Unsupported as error:
        return {"is_right": None, "why_not": str(error)}
    except Exception as error:  # Whatever a compiler or a driver may say: the other backends are still tried.
        return {"is_right": False, "failed": (str(error).splitlines() or [type(error).__name__])[0]}
    # GPUs otherwise multiply float32 with fewer bits.
    with jax.default_matmul_precision("highest"):
        right = OPERATIONS[operation](dtype, "reference").astype(jnp.float32)
    worst = float(jnp.linalg.norm(right - found) / jnp.linalg.norm(right))
    return {"is_right": worst < tolerance, "error": worst}


WINDOW = Window(16, 32)


def _draw(seed: int, dtype: jnp.dtype, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _cache(dtype: jnp.dtype) -> tuple[Pools, Heads]:
    shapes = ((1, 1, 640, 64),) * 2 + ((1, 1, 48, 64),) * 2
    pools = Pools(*(_draw(seed, dtype, *shape) for seed, shape in enumerate(shapes)))
    return pools, Heads(jnp.array([True, False]), jnp.zeros(2, jnp.int32))


def _prefill(dtype: jnp.dtype, backend: str) -> jax.Array:
    q, k, v = (_draw(4 + i, dtype, 1, 150, count, 64) for i, count in enumerate((4, 2, 2)))
    rows: dict[str, Any] = {"start": jnp.array([200], jnp.int32), "lengths": jnp.array([150], jnp.int32)}
    pools, heads = _cache(dtype)
    return prefill_attention(q, k, v, pools, heads, **rows, window=WINDOW, backend=backend)


def _decode(dtype: jnp.dtype, backend: str) -> jax.Array:
    lengths = jnp.array([600], jnp.int32)
    return decode_attention(_draw(4, dtype, 1, 4, 64), *_cache(dtype), lengths=lengths, window=WINDOW, backend=backend)


def _training(dtype: jnp.dtype, backend: str) -> jax.Array:
    q, k, v = (_draw(4 + i, dtype, 1, 128, heads, 64) for i, heads in enumerate((4, 2, 2)))
    return gated_attention(q, k, v, jnp.array([0.25, 0.75], jnp.float32), window=WINDOW, backend=backend)


OPERATIONS = {"prefill": _prefill, "decode": _decode, "training": _training}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(record: dict) -> str:
    lines = [f"python        {record['python']}"]
    lines += [f"{name:<14}{found or 'not installed'}" for name, found in record["packages"].items()]
    lines.append(f"host memory   {record['host_memory_bytes'] / 1e9:.1f} GB")
    for device in record["devices"]:
        limit = device["memory"].get("bytes_limit")
        lines.append(
            f"device        {device['kind']} ({device['platform']})" + (f", {limit / 1e9:.1f} GB" if limit else "")
        )
    for name, operations in record["backends"].items():
        default = ", the default here" if name == record["default_backend"] else ""
        if name == "triton" and record["devices"][0]["platform"] == "cpu":
            default = ", interpreted: a kernel for GPUs"
        lines.append(f"backend       {name}{default}")
        for operation, found in operations.items():
            if "why_not" in found:
                verdict = f"cannot run here: {found['why_not']}"
            elif "failed" in found:
                verdict = f"FAILED: {found['failed']}"
            else:
                verdict = f"{'right' if found['is_right'] else 'WRONG'}, error {found['error']:.1e}"
            lines.append(f"  {operation:<12}{verdict}")
    return "\n".join(lines)
