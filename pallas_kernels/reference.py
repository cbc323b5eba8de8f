"""Dense attention, obviously right: the oracle of every test. Memory grows with T times S; use it on small inputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.append import scatter
from pallas_kernels.merge import MASKED, capped
from pallas_kernels.quantized import Stored, read, read_dtype
from pallas_kernels.types import Backend, Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window, consecutive


def prefill(
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
    score_cap: float | None = None,
) -> Partial:
    """See `pallas_kernels.prefill_attention`; of several shards, the first counts the chunk's own keys."""
    del lengths  # Padding is at the end of a row: causality hides it from every real token.
    own = consecutive(start, q.shape[1])
    counted = own if shards is None else jnp.where(shards.index == 0, own, -1)
    return _over_pools(q, k, v, pools, heads, (own, counted), start, window, shards, None, score_cap)


def decode(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    score_cap: float | None = None,
) -> Partial:
    """See `pallas_kernels.decode_attention`: the same dense attention, with the newest token already in the pools."""
    dtypes = (read_dtype(pool, q.dtype) for pool in (pools.full_k, pools.ring_k) if pool.shape[0])
    nothing = jnp.zeros((len(q), 0, heads.slot.shape[0], q.shape[2]), functools.reduce(np.promote_types, dtypes))
    q_pos, none = lengths[:, None] - 1, jnp.zeros((len(q), 0), jnp.int32)
    own = none, none
    part = _over_pools(q[:, None], nothing, nothing, pools, heads, own, lengths, window, shards, q_pos, score_cap)
    return jax.tree.map(lambda x: x[:, 0], part)


def training(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], window: Window | None
) -> Partial:
    """Every head over the sequence's own keys."""
    own = consecutive(jnp.zeros(q.shape[0], jnp.int32), q.shape[1])

    def attend(q_h: Array, k_h: Array, v_h: Array) -> Partial:
        return _attend(q_h, (k_h, v_h, own), own, window)

    part = jax.vmap(attend, in_axes=2, out_axes=2)(_by_kv_head(q, k.shape[2]), k, v)
    return Partial(part.out.reshape(q.shape), part.log_sum.reshape(q.shape[:3]))


def _over_pools(
    q: Array,
    k: Array,
    v: Array,
    pools: Pools,
    heads: Heads,
    own: tuple[Array, Array],
    cached: Int32[Array, "B"],
    window: Window,
    shards: TokenShards | None,
    q_pos: Int32[Array, "B T"] | None = None,
    score_cap: float | None = None,
) -> Partial:
    """Attention over the first `cached` tokens in the pools and over k and v, for heads of both types.

    `own` has the positions of k and v for streaming and for retrieval heads, -1 for keys that do not count. `q_pos` are
    the positions of the queries, by default those of k and v.
    """
    q_pos = own[0] if q_pos is None else q_pos
    index = jnp.arange(pools.capacity, dtype=jnp.int32)[None, :]
    index = index if shards is None else index * shards.count + shards.index
    full_pos = jnp.where(index < cached[:, None], index, -1)
    ring_pos = window.positions(cached) if pools.ring_k.shape[0] else full_pos[:, :0]

    def one_head(q_h: Array, k_h: Array, v_h: Array, is_retrieval: Array, slot: Array) -> Partial:
        context = _join(pools.full, pools.pages, slot, full_pos, (k_h, v_h, own[1]))
        seen = _join(pools.ring, None, slot, ring_pos, (k_h, v_h, own[0]))
        both = _attend(q_h, context, q_pos, None, score_cap), _attend(q_h, seen, q_pos, window, score_cap)
        return jax.tree.map(lambda x, y: jnp.where(is_retrieval, x, y), *both)

    args = _by_kv_head(q, heads.slot.shape[0]), k, v, heads.is_retrieval, heads.slot
    out = jax.vmap(one_head, in_axes=(2, 2, 2, 0, 0), out_axes=2)(*args)
    return jax.tree.map(lambda x: x.reshape(*q.shape[:3], *x.shape[4:]), out)


def _by_kv_head(q: Array, num_kv_heads: int) -> Float[Array, "B T K G H"]:
    batch, length, num_heads, head_dim = q.shape
    return q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _join(pool: tuple[Stored, Stored], pages: Array | None, slot: Array, pos: Array, own: Any) -> Any:
    """One head's cached and own keys, values and their positions, end to end."""
    *own_kv, own_pos = own
    if not pool[0].shape[0]:
        return own
    cached = (_slot(x, pages, slot, new.dtype) for x, new in zip(pool, own_kv, strict=True))
    joined = (jnp.concatenate(both, axis=1) for both in zip(cached, own_kv, strict=True))
    return (*joined, jnp.concatenate([pos, own_pos], axis=1))


def _slot(pool: Stored, pages: Array | None, slot: Array, dtype: Any) -> Float[Array, "B S H"]:
    """Keys or values of one slot."""

    def rows(x: Array) -> Array:
        if pages is None:
            return x[slot]
        in_order = jnp.take(x[slot], pages, axis=0, mode="clip")  # [B, n, page, ...]
        return in_order.reshape(pages.shape[0], -1, *x.shape[3:])

    return read(jax.tree.map(rows, pool), dtype).astype(dtype)


def _attend(q_h: Array, cached: Any, q_pos: Array, window: Window | None, score_cap: float | None = None) -> Partial:
    """Softmax attention of one KV head's query group `[B T G H]` over all keys `[B S H]`, masked by position."""
    keys, values, k_pos = cached
    nothing = jnp.full(q_h.shape[:-1], MASKED, jnp.float32)
    if keys.shape[1] == 0:  # No head has this type: the caller discards this branch.
        return Partial(jnp.zeros_like(q_h), nothing)
    # Memory without a token may hold NaN, which a weight of zero does not hide.
    values = jnp.where((k_pos >= 0)[:, :, None], values, jnp.zeros((), values.dtype))
    q_pos, k_pos = q_pos[:, :, None], k_pos[:, None, :]
    seen = (k_pos <= q_pos if window is None else window.visible(q_pos, k_pos)) & (k_pos >= 0)
    compute = np.promote_types(np.promote_types(np.float32, q_h.dtype), keys.dtype)
    scores = jnp.einsum("btgh,bsh->btgs", q_h.astype(compute), keys.astype(compute)) * q_h.shape[-1] ** -0.5
    scores = jnp.where(seen[:, :, None, :], capped(scores, score_cap), -jnp.inf)
    weights = jnp.where(seen.any(-1)[:, :, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
    log_sum = jnp.maximum(jax.nn.logsumexp(scores, axis=-1).astype(jnp.float32), nothing)
    return Partial(jnp.einsum("btgs,bsh->btgh", weights, values.astype(compute)).astype(q_h.dtype), log_sum)


BACKEND = Backend("reference", lambda request: None, prefill, decode, training, scatter, caps_scores=True)
