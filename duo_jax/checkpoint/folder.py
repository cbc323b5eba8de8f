"""A Hugging Face folder: `config.json`, one or more safetensors shards, tokenizer files."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from duo_jax.arrays import Shards
from duo_jax.checkpoint.source import Source
from duo_jax.config import ModelConfig
from duo_jax.reading import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Folder(Source):
    """See `Source`. Reads tensor by tensor; one shard is open at a time."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json: it is not a Hugging Face model folder")

    @cached_property
    def config(self) -> ModelConfig:
        """From `config.json`, with EOS ids from `generation_config.json`, where chat models have the end of a turn."""
        raw = read_json(self.path / "config.json")
        if raw.get("model_type") is None:
            raise ValueError(f"{self.path / 'config.json'} has no model_type: it is not a Hugging Face configuration")
        try:
            values = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False).to_dict()
        except StrictDataclassError as error:
            raise ValueError(f"{self.path / 'config.json'} contradicts itself: {error}") from None
        except (ValueError, KeyError):
            # transformers does not know the architecture: our own error names it and the supported ones.
            values = raw
        generation = self.path / "generation_config.json"
        if generation.is_file():
            values["eos_token_id"] = read_json(generation).get("eos_token_id", values.get("eos_token_id"))
        return ModelConfig.from_hf(values)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """From the shards' headers."""
        try:
            return self._shards.shapes
        except ValueError as error:
            raise ValueError(f"{error}; download it again") from None

    def read(self, name: str) -> np.ndarray:
        """Copy one tensor out of its shard."""
        return self._shards.read(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """By transformers."""
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # On a file that cannot be parsed, tokenizers raises Exception itself.
            raise FileNotFoundError(
                f"{self.path} has no tokenizer that transformers can load ({type(error).__name__}: {error}); "
                "put the model's tokenizer files into the folder of its weights"
            ) from None

    @cached_property
    def _shards(self) -> Shards:
        """The files with tensors."""
        if (self.path / INDEX).is_file():
            shards = sorted(set(_weight_map(self.path / INDEX).values()))
        elif (self.path / SINGLE).is_file():
            shards = [SINGLE]  # Other files have the model in another layout (consolidated), or adapters.
        else:
            shards = sorted(path.name for path in self.path.glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(
                f"{self.path} has no *.safetensors file; convert other formats with transformers first"
            )
        missing = [name for name in shards if not (self.path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.path} lacks the shards {missing} that {INDEX} names; download them again")
        return Shards([self.path / name for name in shards])


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensors to shards; download it again")
    return weight_map
