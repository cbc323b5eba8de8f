"""`duo plan`: the longest context that a model has on a GPU, or the memory that a context needs, without loading it.

The arithmetic is `duo_jax.plan`. `--verify` compares it with the compiler's figures, which is why it is here.
"""

from dataclasses import dataclass, replace
from typing import Any

import tyro

from duo_eval.aot.programs import TOLERANCE, is_close, verify
from duo_jax.arguments import MOST_TOKENS, whole_number
from duo_jax.checkpoint.load import loaded_config
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.options import PatternOptions, parse_bytes
from duo_jax.finite import json_text
from duo_jax.generation.chunks import most_at_a_time
from duo_jax.model.config import ModelConfig
from duo_jax.model.precision import EmbedDtype, FloatDtype, KvDtype, WeightDtype
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.plan import Plan, any_pattern
from pallas_kernels.gpus import find_gpu


@dataclass(frozen=True)
class PlanCommand:
    """Compute the longest context of a model for a memory, or the memory for a context, without loading it."""

    model: str
    """Hugging Face folder, .gguf file, packaged model, hub id, or a preset (llama-3-8b, qwen3-8b, ...)."""
    memory: str | None = None
    """Memory that weights, KV cache and activations share: 80GB is 80e9 bytes, all usable; by default the GPU's."""
    gpu: str | None = None
    """a100-80g, h200, rtx-4090 (a wrong name lists all): its memory after the driver, times jax's fraction of it."""
    context: int | None = None
    """Tokens that must fit; without --memory and --gpu, the memory that they need is printed."""
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    kv_dtype: KvDtype | None = None
    """Data type of the cache; int8 and int4 quantize keys and values of retrieval heads."""
    streaming_kv_dtype: KvDtype | None = None
    """Data type of streaming heads' keys and values, which take little memory."""
    weight_dtype: WeightDtype | None = None
    """Quantize the weights of linear maps; w8a8 multiplies integers, int4-32 has a scale for every 32 channels."""
    embed_dtype: EmbedDtype | None = None
    """Quantize embeddings and head too."""
    dtype: FloatDtype | None = None
    """Data type of activations, and of weights and cache that are not quantized; the checkpoint's by default."""
    devices: tyro.conf.OmitArgPrefixes[DeviceOptions] = DeviceOptions()
    batch: int = 1
    """Sequences."""
    chunk: int | None = None
    """Tokens of a prompt computed at a time; by default 8192 with --gpu, shared by a batch, else as on this device."""
    verify: bool = False
    """Compile prefill and decode for the GPU, which need not be present, and compare; needs jax's CUDA plugin."""
    backend: str = "triton"
    """Attention backend to compile."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Plan, print, verify."""
        for name in ("context", "batch", "chunk"):
            if (value := getattr(self, name)) is not None:
                whole_number(name, value, 1)
        if self.memory is not None and self.gpu is not None and not self.verify:
            raise ValueError("give --memory or --gpu, not both: a GPU has its own memory")
        memory = self._memory()
        if memory is None and self.context is None:
            raise ValueError("give --memory 80GB or --gpu NAME for the longest context, or --context N for its memory")
        if self.verify and self.gpu is None:
            raise ValueError("--verify compiles for a GPU: give --gpu too")
        plan = self._plan()
        record = describe(plan, memory, self.context) | {"model": self.model, "gpu": self.gpu}
        if memory is not None:
            plan.check(self.context or 1, memory)
        if not self.json:
            print("\n".join(_lines(plan, record)))
        if self.verify:
            assert self.gpu is not None
            length = self.context or record["max_context"]
            record["verified"] = verify(plan, length, self.gpu.lower(), self.backend)
            if not self.json:
                print("\n".join(_verified(record["verified"])))
        if self.json:
            print(json_text(record))
        if self.verify and not is_close(record["verified"]):
            raise ValueError(
                f"the plan is {record['verified']['deviation']:+.1%} off the compiler's figure, more than "
                f"{TOLERANCE:.0%}: do not rely on it for these settings"
            )

    def _memory(self) -> int | None:
        if self.memory is not None:
            return parse_bytes(self.memory)
        return None if self.gpu is None else find_gpu(self.gpu).usable_bytes

    def _plan(self) -> Plan:
        chunk = self.chunk or most_at_a_time(self.batch, on_gpu=True if self.gpu else None)
        config = loaded_config(self.model)
        config = config.with_dtypes(dtype=self.dtype, weight_dtype=self.weight_dtype, embed_dtype=self.embed_dtype)
        return Plan(
            config,
            self._pattern(config),
            batch_size=self.batch,
            chunk_size=min(chunk, self.context or chunk),
            kv_dtype=self.kv_dtype,
            streaming_dtype=self.streaming_kv_dtype,
            mesh=self.devices.size,
        )

    def _pattern(self, config: ModelConfig) -> HeadPattern:
        options = self.pattern
        if options.pattern is None and options.sparsity is not None:
            sizes = {"sink_size": options.sink_size, "recent_size": options.recent_size}
            return any_pattern(config, options.sparsity, **{k: v for k, v in sizes.items() if v is not None})
        return options.load(self.context or config.trained_positions) or HeadPattern.full(config)


def describe(plan: Plan, memory: int | None, context: int | None) -> dict[str, Any]:
    """Everything that the command prints, as plain values; sizes are in bytes."""
    full = replace(plan, pattern=HeadPattern.full(plan.config))
    return {
        "settings": {
            "batch_size": plan.batch_size,
            "chunk_size": plan.chunk_size,
            "retrieval_heads": plan.head_pattern.num_retrieval,
            "streaming_heads": plan.head_pattern.num_streaming,
            "window_heads": len(plan.config.window_layers) * plan.config.num_kv_heads,
            "dtype": plan.config.dtype,
            "kv_dtype": plan.kv_dtype or plan.config.dtype,
            "weight_dtype": plan.config.weight_dtype or plan.config.dtype,
            "embed_dtype": plan.config.embed_dtype or plan.config.dtype,
            "mesh": vars(plan.mesh),
        },
        "devices": _devices(plan),
        "memory": memory,
        "context": context,
        "trained_positions": plan.config.trained_positions,
        "parameters": plan.config.num_parameters,
        "active_parameters": plan.config.active_parameters,
        **_sizes(plan, memory, context),
        "full_attention": _sizes(full, memory, context),
    }


def _devices(plan: Plan) -> dict[str, Any]:
    """Heads and slots of each device along `tensor`."""
    config, balanced = plan.config, plan.cache(1).heads
    columns = balanced.order.shape[1] // plan.mesh.tensor
    heads, own = len(config.full_layers) * columns, len(config.window_layers) * columns
    real = balanced.num_retrieval
    return {
        "retrieval_heads": real.tolist(),
        "streaming_heads": (heads - real).tolist(),
        "window_heads": own,
        "retrieval_slots": balanced.retrieval_slots,
        "streaming_slots": balanced.streaming_slots - own,
        "copies_of_a_head": plan.mesh.kv_heads(config) // config.num_kv_heads,
        # Every device has as many slots as the fullest one needs: its excess over the mean is unused elsewhere.
        "imbalance": float(real.max() / real.mean() - 1) if real.any() else 0.0,
    }


def _sizes(plan: Plan, memory: int | None, context: int | None) -> dict[str, Any]:
    most = None if memory is None else plan.max_context(memory)
    at = context or most
    return {
        "weights": plan.weights,
        "activations": plan.activations,
        "kv_per_token": plan.kv_per_token,
        "kv": plan.kv(at) if at else None,
        "total": plan.total(at) if at else None,
        "max_context": most,
    }


def _lines(plan: Plan, record: dict[str, Any]) -> list[str]:
    settings, memory, mesh = record["settings"], record["memory"], plan.mesh
    columns = {"full attention": record["full_attention"]}
    if plan.head_pattern.num_streaming:
        columns[f"{plan.head_pattern.sparsity:.0%} stream"] = record
    lines = [
        f"weights {settings['weight_dtype']}, KV cache {settings['kv_dtype']}, batch {plan.batch_size}, chunks of "
        f"{plan.chunk_size} tokens" + (f", {memory / 1e9:.2f} GB" if memory else ""),
        f"{'':<22}" + "".join(f"{name:>16}" for name in columns),
    ]
    rows: list[tuple[str, str, int | float]] = [
        ("weights, GB", "weights", 1e9),
        ("activations, GB", "activations", 1e9),
    ]
    rows += [("KV bytes a token", "kv_per_token", 1), ("KV cache, GB", "kv", 1e9), ("total, GB", "total", 1e9)]
    rows += [("longest context", "max_context", 1)] if memory is not None else []
    for label, name, unit in rows:
        cells = "".join(_cell(sizes[name], unit) for sizes in columns.values())
        lines.append(f"{label:<22}{cells}")
    if plan.config.num_experts:
        active, parameters = plan.config.active_parameters / 1e9, plan.config.num_parameters / 1e9
        lines.append(
            f"A token is computed with {active:.1f}B of {parameters:.1f}B weights: {plan.config.experts_per_token} of "
            f"{plan.config.num_experts} experts in a layer."
        )
    if plan.config.window_layers:
        sizes = " and ".join(str(window.size) for window in plan.config.own_windows)
        lines.append(
            f"{len(plan.config.window_layers)} of {plan.config.num_layers} layers have a window of {sizes} tokens, in "
            "full attention too."
        )
    if mesh.devices > 1:
        lines += _shared(plan, record["devices"])
    if record["context"] is None:
        lines.append("KV cache and total are at the longest context.")
    else:
        lines.append(f"KV cache and total are at {record['context']} tokens: the smallest memory that holds them.")
    trained, most = plan.config.trained_positions, record["context"] or record["max_context"] or 0
    if most > trained:
        lines.append(f"The model was trained for {trained} tokens: expect worse answers beyond that.")
    return lines


def _shared(plan: Plan, devices: dict[str, Any]) -> list[str]:
    mesh = plan.mesh
    lines = [
        f"Sizes are of each of {mesh.devices} devices (tensor {mesh.tensor}, sequence {mesh.sequence}, data "
        f"{mesh.data}); tokens are of each sequence.",
        f"{'device along tensor':<22}" + "".join(f"{i:>6}" for i in range(mesh.tensor)),
    ]
    for kind in ("retrieval", "streaming"):
        cells = "".join(f"{count:>6}" for count in devices[f"{kind}_heads"])
        lines.append(f"{f'{kind} heads':<22}{cells}   of {devices[f'{kind}_slots']} slots")
    if devices["copies_of_a_head"] > 1:
        lines.append(f"Every KV head is on {devices['copies_of_a_head']} of them.")
    return [*lines, f"The largest pool of retrieval heads is {devices['imbalance']:.1%} above the mean."]


def _cell(value: int | None, unit: int | float) -> str:
    if value is None:
        return f"{'-':>16}"
    if value == MOST_TOKENS and unit == 1:
        return f"{'any':>16}"
    return f"{value:>16}" if unit == 1 else f"{value / unit:>16.2f}"


def _verified(verified: dict[str, Any]) -> list[str]:
    gpu = find_gpu(verified["gpu"]).name
    lines = [f"compiled for {gpu}, {verified['context']} tokens, {verified['backend']}:"]
    for name, sizes in verified["programs"].items():
        output = sizes["outputs"] - sizes["aliased"]
        lines.append(
            f"  {name}: arguments {sizes['arguments'] / 1e9:.3f} GB, new outputs {output / 1e9:.3f} GB, "
            f"temporaries {sizes['temporaries'] / 1e9:.3f} GB, total {sizes['total'] / 1e9:.3f} GB"
        )
        if "collectives" in sizes:
            sent = sizes["collectives"]
            kinds = ", ".join(f"{count} {kind}" for kind, count in sent["in_a_layer"].items())
            lines.append(
                f"    collectives in a layer: {kinds}, {sent['bytes_in_a_layer'] / 1e6:.3f} MB; outside the layers "
                f"{sent['bytes_elsewhere'] / 1e6:.3f} MB; the largest {sent['largest']['nbytes'] / 1e6:.3f} MB"
            )
    lines.append(f"  planned {verified['planned'] / 1e9:.3f} GB, {verified['deviation']:+.2%}")
    return lines
