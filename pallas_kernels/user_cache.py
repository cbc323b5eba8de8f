"""The user's cache folder, which has verdicts and tuned tiles; its JSON files are bounded, and may be damaged."""

import json
import os
from pathlib import Path
from typing import Any

# Verdicts of sixteen environments take less than a hundredth.
MOST_BYTES = 1 << 24


def cache_folder() -> Path:
    """The folder of verdicts, tuned tiles, downloads and compiled programs: `$DUO_JAX_CACHE` or `~/.cache/duo-jax`.

    Raises:
        FileNotFoundError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("DUO_JAX_CACHE") or Path.home() / ".cache" / "duo-jax")
    except RuntimeError:
        raise FileNotFoundError("there is no home folder: set HOME, or DUO_JAX_CACHE to a folder") from None


def read_bytes(path: Path) -> bytes:
    """A file of the user's cache, which a program that reads it at every start must not wait for, nor fill memory with.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: no regular file, or one that is too large.
    """
    size = path.stat().st_size
    if not path.is_file() or size > MOST_BYTES:
        raise ValueError(f"no regular file of at most {MOST_BYTES} bytes")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: no regular file, one that is too large, or not JSON.
    """
    try:
        return json.loads(read_bytes(path), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
