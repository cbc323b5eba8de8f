"""A whole model with random weights and keys: a decode step, and the last chunk of a prefill, full and duo."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from duo_eval.aot.compile import memory_of
from duo_eval.aot.programs import decode as decode_step
from duo_eval.aot.programs import prefill_chunk
from duo_eval.gpu_suite.section import Case
from duo_jax import PRESETS, KVCache, Model, ModelConfig
from duo_jax.generation.infer import extend, step
from duo_jax.plan import Plan, any_pattern
from duo_jax.sizes import nbytes
from pallas_kernels.layer import RECENT_SIZE, SINK_SIZE
from pallas_kernels.quantized import Quantized, Stored
from pallas_kernels.timing import fastest

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
    # Millions of tokens: 8-bit weights and activations, 4-bit keys and values.
    bits = {"weights": "w8a8", "cache": "int4", "streaming": 0.5}
    if smoke:
        yield {"model": "toy", "context": 600, "chunk": 64, **bits}
    for context in () if smoke else (3_300_000, 7_000_000):
        yield {"model": "llama-3-8b", "context": context, "chunk": 4096, **bits}


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds a token; seconds of the last chunk before the context; memory of both programs."""
    config = TOY if case["model"] == "toy" else replace(PRESETS[case["model"]], dtype="bfloat16")
    config = replace(config, weight_dtype=case.get("weights"))
    pattern = None
    if case["streaming"]:
        pattern = any_pattern(config, case["streaming"], sink_size=SINK_SIZE, recent_size=RECENT_SIZE)
    plan = Plan(config, pattern, chunk_size=case["chunk"], kv_dtype=case.get("cache"))
    # A backend that does not support this raises before weights are made.
    for program in (prefill_chunk, decode_step):
        function, *shapes = program(plan, case["context"], case["backend"])
        function.trace(*shapes)
    model = Model.random(config, seed=0)
    cache = plan.cache(case["context"]).empty()
    full, rings = jax.jit(_noise, donate_argnums=0)((cache.full, cache.rings))
    cache = replace(cache, full=full, rings=rings)
    tokens = jnp.ones((1, case["chunk"]), jnp.int32)

    def filled(cache: KVCache, length: int) -> KVCache:
        return replace(cache, length=jnp.full((1,), length, jnp.int32))

    last = jnp.zeros((1, config.embed_dim), jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32)
    args = model, filled(cache, case["context"] - STEPS), tokens[:, 0]
    decode = jax.jit(_decode, static_argnums=3, donate_argnums=1).lower(*args, case["backend"]).compile()
    chunk_args = model, tokens, args[1], jnp.full((1,), case["chunk"], jnp.int32), last
    chunk = jax.jit(extend, static_argnums=5, donate_argnums=(2,)).lower(*chunk_args, case["backend"]).compile()
    box = {"cache": cache}

    def one_chunk() -> Any:
        start = filled(box["cache"], case["context"] - case["chunk"])
        hidden, box["cache"] = chunk(model, tokens, start, chunk_args[3], last)
        return hidden

    def some_steps() -> Any:
        logits, box["cache"] = decode(model, filled(box["cache"], case["context"] - STEPS), tokens[:, 0])
        return logits

    chunk_seconds = fastest(one_chunk)
    step_seconds = fastest(some_steps) / STEPS
    # Every weight but the embedding, which is a look-up, and every key and value.
    embedding = 0 if config.tied_head else nbytes(model.decoder.embed.embedding.get_value())
    read = plan.weights - embedding + cache.nbytes
    return {
        "chunk_seconds": chunk_seconds,
        "decode_ms": 1e3 * step_seconds,
        "decode_bytes_per_second": read / step_seconds,
        "chunk_memory_bytes": memory_of(chunk).total,
        "decode_memory_bytes": memory_of(decode).total,
    }


def _noise(pools: Any) -> Any:
    """Random contents of pools, made in place: keys and values around 1, and every number of quantized ones."""

    def bits(x: jax.Array) -> jax.Array:
        """A hash of every element's index."""
        mixed = jnp.uint32(2463534242)
        for axis in range(x.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            mixed = (mixed ^ index) * jnp.uint32(0x9E3779B1)
            mixed = mixed ^ (mixed >> jnp.uint32(15))
        return mixed

    def fill(pool: Stored) -> Stored:
        if isinstance(pool, Quantized):
            # Steps of 1 / 8 from -1 on.
            grid = jnp.full(pool.grid.shape, 0x3E00FFC0, jnp.uint32)
            return replace(pool, words=bits(pool.words).astype(jnp.uint16), grid=grid)
        return (bits(pool).astype(jnp.float32) * 2.0**-31 - 1.0).astype(pool.dtype)

    return jax.tree.map(fill, pools, is_leaf=lambda x: isinstance(x, Quantized))


def _decode(model: Model, cache: KVCache, token: jax.Array, backend: str) -> tuple[jax.Array, KVCache]:
    """`STEPS` steps in one program, as `generate` runs them."""
    active = jnp.ones(token.shape, bool)

    def one_step(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return step(model, token, carry[1], active, backend)

    logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, STEPS, one_step, (logits, cache))


def line(case: Case, result: dict[str, Any]) -> str:
    """Times of a token and of the last chunk."""
    about = f"{case['model']}, {case['context']} tokens, {case['streaming']:.0%} streaming, {case['backend']}"
    about += f", {case['weights']} weights, {case['cache']} cache" if "cache" in case else ""
    chunk = f"{result['chunk_seconds']:.2f} s for the last {case['chunk']} tokens"
    return f"{about}: {result['decode_ms']:.2f} ms a token, {chunk}"
