"""Writing files so that what was there survives a full disk, a kill, or a second process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then into it. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def lock(file: int, path: Path) -> None:
    """Keep an open file or folder for this process until it is closed, where the system has such locks.

    Args:
        file: its descriptor.
        path: its name, for the message.

    Raises:
        ValueError: another process has it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process writes to {path}: wait for it, or choose another --out") from None
    except (ImportError, OSError):
        pass  # Windows, and some file systems of clusters.


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only one that writes to a folder, which is made; where the system has such locks, as `lock`.

    Raises:
        ValueError: another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # Windows opens no folders.
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        lock(held, folder)
        yield
    finally:
        os.close(held)
