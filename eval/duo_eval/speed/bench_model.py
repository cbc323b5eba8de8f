"""The model that engines are measured on: a checkpoint, or random weights in the shape of a preset."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duo_jax import PRESETS, HeadPattern, Model, ModelConfig, load_model
from duo_jax.checkpoint.open import open_source
from duo_jax.checkpoint.source import Source

# Sinks and recent tokens of streaming heads by default: the paper's sizes for efficiency (section 3.1).
SINK_SIZE, RECENT_SIZE = 128, 256


@dataclass(frozen=True)
class BenchModel:
    """A checkpoint, or a preset (`llama-3-8b`) with random weights, whole or only its first layers."""

    source: str
    layers: int | None = None
    dtype: str = "float32"

    @property
    def is_random(self) -> bool:
        """Whether the weights are random."""
        return not Path(self.source).exists() and self.source.lower() in PRESETS

    @property
    def name(self) -> str:
        """The source, and how many of its layers if not all."""
        if self.layers is None:
            return self.source
        return f"{self.source}, {self.layers} of {self._whole.num_layers} layers"

    @property
    def config(self) -> ModelConfig:
        """The shape; no weights are read.

        Raises:
            FileNotFoundError: neither a checkpoint nor a preset.
            ValueError: more layers than the model has, or only some layers of a checkpoint.
        """
        config = self._whole
        if self.layers is None:
            return replace(config, dtype=self.dtype)
        if not self.is_random:
            raise ValueError(f"--layers cuts presets with random weights, not {self.source}: leave it out")
        if not 1 <= self.layers <= config.num_layers:
            raise ValueError(f"--layers must be in [1, {config.num_layers}] for {self.source}, got {self.layers}")
        return replace(config.first_layers(self.layers), dtype=self.dtype)

    @property
    def _whole(self) -> ModelConfig:
        return PRESETS[self.source.lower()] if self.is_random else open_source(self.source, weights=False).config

    def load(self) -> Model:
        """The weights, on the default device."""
        return Model.random(self.config) if self.is_random else load_model(self.source, dtype=self.dtype)

    def tensors(self) -> Source | None:
        """The checkpoint's tensors; None if the weights are random."""
        return None if self.is_random else open_source(self.source)

    def pattern(
        self, source: str | None, sparsity: float, sink_size: int | None, recent_size: int | None
    ) -> HeadPattern:
        """Heads of a pattern, or random ones: the cost depends on how many stream, hardly on which.

        With only some layers, the pattern is cut to them, and the sparsity is that of the remaining layers.

        Raises:
            ValueError: a pattern of another model, or a sparsity outside [0, 1].
        """
        config = self.config
        if source is None:
            gates = np.random.default_rng(0).random((config.num_layers, config.num_kv_heads))
            sink_size = SINK_SIZE if sink_size is None else sink_size
            recent_size = RECENT_SIZE if recent_size is None else recent_size
        else:
            pattern = HeadPattern.load(source, sink_size=sink_size, recent_size=recent_size).of(self._whole)
            gates, sink_size, recent_size = pattern.gates[: config.num_layers], pattern.sink_size, pattern.recent_size
        sizes: dict[str, Any] = {"sink_size": sink_size, "recent_size": recent_size}
        return HeadPattern.from_gates(gates, sparsity=sparsity, **sizes, window_layers=config.window_layers)
