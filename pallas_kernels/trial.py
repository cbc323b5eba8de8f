"""Does a kernel compile at the sizes of the program at hand? Certification compiles one; a program may have others.

A kernel is compiled by itself while the program around it is traced: an error of the whole program would neither name
the kernel nor come before it is too late to take another one. jax keeps what compiles on disk, with all other programs.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax

from pallas_kernels.certify.verdicts import key_of
from pallas_kernels.errors import first_line, is_no_memory
from pallas_kernels.types import Backend, Request, TokenShards


class Operands(NamedTuple):
    """What an operation of a backend is called with, besides the request's window.

    Attributes:
        arrays: its positional arguments.
        rows: its keyword arguments that are arrays.
        shards: devices that share the tokens of retrieval heads.
    """

    arrays: tuple[Any, ...]
    rows: Mapping[str, Any] = {}
    shards: TokenShards | None = None


# Why a backend does not compile, by its name, the request and the shapes of the operands; None: it does.
_tried: dict[Any, str | None] = {}


def compiles(backend: Backend, request: Request, operands: Operands) -> bool:
    """Whether a backend's operation compiles for such operands on the default device; a warning says once if not."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (operands.arrays, dict(operands.rows)))
    leaves, structure = jax.tree.flatten(shapes)
    key = backend.name, request, operands.shards, structure, tuple((x.shape, x.dtype) for x in leaves)
    if key not in _tried:
        # In a thread of its own: without the mesh and the trace of the caller.
        with ThreadPoolExecutor(1) as thread:
            _tried[key] = thread.submit(_compile, _program(backend, request, operands.shards), shapes).result()
    if (why := _tried[key]) is not None:
        _warn(backend.name, key_of(request), why)
    return why is None


def forget_trials() -> None:
    """Compile again when it is next asked."""
    _tried.clear()
    _warn.cache_clear()


def _program(backend: Backend, request: Request, shards: TokenShards | None) -> Callable[..., Any]:
    operation = getattr(backend, request.operation)
    if request.operation == "training":

        def both(*arrays: Any, **_: Any) -> Any:
            out, back = jax.vjp(lambda *inputs: operation(*inputs, request.window), *arrays)
            return out, back(out)

        return both
    one = None if shards is None else replace(shards, at=0)
    return partial(operation, window=request.window, shards=one)


def _compile(program: Callable[..., Any], shapes: tuple[tuple[Any, ...], dict[str, Any]]) -> str | None:
    arrays, rows = shapes
    try:
        jax.jit(program).lower(*arrays, **rows).compile()
    except Exception as error:  # Compilers raise anything.
        # Of memory that is taken, the program itself reports.
        return None if is_no_memory(error) else first_line(error)
    return None


@cache
def _warn(backend: str, key: str, why: str) -> None:
    warnings.warn(
        f"the {backend} backend is right here but does not compile at the size of this program ({key}: {why}): the "
        "next backend is used",
        stacklevel=6,
    )
