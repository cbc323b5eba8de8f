"""Decode attention of one layer: bytes of keys and values read per second, checked."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_eval.gpu_suite import check
from duo_eval.gpu_suite.section import Case
from duo_jax.sizes import nbytes
from pallas_kernels import layer

HEADS = (32, 8, 128)


def cases(*, smoke: bool) -> Iterator[Case]:
    """Lengths, batch sizes, caches, rows of different lengths; then fractions of the heads that stream."""
    if smoke:
        toy = {"batch": 1, "length": 500, "streaming": 0.5, "heads": (8, 4, 16)}
        yield from (toy, toy | {"batch": 3, "ragged": True}, toy | {"cache": "int4"})
        return
    half: Case = {"batch": 1, "length": 131_072, "streaming": 0.5, "heads": HEADS}
    long = half | {"length": 1_048_576}
    yield from (half, long, half | {"batch": 8}, half | {"batch": 8, "cache": "int4"}, long | {"cache": "int4"})
    # One long row among short ones.
    yield from (long | {"batch": 8, "ragged": True}, half | {"batch": 8, "ragged": True})
    yield from (half | {"batch": batch, "cache": "int8"} for batch in (1, 8))
    for streaming in (0.0, 0.75):
        for batch in (1, 8):
            for length in (131_072, 1_048_576):
                yield {"batch": batch, "length": length, "streaming": streaming, "heads": HEADS}


def measure(case: Case) -> dict[str, Any]:
    """Seconds, bytes a second, and the check."""
    heads, length, batch = tuple(case["heads"]), case["length"], case["batch"]
    shape = {"streaming": case["streaming"], "batch": batch, "capacity": length, "cache": case.get("cache")}
    check.fits(nbytes(jax.eval_shape(lambda: layer.make(heads=heads, dtype="bfloat16", tokens=1, **shape))))
    made = layer.make(heads=heads, dtype="bfloat16", tokens=1, **shape)
    filled = np.full(batch, length)
    if case.get("ragged"):
        filled[1:] = np.linspace(min(300, length), length // 64 + 1, batch - 1)
    lengths = jnp.asarray(filled, jnp.int32)
    made = check.hide(made, lengths)

    def attend(made: layer.Layer) -> jax.Array:
        return made.decode(lengths=lengths, backend=case["backend"])

    checked = check.check(attend, made, start=lengths)
    seconds = layer.seconds_of(attend, made)
    full = nbytes(made.pools.full) / (batch * length) * filled.sum()
    size = int(full) + nbytes(made.pools.ring)
    return {"seconds": seconds, "bytes": size, "bytes_per_second": size / seconds} | checked


def line(case: Case, result: dict[str, Any]) -> str:
    """Verdict, bandwidth and time."""
    about = f"{case['length']} tokens, batch {case['batch']}, {case['streaming']:.0%} streaming, {case['backend']}"
    about += f", {case['cache']} cache" if "cache" in case else ""
    about += ", other rows short" if case.get("ragged") else ""
    rate = f"{result['bytes_per_second'] / 1e12:.2f} TB/s, {1e6 * result['seconds']:.0f} us"
    return f"{about}: {check.verdict(result)}, {rate}"
