"""Generated code in the sandbox: what is wrong fails, what misbehaves fails without hanging or doing harm."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from duo_eval.tasks.sandbox import sandbox
from duo_eval.tasks.sandbox.sandbox import ISOLATED, NOT_ISOLATED, Limits, Verdict, isolation, run

QUICK = Limits(seconds=3.0)
needs_isolation = pytest.mark.usefixtures("isolated")
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture
def without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernel cannot isolate."""
    monkeypatch.setattr(sandbox, "_missing", lambda: "OSError: [Errno 38] Function not implemented")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file, unchanged afterwards."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("whole")
    before = os.stat(folder / "victim")
    yield folder
    after = os.stat(folder / "victim")
    assert os.listdir(folder) == ["victim"] and (folder / "victim").read_text() == "whole"
    assert (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_nlink) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime_ns,
        1,
    )


@pytest.mark.parametrize("unsafe", [False, True])
def test_right_code_passes_and_wrong_code_fails(unsafe, request):
    request.getfixturevalue("without_landlock" if unsafe else "isolated")
    assert run(RIGHT + "assert add(2, 3) == 5", QUICK, unsafe=unsafe) == Verdict("passed")
    wrong = run(RIGHT + "assert add(2, 3) == 6, 'not six'", QUICK, unsafe=unsafe)
    assert (wrong.outcome, wrong.reason) == ("failed", "AssertionError: not six")


@needs_isolation
@pytest.mark.parametrize(
    "program",
    [
        "open('x', 'w').write('y')\nimport os\nos.rename('x', 'z')\nos.replace('z', 'x')\nos.remove('x')",
        "import json, math, re, hashlib, sqlite3, tempfile, random, decimal",
        "import datetime\ndatetime.datetime.now().astimezone()",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import resource, socket\nresource.getrlimit(resource.RLIMIT_AS)",
    ],
)
def test_what_a_solution_may_need_works(program):
    assert run(program, QUICK) == Verdict("passed")


@needs_isolation
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(:", "SyntaxError"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("x = [0]\nwhile True:\n    x = x + x", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)", "PermissionError"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "Operation not permitted"),
        ("import os\nos.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import multiprocessing as m\np = m.Process(target=print)\np.start()\np.join()", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import ctypes\nassert ctypes.CDLL(None).fork() != -1, 'refused'", "AssertionError: refused"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", "not allowed"),
        ("import os, stat\nos.mknod('d', stat.S_IFBLK | 0o600, os.makedev(8, 0))", "PermissionError"),
        ("import os\nos.mkdir('folder')", "PermissionError"),
        ("open('/proc/1/environ')", "PermissionError"),
        ("import os\nos.listdir('/home')", "PermissionError"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "exit status 0"),
        ("import os\nos.abort()", "ended early"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os\nassert os.environ.get('HOME')", "AssertionError"),
        ("with open('big', 'w') as f:\n    f.write('x' * (1 << 22))", ""),
        ("import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'x' * (1 << 22))\n    except OSError: pass", "xxx"),
    ],
)
def test_what_misbehaves_fails(program, reason):
    found = run(program, QUICK)
    assert found.outcome == "failed" and reason in found.reason and len(found.reason) <= 500, found


@needs_isolation
@pytest.mark.parametrize(
    "attempt",
    [
        "open(VICTIM, 'w')",
        "open(VICTIM)",
        "open(NEW, 'w')",
        "os.replace('own', VICTIM)",
        "os.rename('own', NEW)",
        "os.rename(VICTIM, 'stolen')",
        "os.link(VICTIM, 'linked')",
        "os.link('own', NEW)",
        "os.symlink('own', NEW)",
        "os.remove(VICTIM)",
        "os.truncate(VICTIM, 0)",
        "os.close(os.open(VICTIM, os.O_TRUNC))",
        "os.chmod(VICTIM, 0o777)",
        "os.chown(VICTIM, 1, 1)",
        "os.utime(VICTIM, (1, 1))",
        "os.setxattr(VICTIM, 'user.a', b'1')",
        "os.mkdir(NEW)",
        "os.mkfifo(NEW)",
        "os.symlink(VICTIM, 'in'); open('in', 'w')",
        "os.listdir(os.path.dirname(VICTIM))",
        "subprocess.run(['touch', NEW])",
        "os.chroot('/')",
        "socket.socketpair()[0].connect('/tmp/.X11-unix/X0')",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    ],
)
def test_nothing_outside_its_folder_is_changed_or_read(attempt, outside):
    setup = f"VICTIM, NEW = {str(outside / 'victim')!r}, {str(outside / 'new')!r}\nopen('own', 'w').close()\n"
    attempted = f"try:\n    {attempt}\nexcept OSError:\n    pass\nelse:\n    assert False, 'allowed'"
    program = f"import ctypes, os, resource, socket, subprocess\n{setup}{attempted}"
    found = run(program, QUICK)
    assert found == Verdict("passed"), found


def test_without_isolation_nothing_runs_unless_told(without_landlock, tmp_path):
    program = f"open({str(tmp_path / 'here')!r}, 'w')"
    for start in (lambda: run(program, QUICK), isolation):
        with pytest.raises(NotImplementedError, match=r"cannot isolate.*Errno 38.*--unsafe"):
            start()
    assert not (tmp_path / "here").exists()
    assert isolation(unsafe=True) == NOT_ISOLATED
    assert run(program, QUICK, unsafe=True) == Verdict("passed") and (tmp_path / "here").exists()


@needs_isolation
def test_a_probe_that_is_allowed_anything_counts_as_no_isolation(monkeypatch):
    assert isolation() == ISOLATED
    real = sandbox._run
    monkeypatch.setattr(sandbox, "_run", lambda program, limits, isolated: real(program, limits, isolated=False))
    assert sandbox._missing.__wrapped__() == "SystemExit: may open"


@needs_isolation
@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_killed_in_time(program):
    begin = time.monotonic()
    assert run(program, Limits(seconds=0.7)).outcome == "timed out"
    assert time.monotonic() - begin < 10


@needs_isolation
def test_what_it_prints_is_not_its_verdict():
    loud = "import sys\nfor _ in range(10 ** 5):\n    print('passed' * 10)\n    print('x', file=sys.stderr)\n"
    assert run(loud, Limits(seconds=20.0)) == Verdict("passed")
    assert run("print('passed')\nassert False", QUICK).outcome == "failed"


@pytest.mark.parametrize(
    ("limits", "flag"),
    [
        (Limits(seconds=0.0), "--limits.seconds"),
        (Limits(seconds=math.nan), "--limits.seconds"),
        (Limits(seconds=math.inf), "--limits.seconds"),
        (Limits(memory=0), "--limits.memory"),
        (Limits(file_size=-1), "--limits.file-size"),
        (Limits(open_files=1 << 63), "--limits.open-files"),
    ],
)
def test_limits_that_cannot_be_set_are_refused(limits, flag):
    with pytest.raises(ValueError, match=rf"{flag} must be above 0"):
        run("pass", limits)
