"""Loading: find the checkpoint, check every tensor's name and shape, then read them one by one."""

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from duo_jax.arguments import instance, path_of
from duo_jax.certified import certify_model
from duo_jax.checkpoint.folder import Folder
from duo_jax.checkpoint.gguf_blocks import Blocks
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.mxfp4 import Mxfp4
from duo_jax.checkpoint.packaged import PACKAGED, packaged_model
from duo_jax.checkpoint.save import SavedModel
from duo_jax.checkpoint.source import Source
from duo_jax.checkpoint.stored import Packed
from duo_jax.checkpoint.weight_table import Weight, check_tensors, linear_maps, weight_table
from duo_jax.config import ModelConfig
from duo_jax.families.presets import PRESETS
from duo_jax.families.quantization import StoredFormat
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.place import placement_on
from duo_jax.model import Model, abstract_decoder, check_size
from duo_jax.pattern import HeadPattern
from duo_jax.precision import AnyDtype, name_of
from duo_jax.programs import keep_programs
from duo_jax.tokenizer import TextTokenizer
from duo_jax.weights import quantize_kernel

if TYPE_CHECKING:
    import qwix  # imported when weights are quantized
    import transformers

# Tensors that the device dequantizes.
Compact: TypeAlias = Blocks | Packed | Mxfp4


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
    checkpoint = open_source(source, accept_terms=accept_terms)
    if pattern is not None:
        instance("pattern", pattern, HeadPattern, "HeadPattern.load makes one from a name or folder").check(
            checkpoint.config
        )
    config = checkpoint.config.with_dtypes(dtype=dtype)
    certify_model(config, pattern=pattern, mesh=mesh, trains=fsdp)
    dtypes = {"dtype": dtype, "weight_dtype": weight_dtype, "embed_dtype": embed_dtype}
    if isinstance(checkpoint, SavedModel):
        asked = {name: name_of(value) for name, value in dtypes.items() if value is not None}
        saved = {name: getattr(checkpoint.config, name) for name in dtypes}
        if not asked.items() <= saved.items():
            raise ValueError(f"{source} was saved with {saved}, which cannot be changed to {asked}: load the original")
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
            yield path, _read(checkpoint, weight, jnp.dtype(config.dtype), quantized, on_host=on_host)
            bar.update(counts[path])


def load_tokenizer(source: str | Path, *, accept_terms: bool = False) -> "transformers.PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a model; `source` and `accept_terms` as for `load_model`.

    Raises:
        FileNotFoundError: no tokenizer, or one that lacks most of the model's vocabulary, as from part of its files.
        ValueError: a tokenizer of another model, with more tokens; see `load_model` for errors of the source.
    """
    checkpoint = open_source(source, weights=False, accept_terms=accept_terms)
    vocabulary = checkpoint.config.vocab_size  # First: what is wrong with a configuration is no fault of the tokenizer.
    tokenizer = checkpoint.tokenizer()
    _check_tokenizer(source, tokenizer, vocabulary)
    return tokenizer


def load_text_tokenizer(source: str | Path) -> TextTokenizer:
    """As `load_tokenizer`, for text in and out only; that of a GGUF file is read without importing transformers."""
    checkpoint = open_source(source, weights=False)
    vocabulary = checkpoint.config.vocab_size
    tokenizer = checkpoint.text_tokenizer()
    _check_tokenizer(source, tokenizer, vocabulary)
    return tokenizer


def _check_tokenizer(source: str | Path, tokenizer: TextTokenizer, vocabulary: int) -> None:
    if 2 * len(tokenizer) < vocabulary:
        raise FileNotFoundError(
            f"{source} has no tokenizer of its model: its files make one of {len(tokenizer)} tokens, and the model has "
            f"{vocabulary}; put all of the model's tokenizer files (such as tokenizer.json) into the folder"
        )
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"{source} has the tokenizer of another model: it has {tokenizer.vocab_size} tokens, the model {vocabulary}"
        )
    if len(tokenizer) > vocabulary:
        warnings.warn(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, its model {vocabulary}: text with one of the "
            "added tokens beyond is refused",
            stacklevel=3,
        )


def usual_dtype(config: ModelConfig, dtype: AnyDtype | None = None) -> AnyDtype:
    """The given data type; by default the checkpoint's, but float32 on a CPU, which has no fast bfloat16."""
    if dtype is not None:
        return dtype
    return "float32" if jax.default_backend() == "cpu" else config.dtype


def open_config(source: str | Path, *, accept_terms: bool = False) -> ModelConfig:
    """The configuration of a model or of a preset, without its weights; a path takes precedence over a preset."""
    preset = None if path_of("model", source, "a path or a name").exists() else PRESETS.get(str(source).lower())
    return preset or open_source(source, weights=False, accept_terms=accept_terms).config


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


def open_source(source: str | Path, *, weights: bool = True, accept_terms: bool = False) -> Source:
    """Find a checkpoint by path, packaged name or hub id, without reading its tensors."""
    path = path_of("model", source, "a path or a name")
    if path.is_dir():
        return SavedModel(path) if SavedModel.is_at(path) else Folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is neither a folder nor a .gguf file; for safetensors give the folder around it")
        return GgufFile(path)
    if str(source).lower() in PACKAGED:
        return GgufFile(packaged_model(str(source).lower(), accept_terms=accept_terms))
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from duo_jax.checkpoint import hub  # It imports huggingface_hub, which takes 0.2 s.

        return Folder(hub.download(source, weights=weights))
    raise FileNotFoundError(
        f"no model {str(source)!r:.200}: give a Hugging Face folder, a .gguf file, a hub id (organisation/name), "
        f"or one of the packaged models {sorted(PACKAGED)}"
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


def _read(
    checkpoint: Source, weight: Weight, dtype: jnp.dtype, weight_dtype: str | None, *, on_host: bool
) -> "Array | np.ndarray | qwix.QArray":
    """A parameter of the decoder, on the default device, or on the host, from where it is divided over a mesh."""
    is_plain = on_host and weight_dtype is None
    arranged = Arrangement(weight.is_kernel and not weight.is_stacked, weight.alternates, weight.is_kernel)

    def matrix(parts: tuple[Any, ...]) -> "Array | np.ndarray | qwix.QArray":
        if is_plain:
            values = [x if isinstance(x, np.ndarray) else np.asarray(x.values()) for x in parts]
            return arranged.of(values, np).astype(dtype)
        if weight_dtype and all(isinstance(part, Packed) and part.coding.fits(weight_dtype) for part in parts):
            return _as_stored(parts, dtype, weight_dtype)
        if weight_dtype == "mxfp4" and isinstance(parts[0], Mxfp4):
            return _as_mxfp4(parts[0], arranged)
        return _convert(parts, dtype, arranged, weight_dtype)

    if weight.experts is None:
        return matrix(tuple(checkpoint.stored(name) for name in weight.names))
    if weight.is_stacked:
        whole: Any = checkpoint.stored(weight.names[0])
        matrices = (matrix((whole[number],)) for number in range(weight.experts))
    else:
        matrices = (matrix(tuple(checkpoint.stored(name) for name in names)) for names in weight.parts)
    # In place: a second copy of all experts of a layer may take gigabytes.
    first = next(matrices)
    if isinstance(first, np.ndarray):
        stack: Any = np.empty((weight.experts, *first.shape), dtype)
        stack[0] = first
        for number, part in enumerate(matrices, start=1):
            stack[number] = part
        return stack
    stack = _first_expert(first, weight.experts)
    for number, part in enumerate(matrices, start=1):
        stack = _set_expert(stack, part, number)
    return stack


@functools.partial(jax.jit, static_argnums=1)
def _first_expert(part: "Array | qwix.QArray", experts: int) -> "Array | qwix.QArray":
    """Room for all experts' matrices, with the first one."""
    return jax.tree.map(lambda x: jnp.zeros((experts, *x.shape), x.dtype).at[0].set(x), part)


@functools.partial(jax.jit, donate_argnums=0)
def _set_expert(stack: "Array | qwix.QArray", part: "Array | qwix.QArray", number: Any) -> "Array | qwix.QArray":
    """Write one expert's matrix in place."""
    return jax.tree.map(lambda x, y: x.at[number].set(y), stack, part)


class Arrangement(NamedTuple):
    """How tensors become a parameter."""

    transposes: bool
    alternates: bool
    is_kernel: bool

    def of(self, parts: Sequence[Any], numpy: Any) -> Any:
        """The parameter's array, by `numpy` or `jax.numpy`."""
        x = numpy.concatenate(parts)
        x = x.T if self.transposes else x
        return numpy.concatenate([x[..., ::2], x[..., 1::2]], axis=-1) if self.alternates else x


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _convert(
    parts: tuple[Array | Compact, ...], dtype: jnp.dtype, arranged: Arrangement, weight_dtype: str | None
) -> "Array | qwix.QArray":
    values = [part.values() if isinstance(part, Blocks | Packed | Mxfp4) else part for part in parts]
    x = arranged.of(values, jnp).astype(dtype)
    return x if weight_dtype is None else quantize_kernel(x, weight_dtype, input_axis=int(not arranged.is_kernel))


@functools.partial(jax.jit, static_argnums=1)
def _as_mxfp4(part: Mxfp4, arranged: Arrangement) -> "qwix.QArray":
    """One expert's kernel with the numbers of the checkpoint."""
    return jax.tree.map(lambda x: arranged.of([x], jnp), part.kernel())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _as_stored(parts: tuple[Packed, ...], dtype: jnp.dtype, weight_dtype: str) -> "qwix.QArray":
    """A kernel with the numbers of the checkpoint."""
    kernels = [part.kernel(weight_dtype, dtype) for part in parts]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays).T, *kernels)
