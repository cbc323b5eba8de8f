"""A GGUF file: configuration, tokenizer and quantized weights in one, read as a checkpoint with Hugging Face names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import dequantize

from duo_jax.checkpoint.gguf_architectures import ARCHITECTURES, Architecture
from duo_jax.checkpoint.gguf_blocks import ON_DEVICE, Blocks, in_halves
from duo_jax.checkpoint.gguf_config import config_from_gguf
from duo_jax.checkpoint.gguf_reader import GgufHeader, read_header
from duo_jax.checkpoint.gguf_tokenizer import GgufTokenizer
from duo_jax.checkpoint.source import Source
from duo_jax.checkpoint.weight_table import check_tensors, weight_table
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.model.config import ModelConfig
from duo_jax.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import transformers

ROPE_DIVISORS = "rope_freqs.weight"
# Keys of a model in several files, and what they are for a model in one.
SPLIT = {"no": 0, "count": 0, "tensors.count": 0}
MAX_PARTS = 1000


class GgufFile(Source):
    """See `Source`. Weights are dequantized tensor by tensor as they are read."""

    def __init__(self, path: Path) -> None:
        """Read the header, and those of the other parts if the model is split over several files."""
        self.path = path
        parts = _parts(path)
        self._files = [part.path for part in parts]
        self.metadata = parts[0].metadata
        tensors = [tensor for part in parts for tensor in part.tensors]
        arch = self.metadata.get("general.architecture")
        # An unknown one is refused with the configuration.
        self._row = (isinstance(arch, str) and ARCHITECTURES.get(arch)) or Architecture("")
        self._tensors = {self._row.hf_name(tensor.name): tensor for tensor in tensors}
        if len(self._tensors) < len(tensors):
            raise ValueError(f"{path} has a tensor twice, or under two names; download it again")

    @cached_property
    def config(self) -> ModelConfig:
        """From the metadata, and compared with the tensors."""
        divisors = None
        if ROPE_DIVISORS in self._tensors:
            divisors = tuple(float(x) for x in self.read(ROPE_DIVISORS).flat)
        shapes = self.shapes
        with self._named():
            config = config_from_gguf(self.metadata, shapes, divisors=divisors)
        check_tensors(self.shapes, weight_table(config), config, label=str(self.path))
        return config

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all weights. Unsupported quantizations are refused here."""
        for kind, tensor in {tensor.kind: tensor for tensor in self._tensors.values()}.items():
            try:
                dequantize(tensor.data()[:1], kind)
            except NotImplementedError:
                raise NotImplementedError(
                    f"{self.path}: {tensor.name} is {kind.name}, which gguf cannot dequantize"
                ) from None
        return {name: tensor.shape for name, tensor in self._tensors.items() if name != ROPE_DIVISORS}

    @property
    def files(self) -> Sequence[Path]:
        """The file, or all parts of a split model."""
        return self._files

    def read(self, name: str) -> np.ndarray:
        """Dequantize one tensor, and make it Hugging Face's: the order of q and k rows, and norms without 1 added."""
        tensor, pairs = self._tensors[name], self._pairs(name)
        values = dequantize(tensor.data(), tensor.kind).reshape(tensor.shape)
        if self._row.norms_plus_one and name.endswith("norm.weight"):
            values = values - np.float32(1)
        return values if pairs is None else in_halves(values, pairs)

    def stored(self, name: str) -> np.ndarray | Blocks:
        """See `Source`."""
        tensor = self._tensors[name]
        if tensor.kind not in ON_DEVICE or len(tensor.shape) != 2:
            return self.read(name)
        return Blocks(tensor.data(), tensor.kind, self._pairs(name))

    def _pairs(self, name: str) -> int | None:
        """Pairs of a head's rows that the file has next to each other."""
        is_paired = self._row.paired_rope and (".q_proj." in name or ".k_proj." in name)
        return self.config.head_dim // 2 if is_paired else None

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """From the metadata."""
        return self._tokenizer().to_transformers()

    def text_tokenizer(self) -> TextTokenizer:
        """From the metadata."""
        return self._tokenizer()

    def _tokenizer(self) -> GgufTokenizer:
        with self._named():
            return GgufTokenizer.read(self.metadata)

    @property
    def sampling(self) -> SamplingSettings:
        """From the metadata."""
        with self._named():
            return SamplingSettings.from_gguf(self.metadata)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the file's name before the message of an error."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        except NotImplementedError as error:
            raise NotImplementedError(f"{self.path}: {error}") from None


def _parts(path: Path) -> list[GgufHeader]:
    """The headers of a model's files: the one given, and those that it says belong to it."""
    first = read_header(path)
    split = {key: value for key, value in first.metadata.items() if key.startswith("split.")}
    number, count, total = (split.pop(f"split.{key}", default) for key, default in SPLIT.items())
    if split or any(type(value) is not int for value in (number, count, total)):
        raise NotImplementedError(f"{path}: the metadata {split or 'split.*'} of a split model is not supported")
    if count <= 1:
        return [first]
    if number != 0 or not path.name.endswith(_part(0, count)):
        raise ValueError(
            f"{path} is part {number + 1} of {count} of a split model: give the first part, NAME{_part(0, count)}"
        )
    parts = [first]
    for index in range(1, min(count, MAX_PARTS + 1)):
        other = path.with_name(path.name.removesuffix(_part(0, count)) + _part(index, count))
        if not other.is_file():
            raise FileNotFoundError(f"{path} is part 1 of {count} of a split model, and {other} is missing")
        parts.append(read_header(other))
        if [parts[-1].metadata.get(f"split.{key}") for key in ("no", "count")] != [index, count]:
            raise ValueError(f"{other} is not part {index + 1} of {count}, as its name says; download it again")
    if (stored := sum(len(part.tensors) for part in parts)) != total or len(parts) != count:
        raise ValueError(f"{path}: the model has {total} tensors in {count} files, but they have {stored}")
    return parts


def _part(index: int, count: int) -> str:
    """The end of a part's name, as llama.cpp writes it."""
    return f"-{index + 1:05d}-of-{count:05d}.gguf"
