"""Decode attention of one layer: bytes of keys and values read per second."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import jax.numpy as jnp

from duo_eval.gpu_suite import layer
from duo_eval.gpu_suite.section import Case
from duo_jax.sizes import nbytes

HEADS = (32, 8, 128)


def cases(*, smoke: bool) -> Iterator[Case]:
    """Batch sizes, lengths, and fractions of the heads that stream; then quantized caches."""
    for batch in (1, 2) if smoke else (1, 8):
        for length in (500,) if smoke else (131_072, 524_288, 1_048_576):
            for streaming in (0.0, 0.5, 0.75):
                heads = (8, 4, 16) if smoke else HEADS
                yield {"batch": batch, "length": length, "streaming": streaming, "heads": heads}
    for batch, cache in () if smoke else product((1, 8), ("int8", "int4")):
        yield {"batch": batch, "length": 524_288, "streaming": 0.5, "heads": HEADS, "cache": cache}


def measure(case: Case) -> dict[str, Any]:
    """Seconds, and bytes a second."""
    heads, length, batch = tuple(case["heads"]), case["length"], case["batch"]
    shape = {"streaming": case["streaming"], "batch": batch, "capacity": length}
    made = layer.make(heads=heads, dtype="bfloat16", tokens=1, cache=case.get("cache"), **shape)
    lengths = jnp.full(batch, length, jnp.int32)
    seconds = layer.seconds_of(lambda made: made.decode(lengths=lengths, backend=case["backend"]), made)
    size = nbytes(made.pools)
    return {"seconds": seconds, "bytes": size, "bytes_per_second": size / seconds}


def line(case: Case, result: dict[str, Any]) -> str:
    """Bandwidth and time."""
    about = f"{case['length']} tokens, batch {case['batch']}, {case['streaming']:.0%} streaming, {case['backend']}"
    about += f", {case['cache']} cache" if "cache" in case else ""
    return f"{about}: {result['bytes_per_second'] / 1e12:.2f} TB/s, {1e6 * result['seconds']:.0f} us"
