"""What devices send each other in a compiled program: read from its text, a line for each collective operation."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
TYPES = {"pred": "bool", "bf16": "bfloat16"} | {f"f{bits}": f"float{bits}" for bits in (16, 32, 64)}
TYPES |= {
    f"{short}{bits}": f"{long}{bits}" for short, long in (("s", "int"), ("u", "uint")) for bits in (4, 8, 16, 32, 64)
}


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        nbytes: of what it gives each device.
        layer: of the model, None: outside of them.
    """

    kind: str
    nbytes: int
    layer: int | None


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """Every collective operation of a program. One inside a loop counts once."""
    found = []
    for line in (program.as_text() or "").splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match is None:
            continue
        sizes = [_nbytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match.group(1))]
        if match.group(3) and match.group(2) in ("all-gather", "collective-permute"):
            sizes = sizes[len(sizes) // 2 :]  # Begun, these name what they take too.
        layer = re.search(r"layer_(\d+)/", line)
        found.append(Collective(match.group(2), sum(sizes), int(layer.group(1)) if layer else None))
    return found


def summary(found: list[Collective]) -> dict[str, Any]:
    """The most that any layer has and sends, what is outside of the layers, and the largest of all; sizes in bytes."""
    layers = sorted({one.layer for one in found if one.layer is not None})
    by_layer = [[one for one in found if one.layer == layer] for layer in layers]
    fullest = max(by_layer, key=lambda ones: sum(one.nbytes for one in ones), default=[])
    return {
        "in_a_layer": dict(Counter(one.kind for one in fullest)),
        "bytes_in_a_layer": sum(one.nbytes for one in fullest),
        "bytes_elsewhere": sum(one.nbytes for one in found if one.layer is None),
        "largest": asdict(max(found, key=lambda one: one.nbytes)) if found else None,
    }


def _nbytes(dtype: str, shape: str) -> int:
    name = TYPES.get(dtype)
    if name is None:
        raise ValueError(f"a collective operation of an unknown data type, {dtype!r}")
    count = math.prod(int(n) for n in shape.split(",") if n)
    return (count + 1) // 2 if name in ("int4", "uint4") else count * jnp.dtype(name).itemsize
