"""A cache in a folder: what is filled of its pools, and what is known of the model and the pattern that made it.

Over `saved`, which knows arrays only; `KVCache.save` and `KVCache.load` document both directions.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Shaped
from numpy.typing import ArrayLike

from duo_jax.cache import saved
from duo_jax.cache.pools import dtype_name, empty_pools, number_slots, parts, pool_shapes, stored_as
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from pallas_kernels import Window


def save(path: str | Path, cache: Mapping[str, Any], model: Model | None, tokens: ArrayLike | None) -> None:
    """Write a cache's fields, by name."""
    saved.free(path)
    pools, lengths = cache["pools"], np.asarray(cache["length"])
    max_length, head_dim = pools.full_k.shape[2:]
    filled = int(lengths.max())
    if not 0 < filled <= max_length:
        raise ValueError(f"a cache of {filled} tokens and {max_length=} has nothing to save: prefill it first")
    arrays = {}
    for name, leaf in parts(pools).items():
        # Slots beyond the length hold nothing; a pool without slots is not stored.
        if leaf.size:
            arrays[name] = np.asarray(leaf)[:, :, :filled] if name.startswith("retrieval") else np.asarray(leaf)
    about = {
        "is_retrieval": np.asarray(cache["is_retrieval"]).astype(int).tolist(),
        "sink_size": cache["window"].sink,
        "recent_size": cache["window"].recent,
        "length": lengths.tolist(),
        "max_length": max_length,
        "head_dim": head_dim,
        "dtypes": [stored_as(pools.full_k), stored_as(pools.ring_k)],
        "model": model and _identity(model),
        "tokens": None if tokens is None else np.asarray(tokens).tolist(),
    }
    saved.write(path, arrays, about)


def load(
    path: str | Path,
    model: Model | None,
    *,
    pattern: HeadPattern | None,
    dtype: str | jnp.dtype | None,
    max_length: int | None,
) -> dict[str, Any]:
    """Read a cache's fields, by name, if they are of this model, pattern and data type."""
    about = saved.read_about(path)
    retrieval, streaming = about["dtypes"]
    is_retrieval = np.asarray(about["is_retrieval"], bool)
    window = Window(about["sink_size"], about["recent_size"])
    if model is not None:
        _check_identity(path, about["model"], _identity(model))
    if dtype is not None and dtype_name(dtype) != retrieval:
        raise ValueError(f"{path} holds keys and values in {retrieval}, not in {dtype_name(dtype)}: prefill again")
    if pattern is not None:
        _check_pattern(path, pattern, is_retrieval, window)
    filled, batch_size, max_length = max(about["length"]), len(about["length"]), max_length or about["max_length"]
    if filled > max_length:
        raise ValueError(f"{path} holds {filled} tokens, more than {max_length=}: make it at least that long")
    arrays = saved.read_arrays(path, about["checksums"])
    shapes = pool_shapes(
        int(is_retrieval.sum()),
        int((~is_retrieval).sum()),
        batch_size=batch_size,
        max_length=max_length,
        ring=window.size,
        head_dim=about["head_dim"],
    )
    pools = empty_pools(shapes, (retrieval, streaming))
    flat, tree = jax.tree.flatten(pools)
    flat = [_filled(leaf, arrays[name]) if leaf.size else leaf for name, leaf in zip(parts(pools), flat, strict=True)]
    return {
        "pools": jax.tree.unflatten(tree, flat),
        "is_retrieval": jnp.asarray(is_retrieval),
        "slot": jnp.asarray(number_slots(is_retrieval)),
        "length": jnp.asarray(about["length"], jnp.int32),
        "window": window,
    }


def _filled(pool: Array, new: np.ndarray) -> Array:
    """The pool with rows of `new` at its beginning, slot by slot: no second copy of it is on the device."""
    for slot in range(len(new)):
        pool = _fill(pool, new[slot : slot + 1], np.int32(slot))
    return pool


@functools.partial(jax.jit, donate_argnums=0)
def _fill(pool: Shaped[Array, "P *rows"], new: Shaped[Array, "1 *filled"], slot: Int32[Array, ""]) -> Array:
    return lax.dynamic_update_slice(pool, new, (slot, *(jnp.int32(0),) * (pool.ndim - 1)))


def _identity(model: Model) -> dict[str, Any]:
    """What tells a model: everything of its configuration that its arithmetic depends on, and its weights."""
    config = {name: value for name, value in asdict(model.config).items() if name != "eos_ids"}
    return json.loads(json.dumps(config | {"weights": model.fingerprint}))


def _check_identity(path: str | Path, theirs: dict[str, Any] | None, ours: dict[str, Any]) -> None:
    if theirs is None:
        raise ValueError(f"{path} was saved without a model, so that it cannot be told whether this one made it")
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if names:
        said = ", ".join(f"{name} {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names)
        raise ValueError(f"{path} was made by another model: {said}; prefill again with this one")


def _check_pattern(path: str | Path, pattern: HeadPattern, is_retrieval: np.ndarray, window: Window) -> None:
    gates = is_retrieval.astype(float)
    theirs = HeadPattern(is_retrieval, window.sink, window.recent, gates=gates) if window.recent else None
    if pattern != theirs:
        raise ValueError(
            f"{path} was made with {_heads(is_retrieval, window)}, the pattern has "
            f"{_heads(pattern.is_retrieval, pattern.window)}, or others of them: "
            "leave the pattern out, or prefill again"
        )


def _heads(is_retrieval: np.ndarray, window: Window) -> str:
    sizes = f" ({window.sink} sinks, a window of {window.recent})" if window.recent else ""
    return f"{int(is_retrieval.sum())} retrieval heads of {is_retrieval.size}{sizes}"
