"""Dense attention, obviously right: the oracle of every test. Memory grows with T times S; use it on small inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.mixing import mix
from pallas_kernels.positions import consecutive, ring_positions, visible
from pallas_kernels.quantized import read, read_dtype
from pallas_kernels.types import Heads, Pools


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    sink_size: int,
    recent_size: int,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.prefill_attention`."""
    del lengths  # Padding is at the end of a row: causality hides it from every real token.
    sizes = {"sink_size": sink_size, "recent_size": recent_size}
    own = consecutive(start, q.shape[1])
    pool_pos = jnp.arange(pools.retrieval_k.shape[2], dtype=jnp.int32)[None, :]
    pool_pos = jnp.where(pool_pos < start[:, None], pool_pos, -1)
    ring_pos = ring_positions(start, **sizes) if pools.streaming_k.shape[0] else pool_pos[:, :0]

    def one_head(q_h, k_h, v_h, is_retrieval, slot):
        every = _join(pools.retrieval_k, pools.retrieval_v, slot, pool_pos, k_h, v_h, own)
        kept = _join(pools.streaming_k, pools.streaming_v, slot, ring_pos, k_h, v_h, own)
        return jnp.where(is_retrieval, _attend(q_h, every, own, {}), _attend(q_h, kept, own, sizes))

    return _over_heads(one_head, q, k, v, heads)


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    sink_size: int,
    recent_size: int,
) -> Float[Array, "B N H"]:
    """See `pallas_kernels.decode_attention`: the same dense attention, with the newest token already in the pools."""
    batch, _, head_dim = q.shape
    dtypes = (read_dtype(pool, q.dtype) for pool in (pools.retrieval_k, pools.streaming_k) if pool.shape[0])
    nothing = jnp.zeros((batch, 0, heads.slot.shape[0], head_dim), functools.reduce(np.promote_types, dtypes))
    sizes = {"sink_size": sink_size, "recent_size": recent_size}
    own = lengths[:, None] - 1
    pool_pos = jnp.arange(pools.retrieval_k.shape[2], dtype=jnp.int32)[None, :]
    pool_pos = jnp.where(pool_pos < lengths[:, None], pool_pos, -1)
    ring_pos = ring_positions(lengths, **sizes) if pools.streaming_k.shape[0] else pool_pos[:, :0]

    def one_head(q_h, k_h, v_h, is_retrieval, slot):
        none = own[:, :0]
        every = _join(pools.retrieval_k, pools.retrieval_v, slot, pool_pos, k_h, v_h, none)
        kept = _join(pools.streaming_k, pools.streaming_v, slot, ring_pos, k_h, v_h, none)
        return jnp.where(is_retrieval, _attend(q_h, every, own, {}), _attend(q_h, kept, own, sizes))

    return _over_heads(one_head, q[:, None], nothing, nothing, heads)[:, 0]


def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gates: Float[Array, "K"],
    *,
    sink_size: int,
    recent_size: int,
    full: Float[Array, "B T N H"] | None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.gated_attention`."""
    full = full_attention(q, k, v) if full is None else full
    return mix(gates, full, _causal(q, k, v, {"sink_size": sink_size, "recent_size": recent_size}))


def full_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.full_attention`."""
    return _causal(q, k, v, {})


def _causal(q, k, v, sizes):
    """Every head over the sequence's own keys."""
    own = consecutive(jnp.zeros(q.shape[0], jnp.int32), q.shape[1])
    batch, length, num_heads, head_dim = q.shape
    groups = q.reshape(batch, length, k.shape[2], num_heads // k.shape[2], head_dim)
    attend = lambda q_h, k_h, v_h: _attend(q_h, (k_h, v_h, own), own, sizes)  # noqa: E731
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


def _attend(q_h, cached, q_pos, sizes):
    """Softmax attention of one KV head's query group `[B T G H]` over all keys `[B S H]`, masked by position."""
    keys, values, k_pos = cached
    q_pos, k_pos = q_pos[:, :, None], k_pos[:, None, :]
    seen: Bool[Array, "B T S"] = visible(q_pos, k_pos, **sizes) if sizes else k_pos <= q_pos
    seen = seen & (k_pos >= 0)
    if keys.shape[1] == 0:  # No key of this type at all: the caller discards this branch.
        return jnp.zeros_like(q_h)
    compute = np.promote_types(np.promote_types(np.float32, q_h.dtype), keys.dtype)
    scores = jnp.einsum("btgh,bsh->btgs", q_h.astype(compute), keys.astype(compute)) * q_h.shape[-1] ** -0.5
    scores = jnp.where(seen[:, :, None, :], scores, -jnp.inf)
    weights = jnp.where(seen.any(-1)[:, :, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("btgs,bsh->btgh", weights, values.astype(compute)).astype(q_h.dtype)


def _over_heads(one_head, q, k, v, heads):
    """Map a function of one KV head over all of them, with the query heads of a group together."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = heads.slot.shape[0]
    groups = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = jax.vmap(one_head, in_axes=(2, 2, 2, 0, 0), out_axes=2)(groups, k, v, heads.is_retrieval, heads.slot)
    return out.reshape(batch, length, num_heads, head_dim)
