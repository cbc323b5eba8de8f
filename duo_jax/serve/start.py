"""An engine for a loaded model, and the permanent prefixes of `duo prefill`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from duo_jax.cache import store
from duo_jax.cache.spec import CacheSpec
from duo_jax.serve.engine import Engine
from duo_jax.serve.model_device import ModelDevice
from duo_jax.serve.scheduler import Sizes
from duo_jax.text.lm import LM


def start_engine(lm: LM, sizes: Sizes, spec: CacheSpec, progress: Callable[[str], None] | None = None) -> Engine:
    """Allocate the cache, compile, and start to serve.

    Args:
        lm: model and tokenizer.
        sizes: how much is served at a time, from `duo_jax.serve.sizing.plan_sizes`.
        spec: the cache, from there too.
        progress: called with the name of each program before it is compiled.

    Raises:
        ValueError: a cache that does not fit into memory.
    """
    config, mesh = lm.model.config, lm.model.mesh
    device = ModelDevice(lm.model, replace(spec, mesh=mesh), sizes.chunk_size)
    return Engine(device, sizes, lm.tokenizer, vocab_size=config.vocab_size, eos_ids=lm.eos_ids, progress=progress)


def prefix_tokens(path: Path) -> list[int]:
    """The token ids of a text that `duo prefill` has saved.

    Raises:
        ValueError: a folder that is no saved cache, or one without tokens.
    """
    about = store.read_about(path)
    if about["tokens"] is None:
        raise ValueError(f"{path} was saved without its tokens: save it with duo prefill")
    return list(about["tokens"][0])
