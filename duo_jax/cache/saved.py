"""Named arrays and what is known of them in a folder, through Orbax: whole or not there at all, checked when read.

Knows nothing of caches or models.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

ABOUT, ARRAYS = "about", "arrays"


def write(path: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays and a description (plain values) under a name that appears when everything is on disk.

    Raises:
        FileExistsError: something is there already.
    """
    path = free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    record = {"about": dict(about), "checksums": checksums, "own": _of_text({"about": about, "checksums": checksums})}
    with _checkpointer() as checkpointer:
        # Orbax writes beside the path and renames at the end.
        items = {ABOUT: ocp.args.JsonSave(record), ARRAYS: ocp.args.PyTreeSave(dict(arrays))}
        checkpointer.save(path, ocp.args.Composite(**items))


def free(path: str | Path) -> Path:
    """The absolute path, if nothing is there.

    Raises:
        FileExistsError: something is.
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name, or remove it first")
    return path


def read_about(path: str | Path) -> dict[str, Any]:
    """The description alone.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a folder that `write` made, or one that was truncated or altered.
    """
    record = _restore(path, **{ABOUT: ocp.args.JsonRestore()})[ABOUT]
    try:
        about, checksums, own = (record[name] for name in ("about", "checksums", "own"))
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not hold what is expected: it was not saved by duo-jax") from None
    if own != _of_text({"about": about, "checksums": checksums}):
        raise ValueError(f"{path} was altered after it was saved: its description has another checksum; save it anew")
    return {**about, "checksums": checksums}


def read_arrays(path: str | Path, checksums: Mapping[str, str]) -> dict[str, np.ndarray]:
    """All arrays, each checked.

    Raises:
        ValueError: an array that is missing, truncated or altered, by name.
    """
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in checksums}
    args = ocp.args.PyTreeRestore(item={name: 0 for name in checksums}, restore_args=wanted)
    arrays = _restore(path, **{ARRAYS: args})[ARRAYS]
    for name, array in arrays.items():
        if _checksum(array) != checksums[name]:
            raise ValueError(f"{path} was altered after it was saved: {name} has another checksum; save it anew")
    return arrays


def _restore(path: str | Path, **items: Any) -> Any:
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder that was saved")
    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(path, ocp.args.Composite(**items))
    except Exception as error:  # Whatever Orbax and its file formats raise where bytes are missing or wrong.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read, it is incomplete or was altered: {first}") from None


def _checkpointer() -> ocp.Checkpointer:
    # Keys and values hardly compress, and files are as large as what they hold.
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{ABOUT: ocp.JsonCheckpointHandler(), ARRAYS: arrays}))


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=16)
    for part in array:  # Slot by slot: a part of a pool is not contiguous.
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def _of_text(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
