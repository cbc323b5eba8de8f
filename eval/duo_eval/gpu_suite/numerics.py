"""Every kernel compared with the dense reference in float32, on random inputs that differ in each run."""

import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_eval.gpu_suite.section import Case
from pallas_kernels import layer
from pallas_kernels.certify.cases import TOLERANCE, worst

# The outputs of an operation; in training, gradients are named after their inputs.
NAMES = {"prefill": ("out",), "decode": ("out",), "training": ("out", "q", "k", "v", "gates")}


def cases(*, smoke: bool) -> Iterator[Case]:
    """Operations, types, and shapes of real models: Llama-3, Llama-2, SmolLM2, one KV head, a head dim of 80."""
    shapes = [(4, 2, 40)] if smoke else [(32, 8, 128), (32, 32, 128), (9, 3, 64), (8, 1, 256), (10, 2, 80)]
    tokens, capacity = (400, 500) if smoke else (500, 3000)  # more tokens than a window
    size = {"tokens": tokens, "capacity": capacity, "batch": 3}
    for operation in ("prefill", "decode", "training"):
        for dtype in ("bfloat16",) if smoke else TOLERANCE:
            for heads in shapes:
                yield {"operation": operation, "dtype": dtype, "heads": heads, "streaming": 0.5, **size}
    quantized = (
        [("decode", (4, 2, 32), "int4")] if smoke else product(("prefill", "decode"), shapes[::2], ("int8", "int4"))
    )
    for operation, heads, cache in quantized:
        yield {"operation": operation, "dtype": "bfloat16", "heads": heads, "streaming": 0.5, "cache": cache, **size}
    if smoke:
        return
    for operation in ("prefill", "decode"):
        for streaming in (0.0, 1.0):
            yield {"operation": operation, "dtype": "bfloat16", "heads": shapes[0], "streaming": streaming, **size}
    # Long enough for the largest number of splits.
    long = {"operation": "decode", "dtype": "bfloat16", "heads": shapes[0], "streaming": 0.5}
    yield long | {"tokens": 1, "capacity": 300_000, "batch": 1}


def measure(case: Case) -> dict[str, Any]:
    """Errors of the outputs and, in training, of the gradients."""
    seed = time.time_ns() % (1 << 31)
    shape = {name: case[name] for name in ("dtype", "streaming", "tokens", "capacity", "batch")}
    made = layer.make(heads=tuple(case["heads"]), seed=seed, cache=case.get("cache"), **shape)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, made)
    program = jax.jit(run, static_argnums=(1, 2, 3)).lower(made, case["operation"], case["backend"], seed).compile()
    poison()
    outputs = program(made)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(run, static_argnums=(1, 2, 3))(exact, case["operation"], "reference", seed)
    names = NAMES[case["operation"]]
    errors = {}
    for name, *pair in zip(names, jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        errors[name] = worst(*(np.asarray(x.astype(jnp.float32), np.float64) for x in pair))
    # The gates' gradient is not judged: no kernel computes it, and as a sum with signs it may be nearly 0.
    judged = [error for name, error in errors.items() if name != "gates"]
    # `error < tolerance`, not `not error > tolerance`: NaN is wrong too.
    return {"seed": seed, "errors": errors, "is_right": all(error < TOLERANCE[case["dtype"]] for error in judged)}


def run(made: layer.Layer, operation: str, backend: str, seed: int) -> Any:
    """The operation on rows of different lengths."""
    batch, tokens = made.q.shape[:2]
    capacity = made.pools.full_k.shape[2]
    rng = np.random.default_rng(seed)
    if operation == "prefill":
        # A first chunk, a chunk with padding, one after a whole cache.
        start = jnp.asarray([0, *rng.integers(0, capacity - tokens, batch - 2), capacity - tokens][:batch], jnp.int32)
        lengths = jnp.asarray([tokens, *rng.integers(1, tokens, batch - 2), tokens][:batch], jnp.int32)
        out = made.prefill(start=start, lengths=lengths, backend=backend)
        # Outputs beyond a row's tokens are unspecified.
        return jnp.where((jnp.arange(tokens) < lengths[:, None])[:, :, None, None], out, 0)
    if operation == "decode":
        lengths = jnp.asarray(rng.integers(1, capacity, batch), jnp.int32)
        return made.decode(lengths=lengths, backend=backend)
    gates = jnp.asarray(rng.random(made.k.shape[2]), jnp.float32)
    weights = jnp.asarray(rng.normal(size=made.q.shape), jnp.float32)

    def loss(q: Any, k: Any, v: Any, gates: Any) -> Any:
        out = made._replace(q=q, k=k, v=v).gated(gates, backend=backend).astype(jnp.float32)
        return (weights * out).sum(), out

    gradients, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(made.q, made.k, made.v, gates)
    return out, gradients


def poison() -> None:
    """Fill free memory with NaN and release it: elements that a kernel does not write then show."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    used = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    blocks = max(1, int(0.8 * (limit - used)) >> 28)  # of 256 MiB
    jax.block_until_ready([jnp.full((1 << 26,), jnp.nan, jnp.float32) for _ in range(min(blocks, 400))])


def line(case: Case, result: dict[str, Any]) -> str:
    """Verdict and error."""
    verdict = "right" if result["is_right"] else "WRONG"
    about = f"{case['operation']}, {case['dtype']}, heads {tuple(case['heads'])}, {case['backend']}"
    about += f", {case['cache']} cache" if "cache" in case else ""
    return f"{about}: {verdict}, error {max(result['errors'].values()):.1e}"
