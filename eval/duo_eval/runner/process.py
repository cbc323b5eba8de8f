"""Run functions in a separate process, with its own memory: a call that hangs or crashes does not affect this process.

This process does not import what the function needs, so it never touches the device.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pkgutil import resolve_name
from types import TracebackType
from typing import Any

KILLED = -9


class ProcessError(ValueError):
    """The function raised, or its process ended or gave no answer.

    Attributes:
        exit_code: of a process that ended by itself; -9: killed, as the system does when memory runs out.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        """Keep both."""
        super().__init__(message)
        self.exit_code = exit_code


class Worker:
    """A process that runs functions one after the other; it starts with the first call and restarts after a failure."""

    def __init__(self, timeout: float | None = None) -> None:
        """Nothing is started yet; `timeout` is the limit of a call in seconds."""
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """See `stop`."""
        self.stop()

    def call(self, function: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What `function`, a "module:name", returns for keyword arguments; both are JSON.

        Raises:
            ProcessError: the function raised (its traceback is on stderr), the process ended, or time ran out.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        try:
            self._pipe.send_bytes(json.dumps([function, dict(arguments or {})]).encode())
            if not self._pipe.poll(self._timeout):
                self.stop()
                raise ProcessError(f"no answer within {self._timeout:g} s")
            error, value = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
            self.stop()
            how = "was killed, as when memory runs out" if code == KILLED else f"exited with code {code}"
            raise ProcessError(f"the process {how}", code) from None
        if error is not None:
            self.stop()
            raise ProcessError(error)
        return value

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        self._pipe, other = Pipe()
        # -P: modules in the working directory are not imported. In a session of its own, Ctrl-C reaches only this
        # process, which stops the other; there is no second traceback.
        command = [sys.executable, "-P", "-m", "duo_eval.runner.process", str(other.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()], start_new_session=True)
        other.close()


def in_fresh_process(function: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """One call of a new `Worker`."""
    with Worker() as worker:
        return worker.call(function, arguments)


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, arguments = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        error = value = None
        try:
            value = resolve_name(function)(**arguments)
        except Exception as raised:
            traceback.print_exc()
            error = first_line(raised)
        pipe.send_bytes(json.dumps([error, value]).encode())


def first_line(error: Exception) -> str:
    """An error in one line of at most 300 characters."""
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
    os._exit(0)  # without waiting for threads of the device
