"""Generated code in the sandbox: what is wrong fails, what misbehaves fails without hanging."""

import time
from pathlib import Path

import pytest
from duo_eval.tasks.sandbox import sandbox
from duo_eval.tasks.sandbox.sandbox import Limits, Verdict, run

QUICK = Limits(seconds=3.0)
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(params=["namespaces", "guard alone"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what this machine has, and with what any has."""
    if request.param == "guard alone":
        monkeypatch.setattr(sandbox, "_unshare", tuple)
    return request.param


def test_right_code_passes_and_wrong_code_fails(kind):
    assert run(RIGHT + "assert add(2, 3) == 5", QUICK) == Verdict("passed")
    wrong = run(RIGHT + "assert add(2, 3) == 6, 'not six'", QUICK)
    assert (wrong.outcome, wrong.reason) == ("failed", "AssertionError: not six")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(:", "SyntaxError"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("x = [0]\nwhile True:\n    x = x + x", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)", "PermissionError"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "PermissionError"),
        ("import os\nos.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import multiprocessing as m\np = m.Process(target=print)\np.start()\np.join()", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("open('/tmp/duo-sandbox-was-here', 'w')", "PermissionError"),
        ("import os\nos.remove(os.path.abspath('/tmp/duo-sandbox-is-here'))", "PermissionError"),
        ("import ctypes\nctypes.CDLL(None)", "PermissionError"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "exit status 0"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os\nassert os.environ.get('HOME')", "AssertionError"),
        ("with open('big', 'w') as f:\n    f.write('x' * (1 << 22))", ""),
    ],
)
def test_what_misbehaves_fails(program, reason):
    found = run(program, QUICK)
    assert found.outcome == "failed" and reason in found.reason, found
    assert not Path("/tmp/duo-sandbox-was-here").exists()


@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_an_endless_program_is_killed_in_time(kind, program):
    begin = time.monotonic()
    assert run(program, Limits(seconds=0.7)).outcome == "timed out"
    assert time.monotonic() - begin < 10


def test_what_it_prints_is_not_its_verdict(kind):
    loud = "import sys\nfor _ in range(10 ** 5):\n    print('passed' * 10)\n    print('x', file=sys.stderr)\n"
    assert run(loud, Limits(seconds=20.0)) == Verdict("passed")
    assert run("print('passed')\nassert False", QUICK).outcome == "failed"


def test_namespaces_leave_no_network_and_no_other_process():
    if not sandbox._unshare() or not Path("/proc/self/net/dev").exists():
        pytest.skip("namespaces may not be unshared here")
    assert "no network" in sandbox.isolation()
    # Below Python, where the guard does not look: the kernel's own list of networks, and the process's own number.
    networks = "[line.split(':')[0].strip() for line in open('/proc/self/net/dev')][2:]"
    assert run(f"import os\nassert os.getpid() < 10\nassert {networks} in (['lo'], [])", QUICK) == Verdict("passed")


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        run("pass", Limits(seconds=0.0))
