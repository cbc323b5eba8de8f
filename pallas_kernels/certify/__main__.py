"""The process that examines backends: an order on standard input, one line of JSON for everything that is known.

Each line has `"certify": true` besides:

    {"device": ...}                         where this runs
    {"nothing": reason}                     there is no GPU, and nothing else follows
    {"jobs": [[key, backend], ...]}         what will be examined
    {"begin": [key, backend], "phase": "compile" or "run"}
    {"settled": [key, backend], "verdict": ...}
    {"unknown": [key, backend], "reason": ...}   the device's memory is taken
    {"again": true}                         start another process: this one has lost the device
    {"end": true}                           everything is known

It ends when standard input is closed, so that it does not survive the process that started it.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels.backends import candidates
from pallas_kernels.certify import cases, machine
from pallas_kernels.certify.examine import FAILED, NoMemory, examine
from pallas_kernels.certify.messages import OURS, from_json
from pallas_kernels.certify.verdicts import SAFE, Verdict, key_of
from pallas_kernels.choices import here
from pallas_kernels.errors import first_line, is_no_memory
from pallas_kernels.types import Request


def serve(order: dict[str, Any], say: Any) -> None:
    """Examine what is asked for; `say` gets each line."""
    found = machine.device()
    if not found["capability"] and not order["backends"]:
        say(nothing=f"jax finds no GPU of NVIDIA here, only {found['kind']}")
        return
    say(device=found)
    sizes = cases.SMALL if jax.default_backend() == "cpu" else cases.GPU
    requests = [here(from_json(values)) for values in order["requests"]]
    # What is known of another device says nothing about this one.
    skip = {tuple(job) for job in order["skip"]} if order["device"] in (None, found) else set()
    jobs = list(_jobs(requests, order["backends"]))
    say(jobs=[[key_of(request), backend] for request, backend in jobs])
    made: dict[str, tuple[cases.Case, list[np.ndarray]]] = {}
    for request, backend in jobs:
        key = key_of(request)
        if (key, backend) in skip:
            continue
        say(begin=[key, backend], phase="prepare")
        try:
            if key not in made:
                made.clear()  # Of one request at a time: arrays may be large.
                case = cases.make(request, sizes)
                made[key] = case, case.exact()
            verdict = examine(made[key][0], backend, made[key][1], partial(_begin, say, [key, backend]))
        except Exception as error:  # Without inputs or a reference nothing can be compared.
            if isinstance(error, NoMemory) or is_no_memory(error):
                say(unknown=[key, backend], reason=first_line(error))
                continue
            verdict = Verdict(None, f"cannot be checked here: {first_line(error)}")
        say(settled=[key, backend], verdict=asdict(verdict))
        if not verdict.is_right:
            made.clear()  # The kernel may have written anywhere.
        if verdict.reason.startswith(FAILED):
            say(again=True)  # The device's context may be lost.
            return
    say(end=True)


def _begin(say: Any, job: list[str], phase: str) -> None:
    say(begin=job, phase=phase)


def _jobs(requests: Sequence[Request], backends: Sequence[str] | None) -> Iterator[tuple[Request, str]]:
    """What to examine: for each request `xla`, which the others compete with, and the kernels, preferred ones first.

    The first kernel of every request comes before the second one of any: time may run out.
    """
    rows = []
    for request in requests:
        names = list(backends or candidates(request))
        kernels = [name for name in names if name not in SAFE]
        rows.append([(request, name) for name in (["xla"] * ("xla" in names) + kernels if kernels else [])])
    most = max(map(len, rows), default=0)
    # A request's inputs are made once for `xla` and its first kernel.
    for request_jobs in rows:
        yield from request_jobs[:2]
    for rank in range(2, most):
        yield from (row[rank] for row in rows if rank < len(row))


def main() -> None:
    """Read the order, and write lines until everything is examined."""
    # Whatever libraries print goes to standard error.
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(order, lambda **line: print(json.dumps({OURS: True} | line), file=out, flush=True))
    os._exit(0)  # Without waiting for threads of the device.


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
