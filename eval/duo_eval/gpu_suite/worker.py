"""A process that measures: a kernel that hangs, or leaves the GPU unusable to its process, costs its case alone."""

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from duo_eval.gpu_suite import ceilings, decode, model, numerics, prefill
from duo_eval.gpu_suite.section import Case, Section, first_line
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from pallas_kernels import Unsupported

SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "numerics": numerics,
    "prefill": prefill,
    "decode": decode,
    "model": model,
}


def device() -> dict[str, Any]:
    """What is here."""
    return {"device": jax.devices()[0].device_kind, "is_gpu": jax.default_backend() == "gpu"}


def measured(section: str, case: Case) -> dict[str, Any]:
    """The case with what was found; a case that fails (out of memory, say) does not end the suite."""
    try:
        return {"case": case, **SECTIONS[section].measure(case)}
    except Unsupported as error:
        return {"case": case, "cannot": first_line(error)}
    except Exception as error:
        return {"case": case, "failed": first_line(error)}


class Worker:
    """Runs functions of this module in another process, one after the other; this one never touches the GPU."""

    def __init__(self, seconds: float) -> None:
        """Begin no process yet; a call may take so long."""
        self._seconds = seconds
        self._process: Any = None

    def device(self) -> dict[str, Any]:
        """See `device`."""
        return self._call(device)

    def measured(self, section: str, case: Case) -> dict[str, Any]:
        """See `measured`; after a failure the next call has a new process."""
        try:
            result = self._call(measured, section, case)
        except ChildProcessError as error:
            result = {"case": case, "failed": str(error)}
        if "failed" in result:
            self.stop()
        return result

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._ours.close()
            self._process = None

    def _call(self, function: Any, *args: Any) -> Any:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._ours, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._ours.send((function, args))
        if not self._ours.poll(self._seconds):
            self.stop()
            raise ChildProcessError(f"gave no answer for {self._seconds:g} s")
        try:
            return self._ours.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self.stop()
            raise ChildProcessError(f"the process ended with exit code {code}") from None


def _serve(calls: Connection) -> None:
    while True:
        try:
            function, args = calls.recv()
        except (EOFError, KeyboardInterrupt):
            return
        calls.send(function(*args))


def suite_table(path: Path) -> str:
    """The measurements of one section of `make gpu-suite`, a line for each case."""
    record = json.loads(path.read_text(encoding="utf-8"))
    line = SECTIONS[path.stem].line
    rows = [
        [result.get("failed") or result.get("cannot") or line(result["case"], result)] for result in record["results"]
    ]
    table = rows_to_table(rows, ["measured"])
    return f"{table}\n\n{record['device']}, commit {record['machine']['commit']}; `{record['command']}`."


RESULT = ResultType("GPU kernels and models", with_fields("case"), {"Measurements": suite_table})
