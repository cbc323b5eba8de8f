"""Writing files and folders: whole or not at all, and by one process at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, through a temporary file in the same folder, which is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def free_path(path: str | Path) -> Path:
    """The absolute path.

    Raises:
        FileExistsError: it exists.
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name, or remove it first")
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which is renamed to `path` when the block ends without an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(free_path(path))
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only process that writes to a file or folder, which need not exist. The lock is `.NAME.lock` next to it.

    Raises:
        ValueError: another process writes to it.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process writes to {path}: wait for it, or choose another --out") from None
    except OSError:  # Some file systems of clusters have no locks.
        yield
        return
    try:
        yield
    finally:
        # Removed before it is released: a process that opened it meanwhile sees that it is gone, and opens another.
        if os.name != "nt":
            lock_path.unlink(missing_ok=True)
        lock.release()
