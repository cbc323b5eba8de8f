"""Find a checkpoint by path, packaged name or hub id: its configuration and tokenizer. Loads no weights."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from duo_jax.arguments import path_of
from duo_jax.checkpoint.folder import Folder
from duo_jax.checkpoint.gguf_file import GgufFile
from duo_jax.checkpoint.packaged import PACKAGED, packaged_model
from duo_jax.checkpoint.save import SavedModel
from duo_jax.checkpoint.source import Source
from duo_jax.families.presets import PRESETS
from duo_jax.model.config import ModelConfig
from duo_jax.model.precision import AnyDtype
from duo_jax.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import transformers


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


def open_config(source: str | Path, *, accept_terms: bool = False) -> ModelConfig:
    """The configuration of a model or of a preset, without its weights; a path takes precedence over a preset."""
    preset = None if path_of("model", source, "a path or a name").exists() else PRESETS.get(str(source).lower())
    return preset or open_source(source, weights=False, accept_terms=accept_terms).config


def usual_dtype(config: ModelConfig, dtype: AnyDtype | None = None) -> AnyDtype:
    """The given data type; by default the checkpoint's, but float32 on a CPU, which has no fast bfloat16."""
    if dtype is not None:
        return dtype
    return "float32" if jax.default_backend() == "cpu" else config.dtype


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
