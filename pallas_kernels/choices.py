"""Choices: which backend runs a request, with which tiles, as plain values that can be stored and repeated later."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

from pallas_kernels.gpus import chip, device_kind
from pallas_kernels.tiles import KINDS, tiles_of, trying
from pallas_kernels.types import Request

# Backends by `name_of` a request, instead of the default.
_repeated: dict[str, str] = {}


def here(request: Request) -> Request:
    """A request on the device that programs are traced for."""
    return replace(request, device=device_kind(), capability=chip().capability)


def name_of(request: Request) -> str:
    """What a request asks for, whatever its sizes: as in "training" or "training, window 64+256"."""
    window = request.window
    return request.operation + ("" if window is None else f", window {window.sink}+{window.recent}")


def choice_of(backend: str, request: Request) -> dict[str, Any]:
    """A backend and the tiles that it would run a request with here: `{"backend": ..., "tiles": {kernel: ...}}`."""
    tiles = {kernel: asdict(each) for kernel, each in tiles_of(backend, request).items()}
    return {"backend": backend, "tiles": tiles}


def repeated(request: Request) -> str | None:
    """The backend that is repeated for a request."""
    return _repeated.get(name_of(request))


@contextmanager
def repeating(choices: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Within it, programs are traced with these choices, by `name_of` requests.

    Raises:
        ValueError: tiles that no kernel takes.
    """
    with ExitStack() as stack:
        for choice in choices.values():
            for kernel, values in choice["tiles"].items():
                try:
                    tiles = KINDS[kernel](**values)
                except (LookupError, TypeError, ValueError) as error:
                    raise ValueError(f"tiles of {kernel!r:.60} were altered: {str(error)[:200]}") from None
                stack.enter_context(trying(kernel, tiles))
        before = dict(_repeated)
        _repeated.update({name: choice["backend"] for name, choice in choices.items()})
        try:
            yield
        finally:
            _repeated.clear()
            _repeated.update(before)
