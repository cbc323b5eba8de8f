"""Writing files and folders: whole or not at all, by one process at a time, and never over what someone else wrote."""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from duo_jax.arguments import path_of

# In a folder that is not finished. A folder without it is never removed.
UNFINISHED = ".duo-jax-unfinished"
# Bytes at the beginning of a file from which its writer is recognized.
HEAD = 4096
# Ends of names that `duo_jax.reading` takes for packed files.
PACKED = (".gz", ".zst")
_RANDOM = "[0-9a-f]{16}"
_PART = re.compile(rf"\..*\.{_RANDOM}\.part")


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made, and the mode of a file that is replaced is kept.

    A symbolic link stays, and its target is written.

    Raises:
        ValueError: the path is a folder, a pipe or a device, or is inside a file.
        OSError: it cannot be written, such as on a full disk; it is as it was before.
    """
    _check_place(path)
    target = Path(os.path.realpath(path))
    part = _part(target, target.name[:50])
    with _naming(path, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(content)
            if target.exists():
                part.chmod(stat.S_IMODE(target.stat().st_mode))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file; the text has left this process when the call returns.

    Raises:
        OSError: it cannot be written, such as on a full disk. A part of the text may be in the file.
    """
    with _naming(path, path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def check_output(path: Path, is_own: Callable[[bytes], bool] | None = None, *, force: bool = False) -> None:
    """Check before the work that a file can be written at its end.

    Args:
        path: the file; it need not exist.
        is_own: whether a file with these first `HEAD` bytes may be replaced; None: any file.
        force: replace any file.

    Raises:
        ValueError: the path is a folder, a pipe or a device, is inside a file, or has the name of a packed file.
        FileExistsError: there is a file that is not its own.
        PermissionError: the file or its folder cannot be written to.
    """
    _check_place(path)
    if path.suffix in PACKED:
        raise ValueError(f"{path} would be read as a packed file, and nothing is packed here: leave out {path.suffix}")
    if force or is_own is None or not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head and not is_own(head):
        raise FileExistsError(
            f"{path} exists, and this command did not write it: choose another name, or replace it with --force"
        )


def free_path(path: str | Path) -> Path:
    """The absolute path of a folder that can be made; links in it are resolved.

    Raises:
        FileExistsError: it exists, and is not an empty folder.
        ValueError: it is no path, or is inside a file.
        PermissionError: the folder around it cannot be written to.
    """
    path = Path(os.path.realpath(path_of("path", path)))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: choose another name, or remove it first")
    _check_folder(path.parent)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which is renamed to `path` when the block ends without an error.

    What an interrupted process left of the same folder is removed.

    Raises:
        FileExistsError, ValueError, PermissionError: see `free_path`.
        OSError: it cannot be written, such as on a full disk; nothing is left.
    """
    path = free_path(path)
    with locked(path):
        # The lock is of this name only: a sibling called `NAME.x` may be written now.
        own = re.compile(rf"\.{re.escape(path.name)}\.{_RANDOM}\.part")
        for old in path.parent.glob(".*.part"):
            if own.fullmatch(old.name) and (old / UNFINISHED).is_file():
                shutil.rmtree(old, ignore_errors=True)
        part = _part(path, path.name)
        try:
            with _naming(path, part):
                part.mkdir(parents=True)
                (part / UNFINISHED).touch()
                yield part
                (part / UNFINISHED).unlink()
                if free_path(path).exists():
                    path.rmdir()
                part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def is_left_over(path: Path) -> bool:
    """Whether a name is that of a temporary file or folder, which a killed process leaves."""
    return bool(_PART.fullmatch(path.name))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only process that writes to a file or folder, which need not exist. The lock is `.NAME.lock` next to it.

    Raises:
        ValueError: another process writes to it.
        OSError: nothing can be written there.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        with _naming(path, lock_path):
            lock_path.touch()  # Where no file can be made, such as in /proc, filelock reports a lock too.
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


def _part(path: Path, name: str) -> Path:
    """A new name next to a path."""
    return path.with_name(f".{name}.{secrets.token_hex(8)}.part")


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} is {kind}: give the name of a file")
    if os.path.islink(os.path.realpath(path)):
        raise ValueError(f"{path} is a link that leads back to itself")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is write-protected: choose another name")
    _check_folder(Path(os.path.realpath(path)).parent)


def _check_folder(folder: Path) -> None:
    """Check that a folder can be made, if it does not exist, and written to."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder, so nothing can be written below it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to: choose another folder")


@contextmanager
def _naming(path: Path, part: Path) -> Iterator[None]:
    """Raise the system's errors that name no file, or one in `part`, with the path that the user gave instead."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or Path(str(error.filename)).is_relative_to(part)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
