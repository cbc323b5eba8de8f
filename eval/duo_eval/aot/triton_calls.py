"""Kernels of jax_triton in a lowered program, which are compiled when jax lowers it. Knows no kernel.

A call has its kernel's PTX in a message of jaxlib (jaxlib/gpu/triton.proto, in Protocol Buffers' wire format).
"""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

TARGET = "triton_kernel_call"
# Numbers of fields. A call: its kernel, and programs in three directions.
CALL, KERNEL, X, Y, Z = 1, 1, 2, 3, 4
# A kernel.
NAME, SHARED_MEMORY, PTX, TTIR = 1, 3, 4, 5


class TritonCall(NamedTuple):
    """One launch of a kernel."""

    name: str
    grid: tuple[int, int, int]
    shared_memory: int  # bytes of each program
    ptx: str
    ttir: str  # what Triton made of the source


def triton_calls(lowered: jax.stages.Lowered) -> list[TritonCall]:
    """The launches of a program, in its order."""
    module: Any = lowered.compiler_ir()
    return [_call(message) for message in _messages(module.operation)]


def _messages(operation: Any) -> Iterator[bytes]:
    """Of all calls within an operation of MLIR."""
    for region in operation.regions:
        for block in region:
            for child in block:
                inner = child.operation
                if inner.name == "stablehlo.custom_call" and inner.attributes["call_target_name"].value == TARGET:
                    yield zlib.decompress(inner.attributes["backend_config"].value_bytes)
                yield from _messages(inner)


def _call(message: bytes) -> TritonCall:
    call = _fields(_fields(message)[CALL])
    kernel = _fields(call[KERNEL])
    name, ptx, ttir = (kernel[number].decode() for number in (NAME, PTX, TTIR))
    # A number that is zero is left out.
    return TritonCall(name, (call[X], call[Y], call[Z]), kernel.get(SHARED_MEMORY, 0), ptx, ttir)


def _fields(message: bytes) -> dict[int, Any]:
    """Integers and bytes of a message by their number; the last one of each."""
    found: dict[int, Any] = {}
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            found[number] = integer()
        elif kind == 2:
            size = integer()
            found[number], at = message[at : at + size], at + size
        else:
            raise ValueError(f"a field of a call of jax_triton is an integer or bytes, got wire type {kind}")
    return found
