"""`duo inspect`: a model's shape, which of its heads stream, and the memory saved at several lengths."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from duo_jax.arguments import whole_number
from duo_jax.cache.cache import KVCache
from duo_jax.checkpoint.load import loaded_config, stored_as
from duo_jax.cli.options import PatternOptions
from duo_jax.figures import check_figure, write_figure
from duo_jax.finite import json_text
from duo_jax.model.config import ModelConfig
from duo_jax.model.precision import FloatDtype
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.plan import weight_bytes
from duo_jax.sizes import size_text

LENGTHS = (4096, 32768, 131072, 1048576)


@dataclass(frozen=True)
class Inspect:
    """Show a model's shape, its head table, and the bytes of weights and KV cache; without loading it."""

    model: str
    """Hugging Face folder, .gguf file, packaged model, hub id, or a preset (llama-3-8b, qwen3-8b, ...)."""
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    dtype: FloatDtype | None = None
    """Data type to count bytes in; the checkpoint's own by default."""
    batch_size: int = 1
    """Sequences in the KV cache."""
    lengths: tuple[int, ...] = LENGTHS
    """Context lengths to count KV bytes at, in tokens."""
    png: Path | None = None
    """Write the head table as an image, .png or .svg."""
    force: bool = False
    """Replace a file at --png that this command did not write."""
    json: bool = False
    """Print one JSON object instead of text."""

    @property
    def packages(self) -> tuple[str, ...]:
        """An image is drawn by a package of an extra."""
        return () if self.png is None else ("matplotlib",)

    def run(self) -> None:
        """Read the configuration, count, print."""
        if not self.lengths:
            raise ValueError("--lengths must have at least one length")
        whole_number("batch_size", self.batch_size, 1)
        for length in self.lengths:
            whole_number("lengths", length, 1)
        if self.png is not None:
            check_figure(self.png, force=self.force)
        config = loaded_config(self.model)
        config = replace(config, dtype=self.dtype or config.dtype)
        pattern = self.pattern.load(max(self.lengths))
        pattern = pattern and pattern.of(config)
        record = describe(config, pattern, self.batch_size, self.lengths)
        record["weights"]["stored_as"] = stored_as(self.model, config)
        if self.png is not None:
            if pattern is None:
                raise ValueError("--png draws a head table: give --pattern too")
            write_figure(draw(pattern), self.png, dpi=150, force=self.force)
        print(json_text(record) if self.json else _text(config, pattern, record))


def describe(config: ModelConfig, pattern: HeadPattern | None, batch_size: int, lengths: tuple[int, ...]) -> dict:
    """Everything to print, as plain values; bytes are exact."""
    if pattern is not None:
        pattern = pattern.of(config)
    heads = None
    if pattern is not None:
        heads = {
            "retrieval": pattern.num_retrieval,
            "streaming": pattern.num_streaming,
            "sink_size": int(pattern.sink_size),
            "recent_size": int(pattern.recent_size),
            "is_retrieval": pattern.is_retrieval.astype(int).tolist(),
            "window_layers": list(pattern.window_layers),
        }
    kv_bytes = [
        {
            "length": length,
            "full": KVCache.bytes_for(config, None, batch_size, length),
            "pattern": pattern and KVCache.bytes_for(config, pattern, batch_size, length),
        }
        for length in lengths
    ]
    plain = config.weight_dtype is None and config.embed_dtype is None
    size = config.num_parameters * jnp.dtype(config.dtype).itemsize if plain else weight_bytes(config)
    parameters = {"parameters": config.num_parameters, "active": config.active_parameters}
    weights = {**parameters, "bytes": size}
    model = asdict(config) | {"rope_type": config.rope.type}
    return {"model": model, "weights": weights, "heads": heads, "batch_size": batch_size, "kv_bytes": kv_bytes}


def draw(pattern: HeadPattern) -> Any:
    """Draw the head table: gates as colors, retrieval heads outlined."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, heads = pattern.is_retrieval.shape
    figure = Figure(figsize=(max(4.0, 1.6 + 0.28 * layers), max(2.4, 1.4 + 0.28 * heads)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(pattern.shown_gates.T, aspect="equal", vmin=0, vmax=1, cmap="viridis")
    for layer, head in np.argwhere(pattern.is_retrieval):
        axes.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.2))
    step = max(1, layers // 16)
    axes.set(
        xlabel="layer", ylabel="KV head", xticks=range(0, layers, step), yticks=range(0, heads, max(1, heads // 8))
    )
    axes.set_title(f"{pattern.num_retrieval} of {pattern.num_choosable} KV heads keep every token (red)", fontsize=10)
    figure.colorbar(image, label="gate", shrink=0.8)
    return figure


def _text(config: ModelConfig, pattern: HeadPattern | None, record: dict) -> str:
    lines = [
        f"{config.family}: {config.num_layers} layers, {config.num_heads} query heads, "
        f"{config.num_kv_heads} KV heads of {config.head_dim}, RoPE {config.rope.type}, "
        f"trained for {config.trained_positions} tokens",
        f"weights: {config.num_parameters / 1e6:.1f}M, {size_text(record['weights']['bytes'])} in "
        + " and ".join(filter(None, (config.dtype, config.weight_dtype, config.embed_dtype))),
    ]
    if record["weights"]["stored_as"]:
        lines.append(f"stored as: {record['weights']['stored_as']}")
    if config.num_experts:
        mixtures = sum(map(config.has_experts, range(config.num_layers)))
        lines.append(
            f"experts: {config.experts_per_token} of {config.num_experts} for a token, in {mixtures} layers; it is "
            f"computed with {config.active_parameters / 1e6:.1f}M of the weights"
        )
    if config.window_layers:
        sizes = " and ".join(str(window.size) for window in config.own_windows)
        lines.append(f"windows: {len(config.window_layers)} layers see the last {sizes} tokens (░)")
    if pattern is not None:
        lines += [
            f"heads: {pattern.num_retrieval} retrieval (█), {pattern.num_streaming} streaming (·) with "
            f"{pattern.sink_size} sinks and a window of {pattern.recent_size}",
            "",
            *(
                f"  layer {layer:>3}  "
                + "".join("░" if layer in pattern.window_layers else "█" if keeps else "·" for keeps in row)
                for layer, row in enumerate(pattern.is_retrieval)
            ),
        ]
    lines += ["", f"KV cache, batch {record['batch_size']}:", f"  {'tokens':>9}  {'full':>10}"]
    if pattern is not None:
        lines[-1] += f"  {'pattern':>10}  saved"
    for row in record["kv_bytes"]:
        lines.append(f"  {row['length']:>9}  {size_text(row['full']):>10}")
        if pattern is not None:
            lines[-1] += f"  {size_text(row['pattern']):>10}  {1 - row['pattern'] / row['full']:5.0%}"
    return "\n".join(lines)
