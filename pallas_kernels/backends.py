"""The backends: their names, and which are preferred where; knows no arrays.

A backend is a module of this package with a `BACKEND`; a new one is a file next to the others and its name in
`BACKENDS`. Its module is imported when it is first considered: some need packages that not every machine has.
"""

import importlib
from typing import Any

import jax

from pallas_kernels.types import Backend, Request, Unsupported

BACKENDS = ("reference", "xla", "triton", "jax_triton", "mosaic", "cudnn")

# Backends of each operation, the one that should be fastest first. `xla` runs everything and ends every list.
ELSEWHERE = {"prefill": ("xla",), "decode": ("xla",), "append": ("xla",), "training": ("xla",)}
# `triton` and `jax_triton` have the same algorithm: jax is removing the lowering of the first, the second needs two
# more packages. `mosaic` on Ampere is newer than both.
ON_NVIDIA = {
    "prefill": ("triton", "jax_triton", "mosaic", "cudnn", "xla"),
    "decode": ("triton", "jax_triton", "xla"),
    "append": ("triton", "xla"),
    "training": ("triton", "jax_triton", "xla"),
}
# By compute capability, where the order is another one.
ON_HOPPER = {
    "prefill": ("mosaic", "triton", "jax_triton", "cudnn", "xla"),
    "decode": ("triton", "jax_triton", "mosaic", "xla"),
    "append": ("triton", "xla"),
    "training": ("triton", "jax_triton", "xla"),
}
PREFERENCES = {(9, 0): ON_HOPPER}


def find_backend(name: str) -> Backend:
    """A backend by name; one with a dot is any module with a `BACKEND`, as in "my_kernels.attention".

    Raises:
        ValueError: an unknown one.
    """
    if "." in name:
        return _of_module(name)
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(f"unknown attention backend {name!r:.60}; there are {known}, and modules, named with a dot")
    try:
        return importlib.import_module(f"pallas_kernels.{name}").BACKEND
    except ImportError as error:
        return _missing(name, f"cannot be imported with jax {jax.__version__} ({error})")


def _missing(name: str, why: str) -> Backend:
    """A backend that refuses everything: its kernels need a part of jax, or of another package, that is not there."""

    def run(*_: Any, **__: Any) -> Any:
        raise Unsupported(f"the {name} backend {why}")

    return Backend(name, lambda _: why, run, run, run, run, caps_scores=True)


def _of_module(name: str) -> Backend:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"attention backend {name!r:.60} is no module's name, as my_kernels.attention is")
    try:
        backend = getattr(importlib.import_module(name), "BACKEND", None)
    except (Exception, SystemExit) as error:  # Whatever the user's module raises.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"attention backend {name!r:.60} is no module that can be imported: {why}") from None
    if not isinstance(backend, Backend):
        raise ValueError(f"the module {name} has no BACKEND, a pallas_kernels.types.Backend: see docs/extend.md")
    return backend


def preferences(request: Request) -> tuple[str, ...]:
    """Names of the backends for an operation on a chip, the best first, whether or not they can run the request."""
    known = ELSEWHERE if request.capability is None else PREFERENCES.get(request.capability, ON_NVIDIA)
    return known[request.operation]


def candidates(request: Request) -> tuple[str, ...]:
    """Names of the backends that can run a request where it is traced for, the best first; the last one is `xla`."""
    return tuple(name for name in preferences(request) if find_backend(name).supports(request) is None)
