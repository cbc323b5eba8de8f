"""What a checkpoint is to the loader: a configuration, tensors by Hugging Face's names, and a tokenizer."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from duo_jax.config import ModelConfig


class Source(Protocol):
    """A checkpoint on disk."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name; linear weights as `[out, in]`."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor's values, in the data type that they are stored in (float32 where that is a quantized one)."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the weights."""
        ...
