"""Tile sizes of the kernels: what they are, which ones run where, and how a tuner tries others."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pallas_kernels.gpus import device_kind


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
