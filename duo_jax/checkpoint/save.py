"""Models in this library's own format: parameters as in memory, quantized ones included, so loading converts nothing.

A folder has safetensors shards, `duo_model.json` with the configuration, and the tokenizer's files.
"""

import json
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from duo_jax.arguments import path_of
from duo_jax.arrays import first_names, write_shards
from duo_jax.checkpoint.folder import GENERATION, Folder
from duo_jax.families.table import FAMILIES
from duo_jax.files import whole_folder, write_text
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.mesh.place import placement_on
from duo_jax.model.config import ModelConfig, added_fields
from duo_jax.model.model import Model, abstract_decoder, check_size
from duo_jax.model.rope import ROPES, DividedRope, Rope
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.reading import read_json
from duo_jax.sizes import FOUR_BITS

if TYPE_CHECKING:
    import transformers

CONFIG = "duo_model.json"
STEM = "model"
SAVED_ROPES = ROPES | {DividedRope.type: DividedRope}
# safetensors' names of data types.
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}


def save_model(
    model: Model,
    folder: str | Path,
    tokenizer: "transformers.PreTrainedTokenizerBase | None" = None,
    *,
    sampling: SamplingSettings | None = None,
) -> None:
    """Write a model, quantized or not, to a new folder that `load_model` reads; also its tokenizer if given.

    `sampling` are its generation settings, `LM.sampling` of a loaded model.

    Raises:
        FileExistsError: the folder is not empty.
        OSError: it could not be written, such as on a full disk; nothing is left.
        ValueError: the model is on a mesh.
    """
    if model.mesh is not None:
        raise ValueError("a model on a mesh has its weights in parts, or in another order: save it from one device")
    config = model.config.to_json()
    with whole_folder(path_of("folder", folder)) as part:
        if tokenizer is not None:
            try:
                tokenizer.save_pretrained(part)
            except Exception as error:  # tokenizers raises Exception itself, without the file.
                raise OSError(f"the tokenizer could not be written to {folder}: {error}") from None
        write_shards(part, STEM, ((name, _packed(x)) for name, x in _named(model.params)))
        if sampling is not None:
            write_text(part / GENERATION, json.dumps(sampling.to_hf(), indent=1) + "\n")
        write_text(part / CONFIG, json.dumps(config, indent=1) + "\n")


class SavedModel(Folder):
    """A folder that `save_model` wrote."""

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a folder is one."""
        return (path / CONFIG).is_file()

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path

    @cached_property
    def config(self) -> ModelConfig:
        """From `duo_model.json`."""
        try:
            values = read_json(self.path / CONFIG)
            _check_fields(values, ModelConfig)
            if values["family"] not in FAMILIES:
                raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {values['family']!r:.60}")
            ropes = {name: _saved_rope(values[name]) for name in ("rope", "window_rope") if name in values}
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            changed: dict[str, Any] = values | ropes | lists
            return ModelConfig(**changed)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path / CONFIG} is not a configuration of this version: {error!r:.200}") from None
        except ValueError as error:
            raise ValueError(error if CONFIG in str(error) else f"{self.path / CONFIG}: {error}") from None

    @cached_property
    def stored_format(self) -> None:
        """Arrays are stored as in memory."""
        return None

    def read(self, name: str) -> np.ndarray:
        """Copy one array out of its shard."""
        return self.shards.read(name)

    def load(self, *, mesh: Mesh | None, pattern: HeadPattern | None, fsdp: bool, progress: bool | None) -> Model:
        """Every parameter as it was saved; on a mesh, placed for a pattern or for full attention, or in slices.

        Raises:
            ValueError: missing, extra, misshapen or truncated arrays, by name.
        """
        stored = {name: (shape, self.shards.dtypes[name]) for name, shape in self.shards.shapes.items()}
        check_size(self.config, len(stored), str(self.path))
        graphdef, abstract = abstract_decoder(self.config)
        parameters = dict(_named(abstract))
        wrong = [name for name in {*parameters, *stored} if stored.get(name) != _packed_kind(parameters.get(name))]
        if wrong:
            raise ValueError(f"{self.path}: the arrays do not match its configuration, such as {first_names(wrong)}")
        bar = tqdm(
            parameters.items(), desc="loading", unit=" arrays", disable=None if progress is None else not progress
        )
        structure = jax.tree.structure(abstract)
        if mesh is None:
            arrays = [_unpacked(self.read(name), x.dtype) for name, x in bar]
            return Model(self.config, graphdef, jax.tree.unflatten(structure, arrays))
        placement = placement_on(self.config, mesh, pattern, fsdp=fsdp)
        paths = [path for path, variable in nnx.to_flat_state(abstract) for _ in jax.tree.leaves(variable)]
        arrays = [
            placement.put(path, _unpacked(self.read(name), x.dtype), mesh)
            for path, (name, x) in zip(paths, bar, strict=True)
        ]
        return placement.model(dict(nnx.to_flat_state(jax.tree.unflatten(structure, arrays))), mesh)


def _named(params: nnx.State) -> list[tuple[str, Any]]:
    """Every array of the parameters, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _packed(x: Array) -> Array:
    """Pack 4-bit numbers in pairs, the first in the lower half of a byte: safetensors has no such type."""
    if x.dtype.name not in FOUR_BITS:
        return x
    whole = x if x.dtype == jnp.int4 else jax.lax.bitcast_convert_type(x, jnp.dtype(jnp.uint4))
    pairs = whole.astype(jnp.uint8).reshape(*x.shape[:-1], -1, 2) & jnp.uint8(15)
    return pairs[..., 0] | pairs[..., 1] << jnp.uint8(4)


def _packed_kind(x: Any) -> tuple[tuple[int, ...], str] | None:
    """Shape and data type of an array as it is stored; None for no array."""
    if x is None:
        return None
    if x.dtype.name in FOUR_BITS:
        return (*x.shape[:-1], x.shape[-1] // 2), "U8"
    return x.shape, STORED[x.dtype.name]


def _saved_rope(values: dict[str, Any]) -> Rope:
    """The settings of RoPE, with the tuples that JSON has as lists."""
    kind = SAVED_ROPES[values.pop("type")]
    _check_fields(values, kind)
    settings: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return kind(**settings)


def _check_fields(values: dict[str, Any], kind: type[ModelConfig | Rope]) -> None:
    """Raise KeyError for a field that is missing: its default would be another model's."""
    missing = [field.name for field in fields(kind) if field.name not in (*values, *added_fields())]
    if missing:
        raise KeyError(*missing)


def _unpacked(x: np.ndarray, dtype: jnp.dtype) -> Array:
    if dtype.name not in FOUR_BITS:
        return jnp.asarray(x, dtype)
    numbers = np.stack([x & 15, x >> 4], axis=-1).reshape(*x.shape[:-1], -1).astype(np.int8)
    if dtype == jnp.float4_e2m1fn:
        return jax.lax.bitcast_convert_type(jnp.asarray(numbers, jnp.uint4), jnp.dtype(jnp.float4_e2m1fn))
    return jnp.asarray(np.where(numbers > 7, numbers - 16, numbers), jnp.int4)
