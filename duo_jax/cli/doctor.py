"""`duo doctor`: is this machine ready? Versions, devices, and each attention backend tried against the reference."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BACKENDS, Heads, Pools, decode_attention, gated_attention, prefill_attention
from pallas_kernels.api import VERIFIED
from pallas_kernels.tiles import device_kind

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

# Largest difference from the dense reference that counts as right, in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Doctor:
    """Check versions, devices and memory, and try every attention backend here."""

    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Look, try, print."""
        record = examine()
        print(json.dumps(record) if self.json else _text(record))
        if any(backend["is_right"] is False for backend in record["backends"].values()):
            raise ValueError("a backend computes wrong numbers on this machine: do not use it, and please report this")


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
        "backends": {name: _try(name) for name in BACKENDS},
    }


def _try(backend: str) -> dict:
    """Compare a backend with the reference on a small random case."""
    try:
        # GPUs otherwise multiply float32 with fewer bits.
        with jax.default_matmul_precision("highest"):
            right, found = _attend("reference"), _attend(backend)
    except NotImplementedError as error:
        return {"is_right": None, "why_not": str(error)}
    worst = float(np.abs(right - found).max())
    return {"is_right": bool(worst < TOLERANCE), "max_error": worst}


def _attend(backend: str) -> np.ndarray:
    """Every operation on the same small inputs, the outputs end to end."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pools = Pools(draw(1, 1, 300, 64), draw(1, 1, 300, 64), draw(1, 1, 48, 64), draw(1, 1, 48, 64))
    heads = Heads(jnp.array([True, False]), jnp.zeros(2, jnp.int32))
    q, k, v = draw(1, 128, 4, 64), draw(1, 128, 2, 64), draw(1, 128, 2, 64)
    start, lengths = jnp.array([200], jnp.int32), jnp.array([128], jnp.int32)
    sizes: dict[str, Any] = {"sink_size": 16, "recent_size": 32, "backend": backend}
    prefilled = prefill_attention(q, k, v, pools, heads, start=start, lengths=lengths, **sizes)
    decoded = decode_attention(q[:, 0], pools, heads, lengths=start, **sizes)
    gated = gated_attention(q, k, v, jnp.array([0.25, 0.75], jnp.float32), **sizes)
    return np.concatenate([np.ravel(out) for out in (prefilled, decoded, gated)])


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
    for name, found in record["backends"].items():
        default = ", the default here" if name == record["default_backend"] else ""
        if found["is_right"] is None:
            lines.append(f"backend       {name}: cannot run here: {found['why_not']}")
        else:
            verdict = "right" if found["is_right"] else "WRONG"
            lines.append(
                f"backend       {name}: {verdict}, differs from the reference by {found['max_error']:.1e}{default}"
            )
    return "\n".join(lines)
