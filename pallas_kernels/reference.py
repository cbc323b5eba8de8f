"""Dense attention, obviously right: the oracle of every test. Memory grows with T times S; use it on small inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.blocks import MASKED
from pallas_kernels.mixing import mix
from pallas_kernels.quantized import read, read_dtype
from pallas_kernels.types import Heads, Partial, Pools, TokenShards
from pallas_kernels.window import Window, consecutive


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
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.prefill_attention`."""
    return _prefill(q, k, v, pools, heads, None, start, lengths, window).out


def prefill_partial(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    shards: TokenShards,
    window: Window,
) -> Partial:
    """A device's part of `prefill_attention`: the tokens of its pools, and on the first of them the chunk."""
    return _prefill(q, k, v, pools, heads, shards, start, lengths, window)


def _prefill(q, k, v, pools, heads, shards, start, lengths, window):
    """Attention of a chunk and its log-sum-exp."""
    del lengths  # Padding is at the end of a row: causality hides it from every real token.
    own = consecutive(start, q.shape[1])
    counted = own if shards is None else jnp.where(shards.index == 0, own, -1)
    pool_pos = _pool_positions(pools, shards, start)
    ring_pos = window.positions(start) if pools.ring_k.shape[0] else pool_pos[:, :0]

    def one_head(q_h, k_h, v_h, is_retrieval, slot):
        every = _join(pools.full_k, pools.full_v, slot, pool_pos, k_h, v_h, counted)
        kept = _join(pools.ring_k, pools.ring_v, slot, ring_pos, k_h, v_h, own)
        return _choose(is_retrieval, _attend(q_h, every, own, None), _attend(q_h, kept, own, window))

    return _over_heads(one_head, q, k, v, heads)


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`: the same dense attention, with the newest token already in the pools."""
    return _decode(q, pools, heads, None, lengths, window).out


def decode_partial(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    shards: TokenShards,
    window: Window,
) -> Partial:
    """A device's part of `decode_attention`: the tokens of its pools."""
    return _decode(q, pools, heads, shards, lengths, window)


def _decode(q, pools, heads, shards, lengths, window):
    """Attention of one token a row and its log-sum-exp."""
    batch, _, head_dim = q.shape
    dtypes = (read_dtype(pool, q.dtype) for pool in (pools.full_k, pools.ring_k) if pool.shape[0])
    nothing = jnp.zeros((batch, 0, heads.slot.shape[0], head_dim), functools.reduce(np.promote_types, dtypes))
    own = lengths[:, None] - 1
    pool_pos = _pool_positions(pools, shards, lengths)
    ring_pos = window.positions(lengths) if pools.ring_k.shape[0] else pool_pos[:, :0]

    def one_head(q_h, k_h, v_h, is_retrieval, slot):
        none = own[:, :0]
        every = _join(pools.full_k, pools.full_v, slot, pool_pos, k_h, v_h, none)
        kept = _join(pools.ring_k, pools.ring_v, slot, ring_pos, k_h, v_h, none)
        return _choose(is_retrieval, _attend(q_h, every, own, None), _attend(q_h, kept, own, window))

    return jax.tree.map(lambda x: x[:, 0], _over_heads(one_head, q[:, None], nothing, nothing, heads))


def _pool_positions(pools, shards, length):
    """Position of the token in each entry of a retrieval slot once `length` tokens are in; -1 where there is none."""
    position = jnp.arange(pools.full_k.shape[2], dtype=jnp.int32)[None, :]
    position = position if shards is None else position * shards.count + shards.index
    return jnp.where(position < length[:, None], position, -1)


def _choose(is_retrieval, every, kept):
    return jax.tree.map(lambda x, y: jnp.where(is_retrieval, x, y), every, kept)


def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gates: Float[Array, "K"],
    *,
    window: Window,
    full: Float[Array, "B T N H"] | None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.gated_attention`."""
    full = full_attention(q, k, v) if full is None else full
    return mix(gates, full, _causal(q, k, v, window))


def full_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.full_attention`."""
    return _causal(q, k, v, None)


def _causal(q, k, v, window):
    """Every head over the sequence's own keys."""
    own = consecutive(jnp.zeros(q.shape[0], jnp.int32), q.shape[1])
    batch, length, num_heads, head_dim = q.shape
    groups = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], head_dim)
    attend = lambda q_h, k_h, v_h: _attend(q_h, (k_h, v_h, own), own, window).out  # noqa: E731
    return jax.vmap(attend, in_axes=2, out_axes=2)(groups, k, v).reshape(q.shape)


def _join(pool_k, pool_v, slot, pool_pos, k_h, v_h, own):
    """One head's cached and own keys, values and their positions, end to end."""
    cached_k = _slot(pool_k, slot, k_h.dtype) if pool_k.shape[0] else k_h[:, :0]
    cached_v = _slot(pool_v, slot, v_h.dtype) if pool_v.shape[0] else v_h[:, :0]
    pos = jnp.concatenate([pool_pos[:, : cached_k.shape[1]], own], axis=1)
    return jnp.concatenate([cached_k, k_h], axis=1), jnp.concatenate([cached_v, v_h], axis=1), pos


def _slot(pool, slot, dtype):
    """Keys or values of one slot."""
    return read(jax.tree.map(lambda x: x[slot], pool), dtype).astype(dtype)


def _attend(q_h, cached, q_pos, window):
    """Softmax attention of one KV head's query group `[B T G H]` over all keys `[B S H]`, masked by position."""
    nothing = jnp.full(q_h.shape[:-1], MASKED, jnp.float32)
    keys, values, k_pos = cached
    q_pos, k_pos = q_pos[:, :, None], k_pos[:, None, :]
    seen: Bool[Array, "B T S"] = k_pos <= q_pos if window is None else window.visible(q_pos, k_pos)
    seen = seen & (k_pos >= 0)
    if keys.shape[1] == 0:  # No key of this type at all: the caller discards this branch.
        return Partial(jnp.zeros_like(q_h), nothing)
    compute = np.promote_types(np.promote_types(np.float32, q_h.dtype), keys.dtype)
    scores = jnp.einsum("btgh,bsh->btgs", q_h.astype(compute), keys.astype(compute)) * q_h.shape[-1] ** -0.5
    scores = jnp.where(seen[:, :, None, :], scores, -jnp.inf)
    weights = jnp.where(seen.any(-1)[:, :, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
    log_sum = jnp.maximum(jax.nn.logsumexp(scores, axis=-1).astype(jnp.float32), nothing)
    return Partial(jnp.einsum("btgs,bsh->btgh", weights, values.astype(compute)).astype(q_h.dtype), log_sum)


def _over_heads(one_head, q, k, v, heads):
    """Map a function of one KV head over all of them, with the query heads of a group together."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    groups = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = jax.vmap(one_head, in_axes=(2, 2, 2, 0, 0), out_axes=2)(groups, k, v, heads.is_retrieval, heads.slot)
    return jax.tree.map(lambda x: x.reshape(batch, length, num_heads, *x.shape[4:]), out)
