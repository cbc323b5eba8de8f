"""A Hugging Face folder: `config.json`, one or more safetensors shards, tokenizer files."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from duo_jax.checkpoint.source import Source
from duo_jax.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Folder(Source):
    """See `Source`. Reads tensor by tensor; one shard is open at a time."""

    def __init__(self, path: Path) -> None:
        """Find the shards; nothing is read yet."""
        self.path = path
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json: it is not a Hugging Face model folder")
        self._open: tuple[Path, safe_open] | None = None

    @cached_property
    def config(self) -> ModelConfig:
        """From `config.json`; EOS ids from `generation_config.json` too, where chat models keep the end of a turn."""
        raw = read_json(self.path / "config.json")
        if raw.get("model_type") is None:
            raise ValueError(f"{self.path / 'config.json'} has no model_type: it is not a Hugging Face configuration")
        try:
            values = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False).to_dict()
        except StrictDataclassError as error:
            raise ValueError(f"{self.path / 'config.json'} contradicts itself: {error}") from None
        except (ValueError, KeyError):
            # transformers does not know the architecture: our own refusal names it and what is supported.
            values = raw
        generation = self.path / "generation_config.json"
        if generation.is_file():
            values["eos_token_id"] = read_json(generation).get("eos_token_id", values.get("eos_token_id"))
        return ModelConfig.from_hf(values)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """From the shards' headers."""
        return {name: shape for name, (_, shape) in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Copy one tensor out of its shard."""
        shard, _ = self._tensors[name]
        if self._open is None or self._open[0] != shard:
            self._open = None  # Unmap the last shard before the next: only one counts towards host memory.
            self._open = shard, safe_open(shard, framework="numpy")
        return self._open[1].get_tensor(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """By transformers."""
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # On a file that cannot be parsed, tokenizers raises Exception itself.
            raise FileNotFoundError(
                f"{self.path} has no tokenizer that transformers can load ({type(error).__name__}: {error}); "
                "put the model's tokenizer files beside its weights"
            ) from None

    @cached_property
    def _tensors(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """Shard and shape of every tensor."""
        if (self.path / INDEX).is_file():
            shards = sorted(set(_weight_map(self.path / INDEX).values()))
        elif (self.path / SINGLE).is_file():
            shards = [SINGLE]  # Others beside it hold the model in another layout (consolidated), or adapters.
        else:
            shards = sorted(path.name for path in self.path.glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(
                f"{self.path} has no *.safetensors file; convert other formats with transformers first"
            )
        missing = [name for name in shards if not (self.path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.path} lacks the shards {missing} that {INDEX} names; download them again")
        return {
            name: (self.path / shard, shape) for shard in shards for name, shape in _header(self.path / shard).items()
        }


def read_json(path: Path) -> dict:
    """The object in a file of JSON, or a ValueError with the path."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensors to shards; download it again")
    return weight_map


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a shard's tensors; a truncated file is told by name, where the library says only that it is invalid."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size else b""
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        ends = {name: 8 + length + int(entry["data_offsets"][1]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is truncated or not a safetensors file; download it again") from None
    cut = [name for name, end in ends.items() if end > size]
    if cut:
        raise ValueError(
            f"{path} is truncated: it has {size} bytes of {max(ends.values())}, so that {_names(cut)} cannot be read; "
            "download it again"
        )
    try:
        with safe_open(path, framework="numpy") as shard:
            return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}; download it again") from None


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
