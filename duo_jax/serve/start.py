"""An engine for a loaded model, and the permanent prefixes of `duo prefill`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from duo_jax.cache import store
from duo_jax.cache.spec import CacheSpec
from duo_jax.certified import certify_model, inference
from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.model import Model
from duo_jax.serve.engine import Engine
from duo_jax.serve.model_device import ModelDevice, in_groups
from duo_jax.serve.scheduler import Sizes
from duo_jax.text.lm import LM


def stored_for_engine(lm: LM) -> LM:
    """The LM with weights stored as an engine is fastest; nothing is copied, and `lm.model` cannot be used then."""
    return replace(lm, model=lm.model.by_output(donate=True)) if in_groups(lm.model) else lm


def start_engine(lm: LM, sizes: Sizes, spec: CacheSpec, progress: Callable[[str], None] | None = None) -> Engine:
    """Certify the attention that has no verdict yet, allocate the cache, compile, and start to serve.

    Args:
        lm: model and tokenizer, from `stored_for_engine`.
        sizes: how much is served at a time, from `duo_jax.serve.sizing.plan_sizes`.
        spec: the cache, from there too.
        progress: called with the name of each program before it is compiled.

    Raises:
        ValueError: a cache that does not fit into memory, or a setting that `duo_jax.certify` refuses.
    """
    config, mesh = lm.model.config, lm.model.mesh
    size = MeshSize.of(mesh)
    asked = inference(config, spec.pattern, kv_dtype=spec.precision.kv, mesh=size, page_size=spec.page_size)
    certify_model(config, asked, mesh=mesh)
    device = ModelDevice(lm.model, replace(spec, mesh=mesh), sizes.chunk_size)
    return Engine(device, sizes, lm.tokenizer, vocab_size=config.vocab_size, eos_ids=lm.eos_ids, progress=progress)


def keep_prefix(engine: Engine, model: Model, spec: CacheSpec, path: Path, tokens: list[int]) -> str:
    """Keep a text that `duo prefill` has saved, from its keys and values if they are those of this server's cache.

    The rings are those at the end of the text. They are used from one token before it, as that token sees none that the
    last one has replaced; so a prompt may end where the text does.

    Returns:
        Why the text was computed again; empty if its keys were loaded.
    """
    try:
        saved, reason = _load(model, spec, path), ""
    except ValueError as error:
        saved, reason = None, str(error)
    engine.keep(tokens if saved is None else tokens[:-1], saved)
    return reason


def _load(model: Model, spec: CacheSpec, path: Path) -> store.Stored:
    """The saved cache, in the host's memory.

    Raises:
        ValueError: it is not of this model, pattern and data types, or it cannot be loaded into pages.
    """
    about = store.read_about(path)
    if model.mesh is not None:
        raise ValueError("a model on several devices computes its prefixes")
    if about["page_size"] is not None or len(about["length"]) != 1:
        raise ValueError(f"{path} has pages or several rows, and duo prefill writes neither")
    dtypes = [spec.precision.kv, spec.precision.streaming]
    if about["dtypes"] != dtypes:
        raise ValueError(f"{path} has keys and values in {about['dtypes']}, not in {dtypes}")
    store.check_rope(path, about, spec.max_length)
    return store.read(path, model, pattern=spec.pattern, dtype=dtypes[0], max_length=store.least_length(about))


def prefix_tokens(path: Path) -> list[int]:
    """The token ids of a text that `duo prefill` has saved.

    Raises:
        ValueError: a folder that is no saved cache, or one without tokens.
    """
    about = store.read_about(path)
    if about["tokens"] is None:
        raise ValueError(f"{path} was saved without its tokens: save it with duo prefill")
    return list(about["tokens"][0])
