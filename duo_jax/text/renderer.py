"""Renders chat templates in a process of their own: whatever a template does, it ends here as text or as a refusal.

Knows no tokenizers.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 10
# Most characters that a template adds: a few for each message, and the schema of its tools. A template may also write a
# message several times.
MOST_ADDED, MOST_TIMES = 1_000_000, 8
# The first request waits for imports, on a busy machine too.
START_SECONDS = 60


class Renderer:
    """Starts the process before the first request, and again after a template that had to be ended."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._process: subprocess.Popen[str] | None = None
        self._has_answered = False
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Leave the process to the parent after a fork: two readers would take each other's answers."""
        if self._process is not None:
            self._process.returncode = 0  # It is not this process's child, so there is nothing to wait for.
            pipe: Any
            for pipe in (self._process.stdin, self._process.stdout):
                pipe.buffer.raw.close()  # Without writing what the parent may have left in the buffer.
        self._process, self._has_answered, self._lock = None, False, threading.Lock()

    def start(self) -> None:
        """Start the process now, without waiting for it, so that its imports do not delay the first request."""
        with self._lock, suppress(OSError, ValueError):  # The first request reports them.
            self._running()

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """A conversation as text.

        Raises:
            ValueError: a template that fails, writes too much, or takes too much time or memory; values in messages
                that JSON does not have.
        """
        try:
            given = json.dumps({"messages": messages, "options": options}, allow_nan=False, ensure_ascii=False)
            request = {"template": template, "most": MOST_ADDED + MOST_TIMES * len(given), "seconds": SECONDS}
            line = f"{given[:-1]}, {json.dumps(request, ensure_ascii=False)[1:]}\n"
            line.encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages must have strings, numbers, lists and objects only: {error}") from None
        with self._lock:
            reply = self._ask(line)
        if "text" not in reply:
            raise ValueError(f"the model's chat template refuses these messages: {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        """End the process."""
        process, self._process, self._has_answered = self._process, None, False
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, line: str) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(SECONDS + (0 if self._has_answered else START_SECONDS), _end, (process, late))
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:
            reply = ""
        except BaseException:  # Interrupted: the answer must not be taken for that to a later request.
            self.close()
            raise
        finally:
            timer.cancel()
        if reply.endswith("\n"):
            self._has_answered = True
            return dict(json.loads(reply))
        self.close()
        return {"error": f"it takes more than {SECONDS} seconds" if late.is_set() else "it ended its process"}

    def _running(self) -> subprocess.Popen[str]:
        """The process, started if there is none."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # -I: nothing of the working folder is imported. In a session of its own, Ctrl-C does not reach it.
        if not sys.executable:
            raise ValueError("chat templates are rendered in a process of their own, but sys.executable is empty")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("template_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([path for path in sys.path if path]) + "\n")
        with suppress(OSError):  # A process that has ended already is reported by the request.
            self._process.stdin.flush()
        return self._process


def _end(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()


_RENDERER = Renderer()
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)


def start() -> None:
    """See `Renderer.start`."""
    _RENDERER.start()


def render(template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """See `Renderer.render`."""
    return _RENDERER.render(template, messages, options)
