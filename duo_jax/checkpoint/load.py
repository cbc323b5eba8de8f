"""load_model: check the name and shape of every tensor, then read and place them one by one."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from duo_jax.arguments import instance
from duo_jax.certified import certify_model
from duo_jax.checkpoint.open import open_config, open_source, usual_dtype
from duo_jax.checkpoint.parameters import read_parameter
from duo_jax.checkpoint.save import SavedModel
from duo_jax.checkpoint.source import Source
from duo_jax.checkpoint.weight_table import Weight, check_tensors, linear_maps, weight_table
from duo_jax.families.quantization import StoredFormat
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.place import placement_on
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model, abstract_decoder, check_size
from duo_jax.model.precision import AnyDtype, name_of
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.programs import keep_programs

if TYPE_CHECKING:
    import qwix  # imported when weights are quantized


def load_model(
    source: str | Path,
    *,
    dtype: AnyDtype | None = None,
    weight_dtype: AnyDtype | None = None,
    embed_dtype: AnyDtype | None = None,
    mesh: Mesh | None = None,
    pattern: HeadPattern | None = None,
    fsdp: bool = False,
    accept_terms: bool = False,
    progress: bool | None = None,
) -> Model:
    """Load pretrained weights, tensor by tensor, onto the default device or the devices of a mesh.

    From then on, jax stores compiled programs on disk, see `duo_jax.programs`. On a GPU, attention backends that were
    not checked there yet are checked first, for up to two minutes, unless `duo_jax.certify` was called before: for
    `pattern`, otherwise for full attention and the window of most patterns, with a cache of the weights' data type.

    Args:
        source: a Hugging Face folder, a GGUF file, a packaged model's name, or a hub id.
        dtype: data type of the weights; by default the checkpoint's, but float32 on a CPU, which has no fast bfloat16.
        weight_dtype: quantize the linear maps of the layers, each right after it is read: int8, w8a8 (int8, activations
            too), int4 (a scale for every 64 input channels), int4-32, int4-128 or another name of `WEIGHT_FORMATS`; by
            default, those of a quantized checkpoint stay as they are stored where one of these has the same values.
        embed_dtype: quantize embeddings and head: int8, int4, int4-32 or int4-128; by default they are not quantized.
        mesh: devices that share the weights, from `make_mesh`; each gets its part of a tensor right after it is read.
        pattern: which heads will stream, only with a mesh: it balances retrieval heads over the devices, to within one
            in every layer and in total (see `duo_jax.mesh.balance`). Caches must have this pattern, or another that
            puts the heads on the same devices. None: full attention.
        fsdp: with a mesh, give every device a slice of each array and gather a layer when it is used, for training
            (`duo_jax.mesh.fsdp`); by default devices share heads, for inference.
        accept_terms: the user has read and accepts the terms of use that a packaged model has.
        progress: show a progress bar; by default only in a terminal.

    Raises:
        FileNotFoundError, PermissionError: the path does not exist or is not readable, or a packaged model has terms of
            use that were not accepted; the message has a remedy.
        NotImplementedError: an architecture, feature or quantization that is not supported, by name.
        ValueError: missing, extra, misshapen or truncated tensors, by name; a mesh that cannot share the model; a
            pattern of another model, without a mesh, or with `fsdp`; more weights than the host has memory.
    """
    keep_programs()
    _check_placement(mesh, pattern, fsdp=fsdp)
    checkpoint = open_source(source, accept_terms=accept_terms)
    if pattern is not None:
        instance("pattern", pattern, HeadPattern, "HeadPattern.load makes one from a name or folder").check(
            checkpoint.config
        )
    certify_model(checkpoint.config.with_dtypes(dtype=dtype), pattern=pattern, mesh=mesh, trains=fsdp)
    dtypes = {"dtype": dtype, "weight_dtype": weight_dtype, "embed_dtype": embed_dtype}
    if isinstance(checkpoint, SavedModel):
        _check_saved(source, checkpoint.config, dtypes)
        return checkpoint.load(mesh=mesh, pattern=pattern, fsdp=fsdp, progress=progress)
    config = checkpoint.config.with_dtypes(**dtypes | {"dtype": usual_dtype(checkpoint.config, dtype)})
    check_size(config, len(checkpoint.shapes), str(source))
    _report_conversion(checkpoint, config)
    config = _with_stored_head(checkpoint, config, str(source))
    placement = None if mesh is None else placement_on(config, mesh, pattern, fsdp=fsdp)
    graphdef, abstract = abstract_decoder(config)
    flat = dict(nnx.to_flat_state(abstract))
    for path, value in _weights(checkpoint, config, str(source), on_host=mesh is not None, progress=progress):
        placed = value if placement is None or mesh is None else placement.put(path, value, mesh)
        flat[path] = flat[path].replace(placed)
    if placement is not None and mesh is not None:
        return placement.model(flat, mesh)
    return Model(config, graphdef, nnx.from_flat_state(flat.items()))


def _check_placement(mesh: Mesh | None, pattern: HeadPattern | None, *, fsdp: bool) -> None:
    """Check which of the arguments that place weights on devices are given together."""
    MeshSize.of(mesh)  # Refuses what is not a mesh.
    if pattern is not None and mesh is None:
        raise ValueError(
            "pattern= places heads on the devices of a mesh: give mesh= too, or give the pattern to duo_jax.load, "
            "generate or KVCache.init"
        )
    if fsdp and (mesh is None or pattern is not None):
        raise ValueError(
            "fsdp=True slices weights over the devices of a mesh and places no heads: give mesh=, and no pattern="
        )


def _check_saved(source: str | Path, config: ModelConfig, dtypes: dict[str, Any]) -> None:
    """Check that no other data types are asked for than those that a model was saved with."""
    asked = {name: name_of(value) for name, value in dtypes.items() if value is not None}
    saved = {name: getattr(config, name) for name in dtypes}
    if not asked.items() <= saved.items():
        raise ValueError(f"{source} was saved with {saved}, which cannot be changed to {asked}: load the original")


def _weights(
    checkpoint: Source, config: ModelConfig, label: str, *, on_host: bool, progress: bool | None
) -> Iterator[tuple[tuple[str | int, ...], "Array | np.ndarray | qwix.QArray"]]:
    """Each parameter as it is stored in the model, once all names and shapes were checked; with a progress bar."""
    table = weight_table(config)
    check_tensors(checkpoint.shapes, table, config, label=label)
    counts = {path: sum(int(np.prod(shape)) for shape in weight.shapes) for path, weight in table.items()}
    options: dict[str, Any] = {"unit": " weights", "unit_scale": True, "desc": "loading"}
    with tqdm(total=sum(counts.values()), **options, disable=None if progress is None else not progress) as bar:
        for path, weight in _in_file_order(table, checkpoint):
            quantized = config.map_dtype(str(path[-2])) if weight.is_kernel and weight.is_quantizable else None
            quantized = config.embed_dtype if path[0] in ("embed", "head") else quantized
            yield path, read_parameter(checkpoint, weight, jnp.dtype(config.dtype), quantized, on_host=on_host)
            bar.update(counts[path])


def loaded_config(source: str | Path) -> ModelConfig:
    """As `open_config`, of the model that `load_model` makes: a head that is stored twice is compared."""
    config = open_config(source)
    if not Path(source).expanduser().exists():
        return config  # A preset, or one whose weights are not here yet.
    try:
        checkpoint = open_source(source)
        saved = isinstance(checkpoint, SavedModel)  # As it was when it was loaded.
        return config if saved else _with_stored_head(checkpoint, config, str(source))
    except FileNotFoundError:  # A configuration without weights.
        return config


def stored_as(source: str | Path, config: ModelConfig) -> str | None:
    """How another library quantized a model's weights, and what becomes of them; None: they are not, or a preset's."""
    if not Path(source).expanduser().exists():
        return None
    checkpoint = open_source(source)
    if checkpoint.stored_format is None:
        return None
    unused = checkpoint.stored_format.unused
    return "; ".join(
        [
            str(checkpoint.stored_format),
            _conversion(checkpoint.stored_format, config) or f"loaded as {config.weight_dtype}, value by value",
            *([f"not quantized: {' and '.join(config.unquantized)}"] if config.unquantized else []),
            *([f"not used: its {' and '.join(unused)}"] if unused else []),
        ]
    )


def _with_stored_head(checkpoint: Source, config: ModelConfig, label: str) -> ModelConfig:
    """Untie the head where the configuration ties it, but the files have one that differs, as transformers does."""
    names = "model.embed_tokens.weight", "lm_head.weight"
    if not config.tied_head or not all(name in checkpoint.shapes for name in names):
        return config
    embed, head = (checkpoint.read(name) for name in names)
    if embed.dtype != head.dtype:
        embed, head = embed.astype(np.float32), head.astype(np.float32)
    if np.array_equal(embed, head):
        return config
    warnings.warn(
        f"{label} has tie_word_embeddings, but its lm_head.weight differs from model.embed_tokens.weight: the stored "
        "head is used, as by transformers",
        stacklevel=3,
    )
    return replace(config, tied_head=False)


def _report_conversion(checkpoint: Source, config: ModelConfig) -> None:
    """Warn where the linear maps of a quantized checkpoint do not stay as they are stored."""
    stored = checkpoint.stored_format
    if stored is not None and (change := _conversion(stored, config)):
        warnings.warn(f"{checkpoint.path} has weights of {stored}; {change}", stacklevel=3)


def _conversion(stored: StoredFormat, config: ModelConfig) -> str | None:
    """How the values of quantized linear maps change; None: not at all."""
    if config.weight_dtype is None:
        left = [module for maps in linear_maps(config).values() for module in maps if not stored.quantizes(module)]
        why = f"not all linear maps are quantized, such as {left[0]}" if left else "no weight_dtype has these values"
        return f"{why}: all are dequantized to {config.dtype}"
    if stored.coding.fits(config.weight_dtype):
        return None
    return f"they are dequantized, and quantized again to {config.weight_dtype}"


def _in_file_order(
    table: dict[tuple[str | int, ...], Weight], checkpoint: Source
) -> Iterator[tuple[tuple[str | int, ...], Weight]]:
    """Parameters in the order of the file's tensors, so that a shard is opened once."""
    order = {name: index for index, name in enumerate(checkpoint.shapes)}
    yield from sorted(table.items(), key=lambda row: order[row[1].names[0]])
