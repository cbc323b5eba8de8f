"""A Hugging Face folder: `config.json`, one or more safetensors shards, tokenizer files."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePath
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from duo_jax.arrays import Shards, first_names
from duo_jax.checkpoint.layouts import UNUSED
from duo_jax.checkpoint.mxfp4 import BLOCKS, SCALES, Mxfp4, mxfp4_shapes
from duo_jax.checkpoint.source import Source
from duo_jax.checkpoint.stored import Packed, checked, parts_of, with_format
from duo_jax.checkpoint.weight_table import check_experts, linear_maps, weight_table
from duo_jax.families.hugging_face import eos_ids
from duo_jax.families.quantization import StoredFormat, stored_format
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.model.config import ModelConfig
from duo_jax.reading import read_json, read_text, without_marks
from duo_jax.text.tokens import special_tokens

if TYPE_CHECKING:
    import transformers

T = TypeVar("T")

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Data types of weights by safetensors' names, and as configurations name them.
FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Files that tokenizers are made of, in the order in which they are looked at for what is wrong.
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Tensors of the text model in a model of text and images, in the two layouts that transformers wrote.
TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|)(embed_tokens|layers|norm|lm_head)(\..*)"
)
MOST_NAME_BYTES = 255  # Of file systems.
MOST_TOKENIZER_BYTES = 1 << 28  # Published ones have up to 35 MB.
_TOKEN, _FLAG = (str, dict, NoneType), (bool, NoneType)
TOKENIZER_TYPES: dict[str, tuple[type, ...]] = {
    "model_max_length": (int, float, NoneType),
    "chat_template": (str, list, dict, NoneType),
    "added_tokens_decoder": (dict, NoneType),
    "tokenizer_class": (str, NoneType),
    "padding_side": (str,),
    "truncation_side": (str,),
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"), _TOKEN),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"), _FLAG),
    **dict.fromkeys(("clean_up_tokenization_spaces", "legacy"), _FLAG),
}


class Folder(Source):
    """See `Source`. Reads tensor by tensor."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        if not (path / CONFIG).exists():
            raise FileNotFoundError(f"{path} has no {CONFIG}: it is not a Hugging Face model folder")

    @cached_property
    def config(self) -> ModelConfig:
        """From `config.json`, with EOS ids from `generation_config.json`, where chat models have the end of a turn."""
        values = read_json(self.path / CONFIG)
        if values.get("model_type") is None:
            raise ValueError(f"{self.path / CONFIG} has no model_type: it is not a Hugging Face configuration")
        if values.get("dtype") is None and values.get("torch_dtype") is None:
            values["dtype"] = self._stored_dtype()
        config = _named(self.path / CONFIG, ModelConfig.from_hf, values)
        if self.stored_format is not None:
            config = _named(self.path / CONFIG, with_format, config, self.stored_format, linear_maps(config))
        settings = values.get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method") == "mxfp4":
            config = _named(self.path / CONFIG, lambda: replace(config, weight_dtype="mxfp4"))
        if "eos_token_id" not in self._generation:
            return config
        ids = eos_ids(self._generation["eos_token_id"])
        return _named(self.path / GENERATION, lambda: replace(config, eos_ids=ids))

    @property
    def sampling(self) -> SamplingSettings:
        """From `generation_config.json`."""
        return _named(self.path / GENERATION, SamplingSettings.from_hf, self._generation)

    @cached_property
    def _generation(self) -> dict[str, Any]:
        path = self.path / GENERATION
        return read_json(path) if path.exists() else {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """From the shards' headers. Tensors that are neither floating-point numbers nor quantized are refused here."""
        modules = {part: name for name, parts in self._quantized.items() for part in parts.values()}
        unused = UNUSED if self._quantized else ()
        shapes = {}
        for name, stored in self._names.items():
            if stored in modules:
                shapes[modules[stored]] = self._linear_shapes[modules[stored]]
            elif not name.endswith(unused):
                if (dtype := self.shards.dtypes[stored]) not in FLOATS:
                    raise NotImplementedError(
                        f"{self.shards.paths[stored]}: {stored} is stored as {dtype}, and weights in a folder must "
                        f"be one of {', '.join(FLOATS)}, unless its quantization_config says how they are quantized"
                    )
                shapes[name] = self.shards.shapes[stored]
        return shapes | self._mxfp4

    @cached_property
    def stored_format(self) -> StoredFormat | None:
        """From `config.json`."""
        values = read_json(self.path / CONFIG)
        text = values.get("text_config")
        return _named(self.path / CONFIG, stored_format, {**(text if isinstance(text, dict) else {}), **values})

    @cached_property
    def _linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that may be quantized, by name."""
        kernels = (
            weight for weight in weight_table(self.config).values() if weight.is_kernel and not weight.is_stacked
        )
        return {name: shape for weight in kernels for name, shape in zip(weight.names, weight.shapes, strict=True)}

    @cached_property
    def _quantized(self) -> dict[str, dict[str, str]]:
        """The arrays of each quantized tensor, see `parts_of`."""
        if self.stored_format is None:
            return {}
        shapes = {name: self.shards.shapes[stored] for name, stored in self._names.items()}
        check_experts(shapes, weight_table(self.config).values(), self.config, str(self.path))
        maps = {module for modules in linear_maps(self.config).values() for module in modules}
        return _named(self.path, parts_of, self.stored_format, self._linear_shapes, self._names, self.shards, maps)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names of the model's tensors -> those in the shards; of a model of text and images, those of its text."""
        packed = {f"{name}{part}" for name in self._mxfp4 for part in (BLOCKS, SCALES)}
        stored = [name for name in self.shards.shapes if name not in packed]
        if "text_config" not in read_json(self.path / CONFIG):
            return {name: name for name in stored}
        parts = {name: match.groups() for name in stored if (match := TEXT.fullmatch(name))}
        return {f"{'' if part == 'lm_head' else 'model.'}{part}{rest}": name for name, (part, rest) in parts.items()}

    @cached_property
    def _mxfp4(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are stored as blocks and scales."""
        return mxfp4_shapes(self.shards.shapes, self.shards.dtypes)

    @property
    def files(self) -> Sequence[Path]:
        """The shards that are in use."""
        return self.shards.files

    def read(self, name: str) -> np.ndarray:
        """Copy one tensor out of its shard."""
        stored = self.stored(name)
        return stored if isinstance(stored, np.ndarray) else np.asarray(stored.values())

    def stored(self, name: str) -> np.ndarray | Packed | Mxfp4:
        """As `read`, but quantized tensors are as they are stored."""
        if name in self._mxfp4:
            return Mxfp4(*(self.shards.read(f"{name}{part}") for part in (BLOCKS, SCALES)))
        if self.stored_format is None or name not in self._quantized:
            return self.shards.read(self._names[name])
        arrays = {what: self.shards.read(stored) for what, stored in self._quantized[name].items()}
        return _named(self.path, checked, name, arrays, self.stored_format.coding, self._linear_shapes[name])

    def tokenizer(self) -> "transformers.PreTrainedTokenizerBase":
        """By transformers."""
        files = [self.path / name for name in TOKENIZER_FILES if (self.path / name).exists()]
        for file in files:
            # transformers reads files whole, and would wait for a pipe.
            if not file.is_file() or file.stat().st_size > MOST_TOKENIZER_BYTES:
                raise ValueError(f"{file} must be a regular file of at most {MOST_TOKENIZER_BYTES} bytes")
        if self.path / TOKENIZER_CONFIG in files:
            _check_tokenizer_config(self.path / TOKENIZER_CONFIG)
        try:
            from transformers import AutoTokenizer  # 0.5 s

            with without_marks(self.path, (CONFIG, *TOKENIZER_FILES)) as path:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            tokenizer.name_or_path = str(self.path)  # Not a temporary folder: lm-eval names its cache after it.
            for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
                if getattr(tokenizer, name, None) == "":  # For none: transformers would look for its id without end.
                    setattr(tokenizer, name, None)
            special_tokens(tokenizer)  # Raises for one without an id.
            return tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises Exception itself, and where it panics, a BaseException.
            raise FileNotFoundError(
                f"{self.path} has no tokenizer that transformers can load ({_reason(files, error)}); "
                "put the model's tokenizer files into the folder of its weights"
            ) from None

    @cached_property
    def shards(self) -> Shards:
        """The files with tensors.

        Raises:
            FileNotFoundError: there are none, or one that the index names is missing.
            ValueError: files that are damaged, or that differ from the index.
        """
        single, index = self.path / SINGLE, self.path / INDEX
        if not single.exists() and index.exists():
            return self._indexed(index)
        if single.exists():
            if index.exists():
                warnings.warn(
                    f"{self.path} has {SINGLE} and {INDEX}: the first is used, as by transformers", stacklevel=2
                )
            paths = [single]  # Other files have the model in another layout (consolidated), or adapters.
        else:
            paths = sorted(self.path.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"{self.path} has no *.safetensors file; convert other formats with transformers first"
            )
        return _readable(Shards(paths))

    def _indexed(self, index: Path) -> Shards:
        """The shards that the index names, each with the tensors that it should have."""
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensors to shards; download it again")
        names = sorted(set(weight_map.values()))
        # A name, not where a link points to: in the hub's cache, every file is a link.
        if outside := [name for name in names if PurePath(name).is_absolute() or ".." in PurePath(name).parts]:
            raise ValueError(f"{index} names files outside its folder: {first_names(outside)}")
        if long := [name for name in names if len(name.encode()) > MOST_NAME_BYTES]:
            raise ValueError(
                f"{index} names a file of {len(long[0])} characters, {long[0][:40]}..., which cannot exist"
            )
        missing = [name for name in names if not (self.path / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{self.path} lacks the shards {first_names(missing)} that {INDEX} names; download them again"
            )
        shards = _readable(Shards([self.path / name for name in names]))
        wrong = [name for name, shard in weight_map.items() if shards.paths.get(name) != self.path / shard]
        if wrong:
            raise ValueError(
                f"{index} names {first_names(wrong)} in {weight_map[wrong[0]]}, which does not have it; "
                "download both again"
            )
        return shards

    def _stored_dtype(self) -> str:
        """Data type of the first tensor, as transformers uses for a configuration that names none."""
        try:
            dtypes = self.shards.dtypes.values()
        except FileNotFoundError:  # A configuration without weights.
            return "float32"
        return next((FLOATS[dtype] for dtype in dtypes if dtype in FLOATS), "float32")


def _readable(shards: Shards) -> Shards:
    try:
        shards.shapes  # noqa: B018  # Reads the headers.
    except ValueError as error:
        raise ValueError(f"{error}; download it again") from None
    return shards


def _named(file: Path, make: Callable[..., T], *values: Any) -> T:
    """What `make` returns, or its error with the file."""
    try:
        return make(*values)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_tokenizer_config(path: Path) -> None:
    """Check the types of what is used long after the tokenizer was made."""
    for name, value in read_json(path).items():
        kinds = TOKENIZER_TYPES.get(name)
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise ValueError(f"{path}: {name} must be {expected}, got {str(value)[:60]!r}")


def _reason(files: list[Path], error: BaseException) -> str:
    """What is wrong: the first file that cannot be read, or else what was raised."""
    for file in files:
        try:
            read_json(file) if file.suffix == ".json" else file.suffix != ".model" and read_text(file)
        except (ValueError, OSError) as wrong:
            return str(wrong)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
