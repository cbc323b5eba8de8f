"""Inside the sandbox: sets limits on this process, refuses operations that no solution needs, runs the program.

Started by `sandbox.py` as a script without site packages: it may import only the standard library.
"""

import json
import os
import resource
import sys
from typing import Any

# Events of Python's audit hooks that are refused by their first words. `import` of a module that opens libraries or
# sockets is not: some of the standard library does so without using them.
REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile",
    "os.kill", "pty.", "ctypes.", "signal.pthread_kill", "os.chmod", "os.chown", "os.link", "os.symlink", "os.putenv",
    "resource.", "ftplib.", "http.", "smtplib.", "urllib.", "webbrowser.", "sys.settrace", "sys.setprofile", "mmap.",
    "shutil.",
)  # fmt: skip
# Events whose first arguments are paths: allowed in the working folder.
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "tempfile.")


def main() -> None:
    """Read the request, run the program, print the completion token."""
    order = json.load(sys.stdin)
    voice = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    program, word = compile_program(order["program"]), order["word"]
    limit(order["limits"])
    sys.addaudithook(refuse(os.path.realpath(os.getcwd())))
    try:
        if isinstance(program, str):
            os.write(voice, program.encode())
            return
        exec(program, {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed.
        os.write(voice, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
        return
    os.write(voice, word.encode())


def compile_program(text: str) -> Any:
    """The program's code, or an error message."""
    try:
        return compile(text, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"


def limit(sizes: dict[str, Any]) -> None:
    """Limits that only root could raise again."""
    seconds = int(sizes["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, int(sizes["memory"])),
        (resource.RLIMIT_FSIZE, int(sizes["file_size"])),
        (resource.RLIMIT_NOFILE, int(sizes["open_files"])),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def refuse(folder: str) -> Any:
    """An audit hook: it cannot be taken off again."""

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        return os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused in the sandbox")
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and not inside(path):
                raise PermissionError(f"writing to {path!r} is refused in the sandbox")
        elif event.startswith(CHANGES) and args and isinstance(args[0], str | bytes) and not inside(args[0]):
            raise PermissionError(f"{event} of {args[0]!r} is refused in the sandbox")

    return hook


if __name__ == "__main__":
    main()
