"""The operations: they check their arguments, choose a backend, and merge what devices computed in parts."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.backends import candidates, find_backend
from pallas_kernels.certify.verdicts import SAFE, best, warn_without_kernel
from pallas_kernels.choices import repeated
from pallas_kernels.gpus import chip, device_kind
from pallas_kernels.merge import log_copies, merge_shards, with_sinks
from pallas_kernels.quantized import BITS, Quantized, Stored, hadamard, read, store
from pallas_kernels.segments import is_short
from pallas_kernels.trial import Operands, compiles
from pallas_kernels.types import Backend, Heads, Partial, Pools, Request, TokenShards, Unsupported
from pallas_kernels.window import Window


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
    sink_logits: Float[Array, "N"] | None = None,
    score_cap: float | None = None,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of one chunk of a prompt, for one layer, over the cache as it was *before* the chunk and the chunk.

    Retrieval heads see every earlier token, streaming heads exactly what `window` shows them (paper section 2.1),
    wherever the chunk begins. Scores are divided by `sqrt(H)`; softmax is in float32. Rows of the output beyond
    `lengths` are unspecified but finite.

    Args:
        q: queries after RoPE.
        k: the chunk's own keys after RoPE; they are not in the pools yet.
        v: the chunk's own values.
        pools: keys and values of all earlier tokens.
        heads: this layer's row of the head table.
        start: position of the chunk's first token, per row: the number of tokens in the pools.
        lengths: valid tokens of the chunk, per row; the rest is padding.
        window: what streaming heads see.
        sink_logits: of models that have them, the score of each query head for a learned sink without a value.
        score_cap: scores s become `score_cap * tanh(s / score_cap)`; None: they do not.
        shards: inside `jax.shard_map`, the devices that share the tokens of retrieval heads; None if this device has
            all. Each attends to its own tokens, and the parts are merged: no pool is gathered.
        backend: a name in `BACKENDS`; None takes `DUO_BACKEND`, else the fastest one that is right on this device, by
            its verdicts (`pallas_kernels.certify`).

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    options: dict[str, Any] = {"window": window, "score_cap": score_cap, "shards": shards, "backend": backend}
    part = prefill_part(q, k, v, pools, heads, start=start, lengths=lengths, **options)
    return _finished(part, sink_logits, heads, shards).astype(q.dtype)


def prefill_part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pools: Pools,
    heads: Heads,
    *,
    start: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    window: Window,
    score_cap: float | None = None,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Partial:
    """`prefill_attention` over the tokens of one of the devices that share them."""
    _check(q.shape[0], q.shape[2:], pools, heads, window)
    if k.shape != (*q.shape[:2], heads.slot.shape[0], q.shape[3]) or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, T, K, H] like {q.shape=}, got {k.shape=}, {v.shape=}")
    # Padding may hold NaN, which a weight of zero does not hide.
    is_valid = (jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None])[:, :, None, None]
    k, v = (jnp.where(is_valid, x, jnp.zeros((), x.dtype)) for x in (k, v))
    k = _as_stored(k, pools.full_k, pools.ring_k, heads, q.dtype)
    v = _as_stored(v, pools.full_v, pools.ring_v, heads, q.dtype)
    request = _request("prefill", q, (k, v), pools, heads.slot.shape[0], window, shards, score_cap)
    with jax.named_scope("prefill_attention"):
        turned, rows = _in_basis_of_pools(q, pools, heads), {"start": start, "lengths": lengths}
        chosen = choose(request, backend, Operands((turned, k, v, pools, heads), rows, shards))
        assert chosen.prefill is not None
        options = {} if score_cap is None else {"score_cap": score_cap}
        part = chosen.prefill(turned, k, v, pools, heads, **rows, window=window, shards=shards, **options)
        return part._replace(out=_in_basis_of_pools(part.out, pools, heads))


def decode_attention(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    sink_logits: Float[Array, "N"] | None = None,
    score_cap: float | None = None,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one new token per row, for one layer, over pools that contain its key and value already.

    Args:
        q: queries after RoPE, one token per row.
        pools: keys and values, the new token's included.
        heads: this layer's row of the head table.
        lengths: tokens in the cache, per row, the new one counted; the output of a row with none is unspecified.
        window: what streaming heads see.
        sink_logits: as in `prefill_attention`.
        score_cap: as in `prefill_attention`.
        shards: as in `prefill_attention`.
        backend: a name in `BACKENDS`; None takes `DUO_BACKEND`, else the fastest one that is right on this device, by
            its verdicts (`pallas_kernels.certify`).

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    options: dict[str, Any] = {"window": window, "score_cap": score_cap, "shards": shards, "backend": backend}
    part = decode_part(q, pools, heads, lengths=lengths, **options)
    return _finished(part, sink_logits, heads, shards).astype(q.dtype)


def decode_part(
    q: Float[Array, "B N H"],
    pools: Pools,
    heads: Heads,
    *,
    lengths: Int32[Array, "B"],
    window: Window,
    score_cap: float | None = None,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Partial:
    """`decode_attention` over the tokens of one of the devices that share them."""
    _check(q.shape[0], q.shape[1:], pools, heads, window)
    request = _request("decode", q, (), pools, heads.slot.shape[0], window, shards, score_cap)
    with jax.named_scope("decode_attention"):
        turned = _in_basis_of_pools(q, pools, heads)
        chosen = choose(request, backend, Operands((turned, pools, heads), {"lengths": lengths}, shards))
        assert chosen.decode is not None
        options = {} if score_cap is None else {"score_cap": score_cap}
        part = chosen.decode(turned, pools, heads, lengths=lengths, window=window, shards=shards, **options)
        return part._replace(out=_in_basis_of_pools(part.out, pools, heads))


def append_token(
    pools: Pools,
    heads: Heads,
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    *,
    start: Int32[Array, "B"],
    active: Bool[Array, "B"],
    window: Window,
    shards: TokenShards | None = None,
    backend: str | None = None,
) -> Pools:
    """Write the key and the value of one new token per row, for one layer.

    A token goes to its position in a retrieval head's slot, and to `window.index` of it in a streaming head's ring. One
    without room, without a page, or stored by another device is not written.

    Args:
        pools: keys and values of all earlier tokens.
        heads: this layer's row of the head table.
        k: keys after RoPE.
        v: values.
        start: position of the token, per row.
        active: rows with a token; nothing of the others is written.
        window: what streaming heads see.
        shards: as in `prefill_attention`.
        backend: as in `prefill_attention`; named ones without an `append` of their own write as `xla`.

    Returns:
        The new pools. The kernels write in place if the old ones are not used any more.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    _check(k.shape[0], k.shape[1:], pools, heads, window)
    if k.shape[1] != heads.slot.shape[0] or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, K, H] with {heads.slot.shape=}, got {k.shape=}, {v.shape=}")
    request = _request("append", k, (v,), pools, k.shape[1], window, shards)
    named = backend or os.environ.get("DUO_BACKEND")
    if named and find_backend(named).append is None:
        backend = "xla"
    with jax.named_scope("append_token"):
        rows = {"start": start, "active": active}
        chosen = choose(request, backend, Operands((pools, heads, k, v), rows, shards))
        assert chosen.append is not None
        return chosen.append(pools, heads, k, v, **rows, window=window, shards=shards)


def gated_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gates: Float[Array, "K"],
    *,
    window: Window,
    full: Float[Array, "B T N H"] | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention for training gates, for one layer: `gates * full + (1 - gates) * streaming` (paper section 2.2).

    Differentiable in q, k, v, `gates`, `full` and `sink_logits`; no cache. Memory is linear in T, forward and backward.

    Args:
        q: queries after RoPE.
        k: keys after RoPE.
        v: values.
        gates: one per KV head, in [0, 1].
        window: what streaming heads see.
        full: output of full attention to mix in ("teacher" mixing); None computes it from q, k and v ("self" mixing).
        sink_logits: as in `prefill_attention`; both terms have the sink.
        backend: a name in `BACKENDS`; None takes `DUO_BACKEND`, else the fastest one that is right on this device, by
            its verdicts (`pallas_kernels.certify`).

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    if gates.shape != k.shape[2:3]:
        raise ValueError(f"gates must be one per KV head, got {gates.shape=} with {k.shape=}")
    if full is not None and full.shape != q.shape:
        raise ValueError(f"full must have the queries' shape, got {full.shape=} with {q.shape=}")
    with jax.named_scope("gated_attention"):
        full = _training(q, k, v, None, sink_logits, backend) if full is None else full
        streaming = _training(q, k, v, window, sink_logits, backend)
        gate = jnp.repeat(gates, q.shape[2] // k.shape[2], total_repeat_length=q.shape[2])[None, None, :, None]
        # In the gates' type.
        return (gate * full.astype(gate.dtype) + (1 - gate) * streaming.astype(gate.dtype)).astype(full.dtype)


def full_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    window: Window | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention over a sequence's own keys, without a cache: the teacher's. Differentiable, memory linear in T.

    Args:
        q: queries after RoPE.
        k: keys after RoPE.
        v: values.
        window: what all heads see, in a layer with a window of its own; None: every earlier token.
        sink_logits: as in `prefill_attention`.
        backend: a name in `BACKENDS`; None takes `DUO_BACKEND`, else the fastest one that is right on this device, by
            its verdicts (`pallas_kernels.certify`).

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
        Unsupported: a backend that cannot do this, a NotImplementedError.
    """
    with jax.named_scope("full_attention"):
        return _training(q, k, v, window, sink_logits, backend)


def choose(request: Request, name: str | None = None, operands: Operands | None = None) -> Backend:
    """The named backend; without a name the one that a resumed run repeats, or that in `DUO_BACKEND`.

    Otherwise the fastest one with a verdict that it is right. One that was not named, and does not compile for the
    operands, is passed over.

    Raises:
        ValueError: an unknown name.
        Unsupported: the backend cannot run the request.
    """
    again, named = repeated(request), os.environ.get("DUO_BACKEND")
    if wanted := name or again or named:
        backend = find_backend(wanted)
        reason = backend.supports(request)
        if reason is not None:
            way = f"use backend={candidates(request)[0]!r}" if name else "unset DUO_BACKEND, or name another one"
            raise Unsupported(f"the {wanted} backend {reason}: {way}")
        if wanted in SAFE or name or named or _compiles(backend, request, operands):
            return backend
    able = candidates(request)
    if set(able) <= set(SAFE):
        warn_without_kernel(request)
    names = tuple(each for each in able if each != again)
    while (chosen := best(request, names)) not in SAFE:
        backend = find_backend(chosen)
        if _compiles(backend, request, operands):
            return backend
        names = tuple(each for each in names if each != chosen)
    return find_backend(chosen)


def _compiles(backend: Backend, request: Request, operands: Operands | None) -> bool:
    return operands is None or compiles(backend, request, operands)


def _finished(
    part: Partial, sink_logits: Array | None, heads: Heads | None = None, shards: TokenShards | None = None
) -> Array:
    """The output, once all keys were met: learned sinks are in no backend, and not in a part."""
    whole = part if shards is None else merge_shards(part, shards.axis)
    if sink_logits is None:
        return whole.out
    if shards is not None and heads is not None:
        sink_logits = sink_logits.astype(jnp.float32) + log_copies(heads, shards.count, sink_logits.shape[0])
    if sink_logits.shape != whole.log_sum.shape[-1:]:
        raise ValueError(f"sink_logits must be one per query head, got {sink_logits.shape=} with {whole.out.shape=}")
    return with_sinks(whole, sink_logits)


def _training(
    q: Array, k: Array, v: Array, window: Window | None, sink_logits: Array | None, backend: str | None
) -> Array:
    """Causal attention of retrieval heads, or of streaming heads with a window."""
    if q.shape[2] % k.shape[2] or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or v.shape != k.shape:
        raise ValueError(f"k and v must be [B, T, K, H] with K dividing N, got {q.shape=}, {k.shape=}, {v.shape=}")
    request = _request("training", q, (k, v), None, k.shape[2], window, None)
    chosen = choose(request, backend, Operands((q, k, v)))
    assert chosen.training is not None
    return _finished(chosen.training(q, k, v, window), sink_logits).astype(q.dtype)


def _request(
    operation: str,
    q: Array,
    own: tuple[Array, ...],
    pools: Pools | None,
    num_kv_heads: int,
    window: Window | None,
    shards: TokenShards | None,
    score_cap: float | None = None,
) -> Request:
    used = [pool for pool in pools.stored if pool.shape[0]] if pools else []
    arrays = [q, *own, *(pool for pool in used if not isinstance(pool, Quantized))]
    sizes = [kind[0].shape[2] for kind in (pools.full, pools.ring) if kind[0].shape[0]] if pools else []
    full = _stored_as(pools.full_k) if pools else None
    return Request(
        operation=operation,
        device=device_kind(),
        dtypes=frozenset(x.dtype.name for x in arrays),
        head_dim=q.shape[-1],
        group=q.shape[-2] // num_kv_heads,
        bits=frozenset(pool.bits for pool in used if isinstance(pool, Quantized)),
        capacities=tuple(sizes),
        page=None if pools is None else pools.page,
        is_sharded=shards is not None,
        is_short=operation == "prefill" and full in BITS and is_short(q, num_kv_heads),
        capability=chip().capability,
        window=window,
        score_cap=score_cap,
        q=q.dtype.name,
        full=full,
        ring=_stored_as(pools.ring_k) if pools else None,
    )


def _stored_as(pool: Stored) -> str | None:
    """How a pool is stored; None if it has no slot."""
    if not pool.shape[0]:
        return None
    return f"int{pool.bits}" if isinstance(pool, Quantized) else pool.dtype.name


def _in_basis_of_pools(x: Float[Array, "*rows N H"], pools: Pools, heads: Heads) -> Float[Array, "*rows N H"]:
    """Queries or outputs, in the Hadamard basis or back from it where a head's pool is quantized: its own inverse."""
    full, ring = (isinstance(kind[0], Quantized) and kind[0].shape[0] > 0 for kind in (pools.full, pools.ring))
    if not full and not ring:
        return x
    is_turned = jnp.where(heads.is_retrieval, full, ring)
    group = x.shape[-2] // is_turned.shape[0]
    is_turned = jnp.repeat(is_turned, group, total_repeat_length=x.shape[-2])[:, None]
    return jnp.where(jnp.broadcast_to(is_turned, x.shape), hadamard(x), x)


def _as_stored(
    x: Float[Array, "B T K H"], full: Stored, ring: Stored, heads: Heads, dtype: jnp.dtype
) -> Float[Array, "B T K H"]:
    """A chunk's keys or values as attention will read them from the cache: results must not depend on the chunks."""
    kinds = [pool for pool in (full, ring) if pool.shape[0]]
    rounded = [read(store(x, pool), dtype) for pool in kinds]
    if len(kinds) == 2 and kinds[0].dtype != kinds[1].dtype:
        common = np.promote_types(rounded[0].dtype, rounded[1].dtype)
        is_retrieval = heads.is_retrieval[None, None, :, None]
        return jnp.where(is_retrieval, rounded[0].astype(common), rounded[1].astype(common))
    return rounded[0]


def _check(batch: int, q_heads: tuple[int, ...], pools: Pools, heads: Heads, window: Window) -> None:
    num_heads, head_dim = q_heads
    num_kv_heads = heads.slot.shape[0]
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads=} and {num_kv_heads=}")
    for name, pool in zip(Pools._fields, pools.stored, strict=False):
        is_paged = name.startswith("full") and pools.pages is not None
        rows = pool.shape[1] if is_paged else batch
        if pool.shape[1] != rows or pool.shape[3] != head_dim:
            raise ValueError(f"{name} must be [P, {rows}, S, {head_dim}] to fit the queries, got {pool.shape}")
    if pools.pages is not None and pools.pages.shape[0] != batch:
        raise ValueError(f"the page table must have a row for each of {batch} rows, got {pools.pages.shape=}")
    if pools.ring_k.shape[0] and pools.ring_k.shape[2] != window.size:
        raise ValueError(f"a ring must have window.size entries, got {pools.ring_k.shape=} and {window=}")
