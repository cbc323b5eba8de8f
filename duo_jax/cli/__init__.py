"""The `duo` command. Subcommands are entry points in the group `duo.commands`, to which other packages add theirs.

A subcommand is a frozen dataclass: its fields are the flags, its docstring is the help, and `run` does the work.
"""

import ast
import contextlib
import contextvars
import errno
import functools
import gc
import importlib.util
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from types import FrameType
from typing import Any

from duo_jax.extras import missing_package, needed, packages_of, require

# Errors that users can cause and fix: reported in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError)


def main() -> None:
    """Run the subcommand named on the command line. Exit codes: 0 success, 2 wrong use, 130 interrupted."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    commands = {entry.name: entry for entry in entry_points(group="duo.commands")}
    label, work = f"duo {name}" if name in commands else "duo", functools.partial(_main, name, commands)
    # In a context of its own, in which messages name flags.
    sys.exit(contextvars.copy_context().run(_status, label, work))


def _main(name: str, commands: dict[str, EntryPoint]) -> None:
    for argument in sys.argv[1:]:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            # Bytes from the shell that are not UTF-8 arrive as halves of surrogate pairs, which nothing can write.
            raise ValueError(f"the argument {argument[:80]!a} is not UTF-8 text")
    if name in ("-h", "--help"):
        print(_usage(commands))
    elif name == "--version":
        print(f"duo-jax {version('duo-jax')}")
    elif name not in commands:
        raise ValueError(f"no command {name!r}; there are {', '.join(sorted(commands))}. See duo --help")
    else:
        _run(commands[name])


def _run(entry: EntryPoint) -> None:
    with _no_garbage():
        from duo_jax.programs import keep_programs
        from pallas_kernels.certify.machine import check_setting, may_have_gpu

        check_setting()
        _take_memory()
        keep_programs()
        warnings.showwarning = functools.partial(_warn, entry.name)
        command = _parsed(entry, sys.argv[2:])
    require(f"duo {entry.name}", packages_of(command))
    if may_have_gpu() or os.environ.get("DUO_BACKEND"):
        from duo_jax.cli.certify import certify_for

        certify_for(command)
    command.run()


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Imports make no garbage: do not look for it in what they make, neither now nor whenever Python does later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _parsed(entry: EntryPoint, args: list[str]) -> Any:
    """The command that the arguments describe."""
    from duo_jax.cli.flags import is_help, parse

    try:
        command = entry.load()
    except ImportError as error:
        if package := missing_package(error):
            raise NotImplementedError(needed(f"duo {entry.name}", [package])) from None
        raise
    if not is_help(args):
        require(f"duo {entry.name}", packages_of(command))
    # A command whose defaults depend on a flag (a preset) has one class per preset.
    command = command.variant(args) if hasattr(command, "variant") else command
    return parse(command, f"duo {entry.name}", args)


def _status(label: str, work: Callable[[], None]) -> int:
    """Do the work and return its exit code; errors that users can cause and fix are reported in one line."""
    if sys.stderr is None:  # Closed by the shell, as are the other two below.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        print(f"{label}: standard output is closed: redirect it to a file or to {os.devnull}", file=sys.stderr)
        return 2
    try:
        try:
            with _interrupts():
                work()
        except SystemExit as done:  # Of tyro, after a help text or for a wrong flag.
            sys.stdout.flush()
            return done.code if isinstance(done.code, int) else int(done.code is not None)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        # The process ends: another Ctrl-C would print a traceback of that.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{label}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader (head, less) closed the pipe.
        return 0
    except Exception as error:
        reason = None if os.environ.get("DUO_TRACEBACK") else _reason(error)
        if reason is None:
            raise
        print(f"{label}: {reason}", file=sys.stderr)
        return 2
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            # The interpreter would fail at the same output again, with another exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt after Ctrl-C, also if an extension that is being imported makes another error of it."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _reason(error: Exception) -> str | None:
    """The message of an error that users can cause and fix; None for others, which keep their traceback."""
    if isinstance(error, UnicodeEncodeError):
        text = error.object[error.start : error.end][:20]
        if error.encoding.startswith("utf"):
            return f"{text!a} is half of a surrogate pair, which is not text"
        return f"the output's encoding {error.encoding} has no {text!a}: set PYTHONIOENCODING=utf-8"
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF):
        return f"standard output cannot be written to: {error.strerror}"  # Errors of files name the file.
    if isinstance(error, ImportError) and (package := missing_package(error)):
        return needed("this command", [package])
    if isinstance(error, USER_ERRORS):
        from duo_jax.arguments import in_flags

        return in_flags(message_of(error))
    return _platform_reason() if isinstance(error, RuntimeError | AssertionError) else None


def message_of(error: Exception) -> str:
    """The message; of an error of the system, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{error.filename!s:.200}: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            message += ": check the path" + (
                "" if os.path.isabs(str(error.filename)) else ", which is relative to the working folder"
            )
        return message
    return str(error)


def _platform_reason() -> str | None:
    """Why jax has no device at all, if so: it raises this from wherever the first device is used."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        why = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        return f"jax finds no device of JAX_PLATFORMS={platforms}{why}: unset it, or set it to cpu"
    return None


def _warn(name: str, message: Warning | str, *place: object) -> None:
    """Print a warning in one line, without the source code around it."""
    print(f"duo {name}: warning: {message}", file=sys.stderr)


def _take_memory() -> None:
    """Let jax use as much of a GPU as `duo plan` assumes, unless the user has set the fraction."""
    from pallas_kernels.gpus import MEMORY_FRACTION

    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)


def _usage(commands: dict[str, EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {_summary(commands[name])}" for name in sorted(commands)]
    return "\n".join(["usage: duo COMMAND [flags]", "", *lines, "", "duo COMMAND --help lists a command's flags."])


def _summary(entry: EntryPoint) -> str:
    """The first line of a subcommand's docstring, read without importing its module."""
    spec = importlib.util.find_spec(entry.module)
    source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    docstring = next((ast.get_docstring(node) for node in classes if node.name == entry.attr), None)
    return (docstring or "").partition("\n")[0]
