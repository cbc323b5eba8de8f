"""Runs generated code in a separate process, with limits. Knows nothing about the origin of the code.

Limits: wall-clock and processor time, memory (address space), size of files, open files, no core dumps; an empty
environment, a working folder that is empty and removed afterwards, Python without site packages.

Isolation, by the Linux kernel (`guard.py`): the program may read Python and the system's libraries, and change files in
its working folder only. It has no network and starts no process. A first program tests this; where it fails, nothing
runs unless the caller insists. This is no virtual machine: an error of the kernel may still let a program out.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

GUARD = Path(__file__).with_name("guard.py")
LONGEST = 86400.0
ISOLATED = "time, memory, files; no network, no processes, no files outside its folder (Landlock, seccomp)"
NOT_ISOLATED = "time, memory, files; not isolated"
# Tries what no program may; each attempt that succeeds is named.
PROBE = """
import os, socket
open("own", "w").close()
attempts = {
    "open": lambda: open(VICTIM, "r+"),
    "read": lambda: open(VICTIM),
    "replace": lambda: os.replace("own", VICTIM),
    "rename": lambda: os.rename(VICTIM, "stolen"),
    "link": lambda: os.link(VICTIM, "linked"),
    "remove": lambda: os.remove(VICTIM),
    "truncate": lambda: os.truncate(VICTIM, 0),
    "chmod": lambda: os.chmod(VICTIM, 0o600),
    "mkdir": lambda: os.mkdir(VICTIM + ".folder"),
    "fork": os.fork,
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "connect": socket.socket,
    "signal": lambda: os.kill(os.getppid(), 0),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(f"may {name}")
"""


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

    def check(self) -> None:
        """Refuse limits that the system cannot set.

        Raises:
            ValueError: a limit that is not a number above 0, or is above the longest time or the largest size.
        """
        for name, value in asdict(self).items():
            most = LONGEST if name == "seconds" else (1 << 63) - 1
            if not 0 < value <= most:
                raise ValueError(f"--limits.{name.replace('_', '-')} must be above 0 and at most {most:g}, got {value}")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program: it ran to its end, failed, or ran out of time; and the reason."""

    outcome: Literal["passed", "failed", "timed out"]
    reason: str = ""


def run(program: str, limits: Limits = Limits(), *, unsafe: bool = False) -> Verdict:
    """Run a Python program to its end: "passed" if nothing was raised. Leaving early, by any exit, is a failure.

    Raises:
        NotImplementedError: see `isolation`.
        ValueError: see `Limits.check`.
    """
    limits.check()
    return _run(program, limits, isolated=isolation(unsafe=unsafe) == ISOLATED)


def isolation(*, unsafe: bool = False) -> str:
    """The isolation of programs on this machine, to be stored with results.

    Raises:
        NotImplementedError: there is none, and the caller does not accept that.
    """
    reason = _missing()
    if reason and not unsafe:
        raise NotImplementedError(
            f"this system cannot isolate generated code ({reason}): that takes Linux 6.2 or newer with Landlock, and "
            "libseccomp; in a container or virtual machine with nothing to lose, --unsafe runs it nevertheless"
        )
    return NOT_ISOLATED if reason else ISOLATED


@functools.cache
def _missing() -> str:
    """Why programs cannot be isolated here; empty if they can."""
    with tempfile.TemporaryDirectory(prefix="duo-sandbox-") as folder:
        victim = Path(folder) / "victim"
        victim.write_text("whole")
        verdict = _run(PROBE.replace("VICTIM", repr(str(victim))), Limits(seconds=60.0), isolated=True)
        if verdict.outcome == "passed" and os.listdir(folder) == ["victim"] and victim.read_text() == "whole":
            return ""
    return verdict.reason or "a test program changed a file"


def _run(program: str, limits: Limits, *, isolated: bool) -> Verdict:
    word = secrets.token_hex(16)  # Printed only after the last line: an early exit with status 0 has not passed.
    order = json.dumps({"program": program, "word": word, "limits": asdict(limits), "isolated": isolated})
    # The output is a file, since the size of a file is limited.
    with tempfile.TemporaryDirectory(prefix="duo-sandbox-") as folder, tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            child.communicate(order.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict("timed out", f"more than {limits.seconds:g} s")
        finally:
            _kill(child)
        output.seek(0)
        text = output.read(2048).decode(errors="replace").strip()
    if text == word:
        return Verdict("passed")
    return Verdict("failed", text[:500] or f"ended early, with exit status {child.returncode}")


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """The whole group, whether or not its first process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
