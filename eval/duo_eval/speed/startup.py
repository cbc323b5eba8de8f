"""`duo eval startup`: CPU seconds until a command has answered, in fresh processes, in one or several environments."""

import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_jax.arguments import whole_number

DUO = "import sys; from duo_jax.cli import main; sys.argv[0] = 'duo'; main()"


@dataclass(frozen=True)
class Startup:
    """Measure how long imports and short commands take, with their programs compiled before."""

    out: Path = Path("startup.json")
    """File to write."""
    pythons: tuple[str, ...] = ("python",)
    """Interpreters that have duo-jax, each as NAME=PATH or a command; they take turns."""
    model: str = "smollm2-135m-instruct"
    """Model that generates 8 tokens."""
    repeats: int = 5
    """Timed runs of each; one before them, which does not count, compiles and fills the caches."""

    def run(self) -> None:
        """Measure, write, print."""
        whole_number("repeats", self.repeats, 1)
        record = Record.open(self.out, {"task": "startup", **asdict(self)}, again=True)
        generate = ["generate", "--model", self.model, "--prompt", "The sky is", "--max-new-tokens", "8"]
        commands = {
            "import jax": ["-c", "import jax"],
            "import duo_jax": ["-c", "import duo_jax"],
            "duo --help": ["-c", DUO, "--help"],
            "duo generate --help": ["-c", DUO, "generate", "--help"],
            "duo doctor": ["-c", DUO, "doctor"],
            "duo generate, 8 tokens": ["-c", DUO, *generate],
        }
        named = [python.partition("=") if "=" in python else (python, "", python) for python in self.pythons]
        with record.writing() as append:
            for title, arguments in commands.items():
                seconds: dict[str, list[float]] = {name: [] for name, _, _ in named}
                for _ in tqdm(range(1 + self.repeats), desc=title, disable=None):
                    for name, _, python in named:
                        # Nothing of the working folder or of PYTHONPATH is imported: both would have that package.
                        seconds[name].append(cpu_seconds([python, "-E", "-P", *arguments]))
                for name, each in seconds.items():
                    median = statistics.median(each[1:])
                    result = {"seconds": median, "times": each[1:], "first": each[0], "load": os.getloadavg()[0]}
                    append(None, {"command": title, "environment": name, **result})
        print(startup_table(self.out))


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of a command and of the processes that it has waited for.

    Raises:
        ValueError: it failed, or does not exist.
    """
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise ValueError(f"--pythons: cannot run {command[0]!r} ({error.strerror})") from None
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"--pythons: {' '.join(command):.200} ended with status {process.returncode}; run it by hand")
    return usage.ru_utime + usage.ru_stime


def startup_table(path: Path) -> str:
    """Median CPU seconds of each command, in each environment."""
    head, results = read(path)
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        rows.setdefault(result["command"], {})[result["environment"]] = result["seconds"]
    names = list(dict.fromkeys(result["environment"] for result in results))
    cells = [[title, *(f"{times[name]:.2f}" for name in names)] for title, times in rows.items()]
    repeats = head["about"]["repeats"]
    table = rows_to_table(cells, ["CPU seconds", *names])
    return f"{table}\n\nMedians of {repeats}. {origin(head['runs'], head['runs'][-1]['command'])}"


RESULT = ResultType("Start-up", of_task("startup"), {"CPU seconds": startup_table})
