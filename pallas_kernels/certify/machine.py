"""What verdicts depend on, found without using a GPU: driver, packages, source, tiles, visible devices, XLA's flags."""

import hashlib
import importlib.util
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.ptxas import ptxas_version, version_text
from pallas_kernels.tiles import tuned_file
from pallas_kernels.user_cache import read_bytes

# Packages whose code decides what a kernel computes.
PACKAGES = (
    "jax",
    "jaxlib",
    *(f"jax-cuda{number}-{part}" for number in (12, 13) for part in ("plugin", "pjrt")),
    *("jax-triton", "triton"),
    *("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
DRIVER = Path("/proc/driver/nvidia")
# Flags of XLA that change no code of a GPU: what is written for debugging, and how many CPU devices are pretended.
UNRELATED = ("--xla_dump_", "--xla_force_host_platform_device_count")
# Of Linux, and of Windows Subsystem for Linux.
DEVICES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"))


def may_have_gpu() -> bool:
    """Whether jax may find a GPU: it is not forbidden, its plugin is installed, and the system has a device."""
    platforms = str(jax.config.values["jax_platforms"] or os.environ.get("JAX_PLATFORMS") or "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    has_plugin = any(_exists(f"jax_plugins.xla_cuda{number}") for number in (12, 13, 14))
    return has_plugin and any(path.exists() for path in (DRIVER, *DEVICES))


def check_setting() -> str:
    """The value of `DUO_CERTIFY`.

    Raises:
        ValueError: another one than 0, 1 and full.
    """
    setting = os.environ.get("DUO_CERTIFY") or "1"
    if setting not in ("0", "1", "full"):
        raise ValueError(f"DUO_CERTIFY must be 0, 1 or full, got {setting!r:.60}")
    return setting


@cache
def environment() -> dict[str, Any]:
    """Everything but the device itself, as plain values."""
    models = sorted(DRIVER.glob("gpus/*/information"))
    return {
        "driver": _text(DRIVER / "version").partition("\n")[0],
        "gpus": [match[1] for path in models if (match := re.search(r"Model:\s*(.*)", _text(path)))],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "flags": [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(UNRELATED)],
        "packages": {name: number for name in PACKAGES if (number := _package(name))},
        "ptxas": {name: version_text(ptxas_version(name)) for name in ("mosaic", "triton")},
        "source": _source(),
        "tiles": hashlib.sha256(_tiles()).hexdigest()[:16],
    }


def device() -> dict[str, Any]:
    """The device that programs run on by default; this takes it."""
    first = jax.local_devices()[0]
    return {
        "kind": first.device_kind,
        "capability": str(getattr(first, "compute_capability", "")),
        "cores": getattr(first, "core_count", None),
        "shared_memory": getattr(first, "shared_memory_per_block_optin", None),
    }


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tiles() -> bytes:
    try:
        return read_bytes(tuned_file())
    except (OSError, ValueError):
        return b""


def _source() -> str:
    """A hash of this package's source."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
