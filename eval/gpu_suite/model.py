"""A whole model with random weights: a decode step, and the last chunk of a prefill, full attention and duo."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax import PRESETS, KVCache, Model, ModelConfig
from duo_jax.phases import extend, step
from duo_jax.plan import Plan, any_pattern
from eval.costs import decode_bytes
from eval.gpu_suite.layer import RECENT_SIZE, SINK_SIZE
from eval.gpu_suite.section import Case, fastest
from eval.memory import decode as decode_step
from eval.memory import prefill_chunk

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
    """Milliseconds a token; seconds of the last chunk before the context; memory of both programs."""
    config = TOY if case["model"] == "toy" else replace(PRESETS[case["model"]], dtype="bfloat16")
    pattern = None
    if case["streaming"]:
        pattern = any_pattern(config, case["streaming"], sink_size=SINK_SIZE, recent_size=RECENT_SIZE)
    plan = Plan(config, pattern, chunk_size=case["chunk"])
    # What the backend cannot do, it says before weights are made.
    for program in (prefill_chunk, decode_step):
        function, *shapes = program(plan, case["context"], case["backend"])
        function.trace(*shapes)
    model = Model.random(config, seed=0)
    cache = KVCache.init(config, pattern, 1, case["context"])
    tokens = jnp.ones((1, case["chunk"]), jnp.int32)

    def filled(cache: KVCache, length: int) -> KVCache:
        # Zeros, where a prompt would have left keys.
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

    chunk_seconds = fastest(one_chunk, least=0.0)
    step_seconds = fastest(some_steps, least=0.0) / STEPS
    costs: dict[str, Any] = {"batch_size": 1, "length": case["context"], "itemsize": 2}
    return {
        "chunk_seconds": chunk_seconds,
        "decode_ms": 1e3 * step_seconds,
        "decode_bytes_per_second": decode_bytes(config, pattern, **costs) / step_seconds,
        "chunk_memory_bytes": _needs(chunk),
        "decode_memory_bytes": _needs(decode),
    }


def _decode(model: Model, cache: KVCache, token: jax.Array, backend: str) -> tuple[jax.Array, KVCache]:
    """Some steps in one program, as `generate` makes them."""
    active = jnp.ones(token.shape, bool)

    def one(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return step(model, token, carry[1], active, backend)

    logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, STEPS, one, (logits, cache))


def _needs(program: jax.stages.Compiled) -> int | None:
    """Bytes of device memory while a program runs, from the compiler; an output in its argument's place counts once."""
    found = program.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def line(case: Case, found: dict[str, Any]) -> str:
    """In words."""
    about = f"{case['model']}, {case['context']} tokens, {case['streaming']:.0%} streaming, {case['backend']}"
    chunk = f"{found['chunk_seconds']:.2f} s the last {case['chunk']} tokens"
    return f"{about}: {found['decode_ms']:.2f} ms a token, {chunk}"
