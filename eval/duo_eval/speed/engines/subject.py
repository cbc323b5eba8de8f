"""What engines are measured on: the weights of a checkpoint, or random ones in the shape of a preset."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duo_jax import PRESETS, HeadPattern, Model, ModelConfig, load_model
from duo_jax.checkpoint.load import open_source
from duo_jax.checkpoint.source import Source

# What streaming heads keep where no pattern says it: the paper's sizes for efficiency (section 3.1).
SINK_SIZE, RECENT_SIZE = 128, 256


@dataclass(frozen=True)
class Subject:
    """A model to measure: a checkpoint, or a preset (`llama-3-8b`) with random weights, whole or its first layers."""

    model: str
    layers: int | None = None
    dtype: str = "float32"

    @property
    def is_random(self) -> bool:
        """Whether the weights are made up."""
        return not Path(self.model).exists() and self.model.lower() in PRESETS

    @property
    def name(self) -> str:
        """What was measured; of a cut model, how much of it."""
        return self.model if self.layers is None else f"{self.model}, {self.layers} of {self._whole.num_layers} layers"

    @property
    def config(self) -> ModelConfig:
        """The shape; no weights are read.

        Raises:
            FileNotFoundError: neither a checkpoint nor a preset.
            ValueError: layers that the model has not, or of a checkpoint.
        """
        config = self._whole
        if self.layers is None:
            return replace(config, dtype=self.dtype)
        if not self.is_random:
            raise ValueError(f"--layers cuts presets with random weights, not {self.model}: leave it out")
        if not 1 <= self.layers <= config.num_layers:
            raise ValueError(f"--layers must be in [1, {config.num_layers}] for {self.model}, got {self.layers}")
        return replace(config, dtype=self.dtype, num_layers=self.layers)

    @property
    def _whole(self) -> ModelConfig:
        return PRESETS[self.model.lower()] if self.is_random else open_source(self.model, weights=False).config

    def load(self) -> Model:
        """The weights, on the default device."""
        return Model.random(self.config) if self.is_random else load_model(self.model, dtype=self.dtype)

    def source(self) -> Source | None:
        """The checkpoint's tensors; None where the weights are random."""
        return None if self.is_random else open_source(self.model)

    def pattern(
        self, source: str | None, sparsity: float, sink_size: int | None, recent_size: int | None
    ) -> HeadPattern:
        """Heads of a pattern, or random ones: what they cost depends on how many stream, hardly on which.

        Of a cut model, the pattern's first layers, and the sparsity is that of these.

        Raises:
            ValueError: a pattern of another model, or a sparsity outside [0, 1].
        """
        config = self.config
        if source is None:
            gates = np.random.default_rng(0).random((config.num_layers, config.num_kv_heads))
            sink_size = SINK_SIZE if sink_size is None else sink_size
            recent_size = RECENT_SIZE if recent_size is None else recent_size
        else:
            pattern = HeadPattern.load(source, sink_size=sink_size, recent_size=recent_size)
            pattern.check(self._whole)
            gates, sink_size, recent_size = pattern.gates[: config.num_layers], pattern.sink_size, pattern.recent_size
        return HeadPattern.from_gates(gates, sparsity=sparsity, sink_size=sink_size, recent_size=recent_size)
