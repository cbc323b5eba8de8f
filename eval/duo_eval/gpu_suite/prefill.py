"""Prefill attention of one layer: operations a second on the visible pairs, compared with cuDNN's causal attention."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.gpu_suite import layer
from duo_eval.gpu_suite.section import Case
from duo_eval.runner.process import first_line
from duo_eval.speed.roofline import visible_pairs

HEADS = (32, 8, 128)


def cases(*, smoke: bool) -> Iterator[Case]:
    """Lengths, and fractions of the heads that stream."""
    for tokens in (128,) if smoke else (4096, 16384, 65536):
        for streaming in (0.0, 1.0, 0.5):
            yield {"tokens": tokens, "streaming": streaming, "heads": (4, 2, 16) if smoke else HEADS}


def measure(case: Case) -> dict[str, Any]:
    """Seconds and operations a second; for full attention also cuDNN's, if it runs."""
    tokens, heads = case["tokens"], tuple(case["heads"])
    made = layer.make(heads=heads, dtype="bfloat16", streaming=case["streaming"], tokens=tokens, capacity=tokens)
    rows = {"start": jnp.zeros(1, jnp.int32), "lengths": jnp.full(1, tokens, jnp.int32)}
    seconds = layer.seconds_of(lambda made: made.prefill(**rows, backend=case["backend"]), made)
    streaming = round(case["streaming"] * heads[1])
    pairs = (heads[1] - streaming) * visible_pairs(tokens, tokens)
    pairs += streaming * visible_pairs(tokens, layer.WINDOW.size)
    flops = 4 * heads[2] * (heads[0] // heads[1]) * pairs
    result = {"seconds": seconds, "flops_per_second": flops / seconds}
    if case["streaming"] == 0.0:
        result |= _cudnn(made, flops)
    return result


def _cudnn(made: layer.Layer, flops: int) -> dict[str, Any]:
    def attend(made: layer.Layer) -> jax.Array:
        return jax.nn.dot_product_attention(made.q, made.k, made.v, is_causal=True, implementation="cudnn")

    try:
        seconds = layer.seconds_of(attend, made)
    except Exception as error:  # Errors differ: no cuDNN, or a shape that it does not support.
        return {"cudnn": f"not run: {first_line(error)}"}
    return {"cudnn_seconds": seconds, "cudnn_flops_per_second": flops / seconds}


def line(case: Case, result: dict[str, Any]) -> str:
    """Rate and time."""
    rate = f"{result['flops_per_second'] / 1e12:.0f} TFLOP/s, {1e3 * result['seconds']:.2f} ms"
    peer = f"; cuDNN {result['cudnn_flops_per_second'] / 1e12:.0f}" if "cudnn_flops_per_second" in result else ""
    return f"{case['tokens']} tokens, {case['streaming']:.0%} streaming, {case['backend']}: {rate}{peer}"
