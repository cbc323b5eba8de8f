"""Runs generated code in a separate process, with limits. Knows nothing about the origin of the code.

Always enforced: wall-clock and processor time, memory (address space), size of files, open files, no core dumps; an
empty environment, a working folder that is empty and removed afterwards, Python without site packages; a process group
of its own, killed at the end. `guard.py`, inside, refuses sockets, new processes, signals, foreign functions
and changes outside the working folder.

On Linux, where namespaces may be unshared (`isolation` says whether), the kernel enforces more: there is no network,
and the code sees only its own processes, all of which die with the first.

This keeps mistakes of a model from doing harm. It does not stop malicious code: the code may read whatever this user
may read, and without namespaces a determined program gets around the guard.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

GUARD = Path(__file__).with_name("guard.py")
# Root needs no user namespace, others do; the first command that works is used.
_FLAGS = "--net --pid --ipc --fork --kill-child"
_NAMESPACES = (f"--user --map-current-user {_FLAGS}", _FLAGS)


@dataclass(frozen=True)
class Limits:
    """Limits of a program."""

    seconds: float = 10.0
    """Wall-clock time; processor time is limited to a second more."""
    memory: int = 1 << 29
    """Bytes of address space, the interpreter's 30 MB included."""
    file_size: int = 1 << 20
    """Bytes of a file."""
    open_files: int = 32
    """Files open at a time."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program: it ran to its end, failed, or ran out of time; and the reason."""

    outcome: Literal["passed", "failed", "timed out"]
    reason: str = ""


def run(program: str, limits: Limits = Limits()) -> Verdict:
    """Run a Python program to its end: "passed" if nothing was raised. Leaving early, by any exit, is a failure.

    Raises:
        ValueError: limits that are not positive.
    """
    if min(limits.seconds, limits.memory, limits.file_size, limits.open_files) <= 0:
        raise ValueError(f"limits must be above 0, got {limits}")
    word = secrets.token_hex(16)  # Printed only after the last line: an early exit with status 0 has not passed.
    order = json.dumps({"program": program, "word": word, "limits": asdict(limits)})
    command = [*_unshare(), sys.executable, "-I", "-S", str(GUARD)]
    with tempfile.TemporaryDirectory(prefix="duo-sandbox-") as folder:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(order.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict("timed out", f"more than {limits.seconds:g} s")
        finally:
            _kill(child)
    text = output.decode(errors="replace").strip()
    if text == word:
        return Verdict("passed")
    return Verdict("failed", text[:500] or f"ended early, with exit status {child.returncode}")


def isolation() -> str:
    """The isolation that this machine offers, to be stored with results."""
    inside = "time, memory, files; sockets, processes and signals refused inside Python"
    return f"{inside}; no network, no other processes (namespaces)" if _unshare() else inside


@functools.cache
def _unshare() -> tuple[str, ...]:
    """A command that runs another without a network and without other processes in sight; empty if there is none."""
    tool = shutil.which("unshare")
    for flags in _NAMESPACES if tool else ():
        command = (str(tool), *flags.split())
        try:
            done = subprocess.run([*command, "true"], capture_output=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return command
    return ()


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """The whole group, whether or not its first process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
