"""Tile sizes of the GPU kernels: a table by kind of GPU, kernel and head dim, and what to take beyond it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import jax


@dataclass(frozen=True)
class FlashTiles:
    """Tiles of the prefill kernel, and of the backward kernels of training."""

    block_q: int
    """Queries of a tile."""
    block_k: int
    """Keys of a tile."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Loads that are in flight while a tile is computed."""


@dataclass(frozen=True)
class DecodeTiles:
    """Tiles of the decode kernel."""

    block_k: int
    """Keys of a tile."""
    min_split: int
    """Least keys that are worth a program of their own; a multiple of `block_k`."""
    max_programs: int
    """Programs to spread a layer's keys over: a few for every multiprocessor."""
    num_warps: int
    """Warps of a program; the Mosaic kernel has the four of a warpgroup that multiply."""
    num_stages: int
    """Loads that are in flight while a tile is computed."""


@dataclass(frozen=True)
class PipelineTiles:
    """Tiles of the Mosaic prefill kernel, whose tiles of queries have one size."""

    block_k: int
    """Keys of a tile."""
    num_stages: int
    """Tiles of keys and values that shared memory holds."""


_TRIED: dict[str, Any] = {}

KINDS: dict[str, type[Any]] = {
    "flash": FlashTiles,
    "backward": FlashTiles,
    "decode": DecodeTiles,
    "mosaic_flash": PipelineTiles,
    "mosaic_decode": DecodeTiles,
}


def tiles_for(kernel: str, head_dim: int, itemsize: int, *, quantized: bool = False) -> Any:
    """Tiles of a kernel on the device that programs run on, from `tiles.json`, else ones that fit any GPU.

    Args:
        kernel: a name in `KINDS`.
        head_dim: of the model, rounded up to a power of two by the kernels.
        itemsize: bytes of a number: float32 tiles are half as large.
        quantized: whether the cache is; its keys take more registers while they are unpacked.
    """
    if kernel in _TRIED:
        return _TRIED[kernel]
    width = max(16, 1 << (head_dim - 1).bit_length())
    name = f"{width}x{itemsize}" + "q" * quantized
    found = _table().get(device_kind(), {}).get(kernel, {}).get(name)
    return KINDS[kernel](**found) if found else _default(kernel, width, itemsize, quantized)


@contextmanager
def trying(kernel: str, tiles: Any) -> Iterator[None]:
    """Within it, programs are traced with these tiles of a kernel: for a tuner."""
    _TRIED[kernel] = tiles
    try:
        yield
    finally:
        del _TRIED[kernel]


# Of GPUs that programs are compiled for where they need not be: a kind of device does not tell.
CAPABILITIES = {
    "NVIDIA A100-SXM4-80GB": (8, 0),
    "NVIDIA GeForce RTX 4090": (8, 9),
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA H200": (9, 0),
    "NVIDIA B200": (10, 0),
}


def compute_capability() -> tuple[int, int] | None:
    """That of the GPU that programs are made for, as in (9, 0); None on another kind of device, or an unknown one."""
    device = jax.devices()[0]
    if device.device_kind != device_kind():
        return CAPABILITIES.get(device_kind())
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def device_kind() -> str:
    """Kind of device that programs are made for, as the table names it: the mesh's in use, else the default's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


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


@cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads((files("pallas_kernels") / "tiles.json").read_text(encoding="utf-8"))
