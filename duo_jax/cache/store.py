"""Caches in folders: the filled part of the pools, the model and pattern that made it, and a checksum of every array.

A folder has safetensors shards and `duo_cache.json`. `KVCache.save` and `KVCache.load` document both directions.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Shaped
from numpy.typing import ArrayLike
from safetensors import SafetensorError

from duo_jax.arguments import MOST_TOKENS, check_rows, instance, integers, path_of, whole_number
from duo_jax.arrays import Shards, write_shards
from duo_jax.cache.cache import KeyValues, KVCache
from duo_jax.cache.spec import CacheSpec
from duo_jax.differences import changes
from duo_jax.files import free_path, whole_folder, write_text
from duo_jax.model.config import ModelConfig
from duo_jax.model.config_checks import MOST
from duo_jax.model.model import Model
from duo_jax.model.precision import ALLOWED, AnyDtype, Precision, check_name, name_of
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.reading import read_json
from pallas_kernels import Window
from pallas_kernels.quantized import BITS

ABOUT = "duo_cache.json"
STEM = "cache"
# Version of what arrays of quantized numbers contain; the first had no entry.
FORMAT = 2


def save(
    path: str | Path, cache: KVCache, model: Model | None, tokens: ArrayLike | None, text: str | None = None
) -> None:
    """Write a cache to a new folder."""
    path = free_path(path)
    lengths = np.asarray(cache.length)
    filled = int(lengths.max())
    if not 0 < filled <= cache.max_length:
        raise ValueError(f"a cache of {filled} tokens and {cache.max_length=} has nothing to save: prefill it first")
    if tokens is not None:
        tokens = check_rows("tokens", tokens, cache.batch_size)
        if tokens.shape[1] != filled:
            raise ValueError(f"tokens must be those in the cache, {filled} of each row, got {tokens.shape=}")
    window, layers = _windows(cache)
    about = {
        "is_retrieval": np.asarray(cache.is_retrieval).astype(int).tolist(),
        "window": astuple(window),
        "layer_windows": layers and [own and astuple(own) for own in layers],
        "length": lengths.tolist(),
        "max_length": cache.max_length,
        "page_size": None if cache.pages is None else cache.full.k.shape[2],
        "head_dim": cache.head_dim,
        "dtypes": [dtype.name.replace("uint", "int") for dtype in (cache.dtype, cache.streaming_dtype)],
        "format": FORMAT,
        "model": model and _identity(model),
        "tokens": None if tokens is None else tokens.tolist(),
        "text": text,
    }
    checksums: dict[str, str] = {}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in _filled_arrays(cache, filled):
            checksums[name] = _checksum(array)
            yield name, array

    with whole_folder(path) as folder:
        write_shards(folder, STEM, arrays())
        record = {"about": about, "checksums": checksums}
        write_text(folder / ABOUT, json.dumps({**record, "own": _text_checksum(record)}))


def read_about(path: str | Path) -> dict[str, Any]:
    """The description of a saved cache, without its arrays.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a folder that `save` made, or one that was truncated or altered.
    """
    path = path_of("path", path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder with a saved cache")
    if (path / "_CHECKPOINT_METADATA").exists():
        raise ValueError(f"{path} was saved by duo-jax 0.1, whose format is no longer read: prefill and save it again")
    if not (path / ABOUT).is_file():
        raise ValueError(f"{path} has no {ABOUT}: it is not a saved cache, is incomplete, or was altered")
    try:
        record = read_json(path / ABOUT)
        own = record.pop("own")
        about, checksums = record["about"], record["checksums"]
        if own != _text_checksum(record):
            raise ValueError("its checksum does not match")
        _check_about(about)
        instance("checksums", checksums, dict)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / ABOUT} is incomplete or was altered ({reason:.200}): save the cache again") from None
    if BITS.keys() & set(about["dtypes"]) and about.get("format") != FORMAT:
        raise ValueError(
            f"{path} has {' and '.join(about['dtypes'])} keys and values as another version of duo-jax stored them: "
            "prefill and save it again"
        )
    return {**about, "checksums": checksums}


def _check_about(about: Mapping[str, Any]) -> None:
    """Check every type and range: whoever changed a description may have written a checksum that fits.

    Raises:
        ValueError: a wrong value, by name.
        KeyError, TypeError: a description of another shape.
    """
    sizes = {"max_length": 1, "head_dim": 1} | ({} if about["page_size"] is None else {"page_size": 1})
    for name, least in sizes.items():
        whole_number(name, about[name], least, MOST["head_dim"] if name == "head_dim" else MOST_TOKENS)
    table = integers("is_retrieval", about["is_retrieval"])
    if table.ndim != 2 or not table.size or ((table != 0) & (table != 1)).any():
        raise ValueError(f"is_retrieval must be a table of 0 and 1, got {table.shape=}")
    lengths = integers("length", about["length"])
    if lengths.ndim != 1 or not lengths.size or lengths.min() < 0 or not 0 < lengths.max() <= about["max_length"]:
        raise ValueError(f"length must be the tokens of each row, at most {about['max_length']}, got {lengths!s:.60}")
    layers = about["layer_windows"]
    if layers is not None and len(instance("layer_windows", layers, list)) != len(table):
        raise ValueError(f"layer_windows must have an entry for each of {len(table)} layers, got {len(layers)}")
    for window in (about["window"], *(own for own in layers or () if own is not None)):
        sink_size, recent_size = instance("window", window, list)
        # A cache without streaming heads has a window of no size.
        whole_number("sink_size", sink_size, 0)
        whole_number("recent_size", recent_size, 0)
    for dtype in about["dtypes"]:
        check_name("dtypes", dtype, ALLOWED["kv_dtype"])
    if len(about["dtypes"]) != 2:
        raise ValueError(f"dtypes must be those of retrieval and streaming heads, got {about['dtypes']!r:.60}")
    if about["tokens"] is not None:
        check_rows("tokens", about["tokens"], len(lengths))
    # Caches of older versions have no text.
    for name, value, kind in (("model", about["model"], dict), ("text", about.get("text"), str)):
        if value is not None:
            instance(name, value, kind)


class Stored(NamedTuple):
    """A saved cache in the host's memory.

    Attributes:
        about: what `read_about` returns.
        spec: the cache that has room for it.
        arrays: its arrays by their names; those of pages have no more tokens than were saved.
    """

    about: dict[str, Any]
    spec: CacheSpec
    arrays: dict[str, np.ndarray]

    def pools(self) -> tuple[KeyValues, tuple[KeyValues, ...]]:
        """The arrays as keys and values of retrieval heads `[P, B, filled, H]`, and those of each ring."""
        shapes = jax.eval_shape(_pools, self.spec.abstract())
        named = _parts(*shapes).items()
        # Pools without slots are not stored.
        leaves = [self.arrays[name] if like.size else np.zeros(like.shape, like.dtype) for name, like in named]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def load(
    path: str | Path,
    model: Model | None,
    *,
    pattern: HeadPattern | None,
    dtype: AnyDtype | None,
    max_length: int | None,
) -> KVCache:
    """Read a cache, if it is of this model, pattern and data type; None: any."""
    about, spec, arrays = read(path, model, pattern=pattern, dtype=dtype, max_length=max_length)
    cache = spec.empty()
    pools, structure = _parts(*_pools(cache)), jax.tree.structure((cache.full, cache.rings))
    full, rings = jax.tree.unflatten(structure, list(_written(pools, arrays)))
    # Rows of a new cache own consecutive pages: its full pool is a contiguous one in another shape.
    full = jax.tree.map(lambda x, like: x.reshape(like.shape), full, cache.full)
    return replace(cache, full=full, rings=rings, length=jnp.asarray(about["length"], jnp.int32))


def read(
    path: str | Path,
    model: Model | None,
    *,
    pattern: HeadPattern | None,
    dtype: AnyDtype | None,
    max_length: int | None,
) -> Stored:
    """As `load`, but nothing is allocated on a device."""
    about = read_about(path)
    if model is not None:
        _check_identity(path, about["model"], _identity(model))
    kv_dtype = about["dtypes"][0]
    if dtype is not None and name_of(dtype) != kv_dtype:
        raise ValueError(f"{path} has keys and values in {kv_dtype}, not in {name_of(dtype)}: prefill again")
    if pattern is not None:
        _check_pattern(path, pattern, about)
    filled = max(about["length"])
    max_length = about["max_length"] if max_length is None else whole_number("max_length", max_length, 1)
    if filled > max_length:
        raise ValueError(f"{path} has {filled} tokens, more than {max_length=}: make it at least that long")
    arrays = _read_arrays(path_of("path", path), about["checksums"])
    try:
        spec = _spec(about, max_length)
    except ValueError as error:
        raise ValueError(f"{path} is incomplete or was altered: {error}; save the cache again") from None
    # Traced: nothing is allocated before the shapes are compared.
    jax.eval_shape(lambda cache: _check_arrays(path, _parts(*_pools(cache)), arrays, filled), spec.abstract())
    check_rope(path, about, spec.max_length)
    return Stored(about, spec, arrays)


def check_rope(path: str | Path, about: Mapping[str, Any], max_length: int) -> None:
    """Check that keys were turned as those of the new cache will be: LongRoPE depends on the room of a cache.

    Raises:
        ValueError: they were not.
    """
    changes_at, saved = _rope_changes_at(about), about["max_length"]
    if changes_at is not None and (max_length > changes_at) != (saved > changes_at):
        raise ValueError(
            f"{path} was saved with room for {saved} tokens, and cannot have room for {max_length}: RoPE of its model "
            f"changes at {changes_at}; prefill again with that room"
        )


def least_length(about: Mapping[str, Any]) -> int:
    """The smallest `max_length` that a saved cache can be loaded with."""
    filled, changes_at = max(about["length"]), _rope_changes_at(about)
    return filled if changes_at is None or about["max_length"] <= changes_at else max(filled, changes_at + 1)


def _rope_changes_at(about: Mapping[str, Any]) -> int | None:
    """The `max_length` above which LongRoPE turns keys otherwise; None: it is not LongRoPE."""
    rope = (about["model"] or {}).get("rope")
    if not isinstance(rope, dict) or "long_factor" not in rope:
        return None
    return int(rope["original_max_position_embeddings"])


def pattern_of(about: Mapping[str, Any]) -> HeadPattern:
    """The pattern of a saved cache; its gates are 0 and 1."""
    table = np.asarray(about["is_retrieval"], bool)
    sink_size, recent_size = about["window"]
    own = tuple(layer for layer, window in enumerate(about["layer_windows"] or ()) if window is not None)
    return HeadPattern(table, sink_size, recent_size, gates=table.astype(float), window_layers=own)


def _windows(cache: KVCache) -> tuple[Window, tuple[Window | None, ...] | None]:
    """The window of the pattern, and for each layer its own; None if no layer has one."""
    layers = range(len(cache.ring_of_layer))
    own = tuple(cache.window(layer) if layer in cache.window_layers else None for layer in layers)
    chosen = (cache.window(layer) for layer in layers if layer not in cache.window_layers)
    return next(chosen, Window(0, 0)), own if any(own) else None


def _spec(about: Mapping[str, Any], max_length: int) -> CacheSpec:
    """What `load` makes. A cache knows no model: only the fields of the configuration that it needs are right."""
    pattern, layers = pattern_of(about), about["layer_windows"]
    kv_heads, (kv_dtype, streaming_dtype) = pattern.num_kv_heads, about["dtypes"]
    if any(window and (window[0] or not window[1]) for window in layers or ()):
        raise ValueError(f"the window of a layer is of recent tokens only, got {layers!s:.60}")
    config = ModelConfig(
        *("", 1, pattern.num_layers, 1, kv_heads, kv_heads, about["head_dim"]),
        mlp_dim=1,
        max_positions=1,
        layer_windows=tuple(window and window[1] for window in layers or ()),
    )
    return CacheSpec(
        config,
        pattern,
        len(about["length"]),
        max_length,
        Precision("float32", kv_dtype=kv_dtype, streaming_dtype=streaming_dtype),
        page_size=about["page_size"],
    )


def _parts(full: KeyValues, rings: tuple[KeyValues, ...]) -> dict[str, Any]:
    """The arrays of all pools, or their shapes, by their names in files."""
    leaves = jax.tree_util.tree_leaves_with_path({"full": full._asdict(), "ring": [ring._asdict() for ring in rings]})
    return {jax.tree_util.keystr(path, simple=True, separator="_"): leaf for path, leaf in leaves}


def _contiguous(full: KeyValues, pages: Array | None) -> KeyValues:
    """A full pool `[P, B, S, H]`; a paged one is gathered."""
    if pages is None:
        return full
    return jax.tree.map(lambda x: x[:, pages].reshape(len(x), len(pages), -1, *x.shape[3:]), full)


def _pools(cache: KVCache) -> tuple[KeyValues, tuple[KeyValues, ...]]:
    """The pools as they are stored."""
    return _contiguous(cache.full, cache.pages), cache.rings


def _check_arrays(path: str | Path, pools: dict[str, Array], arrays: Mapping[str, np.ndarray], filled: int) -> None:
    """Raise ValueError for stored arrays that do not fit the pools of a cache, by name."""
    for name, pool in pools.items():
        shape = (*pool.shape[:2], filled, *pool.shape[3:]) if name.startswith("full") else pool.shape
        stored = arrays.get(name)
        if pool.size and (stored is None or (stored.shape, stored.dtype) != (shape, pool.dtype)):
            got = None if stored is None else f"{stored.dtype.name}{list(stored.shape)}"
            raise ValueError(
                f"{path} is incomplete or was altered: {name} must be {pool.dtype.name}{list(shape)}, got {got}; save "
                "the cache again"
            )


def _filled_arrays(cache: KVCache, filled: int) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays to store: pools without slots, and entries beyond the length, are left out."""
    # A row of a pool of pages may have room for more tokens than the pool has: only pages with tokens are gathered.
    pages = None if cache.pages is None else cache.pages[:, : -(-filled // cache.full.k.shape[2])]
    for name, leaf in _parts(_contiguous(cache.full, pages), cache.rings).items():
        if leaf.size:
            yield name, np.asarray(leaf)[:, :, :filled] if name.startswith("full") else np.asarray(leaf)


def _read_arrays(path: Path, checksums: Mapping[str, str]) -> dict[str, np.ndarray]:
    """All arrays, each checked.

    Raises:
        ValueError: an array that is missing, truncated or altered, by name.
    """
    arrays = {}
    try:
        shards = Shards(sorted(path.glob(f"{STEM}-*.safetensors")))
        for name, checksum in checksums.items():
            arrays[name] = shards.read(name)
            if _checksum(arrays[name]) != checksum:
                raise ValueError(f"the checksum of {name} does not match")
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} is incomplete or was altered: {error}; save the cache again") from None
    return arrays


def _written(pools: dict[str, Array], arrays: Mapping[str, np.ndarray]) -> Iterator[Array]:
    """The pools with the stored entries at the beginning of each slot, slot by slot: there is no second copy."""
    for name, pool in pools.items():
        if name in arrays:
            for slot in range(len(pool)):
                pool = _write_slot(pool, arrays[name][slot : slot + 1], np.int32(slot))
        yield pool


@functools.partial(jax.jit, donate_argnums=0)
def _write_slot(pool: Shaped[Array, "P *rows"], new: Shaped[Array, "1 *filled"], slot: Int32[Array, ""]) -> Array:
    return lax.dynamic_update_slice(pool, new, (slot, *(jnp.int32(0),) * (pool.ndim - 1)))


def _checksum(array: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=16)
    for part in array:  # Slot by slot: a part of a pool is not contiguous.
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def _text_checksum(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _identity(model: Model) -> dict[str, Any]:
    """What identifies a model: its weights, and every field of its configuration that its arithmetic depends on."""
    config = {name: value for name, value in model.config.to_json().items() if name != "eos_ids"}
    config["rope"] = asdict(model.config.rope)  # Without its type, as ever: caches of earlier versions are compared.
    return json.loads(json.dumps(config | {"weights": model.fingerprint}))


def _check_identity(path: str | Path, saved: dict[str, Any] | None, given: dict[str, Any]) -> None:
    if saved is None:
        raise ValueError(f"{path} was saved without a model, so it cannot be matched to this one")
    if changed := "; ".join(changes(saved, given)):
        raise ValueError(f"{path} was made by another model: {changed}; prefill again with this one")


def _check_pattern(path: str | Path, pattern: HeadPattern, about: Mapping[str, Any]) -> None:
    saved = pattern_of(about)
    is_same = np.array_equal(saved.is_retrieval, pattern.is_retrieval) and saved.window == pattern.window
    # A pattern from elsewhere does not have the window layers.
    if not is_same or pattern.window_layers not in ((), saved.window_layers):
        raise ValueError(
            f"{path} was made with {_text(saved)}, the pattern has {_text(pattern)}, or different ones: "
            "leave the pattern out, or prefill again"
        )


def _text(pattern: HeadPattern) -> str:
    sizes = f" ({pattern.sink_size} sinks, a window of {pattern.recent_size})" if pattern.window.size else ""
    return f"{pattern.num_retrieval} retrieval heads of {pattern.num_choosable}{sizes}"
