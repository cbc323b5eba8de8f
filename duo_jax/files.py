"""Writing files so that what was there survives a full disk, a kill, or a second process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then into it. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file or folder, which need not exist yet: `.NAME.lock` beside it, removed afterwards.

    Raises:
        ValueError: another process holds it.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process writes to {path}: wait for it, or choose another --out") from None
    try:
        yield
    finally:
        # Removed while it is held: a process that opened it in the meantime finds that it has no name any more.
        if os.name != "nt":
            lock_path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder, which is created.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield
