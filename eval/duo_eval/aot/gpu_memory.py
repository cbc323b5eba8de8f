"""Tables of the GPU page: memory of models by context, and the longest context of each GPU. Computed, not measured."""

from dataclasses import replace

from duo_eval.show.markdown import rows_to_table
from duo_jax import PRESETS
from duo_jax.generation.chunks import most_at_a_time
from duo_jax.plan import Plan, any_pattern
from pallas_kernels.gpus import GPUS

# A preset and the fraction of its KV heads that stream.
MODELS = {"llama-3.1-8b": 0.5, "qwen3-8b": 0.5, "qwen2.5-7b": 0.5, "mistral-7b": 0.5, "llama-2-7b": 0.75}
SHOWN = ("a100-80g", "h100-80g", "h200", "b200", "rtx-4090")  # of GPUS
CONTEXTS = (32_768, 131_072, 1_048_576)
PRECISIONS: dict[str, tuple[str | None, str | None]] = {"bf16": (None, None), "int8, int4": ("int8", "int4")}


def _plans(model: str, precision: str) -> tuple[Plan, Plan]:
    """The plans of full attention and of the pattern."""
    weights, cache = PRECISIONS[precision]
    config = PRESETS[model].with_dtypes(weight_dtype=weights)
    full = Plan(config, chunk_size=most_at_a_time(on_gpu=True), kv_dtype=cache)
    return full, replace(full, pattern=any_pattern(config, MODELS[model]))


def memory_by_context() -> str:
    """GB of weights, cache and activations, for one sequence in bfloat16: full attention, then the pattern."""
    rows = []
    for model, sparsity in MODELS.items():
        full, duo = _plans(model, "bf16")
        totals = [f"{full.total(length) / 1e9:.1f} / {duo.total(length) / 1e9:.1f}" for length in CONTEXTS]
        rows.append([model, f"{sparsity:.0%}", f"{full.weights / 1e9:.1f}", *totals])
    return rows_to_table(rows, ["model", "stream", "weights", *(f"{length:,} tokens" for length in CONTEXTS)])


def longest_contexts() -> str:
    """Thousands of tokens of one sequence that fit on each GPU: full attention, then the pattern."""
    usable: dict[int, list[str]] = {}  # GPUs of the same memory share a column.
    for name in SHOWN:
        usable.setdefault(GPUS[name].usable_bytes, []).append(name)
    rows = []
    for model in MODELS:
        for precision in PRECISIONS:
            plans = _plans(model, precision)
            most = [[plan.max_context(nbytes) // 1000 for plan in plans] for nbytes in usable]
            rows.append([model, precision, *(f"{full:,} / {duo:,}" if full else "no room" for full, duo in most)])
    return rows_to_table(rows, ["model", "weights, cache", *map(", ".join, usable.values())], align="llr")
