"""A whole model with random weights: a decode step, and the last chunk of a prefill, full attention and duo."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax import PRESETS, HeadPattern, KVCache, Model, ModelConfig, decode_step, prefill
from eval.costs import decode_bytes
from eval.gpu_suite.layer import RECENT_SIZE, SINK_SIZE
from eval.gpu_suite.section import Case, fastest

TOY = ModelConfig("llama", 61, 2, 32, 4, 2, 16, 48, max_positions=4096, dtype="float32", eos_ids=(2,))
STEPS = 16


def cases(*, smoke: bool) -> Iterator[Case]:
    """The paper's contexts (section 3.4) and sparsities."""
    contexts: dict[str, tuple[float, tuple[int, ...]]] = {
        "llama-3-8b": (0.5, (102_400, 307_200, 512_000)),
        "llama-2-7b": (0.75, (20_480, 61_440, 102_400)),
    }
    if smoke:
        contexts = {"toy": (0.5, (600,))}
    for name, (sparsity, lengths) in contexts.items():
        for context in lengths:
            for streaming in (0.0, sparsity):
                yield {"model": name, "context": context, "streaming": streaming, "chunk": 64 if smoke else 8192}


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds a token; seconds of the last chunk before the context; peak memory."""
    config = TOY if case["model"] == "toy" else replace(PRESETS[case["model"]], dtype="bfloat16")
    model = Model.random(config, seed=0)
    shape = config.num_layers, config.num_kv_heads
    gates = np.random.default_rng(0).random(shape)
    pattern = None
    if case["streaming"]:
        sizes: dict[str, Any] = {"sink_size": SINK_SIZE, "recent_size": RECENT_SIZE}
        pattern = HeadPattern.from_gates(gates, sparsity=case["streaming"], **sizes)
    cache = KVCache.init(config, pattern, 1, case["context"])
    box = {"cache": cache}

    def filled() -> KVCache:
        # Zeros, where a prompt would have left keys: as fast to read as anything else.
        length = case["context"] - case["chunk"] - STEPS
        return replace(box["cache"], length=jnp.full((1,), length, jnp.int32))

    tokens = jnp.ones((1, case["chunk"]), jnp.int32)

    def chunk() -> Any:
        logits, box["cache"] = prefill(model, tokens, filled(), chunk_size=case["chunk"], backend=case["backend"])
        return logits

    def steps() -> Any:
        cache = filled()
        for _ in range(STEPS):
            logits, cache = decode_step(model, tokens[:, 0], cache, backend=case["backend"])
        box["cache"] = cache
        return logits

    prefill_seconds = fastest(chunk, least=0.0)
    step_seconds = fastest(steps, least=0.0) / STEPS
    costs: dict[str, Any] = {"batch_size": 1, "length": case["context"], "itemsize": 2}
    size = decode_bytes(config, pattern, **costs)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "chunk_seconds": prefill_seconds,
        "decode_ms": 1e3 * step_seconds,
        "decode_bytes_per_second": size / step_seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def line(case: Case, found: dict[str, Any]) -> str:
    """In words."""
    about = f"{case['model']}, {case['context']} tokens, {case['streaming']:.0%} streaming, {case['backend']}"
    chunk = f"{found['chunk_seconds']:.2f} s the last {case['chunk']} tokens"
    return f"{about}: {found['decode_ms']:.2f} ms a token, {chunk}"
