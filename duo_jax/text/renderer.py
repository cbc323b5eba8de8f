"""Renders chat templates in a process of their own: whatever a template does, it ends here as text or as a refusal.

Knows no tokenizers.
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 10
# Most characters that a template adds: a few for each message, and the schema of its tools. A template may also write a
# message several times.
MOST_ADDED, MOST_TIMES = 1_000_000, 8
# The first request waits for imports, on a busy machine too.
START_SECONDS = 60


class Renderer:
    """Starts the process at the first request, and again after a template that had to be ended."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """A conversation as text.

        Raises:
            ValueError: a template that fails, writes too much, or takes too much time or memory; values in messages
                that JSON does not have.
        """
        try:
            given = json.dumps([messages, options], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages must have strings, numbers, lists and objects only: {error}") from None
        most = MOST_ADDED + MOST_TIMES * len(given)
        request = {"template": template, "messages": messages, "options": options, "most": most, "seconds": SECONDS}
        with self._lock:
            reply = self._ask(json.dumps(request) + "\n")
        if "text" not in reply:
            raise ValueError(f"the model's chat template refuses these messages: {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, line: str) -> dict[str, str]:
        is_new = self._process is None or self._process.poll() is not None
        process = self._start() if is_new else self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(SECONDS + (START_SECONDS if is_new else 0), end)
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
            return dict(json.loads(reply))
        self.close()
        return {"error": f"it takes more than {SECONDS} seconds" if late.is_set() else "it ended its process"}

    def _start(self) -> subprocess.Popen[str]:
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
        return self._process


_RENDERER = Renderer()
atexit.register(_RENDERER.close)


def render(template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """See `Renderer.render`."""
    return _RENDERER.render(template, messages, options)
