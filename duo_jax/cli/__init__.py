"""The `duo` command. Subcommands are entry points in the group `duo.commands`, to which other packages add theirs.

A subcommand is a frozen dataclass: its fields are the flags, its docstring is the help, and `run` does the work.
"""

import ast
import functools
import importlib.util
import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

# Errors that users can cause and fix: reported in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError)


def main() -> None:
    """Run the subcommand named on the command line. Exit codes: 0 success, 2 wrong use, 130 interrupted."""
    commands = {entry.name: entry for entry in entry_points(group="duo.commands")}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage(commands))
    elif name == "--version":
        print(f"duo-jax {version('duo-jax')}")
    elif name not in commands:
        print(f"duo: no command {name!r}; there are {', '.join(sorted(commands))}. See duo --help", file=sys.stderr)
        sys.exit(2)
    else:
        sys.exit(_run(commands[name]))


def _run(entry: EntryPoint) -> int:
    try:
        import tyro

        _take_memory()
        _keep_compiled_programs()
        warnings.showwarning = functools.partial(_warn, entry.name)
        command, args = entry.load(), sys.argv[2:]
        # A command whose defaults depend on a flag (a preset) has one class per preset.
        command = command.variant(args) if hasattr(command, "variant") else command
        tyro.cli(command, prog=f"duo {entry.name}", args=args).run()
    except KeyboardInterrupt:
        print(f"\nduo {entry.name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) closed the pipe; keep the interpreter from failing when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        if os.environ.get("DUO_TRACEBACK"):
            raise
        print(f"duo {entry.name}: {error}", file=sys.stderr)
        return 2
    return 0


def _warn(name: str, message: Warning | str, *place: object) -> None:
    """Print a warning in one line, without the source code around it."""
    print(f"duo {name}: warning: {message}", file=sys.stderr)


def _take_memory() -> None:
    """Let jax use as much of a GPU as `duo plan` assumes, unless the user has set the fraction."""
    from pallas_kernels.gpus import MEMORY_FRACTION

    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)


def _keep_compiled_programs() -> None:
    """Compile each program once per machine, unless the user disables it (`JAX_ENABLE_COMPILATION_CACHE=0`)."""
    import jax

    from duo_jax.checkpoint.packaged import cache_folder

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


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
