"""The attention backends and tiles of a training run: stored when it begins, and used again when it resumes.

Backends round differently, and so do tiles of other sizes. A run that is interrupted ends with the gates of one that is
not only if both have the same.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duo_jax.mesh.processes import is_first
from pallas_kernels import ops
from pallas_kernels.backends import candidates, find_backend
from pallas_kernels.certify.verdicts import SAFE, best, verdicts_on
from pallas_kernels.choices import choice_of, here, name_of, repeating
from pallas_kernels.gpus import device_kind
from pallas_kernels.types import Request

# In the file of a run: `{"device": ..., "choices": ...}`, in order; the last entry is that of the last resume.
BACKENDS = "backends"


def chosen(requests: Sequence[Request], named: str | None) -> dict[str, Any]:
    """What runs here, for a run that begins; `named` is the backend of the command line."""
    on_device = [here(request) for request in requests]
    choices = {name_of(each): choice_of(ops.choose(each, named).name, each) for each in on_device}
    return {"device": device_kind(), "choices": choices}


def resumed(
    path: Path, earlier: list[dict[str, Any]], requests: Sequence[Request], named: str | None
) -> list[dict[str, Any]]:
    """The entries of a run's file with what runs now: what ran before, unless `DUO_BACKEND` names another backend.

    Tiles belong to a kind of device: on another one, those of this one are used, and stored.

    Args:
        path: the file, for messages.
        earlier: its entries; none if an earlier version wrote it.
        requests: the attention of the run.
        named: the backend of the command line.

    Raises:
        ValueError: entries that were altered.
        Unsupported: a backend that cannot run here, a NotImplementedError.
    """
    if not isinstance(earlier, list):
        _names(None, path)
    if not earlier or os.environ.get("DUO_BACKEND"):
        now = chosen(requests, named)
        if earlier and _names(earlier[-1], path) != _names(now, path):
            _tell(f"{path.parent}: resuming with other attention backends, as DUO_BACKEND says")
        return [*earlier, now] if not earlier or now != earlier[-1] else list(earlier)
    last, choices = earlier[-1], {}
    before = _names(last, path)
    for request in map(here, requests):
        name = name_of(request)
        if name not in before:
            raise ValueError(f"{path} has no attention backend for {name}, so it was altered: choose another folder")
        why = _refused(before[name], request, ran_here=last["device"] == device_kind())
        if why is not None and before[name] != named:
            raise ops.Unsupported(
                f"{path.parent} was computed with the {before[name]} backend, which {why}: resume it where it can, or "
                "set DUO_BACKEND to resume with another one, which rounds differently"
            )
        choices[name] = choice_of(before[name], request)
        fastest = before[name] if named else best(request, candidates(request))
        if fastest not in (before[name], *SAFE):
            _tell(
                f"{path.parent}: resuming with the {before[name]} backend, as it began; {fastest} is faster here "
                f"(DUO_BACKEND={fastest})"
            )
    if last["device"] == device_kind():
        return list(earlier)
    return [*earlier, {"device": device_kind(), "choices": choices}]


def _tell(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr)


def _refused(backend: str, request: Request, *, ran_here: bool) -> str | None:
    """Why a backend cannot be used for a request here; None if it can, as where the run has been with it."""
    try:
        reason = find_backend(backend).supports(request)
    except ValueError as error:
        return f"cannot be loaded here ({error})"
    if reason is not None or backend in SAFE:
        return reason
    verdict = verdicts_on(request).get(backend)
    if verdict is not None and verdict.is_right is False:
        return f"is not right on {request.device} ({verdict})"
    if ran_here or (verdict is not None and verdict.is_right):
        return None
    if request.capability is None:
        return f"is for GPUs, this is {request.device}"
    return f"was not found to be right on {request.device} yet"


def _names(entry: Any, path: Path) -> dict[str, str]:
    """Backends by name of the request."""
    try:
        with repeating(entry["choices"]):
            names = {name: choice["backend"] for name, choice in entry["choices"].items()}
        if not all(isinstance(name, str) for name in (entry["device"], *names.values())):
            raise TypeError
    except (LookupError, TypeError, AttributeError, ValueError):
        raise ValueError(f"the entry {BACKENDS!r} of {path} was altered: choose another folder") from None
    return names
