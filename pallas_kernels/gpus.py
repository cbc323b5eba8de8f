"""Facts about GPUs: memory and compute capability by name, a description for compilers, and the kernels' tile sizes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

# Fraction of a GPU's memory that programs may take; jax's own default is three quarters. The rest is for what jax's
# allocator does not manage: CUDA's context, libraries and their workspaces, and fragmentation.
MEMORY_FRACTION = 0.95


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, to plan and compile for without the device."""

    name: str
    """As the driver reports it, `jax.Device.device_kind`."""
    capability: tuple[int, int]
    """Compute capability, as in (9, 0)."""
    cores: int
    """Multiprocessors."""
    memory_bytes: int
    """Total that the CUDA driver reports: less than is sold, for error correction and the driver's own use."""
    bandwidth: int
    """Bytes of memory per second."""
    shared_memory_per_core: int
    l2_bytes: int
    clock_ghz: float

    @property
    def usable_bytes(self) -> int:
        """Bytes that programs may take: `MEMORY_FRACTION` of the total."""
        return int(self.memory_bytes * MEMORY_FRACTION)

    @property
    def architecture(self) -> str:
        """As `ptxas -arch` takes it."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def target_config(self) -> str:
        """Description for XLA's compiler, a `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              name: "{self.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
              cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
              core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_bytes}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block_optin: {self.shared_memory_per_core - 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
              dnn_version: "9.12.0"
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
            runtime_version {{ major: 12 minor: 8 patch: 0 }} device_description_str: "{self.name}"
        """


def _gib(count: float) -> int:
    return int(count * (1 << 30))


# Cores, bandwidth, caches and clocks are those of NVIDIA's data sheets. Memory is the total that CUDA reports, rounded
# down: PyTorch's out-of-memory messages quote it, and published ones have 79.14 to 79.25 GiB for GPUs of 80 GB, 139.72
# to 139.81 for an H200, 178.35 to 178.36 for a B200, 23.61 to 23.68 for an RTX 4090.
GPUS: dict[str, Gpu] = {
    "a100-80g": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, _gib(79.1), 2_039_000_000_000, 167_936, 40 << 20, clock_ghz=1.41
    ),
    "h100-80g": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, _gib(79.1), 3_350_000_000_000, 233_472, 50 << 20, clock_ghz=1.98
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, _gib(139.7), 4_800_000_000_000, 233_472, 50 << 20, clock_ghz=1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, _gib(178.3), 8_000_000_000_000, 233_472, 126 << 20, clock_ghz=1.97),
    "rtx-4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, _gib(23.5), 1_008_000_000_000, 102_400, 72 << 20, clock_ghz=2.52
    ),
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its key in `GPUS`.

    Raises:
        ValueError: an unknown one.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"unknown GPU {name!r}: choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def device_kind() -> str:
    """Kind of device that programs are traced for: that of the mesh in use, otherwise of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU that programs are traced for; None on other devices and unknown GPUs."""
    device = jax.devices()[0]
    if device.device_kind != device_kind():  # Programs are compiled for a GPU that is not here.
        return next((gpu.capability for gpu in GPUS.values() if gpu.name == device_kind()), None)
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


@dataclass(frozen=True)
class FlashTiles:
    """Tiles of Triton's prefill kernel, and of the backward kernels of training."""

    block_q: int
    """Queries of a tile."""
    block_k: int
    """Keys of a tile."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Loads in flight while a tile is computed."""


@dataclass(frozen=True)
class DecodeTiles:
    """Tiles of the decode kernels."""

    block_k: int
    """Keys of a tile."""
    min_split: int
    """Least keys that are worth a program of their own; a multiple of `block_k`."""
    max_programs: int
    """Programs to spread a layer's keys over: a few for every multiprocessor."""
    num_warps: int
    """Warps of a program; the Mosaic kernel always multiplies with the four of a warpgroup."""
    num_stages: int
    """Loads in flight while a tile is computed."""

    def __post_init__(self) -> None:
        if self.min_split % self.block_k:
            raise ValueError(f"min_split must be a multiple of block_k, got {self}")


@dataclass(frozen=True)
class PipelineTiles:
    """Tiles of the Mosaic prefill kernel, whose tiles of queries have one size."""

    block_k: int
    """Keys of a tile."""
    num_stages: int
    """Tiles of keys and values that shared memory holds."""


KINDS: dict[str, type[Any]] = {
    "flash": FlashTiles,
    "backward": FlashTiles,
    "decode": DecodeTiles,
    "mosaic_flash": PipelineTiles,
    "mosaic_decode": DecodeTiles,
}

_ON_TRIAL: dict[str, Any] = {}


def tiles_for(kernel: str, head_dim: int, itemsize: int, *, quantized: bool = False) -> Any:
    """Tiles of a kernel on the device that programs are traced for: tuned ones, or ones that fit any GPU.

    Args:
        kernel: a name in `KINDS`.
        head_dim: of the model; kernels round it up to a power of two.
        itemsize: bytes of a number: float32 tiles are half as large.
        quantized: whether the cache is; its keys need more registers while they are unpacked.
    """
    if kernel in _ON_TRIAL:
        return _ON_TRIAL[kernel]
    width = max(16, 1 << (head_dim - 1).bit_length())
    name = f"{width}x{itemsize}" + "q" * quantized
    tuned = _tuned().get(device_kind(), {}).get(kernel, {}).get(name)
    return KINDS[kernel](**tuned) if tuned else _default(kernel, width, itemsize, quantized)


@contextmanager
def trying(kernel: str, tiles: Any) -> Iterator[None]:
    """Within it, programs are traced with these tiles of a kernel: for a tuner."""
    _ON_TRIAL[kernel] = tiles
    try:
        yield
    finally:
        del _ON_TRIAL[kernel]


def tuned_file() -> Path:
    """The file of tuned tiles in the user's cache: by kind of GPU, kernel and `<head dim>x<bytes of a number>[q]`."""
    # Without a home folder, expanduser leaves the ~, and there is no such file.
    folder = os.environ.get("DUO_JAX_CACHE") or os.path.expanduser("~/.cache/duo-jax")
    return Path(folder) / "tiles.json"


@cache
def _tuned() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    path = tuned_file()
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or was altered ({error}): delete it, then tune again") from None


def _default(kernel: str, width: int, itemsize: int, quantized: bool) -> Any:
    """Small enough for the registers and the shared memory of an A100, without spills."""
    small = width * itemsize <= 256
    if quantized:
        tiles = _default(kernel, width, itemsize, False)
        smaller = {"block_k": 32 if small else 16} | ({"block_q": 32} if kernel == "flash" and not small else {})
        return replace(tiles, **smaller)
    if kernel == "mosaic_flash":
        return PipelineTiles(block_k=128, num_stages=2)
    if kernel == "mosaic_decode":
        return DecodeTiles(block_k=64, min_split=256, max_programs=1056, num_warps=4, num_stages=4)
    if kernel == "decode":
        return DecodeTiles(block_k=64 if small else 32, min_split=256, max_programs=1024, num_warps=4, num_stages=2)
    if kernel == "backward":
        if width * itemsize <= 128:
            return FlashTiles(64, 32, 4, 2)
        return FlashTiles(64, 64, 8, 2) if small else FlashTiles(32, 32, 8, 1)
    return FlashTiles(128, 64, 8, 2) if small else FlashTiles(64, 32, 8, 2)
