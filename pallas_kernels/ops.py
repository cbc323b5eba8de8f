"""The operations: they validate, pick a backend, or raise for a named one that cannot.

A backend is a module of this package with the operations that it has as functions; a new one is a file beside its
siblings and its name in `BACKENDS`. It is imported when it is first used: some need what not every machine has.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpus import device_kind
from pallas_kernels.merge import merge
from pallas_kernels.quantized import Stored, read, store
from pallas_kernels.types import Heads, Pools, TokenShards, Unsupported
from pallas_kernels.window import Window

BACKENDS = ("reference", "xla", "triton", "jax_triton", "mosaic")

# Kinds of device (`jax.devices()[0].device_kind`) and the best backend whose numerics were verified there, by committed
# results of `python -m duo_eval.gpu_suite`. Without an entry: `xla`.
VERIFIED: dict[str, str] = {"cpu": "xla"}


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of one chunk of a prompt, for one layer, over the cache as it was *before* the chunk and the chunk.

    Retrieval heads see every earlier token; streaming heads the sinks and the recent tokens of `window`
    (paper section 2.1), exactly, wherever the chunk begins. Scores are divided by
    `sqrt(H)`; softmax is in float32. Rows of the output beyond `lengths` are unspecified but finite.

    Args:
        q: queries after RoPE.
        k: the chunk's own keys after RoPE; they are not in the pools yet.
        v: the chunk's own values.
        pools: keys and values of all earlier tokens.
        heads: this layer's row of the head table.
        start: position of the chunk's first token, per row: the number of tokens in the pools.
        lengths: valid tokens of the chunk, per row; what follows is padding.
        window: what streaming heads see.
        shards: inside `jax.shard_map`, the devices that share the tokens of retrieval heads; None: this one has all.
            Each attends to what it holds, and their parts are merged: no pool is gathered.
        backend: a name in `BACKENDS`; None takes the best one verified on this kind of device.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    _check(q.shape[0], q.shape[2:], pools, heads, window)
    if k.shape != (*q.shape[:2], heads.slot.shape[0], q.shape[3]) or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, T, K, H] beside {q.shape=}, got {k.shape=}, {v.shape=}")
    k = _as_held(k, pools.full_k, pools.ring_k, heads, q.dtype)
    v = _as_held(v, pools.full_v, pools.ring_v, heads, q.dtype)
    rows = {"start": start, "lengths": lengths}
    with jax.named_scope("prefill_attention"):
        if shards is not None:
            part = _operation(backend, "prefill_partial")(q, k, v, pools, heads, shards=shards, **rows, window=window)
            return merge(part, shards.axis, q.dtype)
        return _operation(backend, "prefill_attention")(q, k, v, pools, heads, **rows, window=window)


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one new token a row, for one layer, over pools that hold its key and value already.

    Args:
        q: queries after RoPE, one token a row.
        pools: keys and values, the new token's included.
        heads: this layer's row of the head table.
        lengths: tokens in the cache, per row, the new one counted; the output of a row with none is unspecified.
        window: what streaming heads see.
        shards: inside `jax.shard_map`, the devices that share the tokens of retrieval heads; None: this one has all.
            Each attends to what it holds, and their parts are merged: no pool is gathered.
        backend: a name in `BACKENDS`; None takes the best one verified on this kind of device.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    _check(q.shape[0], q.shape[1:], pools, heads, window)
    rows = {"lengths": lengths}
    with jax.named_scope("decode_attention"):
        if shards is not None:
            part = _operation(backend, "decode_partial")(q, pools, heads, shards=shards, **rows, window=window)
            return merge(part, shards.axis, q.dtype)
        return _operation(backend, "decode_attention")(q, pools, heads, **rows, window=window)


def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gates: Float[Array, "K"],
    *,
    window: Window,
    full: Float[Array, "B T N H"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention for training gates, for one layer: `gates * full + (1 - gates) * streaming` (paper section 2.2).

    Differentiable in q, k, v, `gates` and `full`; no cache. Memory is linear in T, forward and backward.

    Args:
        q: queries after RoPE.
        k: keys after RoPE.
        v: values.
        gates: one per KV head, in [0, 1].
        window: what streaming heads see.
        full: output of full attention to mix in ("teacher" mixing); None computes it from q, k and v ("self" mixing).
        backend: a name in `BACKENDS`; None takes the best one verified on this kind of device.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    _check_training(q, k, v)
    if gates.shape != k.shape[2:3]:
        raise ValueError(f"gates must be one per KV head, got {gates.shape=} beside {k.shape=}")
    if full is not None and full.shape != q.shape:
        raise ValueError(f"full must have the queries' shape, got {full.shape=} beside {q.shape=}")
    with jax.named_scope("gated_attention"):
        return _operation(backend, "gated_attention")(q, k, v, gates, window=window, full=full)


def full_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention over a sequence's own keys, without a cache: the teacher's. Differentiable, memory linear in T.

    Args:
        q: queries after RoPE.
        k: keys after RoPE.
        v: values.
        backend: a name in `BACKENDS`; None takes the best one verified on this kind of device.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    _check_training(q, k, v)
    with jax.named_scope("full_attention"):
        return _operation(backend, "full_attention")(q, k, v)


def _as_held(
    x: Float[Array, "B T K H"], retrieval: Stored, streaming: Stored, heads: Heads, dtype: jnp.dtype
) -> Float[Array, "B T K H"]:
    """A chunk's keys or values as the cache will hold them: otherwise results would depend on where a chunk begins."""
    kinds = [pool for pool in (retrieval, streaming) if pool.shape[0]]
    held = [read(store(x, pool), dtype) for pool in kinds]
    if len(kinds) == 2 and (kinds[0].dtype != kinds[1].dtype):
        common = np.promote_types(held[0].dtype, held[1].dtype)
        of_type = heads.is_retrieval[None, None, :, None]
        return jnp.where(of_type, held[0].astype(common), held[1].astype(common))
    return held[0]


def _check_training(q: Array, k: Array, v: Array) -> None:
    if q.shape[2] % k.shape[2] or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, T, K, H] with K dividing N, got {q.shape=}, {k.shape=}, {v.shape=}")


def _check(batch: int, q_heads: tuple[int, ...], pools: Pools, heads: Heads, window: Window) -> None:
    num_heads, head_dim = q_heads
    num_kv_heads = heads.slot.shape[0]
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads=} and {num_kv_heads=}")
    for name, pool in zip(Pools._fields, pools.stored, strict=False):
        if pool.shape[1] != batch or pool.shape[3] != head_dim:
            raise ValueError(f"{name} must be [P, {batch}, S, {head_dim}] beside the queries, got {pool.shape}")
    if pools.ring_k.shape[0] and pools.ring_k.shape[2] != window.size:
        raise ValueError(f"a ring must have window.size entries, got {pools.ring_k.shape=} and {window=}")


def _operation(backend: str | None, operation: str) -> Callable[..., Any]:
    name = _default_backend(device_kind()) if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; there are {', '.join(BACKENDS)}")
    found = getattr(importlib.import_module(f"pallas_kernels.{name}"), operation, None)
    if found is None:
        raise Unsupported(f"the {name} backend has no {operation}: use backend='triton'")
    return found


@cache
def _default_backend(kind: str) -> str:
    if kind not in VERIFIED:
        warnings.warn(f"no attention backend is verified on {kind!r} yet: using 'xla'", stacklevel=4)
    return VERIFIED.get(kind, "xla")
