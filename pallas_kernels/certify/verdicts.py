"""Verdicts on backends, for exact requests on this machine: one file in the user's cache, and what `choose` asks.

The file lists environments (`machine.environment`), each with the verdicts found in it: a changed driver, compiler or
kernel is another environment. It can be lost without harm: what is missing is found again.
"""

import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from pallas_kernels.certify.machine import device, environment
from pallas_kernels.types import Request, keys_of_page
from pallas_kernels.user_cache import cache_folder, read_json

# A path from the root on.
PATH = re.compile(r"(?<![\w.~])~?/(?:[^\s/:;,'\"()]+/)+[^\s/:;,'\"()]*")
# Backends that need no verdict: programs of jax's own operations. `reference` is the last resort.
SAFE = ("xla", "reference")
# Environments kept in the file, the newest ones.
KEPT = 16
# Seconds to wait for another process to write.
PATIENCE = 5.0


def how(key: str) -> str:
    """What to run for the verdicts on a request."""
    flag = " --training" if key.startswith("training") else ""
    return f"duo doctor --certify MODEL{flag}, with the pattern, data types and mesh in use"


@dataclass(frozen=True)
class Verdict:
    """What was found about a backend for a request.

    Attributes:
        is_right: None: not known, because time ran out.
        reason: why it is not right.
        error: largest relative error.
        seconds: of one call.
    """

    is_right: bool | None
    reason: str = ""
    error: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse what a damaged file may contain: a right backend has an error and a time."""
        numbers = self.error, self.seconds
        if not isinstance(self.is_right, bool | None) or not isinstance(self.reason, str):
            raise ValueError("a verdict is right, wrong or unknown, with a reason")
        if not all(x is None or (type(x) in (int, float) and x >= 0) for x in numbers):
            raise ValueError("error and seconds of a verdict are numbers from 0 on")
        if self.is_right and not all(x is not None and x < 1e9 for x in numbers):
            raise ValueError("a backend that is right has an error and a time")

    def __str__(self) -> str:
        """In a few words."""
        if not self.is_right:
            return self.reason
        return f"right, error {self.error:.1e}, {1e3 * (self.seconds or 0):.3g} ms"

    def to_json(self) -> dict[str, Any]:
        """The values that differ from the defaults and that JSON has: an infinite error is in the reason."""
        values = {"is_right": self.is_right, "reason": self.reason, "error": self.error, "seconds": self.seconds}
        return {
            name: value
            for name, value in values.items()
            if value not in (None, "") and not (isinstance(value, float) and math.isinf(value))
        }


@dataclass
class Found:
    """The verdicts of one environment.

    Attributes:
        verdicts: by `key_of` the request and name of the backend.
        complete: keys of requests of which every candidate has a verdict.
        device: `machine.device()` where they were found; None: not known yet.
    """

    verdicts: dict[str, dict[str, Verdict]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    device: dict[str, Any] | None = None

    def add(self, other: "Found") -> None:
        """Take over all that another one has; if that is of another device, in place of what was found on this one."""
        if self.device is not None and other.device not in (None, self.device):
            self.verdicts, self.complete = {}, set()
        for key, verdicts in other.verdicts.items():
            self.verdicts.setdefault(key, {}).update(verdicts)
        self.complete |= other.complete
        self.device = other.device or self.device

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        verdicts = {
            key: {backend: verdict.to_json() for backend, verdict in row.items()} for key, row in self.verdicts.items()
        }
        return {"device": self.device, "complete": sorted(self.complete), "verdicts": verdicts}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Found":
        """What `to_json` wrote.

        Raises:
            ValueError, TypeError, LookupError, AttributeError: other values.
        """
        verdicts = {
            key: {backend: Verdict(**({"is_right": None} | verdict)) for backend, verdict in row.items()}
            for key, row in values["verdicts"].items()
        }
        complete, device = values["complete"], values["device"]
        if not isinstance(complete, list) or not all(isinstance(key, str) for key in complete):
            raise ValueError("complete is a list of keys")
        if device is not None and not isinstance(device["kind"], str):
            raise ValueError("a device has a kind")
        return cls(verdicts, set(complete), device)


def key_of(request: Request) -> str:
    """A request in words, without what a verdict does not depend on."""
    window = "" if request.window is None else f"window {request.window.sink}+{request.window.recent}"
    pools = [f"{name} {stored}" for name in ("full", "ring") if (stored := getattr(request, name))]
    paged = [f"paged by {keys_of_page(request.page)}"] if request.page is not None else []
    how = ["short"] * request.is_short + paged + ["sharded"] * request.is_sharded
    cap = "" if request.score_cap is None else f"cap {request.score_cap:g}"
    sizes = [f"head dim {request.head_dim}", f"group {request.group}", window, cap]
    return ", ".join(filter(None, [f"{request.operation} {request.q}", *sizes, *pools, *how]))


def verdicts_on(request: Request) -> dict[str, Verdict]:
    """The verdicts on a request on the device that programs are traced for, by name of the backend."""
    return _agreed_on().verdicts.get(key_of(request), {}) if _is_here(request.device) else {}


def best(request: Request, names: Sequence[str]) -> str:
    """The fastest of the backends that are right for a request, by the verdicts; without any, a safe one.

    `names` are those that can run it, `xla` among them. On a CPU, and where no kernel could run it, the first one.
    """
    kernels = [name for name in names if name not in SAFE]
    if request.device == "cpu" or not kernels:
        return names[0]
    verdicts = verdicts_on(request)
    right = [name for name in names if name in verdicts and verdicts[name].is_right]
    chosen = min(right, key=lambda name: verdicts[name].seconds or 0.0, default=None)
    if chosen is None:
        is_wrong = "xla" in verdicts and verdicts["xla"].is_right is False
        chosen = "reference" if is_wrong else next(name for name in names if name in SAFE)
    if chosen in SAFE and not all(name in verdicts and verdicts[name].is_right for name in kernels):
        why = "; ".join(f"{name}: {verdicts[name]}" if name in verdicts else f"{name}: not checked" for name in kernels)
        if _agreed is None and jax.process_count() > 1:
            why = "the processes have not agreed on verdicts, as they do when all of them load the model on their mesh"
        key = key_of(request)
        found = f"no kernel is known to be right for {key} on {request.device} ({why}). To check them: {how(key)}"
        _warn(key, chosen, found)
    return chosen


def warn_without_kernel(request: Request) -> None:
    """Say once that a GPU will be slow, as no kernel takes a request."""
    if request.capability is not None:
        _warn(key_of(request), SAFE[0], f"no kernel takes {key_of(request)} on {request.device}")


@cache
def _warn(key: str, chosen: str, why: str) -> None:
    what = "the write of new tokens runs" if key.startswith("append") else "attention runs"
    warnings.warn(f"{what} on {chosen!r}, which is slow on a GPU: {why}", stacklevel=6)


def _is_here(device_kind: str) -> bool:
    """Whether the verdicts were found on the device that programs are traced for."""
    found = _agreed_on().device
    return found is not None and found["kind"] == device_kind and found == device()


# All that this process knows, and what several processes have agreed on.
_known: Found | None = None
_agreed: Found | None = None


def known() -> Found:
    """The verdicts of this environment; the file is read once, and whatever this process finds is added."""
    global _known
    if _known is None:
        _known = stored()
    return _known


def forget() -> None:
    """Read the file again when a verdict is needed."""
    global _known, _agreed
    _known = _agreed = None
    _warn.cache_clear()


def agree_on(found: Found) -> None:
    """Choose by these verdicts, whatever this process knows: those of the process that decides for several."""
    global _agreed
    _agreed = found


def _agreed_on() -> Found:
    """What to choose by. Several processes that have not agreed choose alike, as they must, by knowing nothing."""
    if _agreed is not None:
        return _agreed
    return known() if jax.process_count() == 1 else Found()


def path() -> Path:
    """The file.

    Raises:
        FileNotFoundError: the user has no home folder.
    """
    return cache_folder() / "verdicts.json"


def stored() -> Found:
    """The verdicts of this environment in the file."""
    here = environment()
    return next((Found.from_json(row) for row in _read() if row["environment"] == here), Found())


def add(new: Found) -> None:
    """Add verdicts to those known, and to the file.

    A file that cannot be written is reported once; the verdicts then hold for this process.
    """
    known().add(new)
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with _lock():
            here, rows = environment(), _read()
            merged = next((Found.from_json(row) for row in rows if row["environment"] == here), Found())
            merged.add(new)
            rows = [row for row in rows if row["environment"] != here][-KEPT + 1 :]
            _write([*rows, {"environment": here, **merged.to_json()}])
    except OSError as error:
        # Without a home folder there is no path.
        _cannot_store(str(error) if error.errno is None else f"{path()}: {error.strerror}")


@cache
def _cannot_store(why: str) -> None:
    warnings.warn(
        f"verdicts on attention backends cannot be stored ({why}), so they are found again in every process: set "
        "DUO_JAX_CACHE to a folder that can be written to",
        stacklevel=4,
    )


def report(keys: Iterable[str] | None = None) -> dict[str, Any]:
    """The verdicts of this environment with the machine, to send: without paths, which compilers put into errors."""
    found = known().to_json()
    if keys is not None:
        found["verdicts"] = {key: found["verdicts"].get(key, {}) for key in keys}
    for row in found["verdicts"].values():
        for verdict in row.values():
            if "reason" in verdict:
                verdict["reason"] = PATH.sub("PATH", verdict["reason"])
    here = environment()
    return {"environment": here | {"flags": [PATH.sub("PATH", flag) for flag in here["flags"]]}, **found}


def _lock() -> Any:
    """One writer at a time; where a file system has no locks, or one is stuck, the last writer wins."""
    lock = FileLock(path().with_name(".verdicts.json.lock"), timeout=PATIENCE)
    with suppress(OSError, Timeout, NotImplementedError):
        lock.acquire()
    return _Held(lock)


class _Held:
    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _read() -> list[dict[str, Any]]:
    """The file's environments; none if it is missing or damaged: it is then made again."""
    try:
        rows = read_json(path())
        for row in rows:
            Found.from_json(row)
            row["environment"].keys()
        return list(rows)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []


def _write(rows: list[dict[str, Any]]) -> None:
    part = path().with_name(f".verdicts.json.{secrets.token_hex(8)}.part")
    try:
        part.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path())
    finally:
        part.unlink(missing_ok=True)
