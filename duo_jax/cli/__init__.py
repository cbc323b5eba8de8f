"""The `duo` command. Subcommands are found through the entry-point group `duo.commands`: `train` and `eval` add theirs.

A subcommand is a frozen dataclass whose fields are its flags, whose docstring is its help, and whose `run` does it.
"""

import functools
import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points

from duo_jax.gpus import MEMORY_FRACTION

# What a caller can get wrong: said in a line, without a traceback.
USER_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError)


def main() -> None:
    """Run the subcommand that the command line names. Exit codes: 0 done, 2 wrong use, 130 interrupted."""
    commands = {entry.name: entry for entry in entry_points(group="duo.commands")}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage(commands))
    elif name == "--version":
        print(f"duo-jax {_version()}")
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
        # A command whose defaults depend on a flag (a preset) has a class for each.
        command = command.variant(args) if hasattr(command, "variant") else command
        tyro.cli(command, prog=f"duo {entry.name}", args=args).run()
    except KeyboardInterrupt:
        print(f"\nduo {entry.name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        if os.environ.get("DUO_TRACEBACK"):
            raise
        print(f"duo {entry.name}: {error}", file=sys.stderr)
        return 2
    return 0


def _warn(name: str, message: Warning | str, *place: object) -> None:
    """A warning in a line, without the source code around it."""
    print(f"duo {name}: warning: {message}", file=sys.stderr)


def _take_memory() -> None:
    """Let jax take as much of a GPU as `duo plan` counts on, unless it was told otherwise."""
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)


def _keep_compiled_programs() -> None:
    """Compile a program once per machine, unless jax was told otherwise (`JAX_ENABLE_COMPILATION_CACHE=0`)."""
    import jax

    from duo_jax.checkpoint.packaged import cache_folder

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _usage(commands: dict[str, EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {_summary(commands[name])}" for name in sorted(commands)]
    return "\n".join(["usage: duo COMMAND [flags]", "", *lines, "", "duo COMMAND --help lists a command's flags."])


def _summary(entry: EntryPoint) -> str:
    return (entry.load().__doc__ or "").strip().splitlines()[0]


def _version() -> str:
    from importlib.metadata import version

    return version("duo-jax")
