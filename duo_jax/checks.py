"""Checks of the arguments of public functions, before any compute. Errors name the value, the rule and the way out.

Under a caller's own `jit`, values are unknown and cannot be checked. A cache that overflows there gives NaN logits.
"""

import warnings
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32
from numpy.typing import ArrayLike

from duo_jax.arguments import ArgumentError, check_rows, instance, integers, seed_number, spelling, whole_number
from duo_jax.cache.cache import KVCache
from duo_jax.generation.sampling import Sampler
from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.config import ModelConfig
from duo_jax.model.model import Model
from duo_jax.model.precision import WeightDtype

_warned: set[ModelConfig] = set()
_warned_of_quantization: set[str] = set()


def is_traced(*values: object) -> bool:
    """Whether any of these is being traced, so that its value is unknown."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def check_model(model: object) -> None:
    """Raise ValueError for anything but a model."""
    instance("model", model, Model, "load_model makes one")


def check_prompt(
    config: ModelConfig, tokens: ArrayLike, lengths: ArrayLike | None
) -> tuple[Int32[Array | np.ndarray, "B T"], Int32[Array | np.ndarray, "B"]]:
    """Tokens and lengths as int32 arrays of numpy, or of jax where one of them is traced.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a length outside [1, T], or shapes that do not fit.
    """
    if is_traced(tokens, lengths):
        tokens = jnp.asarray(tokens)
        full = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
        return tokens.astype(jnp.int32), full if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
    tokens = integers("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, length], got {tokens.shape=}; for one prompt pass tokens[None]")
    if 0 in tokens.shape:
        raise ValueError(f"the prompt is empty, got {tokens.shape=}; it must have at least one token a row")
    batch, length = tokens.shape
    lengths = np.full(batch, length) if lengths is None else integers("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have one entry a row, got {lengths.shape=} for {tokens.shape=}")
    if lengths.min() < 1 or lengths.max() > length:
        raise ValueError(f"lengths must be in [1, {length}] (an empty prompt has no answer), got {lengths.tolist()}")
    valid = np.arange(length)[None, :] < lengths[:, None]
    check_vocabulary(config, tokens[valid])
    # Padding may be any number; its result is never used, but it must be a valid index of the embedding.
    tokens = np.where(valid, tokens, 0)
    return tokens.astype(np.int32), lengths.astype(np.int32)


def check_step(
    config: ModelConfig, token: ArrayLike, active: ArrayLike | None
) -> tuple[Int32[Array, "B"], Bool[Array, "B"]]:
    """One token per row as int32, and the rows to append to as bool.

    Raises:
        ValueError: an active row's token outside the vocabulary, or shapes that do not fit.
    """
    ids = jnp.asarray(token) if is_traced(token) else integers("token", token)
    rows = np.ones(ids.shape, bool) if active is None else active
    rows = jnp.asarray(rows) if is_traced(rows) else np.asarray(rows)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"token must be [batch] integers, got {ids.dtype}{ids.shape}")
    if rows.shape != ids.shape or rows.dtype != bool:
        raise ValueError(f"active must be a bool for each of {ids.shape[0]} rows, got {rows.dtype}{rows.shape}")
    if not is_traced(ids, rows):
        check_vocabulary(config, np.asarray(ids)[rows])
        ids = np.where(rows, ids, 0)  # The token of an inactive row may be any number.
    return jnp.asarray(ids).astype(jnp.int32), jnp.asarray(rows)


def check_vocabulary(config: ModelConfig, tokens: np.ndarray) -> None:
    """Raise ValueError for a token id outside the vocabulary, which an embedding look-up would silently clamp."""
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"token ids must be in [0, {config.vocab_size}), got {int(tokens[outside].flat[0])}: "
            "is this the tokenizer of another model?"
        )


def check_cache(
    model: Model, cache: KVCache, count: Int[Array | np.ndarray, "B"] | Bool[Array | np.ndarray, "B"]
) -> None:
    """Check that the cache is of this model, and that `count` more tokens fit into each of its rows.

    Warns once if they exceed the positions that the model was trained for.

    Raises:
        ValueError: a cache of another model, batch or mesh, one that is too short, or one that was donated.
    """
    instance("cache", cache, KVCache, "KVCache.init makes one")
    if model.is_fsdp:
        raise ValueError("the model was loaded with fsdp=True, to train with: load it without, for inference")
    config, sizes = model.config, MeshSize.of(model.mesh)
    if cache.mesh != model.mesh:
        places = [MeshSize.of(mesh) if mesh is not None else "one device" for mesh in (cache.mesh, model.mesh)]
        raise ValueError(f"the cache is on {places[0]}, the model on {places[1]}: give both the same mesh=")
    expected = (config.num_layers, sizes.kv_heads(config), config.head_dim, count.shape[0])
    actual = (*cache.is_retrieval.shape, cache.head_dim, cache.batch_size)
    if actual != expected:
        raise ValueError(
            f"the cache was made for (layers, kv heads, head dim, batch) = {actual}, model and prompt have {expected}; "
            "make one with KVCache.init(model.config, pattern, batch_size, max_length)"
        )
    own = {layer: cache.window(layer) for layer in cache.window_layers}
    if own != {layer: config.window(layer) for layer in config.window_layers}:
        raise ValueError(
            "the cache was made for a model whose layers have other windows: make one with KVCache.init(model.config, "
            "pattern, batch_size, max_length)"
        )
    if is_traced(cache, count):
        return
    cache.check_alive()
    if (
        model.mesh is not None
        and not is_traced(model)
        and not np.array_equal(np.asarray(model.order), np.asarray(cache.order))
    ):
        raise ValueError(
            "on this mesh, the model's heads are placed for another pattern than the cache's: load the model for the "
            "pattern that it will serve, load_model(..., mesh=mesh, pattern=pattern)"
        )
    length, count = np.asarray(cache.length), np.asarray(count, np.int64)
    total = length + count
    if (total > cache.max_length).any():
        row = int(total.argmax())
        raise ValueError(
            f"row {row} has {length[row]} tokens and {count[row]} more make {total[row]}, but the cache has "
            f"max_length={cache.max_length}: make a longer one, or ask for fewer tokens"
        )
    if total.max() > config.trained_positions and config not in _warned:
        _warned.add(config)
        warnings.warn(
            f"{total.max()} tokens of context, but the model was trained for {config.trained_positions}: "
            "expect worse answers beyond that",
            stacklevel=4,
        )


def warn_of_quantization(model: Model, cache: KVCache) -> None:
    """Warn once in a process that quantized numbers cost time on a CPU, which has no instructions to unpack them."""
    if _warned_of_quantization or is_traced(model, cache) or jax.default_backend() != "cpu":
        return
    config = model.config
    stored = cache.dtype.name.replace("uint", "int")
    dtypes = {"weight_dtype": config.weight_dtype, "embed_dtype": config.embed_dtype, "kv_dtype": stored}
    quantized = {name: value for name, value in dtypes.items() if value in get_args(WeightDtype)}
    if quantized:
        _warned_of_quantization.update(quantized)
        listed = " and ".join(f"{spelling.get()(name)} {value}" for name, value in quantized.items())
        warnings.warn(f"on a CPU, {listed} saves memory and costs time: use it where memory is short", stacklevel=4)


def check_generation(
    config: ModelConfig,
    *,
    sampler: Sampler,
    key: object,
    eos_ids: Sequence[int],
    cache: KVCache | None,
    **of_new_cache: object,
) -> tuple[int, ...]:
    """Check how tokens are generated and return the EOS ids; `of_new_cache` are options that only a new cache takes.

    Raises:
        ValueError: a random sampler without a key, an EOS id outside the vocabulary, arguments of other types, or an
            option that does not go with a cache.
    """
    instance("sampler", sampler, Sampler, "for example Greedy()")
    if cache is not None:
        instance("cache", cache, KVCache)
    for name, value in of_new_cache.items():
        if value is not None and cache is not None:
            raise ValueError(f"the cache already has a {name}: give {name} or cache, not both")
    if sampler.is_random and key is None:
        raise ValueError(f"{type(sampler).__name__} draws at random: pass key=, a jax.random key or a seed")
    return check_ids(config, eos_ids)


def check_ids(config: ModelConfig, eos_ids: Any) -> tuple[int, ...]:
    """Tokens that end a row, as Python integers.

    Raises:
        ArgumentError: anything but a tuple, list or array of integers.
        ValueError: a token outside the vocabulary.
    """
    if not isinstance(eos_ids, tuple | list | np.ndarray):
        raise ArgumentError("eos_ids", f"must be a tuple of token ids, got {eos_ids!r}")
    ids = tuple(whole_number("an id of eos_ids", token, -1) for token in eos_ids)
    check_vocabulary(config, np.asarray(ids, np.int64))
    return ids


def check_key(name: str, key: Any) -> Any:
    """A seed as an `int`, or a key of random numbers; None is neither.

    Raises:
        ArgumentError: anything but an integer from 0 to the largest int64, or a `jax.random` key.
    """
    if isinstance(key, jax.Array) and not jnp.issubdtype(key.dtype, jnp.signedinteger):
        is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
        if not is_key and (key.dtype != jnp.uint32 or key.shape != (2,)):
            raise ArgumentError(name, f"must be one jax.random key or a seed, got {key.dtype}{key.shape}")
        return key
    return None if key is None else seed_number(name, key)


def check_history(config: ModelConfig, history: ArrayLike, batch: int) -> Int[np.ndarray, "B n"]:
    """Token ids that each row has seen before its prompt.

    Raises:
        ValueError: another type or shape, or a token outside the vocabulary.
    """
    tokens = check_rows("history", history, batch)
    check_vocabulary(config, tokens)
    return tokens
