"""Prefill attention of one layer: operations a second on the visible pairs, checked, and next to cuDNN's."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.gpu_suite import check
from duo_eval.gpu_suite.section import Case
from duo_eval.runner.process import first_line
from duo_eval.speed.roofline import visible_pairs
from duo_jax.sizes import nbytes
from pallas_kernels import layer

HEADS = (32, 8, 128)


def cases(*, smoke: bool) -> Iterator[Case]:
    """Chunks after a cache, a question over a long one, and whole texts with different fractions that stream."""
    if smoke:
        for tokens, start in ((70, 90), (128, 0)):
            yield {"tokens": tokens, "start": start, "streaming": 0.5, "heads": (4, 2, 16)}
        yield {"tokens": 5, "start": 90, "streaming": 0.5, "heads": (4, 2, 16), "cache": "int4"}
        return
    after = [(16_384, 16_384), (65_536, 65_536), (1024, 131_072), (8192, 131_072), (32, 524_288)]
    for tokens, start in after:
        yield {"tokens": tokens, "start": start, "streaming": 0.5, "heads": HEADS}
    yield {"tokens": 32, "start": 524_288, "streaming": 0.5, "heads": HEADS, "cache": "int4"}
    for tokens in (4096, 16_384, 65_536):
        for streaming in (0.0, 1.0, 0.5):
            yield {"tokens": tokens, "start": 0, "streaming": streaming, "heads": HEADS}


def measure(case: Case) -> dict[str, Any]:
    """Seconds, operations a second, and the check; for full attention without a cache also cuDNN's."""
    tokens, start, heads = case["tokens"], case["start"], tuple(case["heads"])
    shape = {"streaming": case["streaming"], "capacity": start + tokens, "cache": case.get("cache")}
    check.fits(8 * heads[2] * heads[1] * (start + tokens))
    made = layer.make(heads=heads, dtype="bfloat16", tokens=tokens, **shape)
    rows = {"start": jnp.full(1, start, jnp.int32), "lengths": jnp.full(1, tokens, jnp.int32)}
    made = check.hide(made, rows["start"])

    def attend(made: layer.Layer) -> jax.Array:
        return made.prefill(**rows, backend=case["backend"])

    checked = check.check(attend, made, **rows)
    seconds = layer.seconds_of(attend, made)
    streaming = round(case["streaming"] * heads[1])
    pairs = (heads[1] - streaming) * _pairs(start, tokens, start + tokens)
    pairs += streaming * _pairs(start, tokens, layer.WINDOW.size)
    flops = 4 * heads[2] * (heads[0] // heads[1]) * pairs
    cached = nbytes(made.pools) * start // (start + tokens)
    result = {"seconds": seconds, "flops_per_second": flops / seconds, "bytes_per_second": cached / seconds} | checked
    if case["streaming"] == 0.0 and not start:
        result |= _cudnn(made, flops)
    return result


def _pairs(start: int, tokens: int, capacity: int) -> int:
    """Query-key pairs of one head, of a chunk."""
    return visible_pairs(start + tokens, capacity) - visible_pairs(start, capacity)


def _cudnn(made: layer.Layer, flops: int) -> dict[str, Any]:
    def attend(made: layer.Layer) -> jax.Array:
        return jax.nn.dot_product_attention(made.q, made.k, made.v, is_causal=True, implementation="cudnn")

    try:
        seconds = layer.seconds_of(attend, made)
    except Exception as error:  # Errors differ: no cuDNN, or a shape that it does not support.
        return {"cudnn": f"not run: {first_line(error)}"}
    return {"cudnn_seconds": seconds, "cudnn_flops_per_second": flops / seconds}


def line(case: Case, result: dict[str, Any]) -> str:
    """Rate, time and verdict."""
    rate = f"{result['flops_per_second'] / 1e12:.0f} TFLOP/s, {1e3 * result['seconds']:.2f} ms"
    if case["start"] > 8 * case["tokens"]:
        rate += f", {result['bytes_per_second'] / 1e12:.2f} TB/s"
    peer = f"; cuDNN {result['cudnn_flops_per_second'] / 1e12:.0f}" if "cudnn_flops_per_second" in result else ""
    after = f" after {case['start']}" if case["start"] else ""
    about = f"{case['tokens']} tokens{after}, {case['streaming']:.0%} streaming, {case['backend']}"
    about += f", {case['cache']} cache" if "cache" in case else ""
    return f"{about}: {check.verdict(result)}, {rate}{peer}"
