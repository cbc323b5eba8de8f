"""The loader's view of a checkpoint: a configuration, tensors by Hugging Face's names, and a tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from duo_jax.checkpoint.gguf_blocks import Blocks
from duo_jax.checkpoint.mxfp4 import Mxfp4
from duo_jax.checkpoint.stored import Packed
from duo_jax.families.quantization import StoredFormat
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.model.config import ModelConfig
from duo_jax.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import transformers


class Source(ABC):
    """A checkpoint on disk.

    Attributes:
        path: its file or folder.
    """

    path: Path

    @property
    @abstractmethod
    def config(self) -> ModelConfig:
        """The model's configuration."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name; linear weights as `[out, in]`."""

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that the tensors are read from, in a fixed order."""

    @property
    def stored_format(self) -> StoredFormat | None:
        """How a folder of another library has its weights quantized; None: not, or tensor by tensor."""
        return None

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor's values, in the data type that they are stored in; quantized ones in float32."""

    def stored(self, name: str) -> np.ndarray | Blocks | Packed | Mxfp4:
        """As `read`, but values that the device can dequantize are still quantized."""
        return self.read(name)

    @abstractmethod
    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """The tokenizer that came with the weights."""

    def text_tokenizer(self) -> TextTokenizer:
        """As `tokenizer`, without transformers where that is possible: its import takes 0.6 s."""
        return self.tokenizer()

    @property
    def sampling(self) -> SamplingSettings:
        """How the model's authors choose tokens; a checkpoint without such settings takes the most likely one."""
        return SamplingSettings()
