"""Tile sizes of the kernels: what they are, which ones run where, and how a tuner tries others.

What ships depends on the chip's compute capability, multiprocessors and shared memory. Tiles that were tuned on the
user's machine take precedence.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.gpus import Chip, chip, device_kind, shared_memory_per_block
from pallas_kernels.ptxas import ptxas_version, version_text
from pallas_kernels.types import MOST_KEYS, Request, keys_of_page
from pallas_kernels.user_cache import cache_folder, read_json

# The most of each number; more fits into no GPU.
MOST = {
    "block_q": 1024,
    "block_k": MOST_KEYS,
    "num_warps": 32,
    "num_stages": 16,
    "min_split": 1 << 20,
    "max_programs": 1 << 20,
}


class Tiles:
    """Checks that all tiles share: positive integers up to `MOST`, powers of two where they are sizes of a tile."""

    def __post_init__(self) -> None:
        """Check the numbers: a wrong one can give wrong results instead of an error.

        Raises:
            ValueError: a number that no kernel takes.
        """
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if type(value) is not int or not 1 <= value <= MOST[field.name]:
                raise ValueError(f"{field.name} must be a positive integer up to {MOST[field.name]}, got {value!r}")
            if field.name in ("block_q", "block_k", "num_warps") and value.bit_count() > 1:
                raise ValueError(f"{field.name} must be a power of two, got {value}")


@dataclass(frozen=True)
class FlashTiles(Tiles):
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
class DecodeTiles(Tiles):
    """Tiles of the decode kernels."""

    block_k: int
    """Keys of a tile."""
    min_split: int
    """Least keys that are worth a program of their own; a multiple of `block_k` and of 8."""
    max_programs: int
    """Programs to spread a layer's keys over, a few for every multiprocessor; of `short`, those of a KV head."""
    num_warps: int
    """Warps of a program; the Mosaic kernel always multiplies with the four of a warpgroup."""
    num_stages: int
    """Loads in flight while a tile is computed."""

    def __post_init__(self) -> None:
        """Check the numbers; see `Tiles`."""
        super().__post_init__()
        # TMA addresses keys by eights.
        if self.min_split % self.block_k or self.min_split % 8:
            raise ValueError(f"min_split must be a multiple of block_k={self.block_k} and of 8, got {self.min_split}")


@dataclass(frozen=True)
class PipelineTiles(Tiles):
    """Tiles of the Mosaic prefill kernel, whose tiles of queries have one size."""

    block_k: int
    """Keys of a tile."""
    num_stages: int
    """Tiles of keys and values that shared memory holds, at least two."""

    def __post_init__(self) -> None:
        """Check the numbers; see `Tiles`."""
        super().__post_init__()
        # The values of one tile are still multiplied when the keys of the next one are.
        if self.num_stages < 2:
            raise ValueError(f"num_stages must be at least 2, got {self.num_stages}")


KINDS: dict[str, type[Any]] = {
    "flash": FlashTiles,
    "backward": FlashTiles,
    "decode": DecodeTiles,
    "short": DecodeTiles,
    "mosaic_flash": PipelineTiles,
    "mosaic_decode": DecodeTiles,
}

# The kernels of a backend's operations. For a short chunk over a quantized cache, some run `short` too, decode's.
KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("triton", "prefill"): ("flash",),
    ("triton", "decode"): ("decode",),
    ("triton", "training"): ("flash", "backward"),
    ("jax_triton", "prefill"): ("flash",),
    ("jax_triton", "decode"): ("decode",),
    ("jax_triton", "training"): ("flash", "backward"),
    ("mosaic", "prefill"): ("mosaic_flash",),
    ("mosaic", "decode"): ("mosaic_decode",),
}

WITH_SHORT = ("triton", "mosaic")

# Shared memory of a block on A100, bytes; with less, some tiles are smaller.
WIDE = 163 << 10

# Queries of a tile of decode that unpacks quantized keys, at least and at most: there are registers for no more.
LEAST_ROWS, MOST_ROWS = 64, 128
# Keys of a tile, at least: what a matrix product sums over. A tile is as small as a page needs.
LEAST_KEYS = 16
PAGED = ("flash", "decode", "short")

_ON_TRIAL: dict[str, Any] = {}


def tiles_for(kernel: str, head_dim: int, itemsize: int, *, quantized: bool = False, page: int | None = None) -> Any:
    """Tiles of a kernel on the device that programs are traced for: tuned ones, or ones that fit the chip.

    Args:
        kernel: a name in `KINDS`.
        head_dim: of the model; kernels round it up to a power of two.
        itemsize: bytes of a number: float32 tiles are half as large.
        quantized: whether the cache is that a decode kernel reads; in prefill, kernels read unpacked keys.
        page: tokens of a page of the cache, which a tile of the kernels in `PAGED` must not cross; None: it has none.

    Raises:
        ValueError: a file of tuned tiles that was altered.
    """
    tiles = _tiles(kernel, head_dim, itemsize, quantized)
    if page is None or kernel not in PAGED:
        return tiles
    return replace(tiles, block_k=min(tiles.block_k, max(LEAST_KEYS, keys_of_page(page))))


def _tiles(kernel: str, head_dim: int, itemsize: int, quantized: bool) -> Any:
    if kernel in _ON_TRIAL:
        return _ON_TRIAL[kernel]
    tuned = _tuned()
    if tuned:
        entries = tuned.get(tuned_key(kernel), {}).get(kernel, {})
        if found := entries.get(size_key(head_dim, itemsize, quantized=quantized)):
            return found
    return _default(kernel, _width(head_dim), itemsize, quantized, chip())


def tiles_of(backend: str, request: Request) -> dict[str, Any]:
    """Tiles of each kernel that a backend would run a request with, where it is traced for."""
    itemsize = 4 if "float32" in request.dtypes else 2
    page = None if request.full is None else request.page
    kernels = KERNELS.get((backend, request.operation), ())
    if backend in WITH_SHORT and request.is_short:
        kernels += ("short",)
    return {
        kernel: tiles_for(
            kernel,
            request.head_dim,
            itemsize,
            quantized=bool(request.bits) and (request.operation == "decode" or kernel == "short"),
            page=page,
        )
        for kernel in kernels
    }


def refused_size(request: Request) -> str | None:
    """The reason why Triton's smallest tiles do not fit on the request's GPU, or None."""
    if "float32" not in request.dtypes or request.head_dim <= 128 or request.operation in ("decode", "append"):
        return None
    if request.capability is not None and shared_memory_per_block(request.capability) < WIDE:
        # They would spill thousands of registers.
        return f"takes float32 only up to head dim 128 on GPUs with 99 KiB of shared memory, got {request.head_dim}"
    return None


@contextmanager
def trying(kernel: str, tiles: Any) -> Iterator[None]:
    """Within it, programs are traced with these tiles of a kernel: for a tuner, or a run that repeats its tiles."""
    before = _ON_TRIAL.get(kernel)
    _ON_TRIAL[kernel] = tiles
    try:
        yield
    finally:
        del _ON_TRIAL[kernel]
        if before is not None:
            _ON_TRIAL[kernel] = before


def tuned_file() -> Path:
    """The file of tuned tiles in the user's cache: by `tuned_key`, kernel and `size_key`.

    Raises:
        FileNotFoundError: the user has no home folder.
    """
    return cache_folder() / "tiles.json"


def tuned_key(kernel: str) -> str:
    """What tuned tiles of a kernel belong to: the kind of chip, and the compilers.

    As in "sm_90, 132 SMs, 227 KiB, jax 0.11.2, ptxas 12.9.86".
    """
    here, assembler = chip(), ptxas_version("mosaic" if kernel.startswith("mosaic") else "triton")
    if here.capability is None:
        kind = device_kind()
    else:
        major, minor = here.capability
        kind = f"sm_{major}{minor}, {here.cores} SMs, {here.shared_memory >> 10} KiB"
    return f"{kind}, jax {jax.__version__}, ptxas {version_text(assembler)}"


def size_key(head_dim: int, itemsize: int, *, quantized: bool = False) -> str:
    """Name of the sizes that tiles depend on: `<head dim>x<bytes of a number>`, and a q for quantized caches."""
    return f"{_width(head_dim)}x{itemsize}" + "q" * quantized


def _width(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def _tuned() -> dict[str, dict[str, dict[str, Any]]]:
    try:
        path = tuned_file()
        is_there = path.exists()
    except OSError:  # No home folder, or one of another user.
        return {}
    return read_tuned(path) if is_there else {}


def check_tuned() -> None:
    """Read the file of tuned tiles.

    Raises:
        ValueError: one that was altered.
    """
    _tuned()


def forget_tuned() -> None:
    """Read the file again when tiles are next asked for: after tuning."""
    _tuned.cache_clear()


def read_tuned(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Tiles in a file, by `tuned_key`, kernel and `size_key`.

    Raises:
        ValueError: not a file of tiles, or tiles that no kernel takes.
    """
    try:
        return {
            key: {
                kernel: {size: _checked(f"{kernel} {size}", kernel, entry) for size, entry in sizes.items()}
                for kernel, sizes in kernels.items()
            }
            for key, kernels in read_json(path).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        why = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} is truncated or was altered ({why}): delete it, then tune again") from None


def _checked(name: str, kernel: str, entry: Mapping[str, int]) -> Any:
    if kernel not in KINDS:
        raise ValueError(f"there is no kernel {kernel!r}")
    names = [field.name for field in fields(KINDS[kernel])]
    if sorted(entry) != sorted(names):
        raise ValueError(f"{name} needs {', '.join(names)}")
    try:
        return KINDS[kernel](**entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _default(kernel: str, width: int, itemsize: int, quantized: bool, chip: Chip) -> Any:
    """What ships: within the shared memory of the chip, by compilation for A100, RTX 4090 and H200.

    tokamax's public table for H100 has 128 x 128 with 3 stages and 8 warps as Triton's best. Here that spills registers
    on sm_90 (116 bytes a thread, jax 0.10.2), so it is for the tuner to find out.
    """
    small = width * itemsize <= 256
    if kernel == "short":
        one = _default("decode", width, itemsize, True, chip)
        most = 64 if chip.is_hopper and width <= 128 else 32
        # One program, of eight warps, has the registers of a multiprocessor.
        return replace(one, block_k=min(one.block_k, most), num_warps=8, max_programs=chip.cores or 8)
    if quantized:
        return replace(_default(kernel, width, itemsize, False, chip), block_k=64 if small else 32)
    # Two waves of four programs on each multiprocessor.
    programs = 8 * (chip.cores or 128)
    # Float32 tiles of the larger head dims do not fit into 99 KiB.
    is_narrow = 0 < chip.shared_memory < WIDE and itemsize == 4 and not small
    if kernel == "mosaic_flash":
        if chip.capability is None or chip.is_hopper:
            return PipelineTiles(block_k=128, num_stages=2)
        # Two programs of four warps have the registers of a multiprocessor, and need twice this shared memory.
        return PipelineTiles(block_k=32 if chip.shared_memory < WIDE and width * itemsize > 128 else 64, num_stages=2)
    if kernel == "mosaic_decode":
        return DecodeTiles(block_k=64, min_split=256, max_programs=programs, num_warps=4, num_stages=4)
    if kernel == "decode":
        block_k = 64 if small else 16 if is_narrow and width > 128 else 32
        # Four warps of the largest float32 tiles spill up to 452 bytes a thread, eight 16 (sm_86) or none (sm_80).
        warps = 8 if itemsize == 4 and width > 128 else 4
        return DecodeTiles(block_k, min_split=256, max_programs=programs, num_warps=warps, num_stages=2)
    if kernel == "backward":
        if width * itemsize <= 128:
            return FlashTiles(64, 32, 4, 2)
        if is_narrow or (itemsize == 4 and small):  # 64 x 64 spills up to 2,712 bytes a thread of float32 in sm_86.
            return FlashTiles(32, 16, 4, 1)
        return FlashTiles(64, 64, 8, 2) if small else FlashTiles(32, 32, 8, 1)
    if is_narrow:
        return FlashTiles(32, 32, 4, 2)
    if itemsize == 4 and small:
        # 128 x 64 with 8 warps spills 1,348 bytes a thread in sm_86; this none, in half of the shared memory.
        return FlashTiles(64, 32, 4, 2)
    return FlashTiles(128, 64, 8, 2) if small else FlashTiles(64, 32, 8, 2)
