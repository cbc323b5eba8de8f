"""Traffic between devices in a compiled program, read from its text: one line for each collective operation."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.sizes import FOUR_BITS

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
TYPES = {"pred": "bool", "bf16": "bfloat16", "f4e2m1fn": "float4_e2m1fn"} | {
    f"f{bits}": f"float{bits}" for bits in (16, 32, 64)
}
TYPES |= {
    f"{short}{bits}": f"{long}{bits}" for short, long in (("s", "int"), ("u", "uint")) for bits in (4, 8, 16, 32, 64)
}


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        nbytes: bytes that it delivers to each device.
        layer: index of the model's layer; None: outside the layers.
    """

    kind: str
    nbytes: int
    layer: int | None


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """Every collective operation of a program; an operation inside a loop counts once."""
    operations = []
    for line in (program.as_text() or "").splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match is None:
            continue
        sizes = [_nbytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match.group(1))]
        if match.group(3) and match.group(2) in ("all-gather", "collective-permute"):
            sizes = sizes[len(sizes) // 2 :]  # The start of an asynchronous operation lists its operands too.
        layer = re.search(r"layer_(\d+)/", line)
        operations.append(Collective(match.group(2), sum(sizes), int(layer.group(1)) if layer else None))
    return operations


def summary(operations: list[Collective]) -> dict[str, Any]:
    """The layer with the most traffic, the traffic outside the layers, and the largest operation; sizes in bytes."""
    layers = sorted({each.layer for each in operations if each.layer is not None})
    by_layer = [[each for each in operations if each.layer == layer] for layer in layers]
    fullest = max(by_layer, key=lambda layer: sum(each.nbytes for each in layer), default=[])
    return {
        "in_a_layer": dict(Counter(each.kind for each in fullest)),
        "bytes_in_a_layer": sum(each.nbytes for each in fullest),
        "bytes_elsewhere": sum(each.nbytes for each in operations if each.layer is None),
        "largest": asdict(max(operations, key=lambda each: each.nbytes)) if operations else None,
    }


def _nbytes(dtype: str, shape: str) -> int:
    name = TYPES.get(dtype)
    if name is None:
        raise ValueError(f"a collective operation has an unknown data type, {dtype!r}: add it to TYPES")
    count = math.prod(int(n) for n in shape.split(",") if n)
    return (count + 1) // 2 if name in FOUR_BITS else count * jnp.dtype(name).itemsize
