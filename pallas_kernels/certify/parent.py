"""Certification: start the process that examines, show its progress, store its verdicts, survive its end."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout

from pallas_kernels.backends import find_backend
from pallas_kernels.certify import verdicts
from pallas_kernels.certify.machine import check_setting, may_have_gpu
from pallas_kernels.certify.messages import OURS, to_json
from pallas_kernels.certify.verdicts import Found, Verdict, key_of
from pallas_kernels.tiles import check_tuned
from pallas_kernels.types import Request, Unsupported

# Seconds for everything, and for running (not compiling) one backend; both are longer in full.
LIMIT, RUN_LIMIT = 120.0, 30.0
FULL_LIMIT, FULL_RUN_LIMIT = 1800.0, 120.0

# Seconds between two looks at whether the process lives; bytes of a line of its output, and of the end of its errors.
GLANCE, MOST_LINES, MOST_ERRORS = 1.0, 1 << 20, 2000

# Signals that come from outside: a user, or the system when its memory runs out.
KILLERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Show = Callable[[str], None]
Job = tuple[str, str]


def show_on_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def certify(
    requests: Iterable[Request],
    *,
    full: bool = False,
    backends: Sequence[str] | None = None,
    show: Show = show_on_stderr,
) -> None:
    """Find the verdicts on requests that are missing, in a process of its own; nothing happens without a GPU.

    Call this before jax takes the GPU: otherwise too little memory may be left, and the verdicts remain unknown.
    `DUO_CERTIFY=0` and `DUO_BACKEND` turn it off unless it is `full`; `DUO_CERTIFY=full` is `full` for all.

    Args:
        requests: what will run; `device`, `capability`, `capacities` do not matter.
        full: examine again what has a verdict, and take as long as needed.
        backends: names to examine instead of the candidates.
        show: called with each line of progress.

    Raises:
        ValueError: another value of DUO_CERTIFY, or a file of tuned tiles that was altered.
    """
    setting = check_setting()
    if not may_have_gpu() or (not full and (setting == "0" or os.environ.get("DUO_BACKEND"))):
        return
    check_tuned()
    full = full or setting == "full"
    wanted = {key_of(request): request for request in requests}
    if not full and wanted.keys() <= verdicts.known().complete:
        return
    limit, run_limit = (FULL_LIMIT, FULL_RUN_LIMIT) if full else (LIMIT, RUN_LIMIT)
    end = time.monotonic() + limit
    with _alone(limit, show) as is_alone:
        verdicts.known().add(verdicts.stored())  # Another process may have found them meanwhile.
        missing = {key: request for key, request in wanted.items() if full or key not in verdicts.known().complete}
        if missing and is_alone:
            left = max(0.0, end - time.monotonic())
            _Certification(missing, backends, left, run_limit, full, show).run()


def check_settings(requests: Iterable[Request] = ()) -> None:
    """Refuse a wrong `DUO_CERTIFY`, and a `DUO_BACKEND` that cannot do all that is requested.

    Raises:
        ValueError: another value of DUO_CERTIFY than 0, 1 and full; an unknown backend.
        Unsupported: the backend has no such operation, a NotImplementedError.
    """
    check_setting()
    if name := os.environ.get("DUO_BACKEND"):
        backend = find_backend(name)
        for request in requests:
            if request.operation != "append" and getattr(backend, request.operation) is None:
                why = backend.supports(request)
                raise Unsupported(f"the {name} backend {why}: unset DUO_BACKEND, or name another one")


class _Certification:
    """One certification, over as many processes as backends crash."""

    def __init__(
        self,
        requests: dict[str, Request],
        backends: Sequence[str] | None,
        limit: float,
        run_limit: float,
        full: bool,
        show: Show,
    ) -> None:
        self._requests, self._backends, self._show = requests, backends, show
        self._limit, self._run_limit, self._end = limit, run_limit, time.monotonic() + limit
        known = {} if full else verdicts.known().verdicts
        self._settled = {(key, name) for key in requests for name in known.get(key, {})}
        self._unknown: set[Job] = set()
        self._jobs: set[Job] = set()
        self._job: Job | None = None
        self._phase, self._since = "", 0.0

    def run(self) -> None:
        """Examine until nothing is left, or time is over."""
        what = f"{len(self._requests)} operations" if len(self._requests) > 1 else "one operation"
        self._show(f"checking attention backends on this GPU, once for {what}: {self._limit:.0f} s at most")
        is_over = False
        try:
            while self._has_more() and not is_over:
                with _Child(self._order()) as child:
                    is_over = not self._follow(child)
        except OSError as error:
            way = verdicts.how(next(iter(self._requests)))
            self._show(f"  nothing more can be checked: {error.strerror or error}; later: {way}")

    def _has_more(self) -> bool:
        return not self._jobs or bool(self._jobs - self._settled - self._unknown)

    def _order(self) -> dict[str, Any]:
        return {
            "requests": [to_json(request) for request in self._requests.values()],
            "backends": self._backends,
            "device": verdicts.known().device,
            "skip": [list(job) for job in self._settled | self._unknown],
        }

    def _follow(self, child: "_Child") -> bool:
        """Take in what a child reports until its end; False if no further child should be started."""
        self._job, self._phase = None, ""
        while True:
            now = time.monotonic()
            is_running = self._job is not None and self._phase == "run"
            until = min(self._end, self._since + self._run_limit) if is_running else self._end
            line = child.read(until - now)
            if line is not None:
                if not line:
                    return self._ended(child)
                message = _message(line)
                self._take(message)
                if "nothing" in message:
                    self._show(f"  nothing is checked: {message['nothing']}; what it finds: duo doctor")
                if any(end in message for end in ("again", "end", "nothing")):
                    return "again" in message
            elif self._job is None:
                self._show(f"  nothing is known after {self._limit:.0f} s: jax does not find the GPU, or it hangs")
                return False
            elif is_running and time.monotonic() < self._end:
                self._settle(self._job, Verdict(False, f"hangs: no result after {self._run_limit:.0f} s"))
                return True
            else:
                # Known next time by its name: the others are examined then.
                self._settle(
                    self._job,
                    Verdict(None, f"not known after {self._limit:.0f} s, in full: {verdicts.how(self._job[0])}"),
                )
                return False

    def _take(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        if "device" in line:
            if verdicts.known().device not in (None, line["device"]):
                self._settled.clear()
            verdicts.add(Found(device=line["device"]))
        elif "jobs" in line:
            self._jobs = {(key, name) for key, name in line["jobs"]}
            self._complete()
        elif "begin" in line:
            self._job, self._phase, self._since = tuple(line["begin"]), line["phase"], time.monotonic()
        elif "settled" in line:
            self._settle(tuple(line["settled"]), Verdict(**line["verdict"]))
        elif "unknown" in line:
            self._leave(tuple(line["unknown"]), line["reason"])

    def _ended(self, child: "_Child") -> bool:
        """A child has ended without saying so."""
        how, by = child.how_it_ended()
        if self._job is None:
            way = verdicts.how(next(iter(self._requests)))
            self._show(f"  nothing could be checked: the process {how}; when the GPU is free: {way}")
            return False
        if by in KILLERS:  # No fault of the backend: not stored, so that it is checked again next time.
            self._leave(self._job, f"the process {how}")
        elif self._phase == "prepare":
            self._settle(self._job, Verdict(None, f"cannot be checked here: the process {how}"))
        else:
            self._settle(self._job, Verdict(False, f"the process {how}"))
        return True

    def _leave(self, job: Job, reason: str) -> None:
        """Leave a backend for another time."""
        self._unknown.add(job)
        key, name = job
        self._show(f"  {key}: {name} is not known ({reason}); when the GPU is free: {verdicts.how(key)}")

    def _settle(self, job: Job, verdict: Verdict) -> None:
        """Store a verdict at once: nothing is lost if this process ends."""
        key, name = job
        self._settled.add(job)
        self._job = None
        verdicts.add(Found({key: {name: verdict}}))
        self._show(f"  {key}: {name}{' is' if verdict.is_right else ':'} {verdict}")
        self._complete()

    def _complete(self) -> None:
        done = {key for key in self._requests if all(job in self._settled for job in self._jobs if job[0] == key)}
        if done - verdicts.known().complete:
            verdicts.add(Found(complete=done))


def _message(line: bytes) -> dict[str, Any]:
    """What a line says; nothing, if a library has written it before the process could prevent that."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) and message.get(OURS) else {}


class _Child:
    """The process that examines. It may write anything, fork, and hang: users' backends run in it."""

    def __init__(self, order: dict[str, Any]) -> None:
        # The parent's modules, but none of the working directory.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        options = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}
        # In a session of its own, Ctrl-C reaches only this process, which stops the other and what that has started.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pallas_kernels.certify"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | options,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._lines, self._end_of_errors = b"", b""
        self._selector = selectors.DefaultSelector()
        for pipe in (self._process.stdout, self._process.stderr):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # It has ended, with all that it started.
            os.killpg(self._process.pid, signal.SIGKILL)

    def read(self, seconds: float) -> bytes | None:
        """The next line; empty at the end, None if there is none in time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if b"\n" in self._lines:
                line, _, self._lines = self._lines.partition(b"\n")
                return line
            if not self._take(min(left, GLANCE)):
                return b""
        return None

    def _take(self, seconds: float) -> bool:
        """Wait for something to read, and read it; False if nothing will come any more."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            part = os.read(key.fd, 1 << 16)
            if not part:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._process.stderr:
                self._end_of_errors = (self._end_of_errors + part)[-MOST_ERRORS:]
            else:
                self._lines += part
                if len(self._lines) > MOST_LINES and b"\n" not in part:
                    self._lines = b""  # No line of ours.
        # Whatever it has started may keep the pipes open.
        has_ended = not ready and self._process.poll() is not None
        return not has_ended and self._process.stdout in self._selector.get_map()

    def how_it_ended(self) -> tuple[str, int | None]:
        """In words, with the last line that it wrote; and the signal that ended it."""
        try:
            code = self._process.wait(GLANCE)
        except subprocess.TimeoutExpired:
            return "closed its output and did not end", None
        if code < 0:
            known = {each.value: each.name for each in signal.Signals}
            return f"was ended by {known.get(-code, f'signal {-code}')}", -code
        end = time.monotonic() + GLANCE
        while self._process.stderr in self._selector.get_map() and time.monotonic() < end:
            self._take(GLANCE / 10)
        last = self._end_of_errors.decode(errors="replace").strip().splitlines()
        return f"exited with code {code}" + (f": {last[-1][:200]}" if last else ""), None


@contextmanager
def _alone(limit: float, show: Show) -> Iterator[bool]:
    """Be the only process on this machine that certifies: two would disturb each other's times.

    False if another one does not end in time.
    """
    is_alone = True
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # A folder that cannot be written to, a file system without locks.
            path = verdicts.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(".certify.lock"), timeout=0)
            held.callback(lock.release)
            try:
                lock.acquire()
            except Timeout:
                show("another process checks attention backends: waiting for it")
                try:
                    lock.acquire(timeout=limit)
                except Timeout:
                    is_alone = False
                    show(f"  it is not done after {limit:.0f} s: continuing with the verdicts that exist")
        yield is_alone
