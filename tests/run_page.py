"""Runs the code blocks of a page in one folder, as a reader would; starts nothing of this project by itself."""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from pathlib import Path


def run_python(text: str, names: dict) -> tuple[int, str, str]:
    """Exit code, standard output and error of Python code, which shares its names with the page's other blocks."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            exec(compile(text, "<block>", "exec"), names)
        except Exception:
            traceback.print_exc()
            return 1, out.getvalue(), error.getvalue()
    return 0, out.getvalue(), error.getvalue()


def run_shell(text: str) -> tuple[int, str, str]:
    """The same of shell commands, of which the first that fails ends the block."""
    shell = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def main() -> None:
    """Read a list of (language or /file, text, exit code), run it up to the first other exit code, write outputs."""
    blocks = json.load(sys.stdin)
    # Classes that a block defines look up their module.
    names = vars(sys.modules["__main__"]) | {"__name__": "__main__"}
    results = []
    for language, text, code in blocks:
        if language.startswith("/"):
            Path(language[1:]).write_text(text, encoding="utf-8")
            results.append((0, "", ""))
        else:
            results.append(run_python(text, names) if language == "python" else run_shell(text))
        if results[-1][0] != code:
            break
    json.dump(results, sys.__stdout__)


if __name__ == "__main__":
    main()
